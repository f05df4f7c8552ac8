"""The converter of guided-diffusion's and improved-diffusion's weights against what their own code computed"""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from published.weights import inputs, noise, spread, weights

from fastdiff import Classifier, DiffusionModel, sample
from fastdiff.convert.guided_diffusion import model_from_guided_diffusion, state_to_guided_diffusion
from fastdiff.convert.published import PUBLISHED
from fastdiff.convert.shapes import readings, shown
from fastdiff.model import EncoderConfig, EncoderUNet, SuperResolutionUNet, UNet, UNetConfig
from fastdiff.model.trunk import channel_multiple

FACTS = Path(__file__).parent / "published"
CHECKPOINTS = json.loads(gzip.decompress((FACTS / "keys.json.gz").read_bytes()))
NETWORKS: dict[str, Any] = json.loads((FACTS / "networks.json").read_text())
TRAJECTORIES: dict[str, Any] = json.loads((FACTS / "trajectories.json").read_text())
OTHER = {"legacy": "new", "new": "legacy"}


def flags_of(record: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What a person who trained a small network would say of it"""
    arguments = record["arguments"]
    flags = {
        "image_size": record["inputs"]["x"][-1],
        "attention_order": record["attention_order"],
        "schedule": "cosine",
        "num_train_timesteps": record["inputs"]["num_timesteps"],
        "rescale_timesteps": record["rescale_timesteps"],
        "dtype": torch.float32,
    }
    if "num_head_channels" in arguments:
        flags["head_channels"] = arguments["num_head_channels"]
    else:
        flags["num_heads"] = arguments["num_heads"]
    if "low_res" in record["inputs"]:
        flags["low_res_size"] = record["inputs"]["low_res"][-1]
    return flags | changes


def state_of(name: str) -> dict[str, torch.Tensor]:
    return weights(NETWORKS[name]["shapes"], NETWORKS[name]["seed"])


def outputs(model: DiffusionModel | Classifier, record: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """The numbers that were recorded of the original, here"""
    given = inputs(record["seed"], **record["inputs"])
    x, t = given.pop("x").to(dtype), given.pop("t").to(dtype)
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    with torch.no_grad():
        out = model.network.to(dtype)(x, t, **given)
    assert list(out.shape) == record["shape"]
    return out.flatten()[spread(out.numel())]


@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_the_original_code_computed(name: str) -> None:
    record = NETWORKS[name]
    model = model_from_guided_diffusion(state_of(name), **flags_of(record))
    got = outputs(model, record, torch.float32)
    assert (got - torch.tensor(record["float32"])).abs().max() < 1e-5
    got = outputs(model, record, torch.float64)
    assert (got - torch.tensor(record["float64"], dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("name", [name for name, record in NETWORKS.items() if max(record["heads"].values()) > 1])
def test_the_wrong_order_of_qkv_is_far_off(name: str) -> None:
    record = NETWORKS[name]
    order = OTHER[record["attention_order"]]
    model = model_from_guided_diffusion(state_of(name), **flags_of(record, attention_order=order))
    assert (outputs(model, record, torch.float32) - torch.tensor(record["float32"])).abs().max() > 1e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 3e-5)])
@pytest.mark.parametrize("name", [name for name, record in TRAJECTORIES.items() if "network" in record["config"]])
def test_whole_trajectories_of_the_original_networks(name: str, dtype: str, tolerance: float) -> None:
    """Network, tables and loop together, from a state dict alone; float32 has the original's own rounding in it"""
    record, config = TRAJECTORIES[name], TRAJECTORIES[name]["config"]
    network = NETWORKS[config["network"]]
    flags = {"schedule": config["schedule"], "num_train_timesteps": config["diffusion_steps"]}
    model = model_from_guided_diffusion(state_of(config["network"]), **flags_of(network, **flags))
    assert isinstance(model, DiffusionModel) and model.variance == config["variance"]
    x_T, drawn = noise(record["seed"], record["rows"], record["shape"])
    images = sample(
        model,
        record["y"],
        steps=config["respacing"],
        solver={"p_sample_loop": "ddpm", "ddim_sample_loop": "ddim"}[config["sampler"]],
        x_T=x_T.to(getattr(torch, dtype)),
        noise=drawn.to(getattr(torch, dtype)),
        dtype=dtype,
    )
    expected = torch.tensor(record[dtype], dtype=images.dtype)
    assert (images.flatten()[spread(images.numel())] - expected).abs().max() < tolerance


@pytest.mark.parametrize("order", sorted(OTHER))
@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back_is_every_tensor(name: str, order: str) -> None:
    state = state_of(name)
    model = model_from_guided_diffusion(state, **flags_of(NETWORKS[name], attention_order=order))
    back = state_to_guided_diffusion(model.network, order)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key
        assert back[key].data_ptr() != tensor.data_ptr()
    # and in the other order, which is another file of the same network
    again = model_from_guided_diffusion(
        state_to_guided_diffusion(model.network, OTHER[order]),
        **flags_of(NETWORKS[name], attention_order=OTHER[order]),
    )
    assert all(torch.equal(p, q) for p, q in zip(again.network.parameters(), model.network.parameters(), strict=True))


def test_the_models_that_come_out() -> None:
    model = model_from_guided_diffusion(state_of("adm"), **flags_of(NETWORKS["adm"]), name="mine")
    assert isinstance(model, DiffusionModel) and isinstance(model.network, UNet) and not model.network.training
    assert (model.num_classes, model.null_label, model.variance, model.prediction) == (7, None, "learned_range", "eps")
    assert (model.image_shape, model.schedule.name, model.dtype, model.name) == (
        (3, 16, 16),
        "cosine",
        torch.float32,
        "mine",
    )
    assert model.provenance == {"format": "guided-diffusion", "attention_order": "legacy", "published": None}
    null = model_from_guided_diffusion(state_of("adm"), **flags_of(NETWORKS["adm"]), num_classes=6)
    assert isinstance(null, DiffusionModel) and (null.num_classes, null.null_label) == (6, 6)
    plain = model_from_guided_diffusion(state_of("plain, pools"), **flags_of(NETWORKS["plain, pools"]))
    assert isinstance(plain, DiffusionModel) and plain.variance == "fixed_large"
    options = flags_of(NETWORKS["plain, pools"], variance="fixed_small", prediction="x0")
    plain = model_from_guided_diffusion(state_of("plain, pools"), **options)
    assert isinstance(plain, DiffusionModel) and (plain.variance, plain.prediction) == ("fixed_small", "x0")
    upsampler = model_from_guided_diffusion(state_of("upsampler"), **flags_of(NETWORKS["upsampler"]))
    assert isinstance(upsampler.network, SuperResolutionUNet) and upsampler.image_shape == (3, 16, 16)
    judge = model_from_guided_diffusion(state_of("classifier, spatial"), **flags_of(NETWORKS["classifier, spatial"]))
    assert isinstance(judge, Classifier) and isinstance(judge.network, EncoderUNet) and judge.num_classes == 11
    improved = model_from_guided_diffusion(state_of("improved"), **flags_of(NETWORKS["improved"]))
    assert improved.network.config.time_scale == 0.25 and improved.schedule.num_train_timesteps == 4000


def test_an_attention_pool_shows_the_image_size() -> None:
    name = "classifier, attention"
    flags = flags_of(NETWORKS[name])
    del flags["image_size"]
    model = model_from_guided_diffusion(state_of(name), **flags)
    assert (outputs(model, NETWORKS[name], torch.float32) - torch.tensor(NETWORKS[name]["float32"])).abs().max() < 1e-5


def test_the_widest_dtype_of_the_file_is_kept() -> None:
    state = state_of("plain, convolutions")
    half = {key: value.half() if "blocks" in key else value for key, value in state.items()}
    model = model_from_guided_diffusion(half, **flags_of(NETWORKS["plain, convolutions"], dtype=torch.float16))
    assert {p.dtype for p in model.network.parameters()} == {torch.float32} and model.dtype == torch.float16
    all_half = {key: value.half() for key, value in state.items()}
    model = model_from_guided_diffusion(all_half, **flags_of(NETWORKS["plain, convolutions"], dtype=torch.float16))
    assert {p.dtype for p in model.network.parameters()} == {torch.float16}


@pytest.mark.parametrize("key", ["conv_in.weight", "pos_embed.proj.weight"])
def test_weights_of_diffusers_are_told(key: str) -> None:
    match = rf"weights of diffusers, with {key}: give the folder that holds them"
    refused(match, {key: torch.zeros(8, 3, 3, 3), "conv_out.bias": torch.zeros(3)})


# ---- published networks, by their shapes


def meta_state(file: str) -> dict[str, torch.Tensor]:
    record = CHECKPOINTS[file]
    keys = CHECKPOINTS[record["keys_of"]]["keys"] if record.get("keys_of") else record["keys"]
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")
        for key, (shape, dtype) in keys.items()
    }


