"""residual whose skip goes through a 1 x 1 convolution of one or two tensors, against torch's in float64"""

import itertools

import numpy as np
import pytest
import torch
from places import GPU, INTERPRETER
from residual_cases import (
    DTYPES,
    LAYOUTS,
    MANTISSA,
    by_chunk,
    check_rounded,
    check_statistics,
    draw_wide,
    images_of,
    upstream_of,
    wide_formula,
)
from torch import Tensor

from fastdiff_kernels import reference, residual
from fastdiff_kernels._tuning import num_chunks

KERNEL = pytest.mark.parametrize("place", [INTERPRETER, GPU])  # the reference has no plan
NAN = float("nan")
# shape of h, channels of the skips, their rows, whether the weight has a bias: neither all different nor all alike,
# with and without masks of any kind
CASES = {
    "one": ((2, 6, 4, 4), (5,), (2,), False),
    "one_shared": ((3, 24, 5, 7), (40,), (2,), True),
    "square": ((2, 16, 8, 8), (16,), (1,), False),
    "two": ((2, 40, 5, 7), (24, 16), (2, 2), True),
    "first_shared": ((3, 5, 4, 6), (3, 7), (2, 3), False),
    "second_shared": ((3, 5, 4, 6), (7, 3), (3, 2), True),
    "both_shared": ((5, 8, 3, 5), (8, 8), (3, 4), True),
    "no_masks": ((2, 64, 8, 8), (64, 128), (2, 1), True),
    "many_channels": ((1, 70, 9, 15), (130, 33), (1, 1), True),
    "one_pixel": ((2, 192, 1, 1), (48, 96), (1, 1), False),
}
ALL = pytest.mark.parametrize("case", CASES)
BIASES = pytest.mark.parametrize(
    "bias,weight_bias", list(itertools.product(("none", "like_h", "float32"), repeat=2)), ids=str
)
SOME = pytest.mark.parametrize("case", ["one_shared", "first_shared", "second_shared"])


def draw_case(case, dtype=torch.float32, **options) -> dict[str, Tensor]:
    shape, parts, rows, weight_bias = CASES[case]
    return draw_wide(shape, parts, dtype, rows=rows, weight_bias=weight_bias, **options)


def check_close(y: Tensor, op: dict[str, Tensor], place) -> None:
    """One rounding of an fp32 sum; bfloat16 products on a CPU are rounded one by one"""
    if place.impl == "reference" and y.dtype == torch.bfloat16:
        products = []
        for name in [name for name in op if name.startswith("skip")]:
            others = {other: torch.zeros_like(op[other]) for other in images_of(op) if other != name}
            products.append(wide_formula(**op | others | {"bias": None, "weight_bias": None}).abs())
        want = wide_formula(**op)
        assert ((y.double() - want).abs() <= 2.0**-8 * (sum(products) + want.abs()) + 1e-6).all()
    else:
        check_rounded(y, wide_formula(**op), scale=24.0)


@pytest.fixture
def launch(place):
    """Launches the plan itself, on tensors that the test owns"""
    from fastdiff_kernels.jit.projection import plan_projection

    def run(op: dict[str, Tensor], y: Tensor, stats: Tensor | None) -> None:
        given = [op.get(name) for name in ("h", "bias", "skip", "skip2", "weight", "weight_bias")]
        plan_projection(*given, y, stats).launch()

    return run


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_statistics(place, dtype, case):
    op = draw_case(case, dtype, device=place.device)
    y, stats = residual(**op, impl=place.impl)
    assert y.dtype == dtype and y.stride() == op["h"].stride()
    check_close(y, op, place)
    b, c, height, width = y.shape
    assert stats.dtype == torch.float32 and stats.shape == (2, b, num_chunks(height * width), c)
    check_statistics(stats, y)


