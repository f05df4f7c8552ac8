"""A small network and recipe for tests of the command line, and how its commands are run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fastdiff import images
from fastdiff.model import UNetConfig
from fastdiff.training import digits

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
FAST = ["--steps", "3", "-n", "2", "--labels", "3,1"]
NETWORK = UNetConfig(
    **{"image_size": 16, "in_channels": 1, "out_channels": 1, "channels": 8, "channel_mult": (1, 2), "num_blocks": 1},
    **{"attention_resolutions": (), "num_heads": 1, "head_channels": None, "num_labels": 11, "groups": 4},
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = ENVIRONMENT | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=120)


def recipe(**changes: object) -> Path:
    """A recipe for three steps on eight digits, in a folder of its own."""
    folder, data = Path("recipes"), digits()
    folder.mkdir(exist_ok=True)
    if not (folder / "a.npz").exists():
        images.save_npz(folder / "a.npz", images.to_uint8(data.images[:8]), data.labels[:8].tolist(), {})
    diffusion = {"schedule": {"name": "linear", "num_train_timesteps": 1000}, "prediction": "eps"}
    diffusion |= {"variance": "fixed_small", "num_classes": 10, "null_label": 10, "image_shape": [1, 16, 16]}
    sections = {
        "name": "small",
        "data": "a.npz",
        "network": {"type": "unet", **NETWORK.to_dict()},
        "diffusion": diffusion | {"clip_x0": True},
        "dtype": None,
        "storage_dtype": "float16",
        "training": {"iterations": 3, "batch_size": 4, "save_every": 2, "seed": 5},
    }
    sections |= changes
    path = folder / "recipe.json"
    path.write_text(json.dumps({key: value for key, value in sections.items() if value != "left out"}))
    return path