def flags(record: dict[str, Any], name: str, default: Any = None) -> Any:
    return record["flags"].get(name, default)


@pytest.mark.parametrize("file", sorted(CHECKPOINTS))
def test_published_networks_are_recognised_with_all_their_facts(file: str) -> None:
    record, built = CHECKPOINTS[file], CHECKPOINTS[file]["built"]
    shapes = {key: tuple(value.shape) for key, value in meta_state(file).items()}
    (found,) = [entry for entry in PUBLISHED for seen in readings(shapes) if shown(entry.config) == seen]
    assert f"{file}.pt" in found.files
    config = found.config
    side = flags(record, "image_size") or flags(record, "large_size")
    assert config.image_size == side
    assert found.attention_order == built["attention_order"]
    for width, heads in built_heads(record, shapes):
        assert config.heads(width) == heads
    if "noise_schedule" in record["flags"]:
        assert found.schedule == flags(record, "noise_schedule")
        assert found.num_train_timesteps == flags(record, "diffusion_steps")
        # of no consequence where T is 1000
        scale = 1000 / found.num_train_timesteps if found.rescale_timesteps else 1
        assert scale == (1000 / flags(record, "diffusion_steps") if flags(record, "rescale_timesteps") else 1)
        if not file.startswith("lsun_"):
            assert config.dropout == flags(record, "dropout")
        assert (found.dtype == torch.float16) == flags(record, "use_fp16", False)
    if hasattr(config, "low_res_size"):
        assert config.low_res_size == flags(record, "small_size")


