"""Whole loops of diffusers with our schedulers inside: its pipelines, drawn, saved and loaded"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from reference.networks import mixing, mixing_learned, randomised
from scheduler_cases import FUSED, PREDICTION, STOCK, a_pair, fused_everywhere, tensors

import fastdiff
from fastdiff.integrations.diffusers import FusedDDIMScheduler, FusedDDPMScheduler

ROOT = Path(__file__).resolve().parent.parent
SPACINGS = ("leading", "linspace", "trailing")


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> list[torch.Tensor]:
    return fused_everywhere(monkeypatch)


def tiny_unet(channels: int = 2) -> UNet2DModel:
    unet = UNet2DModel(
        **{"sample_size": 8, "in_channels": channels, "out_channels": channels, "layers_per_block": 1},
        **{"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
        **{"norm_num_groups": 4, "attention_head_dim": 4, "add_attention": False},
    )
    return randomised(unet)


def piped(pipeline: type, scheduler: Any, generators: bool, **options: Any) -> np.ndarray:
    pipe = pipeline(tiny_unet(3), scheduler)
    # DDIMPipeline makes a stock DDIMScheduler of whatever it is given
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    given = [torch.Generator().manual_seed(i) for i in (5, 6)] if generators else torch.Generator().manual_seed(5)
    return pipe(batch_size=2, generator=given, num_inference_steps=6, output_type="np", **options).images


@pytest.mark.parametrize("generators", [False, True], ids=["generator", "generators"])
@PREDICTION
@pytest.mark.parametrize("spacing", SPACINGS)
def test_pipelines_draw_the_same_images(spacing: str, prediction: str, generators: bool, launches) -> None:
    config = {"timestep_spacing": spacing, "prediction_type": prediction}
    for variance in ("fixed_small", "fixed_large"):
        theirs, ours = a_pair(DDPMScheduler, None, variance_type=variance, **config)
        images = [piped(DDPMPipeline, s, generators) for s in (theirs, ours)]
        assert images[0].std() > 0.1 and np.abs(images[0] - images[1]).max() < 2e-5
    for options in ({}, {"eta": 0.7}, {"eta": 1.0, "use_clipped_model_output": True}):
        theirs, ours = a_pair(DDIMScheduler, None, **config)
        images = [piped(DDIMPipeline, s, generators, **options) for s in (theirs, ours)]
        assert images[0].std() > 0.1 and np.abs(images[0] - images[1]).max() < 2e-5
    assert len(launches) == 6 * 5


@STOCK
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_a_loop_over_guided_latents(stock: type, learned: bool, launches) -> None:
    """DiTPipeline's: conditional and null halves of a batch that are kept alike, and a variance that DDIM never sees"""
    learned_ddpm = {"variance_type": "learned_range"} if learned and stock is DDPMScheduler else {}
    results = []
    for scheduler in a_pair(stock, 8, clip_sample=False, **learned_ddpm):
        x = tensors((3, 2, 4, 4))[0].repeat(2, 1, 1, 1)
        labels = torch.tensor([3, 0, 7, 10, 10, 10])
        generator = torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            x = torch.cat([x[:3]] * 2)
            out = (mixing_learned if learned else mixing)(x, t.expand(6).float(), labels)
            eps, rest = out[:, :2], out[:, 2:]
            eps = (eps[3:] + 4 * (eps[:3] - eps[3:])).repeat(2, 1, 1, 1)
            out = torch.cat([eps, rest], 1) if learned_ddpm else eps
            options = {"eta": 0.0} if stock is DDIMScheduler else {}
            x = scheduler.step(out, t, x, generator=generator, **options).prev_sample
        results.append(x)
    scale = max(1.0, results[0].abs().max().item())
    torch.testing.assert_close(*results, rtol=0, atol=1000 * 2**-24 * scale)
    assert len(launches) == 8


RELOAD = """
import sys
import numpy as np, torch
import fastdiff
assert "diffusers" not in sys.modules
from diffusers import DDPMPipeline
for name in sys.argv[2:]:
    pipe = DDPMPipeline.from_pretrained(f"{sys.argv[1]}/{name}")
    assert type(pipe.scheduler) is getattr(fastdiff, name), type(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    images = pipe(batch_size=2, generator=generator, num_inference_steps=3, output_type="np").images
    np.save(f"{sys.argv[1]}/{name}.npy", images)
"""


def test_saved_pipelines_are_loaded_by_a_fresh_process(tmp_path: Path) -> None:
    def drawn(pipe: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(5)
        return pipe(batch_size=2, generator=generator, num_inference_steps=3, output_type="np").images

    pipes = {}
    for stock, fused in FUSED.items():
        pipes[fused.__name__] = pipe = DDPMPipeline(tiny_unet(3), fused(steps_offset=1))
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(tmp_path / fused.__name__)
        pipe.scheduler = stock.from_config(pipe.scheduler.config)
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RELOAD, str(tmp_path), *pipes]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "xpected" not in done.stderr, done.stderr
    for name, pipe in pipes.items():
        assert np.abs(np.load(tmp_path / f"{name}.npy") - drawn(pipe)).max() < 2e-5


def test_the_names_are_found_at_the_top() -> None:
    assert fastdiff.FusedDDIMScheduler is FusedDDIMScheduler and fastdiff.FusedDDPMScheduler is FusedDDPMScheduler
    assert FusedDDIMScheduler.__module__ == "fastdiff" and issubclass(FusedDDIMScheduler, fastdiff.SchedulerMixin)
