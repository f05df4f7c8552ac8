"""The sampling loop: a table, a model, and one step function without a host read in it."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastdiff.classifier import Classifier
from fastdiff.cuda_graph import NotCapturable, Pool, is_out_of_memory
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.guidance import Interval, Labels, Weight, guided_rows
from fastdiff.loading import load
from fastdiff.networks import PlacedNetworks
from fastdiff.noise import Seed
from fastdiff.placement import OutOfMemoryError, device_of, resolve_device, resolve_dtype
from fastdiff.request import Batch, Noise, Request, build_table, resolve_classifier, resolve_request
from fastdiff.schedule import Steps
from fastdiff.solvers import Solver, StepTable
from fastdiff.step import Shape, Step, bucket

__all__ = ["Cancelled", "OutOfMemoryError", "Sampler", "sample"]

# batch shapes whose buffers and graphs are kept; without graphs, buffers of one
KEPT = 4

Model = DiffusionModel | str | PathLike[str]
Callback = Callable[[int, int, float, torch.Tensor, torch.Tensor], Any] | None


class Cancelled(RuntimeError):
    """A callback returned False."""


class _Tabled(NamedTuple):
    """A table, and which of its rows are guided"""

    table: StepTable
    guided: npt.NDArray[np.bool_]


class Sampler:
    """Samples one model with one solver again and again; owns its buffers and graphs.

    model: a DiffusionModel, or what fastdiff.load takes: a bundled model's name, a checkpoint's folder or file.
    steps: network evaluations and their times, see `fastdiff.schedule.timesteps`.
    solver: a name in SOLVERS, or a function (schedule, steps, *, prediction, clip_x0) -> StepTable, such as
        functools.partial(ddim, eps="network"). None is the model's own, with its spacing for an int steps, else "ddim".
    eta: DDIM's stochasticity in [0, 1]; None is 0. ValueError for a solver that has none.
    guidance_interval: (lo, hi) of sigma_edm = sigma / alpha: guided where lo < sigma_edm <= hi; None: everywhere.
    clip_x0: clip predictions to [-1, 1]; None asks the model.
    device: None is where the network lies, and a GPU if there is one for a model given by name or folder.
    dtype: compute dtype, or its name. None is the model's recorded one; else for fastdiff's own networks bfloat16 on
        CUDA and on CPUs with AMX, float32 elsewhere; other networks stay as they are. torch.float64 (CPU only) keeps
        table, state, noise and result in float64.
    batch_size: images at a time; None is all of them.
    graph: capture a step as a CUDA graph and replay it once a row: "auto" where there is a GPU and the network can be
        captured, with one warning where it cannot; True is a ValueError where it cannot be; False runs eagerly.
        A graph serves batches up to its bucket (1, 2, 3, 4, 6, 8, 12, ... images), shorter ones are padded; the four
        shapes that were used last are kept. Images are bitwise the same in all batches of a bucket.
    check_finite: look for NaN and infinity after every row (one host read a row) and raise FloatingPointError that
        names row and image.
    classifier: a Classifier of noisy images, a bundled one's name or a checkpoint's folder, whose gradient guides
        (2105.05233, section 4), with or without w; of the model's image_shape, schedule and classes.
    classifier_form: "mean" moves the mean of a stochastic step by its variance times the gradient (algorithm 1),
        "score" the eps of any solver (algorithm 2); None is "mean" for ddpm, "score" elsewhere.
    decode: return what the model's decode makes of the latents, where it has one, batch by batch; False: the latents.

    A network is used in place where device, dtype and layout fit, and otherwise through a converted copy, which takes
    over the network's weights and buffers at every call; `fastdiff.load(..., device=)` saves that. Weights that moved
    or were replaced are noticed at every call. Calls from several threads are served in turn.

    Of a network of fastdiff's protocol, time and label conditioning of all rows are computed before the loop: as one
    table of all blocks' modulations up to 256 MiB, above as one of their embeddings and a product in each step.

    Raises ValueError, TypeError or CheckpointError naming the argument, and OutOfMemoryError, after which the memory is
    free again and a smaller call succeeds.
    """

    def __init__(
        self,
        model: Model = "digits",
        *,
        steps: Steps = 50,
        solver: str | Solver | None = None,
        eta: float | None = None,
        guidance_interval: Interval = None,
        clip_x0: bool | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int | None = None,
        graph: bool | str = "auto",
        check_finite: bool = False,
        classifier: Classifier | str | PathLike[str] | None = None,
        classifier_form: str | None = None,
        decode: bool = True,
    ) -> None:
        dtype = resolve_dtype(dtype)
        if not isinstance(graph, bool) and graph != "auto":
            raise ValueError(f"graph must be 'auto', True or False, got {graph!r}")
        if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer)):
            raise TypeError(f"batch_size must be an integer or None, got {batch_size!r}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        for name, value in (("check_finite", check_finite), ("decode", decode)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if not isinstance(model, DiffusionModel | str | PathLike):
            raise TypeError(f"model must be a DiffusionModel, a name or a folder, got {type(model).__name__}")
        given = (model, classifier)
        if isinstance(model, DiffusionModel):
            self.device = resolve_device(device) if device is not None else device_of(model)
        else:
            self.device = resolve_device(device)
            model = load(model, dtype=dtype)
        if graph is True and not self._can_capture():
            raise ValueError(f"graph=True needs a CUDA device, got {self.device}; use graph='auto'")
        self._graph = graph
        self._placed = PlacedNetworks(model, resolve_classifier(classifier, model, dtype), self.device, dtype)
        self.set_table(
            steps=steps,
            solver=solver,
            eta=eta,
            guidance_interval=guidance_interval,
            clip_x0=clip_x0,
            classifier_form=classifier_form,
        )
        # what was loaded here, once all of the above was right
        for owner, whose in zip((self.model, self.classifier), given, strict=True):
            if owner is not None and owner is not whose and isinstance(owner.network, torch.nn.Module):
                owner.network.to(self.device)
        self.batch_size = batch_size
        self.check_finite = check_finite
        self.decode = decode
        # those used last at the end
        self._steps: OrderedDict[Shape, Step] = OrderedDict()
        self._addresses: object = None
        self._graphing = graph is not False and self._can_capture()
        self._pool: Pool | None = None
        self._done: torch.cuda.Event | None = None
        self._lock = threading.Lock()
        self._sampling: int | None = None  # the thread that holds the lock

    def set_table(
        self,
        *,
        steps: Steps = 50,
        solver: str | Solver | None = None,
        eta: float | None = None,
        guidance_interval: Interval = None,
        clip_x0: bool | None = None,
        classifier_form: str | None = None,
    ) -> None:
        """Another table from the next call on, all of the arguments as Sampler's; graphs that serve it are kept.

        They serve every table of as many rows (up to 64, 128, 256, ...) that likewise has or lacks noise, history and
        a learned variance.
        """
        if clip_x0 is not None and not isinstance(clip_x0, bool):
            raise TypeError(f"clip_x0 must be True, False or None, got {clip_x0!r}")
        table = build_table(self.model, solver, steps, eta, clip_x0)
        guided = guided_rows(table.sigma_edm, guidance_interval)
        if self.classifier is not None:
            table = table.with_classifier(classifier_form, guided)
        elif classifier_form is not None:
            raise ValueError(f"classifier_form needs a classifier, got {classifier_form!r} and classifier=None")
        # at once: another thread may be about to sample
        self._tabled = _Tabled(table, guided)

    @property
    def model(self) -> DiffusionModel:
        return self._placed.model

    @property
    def classifier(self) -> Classifier | None:
        return self._placed.classifier

    @property
    def table(self) -> StepTable:
        return self._tabled.table

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's input; a foreign network has its owner's."""
        return self._placed.dtype

    def _can_capture(self) -> bool:
        return self.device.type == "cuda"

    @property
    def timesteps(self) -> list[float]:
        """The network's time in each row, descending."""
        return self.table.t.tolist()

    def __call__(
        self,
        labels: Labels = None,
        w: Weight = 0.0,
        *,
        num_images: int | None = None,
        seed: Seed = None,
        x_T: torch.Tensor | None = None,
        noise: Noise = None,
        classifier_scale: Weight = 1.0,
        extra: Mapping[str, torch.Tensor] | None = None,
        progress: bool = False,
        callback: Callback = None,
    ) -> torch.Tensor:
        """Draw images: float32 (N, C, H, W), nominally in [-1, 1]; the arguments are those of `fastdiff.sample`.

        Where the model has a decode, its images (N, ...) instead, unless N is 0.
        """
        tabled = self._tabled
        request = resolve_request(
            self.model,
            self.classifier,
            len(tabled.table),
            self.batch_size,
            labels=labels,
            w=w,
            num_images=num_images,
            seed=seed,
            x_T=x_T,
            noise=noise,
            classifier_scale=classifier_scale,
            extra=extra,
            callback=callback,
        )
        total = len(request.batches) * len(tabled.table)
        with self._turn(), self._current_networks(), _progress_bar(progress, total) as bar:
            try:
                images = torch.empty(request.shape, dtype=self._networks.state_dtype, device=self.device)
                decoded = []
                for batch in request.batches:
                    step = self._step(tabled, request, batch, request.size)
                    images[batch.part] = self._run(step, tabled, batch, bar, callback)
                    if self.decode and self.model.decode is not None:
                        decoded.append(_decoded(self.model.decode, images[batch.part]))
                return torch.cat(decoded) if decoded else images
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                images = step = decoded = None  # type: ignore[assignment]
                why = str(error).splitlines()[0] if str(error) else "out of memory"
            # out here nothing of the attempt is held
            self._release()
            fits = self._largest_that_fits(tabled, request)
            remedy = f"batch_size={fits} fits" if fits else "not even one image fits"
            raise OutOfMemoryError(
                f"batch_size: {request.size} images at a time do not fit in memory, {remedy}: {why}", fits
            )

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time: they share the buffers. A call from inside a call would wait for itself."""
        if self._sampling == threading.get_ident():
            raise RuntimeError("this sampler is sampling already; a callback or network needs a Sampler of its own")
        # buffers outlive the call, and an inference tensor could not be written to outside inference mode
        # and the dtype is the sampler's to choose, not an autocast's around the call
        with (
            self._lock,
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            self._sampling = threading.get_ident()
            try:
                # the caller before may have used another stream
                if self._done is not None:
                    torch.cuda.current_stream(self.device).wait_event(self._done)
                yield
            finally:
                if self.device.type == "cuda":
                    stream = torch.cuda.current_stream(self.device)
                    self._done = stream.record_event()
                    # buffers go back to the stream that they were made on, which knows nothing of others
                    if any(step.stream != stream for step in self._steps.values()):
                        self._done.synchronize()
                self._sampling = None

    @contextlib.contextmanager
    def _current_networks(self) -> Iterator[None]:
        with self._placed.current() as self._networks:
            addresses = self._networks.addresses()
            if addresses != self._addresses:
                self._release()
                self._addresses = addresses
            yield

    def _release(self) -> None:
        """Drops every buffer and graph"""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self._steps.clear()
        self._pool = None
        if self.device.type == "cuda":
            # after a failed capture older versions of torch keep it open and refuse
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()

    def _step(self, tabled: _Tabled, request: Request, batch: Batch, size: int) -> Step:
        """Buffers for a batch, with their graphs where there can be any

        size: images of the call's other batches; a short one takes their graph.
        """
        plan = batch.plan
        m = plan.M if tabled.guided.any() else 0
        if self._graphing:
            n = bucket(size)
            try:
                return self._kept_step(tabled, request, batch, n, n if m == plan.N else bucket(m))
            except NotCapturable as error:
                self._release()
                if self._graph is True:
                    raise ValueError(f"graph=True: the network cannot be captured: {error}; use graph='auto'") from None
                warnings.warn(f"sampling eagerly: the network cannot be captured: {error}", stacklevel=4)
                self._graphing = False
        return self._kept_step(tabled, request, batch, plan.N, m)

    def _kept_step(self, tabled: _Tabled, request: Request, batch: Batch, n: int, m: int) -> Step:
        shape = Shape.of(
            tabled.table,
            n,
            m,
            has_noise=request.has_noise and tabled.table.stochastic,
            wants_x0=request.wants_x0,
            classified=batch.plan.classifier_scale is not None and bool(tabled.guided.any()),
            extra=batch.extra,
            dtype=self._networks.dtype,
        )
        step = self._steps.pop(shape, None)
        if step is None:
            while len(self._steps) >= (KEPT if self._graphing else 1):
                self._steps.popitem(last=False)
            step = Step(self._networks, shape)
        if self._graphing:
            if self._pool is None and self.device.type == "cuda":
                self._pool = Pool(self.device)
            for guided in set(tabled.guided.tolist()):
                step.capture(guided, self._pool)
        self._steps[shape] = step
        return step

    def _largest_that_fits(self, tabled: _Tabled, request: Request) -> int:
        """The largest of size / 2, size / 4, ... images of which a row can be run beside all results, or 0"""
        size = request.size
        while size > 1:
            size //= 2
            try:
                self._try_row(tabled, request, size)
                return size
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            finally:
                self._release()
        return 0

    def _try_row(self, tabled: _Tabled, request: Request, size: int) -> None:
        images = torch.empty(request.shape, dtype=self._networks.state_dtype, device=self.device)
        batch = request.trial(size)
        step = self._step(tabled, request, batch, size)
        step.fill(tabled.table, batch.plan, batch.randomness, batch.extra)
        step(True)
        if self.decode and self.model.decode is not None:
            _decoded(self.model.decode, torch.zeros_like(images[:size]))
        del images

    def _run(self, step: Step, tabled: _Tabled, batch: Batch, bar: Any, callback: Callback) -> torch.Tensor:
        """One batch, from x_T to images, in the caller's order"""
        plan, (table, guided) = batch.plan, tabled
        step.fill(table, plan, batch.randomness, batch.extra)
        order, inverse = plan.order.to(self.device), plan.inverse.to(self.device)
        for row in range(len(table)):
            if step.noise is not None and batch.randomness.noise is not None and table.c_noise[row] != 0:
                given = batch.randomness.noise(row)
                step.noise[: plan.N].copy_(given[order if given.device == order.device else plan.order])
            step(bool(guided[row]))
            bar.update()
            if self.check_finite:
                _check_row(step.x[inverse], table, row, batch.part.start)
            if callback is not None and step.x0 is not None:
                go_on = callback(row, len(table), float(table.t[row]), step.x[inverse], step.x0[inverse])
                if go_on is False:
                    raise Cancelled(f"the callback stopped sampling after row {row} of {len(table)}")
        return step.x[inverse]


