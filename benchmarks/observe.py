"""What a call needs besides time: memory, launches, energy; each None, or a reason, where it cannot be had"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastdiff.evaluation.results import Row

Run = Callable[[], object]

HOST_LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


class TookTooLong(BaseException):
    """More seconds than a peer is given; no Exception, as Inductor takes those for a kernel that does not work"""


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """TookTooLong after so many seconds of the body; main thread only"""

    def stop(*_: Any) -> None:
        raise TookTooLong(f"more than {seconds:g} s to be made and called once")

    before = signal.signal(signal.SIGALRM, stop)
    # again, should it be swallowed all the same
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def why(error: BaseException) -> str:
    """One line for a row's `absent`"""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


class DeviceMemory:
    """Most bytes of a GPU that the body held at a time beyond what was held before, allocated and reserved"""

    def __enter__(self) -> DeviceMemory:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        self.peak = torch.cuda.max_memory_allocated() - self.before[0]
        self.reserved = torch.cuda.max_memory_reserved() - self.before[1]


class PeakMemory:
    """Most bytes that a call holds at a time beyond what was held when this was made

    On a GPU what torch has allocated. On a CPU the resident size of the process, so with all that libraries and
    compilers keep; what was freed goes back to the system before both readings. Linux only, else None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize()
            self.before: int | None = torch.cuda.memory_allocated()
        else:
            _give_back()
            self.before = _resident("VmRSS")

    def of(self, run: Run) -> int | None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            peak: int | None = torch.cuda.max_memory_allocated()
        else:
            _give_back()
            try:
                # sets VmHWM back to what is resident now: proc_pid_clear_refs(5)
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                return None
            run()
            peak = _resident("VmHWM")
        return None if peak is None or self.before is None else peak - self.before


def _resident(name: str) -> int | None:
    """Bytes of the process in memory, now ("VmRSS") or at most ("VmHWM"); None where Linux is not asked"""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])


def _give_back() -> None:
    """What was freed, to the system: an allocator keeps some, which would hide what is allocated next"""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def launches(run: Run, steps: int) -> Row:
    """Kernels and copies that ran on the GPU, and launches by the host, a step; nothing where CUPTI sees nothing"""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profiler:
            run()
            torch.cuda.synchronize()
        events = list(profiler.events() or ())
    except RuntimeError:
        return {}
    on_device = sum(
        e.device_type == torch.autograd.DeviceType.CUDA and not getattr(e, "is_user_annotation", False) for e in events
    )
    by_host = sum(e.name.startswith(HOST_LAUNCHES) for e in events)
    return {"launches": on_device / steps, "host_launches": by_host / steps} if on_device else {}


def energy(run: Run, images: int, window: float = 10.0) -> Row:
    """Joules an image over a window of seconds, what the GPU draws when idle included"""
    try:
        stop, source = _meter()
    except Exception as error:
        return {"J_per_image": None, "energy": f"absent: {why(error)}"}
    calls, start = 0, time.perf_counter()
    try:
        while time.perf_counter() - start < window:
            run()
            torch.cuda.synchronize()
            calls += 1
    finally:
        joules = stop(time.perf_counter() - start)
    if joules is None:
        return {"J_per_image": None, "energy": f"absent: {source} said nothing"}
    return {"J_per_image": joules / (calls * images), "energy": source}


def _meter() -> tuple[Callable[[float], float | None], str]:
    """A function of the seconds since now that gives the joules, and what it asks"""
    try:
        import pynvml  # type: ignore[import-not-found]
    except ImportError:
        return _sampled()
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(_uuid())
    start = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    return lambda _: (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - start) / 1e3, "NVML's counter"


def _uuid() -> str:
    """Of the current GPU: what NVML counts knows nothing of CUDA_VISIBLE_DEVICES"""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _sampled() -> tuple[Callable[[float], float | None], str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        raise FileNotFoundError("neither nvidia-ml-py nor nvidia-smi")
    query = [command, "--query-gpu=power.draw", "--format=csv,noheader,nounits", f"--id={_uuid()}"]
    process = subprocess.Popen([*query, "-lms", "100"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def stop(seconds: float) -> float | None:
        process.terminate()
        watts = []
        for line in process.communicate(timeout=10)[0].splitlines():
            with contextlib.suppress(ValueError):
                watts.append(float(line))
        return seconds * sum(watts) / len(watts) if watts else None

    return stop, "power.draw every 100 ms"
