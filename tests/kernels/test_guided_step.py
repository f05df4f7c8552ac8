"""guided_step against the table's formulas written out image by image in NumPy"""

import dataclasses
import io

import numpy as np
import pytest
import torch
from counting import counting
from places import GPU, INTERPRETER
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff_kernels import COEFS, NUM_COEFS, STREAM_STEP, _impl, guided_step, philox_normal, reference

N, C, H, W = 4, 2, 3, 5
NAN, INF = float("nan"), float("inf")
CANARY = -7.0
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
NOISE_ALONE = dict.fromkeys(COEFS, 0.0) | {"x0_max": INF, "c_noise": 1.0}
SEEDS = (-1, 2**62 + 5, 7, 0)


@dataclasses.dataclass(frozen=True)
class Step:
    """guided_step in one place, in the widest state that it takes there"""

    device: str
    impl: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.impl == "reference" else torch.float32

    @property
    def tolerance(self) -> float:
        return 1e-13 if self.impl == "reference" else 1e-5

    def row(self, dtype: torch.dtype | None = None, **coefs: float) -> Tensor:
        values = FULL_ROW | coefs
        return torch.tensor([values[name] for name in COEFS], dtype=dtype or self.dtype, device=self.device)

    def weights(self, *w: float, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(w if len(w) > 1 else w * N, dtype=dtype or self.dtype, device=self.device)

    def draw(self, m=N, shape=(N, C, H, W), *, dtype=None, variance=False, seed=0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        n, c, h, w = shape
        shapes = dict.fromkeys(("x", "out", "hist", "grad", "noise"), shape)
        shapes["out"] = (n + m, 2 * c if variance else c, h, w)
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, dtype or self.dtype)
            for name, shape in shapes.items()
        }

    def seeds(self, draw: int = 13, n: int = N) -> dict[str, Tensor]:
        return {
            "seeds": torch.tensor(SEEDS[:n], device=self.device),
            "draw": torch.tensor([draw], device=self.device),
        }

    def __call__(self, x, out, coefs, w=None, *, hist=None, **options) -> tuple[Tensor, Tensor, Tensor | None]:
        """The in-place op on copies, its outputs poisoned beforehand"""
        x, x0 = x.clone(), torch.full_like(x, NAN)
        hist = None if hist is None else hist.clone()
        guided_step(x, out, coefs, w, x0=x0, hist=hist, impl=self.impl, **options)
        return x, x0, hist

    def check(self, got, want, tolerance: float | None = None) -> None:
        tolerance = tolerance or self.tolerance
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a.double().cpu().numpy(), b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def step(place) -> Step:
    return Step(place.device, place.impl)


def by_image(x, out, coefs, w=None, *, hist=None, grad=None, noise=None, learned=False) -> tuple[np.ndarray, ...]:
    """(x', x0, h') in NumPy float64, an image at a time, a missing tensor being zero"""
    n, c = x.shape[:2]
    k = dict(zip(COEFS, coefs.double().tolist(), strict=True))
    x, out = x.double().cpu().numpy(), out.double().cpu().numpy()
    hist, grad, noise = (np.zeros_like(x) if t is None else t.double().cpu().numpy() for t in (hist, grad, noise))
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


