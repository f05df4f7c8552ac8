"""eps, v and x0 say the same thing in different words"""

import numpy as np
import pytest
import torch

from fastdiff.prediction import PREDICTIONS, named_prediction

ANGLES = np.linspace(0.01, np.pi / 2 - 0.01, 7)
ALPHA, SIGMA = np.cos(ANGLES), np.sin(ANGLES)
RNG = np.random.default_rng(0)
X0, EPS = RNG.standard_normal((2, 7))
X = ALPHA * X0 + SIGMA * EPS
# DDPM equation 14's eps, the data itself, and Progressive Distillation's v (2202.00512 appendix D)
SAID = {"eps": EPS, "x0": X0, "v": ALPHA * EPS - SIGMA * X0}


def test_the_known_predictions():
    assert set(PREDICTIONS) == set(SAID)
    with pytest.raises(ValueError, match=r"prediction must be one of \['eps', 'v', 'x0'\], got 'score'"):
        named_prediction("score")


@pytest.mark.parametrize("name", sorted(SAID))
def test_what_the_network_says_gives_x0_and_eps_back(name):
    kind, g = named_prediction(name), SAID[name]
    k_x, k_out = kind.to_x0(ALPHA, SIGMA)
    np.testing.assert_allclose(k_x * X + k_out * g, X0, rtol=0, atol=1e-12)
    e_x, e_out = kind.to_eps(ALPHA, SIGMA)
    np.testing.assert_allclose(e_x * X + e_out * g, EPS, rtol=0, atol=1e-12)
    g_x0, g_eps = kind.target(ALPHA, SIGMA)
    np.testing.assert_allclose(g_x0 * X0 + g_eps * EPS, g, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", sorted(SAID))
def test_the_training_target_of_images(name, dtype):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 7, 2, 3, 3, generator=generator, dtype=torch.float64).to(dtype)
    alpha, sigma = torch.from_numpy(ALPHA).to(dtype), torch.from_numpy(SIGMA).to(dtype)
    target = named_prediction(name).training_target(x0, eps, alpha, sigma)
    assert target.dtype == dtype
    for i in range(7):
        said = {"eps": eps[i], "x0": x0[i], "v": alpha[i] * eps[i] - sigma[i] * x0[i]}[name]
        torch.testing.assert_close(target[i], said, rtol=1e-6, atol=1e-6)


def test_without_signal_only_eps_says_nothing_about_x0():
    alpha, sigma = np.array([0.5, 0.0]), np.array([0.75**0.5, 1.0])
    with pytest.raises(ValueError, match="alpha = 0; use 'v' or 'x0'"):
        named_prediction("eps").to_x0(alpha, sigma)
    for name in ("v", "x0"):
        k_x, k_out = named_prediction(name).to_x0(alpha, sigma)
        g_x0, _ = named_prediction(name).target(alpha, sigma)
        np.testing.assert_allclose(k_x * alpha + k_out * g_x0, 1)
