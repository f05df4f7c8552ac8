"""One step of the sampler: no host read, no new buffer, so that a graph can capture it"""

import copy

import pytest
import torch
from reference.networks import mixing
from sampling_cases import SHAPE, STEPS, TABLES, sampled
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
import fastdiff.step
from fastdiff.step import Step
from fastdiff_kernels import guided_step

aten = torch.ops.aten


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


def addresses(step: Step) -> dict[str, int]:
    buffers = {name: value for name, value in vars(step).items() if isinstance(value, torch.Tensor)} | step.extra
    return {name: buffer.data_ptr() for name, buffer in buffers.items()}


def watch(monkeypatch) -> list[int]:
    """Holds every later row to its word; returns a list that grows by the number of buffers of each"""
    run, watched = Step.run, []

    def watched_run(self, m):
        before = addresses(self)
        assert set(before.values()) <= {tensor.data_ptr() for tensor in self.static()}
        with NoHostReads():
            run(self, m)
        assert addresses(self) == before, "a row replaced a buffer"
        watched.append(len(before))

    monkeypatch.setattr(Step, "run", watched_run)
    return watched


@pytest.mark.parametrize("table", TABLES)
def test_a_step_reads_nothing_on_the_host_and_keeps_every_buffer(monkeypatch, table):
    expected = sampled(table)
    watched = watch(monkeypatch)
    assert torch.equal(sampled(table), expected)
    assert len(watched) == STEPS and min(watched) >= 8


@pytest.mark.parametrize("table", TABLES)
def test_a_step_runs_on_tensors_that_hold_no_data(monkeypatch, table):
    """On the meta device any read of data is an error, and so is mixing in a tensor that a step made elsewhere"""
    run, shapes = Step.run, []

    def on_meta(self, m):
        meta = copy.copy(self)
        for part in ("part", "null_part"):
            setattr(meta, part, copy.copy(getattr(self, part)))
        meta.extra = {name: values.to("meta") for name, values in self.extra.items()}
        for owner in (meta, meta.part):
            for name, value in vars(owner).items():
                if isinstance(value, torch.Tensor):
                    setattr(owner, name, value.to("meta"))
        run(meta, m)
        shapes.append(meta.x.shape)
        run(self, m)

    expected = sampled(table)
    monkeypatch.setattr(Step, "run", on_meta)
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

    monkeypatch.setattr(fastdiff.step, "guided_step", nosy)
    sampled("guided")
    watch(monkeypatch)
    with pytest.raises(AssertionError, match=r"_local_scalar_dense.* inside a step"):
        sampled("guided")


@pytest.mark.parametrize("name", ["x", "x_net", "coefs", "t"])
def test_the_watch_sees_a_replaced_buffer(monkeypatch, name):
    run = Step.run

    def careless(self, m):
        run(self, m)
        setattr(self, name, getattr(self, name).clone())

    monkeypatch.setattr(Step, "run", careless)
    watch(monkeypatch)
    with pytest.raises(AssertionError, match="replaced a buffer"):
        sampled("guided")
