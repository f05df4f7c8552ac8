"""The training loop: AdamW, an average of the weights, a log, and checkpoints from which a run goes on bit for bit.

No random state is carried from step to step: sample n = step * batch_size + i of a run has an image (the epoch's
permutation, keyed by (seed, epoch)), a time, a dropped label and noise (losses.py) that follow from (seed, n) alone,
and dropout is seeded with the key of each batch's first sample. So a run needs only its step, weights, average and
moments to go on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from fastdiff import checkpoint
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Dataset
from fastdiff.training.losses import Objective, draw, sample_keys

__all__ = ["TrainingError", "train"]

Callback = Callable[[int, DiffusionModel], object]

STATE_FILE = "state.safetensors"
LOG_FILE = "log.jsonl"
MODEL_FOLDER = "model"
# how a run is watched and where it keeps its activations, not what it computes
FREE_FIELDS = ("log_every", "save_every", "gradient_checkpointing")


class TrainingError(RuntimeError):
    """Training cannot go on: the loss or the gradient is no longer finite."""


def train(
    model: DiffusionModel,
    data: Dataset,
    config: TrainConfig,
    out: str | PathLike[str] | None,
    *,
    resume: bool = False,
    progress: bool = True,
    callback: Callback | None = None,
) -> DiffusionModel:
    """Trains model.network in place, on the device of its parameters, and returns a model with the averaged weights.

    out: folder for model/ (native checkpoint of the average) and state.safetensors (what resume needs), each replaced
        whole at every config.save_every steps and at the end, and for log.jsonl, a line every config.log_every steps;
        None writes nothing.
    resume: go on from out's state, bit for bit on a CPU; every argument must be what it was.
    callback(step, averaged model): after each save, after `step` steps; the model is valid during the call.

    torch's default generator is seeded anew at every step (for dropout) and left so.
    Raises ValueError or TypeError before any work, TrainingError at a loss or gradient that is not finite: nothing is
    updated or saved at that step, and what was saved last stays, as it does after KeyboardInterrupt.
    """
    network = _check(model, data, config)
    if out is not None:
        checkpoint.kind_of(model)
    folder = _check_folder(out, resume)
    run = _Run(model, network, data, config)
    if folder is not None and resume:
        run.load(folder / STATE_FILE)
        _cut_log(folder / LOG_FILE, run.step)
    elif folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG_FILE).write_text("")

    began, losses, since = time.perf_counter() - run.seconds, [], time.perf_counter()
    bar = tqdm(total=config.iterations, initial=run.step, disable=not progress, unit="step", desc="train")
    with bar:
        while run.step < config.iterations:
            loss, grad_norm, lr = run.advance()
            losses.append(loss)
            run.seconds = time.perf_counter() - began
            last = run.step == config.iterations
            if last or (config.log_every and run.step % config.log_every == 0):
                rate = len(losses) * config.batch_size / (time.perf_counter() - since)
                line = {
                    "step": run.step,
                    "loss": sum(losses) / len(losses),
                    "grad_norm": grad_norm,
                    "lr": lr,
                    "images_per_s": round(rate, 1),
                    "seconds": round(run.seconds, 3),
                }
                bar.set_postfix_str(f"loss {line['loss']:.4f}, {rate:.0f} images/s", refresh=False)
                if folder is not None:
                    with open(folder / LOG_FILE, "a") as log:
                        log.write(json.dumps(line) + "\n")
                losses, since = [], time.perf_counter()
            if last or (config.save_every and run.step % config.save_every == 0):
                paused = time.perf_counter()
                if folder is not None:
                    run.save(folder / STATE_FILE)
                    checkpoint.save(run.averaged(), folder / MODEL_FOLDER, overwrite=True)
                if callback is not None:
                    callback(run.step, run.averaged())
                paused = time.perf_counter() - paused
                began, since = began + paused, since + paused
            bar.update()
    return run.averaged()


class _Run:
    """All that changes while a model trains."""

    def __init__(self, model: DiffusionModel, network: nn.Module, data: Dataset, config: TrainConfig) -> None:
        self.model, self.config, self.data = model, config, data
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = next(network.parameters()).device
        self.images, self.labels = data.images.to(self.device), data.labels.to(self.device)
        self.objective = Objective(model.schedule, model.prediction, self.device)
        self.average = AveragedModel(network, multi_avg_fn=self._average)
        self.average.requires_grad_(False)
        self.average.module.eval()
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.step, self.seconds = 0, 0.0
        pixels = hashlib.sha256(data.images.numpy(force=True).tobytes())
        pixels.update(data.labels.numpy(force=True).tobytes())
        self._digest = pixels.hexdigest()
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def _average(self, ema: Any, current: Any, updates: torch.Tensor | int) -> None:
        torch._foreach_lerp_(ema, current, 1 - self.config.ema_decay_at(int(updates)))

    def _indices(self, start: int) -> torch.Tensor:
        """Images of samples start .. start + batch_size - 1, int64 (B,)."""
        numbers = np.arange(start, start + self.config.batch_size)
        chosen = np.empty_like(numbers)
        for epoch in np.unique(numbers // len(self.data)).tolist():
            if self._order[0] != epoch:
                self._order = epoch, np.random.default_rng((self.config.seed, epoch)).permutation(len(self.data))
            inside = numbers // len(self.data) == epoch
            chosen[inside] = self._order[1][numbers[inside] % len(self.data)]
        return torch.from_numpy(chosen).to(self.device)

    def advance(self) -> tuple[float, float, float]:
        """One step; its loss, gradient norm before clipping, and learning rate."""
        config, model, step = self.config, self.model, self.step
        indices = self._indices(step * config.batch_size)
        keys = sample_keys(config.seed, step * config.batch_size, config.batch_size)
        torch.manual_seed(int(keys[0]))  # dropout
        keys = keys.to(self.device)
        t, dropped = draw(keys, model.schedule.num_train_timesteps, config.p_uncond)
        x0, y = self.images[indices], None
        if model.num_classes is not None:
            y = self.labels[indices]
            if model.null_label is not None:
                y = torch.where(dropped, model.null_label, y)
        x, target = self.objective.noised(x0, keys, t)

        self.network.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            output = self.network(x, t.float(), y)
        loss = self.objective.loss(output, target).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        loss = loss.detach()
        grad_norm = nn.utils.clip_grad_norm_(self.parameters.values(), config.grad_clip)
        if not torch.isfinite(torch.stack([loss, grad_norm])).all():
            raise TrainingError(
                f"step {step + 1}: loss {float(loss)} and gradient norm {float(grad_norm)} must be finite; nothing was "
                "updated and what was saved last is intact; try a lower lr, a longer warmup or precision='float32'"
            )
        lr = config.lr_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.average.update_parameters(self.network)
        self.step += 1
        return float(loss), float(grad_norm), lr

    def averaged(self) -> DiffusionModel:
        """The model with the averaged weights (shared with this run) and where they come from."""
        model, data = self.model, self.data
        training = {
            "data": data.name,
            "data_source": data.source,
            "data_licence": data.licence,
            "data_images": len(data),
            "config": self.config.to_dict(),
            "iterations": self.step,
            "seed": self.config.seed,
            "torch": torch.__version__,
        }
        return DiffusionModel(
            self.average.module,
            model.schedule,
            model.prediction,
            model.variance,
            model.num_classes,
            model.null_label,
            model.image_shape,
            clip_x0=model.clip_x0,
            dtype=model.dtype,
            name=model.name,
            provenance={**model.provenance, "training": training},
        )

    def _facts(self) -> dict[str, Any]:
        """What must be equal for a run to go on; the names are those that errors show."""
        model, network = self.model, self.network.config.to_dict()
        return {
            **{k: v for k, v in self.config.to_dict().items() if k not in FREE_FIELDS},
            "data": self._digest,
            "prediction": model.prediction,
            "schedule": hashlib.sha256(model.schedule.betas.tobytes()).hexdigest(),
            "num_classes": model.num_classes,
            "null_label": model.null_label,
            "image_shape": list(model.image_shape),
            # shapes alone do not tell heads, groups or dropout apart
            "network": {k: v for k, v in network.items() if k not in FREE_FIELDS},
        }

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the state by its flat name; moments are made here where the optimiser has none yet."""
        for prefix, module in (("raw", self.network), ("ema", self.average.module)):
            for name, tensor in module.state_dict().items():
                yield f"{prefix}.{name}", tensor
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            for moment in ("exp_avg", "exp_avg_sq"):
                # the parameter's own strides: the order of the optimiser's arithmetic follows the layout
                yield f"{moment}.{name}", state.setdefault(moment, torch.zeros_like(parameter))

    def save(self, path: Path) -> None:
        """Writes the state, whole or not at all."""
        facts = {"format": "fastdiff training state 1", "step": self.step, "seconds": self.seconds, **self._facts()}
        metadata = {name: json.dumps(value) for name, value in facts.items()}
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
        self.step, self.seconds = facts["step"], facts["seconds"]
        self.average.n_averaged.fill_(self.step)
        for parameter in self.parameters.values():
            self.optimizer.state[parameter]["step"] = torch.tensor(float(self.step), device=self.device)


