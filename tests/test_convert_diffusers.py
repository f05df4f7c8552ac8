import inspect
from typing import Any

import pytest
import torch

from fastdiff.convert import unet_from_diffusers, unet_to_diffusers
from fastdiff.convert.diffusers_config import DEFAULTS
from fastdiff.model import PRESETS, UPSAMPLER_PRESETS, SuperResolutionUNet, UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")


def randomised(module: torch.nn.Module) -> Any:
    """Every parameter random, none of them zero"""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / (p[0].numel() if p.ndim > 1 else 4) ** 0.5)
    return module.eval()


def their_config(
    attention: str, widths: tuple[int, ...], *, resample: str = "resnet", **changes: Any
) -> dict[str, Any]:
    """attention: a letter a level, A with attention"""
    down, up = {
        "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
        "conv": ("DownBlock2D", "UpBlock2D"),
    }[resample]
    return {
        "sample_size": 8,
        "block_out_channels": widths,
        "down_block_types": tuple("AttnDownBlock2D" if a == "A" else down for a in attention),
        "up_block_types": tuple("AttnUpBlock2D" if a == "A" else up for a in reversed(attention)),
        "layers_per_block": 1,
        "downsample_type": resample,
        "upsample_type": resample,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "attn_norm_num_groups": 4,
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 5,
        **changes,
    }


CONFIGS = [
    pytest.param(their_config("A", (16,)), id="one-level"),
    pytest.param(their_config("-A", (16, 32)), id="two-levels"),
    pytest.param(their_config("A-", (16, 24), layers_per_block=2), id="two-blocks-attention-on-top"),
    pytest.param(their_config("-AA", (24, 40, 16), layers_per_block=2), id="three-levels-odd-mults"),
    pytest.param(their_config("--", (16, 16), attention_head_dim=4), id="attention-in-the-middle-only"),
    pytest.param(their_config("-A", (16, 32), attention_head_dim=None), id="one-head"),
    pytest.param(their_config("-A", (16, 32), num_class_embeds=None, in_channels=1, out_channels=2), id="no-labels"),
    pytest.param(their_config("-A", (16, 32), resample="conv"), id="conv-resample"),
    pytest.param(
        their_config("-A", (16, 32), resnet_time_scale_shift="default", attn_norm_num_groups=None), id="embedding-added"
    ),
    pytest.param(
        their_config("-A", (16, 32), resample="conv")
        | {"down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D")},
        id="old-block-names",
    ),
    pytest.param(
        their_config("--", (16, 32), down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D")),
        id="a-last-block-of-another-type",
    ),
    pytest.param(their_config("-A", (16, 32), flip_sin_to_cos=False), id="sines-first"),
    pytest.param(
        their_config("-A", (16, 32), add_attention=False, attn_norm_num_groups=None), id="no-attention-in-the-middle"
    ),
]


