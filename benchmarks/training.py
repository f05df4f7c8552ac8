"""Steps of training with random weights and random images, and fastdiff's

A step is all that a run repeats: images, labels, times and noise are drawn, x_t is made, the network runs forward and
backward, the gradient is clipped, AdamW updates the weights and their average follows. All versions of a case have the
same weights and draws in one step; `Exact` says whether it is the same step.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

import fastdiff
from benchmarks.networks import CONFIGS, STEPS, randomised, relative
from fastdiff import DiffusionModel, Schedule
from fastdiff.model import UNet, UNetConfig
from fastdiff.training import Dataset, Run, TrainConfig

NETWORKS = ("digits", "adm-64", "toy")
# diffusers' DDPMScheduler knows it by the same name
SCHEDULE = "linear"
# batches that the data set holds: more than one, so that images are looked up
BATCHES = 16

# steps that are compared: after two, what AdamW and the average remember is seen
CHECKED = 2
# relative errors in the 2-norm: of loss and gradient in float32, and of what weights and average have moved by; AdamW's
# first steps are signs, which rounding decides where a gradient is nothing else (the bias of attention's keys)
TOLERANCE, MOVED_TOLERANCE = 1e-3, 2e-2
# in half precision so many times the error of diffusers' step in that dtype; a step without that to go by
HALF_TOLERANCE, HALF_ALONE = 2.0, 0.1


@dataclasses.dataclass(frozen=True)
class Case:
    """images: of a step"""

    network: str
    device: str
    dtype: str
    images: int

    @property
    def id(self) -> str:
        return f"{self.network.replace('-', '')}-{self.device}-{self.dtype}-b{self.images}"


class Draws(NamedTuple):
    """Images (B, C, H, W), labels (B,) of which some are the null label, eps (B, C, H, W) and times int64 (B,)"""

    x0: Tensor
    y: Tensor
    eps: Tensor
    t: Tensor


Tensors = Mapping[str, Tensor]


class Trainer(Protocol):
    """A network in training; tensors have the names and shapes of fastdiff's UNet"""

    def __call__(self, steps: int = STEPS) -> Tensor:
        """Losses (steps,) of so many steps, each with draws of its own"""

    def step(self, draws: Draws) -> Tensor:
        """The loss (1,) of a step with these draws, which one that makes its own makes in its first step"""

    def restart(self) -> None:
        """The first weights again, in place: the next step with the first draws has the first gradient"""

    def gradients(self) -> Tensors:
        """Of the last step, clipped"""

    def weights(self) -> Tensors: ...

    def average(self) -> Tensors: ...


def config_of(name: str) -> UNetConfig:
    """Without dropout, as no two libraries drop the same, and without a variance, as diffusers' loss trains none"""
    if name == "digits":
        network = fastdiff.load("digits").network
        assert isinstance(network, UNet)
        config = network.config
    else:
        config = CONFIGS[name]
    return dataclasses.replace(config, dropout=0.0, out_channels=config.in_channels)


def build(name: str, seed: int = 0) -> UNet:
    return randomised(config_of(name), seed)


class Problem:
    """What every version of a case trains on, and how"""

    def __init__(self, case: Case) -> None:
        config = config_of(case.network)
        if config.num_labels is None:
            raise ValueError("labels are dropped, and num_labels is None")
        self.case, self.config = case, config
        self.when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.device = torch.device(case.device)
        self.null_label = config.num_labels - 1
        generator = torch.Generator().manual_seed(1)
        count, side = BATCHES * case.images, config.image_size
        images = torch.rand(count, config.in_channels, side, side, generator=generator) * 2 - 1
        labels = torch.randint(self.null_label, (count,), generator=generator)
        self.data = Dataset(images, labels, self.null_label, "random", "benchmarks", "none")

    def training(self, *, compile: bool = False) -> TrainConfig:
        return TrainConfig(
            # the rate stays what it is, so that their number does not matter
            iterations=1,
            batch_size=self.case.images,
            lr=1e-4,
            warmup=0,
            decay="constant",
            ema_decay=0.9999,
            precision=self.case.dtype,
            compile=compile,
        )

    def model(self, network: nn.Module) -> DiffusionModel:
        shape = (self.config.in_channels, self.config.image_size, self.config.image_size)
        schedule = Schedule.named(SCHEDULE)
        return DiffusionModel(network, schedule, num_classes=self.null_label, image_shape=shape)


