"""Every launch and option of ada_group_norm, forward and backward, against float64 in each place that it runs"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from ada_group_norm_cases import OPTIONS, PER_GROUP, TENSORS, Case, both_paths, check, close
from places import PATHS

from fastdiff_kernels import _plan, _tuning, ada_group_norm, reference

# NumPy's words for infinities that a GPU makes silently
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the kernels launched in a test, in order"""
    names: list[str] = []
    monkeypatch.setattr(_plan, "observers", [lambda plan: names.append(plan.name)])
    return names


DTYPES = [torch.float32, torch.float16]


@both_paths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_group", PER_GROUP, ids="{}_per_group".format)
def test_every_width_of_a_group(place, per_group, dtype):
    check(Case(per_group=per_group, groups=3), dtype, place)


@both_paths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(place, option, dtype):
    check(OPTIONS[option], dtype, place)


SIZES = [(1, 1), (1, 7), (2, 2), (7, 1), (9, 15), (16, 16), (23, 5)]


@both_paths
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size(place, size):
    check(Case(size=size, b=1, second=3), torch.float32, place)


@both_paths
def test_one_group_and_a_group_a_channel(place):
    check(Case(per_group=10, groups=1, second=3, x_bias=True), torch.float32, place)
    check(Case(per_group=1, groups=12, second=3, x_bias=True), torch.float32, place)


# more than 256 pixels, of few channels and of many
@pytest.mark.parametrize(("per_group", "size"), [(8, (16, 17)), (6, (24, 25)), (64, (17, 17))], ids=str)
def test_large_images_take_the_split_path(place, launched, per_group, size):
    check(Case(per_group=per_group, groups=4, b=1, size=size), torch.float32, place)
    if place.impl == "triton":
        assert launched == ["statistics", "apply", "sums", "fold_sums", "dx"]


@pytest.mark.parametrize(("per_group", "size"), [(24, (8, 8)), (8, (16, 16))], ids=str)
def test_small_images_take_one_launch_each_way(place, launched, per_group, size):
    check(Case(per_group=per_group, groups=4, size=size), torch.float32, place)
    assert launched == (["slab", "slab_backward"] if place.impl == "triton" else [])


@both_paths
def test_statistics_handed_in_save_their_launch(place, launched):
    case = Case(per_group=6, groups=4, b=2, size=(9, 10), second=10, x_bias=True)
    tensors = case.draw(torch.float32, place.device)
    # any number of chunks, and not the same for both
    stats, stats2 = reference.chunk_statistics(tensors["x"], 4), reference.chunk_statistics(tensors["x2"], 7)
    check(case, torch.float32, place, stats=stats, stats2=stats2)
    if place.split:
        assert launched == ["apply", "sums", "fold_sums", "dx"]
    launched.clear()
    check(case, torch.float32, place, stats2=stats2)
    if place.split:
        assert launched[:2] == ["statistics", "apply"]


@both_paths
def test_statistics_of_fewer_rows_go_with_their_tensor(place, launched):
    case = Case(per_group=6, groups=4, b=3, size=(5, 6), second=10, second_rows=2, x_bias=True)
    tensors = case.draw(torch.float32, place.device)
    stats, stats2 = reference.chunk_statistics(tensors["x"], 4), reference.chunk_statistics(tensors["x2"], 3)
    check(case, torch.float32, place, stats=stats, stats2=stats2)
    if place.split:
        assert launched == ["apply", "sums", "fold_sums", "dx"]
    check(case, torch.float32, place, stats=stats)


@pytest.fixture
def plans(monkeypatch) -> list[_plan.Plan]:
    """The plans launched in a test, in order"""
    made: list[_plan.Plan] = []
    monkeypatch.setattr(_plan, "observers", [made.append])
    return made


@pytest.mark.parametrize("place", PATHS[1:], indirect=True)
def test_moments_are_stored_only_for_a_backward_pass(place, plans):
    case = Case(per_group=18, groups=8, b=2, second=48, second_rows=1, x_bias=True, size=(3, 4))
    tensors = case.draw(torch.float32, place.device)
    y = ada_group_norm(**tensors, **case.options, impl=place.impl)
    tensors["weight"].requires_grad_()
    with torch.no_grad():
        ada_group_norm(**tensors, **case.options, impl=place.impl)
    written = [plan.args["moments_ptr"] for plan in plans if plan.name in ("apply", "slab")]
    assert written == [None, None]
    # whatever memory they get must be written wholly: what a launch leaves out stays NaN
    operands = [tensors.get(name) for name in TENSORS]
    again, moments = torch.ops.fastdiff_kernels.ada_group_norm(
        *operands, None, None, case.groups, 1e-5, case.silu, case.resample, True, place.impl
    )
    assert torch.equal(again, y)
    whole = torch.cat([tensors["x"], tensors["x2"].expand(2, -1, -1, -1)], 1) + tensors["x_bias"][:, None, None]
    grouped = whole.double().reshape(2, 8, -1)
    want = torch.stack((grouped.mean(2), (grouped.var(2, correction=0) + 1e-5).rsqrt()))
    close(moments, want, 1e-6)
    empty = torch.ops.fastdiff_kernels.ada_group_norm(
        *operands, None, None, case.groups, 1e-5, case.silu, case.resample, False, place.impl
    )[1]
    assert empty.numel() == 0


