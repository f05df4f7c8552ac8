"""Schedules and spacings against literal loops, and diffusers' own lists"""

import re

import numpy as np
import pytest
from diffusers import DDIMScheduler
from reference import schedule as reference

from fastdiff.schedule import SCHEDULES, Schedule, timesteps

T = 1000
PAPER_BETAS = {"linear": reference.linear_betas, "cosine": reference.cosine_betas}


def test_every_schedule_has_a_reference():
    assert set(SCHEDULES) == set(PAPER_BETAS)


@pytest.mark.parametrize("length", [21, 100, 1000, 4000])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_betas_and_their_products_are_the_papers(name, length):
    schedule, betas = Schedule.named(name, length), PAPER_BETAS[name](length)
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == np.float64
    assert schedule.num_train_timesteps == length
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(schedule.alphas_cumprod, reference.alphas_cumprod(betas), rtol=1e-9)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("t", [0, 0.25, 0.999, 17.5, 500, 998.75, 999])
def test_abar_at_fractional_times_interpolates_the_log_snr(name, t):
    schedule = Schedule.named(name)
    abar = reference.abar_at(t, PAPER_BETAS[name](T))
    assert schedule.abar(t) == pytest.approx(abar, rel=1e-9)
    alpha, sigma = schedule.alpha_sigma(t)
    assert (alpha, sigma) == pytest.approx((abar**0.5, (1 - abar) ** 0.5), rel=1e-9)


def test_abar_falls_between_integers_too():
    assert (np.diff(Schedule.named("cosine").abar(np.linspace(0, T - 1, 12345))) < 0).all()


def test_betas_of_ones_own_are_copied_and_frozen():
    betas = np.full(8, 0.1)
    schedule = Schedule(betas)
    betas[:] = 0.5
    np.testing.assert_allclose(schedule.alphas_cumprod, 0.9 ** np.arange(1, 9), rtol=1e-14)
    for values in (schedule.betas, schedule.alphas_cumprod):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0.3


@pytest.mark.parametrize(
    "betas", [[], [[0.1]], [0.0, 0.1], [0.1, 1.5], [0.1, float("nan")], [1.0, 0.1], [-0.1]], ids=str
)
def test_betas_that_are_no_chain(betas):
    with pytest.raises(ValueError, match="betas must be"):
        Schedule(np.array(betas))


@pytest.mark.parametrize("length", [1, 2, 20])
def test_a_linear_chain_too_short_for_its_betas(length):
    with pytest.raises(ValueError, match=f"at least 21, got {length}"):
        Schedule.named("linear", length)


@pytest.mark.parametrize("length", [0, -1, True, 10.0, 2**20 + 1, 2**63])
def test_a_length_that_is_none(length):
    with pytest.raises(ValueError, match="num_train_timesteps must be"):
        Schedule.named("cosine", length)


def test_unknown_schedules_list_the_known():
    with pytest.raises(ValueError, match=r"schedule must be one of \['cosine', 'linear'\], got 'quadratic'"):
        Schedule.named("quadratic")


def times(steps, length: int = T) -> list[float]:
    chosen = timesteps(steps, length)
    assert chosen.dtype == np.float64 and chosen.ndim == 1
    assert (np.diff(chosen) < 0).all() and chosen[-1] >= 0 and chosen[0] <= length - 1
    return chosen.tolist()


def test_published_lists():
    assert times("ddim25") == list(range(0, 1000, 40))[::-1]
    assert times("25")[::-1][:4] == [0, 42, 83, 125] and times("25")[:2] == [999, 957]
    assert times(1) == times("1") == times("linspace:1") == [999]
    assert times(2) == [999, 0]
    assert times(T) == list(range(T))[::-1]


@pytest.mark.parametrize("length", [1, 21, 100, 1000])
def test_an_int_is_the_fractional_stride(length):
    for count in range(2, length + 1):
        assert times(count, length) == times(str(count), length) == reference.sections([count], length)[::-1]


@pytest.mark.parametrize(
    "counts", [[10, 15, 20], [1, 1], [250, 250, 250, 250], [334, 333, 333], [2, 9, 1, 30, 7, 7, 7]], ids=str
)
def test_sections(counts):
    assert times(",".join(map(str, counts))) == reference.sections(counts, T)[::-1]


