"""Stock schedulers of diffusers beside ours, and where ours launch"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from fastdiff.integrations.diffusers import FusedDDIMScheduler, FusedDDPMScheduler, schedulers

FUSED = {DDPMScheduler: FusedDDPMScheduler, DDIMScheduler: FusedDDIMScheduler}
STOCK = pytest.mark.parametrize("stock", [DDPMScheduler, DDIMScheduler], ids=["ddpm", "ddim"])
PREDICTIONS = ("epsilon", "sample", "v_prediction")
PREDICTION = pytest.mark.parametrize("prediction", PREDICTIONS)


def fused_everywhere(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Fuses on this machine's CPU, too; a list that grows by the coefficients of every launch"""
    seen: list[torch.Tensor] = []

    def counted(x, out, coefs, *args, **kwargs):
        seen.append(coefs)
        guided_step(x, out, coefs, *args, **kwargs)

    guided_step = schedulers.guided_step
    monkeypatch.setattr(schedulers, "FUSED_ON", ("cpu", "cuda"))
    monkeypatch.setattr(schedulers, "guided_step", counted)
    return seen


def a_pair(stock: type, steps: int | None = 10, **config: Any) -> tuple[Any, Any]:
    """The stock scheduler and ours"""
    theirs = stock(**config)
    ours = FUSED[stock](**config)
    if steps is not None:
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps)
    return theirs, ours


def tensors(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def stepped(scheduler: Any, out: torch.Tensor, t: Any, x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    """prev_sample and pred_original_sample under a fixed seed"""
    if options.get("variance_noise") is None:
        options["generator"] = torch.Generator().manual_seed(7)
    return scheduler.step(out, t, x, return_dict=False, **options)
