"""guided_step against the table's formulas written out image by image in NumPy"""

import numpy as np
import pytest
import torch
from counting import counting
from guided_step_cases import FULL_ROW, INF, NAN, C, H, N, Step, W, by_image
from places import GPU, INTERPRETER

from fastdiff_kernels import COEFS, NUM_COEFS, reference

READS = {  # the coefficients through which each input is read
    "hist": ("c_hist",),
    "noise": ("c_noise",),
    "grad": ("k_grad", "c_grad"),
}


def test_the_columns_are_the_documented_ones():
    assert tuple(FULL_ROW) == COEFS and len(COEFS) == NUM_COEFS


@pytest.mark.parametrize("variance", ["fixed", "ignored", "learned"])
@pytest.mark.parametrize("m", [0, 1, N], ids="M{}".format)
def test_every_term_at_once(step, m, variance):
    inputs = step.draw(m, variance=variance != "fixed")
    w = step.weights(1.5, 0.0, -0.5, 4.0)
    options = {"coefs": step.row(x0_max=0.8), "w": w, "learned": variance == "learned"}
    got, want = step(**inputs, **options), by_image(**inputs, **options)
    assert all(tensor.dtype == step.dtype for tensor in got)
    assert (np.abs(want[1]) > 0.8).any(), "the gradient is added after the clamp, and is not clamped again"
    step.check(got, want)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("name", COEFS)
