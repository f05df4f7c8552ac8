"""A step made of the ops, captured and replayed, is the step run eagerly; on a CPU the function stands for the graph"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from places import GPU, INTERPRETER, REFERENCE

from fastdiff_kernels import COEFS, ada_group_norm, guided_step, load_row, residual

N, ROWS = 2, 3


class Step:
    """Static buffers, and one row of a table with a network of a norm and a residual in between"""

    def __init__(self, device: str, impl: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            value = torch.randn(shape, generator=generator).to(device)
            return value.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else value

        self.impl = impl
        self.table = randn(ROWS, len(COEFS)).abs() * 0.3
        self.times = torch.arange(float(ROWS), device=device)
        self.x_T = randn(N, 8, 4, 4)
        self.norm = [randn(8), randn(8), randn(2 * N, 8), randn(2 * N, 8)]
        self.bias = randn(8)
        self.seeds = torch.arange(N, device=device)
        self.w = torch.tensor([1.5, 0.5], device=device)
        self.counter, self.draw = torch.zeros(2, 1, dtype=torch.int64, device=device).unbind(0)
        self.coefs, self.t = torch.empty(len(COEFS), device=device), torch.empty(2 * N, device=device)
        self.x, self.x_net, self.hist = self.x_T.clone(), torch.cat((self.x_T, self.x_T)), torch.zeros_like(self.x_T)

    def reset(self) -> None:
        self.counter.zero_()
        self.x.copy_(self.x_T)
        self.x_net.copy_(torch.cat((self.x_T, self.x_T)))
        self.hist.zero_()

    def __call__(self) -> None:
        load_row(self.table, self.times, self.counter, self.coefs, self.t, self.draw, impl=self.impl)
        h = ada_group_norm(self.x_net, *self.norm, groups=2, impl=self.impl)
        out, _ = residual(h + self.t[:, None, None, None], self.bias, self.x_net, impl=self.impl)
        options = {"x_net": self.x_net, "hist": self.hist, "seeds": self.seeds, "draw": self.draw}
        guided_step(self.x, out, self.coefs, self.w, **options, impl=self.impl)


def captured(step: Step, device: str) -> Callable[[], None]:
    if device == "cpu":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


@pytest.mark.parametrize("place", [REFERENCE, INTERPRETER, GPU], indirect=True)
def test_a_replayed_step_is_the_eager_one(place):
    step = Step(place.device, place.impl)
    states = []
    for _ in range(ROWS):
        step()
        states.append((step.x.clone(), step.x_net.clone(), step.hist.clone()))
    assert all(x.isfinite().all() for x, _, _ in states)
    assert not torch.equal(states[0][0], states[1][0])
    step.reset()
    replay = captured(step, place.device)
    for _ in range(2):  # a graph is replayed for the next call, too
        step.reset()
        for state in states:
            replay()
            for got, want in zip((step.x, step.x_net, step.hist), state, strict=True):
                assert torch.equal(got, want)
        assert step.counter.item() == ROWS
