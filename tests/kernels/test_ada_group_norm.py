"""ada_group_norm and its specification against float64 formulas that share no code with them"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from places import NO_TRITON
from torch import Tensor

from fastdiff_kernels import _host_norm, ada_group_norm, reference

IMPLEMENTATIONS = {"public": ada_group_norm, "reference": reference.ada_group_norm}
# the guided-diffusion networks' channels per group, and two odd ones
CHANNELS_PER_GROUP = (6, 8, 12, 16, 18, 24, 30, 36, 42, 48, 1, 5)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
NAMES = ("x", "weight", "bias", "scale", "shift")


@pytest.fixture(params=IMPLEMENTATIONS, ids=str)
def norm(request):
    return IMPLEMENTATIONS[request.param]


def draw(shape, dtype=torch.float32, *, seed=0, mean=0.0, channels_last=True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    b, c = shape[:2]
    shapes = (shape, (c,), (c,), (b, c), (b, c))
    operands = {
        name: torch.randn(size, generator=generator, dtype=torch.float64)
        for name, size in zip(NAMES, shapes, strict=True)
    }
    operands["x"] += mean
    if channels_last:
        operands["x"] = operands["x"].contiguous(memory_format=torch.channels_last)
    return {name: value.to(dtype) for name, value in operands.items()}


def formula(x, weight, bias, scale=None, shift=None, *, groups, eps=1e-5, silu=True) -> Tensor:
    """torch's contiguous float64 group_norm, then the modulation and SiLU spelled out"""
    x, weight, bias = (value.double().contiguous() for value in (x, weight, bias))
    y = F.group_norm(x, groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale.double()[:, :, None, None]) + shift.double()[:, :, None, None]
    return y / (1 + torch.exp(-y)) if silu else y


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """within tolerance of the scale of the expected tensor"""
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max()
    assert error <= tolerance * max(1.0, want.double().abs().max().item()), f"error {error:.3g}"


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
def test_a_scalar_loop_gives_the_same(norm, silu):
    op = draw((2, 6, 2, 3), torch.float64)
    groups, eps = 2, 0.1
    want = np.empty(op["x"].shape)
    x, weight, bias, scale, shift = (op[name].numpy() for name in NAMES)
    for b in range(2):
        for c in range(6):
            members = [x[b, k, i, j] for k in range(6) if k // 3 == c // 3 for i in range(2) for j in range(3)]
            mean = sum(members) / len(members)
            var = sum((value - mean) ** 2 for value in members) / len(members)
            for i in range(2):
                for j in range(3):
                    y = (x[b, c, i, j] - mean) / np.sqrt(var + eps) * weight[c] + bias[c]
                    y = y * (1 + scale[b, c]) + shift[b, c]
                    want[b, c, i, j] = y / (1 + np.exp(-y)) if silu else y
    got = norm(**op, groups=groups, eps=eps, silu=silu)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("per_group", CHANNELS_PER_GROUP, ids="{}_per_group".format)
def test_forward_and_gradients_at_every_group_width(norm, per_group, dtype):
    op = draw((2, 4 * per_group, 5, 3), dtype)
    upstream = torch.randn(op["x"].shape, dtype=torch.float64).to(dtype)
    wanted = {name: value.double().clone().requires_grad_() for name, value in op.items()}
    given = {name: value.clone().requires_grad_() for name, value in op.items()}
    want, got = formula(**wanted, groups=4), norm(**given, groups=4)
    assert got.dtype == dtype
    close(got, want, TOLERANCE[dtype])
    want.backward(upstream.double())
    got.backward(upstream)
    for name in NAMES:
        assert given[name].grad.dtype == dtype
        close(given[name].grad, wanted[name].grad, TOLERANCE[dtype])


@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "plain"])
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
def test_gradcheck(norm, silu, modulated):
    op = draw((2, 6, 3, 2), torch.float64)
    names = NAMES if modulated else NAMES[:3]
    leaves = tuple(op[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(lambda *args: norm(*args, groups=2, silu=silu), leaves)


@pytest.mark.parametrize("wanted", NAMES)
def test_a_single_gradient_can_be_asked_for(norm, wanted):
    op = draw((2, 6, 3, 3), torch.float64)
    upstream = torch.randn_like(op["x"])
    every = [value.requires_grad_() for value in op.values()]
    want = torch.autograd.grad(formula(**op, groups=3), every, upstream)[NAMES.index(wanted)]
    alone = {name: value.detach().requires_grad_(name == wanted) for name, value in op.items()}
    (got,) = torch.autograd.grad(norm(**alone, groups=3), alone[wanted], upstream)
    close(got, want, 1e-11)


def test_a_second_derivative_is_refused_and_not_wrong():
    op = draw((1, 4, 3, 3), torch.float64)
    x = op.pop("x").requires_grad_()
    (gradient,) = torch.autograd.grad(ada_group_norm(x, **op, groups=2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_float32_parameters_with_bfloat16_activations(norm):
    op = draw((2, 24, 3, 5))
    x = op.pop("x").bfloat16()
    got = norm(x, **op, groups=4)
    assert got.dtype == torch.bfloat16
    # one rounding at the end: half a unit in the last of 8 bits, not one for each of four operations
    want = formula(x, **op, groups=4)
    assert ((got.double() - want).abs() <= 2**-8 * want.abs() + 1e-4).all()


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_a_mean_of_1e4_keeps_the_variance(norm, channels_last):
    op = draw((2, 12, 16, 16), mean=1e4, channels_last=channels_last)
    given = {name: value.requires_grad_() for name, value in op.items()}
    wanted = {name: value.detach().double().requires_grad_() for name, value in op.items()}
    upstream = torch.randn(2, 12, 16, 16)
    got, want = norm(**given, groups=4), formula(**wanted, groups=4)
    close(got, want, 1e-2)
    got.backward(upstream)
    want.backward(upstream.double())
    for name in NAMES:
        close(given[name].grad, wanted[name].grad, 1e-2)


def test_a_constant_input_gives_the_bias(norm):
    bias = torch.tensor([0.5, -1.0, 2.0, 0.0])
    y = norm(torch.full((2, 4, 3, 3), 7.0), torch.ones(4), bias, groups=2, silu=False)
    assert torch.equal(y, bias[None, :, None, None].expand_as(y))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_bad_value_stays_in_its_sample_and_group(norm, bad):
    op = draw((3, 8, 4, 4))
    clean = norm(**op, groups=2)
    op["x"][1, 5, 2, 2] = bad
    x = op.pop("x").requires_grad_()
    y = norm(x, **op, groups=2)
    gradient = torch.autograd.grad(y, x, torch.randn_like(y))[0]
    assert y[1, 4:].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]]) and torch.equal(y[1, :4], clean[1, :4])
    assert gradient[[0, 2]].isfinite().all() and gradient[1, :4].isfinite().all()


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "batch_inside": lambda x: x.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
    "batch_innermost": lambda x: x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_kept(norm, layout):
    op = draw((3, 6, 4, 5))
    x = LAYOUTS[layout](op.pop("x"))
    y = norm(x, **op, groups=3)
    assert y.stride() == x.stride()
    close(y, formula(x, **op, groups=3), 3e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_has_the_layout_of_x_whatever_the_upstream_layout(layout):
    op = draw((3, 6, 4, 5))
    x = LAYOUTS[layout](op.pop("x")).requires_grad_()
    (gradient,) = torch.autograd.grad(ada_group_norm(x, **op, groups=3), x, torch.randn(3, 6, 4, 5))
    assert gradient.stride() == x.stride()


def test_views_are_read_within_their_bounds_and_left_alone(norm):
    op = draw((2, 6, 4, 5))
    base = torch.full((4, 8, 7, 14), float("nan")).contiguous(memory_format=torch.channels_last)
    x = base[1:3, 1:7, 2:6, 3:13:2]
    x.copy_(op.pop("x"))
    before = base.clone()
    mod = torch.full((2, 14), float("nan"))
    scale, shift = mod[:, 1:7], mod[:, 8:]
    scale.copy_(op.pop("scale"))
    shift.copy_(op.pop("shift"))
    y = norm(x, **op, scale=scale, shift=shift, groups=2)
    close(y, formula(x, **op, scale=scale, shift=shift, groups=2), 3e-5)
    assert torch.equal(base.isnan(), before.isnan()) and torch.equal(base.nan_to_num(), before.nan_to_num())


def test_expanded_inputs(norm):
    op = draw((1, 6, 3, 3))
    op["x"], op["scale"], op["shift"] = (
        value.expand(4, *value.shape[1:]) for value in (op["x"], op["scale"], op["shift"])
    )
    y = norm(**op, groups=3)
    assert torch.equal(y, y[:1].expand_as(y))
    close(y, formula(**op, groups=3), 3e-5)


@pytest.mark.parametrize("shape", [(1, 1, 7, 3), (2, 3, 1, 1), (1, 4, 1, 9)], ids=str)
def test_degenerate_sizes(norm, shape):
    op = draw(shape, torch.float64)
    close(norm(**op, groups=1), formula(**op, groups=1), 1e-11)


def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(norm):
    op = {name: value.requires_grad_() for name, value in draw((0, 6, 3, 3)).items()}
    y = norm(**op, groups=3)
    assert y.shape == (0, 6, 3, 3)
    y.sum().backward()
    assert torch.equal(op["weight"].grad, torch.zeros(6))


def test_torch_compile_traces_it_whole():
    op = draw((2, 6, 3, 5))
    x = op.pop("x").requires_grad_()
    compiled = torch.compile(lambda x: ada_group_norm(x, **op, groups=3), backend="aot_eager", fullgraph=True)
    upstream = torch.randn(x.shape)
    close(compiled(x), ada_group_norm(x, **op, groups=3), 1e-6)
    got, want = (torch.autograd.grad(f(x), x, upstream)[0] for f in (compiled, lambda x: formula(x, **op, groups=3)))
    close(got, want, 3e-5)


def valid() -> dict:
    return {**draw((2, 6, 3, 3)), "groups": 3}


ERRORS = {
    "x_not_a_tensor": ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    "x_3d": ({"x": torch.zeros(2, 6, 3)}, ValueError, r"x must have shape \(B, C, H, W\), got \(2, 6, 3\)"),
    "x_pixels": (
        {"x": torch.zeros(1, 1, 1, 1, dtype=torch.half).expand(2, 6, 2**15, 2**15)},
        ValueError,
        "x must have fewer than 2\\^30 pixels an image, got 32768 x 32768",
    ),
    "x_no_channels": ({"x": torch.zeros(2, 0, 3, 3)}, ValueError, "x must have at least one channel, got none"),
    "x2_no_channels": ({"x2": torch.zeros(2, 0, 3, 3)}, ValueError, "x2 must have at least one channel, got none"),
    "x2_size": (
        {"x2": torch.zeros(2, 6, 3, 4)},
        ValueError,
        r"x2 must have shape \(B2, C2, 3, 3\), got \(2, 6, 3, 4\)",
    ),
    "x2_dtype": ({"x2": torch.zeros(2, 6, 3, 3).half()}, TypeError, "x2 must be torch.float32, got torch.float16"),
    "x2_more_rows": ({"x2": torch.zeros(3, 6, 3, 3)}, ValueError, "x2 must have B / 2 to B rows, B = 2 of x, got 3"),
    "x2_too_few_rows": (
        {"x2": torch.zeros(1, 6, 3, 3), "x": torch.zeros(3, 6, 3, 3), "scale": None, "shift": None},
        ValueError,
        "x2 must have B / 2 to B rows, B = 3 of x, got 1",
    ),
    "x2_and_scale_of_other_rows": (
        {"x2": torch.zeros(1, 6, 3, 3), "scale": torch.ones(3, 12), "shift": torch.ones(3, 12)},
        ValueError,
        "scale must have the 2 rows of x where x2 has fewer, got 3",
    ),
    "stats2_rows": (
        {
            **{"x2": torch.zeros(1, 6, 3, 3), "stats2": torch.zeros(2, 2, 4, 6), "scale": None, "shift": None},
            **{"weight": torch.ones(12), "bias": torch.ones(12)},
        },
        ValueError,
        r"stats2 must have shape \(2, 1, CHUNKS2?, 6\)",
    ),
    "x_bias_shape": ({"x_bias": torch.zeros(5)}, ValueError, r"x_bias must have shape \(6,\), got \(5,\)"),
    "resample": ({"resample": "nearest"}, ValueError, "resample must be one of None, 'down', 'up', got 'nearest'"),
    "resample_odd": ({"resample": "down"}, ValueError, "resample='down' needs an even height and width, got 3 x 3"),
    "rows": (
        {"scale": torch.ones(5, 6), "shift": torch.ones(5, 6)},
        ValueError,
        "scale must have B to 2B rows, B = 2 of x, got 5",
    ),
    "stats_shape": ({"stats": torch.zeros(2, 2, 4, 5)}, ValueError, r"stats must have shape \(2, 2, CHUNKS, 6\)"),
    "stats_no_chunks": ({"stats": torch.zeros(2, 2, 0, 6)}, ValueError, "stats must have at least one chunk"),
    "stats_dtype": ({"stats": torch.zeros(2, 2, 4, 6).half()}, TypeError, "stats must be torch.float32"),
    "stats2_alone": ({"stats2": torch.zeros(2, 2, 4, 6)}, ValueError, "stats2 must be None without x2"),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'triton', 'reference', got 'cuda'"),
    "x_int": ({"x": torch.zeros(2, 6, 3, 3, dtype=torch.int64)}, TypeError, "x must be .* got torch.int64"),
    "groups_zero": ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
    "groups_float": ({"groups": 3.0}, TypeError, "groups must be an int, got float"),
    "groups_indivisible": ({"groups": 4}, ValueError, "groups must divide the 6 channels of x, got 4"),
    "eps_zero": ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
    "eps_text": ({"eps": "1e-5"}, TypeError, "eps must be a float, got str"),
    "eps_tensor": ({"eps": torch.tensor(1e-5)}, TypeError, "eps must be a float, got Tensor"),
    "silu_text": ({"silu": "no"}, TypeError, "silu must be a bool, got str"),
    "x_sparse": (
        {"x": torch.zeros(2, 6, 3, 3).to_sparse()},
        ValueError,
        "x must be dense, got layout torch.sparse_coo",
    ),
    "eps_nan": ({"eps": float("nan")}, ValueError, "eps must be positive, got nan"),
    "weight_none": ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    "weight_shape": ({"weight": torch.ones(5)}, ValueError, r"weight must have shape \(6,\), got \(5,\)"),
    "bias_shape": ({"bias": torch.ones(6, 1)}, ValueError, r"bias must have shape \(6,\), got \(6, 1\)"),
    "scale_shape": ({"scale": torch.ones(6)}, ValueError, r"scale must have shape \(ROWS, 6\), got \(6,\)"),
    "shift_shape": ({"shift": torch.ones(1, 6)}, ValueError, r"shift must have shape \(2, 6\), got \(1, 6\)"),
    "scale_alone": ({"shift": None}, ValueError, "scale and shift must be given together"),
    "shift_alone": ({"scale": None}, ValueError, "scale and shift must be given together"),
    "weight_dtype": ({"weight": torch.ones(6).double()}, TypeError, "weight must be torch.float32, got torch.float64"),
    "shift_dtype": ({"shift": torch.ones(2, 6).half()}, TypeError, "shift must be torch.float32, got torch.float16"),
    "bf16_x_fp16_bias": (
        {"x": torch.zeros(2, 6, 3, 3).bfloat16(), "bias": torch.ones(6).half()},
        TypeError,
        "bias must be torch.bfloat16 or torch.float32, got torch.float16",
    ),
    "scale_device": (
        {"scale": torch.ones(2, 6, device="meta")},
        ValueError,
        "scale must be on the device of x, cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    change, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        ada_group_norm(**{**valid(), **change})
    ada_group_norm(**valid())


@NO_TRITON
def test_float64_has_no_kernel():
    op = {name: tensor.double() for name, tensor in draw((2, 6, 3, 3)).items()}
    with pytest.raises(ValueError, match=r"impl='triton' needs x to be .* got torch.float64; use impl='reference'"):
        ada_group_norm(**op, groups=3, impl="triton")
    ada_group_norm(**op, groups=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("rows, rows2", [(3, None), (5, None), (3, 2), (5, 3)])
@pytest.mark.parametrize(
    "limits",
    [{"TILED": 0, "TILE": tile} for tile in (1, 100, 2**18)]
    + [{"BLOCKED": 0, "BLOCK": block} for block in (1, 999, 2000)],
    ids=str,
)
def test_what_exceeds_a_cache_is_normalised_in_parts(monkeypatch, dtype, resample, rows, rows2, limits):
    """A tile is two lines, some, or all, a block one image or some; rows of y, and of a second tensor, as everywhere"""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return (2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1).to(dtype)

    x = randn(3 if rows2 is None else rows, 6, 10, 4).contiguous(memory_format=torch.channels_last)
    x2 = None if rows2 is None else randn(rows2, 6, 10, 4)
    c = 6 if x2 is None else 12
    weight, bias, x_bias, scale, shift = randn(c), randn(c), randn(c), randn(rows, c), randn(rows, c)
    options = {"groups": 3, "resample": resample, "x_bias": x_bias}
    exact = reference.ada_group_norm(
        *(value.double() for value in (x, weight, bias, scale, shift)),
        **{**options, "x_bias": x_bias.double(), "x2": None if x2 is None else x2[torch.arange(rows) % rows2].double()},
    )
    for name, limit in limits.items():
        monkeypatch.setattr(_host_norm, name, limit)
    y = ada_group_norm(x, weight, bias, scale, shift, **options, x2=x2)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert y.dtype == dtype and y.shape == exact.shape and y.is_contiguous(memory_format=torch.channels_last)
    assert (y.double() - exact).abs().max() < tolerance * exact.abs().max()
    # moments for a backward pass are the same, too
    if dtype == torch.float64 and x2 is None:
        wide = x.clone().requires_grad_()
        grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        ada_group_norm(wide, weight, bias, scale, shift, **options).backward(grad)
        for name in ("TILED", "BLOCKED"):
            monkeypatch.setattr(_host_norm, name, 2**60)
        whole = x.clone().requires_grad_()
        ada_group_norm(whole, weight, bias, scale, shift, **options).backward(grad)
        torch.testing.assert_close(wide.grad, whole.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(8, 64, 64, 64), (1, 512, 64, 64)], ids=str)
def test_only_a_cpu_takes_parts(shape):
    """Other devices have no such cache, and a launch for every pass"""
    for device, parts in (("meta", False), ("cpu", True)):
        x, vector = torch.empty(shape, device=device), torch.empty(shape[1], device=device)
        norm = _host_norm.HostNorm(x, None, None, vector, vector, None, None, 32, 1e-5, True, None)
        assert norm.exceeds_cache() == parts


def test_a_tile_holds_a_large_mean(monkeypatch):
    monkeypatch.setattr(_host_norm, "TILED", 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 16, 16, generator=generator, dtype=torch.float64) + 1e4
    weight, bias = torch.ones(8), torch.zeros(8)
    y = ada_group_norm(x.float(), weight, bias, groups=2, silu=False)
    exact = reference.ada_group_norm(x, weight.double(), bias.double(), groups=2, silu=False)
    assert (y - exact).abs().max() < 1e-2
    x[0, 0, 0, 0] = torch.nan
    y = ada_group_norm(x.float(), weight, bias, groups=2)
    assert y[0, :4].isnan().all() and not y[0, 4:].isnan().any() and not y[1].isnan().any()
