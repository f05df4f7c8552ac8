"""Timestep samplers: unbiased, and drawn to where the losses are."""

from __future__ import annotations

import pytest
import torch

from fastdiff.training.losses import draw, sample_keys
from fastdiff.training.timesteps import HISTORY, LossSecondMoment, Uniform

T = 50
RANGE = 2**32


def losses(t: torch.Tensor) -> torch.Tensor:
    return 10 / (1 + t.double()) + 0.01 * t


def learned(T: int = T) -> LossSecondMoment:
    sampler = LossSecondMoment(T)
    for _ in range(HISTORY):
        sampler.update(torch.arange(T), losses(torch.arange(T)))
    return sampler


def probabilities(sampler: Uniform, T: int = T) -> torch.Tensor:
    """P(t) over all 2^32 words, from the words at which the choice changes, found by bisection"""
    starts = []
    for t in range(T):
        low, high = 0, RANGE  # the least word whose choice is at least t
        while low < high:
            middle = (low + high) // 2
            if int(sampler.choose(torch.tensor([middle]))[0]) >= t:
                high = middle
            else:
                low = middle + 1
        starts.append(low)
    ends = torch.tensor([*starts[1:], RANGE], dtype=torch.float64)
    return (ends - torch.tensor(starts, dtype=torch.float64)) / RANGE


@pytest.mark.parametrize(
    "make", [lambda: Uniform(T), lambda: LossSecondMoment(T), learned], ids=["uniform", "new", "warm"]
)
def test_the_weighted_mean_is_that_of_uniform_times(make) -> None:
    """E[weight * f(t)] over every word is the plain mean over t, but for float32's rounding of the weights"""
    sampler = make()
    p = probabilities(sampler)
    starts = torch.cat([torch.zeros(1, dtype=torch.float64), p.cumsum(0)[:-1]]).mul(RANGE).round().long()
    t, weights = sampler.choose(starts)
    assert t.tolist() == list(range(T))
    for f in (torch.ones(T, dtype=torch.float64), losses(torch.arange(T)), torch.arange(T).double() ** 2):
        torch.testing.assert_close((p * weights.double() * f).sum(), f.mean(), rtol=1e-6, atol=0)


def test_a_monte_carlo_mean_is_unbiased_and_less_scattered() -> None:
    words, _ = draw(sample_keys(0, 0, 50_000), 0.0)
    means, spreads = [], []
    for sampler in (Uniform(T), learned()):
        t, weights = sampler.choose(words)
        values = weights.double() * losses(t)
        means.append(values.mean())
        spreads.append(values.std())
        assert abs(means[-1] - losses(torch.arange(T)).mean()) < 5 * spreads[-1] / 50_000**0.5
    assert spreads[1] < 0.1 * spreads[0]


def test_probability_follows_the_root_of_the_mean_square_of_the_last_ten_losses() -> None:
    sampler = LossSecondMoment(3)
    for i in range(25):
        # only the last ten count, and their order does not
        sampler.update(torch.tensor([0, 1, 2]), torch.tensor([1.0 if i >= 15 else 99.0, 3.0, 4.0 + 3 * (-1) ** i]))
    root = torch.tensor([1.0, 3.0, (0.5 * 7**2 + 0.5 * 1**2) ** 0.5], dtype=torch.float64)
    expected = 0.999 * root / root.sum() + 0.001 / 3
    torch.testing.assert_close(probabilities(sampler, 3), expected, rtol=1e-6, atol=0)


def test_a_probability_is_the_width_that_the_weight_divides_by() -> None:
    """To the word: of 2^32 words t has 2^32 / (T * weight)"""
    sampler = learned()
    counts = (probabilities(sampler) * RANGE).round().long()
    assert int(counts.sum()) == RANGE
    assert counts.tolist() == torch.from_numpy(sampler._ends()).diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()


def test_it_is_uniform_until_every_time_has_ten_losses() -> None:
    sampler, words = LossSecondMoment(4), torch.arange(0, RANGE, RANGE // 64)
    for i in range(HISTORY):
        expected = Uniform(4).choose(words)
        assert torch.equal(sampler.choose(words)[0], expected[0]) and (sampler.choose(words)[1] == 1).all()
        sampler.update(torch.tensor([0, 1, 2, 3, 0]), torch.tensor([9.0, 1.0, 1.0, 1.0, 9.0]))
        if i == HISTORY - 2:
            assert sampler.counts.tolist() == [10, 9, 9, 9]
    assert not torch.equal(sampler.choose(words)[0], expected[0])


def test_losses_of_zero_leave_every_time_a_share() -> None:
    sampler = LossSecondMoment(8)
    for _ in range(HISTORY):
        sampler.update(torch.arange(8), torch.zeros(8))
    torch.testing.assert_close(
        probabilities(sampler, 8), torch.full((8,), 1 / 8, dtype=torch.float64), rtol=1e-6, atol=0
    )
    sampler.update(torch.tensor([5] * HISTORY), torch.ones(HISTORY))
    assert float(probabilities(sampler, 8).min()) == pytest.approx(0.001 / 8, rel=1e-3)
