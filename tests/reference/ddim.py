"""DDIM's sampling and its inverse as the paper writes them: one image, one timestep at a time, in NumPy float64"""

import math
from collections.abc import Sequence

import numpy as np
from reference.ddpm import Predict, predicted_x0


def sample(
    predict: Predict,
    x_T: np.ndarray,
    noise: np.ndarray | None,
    times: Sequence[float],
    abars: Sequence[float],
    *,
    prediction: str = "eps",
    eta: float = 0.0,
    clip: bool = True,
    eps_from: str = "x0",
) -> np.ndarray:
    """2010.02502 equations 12 and 16; the arguments are those of ddpm.sample

    eps_from: "x0" derives the direction again from the clipped x0, "network" keeps what the network said.
    """
    x = x_T.astype(np.float64)
    C = len(x)
    for i, t in enumerate(times):
        abar, abar_prev = abars[i], abars[i + 1] if i + 1 < len(times) else 1.0
        out = predict(x, t)[:C]
        x0 = predicted_x0(x, out, abar, prediction)
        eps = out if prediction == "eps" else (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        if clip:
            x0 = np.clip(x0, -1, 1)
        if eps_from == "x0":
            eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar)) * math.sqrt(1 - abar / abar_prev)
        x = math.sqrt(abar_prev) * x0 + math.sqrt(max(1 - abar_prev - sigma**2, 0.0)) * eps
        if sigma > 0 and noise is not None:
            x = x + sigma * noise[i]
    return x


def encode(predict: Predict, x0: np.ndarray, times: Sequence[float], abars: Sequence[float]) -> np.ndarray:
    """x_T of an image: the ODE of 2010.02502 section 4.3, upward by explicit steps, eps prediction, no clipping"""
    x, abar = x0.astype(np.float64), 1.0
    for t, abar_next in zip(reversed(times), reversed(abars), strict=True):
        # the eps of the level stepped to, taken at the state stepped from
        eps = predict(x, t)
        clean = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        x, abar = math.sqrt(abar_next) * clean + math.sqrt(1 - abar_next) * eps, abar_next
    return x
