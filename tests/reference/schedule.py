"""Noise schedules and spacings as the papers and their first code write them: Python loops in float64"""

import math
from collections.abc import Sequence

import numpy as np


def linear_betas(T: int) -> list[float]:
    """DDPM (2006.11239) section 4, endpoints scaled by 1000 / T as in 2102.09672"""
    first, last = 1e-4 * 1000 / T, 2e-2 * 1000 / T
    return [first + (last - first) * i / (T - 1) for i in range(T)]


def cosine_betas(T: int) -> list[float]:
    """Improved DDPM (2102.09672) equation 17 with s = 0.008, betas at most 0.999"""

    def f(t: int) -> float:
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - (f(t) / f(0)) / (f(t - 1) / f(0)), 0.999) for t in range(1, T + 1)]


def alphas_cumprod(betas: Sequence[float]) -> list[float]:
    product, products = 1.0, []
    for beta in betas:
        product *= 1 - beta
        products.append(product)
    return products


def abar_at(t: float, betas: Sequence[float]) -> float:
    """abar at time t; between two integers the log-SNR is interpolated linearly"""
    abar = alphas_cumprod(betas)
    low, fraction = math.floor(t), t - math.floor(t)
    if fraction == 0:
        return abar[low]
    log_snr = [math.log(abar[i] / (1 - abar[i])) for i in (low, low + 1)]
    return 1 / (1 + math.exp(-((1 - fraction) * log_snr[0] + fraction * log_snr[1])))


def sections(counts: Sequence[int], T: int) -> list[int]:
    """Ascending times: T cut into len(counts) parts, the longer ones first, each strided fractionally"""
    chosen, start = [], 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (1 if i < T % len(counts) else 0)
        assert count <= size
        stride = 1 if count <= 1 else (size - 1) / (count - 1)
        current = 0.0
        for _ in range(count):
            chosen.append(start + round(current))
            current += stride
        start += size
    return chosen


def integer_stride(count: int, T: int) -> list[int] | None:
    """Ascending times of the smallest integer stride from 0 that gives count of them; None where no stride does"""
    for stride in range(1, T):
        if len(range(0, T, stride)) == count:
            return list(range(0, T, stride))
    return None


def leading(count: int, T: int) -> list[int]:
    """Descending, as diffusers"""
    return [i * (T // count) for i in range(count)][::-1]


def linspace(count: int, T: int) -> list[int]:
    return [int(t) for t in np.linspace(0, T - 1, count).round()][::-1]


def trailing(count: int, T: int) -> list[int]:
    """As diffusers, with its stray extra times where the float stride falls short of zero"""
    return [int(t) - 1 for t in np.round(np.arange(T, 0, -T / count))]
