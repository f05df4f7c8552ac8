"""GraphedStep: a function over static buffers, captured once as a CUDA graph and replayed; knows no diffusion

On a CPU, which has no graphs, the same class calls the function at every replay, under the same contract: what a
capture could not hold is refused, and what a caller forgets to fill is poison.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["GraphedStep", "NotCapturable", "Pool", "is_out_of_memory"]

aten = torch.ops.aten
# what waits for the device to look at its data
READS = (
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select),
    *(aten._unique2, aten.unique_consecutive, aten.unique_dim),
)
NO_MEMORY = ("out of memory", "_ALLOC_FAILED", "DefaultCPUAllocator", "bad_alloc")


class NotCapturable(RuntimeError):
    """The function does something that a graph cannot hold"""


def is_out_of_memory(error: BaseException) -> bool:
    """Also of drivers and libraries that load kernels and want workspaces, and of a CPU's, which have no type for it"""
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)


class Pool:
    """Memory that graphs share which never run at once; all are captured on its stream, or they would not share it"""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self.handle, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()


class _Watched(TorchDispatchMode):
    """Names the operation that a capture would die of"""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        mine = any(tensor.device == self.device for tensor in tensors)
        op = getattr(func, "overloadpacket", None)
        masked = op in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if mine and (masked or op in READS):
            raise NotCapturable(f"{func} reads the device's data on the host")
        if op in (aten._to_copy, aten.copy_):
            between = {tensor.device for tensor in (*tensors, out)}
            if self.device in between and len(between) > 1:
                raise NotCapturable(f"{func} moves data between {' and '.join(sorted(map(str, between)))}")
        return out


def _watch(step: Callable[[], None], device: torch.device) -> None:
    try:
        with _Watched(device):
            step()
        return
    except NotCapturable:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
    # some operators refuse any mode around them; an error of the step's own comes again
    step()


class GraphedStep:
    """step(), warmed up, captured on a side stream, and replayed by a call

    step: reads and writes tensors only that outlive this object, or that it makes itself; nothing of it runs on the
        host at a replay.
    static: the tensors through which callers and replays speak. They are zero while step is warmed up, and poison
        afterwards (NaN, the least integer, or True): fill all of them before the first replay.
    pool: of graphs that never run at once; default: one of its own.
    warmups: calls before the capture, for what libraries choose and Triton compiles at a first call; one on a CPU.

    Raises NotCapturable, torch.OutOfMemoryError where a capture runs out of memory, ValueError without static tensors,
    and whatever step raises when it is warmed up; after any of them nothing is held.
    """

    def __init__(
        self, step: Callable[[], None], static: Iterable[torch.Tensor], *, pool: Pool | None = None, warmups: int = 2
    ) -> None:
        static = list(static)
        if not static:
            raise ValueError("static must hold at least one tensor, got none: a replay would have no effect")
        device = static[0].device
        for tensor in static:
            tensor.zero_()
        if device.type == "cuda":
            self._replay = _capture(step, pool or Pool(device), device, warmups)
        else:
            _watch(step, device)
            self._replay = step
        for tensor in static:
            tensor.fill_(_poison(tensor.dtype))

    def __call__(self) -> None:
        self._replay()


def _poison(dtype: torch.dtype) -> float | bool:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min


def _capture(step: Callable[[], None], pool: Pool, device: torch.device, warmups: int) -> Callable[[], None]:
    with torch.cuda.device(device):
        caller, side = torch.cuda.current_stream(), pool.stream
        side.wait_stream(caller)
        try:
            with torch.cuda.stream(side):
                _watch(step, device)
                for _ in range(warmups - 1):
                    step()
            return _captured(step, pool)
        finally:
            # after a failed capture torch leaves its own stream behind
            torch.cuda.set_stream(caller)
            caller.wait_stream(side)


def _captured(step: Callable[[], None], pool: Pool) -> Callable[[], None]:
    graph, failed = torch.cuda.CUDAGraph(), None
    try:
        # other threads may go on using the device
        with torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local"):
            try:
                step()
            except RuntimeError as error:
                # ending a capture that has failed fails, too, and says less
                failed = _told(error)
                raise
    except RuntimeError as error:
        _give_up(pool)
        failed = failed or _told(error)
    if failed is not None:
        raise failed
    return graph.replay


def _give_up(pool: Pool) -> None:
    """Tells the allocator that a failed capture is over: before torch 2.12 it goes on waiting, and returns no memory"""
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device, pool.handle)
        torch._C._cuda_releasePool(device, pool.handle)


def _told(error: RuntimeError) -> RuntimeError:
    """What a caller is told: a new error, which holds no frames"""
    kind = torch.OutOfMemoryError if is_out_of_memory(error) else NotCapturable
    return kind((str(error) or type(error).__name__).splitlines()[0])
