"""What only a GPU can show. Cases that a CPU can run as well do so there, and cannot rot."""

from __future__ import annotations

import pytest
import torch

import fastdiff
from fastdiff.model import UNet, UNetConfig
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
def test_a_step_synchronises_with_no_host() -> None:
    sampler = fastdiff.Sampler(small_model(), steps=5, solver="ddpm", device="cuda")
    sampler([0, 1], 1.5, seed=0)  # buffers, cuDNN
    assert sampler._buffers is not None
    buffers = sampler._buffers[1]
    buffers.counter.zero_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            sampler._step(buffers, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
