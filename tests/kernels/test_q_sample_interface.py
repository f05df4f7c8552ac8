"""q_sample as an op of torch.library, and its errors"""

import io

import pytest
import torch
from places import NO_TRITON
from q_sample_cases import PREDICTION, inputs, seeds_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff_kernels import q_sample

OP = torch.ops.fastdiff_kernels.q_sample.default


def test_nothing_is_read_on_the_host(place):
    class NoHostRead(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a device value was read on the host"
            return func(*args, **(kwargs or {}))

    given = inputs((2, 3, 4, 4), device=place.device) | {"noise": None, "seeds": seeds_of(2, place.device)}
    draw = torch.tensor([3], device=place.device)
    with pytest.raises(AssertionError, match="read on the host"), NoHostRead():
        draw.item()
    with NoHostRead():
        q_sample(**given, draw=draw, impl=place.impl)


@PREDICTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "batch_inside"])
def test_opcheck(layout, dtype, prediction):
    given = inputs((2, 3, 4, 5), dtype, layout=layout)
    x0, alpha, sigma, noise = given.values()
    for needs_grad in (True, False):
        leaf = x0.clone().requires_grad_(needs_grad)
        torch.library.opcheck(OP, (leaf, alpha, sigma, noise, None, None, 0, prediction, torch.float16, "auto"))
    draw = torch.tensor([1])
    torch.library.opcheck(OP, (x0[:, :, ::2], alpha, sigma, None, seeds_of(2), draw, 0, prediction, dtype, "auto"))


@PREDICTION
def test_torch_compile_traces_it_whole(place, prediction):
    given = inputs((2, 3, 4, 4), device=place.device)
    x0, seeds, draw = given["x0"].requires_grad_(), seeds_of(2, place.device), torch.tensor([5], device=place.device)

    def function(x0: Tensor, alpha: Tensor, sigma: Tensor, seeds: Tensor, draw: Tensor) -> Tensor:
        x_t, target = q_sample(x0, alpha, sigma, seeds=seeds, draw=draw, prediction=prediction, impl=place.impl)
        return x_t.sin() - target.cos()

    results = []
    upstream = torch.randn(x0.shape, generator=torch.Generator().manual_seed(9)).to(x0)
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        y = call(x0, given["alpha"], given["sigma"], seeds, draw)
        results.append((y, *torch.autograd.grad(y, x0, upstream)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


class Noising(torch.nn.Module):
    def forward(self, x0: Tensor, alpha: Tensor, sigma: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        return q_sample(x0, alpha, sigma, seeds=seeds, draw=3, prediction="v", dtype=torch.bfloat16)


def test_torch_export_round_trip():
    given = inputs((2, 3, 4, 4)) | {"noise": seeds_of(2)}
    file = io.BytesIO()
    torch.export.save(torch.export.export(Noising(), tuple(given.values())), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for got, want in zip(loaded(*given.values()), Noising()(*given.values()), strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride() and got.dtype == want.dtype


SEEDED = {"noise": None, "seeds": torch.tensor([1, 2])}
ERRORS = {
    "x0_list": ({"x0": [1.0]}, TypeError, "x0 must be a torch.Tensor, got list"),
    "x0_3d": ({"x0": torch.zeros(2, 3, 4)}, ValueError, r"x0 must have shape \(B, C, H, W\), got \(2, 3, 4\)"),
    "x0_uint8": ({"x0": torch.zeros(2, 3, 4, 4).byte()}, TypeError, "x0 must be .* got torch.uint8"),
    "x0_pixels": (
        {"x0": torch.zeros(1, 1, 1, 1).expand(2, 3, 1 << 15, 1 << 15)},
        ValueError,
        r"x0 must have fewer than 2\^30 pixels an image, got 32768 x 32768",
    ),
    "alpha_float": ({"alpha": 0.5}, TypeError, "alpha must be a torch.Tensor, got float"),
    "alpha_shape": ({"alpha": torch.ones(3)}, ValueError, r"alpha must have shape \(2,\), got \(3,\); one an image"),
    "alpha_dtype": ({"alpha": torch.ones(2).double()}, TypeError, "alpha must be torch.float32, got torch.float64"),
    "sigma_shape": ({"sigma": torch.ones(2, 1)}, ValueError, r"sigma must have shape \(2,\), got \(2, 1\)"),
    "sigma_dtype": ({"sigma": torch.ones(2).half()}, TypeError, "sigma must be torch.float32, got torch.float16"),
    "sigma_device": (
        {"sigma": torch.ones(2, device="meta")},
        ValueError,
        "sigma must be on the device of x0, cpu, got meta",
    ),
    "neither": ({"noise": None}, ValueError, "exactly one of noise and seeds must be given, got neither"),
    "both": ({"seeds": torch.tensor([1, 2])}, ValueError, "exactly one of noise and seeds must be given, got both"),
    "noise_shape": ({"noise": torch.zeros(2, 3, 4, 5)}, ValueError, r"noise must have shape \(2, 3, 4, 4\), got"),
    "noise_dtype": (
        {"noise": torch.zeros(2, 3, 4, 4).half()},
        TypeError,
        "noise must be torch.float32, got torch.float16",
    ),
    "noise_device": (
        {"noise": torch.zeros(2, 3, 4, 4, device="meta")},
        ValueError,
        "noise must be on the device of x0, cpu, got meta",
    ),
    "seeds_shape": (SEEDED | {"seeds": torch.zeros(3).long()}, ValueError, r"seeds must have shape \(2,\), got \(3,\)"),
    "seeds_dtype": (SEEDED | {"seeds": torch.zeros(2).int()}, TypeError, "seeds must be torch.int64, got torch.int32"),
    "seeds_device": (
        SEEDED | {"seeds": torch.zeros(2, device="meta").long()},
        ValueError,
        "seeds must be on the device of x0, cpu, got meta",
    ),
    "draw_with_noise": ({"draw": 1}, ValueError, "draw must be left out with noise, got 1: it counts what seeds draw"),
    "draw_tensor_with_noise": (
        {"draw": torch.tensor([0])},
        ValueError,
        "draw must be left out with noise, got a tensor",
    ),
    "draw_negative": (SEEDED | {"draw": -1}, ValueError, r"draw must be in \[0, 4294967296\), got -1"),
    "draw_float": (SEEDED | {"draw": 1.0}, TypeError, "draw must be an int, got float"),
    "draw_shape": (SEEDED | {"draw": torch.tensor(1)}, ValueError, r"draw must have shape \(1,\), got \(\)"),
    "prediction": ({"prediction": "score"}, ValueError, "prediction must be one of 'eps', 'v', 'x0', got 'score'"),
    "dtype": ({"dtype": torch.int64}, TypeError, "dtype must be one of .*, got torch.int64"),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'triton', 'reference', got 'cuda'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    change, kind, message = ERRORS[case]
    valid = inputs((2, 3, 4, 4))
    with pytest.raises(kind, match=message):
        q_sample(**{**valid, **change})
    q_sample(**valid)
    q_sample(**valid | SEEDED)


@NO_TRITON
def test_float64_has_no_kernel():
    with pytest.raises(ValueError, match=r"impl='triton' needs x0 to be .* got torch.float64; use impl='reference'"):
        q_sample(**inputs((2, 3, 4, 4), torch.float64), impl="triton")
    with pytest.raises(ValueError, match=r"impl='triton' needs dtype to be one of .*, got torch.float64; use impl"):
        q_sample(**inputs((2, 3, 4, 4)), dtype=torch.float64, impl="triton")
