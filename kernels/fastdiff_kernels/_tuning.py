"""Launch settings: a rule for every shape, and over it what was measured on a GPU of this name; nothing is timed here

configs/<GPU name>.json holds {"settings": {kernel: {bucket: {setting: value}}}, ...}. The bucket of a shape rounds its
rows and pixels up to powers of two. Settings change how fast a result comes and the order of a sum, as alignment and
layout of the tensors do; CHUNKS is a rule of the shape alone.
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "configs"

# kernels that sum over pixels: an image's result may not depend on how many come with it, so all batches share a bucket
SUMS = frozenset({"statistics", "residual", "projection", "slab", "apply", "sums", "dx", "slab_backward"})

# that two images, one doubled for guidance, should have of a kernel: the multiprocessors of an H100
PROGRAMS = 132

observers: list[Callable[[str, str, dict[str, int]], None]] = []
"""Called with kernel, bucket and rule whenever settings are asked for: what the tuner learns its candidates from"""

trial: dict[str, dict[str, int]] = {}
"""Kernel -> settings that stand in for what was measured while the tuner tries them"""


def num_chunks(pixels: int) -> int:
    """Chunks of an image's pixels whose statistics are kept apart; independent of batch and device, as results must be

    Every program of a norm reads those of all chunks, so more cost bytes; fewer leave a GPU idle: two images of
    16 x 16 and 576 channels are 144 programs of 32 channels, of 64 x 64 and 192 are 192, of 256 x 256 and 256 are 512.
    """
    # 4 of up to 128 pixels, then 4 to 16 of 128 or more, 32 above 64 x 64; for symbolic sizes, too
    small = torch.sym_min(4, -(-pixels // 32))
    large = torch.sym_min(torch.sym_ite(pixels > 64 * 64, 32, 16), -(-pixels // 128))
    return torch.sym_max(torch.sym_max(1, small), large)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, at least 1"""
    return 1 << max(n - 1, 0).bit_length()


def channel_block(channels: int, tiles: int = PROGRAMS) -> int:
    """Channels of a program: 64, or 32 where only that divides, so that no lane is masked; fewer for narrow tensors

    tiles: programs of an image beside one another in its pixels; where these make too few programs, down to 16.
    """
    block = 32 if channels % 64 == 32 else min(64, power_of_two(channels))
    while block > 16 and channels % (block // 2) == 0 and 2 * tiles * -(-channels // block) < PROGRAMS:
        block //= 2
    return block


def bucket(kernel: str, rows: int, channels: int, pixels: int, dtype: torch.dtype, rule: dict[str, int]) -> str:
    """float16 and bfloat16 move the same bytes; the rule stands for the options and layout that it depends on"""
    place = f"{8 * dtype.itemsize} bits C{channels} HW{power_of_two(pixels)} rule {'/'.join(map(str, rule.values()))}"
    return place if kernel in SUMS else f"{place} B{power_of_two(rows)}"


def config_file(gpu_name: str) -> Path:
    return CONFIGS / (re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".json")


@functools.cache
def _measured(device: torch.device) -> dict[str, dict[str, dict[str, Any]]]:
    if device.type != "cuda":
        return {}
    path = config_file(torch.cuda.get_device_name(device))
    return json.loads(path.read_text())["settings"] if path.exists() else {}


def settings(
    kernel: str, device: torch.device, rows: int, channels: int, pixels: int, dtype: torch.dtype, /, **rule: int
) -> dict[str, int]:
    """rule, with the values measured for this kernel and bucket on this GPU over it; other names are ignored"""
    place = bucket(kernel, rows, channels, pixels, dtype, rule)
    for observe in observers:
        observe(kernel, place, dict(rule))
    found = trial[kernel] if kernel in trial else _measured(device).get(kernel, {}).get(place, {})
    return rule | {name: value for name, value in found.items() if name in rule}
