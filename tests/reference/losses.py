"""Training losses as the papers write them, for one image in NumPy float64"""

import math
from collections.abc import Sequence

import numpy as np
from reference.ddpm import predicted_x0


def target(x0: np.ndarray, eps: np.ndarray, abar: float, prediction: str) -> np.ndarray:
    """What the network should say; v of 2202.00512, appendix D"""
    return {"eps": eps, "x0": x0, "v": math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0}[prediction]


def min_snr_weight(abar: float, prediction: str, gamma: float) -> float:
    """2303.09556, section 3.4: the error of x0 weighs min(SNR, gamma), whatever the network predicts"""
    snr = abar / (1 - abar)
    return min(snr, gamma) / {"x0": 1.0, "eps": snr, "v": snr + 1}[prediction]


def log_variance(t: int, betas: Sequence[float], abars: Sequence[float], variance: str, v: np.ndarray) -> np.ndarray:
    """Of p(x_{t-1} | x_t); at t = 0 beta tilde is that of t = 1, and so is the fixed large variance"""

    def beta_tilde(i: int) -> float:
        i = max(i, 1)
        return betas[i] * (1 - abars[i - 1]) / (1 - abars[i])

    if variance == "fixed_small":
        return np.full_like(v, math.log(beta_tilde(t)))
    if variance == "fixed_large":
        return np.full_like(v, math.log(betas[t] if t else beta_tilde(0)))
    f = (v + 1) / 2  # 2102.09672 equation 15
    return f * math.log(betas[t]) + (1 - f) * math.log(beta_tilde(t))


def bound_term(
    x0: np.ndarray,
    x_t: np.ndarray,
    out: np.ndarray,
    t: int,
    betas: Sequence[float],
    abars: Sequence[float],
    prediction: str,
    variance: str,
) -> float:
    """L_t of 2102.09672 equations 4 to 7 in bits per dimension; out is (2C, H, W), x0 holds 8-bit pixels"""
    C = len(x0)
    abar, abar_prev, beta = abars[t], abars[t - 1] if t else 1.0, betas[t]
    c_x0 = math.sqrt(abar_prev) * beta / (1 - abar)
    c_x = math.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar)
    mean = c_x0 * predicted_x0(x_t, out[:C], abar, prediction) + c_x * x_t
    logs = log_variance(t, betas, abars, variance, out[C:])
    nats = []
    for value, m, log_var, noisy in zip(x0.flat, mean.flat, logs.flat, x_t.flat, strict=True):
        if t == 0:

            def cdf(y: float, m: float = m, log_var: float = log_var) -> float:
                z = (y - m) / math.exp(log_var / 2)
                return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

            upper = 1.0 if value > 0.999 else cdf(value + 1 / 255)
            lower = 0.0 if value < -0.999 else cdf(value - 1 / 255)
            nats.append(-math.log(max(upper - lower, 1e-12)))
        else:
            true_mean, true_log_var = c_x0 * value + c_x * noisy, math.log(beta * (1 - abar_prev) / (1 - abar))
            ratio = math.exp(true_log_var - log_var)
            nats.append(0.5 * (log_var - true_log_var + ratio + (true_mean - m) ** 2 / math.exp(log_var) - 1))
    return float(np.mean(nats)) / math.log(2)