def sample(
    model: Model = "digits",
    labels: Labels = None,
    w: Weight = 0.0,
    *,
    num_images: int | None = None,
    steps: Steps = 50,
    solver: str | Solver | None = None,
    eta: float | None = None,
    guidance_interval: Interval = None,
    clip_x0: bool | None = None,
    seed: Seed = None,
    x_T: torch.Tensor | None = None,
    noise: Noise = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    graph: bool | str = "auto",
    check_finite: bool = False,
    classifier: Classifier | str | PathLike[str] | None = None,
    classifier_scale: Weight = 1.0,
    classifier_form: str | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
    decode: bool = True,
    progress: bool = False,
    callback: Callback = None,
) -> torch.Tensor:
    """Draw images: float32 (N, C, H, W) on the model's device, nominally in [-1, 1]; float64 if dtype is float64.

    model: a DiffusionModel, or what fastdiff.load takes: a bundled model's name, a checkpoint's folder or file.
    labels: one in [0, num_classes), or N of them; None: unconditional. What a classifier is asked for, which alone
        takes them where the model is unconditional.
    w: guidance weight, a number or (N,): eps = (1 + w) * eps_cond - w * eps_null (2207.12598 equation 6). 0 is
        conditional and does not run the null half, -1 is unconditional; guidance_scale elsewhere is 1 + w.
    num_images: N, where nothing else says it; what is given must agree.
    seed: an int in [0, 2**63), which stands for `image_seeds(seed, N)`; N of them, one an image; or None: drawn from
        torch's default generator.
    x_T: (N, C, H, W), the noise to start from, instead of the seeds' own.
    noise: (rows, N, C, H, W), or a function of the row that returns (N, C, H, W) and the same for the same row: the
        noise of each row, instead of the seeds' own. Rows without noise do not ask for it.
    classifier_scale: a number or (N,), by which each image's gradient d log p(label | x_t) / dx_t of the classifier is
        multiplied; where it is 0 there is none, and where all are, the classifier does not run.
    extra: further inputs by name, tensors (N, ...), which network(x, t, y, **extra) takes for each row; those of
        floating point are cast to the compute dtype.
    progress: show a bar.
    callback: called as callback(row, rows, t, x, x0) after each row of each batch, x and x0 (N, C, H, W) of that batch;
        returning False raises Cancelled.
    steps, solver, eta, guidance_interval, clip_x0, batch_size, device, dtype, graph, check_finite, classifier,
        classifier_form, decode: see Sampler, which is the thing to keep where a model is sampled more than once.

    Raises ValueError, TypeError or CheckpointError naming the argument, before any work.
    """
    sampler = Sampler(
        model,
        steps=steps,
        solver=solver,
        eta=eta,
        guidance_interval=guidance_interval,
        clip_x0=clip_x0,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        graph=graph,
        check_finite=check_finite,
        classifier=classifier,
        classifier_form=classifier_form,
        decode=decode,
    )
    return sampler(
        labels,
        w,
        num_images=num_images,
        seed=seed,
        x_T=x_T,
        noise=noise,
        classifier_scale=classifier_scale,
        extra=extra,
        progress=progress,
        callback=callback,
    )


def _decoded(decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    images = decode(latents)
    if not isinstance(images, torch.Tensor) or images.ndim == 0 or len(images) != len(latents):
        got = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"model.decode must return a tensor ({len(latents)}, ...), an image a latent, got {got}")
    return images


def _check_row(x: torch.Tensor, table: StepTable, row: int, start: int) -> None:
    bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten()
    if len(bad):
        raise FloatingPointError(
            f"image {start + int(bad[0])} is not finite after row {row} of {len(table)} (t = {table.t[row]:g})"
        )


@contextlib.contextmanager
def _progress_bar(progress: bool, total: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, desc="sampling", unit="step", disable=not progress) as bar:
        yield bar