def test_each_coefficient_alone(step, name, learned):
    """The row of a plain x' = x0 = x, with one coefficient moved"""
    quiet = dict.fromkeys(COEFS, 0.0) | {"x0_max": INF, "k_x": 1.0, "c_x0": 1.0, "log_beta_tilde": -2.0}
    if name in ("log_beta", "log_beta_tilde"):
        quiet["c_noise"] = 1.0
    inputs = step.draw(variance=learned)
    still, moved = step.row(**quiet), step.row(**quiet | {name: 0.6})
    options = {**inputs, "w": step.weights(2.0), "learned": learned}
    got, want = step(coefs=moved, **options), by_image(coefs=moved, **options)
    step.check(got, want)
    unmoved = by_image(coefs=still, **options)
    if learned or name not in ("log_beta", "log_beta_tilde"):
        assert any(not np.array_equal(a, b) for a, b in zip(want, unmoved, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_float32_state_with_a_network_of_any_float(step, dtype):
    inputs = step.draw(dtype=torch.float32)
    inputs["out"] = inputs["out"].to(dtype)
    options = {"coefs": step.row(torch.float32), "w": step.weights(1.5, dtype=torch.float32)}
    got = step(**inputs, **options)
    assert all(tensor.dtype == torch.float32 for tensor in got)
    step.check(got, by_image(**inputs, **options), 5e-6)


def test_float64_state_with_a_float32_network():
    step = Step("cpu", "reference")
    inputs = step.draw()
    inputs["out"] = inputs["out"].float()
    options = {"coefs": step.row(), "w": step.weights(1.5)}
    step.check(step(**inputs, **options), by_image(**inputs, **options))


def test_w_zero_is_bitwise_the_conditional_row_and_never_reads_the_null_row(step):
    inputs = step.draw()
    inputs["out"][[N, N + 2]] = NAN
    got = step(**inputs, coefs=step.row(), w=step.weights(0.0, 2.0, -0.0, 1.0))
    plain = step(**inputs | {"out": inputs["out"][:N]}, coefs=step.row())
    for guided, conditional in zip(got, plain, strict=True):
        assert torch.equal(guided[[0, 2]], conditional[[0, 2]])
        assert guided.isfinite().all() and not torch.equal(guided[[1, 3]], conditional[[1, 3]])


def test_w_per_image_equals_single_runs(step):
    inputs = step.draw(m=3)
    w = step.weights(0.5, 7.0, 0.0, NAN)  # the last image has no null row
    got = step(**inputs, coefs=step.row(), w=w)
    for i in range(N):
        rows = [i, N + i] if i < 3 else [i]
        alone = {name: inputs[name][i : i + 1] for name in ("x", "hist", "grad", "noise")}
        single = step(**alone, out=inputs["out"][rows], coefs=step.row(), w=w[i : i + 1])
        for batched, one in zip(got, single, strict=True):
            assert torch.equal(batched[i : i + 1], one)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_a_zero_coefficient_does_not_read_its_tensor(step, name, learned):
    inputs = step.draw(0, variance=learned)
    inputs[name].fill_(NAN)
    coefs = step.row(**dict.fromkeys(READS[name], 0.0))
    without = {key: value for key, value in inputs.items() if key != name}
    step.check(step(**inputs, coefs=coefs, learned=learned), by_image(**without, coefs=coefs, learned=learned))


@pytest.mark.parametrize("name", ["k_grad", "c_grad"])
def test_a_gradient_is_read_for_one_of_its_coefficients(step, name):
    inputs = step.draw(0)
    coefs = step.row(**{name: 0.0})
    step.check(step(**inputs, coefs=coefs), by_image(**inputs, coefs=coefs))


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
def test_zero_coefficients_of_the_state_and_the_output_do_not_read_them(step, guided):
    inputs, w = step.draw(N if guided else 0), step.weights(2.0)
    coefs = step.row(k_x=0.0, c_x=0.0, h_x=0.0)
    want = by_image(**inputs | {"x": torch.zeros(N, C, H, W)}, coefs=coefs, w=w)
    step.check(step(**inputs | {"x": torch.full_like(inputs["x"], NAN)}, coefs=coefs, w=w), want)
    coefs = step.row(k_out=0.0, c_out=0.0)
    want = by_image(**inputs | {"out": torch.zeros_like(inputs["out"])}, coefs=coefs, w=w)
    step.check(step(**inputs | {"out": torch.full_like(inputs["out"], NAN)}, coefs=coefs, w=w), want)


@pytest.mark.parametrize("name", ["k_x", "c_x", "h_x"])
def test_each_coefficient_that_reads_the_state_is_selected_by_itself(step, name):
    """NaN in x shows where its own coefficient is not zero, and nowhere else"""
    inputs = step.draw(0)
    inputs["x"].fill_(NAN)
    silent = dict.fromkeys(("k_x", "c_x", "h_x", "c_x0", "h_x0"), 0.0)
    shown = [t.isnan().all().item() for t in step(**inputs, coefs=step.row(**silent | {name: 0.5}))]
    assert shown == [name == "c_x", name == "k_x", name == "h_x"]


UNREAD = {  # what is not even loaded in a row with these coefficients zero
    "x": ("k_x", "c_x", "h_x"),
    "out": ("k_out", "c_out"),
    "v": ("c_grad", "c_noise"),
    **READS,
}


@pytest.mark.parametrize("place", [INTERPRETER])
@pytest.mark.parametrize("name", [*UNREAD, "everything", "null"])
def test_what_is_not_needed_is_not_loaded(step, name):
    inputs = step.draw(variance=True)
    zero = dict.fromkeys(UNREAD.get(name, ()), 0.0)
    w = step.weights(0.0, 2.0, -0.0, 1.0) if name == "null" else step.weights(2.0)
    with counting() as counts:
        step(**inputs, coefs=step.row(**zero), w=w, learned=True)
    image = C * H * W * 4
    want = {argument: N * image for argument in ("x_ptr", "hist_ptr", "grad_ptr", "noise_ptr")}
    rows = {"out": N, "v": 2 * N, "null": 2 * N + 2}.get(name, 3 * N)  # conditional and null rows, and v
    want |= {"out_ptr": rows * image}
    unread = "noise" if name == "v" else name
    want |= {f"{unread}_ptr": 0} if unread in inputs and name != "out" else {}
    (count,) = counts
    assert {argument: count.loads[argument] for argument in want} == want


def test_zero_coefficients_of_x0_do_not_read_it(step):
    inputs = step.draw(0)
    inputs["out"].fill_(NAN)
    x_next, x0, hist = step(**inputs, coefs=step.row(c_x0=0.0, c_out=0.0, h_x0=0.0))
    assert x0.isnan().all() and x_next.isfinite().all() and hist.isfinite().all()


def test_a_learned_variance_is_not_read_at_the_last_row(step):
    inputs = step.draw(0, variance=True)
    inputs["out"][:, C:] = NAN
    coefs = step.row(c_noise=0.0, c_grad=0.0)
    step.check(step(**inputs, coefs=coefs, learned=True), by_image(**inputs, coefs=coefs))


@pytest.mark.parametrize("missing", ["grad", "noise"])
def test_a_learned_variance_is_not_read_for_what_is_not_there(step, missing):
    inputs = step.draw(0, variance=True)
    inputs["out"][:, C:] = NAN
    del inputs[missing]
    coefs = step.row(**{"c_noise" if missing == "grad" else "c_grad": 0.0})
    step.check(step(**inputs, coefs=coefs, learned=True), by_image(**inputs, coefs=coefs))


def test_the_null_half_of_a_learned_variance_is_not_read(step):
    inputs = step.draw(variance=True)
    options = {"coefs": step.row(), "w": step.weights(3.0), "learned": True}
    want = by_image(**inputs, **options)
    inputs["out"][N:, C:] = NAN
    step.check(step(**inputs, **options), want)


def test_nan_in_an_image_stays_there_and_survives_the_clamp(step):
    inputs = step.draw()
    clean = step(**inputs, coefs=step.row(), w=step.weights(1.0))
    inputs["x"][1, 0, 0, 0] = NAN
    got = step(**inputs, coefs=step.row(), w=step.weights(1.0))
    for dirty, good in zip(got, clean, strict=True):
        assert dirty[1, 0, 0, 0].isnan() and dirty.isnan().sum() == 1
        assert torch.equal(dirty[[0, 2, 3]], good[[0, 2, 3]])


@pytest.mark.parametrize("x0_max", [1.0, 0.0, INF])
def test_the_clamp_holds_infinities_and_lets_nan_pass(step, x0_max):
    inputs = step.draw(0)
    inputs["x"][0, 0, 0] = torch.tensor([INF, -INF, NAN, 1e30, -1e30])
    row = dict.fromkeys(("k_out", "k_grad", "c_x", "c_out", "c_hist", "c_grad", "c_noise", "h_x"), 0.0)
    x_next, x0, hist = step(**inputs, coefs=step.row(**row | {"x0_max": x0_max}))
    clipped = np.clip(FULL_ROW["k_x"] * inputs["x"].double().cpu().numpy(), -x0_max, x0_max)
    assert np.isnan(clipped).sum() == 1
    step.check((x_next, x0, hist), (FULL_ROW["c_x0"] * clipped, clipped, FULL_ROW["h_x0"] * clipped))


@pytest.mark.parametrize("missing", ["hist", "grad", "noise"])
def test_a_missing_tensor_is_a_zero_coefficient(step, missing):
    inputs = step.draw(0)
    del inputs[missing]
    got, want = step(**inputs, coefs=step.row()), by_image(**inputs, coefs=step.row())
    if missing == "hist":
        assert got[2] is None
        got, want = got[:2], want[:2]
    step.check(got, want)


def test_gradcheck_of_the_reference():
    step = Step("cpu", "reference")
    inputs = {name: value[:, :, :1, :2].contiguous() for name, value in step.draw(variance=True).items()}
    tensors = [*inputs.values(), step.row(x0_max=3.0), step.weights(0.5, 1.0, 2.0, -1.0)]
    names = [*inputs, "coefs", "w"]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(
        lambda *args: reference.guided_step(**dict(zip(names, args, strict=True)), learned=True), leaves
    )


@pytest.mark.parametrize("place", [INTERPRETER, GPU], indirect=True)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_large_batch_equals_the_reference(place, dtype, layout):
    device, n, side = (place.device, 64, 256) if place.device == "cuda" else (place.device, 2, 6)
    step, shape = Step(device, place.impl), (n, 3, side, side)
    inputs = {name: t.contiguous(memory_format=layout) for name, t in step.draw(n, shape, variance=True).items()}
    del inputs["noise"]
    inputs["out"] = inputs["out"].to(dtype)
    options = {
        **{"coefs": step.row(), "w": torch.linspace(-1, 5, n, device=device), "learned": True},
        **{"seeds": torch.arange(n, device=device) * 2**57, "draw": torch.tensor([3], device=device)},
    }
    results = []
    for impl in ("triton", "reference"):
        x_net = inputs["x"].new_zeros((2 * n, *shape[1:]), dtype=dtype).contiguous(memory_format=layout)
        results.append((*Step(device, impl)(**inputs, **options, x_net=x_net), x_net))
    for got, want in zip(*results, strict=True):
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, want, rtol=max(1e-5, eps), atol=1e-5)
