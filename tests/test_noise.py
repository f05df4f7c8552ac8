"""Seeds and the noise they stand for: laws of image_seeds, and images that do not know their neighbours"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from reference.networks import NULL, Recorder, mixing, mixing_learned, randomness

import fastdiff
from fastdiff import DiffusionModel, image_seeds
from fastdiff.model import UNet, UNetConfig
from fastdiff.noise import resolve_seeds
from fastdiff_kernels import STREAM_STEP, STREAM_X_T, philox_normal

SHAPE, STEPS, LIMIT = (2, 4, 4), 6, 2**63


def splitmix64(state: int) -> Iterator[int]:
    """Steele, Lea and Flood 2014, figure 17, as Vigna's public C code has it"""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def expected_seeds(seed: int, n: int) -> list[int]:
    """The stream whose first state is the first output of the seed's own stream; 63 bits of each output"""
    origin = next(splitmix64(seed)) - 0x9E3779B97F4A7C15
    return [z >> 1 for z in islice(splitmix64(origin), n)]


def test_the_published_answers_of_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert list(islice(splitmix64(1234567), 4)) == published


@pytest.mark.parametrize("seed", [0, 1, 2, 12345, 2**31, 2**32 + 1, LIMIT - 1])
def test_image_seeds_are_a_splitmix64_stream(seed):
    seeds = image_seeds(seed, 100)
    assert seeds == expected_seeds(seed, 100)
    assert all(type(s) is int and 0 <= s < LIMIT for s in seeds)
    assert len(set(seeds)) == 100


def test_image_seeds_never_change():
    assert image_seeds(0, 3) == [2598789274482403935, 6017775124710473527, 6467540162864785327]
    assert image_seeds(2026, 3) == [4320352439998022872, 3979696808928102735, 277469307270364344]
    assert image_seeds(LIMIT - 1, 2) == [8280256573862806811, 3811431516645549711]


def test_a_longer_list_begins_with_the_shorter_one_and_may_start_later():
    seeds = image_seeds(7, 64)
    for n in (0, 1, 3, 63):
        assert image_seeds(7, n) == seeds[:n]
        assert image_seeds(7, 64 - n, start=n) == seeds[n:]


def test_neighbouring_runs_share_no_image():
    runs = [image_seeds(seed, 2000) for seed in range(20)]
    assert len({seed for run in runs for seed in run}) == 20 * 2000


@pytest.mark.parametrize("seed", [-1, LIMIT, 2**64], ids=str)
def test_seeds_out_of_range(seed):
    message = rf"must be in \[0, 2\*\*63\), got {seed}"
    with pytest.raises(ValueError, match="seed " + message):
        image_seeds(seed, 2)
    with pytest.raises(ValueError, match=r"seed\[1\] " + message):
        resolve_seeds([0, seed], 2)


@pytest.mark.parametrize(
    "seed", [True, 1.0, "1", [1.5, 2.0], [1, None], [True, 1], {1, 2}, torch.tensor([1.0, 2.0])], ids=str
)
def test_seeds_of_another_kind(seed):
    with pytest.raises(TypeError, match="seed"):
        resolve_seeds(seed, 2)


@pytest.mark.parametrize(("n", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)], ids=str)
def test_a_number_of_images_that_is_none(n, error):
    with pytest.raises(error, match="n must be"):
        image_seeds(0, n)


@pytest.mark.parametrize("seed", [[5, 6], (5, 6), np.array([5, 6]), torch.tensor([5, 6])], ids=str)
def test_a_sequence_is_used_as_it_is(seed):
    assert resolve_seeds(seed, 2).tolist() == [5, 6]
    assert resolve_seeds(seed, 2).dtype == torch.int64
    with pytest.raises(ValueError, match="one an image: expected 3, got 2"):
        resolve_seeds(seed, 3)


def test_an_int_stands_for_its_image_seeds():
    assert resolve_seeds(3, 5).tolist() == resolve_seeds(np.int64(3), 5).tolist() == image_seeds(3, 5)


def test_no_seed_is_drawn_from_torchs_generator():
    torch.manual_seed(0)
    first, second = resolve_seeds(None, 4), resolve_seeds(None, 4)
    torch.manual_seed(0)
    assert torch.equal(resolve_seeds(None, 4), first)
    assert not set(first.tolist()) & set(second.tolist())


def a_model(network=mixing, **options) -> DiffusionModel:
    return DiffusionModel(network, "linear", image_shape=SHAPE, null_label=NULL, **options)