def _check(model: DiffusionModel, data: Dataset, config: TrainConfig) -> nn.Module:
    if not isinstance(model, DiffusionModel) or not isinstance(model.network, nn.Module):
        raise TypeError("model must be a DiffusionModel whose network is a torch.nn.Module")
    if not isinstance(data, Dataset) or not isinstance(config, TrainConfig):
        raise TypeError(f"data and config must be a Dataset and a TrainConfig, got {type(data)} and {type(config)}")
    if model.variance == "learned_range":
        raise ValueError("variance must be fixed: the simple loss trains no variance, got 'learned_range'")
    if tuple(data.images.shape[1:]) != model.image_shape:
        raise ValueError(f"data must have images of {model.image_shape}, got {tuple(data.images.shape[1:])}")
    if model.num_classes is not None and data.num_classes is None:
        raise ValueError(f"data must have labels for a model of {model.num_classes} classes, got none")
    if model.num_classes is not None and (data.num_classes or 0) > model.num_classes:
        raise ValueError(f"data must have at most the model's {model.num_classes} classes, got {data.num_classes}")
    if model.num_classes is not None and model.null_label is None and config.p_uncond > 0:
        raise ValueError(f"p_uncond must be 0 for a model with null_label=None, got {config.p_uncond}")
    dtypes = {p.dtype for p in model.network.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(f"model.network must have float32 parameters, got {sorted(map(str, dtypes))}; use .float()")
    return model.network


def _check_folder(out: str | PathLike[str] | None, resume: bool) -> Path | None:
    if out is None:
        if resume:
            raise ValueError("resume needs out, the folder of the run to go on with, got None")
        return None
    state = Path(out) / STATE_FILE
    if resume and not state.is_file():
        raise ValueError(f"resume: there is no {state}; start without resume")
    if not resume and state.exists():
        raise ValueError(f"out: {state} exists; pass resume=True to go on with that run, or give another folder")
    return Path(out)


def _cut_log(path: Path, step: int) -> None:
    """Drops the lines after step, which the run writes again, and whatever is no line of a log."""

    def keeps(line: str) -> bool:
        try:
            return line.endswith("\n") and json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError):
            return False

    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    checkpoint.atomic_write(path, "".join(filter(keeps, lines)).encode())
