"""Counter-based noise: the same numbers on every device, at every batch size, in any order"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import FLOATS, check_device, check_dtype, check_int, check_shape
from ._impl import TRITON_DTYPES, check_impl, plain, uses_triton

STREAM_X_T = 0
STREAM_STEP = 1
STREAM_TRAINING = 2


def check_draw(draw: int | Tensor, device: torch.device) -> None:
    if isinstance(draw, Tensor):
        check_shape("draw", draw, (1,))
        check_dtype("draw", draw, (torch.int64,))
        check_device("draw", draw, device, like="seeds")
    else:
        check_int("draw", draw, 0, 1 << 32)


def check_seeds(seeds: Tensor, n: int | str = "N") -> None:
    check_shape("seeds", seeds, (n,), "one seed an image")
    check_dtype("seeds", seeds, (torch.int64,))


def _philox(
    seeds: Tensor,
    shape: Sequence[int],
    draw: Tensor | None,
    draw_value: int,
    stream: int,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    """int64 for words, a float for normals; draw_value is read without draw"""
    draws = draw_value if draw is None else draw
    if uses_triton(impl, seeds, (torch.int64,)) and dtype != torch.float64:
        from .jit.philox import plan_philox

        out = torch.empty((len(seeds), *shape), dtype=dtype, device=seeds.device)
        plan_philox(seeds, draws, stream, out).launch()
        return out
    if dtype == torch.int64:
        return reference.philox_uint32(seeds, shape, draw=draws, stream=stream).contiguous()
    return reference.philox_normal(seeds, shape, draw=draws, stream=stream, dtype=dtype).contiguous()


_philox_op = torch.library.custom_op("fastdiff_kernels::philox", _philox, mutates_args=())


@_philox_op.register_fake
def _(seeds: Tensor, shape: Sequence[int], *rest: Any) -> Tensor:
    dtype, _impl = rest[-2:]
    return seeds.new_empty((seeds.shape[0], *shape), dtype=dtype)


def _call(
    seeds: Tensor, shape: Sequence[int], draw: int | Tensor, stream: int, dtype: torch.dtype, impl: str
) -> Tensor:
    check_impl(impl, seeds, "seeds", (torch.int64,))
    given, value = (draw, 0) if isinstance(draw, Tensor) else (None, draw)
    run = _philox if plain(seeds, given) else _philox_op
    return run(seeds, shape, given, value, stream, dtype, impl)


def _check(seeds: Tensor, shape: Sequence[int], draw: int | Tensor, stream: int) -> tuple[int, ...]:
    check_seeds(seeds)
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape must be a sequence of ints, got {type(shape).__name__}")
    for size in shape:
        check_int("every size in shape", size, 0)
    check_draw(draw, seeds.device)
    check_int("stream", stream, 0, 1 << 32)
    return tuple(shape)


def philox_uint32(
    seeds: Tensor, shape: Sequence[int], *, draw: int | Tensor, stream: int, impl: str = "auto"
) -> Tensor:
    """Philox4x32-10 words, int64 (N, *shape) in [0, 2^32): word element % 4 of counter (element // 4, draw, stream, 0)

    seeds int64 (N,), each the 64-bit key of one image; shape one image's, its elements counted in row-major order;
    draw an int in [0, 2^32) or an int64 tensor (1,) on the device of seeds; stream an int in [0, 2^32); impl "auto"
    (Triton on a GPU), "triton" or "reference".
    Raises ValueError for a shape, range or device that does not fit, TypeError for a dtype.

    Reference: reference.philox_uint32; Salmon et al., SC 2011
    """
    shape = _check(seeds, shape, draw, stream)
    return _call(seeds, shape, draw, stream, torch.int64, impl)


def philox_normal(
    seeds: Tensor,
    shape: Sequence[int],
    *,
    draw: int | Tensor,
    stream: int,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """Standard normals (N, *shape), Box-Muller on the words of philox_uint32, whose arguments it takes

    Precision: float32, then rounded to dtype (float16, bfloat16, float32 or float64).
    Traffic:   1 write
    Reference: reference.philox_normal

    Raises ValueError for a shape, range or device that does not fit, TypeError for a dtype.
    """
    shape = _check(seeds, shape, draw, stream)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
    if impl == "triton" and dtype not in TRITON_DTYPES:
        raise ValueError(f"impl='triton' needs dtype to be one of {TRITON_DTYPES}, got {dtype}; use impl='reference'")
    return _call(seeds, shape, draw, stream, dtype, impl)
