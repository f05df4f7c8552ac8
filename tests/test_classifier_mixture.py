"""A mixture of Gaussians, whose networks and classifier are exact: guided by it, unconditional is conditional

For x0 ~ N(m_k, s_k^2 I) with probability p_k, x_t ~ N(alpha m_k, v_k I), v_k = alpha^2 s_k^2 + sigma^2: with every
p(k | x_t) known, grad log p(y | x_t) = grad log p(x_t | y) - grad log p(x_t), so that at scale 1 the score form puts
the conditional network for the unconditional one, whatever the solver.
"""

import functools
import math

import pytest
import torch
from reference.networks import randomness
from sampling_cases import with_history
from test_gaussian import dpm_solver_pp_2m, levels

from fastdiff import Classifier, DiffusionModel, Sampler
from fastdiff.solvers import ddim

SHAPE, STEPS, CLASSES = (1, 2, 2), 12, 3
LOG_PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
MEANS = torch.tensor([[0.8, -0.5, 0.1, 0.3], [-0.6, 0.2, 0.9, -0.8], [0.1, 0.7, -0.4, 0.5]], dtype=torch.float64)
STD = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
LABELS = [0, 1, 2, 1]


def components(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(k, x_t) (B, 3) but for a constant, and each component's score (B, 3, 4)"""
    alpha, sigma = levels(t)
    away = x.flatten(1)[:, None] - alpha[..., None] * MEANS
    variance = (alpha * STD) ** 2 + sigma**2
    log_p = LOG_PRIOR - (away**2).sum(-1) / (2 * variance) - 2 * variance.log()
    return log_p, -away / variance[..., None]


def judge(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return components(x, t)[0]


def exact(prediction: str, v: float | None = None):
    """Label 3, or none: the mixture"""

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        log_p, scores = components(x, t)
        share = torch.softmax(log_p, 1)
        if y is not None:
            share = torch.where((y < CLASSES)[:, None], torch.eye(CLASSES + 1, dtype=x.dtype)[y, :CLASSES], share)
        alpha, sigma = levels(t)
        eps = -sigma * (share[..., None] * scores).sum(1)
        x0 = (x.flatten(1) - sigma * eps) / alpha
        g = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[prediction].reshape(x.shape)
        return g if v is None else torch.cat([g, torch.full_like(g, v)], dim=1)

    return network


def a_model(prediction: str = "eps", conditional: bool = True, v: float | None = None) -> DiffusionModel:
    return DiffusionModel(
        exact(prediction, v),
        "linear",
        prediction,
        "fixed_small" if v is None else "learned_range",
        num_classes=CLASSES if conditional else None,
        image_shape=SHAPE,
        clip_x0=False,
    )


CLASSIFIER = Classifier(judge, "linear", CLASSES, SHAPE)
SOLVERS = {
    "ddim": {"solver": "ddim"},
    "ddim eta 0.3": {"solver": "ddim", "eta": 0.3},
    "ddim eta 1": {"solver": "ddim", "eta": 1},
    "ddim eps network": {"solver": functools.partial(ddim, eps="network")},
    "ddim eps network, eta 0.3": {"solver": functools.partial(ddim, eps="network"), "eta": 0.3},
    "ddpm": {"solver": "ddpm"},
    "history": {"solver": with_history},
}
CASES = [(solver, prediction) for solver in SOLVERS for prediction in ("eps", "v", "x0")]


def sampled(model: DiffusionModel, call: dict, **options) -> torch.Tensor:
    x_T, noise = randomness(STEPS, len(LABELS), SHAPE)
    sampler = Sampler(model, **{"steps": STEPS, "dtype": "float64"} | options)
    return sampler(LABELS, x_T=x_T, noise=noise, **call)


def guided(model: DiffusionModel, call: dict, **options) -> torch.Tensor:
    return sampled(model, call, classifier=CLASSIFIER, classifier_form="score", **options)


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.isfinite().all() and expected.abs().max() < 10
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("solver", "prediction"), CASES, ids=map(", ".join, CASES))
def test_the_unconditional_network_becomes_the_conditional_one(solver, prediction) -> None:
    expected = sampled(a_model(prediction), {}, **SOLVERS[solver])
    assert_equal(guided(a_model(prediction, conditional=False), {}, **SOLVERS[solver]), expected)
    # and the null rows of a conditional one, whose labels still reach the classifier
    assert_equal(guided(a_model(prediction), {"w": -1.0}, **SOLVERS[solver]), expected)
    assert (sampled(a_model(prediction), {"w": -1.0}, **SOLVERS[solver]) - expected).abs().max() > 0.1


def test_with_a_second_order_history() -> None:
    options = {"solver": dpm_solver_pp_2m}
    assert_equal(guided(a_model(conditional=False), {}, **options), sampled(a_model(), {}, **options))


@pytest.mark.parametrize("v", [-1.0, 0.3])
def test_with_a_learned_variance(v) -> None:
    expected = sampled(a_model(v=v), {}, solver="ddpm")
    assert_equal(guided(a_model(conditional=False, v=v), {}, solver="ddpm"), expected)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "ddim eps network"])
def test_w_and_the_scale_add_up(solver) -> None:
    """eps_cond - eps_null = -sigma grad, so that 1 + w of either, or of both together, is one w"""
    w = [1.5, 0.0, 0.5, 2.0]
    expected = sampled(a_model(), {"w": w}, **SOLVERS[solver])
    alone = [1 + each for each in w]
    assert_equal(guided(a_model(conditional=False), {"classifier_scale": alone}, **SOLVERS[solver]), expected)
    together = {"w": [1.0, 0.0, -1.0, 0.0], "classifier_scale": [0.5, 0.0, 1.5, 2.0]}
    assert_equal(guided(a_model(), together, **SOLVERS[solver]), expected)


def test_the_mean_form_tends_to_it_with_the_steps() -> None:
    """It takes the gradient of a step's start for all of the step (2105.05233 equation 8): first order"""
    errors = []
    for steps in (100, 200, 400):
        x_T, noise = randomness(steps, len(LABELS), SHAPE)
        call = {"labels": LABELS, "x_T": x_T, "noise": noise}
        options = {"steps": steps, "solver": "ddpm", "dtype": "float64"}
        mean = Sampler(a_model(conditional=False), **options, classifier=CLASSIFIER)(**call)
        errors.append((mean - Sampler(a_model(), **options)(**call)).abs().max().item())
    assert errors[-1] < 0.1 and math.log2(errors[0] / errors[-1]) > 1.4, errors
