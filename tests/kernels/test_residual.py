"""residual against float64 formulas that share no code with it, and its statistics against loops over the chunks"""

import numpy as np
import pytest
import torch
from counting import counting
from places import GPU, INTERPRETER, NO_INTERPRETER
from residual_cases import (
    DTYPES,
    FACTOR,
    FORM,
    LAYOUTS,
    RESAMPLE,
    by_chunk,
    check_rounded,
    check_statistics,
    draw,
    formula,
    images_of,
    upstream_of,
)
from torch import Tensor

from fastdiff_kernels import reference, residual
from fastdiff_kernels._tuning import num_chunks

KERNEL = pytest.mark.parametrize("place", [INTERPRETER, GPU])  # the reference has no plan
SHAPES = [(2, 3, 4, 6), (1, 1, 8, 8), (2, 5, 2, 2), (2, 24, 8, 8), (1, 42, 16, 16)]
ODD_SHAPES = [(2, 1, 3, 5), (2, 5, 7, 3), (3, 24, 3, 5), (1, 42, 1, 1), (1, 3, 65, 2)]
NAN = float("nan")


@pytest.fixture
def launch(place):
    """Launches the plan itself, on tensors that the test owns"""
    from fastdiff_kernels.jit.residual import plan_residual

    return lambda *args: plan_residual(*args).launch()


@FORM
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_statistics(place, shape, dtype, resample, skip):
    op = draw(shape, resample, dtype, skip=skip, device=place.device)
    y, stats = residual(**op, resample=resample, impl=place.impl)
    assert y.dtype == dtype and y.stride() == op["h"].stride()
    check_rounded(y, formula(**op, resample=resample))
    chunks = num_chunks(shape[2] * shape[3])
    assert stats.dtype == torch.float32 and stats.shape == (2, shape[0], chunks, shape[1])
    check_statistics(stats, y)


