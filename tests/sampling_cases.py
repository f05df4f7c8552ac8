"""Calls of the sampler of every kind: what a row must do without a host, and a graph like an eager run"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from reference.networks import NULL, judging, mixing, mixing_learned, randomness

from fastdiff import Classifier, DiffusionModel, Sampler, Schedule, StepTable
from fastdiff.solvers import ddim

SHAPE, STEPS = (2, 4, 4), 6


def a_model(network=mixing, **options) -> DiffusionModel:
    return DiffusionModel(network, "linear", **{"image_shape": SHAPE, "null_label": NULL} | options)


def a_classifier(network=judging, **options) -> Classifier:
    return Classifier(network, "linear", **{"image_shape": SHAPE} | options)


def with_history(schedule: Schedule, steps, *, prediction: str) -> StepTable:
    """DDIM, half of whose x0 comes through the history and is taken away again"""
    table = ddim(schedule, steps, prediction=prediction, clip_x0=False)
    h_x0 = np.ones(len(table))
    # the x0 of the row before and of this row are equal to the table, which knows no images
    c_hist = np.full(len(table), -0.1)
    c_hist[[0, -1]] = 0
    return dataclasses.replace(table, h_x0=h_x0, c_hist=c_hist, c_x0=table.c_x0 - c_hist)


def tinted(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None, *, tint: torch.Tensor, kind: torch.Tensor):
    """mixing, moved by tint (B, C, 1, 1) in the dtype of x and by kind int64 (B,)"""
    return mixing(x + tint, t, y) + 0.2 * torch.cos(kind.to(x.dtype))[:, None, None, None]


EXTRA = {"tint": randomness(0, 3, (2, 1, 1), seed=1)[0], "kind": torch.tensor([4, 5, 6])}
TABLES = {
    "unguided": ({"solver": "ddim"}, {"labels": [1, 2, 3]}),
    "guided": ({"solver": "ddim"}, {"labels": [1, 2, 3], "w": 1.5}),
    "guided in part": ({"solver": "ddim", "guidance_interval": (0.1, 5.0)}, {"labels": [1, 2, 3], "w": [0, 1.5, -1]}),
    "unconditional": ({"solver": "ddim"}, {"num_images": 3}),
    "stochastic": ({"solver": "ddpm"}, {"labels": [1, 2, 3], "w": [0, 1.5, -1]}),
    "eta": ({"solver": "ddim", "eta": 0.5, "dtype": "float64"}, {"labels": [1, 2, 3]}),
    "eps network": ({"solver": functools.partial(ddim, eps="network")}, {"labels": [1, 2, 3], "w": 1.5}),
    "bfloat16": ({"solver": "ddim", "dtype": "bfloat16"}, {"labels": [1, 2, 3], "w": 1.5}),
    "learned": ({"solver": "ddpm"}, {"labels": [1, 2, 3], "w": 1.5}),
    "replayed": ({"solver": "ddpm"}, {"labels": [1, 2, 3], "w": 1.5, "noise": randomness(STEPS, 3)[1]}),
    "history": ({"solver": with_history}, {"labels": [1, 2, 3], "w": 1.5}),
    "callback": ({"solver": "ddpm"}, {"labels": [1, 2, 3], "w": 1.5, "callback": lambda *_: None}),
    "classifier": ({"solver": "ddim", "classifier": a_classifier()}, {"labels": [1, 2, 3], "classifier_scale": 2.0}),
    "classifier, guided in part": (
        {"solver": "ddpm", "classifier": a_classifier(), "guidance_interval": (0.1, 5.0)},
        {"labels": [1, 2, 3], "w": [0, 1.5, -1], "classifier_scale": [1, 0, 3]},
    ),
    "extra": ({"solver": "ddpm"}, {"labels": [1, 2, 3], "w": [0, 1.5, -1], "extra": EXTRA}),
}


def sampled(table: str, network=None, **changes) -> torch.Tensor:
    options, call = TABLES[table]
    learned = table == "learned"
    network = network or {"learned": mixing_learned, "extra": tinted}.get(table, mixing)
    model = a_model(network, variance="learned_range" if learned else "fixed_small")
    return Sampler(model, **{"steps": STEPS, **options, **changes})(**call, seed=0)
