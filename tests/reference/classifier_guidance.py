"""Classifier guidance as 2105.05233 section 4 writes it: one image, one timestep at a time, in NumPy float64"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from reference.ddpm import Predict, predicted_x0
from reference.schedule import abar_at

Gradient = Callable[[np.ndarray, float], np.ndarray]


def judged(label: int, interval: tuple[float, float] | None = None, betas: Sequence[float] = ()) -> Gradient:
    """d log softmax(reference.networks.judging(x, t))[label] / dx by hand; zero outside of the interval of sigma_edm"""

    def gradient(x: np.ndarray, t: float) -> np.ndarray:
        if interval is not None:
            abar = abar_at(t, betas)
            if not interval[0] < math.sqrt((1 - abar) / abar) <= interval[1]:
                return np.zeros_like(x)
        k = np.arange(1, 11) / 10
        angle = k[:, None] * x.reshape(1, -1) + np.arange(x.size) + math.sin(3 * t / 1000)
        logits, slopes = np.sin(angle).sum(1), k[:, None] * np.cos(angle)
        p = np.exp(logits - logits.max())
        return (slopes[label] - (p / p.sum()) @ slopes).reshape(x.shape)

    return gradient


def algorithm_1(
    predict: Predict,
    gradient: Gradient,
    scale: float,
    x_T: np.ndarray,
    noise: np.ndarray,
    times: Sequence[float],
    abars: Sequence[float],
    *,
    prediction: str = "eps",
    variance: str = "fixed_small",
    clip: bool = True,
) -> np.ndarray:
    """x_{t-1} ~ N(mu + s Sigma grad, Sigma), the gradient taken at x_t as guided-diffusion does

    The other arguments are those of ddpm.sample. Of the last row, which has no noise, Sigma is guided-diffusion's: 0 if
    fixed_small, the posterior variance of the row before if fixed_large, and that for its lower bound if learned.
    """
    x = x_T.astype(np.float64)
    C = len(x)
    for i, t in enumerate(times):
        last = i + 1 == len(times)
        abar, abar_prev = abars[i], 1.0 if last else abars[i + 1]
        beta = 1 - abar / abar_prev
        beta_tilde = (1 - abar_prev) / (1 - abar) * beta
        clipped = beta_tilde
        if last:
            clipped = beta if i == 0 else (1 - abar) / (1 - abars[i - 1]) * (1 - abars[i - 1] / abar)
        out = predict(x, t)
        x0 = predicted_x0(x, out[:C], abar, prediction)
        if clip:
            x0 = np.clip(x0, -1, 1)
        mean = math.sqrt(abar_prev) * beta / (1 - abar) * x0 + math.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar) * x
        if variance == "fixed_small":
            sigma = np.full(x.shape, beta_tilde)
        elif variance == "fixed_large":
            sigma = np.full(x.shape, clipped if last else beta)
        else:
            v = (out[C:] + 1) / 2
            sigma = np.exp(v * math.log(beta) + (1 - v) * math.log(clipped))
        x = mean + scale * sigma * gradient(x, t)
        if not last:
            x = x + np.sqrt(sigma) * noise[i]
    return x


def algorithm_2(
    predict: Predict,
    gradient: Gradient,
    scale: float,
    x_T: np.ndarray,
    noise: np.ndarray,
    times: Sequence[float],
    abars: Sequence[float],
    *,
    prediction: str = "eps",
    eta: float = 0.0,
    clip: bool = True,
    eps_from: str = "x0",
) -> np.ndarray:
    """eps^ = eps - sqrt(1 - abar) s grad, and DDIM's step from it; the other arguments are those of ddim.sample

    What is clipped is the x0 of before: that of eps^ is not clipped again.
    """
    x = x_T.astype(np.float64)
    C = len(x)
    for i, t in enumerate(times):
        abar, abar_prev = abars[i], abars[i + 1] if i + 1 < len(times) else 1.0
        x0 = predicted_x0(x, predict(x, t)[:C], abar, prediction)
        own = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        if clip:
            x0 = np.clip(x0, -1, 1)
        pushed = math.sqrt(1 - abar) * scale * gradient(x, t)
        eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar) - pushed
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        if eps_from == "network":
            eps = own - pushed
        sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar)) * math.sqrt(1 - abar / abar_prev)
        x = math.sqrt(abar_prev) * x0 + math.sqrt(max(1 - abar_prev - sigma**2, 0.0)) * eps + sigma * noise[i]
    return x
