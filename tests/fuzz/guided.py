"""Files of guided-diffusion: safetensors, zips and pickles of torch.save, names and shapes of state dicts, flags"""

from __future__ import annotations

import functools
import hashlib
import io
import random
import zipfile
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch

from fastdiff import loading
from fastdiff.checkpoint import CheckpointError
from fastdiff.convert.guided_diffusion import state_to_guided_diffusion
from fastdiff.model import EncoderConfig, EncoderUNet, SuperResolutionConfig, SuperResolutionUNet, UNet, UNetConfig
from fastdiff.placement import DTYPES

from .. import checkpoints
from .archives import mutated_archive, mutated_legacy, saved
from .blobs import mutated_safetensors
from .harness import Case, Target
from .inputs import State, assert_same_state, exact, placed, scratch, told
from .trees import mutated_tree

__all__ = ["targets"]

GUIDED: dict[str, Any] = dict(image_size=8, channels=32, channel_mult=(1, 2), num_blocks=1, num_heads=2)
GUIDED |= dict(attention_resolutions=(4,), head_channels=None)
ONE_LEVEL: dict[str, Any] = dict(channel_mult=(1,), attention_resolutions=())
FLAGS: dict[str, Any] = dict(image_size=8, num_heads=2, attention_order="legacy", schedule="linear")
FLAGS |= dict(num_train_timesteps=1000, rescale_timesteps=False, dtype="float32")


@functools.cache
def guided_states() -> dict[str, tuple[State, dict[str, Any]]]:
    """By name: a state dict in half precision, which is quicker to read, and flags"""
    unet = UNet(UNetConfig(out_channels=6, num_labels=5, **GUIDED))
    plain = UNet(UNetConfig(**GUIDED | ONE_LEVEL | dict(scale_shift=False)))
    small = dict(low_res_size=4, low_res_channels=3, resblock_updown=False)
    upsampler = SuperResolutionUNet(SuperResolutionConfig(**GUIDED | ONE_LEVEL | small))
    encoder = EncoderUNet(EncoderConfig(out_channels=5, **GUIDED | ONE_LEVEL))
    networks = {
        "unet": (unet, {}),
        "plain": (plain, {}),
        "upsampler": (upsampler, {"low_res_size": 4}),
        "encoder": (encoder, {}),
    }
    return {
        name: (
            state_to_guided_diffusion(checkpoints.filled(network, 0).half(), "legacy"),
            FLAGS | flags,
        )
        for name, (network, flags) in networks.items()
    }


def flags_of(tree: dict[str, Any]) -> dict[str, Any]:
    dtype = tree.get("dtype")
    return {**tree, "dtype": DTYPES[dtype]} if isinstance(dtype, str) and dtype in DTYPES else tree


def load_guided(case: tuple[str, str, bytes]) -> Any:
    """case: whose flags, the file's name, its bytes"""
    name, file, data = case
    read = loading.load_classifier if name == "encoder" else loading.load
    return read(placed({file: data}) / file, **flags_of(guided_states()[name][1]), allow_nonfinite=True)


def judge_guided(case: Case, model: Any) -> str:
    name, file, data = case.mutated
    state = told(data) if file.endswith(".safetensors") else torch.load(io.BytesIO(data), "cpu", weights_only=True)
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.testzip() is None, "a checksum is another's"
            assert data[-22 - len(archive.comment) :].startswith(b"PK\x05\x06"), "something follows the archive"
    assert_same_state(
        state_to_guided_diffusion(model.network, "legacy"), {key: value.float() for key, value in state.items()}
    )
    assert {value.dtype for value in model.network.state_dict().values()} == {torch.float32}
    assert model.provenance["sha256"] == hashlib.sha256(data).hexdigest(), "provenance tells another hash"
    original = guided_states()[name][0]
    if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in original.items()}:
        return "as told"
    expected = load_whole(name).network.config
    assert model.network.config == expected, f"config {model.network.config}"
    # bits of the payload that nobody can see
    return "same" if all(torch.equal(state[key], original[key]) for key in original) else "as told"


@functools.cache
def load_whole(name: str) -> Any:
    return load_guided((name, "model.safetensors", safetensors.torch.save(guided_states()[name][0])))


FORMATS: dict[str, tuple[str, Callable[[State], bytes], Callable[[random.Random, bytes], tuple[str, bytes]]]] = {
    "safetensors": ("model.safetensors", safetensors.torch.save, mutated_safetensors),
    "pt": ("model.pt", saved, mutated_archive),
    "pt-legacy": ("model.pt", functools.partial(saved, legacy=True), mutated_legacy),
}


@functools.cache
def guided_file(format: str, name: str) -> bytes:
    return FORMATS[format][1](guided_states()[name][0])


