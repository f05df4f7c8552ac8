"""How many bytes a launch moves, as a formula of its plan's shapes; a test holds each to what the interpreter counts

Every program counts what it loads and stores, whether or not a cache answers; lanes of one access that want the same
element count once. Nothing is taken off for a coefficient or a weight that happens to be zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch

from fastdiff_kernels._plan import Plan


class Bytes(NamedTuple):
    loads: int
    stores: int

    @property
    def total(self) -> int:
        return self.loads + self.stores


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the elements, each tensor once"""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def item(*tensors: torch.Tensor | None) -> int:
    """Bytes of one element of each"""
    return sum(tensor.element_size() for tensor in tensors if tensor is not None)


def plan_bytes(plan: Plan) -> Bytes:
    """What this launch moves; KeyError for a kernel without a formula"""
    return Bytes(0, 0) if 0 in plan.grid else FORMULAS[plan.name](_Launch(plan))


def moved(plans: Iterable[Plan]) -> int:
    return sum(plan_bytes(plan).total for plan in plans)


class _Launch:
    """A plan's arguments and constants by name, tensors without their _ptr"""

    def __init__(self, plan: Plan) -> None:
        self.programs = math.prod(plan.grid)
        self._values: dict[str, Any] = {**plan.args, **plan.constexprs}

    def __getattr__(self, name: str) -> Any:
        values = self._values
        return values[f"{name}_ptr"] if f"{name}_ptr" in values else values[name]


