"""Classifier-free guidance (2207.12598 equation 6) for one image, with an interval of noise levels (2404.07724)"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from reference.ddpm import Predict
from reference.schedule import abar_at


def guided(
    network: Callable[..., torch.Tensor],
    label: int | None,
    w: float,
    *,
    null_label: int,
    channels: int,
    interval: tuple[float, float] | None = None,
    betas: Sequence[float] = (),
) -> Predict:
    """predict(x, t) = (1 + w) * network(label) - w * network(null); a learned variance is the conditional one's"""

    def one(x: np.ndarray, t: float, y: int) -> np.ndarray:
        t_row = torch.tensor([t], dtype=torch.float64)
        return network(torch.from_numpy(x)[None], t_row, torch.tensor([y]))[0].numpy()

    def predict(x: np.ndarray, t: float) -> np.ndarray:
        if label is None or w == -1:
            return one(x, t, null_label)
        out = one(x, t, label)
        if interval is not None:
            abar = abar_at(t, betas)
            sigma_edm = math.sqrt((1 - abar) / abar)
            if not interval[0] < sigma_edm <= interval[1]:
                return out
        if w != 0:
            null = one(x, t, null_label)
            out[:channels] = (1 + w) * out[:channels] - w * null[:channels]
        return out

    return predict
