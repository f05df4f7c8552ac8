"""Any config that UNet2DModel can be: ours computes the same, or says by key why it cannot"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.networks import randomised

from fastdiff.convert import unet_from_diffusers
from fastdiff.convert.diffusers_config import DEFAULTS
from fastdiff.model import UNet

diffusers = pytest.importorskip("diffusers")

SWEEP = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
KINDS = {
    "conv": ("DownBlock2D", "UpBlock2D"),
    "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    "attention": ("AttnDownBlock2D", "AttnUpBlock2D"),
}
# what may take the place of a value, most of which UNet2DModel can be
OTHERS: dict[str, list[Any]] = {
    "sample_size": [8, 12, (8, 12), (4, 8), [8, 8], 6, 5],
    "center_input_sample": [True],
    "time_embedding_type": ["fourier"],
    "time_embedding_dim": [32, 64, 48, 0],
    "freq_shift": [1, 0.0],
    "flip_sin_to_cos": [False],
    "mid_block_type": [None],
    "mid_block_scale_factor": [2, math.sqrt(2), 1.0],
    "downsample_padding": [0, 2],
    "downsample_type": ["conv", "resnet", None, "pool"],
    "upsample_type": ["conv", "resnet", None, "pool"],
    "dropout": [0.0, 0.5],
    "act_fn": ["swish", "mish", "relu"],
    "attention_head_dim": [None, 1, 2, 3, 4, 5, 8, 64],
    "norm_num_groups": [1, 2, 4, 8],
    "attn_norm_num_groups": [None, 1, 2, 4],
    "norm_eps": [1e-6],
    "resnet_time_scale_shift": ["default", "scale_shift"],
    "add_attention": [False],
    "class_embed_type": ["timestep", "identity"],
    "num_class_embeds": [None, 1, 3],
    "num_train_timesteps": [10],
    "layers_per_block": [1, 2, 3],
    "in_channels": [1, 3],
    "out_channels": [1, 6],
    "down_block_types": [("DownBlock2D", "AttnDownBlock2D"), ("SkipDownBlock2D", "AttnSkipDownBlock2D")],
    "up_block_types": [("UpBlock2D", "UNetResUpBlock2D"), ("AttnUpBlock2D", "UpBlock2D")],
    "block_out_channels": [(8, 16), (8, 12), (7, 14)],
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config that converts, with up to two of its values taken by others"""
    levels = draw(st.integers(1, 3))
    resample = draw(st.sampled_from(["conv", "resnet"]))
    scale_shift = draw(st.booleans())
    groups = draw(st.sampled_from([1, 2, 4]))
    kinds = [draw(st.sampled_from([resample, "attention"])) for _ in range(levels)]
    # neither end's last block resamples, whatever its type
    last_down = draw(st.sampled_from(["conv", "resnet"])) if kinds[-1] != "attention" else "attention"
    last_up = draw(st.sampled_from(["conv", "resnet"])) if kinds[0] != "attention" else "attention"
    prefix = draw(st.sampled_from(["", "", "UNetRes"]))
    config = {
        **DEFAULTS,
        "sample_size": 8,
        "block_out_channels": tuple(draw(st.sampled_from([8, 12, 16])) for _ in range(levels)),
        "down_block_types": tuple(prefix + KINDS[kind][0] for kind in [*kinds[:-1], last_down]),
        "up_block_types": tuple(prefix + KINDS[kind][1] for kind in [*kinds[:0:-1], last_up]),
        "layers_per_block": draw(st.integers(1, 2)),
        "downsample_type": resample,
        "upsample_type": resample,
        "attention_head_dim": draw(st.sampled_from([None, 1, 2, 4])),
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if scale_shift else draw(st.sampled_from([None, groups])),
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "num_class_embeds": draw(st.sampled_from([None, 3])),
        "add_attention": draw(st.sampled_from([True, True, False])),
        "flip_sin_to_cos": draw(st.sampled_from([True, True, False])),
        "out_channels": draw(st.sampled_from([3, 6])),
    }
    for key in draw(st.lists(st.sampled_from(sorted(OTHERS)), max_size=2)):
        config[key] = draw(st.sampled_from(OTHERS[key]))
    return config


def converted(config: dict[str, Any], weights: dict[str, torch.Tensor], *words: str) -> UNet | None:
    """The network; None where it is refused, in a sentence that names a key or one of the words"""
    try:
        return unet_from_diffusers(config, weights)
    except (TypeError, ValueError) as error:
        assert any(word in str(error) for word in (*DEFAULTS, *words)), error
        return None


def test_what_converts_computes_the_same_and_what_does_not_is_named() -> None:
    seen: Counter[str] = Counter()

    @SWEEP
    @given(config=configs())
    def check(config: dict[str, Any]) -> None:
        try:
            theirs = randomised(diffusers.UNet2DModel(**config).double())
        except Exception:  # whatever it raises for what it cannot be
            seen["not theirs"] += 1
            return
        ours = converted(config, theirs.state_dict())
        if ours is None:
            seen["refused"] += 1
            return
        torch.manual_seed(0)
        side = config["sample_size"]
        H, W = (side, side) if isinstance(side, int) else side
        x, t = torch.randn(2, config["in_channels"], H, W).double(), torch.tensor([1.0, 731.0], dtype=torch.float64)
        y = None if config["num_class_embeds"] is None else torch.tensor([0, config["num_class_embeds"] - 1])
        with torch.no_grad():
            # their features of the time are float32
            got, expected = ours(x, t.float(), y), theirs(x, t.float(), y).sample
            assert (got - expected).abs().max() < 1e-12 * expected.abs().max()
            got, expected = ours.float()(x.float(), t.float(), y), theirs.float()(x.float(), t.float(), y).sample
            assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
        seen["converted"] += 1
        for key in ("flip_sin_to_cos", "add_attention"):
            seen[f"without {key}"] += not config[key]

    check()
    assert seen["converted"] > 40 and seen["refused"] > 5, seen
    assert seen["without flip_sin_to_cos"] > 5 and seen["without add_attention"] > 5, seen


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["conv", "resnet", "AttnDownBlock2D", "UNet2DModel"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)


def test_any_value_anywhere_is_refused_or_changes_nothing() -> None:
    config = {**DEFAULTS, "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4}
    config |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    weights = randomised(diffusers.UNet2DModel(**config)).state_dict()
    expected = unet_from_diffusers(config, weights)
    # what a network's function does not depend on, or its weights cannot show
    silent = {"sample_size", "dropout", "num_train_timesteps", "attention_head_dim", "flip_sin_to_cos"}

    @settings(SWEEP, max_examples=400)
    @given(key=st.sampled_from(sorted(DEFAULTS)) | st.sampled_from(["_class_name", "", "norm_epsilon"]), value=JSON)
    def check(key: str, value: Any) -> None:
        ours = converted({**config, key: value}, weights, "_class_name", "unknown keys", "state_dict")
        if ours is not None and key not in silent:
            assert ours.config == expected.config, (key, value)

    check()
