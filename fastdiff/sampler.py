"""The sampling loop: a table, a model, and one step function without a host read in it."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastdiff.checkpoint import load
from fastdiff.cuda_graph import NotCapturable, Pool, is_out_of_memory
from fastdiff.diffusion_model import DiffusionModel, Network
from fastdiff.guidance import (
    GuidancePlan,
    Interval,
    Labels,
    Weight,
    guided_rows,
    plan_guidance,
    resolve_labels,
    resolve_w,
)
from fastdiff.noise import Seed, resolve_seeds
from fastdiff.placement import (
    OutOfMemoryError,
    Placed,
    addresses,
    device_of,
    dtype_of,
    preferred_dtype,
    resolve_device,
    resolve_dtype,
)
from fastdiff.request import build_table, check_images, count_images, noise_row
from fastdiff.schedule import Steps
from fastdiff.solvers import Solver, StepTable
from fastdiff.step import Networks, Randomness, Shape, Step, bucket

__all__ = ["Cancelled", "OutOfMemoryError", "Sampler", "sample"]

# batch shapes whose buffers and graphs are kept; without graphs, buffers of one
KEPT = 4

Model = DiffusionModel | str | PathLike[str]
Noise = torch.Tensor | Callable[[int], torch.Tensor] | None
Callback = Callable[[int, int, float, torch.Tensor, torch.Tensor], Any] | None


class Cancelled(RuntimeError):
    """A callback returned False."""


class _Batch(NamedTuple):
    part: slice
    plan: GuidancePlan
    randomness: Randomness


class _Tabled(NamedTuple):
    """A table, and which of its rows are guided"""

    table: StepTable
    guided: npt.NDArray[np.bool_]


class Sampler:
    """Samples one model with one solver again and again; owns its buffers and graphs.

    model: a DiffusionModel, a bundled model's name, or a checkpoint's folder.
    steps: network evaluations and their times, see `fastdiff.schedule.timesteps`.
    solver: a name in SOLVERS, or a function (schedule, steps, *, prediction, clip_x0) -> StepTable, such as
        functools.partial(ddim, eps="network").
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

    The network is used in place where device, dtype and layout fit, and otherwise through a converted copy, which takes
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
        solver: str | Solver = "ddim",
        eta: float | None = None,
        guidance_interval: Interval = None,
        clip_x0: bool | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int | None = None,
        graph: bool | str = "auto",
        check_finite: bool = False,
    ) -> None:
        dtype = resolve_dtype(dtype)
        if not isinstance(graph, bool) and graph != "auto":
            raise ValueError(f"graph must be 'auto', True or False, got {graph!r}")
        if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer)):
            raise TypeError(f"batch_size must be an integer or None, got {batch_size!r}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not isinstance(check_finite, bool):
            raise TypeError(f"check_finite must be True or False, got {check_finite!r}")
        if not isinstance(model, DiffusionModel | str | PathLike):
            raise TypeError(f"model must be a DiffusionModel, a name or a folder, got {type(model).__name__}")
        loaded = None
        if isinstance(model, DiffusionModel):
            self.device = resolve_device(device) if device is not None else device_of(model)
        else:
            self.device = resolve_device(device)
            model = load(model, dtype=dtype)
            loaded = model.network
        self.model = model
        self._convert_to = dtype or preferred_dtype(model, self.device)
        self._set_dtype()
        if graph is True and not self._can_capture():
            raise ValueError(f"graph=True needs a CUDA device, got {self.device}; use graph='auto'")
        self._graph = graph
        self.set_table(steps=steps, solver=solver, eta=eta, guidance_interval=guidance_interval, clip_x0=clip_x0)
        if isinstance(loaded, torch.nn.Module):
            loaded.to(self.device)  # once all of the above was right
        self._placed = [Placed(self.device, self._convert_to) for _ in range(2)]
        self._running: list[Network] = []
        self.batch_size = batch_size
        self.check_finite = check_finite
        # those used last at the end
        self._steps: OrderedDict[Shape, Step] = OrderedDict()
        self._weights: object = None
        self._graphing = graph is not False and self._can_capture()
        self._pool: Pool | None = None
        self._done: torch.cuda.Event | None = None
        self._lock = threading.Lock()
        self._sampling: int | None = None  # the thread that holds the lock

    def set_table(
        self,
        *,
        steps: Steps = 50,
        solver: str | Solver = "ddim",
        eta: float | None = None,
        guidance_interval: Interval = None,
        clip_x0: bool | None = None,
    ) -> None:
        """Another table from the next call on, the arguments as Sampler's; graphs that serve it are kept.

        They serve every table of as many rows (up to 64, 128, 256, ...) that likewise has or lacks noise, history and
        a learned variance.
        """
        if clip_x0 is not None and not isinstance(clip_x0, bool):
            raise TypeError(f"clip_x0 must be True, False or None, got {clip_x0!r}")
        table = build_table(self.model, solver, steps, eta, clip_x0)
        # at once: another thread may be about to sample
        self._tabled = _Tabled(table, guided_rows(table.sigma_edm, guidance_interval))

    @property
    def table(self) -> StepTable:
        return self._tabled.table

    def _set_dtype(self) -> None:
        """Of the network's input and, where it is float64, of the state; a foreign network has its owner's"""
        self.dtype = self._convert_to or dtype_of(self.model)
        if self.dtype == torch.float64 and self.device.type != "cpu":
            raise ValueError(f"dtype=torch.float64 runs on the CPU only, got device {self.device}")
        self._state_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32

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
        progress: bool = False,
        callback: Callback = None,
    ) -> torch.Tensor:
        """Draw images: float32 (N, C, H, W), nominally in [-1, 1]; the arguments are those of `fastdiff.sample`."""
        model, tabled = self.model, self._tabled
        y = resolve_labels(labels, model.num_classes, model.null_label)
        weights = resolve_w(w)
        n = count_images(num_images, y, weights, seed, x_T)
        seeds = resolve_seeds(seed, n)
        shape = (n, *model.image_shape)
        if x_T is not None:
            check_images("x_T", x_T, shape)
        if isinstance(noise, torch.Tensor):
            check_images("noise", noise, (len(tabled.table), *shape))
        elif noise is not None and not callable(noise):
            raise TypeError(f"noise must be a tensor, a function of the row or None, got {type(noise).__name__}")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be a function or None, got {type(callback).__name__}")
        batches = []
        for start in range(0, n, self.batch_size or max(n, 1)):
            part = slice(start, min(start + (self.batch_size or n), n))
            plan = plan_guidance(
                y if y is None or y.ndim == 0 else y[part],
                weights if weights.ndim == 0 else weights[part],
                part.stop - part.start,
                num_classes=model.num_classes,
                null_label=model.null_label,
                has_null_model=model.null_model is not None,
            )
            randomness = Randomness(
                seeds=seeds[part],
                x_T=None if x_T is None else x_T[part],
                noise=None if noise is None else functools.partial(noise_row, noise, shape, part),
            )
            batches.append(_Batch(part, plan, randomness))
        with self._turn(), self._current_networks(), _progress_bar(progress, len(batches) * len(tabled.table)) as bar:
            size = min(self.batch_size or n, n)
            try:
                images = torch.empty(shape, dtype=self._state_dtype, device=self.device)
                for batch in batches:
                    step = self._step(tabled, batch.plan, size, noise is not None, callback is not None)
                    images[batch.part] = self._run(step, tabled, batch, bar, callback)
                return images
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                images = step = None  # type: ignore[assignment]
                why = str(error).splitlines()[0] if str(error) else "out of memory"
            # out here nothing of the attempt is held
            self._release()
            guided = sum(batch.plan.M for batch in batches)
            fits = self._largest_that_fits(tabled, shape, size, guided, noise is not None, callback is not None)
            remedy = f"batch_size={fits} fits" if fits else "not even one image fits"
            raise OutOfMemoryError(f"batch_size: {size} images at a time do not fit in memory, {remedy}: {why}", fits)

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
        """Networks on the device with the weights that they have now, in eval mode; copies are brought up to date."""
        model = self.model
        sources = [model.network, *([] if model.null_model is None else [model.null_model.network])]
        with contextlib.ExitStack() as stack:
            pairs = zip(self._placed, sources, strict=False)
            self._running = [stack.enter_context(place.current(network)) for place, network in pairs]
            self._set_dtype()
            # graphs hold addresses, and would go on reading memory that others own by now
            weights = [self.dtype, *map(addresses, self._running)]
            if weights != self._weights:
                self._release()
                self._weights = weights
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

    def _step(self, tabled: _Tabled, plan: GuidancePlan, size: int, has_noise: bool, wants_x0: bool) -> Step:
        """Buffers for a batch, with their graphs where there can be any

        size: images of the call's other batches; a short one takes their graph.
        """
        m = plan.M if tabled.guided.any() else 0
        if self._graphing:
            n = bucket(size)
            try:
                return self._kept_step(tabled, n, n if m == plan.N else bucket(m), has_noise, wants_x0)
            except NotCapturable as error:
                self._release()
                if self._graph is True:
                    raise ValueError(f"graph=True: the network cannot be captured: {error}; use graph='auto'") from None
                warnings.warn(f"sampling eagerly: the network cannot be captured: {error}", stacklevel=4)
                self._graphing = False
        return self._kept_step(tabled, plan.N, m, has_noise, wants_x0)

    def _kept_step(self, tabled: _Tabled, n: int, m: int, has_noise: bool, wants_x0: bool) -> Step:
        shape = Shape.of(tabled.table, n, m, has_noise and tabled.table.stochastic, wants_x0)
        step = self._steps.pop(shape, None)
        if step is None:
            while len(self._steps) >= (KEPT if self._graphing else 1):
                self._steps.popitem(last=False)
            step = Step(self._networks(), shape)
        if self._graphing:
            if self._pool is None and self.device.type == "cuda":
                self._pool = Pool(self.device)
            for live in {m if guided else 0 for guided in tabled.guided}:
                step.capture(live, self._pool)
        self._steps[shape] = step
        return step

    def _networks(self) -> Networks:
        model = self.model
        null_dtype = None
        if model.null_model is not None and isinstance(model.null_model.network, torch.nn.Module):
            null_dtype = self._convert_to or dtype_of(model.null_model)
        return Networks(
            network=self._running[0],
            null_network=None if model.null_model is None else self._running[1],
            image_shape=model.image_shape,
            has_labels=model.num_classes is not None,
            null_label=model.null_label,
            null_unlabelled=model.null_model is not None and model.null_model.num_classes is None,
            device=self.device,
            dtype=self.dtype,
            null_dtype=null_dtype,
            state_dtype=self._state_dtype,
        )

    def _largest_that_fits(
        self, tabled: _Tabled, shape: tuple[int, ...], size: int, guided: int, has_noise: bool, wants_x0: bool
    ) -> int:
        """The largest of size / 2, size / 4, ... images of which a row can be run beside all results, or 0

        guided: images of the call that have a null row; any of them may meet in a batch.
        """
        while size > 1:
            size //= 2
            try:
                self._try_row(tabled, shape, size, min(size, guided), has_noise, wants_x0)
                return size
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            finally:
                self._release()
        return 0

    def _try_row(
        self, tabled: _Tabled, shape: tuple[int, ...], n: int, m: int, has_noise: bool, wants_x0: bool
    ) -> None:
        images = torch.empty(shape, dtype=self._state_dtype, device=self.device)
        order = torch.arange(n)
        y = None if self.model.num_classes is None else torch.zeros_like(order)
        plan = GuidancePlan(order, y, (order < m).double())
        step = self._step(tabled, plan, n, has_noise, wants_x0)
        step.fill(tabled.table, plan, Randomness(torch.zeros_like(order), None, None))
        step(step.shape.m)
        del images

    def _run(self, step: Step, tabled: _Tabled, batch: _Batch, bar: Any, callback: Callback) -> torch.Tensor:
        """One batch, from x_T to images, in the caller's order"""
        plan, (table, guided) = batch.plan, tabled
        step.fill(table, plan, batch.randomness)
        order, inverse = plan.order.to(self.device), plan.inverse.to(self.device)
        for row in range(len(table)):
            if step.noise is not None and batch.randomness.noise is not None and table.c_noise[row] != 0:
                given = batch.randomness.noise(row)
                step.noise[: plan.N].copy_(given[order if given.device == order.device else plan.order])
            step(step.shape.m if guided[row] else 0)
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
    solver: str | Solver = "ddim",
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
    progress: bool = False,
    callback: Callback = None,
) -> torch.Tensor:
    """Draw images: float32 (N, C, H, W) on the model's device, nominally in [-1, 1]; float64 if dtype is float64.

    model: a DiffusionModel, a bundled model's name, or a checkpoint's folder.
    labels: one in [0, num_classes), or N of them; None: unconditional.
    w: guidance weight, a number or (N,): eps = (1 + w) * eps_cond - w * eps_null (2207.12598 equation 6). 0 is
        conditional and does not run the null half, -1 is unconditional; guidance_scale elsewhere is 1 + w.
    num_images: N, where nothing else says it; what is given must agree.
    seed: an int in [0, 2**63), which stands for `image_seeds(seed, N)`; N of them, one an image; or None: drawn from
        torch's default generator.
    x_T: (N, C, H, W), the noise to start from, instead of the seeds' own.
    noise: (rows, N, C, H, W), or a function of the row that returns (N, C, H, W) and the same for the same row: the
        noise of each row, instead of the seeds' own. Rows without noise do not ask for it.
    progress: show a bar.
    callback: called as callback(row, rows, t, x, x0) after each row of each batch, x and x0 (N, C, H, W) of that batch;
        returning False raises Cancelled.
    steps, solver, eta, guidance_interval, clip_x0, batch_size, device, dtype, graph, check_finite: see Sampler, which
        is the thing to keep where a model is sampled more than once.

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
    )
    return sampler(
        labels, w, num_images=num_images, seed=seed, x_T=x_T, noise=noise, progress=progress, callback=callback
    )


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
