"""Where guided_step reads and writes: layouts, views, offsets, and the noise that each element gets"""

import numpy as np
import pytest
import torch
from guided_step_cases import CANARY, INF, LAYOUTS, NAN, C, H, N, Step, W, by_image, laid_out, normals

from fastdiff_kernels import COEFS, NUM_COEFS, guided_step

NOISE_ALONE = dict.fromkeys(COEFS, 0.0) | {"x0_max": INF, "c_noise": 1.0}


@pytest.mark.parametrize("m_next", [0, 2, N], ids="next_M{}".format)
@pytest.mark.parametrize("m", [0, 2, N], ids="M{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_network_input_repeats_the_first_images(place, m, m_next, dtype):
    step = Step(place.device, place.impl)
    inputs = step.draw(m, dtype=torch.float32)
    x_net = torch.full((N + m_next, C, H, W), NAN, dtype=dtype, device=place.device)
    x_net = x_net.contiguous(memory_format=torch.channels_last)
    options = {"coefs": step.row(torch.float32), "w": step.weights(1.0, dtype=torch.float32)}
    guided_step(**inputs, **options, x_net=x_net, impl=place.impl)
    source = [b if b < N else b - N for b in range(N + m_next)]
    assert torch.equal(x_net, inputs["x"][source].to(dtype))


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
