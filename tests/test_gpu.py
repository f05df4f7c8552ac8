"""What only a GPU can show. Cases that a CPU can run as well do so there, and cannot rot."""

from __future__ import annotations

import copy

import pytest
import torch

import fastdiff
from fastdiff.guidance import classifier_gradient
from fastdiff.model import EncoderConfig, EncoderUNet, UNet, UNetConfig
from fastdiff_kernels import STREAM_STEP, ada_group_norm, philox_normal, philox_uint32

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=pytest.mark.gpu, id="gpu")]


def small_model() -> fastdiff.DiffusionModel:
    torch.manual_seed(0)
    config = UNetConfig(
        image_size=8,
        in_channels=1,
        out_channels=1,
        channels=32,
        channel_mult=(1, 2),
        num_blocks=1,
        attention_resolutions=(4,),
        head_channels=16,
        num_labels=5,
        groups=8,
    )
    network = UNet(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return fastdiff.DiffusionModel(network, "linear", num_classes=4, null_label=4, image_shape=(1, 8, 8))


def adm_classifier(checkpointing: bool = False) -> fastdiff.Classifier:
    """ADM's encoder, with the backward passes of our kernels"""
    torch.manual_seed(1)
    config = EncoderConfig(
        **{"image_size": 8, "in_channels": 1, "out_channels": 4, "channels": 32, "channel_mult": (1, 2)},
        **{"num_blocks": 1, "attention_resolutions": (4,), "head_channels": 16, "groups": 8},
        gradient_checkpointing=checkpointing,
    )
    network = EncoderUNet(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return fastdiff.Classifier(network, "linear", 4, (1, 8, 8))


def small_classifier() -> fastdiff.Classifier:
    torch.manual_seed(1)
    layers = (torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.GroupNorm(4, 16), torch.nn.SiLU(), torch.nn.Flatten())

    class Network(torch.nn.Sequential):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(x + 1e-3 * t[:, None, None, None].to(x.dtype))

    return fastdiff.Classifier(Network(*layers, torch.nn.Linear(16 * 64, 4)), "linear", 4, (1, 8, 8))


@pytest.mark.parametrize("device", DEVICES)
def test_the_noise_is_that_of_the_cpu(device: str) -> None:
    seeds = torch.tensor(fastdiff.image_seeds(3, 5))
    words = philox_uint32(seeds.to(device), (3, 7, 5), draw=9, stream=STREAM_STEP)
    assert torch.equal(words.cpu(), philox_uint32(seeds, (3, 7, 5), draw=9, stream=STREAM_STEP))
    normals = philox_normal(seeds.to(device), (3, 7, 5), draw=9, stream=STREAM_STEP)
    assert (normals.cpu() - philox_normal(seeds, (3, 7, 5), draw=9, stream=STREAM_STEP)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_ada_group_norm_equals_float64(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 48, 6, 5, generator=generator) + 1).to(dtype)
    weight, bias = torch.randn(2, 48, generator=generator).to(dtype)
    scale, shift = torch.randn(2, 2, 48, generator=generator).to(dtype)
    exact = torch.nn.functional.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-5)
    exact = torch.nn.functional.silu(exact * (1 + scale.double())[..., None, None] + shift.double()[..., None, None])
    got = ada_group_norm(*(v.to(device) for v in (x, weight, bias, scale, shift)), groups=8)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    assert (got.cpu().double() - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("device", DEVICES)
def test_images_are_those_of_float64_on_the_cpu(device: str, solver: str) -> None:
    arguments = {"labels": [0, 1, 2, 3], "w": [0.0, 1.5, 3.0, -1.0], "steps": 10, "solver": solver, "seed": 0}
    exact = fastdiff.sample(small_model(), **arguments, dtype=torch.float64)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        got = fastdiff.sample(small_model(), **arguments, device=device, dtype=torch.float32)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    assert got.device.type == device
    assert (got.cpu().double() - exact).abs().max() < 1e-3


@pytest.mark.gpu
def test_float64_is_refused_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="float64 runs on the CPU only"):
        fastdiff.sample(small_model(), [0], device="cuda", dtype=torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("classified", [False, True], ids=["w", "w and a classifier"])
def test_a_step_synchronises_with_no_host(classified: bool) -> None:
    classifier = small_classifier() if classified else None
    sampler = fastdiff.Sampler(small_model(), steps=5, solver="ddpm", device="cuda", graph=False, classifier=classifier)
    sampler([0, 1], 1.5, seed=0)  # buffers, cuDNN
    (step,) = sampler._steps.values()
    step.counter.zero_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            step.run(guided=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


CALLS = {
    "one": {"labels": [1], "w": 1.5},
    "padded": {"labels": [0, 1, 2, 3, 0], "w": 1.5},
    "unguided": {"labels": [0, 1, 2], "w": 0.0},
    "guided in part": {"labels": [0, 1, 2, 3], "w": [0.0, 1.5, -1.0, 3.0]},
    "batches": {"labels": [0, 1, 2, 3, 0], "w": 1.5},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("call", CALLS)
def test_replays_give_the_images_of_an_eager_run(call: str, dtype: str) -> None:
    """Whole trajectories; the same kernels at the same batch size, so to the last bit but for cuDNN's choices"""
    options = {"steps": 10, "solver": "ddpm", "device": "cuda", "dtype": dtype, "guidance_interval": (0.1, 20.0)}
    if call == "batches":
        options["batch_size"] = 2
    sampler = fastdiff.Sampler(small_model(), **options, graph=True)
    eager = fastdiff.Sampler(small_model(), **options, graph=False)(**CALLS[call], seed=0)
    for _ in range(2):
        images = sampler(**CALLS[call], seed=0)
        assert (images - eager).abs().max() < {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}[dtype]
    assert sampler._graphing and all(step.graphs for step in sampler._steps.values())


CLASSIFIERS = {"plain": small_classifier, "adm": adm_classifier, "checkpointed": lambda: adm_classifier(True)}


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["score", "mean"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_gradient_is_captured_and_replayed(kind: str, dtype: str, form: str) -> None:
    """autograd inside of a capture; scales, labels and images are data of the graph"""
    options = {"steps": 10, "solver": "ddpm", "device": "cuda", "dtype": dtype, "guidance_interval": (0.1, 20.0)}
    options |= {"classifier": CLASSIFIERS[kind](), "classifier_form": form}
    captured = fastdiff.Sampler(small_model(), **options, graph=True)
    eager = fastdiff.Sampler(small_model(), **options, graph=False)
    for scale in (1.0, [0.5, 0.0, 2.0]):
        call = {"labels": [0, 1, 2], "w": [0.0, 1.5, -1.0], "classifier_scale": scale, "seed": 0}
        expected = eager(**call)
        for _ in range(2):
            assert (captured(**call) - expected).abs().max() < {"float32": 1e-3, "bfloat16": 0.3}[dtype]
    assert all(p.grad is None for p in options["classifier"].parameters())


@pytest.mark.gpu
def test_a_replayed_row_synchronises_with_no_host() -> None:
    sampler = fastdiff.Sampler(small_model(), steps=5, solver="ddpm", device="cuda", graph=True)
    sampler([0, 1], 1.5, seed=0)
    (step,) = sampler._steps.values()
    step.counter.zero_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_thousand_calls_keep_the_memory_that_the_first_took() -> None:
    """Graphs of seven shapes come and go, four at a time"""
    sampler = fastdiff.Sampler(small_model(), steps=2, device="cuda")
    taken = []
    for i in range(1000):
        sampler([i % 4] * (1 + i % 12), float(i % 2), seed=i)
        if i in (48, 999):
            torch.cuda.synchronize()
            taken.append(torch.cuda.memory_reserved())
    assert taken[1] <= 1.1 * taken[0]


@pytest.mark.gpu
def test_out_of_memory_is_typed_and_leaves_the_device_usable() -> None:
    sampler = fastdiff.Sampler(small_model(), steps=2, device="cuda")
    small = sampler([0, 1], 1.5, seed=0)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(free - 2**31, dtype=torch.uint8, device="cuda")
    # their label and time embeddings alone are most of what is left
    too_many = 48_000
    with pytest.raises(fastdiff.OutOfMemoryError, match="batch_size") as e:
        sampler([0] * too_many, 1.5, seed=0)
    assert 0 < e.value.batch_size < too_many
    assert torch.equal(sampler([0, 1], 1.5, seed=0), small)
    del filler


@pytest.mark.gpu
def test_more_images_than_a_grid_has_rows() -> None:
    sampler = fastdiff.Sampler(small_model(), steps=1, device="cuda", dtype="float16")
    few = sampler([1, 2, 3], 1.5, seed=[7, 8, 9])
    seeds = torch.full((70_000,), 7)
    seeds[-2:] = torch.tensor([8, 9])
    many = sampler([1] * 69_998 + [2, 3], 1.5, seed=seeds)
    assert (many[[0, -2, -1]] - few).abs().max() < 0.05


@pytest.mark.gpu
def test_threads_on_streams_of_their_own_are_served_in_turn() -> None:
    import threading

    sampler = fastdiff.Sampler(small_model(), steps=5, device="cuda", dtype="float32")
    calls = [{"labels": [i % 4] * (1 + i % 3), "w": float(i % 2), "seed": i} for i in range(8)]
    expected = [sampler(**call) for call in calls]
    results: list[torch.Tensor | None] = [None] * 8

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results[i] = sampler(**calls[i])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, expected, strict=True):
        assert got is not None and torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_of_adms_classifier_is_that_of_float64(device: str) -> None:
    """The image's gradient, through the kernels' backward passes where there is a GPU"""
    classifier = adm_classifier()
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, labels, scale = torch.tensor([0.0, 300.0, 900.0]), torch.tensor([1, 3, 0]), torch.tensor([1.0, 2.0, 0.5])

    def gradient(device: str, dtype: torch.dtype) -> torch.Tensor:
        network = copy.deepcopy(classifier.network).to(device, dtype).eval()
        given = (value.to(device) for value in (x.to(dtype), t, labels, scale.to(dtype)))
        return classifier_gradient(network, *given, num_classes=4).cpu().double()

    exact = gradient("cpu", torch.float64)
    assert (gradient(device, torch.float32) - exact).abs().max() < (
        1e-5 if device == "cpu" else 2e-3
    ) * exact.abs().max()
