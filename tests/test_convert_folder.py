"""Folders of diffusers, read: sampled as the stock pipeline samples, and damage is named"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import PNG, assert_same_model, header_of, refused, with_header
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    PNDMScheduler,
    UNet2DModel,
)
from pipeline_cases import FILES, SHAPE, TOLERANCE, WEIGHTS, edit, pipeline
from reference.networks import randomness
from test_checkpoint_damage import Touch

import fastdiff
from fastdiff import DiffusionModel
from fastdiff.checkpoint import CheckpointError
from fastdiff.convert.diffusers_folder import load_folder, network_class
from fastdiff.integrations.diffusers import unet_model
from fastdiff.placement import runnable_dtype


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pipeline(DDPMScheduler(), num_class_embeds=11).save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


SCHEDULERS = {
    "ddim": DDIMScheduler(),
    "ddim-cosine-v": DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    "ddim-trailing-not-clipped": DDIMScheduler(
        timestep_spacing="trailing", prediction_type="sample", clip_sample=False
    ),
    "ddim-offset": DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False),
    "ddpm": DDPMScheduler(),
    "ddpm-large-linspace": DDPMScheduler(variance_type="fixed_large", timestep_spacing="linspace"),
    "ddpm-learned": DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_loaded_pipeline_samples_what_it_samples(name: str, tmp_path: Path) -> None:
    steps, N = 12, 2
    pipe = pipeline(SCHEDULERS[name], out_channels=6 if name == "ddpm-learned" else 3)
    pipe.save_pretrained(tmp_path)
    theirs = pipe(N, torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="pt").images

    generator = torch.Generator().manual_seed(0)
    x_T, *noise = (torch.randn(N, *SHAPE, generator=generator) for _ in range(steps + 1))
    stochastic = name.startswith("ddpm")
    model = load_folder(tmp_path)
    ours = fastdiff.sample(
        model,
        num_images=N,
        steps=steps,
        x_T=x_T,
        noise=torch.stack(noise) if stochastic else None,
        dtype="float32",
    )
    assert theirs.std() > 0.1
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=TOLERANCE)


def test_labels_and_guidance_of_a_loaded_folder(tmp_path: Path) -> None:
    scheduler, steps, w = DDIMScheduler(), 10, 1.5
    pipeline(scheduler, num_class_embeds=11).save_pretrained(tmp_path)
    network, y = UNet2DModel.from_pretrained(tmp_path / "unet"), torch.tensor([3, 0, 9])
    x_T = randomness(0, 3, SHAPE)[0].float()
    x, null = x_T, torch.full_like(y, 10)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = (1 + w) * network(x, t, y).sample - w * network(x, t, null).sample
            x = scheduler.step(eps, t, x).prev_sample
    images = fastdiff.sample(load_folder(tmp_path, num_classes=10), y, w, steps=steps, x_T=x_T, dtype="float32")
    # guidance enlarges what the tables are off by
    torch.testing.assert_close(images, x, rtol=0, atol=(1 + 2 * w) * TOLERANCE)


def test_a_class_embedding_does_not_tell_its_null_row(folder: Path, tmp_path: Path) -> None:
    labels = {given: load_folder(folder, num_classes=given) for given in (None, 11, 10)}
    assert {given: (m.num_classes, m.null_label) for given, m in labels.items()} == {
        None: (11, None),
        11: (11, None),
        10: (10, 10),
    }
    for wrong in (9, 12, True, "10", 10.5):
        refused(folder, "num_classes must be 11, or 10 with a null label", by=load_folder, num_classes=wrong)
    pipeline(DDPMScheduler()).save_pretrained(tmp_path / "none")
    assert load_folder(tmp_path / "none").num_classes is None
    refused(tmp_path / "none", "num_classes must be None", by=load_folder, num_classes=10)


def test_a_bare_network_needs_a_scheduler(folder: Path, tmp_path: Path) -> None:
    bare, facts = tmp_path / "bare", folder / "scheduler"
    shutil.copytree(folder / "unet", bare)
    refused(bare, "has a network but no scheduler", "give scheduler=", by=load_folder)
    config = {**json.loads((facts / "scheduler_config.json").read_bytes()), "prediction_type": "v_prediction"}
    assert load_folder(bare, scheduler=config).prediction == "v"
    for path in (facts, facts / "scheduler_config.json"):
        assert_same_model(load_folder(bare, scheduler=path), named("bare", load_folder(folder)))
    # in place of a pipeline's, too
    assert load_folder(folder, scheduler=config).prediction == "v"
    with pytest.raises(CheckpointError, match="nowhere"):
        load_folder(bare, scheduler=tmp_path / "nowhere")
    for path in ("a" * 10**4, "\0"):
        with pytest.raises(CheckpointError):
            load_folder(bare, scheduler=path)
    with pytest.raises(
        TypeError, match="scheduler must be a DDPMScheduler or DDIMScheduler, its config or a path, got"
    ):
        load_folder(bare, scheduler=3)
    with pytest.raises(ValueError, match=r"scheduler's _class_name must be 'DDPMScheduler' or .* got 'PNDMScheduler'"):
        load_folder(bare, scheduler=PNDMScheduler())


@pytest.mark.parametrize("made", [DDPMScheduler, DDIMScheduler])
def test_a_scheduler_itself_or_its_pipelines_folder_will_do(made: Any, folder: Path, tmp_path: Path) -> None:
    scheduler = made(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    pipeline(scheduler).save_pretrained(tmp_path / "other")
    models = [
        load_folder(folder, scheduler=given) for given in (scheduler, tmp_path / "other", str(tmp_path / "other"))
    ]
    for model in models:
        assert_same_model(model, models[0])
        assert (model.prediction, model.solver) == ("v", load_folder(tmp_path / "other").solver)
    # as that pipeline is read: its class says which scheduler it makes of the config
    edit(tmp_path / "other" / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    assert load_folder(folder, scheduler=tmp_path / "other").solver["name"] == "ddim"
    (tmp_path / "other" / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"other/scheduler/scheduler_config\.json"):
        load_folder(folder, scheduler=tmp_path / "other")


def named(name: str, model: DiffusionModel) -> DiffusionModel:
    model.name = name
    return model


def test_the_pipelines_class_says_which_scheduler_it_is(folder: Path) -> None:
    """from_pretrained makes the class that model_index.json names of whatever config lies there"""
    assert load_folder(folder).solver["name"] == "ddpm"
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    assert load_folder(folder).solver["name"] == "ddim"
    edit(folder / "model_index.json", scheduler=["diffusers", "DDPMScheduler"], _class_name="DDIMPipeline")
    assert load_folder(folder).solver["name"] == "ddim"
    assert isinstance(DiffusionPipeline.from_pretrained(folder).scheduler, DDIMScheduler)


def test_sizes_of_images(tmp_path: Path) -> None:
    pipeline(DDPMScheduler(), sample_size=(8, 4)).save_pretrained(tmp_path / "oblong")
    assert load_folder(tmp_path / "oblong").image_shape == (3, 8, 4)
    pipeline(DDPMScheduler(), sample_size=None).save_pretrained(tmp_path / "any")
    refused(tmp_path / "any", "unet/config.json", "sample_size must be given", by=load_folder)
    assert load_folder(tmp_path / "any", image_size=16).image_shape == (3, 16, 16)


def test_what_returns_too_few_or_too_many_channels(tmp_path: Path) -> None:
    learned = DDPMScheduler(variance_type="learned_range")
    for name, scheduler, channels in (("few", learned, 3), ("many", DDPMScheduler(), 6), ("odd", DDIMScheduler(), 5)):
        pipeline(scheduler, out_channels=channels).save_pretrained(tmp_path / name)
        refused(tmp_path / name, "out_channels must be in_channels=3", by=load_folder)
    # what DDIMScheduler does not take, fastdiff's ddim does
    pipeline(DDIMScheduler(), out_channels=6).save_pretrained(tmp_path / "ddim")
    assert load_folder(tmp_path / "ddim").variance == "learned_range"


def test_device_dtype_and_state_of_the_network(folder: Path) -> None:
    state = torch.random.get_rng_state()
    model = load_folder(folder, dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.network.training
    assert model.network.conv_first.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_folder(folder, dtype=torch.int8)
    with pytest.raises(ValueError, match="device must be one of"):
        load_folder(folder, device="tpu")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_dtype_it_is_that_of_the_stored_weights(stored: torch.dtype, folder: Path) -> None:
    """A pipeline computes in it, and so does fastdiff, whatever the device would be fastest in"""
    UNet2DModel.from_pretrained(folder / "unet").to(stored).save_pretrained(folder / "unet")
    model = fastdiff.load(folder)
    run = runnable_dtype(stored, torch.device("cpu"))
    assert model.dtype == stored and {p.dtype for p in model.parameters()} == {run}
    assert fastdiff.Sampler(model, steps=2, device="cpu").dtype == run


def test_variants_and_shards(folder: Path) -> None:
    expected = load_folder(folder).network.state_dict()
    network = UNet2DModel.from_pretrained(folder / "unet")
    (folder / WEIGHTS).unlink()
    network.save_pretrained(folder / "unet", max_shard_size="20KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 2
    loaded = load_folder(folder).network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())

    refused(folder / "unet", "has no diffusion_pytorch_model.fp16.safetensors", "variant=", by=by_fp16)
    network.half().save_pretrained(folder / "unet", variant="fp16")
    halves = by_fp16(folder).network
    assert by_fp16(folder).dtype == torch.float16
    network.save_pretrained(folder / "unet", variant="fp16", max_shard_size="10KB")
    assert (folder / "unet/diffusion_pytorch_model.safetensors.index.fp16.json").exists()
    assert all(
        torch.equal(value, halves.state_dict()[key]) for key, value in by_fp16(folder).network.state_dict().items()
    )
    for wrong in ("../fp16", "", 16):
        with pytest.raises(ValueError, match="variant must be a word"):
            load_folder(folder, variant=wrong)  # type: ignore[arg-type]


def by_fp16(path: Path) -> DiffusionModel:
    return load_folder(path.parent if path.name == "unet" else path, variant="fp16")


SHARD_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "outside": (lambda files: {**files, "conv_in.bias": "../secret.safetensors"}, "files of this folder"),
    "absolute": (lambda files: {**files, "conv_in.bias": "/etc/passwd.safetensors"}, "files of this folder"),
    "backslash": (lambda files: {**files, "conv_in.bias": "..\\secret.safetensors"}, "files of this folder"),
    "pickle": (lambda files: {**files, "conv_in.bias": "weights.bin"}, "files of this folder"),
    "hidden": (lambda files: {**files, "conv_in.bias": ".safetensors"}, "files of this folder"),
    "absent": (lambda files: {**files, "conv_in.bias": "absent.safetensors"}, "absent.safetensors"),
    "key elsewhere": (lambda files: {**files, "conv_in.bias": files["conv_out.bias"]}, "conv_in.bias"),
    "key left out": (lambda files: {key: files[key] for key in files if key != "conv_in.bias"}, "conv_in.bias"),
    "numbers": (lambda files: dict.fromkeys(files, 1), "weight_map"),
    "list": (lambda files: list(files), "weight_map"),
    "empty": (lambda files: {}, "weight_map"),
    "none": (lambda files: ..., "weight_map"),
}


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_an_index_names_files_of_its_folder_and_what_is_in_them(fault: str, folder: Path) -> None:
    change, word = SHARD_FAULTS[fault]
    network = UNet2DModel.from_pretrained(folder / "unet")
    (folder / WEIGHTS).unlink()
    network.save_pretrained(folder / "unet", max_shard_size="20KB")
    shutil.copy(next((folder / "unet").glob("*-00001-*")), folder / "secret.safetensors")
    index = folder / f"{WEIGHTS}.index.json"
    edit(index, weight_map=change(json.loads(index.read_bytes())["weight_map"]))
    refused(folder, word, by=load_folder)


def test_a_pickle_is_read_only_by_name_and_never_executed(folder: Path, tmp_path: Path) -> None:
    expected = load_folder(folder).network.state_dict()
    network = UNet2DModel.from_pretrained(folder / "unet")
    (folder / WEIGHTS).unlink()
    network.save_pretrained(folder / "unet", safe_serialization=False)
    refused(folder, "weights_file=", "diffusion_pytorch_model.bin", by=load_folder)
    name = "diffusion_pytorch_model.bin"
    loaded = load_folder(folder, weights_file=name).network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())

    canary = tmp_path / "canary"
    for data in (pickle.dumps(Touch(canary), protocol=2), b"", PNG):
        (folder / "unet" / name).write_bytes(data)
        refused(folder, name, by=load_folder, weights_file=name)
    torch.save({"state": Touch(canary)}, folder / "unet" / name)
    refused(folder, name, by=load_folder, weights_file=name)
    assert not canary.exists()
    for wrong in ("../scheduler/x.bin", "/etc/x.bin", "..", "", "a\\b.bin", 3):
        refused(folder, "weights_file must be the name of a file", by=load_folder, weights_file=wrong)
    refused(folder, "must not both be given", by=load_folder, weights_file=name, variant="fp16")


def test_links_of_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert_same_model(load_folder(snapshot), named("main", load_folder(folder)))
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("nowhere")
    refused(snapshot, WEIGHTS, by=load_folder)


def truncations(data: bytes) -> Iterator[bytes]:
    yield from (b"", data[: len(data) // 2], data[:-2], PNG, pickle.dumps({"a": 1}), b"\xff\xfe" + data)


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named(file: str, folder: Path) -> None:
    path = folder / file
    data = path.read_bytes()
    for damaged in truncations(data):
        path.write_bytes(damaged)
        refused(folder, file, by=load_folder)
    path.unlink()
    refused(folder, "neither" if file == "model_index.json" else file.split("/")[0], by=load_folder)
    path.mkdir()
    refused(folder, file, by=load_folder)
    path.rmdir()
    os.mkfifo(path)
    refused(folder, file, by=load_folder)
    path.unlink()
    path.write_bytes(data)
    load_folder(folder)


@pytest.mark.parametrize("file", FILES[:3])
def test_a_config_is_an_object_with_each_key_once_and_finite_numbers(file: str, folder: Path) -> None:
    path = folder / file
    text = path.read_text().rstrip()
    for damaged in ("[]", "null", "3", "[" * 100_000, text[:-1] + ', "_x": 1, "_x": 1}', text[:-1] + ', "_x": NaN}'):
        path.write_text(damaged)
        refused(folder, file, by=load_folder)
    path.write_text(text + " " * 2**20)
    refused(folder, file, "bytes, at most", by=load_folder)


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another network": ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "must hold a UNet2DModel"),
    "a transformer": (
        "model_index.json",
        {"unet": ..., "transformer": ["diffusers", "DiTTransformer2DModel"]},
        "fastdiff.integrations.diffusers.dit_model",
    ),
    "no network": ("model_index.json", {"unet": ...}, "unet must be a library's and a class's name"),
    "a null network": ("model_index.json", {"unet": [None, None]}, "unet must be a library's and a class's name"),
    "no scheduler": ("model_index.json", {"scheduler": ...}, "scheduler must be a library's"),
    "another scheduler": (
        "model_index.json",
        {"scheduler": ["diffusers", "PNDMScheduler"]},
        "_class_name must be 'DDPMScheduler' or 'DDIMScheduler'",
    ),
    "odd labels": ("model_index.json", {"_fastdiff": {"num_classes": 10}}, "_fastdiff must have"),
    "labels null": ("model_index.json", {"_fastdiff": None}, "_fastdiff must have"),
    "labels and more": (
        "model_index.json",
        {"_fastdiff": {"num_classes": 11, "null_label": None, "colour": 1}},
        "_fastdiff must have",
    ),
    **{
        f"hash {value}": (
            "model_index.json",
            {"_fastdiff": {"num_classes": 11, "null_label": None, "sha256": value}},
            "_fastdiff.sha256 must be 64 hexadecimal digits",
        )
        for value in (None, "a" * 63, "A" * 64, "a" * 64 + "\n", [])
    },
    "labels without rows": ("model_index.json", {"_fastdiff": {"num_classes": 12, "null_label": 12}}, "num_classes=12"),
    "no labels": ("model_index.json", {"_fastdiff": {"num_classes": None, "null_label": None}}, "num_class_embeds=11"),
    "another class": ("unet/config.json", {"_class_name": "VQModel"}, "must hold a UNet2DModel, got 'VQModel'"),
    "class a list": ("unet/config.json", {"_class_name": ["UNet2DModel"]}, "must hold a UNet2DModel"),
    "unknown key": ("unet/config.json", {"colour": 1}, "unknown keys [colour]"),
    "unfit": ("unet/config.json", {"freq_shift": 1}, "freq_shift must be 0"),
    "unfit, remedy": ("unet/config.json", {"norm_eps": 1e-6}, "fastdiff.integrations.diffusers.unet_model"),
    "another width": ("unet/config.json", {"block_out_channels": [8, 24]}, "must have shape"),
    "more blocks": ("unet/config.json", {"layers_per_block": 2}, "lacks keys"),
    "blocks without end": ("unet/config.json", {"layers_per_block": 10**6}, "layers_per_block"),
    "scheduler key": ("scheduler/scheduler_config.json", {"colour": 1}, "colour"),
    "scheduler type": ("scheduler/scheduler_config.json", {"beta_start": "1"}, "beta_start"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_config_that_is_not_exactly_right_is_refused(fault: str, folder: Path) -> None:
    file, changes, word = FAULTS[fault]
    edit(folder / file, **changes)
    assert len(refused(folder, word, by=load_folder)) < 2000


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def test_every_key_and_shape_must_be_the_networks(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    for change, word in (
        (lambda tensors: tensors.pop("conv_in.bias"), "lacks keys [conv_in.bias]"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected keys [extra]"),
        (lambda tensors: tensors.update({"conv_in.bias": torch.zeros(1)}), "must have shape (8,), got (1,)"),
        (lambda tensors: tensors.update({"conv_in.bias": torch.zeros(8).int()}), "one floating-point dtype"),
        (lambda tensors: tensors.clear(), WEIGHTS),
    ):
        change_weights(folder, change)
        assert len(refused(folder, WEIGHTS, word, by=load_folder)) < 2000
        (folder / WEIGHTS).write_bytes(data)
    header, body = header_of(data)
    for field, lie in (("shape", [3]), ("dtype", "F64"), ("data_offsets", [0, 2**62])):
        damaged = {**header, "conv_in.bias": {**header["conv_in.bias"], field: lie}}
        (folder / WEIGHTS).write_bytes(with_header(damaged, body))
        refused(folder, WEIGHTS, by=load_folder)
    for damaged in (data + b"\0", b"\xff" * 8 + data[8:]):
        (folder / WEIGHTS).write_bytes(damaged)
        refused(folder, WEIGHTS, by=load_folder)


def test_nan_weights_are_refused_unless_asked_for(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors["conv_in.bias"].fill_(float("nan")))
    refused(folder, WEIGHTS, "NaN or infinite weights in conv_in.bias", "allow_nonfinite=True", by=load_folder)
    assert load_folder(folder, allow_nonfinite=True).network.conv_first.bias.isnan().all()


def test_what_is_no_folder_of_diffusers(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "nowhere", "is no folder", by=load_folder)
    refused(folder / FILES[0], "is no folder", by=load_folder)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither model_index.json nor config.json", by=load_folder)


def test_the_class_of_a_folders_network(folder: Path) -> None:
    assert network_class(folder) == network_class(folder / "unet") == "UNet2DModel"
    edit(folder / "model_index.json", unet=..., transformer=["diffusers", "DiTTransformer2DModel"])
    assert network_class(folder) == "DiTTransformer2DModel"
    edit(folder / "model_index.json", transformer=...)
    refused(folder, "unet must be a library's and a class's name", by=network_class)
    edit(folder / "unet" / "config.json", _class_name=["UNet2DModel"])
    refused(folder / "unet", "_class_name must be the name", by=network_class)


def test_a_flat_pipeline_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    pipeline(DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path / "pipe")
    flat = tmp_path / "flat"
    shutil.copytree(tmp_path / "pipe" / "unet", flat)
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        shutil.copy(tmp_path / "pipe" / file, flat)
    steps, theirs = 5, DDPMPipeline.from_pretrained(flat)
    theirs.set_progress_bar_config(disable=True)
    images = theirs(1, torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="pt").images
    generator = torch.Generator().manual_seed(0)
    x_T, *noise = (torch.randn(1, *SHAPE, generator=generator) for _ in range(steps + 1))
    options: dict[str, Any] = {"steps": steps, "x_T": x_T, "noise": torch.stack(noise)}
    for by in (fastdiff.load, unet_model):
        ours = fastdiff.sample(by(flat), **options)
        torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), images, rtol=0, atol=TOLERANCE)
    assert_same_model(load_folder(flat), named("flat", load_folder(tmp_path / "pipe")))
    # a folder of its own comes first, whatever lies beside it
    (flat / "unet").mkdir()
    refused(flat, "flat/unet", by=load_folder)
