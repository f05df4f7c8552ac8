"""The published networks of guided-diffusion and improved-diffusion: what the shapes of their weights cannot show

Facts are those of the flags in both repositories' READMEs (2105.05233, 2102.09672).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastdiff.model import (
    CLASSIFIER_PRESETS,
    PRESETS,
    UPSAMPLER_PRESETS,
    SuperResolutionConfig,
    TrunkConfig,
    UNetConfig,
)

__all__ = ["ATTENTION_ORDERS", "PUBLISHED", "Published"]

ATTENTION_ORDERS = ("legacy", "new")


@dataclass(frozen=True)
class Published:
    """A network, and what its weights do not tell.

    files: the names it was published under. attention_order: of qkv's rows, "legacy" is [head][q, k, v][ch], "new" is
    [q, k, v][head][ch]. rescale_timesteps: the network was trained on t * 1000 / T. dtype: what its authors compute in.
    """

    name: str
    files: tuple[str, ...]
    config: TrunkConfig
    schedule: str
    attention_order: str = "legacy"
    num_train_timesteps: int = 1000
    rescale_timesteps: bool = False
    dtype: torch.dtype = torch.float16


# improved-diffusion's networks: convolutions resample, four heads, attention at 16 and 8
_IDDPM_64 = UNetConfig(
    image_size=64,
    out_channels=6,
    channels=128,
    attention_resolutions=(16, 8),
    num_heads=4,
    head_channels=None,
    resblock_updown=False,
)
_IDDPM_LSUN = replace(
    _IDDPM_64,
    image_size=256,
    channel_mult=(1, 1, 2, 2, 4, 4),
    num_blocks=2,
    num_heads=1,
    attention_resolutions=(16,),
    scale_shift=False,
)
_IDDPM_TO_256 = SuperResolutionConfig(
    image_size=256,
    out_channels=6,
    channels=192,
    channel_mult=(1, 1, 2, 2, 4, 4),
    num_blocks=2,
    attention_resolutions=(16, 8),
    num_heads=4,
    head_channels=None,
    resblock_updown=False,
    num_labels=1000,
    low_res_size=64,
)

_LSUN = ("lsun_bedroom.pt", "lsun_cat.pt", "lsun_horse.pt", "lsun_horse_nodropout.pt")
PUBLISHED: tuple[Published, ...] = (
    Published("adm-64", ("64x64_diffusion.pt",), PRESETS["adm-64"], "cosine", "new"),
    Published("adm-128", ("128x128_diffusion.pt",), PRESETS["adm-128"], "linear"),
    Published("adm-256", ("256x256_diffusion.pt",), PRESETS["adm-256"], "linear"),
    Published("adm-256-uncond", ("256x256_diffusion_uncond.pt", *_LSUN), PRESETS["adm-256-uncond"], "linear"),
    Published("adm-512", ("512x512_diffusion.pt",), PRESETS["adm-512"], "linear", dtype=torch.float32),
    Published("upsampler-64-256", ("64_256_upsampler.pt",), UPSAMPLER_PRESETS["upsampler-64-256"], "linear"),
    Published("upsampler-128-512", ("128_512_upsampler.pt",), UPSAMPLER_PRESETS["upsampler-128-512"], "linear"),
    # a classifier sees the times of the model that it guides
    *(
        Published(
            f"classifier-{side}",
            (f"{side}x{side}_classifier.pt",),
            CLASSIFIER_PRESETS[f"classifier-{side}"],
            "cosine" if side == 64 else "linear",
            dtype=torch.float32,
        )
        for side in (64, 128, 256, 512)
    ),
    Published(
        "iddpm-imagenet-64-uncond",
        ("imagenet64_uncond_100M_1500K.pt", "imagenet64_uncond_vlb_100M_1500K.pt"),
        _IDDPM_64,
        "cosine",
        num_train_timesteps=4000,
        rescale_timesteps=True,
        dtype=torch.float32,
    ),
    Published(
        "iddpm-imagenet-64",
        ("imagenet64_cond_270M_250K.pt",),
        replace(_IDDPM_64, channels=192, num_labels=1000),
        "cosine",
        num_train_timesteps=4000,
        dtype=torch.float32,
    ),
    Published(
        "iddpm-cifar-10",
        ("cifar10_uncond_50M_500K.pt", "cifar10_uncond_vlb_50M_500K.pt"),
        replace(_IDDPM_64, image_size=32, channel_mult=(1, 2, 2, 2), dropout=0.3),
        "cosine",
        num_train_timesteps=4000,
        rescale_timesteps=True,
        dtype=torch.float32,
    ),
    Published(
        "iddpm-upsampler-64-256",
        ("upsample_cond_500K.pt",),
        _IDDPM_TO_256,
        "linear",
        num_train_timesteps=4000,
        dtype=torch.float32,
    ),
    Published(
        "iddpm-lsun-bedroom",
        ("lsun_uncond_100M_1200K_bs128.pt", "lsun_uncond_100M_2400K_bs64.pt"),
        _IDDPM_LSUN,
        "linear",
        dtype=torch.float32,
    ),
)
