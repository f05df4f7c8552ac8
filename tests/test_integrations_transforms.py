"""What looks into a step, a gradient, a transform or a compiler, gets the schedulers' own"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDIMScheduler
from scheduler_cases import STOCK, a_pair, fused_everywhere, stepped, tensors
from torch.autograd import forward_ad

SHAPE = (3, 2, 4, 4)


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> list[torch.Tensor]:
    return fused_everywhere(monkeypatch)


@STOCK
@pytest.mark.parametrize("wanted", ["model_output", "sample"])
def test_gradients_are_theirs(stock: type, wanted: str) -> None:
    theirs, ours = a_pair(stock, 10, clip_sample=False)
    grads = []
    for scheduler in (theirs, ours):
        x, out = tensors(SHAPE, SHAPE)
        leaf = (x if wanted == "sample" else out).requires_grad_()
        stepped(scheduler, out, 500, x)[0].square().sum().backward()
        grads.append(leaf.grad)
        with torch.no_grad():
            assert not stepped(scheduler, out, 500, x)[0].requires_grad
    assert torch.equal(*grads) and grads[0].abs().max() > 0


def dual(f, x: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack((x, 2 * x))),
    "dual": dual,
}


@STOCK
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_see_their_step(stock: type, transform: str, launches) -> None:
    theirs, ours = a_pair(stock, 10, clip_sample=False)
    x, out = tensors(SHAPE, SHAPE)
    got, expected = (TRANSFORMS[transform](lambda x, s=s: s.step(out, 0, x)[0], x) for s in (ours, theirs))
    assert torch.equal(got, expected) and got.abs().max() > 0 and not launches


@STOCK
def test_a_compiler_gets_their_step(stock: type, launches) -> None:
    """Without a launch, and DDIM's in one graph, as it is where the scheduler is stock"""
    _, ours = a_pair(stock, 10)
    x, out = tensors(SHAPE, SHAPE)
    torch._dynamo.reset()
    step = torch.compile(ours.step, backend="eager", fullgraph=stock is DDIMScheduler)
    options = {} if stock is DDIMScheduler else {"generator": torch.Generator().manual_seed(0)}
    got = step(out, 500, x, return_dict=False, **options)
    assert not launches
    options = {} if stock is DDIMScheduler else {"generator": torch.Generator().manual_seed(0)}
    for value, expected in zip(got, ours.step(out, 500, x, return_dict=False, **options), strict=True):
        torch.testing.assert_close(value, expected)
    assert len(launches) == 1
