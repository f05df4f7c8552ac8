"""Which t each sample of a batch is trained at, and the weight that keeps the mean loss unbiased.

A sample brings 32 random bits; an interval of them belongs to each t, so a t's probability is its interval's width
over 2^32, exactly, and its weight 1 / (T * probability).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["TIMESTEP_SAMPLERS", "LossSecondMoment", "Uniform"]

HISTORY = 10  # losses a timestep that are remembered
UNIFORM_SHARE = 0.001  # of the probability, so that no t is forgotten
_RANGE = 2**32


class Uniform:
    """Every t in [0, T) alike; all weights are 1."""

    def __init__(self, num_train_timesteps: int) -> None:
        self.num_train_timesteps = num_train_timesteps

    def choose(self, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """t int64 (B,) and weights float32 (B,) of words int64 (B,) in [0, 2^32), all on the CPU."""
        return (words * self.num_train_timesteps) >> 32, torch.ones(words.shape)

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Takes note of the losses (B,) of samples at t (B,), before they were weighted."""

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors that a run must keep to go on; they are written to in place."""
        return iter(())


class LossSecondMoment(Uniform):
    """p(t) in proportion to sqrt(E[L_t^2]) over the last ten losses of t (2102.09672, equation 18).

    Uniform until every t has ten. A thousandth of the probability stays uniform.
    """

    def __init__(self, num_train_timesteps: int) -> None:
        super().__init__(num_train_timesteps)
        self.losses = torch.zeros(num_train_timesteps, HISTORY, dtype=torch.float64)  # the oldest first
        self.counts = torch.zeros(num_train_timesteps, dtype=torch.int64)

    def choose(self, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        T = self.num_train_timesteps
        if int(self.counts.min()) < HISTORY:
            return super().choose(words)
        ends = self._ends()
        t = np.searchsorted(ends, words.numpy(), side="right")
        widths = np.diff(ends, prepend=0)
        return torch.from_numpy(t), torch.from_numpy(_RANGE / (T * widths[t])).float()

    def _ends(self) -> npt.NDArray[np.int64]:
        """Where each t's interval of the words ends, int64 (T,), the last at 2^32."""
        root = self.losses.square().mean(1).sqrt().numpy()
        total = root.sum()
        share = root / total if total > 0 else np.full(len(root), 1 / len(root))
        p = (1 - UNIFORM_SHARE) * share + UNIFORM_SHARE / len(root)
        ends = np.floor(np.cumsum(p) * _RANGE).astype(np.int64)
        ends[-1] = _RANGE
        return ends

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        # NumPy's views of the same memory: an index of a tensor costs ten times as much
        history, counts = self.losses.numpy(), self.counts.numpy()
        for where, loss in zip(t.tolist(), losses.double().tolist(), strict=True):
            history[where, :-1] = history[where, 1:]
            history[where, -1] = loss
            counts[where] = min(counts[where] + 1, HISTORY)

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "losses", self.losses
        yield "counts", self.counts


TIMESTEP_SAMPLERS: dict[str, type[Uniform]] = {"uniform": Uniform, "loss_second_moment": LossSecondMoment}
