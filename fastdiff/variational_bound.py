"""The variational bound on the negative log-likelihood, term by term, in bits per dimension.

For a chain of levels i = 0, 1, ..., R - 1, least noise first, and an image x0 of 8-bit pixels:

    L = prior + sum_i term_i
    prior  = KL(q(x_T | x0) || N(0, I))
    term_i = KL(q(x_{i-1} | x_i, x0) || p(x_{i-1} | x_i))    i > 0
    term_0 = -log p(x0 | x_0)                                the discretised Gaussian

DDPM (2006.11239) equations 5 to 7 and 13, Improved DDPM (2102.09672) equations 4 to 7 and 15.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastdiff.schedule import Schedule, Steps
from fastdiff.solvers import ddpm

__all__ = ["VariationalBound", "discretized_gaussian_log_likelihood", "normal_kl"]


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) of each element in nats; shapes broadcast."""
    d = log_variance1 - log_variance2
    # expm1(d) - d, not exp(d) - 1 - d: variances that nearly agree keep their digits in float32
    return 0.5 * (torch.expm1(d) - d + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass that N(mean, exp(log_variance)) has in the bin of each 8-bit pixel, in nats; shapes broadcast.

    x: pixels u / 127.5 - 1 of u in 0, ..., 255. A bin is x +- 1/255; those of |x| > 0.999 reach to infinity, so that
    the 256 masses sum to 1. The Gaussian's distribution function is 0.5 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))),
    off by 3e-4 at most, and a mass counts as 1e-12 at least, below which no gradient is left.

    DDPM equation 13, with the approximation of Page (1977), which is that of the published bits per dimension.
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    centred = x - mean
    # inner bins are mirrored into the lower half: there a small mass keeps its digits in float32
    low = -centred.abs()
    inner = _normal_cdf(inverse_std * (low + 1 / 255)) - _normal_cdf(inverse_std * (low - 1 / 255))
    black = _normal_cdf(inverse_std * (centred + 1 / 255))
    white = _normal_cdf(-inverse_std * (centred - 1 / 255))
    mass = torch.where(x < -0.999, black, torch.where(x > 0.999, white, inner))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    # 0.5 (1 + tanh(u)) = sigmoid(2 u), which does not cancel where z << 0; at 30 it is 0 or 1 in any dtype, and beyond
    # the cube may overflow and spoil the gradient
    z = z.clamp(-30, 30)
    return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))