@pytest.mark.parametrize(
    "resample,skip", [(None, True), ("down", True), (None, False)], ids=["plain", "down", "no_skip"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_sizes(place, shape, dtype, resample, skip):
    op = draw(shape, resample, dtype, skip=skip, device=place.device)
    y, stats = residual(**op, resample=resample, impl=place.impl)
    check_rounded(y, formula(**op, resample=resample))
    check_statistics(stats, y)


@pytest.mark.parametrize("b,rows", [(3, 2), (2, 1), (4, 2), (5, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@RESAMPLE
def test_rows_past_those_of_skip_take_its_first(place, resample, dtype, b, rows):
    op = draw((b, 5, 4, 6), resample, dtype, rows=rows, device=place.device)
    y, stats = residual(**op, resample=resample, impl=place.impl)
    check_rounded(y, formula(**op, resample=resample))
    check_statistics(stats, y)
    op["skip"] = torch.cat((op["skip"], op["skip"][: b - rows]))
    alike = residual(**op, resample=resample, impl=place.impl)
    assert torch.equal(y, alike[0]) and torch.equal(stats, alike[1])


@FORM
def test_float64_stays_float64(resample, skip):
    op = draw((2, 6, 4, 4), resample, torch.float64, skip=skip)
    y, stats = residual(**op, resample=resample)
    assert y.dtype == stats.dtype == torch.float64
    np.testing.assert_allclose(y, formula(**op, resample=resample), rtol=0, atol=1e-14)
    np.testing.assert_allclose(stats, by_chunk(y, 1), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_skip_it_is_as_with_zeros(place, dtype, layout):
    op = draw((2, 24, 8, 6), None, dtype, layout=layout, device=place.device)
    op["skip"].zero_()
    for bias in (op["bias"], op["bias"].to(dtype), None):
        want = residual(op["h"], bias, op["skip"], impl=place.impl)
        got = residual(op["h"], bias, None, impl=place.impl)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_y_is_new_even_where_nothing_is_added(place):
    h = draw((2, 5, 4, 6), device=place.device)["h"]
    y, stats = residual(h, None, None, impl=place.impl)
    assert torch.equal(y, h) and y.stride() == h.stride()
    check_statistics(stats, h)
    before = h.clone()
    y.zero_()
    assert torch.equal(h, before)


@pytest.mark.parametrize("skip", [True, False], ids=["plain", "no_skip"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_may_be_left_out_or_have_the_dtype_of_h(place, dtype, skip):
    op = draw((2, 5, 3, 5), None, dtype, skip=skip, device=place.device)
    for bias in (None, op["bias"].to(dtype)):
        y, _ = residual(op["h"], bias, op["skip"], impl=place.impl)
        check_rounded(y, formula(op["h"], bias, op["skip"], None))


@FORM
def test_without_statistics_y_has_the_same_bits(place, resample, skip):
    op = draw((2, 5, 4, 6), resample, torch.float16, skip=skip, device=place.device)
    y, stats = residual(**op, resample=resample, stats=False, impl=place.impl)
    assert stats is None
    assert torch.equal(y, residual(**op, resample=resample, impl=place.impl)[0])


def test_statistics_are_of_the_rounded_y(place):
    """fp16 holds even numbers only above 2048: the sum's own mean is 2050.5"""
    h = torch.full((1, 8, 4, 4), 2048.0, dtype=torch.float16, device=place.device)
    skip = torch.full_like(h, 2.5)
    y, stats = residual(h, None, skip, impl=place.impl)
    assert (y == 2050).all() and (stats[0] == 2050).all() and (stats[1] == 0).all()


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_mean_of_1e4_keeps_the_deviations(place, layout):
    op = draw((2, 24, 16, 16), mean=1e4, layout=layout, device=place.device)
    y, stats = residual(**op, impl=place.impl)
    want = by_chunk(y, num_chunks(16 * 16))
    # fp32 sums of 1e4 leave a few units of 2^-10 in the means, which the merge of tiles sees
    np.testing.assert_allclose(stats[0].cpu(), want[0], rtol=0, atol=1e-2)
    np.testing.assert_allclose(stats[1].cpu(), want[1], rtol=1e-3)


@pytest.mark.parametrize("value", [1e15, -3e4, 0.1], ids=str)
def test_a_constant_has_no_deviation(place, value):
    h = torch.full((1, 24, 16, 16), value, device=place.device)
    y, stats = residual(h, None, torch.zeros_like(h), impl=place.impl)
    assert (y == h).all()
    np.testing.assert_allclose(stats[0].cpu(), h[0, 0, 0, 0].item(), rtol=1e-6)
    assert (stats[1] <= 64 * (1e-6 * value) ** 2).all()


@pytest.mark.parametrize("shape", [(2, 5, 16, 16), (1, 3, 9, 15)], ids=str)
def test_chunks_merge_to_the_statistics_of_the_whole(place, shape):
    op = draw(shape, mean=3.0, device=place.device)
    y, stats = residual(**op, impl=place.impl)
    pixels, chunks = shape[2] * shape[3], stats.shape[2]
    assert chunks > 1
    size = -(-pixels // chunks)
    count = torch.tensor([float(min(size, pixels - k * size)) for k in range(chunks)])[None, :, None]
    assert count.sum() == pixels
    mean, m2 = stats.double().cpu()
    whole = (count * mean).sum(1) / pixels
    total = m2.sum(1) + (count * (mean - whole[:, None]) ** 2).sum(1)
    y = y.double().cpu()
    np.testing.assert_allclose(whole, y.mean((2, 3)), atol=1e-6)
    np.testing.assert_allclose(total / pixels, y.var((2, 3), correction=0), rtol=1e-5)


@pytest.mark.parametrize("pixels,chunks", [(5, 4), (7, 3), (1, 5), (0, 2), (64, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_chunk_statistics_cut_the_pixels_as_documented(pixels, chunks, dtype):
    x = torch.randn(2, 3, 1, pixels, dtype=dtype)
    got = reference.chunk_statistics(x, chunks)
    assert got.dtype == dtype and got.shape == (2, 2, chunks, 3)
    np.testing.assert_allclose(got, by_chunk(x, chunks), rtol=1e-5, atol=1e-6)


def test_chunk_statistics_of_fp16_are_fp32():
    assert reference.chunk_statistics(torch.ones(1, 2, 3, 3).half(), 1).dtype == torch.float32


@pytest.mark.parametrize(
    "shape,chunks", [((1, 40, 15, 15), 1), ((2, 3, 5, 1), 4), ((1, 64, 13, 10), 2), ((1, 3, 2, 2), 64)], ids=str
)
@KERNEL
def test_any_number_of_chunks_and_tiles_in_a_chunk(place, launch, shape, chunks):
    op = draw(shape, mean=100.0, device=place.device)
    y = torch.full_like(op["h"], NAN)
    stats = torch.full((2, shape[0], chunks, shape[1]), NAN, device=place.device)
    launch(op["h"], op["bias"], op["skip"], y, stats, None)
    check_rounded(y, formula(**op, resample=None), scale=128)
    want = by_chunk(y, chunks)
    np.testing.assert_allclose(stats[0].cpu(), want[0], rtol=3e-7)
    np.testing.assert_allclose(stats[1].cpu(), want[1], rtol=2e-5, atol=1e-7)


@FORM
def test_every_output_is_written(place, monkeypatch, resample, skip):
    op = draw((2, 5, 6, 4), resample, skip=skip, device=place.device)
    want = residual(**op, resample=resample, impl=place.impl)
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, real=real, **kwargs: real(*args, **kwargs).fill_(NAN))
    assert torch.empty(1).isnan()
    got = residual(**op, resample=resample, impl=place.impl)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@NO_INTERPRETER
@FORM
def test_the_traffic_is_each_tensor_once(resample, skip):
    op = draw((2, 24, 12, 8), resample, skip=skip)  # a chunk is 6 whole rows
    with counting() as counts:
        y, stats = residual(**op, resample=resample, impl="triton")
    (count,) = counts
    moved = {f"{name}_ptr": op[name].numel() * 4 for name in images_of(op)}
    assert {name: size for name, size in count.loads.items() if name != "bias_ptr"} == moved
    assert count.stores == {"y_ptr": y.numel() * 4, "stats_ptr": stats.numel() * 4}


@FORM
def test_twice_the_same_bits_and_alone_as_in_a_batch(place, resample, skip):
    op = draw((3, 24, 8, 8), resample, skip=skip, device=place.device)
    first = residual(**op, resample=resample, impl=place.impl)
    second = residual(**op, resample=resample, impl=place.impl)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = {name: op[name][1:2] for name in images_of(op)}
    y, stats = residual(**{**op, **alone}, resample=resample, impl=place.impl)
    assert torch.equal(y, first[0][1:2])
    if place.impl == "triton":
        assert torch.equal(stats, first[1][:, 1:2])


@pytest.mark.parametrize("bad", [NAN, float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["h", "skip"])
def test_a_bad_value_stays_in_its_pixel_and_its_channel(place, where, bad):
    op = draw((3, 5, 16, 8), device=place.device)
    y, stats = residual(**op, impl=place.impl)
    op[where][1, 3, 15, 2] = bad
    dirty, dirty_stats = residual(**op, impl=place.impl)
    assert not dirty[1, 3, 15, 2].isfinite() and (~dirty.isfinite()).sum() == 1
    assert torch.equal(dirty[[0, 2]], y[[0, 2]])
    hit = torch.zeros_like(stats, dtype=torch.bool)
    hit[:, 1, -1, 3] = True  # the last chunk
    assert not dirty_stats[hit].isfinite().any()
    assert torch.equal(dirty_stats[~hit], stats[~hit])


@RESAMPLE
@pytest.mark.parametrize("skip_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_y_has_the_layout_of_h_whatever_that_of_skip(place, layout, skip_layout, resample):
    op = draw((3, 6, 4, 2), resample, layout=layout, device=place.device)
    op["skip"] = LAYOUTS[skip_layout](op["skip"])
    y, stats = residual(**op, resample=resample, impl=place.impl)
    assert y.stride() == op["h"].stride()
    check_rounded(y, formula(**op, resample=resample))
    check_statistics(stats, y)


@FORM
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_views_are_read_within_their_bounds_and_left_alone(place, layout, resample, skip):
    op = draw((2, 6, 4, 4), resample, layout="contiguous", skip=skip, device=place.device)
    views, bases = {"skip": None}, {}
    for name in images_of(op):
        b, c, h, w = op[name].shape
        bases[name] = LAYOUTS[layout](torch.full((b + 2, c + 2, h + 3, 2 * w + 3), NAN, device=place.device))
        views[name] = bases[name][1:-1, 1:-1, 2:-1, 2:-1:2]
        views[name].copy_(op[name])
    row = torch.full((15,), NAN, device=place.device)
    views["bias"] = row[2:14:2]
    views["bias"].copy_(op["bias"])
    before = {name: base.clone() for name, base in bases.items()}
    y, stats = residual(**views, resample=resample, impl=place.impl)
    assert y.stride() == torch.empty_like(views["h"]).stride()
    check_rounded(y, formula(**op, resample=resample))
    check_statistics(stats, y)
    assert all(torch.equal(bases[name].nan_to_num(7), before[name].nan_to_num(7)) for name in bases)


@pytest.mark.parametrize("skip", [True, False], ids=["plain", "no_skip"])
def test_an_unaligned_base(place, skip):
    """Views that start one element after a 16-byte boundary"""
    op = draw((2, 24, 3, 5), dtype=torch.float16, skip=skip, device=place.device)
    for name in images_of(op):
        memory = torch.empty(op[name].numel() + 1, dtype=torch.float16, device=place.device)
        view = memory[1:].as_strided(op[name].shape, op[name].stride(), 1)
        op[name] = view.copy_(op[name])
    check_rounded(residual(**op, impl=place.impl)[0], formula(**op, resample=None))


def test_expanded_inputs(place):
    op = draw((1, 6, 3, 3), device=place.device)
    op["h"] = op["h"].expand(4, 6, 3, 3)
    op["skip"] = op["skip"][:, :, :1].expand(4, 6, 3, 3)
    op["bias"] = op["bias"][:1].expand(6)
    y, stats = residual(**op, impl=place.impl)
    check_rounded(y, formula(**op, resample=None))
    assert torch.equal(stats, stats[:, :1].expand_as(stats))
    # strides of an expanded h leave the order of dimensions open: still h's own, not skip's
    h, skip = op["h"][:, :1].expand(4, 6, 3, 3), LAYOUTS["channels_last"](torch.zeros(4, 6, 3, 3, device=place.device))
    y, _ = residual(h, None, skip, impl=place.impl)
    assert y.stride() == torch.empty_like(h).stride() and torch.equal(y, h)


@KERNEL
@FORM
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_nothing_outside_a_view_is_written(place, launch, layout, resample, skip):
    op = draw((2, 5, 4, 6), resample, skip=skip, device=place.device)
    base = LAYOUTS[layout](torch.full((4, 7, 7, 15), -7.0, device=place.device))
    y = base[1:-1, 1:-1, 2:-1, 1:-2:2]
    memory = torch.full((2 * 2 * 5 + 2,), -7.0, device=place.device)
    stats = memory[1:-1].view(2, 2, 1, 5)
    launch(op["h"], op["bias"], op["skip"], y, stats, resample)
    check_rounded(y, formula(**op, resample=resample))
    check_statistics(stats, y)
    assert memory[0] == memory[-1] == -7
    y.fill_(-7)
    assert (base == -7).all()


@KERNEL
@FORM
@pytest.mark.parametrize("dim", range(4), ids="BCHW".__getitem__)
def test_offsets_past_2_to_the_31(place, launch, dim, resample, skip):
    """A stride of 2^30 elements, in memory of which a few pages are ever touched"""
    step = 1 << 30
    shape = [4 if d == dim else 2 for d in range(4)]
    op = draw(shape, resample, torch.float16, skip=skip, device=place.device)
    times, part = FACTOR[resample]
    memory = torch.empty(step * 7 + 8192, dtype=torch.float16, device=place.device)

    def view(size: list[int], start: int) -> Tensor:
        stride, small = [0] * 4, 1
        for d in (3, 2, 1, 0):
            stride[d] = step if d == dim else small
            small *= 1 if d == dim else size[d]
        return memory.as_strided(size, stride, start)

    skip_size = [size if d < 2 else size * times // part for d, size in enumerate(shape)]
    views = {"h": view(shape, 0), "skip": view(skip_size, 2048) if skip else None}
    for name in images_of(op):
        views[name].copy_(op[name])
    y = view(shape, 4096)
    stats = torch.full((2, shape[0], 1, shape[1]), NAN, device=place.device)
    launch(views["h"], op["bias"], views["skip"], y, stats, resample)
    check_rounded(y.clone(), formula(**op, resample=resample))
    check_statistics(stats, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", ["float32", "like_h", "none"])
@FORM
def test_gradients(place, resample, skip, bias_dtype, dtype):
    op = draw((2, 5, 4, 6), resample, dtype, skip=skip, device=place.device)
    if bias_dtype != "float32":
        op["bias"] = op["bias"].to(dtype) if bias_dtype == "like_h" else None
    given = {name: None if value is None else value.clone().requires_grad_() for name, value in op.items()}
    wanted = {name: None if value is None else value.double().requires_grad_() for name, value in op.items()}
    upstream = upstream_of(op["h"])
    y, stats = residual(**given, resample=resample, impl=place.impl)
    assert y.requires_grad and not stats.requires_grad
    y.backward(upstream)
    formula(**wanted, resample=resample).backward(upstream.double())
    for name in ("h", "skip", "bias"):
        if op[name] is not None:
            assert given[name].grad.dtype == op[name].dtype
            check_rounded(given[name].grad, wanted[name].grad, scale=8.0)


@pytest.mark.parametrize("dtype", DTYPES)
@RESAMPLE
def test_a_shared_row_gets_the_sum_of_its_gradients(place, resample, dtype):
    op = draw((5, 3, 4, 6), resample, dtype, rows=3, device=place.device)
    given, wanted = op["skip"].clone().requires_grad_(), op["skip"].double().requires_grad_()
    upstream = upstream_of(op["h"])
    residual(op["h"], None, given, resample=resample, impl=place.impl)[0].backward(upstream)
    formula(op["h"], None, wanted, resample).backward(upstream.double())
    assert given.grad.dtype == dtype
    check_rounded(given.grad, wanted.grad, scale=16.0)


@pytest.mark.parametrize("wanted", ["h", "bias", "skip"])
@FORM
def test_a_single_gradient_can_be_asked_for(resample, skip, wanted):
    op = draw((2, 6, 4, 2), resample, torch.float64, skip=skip)
    if op[wanted] is None:
        pytest.skip("there is no skip")
    upstream = upstream_of(op["h"])
    alone = {
        name: None if value is None else value.double().requires_grad_(name == wanted) for name, value in op.items()
    }
    (got,) = torch.autograd.grad(residual(**alone, resample=resample)[0], alone[wanted], upstream)
    (want,) = torch.autograd.grad(formula(**alone, resample=resample), alone[wanted], upstream)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("function", [residual, reference.residual], ids=["public", "reference"])
@pytest.mark.parametrize("rows", [2, 3])
@FORM
def test_gradcheck(function, resample, skip, rows):
    op = draw((3, 2, 2, 4), resample, torch.float64, rows=rows, skip=skip)
    leaves = tuple(value.double().requires_grad_() for value in op.values() if value is not None)

    def y(h: Tensor, bias: Tensor, given: Tensor | None = None) -> Tensor:
        return function(h, bias, given, resample=resample, stats=False)[0]

    assert torch.autograd.gradcheck(y, leaves)
    assert torch.autograd.gradgradcheck(y, leaves)


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 0, 4, 4), (2, 6, 0, 4), (2, 6, 4, 0)], ids=str)
@FORM
def test_empty(place, shape, resample, skip):
    op = draw(shape, resample, skip=skip, device=place.device)
    leaves = [value.requires_grad_() for value in op.values() if value is not None]
    y, stats = residual(**op, resample=resample, impl=place.impl)
    assert y.shape == shape
    assert torch.equal(stats, torch.zeros(2, shape[0], num_chunks(shape[2] * shape[3]), shape[1], device=place.device))
    y.backward(torch.ones_like(y))
    assert all(torch.equal(value.grad, torch.zeros_like(value)) for value in leaves)