SPLIT_PLACES = pytest.mark.parametrize("place", [PATHS[2], PATHS[4]], indirect=True)


@SPLIT_PLACES
@pytest.mark.parametrize("tile", [(1, 8), (4, 2)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e4], ids=str)
def test_statistics_merge_whatever_the_tile(place, tile, mean, monkeypatch):
    """Many tiles in chunks and channels, some of them without a pixel"""
    block_k, block_l = tile
    monkeypatch.setattr(
        "fastdiff_kernels.jit.ada_group_norm.merge_block",
        lambda chunks, per_group, groups, num_warps: {"BLOCK_G": 8, "BLOCK_K": block_k, "BLOCK_L": block_l},
    )
    case = Case(per_group=7, groups=5, b=2, size=(5, 7), second=17, second_rows=1, x_bias=True, mean=mean)
    tensors = case.draw(torch.float32, place.device)
    stats, stats2 = reference.chunk_statistics(tensors["x"], 3), reference.chunk_statistics(tensors["x2"], 10)
    tolerance = 5e-3 if mean else None
    check(case, torch.float32, place, tolerance, stats=stats, stats2=stats2)


@SPLIT_PLACES
@pytest.mark.parametrize("option", ["plain", "everything_up", "everything_down", "second_of_fewer_rows"])
def test_tiles_of_a_program_follow_one_another(place, option, monkeypatch, plans):
    case = dataclasses.replace(OPTIONS[option], size=(8, 10))
    tensors = case.draw(torch.float32, place.device)
    want = ada_group_norm(**tensors, **case.options, impl=place.impl)
    monkeypatch.setitem(_tuning.trial, "apply", {"BLOCK_P": 8, "TILES": 3})
    check(case, torch.float32, place)
    assert torch.equal(ada_group_norm(**tensors, **case.options, impl=place.impl), want)
    assert [plan.constexprs["TILES"] for plan in plans if plan.name == "apply"] == [1, 3, 3]


@both_paths
def test_the_statistics_handed_in_are_the_ones_used(place):
    if place.impl == "triton" and not place.split:
        pytest.skip("a slab reads x once either way, and computes its own")
    tensors = Case(size=(6, 6)).draw(torch.float32, place.device)
    stats = reference.chunk_statistics(tensors["x"], 3)
    stats[1] *= 4  # as if x varied twice as much within its chunks
    got = ada_group_norm(**tensors, groups=2, stats=stats, impl=place.impl)
    moments = reference.group_moments(stats, None, None, 36, 2, 1e-5)
    mean, rstd = (reference.spread(moment, tensors["x"]) for moment in moments)
    gain, offset = reference.modulated_affine(
        *(tensors[name] for name in ("weight", "bias", "scale", "shift")), torch.float32
    )
    close(got, F.silu((tensors["x"] - mean) * rstd * gain + offset).double(), 1e-5)


@pytest.mark.parametrize("chunks", [1, 3, 8, 64])
def test_chunks_merge_to_the_moments_of_the_whole(chunks):
    case = Case(per_group=5, groups=3, b=3, size=(7, 9), second=4, second_rows=2, x_bias=True, mean=100.0)
    tensors = case.draw(torch.float64, "cpu")
    x, x2, x_bias = tensors["x"], tensors["x2"], tensors["x_bias"]
    stats, stats2 = reference.chunk_statistics(x, chunks), reference.chunk_statistics(x2, chunks + 1)
    got = reference.group_moments(stats, stats2, x_bias, 63, 3, 1e-5)
    whole = (torch.cat([x, x2[[0, 1, 0]]], 1) + x_bias[:, None, None]).reshape(3, 3, -1)
    want = torch.stack((whole.mean(2), (whole.var(2, correction=0) + 1e-5).rsqrt()))
    assert torch.allclose(got, want, rtol=1e-12)