def test_ddim_strides_and_the_counts_they_can_meet():
    met = {count: reference.integer_stride(count, T) for count in range(2, T + 1)}
    assert sum(chosen is not None for chosen in met.values()) == 62
    for count, chosen in met.items():
        if chosen is not None:
            assert times(f"ddim{count}") == chosen[::-1]


def test_a_ddim_stride_that_cannot_be_met_names_the_nearest_that_can():
    able = [count for count in range(2, T + 1) if reference.integer_stride(count, T)]
    for count in sorted(set(range(1, T + 1)) - set(able)):
        with pytest.raises(ValueError, match=f"ddim{count}'") as error:
            timesteps(f"ddim{count}", T)
        named = [int(n) for n in re.findall(r"'ddim(\d+)'", str(error.value).split("nearest")[1])]
        assert set(named) <= set(able)
        assert min(abs(n - count) for n in named) == min(abs(n - count) for n in able)


@pytest.mark.parametrize("length", [T, 50])
@pytest.mark.parametrize("name", ["leading", "linspace", "trailing"])
def test_diffusers_spacings(name, length):
    scheduler = DDIMScheduler(length, timestep_spacing=name)
    for count in range(1, length + 1):
        scheduler.set_timesteps(count)
        theirs = scheduler.timesteps.tolist()
        if name == "linspace" and count == 1:
            theirs = [length - 1]  # theirs starts from noise at t = 0
        # where their float stride falls short of zero, their trailing list has one time too many
        assert len(theirs) <= count + (name == "trailing")
        assert times(f"{name}:{count}", length) == theirs[:count]


@pytest.mark.parametrize(
    "given", [[999, 500, 0], [999.0, 998.5, 0.25], (7,), np.array([3, 2]), np.array([3.5, 2])], ids=str
)
def test_explicit_times_are_kept(given):
    assert times(given) == [float(t) for t in given]


BAD = {
    "zero": (0, "steps must be in .1, 1000., got 0; the nearest is 1"),
    "negative": (-1, "got -1; the nearest is 1"),
    "too many": (1001, "got 1001; the nearest is 1000"),
    "float": (2.5, "whole number, got 2.5; the nearest is 2"),
    "huge float": (5000.5, "got 5000.5; the nearest is 1000"),
    "nan": (float("nan"), "steps must be a whole number, got nan"),
    "'0'": ("0", "got 0; the nearest is 1"),
    "'-3'": ("-3", "got -3; the nearest is 1"),
    "ddim0": ("ddim0", "got 'ddim0'; the nearest is 1"),
    "ddim1001": ("ddim1001", "got 'ddim1001'; the nearest is 1000"),
    "leading:0": ("leading:0", "got 'leading:0'; the nearest is 1"),
    "trailing:1001": ("trailing:1001", "got 'trailing:1001'; the nearest is 1000"),
    "empty section": ("10,0", "section 2 of 2 has 500 timesteps, got 0; the nearest is 1"),
    "full section": ("501,10", "section 1 of 2 has 500 timesteps, got 501; the nearest is 500"),
    "empty string": ("", "steps must be an int"),
    "words": ("fast", "steps must be an int, .* got 'fast'"),
    "fraction": ("2.5", "steps must be an int"),
    "trailing comma": ("10,", "steps must be an int"),
    "no times": ([], "steps as timesteps must be a non-empty vector"),
    "ascending": ([0, 999], "strictly descending"),
    "twice": ([999, 500, 500], "strictly descending"),
    "past the end": ([1000, 0], "must be in .0, 999., got 0.0 to 1000.0"),
    "below zero": ([999, -0.5], "must be in .0, 999."),
    "nan time": ([999, float("nan")], "must be in .0, 999."),
    "matrix": ([[999], [0]], "non-empty vector, got shape .2, 1."),
}


@pytest.mark.parametrize("case", BAD)
def test_steps_that_cannot_be_met(case):
    steps, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        timesteps(steps, T)


@pytest.mark.parametrize("steps", [True, {"a": 1}, [object()], ["x"]], ids=["bool", "dict", "object", "letters"])
def test_steps_of_another_kind(steps):
    with pytest.raises((TypeError, ValueError), match="steps must be an int"):
        timesteps(steps, T)
