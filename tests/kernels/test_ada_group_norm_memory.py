"""Where ada_group_norm reads and writes, large shapes, and the op under torch.library, compile and export"""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from ada_group_norm_cases import OPTIONS, TENSORS, TOLERANCE, Case, both_paths, check, close, formula
from places import GPU, PATHS, REFERENCE
from torch import Tensor

from fastdiff_kernels import ada_group_norm
from fastdiff_kernels._tuning import num_chunks

# NumPy's words for infinities that a GPU makes silently
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def _sliced(value: Tensor) -> tuple[Tensor, Tensor]:
    """A view with gaps in every dimension inside a canvas of NaN, filled with value; and the canvas"""
    b, c, h, w = value.shape
    canvas = torch.full((b + 2, c + 3, 2 * h + 3, w + 4), float("nan"), dtype=value.dtype, device=value.device)
    canvas = canvas.contiguous(memory_format=torch.channels_last)
    view = canvas[1:-1, 1:-2, 2:-1:2, 3:-1]
    view.copy_(value)
    return view, canvas


@both_paths
@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_views_are_read_within_their_bounds_and_left_alone(place, resample):
    case = Case(per_group=6, groups=2, size=(4, 6), second=5, resample=resample, repeats=1, x_bias=True)
    tensors = case.draw(torch.float32, place.device)
    want = formula(**{name: value.double() for name, value in tensors.items()}, **case.options)
    canvases = {}
    for name in ("x", "x2"):
        tensors[name], canvases[name] = _sliced(tensors[name])
    gapped = torch.full((2, 24), float("nan"), device=place.device)
    gapped[:, ::2] = torch.stack((tensors["weight"], tensors["bias"]))
    tensors["weight"], tensors["bias"] = gapped[0, ::2], gapped[1, ::2]
    before = {name: canvas.clone() for name, canvas in canvases.items()}
    tensors["x"].requires_grad_()
    y = ada_group_norm(**tensors, **case.options, impl=place.impl)
    close(y, want, 3e-6)
    (gradient,) = torch.autograd.grad(y, tensors["x"], torch.ones_like(y))
    assert gradient.isfinite().all()
    for name, canvas in canvases.items():
        assert torch.equal(canvas.isnan(), before[name].isnan())
        assert torch.equal(canvas.nan_to_num(), before[name].nan_to_num())


@both_paths
def test_an_upstream_gradient_with_gaps_or_expanded(place):
    case = Case(size=(4, 6))
    tensors = case.draw(torch.float32, place.device)
    x = tensors["x"].requires_grad_()
    y = ada_group_norm(**tensors, **case.options, impl=place.impl)
    dense = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, x, dense, retain_graph=True)
    (got,) = torch.autograd.grad(y, x, _sliced(dense)[0], retain_graph=True)
    close(got, want.double(), 1e-6)
    scalar = torch.ones((), device=place.device)
    (got,) = torch.autograd.grad(y, x, scalar.expand_as(y), retain_graph=True)
    (want,) = torch.autograd.grad(y, x, torch.ones_like(y))
    close(got, want.double(), 1e-6)


@both_paths
def test_expanded_inputs(place):
    tensors = Case(b=1).draw(torch.float32, place.device)
    for name in ("x", "scale", "shift"):
        tensors[name] = tensors[name].expand(3, *tensors[name].shape[1:])
    y = ada_group_norm(**tensors, groups=2, impl=place.impl)
    assert place.impl == "reference" or torch.equal(y, y[:1].expand_as(y))
    close(y, formula(**tensors, groups=2, silu=True, resample=None), 3e-6)


@both_paths
def test_empty_batches_and_images(place):
    for b, size in ((0, (4, 4)), (2, (0, 4))):
        case = Case(b=b, size=size, x_bias=True, second=5)
        tensors = {name: value.requires_grad_() for name, value in case.draw(torch.float32, place.device).items()}
        y = ada_group_norm(**tensors, **case.options, impl=place.impl)
        assert y.shape == (b, 12, *size)
        for name, gradient in zip(tensors, torch.autograd.grad(y.sum(), list(tensors.values())), strict=True):
            assert torch.equal(gradient, torch.zeros_like(tensors[name])), name


@pytest.mark.parametrize("place", PATHS[1:], indirect=True)
@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_nothing_is_written_outside_the_result(place, resample, monkeypatch):
    """Every buffer that the op makes is a view inside a poisoned canvas: written wholly, and nothing around it"""
    case = Case(per_group=6, groups=2, b=2, size=(6, 8), second=5, repeats=1, x_bias=True, resample=resample)
    tensors = {name: value.requires_grad_() for name, value in case.draw(torch.float32, place.device).items()}
    canvases = []

    def poisoned(size, *args, **kwargs) -> Tensor:
        like = torch_empty(size, *args, **kwargs)
        length = max(sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) + 1, 0)
        canvas = torch.full((length + 64,), float("nan"), dtype=like.dtype, device=like.device)
        canvases.append((canvas, length))
        return canvas[32:].as_strided(like.shape, like.stride())

    def poisoned_like(tensor: Tensor) -> Tensor:
        return poisoned(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=torch.channels_last)

    torch_empty = torch.empty
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", poisoned_like)
    y = ada_group_norm(**tensors, **case.options, impl=place.impl)
    grads = torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y.detach().clone()))
    monkeypatch.undo()
    assert y.isfinite().all() and all(gradient.isfinite().all() for gradient in grads)
    assert canvases
    for canvas, length in canvases:
        assert canvas[:32].isnan().all() and canvas[32 + length :].isnan().all()


