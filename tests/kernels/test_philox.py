"""Counter-based noise against Random123's known answers and an independent Box-Muller"""

import math

import numpy as np
import pytest
import torch
from places import INTERPRETER
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff_kernels import STREAM_STEP, STREAM_TRAINING, STREAM_X_T, philox_normal, philox_uint32, reference

# kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, answer
KNOWN_ANSWERS = {
    "zeros": ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}
EXTREME_SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62 + 12345, 2**63 - 1, -1, -(2**63))


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def python_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers"""
    c, k = list(counter), list(key)
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * c[0], 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high_1 ^ c[1] ^ k[0], low_1, high_0 ^ c[3] ^ k[1], low_0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def box_muller(words: np.ndarray) -> np.ndarray:
    """float64 normals of uint32 words (..., 4), with the true cosine and sine"""
    u = ((words.astype(np.int64) >> 8) + 0.5) / 2.0**24
    radius, angle = np.sqrt(-2 * np.log(u[..., 0::2])), 2 * np.pi * u[..., 1::2]
    pairs = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1)
    return pairs.reshape(words.shape)


@pytest.mark.parametrize("case", KNOWN_ANSWERS)
def test_known_answers(case):
    counter, key, answer = map(words_of, KNOWN_ANSWERS[case])
    got = reference.philox4x32(*([torch.tensor([word]) for word in words] for words in (counter, key)))
    assert [word.item() for word in got] == answer == python_philox(counter, key)


@pytest.mark.parametrize("stream", [STREAM_X_T, STREAM_STEP, STREAM_TRAINING, 2**32 - 1], ids="stream_{}".format)
@pytest.mark.parametrize("draw", [0, 7, 2**32 - 1], ids="draw_{}".format)
def test_key_and_counter_are_the_documented_ones(place, draw, stream):
    shape = (3, 2, 3)
    seeds = torch.tensor(EXTREME_SEEDS, device=place.device)
    got = philox_uint32(seeds, shape, draw=draw, stream=stream, impl=place.impl)
    assert got.shape == (len(EXTREME_SEEDS), *shape) and got.dtype == torch.int64
    for image, seed in enumerate(EXTREME_SEEDS):
        key = [seed % 2**32, (seed >> 32) % 2**32]
        want = [python_philox([element // 4, draw, stream, 0], key)[element % 4] for element in range(18)]
        assert got[image].flatten().tolist() == want


def test_normals_follow_box_muller(place):
    seeds = torch.arange(8 if place.interpreted else 64, device=place.device) * 0x1234567890ABCDE
    words = philox_uint32(seeds, (3, 32, 32), draw=3, stream=STREAM_STEP, impl="reference")
    got = philox_normal(seeds, (3, 32, 32), draw=3, stream=STREAM_STEP, impl=place.impl)
    want = box_muller(words.cpu().numpy().reshape(len(seeds), -1, 4)).reshape(got.shape)
    assert got.dtype == torch.float32
    # a GPU's square root is approximate
    np.testing.assert_allclose(got.cpu().numpy(), want, rtol=0, atol=1e-6 if place.device == "cpu" else 1e-5)


# two images' first four normals, draw 9, step stream
FROZEN_SEEDS = (0, 2**63 - 25)
FROZEN = (
    *(-2.4674184984157, 0.0884936281184, -1.1334727751956, -0.0198549556306),
    *(1.2239781366187, 0.7223696771039, 1.0556616365212, -0.1938647480638),
)

# the extremes of u, where float32 cannot hold m + 0.5, and both sides of every octant
CORNERS = sorted({0, 1, 2, 2**24 - 1, 2**24 - 2, *(k * 2**21 + d for k in range(1, 8) for d in (-1, 0, 1))})


def test_normals_at_the_corners_of_the_words():
    m = torch.tensor(CORNERS, dtype=torch.int32)
    u = (np.array(CORNERS) + 0.5) / 2.0**24
    np.testing.assert_allclose(reference._radius(m).numpy(), np.sqrt(-2 * np.log(u)), rtol=3e-7)
    cos, sin = reference._cos_sin(m)
    np.testing.assert_allclose(cos.numpy(), np.cos(2 * np.pi * u), rtol=0, atol=1.5e-7)
    np.testing.assert_allclose(sin.numpy(), np.sin(2 * np.pi * u), rtol=0, atol=1.5e-7)


def test_a_frozen_table_of_normals(place):
    seeds = torch.tensor(FROZEN_SEEDS, device=place.device)
    got = philox_normal(seeds, (1, 2, 2), draw=9, stream=STREAM_STEP, impl=place.impl)
    assert got.flatten().tolist() == pytest.approx(FROZEN, abs=1e-6 if place.device == "cpu" else 1e-5)
    words = [python_philox([0, 9, STREAM_STEP, 0], [seed % 2**32, seed >> 32]) for seed in FROZEN_SEEDS]
    assert box_muller(np.array(words)).flatten().tolist() == pytest.approx(FROZEN, abs=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 5), (3, 7, 9), (3, 32, 32)], ids=str)
def test_an_image_alone_is_bitwise_the_image_in_a_batch(place, shape):
    def draw(seeds: torch.Tensor) -> torch.Tensor:
        return philox_normal(seeds, shape, draw=5, stream=STREAM_X_T, impl=place.impl)

    seeds = torch.randint(-(2**63), 2**63 - 1, (13,), generator=torch.Generator().manual_seed(0)).to(place.device)
    batch = draw(seeds)
    for part in (slice(0, 1), slice(12, 13), slice(3, 9), slice(0, 13, 5)):
        assert torch.equal(draw(seeds[part]), batch[part])
    order = torch.randperm(13)
    assert torch.equal(draw(seeds[order]), batch[order])


def test_a_device_draw_equals_the_same_int(place):
    seeds = torch.tensor([3, 4], device=place.device)
    for draw in (0, 11, 2**31, 2**32 - 1):
        a, b = (
            philox_normal(seeds, (2, 3, 3), draw=given, stream=STREAM_STEP, impl=place.impl)
            for given in (draw, torch.tensor([draw], device=place.device))
        )
        assert torch.equal(a, b)


def test_a_shape_is_a_prefix_of_a_longer_one(place):
    """An element's value depends on its index alone, also where the count is no multiple of 4"""
    seeds = torch.tensor([3, 4], device=place.device)
    whole = philox_normal(seeds, (2100,), draw=0, stream=0, impl=place.impl)
    for count in (1, 2, 3, 5, 18, 39, 1023, 1025):
        part = philox_normal(seeds, (count,), draw=0, stream=0, impl=place.impl)
        assert torch.equal(part, whole[:, :count])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_are_the_float32_normals_rounded(place, dtype):
    if place.impl == "triton" and dtype == torch.float64:
        pytest.skip("an error; see below")
    seeds = torch.arange(5, device=place.device)
    got = philox_normal(seeds, (3, 4, 4), draw=1, stream=STREAM_STEP, dtype=dtype, impl=place.impl)
    assert got.dtype == dtype
    assert torch.equal(got, philox_normal(seeds, (3, 4, 4), draw=1, stream=STREAM_STEP, impl=place.impl).to(dtype))


