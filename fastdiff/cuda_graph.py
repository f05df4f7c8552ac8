"""GraphedStep: a function over static buffers, captured once as a CUDA graph and replayed; knows no diffusion

On a CPU, which has no graphs, the same class calls the function at every replay, under the same contract: what a
capture could not hold is refused, and what a caller forgets to fill is poison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["GraphedStep", "NotCapturable"]

aten = torch.ops.aten
# what waits for the device to look at its data
READS = (
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select),
    *(aten._unique2, aten.unique_consecutive, aten.unique_dim),
)
POISON = -(2**62)


class NotCapturable(RuntimeError):
    """The function does something that a graph cannot hold"""


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
        masked = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if mine and (masked or func.overloadpacket in READS):
            raise NotCapturable(f"{func} reads the device's data on the host")
        if func.overloadpacket in (aten._to_copy, aten.copy_):
            between = {tensor.device for tensor in (*tensors, out)}
            if self.device in between and len(between) > 1:
                raise NotCapturable(f"{func} moves data between {' and '.join(sorted(map(str, between)))}")
        return out


class GraphedStep:
    """step(), warmed up, captured on a side stream, and replayed by a call

    step: reads and writes tensors only that outlive this object, or that it makes itself; nothing of it runs on the
        host at a replay.
    static: the tensors through which callers and replays speak. They are zero while step is warmed up, and poison
        afterwards (NaN, or an index of nothing): fill all of them before the first replay.
    pool: memory pool of graphs that never run at once; default: one of its own.
    warmups: calls before the capture, for what libraries choose and Triton compiles at a first call.

    Raises NotCapturable, and lets torch.OutOfMemoryError pass; after either nothing is held.
    """

    def __init__(
        self, step: Callable[[], None], static: Iterable[torch.Tensor], *, pool: Any = None, warmups: int = 2
    ) -> None:
        static = list(static)
        device = static[0].device
        for tensor in static:
            tensor.zero_()
        if device.type == "cuda":
            self._replay = _capture(step, device, pool, warmups)
        else:
            with _Watched(device):
                step()
            self._replay = step
        for tensor in static:
            tensor.fill_(float("nan") if tensor.is_floating_point() else POISON)

    def __call__(self) -> None:
        self._replay()


def _capture(step: Callable[[], None], device: torch.device, pool: Any, warmups: int) -> Callable[[], None]:
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            with _Watched(device):
                step()
            for _ in range(warmups - 1):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may go on using the device
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # ending a capture that ran out of memory fails, too
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            raise NotCapturable(str(error).splitlines()[0]) from error
    return graph.replay
