"""The step of a scheduler alone, stock and fused: a chain of steps around an output that no network computes

On a CPU the fused schedulers leave the step to the stock code. "fused-reference" is what they would do there instead:
guided_step, whose reference is several operations like theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastdiff
from benchmarks.networks import OnRow, relative
from benchmarks.pipelines import SEED, replaying

STEPS = 50
# images of the networks, and the latents of DiT-XL-2-256, which are not clipped
SHAPES = {"adm-64": (3, 64, 64), "digits": (1, 16, 16), "dit": (4, 32, 32)}
LATENTS = ("dit",)
SCHEDULERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}

# relative errors of a step in the 2-norm: in float32; in half precision so many times the stock step's are added
TOLERANCE, HALF_TOLERANCE = 2e-5, 2.0


@dataclasses.dataclass(frozen=True)
class Case:
    """solver: of SCHEDULERS; network: of SHAPES"""

    solver: str
    network: str
    device: str
    dtype: str
    images: int

    @property
    def id(self) -> str:
        return f"{self.solver}-{self.network.replace('-', '')}-{self.device}-{self.dtype}-n{self.images}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.images, *SHAPES[self.network]


def scheduler_of(solver: str, network: str, *, fused: bool) -> Any:
    """Set to STEPS, its timesteps on the host; ImportError without diffusers"""
    import diffusers

    stock = getattr(diffusers, SCHEDULERS[solver])(clip_sample=network not in LATENTS)
    made = getattr(fastdiff, f"Fused{SCHEDULERS[solver]}").from_config(stock.config) if fused else stock
    made.set_timesteps(STEPS)
    return made


@contextlib.contextmanager
def fused_on(device: str) -> Iterator[None]:
    """Fused schedulers launch there, too"""
    from fastdiff.integrations.diffusers import schedulers

    with mock.patch.object(schedulers, "FUSED_ON", (*schedulers.FUSED_ON, device)):
        yield


class Problem:
    """x_T and out, the output of every step, (N, C, H, W), and the noise of a check (STEPS, N, C, H, W)"""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.device, self.dtype = torch.device(case.device), getattr(torch, case.dtype)
        generator = torch.Generator().manual_seed(1)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(self.device, self.dtype)

        self.x_T, self.out, self.noise = normal(*case.shape), normal(*case.shape), normal(STEPS, *case.shape)


class Chain:
    """chain(on_row=None) -> x after STEPS steps; host: launch on a CPU, where the fused ones do not by themselves"""

    def __init__(self, problem: Problem, *, fused: bool, host: bool = False, dtype: torch.dtype | None = None) -> None:
        self.scheduler = scheduler_of(problem.case.solver, problem.case.network, fused=fused)
        self.x_T, self.out = (x.to(dtype or problem.dtype) for x in (problem.x_T, problem.out))
        self.noise, self.host = problem.noise, host
        self.stochastic = problem.case.solver == "ddpm"

    def __call__(self, on_row: OnRow = None) -> Tensor:
        generator = torch.Generator(self.x_T.device).manual_seed(SEED)
        options = {"generator": generator} if self.stochastic else {}
        x = self.x_T
        with torch.no_grad(), self._launching():
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.out, t, x, **options).prev_sample
                if on_row is not None:
                    on_row()
        return x

    def each(self) -> Tensor:
        """(STEPS, N, C, H, W): every step alone, from x_T, with the problem's noise"""
        with torch.no_grad(), replaying(self.noise), self._launching():
            steps = [self.scheduler.step(self.out, t, self.x_T).prev_sample for t in self.scheduler.timesteps]
        return torch.stack(steps)

    def _launching(self) -> contextlib.AbstractContextManager[None]:
        return fused_on("cpu") if self.host else contextlib.nullcontext()


def chains(problem: Problem) -> dict[str, Chain]:
    """By provider"""
    made = {"diffusers": Chain(problem, fused=False), "diffusers-fused": Chain(problem, fused=True)}
    if problem.device.type == "cpu":
        made["fused-reference"] = Chain(problem, fused=True, host=True)
    return made


def check_chains(problem: Problem, made: dict[str, Chain]) -> dict[str, float]:
    """Relative errors of single steps against float64; AssertionError beyond what the stock step's dtype explains"""
    exact = Chain(problem, fused=False, dtype=torch.float64).each()
    errors = {
        # of the worst step
        name: max(map(relative, chain.each(), exact))
        for name, chain in made.items()
    }
    limit = TOLERANCE
    if problem.dtype != torch.float32:
        limit += HALF_TOLERANCE * errors["diffusers"]
    assert all(error <= limit for error in errors.values()), (errors, limit)
    return errors


def meta_step(solver: str, network: str, *, fused: bool, dtype: torch.dtype) -> Callable[[], object]:
    """A step of one image on tensors without memory, after the first, with which the rows of a chain are uploaded"""
    x = torch.empty(1, *SHAPES[network], dtype=dtype, device="meta")
    scheduler = scheduler_of(solver, network, fused=fused)

    def step() -> object:
        with torch.no_grad(), fused_on("meta"):
            return scheduler.step(x, scheduler.timesteps[1], x)

    step()
    return step


def counted_steps() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """What benchmarks.count counts: a network, a scheduler's name and its step in float16; nothing without diffusers"""
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return
    for network in ("adm-64", "dit"):
        for solver, name in SCHEDULERS.items():
            for fused in (False, True):
                step = meta_step(solver, network, fused=fused, dtype=torch.float16)
                yield network, f"{'Fused' if fused else ''}{name}.step", step
