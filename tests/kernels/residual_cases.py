"""What the tests of residual share: random inputs, and its formula in float64"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

FACTOR = {None: (1, 1), "down": (2, 1), "up": (1, 2)}
RESAMPLE = pytest.mark.parametrize("resample", FACTOR, ids=["plain", "down", "up"])
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "batch_inside": lambda x: x.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
    "batch_innermost": lambda x: x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
}


def draw(
    shape, resample=None, dtype=torch.float32, *, layout="channels_last", seed=0, mean=0.0, device="cpu"
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    b, c, h, w = shape
    times, part = FACTOR[resample]
    shapes = {"h": shape, "bias": (c,), "skip": (b, c, h * times // part, w * times // part)}
    operands = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in shapes.items()}
    operands["h"] += mean
    for name in ("h", "skip"):
        operands[name] = LAYOUTS[layout](operands[name].to(dtype)).to(device)
    operands["bias"] = operands["bias"].float().to(device)
    return operands


def upstream_of(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)


def formula(h: Tensor, bias: Tensor | None, skip: Tensor, resample: str | None) -> Tensor:
    """In float64 by torch's own resampling"""
    h, skip = h.double(), skip.double()
    if resample == "down":
        skip = F.avg_pool2d(skip, 2)
    elif resample == "up":
        skip = F.interpolate(skip, scale_factor=2.0, mode="nearest")
    return h + skip if bias is None else h + bias.double()[None, :, None, None] + skip