@ALL
def test_float64_stays_float64(case):
    op = draw_case(case, torch.float64)
    y, stats = residual(**op)
    assert y.dtype == stats.dtype == torch.float64
    np.testing.assert_allclose(y, wide_formula(**op), rtol=0, atol=1e-13)
    np.testing.assert_allclose(stats, by_chunk(y, stats.shape[2]), rtol=1e-12, atol=1e-13)


def draw_biases(bias: str, weight_bias: str, dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
    op = draw_case("second_shared", dtype, device=device)
    for name, kind in (("bias", bias), ("weight_bias", weight_bias)):
        op[name] = {"none": None, "like_h": op[name].to(dtype), "float32": op[name]}[kind]
    return op


@BIASES
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_bias_may_be_left_out_or_have_the_dtype_of_h(place, dtype, bias, weight_bias):
    op = draw_biases(bias, weight_bias, dtype, place.device)
    check_close(residual(**op, impl=place.impl)[0], op, place)


@BIASES
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_bias_gets_a_gradient_of_its_own_dtype(place, dtype, bias, weight_bias):
    op = draw_biases(bias, weight_bias, dtype, place.device)
    leaves = {name: op[name].requires_grad_() for name in ("bias", "weight_bias") if op[name] is not None}
    op["h"].requires_grad_()
    upstream = upstream_of(op["h"])
    residual(**op, impl=place.impl)[0].backward(upstream)
    for value in leaves.values():
        assert value.grad.dtype == value.dtype
        check_rounded(value.grad, upstream.double().sum((0, 2, 3)), scale=64.0)


def test_a_weight_bias_with_gaps(place):
    op = draw_case("second_shared", device=place.device)
    want = residual(**op, impl=place.impl)
    row = torch.full((15,), NAN, device=place.device)
    row[2:12:2] = op["weight_bias"]
    got = residual(**{**op, "weight_bias": row[2:12:2]}, impl=place.impl)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("trailing", [(1,), (1, 1)], ids=["1d", "2d"])
def test_the_weight_of_a_convolution(place, trailing):
    """As Conv1d and Conv2d hold it, and as a view with gaps"""
    op = draw_case("first_shared", device=place.device)
    y, stats = residual(**op, impl=place.impl)
    weight = op["weight"].reshape(*op["weight"].shape, *trailing)
    if len(trailing) == 2:
        weight = weight.contiguous(memory_format=torch.channels_last)
    with_gaps = torch.stack((weight, weight), 1).flatten(0, 1)[::2]
    for given in (weight, with_gaps):
        got = residual(**{**op, "weight": given}, impl=place.impl)
        assert torch.equal(got[0], y) and torch.equal(got[1], stats)


def test_a_transposed_weight_is_read_as_what_it_is(place):
    op = draw_case("square", device=place.device)
    y, _ = residual(**op, impl=place.impl)
    turned = op["weight"].T.contiguous().T
    assert turned.stride() == (1, 16)
    assert torch.equal(residual(**{**op, "weight": turned}, impl=place.impl)[0], y)


def test_two_skips_are_their_concatenation(place):
    op = draw_case("no_masks", device=place.device)
    y, _ = residual(**op, impl=place.impl)
    whole = torch.cat((op["skip"], op.pop("skip2").expand(2, -1, -1, -1)), 1)
    alike, _ = residual(**{**op, "skip": whole}, impl=place.impl)
    torch.testing.assert_close(alike, y, rtol=0, atol=4e-6)


@SOME
def test_shared_rows_are_as_if_they_were_repeated(place, case):
    op = draw_case(case, device=place.device)
    first = residual(**op, impl=place.impl)
    b = len(op["h"])
    for name in ("skip", "skip2"):
        if name in op:
            op[name] = torch.cat((op[name], op[name][: b - len(op[name])]))
    for got, want in zip(residual(**op, impl=place.impl), first, strict=True):
        # torch's products depend on how many rows there are
        assert torch.equal(got, want) if place.impl == "triton" else torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@SOME
def test_without_statistics_y_has_the_same_bits(place, case):
    op = draw_case(case, torch.float16, device=place.device)
    y, stats = residual(**op, stats=False, impl=place.impl)
    assert stats is None
    assert torch.equal(y, residual(**op, impl=place.impl)[0])


def test_statistics_are_of_the_rounded_y(place):
    """fp16 holds even numbers only above 2048: the sum's own mean is 2050.5"""
    h = torch.full((1, 8, 4, 4), 2048.0, dtype=torch.float16, device=place.device)
    weight = torch.full((8, 1), 0.5, dtype=torch.float16, device=place.device)
    y, stats = residual(h, None, torch.full_like(h[:, :1], 5.0), weight=weight, impl=place.impl)
    assert (y == 2050).all() and (stats[0] == 2050).all() and (stats[1] == 0).all()


def test_a_mean_of_1e4_keeps_the_deviations(place):
    """In the h that the products are added to: added up on it, each would lose what h has no digits for"""
    op = draw_wide((2, 24, 12, 12), (192, 64), mean=1e4, device=place.device)
    y, stats = residual(**op, impl=place.impl)
    # half a unit of fp32 there
    assert ((y.double() - wide_formula(**op)).abs() <= 2.0**-11 + 1e-5).all()
    want = by_chunk(y, num_chunks(12 * 12))
    np.testing.assert_allclose(stats[0].cpu(), want[0], rtol=0, atol=1e-2)
    np.testing.assert_allclose(stats[1].cpu(), want[1], rtol=1e-3)


@pytest.mark.parametrize(
    "shape,chunks", [((1, 40, 15, 15), 1), ((2, 3, 5, 1), 4), ((1, 64, 13, 10), 2), ((1, 3, 2, 2), 64)], ids=str
)
@KERNEL
def test_any_number_of_chunks_and_tiles_in_a_chunk(place, launch, shape, chunks):
    op = draw_wide(shape, (20, 9), mean=100.0, device=place.device)
    y = torch.full_like(op["h"], NAN)
    stats = torch.full((2, shape[0], chunks, shape[1]), NAN, device=place.device)
    launch(op, y, stats)
    check_rounded(y, wide_formula(**op), scale=128)
    want = by_chunk(y, chunks)
    np.testing.assert_allclose(stats[0].cpu(), want[0], rtol=3e-7)
    np.testing.assert_allclose(stats[1].cpu(), want[1], rtol=2e-5, atol=1e-7)


@SOME
def test_every_output_is_written(place, monkeypatch, case):
    op = draw_case(case, device=place.device)
    want = residual(**op, impl=place.impl)
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, real=real, **kwargs: real(*args, **kwargs).fill_(NAN))
    assert torch.empty(1).isnan()
    got = residual(**op, impl=place.impl)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_an_image_alone_is_as_in_a_batch(place):
    op = draw_wide((3, 24, 8, 8), (40, 24), rows=(3, 2), device=place.device)
    first = residual(**op, impl=place.impl)
    second = residual(**op, impl=place.impl)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for row, of_second in ((1, 1), (2, 0)):
        alone = {"h": op["h"][row, None], "skip": op["skip"][row, None], "skip2": op["skip2"][of_second, None]}
        y, stats = residual(**op | alone, impl=place.impl)
        if place.impl == "triton":
            assert torch.equal(y[0], first[0][row]) and torch.equal(stats[:, 0], first[1][:, row])
        else:
            torch.testing.assert_close(y[0], first[0][row], rtol=0, atol=2e-6)


