"""Networks for tests: cheap, deterministic, true to float64, and not trivial in x, t or y"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

NULL = 10

Module = TypeVar("Module", bound=torch.nn.Module)


def randomised(module: Module, seed: int = 0) -> Module:
    """Every parameter random: a fresh network is zero and would hide mistakes"""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / fan_in**0.5)
    return module.eval()


def mixing(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    """Every pixel depends on others, on t and on y; (B, C, H, W), of unit size"""
    label = torch.zeros_like(t) if y is None else y.to(t.dtype)
    push = (torch.sin(3 * t / 1000) + 0.4 * torch.cos(1.3 * label)).to(x.dtype)[:, None, None, None]
    return torch.tanh(0.9 * x + 0.5 * x.flip(-1) - 0.3 * x.flip(1) + push)


def mixing_learned(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    """mixing, and a variance that differs from pixel to pixel and between labels; (B, 2C, H, W)"""
    g = mixing(x, t, y)
    return torch.cat([g, torch.sin(2 * g + x.flip(-2))], dim=1)


def judging(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Logits (B, 10) of a classifier, whose gradient differs from pixel to pixel and depends on x, t and the label"""
    k = torch.arange(1, 11, device=x.device, dtype=x.dtype) / 10
    phase = torch.arange(x[0].numel(), device=x.device) + torch.sin(3 * t / 1000)[:, None]
    return torch.sin(k[:, None] * x.flatten(1)[:, None] + phase[:, None].to(x.dtype)).sum(-1)


class Recorder:
    """A network that keeps the inputs of its calls"""

    def __init__(self, network: Callable[..., torch.Tensor] = mixing) -> None:
        self.network = network
        self.x: list[torch.Tensor] = []
        self.t: list[torch.Tensor] = []
        self.y: list[list[int] | None] = []
        self.extra: list[dict[str, torch.Tensor]] = []

    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, *y: torch.Tensor | None, **extra: torch.Tensor
    ) -> torch.Tensor:
        self.x.append(x.detach().clone())
        self.t.append(t.clone())
        self.y += [None if labels is None else labels.tolist() for labels in y]
        self.extra.append({name: values.clone() for name, values in extra.items()})
        return self.network(x, t, *y, **extra)

    @property
    def batches(self) -> list[int]:
        return [len(x) for x in self.x]


def randomness(
    rows: int, n: int, shape: tuple[int, ...] = (2, 4, 4), seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_T (n, *shape) and noise (rows, n, *shape) in float64, exact in float32 too"""
    values = np.random.default_rng(seed).standard_normal((rows + 1, n, *shape)).astype(np.float32)
    return torch.from_numpy(values[0]).double(), torch.from_numpy(values[1:]).double()