def both_outputs(ours: UNet, theirs: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x, t = torch.randn(3, theirs.config.in_channels, 8, 8, dtype=dtype), torch.tensor([0, 500, 999])
    y = None if theirs.config.num_class_embeds is None else torch.tensor([0, 4, 2])
    with torch.no_grad():
        return ours(x, t, y), theirs(x, t, y).sample


def assert_equal_outputs(ours: UNet, theirs: Any, dtype: torch.dtype) -> None:
    out, expected = both_outputs(ours, theirs, dtype)
    assert out.std() > 0.1
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    assert (out - expected).abs().max() < rtol * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_both_ways_compute_the_same(config: dict[str, Any], dtype: torch.dtype) -> None:
    theirs = randomised(diffusers.UNet2DModel(**config).to(dtype))
    ours = unet_from_diffusers(theirs.config, theirs.state_dict())
    assert {p.dtype for p in ours.parameters()} == {dtype} and not ours.training
    assert_equal_outputs(ours, theirs, dtype)

    ours = randomised(UNet(ours.config).to(dtype).to(memory_format=torch.channels_last))
    config_back, weights = unet_to_diffusers(ours)
    theirs = diffusers.UNet2DModel(**config_back).to(dtype).eval()
    theirs.load_state_dict(weights)
    assert_equal_outputs(ours, theirs, dtype)


@pytest.mark.parametrize("config", CONFIGS)
def test_there_and_back_is_the_same_network(config: dict[str, Any]) -> None:
    ours = randomised(unet_from_diffusers(config, diffusers.UNet2DModel(**config).state_dict()))
    back = unet_from_diffusers(*unet_to_diffusers(ours))
    assert back.config == ours.config
    assert all(torch.equal(p, ours.state_dict()[name]) for name, p in back.state_dict().items())


def test_results_share_no_memory_with_the_source() -> None:
    theirs = randomised(diffusers.UNet2DModel(**their_config("-A", (16, 32))))
    ours = unet_from_diffusers(theirs.config, theirs.state_dict())
    _, weights = unet_to_diffusers(ours)
    kept = {name: p.clone() for name, p in ours.state_dict().items()}
    with torch.no_grad():
        for p in [*theirs.parameters(), *weights.values()]:
            p.fill_(7)
    assert all(torch.equal(p, kept[name]) for name, p in ours.state_dict().items())


@pytest.mark.parametrize("name", ["adm-64", "adm-256", "adm-256-uncond"])
def test_published_networks_fit_unet2dmodel(name: str) -> None:
    with torch.device("meta"):
        ours = UNet(PRESETS[name])
        config, weights = unet_to_diffusers(ours)
        theirs = diffusers.UNet2DModel(**config)
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_missing_config_keys_have_unet2dmodels_defaults() -> None:
    parameters = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    assert {name: p.default for name, p in parameters.items() if name != "self"} == DEFAULTS


def weights_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    return diffusers.UNet2DModel(**config).state_dict()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name must be 'UNet2DModel', got 'UNet2DConditionModel'"),
        ({"depth": 3}, r"unknown keys \[depth\]"),
        ({"center_input_sample": True}, "center_input_sample must be False .*got True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type must be 'positional' .*got 'fourier'"),
        ({"time_embedding_dim": 99}, "time_embedding_dim must be None or 64 .*got 99"),
        ({"freq_shift": 1}, "freq_shift must be 0 .*got 1"),
        ({"mid_block_type": None}, "mid_block_type must be 'UNetMidBlock2D' .*got None"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor must be 1 .*got 2"),
        ({"act_fn": "relu"}, "act_fn must be 'silu' or 'swish' .*got 'relu'"),
        ({"norm_eps": 1e-6}, "norm_eps must be 1e-05 .*got 1e-06"),
        ({"add_attention": "no"}, "add_attention must be True or False .*got 'no'"),
        ({"class_embed_type": "timestep"}, "class_embed_type must be None .*got 'timestep'"),
        ({"attn_norm_num_groups": None}, "attn_norm_num_groups must be 4 .*got None"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift must be .*got 'spatial'"),
        ({"upsample_type": "conv"}, "upsample_type must resample in one way .*'resnet'.* down .*'conv'.* up"),
        ({"upsample_type": "bilinear"}, "upsample_type must be .*got 'bilinear'"),
        ({"downsample_type": "pool"}, "downsample_type must be .*got 'pool'"),
        ({"down_block_types": ("SkipDownBlock2D",) * 2}, "down_block_types must be 2 of .*'ResnetDownsampleBlock2D'"),
        ({"down_block_types": ("AttnDownBlock2D",)}, "down_block_types must be 2 of"),
        ({"down_block_types": ([], {})}, "down_block_types must be 2 of"),
        ({"up_block_types": ("ResnetUpsampleBlock2D",) * 2}, "up_block_types must have attention at the levels"),
        ({"up_block_types": ("AttnDownBlock2D",) * 2}, "up_block_types must be 2 of"),
        ({"block_out_channels": ()}, "block_out_channels must name 1 to 16 widths, got 0"),
        ({"block_out_channels": (16,) * 17}, "block_out_channels must name 1 to 16 widths, got 17"),
        ({"block_out_channels": (15, 30)}, "block_out_channels must begin with an even width .*got 15"),
        ({"block_out_channels": (16, 2**40)}, r"block_out_channels must be in \[1, 1048576\]"),
        ({"layers_per_block": 0}, "layers_per_block must be in .*got 0"),
        ({"layers_per_block": 10**5}, "0 tensors, too few for 200000 blocks of layers_per_block"),
        ({"num_class_embeds": 0}, "num_class_embeds must be in .*got 0"),
        ({"attention_head_dim": 0}, "attention_head_dim must be in .*got 0"),
        ({"attention_head_dim": 3}, r"attention_head_dim must divide .*\[32\].*got 3"),
        (
            {**their_config("A-", (16, 24)), "attention_head_dim": 16},
            r"attention_head_dim must divide .*\[16, 24\].*got 16",
        ),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"sample_size": None}, "sample_size must be given, and equal to image_size"),
        ({"sample_size": 7}, "sample_size must be divisible by 2 for 2 levels, got 7"),
        ({"sample_size": (8, 9)}, "sample_size must be divisible by 2 for 2 levels, got 9"),
        ({"norm_num_groups": 3, "attn_norm_num_groups": 3}, r"norm_num_groups must divide .*\(16, 32\), got 3"),
    ],
    ids=str,
)
def test_unsupported_configs_name_the_key(changes: dict[str, Any], match: str) -> None:
    config = {**their_config("-A", (16, 32)), **changes}
    with pytest.raises(ValueError, match=match):
        unet_from_diffusers(config, {})


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("in_channels", "3", "in_channels must hold integers, got '3'"),
        ("layers_per_block", 2.0, "layers_per_block must hold integers, got 2.0"),
        ("norm_num_groups", None, "norm_num_groups must hold integers, got None"),
        ("num_class_embeds", True, "num_class_embeds must hold integers, got True"),
        ("attention_head_dim", [8, 8], r"attention_head_dim must hold integers, got \[8, 8\]"),
        ("block_out_channels", 16, "block_out_channels must be a list"),
        ("block_out_channels", "16", "block_out_channels must be a list"),
        ("block_out_channels", [16, [32]], r"block_out_channels must hold integers, got \[32\]"),
        ("down_block_types", None, "down_block_types must be a list"),
        ("sample_size", 8.0, "sample_size must hold integers, got 8.0"),
        ("sample_size", [8, 8, 8], "sample_size must hold integers"),
    ],
    ids=str,
)
def test_values_of_another_type_name_the_key(key: str, value: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        unet_from_diffusers({**their_config("-A", (16, 32)), key: value}, {})


def test_conv_resampling_needs_padding_one() -> None:
    config = their_config("-A", (16, 32), resample="conv", downsample_padding=0)
    with pytest.raises(ValueError, match=r"downsample_padding must be 1 .*got 0"):
        unet_from_diffusers(config, {})


def test_image_size_stands_in_for_a_missing_sample_size() -> None:
    config = their_config("-A", (16, 32), sample_size=None)
    assert unet_from_diffusers(config, weights_of(config), image_size=8).config.attention_resolutions == (4,)
    with pytest.raises(ValueError, match="equal to image_size"):
        unet_from_diffusers({**config, "sample_size": 16}, {}, image_size=8)


def test_a_pair_of_sides_stands_for_any_images() -> None:
    config = their_config("-A", (16, 32), sample_size=(8, 4))
    theirs = randomised(diffusers.UNet2DModel(**config))
    ours = unet_from_diffusers(config, theirs.state_dict())
    assert ours.config.image_size == 8 and ours.config.attention_resolutions == (4,)
    x, t, y = torch.randn(2, 3, 8, 4), torch.tensor([3, 700]), torch.tensor([1, 4])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, y), theirs(x, t, y).sample, rtol=0, atol=1e-4)


