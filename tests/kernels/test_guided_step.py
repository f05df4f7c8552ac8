"""guided_step against the table's formulas written out image by image in NumPy"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff_kernels import COEFS, NUM_COEFS, STREAM_STEP, guided_step, philox_normal, reference

N, C, H, W = 4, 2, 3, 5
NAN = float("nan")
FULL_ROW = {
    "k_x": 1.3,
    "k_out": -0.7,
    "k_grad": 0.2,
    "x0_max": 1.0,
    "c_x": 0.8,
    "c_x0": 0.35,
    "c_out": -0.15,
    "c_hist": 0.25,
    "c_grad": 0.6,
    "c_noise": 0.4,
    "h_x": -0.3,
    "h_x0": 0.9,
    "log_beta": -1.0,
    "log_beta_tilde": -2.0,
}
READS = {  # the coefficients through which each input is read
    "hist": ("c_hist",),
    "noise": ("c_noise",),
    "grad": ("k_grad", "c_grad"),
}


def row(dtype=torch.float64, **coefs: float) -> Tensor:
    values = FULL_ROW | coefs
    return torch.tensor([values[name] for name in COEFS], dtype=dtype)


def draw(m=N, *, dtype=torch.float64, variance=False, seed=0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, out = (N, C, H, W), (N + m, 2 * C if variance else C, H, W)
    shapes = {"x": images, "out": out, "hist": images, "grad": images, "noise": images}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def by_image(x, out, coefs, w=None, *, hist=None, grad=None, noise=None, learned=False) -> tuple[np.ndarray, ...]:
    """(x', x0, h') in NumPy float64, an image at a time, a missing tensor being zero"""
    n, c = x.shape[:2]
    k = dict(zip(COEFS, coefs.double().tolist(), strict=True))
    x, out = x.double().numpy(), out.double().numpy()
    hist, grad, noise = (np.zeros_like(x) if t is None else t.double().numpy() for t in (hist, grad, noise))
    states, predictions, histories = [], [], []
    for i in range(n):
        g = out[i, :c]
        if i < len(out) - n and w[i] != 0:
            g = (1 + float(w[i])) * out[i, :c] - float(w[i]) * out[n + i, :c]
        variance = np.ones_like(x[i])
        if learned:
            f = (out[i, c:] + 1) / 2
            variance = np.exp(f * k["log_beta"] + (1 - f) * k["log_beta_tilde"])
        x0 = np.clip(k["k_x"] * x[i] + k["k_out"] * g, -k["x0_max"], k["x0_max"]) + k["k_grad"] * grad[i]
        predictions.append(x0)
        states.append(
            k["c_x"] * x[i]
            + k["c_x0"] * x0
            + k["c_out"] * g
            + k["c_hist"] * hist[i]
            + k["c_grad"] * variance * grad[i]
            + k["c_noise"] * np.sqrt(variance) * noise[i]
        )
        histories.append(k["h_x"] * x[i] + k["h_x0"] * x0)
    return np.array(states), np.array(predictions), np.array(histories)


def run(x, out, coefs, w=None, *, hist=None, **options) -> tuple[Tensor, Tensor, Tensor | None]:
    """The in-place op on copies, its outputs poisoned beforehand"""
    x, x0 = x.clone(), torch.full_like(x, NAN)
    hist = None if hist is None else hist.clone()
    guided_step(x, out, coefs, w, x0=x0, hist=hist, **options)
    return x, x0, hist


IMPLEMENTATIONS = {"public": run, "reference": reference.guided_step}


@pytest.fixture(params=IMPLEMENTATIONS, ids=str)
def step(request):
    return IMPLEMENTATIONS[request.param]


def check(got, want, tolerance=1e-13) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.double().numpy(), b, rtol=tolerance, atol=tolerance)


def test_the_columns_are_the_documented_ones():
    assert tuple(FULL_ROW) == COEFS and len(COEFS) == NUM_COEFS


@pytest.mark.parametrize("variance", ["fixed", "ignored", "learned"])
@pytest.mark.parametrize("m", [0, 1, N], ids="M{}".format)
def test_every_term_at_once(step, m, variance):
    inputs = draw(m, variance=variance != "fixed")
    w = torch.tensor([1.5, 0.0, -0.5, 4.0], dtype=torch.float64)
    options = {"coefs": row(x0_max=0.8), "w": w, "learned": variance == "learned"}
    got, want = step(**inputs, **options), by_image(**inputs, **options)
    assert all(tensor.dtype == torch.float64 for tensor in got)
    assert (np.abs(want[1]) > 0.8).any(), "the gradient is added after the clamp, and is not clamped again"
    check(got, want)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("name", COEFS)
def test_each_coefficient_alone(step, name, learned):
    """The row of a plain x' = x0 = x, with one coefficient moved"""
    quiet = dict.fromkeys(COEFS, 0.0) | {"x0_max": math.inf, "k_x": 1.0, "c_x0": 1.0, "log_beta_tilde": -2.0}
    if name in ("log_beta", "log_beta_tilde"):
        quiet["c_noise"] = 1.0
    inputs = draw(variance=learned)
    w = torch.full((N,), 2.0, dtype=torch.float64)
    still, moved = row(**quiet), row(**quiet | {name: 0.6})
    options = {**inputs, "w": w, "learned": learned}
    got, want = step(coefs=moved, **options), by_image(coefs=moved, **options)
    check(got, want)
    unmoved = by_image(coefs=still, **options)
    if learned or name not in ("log_beta", "log_beta_tilde"):
        assert any(not np.array_equal(a, b) for a, b in zip(want, unmoved, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_float32_state_with_a_network_of_any_float(step, dtype):
    inputs = draw(dtype=torch.float32)
    inputs["out"] = inputs["out"].to(dtype)
    options = {"coefs": row(torch.float32), "w": torch.full((N,), 1.5)}
    got = step(**inputs, **options)
    assert all(tensor.dtype == torch.float32 for tensor in got)
    check(got, by_image(**inputs, **options), 5e-6)


def test_float64_state_with_a_float32_network(step):
    inputs = draw()
    inputs["out"] = inputs["out"].float()
    options = {"coefs": row(), "w": torch.full((N,), 1.5, dtype=torch.float64)}
    check(step(**inputs, **options), by_image(**inputs, **options))


def test_w_zero_is_bitwise_the_conditional_row_and_never_reads_the_null_row(step):
    inputs = draw(dtype=torch.float32)
    w = torch.tensor([0.0, 2.0, -0.0, 1.0])
    inputs["out"][[N, N + 2]] = NAN
    got = step(**inputs, coefs=row(torch.float32), w=w)
    plain = step(**inputs | {"out": inputs["out"][:N]}, coefs=row(torch.float32))
    for guided, conditional in zip(got, plain, strict=True):
        assert torch.equal(guided[[0, 2]], conditional[[0, 2]])
        assert guided.isfinite().all() and not torch.equal(guided[[1, 3]], conditional[[1, 3]])


def test_w_per_image_equals_single_runs(step):
    inputs = draw(m=3)
    w = torch.tensor([0.5, 7.0, 0.0, NAN], dtype=torch.float64)  # the last image has no null row
    got = step(**inputs, coefs=row(), w=w)
    for i in range(N):
        rows = [i, N + i] if i < 3 else [i]
        alone = {name: inputs[name][i : i + 1] for name in ("x", "hist", "grad", "noise")}
        single = step(**alone, out=inputs["out"][rows], coefs=row(), w=w[i : i + 1])
        for batched, one in zip(got, single, strict=True):
            assert torch.equal(batched[i : i + 1], one)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_a_zero_coefficient_does_not_read_its_tensor(step, name, learned):
    inputs = draw(0, variance=learned)
    inputs[name].fill_(NAN)
    coefs = row(**dict.fromkeys(READS[name], 0.0))
    without = {key: value for key, value in inputs.items() if key != name}
    check(step(**inputs, coefs=coefs, learned=learned), by_image(**without, coefs=coefs, learned=learned))


def test_zero_coefficients_of_the_state_and_the_output_do_not_read_them(step):
    inputs = draw(0)
    inputs["x"].fill_(NAN)
    got = step(**inputs, coefs=row(k_x=0.0, c_x=0.0, h_x=0.0))
    check(got, by_image(**inputs | {"x": torch.zeros(N, C, H, W)}, coefs=row(k_x=0.0, c_x=0.0, h_x=0.0)))
    inputs = draw(0)
    inputs["out"].fill_(NAN)
    got = step(**inputs, coefs=row(k_out=0.0, c_out=0.0))
    check(got, by_image(**inputs | {"out": torch.zeros(N, C, H, W)}, coefs=row(k_out=0.0, c_out=0.0)))


def test_zero_coefficients_of_x0_do_not_read_it(step):
    inputs = draw(0)
    inputs["out"].fill_(NAN)
    x_next, x0, hist = step(**inputs, coefs=row(c_x0=0.0, c_out=0.0, h_x0=0.0))
    assert x0.isnan().all() and x_next.isfinite().all() and hist.isfinite().all()


def test_a_learned_variance_is_not_read_at_the_last_row(step):
    inputs = draw(0, variance=True)
    inputs["out"][:, C:] = NAN
    coefs = row(c_noise=0.0, c_grad=0.0)
    check(step(**inputs, coefs=coefs, learned=True), by_image(**inputs, coefs=coefs))


def test_the_null_half_of_a_learned_variance_is_not_read(step):
    inputs = draw(variance=True)
    options = {"coefs": row(), "w": torch.full((N,), 3.0, dtype=torch.float64), "learned": True}
    want = by_image(**inputs, **options)
    inputs["out"][N:, C:] = NAN
    check(step(**inputs, **options), want)


def test_nan_in_an_image_stays_there_and_survives_the_clamp(step):
    inputs = draw(dtype=torch.float32)
    clean = step(**inputs, coefs=row(torch.float32), w=torch.ones(N))
    inputs["x"][1, 0, 0, 0] = NAN
    got = step(**inputs, coefs=row(torch.float32), w=torch.ones(N))
    for dirty, good in zip(got, clean, strict=True):
        assert dirty[1, 0, 0, 0].isnan() and dirty.isnan().sum() == 1
        assert torch.equal(dirty[[0, 2, 3]], good[[0, 2, 3]])


@pytest.mark.parametrize("missing", ["hist", "grad", "noise"])
def test_a_missing_tensor_is_a_zero_coefficient(step, missing):
    inputs = draw(0)
    del inputs[missing]
    got, want = step(**inputs, coefs=row()), by_image(**inputs, coefs=row())
    if missing == "hist":
        assert got[2] is None
        got, want = got[:2], want[:2]
    check(got, want)


def test_gradcheck_of_the_reference():
    inputs = {name: value[:, :, :1, :2].contiguous() for name, value in draw(variance=True).items()}
    tensors = [*inputs.values(), row(x0_max=3.0), torch.tensor([0.5, 1.0, 2.0, -1.0], dtype=torch.float64)]
    names = [*inputs, "coefs", "w"]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(
        lambda *args: reference.guided_step(**dict(zip(names, args, strict=True)), learned=True), leaves
    )


@pytest.mark.parametrize("m_next", [0, 2, N], ids="next_M{}".format)
@pytest.mark.parametrize("m", [0, 2, N], ids="M{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_network_input_repeats_the_first_images(m, m_next, dtype):
    inputs = draw(m, dtype=torch.float32)
    x_net = torch.full((N + m_next, C, H, W), NAN, dtype=dtype).contiguous(memory_format=torch.channels_last)
    guided_step(**inputs, coefs=row(torch.float32), w=torch.ones(N), x_net=x_net)
    source = [b if b < N else b - N for b in range(N + m_next)]
    assert torch.equal(x_net, inputs["x"][source].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_seeds_draw_the_philox_noise_of_the_step_stream(dtype):
    inputs = draw(0, dtype=dtype)
    seeds, at = torch.tensor([5, 2**62, 7, -1]), torch.tensor([13])
    inputs["noise"] = philox_normal(seeds, (C, H, W), draw=13, stream=STREAM_STEP, dtype=dtype)
    given = run(**inputs, coefs=row(dtype))
    del inputs["noise"]
    drawn = run(**inputs, coefs=row(dtype), seeds=seeds, draw=at)
    assert all(torch.equal(a, b) for a, b in zip(given, drawn, strict=True))


def test_views_are_written_within_their_bounds_and_addresses_stay():
    inputs = draw(1, dtype=torch.float32)
    w = torch.ones(N)
    want = run(**inputs, coefs=row(torch.float32), w=w)
    sizes = {"x": (N, C), "hist": (N, C), "x0": (N, C), "x_net": (N + 1, C)}
    bases = {name: torch.full((n + 2, c + 2, H + 2, 2 * W + 2), -7.0) for name, (n, c) in sizes.items()}
    bases["x_net"] = bases["x_net"].contiguous(memory_format=torch.channels_last)
    views = {name: base[1:-1, 1:-1, 1:-1, 1:-1:2] for name, base in bases.items()}
    for name in ("x", "hist"):
        views[name].copy_(inputs.pop(name))
    guided_step(**inputs, **views, coefs=row(torch.float32), w=w)
    for name, expected in zip(("x", "x0", "hist"), want, strict=True):
        assert torch.equal(views[name], expected)
    assert torch.equal(views["x_net"], want[0][[0, 1, 2, 3, 0]])
    for name, base in bases.items():
        views[name].fill_(-7)
        assert (base == -7).all(), f"something was written outside the view of {name}"


def test_inputs_may_be_strided_and_expanded_and_are_left_alone(step):
    inputs = draw(dtype=torch.float32)
    want = step(**inputs, coefs=row(torch.float32), w=torch.ones(N))
    strided = {
        name: torch.stack((value, value * NAN), -1).contiguous(memory_format=torch.contiguous_format)[..., 0]
        for name, value in inputs.items()
    }
    before = {name: value.clone() for name, value in strided.items()}
    got = step(**strided, coefs=row(torch.float32), w=torch.ones(1).expand(N))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(before[name], strided[name]) for name in strided)


def test_an_empty_batch():
    x, seeds, at = torch.empty(0, C, H, W), torch.empty(0, dtype=torch.int64), torch.tensor([0])
    x_next, x0, hist = run(x, x, row(torch.float32), torch.empty(0), hist=x, x_net=x.half(), seeds=seeds, draw=at)
    assert x_next.shape == x0.shape == hist.shape == (0, C, H, W)


def test_nothing_is_read_on_the_host():
    class NoHostRead(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a device value was read on the host"
            return func(*args, **(kwargs or {}))

    inputs = draw(variance=True, dtype=torch.float32)
    del inputs["noise"]
    coefs, w, x_net = row(torch.float32), torch.ones(N), torch.empty(2 * N, C, H, W)
    with pytest.raises(AssertionError, match="read on the host"), NoHostRead():
        coefs[0].item()
    with NoHostRead():
        guided_step(
            **inputs, coefs=coefs, w=w, x_net=x_net, seeds=torch.arange(N), draw=torch.tensor([2]), learned=True
        )


def valid() -> dict:
    return {**draw(1, dtype=torch.float32), "coefs": row(torch.float32), "w": torch.ones(N)}


def seeded(**change) -> dict:
    return {"noise": None, "seeds": torch.zeros(N).long(), "draw": torch.tensor([0])} | change


ERRORS = {
    "x_3d": ({"x": torch.zeros(4, 2, 3)}, ValueError, r"x must have shape \(N, C, H, W\), got \(4, 2, 3\)"),
    "x_half": ({"x": torch.zeros(N, C, H, W).half()}, TypeError, "x must be torch.float32 or torch.float64, got"),
    "x_expanded": (
        {"x": torch.zeros(1, C, H, W).expand(N, C, H, W)},
        ValueError,
        "x is written in place and must not be expanded",
    ),
    "out_size": ({"out": torch.zeros(5, C, H, 4)}, ValueError, r"out must have shape \(N \+ M, C or 2C, 3, 5\), got"),
    "out_rows_few": ({"out": torch.zeros(3, C, H, W)}, ValueError, "0 <= M <= N = 4, got 3"),
    "out_rows_many": ({"out": torch.zeros(9, C, H, W)}, ValueError, "0 <= M <= N = 4, got 9"),
    "out_channels": ({"out": torch.zeros(5, 3, H, W)}, ValueError, "out must have 2 or 4 channels for x of 2, got 3"),
    "out_not_learned": ({"learned": True}, ValueError, r"out must have 4 channels \(learned=True\) .* got 2"),
    "out_wider_dtype": ({"out": torch.zeros(5, C, H, W).double()}, TypeError, "out must be .* got torch.float64"),
    "out_int": ({"out": torch.zeros(5, C, H, W).int()}, TypeError, "out must be .* got torch.int32"),
    "coefs_shape": ({"coefs": torch.zeros(3)}, ValueError, r"coefs must have shape \(14,\), got \(3,\)"),
    "coefs_dtype": ({"coefs": row()}, TypeError, "coefs must be torch.float32, got torch.float64"),
    "w_missing": ({"w": None}, ValueError, "w must be given: out has 1 null rows"),
    "w_float": ({"w": 1.5}, TypeError, "w must be a torch.Tensor, got float"),
    "w_shape": ({"w": torch.ones(1)}, ValueError, r"w must have shape \(4,\), got \(1,\)"),
    "w_dtype": ({"w": torch.ones(N).double()}, TypeError, "w must be torch.float32, got torch.float64"),
    "hist_shape": ({"hist": torch.zeros(1, C, H, W)}, ValueError, "hist must have shape"),
    "hist_expanded": (
        {"hist": torch.zeros(1, C, H, W).expand(N, C, H, W)},
        ValueError,
        "hist is written in place and must not be expanded",
    ),
    "grad_dtype": ({"grad": torch.zeros(N, C, H, W).half()}, TypeError, "grad must be torch.float32, got"),
    "noise_shape": ({"noise": torch.zeros(N, C, H, 1)}, ValueError, "noise must have shape"),
    "x0_dtype": ({"x0": torch.zeros(N, C, H, W).double()}, TypeError, "x0 must be torch.float32, got torch.float64"),
    "x_net_size": ({"x_net": torch.zeros(5, C, H, 4)}, ValueError, r"x_net must have shape \(N \+ M', 2, 3, 5\), got"),
    "x_net_rows_few": ({"x_net": torch.zeros(3, C, H, W)}, ValueError, "x_net must have N to 2N rows, N = 4, got 3"),
    "x_net_rows_many": ({"x_net": torch.zeros(9, C, H, W)}, ValueError, "x_net must have N to 2N rows, N = 4, got 9"),
    "x_net_expanded": (
        {"x_net": torch.zeros(1, C, H, W).expand(5, C, H, W)},
        ValueError,
        "x_net is written in place and must not be expanded",
    ),
    "x_net_int": ({"x_net": torch.zeros(5, C, H, W).int()}, TypeError, "x_net must be .* got torch.int32"),
    "both_noises": (
        {"seeds": torch.zeros(N).long(), "draw": torch.tensor([0])},
        ValueError,
        "noise and seeds must not both be given",
    ),
    "seeds_alone": (seeded(draw=None), ValueError, "seeds and draw must be given together"),
    "draw_alone": (seeded(seeds=None), ValueError, "seeds and draw must be given together"),
    "seeds_shape": (seeded(seeds=torch.zeros(3).long()), ValueError, r"seeds must have shape \(4,\), got \(3,\)"),
    "seeds_dtype": (seeded(seeds=torch.zeros(N)), TypeError, "seeds must be torch.int64, got torch.float32"),
    "draw_int": (seeded(draw=3), TypeError, "draw must be a torch.Tensor, got int"),
    "draw_shape": (seeded(draw=torch.zeros(2).long()), ValueError, r"draw must have shape \(1,\), got \(2,\)"),
    "draw_device": (
        seeded(draw=torch.zeros(1, device="meta").long()),
        ValueError,
        "draw must be on the device of x, cpu, got meta",
    ),
    "w_device": ({"w": torch.ones(N, device="meta")}, ValueError, "w must be on the device of x, cpu, got meta"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument_and_write_nothing(case):
    change, kind, message = ERRORS[case]
    arguments = valid() | change
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises(kind, match=message):
        guided_step(**arguments)
    for name, value in before.items():
        assert value.device.type == "meta" or torch.equal(arguments[name], value)
    guided_step(**valid())
