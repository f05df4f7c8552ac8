"""Configs of diffusers' networks and schedulers, which diffusers itself judges, and folders of its pipelines"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import safetensors.torch
import torch

from fastdiff import loading
from fastdiff.checkpoint import CheckpointError
from fastdiff.convert.diffusers import unet_from_diffusers, unet_to_diffusers
from fastdiff.convert.diffusers_folder import save_folder
from fastdiff.convert.schedulers import SchedulerFacts, scheduler_from_diffusers, scheduler_to_diffusers
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.integrations.diffusers import dit_model
from fastdiff.model import UNet, UNetConfig
from fastdiff.schedule import timesteps

from .. import checkpoints
from .blobs import mutated_bytes, mutated_safetensors
from .harness import Case, Target
from .inputs import Files, State, assert_same_state, exact, placed, scratch, told, tree_told
from .trees import mutated_text, mutated_tree

__all__ = ["targets"]

diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SMALL: dict[str, Any] = dict(image_size=8, in_channels=1, out_channels=1, channels=8, num_blocks=1, groups=4)
SMALL |= dict(num_heads=None, head_channels=4, num_labels=3)


@functools.cache
def networks() -> tuple[UNet, ...]:
    updown = UNet(UNetConfig(**SMALL, channel_mult=(1, 2), attention_resolutions=(4,)))
    plain = UNetConfig(**SMALL, channel_mult=(1,), attention_resolutions=(8,), resblock_updown=False, scale_shift=False)
    return tuple(checkpoints.filled(network, 0) for network in (updown, UNet(plain)))


@functools.cache
def configs() -> tuple[tuple[dict[str, Any], State], ...]:
    made = map(unet_to_diffusers, networks())
    return tuple((json.loads(json.dumps(config)), state) for config, state in made)


def outputs(network: Any, config: dict[str, Any], *, theirs: bool) -> torch.Tensor:
    """Of two images at two times"""
    generator = torch.Generator().manual_seed(0)
    size = config.get("sample_size")
    height, width = size if isinstance(size, list) else (size, size)
    x = torch.randn(2, networks()[0].config.in_channels, min(height, 16), min(width, 16), generator=generator)
    t, y = torch.tensor([3.0, 700.0]), torch.tensor([0, 2])
    with torch.no_grad():
        return network(x, t, y).sample if theirs else network(x, t, y)


def judge_unet(case: Case, unet: Any) -> str:
    which, config = case.mutated
    if exact(config) == exact(case.original[1]):
        return "same"
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        peer = diffusers.UNet2DModel(**given).eval()
        peer.load_state_dict(configs()[which][1])
    except Exception as error:
        raise AssertionError(f"diffusers refuses it: {type(error).__name__} {str(error)[:200]}") from error
    ours, theirs = outputs(unet, given, theirs=False), outputs(peer, given, theirs=True)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert unet.config.dropout == given.get("dropout", 0), f"dropout is {unet.config.dropout}"
    return "as told"


def unet_target() -> Target:
    def make(rng: random.Random) -> Case:
        which = rng.randrange(len(configs()))
        mutator, mutated = mutated_tree(rng, configs()[which][0])
        return Case(mutator, (which, configs()[which][0]), (which, mutated))

    def load(case: tuple[int, Any]) -> Any:
        return unet_from_diffusers(case[1], configs()[case[0]][1])

    whole = [(i, config) for i, (config, _) in enumerate(configs())]
    return Target("diffusers-unet", "diffusers", make, load, judge_unet, (ValueError, TypeError), whole)


@functools.cache
def schedulers() -> tuple[dict[str, Any], ...]:
    DDPM, DDIM = diffusers.DDPMScheduler, diffusers.DDIMScheduler
    made = (
        DDPM(),
        DDIM(timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        DDIM(beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False, clip_sample=False),
        DDPM(num_train_timesteps=4, trained_betas=[0.1, 0.2, 0.3, 0.4], timestep_spacing="linspace"),
        DDPM(beta_schedule="squaredcos_cap_v2", variance_type="fixed_large", clip_sample_range=2.0),
    )
    return tuple(json.loads(scheduler.to_json_string()) for scheduler in made)


def judge_scheduler(case: Case, facts: SchedulerFacts) -> str:
    config, T = case.mutated, facts.schedule.num_train_timesteps
    assert T <= 2**20
    try:
        # what begins with _ is for its own notes
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        peer = getattr(diffusers, config["_class_name"].removeprefix("Fused")).from_config(given)
        count = min(T, 10)
        peer.set_timesteps(count)
    except Exception as error:
        # theirs takes no more steps than it likes; what fastdiff would take is its own affair
        raise AssertionError(f"diffusers refuses it: {type(error).__name__} {str(error)[:200]}") from error
    theirs = peer.alphas_cumprod.double().numpy()
    # their float32 ends in 0 / 0 where a long chain is rescaled
    known = ~np.isnan(theirs)
    np.testing.assert_allclose(facts.schedule.alphas_cumprod[known], theirs[known], rtol=1e-4, atol=1e-5)
    told = peer.config
    assert facts.prediction == PREDICTIONS[told["prediction_type"]]
    assert facts.clip_x0 is told["clip_sample"]
    assert facts.solver.get("x0_max", 1.0) == float(told["clip_sample_range"]) or not facts.clip_x0
    ours = facts.solver
    times = peer.timesteps.tolist()
    try:
        assert list(timesteps(ours["spacing"].replace("N", str(count), 1), T)) == times, f"times are {times}"
    except ValueError:
        # theirs looks them up beyond the end of its table
        assert max(times) >= T, f"times are {times}"
    if ours["name"] == "ddpm":
        assert told["variance_type"].removesuffix("_log") == facts.variance
    else:
        assert isinstance(peer, diffusers.DDIMScheduler) and ours["eps"] == "network"
        assert (ours.get("last", "clean") == "clean") == told["set_alpha_to_one"]
    return "same" if exact(config) == exact(case.original) else "as told"


def scheduler_target() -> Target:
    def make(rng: random.Random) -> Case:
        config = rng.choice(schedulers())
        mutator, mutated = mutated_tree(rng, config)
        return Case(mutator, config, mutated)

    return Target(
        "scheduler", "scheduler", make, scheduler_from_diffusers, judge_scheduler, (ValueError, TypeError), schedulers()
    )


def models() -> tuple[DiffusionModel, ...]:
    common: dict[str, Any] = dict(image_shape=(1, 8, 8))
    facts = [scheduler_from_diffusers(schedulers()[i]) for i in (2, 4)]
    names = ("prediction", "variance", "clip_x0", "solver")
    options = [{name: getattr(fact, name) for name in names} for fact in facts]
    labels = (dict(num_classes=2, null_label=2), dict(num_classes=3, null_label=None))
    return tuple(
        DiffusionModel(network, fact.schedule, **option, **label, **common)
        for network, fact, option, label in zip(networks(), facts, options, labels, strict=True)
    )


WEIGHTS, INDEX = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors.index.json"


@functools.cache
def folders() -> tuple[Files, ...]:
    """Pipelines with one file of weights and with two"""
    made = []
    for model in models():
        folder = scratch() / "pipeline"
        shutil.rmtree(folder, ignore_errors=True)
        save_folder(model, folder)
        made.append(
            {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        )
    return made[0], unhashed(made[1]), sharded(unhashed(made[0]))


def unhashed(files: Files) -> Files:
    """As diffusers itself writes them, which no hash keeps from being damaged"""
    index = json.loads(files["model_index.json"])
    del index["_fastdiff"]["sha256"]
    return {**files, "model_index.json": json.dumps(index).encode()}


def sharded(files: Files) -> Files:
    state = told(files[WEIGHTS])
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {key: names[i % 2] for i, key in enumerate(state)}
    halves = [(name, {key: state[key] for key in state if where[key] == name}) for name in names]
    parts = {f"unet/{name}": safetensors.torch.save(half) for name, half in halves}
    index = json.dumps({"metadata": {}, "weight_map": where}).encode()
    return {**{name: data for name, data in files.items() if name != WEIGHTS}, **parts, INDEX: index}


def other_files(rng: random.Random, files: Files) -> tuple[str, Files]:
    name = rng.choice(sorted(files))
    kind = rng.random()
    if kind < 0.1:
        return "drop", {key: data for key, data in files.items() if key != name}
    if kind < 0.2:
        other = rng.choice(folders())
        return "another's", {**files, name: other.get(name, b"")}
    if kind < 0.25:
        two = rng.choice(sorted(files))
        return "exchange", {**files, name: files[two], two: files[name]}
    if name.endswith(".json"):
        change = mutated_bytes if rng.random() < 0.3 else lambda rng, data: mutated_text(rng, json.loads(data))
    else:
        change = mutated_safetensors
    mutator, data = change(rng, files[name])
    return f"{mutator} in {name}", {**files, name: data}


def judge_folder(case: Case, model: DiffusionModel) -> str:
    """Against its parts, each of which has a target of its own"""
    files = case.mutated
    index, config, scheduler = (
        tree_told(files[name]) for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    )
    if INDEX in files:
        where = tree_told(files[INDEX])["weight_map"]
        state = {key: told(files[f"unet/{name}"])[key] for key, name in where.items()}
    else:
        state = told(files[WEIGHTS])
    expected = unet_from_diffusers(config, state)
    assert model.network.config == expected.config
    assert_same_state(model.network.state_dict(), expected.state_dict())
    # a DDIMPipeline makes its scheduler a DDIMScheduler, whatever it was
    kind = "DDIMScheduler" if index.get("_class_name") == "DDIMPipeline" else index["scheduler"][1]
    facts = scheduler_from_diffusers({**scheduler, "_class_name": kind})
    assert np.array_equal(model.schedule.betas, facts.schedule.betas)
    found = (model.prediction, model.clip_x0, model.solver)
    assert found == (facts.prediction, facts.clip_x0, facts.solver), f"{found} and not {facts}"
    rows = config.get("num_class_embeds")
    if sha256 := (index.get("_fastdiff") or {}).get("sha256"):
        assert sha256 == hashlib.sha256(files[WEIGHTS]).hexdigest(), "the weights are not those that were saved"
    labels = index.get("_fastdiff") or {"num_classes": rows, "null_label": None}
    assert (model.num_classes, model.null_label) == (labels["num_classes"], labels["null_label"])
    return "same" if files == case.original else "as told"


def folder_target() -> Target:
    def make(rng: random.Random) -> Case:
        files = rng.choice(folders())
        mutator, mutated = other_files(rng, files)
        return Case(mutator, files, mutated)

    load: Callable[[Files], Any] = lambda files: loading.load(placed(files), allow_nonfinite=True)  # noqa: E731
    return Target("diffusers-folder", "diffusers", make, load, judge_folder, (CheckpointError,), folders())


OPTIONS: dict[str, Any] = dict(num_classes=3, image_size=8, variant=None, weights_file=None, scheduler=None)


def options_target() -> Target:
    """What a caller says of a folder"""
    options = {**OPTIONS, "scheduler": schedulers()[2]}

    def make(rng: random.Random) -> Case:
        mutator, mutated = mutated_tree(rng, rng.choice((OPTIONS, options)))
        named = isinstance(mutated, dict) and all(isinstance(key, str) for key in mutated)
        mutated = {key: mutated[key] for key in mutated if key not in ("src", "device", "dtype")} if named else OPTIONS
        return Case(mutator, OPTIONS, mutated)

    def load(mutated: dict[str, Any]) -> Any:
        return loading.load(placed(folders()[1]), **mutated)

    def judge(case: Case, model: DiffusionModel) -> str:
        given = {key: value for key, value in case.mutated.items() if value is not None}
        scheduler = given.pop("scheduler", json.loads(folders()[1]["scheduler/scheduler_config.json"]))
        facts = scheduler_from_diffusers(scheduler)
        assert np.array_equal(model.schedule.betas, facts.schedule.betas) and model.solver == facts.solver
        assert exact(model.num_classes) == exact(given.pop("num_classes", 3))
        assert exact(model.image_shape[1]) == exact(given.pop("image_size", 8))
        name = given.pop("weights_file", "diffusion_pytorch_model.safetensors")
        assert list(model.provenance["sha256"]) == [name], f"{name} was asked for"
        given.pop("allow_nonfinite", None)
        assert not given, f"{given} made no difference"
        return "same" if exact(case.mutated) == exact(case.original) else "as told"

    return Target("diffusers-options", "diffusers", make, load, judge, (ValueError, TypeError), [OPTIONS])


@functools.cache
def dit_files() -> Files:
    options: dict[str, Any] = dict(num_attention_heads=2, attention_head_dim=4, in_channels=1, out_channels=2)
    options |= dict(sample_size=4, patch_size=2, num_layers=1, norm_num_groups=4, num_embeds_ada_norm=2)
    latents: dict[str, Any] = dict(in_channels=1, out_channels=1, latent_channels=1, norm_num_groups=4)
    latents |= dict(
        block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",)
    )
    transformer, vae = diffusers.DiTTransformer2DModel(**options), diffusers.AutoencoderKL(**latents)
    folder = scratch() / "dit"
    diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dit_target() -> Target:
    """A network that diffusers itself builds and fills"""

    def make(rng: random.Random) -> Case:
        mutator, mutated = other_files(rng, dit_files())
        return Case(mutator, dit_files(), mutated)

    def judge(case: Case, model: DiffusionModel) -> str:
        files = case.mutated
        weights = told(files["transformer/diffusion_pytorch_model.safetensors"])
        assert_same_state(model.network.transformer.state_dict(), weights)
        assert (model.decode is None) == ("vae" not in tree_told(files["model_index.json"]))
        if model.decode is not None:
            assert_same_state(model.decode.args[0].state_dict(), told(files["vae/diffusion_pytorch_model.safetensors"]))
        config, known = tree_told(files["transformer/config.json"]), model.network.transformer.config
        for key in known.keys() & config.keys():
            assert exact(known[key]) == exact(config[key]), f"{key} is {known[key]} and not {config[key]}"
        facts = scheduler_from_diffusers(
            {**tree_told(files["scheduler/scheduler_config.json"]), "_class_name": "DDIMScheduler"}
        )
        assert np.array_equal(model.schedule.betas, facts.schedule.betas) and model.solver == facts.solver
        return "same" if files == case.original else "as told"

    load: Callable[[Files], Any] = lambda files: dit_model(placed(files), allow_nonfinite=True)  # noqa: E731
    return Target("diffusers-dit", "diffusers", make, load, judge, (CheckpointError,), [dit_files()])


def round_trip_target() -> Target:
    """A scheduler's config, understood and written again, is understood as the same"""

    def make(rng: random.Random) -> Case:
        config = rng.choice(schedulers())
        mutator, mutated = mutated_tree(rng, config)
        return Case(mutator, config, mutated)

    def load(config: Any) -> tuple[SchedulerFacts, SchedulerFacts]:
        facts = scheduler_from_diffusers(config)
        options = dict(variance=facts.variance, clip_x0=facts.clip_x0, solver=facts.solver)
        out = dict(num_classes=None, null_label=None, image_shape=(1, 8, 8))
        model = DiffusionModel(lambda x, t, y: x, facts.schedule, facts.prediction, **options, **out)
        return facts, scheduler_from_diffusers(scheduler_to_diffusers(model))

    def judge(case: Case, both: tuple[SchedulerFacts, SchedulerFacts]) -> str:
        first, second = both
        assert np.array_equal(first.schedule.betas, second.schedule.betas)
        for key in ("prediction", "clip_x0", "solver"):
            assert getattr(first, key) == getattr(second, key), f"{key}: {getattr(first, key)} {getattr(second, key)}"
        return "same" if exact(case.mutated) == exact(case.original) else "as told"

    return Target("scheduler-round-trip", "scheduler", make, load, judge, (ValueError, TypeError), schedulers())


def targets() -> list[Target]:
    return [
        *(unet_target(), folder_target(), options_target(), dit_target()),
        *(scheduler_target(), round_trip_target()),
    ]
