"""The training loop: steps of a run, its log, its checkpoints, and the calls that a schedule asks for."""

from __future__ import annotations

import time
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from fastdiff import checkpoint
from fastdiff.classifier import Classifier
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Dataset
from fastdiff.training.log import LOG_FILE, RunLog, cut_log, require_tensorboard
from fastdiff.training.losses import loss_of
from fastdiff.training.run import Run, TrainingError, extra_of

__all__ = ["TrainingError", "train"]

M = TypeVar("M", bound=DiffusionModel | Classifier)
Callback = Callable[[int, Any], object]

STATE_FILE = "state.safetensors"
MODEL_FOLDER = "model"


def train(
    model: M,
    data: Dataset,
    config: TrainConfig,
    out: str | PathLike[str] | None,
    *,
    resume: bool = False,
    progress: bool = True,
    callback: Callback | None = None,
    storage_dtype: torch.dtype | None = None,
) -> M:
    """Trains model.network in place, on the device of its parameters, and returns a model with the averaged weights.

    model: a DiffusionModel, trained by config.loss, or a Classifier, by the cross entropy at x_t.
    out: folder for model/ (native checkpoint of the average; model-<decay>/ for further rates of averaging) and
        state.safetensors (what resume needs), each replaced whole at every config.save_every steps and at the end, and
        for log.jsonl, a line every config.log_every steps; None writes nothing.
    resume: go on from out's state, bit for bit on a CPU; all that steps depend on must be what it was. A finished run
        writes its models again, which a kill may have kept it from.
    storage_dtype: of the weights in the checkpoints (float16 halves them); None stores them as they are, float32.
    callback(step, averaged model): every config.sample_every steps and at the end; the model is valid during the call.

    A step whose loss or gradient is not finite updates nothing and is counted. torch's default generator is seeded
    anew at every step (for dropout) and left so.
    Raises ValueError or TypeError before any work, TrainingError where more than config.max_skipped steps were not
    finite, or weights are not that are about to be saved: what was saved last stays, as after KeyboardInterrupt.
    """
    _check(model, data, config)
    if out is not None:
        checkpoint.kind_of(model)
    folder = _check_folder(out, resume)
    run = Run(model, data, config)
    if folder is not None and resume:
        run.load(folder / STATE_FILE)
        cut_log(folder, run.step)
    elif folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG_FILE).write_text("")
    log = RunLog(folder, model.schedule.num_train_timesteps, config.tensorboard, run.step)
    sample_every = config.save_every if config.sample_every is None else config.sample_every

    def due(every: int) -> bool:
        return run.step == config.iterations or (every > 0 and run.step % every == 0)

    def keep() -> None:
        saved, called = folder is not None and due(config.save_every), callback is not None and due(sample_every)
        if saved or called:
            run.check_weights()
        if saved and folder is not None:
            run.save(folder / STATE_FILE)
            for which, decay in enumerate(config.ema_decays):
                name = f"{MODEL_FOLDER}-{decay!r}" if which else MODEL_FOLDER
                checkpoint.save(run.averaged(which), folder / name, overwrite=True, storage_dtype=storage_dtype)
        if called and callback is not None:
            callback(run.step, run.averaged())

    began, since, logged = time.perf_counter() - run.seconds, time.perf_counter(), run.step
    bar = tqdm(total=config.iterations, initial=run.step, disable=not progress, unit="step", desc="train")
    try:
        if run.step == config.iterations:
            keep()
        while run.step < config.iterations:
            log.add(run.advance())
            run.seconds = time.perf_counter() - began
            if due(config.log_every):
                rate = (run.step - logged) * config.batch_size / (time.perf_counter() - since)
                line = log.write(run.step, run.skipped, rate, run.seconds)
                loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
                skipped = f", {run.skipped} skipped" if run.skipped else ""
                bar.set_postfix_str(f"loss {loss}, {rate:.0f} images/s{skipped}", refresh=False)
                since, logged = time.perf_counter(), run.step
            paused = time.perf_counter()
            keep()
            paused = time.perf_counter() - paused
            began, since = began + paused, since + paused
            bar.update()
    except TrainingError:
        if log.pending:
            log.write(run.step, run.skipped, None, run.seconds)
        raise
    finally:
        bar.close()
        log.close()
    return run.averaged()


def _check(model: DiffusionModel | Classifier, data: Dataset, config: TrainConfig) -> None:
    if not isinstance(model, DiffusionModel | Classifier) or not isinstance(model.network, nn.Module):
        raise TypeError("model must be a DiffusionModel or a Classifier whose network is a torch.nn.Module")
    if not isinstance(data, Dataset) or not isinstance(config, TrainConfig):
        raise TypeError(f"data and config must be a Dataset and a TrainConfig, got {type(data)} and {type(config)}")
    if tuple(data.images.shape[1:]) != model.image_shape:
        raise ValueError(f"data must have images of {model.image_shape}, got {tuple(data.images.shape[1:])}")
    if model.num_classes is not None and data.num_classes is None:
        raise ValueError(f"data must have labels for a model of {model.num_classes} classes, got none")
    if model.num_classes is not None and (data.num_classes or 0) > model.num_classes:
        raise ValueError(f"data must have at most the model's {model.num_classes} classes, got {data.num_classes}")
    if isinstance(model, DiffusionModel):
        if model.num_classes is not None and model.null_label is None and config.p_uncond > 0:
            raise ValueError(f"p_uncond must be 0 for a model with null_label=None, got {config.p_uncond}")
        if model.null_model is not None:
            raise ValueError("model must have null_model=None: each network is trained by itself")
    if not any(p.requires_grad for p in model.network.parameters()):
        raise ValueError("model.network must have parameters that require a gradient, got none")
    dtypes = {p.dtype for p in model.network.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(f"model.network must have float32 parameters, got {sorted(map(str, dtypes))}; use .float()")
    extra_of(model, data)
    loss_of(model, config, "cpu")
    if config.tensorboard:
        require_tensorboard()


def _check_folder(out: str | PathLike[str] | None, resume: bool) -> Path | None:
    if out is None:
        if resume:
            raise ValueError("resume needs out, the folder of the run to go on with, got None")
        return None
    folder = Path(out)
    state = folder / STATE_FILE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, and {folder} is a file; give another name")
    if resume and not state.is_file():
        raise ValueError(f"resume: there is no {state}; start without resume")
    if not resume and state.exists():
        raise ValueError(f"out: {state} exists; pass resume=True to go on with that run, or give another folder")
    if not resume and (model := folder / MODEL_FOLDER).exists():
        raise ValueError(f"out: {model} exists, of a run without its state; give another folder")
    return folder