def built_heads(record: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[tuple[int, int]]:
    """(width, heads) of every attention that the original code built"""
    blocks = {name: n for name, n in record["built"]["heads"].items() if f"{name}.qkv.weight" in shapes}
    assert blocks
    return [(shapes[f"{name}.qkv.weight"][1], n) for name, n in blocks.items()]


def test_a_classifier_has_the_schedule_of_the_model_of_its_size() -> None:
    known = {entry.name: entry for entry in PUBLISHED}
    for side in (64, 128, 256, 512):
        assert known[f"classifier-{side}"].schedule == known[f"adm-{side}"].schedule


def test_a_published_network_needs_no_flag_and_heeds_those_that_are_given() -> None:
    state = {
        key: torch.full(tuple(value.shape), 0.5).bfloat16() for key, value in meta_state("64x64_classifier").items()
    }
    judge = model_from_guided_diffusion(state)
    assert isinstance(judge, Classifier) and judge.name == judge.provenance["published"] == "classifier-64"
    assert judge.network.config.head_channels == 64 and judge.schedule.name == "cosine"
    other = model_from_guided_diffusion(state, num_heads=2, schedule="linear", attention_order="new", name="mine")
    assert (other.network.config.num_heads, other.network.config.head_channels) == (2, None)
    assert (other.schedule.name, other.provenance["attention_order"], other.name) == ("linear", "new", "mine")


def test_a_published_network_of_improved_diffusion() -> None:
    keys = meta_state("cifar10_uncond_50M_500K").items()
    state = {key: torch.zeros(value.shape, dtype=torch.bfloat16) for key, value in keys}
    model = model_from_guided_diffusion(state)
    config = model.network.config
    assert isinstance(model, DiffusionModel) and model.name == "iddpm-cifar-10" and model.image_shape == (3, 32, 32)
    assert (config.num_heads, config.head_channels, config.dropout, config.time_scale) == (4, None, 0.3, 0.25)
    assert (model.num_classes, model.variance, model.dtype) == (None, "learned_range", torch.float32)
    config = model_from_guided_diffusion(state, head_channels=64, num_train_timesteps=1000).network.config
    assert (config.num_heads, config.head_channels, config.time_scale) == (None, 64, 1.0)


# ---- what is missing or wrong


def refused(match: str, state: dict[str, torch.Tensor], error: type[Exception] = ValueError, **flags: Any) -> None:
    with pytest.raises(error, match=match):
        model_from_guided_diffusion(state, **flags)


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("image_size", "convolutions fit every size"),
        ("head_channels", r"num_heads \(or head_channels"),
        ("attention_order", "rows of qkv have the same shape"),
        ("schedule", "noise schedule is nowhere"),
        ("num_train_timesteps", "T is nowhere"),
        ("dtype", "compute dtype"),
    ],
)
def test_what_shapes_do_not_show_is_asked_for_by_name(flag: str, why: str) -> None:
    flags = flags_of(NETWORKS["adm"])
    del flags[flag]
    refused(why, state_of("adm"), **flags)