class Ours:
    """fastdiff.training.Run; compile: of TrainConfig"""

    def __init__(self, problem: Problem, unet: UNet, *, compile: bool = False) -> None:
        self.unet = unet
        network = copy.deepcopy(unet).to(problem.device)
        self.run = Run(problem.model(network), problem.data, problem.training(compile=compile))

    def __call__(self, steps: int = STEPS) -> Tensor:
        return torch.tensor([self.run.advance().loss for _ in range(steps)])

    def step(self, draws: Draws | None = None) -> Tensor:
        return self(1)

    def restart(self) -> None:
        # what a step draws follows from its number
        self.run.step = 0
        with torch.no_grad():
            for p, first in zip(self.run.parameters.values(), self.unet.parameters(), strict=True):
                p.copy_(first)

    def watched(self) -> tuple[Draws, float]:
        """A step: what it drew, and its loss"""
        loss, seen = self.run.loss, []

        def watch(network: Callable[..., Tensor], batch: Any) -> Any:
            seen.append(batch)
            return loss(network, batch)

        self.run.loss = watch  # type: ignore[assignment]
        step = self.run.advance()
        self.run.loss = loss
        (batch,) = seen
        # the target of a network that predicts eps
        _, eps = loss.noised(batch.x0, batch.keys, batch.t)
        return Draws(batch.x0, batch.y, eps, batch.t), step.loss

    def gradients(self) -> Tensors:
        return {name: p.grad for name, p in self.run.parameters.items() if p.grad is not None}

    def weights(self) -> Tensors:
        return self.run.parameters

    def average(self) -> Tensors:
        return dict(self.run.averages[0].module.named_parameters())


def flat(tensors: Tensors) -> Tensor:
    """One vector, a copy"""
    return torch.cat([tensors[name].detach().reshape(-1) for name in sorted(tensors)])


class Exact:
    """The first step of a case in float32, which fastdiff and the peer agree on, and what half precision may err by

    AssertionError where they do not agree. peer: makes a problem's trainer; None: there is none, and nothing to agree.
    """

    def __init__(self, problem: Problem, unet: UNet, peer: Callable[[Problem], Trainer] | None) -> None:
        float32 = Problem(dataclasses.replace(problem.case, dtype="float32"))
        ours = Ours(float32, unet)
        before = flat(ours.weights())
        self.draws, self.loss = ours.watched()
        self.gradients = flat(ours.gradients())
        self.limit = TOLERANCE
        self.errors: dict[str, float] = {}
        if peer is not None:
            theirs = peer(float32)
            self.errors["to_diffusers"] = self.check(theirs, theirs.step(self.draws))
            for _ in range(1, CHECKED):
                draws, _ = ours.watched()
                theirs.step(draws)
            for name, of_ours, of_theirs in (
                ("weights", ours.weights(), theirs.weights()),
                ("average", ours.average(), theirs.average()),
            ):
                error = relative(flat(of_theirs) - before, flat(of_ours) - before)
                assert error <= MOVED_TOLERANCE, (name, error)
                self.errors[f"{name}_to_diffusers"] = error
        if problem.case.dtype != "float32":
            self.limit = HALF_ALONE
            if peer is not None:
                theirs = peer(problem)
                self.errors["diffusers_to_float32"] = self.check(theirs, theirs.step(self.draws))
                self.limit = HALF_TOLERANCE * self.errors["diffusers_to_float32"] + TOLERANCE

    def check(self, trainer: Trainer, loss: Tensor) -> float:
        """Error of the gradient after a step with these draws and the first weights; AssertionError if it is wrong"""
        error = relative(flat(trainer.gradients()).to(self.gradients.device), self.gradients)
        assert error <= self.limit, (error, self.limit)
        assert abs(float(loss) / self.loss - 1) <= self.limit, (float(loss), self.loss, self.limit)
        return error
