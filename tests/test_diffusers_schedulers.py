"""sample() against diffusers' DDPMScheduler and DDIMScheduler, driven step by step with the same network and noise"""

import functools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from reference.networks import NULL, mixing, mixing_learned, randomness

import fastdiff
from fastdiff import DiffusionModel, Schedule
from fastdiff.solvers import ddim

SHAPE, LABELS = (2, 4, 4), torch.tensor([3, 0, 7])
PREDICTION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
BETA_SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
# theirs keeps betas and alphas_cumprod in float32: 1000 rounded factors, each off by 2^-24 at most
TOLERANCE = {"float64": 1e-10, "float32": 1000 * 2**-24}


def a_model(schedule: str, prediction: str, variance: str = "fixed_small", clip: bool = True) -> DiffusionModel:
    network = mixing_learned if variance == "learned_range" else mixing
    return DiffusionModel(network, schedule, prediction, variance, 10, NULL, SHAPE, clip_x0=clip)


def in_float64(scheduler, schedule: str):
    """Their algorithm on our chain, so that only the algorithm is compared"""
    scheduler.alphas_cumprod = torch.from_numpy(Schedule.named(schedule).alphas_cumprod.copy())
    one = torch.tensor(1.0, dtype=torch.float64)
    if isinstance(scheduler, DDPMScheduler):
        scheduler.one = one
    else:
        scheduler.final_alpha_cumprod = one
    return scheduler


def their_ddpm(scheduler: DDPMScheduler, model: DiffusionModel, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Their images, and the noise that they drew"""
    ours, theirs = (torch.Generator().manual_seed(0) for _ in range(2))
    noise = torch.zeros(len(scheduler.timesteps), *x.shape, dtype=x.dtype)
    for row, t in enumerate(scheduler.timesteps):
        out = model.network(x, t.double().expand(len(x)), LABELS)
        if t > 0:
            noise[row] = torch.randn(x.shape, generator=ours, dtype=x.dtype)
        x = scheduler.step(out, t, x, generator=theirs).prev_sample
    return x, noise


def their_ddim(scheduler: DDIMScheduler, model: DiffusionModel, x: torch.Tensor, noise, eta: float, clipped_eps: bool):
    for row, t in enumerate(scheduler.timesteps.tolist()):
        out = model.network(x, torch.full((len(x),), float(t), dtype=torch.float64), LABELS)[:, : x.shape[1]]
        x = scheduler.step(
            out, t, x, eta=eta, use_clipped_model_output=clipped_eps, variance_noise=noise[row]
        ).prev_sample
    return x


def assert_images(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """The tolerance is in units of the image: unclipped, this network drives images to hundreds"""
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("schedule", sorted(BETA_SCHEDULE))
def test_the_schedules_are_theirs(schedule):
    theirs = DDPMScheduler(beta_schedule=BETA_SCHEDULE[schedule])
    ours = Schedule.named(schedule)
    np.testing.assert_allclose(theirs.betas.numpy(), ours.betas, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(theirs.alphas_cumprod.numpy(), ours.alphas_cumprod, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("tables", ["float64", "float32"])
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("prediction", sorted(PREDICTION))
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("schedule", sorted(BETA_SCHEDULE))
def test_ddpm(schedule, variance, prediction, clip, tables):
    model = a_model(schedule, prediction, variance, clip)
    scheduler = DDPMScheduler(
        beta_schedule=BETA_SCHEDULE[schedule],
        variance_type=variance,
        clip_sample=clip,
        prediction_type=PREDICTION[prediction],
    )
    if tables == "float64":
        scheduler = in_float64(scheduler, schedule)
    # the fractional stride, which their own names cannot spell
    sampler = fastdiff.Sampler(model, steps=12, solver="ddpm", dtype=torch.float64)
    scheduler.set_timesteps(timesteps=[int(t) for t in sampler.timesteps])
    x_T, _ = randomness(0, len(LABELS))
    theirs, noise = their_ddpm(scheduler, model, x_T)
    images = sampler(LABELS, x_T=x_T, noise=noise)
    assert_images(images, theirs, TOLERANCE[tables])


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_ddpm_with_their_spacings(spacing):
    """Their DDPM looks its previous time up in the list, so that every spacing is right"""
    model = a_model("linear", "eps")
    scheduler = in_float64(DDPMScheduler(timestep_spacing=spacing), "linear")
    scheduler.set_timesteps(15)
    sampler = fastdiff.Sampler(model, steps=f"{spacing}:15", solver="ddpm", dtype=torch.float64)
    assert sampler.timesteps == scheduler.timesteps.tolist()
    x_T, _ = randomness(0, len(LABELS))
    theirs, noise = their_ddpm(scheduler, model, x_T)
    # beta tilde is 0 in the last row; theirs is kept at 1e-20 for the logarithm
    assert_images(sampler(LABELS, x_T=x_T, noise=noise), theirs, 1e-9)


@pytest.mark.parametrize("tables", ["float64", "float32"])
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("eps", ["x0", "network"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", sorted(PREDICTION))
@pytest.mark.parametrize("schedule", sorted(BETA_SCHEDULE))
def test_ddim(schedule, prediction, eta, eps, clip, tables):
    model = a_model(schedule, prediction, clip=clip)
    scheduler = DDIMScheduler(
        beta_schedule=BETA_SCHEDULE[schedule],
        clip_sample=clip,
        set_alpha_to_one=True,
        prediction_type=PREDICTION[prediction],
    )
    if tables == "float64":
        scheduler = in_float64(scheduler, schedule)
    scheduler.set_timesteps(12)
    x_T, noise = randomness(12, len(LABELS))
    theirs = their_ddim(scheduler, model, x_T, noise, eta, clipped_eps=eps == "x0")
    solver = "ddim" if eps == "x0" else functools.partial(ddim, eps="network")
    images = fastdiff.sample(
        model, LABELS, steps="leading:12", solver=solver, eta=eta, x_T=x_T, noise=noise, dtype=torch.float64
    )
    assert_images(images, theirs, TOLERANCE[tables])


@pytest.mark.parametrize("count", [10, 50])
def test_ddim_trailing_where_their_previous_step_is_the_next_time(count):
    """t - T // N is the next time of the trailing list where N divides T"""
    model = a_model("linear", "v")
    scheduler = in_float64(DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing"), "linear")
    scheduler.set_timesteps(count)
    x_T, noise = randomness(count, len(LABELS))
    theirs = their_ddim(scheduler, model, x_T, noise, 0.5, clipped_eps=True)
    images = fastdiff.sample(
        model, LABELS, steps=f"trailing:{count}", eta=0.5, x_T=x_T, noise=noise, dtype=torch.float64
    )
    assert_images(images, theirs, 1e-10)