def guided_target(format: str) -> Target:
    file, _, mutate = FORMATS[format]

    def make(rng: random.Random) -> Case:
        name = rng.choice(sorted(guided_states()))
        mutator, data = mutate(rng, guided_file(format, name))
        return Case(mutator, (name, file, guided_file(format, name)), (name, file, data))

    whole = [(name, file, guided_file(format, name)) for name in guided_states()]
    return Target(f"guided-{format}", "guided", make, load_guided, judge_guided, (CheckpointError,), whole)


def other_state(rng: random.Random, state: State) -> tuple[str, State]:
    """Names and shapes of another network, or of none"""
    state, keys = dict(state), sorted(state)
    one, two = rng.sample(keys, 2)
    block = rng.choice(sorted({".".join(key.split(".")[:2]) for key in keys}))
    kind = rng.choice(("drop", "rename", "drop block", "move block", "copy block", "exchange", "grow", "cut", "dtype"))
    if kind == "drop":
        del state[one]
    elif kind == "rename":
        names = (
            f"module.{one}",
            one.replace("0", "1", 1),
            one.replace("1", "999999", 1),
            one.upper(),
            "",
            two,
            f"{one}.x",
        )
        state[rng.choice((*names, one.replace("blocks.", "blocks.0", 1), one.replace("blocks.", "blocks.-")))] = (
            state.pop(one)
        )
    elif kind.endswith("block"):
        to = rng.choice(
            ("input_blocks.1", "input_blocks.2", "input_blocks.9", "output_blocks.0", "middle_block.3", "out.2")
        )
        for key in keys:
            if key.startswith(f"{block}."):
                value = state[key] if kind == "copy block" else state.pop(key)
                if kind != "drop block":
                    state[to + key.removeprefix(block)] = value.clone()
    elif kind == "exchange":
        state[one], state[two] = state[two], state[one]
    elif kind == "grow":
        state[one] = torch.cat([state[one]] * 2, rng.randrange(state[one].ndim))
    elif kind == "cut":
        axis = rng.randrange(state[one].ndim)
        state[one] = state[one].narrow(axis, 0, rng.choice((0, 1, state[one].shape[axis] // 2))).contiguous()
    else:
        state[one] = state[one].to(rng.choice((torch.float32, torch.bfloat16, torch.int8, torch.bool)))
    return kind, state


def state_target() -> Target:
    def make(rng: random.Random) -> Case:
        name = rng.choice(sorted(guided_states()))
        mutator, state = other_state(rng, guided_states()[name][0])
        original, data = guided_file("safetensors", name), safetensors.torch.save(state)
        return Case(mutator, (name, "model.safetensors", original), (name, "model.safetensors", data))

    return Target("guided-state", "guided", make, load_guided, judge_guided, (CheckpointError,))


def load_flagged(flags: Any) -> Any:
    file = scratch() / "flagged.safetensors"
    if not file.exists():
        file.write_bytes(guided_file("safetensors", "unet"))
    return loading.load(file, **flags_of(flags))


def judge_flags(case: Case, model: Any) -> str:
    config, schedule = model.network.config, model.schedule
    found = {
        "image_size": config.image_size,
        "num_heads": config.num_heads,
        "head_channels": config.head_channels,
        "attention_order": model.provenance["attention_order"],
        "schedule": schedule.name,
        "num_train_timesteps": schedule.num_train_timesteps,
        "rescale_timesteps": config.time_scale == 1000 / schedule.num_train_timesteps,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prediction": model.prediction,
        "variance": model.variance,
        "num_classes": model.num_classes,
        "num_blocks": config.num_blocks,
        "image_channels": config.in_channels,
        "name": model.name if isinstance(model.name, str) else None,
    }
    if schedule.num_train_timesteps == 1000:
        # both are one
        found["rescale_timesteps"] = case.mutated.get("rescale_timesteps")
    # a learned variance leaves no choice
    found["variance"] = case.mutated.get("variance") or found["variance"]
    for key, value in case.mutated.items():
        assert value is None or exact(found.get(key)) == exact(value), f"{key} is {found.get(key)!r} and not {value!r}"
    return "same" if exact(case.mutated) == exact(case.original) else "as told"


def flags_target() -> Target:
    more = dict(prediction="eps", num_classes=5, num_blocks=1, image_channels=3)

    def make(rng: random.Random) -> Case:
        flags = FLAGS | {key: more[key] for key in more if rng.random() < 0.5}
        mutator, mutated = mutated_tree(rng, flags)
        mutated = mutated if isinstance(mutated, dict) and all(isinstance(key, str) for key in mutated) else flags
        for taken in ("src", "device", "allow_nonfinite"):
            mutated.pop(taken, None)
        return Case(mutator, flags, mutated)

    return Target("guided-flags", "guided", make, load_flagged, judge_flags, (ValueError, TypeError), [FLAGS])


def targets() -> list[Target]:
    return [*map(guided_target, FORMATS), state_target(), flags_target()]
