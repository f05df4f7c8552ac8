"""What the tests of residual share: random inputs, its formula in float64, and how close to it a result must be"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

FACTOR = {None: (1, 1), "down": (2, 1), "up": (1, 2)}
RESAMPLE = pytest.mark.parametrize("resample", FACTOR, ids=["plain", "down", "up"])
# with a skip of each kind, and with none
FORM = pytest.mark.parametrize(
    "resample,skip", [*((value, True) for value in FACTOR), (None, False)], ids=["plain", "down", "up", "no_skip"]
)
DTYPES = [pytest.param(getattr(torch, name), id=name) for name in ("float32", "float16", "bfloat16")]
MANTISSA = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "batch_inside": lambda x: x.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
    "batch_innermost": lambda x: x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
}


def draw(
    shape,
    resample=None,
    dtype=torch.float32,
    *,
    layout="channels_last",
    seed=0,
    mean=0.0,
    device="cpu",
    rows=None,
    skip=True,
) -> dict[str, Tensor | None]:
    """rows: of skip, where it has not as many as h; skip: whether there is one, it is None otherwise"""
    generator = torch.Generator().manual_seed(seed)
    b, c, h, w = shape
    times, part = FACTOR[resample]
    of_skip = (b if rows is None else rows, c, h * times // part, w * times // part)
    shapes = {"h": shape, "bias": (c,), "skip": of_skip}
    operands = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in shapes.items()}
    operands["h"] += mean
    for name in ("h", "skip"):
        operands[name] = LAYOUTS[layout](operands[name].to(dtype)).to(device)
    operands["bias"] = operands["bias"].float().to(device)
    return operands if skip else {**operands, "skip": None}


def images_of(op: dict[str, Tensor | None]) -> list[str]:
    """The names of the operands (B, C, H, W) that there are"""
    return [name for name in ("h", "skip", "skip2") if op.get(name) is not None]


def draw_wide(
    shape,
    parts,
    dtype=torch.float32,
    *,
    rows=(),
    weight_bias=False,
    layout="channels_last",
    mean=0.0,
    device="cpu",
    seed=0,
) -> dict[str, Tensor]:
    """parts: channels of skip and of skip2, if there is one; rows: theirs, where not as many as h has"""
    generator = torch.Generator().manual_seed(seed)
    b, c, height, width = shape
    rows = rows or (b,) * len(parts)

    def images(n: int, channels: int, shift: float = 0.0) -> Tensor:
        x = torch.randn(n, channels, height, width, generator=generator, dtype=torch.float64) + shift
        return LAYOUTS[layout](x.to(dtype)).to(device)

    weight = torch.randn(c, sum(parts), generator=generator, dtype=torch.float64) / max(sum(parts), 1) ** 0.5
    operands = {"h": images(b, c, mean), "bias": torch.randn(c, generator=generator).to(device)}
    operands |= {name: images(n, part) for name, n, part in zip(("skip", "skip2"), rows, parts, strict=False)}
    operands["weight"] = weight.to(dtype).to(device)
    if weight_bias:
        operands["weight_bias"] = torch.randn(c, generator=generator).to(device)
    return operands


def upstream_of(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)


def feeding(x: Tensor, rows: int) -> Tensor:
    """The row of x that each of so many rows takes, by indices"""
    return x[[b if b < len(x) else b - len(x) for b in range(rows)]]


def formula(h: Tensor, bias: Tensor | None, skip: Tensor | None, resample: str | None) -> Tensor:
    """In float64 by torch's own resampling"""
    y = h.double()
    if skip is not None:
        skip = skip.double()
        if resample == "down":
            skip = F.avg_pool2d(skip, 2)
        elif resample == "up":
            skip = F.interpolate(skip, scale_factor=2.0, mode="nearest")
        y = y + feeding(skip, len(h))
    return y if bias is None else y + bias.double()[None, :, None, None]


def wide_formula(
    h: Tensor,
    bias: Tensor | None,
    skip: Tensor,
    weight: Tensor,
    skip2: Tensor | None = None,
    weight_bias: Tensor | None = None,
) -> Tensor:
    """In float64 by torch's convolution of a stored concatenation"""
    whole = [feeding(x.double(), len(h)) for x in (skip, skip2) if x is not None]
    kernel = weight.double().reshape(*weight.shape[:2], 1, 1)
    y = h.double() + F.conv2d(torch.cat(whole, 1), kernel, None if weight_bias is None else weight_bias.double())
    return y if bias is None else y + bias.double()[None, :, None, None]


def by_chunk(y: Tensor, chunks: int) -> np.ndarray:
    """(2, B, chunks, C) in NumPy, pixel lists cut by hand"""
    pixels = y.detach().double().cpu().numpy().reshape(y.shape[0], y.shape[1], -1)
    size = -(-pixels.shape[2] // chunks)
    out = np.zeros((2, y.shape[0], chunks, y.shape[1]))
    for k in range(chunks):
        part = pixels[:, :, k * size : (k + 1) * size]
        if part.shape[2]:
            out[0, :, k], out[1, :, k] = part.mean(2), part.var(2) * part.shape[2]
    return out


def check_rounded(got: Tensor, want: Tensor, scale: float = 4.0) -> None:
    """One rounding to got's dtype of an fp32 sum of terms as large as scale"""
    room = 2.0 ** -MANTISSA[got.dtype] * want.abs() * 1.001 + 2.0**-24 + 4 * scale * 2.0**-24
    assert got.shape == want.shape and ((got.double() - want).abs() <= room).all()


def check_statistics(stats: Tensor, y: Tensor, rtol: float = 2e-6, scale: float = 4.0) -> None:
    want = by_chunk(y, stats.shape[2])
    got = stats.double().cpu().numpy()
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=rtol * scale)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=64 * (rtol * scale) ** 2 + 1e-6)
