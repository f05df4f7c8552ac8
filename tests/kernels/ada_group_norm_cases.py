"""What the tests of ada_group_norm's kernels share: cases, the formula in float64, and the comparison with it"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from places import PATHS
from torch import Tensor

from fastdiff_kernels import ada_group_norm

both_paths = pytest.mark.parametrize("place", PATHS, indirect=True)

# every width of a group in the guided-diffusion networks, and odd ones
PER_GROUP = (6, 8, 12, 16, 18, 24, 30, 36, 42, 48, 56, 64, 1, 5, 7, 9)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
TENSORS = ("x", "x2", "x_bias", "weight", "bias", "scale", "shift")


@dataclasses.dataclass(frozen=True)
class Case:
    per_group: int = 6
    groups: int = 2
    b: int = 2
    size: tuple[int, int] = (4, 5)
    second: int = 0  # channels of x2
    repeats: int = 0  # rows of y beyond B
    x_bias: bool = False
    modulated: bool = True
    silu: bool = True
    resample: str | None = None
    mean: float = 0.0
    layout: torch.memory_format = torch.channels_last
    second_rows: int = 0  # of x2 where they are not B

    def draw(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """The tensors of the case, rounded to dtype"""
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        c, rows = self.per_group * self.groups, self.b + self.repeats
        tensors = {"x": randn(self.b, c - self.second, *self.size) + self.mean, "weight": randn(c), "bias": randn(c)}
        tensors["x"] = tensors["x"].contiguous(memory_format=self.layout)
        if self.second:
            x2 = randn(self.second_rows or self.b, self.second, *self.size) + self.mean
            tensors["x2"] = x2.contiguous(memory_format=self.layout)
        if self.x_bias:
            tensors["x_bias"] = randn(c)
        tensors = {name: value.to(device, dtype) for name, value in tensors.items()}
        if self.modulated:
            # as the network has them: two views of one product
            tensors["scale"], tensors["shift"] = randn(rows, 2 * c).to(device, dtype).chunk(2, 1)
        return tensors

    @property
    def options(self) -> dict[str, object]:
        return {"groups": self.groups, "silu": self.silu, "resample": self.resample}


def formula(
    x, weight, bias, scale=None, shift=None, x2=None, x_bias=None, *, groups, silu, resample, eps=1e-5
) -> Tensor:
    """float64 and torch's contiguous group_norm, every option spelled out"""
    x, weight, bias = x.double(), weight.double(), bias.double()
    if x2 is not None:
        x = torch.cat([x, torch.stack([x2[row % len(x2)] for row in range(len(x))]).double()], 1)
    if x_bias is not None:
        x = x + x_bias.double()[None, :, None, None]
    y = F.group_norm(x.contiguous(), groups, weight, bias, eps)
    if scale is not None:
        y = torch.stack([y[row % len(y)] for row in range(len(scale))])
        y = y * (1 + scale.double()[:, :, None, None]) + shift.double()[:, :, None, None]
    if silu:
        y = y / (1 + torch.exp(-y))
    if resample == "down":
        y = (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4
    if resample == "up":
        y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return y


def close(got: Tensor, want: Tensor, tolerance: float, what: str = "y") -> None:
    assert got.shape == want.shape, what
    error = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    assert error <= tolerance * max(1.0, want.abs().max().item() if want.numel() else 0.0), f"{what}: {error:.3g}"


def check(case: Case, dtype: torch.dtype, place, tolerance: float | None = None, **more) -> None:
    """Forward, and every gradient under a random upstream one"""
    tensors = case.draw(dtype, place.device)
    wanted = {name: value.double().clone().requires_grad_() for name, value in tensors.items()}
    given = {name: value.requires_grad_() for name, value in tensors.items()}
    want = formula(**wanted, **case.options)
    got = ada_group_norm(**given, **case.options, **more, impl=place.impl)
    assert got.dtype == dtype
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    close(got, want, tolerance)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(want.shape, generator=generator, dtype=torch.float64).to(place.device, dtype)
    grads = torch.autograd.grad(got, list(given.values()), upstream)
    exact = torch.autograd.grad(want, list(wanted.values()), upstream.double())
    for name, gradient, expected in zip(given, grads, exact, strict=True):
        assert gradient.dtype == dtype
        # a sum over pixels has the error of its terms
        close(gradient, expected, 4 * tolerance, f"gradient of {name}")


OPTIONS = {
    "plain": Case(modulated=False),
    "linear": Case(silu=False),
    "plain_linear": Case(modulated=False, silu=False),
    "x_bias": Case(x_bias=True),
    "second": Case(second=5),
    "second_aligned": Case(per_group=16, second=16),
    "second_wider_than_first": Case(per_group=24, groups=3, second=64),
    "second_of_one_channel": Case(second=1, x_bias=True),
    "second_of_fewer_rows": Case(b=3, second=5, second_rows=2, x_bias=True),
    "second_of_half_the_rows": Case(per_group=8, b=4, second=8, second_rows=2, size=(4, 6), resample="down"),
    "second_of_one_row": Case(b=2, second=7, second_rows=1, modulated=False, resample="up"),
    # boundaries of blocks and of the tensors inside groups, groups of both tensors inside blocks
    "many_blocks": Case(per_group=6, groups=17, b=1, second=40),
    "groups_across_blocks": Case(per_group=18, groups=8, b=1, second=48, x_bias=True, size=(3, 4)),
    "groups_wider_than_blocks": Case(per_group=42, groups=4, b=1, second=72, size=(3, 4)),
    "one_group_of_many_blocks": Case(per_group=100, groups=1, second=28, x_bias=True, size=(3, 4)),
    "repeat_some": Case(b=3, repeats=2),
    "repeat_all": Case(repeats=2, x_bias=True),
    "down": Case(size=(4, 6), resample="down"),
    "up": Case(size=(3, 5), resample="up"),
    "down_plain": Case(size=(6, 2), resample="down", modulated=False),
    "up_linear": Case(resample="up", silu=False, modulated=False),
    "down_second_bias": Case(size=(4, 4), resample="down", second=7, x_bias=True),
    "up_second_repeat": Case(resample="up", second=4, repeats=1),
    "down_repeat": Case(size=(2, 6), resample="down", repeats=2, x_bias=True),
    "everything_up": Case(per_group=18, groups=3, second=23, repeats=1, x_bias=True, resample="up"),
    "everything_down": Case(8, 4, 3, (8, 8), 8, 3, True, True, True, "down"),
    "contiguous": Case(layout=torch.contiguous_format),
    "contiguous_second_up": Case(layout=torch.contiguous_format, second=5, resample="up"),
    "contiguous_down": Case(layout=torch.contiguous_format, size=(4, 6), resample="down", x_bias=True),
}
