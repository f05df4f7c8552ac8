"""The sampling loop: a table, a model, and one step function without a host read in it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch

from fastdiff.checkpoint import load
from fastdiff.diffusion_model import DiffusionModel
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
    DTYPES,
    device_of,
    dtype_of,
    eval_mode,
    placed,
    preferred_dtype,
    resolve_device,
    resolve_dtype,
)
from fastdiff.schedule import Steps
from fastdiff.solvers import SOLVERS, Solver, StepTable
from fastdiff_kernels import COEFS, STREAM_X_T, guided_step, load_row, philox_normal

__all__ = ["Cancelled", "Sampler", "sample"]

Model = DiffusionModel | str | PathLike[str]
Noise = torch.Tensor | Callable[[int], torch.Tensor] | None
Callback = Callable[[int, int, float, torch.Tensor, torch.Tensor], Any] | None


class Cancelled(RuntimeError):
    """A callback returned False."""


@dataclass
class _Buffers:
    """What one batch shape keeps on the device, at fixed addresses: N images, N + M network rows."""

    table: torch.Tensor  # (rows, NUM_COEFS)
    times: torch.Tensor  # (rows,)
    counter: torch.Tensor  # (1,) the next row
    coefs: torch.Tensor  # (NUM_COEFS,) the current row
    draw: torch.Tensor  # (1,) the current row's number
    x: torch.Tensor  # (N, C, H, W) state
    x0: torch.Tensor | None  # (N, C, H, W) predicted, where a callback wants it
    noise: torch.Tensor | None  # (N, C, H, W), where the caller brings it
    hist: torch.Tensor | None  # (N, C, H, W), where the solver has one
    seeds: torch.Tensor  # (N,)
    w: torch.Tensor  # (N,)
    x_net: torch.Tensor  # (N + M, C, H, W) the network's input
    t: torch.Tensor  # (N + M,)
    y: torch.Tensor | None  # (N + M,)


@dataclass(frozen=True)
class _Replay:
    """Where one batch's randomness comes from: its seeds, or the caller's own tensors."""

    seeds: torch.Tensor
    x_T: torch.Tensor | None
    noise: Callable[[int], torch.Tensor] | None


class Sampler:
    """Samples one model with one solver again and again; owns its buffers.

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
    graph: "auto" and False run eagerly; True is a ValueError as long as there is no graph capture.
    check_finite: look for NaN and infinity after every row (one host read a row) and raise FloatingPointError that
        names row and image.

    The network is used in place where device and dtype fit, and otherwise through a converted copy, which takes over
    the network's weights and buffers at every call; `fastdiff.load(..., device=)` saves that. Calls from several
    threads are served in turn; on a GPU they must share a stream.

    Raises ValueError, TypeError or CheckpointError naming the argument.
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
        if graph is True:
            raise ValueError("graph=True: this version runs eagerly and captures no graphs; use graph='auto'")
        if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer)):
            raise TypeError(f"batch_size must be an integer or None, got {batch_size!r}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if clip_x0 is not None and not isinstance(clip_x0, bool):
            raise TypeError(f"clip_x0 must be True, False or None, got {clip_x0!r}")
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
        self.dtype = self._convert_to or dtype_of(model)
        if self.dtype == torch.float64 and self.device.type != "cpu":
            raise ValueError(f"dtype=torch.float64 runs on the CPU only, got device {self.device}")
        self.table = _build_table(model, solver, steps, eta, clip_x0)
        self._guided = guided_rows(self.table.sigma_edm, guidance_interval)
        if isinstance(loaded, torch.nn.Module):
            loaded.to(self.device)  # once all of the above was right
        self._network = self._source = model.network
        self._state_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.batch_size = batch_size
        self.check_finite = check_finite
        self._buffers: tuple[tuple[int, int, bool, bool], _Buffers] | None = None
        self._lock = threading.Lock()
        self._sampling: int | None = None  # the thread that holds the lock

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
        model = self.model
        y = resolve_labels(labels, model.num_classes, model.null_label)
        weights = resolve_w(w)
        n = _count_images(num_images, y, weights, seed, x_T)
        seeds = resolve_seeds(seed, n)
        shape = (n, *model.image_shape)
        if x_T is not None:
            _check_images("x_T", x_T, shape)
        if isinstance(noise, torch.Tensor):
            _check_images("noise", noise, (len(self.table), *shape))
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
            )
            replay = _Replay(
                seeds=seeds[part],
                x_T=None if x_T is None else x_T[part],
                noise=None if noise is None else functools.partial(_noise_row, noise, shape, part),
            )
            batches.append((part, plan, replay))
        total = len(batches) * len(self.table)
        with self._turn(), self._current_network(), _progress_bar(progress, total) as bar:
            images = torch.empty(shape, dtype=self._state_dtype, device=self.device)
            for part, plan, replay in batches:
                images[part] = self._run(plan, replay, part.start, bar, callback)
        return images

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time: they share the buffers. A call from inside a call would wait for itself."""
        if self._sampling == threading.get_ident():
            raise RuntimeError("this sampler is sampling already; a callback or network needs a Sampler of its own")
        # buffers outlive the call, and an inference tensor could not be written to outside inference mode
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._sampling = threading.get_ident()
            try:
                yield
            finally:
                self._sampling = None

    @contextlib.contextmanager
    def _current_network(self) -> Iterator[None]:
        """The network on the device with the weights that it has now, in eval mode; a copy is brought up to date."""
        network = self.model.network
        copied = self._network if self._source is network and self._network is not network else None
        self._network = placed(network, self.device, self._convert_to, copied)
        self._source = network
        with eval_mode(self._network):
            yield

    def _run(self, plan: GuidancePlan, replay: _Replay, start: int, bar: Any, callback: Callback) -> torch.Tensor:
        """One batch, from x_T to images, in the caller's order; start is its first image's number in the call."""
        b = self._fill(plan, replay, callback is not None)
        inverse = plan.inverse.to(self.device)
        rows = len(self.table)
        for row in range(rows):
            if b.noise is not None and replay.noise is not None and self.table.c_noise[row] != 0:
                b.noise.copy_(replay.noise(row)[plan.order])
            self._step(b, plan.M if self._guided[row] else 0)
            bar.update()
            if self.check_finite:
                self._check_row(b.x[inverse], row, start)
            if callback is not None and b.x0 is not None:
                go_on = callback(row, rows, float(self.table.t[row]), b.x[inverse], b.x0[inverse])
                if go_on is False:
                    raise Cancelled(f"the callback stopped sampling after row {row} of {rows}")
        return b.x[inverse]

    def _fill(self, plan: GuidancePlan, replay: _Replay, wants_x0: bool) -> _Buffers:
        """Everything that differs between calls goes into the buffers here; the steps read nothing else."""
        key = (plan.N, plan.M, replay.noise is not None, wants_x0)
        if self._buffers is None or self._buffers[0] != key:
            self._buffers = None  # frees the old ones first
            self._buffers = (key, self._allocate(*key))
        b = self._buffers[1]
        b.seeds.copy_(replay.seeds[plan.order])
        b.w.copy_(plan.w)
        if b.y is not None and plan.y is not None:
            b.y[: plan.N].copy_(plan.y)
            if self.model.null_label is not None:
                b.y[plan.N :].fill_(self.model.null_label)
        if replay.x_T is None:
            b.x.copy_(philox_normal(b.seeds, self.model.image_shape, draw=0, stream=STREAM_X_T, dtype=b.x.dtype))
        else:
            b.x.copy_(replay.x_T[plan.order])
        b.x_net[: plan.N].copy_(b.x)
        b.x_net[plan.N :].copy_(b.x[: plan.M])
        if b.hist is not None:
            b.hist.zero_()
        b.counter.zero_()
        return b

    def _allocate(self, n: int, m: int, has_noise: bool, wants_x0: bool) -> _Buffers:
        def new(*shape: int, dtype: torch.dtype = self._state_dtype) -> torch.Tensor:
            layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
            return torch.zeros(shape, dtype=dtype, device=self.device).contiguous(memory_format=layout)

        shape = (n, *self.model.image_shape)
        table = torch.from_numpy(self.table.pack(COEFS)).to(self.device, self._state_dtype)
        return _Buffers(
            table=table,
            times=torch.from_numpy(self.table.t.copy()).to(self.device, self._state_dtype),
            counter=new(1, dtype=torch.int64),
            coefs=new(len(COEFS)),
            draw=new(1, dtype=torch.int64),
            x=new(*shape),
            x0=new(*shape) if wants_x0 else None,
            noise=new(*shape) if has_noise and self.table.stochastic else None,
            hist=new(*shape) if self.table.has_history else None,
            seeds=new(n, dtype=torch.int64),
            w=new(n),
            x_net=new(n + m, *self.model.image_shape, dtype=self.dtype),
            t=new(n + m),
            y=None if self.model.num_classes is None else new(n + m, dtype=torch.int64),
        )

    def _step(self, b: _Buffers, m: int) -> None:
        """One row: what a graph captures. m is 0 or M; no host read, no new buffer, no branch on device data."""
        live = len(b.x) + m
        load_row(b.table, b.times, b.counter, b.coefs, b.t, b.draw)
        out = self._network(b.x_net[:live], b.t[:live], None if b.y is None else b.y[:live])
        self._check_output(out, live)
        philox = self.table.stochastic and b.noise is None
        guided_step(
            b.x,
            out,
            b.coefs,
            b.w,
            x_net=b.x_net,
            x0=b.x0,
            hist=b.hist,
            noise=b.noise,
            seeds=b.seeds if philox else None,
            draw=b.draw if philox else None,
            learned=self.table.learned,
        )

    def _check_output(self, out: object, live: int) -> None:
        C, H, W = self.model.image_shape
        shapes = [(live, 2 * C, H, W)] if self.table.learned else [(live, C, H, W), (live, 2 * C, H, W)]
        narrower = [dtype for dtype in DTYPES.values() if dtype.itemsize <= self._state_dtype.itemsize]
        if isinstance(out, torch.Tensor) and out.dtype not in narrower:
            raise TypeError(f"network(x, t, y) must return {' or '.join(map(str, narrower))}, got {out.dtype}")
        if not isinstance(out, torch.Tensor) or tuple(out.shape) not in shapes:
            got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(
                f"network(x, t, y) must return a tensor of shape {' or '.join(map(str, shapes))}, got {got}"
            )

    def _check_row(self, x: torch.Tensor, row: int, start: int) -> None:
        bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten()
        if len(bad):
            raise FloatingPointError(
                f"image {start + int(bad[0])} is not finite after row {row} of {len(self.table)} "
                f"(t = {self.table.t[row]:g})"
            )


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


def _build_table(
    model: DiffusionModel, solver: str | Solver, steps: Steps, eta: float | None, clip_x0: bool | None
) -> StepTable:
    if isinstance(solver, str) and solver not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)} or a function, got {solver!r}")
    build = SOLVERS[solver] if isinstance(solver, str) else solver
    if not callable(build):
        raise TypeError(f"solver must be a name or a function that returns a StepTable, got {type(solver).__name__}")
    takes = inspect.signature(build).parameters
    options = {
        "prediction": model.prediction,
        "clip_x0": model.clip_x0 if clip_x0 is None else clip_x0,
        "variance": model.variance,
    }
    # what a functools.partial has fixed already stays as it is
    fixed = build.keywords if isinstance(build, functools.partial) else {}
    if eta is not None:
        if "eta" not in takes or "eta" in fixed:
            why = "has none" if "eta" not in takes else "has fixed it already"
            raise ValueError(f"eta: solver {solver!r} {why}; leave it out, or use solver='ddim'")
        options["eta"] = eta
    table = build(model.schedule, steps, **{k: v for k, v in options.items() if k in takes and k not in fixed})
    if not isinstance(table, StepTable):
        raise TypeError(f"solver must return a StepTable, got {type(table).__name__}")
    if table.prediction != model.prediction:
        raise ValueError(
            f"solver must build its table for prediction={model.prediction!r}, got {table.prediction!r}; "
            "a function must take prediction as an argument and pass it on"
        )
    return table


def _count_images(
    num_images: int | None, labels: torch.Tensor | None, w: torch.Tensor, seed: Seed, x_T: torch.Tensor | None
) -> int:
    """N, from whatever says it; all that say it must agree; 1 if none does."""
    said: dict[str, int] = {}
    if num_images is not None:
        if isinstance(num_images, bool) or not isinstance(num_images, int | np.integer):
            raise TypeError(f"num_images must be an integer, got {num_images!r}")
        if num_images < 0:
            raise ValueError(f"num_images must be at least 0, got {num_images}")
        said["num_images"] = int(num_images)
    if labels is not None and labels.ndim:
        said["labels"] = len(labels)
    if w.ndim:
        said["w"] = len(w)
    if seed is not None and not isinstance(seed, int | np.integer | str) and hasattr(seed, "__len__"):
        if getattr(seed, "ndim", 1) != 1:
            raise ValueError(f"seed must be an integer or a vector, got shape {tuple(seed.shape)}")  # type: ignore[union-attr]
        said["seed"] = len(seed)
    if x_T is not None:
        if not isinstance(x_T, torch.Tensor) or x_T.ndim != 4:
            raise ValueError(f"x_T must be a tensor (N, C, H, W), got {getattr(x_T, 'shape', type(x_T).__name__)}")
        said["x_T"] = len(x_T)
    if len(set(said.values())) > 1:
        raise ValueError(
            "these must agree on the number of images: " + ", ".join(f"{k} has {v}" for k, v in said.items())
        )
    return next(iter(said.values()), 1)


def _check_images(argument: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{argument} must have shape {shape}, got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{argument} must be floating point, got {tensor.dtype}")


def _noise_row(
    noise: torch.Tensor | Callable[[int], torch.Tensor], shape: tuple[int, ...], part: slice, row: int
) -> torch.Tensor:
    """The caller's noise for one row of one batch; a function is asked for all N images and cut."""
    if isinstance(noise, torch.Tensor):
        return noise[row, part]
    values = noise(row)
    if not isinstance(values, torch.Tensor):
        raise TypeError(f"noise({row}) must return a tensor, got {type(values).__name__}")
    _check_images(f"noise({row})", values, shape)
    return values[part]


@contextlib.contextmanager
def _progress_bar(progress: bool, total: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, desc="sampling", unit="step", disable=not progress) as bar:
        yield bar
