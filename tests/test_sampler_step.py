"""One step of the sampler: no host read, no new buffer, so that a graph can capture it"""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from reference.networks import NULL, mixing, mixing_learned, randomness
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
import fastdiff.sampler
from fastdiff import DiffusionModel, Sampler, Schedule, StepTable
from fastdiff.solvers import ddim
from fastdiff_kernels import guided_step

SHAPE, STEPS = (2, 4, 4), 6
aten = torch.ops.aten


def a_model(network=mixing, **options) -> DiffusionModel:
    return DiffusionModel(network, "linear", **{"image_shape": SHAPE, "null_label": NULL} | options)


class NoHostReads(TorchDispatchMode):
    """Refuses what would stop a stream to look at its data, or move data between host and device"""

    REFUSED = (
        aten._local_scalar_dense,
        aten.item,
        aten.is_nonzero,
        aten.nonzero,
        aten.equal,
        aten.masked_select,
        aten.lift_fresh,
        aten.pin_memory,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in self.REFUSED:
            raise AssertionError(f"{func} inside a step")
        if func.overloadpacket is aten._to_copy and kwargs.get("device") is not None:
            raise AssertionError(f"{func} to {kwargs['device']} inside a step")
        return func(*args, **kwargs)


def addresses(buffers) -> dict[str, int]:
    values = {f.name: getattr(buffers, f.name) for f in dataclasses.fields(buffers)}
    return {name: value.data_ptr() for name, value in values.items() if isinstance(value, torch.Tensor)}


def watch(monkeypatch) -> list[int]:
    """Holds every later step to its word; returns a list that grows by the size of each"""
    step, watched = Sampler._step, []

    def watched_step(self, buffers, *rest):
        before = addresses(buffers)
        with NoHostReads():
            step(self, buffers, *rest)
        assert addresses(buffers) == before, "a step replaced a buffer"
        watched.append(len(before))

    monkeypatch.setattr(Sampler, "_step", watched_step)
    return watched


def with_history(schedule: Schedule, steps, *, prediction: str) -> StepTable:
    """DDIM, half of whose x0 comes through the history and is taken away again"""
    table = ddim(schedule, steps, prediction=prediction, clip_x0=False)
    h_x0 = np.ones(len(table))
    # the x0 of the row before and of this row are equal to the table, which knows no images
    c_hist = np.full(len(table), -0.1)
    c_hist[[0, -1]] = 0
    return dataclasses.replace(table, h_x0=h_x0, c_hist=c_hist, c_x0=table.c_x0 - c_hist)


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
}


def sampled(table: str, network=None, **changes) -> torch.Tensor:
    options, call = TABLES[table]
    learned = table == "learned"
    network = network or (mixing_learned if learned else mixing)
    model = a_model(network, variance="learned_range" if learned else "fixed_small")
    return Sampler(model, **{"steps": STEPS, **options, **changes})(**call, seed=0)


@pytest.mark.parametrize("table", TABLES)
def test_a_step_reads_nothing_on_the_host_and_keeps_every_buffer(monkeypatch, table):
    expected = sampled(table)
    watched = watch(monkeypatch)
    assert torch.equal(sampled(table), expected)
    assert len(watched) == STEPS and min(watched) >= 8


@pytest.mark.parametrize("table", TABLES)
def test_a_step_runs_on_tensors_that_hold_no_data(monkeypatch, table):
    """On the meta device any read of data is an error, and so is mixing in a tensor that a step made elsewhere"""
    step, shapes = Sampler._step, []

    def on_meta(self, buffers, *rest):
        values = {f.name: getattr(buffers, f.name) for f in dataclasses.fields(buffers)}
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        step(self, dataclasses.replace(buffers, **meta), *rest)
        shapes.append(meta["x"].shape)
        step(self, buffers, *rest)

    expected = sampled(table)
    monkeypatch.setattr(Sampler, "_step", on_meta)
    assert torch.equal(sampled(table), expected)
    assert shapes == [(3, *SHAPE)] * STEPS


def reads_a_value(x, t, y):
    return mixing(x, t, y) * (1.0 if t[0].item() >= 0 else 0.0)


def branches(x, t, y):
    return mixing(x, t, y) if (t >= 0).all() else x


def indexes_by_value(x, t, y):
    return mixing(x, t, y) + torch.zeros(1000)[t[0].long()]


def uploads(x, t, y):
    return mixing(x, t, y) * torch.tensor([1.0])


def selects(x, t, y):
    return mixing(x, t, y) + (y == 0).nonzero().sum()


NOSY = [reads_a_value, branches, indexes_by_value, uploads, selects]


@pytest.mark.parametrize("network", NOSY, ids=lambda f: f.__name__)
def test_the_watch_sees_a_network_that_reads_its_data(monkeypatch, network):
    watch(monkeypatch)
    with pytest.raises(AssertionError, match="inside a step"):
        sampled("guided", network)


def test_the_watch_sees_a_step_that_reads_its_data(monkeypatch):
    def nosy(x, out, *args, **kwargs):
        assert float(x.abs().max()) >= 0
        guided_step(x, out, *args, **kwargs)

    monkeypatch.setattr(fastdiff.sampler, "guided_step", nosy)
    sampled("guided")
    watch(monkeypatch)
    with pytest.raises(AssertionError, match=r"_local_scalar_dense.* inside a step"):
        sampled("guided")


@pytest.mark.parametrize("name", ["x", "x_net", "coefs", "t"])
def test_the_watch_sees_a_replaced_buffer(monkeypatch, name):
    step = Sampler._step

    def careless(self, buffers, *rest):
        step(self, buffers, *rest)
        setattr(buffers, name, getattr(buffers, name).clone())

    monkeypatch.setattr(Sampler, "_step", careless)
    watch(monkeypatch)
    with pytest.raises(AssertionError, match="replaced a buffer"):
        sampled("guided")
