"""The simple loss of DDPM (2006.11239, equation 14) for eps, v and x0, with randomness that depends on no batch.

Sample number n of a run is keyed by (run seed, n). From Philox stream 2 under that key: draw 0 is eps; word 0 of draw 1
chooses t, word 1 decides whether the label is dropped.
"""

from __future__ import annotations

import numpy as np
import torch

from fastdiff.noise import seed_array
from fastdiff.prediction import named_prediction
from fastdiff.schedule import Schedule
from fastdiff_kernels import STREAM_TRAINING, philox_uint32, q_sample

__all__ = ["Objective", "draw", "sample_keys"]


def sample_keys(seed: int, start: int, n: int) -> torch.Tensor:
    """64-bit Philox keys of samples start .. start + n - 1 of a run, int64 (n,)."""
    return torch.from_numpy(seed_array(seed, n, start=start))


def draw(keys: torch.Tensor, num_train_timesteps: int, p_uncond: float) -> tuple[torch.Tensor, torch.Tensor]:
    """t int64 (B,) uniform in [0, T), and dropped bool (B,), true with probability p_uncond."""
    words = philox_uint32(keys, (2,), draw=1, stream=STREAM_TRAINING)
    return (words[:, 0] * num_train_timesteps) >> 32, words[:, 1] < round(p_uncond * 2**32)


class Objective:
    """Noising and the mean squared error of one schedule and prediction; tables are float64, cast once to float32."""

    def __init__(self, schedule: Schedule, prediction: str, device: torch.device | str = "cpu") -> None:
        self.prediction = named_prediction(prediction)
        tables = schedule.alpha_sigma(np.arange(schedule.num_train_timesteps))
        self.alpha, self.sigma = (torch.from_numpy(table).float().to(device) for table in tables)

    def noised(self, x0: torch.Tensor, keys: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t, target) for t int64 (B,), x_t = alpha * x0 + sigma * eps, eps that of keys; channels_last."""
        x0 = x0.contiguous(memory_format=torch.channels_last)
        return q_sample(x0, self.alpha[t], self.sigma[t], seeds=keys, draw=0, prediction=self.prediction.name)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean squared error of each sample, float32 (B,)."""
        return (output.float() - target).square().flatten(1).mean(1)