def silent(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_seeds_replay_as_the_philox_streams_of_the_counter(solver, dtype):
    """x_T is stream 0 at draw 0, a row's noise stream 1 at the row's number"""
    options = {"steps": STEPS, "solver": solver, "dtype": dtype}
    images = fastdiff.sample(a_model(), [1, 2, 3], seed=9, **options)
    seeds = torch.tensor(image_seeds(9, 3))
    x_T = philox_normal(seeds, SHAPE, draw=0, stream=STREAM_X_T)
    noise = torch.stack([philox_normal(seeds, SHAPE, draw=row, stream=STREAM_STEP) for row in range(STEPS)])
    assert torch.equal(fastdiff.sample(a_model(), [1, 2, 3], x_T=x_T, noise=noise, **options), images)


@pytest.mark.parametrize("w", [0.0, 1.5], ids=["w 0", "w 1.5"])
@pytest.mark.parametrize("batch", [1, 7])
def test_noise_is_bitwise_the_same_in_every_batch(batch, w):
    """Under a silent network an image is its noise"""
    seeds = image_seeds(3, 64)
    labels = [i % 10 for i in range(64)]
    sampler = fastdiff.Sampler(a_model(silent), steps=STEPS, solver="ddpm", clip_x0=False)
    together = sampler(labels, w, seed=seeds)
    for start in range(0, 64, 5 * batch):
        part = slice(start, start + batch)
        assert torch.equal(sampler(labels[part], w, seed=seeds[part]), together[part])


def test_the_memory_layout_of_x_T_does_not_matter():
    x_T, noise = randomness(STEPS, 3)
    options = {"steps": STEPS, "solver": "ddpm"}
    images = fastdiff.sample(a_model(), [1, 2, 3], x_T=x_T, noise=noise, **options)
    strided = x_T.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(fastdiff.sample(a_model(), [1, 2, 3], x_T=strided, noise=noise, **options), images)


@pytest.fixture(scope="module")
def unet_model() -> DiffusionModel:
    """A U-Net with random weights, the last layer included: a fresh one is silent"""
    torch.manual_seed(0)
    config = UNetConfig(
        image_size=8,
        in_channels=1,
        out_channels=1,
        channels=16,
        channel_mult=(1, 2),
        num_blocks=1,
        attention_resolutions=(4,),
        head_channels=8,
        num_labels=11,
        groups=4,
    )
    network = UNet(config)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) / (p[0].numel() if p.ndim > 1 else 4) ** 0.5)
    return DiffusionModel(network, "cosine", image_shape=(1, 8, 8))


@pytest.mark.parametrize("w", [0.0, 2.0], ids=["w 0", "w 2"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_an_image_is_the_same_in_every_batch(unet_model, solver, w):
    seeds, labels = image_seeds(11, 64), [i % 10 for i in range(64)]
    options = {"steps": 4, "solver": solver, "dtype": "float32"}
    together = fastdiff.sample(unet_model, labels, w, seed=seeds, **options)
    assert together.std() > 0.2
    sampler = fastdiff.Sampler(unet_model, **options)
    for part in (slice(0, 1), slice(63, 64), slice(0, 7), slice(50, 57)):
        alone = sampler(labels[part], w, seed=seeds[part])
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-4)


def test_any_image_can_be_drawn_again_alone():
    options = {"steps": STEPS, "solver": "ddpm", "dtype": "float64"}
    images = fastdiff.sample(a_model(), range(8), [0, 1, 2, 0, 0, 3, 0, 1], seed=4, **options)
    again = fastdiff.sample(a_model(), [5], 3.0, seed=[image_seeds(4, 8)[5]], **options)
    torch.testing.assert_close(again, images[5:6], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_chunks_equal_one_batch(batch_size, variance):
    network = Recorder(mixing_learned if variance == "learned_range" else mixing)
    labels, w = range(8), torch.tensor([0, 1.5, -1, 0, 2, 0, 0, -1])
    options = {"steps": STEPS, "solver": "ddpm", "dtype": "float64"}
    model = a_model(network, variance=variance)
    together = fastdiff.sample(model, labels, w, seed=1, **options)
    network.x.clear()
    chunked = fastdiff.sample(model, labels, w, seed=1, batch_size=batch_size, **options)
    torch.testing.assert_close(chunked, together, rtol=0, atol=1e-12)
    assert max(network.batches) <= 2 * batch_size
    x_T, noise = randomness(STEPS, 8)
    replay = {"x_T": x_T, "noise": noise, **options}
    together = fastdiff.sample(model, labels, w, **replay)
    torch.testing.assert_close(
        fastdiff.sample(model, labels, w, batch_size=batch_size, **replay), together, rtol=0, atol=1e-12
    )


def test_other_seeds_give_other_images():
    images = fastdiff.sample(a_model(), [3] * 6, seed=[0, 1, 2, 2**40, LIMIT - 1, 0], steps=STEPS, solver="ddpm")
    for i in range(6):
        for j in range(i):
            assert torch.equal(images[i], images[j]) == ((i, j) == (5, 0))


def test_the_global_generators_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    fastdiff.sample(a_model(), [1], seed=0, steps=STEPS, solver="ddpm")
    assert torch.equal(torch.get_rng_state(), before)
