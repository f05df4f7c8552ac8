"""Versions of one sampling call: made, checked against the images in float32, and timed in turn"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import torch
from torch import Tensor

from benchmarks.networks import STEPS, Call
from benchmarks.observe import DeviceMemory
from benchmarks.timing import LEAST_ROUNDS, percentiles
from fastdiff.evaluation.results import Row

if TYPE_CHECKING:
    from benchmarks.conftest import Recorder

# a case ends within ten minutes, but for LEAST_ROUNDS
MAX_ROUNDS = {"cpu": 5, "cuda": 50}
ROUNDS_S = {"cpu": 345.0, "cuda": 120.0}
# of images in [-1, 1] against float32: largest difference in float32; in half precision the mean difference is held to
# so many times that of a loop by hand in that dtype, as most pixels are clipped and even wrong images lie near
TOLERANCE, HALF_TOLERANCE = 1e-2, 2.0


class Named(Protocol):
    """What a case of any kind is told apart by"""

    @property
    def id(self) -> str: ...

    @property
    def device(self) -> str: ...


class Sampling(Named, Protocol):
    """A case of sampling calls"""

    @property
    def network(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def images(self) -> int: ...

    @property
    def w(self) -> float: ...

    @property
    def steps(self) -> int: ...


class Problem(Protocol):
    """What its calls are given, and where"""

    when: str
    device: torch.device
    dtype: torch.dtype

    @property
    def case(self) -> Sampling: ...


@dataclasses.dataclass
class Version:
    """A sampling call and what was seen of it; times: ms a step, calls: ms a call"""

    call: Call
    error: float
    first_s: float
    memory: Row
    times: list[float] = dataclasses.field(default_factory=list)
    calls: list[float] = dataclasses.field(default_factory=list)


def timed(call: Call, device: torch.device) -> tuple[Tensor, float]:
    """Images, and ms of the call with all that it does before and after its steps"""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        images = call()
        end.record()
        end.synchronize()
        return images, start.elapsed_time(end)
    began = time.perf_counter()
    images = call()
    return images, 1e3 * (time.perf_counter() - began)


class _Enough(Exception):
    pass


def one_step(call: Call) -> None:
    def stop() -> None:
        raise _Enough

    with contextlib.suppress(_Enough):
        call(stop)


def sampled(version: Version, problem: Problem) -> None:
    """What pytest-benchmark is given to run once: a call on a GPU, a step on a CPU, where calls take minutes"""
    if problem.device.type == "cuda":
        version.call()
    else:
        one_step(version.call)


class Exact:
    """What all versions of a case must draw: images in float32, and how far a loop by hand in its dtype is from them"""

    def __init__(self, images: Tensor, in_dtype: Tensor) -> None:
        self.images = images.double().cpu()
        self.rounding = self._difference(in_dtype)[0]

    def _difference(self, images: Tensor) -> tuple[float, float]:
        difference = (images.double().cpu() - self.images).abs()
        return float(difference.mean()), float(difference.max())

    def check(self, images: Tensor, dtype: torch.dtype) -> float:
        """Mean difference; AssertionError where it is more than rounding"""
        mean, largest = self._difference(images)
        if dtype == torch.float32:
            assert largest <= TOLERANCE, (largest, mean)
        else:
            # a clipped pixel may fall to the other side, so the largest says nothing
            assert mean <= HALF_TOLERANCE * self.rounding, (mean, self.rounding)
        return mean


def drawn(make: Callable[[], Call], problem: Problem, weights: int) -> tuple[Version, Tensor]:
    """A version and its first images, not checked yet; weights: bytes that it uses, made before"""
    device = problem.device
    with DeviceMemory() if device.type == "cuda" else contextlib.nullcontext() as memory:
        start = time.perf_counter()
        call = make()
        images, _ = timed(call, device)
        first_s = time.perf_counter() - start
    if isinstance(memory, DeviceMemory):
        held: Row = {"peak_memory_bytes": memory.peak + weights, "reserved_bytes": memory.reserved + weights}
    else:
        # what libraries and packed weights take on a CPU, torch does not count
        held = {"peak_memory_bytes": None}
    return Version(call, float("nan"), first_s, held), images


def started(make: Callable[[], Call], problem: Problem, exact: Exact, weights: int) -> Version:
    """The same with first images that are `exact`"""
    version, images = drawn(make, problem, weights)
    version.error = exact.check(images, problem.dtype)
    return version


def take_turns(versions: Mapping[str, Version], device: torch.device, rounds: int, steps: int = STEPS) -> None:
    """Times calls, of so many steps, of all versions in turn until there are enough rounds or the time is over"""
    start = last = time.perf_counter()
    for done in range(min(rounds, MAX_ROUNDS[device.type])):
        now = time.perf_counter()
        if done >= LEAST_ROUNDS and now - start + (now - last) > ROUNDS_S[device.type]:
            break
        last = now
        for version in versions.values():
            _, call_ms = timed(version.call, device)
            version.times.append(call_ms / steps)
            version.calls.append(call_ms)


def facts_of(problem: Problem, kind: str, version: Version | None = None) -> Row:
    """when: of the run, the same in all rows of versions that took turns"""
    case = problem.case
    row: Row = {
        **{"case": kind, "id": f"{kind}-{case.id}", "network": case.network, "dtype": case.dtype},
        **{"images": case.images, "w": case.w, "steps": case.steps, "when": problem.when},
    }
    if version is not None:
        call_ms = percentiles(version.calls)[1]
        row |= {"call_p50_ms": call_ms, "images_per_s": 1e3 * case.images / call_ms, "calls": len(version.calls)}
        row |= {"first_s": version.first_s, "setup_s": max(0.0, version.first_s - call_ms / 1e3)}
        row |= {"mean_error": version.error, "timed": "call", **version.memory}
    return row


@contextlib.contextmanager
def _empty_caches() -> Iterator[None]:
    """Folders of the body's own for what compilers keep, or first images would come without compiling"""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{folder}/inductor")
        patch.setenv("TRITON_CACHE_DIR", f"{folder}/triton")
        yield


@contextlib.contextmanager
def as_benchmarked(device: torch.device) -> Iterator[None]:
    """float32 is float32 on both sides, cuDNN tries its algorithms, compilers find nothing of an earlier case"""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    # max-autotune chooses its convolutions, so all may
    torch.backends.cudnn.benchmark = True
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        with _empty_caches(), torch.no_grad():
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = before


def parametrised(cpu: Sequence[Named], gpu: Sequence[Named], kind: str) -> list[Any]:
    marked = [(case, ()) for case in cpu] + [(case, (pytest.mark.gpu,)) for case in gpu]
    return [pytest.param(case, id=f"{kind}-{case.id}", marks=marks) for case, marks in marked]


def leave_out(case: Named, device: torch.device, record: Recorder, **facts: object) -> None:
    """Skips a case of another device, and with --resume one that has a row with these facts"""
    if case.device != device.type:
        pytest.skip(f"needs --device {case.device}")
    if record.has(**facts):
        pytest.skip("has rows already (--resume)")
