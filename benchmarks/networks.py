"""Whole networks with random weights, what their sampling calls are given, and fastdiff's call

Every call of a case draws the same images: the same weights, x_T, labels, DDIM in STEPS evaluations, guidance w.
`check_networks` holds networks to one another before any of it is timed.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import SOLVERS, DiffusionModel, Sampler, Schedule
from fastdiff.model import PRESETS, UNet, UNetConfig

Network = Callable[..., Tensor]

STEPS = 10
SCHEDULE = "linear"

_HC64 = dataclasses.replace(PRESETS["adm-128"], num_heads=None, head_channels=64)
_TOY = UNetConfig(
    image_size=16,
    out_channels=6,
    channels=32,
    channel_mult=(1, 2),
    num_blocks=1,
    attention_resolutions=(8,),
    head_channels=16,
    num_labels=11,
    groups=8,
)
# a label more than there are classes: the null row that guidance needs. UNet2DModel cannot hold ADM-128's four heads
CONFIGS: dict[str, UNetConfig] = {
    "adm-64": dataclasses.replace(PRESETS["adm-64"], num_labels=1001),
    "adm-128-hc64": dataclasses.replace(_HC64, num_labels=1001),
    "toy": _TOY,
}


@dataclasses.dataclass(frozen=True)
class Case:
    network: str
    device: str
    dtype: str
    images: int
    w: float

    @property
    def id(self) -> str:
        return f"{self.network.replace('-', '')}-{self.device}-{self.dtype}-n{self.images}-w{self.w:g}"

    @property
    def steps(self) -> int:
        return STEPS

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def build(name: str, seed: int = 0) -> UNet:
    """One of CONFIGS"""
    return randomised(CONFIGS[name], seed)


def randomised(config: UNetConfig, seed: int = 0) -> UNet:
    """The network in float32 on the CPU; no parameter is zero, and activations stay near 1 through all blocks"""
    unet = UNet(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, p in unet.named_parameters():
            p.normal_(generator=generator)
            if p.ndim > 1:
                # what ends a branch is small, so that the sum over all blocks does not grow
                ends = parameter_name.endswith(("out_layers.3.weight", "proj_out.weight"))
                p.mul_((0.3 if ends else 1.0) / p[0].numel() ** 0.5)
            else:
                p.mul_(0.1)
        for module in unet.modules():
            # norms: around 1
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 1:
                weight.add_(1)
    return unet.eval()


def diffusion(network: nn.Module, config: UNetConfig) -> DiffusionModel:
    if config.num_labels is None:
        raise ValueError("guidance needs labels, and num_labels is None")
    size = (config.in_channels, config.image_size, config.image_size)
    classes = config.num_labels - 1
    return DiffusionModel(network, SCHEDULE, variance="learned_range", num_classes=classes, image_shape=size)


class Problem:
    """What every call of a case is given"""

    def __init__(self, case: Case) -> None:
        config = CONFIGS[case.network]
        if config.num_labels is None:
            raise ValueError("guidance needs labels, and num_labels is None")
        self.case, self.config = case, config
        self.when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.device, self.dtype = torch.device(case.device), case.torch_dtype
        generator = torch.Generator().manual_seed(1)
        n, side = case.images, config.image_size
        self.labels = torch.randint(config.num_labels - 1, (n,), generator=generator)
        self.x_T = torch.randn(n, config.in_channels, side, side, generator=generator).to(self.device)
        self.table = SOLVERS["ddim"](Schedule.named(SCHEDULE), STEPS, prediction="eps", clip_x0=True)
        self.coefs = self.table.pack(("k_x", "k_out", "c_x", "c_x0")).tolist()
        null = torch.full_like(self.labels, config.num_labels - 1)
        self.y = (torch.cat([self.labels, null]) if case.w else self.labels).to(self.device)
        self.times = [torch.full((len(self.y),), t, device=self.device) for t in self.table.t.tolist()]


OnRow = Callable[[], None] | None
Call = Callable[..., Tensor]
"""call(on_row=None) -> images; on_row() is called after each row"""


class Ours:
    """fastdiff.Sampler; options: its own"""

    def __init__(self, problem: Problem, network: nn.Module, **options: Any) -> None:
        self.problem = problem
        self.w = problem.case.w
        # a row of a GPU is one of replays, or there is none
        graph = True if problem.device.type == "cuda" else "auto"
        options = {"device": problem.device, "dtype": problem.dtype, "graph": graph, **options}
        self.sampler = Sampler(diffusion(network, problem.config), steps=STEPS, solver="ddim", **options)

    def __call__(self, on_row: OnRow = None) -> Tensor:
        callback = None if on_row is None else lambda *_: on_row()
        return self.sampler(self.problem.labels, self.w, x_T=self.problem.x_T, callback=callback)


def relative(got: Tensor, exact: Tensor) -> float:
    """Error in the 2-norm, NaN where got is not finite"""
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def placed(network: Any, problem: Problem, dtype: torch.dtype | None = None, *, channels_last: bool) -> Any:
    """A copy where the problem is, in its dtype or this one"""
    moved = copy.deepcopy(network).to(problem.device, dtype or problem.dtype)
    return moved.to(memory_format=torch.channels_last) if channels_last else moved


def bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def check_networks(problem: Problem, unet: UNet, theirs: Callable[[torch.dtype], Network] | None) -> dict[str, float]:
    """Errors of one evaluation: AssertionError unless ours is theirs, and in half precision no further from float32

    unet: in float32 on the CPU. theirs: the other network in a dtype, where the problem is; None: there is none, and
    ours in half precision is held to ours in float32 alone.
    """
    x, y = torch.cat([problem.x_T, problem.x_T])[: len(problem.y)], problem.y
    t = problem.times[STEPS // 2]

    def output(dtype: torch.dtype, other: Callable[[torch.dtype], Network] | None = None) -> Tensor:
        network = placed(unet, problem, dtype, channels_last=True) if other is None else other(dtype)
        with torch.no_grad():
            return network(x.to(dtype), t, y)

    exact = output(torch.float32)
    errors = {"output_std": float(exact.std())}
    assert 0.1 < errors["output_std"] < 10, errors
    if theirs is not None:
        errors["to_diffusers"] = relative(output(torch.float32, theirs), exact)
        assert errors["to_diffusers"] <= 1e-4, errors
    if problem.dtype != torch.float32:
        errors["to_float32"] = relative(output(problem.dtype), exact)
        limit = 0.05
        if theirs is not None:
            errors["diffusers_to_float32"] = relative(output(problem.dtype, theirs), exact)
            limit = 2 * errors["diffusers_to_float32"] + 1e-4
        assert errors["to_float32"] <= limit, errors
    return errors
