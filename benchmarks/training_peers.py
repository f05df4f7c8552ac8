"""A step of training as diffusers' own scripts take it, with UNet2DModel in every setting that its users know

x_t from DDPMScheduler, EMAModel for the average; the images lie on the device and are indexed there, which no
DataLoader is faster than.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import STEPS
from benchmarks.training import SCHEDULE, Draws, Problem, Tensors, Trainer
from fastdiff.convert import unet_from_diffusers


class Theirs:
    """theirs: a UNet2DModel in float32 on the CPU; memory_format: of its weights and its images

    compiled: torch.compile's options, None: eager. ImportError without diffusers.
    """

    def __init__(
        self,
        problem: Problem,
        theirs: Any,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
        compiled: dict[str, Any] | None = None,
    ) -> None:
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        self.problem, self.config, self.memory_format = problem, problem.training(), memory_format
        self.theirs = theirs
        self.network = copy.deepcopy(theirs).to(problem.device, memory_format=memory_format).train()
        self.images = problem.data.images.to(problem.device, memory_format=memory_format)
        self.labels = problem.data.labels.to(problem.device)
        self.order: list[Tensor] = []
        self.forward = self.network if compiled is None else torch.compile(self.network, dynamic=False, **compiled)
        self.scheduler: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule=SCHEDULE)
        config, self.parameters = self.config, list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        # its decay without warm-up is fastdiff's: min(decay, (1 + n) / (10 + n)) after n updates, the first a copy
        self.ema = EMAModel(self.parameters, decay=config.ema_decays[0], foreach=True)
        self.graphed = bool(compiled and "mode" in compiled)

    def __call__(self, steps: int = STEPS) -> Tensor:
        return torch.cat([self.step(self.draw()) for _ in range(steps)])

    def draw(self) -> Draws:
        n, device = self.problem.case.images, self.problem.device
        if not self.order:
            self.order = list(torch.randperm(len(self.images), device=device).split(n))
        chosen = self.order.pop()
        x0 = self.images[chosen]
        dropped = torch.rand(n, device=device) < self.config.p_uncond
        y = torch.where(dropped, self.problem.null_label, self.labels[chosen])
        t = torch.randint(self.scheduler.config.num_train_timesteps, (n,), device=device)
        return Draws(x0, y, torch.randn_like(x0), t)

    def step(self, draws: Draws) -> Tensor:
        x = self.scheduler.add_noise(draws.x0, draws.eps, draws.t).contiguous(memory_format=self.memory_format)
        self.optimizer.zero_grad(set_to_none=True)
        if self.graphed:
            # gradients lie in memory that the next replay writes to
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.problem.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            output = self.forward(x, draws.t, class_labels=draws.y, return_dict=False)[0]
        loss = F.mse_loss(output.float(), draws.eps)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.optimizer.step()
        self.ema.step(self.parameters)
        return loss.detach().reshape(1)

    def restart(self) -> None:
        with torch.no_grad():
            for p, first in zip(self.parameters, self.theirs.parameters(), strict=True):
                p.copy_(first)

    def gradients(self) -> Tensors:
        return self._as_ours(p.grad for p in self.parameters)

    def weights(self) -> Tensors:
        return self._as_ours(self.parameters)

    def average(self) -> Tensors:
        return self._as_ours(self.ema.shadow_params)

    def _as_ours(self, tensors: Any) -> Tensors:
        names = (name for name, _ in self.network.named_parameters())
        of_theirs = {name: tensor.detach().cpu() for name, tensor in zip(names, tensors, strict=True)}
        ours = unet_from_diffusers(self.network.config, of_theirs)
        return {name: p.detach().to(self.problem.device) for name, p in ours.named_parameters()}


def peers(problem: Problem) -> dict[str, Callable[[Any], Trainer]]:
    """How a case is trained with UNet2DModel, by provider: a function of the float32 network on the CPU"""
    channels_last = partial(Theirs, problem, memory_format=torch.channels_last)
    made: dict[str, Callable[[Any], Trainer]] = {
        "diffusers-eager": partial(Theirs, problem),
        "diffusers-channels-last": channels_last,
        "diffusers-compile": partial(channels_last, compiled={}),
    }
    if problem.device.type == "cuda":
        # what makes up for launches, where a network is small
        made["diffusers-graph"] = partial(channels_last, compiled={"mode": "reduce-overhead"})
    return made
