"""What a step of training minimises, with randomness that depends on no batch.

Sample number n of a run is keyed by (run seed, n). From Philox stream 2 under that key: draw 0 is eps; word 0 of draw 1
chooses t, word 1 decides whether the label is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from fastdiff.classifier import Classifier
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.noise import seed_array
from fastdiff.prediction import named_prediction
from fastdiff.schedule import Schedule
from fastdiff.training.config import TrainConfig
from fastdiff.variational_bound import VariationalBound
from fastdiff_kernels import STREAM_TRAINING, philox_uint32, q_sample

__all__ = ["Batch", "ClassifierLoss", "DiffusionLoss", "Terms", "draw", "loss_of", "sample_keys"]

Forward = Callable[..., torch.Tensor]


def sample_keys(seed: int, start: int, n: int) -> torch.Tensor:
    """64-bit Philox keys of samples start .. start + n - 1 of a run, int64 (n,)."""
    return torch.from_numpy(seed_array(seed, n, start=start))


def draw(keys: torch.Tensor, p_uncond: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Words int64 (B,) in [0, 2^32), from which t is chosen, and dropped bool (B,), true with probability p_uncond."""
    words = philox_uint32(keys, (2,), draw=1, stream=STREAM_TRAINING)
    return words[:, 0], words[:, 1] < round(p_uncond * 2**32)


@dataclass(frozen=True)
class Batch:
    """Samples of a step: clean images (B, C, H, W), labels int64 (B,) or None, keys and t int64 (B,), and what else the
    network takes of each image"""

    x0: torch.Tensor
    y: torch.Tensor | None
    keys: torch.Tensor
    t: torch.Tensor
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Terms:
    """The loss of each sample, float32 (B,), and its parts by name, for the log"""

    loss: torch.Tensor
    parts: Mapping[str, torch.Tensor]


class _Noising:
    """x_t and the target of one schedule and prediction; tables are float64, cast once to float32"""

    def __init__(self, schedule: Schedule, prediction: str, device: torch.device | str) -> None:
        self.prediction = named_prediction(prediction)
        tables = schedule.alpha_sigma(np.arange(schedule.num_train_timesteps))
        self.alpha, self.sigma = (torch.from_numpy(table).float().to(device) for table in tables)

    def noised(self, x0: torch.Tensor, keys: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t, target) for t int64 (B,), x_t = alpha * x0 + sigma * eps, eps that of keys; channels_last."""
        x0 = x0.contiguous(memory_format=torch.channels_last)
        return q_sample(x0, self.alpha[t], self.sigma[t], seeds=keys, draw=0, prediction=self.prediction.name)


class DiffusionLoss(_Noising):
    """TrainConfig.loss of a DiffusionModel, with its min_snr_gamma and vlb_weight"""

    def __init__(self, model: DiffusionModel, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        super().__init__(model.schedule, model.prediction, device)
        learned = model.variance == "learned_range"
        self.name = config.loss or ("hybrid" if learned else "simple")
        if self.name == "hybrid" and not learned:
            raise ValueError(
                f"loss='hybrid' trains a learned variance, the model's is {model.variance!r}; use 'simple'"
            )
        if self.name == "simple" and learned:
            raise ValueError("loss='simple' trains no variance, the model's is 'learned_range'; use 'hybrid' or 'vlb'")
        self.channels, self.learned = model.image_shape[0], learned
        self.T, self.vlb_weight = model.schedule.num_train_timesteps, config.vlb_weight
        self.bound = None
        if self.name != "simple":
            # a clipped prediction would have no gradient
            schedule, prediction, variance = model.schedule, model.prediction, model.variance
            self.bound = VariationalBound(schedule, prediction, variance, clip_x0=False, device=device)
        self.weight = None
        if (gamma := config.min_snr_gamma) is not None:
            snr = (self.alpha / self.sigma).square()
            # the squared error of x0 is that of eps / SNR, and that of v / (SNR + 1)
            self.weight = {
                "x0": snr.clamp(max=gamma),
                "eps": (gamma / snr).clamp(max=1),
                "v": snr.clamp(max=gamma) / (snr + 1),
            }[model.prediction]

    def __call__(self, network: Forward, batch: Batch) -> Terms:
        x, target = self.noised(batch.x0, batch.keys, batch.t)
        return self.terms(network(x, batch.t.float(), batch.y, **batch.extra), batch.x0, x, target, batch.t)

    def terms(
        self, output: torch.Tensor, x0: torch.Tensor, x: torch.Tensor, target: torch.Tensor, t: torch.Tensor
    ) -> Terms:
        """Of the network's output (B, C or 2C, H, W) for x, the x_t of x0 at t."""
        shapes = [(len(x), channels, *x.shape[2:]) for channels in (self.channels, 2 * self.channels)]
        if tuple(output.shape) not in shapes[self.learned :]:
            raise ValueError(f"network(x, t, y) must return {shapes[self.learned :]}, got {tuple(output.shape)}")
        output = output.float()
        mean = output[:, : self.channels]
        mse = (mean - target).square().flatten(1).mean(1)
        simple = mse if self.weight is None else mse * self.weight[t]
        if self.bound is None:
            return Terms(simple, {"mse": mse})
        if self.name == "hybrid":
            output = torch.cat((mean.detach(), output[:, self.channels :]), 1)
        vlb = self.bound.terms(x0, x, output, t)
        loss = {"hybrid": simple + self.vlb_weight * self.T * vlb, "vlb": self.T * vlb, "kl": vlb}[self.name]
        return Terms(loss, {"mse": mse, "vlb": self.T * vlb})


class ClassifierLoss(_Noising):
    """Cross entropy in nats of a classifier at x_t (2105.05233, section 4)"""

    def __init__(self, model: Classifier, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        super().__init__(model.schedule, "x0", device)
        self.num_classes = model.num_classes
        if config.loss is not None or config.min_snr_gamma is not None:
            raise ValueError("loss and min_snr_gamma must be None for a classifier: it is trained by cross entropy")

    def __call__(self, network: Forward, batch: Batch) -> Terms:
        assert batch.y is not None
        x, _ = self.noised(batch.x0, batch.keys, batch.t)
        logits = network(x, batch.t.float()).float()
        if tuple(logits.shape) != (len(x), self.num_classes):
            raise ValueError(
                f"network(x, t) must return logits of shape {(len(x), self.num_classes)}, got {tuple(logits.shape)}"
            )
        right = (logits.argmax(1) == batch.y).float()
        loss = F.cross_entropy(logits, batch.y, reduction="none")
        return Terms(loss, {"accuracy": right})


def loss_of(
    model: DiffusionModel | Classifier, config: TrainConfig, device: torch.device | str
) -> DiffusionLoss | ClassifierLoss:
    """What trains the model; ValueError where config asks for what it cannot have."""
    if isinstance(model, Classifier):
        return ClassifierLoss(model, config, device)
    return DiffusionLoss(model, config, device)
