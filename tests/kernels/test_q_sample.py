"""q_sample against the forward process written out image by image in NumPy"""

import numpy as np
import pytest
import torch
from counting import counting
from places import GPU, INTERPRETER, NO_INTERPRETER
from q_sample_cases import LAYOUTS, PREDICTION, inputs, seeds_of
from torch import Tensor

from fastdiff_kernels import STREAM_TRAINING, philox_normal, q_sample, reference

KERNEL = pytest.mark.parametrize("place", [INTERPRETER, GPU])  # the reference has no plan
DTYPES = [pytest.param(getattr(torch, name), id=name) for name in ("float32", "float16", "bfloat16")]
MANTISSA = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
# whole counters in a channel's pixels, and not
SHAPES = [(2, 3, 8, 8), (2, 1, 4, 5), (1, 5, 16, 16), (2, 24, 2, 6), (1, 42, 4, 4)]
ODD_SHAPES = [(2, 3, 3, 5), (2, 1, 3, 3), (3, 5, 1, 1), (1, 24, 3, 5), (1, 42, 5, 7)]
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
NAN = float("nan")


def by_image(x0, alpha, sigma, noise, prediction) -> tuple[np.ndarray, np.ndarray]:
    """(x_t, target) in float64"""
    x0, alpha, sigma, eps = (value.detach().double().cpu().numpy() for value in (x0, alpha, sigma, noise))
    states, targets = [], []
    for image, a, s, z in zip(x0, alpha, sigma, eps, strict=True):
        states.append(a * image + s * z)
        targets.append({"eps": z, "v": a * z - s * image, "x0": image}[prediction])
    return np.array(states), np.array(targets)


def check(got: tuple[Tensor, Tensor], want: tuple[np.ndarray, np.ndarray], tolerance: float = 1e-6) -> None:
    x_t, target = (value.detach().double().cpu().numpy() for value in got)
    # one rounding of x_t, at most half a unit in the last place
    room = 2.0 ** -MANTISSA.get(got[0].dtype, 53) * np.abs(want[0]) * 1.001 + tolerance
    assert x_t.shape == want[0].shape and (np.abs(x_t - want[0]) <= room).all()
    np.testing.assert_allclose(target, want[1], rtol=0, atol=tolerance)


@pytest.fixture
def launch(place):
    """Launches the plan itself, on tensors that the test owns"""
    from fastdiff_kernels.jit.q_sample import plan_q_sample

    def run(x0, alpha, sigma, noise, seeds, x_t, target, prediction="v") -> None:
        plan_q_sample(x0, alpha, sigma, noise, seeds, 0, STREAM_TRAINING, x_t, target, prediction).launch()

    return run


@PREDICTION
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + ODD_SHAPES, ids=str)
def test_given_noise(place, shape, dtype, prediction):
    given = inputs(shape, dtype, device=place.device)
    x_t, target = q_sample(**given, prediction=prediction, impl=place.impl)
    assert x_t.dtype == dtype and target.dtype == torch.float32
    assert x_t.stride() == target.stride() == given["x0"].stride()
    check((x_t, target), by_image(**given, prediction=prediction))


@pytest.mark.parametrize("draw", [0, 1, 2**32 - 1, "tensor"], ids="draw_{}".format)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES + ODD_SHAPES, ids=str)
def test_seeds_draw_the_philox_noise_of_the_training_stream(place, shape, layout, draw):
    """An element's normal is that of its index in (C, H, W) order, whatever the layout"""
    given = inputs(shape, layout=layout, device=place.device)
    seeds = seeds_of(shape[0], place.device)
    number = 9 if draw == "tensor" else draw
    draw = torch.tensor([9], device=place.device) if draw == "tensor" else draw
    noise = philox_normal(seeds.cpu(), shape[1:], draw=number, stream=STREAM_TRAINING, impl="reference")
    given["noise"] = None
    got = q_sample(**given, seeds=seeds, draw=draw, prediction="v", impl=place.impl)
    assert got[0].stride() == got[1].stride() == given["x0"].stride()
    given["noise"] = noise
    # 1e-6 for the sum, 1e-6 for the normals
    check(got, by_image(**given, prediction="v"), 2e-6)


