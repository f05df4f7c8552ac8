"""DDPM's ancestral sampling as the papers write it: one image, one timestep at a time, in NumPy float64"""

import math
from collections.abc import Callable, Sequence

import numpy as np

Predict = Callable[[np.ndarray, float], np.ndarray]


def predicted_x0(x: np.ndarray, g: np.ndarray, abar: float, prediction: str) -> np.ndarray:
    if prediction == "eps":  # 2006.11239 equation 15
        return (x - math.sqrt(1 - abar) * g) / math.sqrt(abar)
    if prediction == "v":  # 2202.00512 appendix D
        return math.sqrt(abar) * x - math.sqrt(1 - abar) * g
    assert prediction == "x0"
    return g


def sample(
    predict: Predict,
    x_T: np.ndarray,
    noise: np.ndarray,
    times: Sequence[float],
    abars: Sequence[float],
    *,
    prediction: str = "eps",
    variance: str = "fixed_small",
    clip: bool = True,
) -> np.ndarray:
    """2006.11239 algorithm 2 and equation 7, on the respaced chain of 2102.09672 section 4

    predict(x, t) -> (C, H, W), or (2C, H, W) with v in the second half; x_T (C, H, W); noise (rows, C, H, W);
    times (rows,) descending and abars there. No noise in the last row.
    """
    x = x_T.astype(np.float64)
    C = len(x)
    for i, t in enumerate(times):
        last = i + 1 == len(times)
        abar, abar_prev = abars[i], 1.0 if last else abars[i + 1]
        beta = 1 - abar / abar_prev
        out = predict(x, t)
        x0 = predicted_x0(x, out[:C], abar, prediction)
        if clip:
            x0 = np.clip(x0, -1, 1)
        mean = math.sqrt(abar_prev) * beta / (1 - abar) * x0 + math.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar) * x
        if last:
            return mean
        beta_tilde = (1 - abar_prev) / (1 - abar) * beta
        if variance == "fixed_small":
            std = math.sqrt(beta_tilde)
        elif variance == "fixed_large":
            std = math.sqrt(beta)
        else:  # 2102.09672 equation 15, with v scaled from [-1, 1] to [0, 1]
            v = (out[C:] + 1) / 2
            std = np.exp(0.5 * (v * math.log(beta) + (1 - v) * math.log(beta_tilde)))
        x = mean + std * noise[i]
    raise ValueError("times must not be empty")
