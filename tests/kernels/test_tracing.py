"""What every op promises where its tensors are more than memory: free sizes, lazy signs, tangents"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from places import GPU, INTERPRETER, REFERENCE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastdiff_kernels import (
    COEFS,
    STREAM_STEP,
    ada_group_norm,
    guided_step,
    philox_normal,
    q_sample,
    reference,
    residual,
)

anywhere = pytest.mark.parametrize("place", [REFERENCE, INTERPRETER, GPU], indirect=True)


def norm(x: Tensor, seeds: Tensor, impl: str) -> Tensor:
    c = x.shape[1]
    return ada_group_norm(x, x.new_ones(c), x.new_zeros(c), groups=2, impl=impl)


def end_of_block(x: Tensor, seeds: Tensor, impl: str) -> Tensor:
    return residual(x, None, x, impl=impl)[0]


def noised(x: Tensor, seeds: Tensor, impl: str) -> Tensor:
    alpha = torch.full((x.shape[0],), 0.6, device=x.device)
    return q_sample(x, alpha, alpha, seeds=seeds, impl=impl)[0]


def noise(x: Tensor, seeds: Tensor, impl: str) -> Tensor:
    return x + philox_normal(seeds, (4, 6, 5), draw=1, stream=STREAM_STEP, impl=impl)


def step(x: Tensor, seeds: Tensor, impl: str) -> Tensor:
    state = x.clone()
    coefs = torch.linspace(0.1, 1, len(COEFS), device=x.device)
    guided_step(state, x, coefs, seeds=seeds, draw=torch.ones(1, dtype=torch.int64, device=x.device), impl=impl)
    return state


OPS: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "ada_group_norm": norm,
    "residual": end_of_block,
    "q_sample": noised,
    "philox_normal": noise,
    "guided_step": step,
}


def draw(n: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn((n, 4, 6, 5), generator=generator).contiguous(memory_format=torch.channels_last)
    return x.to(device), torch.arange(n, device=device)


@anywhere
@pytest.mark.parametrize("op", OPS)
def test_one_compilation_serves_every_batch(place, op):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(x: Tensor, seeds: Tensor) -> Tensor:
        return OPS[op](x, seeds, place.impl)

    compiled = torch.compile(run, backend=counter, dynamic=True, fullgraph=True)
    compiled(*draw(2, place.device))
    once = counter.frame_count
    for n in (3, 4, 7):
        x, seeds = draw(n, place.device)
        assert torch.equal(compiled(x, seeds), run(x, seeds))
    assert counter.frame_count == once


@anywhere
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "loose"])
@pytest.mark.parametrize("op", OPS)
def test_an_export_with_a_free_batch(place, op, strict):
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, seeds: Tensor) -> Tensor:
            return OPS[op](x, seeds, place.impl)

    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(
        Module(), draw(3, place.device), dynamic_shapes={"x": {0: batch}, "seeds": {0: batch}}, strict=strict
    )
    for n in (2, 5):
        x, seeds = draw(n, place.device)
        assert torch.equal(exported.module()(x, seeds), OPS[op](x, seeds, place.impl))


@anywhere
@pytest.mark.parametrize("op", ["ada_group_norm", "residual", "q_sample"])
def test_a_sign_that_is_only_a_flag_is_not_lost(place, op):
    x, seeds = draw(2, place.device)
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    got = OPS[op](negated, seeds, place.impl)
    torch.testing.assert_close(got, OPS[op]((-x).contiguous(), seeds, place.impl), rtol=1e-5, atol=1e-5)


@anywhere
@pytest.mark.parametrize("op", ["ada_group_norm", "residual", "q_sample"])
def test_a_tangent_is_refused_and_not_dropped(place, op):
    x, seeds = draw(2, place.device)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        OPS[op](torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), seeds, place.impl)


@anywhere
def test_a_state_that_overlaps_itself_is_refused(place):
    x, _ = draw(2, place.device)
    state = torch.zeros(200, device=place.device).as_strided(x.shape, (8, 16, 4, 1))
    with pytest.raises(ValueError, match="x is written in place and must not overlap itself"):
        guided_step(state, x, torch.zeros(len(COEFS), device=place.device), impl=place.impl)


def test_statistics_of_every_number_of_chunks_have_that_shape():
    x, _ = draw(2, "cpu")
    for chunks in (1, 2, 7, 30, 31, 64):
        assert reference.chunk_statistics(x, chunks).shape == (2, 2, chunks, 4)