@both_paths
def test_offsets_past_2_to_the_31(place):
    """Two images 3 * 2^30 elements apart, and rows 2^30 apart: int32 offsets would wrap"""
    if place.device == "cuda":
        pytest.skip("12 GiB of memory; the big shapes below pass 2^31 elements on a GPU")
    storage = torch.empty(3 * 2**31 + 2**20, dtype=torch.float16)  # untouched pages are never backed
    x = storage.as_strided((2, 12, 3, 4), (3 * 2**30, 1, 2**30, 12))
    case = Case(size=(3, 4))
    tensors = case.draw(torch.float16, "cpu")
    x.copy_(tensors["x"])
    want = formula(**tensors, **case.options)
    tensors["x"] = x.requires_grad_()
    y = ada_group_norm(**tensors, **case.options, impl=place.impl)
    close(y, want, TOLERANCE[torch.float16])
    del storage, x, tensors
    gc.collect()


@both_paths
@pytest.mark.parametrize("option", ["plain", "everything_up", "everything_down", "second_of_fewer_rows"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(place, option, grad):
    case = OPTIONS[option]
    for dtype in (torch.float32, torch.float16) if place.impl == "reference" else (torch.float32,):
        tensors = {name: value.requires_grad_(grad) for name, value in case.draw(dtype, place.device).items()}
        operands = [tensors.get(name) for name in TENSORS]
        arguments = (*operands, None, None, case.groups, 1e-5, case.silu, case.resample, grad, place.impl)
        # the gradients that opcheck compares differ by the order of float16 roundings
        torch.library.opcheck(torch.ops.fastdiff_kernels.ada_group_norm, arguments, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("option", ["plain", "everything_up", "everything_down", "second_of_fewer_rows"])
def test_torch_compile_traces_it_whole_and_export_keeps_it(place, option, tmp_path):
    case = OPTIONS[option]
    tensors = case.draw(torch.float32, place.device)

    class Norm(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> Tensor:
            return ada_group_norm(**tensors, **case.options, impl=place.impl)

    want = Norm()(tensors)
    torch._dynamo.reset()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}
    got = torch.compile(Norm(), fullgraph=True, backend="aot_eager")(leaves)
    assert torch.equal(got, want) and got.stride() == want.stride()
    upstream = torch.randn_like(want)
    grads = torch.autograd.grad(got, list(leaves.values()), upstream)
    eager = torch.autograd.grad(Norm()(leaves), list(leaves.values()), upstream)
    for gradient, expected in zip(grads, eager, strict=True):
        close(gradient, expected.double(), 1e-6)
    exported = torch.export.export(Norm(), (tensors,))
    torch.export.save(exported, tmp_path / "norm.pt2")
    assert torch.equal(torch.export.load(tmp_path / "norm.pt2").module()(tensors), want)


def test_inductor_compiles_it(place):
    """The compiler proper, with what surrounds the op fused by it"""
    case = Case(x_bias=True)
    tensors = case.draw(torch.float32, place.device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **t: ada_group_norm(**{**t, "x": t["x"] * 2}, **case.options, impl=place.impl) + 1, fullgraph=True
    )
    doubled = {**tensors, "x": tensors["x"] * 2}
    close(compiled(**tensors), formula(**doubled, **case.options) + 1, 1e-5)


BIG = {
    "adm64_first": Case(6, 32, 16, (64, 64)),
    "adm64_concat": Case(18, 32, 4, (64, 64), second=192, x_bias=True),
    "adm64_8x8": Case(48, 32, 128, (8, 8), second=768),
    "adm256_first": Case(8, 32, 2, (256, 256), repeats=2),
    "down": Case(12, 32, 8, (32, 32), modulated=False, resample="down"),
    "up": Case(24, 32, 8, (16, 16), modulated=False, resample="up"),
    "adm64_shared_skip": Case(12, 32, 4, (64, 64), second=192, second_rows=2),
    "512x512": Case(8, 32, 1, (512, 512)),
    "past_2_31": Case(8, 32, 33, (512, 512), modulated=False),
}


@pytest.mark.parametrize("place", [REFERENCE, GPU], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BIG)
def test_big_shapes(place, name, dtype):
    case = BIG[name]
    if place.impl == "reference":  # the same code at a size for a CPU
        size = (case.size[0] // 8 * 2, case.size[1] // 8)
        case = dataclasses.replace(
            case, b=1 + bool(case.second_rows), size=size, repeats=0, second_rows=case.second_rows // 2
        )
    if name != "past_2_31":
        # sums over 65,536 pixels
        return check(case, dtype, place, max(TOLERANCE[dtype], 2e-5))
    if dtype != torch.float16:
        pytest.skip("4 GiB a tensor are enough")
    tensors = dataclasses.replace(case, b=1).draw(dtype, place.device)
    want = formula(**tensors, **case.options)
    tensors["x"] = tensors["x"].repeat(case.b, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    y = ada_group_norm(**tensors, **case.options, impl=place.impl)
    close(y[-1:], want, TOLERANCE[dtype])


@pytest.mark.parametrize("place", [REFERENCE, *PATHS[-2:]], indirect=True)
@pytest.mark.parametrize("option", OPTIONS)
def test_bfloat16_where_it_is_rounded(place, option):
    check(OPTIONS[option], torch.bfloat16, place)


def test_chunks_are_a_rule_of_the_image_alone():
    sizes = (0, 1, 32, 33, 256, 257, 1024, 4096, 2**14, 2**18)
    assert [num_chunks(pixels) for pixels in sizes] == [1, 1, 1, 2, 4, 4, 8, 16, 32, 32]
