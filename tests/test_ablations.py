"""What is undone to be measured: the same values, op by op and image by image"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import ablations, bench_ladder, network_peers, networks
from benchmarks.ablations import LADDER, Concatenated, Used, norm_without, residual_without, undone
from benchmarks.networks import Case, Ours, Problem
from benchmarks.versions import Exact
from fastdiff.model import UNet, blocks
from fastdiff.model.convolution import Conv2d
from fastdiff_kernels import ada_group_norm, reference, residual

OPS = ("norm", "bias", "concat", "statistics", "resample", "skip")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def norm_arguments(kind: str) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    torch.manual_seed(0)
    if kind == "two inputs":
        x, x2 = random(3, 8, 6, 4), random(2, 16, 6, 4)
        made = {"stats": reference.chunk_statistics(x, 2), "stats2": reference.chunk_statistics(x2, 2)}
        return (x, random(24), random(24), random(3, 24), random(3, 24)), {"x2": x2, "resample": "up", **made}
    x = random(3, 24, 6, 4)
    options = {"x_bias": random(24), "resample": "down", "silu": False, "stats": reference.chunk_statistics(x, 2)}
    return (x, random(24), random(24), random(5, 24), random(5, 24)), options


NORMS = {"two inputs": ("norm", "concat", "statistics", "resample"), "bias": ("norm", "bias", "statistics", "resample")}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("names", [*((name,) for name in OPS), OPS], ids=str)
def test_the_norm_without_its_options(kind: str, names: tuple[str, ...]) -> None:
    operands, options = norm_arguments(kind)
    used = Used()
    got = norm_without(names, used, ada_group_norm, Concatenated())(*operands, groups=4, **options)
    expected = ada_group_norm(*operands, groups=4, **options)
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-10)
    assert {name for name in used if used[name]} <= set(names) & set(NORMS[kind])
    if len(names) == 1:
        assert used[names[0]] == (names[0] in NORMS[kind])


def test_a_bias_on_two_inputs() -> None:
    operands, options = norm_arguments("two inputs")
    options |= {"x_bias": random(24)}
    got = norm_without(["bias"], Used(), ada_group_norm, Concatenated())(*operands, groups=4, **options)
    assert torch.allclose(got, ada_group_norm(*operands, groups=4, **options), rtol=1e-10, atol=1e-10)


def residual_arguments(kind: str) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    torch.manual_seed(0)
    if kind == "resample":
        return (random(3, 8, 4, 6), random(8), random(2, 8, 8, 12)), {"resample": "down"}
    return (random(5, 8, 4, 6), random(8), random(4, 6, 4, 6), random(3, 10, 4, 6), random(8, 16)), {}


RESIDUALS = {"resample": ("bias", "statistics", "resample"), "product": ("bias", "concat", "statistics", "skip")}


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("names", [*((name,) for name in OPS), OPS], ids=str)
def test_the_end_of_a_block_without_its_options(kind: str, names: tuple[str, ...]) -> None:
    operands, options = residual_arguments(kind)
    used = Used()
    y, stats = residual_without(names, used, residual, Concatenated())(*operands, **options)
    expected, of_expected = residual(*operands, **options)
    assert torch.allclose(y, expected, rtol=1e-10, atol=1e-10)
    assert (stats is None) == ("statistics" in names)
    assert stats is None or of_expected is None or torch.allclose(stats, of_expected)
    assert {name for name in used if used[name]} == set(names) & set(RESIDUALS[kind])


def test_what_two_ops_read_is_concatenated_once() -> None:
    cat, x, x2 = Concatenated(), random(2, 3, 2, 2), random(1, 2, 2, 2)
    assert cat(x, x2, 2) is cat(x, x2, 2)
    assert torch.equal(cat(x, x2, 2), torch.cat([x, torch.cat([x2, x2])], 1))
    assert torch.equal(cat(x2, x, 2), torch.cat([torch.cat([x2, x2]), x], 1)), "operands in the other order are others"


def toy(dtype: str = "float32", w: float = 1.5) -> tuple[Problem, UNet]:
    return Problem(Case("toy", "cpu", dtype, 2, w)), networks.build("toy")


@pytest.mark.parametrize("leaves_bias", [False, True])
@pytest.mark.parametrize("names", [*((name,) for name in OPS), OPS], ids=str)
def test_a_network_without_them(names: tuple[str, ...], leaves_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if leaves_bias:
        # as on a GPU
        monkeypatch.setattr(
            Conv2d,
            "unbiased",
            lambda self, x: (torch.conv2d(x, self.weight, None, self.stride, self.padding), self.bias),
        )
    network = networks.build("toy").double()
    torch.manual_seed(0)
    x, t, y = random(2, 3, 16, 16), torch.tensor([10.0, 900.0], dtype=torch.float64), torch.tensor([3, 10])
    ops = blocks.ada_group_norm, blocks.residual
    with torch.no_grad():
        expected = network(x, t, y)
        with undone(names) as used:
            got = network(x, t, y)
    assert (blocks.ada_group_norm, blocks.residual) == ops
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9)
    found = {name for name in used if used[name]}
    # a CPU's blocks hand no statistics on, and no bias
    assert found == set(names) - ({"statistics"} if leaves_bias else {"statistics", "bias"})


def test_the_ops_come_back_after_an_error() -> None:
    ops = blocks.ada_group_norm, blocks.residual
    with pytest.raises(RuntimeError, match="stop"), undone(OPS):
        assert blocks.ada_group_norm is not ops[0] and blocks.residual is not ops[1]
        raise RuntimeError("stop")
    assert (blocks.ada_group_norm, blocks.residual) == ops


@pytest.mark.parametrize("w", [0.0, 1.5])
@pytest.mark.parametrize("name", LADDER)
def test_the_same_images_without_any_of_them(name: str, w: float) -> None:
    problem, unet = toy(w=w)
    used = Used()
    call = bench_ladder.rung(problem, unet, [name], used)
    assert (call() - Ours(problem, unet)()).abs().max() < 1e-3
    if name == "hoisting" or (name == "prefix" and w):
        assert used[name]


def test_every_rung_draws_the_images_that_the_loop_by_hand_draws() -> None:
    problem, unet = toy()
    exact = Exact(*(network_peers.loop_over(problem, unet)(),) * 2)
    made = bench_ladder.rungs(problem, unet, exact)
    assert list(made) == ["one op at a time", *LADDER]
    assert {name for name, version in made.items() if isinstance(version, str)} >= {"statistics", "graph"}
    assert {"norm", "concat", "resample", "skip", "hoisting", "prefix"} <= {
        name for name, version in made.items() if not isinstance(version, str)
    }


@pytest.mark.parametrize("wrong", ["product", "resampled", "plain_norm"])
def test_a_rung_that_draws_other_images_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, unet = toy()
    exact = Exact(*(network_peers.loop_over(problem, unet)(),) * 2)
    right = getattr(ablations, wrong)
    monkeypatch.setattr(ablations, wrong, lambda *args, **options: 1.05 * right(*args, **options))
    with pytest.raises(AssertionError):
        bench_ladder.rungs(problem, unet, exact)


def test_the_null_half_that_counts_for_nothing_is_run() -> None:
    problem, unet = toy(w=0.0)
    made = bench_ladder.rungs(problem, unet, Exact(*(network_peers.loop_over(problem, unet)(),) * 2))
    full, half = (made[name] for name in bench_ladder.NULL_HALF)
    assert not isinstance(full, str) and not isinstance(half, str)
    rows: list[int] = []
    unet.out["2"].register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    full.call()
    assert set(rows) == {4}
    rows.clear()
    half.call()
    assert set(rows) == {2}