@pytest.mark.parametrize("place", [INTERPRETER])
def test_float64_normals_are_not_tritons(place):
    with pytest.raises(ValueError, match=r"impl='triton' needs dtype to be one of .*, got torch.float64"):
        philox_normal(torch.tensor([1]), (2,), draw=0, stream=0, dtype=torch.float64, impl=place.impl)


def test_moments_and_tails():
    z = philox_normal(torch.arange(128), (3, 32, 32), draw=0, stream=STREAM_X_T).double()
    n = z.numel()
    # each bound is five standard errors of the moment's own estimator
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for threshold in (1.0, 2.0, 3.0):
        p = math.erfc(threshold / math.sqrt(2))
        assert abs((z.abs() > threshold).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_images_draws_streams_and_elements_are_uncorrelated():
    shape, seeds = (3, 16, 16), torch.tensor([0, 1, 2, 2**32, 2**63 - 1])
    rows = [
        philox_normal(seeds, shape, draw=draw, stream=stream).flatten(1)
        for draw in (0, 1, 2)
        for stream in (STREAM_X_T, STREAM_STEP, STREAM_TRAINING)
    ]
    vectors = torch.cat(rows).double()
    vectors = torch.cat((vectors, vectors[:1].roll(1, 1), vectors[:1].roll(2, 1), vectors[:1].roll(4, 1)))
    correlation = torch.corrcoef(vectors).fill_diagonal_(0)
    # 768 elements: the standard error is 0.036, and there are about 1100 pairs
    assert correlation.abs().max() < 5 / math.sqrt(vectors.shape[1])


@pytest.mark.parametrize("n,shape", [(0, (3, 4, 4)), (2, (3, 0, 4)), (0, (0,))], ids=str)
def test_empty(place, n, shape):
    seeds = torch.zeros(n, dtype=torch.int64, device=place.device)
    for draw in (0, torch.tensor([0], device=place.device)):
        assert philox_normal(seeds, shape, draw=draw, stream=0, impl=place.impl).shape == (n, *shape)
        assert philox_uint32(seeds, shape, draw=draw, stream=0, impl=place.impl).shape == (n, *shape)


@pytest.mark.parametrize("draw", ["int", "tensor"])
def test_opcheck(place, draw):
    at = torch.tensor([2**32 - 1], device=place.device) if draw == "tensor" else None
    for dtype in (torch.int64, torch.float32):
        arguments = (torch.arange(3, device=place.device), [2, 3, 3], at, 7, 1, dtype, place.impl)
        torch.library.opcheck(torch.ops.fastdiff_kernels.philox.default, arguments)


def test_torch_compile_traces_it_whole(place):
    def function(seeds: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
        z = philox_normal(seeds + 1, (2, 3, 3), draw=draw, stream=STREAM_STEP, impl=place.impl)
        return z + philox_uint32(seeds, (18,), draw=5, stream=0, impl=place.impl).view(-1, 2, 3, 3)

    torch.compiler.reset()
    operands = torch.arange(3, device=place.device), torch.tensor([4], device=place.device)
    assert torch.equal(torch.compile(function, backend="aot_eager", fullgraph=True)(*operands), function(*operands))


def test_nothing_is_read_on_the_host(place):
    class NoHostRead(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a device value was read on the host"
            return func(*args, **(kwargs or {}))

    seeds, draw = torch.tensor([1, 2], device=place.device), torch.tensor([3], device=place.device)
    with pytest.raises(AssertionError, match="read on the host"), NoHostRead():
        draw.item()
    with NoHostRead():
        philox_normal(seeds, (3, 4, 4), draw=draw, stream=STREAM_STEP, impl=place.impl)


ERRORS = {
    "seeds_list": ({"seeds": [1]}, TypeError, "seeds must be a torch.Tensor, got list"),
    "seeds_2d": ({"seeds": torch.zeros(1, 1).long()}, ValueError, r"seeds must have shape \(N,\), got \(1, 1\)"),
    "seeds_float": ({"seeds": torch.zeros(2)}, TypeError, "seeds must be torch.int64, got torch.float32"),
    "shape_int": ({"shape": 5}, TypeError, "shape must be a sequence of ints, got int"),
    "shape_negative": ({"shape": (3, -1)}, ValueError, "every size in shape must be at least 0, got -1"),
    "shape_float": ({"shape": (3.0,)}, TypeError, "every size in shape must be an int, got float"),
    "draw_negative": ({"draw": -1}, ValueError, r"draw must be in \[0, 4294967296\), got -1"),
    "draw_large": ({"draw": 2**32}, ValueError, r"draw must be in \[0, 4294967296\), got 4294967296"),
    "draw_float": ({"draw": 1.0}, TypeError, "draw must be an int, got float"),
    "draw_shape": ({"draw": torch.tensor(0)}, ValueError, r"draw must have shape \(1,\), got \(\)"),
    "draw_dtype": ({"draw": torch.zeros(1).int()}, TypeError, "draw must be torch.int64, got torch.int32"),
    "draw_device": (
        {"draw": torch.zeros(1, device="meta").long()},
        ValueError,
        "draw must be on the device of seeds, cpu, got meta",
    ),
    "stream_negative": ({"stream": -1}, ValueError, r"stream must be in \[0, 4294967296\), got -1"),
    "impl": ({"impl": "cpu"}, ValueError, "impl must be one of 'auto', 'triton', 'reference', got 'cpu'"),
    "stream_tensor": ({"stream": torch.tensor(1)}, TypeError, "stream must be an int, got Tensor"),
}


@pytest.mark.parametrize("op", [philox_uint32, philox_normal], ids=["uint32", "normal"])
@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case, op):
    change, kind, message = ERRORS[case]
    arguments = {"seeds": torch.tensor([1, 2]), "shape": (3, 2), "draw": 0, "stream": 0} | change
    with pytest.raises(kind, match=message):
        op(arguments.pop("seeds"), arguments.pop("shape"), **arguments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_a_dtype_that_holds_no_normals(dtype):
    with pytest.raises(TypeError, match=f"dtype must be one of .*, got {dtype}"):
        philox_normal(torch.tensor([1]), (2,), draw=0, stream=0, dtype=dtype)