def test_everything_that_is_missing_is_told_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        model_from_guided_diffusion(state_of("improved, upsampler"), low_res_size=2)
    for flag in ("image_size", "num_heads", "attention_order", "schedule", "rescale_timesteps", "dtype"):
        assert f"{flag} (" in str(caught.value)


def test_rescaling_is_asked_for_where_it_matters() -> None:
    flags = flags_of(NETWORKS["improved"])
    del flags["rescale_timesteps"]
    refused("rescale_timesteps", state_of("improved"), **flags)
    model_from_guided_diffusion(state_of("improved"), **flags | {"num_train_timesteps": 1000})


def test_one_head_has_one_order() -> None:
    flags = flags_of(NETWORKS["improved, plain"])
    del flags["attention_order"]
    model_from_guided_diffusion(state_of("improved, plain"), **flags)


def test_a_choice_that_the_shapes_leave_is_asked_for() -> None:
    """Six channels in and six out: an image and a smaller one with a learned variance, or one image of six channels"""
    flags = flags_of(NETWORKS["upsampler"])
    del flags["low_res_size"]
    refused(r"image_channels must be given: .*\[3, 6\]", state_of("upsampler"), **flags)
    refused("low_res_size", state_of("upsampler"), **flags, image_channels=3)
    six = model_from_guided_diffusion(state_of("upsampler"), **flags, image_channels=6)
    assert isinstance(six, DiffusionModel) and type(six.network) is UNet and six.image_shape == (6, 16, 16)
    refused("low_res_size must be left out", state_of("upsampler"), **flags, image_channels=6, low_res_size=4)
    refused(r"image_channels must be among \[3, 6\]", state_of("upsampler"), **flags, image_channels=4)