@cache
def _cells(pixels: int, width: int, tiles: tuple[tuple[int, int], ...]) -> int:
    """2 x 2 cells under [start, stop) of row-major pixels, summed over tiles: what nearest-neighbour pixels read"""
    return sum(len({(p // width // 2, p % width // 2) for p in range(*tile)}) for tile in tiles)


def _tiles(pixels: int, chunks: int, block: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of every tile of every chunk"""
    size = -(-pixels // chunks)
    for first in range(0, pixels, size):
        last = min(first + size, pixels)
        for start in range(first, last, block):
            yield start, min(start + block, last)


def _blocks(p: _Launch) -> Iterator[range]:
    """The channels of each program along them: blocks of the first tensor, then of the second"""
    for start, size in ((0, p.C1), (p.C1, p.C2)):
        for first in range(start, start + size, p.BLOCK_C):
            yield range(first, min(first + p.BLOCK_C, start + size))


def _moments(p: _Launch, values: int) -> int:
    """Bytes that the programs of one image and tile load: values a group in fp32, and x_bias"""
    groups = sum(block[-1] // p.CPG - block[0] // p.CPG + 1 for block in _blocks(p))
    return 4 * values * groups + (p.C1 + p.C2) * item(p.x_bias)


def _affine(p: _Launch) -> int:
    """Bytes a row of y: weight, bias, scale, shift"""
    return (p.C1 + p.C2) * item(p.weight, p.bias, p.scale, p.shift)


def _philox(p: _Launch) -> Bytes:
    return Bytes(p.programs * (8 + item(p.draw)), nbytes(p.out))


def _guided_step(p: _Launch) -> Bytes:
    n, c, height, width = p.x.shape
    image = c * height * width
    halves = len(p.out) + (n if p.LEARNED else 0)
    loads = nbytes(p.x, p.hist, p.grad, p.noise) + halves * image * item(p.out)
    coefs = 6 + 3 * (p.hist is not None) + 2 * (p.grad is not None) + 2 * p.LEARNED
    coefs += p.noise is not None or p.seeds is not None
    loads += p.programs * (4 * coefs + item(p.seeds, p.draw)) + p.programs // n * p.M * item(p.w)
    return Bytes(loads, nbytes(p.x, p.x0, p.hist, p.x_net))


def _load_row(p: _Launch) -> Bytes:
    row = nbytes(p.coefs, p.counter)
    return Bytes(row + item(p.times), row + nbytes(p.t, p.draw))


def _q_sample(p: _Launch) -> Bytes:
    small = p.programs * item(p.alpha, p.sigma, p.seeds, p.draw)
    return Bytes(small + nbytes(p.x0, p.noise), nbytes(p.x_t, p.target))


def _residual(p: _Launch) -> Bytes:
    b, c, _, width = p.h.shape
    # for every row of y, those that share one of skip, too
    pixels = 0 if p.skip is None else p.skip.shape[2] * p.skip.shape[3]
    if p.RESAMPLE == "up":
        pixels = _cells(p.HW, width, tuple(_tiles(p.HW, p.CHUNKS, p.BLOCK_P)))
    skip = b * c * item(p.skip) * pixels
    return Bytes(nbytes(p.h) + skip + b * p.CHUNKS * c * item(p.bias), nbytes(p.y, p.stats))


def _projection(p: _Launch) -> Bytes:
    # channels of the output beside one another read the same skips; each tile of pixels reads all weights
    skips = p.B * -(-p.C // p.BLOCK_C) * p.HW * (p.C1 + p.C2) * item(p.skip)
    tiles = sum(1 for _ in _tiles(p.HW, p.CHUNKS, p.BLOCK_P))
    small = p.B * (tiles * nbytes(p.weight) + p.CHUNKS * p.C * item(p.bias, p.weight_bias))
    return Bytes(nbytes(p.h) + skips + small, nbytes(p.y, p.stats))


def _statistics(p: _Launch) -> Bytes:
    return Bytes(nbytes(p.x), nbytes(p.stats))


def _merged(p: _Launch) -> int:
    """Bytes that programs beside one another in channels load: statistics of every group that they touch, and x_bias"""
    loads = 0
    for block in _blocks(p):
        first, end = block[0] // p.CPG * p.CPG, (block[-1] // p.CPG + 1) * p.CPG
        loads += (end - first) * item(p.x_bias)
        in_first = min(end, p.C1) - min(first, p.C1)
        for stats, channels in ((p.stats, in_first), (p.stats2, end - first - in_first)):
            if channels:
                filled = -(-p.H * p.W // -(-p.H * p.W // stats.shape[2]))
                loads += 2 * filled * channels * item(stats)
    return loads


def _apply(p: _Launch) -> Bytes:
    down = p.RESAMPLE == "down"
    tiles = -(-p.H * p.W // (4 if down else 1) // p.BLOCK_P)
    programs = -(-tiles // p.TILES)
    # four loads a pixel are too many to keep for a second row
    image = p.H * p.W * (p.C1 * item(p.x) + p.C2 * item(p.x2))
    small = programs * p.B * (_merged(p) + (p.C1 + p.C2) * item(p.x_bias) + _affine(p))
    # the first row's affine is kept for all tiles
    second = (p.ROWS - p.B) * programs * p.TILES * _affine(p)
    return Bytes((p.ROWS if down else p.B) * image + small + second, nbytes(p.y, p.moments))


def _slab(p: _Launch) -> Bytes:
    image = p.H * p.W * (p.C1 * item(p.x) + p.C2 * item(p.x2)) + (p.C1 + p.C2) * item(p.x_bias)
    return Bytes(p.B * image + p.ROWS * _affine(p), nbytes(p.y, p.moments))


def _gradient(p: _Launch, tiles: tuple[tuple[int, int], ...]) -> int:
    """Bytes of y's gradient at the pixels of x"""
    if p.RESAMPLE != "down":
        return nbytes(p.g)
    return p.ROWS * (p.C1 + p.C2) * item(p.g) * _cells(p.H * p.W, p.W, tiles)


def _sums(p: _Launch) -> Bytes:
    tiles = tuple(_tiles(p.H * p.W, p.CHUNKS, p.BLOCK_P))
    small = p.CHUNKS * (p.B * _moments(p, 2) + p.ROWS * _affine(p))
    return Bytes(nbytes(p.x, p.x2) * p.ROWS // p.B + _gradient(p, tiles) + small, nbytes(p.parts))


def _fold_sums(p: _Launch) -> Bytes:
    small = 2 * p.C * (p.B * item(p.weight) + p.ROWS * item(p.scale))
    return Bytes(nbytes(p.parts) + small, nbytes(p.sums, p.means))


def _dx(p: _Launch) -> Bytes:
    tiles = tuple(_tiles(p.H * p.W, 1, p.BLOCK_P))
    small = len(tiles) * (p.B * _moments(p, 4) + p.ROWS * _affine(p))
    return Bytes(nbytes(p.x, p.x2) + _gradient(p, tiles) + small, nbytes(p.dx, p.dx2, p.dx_sums))


def _slab_backward(p: _Launch) -> Bytes:
    groups, c = (p.C1 + p.C2) // p.CPG, p.C1 + p.C2
    small = p.B * (8 * groups + c * item(p.x_bias)) + p.ROWS * _affine(p)
    loads = nbytes(p.x, p.x2) + _gradient(p, ((0, p.H * p.W),)) + small
    return Bytes(loads, nbytes(p.sums, p.dx, p.dx2, p.dx_sums))


FORMULAS: dict[str, Callable[[_Launch], Bytes]] = {
    "philox": _philox,
    "guided_step": _guided_step,
    "load_row": _load_row,
    "q_sample": _q_sample,
    "residual": _residual,
    "projection": _projection,
    "statistics": _statistics,
    "apply": _apply,
    "slab": _slab,
    "sums": _sums,
    "fold_sums": _fold_sums,
    "dx": _dx,
    "slab_backward": _slab_backward,
}
