"""fastdiff's own checkpoints and their manifests"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
from typing import Any

import numpy as np
import torch

from fastdiff import checkpoint, loading
from fastdiff.checkpoint import CheckpointError
from fastdiff.manifest import Manifest
from fastdiff.schedule import Schedule

from .. import checkpoints
from .blobs import mutated_bytes, mutated_safetensors
from .harness import Case, Target
from .inputs import Files, assert_same_state, exact, files_of, header_told, placed, told, tree_told, weights_in
from .trees import mutated_text

__all__ = ["targets"]


@functools.cache
def native_files() -> tuple[Files, ...]:
    betas = checkpoints.digits(2, schedule=Schedule(np.array([0.1, 0.2, 0.3])), prediction="v", dtype=torch.float16)
    wide = checkpoints.digits(3, name="é", provenance={"x": [1, {"y": 0.5}]}, variance="fixed_large")
    return tuple(files_of(model) for model in (checkpoints.MODEL, betas, wide))


@functools.cache
def classifier_files() -> tuple[Files, ...]:
    return (files_of(checkpoints.judge()),)


def completed(text: bytes) -> dict[str, Any]:
    """A config with what older files leave out"""
    config = tree_told(text)
    config["network"].setdefault("time_scale", 1.0)
    schedule = config.get("diffusion", config.get("classifier", {})).get("schedule", {})
    if "betas" in schedule:
        # 1 is as good as 1.0
        schedule["betas"] = [float(beta) for beta in schedule["betas"]]
    return config


def judge_native(case: Case, model: Any) -> str:
    files = case.mutated
    config = completed(files["config.json"])
    weights = files[config["weights"]["file"]]
    assert hashlib.sha256(weights).hexdigest() == config["weights"]["sha256"], "the weights have another hash"
    written = json.loads(Manifest.written(model, checkpoint.kind_of(model), weights))
    assert exact(written) == exact(config), f"the config says otherwise: {written}"
    state = {key: value.to(model.dtype or value.dtype) for key, value in told(weights).items()}
    assert_same_state(model.network.state_dict(), state)
    before = case.original
    same = weights == before[weights_in(before)] and exact(config) == exact(completed(before["config.json"]))
    return "same" if same else "as told"


def judge_info(case: Case, facts: dict[str, Any]) -> str:
    config = tree_told(case.mutated["config.json"])
    weights = case.mutated[config["weights"]["file"]]
    assert exact(facts["config"]) == exact(config)
    assert (facts["sha256"], facts["bytes"]) == (hashlib.sha256(weights).hexdigest(), len(weights))
    assert facts["parameters"] == sum(math.prod(fields["shape"]) for fields in header_told(weights)[0].values())
    return "same" if case.mutated == case.original else "as told"


def other_weights(rng: random.Random, files: Files) -> tuple[str, Files]:
    """Under the hash of those that were there"""
    name = weights_in(files)
    mutator, data = mutated_safetensors(rng, files[name])
    return mutator, {**files, name: data}


def honest_weights(rng: random.Random, files: Files) -> tuple[str, Files]:
    """Under a hash of their own: who means harm can count"""
    mutator, data = mutated_safetensors(rng, files[weights_in(files)])
    config, digest = json.loads(files["config.json"]), hashlib.sha256(data).hexdigest()
    name = f"model-{digest[:12]}.safetensors"
    config["weights"] = {"file": name, "sha256": digest, "bytes": len(data)}
    return mutator, {"config.json": json.dumps(config).encode(), name: data}


def other_config(rng: random.Random, files: Files) -> tuple[str, Files]:
    if rng.random() < 0.3:
        mutator, data = mutated_bytes(rng, files["config.json"])
    else:
        mutator, data = mutated_text(rng, json.loads(files["config.json"]))
    return mutator, {**files, "config.json": data}


def other_folder(rng: random.Random, files: Files) -> tuple[str, Files]:
    """Files of two checkpoints, under each other's names"""
    other = rng.choice((*native_files(), *classifier_files()))
    mine, theirs = weights_in(files), weights_in(other)
    options: dict[str, Files] = {
        "their config": {**files, "config.json": other["config.json"]},
        "their weights": {**files, mine: other[theirs]},
        "their config and weights": {"config.json": other["config.json"], mine: other[theirs]},
        "both": {**other, **files},
        "no config": {mine: files[mine]},
        "no weights": {"config.json": files["config.json"]},
        "exchanged": {"config.json": files[mine], mine: files["config.json"]},
        "a folder for weights": {"config.json": files["config.json"], f"{mine}/x": b""},
        "nothing": {"x": b""},
    }
    name = rng.choice(sorted(options))
    return name, options[name]


def own_target(
    name: str, kind: str, mutate: Any, *, load: Any = checkpoint.load, judge: Any = judge_native, of: Any = native_files
) -> Target:
    def make(rng: random.Random) -> Case:
        files = rng.choice(of())
        mutator, mutated = mutate(rng, files)
        return Case(mutator, files, mutated)

    return Target(name, kind, make, lambda files: load(placed(files)), judge, (CheckpointError,), of())


def manifest_target() -> Target:
    """The manifest alone, whose errors nobody translates"""

    def make(rng: random.Random) -> Case:
        files = rng.choice((*native_files(), *classifier_files()))
        mutator, mutated = other_config(rng, files)
        return Case(mutator, files["config.json"], mutated["config.json"])

    def judge(case: Case, manifest: Manifest) -> str:
        config, network = completed(case.mutated), manifest.blueprint.network.to_dict()
        assert exact(manifest.config) == exact(tree_told(case.mutated))
        assert exact(config["network"]) == exact({"type": manifest.blueprint.kind, **network})
        weights = config["weights"]
        assert (manifest.file, manifest.sha256, manifest.size) == (weights["file"], weights["sha256"], weights["bytes"])
        return "same" if exact(config) == exact(completed(case.original)) else "as told"

    whole = [files["config.json"] for files in (*native_files(), *classifier_files())]
    return Target("native-manifest", "config", make, Manifest.parse, judge, (ValueError, TypeError), whole)


def targets() -> list[Target]:
    classifier = {"load": checkpoint.load_classifier, "of": classifier_files}
    return [
        own_target("native-folder", "native", other_folder),
        own_target("native-door", "native", other_config, load=loading.load),
        own_target("native-info", "native", other_folder, load=checkpoint.info, judge=judge_info),
        own_target("native-weights", "weights", other_weights),
        own_target("native-weights-honest", "weights", honest_weights),
        own_target("native-weights-info", "weights", honest_weights, load=checkpoint.info, judge=judge_info),
        own_target("native-config", "config", other_config),
        manifest_target(),
        own_target("classifier-weights", "weights", honest_weights, **classifier),
        own_target("classifier-config", "config", other_config, **classifier),
    ]