@pytest.mark.parametrize("m_next", [0, 2, N], ids="next_M{}".format)
@pytest.mark.parametrize("m", [0, 2, N], ids="M{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_network_input_repeats_the_first_images(place, m, m_next, dtype):
    if place.interpreted and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16")
    step = Step(place.device, place.impl)
    inputs = step.draw(m, dtype=torch.float32)
    x_net = torch.full((N + m_next, C, H, W), NAN, dtype=dtype, device=place.device)
    x_net = x_net.contiguous(memory_format=torch.channels_last)
    options = {"coefs": step.row(torch.float32), "w": step.weights(1.0, dtype=torch.float32)}
    guided_step(**inputs, **options, x_net=x_net, impl=place.impl)
    source = [b if b < N else b - N for b in range(N + m_next)]
    assert torch.equal(x_net, inputs["x"][source].to(dtype))


def laid_out(tensor: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A copy in memory full of canaries, and that memory"""
    n, c, h, w = tensor.shape
    order = {"contiguous": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "rows_inside": (0, 3, 1, 2)}
    if layout == "sliced":
        memory = tensor.new_full((n + 2, c + 2, h + 2, 2 * w + 2), CANARY)
        view = memory[1:-1, 1:-1, 1:-1, 1:-1:2]
    elif layout == "sliced_channels_last":
        memory = tensor.new_full((n + 1, h, w, c + 3), CANARY)
        view = memory[1:, :, :, 2:-1].permute(0, 3, 1, 2)
    else:
        memory = tensor.new_full((tensor.numel() + 64,), CANARY)
        strides, size = [0] * 4, 1
        for dim in reversed(order[layout]):
            strides[dim] = size
            size *= tensor.shape[dim]
        view = memory[32:-32].as_strided(tensor.shape, strides)
    return view.copy_(tensor), memory


LAYOUTS = ["contiguous", "channels_last", "rows_inside", "sliced", "sliced_channels_last"]


@pytest.mark.parametrize("noise", ["given", "seeds", "none"])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 5), (4, 2, 3), (5, 3, 5)], ids=str)
@pytest.mark.parametrize("network", ["contiguous", "channels_last", "sliced"], ids="network_{}".format)
@pytest.mark.parametrize("state", LAYOUTS, ids="state_{}".format)
def test_any_layout_and_nothing_written_outside_it(step, state, network, shape, noise):
    learned = shape[0] in (1, 3)
    inputs = step.draw(1, (2, *shape), variance=learned)
    options = {"coefs": step.row(), "w": step.weights(1.5, 2.0), "learned": learned}
    given = inputs.pop("noise")
    z = {"given": given, "seeds": normals(step, shape, n=2), "none": None}[noise]
    want = by_image(**inputs, noise=z, **options)
    inputs |= {"x0": torch.full_like(inputs["x"], NAN), "x_net": torch.full_like(inputs["x"][[0, 1, 0]], NAN)}
    inputs |= {"noise": given} if noise == "given" else {}
    views, memories = {}, {}
    for name, tensor in inputs.items():
        views[name], memories[name] = laid_out(tensor, network if name in ("out", "x_net") else state)
    guided_step(**views, **options, **(step.seeds(n=2) if noise == "seeds" else {}), impl=step.impl)
    step.check((views["x"], views["x0"], views["hist"]), want)
    assert torch.equal(views["x_net"], views["x"][[0, 1, 0]])
    for name in ("out", "grad", "noise"):
        assert name not in views or torch.equal(views[name], inputs[name]), f"{name} was written"
    for name, memory in memories.items():
        views[name].fill_(CANARY)
        assert (memory == CANARY).all(), f"something was written outside the view of {name}"


def test_inputs_may_be_expanded_and_strided(step):
    inputs = step.draw()
    inputs["grad"] = inputs["grad"][:1, :, :1].expand(N, C, H, W)
    inputs["noise"] = inputs["noise"][:, :1, :, :1].expand(N, C, H, W)
    wide = torch.full((3 * NUM_COEFS,), NAN, dtype=step.dtype, device=step.device)
    wide[::3] = step.row()
    w = step.weights(1.0, NAN, 2.0, NAN, 0.0, NAN, 3.0, NAN)[::2]
    want = by_image(**inputs, coefs=step.row(), w=w)
    step.check(step(**inputs, coefs=wide[::3], w=w), want)
    one = step.weights(2.0)[:1].expand(N)
    step.check(step(**inputs, coefs=wide[::3], w=one), by_image(**inputs, coefs=step.row(), w=one))


def normals(step: Step, shape: tuple[int, ...], draw: int = 13, n: int = N) -> Tensor:
    seeds = torch.tensor(SEEDS[:n])
    return philox_normal(seeds, shape, draw=draw, stream=STREAM_STEP, dtype=step.dtype, impl="reference")


# one program, several with a ragged last one, quads that end within a row, and none of them whole
NOISE_SHAPES = [(1, 2, 2), (1, 24, 24), (2, 24, 24), (3, 16, 16), (3, 2, 6), (4, 8, 20), (5, 4, 4)]
ODD_NOISE_SHAPES = [(1, 1, 1), (1, 25, 27), (2, 1, 1), (3, 13, 15), (4, 3, 3), (5, 2, 3)]
MANY_CHANNELS = [((c, h, w), layout) for c, h, w in ((32, 2, 2), (33, 1, 4), (33, 1, 3)) for layout in LAYOUTS[1:3]]
NOISE_CASES = [(shape, layout) for shape in NOISE_SHAPES + ODD_NOISE_SHAPES for layout in LAYOUTS] + MANY_CHANNELS


@pytest.mark.parametrize("shape,layout", NOISE_CASES, ids=str)
def test_seeds_draw_the_philox_noise_of_the_step_stream(step, shape, layout):
    """Elements are counted in (C, H, W) order in any layout; x and out are poisoned, so z is all there is"""
    x, memory = laid_out(torch.full((2, *shape), NAN, dtype=step.dtype, device=step.device), layout)
    guided_step(x, x, step.row(**NOISE_ALONE), **step.seeds(2**32 - 1, 2), impl=step.impl)
    np.testing.assert_allclose(x.cpu(), normals(step, shape, 2**32 - 1, 2), rtol=0, atol=1e-5)
    x.fill_(CANARY)
    assert (memory == CANARY).all()


def test_no_noise_is_drawn_for_a_zero_coefficient(step):
    inputs = step.draw(0)
    del inputs["noise"]
    got = step(**inputs, coefs=step.row(c_noise=0.0), **step.seeds())
    step.check(got, by_image(**inputs, coefs=step.row(c_noise=0.0)))


def test_noise_of_an_image_does_not_depend_on_its_batch(step):
    inputs = step.draw(0, (N, 3, 16, 16))
    del inputs["noise"]
    batch = step(**inputs, coefs=step.row(), **step.seeds())
    for i in range(N):
        alone = {name: value[i : i + 1] for name, value in inputs.items()}
        seeds = step.seeds() | {"seeds": step.seeds()["seeds"][i : i + 1]}
        for one, many in zip(step(**alone, coefs=step.row(), **seeds), batch, strict=True):
            assert torch.equal(one, many[i : i + 1])


@pytest.mark.parametrize("state", ["far", "channels_last"])
@pytest.mark.parametrize("dim", range(4), ids="NCHW".__getitem__)
def test_offsets_past_2_to_the_31(step, dim, state):
    """A stride of 2^30 elements, in memory of which a few pages are ever touched"""
    shape, far = [4 if d == dim else 2 for d in range(4)], 2**30
    n = shape[0]
    inputs = step.draw(1, shape, dtype=torch.float32)
    del inputs["noise"]
    options = {"coefs": step.row(torch.float32), "w": step.weights(*(1.5, 2.0, 3.0, 4.0)[:n], dtype=torch.float32)}
    noise = normals(step, shape[1:], n=n)
    want = by_image(**inputs | {"out": inputs["out"].half()}, noise=noise, **options)
    memory = torch.empty(3 * far + 4096, dtype=torch.float32, device=step.device)
    inputs |= {"x0": torch.zeros(shape), "x_net": torch.zeros(shape)}
    near = iter((1, 4, 16))
    strides = [far if d == dim else next(near) for d in range(4)]
    views = {}
    for k, (name, tensor) in enumerate(inputs.items()):
        base = memory.view(torch.float16) if name in ("out", "x_net") else memory
        views[name] = base.as_strided(tensor.shape, strides, 512 * k // base.element_size())
        if state == "channels_last" and base is memory:
            views[name] = laid_out(tensor, state)[0]
        views[name].copy_(tensor)
    guided_step(**views, **options, **step.seeds(n=n), impl=step.impl)
    step.check((views["x"], views["x0"], views["hist"]), want, 1e-5)
    assert torch.equal(views["x_net"], views["x"].half())


def test_an_empty_batch(step):
    x, seeds, at = torch.empty(0, C, H, W), torch.empty(0, dtype=torch.int64), torch.tensor([0])
    x, seeds, at = x.to(step.device, step.dtype), seeds.to(step.device), at.to(step.device)
    w = torch.empty(0, dtype=step.dtype, device=step.device)
    got = step(x, x, step.row(), w, hist=x, x_net=x.half(), seeds=seeds, draw=at)
    assert all(tensor.shape == (0, C, H, W) for tensor in got)
    flat = torch.empty(N, C, 0, W, dtype=step.dtype, device=step.device)
    assert step(flat, flat, step.row())[0].shape == (N, C, 0, W)


def test_nothing_is_read_on_the_host(step):
    class NoHostRead(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a device value was read on the host"
            return func(*args, **(kwargs or {}))

    inputs = step.draw(variance=True)
    del inputs["noise"]
    coefs, w, x_net = step.row(), step.weights(1.0), torch.empty(2 * N, C, H, W, device=step.device)
    with pytest.raises(AssertionError, match="read on the host"), NoHostRead():
        coefs[0].item()
    seeds = step.seeds()
    with NoHostRead():
        guided_step(**inputs, coefs=coefs, w=w, x_net=x_net, **seeds, learned=True, impl=step.impl)


def test_gradients_are_neither_tracked_nor_silently_wrong(step):
    inputs, a = step.draw(0), torch.ones((), dtype=step.dtype, device=step.device, requires_grad=True)
    inputs["out"].requires_grad_()
    loss = (inputs["x"] * a).sum()
    guided_step(**inputs, coefs=step.row(), impl=step.impl)
    assert not inputs["x"].requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def operands(**tensors: Tensor | None) -> list[Tensor | None]:
    """Arguments of the library op before learned and impl"""
    names = ("x", "out", "coefs", "w", "x_net", "x0", "hist", "grad", "noise", "seeds", "draw")
    return [tensors.get(name) for name in names]


@pytest.mark.parametrize("given", ["everything", "nothing", "seeds"])
def test_opcheck(step, given):
    inputs = step.draw(1, dtype=torch.float32, variance=given == "everything") | {"coefs": step.row(torch.float32)}
    inputs["w"] = step.weights(1.5, dtype=torch.float32)
    if given == "everything":
        inputs |= {"x0": inputs["x"].clone(), "x_net": inputs["x"].half().contiguous(memory_format=torch.channels_last)}
    else:
        inputs = {name: inputs[name] for name in ("x", "out", "coefs", "w")}
    if given == "seeds":
        inputs |= step.seeds()
    op = torch.ops.fastdiff_kernels.guided_step.default
    torch.library.opcheck(op, (*operands(**inputs), given == "everything", step.impl))


@pytest.mark.parametrize("tracked", [(), ("out",), ("x", "out", "hist")], ids=["plain", "out_tracked", "all_tracked"])
@pytest.mark.parametrize("noise", ["given", "seeds"])
def test_torch_compile_traces_it_whole_and_writes_the_same(step, noise, tracked):
    inputs = step.draw(variance=True, dtype=torch.float32)
    inputs |= {"x0": torch.zeros_like(inputs["x"]), "x_net": torch.zeros_like(inputs["x"]).half()}
    inputs |= {"coefs": step.row(torch.float32), "w": step.weights(1.5, dtype=torch.float32)}
    if noise == "seeds":
        del inputs["noise"]
        inputs |= step.seeds()
    names = tuple(inputs)
    torch.compiler.reset()  # or the cases add up to dynamo's limit of recompilations

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        scaled = given["out"] * 0.5
        guided_step(**given | {"out": scaled}, learned=True, impl=step.impl)
        return given["x"] + given["x0"]

    results = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        copies = [tensor.clone().requires_grad_(name in tracked) for name, tensor in inputs.items()]
        results.append([tensor.detach() for tensor in (call(*copies), *copies)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    assert not torch.equal(results[0][1], inputs["x"])


class Guided(torch.nn.Module):
    def __init__(self, impl: str) -> None:
        super().__init__()
        self.impl = impl

    def forward(self, x: Tensor, out: Tensor, coefs: Tensor, x_net: Tensor) -> Tensor:
        guided_step(x, out * 2, coefs, x_net=x_net, impl=self.impl)
        return x_net * 2


def test_torch_export_round_trip(step):
    inputs = step.draw(0, dtype=torch.float32)
    arguments = (inputs["x"], inputs["out"], step.row(torch.float32), torch.zeros_like(inputs["x"]).half())
    file, module = io.BytesIO(), Guided(step.impl)
    torch.export.save(torch.export.export(module, tuple(a.clone() for a in arguments)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    results = []
    for call in (module, loaded):
        copies = [a.clone() for a in arguments]
        results.append([call(*copies), *copies])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][1], arguments[0])


@pytest.mark.parametrize("place", [INTERPRETER, GPU], indirect=True)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_large_batch_equals_the_reference(place, dtype, layout):
    if place.interpreted and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16")
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


@pytest.mark.parametrize("place", [INTERPRETER])
def test_what_triton_does_not_do_is_an_error_when_asked_for(place, monkeypatch):
    double = {name: tensor.double() for name, tensor in valid().items()}
    with pytest.raises(ValueError, match=r"impl='triton' needs x to be torch.float32, got torch.float64"):
        guided_step(**double, impl="triton")
    monkeypatch.setattr(_impl, "INTERPRETED", False)
    arguments = valid()
    before = arguments["x"].clone()
    with pytest.raises(ValueError, match="impl='triton' needs x on a CUDA device, got cpu"):
        guided_step(**arguments, impl="triton")
    assert torch.equal(arguments["x"], before)


def valid() -> dict:
    step = Step("cpu", "reference")
    return {**step.draw(1, dtype=torch.float32), "coefs": step.row(torch.float32), "w": torch.ones(N)}


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
    "coefs_dtype": (
        {"coefs": torch.zeros(NUM_COEFS).double()},
        TypeError,
        "coefs must be torch.float32, got torch.float64",
    ),
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
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'triton', 'reference', got 'cuda'"),
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
