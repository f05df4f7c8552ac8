"""The terms of the variational bound as the papers write them: one image, one level, pixel by pixel, in float64"""

import math
from collections.abc import Sequence

import numpy as np
from reference.ddpm import predicted_x0


def posterior(x0: float, x_t: float, abar: float, abar_prev: float) -> tuple[float, float]:
    """Mean and variance of q(x_{t-1} | x_t, x0), 2006.11239 equations 6 and 7"""
    beta = 1 - abar / abar_prev
    mean = math.sqrt(abar_prev) * beta / (1 - abar) * x0 + math.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar) * x_t
    return mean, (1 - abar_prev) / (1 - abar) * beta


def reverse_variance(i: int, abars: Sequence[float], variance: str, v: float) -> float:
    """Of p(x_{i-1} | x_i); abars ascend from the least noise to the most"""
    abar, abar_prev = abars[i], abars[i - 1] if i > 0 else 1.0
    beta = 1 - abar / abar_prev
    beta_tilde = (1 - abar_prev) / (1 - abar) * beta
    if i == 0:
        # the chain's first beta tilde is 0 and takes the value of the second
        beta_tilde = beta if len(abars) == 1 else (1 - abars[0]) / (1 - abars[1]) * (1 - abars[1] / abars[0])
    if variance == "fixed_small":
        return beta_tilde
    if variance == "fixed_large":
        return beta if i > 0 else beta_tilde
    # 2102.09672 equation 15, with v scaled from [-1, 1] to [0, 1]
    return math.exp((v + 1) / 2 * math.log(beta) + (1 - (v + 1) / 2) * math.log(beta_tilde))


def kl(mean1: float, variance1: float, mean2: float, variance2: float) -> float:
    """KL(N(mean1, variance1) || N(mean2, variance2)) in nats"""
    return 0.5 * math.log(variance2 / variance1) + (variance1 + (mean1 - mean2) ** 2) / (2 * variance2) - 0.5


def cdf(z: float) -> float:
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def discretized(x: float, mean: float, variance: float) -> float:
    """Log-likelihood of an 8-bit pixel in nats, 2006.11239 equation 13"""
    upper = 1.0 if x > 0.999 else cdf((x + 1 / 255 - mean) / math.sqrt(variance))
    lower = 0.0 if x < -0.999 else cdf((x - 1 / 255 - mean) / math.sqrt(variance))
    return math.log(max(upper - lower, 1e-12))


def term(
    x0: np.ndarray,
    x_t: np.ndarray,
    out: np.ndarray,
    i: int,
    abars: Sequence[float],
    *,
    prediction: str,
    variance: str,
    clip: bool,
) -> float:
    """Level i's term in bits per dimension; x0, x_t (C, H, W), out (C or 2C, H, W), abars ascending in noise"""
    C = len(x0)
    abar, abar_prev = abars[i], abars[i - 1] if i > 0 else 1.0
    predicted = predicted_x0(x_t, out[:C], abar, prediction)
    nats = []
    for pixel in np.ndindex(x0.shape):
        guess = float(predicted[pixel])
        if clip:
            guess = min(max(guess, -1.0), 1.0)
        v = float(out[C:][pixel]) if variance == "learned_range" else 0.0
        p_mean, _ = posterior(guess, float(x_t[pixel]), abar, abar_prev)
        p_variance = reverse_variance(i, abars, variance, v)
        if i == 0:
            nats.append(-discretized(float(x0[pixel]), p_mean, p_variance))
        else:
            q_mean, q_variance = posterior(float(x0[pixel]), float(x_t[pixel]), abar, abar_prev)
            nats.append(kl(q_mean, q_variance, p_mean, p_variance))
    return sum(nats) / len(nats) / math.log(2)


def prior(x0: np.ndarray, abar_T: float) -> float:
    """KL(q(x_T | x0) || N(0, I)) in bits per dimension"""
    nats = [kl(math.sqrt(abar_T) * float(x), 1 - abar_T, 0.0, 1.0) for x in x0.flat]
    return sum(nats) / len(nats) / math.log(2)
