"""Small pipelines of diffusers, and a hand to edit what they are saved as"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    UNet2DModel,
)
from reference.networks import randomised

SHAPE = (3, 8, 8)
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
# their tables are float32: 1000 rounded factors, each off by 2^-24 at most
TOLERANCE = 1000 * 2**-24
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FILES = ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", WEIGHTS]


def unet(**changes: Any) -> UNet2DModel:
    return randomised(UNet2DModel(**{**SMALL, **changes}))


def pipeline(scheduler: Any, **changes: Any) -> DDIMPipeline | DDPMPipeline:
    made = DDIMPipeline if isinstance(scheduler, DDIMScheduler) else DDPMPipeline
    pipe = made(unet(**changes), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(path: Path, **changes: Any) -> None:
    """changes: values of the file's object; ... takes a key away"""
    facts = {**json.loads(path.read_bytes()), **changes}
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not ...}))