class VariationalBound:
    """The bound's terms for one chain, prediction and reverse variance, on one device; differentiable in the output.

    schedule: the training chain. prediction: "eps", "v" or "x0".
    variance: of p: "fixed_small" (beta tilde; at index 0 that of index 1), "fixed_large" (beta; at index 0 beta tilde
        of index 1) or "learned_range" (equation 15 of Improved DDPM; the network's second C channels are v).
    steps: None is the whole chain, so that an index is a time t; else as in `fastdiff.schedule.timesteps`, with the
        betas of the respaced chain.
    clip_x0: clip predictions of x0 to [-1, 1].
    dtype: float32 or float64, of the tables; they are computed in float64 and cast once.

    An index is int64 (B,) in [0, len(bound)) on the device, 0 the least noise; its range is not looked at, as that
    would wait for the device. x0, x_t are (B, C, H, W), and output (B, C or 2C, H, W) is what the network said for x_t
    at times[index]; a second half is ignored by the fixed variances. Results have the wider dtype of tables and input.

    Raises ValueError or TypeError naming the argument. Each image's results depend on that image alone.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: str,
        variance: str,
        *,
        steps: Steps | None = None,
        clip_x0: bool,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"schedule must be a Schedule, got {type(schedule).__name__}; use Schedule.named for a name"
            )
        if not isinstance(clip_x0, bool):
            raise TypeError(f"clip_x0 must be True or False, got {clip_x0!r}")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype!r}")
        chain = schedule.num_train_timesteps if steps is None else steps
        table = ddpm(schedule, chain, prediction=prediction, variance=variance, clip_x0=clip_x0)
        self.prediction, self.variance, self.clip_x0, self.dtype = prediction, variance, clip_x0, dtype

        def cast(values: np.ndarray) -> Tensor:
            # a solver's rows begin with the most noise
            return torch.from_numpy(np.flip(values, 0).copy()).to(device, dtype)

        self.times = cast(table.t)  # (R,), the network's times, ascending
        self.alpha, self.sigma = cast(table.alpha), cast(table.sigma)  # (R,): x_t = alpha * x0 + sigma * eps
        fixed_large = np.append(table.log_beta[:-1], table.log_beta_tilde[-1])
        upper = {"fixed_small": table.log_beta_tilde, "fixed_large": fixed_large, "learned_range": table.log_beta}
        self._rows = cast(table.pack(("k_x", "k_out", "c_x", "c_x0", "log_beta_tilde")))
        self._upper = cast(upper[variance])
        abar = float(table.alpha[0] ** 2)
        # of the prior's variance alone, in nats; in float32 it would be lost against 1
        self._abar, self._prior = abar, -0.5 * (math.log1p(-abar) + abar)

    def __len__(self) -> int:
        return len(self.times)

    def terms(self, x0: Tensor, x_t: Tensor, output: Tensor, index: Tensor) -> Tensor:
        """The bound's term of each image at its index, in bits per dimension, (B,).

        At index 0 the pixels are those of x0 rounded to 8 bits. The whole bound is `prior` plus the sum over all
        indices; an index drawn uniformly estimates that sum by len(bound) times its term.
        """
        if x0.shape != x_t.shape:
            raise ValueError(f"x0 must have the shape of x_t, {tuple(x_t.shape)}, got {tuple(x0.shape)}")
        mean, log_variance = self.reverse(x_t, output, index)
        c_x, c_x0, log_beta_tilde = self._coefficients(index)[2:]
        posterior_mean = c_x * x_t + c_x0 * x0
        first = (index == 0)[:, None, None, None]
        # at index 0 a KL that nobody asks for may be infinite, and not selected it would still make the gradient NaN
        finite = torch.where(first, log_beta_tilde, log_variance)
        kl = normal_kl(posterior_mean, log_beta_tilde, mean, finite)
        pixels = torch.floor(x0 * 127.5 + 128) / 127.5 - 1
        log_likelihood = discretized_gaussian_log_likelihood(pixels, mean, log_variance)
        return torch.where(first, -log_likelihood, kl).flatten(1).mean(1) / math.log(2)

    def prior(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x0) || N(0, I)) of each image in bits per dimension, (B,): what no network can change."""
        x0 = x0.to(torch.promote_types(x0.dtype, self.dtype))
        return (0.5 * self._abar * x0.square().flatten(1).mean(1) + self._prior) / math.log(2)

    def reverse(self, x_t: Tensor, output: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of p(x_{i-1} | x_i), both (B, C, H, W); DDPM equation 7 at the predicted x0."""
        x0 = self.predicted_x0(x_t, output, index)
        _, _, c_x, c_x0, log_beta_tilde = self._coefficients(index)
        mean = c_x * x_t + c_x0 * x0
        upper = self._upper[index][:, None, None, None]
        if self.variance != "learned_range":
            return mean, upper.expand_as(mean)
        f = (self._widened(output[:, x_t.shape[1] :]) + 1) / 2
        return mean, f * upper + (1 - f) * log_beta_tilde

    def predicted_x0(self, x_t: Tensor, output: Tensor, index: Tensor) -> Tensor:
        """x0 as the network's output has it, (B, C, H, W), clipped where clip_x0."""
        self._check(x_t, output, index)
        k_x, k_out = self._coefficients(index)[:2]
        x0 = k_x * x_t + k_out * self._widened(output[:, : x_t.shape[1]])
        return x0.clamp(-1, 1) if self.clip_x0 else x0

    def _coefficients(self, index: Tensor) -> tuple[Tensor, ...]:
        """k_x, k_out, c_x, c_x0, log_beta_tilde, (B, 1, 1, 1) each."""
        return self._rows[index][:, :, None, None, None].unbind(1)

    def _widened(self, output: Tensor) -> Tensor:
        # half precision cannot hold (v + 1) / 2
        return output.to(torch.promote_types(output.dtype, self.dtype))

    def _check(self, x_t: Tensor, output: Tensor, index: Tensor) -> None:
        if x_t.ndim != 4:
            raise ValueError(f"x_t must be (B, C, H, W), got shape {tuple(x_t.shape)}")
        B, C, *size = x_t.shape
        channels = (2 * C,) if self.variance == "learned_range" else (C, 2 * C)
        if output.shape not in [(B, c, *size) for c in channels]:
            expected = " or ".join(str((B, c, *size)) for c in channels)
            raise ValueError(
                f"output must have shape {expected} with variance={self.variance!r}, got {tuple(output.shape)}"
            )
        if index.dtype != torch.int64:
            raise TypeError(f"index must be int64, got {index.dtype}")
        if index.shape != (B,):
            raise ValueError(f"index must have shape ({B},), one an image, got {tuple(index.shape)}")