@both_paths
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_a_mean_of_1e4_keeps_the_variance(place, layout):
    check(Case(per_group=6, groups=2, size=(16, 16), mean=1e4, layout=layout), torch.float32, place, 5e-3)
    check(Case(per_group=6, groups=2, size=(9, 9), mean=1e4, second=5, x_bias=True), torch.float32, place, 5e-3)


@both_paths
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_bad_value_stays_in_its_sample_and_group(place, bad):
    tensors = Case(per_group=4, groups=2, b=3, size=(5, 5)).draw(torch.float32, place.device)
    clean = ada_group_norm(**tensors, groups=2, impl=place.impl)
    tensors["x"][1, 5, 2, 2] = bad
    tensors["x"].requires_grad_()
    y = ada_group_norm(**tensors, groups=2, impl=place.impl)
    (gradient,) = torch.autograd.grad(y, tensors["x"], torch.ones_like(y))
    assert y[1, 4:].isnan().all() and gradient[1, 4:].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]]) and torch.equal(y[1, :4], clean[1, :4])
    assert gradient[[0, 2]].isfinite().all() and gradient[1, :4].isfinite().all()


@both_paths
@pytest.mark.parametrize("value", [0.0, 7.0, -3e4], ids=str)
def test_a_constant_image_gives_the_offset(place, value):
    tensors = Case(per_group=4, groups=2, size=(5, 5), silu=False).draw(torch.float32, place.device)
    tensors["x"].fill_(value)
    y = ada_group_norm(**tensors, groups=2, silu=False, impl=place.impl)
    want = tensors["bias"] * (1 + tensors["scale"]) + tensors["shift"]
    close(y, want[:, :, None, None].expand_as(y).double(), 1e-6)


@SPLIT_PLACES
def test_what_rounding_leaves_of_a_mean_is_taken_back(place):
    """Sums of these are not exact, and a deviation of one unit in the last place would be 300 times that in y"""
    case = Case(per_group=7, groups=1, b=1, size=(6, 7), silu=False, second=3)
    tensors = case.draw(torch.float32, place.device)
    for value in (7.3, 0.1, 123.456, -1.7e4 / 3):
        tensors["x"].fill_(value)
        tensors["x2"].fill_(value)
        operands = [tensors.get(name) for name in TENSORS]
        y, moments = torch.ops.fastdiff_kernels.ada_group_norm(
            *operands, None, None, case.groups, 1e-5, case.silu, case.resample, True, place.impl
        )
        want = tensors["bias"] * (1 + tensors["scale"]) + tensors["shift"]
        close(y, want[:, :, None, None].expand_as(y).double(), 1e-6, str(value))
        assert moments[1].item() == pytest.approx(1e-5**-0.5, rel=1e-5), value


@both_paths
@pytest.mark.parametrize("option", ["plain", "everything_up", "everything_down"])
def test_batches_and_repeats_change_no_bit(place, option):
    case = dataclasses.replace(OPTIONS[option], b=3, repeats=3)
    tensors = case.draw(torch.float32, place.device)
    whole = ada_group_norm(**tensors, **case.options, impl=place.impl)
    assert torch.equal(whole, ada_group_norm(**tensors, **case.options, impl=place.impl))
    if not case.modulated:
        return
    for row in range(6):
        batched = ("x", "x2")
        one = {name: value[row % 3 :][:1] if name in batched else value for name, value in tensors.items()}
        one["scale"], one["shift"] = tensors["scale"][row:][:1], tensors["shift"][row:][:1]
        alone = ada_group_norm(**one, **case.options, impl=place.impl)
        if place.name == "reference":  # torch's own reductions split by the size of the batch
            close(alone, whole[row:][:1].double(), 1e-6)
        else:
            assert torch.equal(alone[0], whole[row])


@both_paths
def test_rows_of_the_second_tensor_change_no_bit(place):
    case = OPTIONS["second_of_fewer_rows"]
    tensors = case.draw(torch.float32, place.device)
    whole = ada_group_norm(**tensors, **case.options, impl=place.impl)
    repeated = tensors | {"x2": tensors["x2"][[0, 1, 0]].contiguous(memory_format=case.layout)}
    assert torch.equal(ada_group_norm(**repeated, **case.options, impl=place.impl), whole)
    for row in range(3):
        one = {name: tensors[name][row:][:1] for name in ("x", "scale", "shift")}
        one["x2"] = tensors["x2"][row % 2 :][:1]
        alone = ada_group_norm(**(tensors | one), **case.options, impl=place.impl)
        if place.name == "reference":  # torch's own reductions split by the size of the batch
            close(alone, whole[row:][:1].double(), 1e-6)
        else:
            assert torch.equal(alone[0], whole[row])