@pytest.mark.parametrize("bad", [NAN, float("inf")], ids=["nan", "inf"])
def test_a_bad_value_stays_in_its_pixel_of_the_rows_that_it_feeds(place, bad):
    op = draw_wide((3, 5, 16, 8), (6, 7), rows=(3, 2), device=place.device)
    y, stats = residual(**op, impl=place.impl)
    op["skip2"][0, 4, 15, 2] = bad
    dirty, dirty_stats = residual(**op, impl=place.impl)
    hit = torch.zeros_like(y, dtype=torch.bool)
    hit[[0, 2], :, 15, 2] = True
    assert not dirty[hit].isfinite().any() and torch.equal(dirty[~hit], y[~hit])
    in_chunk = torch.zeros_like(stats, dtype=torch.bool)
    in_chunk[:, [0, 2], -1] = True
    assert not dirty_stats[in_chunk].isfinite().any()
    assert torch.equal(dirty_stats[~in_chunk], stats[~in_chunk])


@pytest.mark.parametrize("of_second", ["channels_last", "batch_innermost"])
@pytest.mark.parametrize("of_first", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_y_has_the_layout_of_h_whatever_that_of_the_skips(place, layout, of_first, of_second):
    op = draw_case("second_shared", layout=layout, device=place.device)
    op["skip"], op["skip2"] = LAYOUTS[of_first](op["skip"]), LAYOUTS[of_second](op["skip2"])
    y, stats = residual(**op, impl=place.impl)
    assert y.stride() == op["h"].stride()
    check_rounded(y, wide_formula(**op), scale=24.0)
    check_statistics(stats, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_views_are_read_within_their_bounds_and_left_alone(place, layout, dtype):
    op = draw_wide((2, 6, 4, 4), (5, 9), dtype, rows=(2, 1), weight_bias=True, layout="contiguous", device=place.device)
    views, bases = {}, {}
    for name in ("h", "skip", "skip2"):
        b, c, h, w = op[name].shape
        bases[name] = LAYOUTS[layout](torch.full((b + 2, c + 2, h + 3, 2 * w + 3), NAN, device=place.device).to(dtype))
        views[name] = bases[name][1:-1, 1:-1, 2:-1, 2:-1:2]
        views[name].copy_(op[name])
    bases["weight"] = torch.full((8, 20), NAN, device=place.device).to(dtype)
    views["weight"] = bases["weight"][1:-1, 4:18]
    views["weight"].copy_(op["weight"])
    for name in ("bias", "weight_bias"):
        bases[name] = torch.full((15,), NAN, device=place.device)
        views[name] = bases[name][2:14:2]
        views[name].copy_(op[name])
    before = {name: base.clone() for name, base in bases.items()}
    y, stats = residual(**views, impl=place.impl)
    assert y.stride() == torch.empty_like(views["h"]).stride()
    check_close(y, op, place)
    check_statistics(stats, y)
    assert all(torch.equal(bases[name].nan_to_num(7), before[name].nan_to_num(7)) for name in bases)


@KERNEL
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_nothing_outside_a_view_is_written(place, launch, layout):
    op = draw_wide((2, 5, 4, 6), (7, 3), device=place.device)
    base = LAYOUTS[layout](torch.full((4, 7, 7, 15), -7.0, device=place.device))
    y = base[1:-1, 1:-1, 2:-1, 1:-2:2]
    memory = torch.full((2 * 2 * 5 + 2,), -7.0, device=place.device)
    stats = memory[1:-1].view(2, 2, 1, 5)
    launch(op, y, stats)
    check_rounded(y, wide_formula(**op), scale=24.0)
    check_statistics(stats, y)
    assert memory[0] == memory[-1] == -7
    y.fill_(-7)
    assert (base == -7).all()


@KERNEL
@pytest.mark.parametrize("dim", range(4), ids="BCHW".__getitem__)
def test_offsets_past_2_to_the_31(place, launch, dim):
    """A stride of 2^30 elements, in memory of which a few pages are ever touched"""
    step = 1 << 30
    shape = [4 if d == dim else 2 for d in range(4)]
    op = draw_wide(shape, (shape[1], shape[1]), torch.float16, device=place.device)
    memory = torch.empty(step * 3 + 8192, dtype=torch.float16, device=place.device)
    stride, small = [0] * 4, 1
    for d in (3, 2, 1, 0):
        stride[d] = step if d == dim else small
        small *= 1 if d == dim else shape[d]
    views = [memory.as_strided(shape, stride, start) for start in (0, 2048, 4096, 6144)]
    *inputs, y = views
    for name, view in zip(("h", "skip", "skip2"), inputs, strict=True):
        op[name] = view.copy_(op[name])
    stats = torch.full((2, shape[0], 1, shape[1]), NAN, device=place.device)
    launch(op, y, stats)
    check_rounded(y.clone(), wide_formula(**op), scale=24.0)
    check_statistics(stats, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["one_shared", "two", "first_shared", "second_shared", "both_shared"])
def test_gradients(place, case, dtype):
    op = draw_case(case, dtype, device=place.device)
    given = {name: value.clone().requires_grad_() for name, value in op.items()}
    wanted = {name: value.double().requires_grad_() for name, value in op.items()}
    upstream = upstream_of(op["h"])
    y, stats = residual(**given, impl=place.impl)
    assert y.requires_grad and not stats.requires_grad
    y.backward(upstream)
    wide_formula(**wanted).backward(upstream.double())
    for name in op:
        grad, want = given[name].grad, wanted[name].grad
        assert grad.dtype == op[name].dtype and grad.shape == want.shape
        if name in ("skip", "skip2"):
            # the sum of shared rows is rounded before the product, and products have their own roundings
            assert (grad.double() - want).abs().max() <= 2.0 ** (2 - MANTISSA[dtype]) * want.abs().max()
        else:
            check_rounded(grad, want, scale=64.0)


@pytest.mark.parametrize("wanted", ["h", "bias", "skip", "skip2", "weight", "weight_bias"])
def test_a_single_gradient_can_be_asked_for(wanted):
    op = draw_case("both_shared", torch.float64)
    upstream = upstream_of(op["h"])
    alone = {name: value.double().requires_grad_(name == wanted) for name, value in op.items()}
    (got,) = torch.autograd.grad(residual(**alone)[0], alone[wanted], upstream)
    (want,) = torch.autograd.grad(wide_formula(**alone), alone[wanted], upstream)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [residual, reference.residual], ids=["public", "reference"])
@pytest.mark.parametrize("parts,rows", [((3,), (2,)), ((2, 3), (3, 2))], ids=str)
def test_gradcheck(function, parts, rows):
    op = draw_wide((3, 2, 2, 1), parts, torch.float64, rows=rows, weight_bias=len(parts) == 2)
    names, leaves = tuple(op), tuple(value.double().requires_grad_() for value in op.values())

    def y(*args: Tensor) -> Tensor:
        return function(**dict(zip(names, args, strict=True)), stats=False)[0]

    assert torch.autograd.gradcheck(y, leaves)
    assert torch.autograd.gradgradcheck(y, leaves)


@pytest.mark.parametrize(
    "shape,parts",
    [
        ((0, 6, 4, 4), (5, 3)),
        ((2, 0, 4, 4), (5, 3)),
        ((2, 6, 0, 4), (5,)),
        ((2, 6, 4, 4), (0,)),
        ((2, 6, 4, 4), (5, 0)),
    ],
    ids=str,
)
def test_empty(place, shape, parts):
    op = draw_wide(shape, parts, weight_bias=True, device=place.device)
    for value in op.values():
        value.requires_grad_()
    y, stats = residual(**op, impl=place.impl)
    assert y.shape == shape
    assert stats.shape == (2, shape[0], num_chunks(shape[2] * shape[3]), shape[1])
    upstream = upstream_of(y)
    y.backward(upstream)
    assert all(value.grad.shape == value.shape for value in op.values())
    assert torch.equal(op["h"].grad, upstream)
    # a product of no channels is 0
    if not parts[0]:
        added = op["bias"] + op["weight_bias"]
        torch.testing.assert_close(y, op["h"] + added[:, None, None], rtol=0, atol=1e-6)
