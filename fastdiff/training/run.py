"""A run: all that changes while a model trains, one step of it, and its state on disk.

Sample n = step * batch_size + i has an image (the epoch's permutation, keyed by (seed, epoch)), a time, a dropped label
and noise (losses.py) that follow from (seed, n) alone, and dropout is seeded with the key of each part's first sample.
So beside its step a run needs only weights, averages, moments, and what the timestep sampler has seen to go on.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastdiff import checkpoint
from fastdiff.classifier import Classifier
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Dataset
from fastdiff.training.losses import Batch, draw, loss_of, sample_keys
from fastdiff.training.timesteps import TIMESTEP_SAMPLERS

__all__ = ["Model", "Run", "Step", "TrainingError"]

Model = DiffusionModel | Classifier

FORMAT = "fastdiff training state 2"
# how a run is watched, when it gives up and where it keeps its activations, not what it computes
FREE_FIELDS = ("log_every", "save_every", "sample_every", "tensorboard", "max_skipped", "gradient_checkpointing")


class TrainingError(RuntimeError):
    """Training cannot go on: too many losses or gradients were not finite, or an update made weights that are not."""


@dataclass(frozen=True)
class Step:
    """What one step did, on the CPU: its weighted mean loss, the gradient's norm before clipping, the learning rate,
    whether it was skipped, and of each sample t (B,), the weight of its loss (B,), the loss (B,) and its parts (B,)"""

    loss: float
    grad_norm: float
    lr: float
    skipped: bool
    t: torch.Tensor
    weights: torch.Tensor
    losses: torch.Tensor
    parts: dict[str, torch.Tensor]


class Run:
    """A model, its data and everything that training keeps of them; config says what a step does."""

    def __init__(self, model: Model, data: Dataset, config: TrainConfig) -> None:
        assert isinstance(model.network, nn.Module)
        self.model, self.config, self.data = model, config, data
        self.network = model.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = next(self.network.parameters()).device
        self.images, self.labels = data.images.to(self.device), data.labels.to(self.device)
        self.extra = {name: tensor.to(self.device) for name, tensor in extra_of(model, data).items()}
        self.loss = loss_of(model, config, self.device)
        self.timesteps = TIMESTEP_SAMPLERS[config.timesteps](model.schedule.num_train_timesteps)
        self.averages = []
        for which in range(len(config.ema_decays)):
            average = AveragedModel(self.network, multi_avg_fn=functools.partial(self._average, which))
            average.requires_grad_(False)
            average.module.eval()
            self.averages.append(average)
        self.parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self._forward = torch.compile(self.network) if config.compile else self.network
        self.step, self.updates, self.seconds = 0, 0, 0.0
        digest = hashlib.sha256()
        for tensor in (data.images, data.labels, *data.extra.values()):
            digest.update(tensor.numpy(force=True).tobytes())
        self._digest = digest.hexdigest()
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def skipped(self) -> int:
        """Steps whose loss or gradient was not finite, and which therefore changed nothing."""
        return self.step - self.updates

    def _average(self, which: int, ema: Any, current: Any, updates: torch.Tensor | int) -> None:
        # self.updates is the same number, on the host
        torch._foreach_lerp_(ema, current, 1 - self.config.ema_decay_at(self.updates, which))

    def _indices(self, start: int, n: int) -> torch.Tensor:
        """Images of samples start .. start + n - 1, int64 (n,)."""
        numbers = np.arange(start, start + n)
        chosen = np.empty_like(numbers)
        for epoch in np.unique(numbers // len(self.data)).tolist():
            if self._order[0] != epoch:
                self._order = epoch, np.random.default_rng((self.config.seed, epoch)).permutation(len(self.data))
            inside = numbers // len(self.data) == epoch
            chosen[inside] = self._order[1][numbers[inside] % len(self.data)]
        return torch.from_numpy(chosen).to(self.device)

    def _batch(self, start: int, n: int) -> tuple[Batch, torch.Tensor]:
        """Samples start .. start + n - 1, and the weights (n,) of their losses."""
        model, indices = self.model, self._indices(start, n)
        keys = sample_keys(self.config.seed, start, n)
        # on the CPU, where timesteps are chosen
        words, dropped = draw(keys, self.config.p_uncond)
        keys, dropped, t, weights = (each.to(self.device) for each in (keys, dropped, *self.timesteps.choose(words)))
        y = None if model.num_classes is None else self.labels[indices]
        if y is not None and isinstance(model, DiffusionModel) and model.null_label is not None:
            y = torch.where(dropped, model.null_label, y)
        extra = {name: tensor[indices] for name, tensor in self.extra.items()}
        return Batch(self.images[indices], y, keys, t, extra), weights

    def advance(self) -> Step:
        """The next step. TrainingError where more than config.max_skipped could not be taken; then nothing changed."""
        config, step = self.config, self.step
        # such as running statistics, which a step that is skipped must not spoil
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        names, rows = self._backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), config.grad_clip)
        # the device is read once a step
        first, *values = torch.cat((norm[None], rows.flatten())).cpu().split((1, *[config.batch_size] * len(rows)))
        grad_norm, (t, weights, losses), parts = float(first), values[:3], dict(zip(names, values[3:], strict=True))
        t, loss = t.long(), float((weights * losses).mean())
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if not finite:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
        if not finite and self.skipped >= config.max_skipped:
            raise TrainingError(
                f"step {step + 1}: loss {loss} and gradient norm {grad_norm} must be finite, and {self.skipped} "
                f"updates were skipped before (max_skipped={config.max_skipped}); what was saved last is intact; go on "
                "with a larger max_skipped, or start anew with a lower lr, a longer warmup or precision='float32'"
            )
        lr = config.lr_at(step)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            for average in self.averages:
                average.update_parameters(self.network)
            self.timesteps.update(t, losses)
            self.updates += 1
        self.step += 1
        return Step(loss, grad_norm, lr, not finite, t, weights, losses, parts)

    def _backward(self) -> tuple[list[str], torch.Tensor]:
        """The gradient of the step's loss, and of each sample t, its weight, its loss and the parts of these names:
        float32 (3 + parts, batch_size) on the device"""
        config = self.config
        size = config.batch_size // config.accumulate
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        names: list[str] = []
        columns = []
        for start in range(self.step * config.batch_size, (self.step + 1) * config.batch_size, size):
            torch.manual_seed(int(sample_keys(config.seed, start, 1)[0]))  # dropout
            batch, weights = self._batch(start, size)
            # the network alone: autocast is no place for a loss
            terms = self.loss(self._autocast_forward, batch)
            ((terms.loss * weights).mean() / config.accumulate).backward()
            names = list(terms.parts)
            columns.append(torch.stack([batch.t.float(), weights, terms.loss, *terms.parts.values()]).detach())
        return names, torch.cat(columns, 1)

    def _autocast_forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            return self._forward(*args, **kwargs)

    def averaged(self, which: int = 0) -> Any:
        """The model with the averaged weights (shared with this run) and where they come from."""
        data, config = self.data, self.config
        training = {
            "data": data.name,
            "data_source": data.source,
            "data_licence": data.licence,
            "data_images": len(data),
            "config": config.to_dict(),
            "iterations": self.step,
            "skipped": self.skipped,
            "ema_decay": config.ema_decays[which],
            "seed": config.seed,
            "torch": torch.__version__,
        }
        model = copy.copy(self.model)
        model.network = self.averages[which].module
        model.provenance = {**model.provenance, "training": training}
        return model

    def check_weights(self) -> None:
        """TrainingError where a weight or average is not finite: an update may have been too large for its dtype."""
        for name, tensor in self._tensors():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise TrainingError(
                    f"step {self.step}: {name} must be finite after an update, and is not; what was saved last is "
                    "intact; start anew with a lower lr or a longer warmup"
                )

    def _facts(self) -> dict[str, Any]:
        """What must be equal for a run to go on; the names are those that errors show."""
        model, network = self.model, self.network.config.to_dict()
        facts = {
            **{k: v for k, v in self.config.to_dict().items() if k not in FREE_FIELDS},
            "data": self._digest,
            "schedule": hashlib.sha256(model.schedule.betas.tobytes()).hexdigest(),
            "num_classes": model.num_classes,
            "image_shape": list(model.image_shape),
            # shapes alone do not tell heads, groups or dropout apart
            "network": {k: v for k, v in network.items() if k not in FREE_FIELDS},
        }
        if isinstance(model, DiffusionModel):
            facts |= {name: getattr(model, name) for name in ("prediction", "variance", "null_label")}
        return facts

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the state by its flat name; moments are made here where the optimiser has none yet."""
        averages = {f"ema{which or ''}": average.module for which, average in enumerate(self.averages)}
        for prefix, module in {"raw": self.network, **averages}.items():
            for name, tensor in module.state_dict().items():
                yield f"{prefix}.{name}", tensor
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            for moment in ("exp_avg", "exp_avg_sq"):
                # the parameter's own strides: the order of the optimiser's arithmetic follows the layout
                yield f"{moment}.{name}", state.setdefault(moment, torch.zeros_like(parameter))
            # a state without its step is no state to the optimiser
            state.setdefault("step", torch.tensor(0.0, device=self.device))
        for name, tensor in self.timesteps.state():
            yield f"timesteps.{name}", tensor

    def save(self, path: Path) -> None:
        """Writes the state, whole or not at all."""
        at = {"format": FORMAT, "step": self.step, "updates": self.updates, "seconds": self.seconds}
        metadata = {name: json.dumps(value) for name, value in {**at, **self._facts()}.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors()}
        checkpoint.atomic_write(path, safetensors.torch.save(tensors, metadata))

    def load(self, path: Path) -> None:
        """Takes the state up again. ValueError names the file, or the argument that is not what it was."""
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                facts = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"resume: {path} is not a training state: {error}") from error
        if facts.get("format") != FORMAT:
            raise ValueError(f"resume: {path} must have the format {FORMAT!r}, got {facts.get('format')!r}; start anew")
        for name, value in self._facts().items():
            if facts.get(name) != value:
                raise ValueError(
                    f"{name} must be what it was to resume {path}: it was {facts.get(name)!r}, got {value!r}; "
                    "start anew in another folder to change it"
                )
        tensors = dict(self._tensors())
        wrong = sorted(set(tensors) ^ set(saved))
        wrong += [name for name in tensors if name in saved and tensors[name].shape != saved[name].shape]
        if wrong:
            raise ValueError(f"model must be what it was to resume {path}: other names or shapes, first {wrong[0]}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(saved[name])
        self.step, self.updates, self.seconds = facts["step"], facts["updates"], facts["seconds"]
        for average in self.averages:
            average.n_averaged.fill_(self.updates)
        for parameter in self.parameters.values():
            self.optimizer.state[parameter]["step"] = torch.tensor(float(self.updates), device=self.device)


def extra_of(model: Model, data: Dataset) -> dict[str, torch.Tensor]:
    """What the network takes of each image beside it: the data's own, or low_res as averages of the pixels."""
    wanted: dict[str, tuple[int, ...]] | None = getattr(model.network, "extra_shapes", None)
    found = dict(data.extra)
    if wanted is None:
        return found
    if "low_res" in wanted and "low_res" not in found:
        found["low_res"] = F.interpolate(data.images, wanted["low_res"][1:], mode="area")
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in found.items()}
    if shapes != wanted:
        raise ValueError(f"data must have extra tensors of shapes {wanted} for the network, got {shapes}")
    return found