def test_levels_that_the_shapes_leave_open_are_asked_for() -> None:
    """Two levels of two blocks and a halving one, or three of one: an encoder of one width does not show which"""
    config = EncoderConfig(
        **{"image_size": 16, "channels": 32, "channel_mult": (1, 1), "num_blocks": 2, "attention_resolutions": ()},
        **{"num_heads": 1, "head_channels": None, "out_channels": 5, "pool": "adaptive"},
    )
    state = state_to_guided_diffusion(EncoderUNet(config), "legacy")
    flags = dict(image_size=16, num_heads=1, schedule="linear", num_train_timesteps=1000, dtype=torch.float32)
    refused(r"num_blocks must be given: .*\[1, 2, 5\]", state, **flags)
    model = model_from_guided_diffusion(state, **flags, num_blocks=2)
    assert model.network.config == config
    refused(r"num_blocks must be among \[1, 2, 5\]", state, **flags, num_blocks=3)


TWO_LEVELS: dict[str, Any] = {"image_size": 16, "channels": 32, "num_blocks": 2, "num_heads": 1, "head_channels": None}


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(**TWO_LEVELS, channel_mult=(1, 1), attention_resolutions=()),
        UNetConfig(**TWO_LEVELS, channel_mult=(1, 1), attention_resolutions=(16,)),
        UNetConfig(**TWO_LEVELS, channel_mult=(1, 1), attention_resolutions=(), resblock_updown=False),
        UNetConfig(**TWO_LEVELS, channel_mult=(1, 1, 1), attention_resolutions=(8,), in_channels=4, out_channels=8),
        EncoderConfig(**TWO_LEVELS, channel_mult=(1, 1), attention_resolutions=(16, 8), pool="adaptive"),
        EncoderConfig(**TWO_LEVELS, channel_mult=(1, 2), attention_resolutions=(), pool="spatial"),
        EncoderConfig(**TWO_LEVELS, channel_mult=(1, 1), attention_resolutions=(8,), resblock_updown=False),
    ],
    ids=lambda config: f"{type(config).__name__}-{config.channel_mult}-{config.attention_resolutions}",
)
def test_levels_that_the_shapes_show_are_not_asked_for(config: UNetConfig | EncoderConfig) -> None:
    """By the blocks that double the resolution, by attention, which never follows one that halves it, or by widths"""
    network = UNet(config) if isinstance(config, UNetConfig) else EncoderUNet(config)
    state = state_to_guided_diffusion(network, "legacy")
    flags = dict(image_size=16, num_heads=1, schedule="linear", num_train_timesteps=1000, dtype=torch.float32)
    assert model_from_guided_diffusion(state, **flags).network.config == config


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"attention_order": "old"}, ValueError, "attention_order must be one of"),
        ({"num_heads": 2}, ValueError, "num_heads and head_channels exclude each other"),
        ({"head_channels": 5}, ValueError, "head_channels must divide"),
        ({"image_size": 10}, ValueError, "image_size must be divisible"),
        ({"image_size": "16"}, TypeError, "image_size must be an int"),
        ({"schedule": "quadratic"}, ValueError, "schedule must be one of"),
        ({"num_train_timesteps": 0}, ValueError, "num_train_timesteps must be"),
        ({"rescale_timesteps": 1}, TypeError, "rescale_timesteps must be True or False"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating"),
        ({"num_classes": 5}, ValueError, "num_classes must be 7 or, with a null label, 6, got 5"),
        ({"prediction": "v"}, ValueError, r"prediction must be one of \['eps', 'x0'\]"),
        ({"variance": "fixed_small"}, ValueError, "variance must be left out: the network learned one"),
        ({"low_res_size": 8}, ValueError, "low_res_size must be left out"),
        ({"num_blocks": 4}, ValueError, r"num_blocks must be among \[1\]"),
        ({"depth": 4}, TypeError, r"flags must be among .*got \['depth'\]"),
    ],
    ids=str,
)
def test_wrong_flags_are_named(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    refused(match, state_of("adm"), error, **flags_of(NETWORKS["adm"], **changes))


def test_wrong_weights_are_named() -> None:
    state, flags = state_of("adm"), flags_of(NETWORKS["adm"])
    missing = {key: value for key, value in state.items() if key != "middle_block.1.qkv.bias"}
    refused("missing keys: middle_block.1.qkv.bias", missing, **flags)
    refused("unknown keys: stray", state | {"stray": torch.zeros(1)}, **flags)
    shapes = state | {"middle_block.1.norm.weight": torch.zeros(5)}
    refused(r"wrong shapes: middle_block.1.norm.weight \[5\] instead of \[96\]", shapes, **flags)
    refused("not floating-point: out.0.bias", state | {"out.0.bias": torch.zeros(32, dtype=torch.int64)}, **flags)
    refused("time_embed.0.weight must have 2 dimensions .*no such key", {"a": torch.zeros(1)}, **flags)
    refused("input_blocks.0.0.weight must have 4", state | {"input_blocks.0.0.weight": torch.zeros(2, 2)}, **flags)
    empty = state | {"time_embed.0.weight": torch.zeros(0, 0)}
    refused(r"time_embed.0.weight must have 2 dimensions .*got \[0, 0\]", empty, **flags)
    none = {key: value for key, value in state.items() if not key.startswith("input_blocks.3.")}
    refused("levels differ", none, **flags)
    many = state | {"input_blocks.999999.0.weight": torch.zeros(1)}
    refused("levels differ", many, **flags)


def test_a_variance_that_was_not_learned_is_not_said_to_be() -> None:
    name = "plain, pools"
    refused("variance must be one of", state_of(name), **flags_of(NETWORKS[name], variance="learned_range"))


def test_many_keys_take_no_long_time() -> None:
    state = {f"input_blocks.{i}.0.in_layers.2.weight": torch.zeros(4, 4, 1, 1) for i in range(1, 7560)}
    state |= {key: value for key, value in state_of("adm").items() if key not in state}
    began = time.perf_counter()
    refused("levels differ", state, **flags_of(NETWORKS["adm"]))
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(("width", "channels"), [(480, 352), (96, 64), (32, 64), (7, 3), (1, 3), (999, 1000)])
def test_a_width_is_its_multiple_of_the_channels(width: int, channels: int) -> None:
    multiple = channel_multiple(width, channels)
    assert int(multiple * channels) == width and multiple == pytest.approx(width / channels)


def test_networks_that_guided_diffusion_cannot_hold() -> None:
    with pytest.raises(TypeError, match="network must be a UNet, SuperResolutionUNet or EncoderUNet, got Linear"):
        state_to_guided_diffusion(torch.nn.Linear(2, 2), "new")
    fields: dict[str, Any] = {"channel_mult": (1,), "num_blocks": 1, "attention_resolutions": ()}
    small = UNet(UNetConfig(image_size=8, channels=16, head_channels=8, groups=4, **fields))
    with pytest.raises(ValueError, match="network must have groups=32 for guided-diffusion, got 4"):
        state_to_guided_diffusion(small, "new")
    with pytest.raises(ValueError, match="attention_order must be one of"):
        state_to_guided_diffusion(model_from_guided_diffusion(state_of("adm"), **flags_of(NETWORKS["adm"])).network, "")


def test_the_table_has_a_command_and_the_facts_of_every_published_network() -> None:
    table = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text().splitlines()
    for entry in PUBLISHED:
        rows = [row for row in table if any(f"`{file}`" in row for file in entry.files) and row.startswith("|")]
        assert sum(f"`{file}`" in row for row in rows for file in entry.files) == len(entry.files)
        for row in rows:
            files, command, facts = row.strip("| ").split(" | ")
            assert command.startswith(f"`fastdiff convert {files.split('`')[1]} ") and f"`{entry.name}`" in facts
        told = next(row for row in rows if f"`{entry.name}`: " in row)
        facts = told.split(f"`{entry.name}`: ")[1]
        if entry.name != "adm-256-uncond":
            assert entry.schedule in facts and f"{entry.attention_order} order" in facts
            assert str(entry.dtype).removeprefix("torch.") in facts
            assert ("T = 4000" in facts) == (entry.num_train_timesteps == 4000)
            assert ("times rescaled" in facts) == entry.rescale_timesteps
