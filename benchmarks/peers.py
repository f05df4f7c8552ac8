"""The same operations as PyTorch's users write them: what is timed beside the kernels, and in float64 their check"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = tuple[Tensor, ...]

# a row in the middle of a table of DDPM with a learned variance
ROW = {
    **{"k_x": 1.4, "k_out": -0.98, "x0_max": 1.0, "c_x": 0.6, "c_x0": 0.35, "c_noise": 1.0},
    **{"log_beta": -3.0, "log_beta_tilde": -3.2},
}


def resample(x: Tensor, how: str | None) -> Tensor:
    if how == "down":
        return F.avg_pool2d(x, 2)
    return x if how is None else F.interpolate(x, scale_factor=2.0, mode="nearest")


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    x2: Tensor | None = None,
    x_bias: Tensor | None = None,
    *,
    groups: int,
    silu: bool,
    how: str | None,
) -> Outputs:
    """A convolution's bias, the skip's concatenation, GroupNorm, scale and shift, SiLU, resampling"""
    h = x if x2 is None else torch.cat([x, x2], dim=1)
    h = h if x_bias is None else h + x_bias[:, None, None]
    h = F.group_norm(h, groups, weight, bias, 1e-5)
    if scale is not None and shift is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return (resample(F.silu(h) if silu else h, how),)


def residual(h: Tensor, bias: Tensor, skip: Tensor, *, how: str | None) -> Outputs:
    """A convolution's bias, which PyTorch adds in a launch of its own, and the skip"""
    return (h + bias[:, None, None] + resample(skip, how),)


def step(x: Tensor, out: Tensor, w: Tensor, noise: Tensor | None, *, learned: bool, dtype: torch.dtype) -> Outputs:
    """ROW with guidance, its coefficients Python numbers; noise None: from torch's generator"""
    n, c = x.shape[:2]
    cond, null = out.to(x.dtype).split(n)
    weight = w[:, None, None, None]
    eps = (1 + weight) * cond[:, :c] - weight * null[:, :c]
    x0 = (ROW["k_x"] * x + ROW["k_out"] * eps).clamp(-ROW["x0_max"], ROW["x0_max"])
    x = ROW["c_x"] * x + ROW["c_x0"] * x0
    if learned:
        f = (cond[:, c:] + 1) / 2
        log_var = f * ROW["log_beta"] + (1 - f) * ROW["log_beta_tilde"]
        x = x + ROW["c_noise"] * torch.exp(0.5 * log_var) * (torch.randn_like(x) if noise is None else noise)
    return x, torch.cat([x, x]).to(dtype)


def forward_process(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | None) -> Outputs:
    """x_t, and eps as the target; noise None: from torch's generator"""
    wide = torch.promote_types(x0.dtype, torch.float32)
    eps = torch.randn_like(x0, dtype=wide) if noise is None else noise
    return (alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * eps).to(x0.dtype), eps
