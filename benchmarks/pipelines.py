"""A folder of diffusers, and what samples it: a pipeline with the stock scheduler or the fused one, and fastdiff

diffusers' own pipelines for pixels take no labels, so that Pipeline is the loop of DiTPipeline around a UNet2DModel:
labels and null labels in one doubled batch, guidance_scale = 1 + w, a state that is doubled like it, in the network's
dtype, and timesteps on the host. With the fused scheduler nothing else of it changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastdiff
from benchmarks import training
from benchmarks.networks import OnRow
from fastdiff import DiffusionModel, Sampler, Schedule
from fastdiff.convert.diffusers_folder import save_folder
from fastdiff.model import UNet

SCHEDULE = "linear"
# what fastdiff calls the habits of the stock schedulers
SOLVERS: dict[str, dict[str, Any]] = {
    "ddim": {"name": "ddim", "spacing": "leading:N", "eps": "network"},
    "ddpm": {"name": "ddpm", "spacing": "leading:N"},
}
SEED = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """solver: of SOLVERS; network: of training.NETWORKS; steps: of a call"""

    solver: str
    network: str
    device: str
    dtype: str
    images: int
    w: float = 1.5
    steps: int = 10

    @property
    def id(self) -> str:
        network = self.network.replace("-", "")
        return f"{self.solver}-{network}-{self.device}-{self.dtype}-n{self.images}-w{self.w:g}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def network_of(name: str) -> UNet:
    """The bundled digits network as it was trained, any other with random weights; eps alone, as DDIMScheduler asks"""
    if name != "digits":
        return training.build(name)
    network = fastdiff.load("digits").network
    assert isinstance(network, UNet)
    return network


def write_folder(case: Case, folder: Path) -> None:
    """A pipeline that both libraries load"""
    network = network_of(case.network)
    config = network.config
    assert config.num_labels is not None
    shape = (config.in_channels, config.image_size, config.image_size)
    model = DiffusionModel(
        network,
        Schedule.named(SCHEDULE),
        num_classes=config.num_labels - 1,
        image_shape=shape,
        solver=SOLVERS[case.solver],
    )
    save_folder(model, folder)


class Problem:
    """What every call of a case is given; folder: written by write_folder

    x_T (N, C, H, W) and noise (steps, N, C, H, W) are float32 that the case's dtype holds; noise None: none is drawn.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.device, self.dtype = torch.device(case.device), case.torch_dtype
        config = training.config_of(case.network)
        assert config.num_labels is not None
        self.null_label = config.num_labels - 1
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.randint(self.null_label, (case.images,), generator=generator)
        shape = (case.images, config.in_channels, config.image_size, config.image_size)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(self.dtype).float().to(self.device)

        self.x_T = normal(*shape)
        self.noise = normal(case.steps, *shape) if case.solver == "ddpm" else None


def load_unet(problem: Problem, dtype: torch.dtype | None = None) -> Any:
    """The UNet2DModel of the folder, in the problem's dtype or this one"""
    from diffusers import UNet2DModel

    # what is meant by low needs a library more
    unet = UNet2DModel.from_pretrained(
        problem.folder, subfolder="unet", torch_dtype=dtype or problem.dtype, low_cpu_mem_usage=False
    )
    return unet.to(problem.device)


def load_scheduler(problem: Problem, *, fused: bool) -> Any:
    """The stock scheduler of the folder, or the fused one made of it"""
    import diffusers

    name = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}[problem.case.solver]
    scheduler = getattr(diffusers, name).from_pretrained(problem.folder, subfolder="scheduler")
    return getattr(fastdiff, f"Fused{name}").from_config(scheduler.config) if fused else scheduler


@contextlib.contextmanager
def replaying(noise: Tensor) -> Iterator[None]:
    """Schedulers, stock and fused, draw rows of noise (rows, N, C, H, W), one after another, in whatever dtype"""
    from diffusers.schedulers import scheduling_ddpm

    from fastdiff.integrations.diffusers import schedulers

    rows = iter(noise)

    def drawn(shape: tuple[int, ...], generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
        row = next(rows)
        # the second half of a doubled state has noise of its own, which the next step must not see
        return torch.cat([row, -row])[: shape[0]].to(device, dtype)

    with contextlib.ExitStack() as stack:
        for module in (scheduling_ddpm, schedulers):
            stack.enter_context(mock.patch.object(module, "randn_tensor", drawn))
        yield


class Pipeline:
    """pipeline(on_row=None) -> images; network: a UNet2DModel"""

    def __init__(self, problem: Problem, network: Any, *, fused: bool) -> None:
        self.problem, self.network = problem, network
        self.scheduler = load_scheduler(problem, fused=fused)

    def __call__(self, on_row: OnRow = None) -> Tensor:
        problem, case = self.problem, self.problem.case
        guided = case.w != 0
        generator = torch.Generator(problem.device).manual_seed(SEED)
        options = {"generator": generator} if case.solver == "ddpm" else {}
        labels = problem.labels.to(problem.device)
        null = torch.full_like(labels, problem.null_label)
        y = torch.cat([labels, null]) if guided else labels
        x = problem.x_T.to(self.network.dtype)
        x = torch.cat([x, x]) if guided else x
        self.scheduler.set_timesteps(case.steps)
        with torch.no_grad():
            for t in self.scheduler.timesteps:
                if guided:
                    half = x[: len(x) // 2]
                    x = torch.cat([half, half])
                x = self.scheduler.scale_model_input(x, t)
                eps = self.network(x, t[None].to(problem.device).expand(len(x)), class_labels=y).sample
                if guided:
                    cond, uncond = eps.chunk(2)
                    half_eps = uncond + (1 + case.w) * (cond - uncond)
                    eps = torch.cat([half_eps, half_eps])
                x = self.scheduler.step(eps, t, x, **options).prev_sample
                if on_row is not None:
                    on_row()
        return x[: case.images]

    def replayed(self) -> Tensor:
        """Images from the problem's noise"""
        if self.problem.noise is None:
            return self()
        with replaying(self.problem.noise):
            return self()


class Ours:
    """fastdiff.Sampler as the folder's model asks for it; model: what fastdiff.load made of the folder"""

    def __init__(self, problem: Problem, model: DiffusionModel) -> None:
        self.problem = problem
        # a row of a GPU is one of replays, or there is none
        graph = True if problem.device.type == "cuda" else "auto"
        self.sampler = Sampler(model, steps=problem.case.steps, device=problem.device, graph=graph)

    def __call__(self, on_row: OnRow = None, noise: Tensor | None = None) -> Tensor:
        callback = None if on_row is None else lambda *_: on_row()
        problem = self.problem
        return self.sampler(problem.labels, problem.case.w, x_T=problem.x_T, noise=noise, seed=SEED, callback=callback)

    def replayed(self) -> Tensor:
        """Images from the problem's noise"""
        return self(noise=self.problem.noise)


def load_ours(problem: Problem) -> DiffusionModel:
    return fastdiff.load(problem.folder, device=problem.device, dtype=problem.dtype)