@PREDICTION
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 3, 3)], ids=str)
def test_seeds_with_every_dtype(place, shape, dtype, prediction):
    given = inputs(shape, dtype, device=place.device)
    seeds = seeds_of(2, place.device)
    given["noise"] = philox_normal(seeds.cpu(), shape[1:], draw=4, stream=STREAM_TRAINING, impl="reference")
    want = by_image(**given, prediction=prediction)
    given["noise"] = None
    got = q_sample(**given, seeds=seeds, draw=4, prediction=prediction, impl=place.impl)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    check(got, want, 2e-6)


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_t_in_another_dtype(place, dtype, out):
    given = inputs((2, 3, 4, 5), dtype, device=place.device)
    given["noise"] = given["noise"].float()
    got = q_sample(**given, dtype=out, impl=place.impl)
    assert got[0].dtype == out and got[1].dtype == torch.float32
    check(got, by_image(**given, prediction="eps"))


@PREDICTION
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids="coefficients_{}".format)
def test_float64_stays_float64(prediction, wide):
    given = inputs((2, 3, 4, 5), torch.float64)
    given["alpha"], given["sigma"] = given["alpha"].to(wide), given["sigma"].to(wide)
    got = q_sample(**given, prediction=prediction)
    assert got[0].dtype == got[1].dtype == torch.float64
    check(got, by_image(**given, prediction=prediction), 1e-15)


def test_an_image_alone_is_bitwise_the_image_in_a_batch(place):
    given = inputs((3, 3, 4, 4), device=place.device)
    given["noise"], seeds = None, seeds_of(3, place.device)
    whole = q_sample(**given, seeds=seeds, prediction="v", impl=place.impl)
    again = q_sample(**given, seeds=seeds, prediction="v", impl=place.impl)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    one = {name: None if value is None else value[1:2] for name, value in given.items()}
    alone = q_sample(**one, seeds=seeds[1:2], prediction="v", impl=place.impl)
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))


