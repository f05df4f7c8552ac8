"""What the kernels of ada_group_norm share: operands, the affine of a row, slabs of whole groups"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._tuning import channel_block, power_of_two
from .tile import address, addresses, grid_offset

# one launch up to here; a larger image has work for every multiprocessor of a GPU, which its few slabs would not give
SLAB_PIXELS = 16 * 16


@triton.jit
def affine(
    weight_ptr, bias_ptr, scale_ptr, scale_stride_b, scale_stride_c, shift_ptr, shift_stride_b, shift_stride_c,
    row, c, mask,
):  # fmt: skip
    """gain, offset (C,) in fp32: gain * normalised + offset = (normalised * weight + bias) * (1 + scale) + shift"""
    gain = tl.load(weight_ptr + c, mask, 0.0).to(tl.float32)
    offset = tl.load(bias_ptr + c, mask, 0.0).to(tl.float32)
    if scale_ptr is not None:
        c = c.to(tl.int64)
        modulation = 1.0 + tl.load(scale_ptr + row * scale_stride_b + c * scale_stride_c, mask, 0.0).to(tl.float32)
        shift = tl.load(shift_ptr + row * shift_stride_b + c * shift_stride_c, mask, 0.0).to(tl.float32)
        gain = gain * modulation
        offset = offset * modulation + shift
    return gain, offset


@triton.jit
def moments_at(moments_ptr, x_bias_ptr, n, B, c, mask, GROUPS: tl.constexpr, CPG: tl.constexpr):
    """Mean of x before x_bias is added to it, and 1 / sqrt(var + eps), of channels c (C,)"""
    group = c // CPG
    mean = tl.load(moments_ptr + n * GROUPS + group, mask, 0.0)
    rstd = tl.load(moments_ptr + (n + B) * GROUPS + group, mask, 0.0)
    if x_bias_ptr is not None:
        mean -= tl.load(x_bias_ptr + c, mask, 0.0).to(tl.float32)
    return mean, rstd


@triton.jit
def over_groups(v, lane, SLAB: tl.constexpr, CPG: tl.constexpr):
    """Sums of v (S,) over each group of CPG lanes, at every lane of the group"""
    total = tl.zeros_like(v)
    for k in tl.static_range(SLAB // CPG):
        mine = lane // CPG == k
        total = tl.where(mine, tl.sum(tl.where(mine, v, 0.0), 0), total)
    return total


@triton.jit
def row_of_second(n, B2, C2: tl.constexpr):
    """The row of x2 that goes with row n of x: b, or b - B2 from B2 on"""
    row = n
    if C2 > 0:
        row = tl.where(n >= B2, n - B2, n)
    return row


@triton.jit
def channels_of(block, C1: tl.constexpr, C2: tl.constexpr, BLOCK_C: tl.constexpr):
    """Whether a block of channels lies in the second tensor, its channels there and of both, and which exist

    The blocks of the first tensor come first, so that none belongs to both.
    """
    BLOCKS_1: tl.constexpr = tl.cdiv(C1, BLOCK_C)
    second = block >= BLOCKS_1
    c_in = (block - second.to(tl.int32) * BLOCKS_1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return second, c_in, c_in + second.to(tl.int32) * C1, c_in < tl.where(second, C2, C1)


@triton.jit
def channels_within(block, C1: tl.constexpr, C2: tl.constexpr, BLOCK_C: tl.constexpr):
    """The first channel of both of a block of channels, and the one after its last"""
    BLOCKS_1: tl.constexpr = tl.cdiv(C1, BLOCK_C)
    second = block >= BLOCKS_1
    start = tl.where(second, C1 + (block - BLOCKS_1) * BLOCK_C, block * BLOCK_C)
    return start, tl.minimum(start + BLOCK_C, tl.where(second, C1 + C2, C1))


@triton.jit
def load_slab(
    x_ptr, x_stride_b, x_stride_h, x_stride_w, x_stride_c,
    x2_ptr, x2_stride_b, x2_stride_h, x2_stride_w, x2_stride_c,
    x_bias_ptr, n, n2, h, w, c, mask_p, mask_c,
    C1: tl.constexpr, C2: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """x + x_bias in fp32 at pixels (P,) and channels (S,) of row n of x and n2 of x2; x is zero outside the masks"""
    mask = mask_p[:, None] & (mask_c & (c < C1))[None, :]
    at = grid_offset(h, w, x_stride_h, x_stride_w, VEC) + n * x_stride_b * VEC
    x = tl.load(addresses(x_ptr, at, c, x_stride_c), mask, 0.0).to(tl.float32)
    if C2 > 0:
        mask_2 = mask_p[:, None] & (mask_c & (c >= C1))[None, :]
        at = grid_offset(h, w, x2_stride_h, x2_stride_w, VEC) + n2 * x2_stride_b * VEC
        x_2 = tl.load(addresses(x2_ptr, at, c - C1, x2_stride_c), mask_2, 0.0).to(tl.float32)
        x = tl.where((c < C1)[None, :], x, x_2)
    if x_bias_ptr is not None:
        x += tl.load(x_bias_ptr + c, mask_c, 0.0).to(tl.float32)[None, :]
    return x


def slab_channels(channels: int, per_group: int) -> int:
    """Channels of the narrowest slab of whole groups that keeps 16-byte accesses, or all"""
    return min(math.lcm(per_group, 8), channels)


def slab_elements(channels: int, per_group: int, pixels: int) -> int:
    """What a program holds of an image that has these pixels, lanes of none included"""
    return power_of_two(slab_channels(channels, per_group)) * power_of_two(pixels)


def slab_fits(channels: int, per_group: int, pixels: int, elements: int) -> bool:
    """Whether one launch does what takes several otherwise"""
    # masks of lanes without a channel are held, too
    most = elements // 2 if masked(channels, per_group) else elements
    return pixels <= SLAB_PIXELS and slab_elements(channels, per_group, pixels) <= most


def masked(channels: int, per_group: int) -> bool:
    """Whether a slab has lanes of no channel"""
    slab = slab_channels(channels, per_group)
    return slab != power_of_two(slab)


def block_of_both(c1: int, c2: int) -> int:
    """Channels of a program, all of which belong to one of two tensors"""
    return min(channel_block(c1 or c2), channel_block(c2 or c1))


@dataclasses.dataclass(frozen=True)
class Norm:
    """The inputs of a launch, forward or backward; see fastdiff_kernels.ada_group_norm"""

    x: Tensor
    x2: Tensor | None
    x_bias: Tensor | None
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    silu: bool
    resample: str | None

    @property
    def b(self) -> int:
        return self.x.shape[0]

    @property
    def b2(self) -> int | None:
        return None if self.x2 is None else self.x2.shape[0]

    @property
    def rows(self) -> int:
        return self.b if self.scale is None else self.scale.shape[0]

    @property
    def c1(self) -> int:
        return self.x.shape[1]

    @property
    def c2(self) -> int:
        return 0 if self.x2 is None else self.x2.shape[1]

    @property
    def channels(self) -> int:
        return self.c1 + self.c2

    @property
    def pixels(self) -> int:
        return self.x.shape[2] * self.x.shape[3]

    @property
    def block_c(self) -> int:
        return block_of_both(self.c1, self.c2)

    def blocks_c(self, block_c: int) -> int:
        return triton.cdiv(self.c1, block_c) + triton.cdiv(self.c2, block_c)

    def channel_blocks(self, block_c: int) -> Iterator[range]:
        """The channels of each program along them: blocks of the first tensor, then of the second"""
        for start, end in ((0, self.c1), (self.c1, self.channels)):
            for first in range(start, end, block_c):
                yield range(first, min(first + block_c, end))

    def arguments(self, vec: int) -> dict[str, Tensor | int | float | None]:
        """Of every kernel over x: addresses, the affine, sizes"""
        operands: dict[str, Tensor | int | float | None] = {**address("x", self.x, vec), **address("x2", self.x2, vec)}
        operands |= {"x_bias_ptr": self.x_bias, "weight_ptr": self.weight, "bias_ptr": self.bias}
        for name, tensor in (("scale", self.scale), ("shift", self.shift)):
            stride_b, stride_c = (None, None) if tensor is None else tensor.stride()
            operands |= {f"{name}_ptr": tensor, f"{name}_stride_b": stride_b, f"{name}_stride_c": stride_c}
        return operands | {"B": self.b, "ROWS": self.rows, "H": self.x.shape[2], "W": self.x.shape[3]}

    def constexprs(self, groups: int) -> dict[str, Any]:
        sizes = {"C1": self.c1, "C2": self.c2, "CPG": self.channels // groups, "REPEATS": 1 + (self.rows > self.b)}
        return {**sizes, "SILU": self.silu, "RESAMPLE": self.resample}
