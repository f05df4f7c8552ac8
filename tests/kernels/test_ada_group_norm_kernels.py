"""Every launch and option of ada_group_norm, forward and backward, against float64 in each place that it runs"""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
import torch.nn.functional as F
from places import GPU, PATHS, REFERENCE
from torch import Tensor

from fastdiff_kernels import _plan, _tuning, ada_group_norm, reference
from fastdiff_kernels._tuning import num_chunks

both_paths = pytest.mark.parametrize("place", PATHS, indirect=True)
# NumPy's words for infinities that a GPU makes silently
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

# every width of a group in the guided-diffusion networks, and odd ones
PER_GROUP = (6, 8, 12, 16, 18, 24, 30, 36, 42, 48, 56, 64, 1, 5, 7, 9)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
TENSORS = ("x", "x2", "x_bias", "weight", "bias", "scale", "shift")


@dataclasses.dataclass(frozen=True)
class Case:
    per_group: int = 6
    groups: int = 2
    b: int = 2
    size: tuple[int, int] = (4, 5)
    second: int = 0  # channels of x2
    repeats: int = 0  # rows of y beyond B
    x_bias: bool = False
    modulated: bool = True
    silu: bool = True
    resample: str | None = None
    mean: float = 0.0
    layout: torch.memory_format = torch.channels_last
    second_rows: int = 0  # of x2 where they are not B

    def draw(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """The tensors of the case, rounded to dtype"""
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        c, rows = self.per_group * self.groups, self.b + self.repeats
        tensors = {"x": randn(self.b, c - self.second, *self.size) + self.mean, "weight": randn(c), "bias": randn(c)}
        tensors["x"] = tensors["x"].contiguous(memory_format=self.layout)
        if self.second:
            x2 = randn(self.second_rows or self.b, self.second, *self.size) + self.mean
            tensors["x2"] = x2.contiguous(memory_format=self.layout)
        if self.x_bias:
            tensors["x_bias"] = randn(c)
        tensors = {name: value.to(device, dtype) for name, value in tensors.items()}
        if self.modulated:
            # as the network has them: two views of one product
            tensors["scale"], tensors["shift"] = randn(rows, 2 * c).to(device, dtype).chunk(2, 1)
        return tensors

    @property
    def options(self) -> dict[str, object]:
        return {"groups": self.groups, "silu": self.silu, "resample": self.resample}


def formula(
    x, weight, bias, scale=None, shift=None, x2=None, x_bias=None, *, groups, silu, resample, eps=1e-5
) -> Tensor:
    """float64 and torch's contiguous group_norm, every option spelled out"""
    x, weight, bias = x.double(), weight.double(), bias.double()
    if x2 is not None:
        x = torch.cat([x, torch.stack([x2[row % len(x2)] for row in range(len(x))]).double()], 1)
    if x_bias is not None:
        x = x + x_bias.double()[None, :, None, None]
    y = F.group_norm(x.contiguous(), groups, weight, bias, eps)
    if scale is not None:
        y = torch.stack([y[row % len(y)] for row in range(len(scale))])
        y = y * (1 + scale.double()[:, :, None, None]) + shift.double()[:, :, None, None]
    if silu:
        y = y / (1 + torch.exp(-y))
    if resample == "down":
        y = (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4
    if resample == "up":
        y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return y


def close(got: Tensor, want: Tensor, tolerance: float, what: str = "y") -> None:
    assert got.shape == want.shape, what
    error = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    assert error <= tolerance * max(1.0, want.abs().max().item() if want.numel() else 0.0), f"{what}: {error:.3g}"


def check(case: Case, dtype: torch.dtype, place, tolerance: float | None = None, **more) -> None:
    """Forward, and every gradient under a random upstream one"""
    tensors = case.draw(dtype, place.device)
    wanted = {name: value.double().clone().requires_grad_() for name, value in tensors.items()}
    given = {name: value.requires_grad_() for name, value in tensors.items()}
    want = formula(**wanted, **case.options)
    got = ada_group_norm(**given, **case.options, **more, impl=place.impl)
    assert got.dtype == dtype
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    close(got, want, tolerance)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(want.shape, generator=generator, dtype=torch.float64).to(place.device, dtype)
    grads = torch.autograd.grad(got, list(given.values()), upstream)
    exact = torch.autograd.grad(want, list(wanted.values()), upstream.double())
    for name, gradient, expected in zip(given, grads, exact, strict=True):
        assert gradient.dtype == dtype
        # a sum over pixels has the error of its terms
        close(gradient, expected, 4 * tolerance, f"gradient of {name}")


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


OPTIONS = {
    "plain": Case(modulated=False),
    "linear": Case(silu=False),
    "plain_linear": Case(modulated=False, silu=False),
    "x_bias": Case(x_bias=True),
    "second": Case(second=5),
    "second_aligned": Case(per_group=16, second=16),
    "second_wider_than_first": Case(per_group=24, groups=3, second=64),
    "second_of_one_channel": Case(second=1, x_bias=True),
    "second_of_fewer_rows": Case(b=3, second=5, second_rows=2, x_bias=True),
    "second_of_half_the_rows": Case(per_group=8, b=4, second=8, second_rows=2, size=(4, 6), resample="down"),
    "second_of_one_row": Case(b=2, second=7, second_rows=1, modulated=False, resample="up"),
    # boundaries of blocks and of the tensors inside groups, groups of both tensors inside blocks
    "many_blocks": Case(per_group=6, groups=17, b=1, second=40),
    "groups_across_blocks": Case(per_group=18, groups=8, b=1, second=48, x_bias=True, size=(3, 4)),
    "groups_wider_than_blocks": Case(per_group=42, groups=4, b=1, second=72, size=(3, 4)),
    "one_group_of_many_blocks": Case(per_group=100, groups=1, second=28, x_bias=True, size=(3, 4)),
    "repeat_some": Case(b=3, repeats=2),
    "repeat_all": Case(repeats=2, x_bias=True),
    "down": Case(size=(4, 6), resample="down"),
    "up": Case(size=(3, 5), resample="up"),
    "down_plain": Case(size=(6, 2), resample="down", modulated=False),
    "up_linear": Case(resample="up", silu=False, modulated=False),
    "down_second_bias": Case(size=(4, 4), resample="down", second=7, x_bias=True),
    "up_second_repeat": Case(resample="up", second=4, repeats=1),
    "down_repeat": Case(size=(2, 6), resample="down", repeats=2, x_bias=True),
    "everything_up": Case(per_group=18, groups=3, second=23, repeats=1, x_bias=True, resample="up"),
    "everything_down": Case(8, 4, 3, (8, 8), 8, 3, True, True, True, "down"),
    "contiguous": Case(layout=torch.contiguous_format),
    "contiguous_second_up": Case(layout=torch.contiguous_format, second=5, resample="up"),
    "contiguous_down": Case(layout=torch.contiguous_format, size=(4, 6), resample="down", x_bias=True),
}


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