@PREDICTION
@pytest.mark.parametrize("name", ["alpha", "sigma"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_term_of_a_zero_coefficient_is_not_read(place, layout, name, prediction):
    given = inputs((3, 3, 4, 4), layout=layout, device=place.device)
    given[name][1] = 0.0
    want = by_image(**given, prediction=prediction)
    given["x0" if name == "alpha" else "noise"][1] = NAN
    x_t, target = q_sample(**given, prediction=prediction, impl=place.impl)
    reads_it = {"alpha": ("v", "x0"), "sigma": ("v", "eps")}[name]
    assert target[1].isnan().all() if prediction in reads_it else target.isfinite().all()
    check((x_t, target.where(~target.isnan(), torch.from_numpy(want[1]).to(target))), want)


@pytest.mark.parametrize("name,other", [("alpha", "noise"), ("sigma", "x0")])
def test_the_target_reads_no_term_of_a_zero_coefficient_either(place, name, other):
    given = inputs((3, 3, 4, 4), device=place.device)
    given[name][1] = 0.0
    want = by_image(**given, prediction="v")[1]
    given[other][1] = NAN
    x_t, target = q_sample(**given, prediction="v", impl=place.impl)
    assert x_t[1].isnan().all() and x_t[[0, 2]].isfinite().all()
    np.testing.assert_allclose(target.cpu(), want, rtol=0, atol=1e-6)


@NO_INTERPRETER
@PREDICTION
@pytest.mark.parametrize("drawn", [False, True], ids=["noise", "seeds"])
def test_the_traffic_is_each_tensor_once_and_nothing_of_a_zero_coefficient(drawn, prediction):
    given = inputs((4, 3, 4, 4))
    given["alpha"][1], given["sigma"][2] = 0.0, 0.0
    given["alpha"][3] = given["sigma"][3] = 0.0
    if drawn:
        given |= {"noise": None, "seeds": seeds_of(4)}
    with counting() as counts:
        x_t, _ = q_sample(**given, prediction=prediction, impl="triton")
    (count,) = counts
    image = x_t[0].numel() * 4
    reads = {"eps": (2, 4), "v": (3, 3), "x0": (4, 2)}[prediction]  # images of x0, of noise
    assert count.loads["x0_ptr"] == reads[0] * image
    assert count.loads["noise_ptr"] == (0 if drawn else reads[1] * image)
    assert count.stores == {"x_t_ptr": 4 * image, "target_ptr": 4 * image}


@pytest.mark.parametrize("bad", [NAN, float("inf")], ids=["nan", "inf"])
def test_a_bad_value_stays_where_it_is(place, bad):
    given = inputs((3, 3, 4, 4), device=place.device)
    clean = q_sample(**given, prediction="v", impl=place.impl)
    given["x0"][1, 2, 3, 0] = bad
    for dirty, good in zip(q_sample(**given, prediction="v", impl=place.impl), clean, strict=True):
        assert (~dirty.isfinite()).sum() == 1 and not dirty[1, 2, 3, 0].isfinite()
        assert torch.equal(dirty[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("drawn", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("noise_layout", LAYOUTS)
@LAYOUT
def test_every_layout(place, layout, noise_layout, drawn):
    given = inputs((3, 6, 4, 2), layout=layout, device=place.device)
    given["noise"], seeds = LAYOUTS[noise_layout](given["noise"]), None
    if drawn:
        seeds = seeds_of(3, place.device)
        given["noise"] = philox_normal(seeds.cpu(), (6, 4, 2), draw=0, stream=STREAM_TRAINING, impl="reference")
    want = by_image(**given, prediction="v")
    if drawn:
        given["noise"] = None
    got = q_sample(**given, seeds=seeds, prediction="v", impl=place.impl)
    assert got[0].stride() == got[1].stride() == given["x0"].stride()
    check(got, want, 2e-6)


@pytest.mark.parametrize("drawn", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("width", [4, 5])
def test_views_are_read_within_their_bounds_and_left_alone(place, width, layout, drawn):
    given = inputs((2, 3, 4, width), layout="contiguous", device=place.device)
    seeds = seeds_of(5, place.device)[::2][:2]
    if drawn:
        given["noise"] = philox_normal(seeds.cpu(), (3, 4, width), draw=0, stream=STREAM_TRAINING, impl="reference")
    want = by_image(**given, prediction="v")
    bases = {}
    for name in ("x0",) if drawn else ("x0", "noise"):
        bases[name] = LAYOUTS[layout](torch.full((4, 5, 7, 2 * width + 3), NAN, device=place.device))
        view = bases[name][1:-1, 1:-1, 2:-1, 2:-1:2]
        given[name] = view.copy_(given[name])
    pairs = torch.stack((given["alpha"], given["sigma"]), 1)
    given["alpha"], given["sigma"] = pairs.unbind(1)
    before = {name: base.clone() for name, base in bases.items()}
    if drawn:
        given["noise"] = None
    got = q_sample(**given, seeds=seeds if drawn else None, prediction="v", impl=place.impl)
    check(got, want, 2e-6)
    assert all(value.stride() == torch.empty_like(given["x0"]).stride() for value in got)
    assert all(torch.equal(bases[name].nan_to_num(7), before[name].nan_to_num(7)) for name in bases)


def test_an_unaligned_base(place):
    given = inputs((2, 8, 2, 4), torch.float16, device=place.device)
    for name in ("x0", "noise"):
        memory = torch.empty(given[name].numel() + 1, dtype=torch.float16, device=place.device)
        view = memory[1:].as_strided(given[name].shape, given[name].stride(), 1)
        given[name] = view.copy_(given[name])
    check(q_sample(**given, impl=place.impl), by_image(**given, prediction="eps"))


def test_expanded_inputs(place):
    given = inputs((1, 3, 4, 4), device=place.device)
    given = {name: value.expand(4, *value.shape[1:]) for name, value in given.items()}
    given["noise"] = given["noise"][:, :1].expand(4, 3, 4, 4)
    check(q_sample(**given, prediction="v", impl=place.impl), by_image(**given, prediction="v"))
    seeds = seeds_of(1, place.device).expand(4)
    x_t, target = q_sample(**given | {"noise": None}, seeds=seeds, impl=place.impl)
    assert torch.equal(x_t, x_t[:1].expand_as(x_t)) and torch.equal(target, target[:1].expand_as(target))


@pytest.mark.parametrize("drawn", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 3, 5)], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_every_output_is_written(place, monkeypatch, layout, shape, drawn):
    given = inputs(shape, layout=layout, device=place.device)
    if drawn:
        given |= {"noise": None, "seeds": seeds_of(2, place.device)}
    want = q_sample(**given, impl=place.impl)
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, real=real, **kwargs: real(*args, **kwargs).fill_(NAN))
    assert torch.empty_like(want[0]).isnan().all()
    got = q_sample(**given, impl=place.impl)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@KERNEL
@pytest.mark.parametrize("drawn", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("width", [4, 5])
def test_nothing_outside_a_view_is_written(place, launch, width, layout, drawn):
    given = inputs((2, 3, 4, width), layout=layout, device=place.device)
    seeds = seeds_of(2, place.device)
    bases = [LAYOUTS[layout](torch.full((4, 5, 7, 2 * width + 3), -7.0, device=place.device)) for _ in range(2)]
    x_t, target = (base[1:-1, 1:-1, 2:-1, 1:-2:2] for base in bases)
    noise = given.pop("noise")
    launch(**given, noise=None if drawn else noise, seeds=seeds if drawn else None, x_t=x_t, target=target)
    if drawn:
        noise = philox_normal(seeds.cpu(), (3, 4, width), draw=0, stream=STREAM_TRAINING, impl="reference")
    check((x_t, target), by_image(**given, noise=noise, prediction="v"), 2e-6)
    for base, view in zip(bases, (x_t, target), strict=True):
        view.fill_(-7)
        assert (base == -7).all()


@KERNEL
@pytest.mark.parametrize("drawn", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("width", [2, 3], ids=["quads", "elements"])
@pytest.mark.parametrize("dim", range(4), ids="BCHW".__getitem__)
def test_offsets_past_2_to_the_31(place, launch, dim, width, drawn):
    """A stride of 2^30 elements, in memory of which a few pages are ever touched"""
    step = 1 << 30
    shape = [2, 2, 2, width]
    shape[dim] = 4 if dim < 3 or width == 2 else 5
    given = inputs(shape, torch.float16, device=place.device)
    memory = torch.empty(step * 5 + 8192, dtype=torch.float16, device=place.device)

    def view(start: int) -> Tensor:
        stride, small = [0] * 4, 1
        for d in (3, 2, 1, 0):
            stride[d] = step if d == dim else small
            small *= 1 if d == dim else shape[d]
        return memory.as_strided(shape, stride, start)

    views = [view(2048 * k) for k in range(4)]
    x0, noise, x_t, target = views
    x0.copy_(given["x0"])
    noise.copy_(given["noise"])
    seeds = seeds_of(shape[0], place.device)
    coefficients = (given["alpha"], given["sigma"])
    launch(x0, *coefficients, None if drawn else noise, seeds if drawn else None, x_t, target)
    if drawn:
        noise = philox_normal(seeds.cpu(), shape[1:], draw=0, stream=STREAM_TRAINING, impl="reference")
    want = by_image(x0, *coefficients, noise, "v")
    for got, value in zip((x_t, target), want, strict=True):
        np.testing.assert_allclose(got.double().cpu().numpy(), value, rtol=2.0**-11, atol=3e-6)


@pytest.mark.parametrize("requested", ["both", "x_t", "target"])
@PREDICTION
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_x0(place, dtype, prediction, requested):
    given = inputs((2, 3, 4, 5), dtype, device=place.device)
    x0 = given.pop("x0").requires_grad_()
    x_t, target = q_sample(x0, **given, prediction=prediction, impl=place.impl)
    assert x_t.requires_grad and target.requires_grad == (prediction != "eps")
    generator = torch.Generator().manual_seed(9)
    to_x_t, to_target = (torch.randn(x0.shape, generator=generator).to(value) for value in (x_t, target))
    slope_x_t, slope_target = given["alpha"], {"eps": 0, "v": -given["sigma"], "x0": 1 + 0 * given["sigma"]}[prediction]
    parts = [
        (x_t, to_x_t, slope_x_t, requested != "target"),
        (target, to_target, slope_target, requested != "x_t" and prediction != "eps"),
    ]
    if not any(part[3] for part in parts):
        assert not target.requires_grad
        return
    loss = sum((output.float() * upstream.float()).sum() for output, upstream, _, wanted in parts if wanted)
    (got,) = torch.autograd.grad(loss, x0)
    want = sum(slope.double()[:, None, None, None] * upstream.double() for _, upstream, slope, w in parts if w)
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= 2.0 ** -MANTISSA[dtype] * want.abs() * 1.001 + 1e-6).all()


@PREDICTION
def test_gradcheck(prediction):
    given = inputs((2, 2, 2, 3), torch.float64)
    x0 = given.pop("x0").requires_grad_()
    given["alpha"], given["sigma"] = given["alpha"].double(), given["sigma"].double()
    chosen = slice(1) if prediction == "eps" else slice(2)
    for function in (q_sample, reference.q_sample):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, **given, prediction=prediction)[chosen], x0)
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x, **given, prediction=prediction)[chosen], x0)


@pytest.mark.parametrize("name", ["alpha", "sigma", "noise"])
def test_other_gradients_are_refused(name):
    given = inputs((2, 3, 4, 4))
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require grad, got requires_grad=True: only x0 has"):
        q_sample(**given)
    with torch.no_grad():
        check(q_sample(**given), by_image(**given, prediction="eps"))


@pytest.mark.parametrize("drawn", [False, True], ids=["noise", "seeds"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 3, 0)], ids=str)
def test_empty(place, shape, drawn):
    given = inputs(shape, device=place.device)
    if drawn:
        given |= {"noise": None, "seeds": seeds_of(shape[0], place.device)}
    x_t, target = q_sample(**given, impl=place.impl)
    assert x_t.shape == target.shape == shape
