"""What training minimises: randomness that depends on no batch, and every loss against its literal formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from reference import losses as paper
from reference import schedule as paper_schedule

from fastdiff import Classifier, DiffusionModel
from fastdiff.training import TrainConfig
from fastdiff.training.losses import Batch, ClassifierLoss, DiffusionLoss, draw, sample_keys
from fastdiff.training.timesteps import Uniform
from fastdiff_kernels import STREAM_TRAINING, philox_normal

SHAPE = (2, 4, 4)
PREDICTIONS = ("eps", "v", "x0")
BETAS = {"linear": paper_schedule.linear_betas(1000), "cosine": paper_schedule.cosine_betas(1000)}
ABARS = {name: paper_schedule.alphas_cumprod(betas) for name, betas in BETAS.items()}


def loss_of(schedule: str = "linear", prediction: str = "eps", variance: str = "fixed_small", **config: Any) -> Any:
    model = DiffusionModel(lambda x, t, y: x, schedule, prediction, variance, image_shape=SHAPE)
    return DiffusionLoss(model, TrainConfig(iterations=1, **config))


def pixels(n: int) -> torch.Tensor:
    """8-bit images, black and white ones among their pixels"""
    levels = torch.randint(0, 256, (n, *SHAPE), generator=torch.Generator().manual_seed(0))
    levels[:, 0, 0, :2] = torch.tensor([0, 255])
    return levels.float() / 127.5 - 1


# Randomness


def test_draws_do_not_depend_on_the_batch_split() -> None:
    loss, clean = loss_of(), torch.zeros(12, *SHAPE)

    def of(start: int, n: int) -> tuple[torch.Tensor, ...]:
        keys = sample_keys(5, 100 + start, n)
        words, dropped = draw(keys, 0.3)
        return words, dropped, *loss.noised(clean[:n], keys, Uniform(1000).choose(words)[0])

    parts = [of(start, n) for start, n in ((0, 1), (1, 7), (8, 4))]
    for tensor, pieces in zip(of(0, 12), zip(*parts, strict=True), strict=True):
        assert torch.equal(tensor, torch.cat(pieces))


def test_runs_and_samples_share_no_key() -> None:
    keys = torch.cat([sample_keys(seed, 0, 5000) for seed in (0, 1, 2**63 - 1)])
    assert len(keys.unique()) == 15000


def test_draw_has_the_stated_distributions() -> None:
    n, T = 20000, 50
    keys = sample_keys(3, 0, n)
    words, dropped = draw(keys, 0.1)
    t, weights = Uniform(T).choose(words)
    _, eps = loss_of().noised(torch.zeros(n, 1, 2, 2), keys, t)
    counts = t.bincount(minlength=T).double()
    assert len(counts) == T and (weights == 1).all()
    # chi-squared with 49 degrees of freedom: 5 standard deviations above its mean
    assert ((counts - n / T) ** 2 / (n / T)).sum() < 49 + 5 * math.sqrt(2 * 49)
    assert abs(dropped.double().mean() - 0.1) < 5 * math.sqrt(0.09 / n)
    # neither t nor the label drop may lean on the noise or on one another
    columns = torch.stack([t.double(), dropped.double(), *eps.flatten(1).double().unbind(1)])
    correlation = torch.corrcoef(columns) - torch.eye(6)
    assert correlation.abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize(("p_uncond", "expected"), [(0.0, False), (1.0, True)])
def test_p_uncond_extremes_are_exact(p_uncond: float, expected: bool) -> None:
    assert (draw(sample_keys(0, 0, 4000), p_uncond)[1] == expected).all()


# Losses


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_loss_is_its_formula(prediction: str, schedule: str) -> None:
    """Each of the losses, variances and weights, at t = 0, 1 and beyond, against one image at a time in float64"""
    t = torch.tensor([0, 1, 2, 400, 900])
    x0, keys = pixels(len(t)), sample_keys(1, 0, len(t))
    generator = torch.Generator().manual_seed(1)
    eps = philox_normal(keys, SHAPE, draw=0, stream=STREAM_TRAINING)
    betas, abars = BETAS[schedule], ABARS[schedule]
    cases = [("simple", "fixed_small", None), ("simple", "fixed_large", 5.0), ("hybrid", "learned_range", None)]
    cases += [("hybrid", "learned_range", 5.0)]
    cases += [(loss, v, None) for loss in ("vlb", "kl") for v in ("fixed_small", "fixed_large", "learned_range")]
    for name, variance, gamma in cases:
        loss = loss_of(schedule, prediction, variance, loss=name, min_snr_gamma=gamma, vlb_weight=0.002)
        x, target = loss.noised(x0, keys, t)
        assert x.is_contiguous(memory_format=torch.channels_last)
        # a network that is nearly right, as bounds of wrong ones overflow
        v = 1.2 * torch.rand(target.shape, generator=generator) - 0.6
        output = torch.cat([target + 0.01 * torch.randn(target.shape, generator=generator), v], 1)
        found = loss.terms(output, x0, x, target, t)
        for i, at in enumerate(t.tolist()):
            clean, noise, said = (tensor[i].double().numpy() for tensor in (x0, eps, output))
            noisy = math.sqrt(abars[at]) * clean + math.sqrt(1 - abars[at]) * noise
            wanted = paper.target(clean, noise, abars[at], prediction)
            simple = float(np.mean((said[:2] - wanted) ** 2))
            vlb = 1000 * paper.bound_term(clean, noisy, said, at, betas, abars, prediction, variance)
            weight = 1.0 if gamma is None else paper.min_snr_weight(abars[at], prediction, gamma)
            expected = {
                "simple": weight * simple,
                "hybrid": weight * simple + 0.002 * vlb,
                "vlb": vlb,
                "kl": vlb / 1000,
            }
            # 1 / alpha of the cosine schedule's last times magnifies float32's rounding
            assert float(found.loss[i]) == pytest.approx(expected[name], rel=5e-3, abs=1e-6), (name, variance, at)
            assert float(found.parts["mse"][i]) == pytest.approx(simple, rel=1e-4)


def test_the_hybrid_loss_trains_the_variance_by_the_bound_and_the_mean_by_the_error() -> None:
    t, x0, keys = torch.tensor([0, 3, 500]), pixels(3), sample_keys(2, 0, 3)
    gradients = {}
    for name in ("hybrid", "vlb"):
        loss = loss_of(variance="learned_range", loss=name, vlb_weight=0.5)
        x, target = loss.noised(x0, keys, t)
        output = torch.cat([target * 0.9, 0.3 * torch.ones_like(target)], 1).requires_grad_()
        (gradients[name],) = torch.autograd.grad(loss.terms(output, x0, x, target, t).loss.sum(), output)
        error = 2 * (output[:, :2] - target).detach() / target[0].numel()
    torch.testing.assert_close(gradients["hybrid"][:, :2], error)
    torch.testing.assert_close(gradients["hybrid"][:, 2:], 0.5 * gradients["vlb"][:, 2:])
    assert (gradients["vlb"][:, :2] - error).abs().max() > 1e-3 and gradients["vlb"][:, 2:].abs().max() > 0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_and_noising_are_those_of_diffusers(prediction: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    t, x0, keys = torch.tensor([0, 1, 400, 999]), pixels(4), sample_keys(9, 0, 4)
    loss = loss_of("linear", prediction)
    x, target = loss.noised(x0, keys, t)
    eps = philox_normal(keys, SHAPE, draw=0, stream=STREAM_TRAINING)
    scheduler = diffusers.DDPMScheduler(1000, beta_schedule="linear")
    torch.testing.assert_close(x, scheduler.add_noise(x0, eps, t))
    theirs = {"eps": eps, "v": scheduler.get_velocity(x0, eps, t), "x0": x0}[prediction]
    torch.testing.assert_close(target, theirs)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_as_diffusers_computes_it(prediction: str) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    diffusers = pytest.importorskip("diffusers")
    t = torch.tensor([0, 1, 100, 400, 900, 999])
    snr = training_utils.compute_snr(diffusers.DDPMScheduler(1000, beta_schedule="linear"), t)
    theirs = torch.stack([snr, 5 * torch.ones_like(snr)], 1).amin(1)
    theirs = {"eps": theirs / snr, "v": theirs / (snr + 1), "x0": theirs}[prediction]
    torch.testing.assert_close(loss_of("linear", prediction, min_snr_gamma=5.0).weight[t], theirs, rtol=1e-3, atol=0)


def test_a_loss_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss='hybrid' trains a learned variance, the model's is 'fixed_small'"):
        loss_of(loss="hybrid")
    with pytest.raises(ValueError, match=r"loss='simple' trains no variance.* use 'hybrid' or 'vlb'"):
        loss_of(variance="learned_range", loss="simple")
    assert loss_of(variance="learned_range").name == "hybrid" and loss_of().name == "simple"
    with pytest.raises(ValueError, match="min_snr_gamma"):
        loss_of(loss="vlb", min_snr_gamma=5.0)


# Classifiers


def test_a_classifier_is_trained_by_the_cross_entropy_at_x_t() -> None:
    seen: list[torch.Tensor] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.extend((x, t))
        return x.flatten(1)[:, :10] * t[:, None] / 100

    classifier = Classifier(network, "linear", 10, SHAPE)
    loss = ClassifierLoss(classifier, TrainConfig(iterations=1))
    t, x0, keys, y = torch.tensor([5, 500]), pixels(2), sample_keys(4, 0, 2), torch.tensor([3, 7])
    terms = loss(network, Batch(x0, y, keys, t))
    torch.testing.assert_close(seen[0], loss_of().noised(x0, keys, t)[0])
    assert seen[1].tolist() == [5.0, 500.0]
    for i in range(2):
        logits = (seen[0][i].flatten()[:10] * t[i] / 100).double().numpy()
        expected = math.log(np.exp(logits).sum()) - logits[y[i]]
        assert float(terms.loss[i]) == pytest.approx(expected, rel=1e-5)
        assert bool(terms.parts["accuracy"][i]) == (int(logits.argmax()) == int(y[i]))
    with pytest.raises(ValueError, match="cross entropy"):
        ClassifierLoss(classifier, TrainConfig(iterations=1, loss="simple"))
