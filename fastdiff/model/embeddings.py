"""Sinusoidal timestep features (Vaswani et al. 2017, with guided-diffusion's [cos, sin] order)"""

import math

import torch


def timestep_embedding(t: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """cat[cos(t * freq), sin(t * freq)] with freq_i = max_period ** (-i / (dim // 2))

    t: (B,), integer or fractional, any device; dim: even. Returns (B, dim) in float32, or float64 if t is float64.
    Everything is made on t's device, so that the call can be captured in a CUDA graph.
    """
    if t.ndim != 1:
        raise ValueError(f"t must have shape (B,), got {tuple(t.shape)}; expand one time to the whole batch")
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and at least 2, got {dim}")
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=dtype, device=t.device) / half)
    args = t.to(dtype)[:, None] * freqs  # (B, half)
    return torch.cat([args.cos(), args.sin()], dim=1)