def test_attentions_first_names_are_read() -> None:
    """Files of diffusers' first releases: query, key, value, proj_attn"""
    theirs = randomised(diffusers.UNet2DModel(**their_config("-A", (16, 32))))
    today = theirs.state_dict()
    old = {
        key.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn"): v
        for key, v in today.items()
    }
    assert old.keys() != today.keys()
    ours, expected = (unet_from_diffusers(theirs.config, weights) for weights in (old, today))
    assert all(torch.equal(p, expected.state_dict()[name]) for name, p in ours.state_dict().items())
    with pytest.raises(ValueError, match=r"unexpected keys .*query"):
        unet_from_diffusers(theirs.config, old | today)


def test_what_is_no_tensor_is_refused() -> None:
    config = their_config("-A", (16, 32))
    for weights in ([], {"conv_in.bias": [1.0]}, {1: torch.zeros(1)}):
        with pytest.raises(TypeError, match="state_dict must"):
            unet_from_diffusers(config, weights)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be a mapping"):
        unet_from_diffusers([], {})  # type: ignore[arg-type]


def test_wrong_weights_name_their_keys() -> None:
    config = their_config("-A", (16, 32))
    weights = weights_of(config)
    weights["stray"] = weights.pop("conv_in.bias")
    with pytest.raises(ValueError, match=r"lacks keys \[conv_in.bias\] and has unexpected keys \[stray\]"):
        unet_from_diffusers(config, weights)
    weights = weights_of(config)
    weights["conv_in.weight"] = weights["conv_in.weight"].reshape(16, 27)
    with pytest.raises(ValueError, match=r"conv_in.weight'\] must have shape \(16, 3, 3, 3\), got \(16, 27\)"):
        unet_from_diffusers(config, weights)
    weights = weights_of(config)
    weights["conv_in.weight"] = weights["conv_in.weight"].half()
    with pytest.raises(ValueError, match=r"one floating-point dtype, got \['torch.float16', 'torch.float32'\]"):
        unet_from_diffusers(config, weights)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"channel_mult": (0.5, 1)}, r"channel_mult\[0\] must be 1, got 0.5"),
        (
            {"num_heads": 2, "head_channels": None, "attention_resolutions": (8, 4)},
            "num_heads must give one head width",
        ),
        ({"resblock_updown": False, "conv_resample": False}, "conv_resample must be True"),
        ({"time_scale": 0.25}, "time_scale must be 1, got 0.25"),
    ],
    ids=str,
)
def test_networks_that_unet2dmodel_cannot_hold(changes: dict[str, Any], match: str) -> None:
    fields = {"channels": 16, "channel_mult": (1, 2), "attention_resolutions": (4,), "head_channels": 8, "groups": 4}
    unet = UNet(UNetConfig(image_size=8, num_blocks=1, **{**fields, **changes}))
    with pytest.raises(ValueError, match=match):
        unet_to_diffusers(unet)


def test_unet2dmodel_has_no_second_image() -> None:
    with torch.device("meta"):
        unet = SuperResolutionUNet(UPSAMPLER_PRESETS["upsampler-64-256"])
    with pytest.raises(TypeError, match="unet must be a UNet, got SuperResolutionUNet"):
        unet_to_diffusers(unet)
