"""DiT with its VAE, and UNet2DModels that fastdiff's UNet cannot hold: images of diffusers' own pipelines"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoints import refused
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from reference.networks import randomised
from test_sampler_step import NoHostReads

import fastdiff
from fastdiff.convert import unet_from_diffusers
from fastdiff.convert.diffusers_folder import load_folder
from fastdiff.integrations.diffusers import DiTNetwork, UNet2DNetwork, dit_model, unet_model

LATENT, STEPS, N = (4, 8, 8), 8, 2
LABELS = [3, 999]
# their tables are float32: 1000 rounded factors, each off by 2^-24 at most
TOLERANCE = 1000 * 2**-24


def transformer(classes: int = 1000, **changes: Any) -> DiTTransformer2DModel:
    options = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1)
    options |= dict(sample_size=8, patch_size=2, norm_num_groups=4, num_embeds_ada_norm=classes)
    return randomised(DiTTransformer2DModel(**{**options, **changes}))


def autoencoder() -> AutoencoderKL:
    options = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, **options).eval()


def a_dit(scheduler: Any = None, **changes: Any) -> DiTPipeline:
    pipe = DiTPipeline(transformer(**changes), autoencoder(), scheduler or DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    a_dit(classes=10).save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


def x_T(n: int = N, shape: tuple[int, ...] = LATENT) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


def assert_latents(got: torch.Tensor, expected: torch.Tensor, guidance_scale: float = 1.0) -> None:
    """In units of the latents, which random weights drive far; guidance enlarges what the tables are off by"""
    atol = TOLERANCE * (2 * guidance_scale - 1) * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


DIT_SCHEDULERS = {
    "ddim": DDIMScheduler(clip_sample=False),
    "ddim-clipped-trailing": DDIMScheduler(timestep_spacing="trailing"),
    "ddpm-variance-dropped": DDPMScheduler(clip_sample=False),
}


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
@pytest.mark.parametrize("name", DIT_SCHEDULERS)
def test_a_dit_samples_what_its_pipeline_samples(
    name: str, guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, latents = a_dit(DIT_SCHEDULERS[name]), []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **options: latents.append(z) or decode(z, **options))
    torch.manual_seed(1)
    theirs = pipe(LABELS, guidance_scale, torch.Generator().manual_seed(0), STEPS, output_type="pt").images
    # they draw for both halves of a guided batch, and keep the first
    torch.manual_seed(1)
    rows = 2 * N if guidance_scale > 1 else N
    noise = torch.stack([torch.randn(rows, *LATENT)[:N] for _ in range(STEPS)])

    model = dit_model(pipe)
    assert model.image_shape == LATENT and (model.num_classes, model.null_label) == (1000, 1000)
    options: dict[str, Any] = {"steps": STEPS, "x_T": x_T(), "noise": noise if name.startswith("ddpm") else None}
    ours = fastdiff.sample(model, LABELS, guidance_scale - 1, **options)
    assert_latents(
        fastdiff.sample(model, LABELS, guidance_scale - 1, decode=False, **options),
        latents[0] * pipe.vae.config.scaling_factor,
        guidance_scale,
    )
    assert ours.shape == (N, 3, 16, 16) and ours.std() > 0.1 and ours.abs().max() <= 1
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=1e-4)


def published_rule(
    network: DiTTransformer2DModel, x: torch.Tensor, t: torch.Tensor, scale: float, guided: int
) -> torch.Tensor:
    """The guided output of a batch whose halves are equal: the first `guided` channels are combined, all others are
    each half's own; what is stepped on is the first half"""
    y = torch.tensor([*LABELS, *[1000] * len(x)])
    out = network(torch.cat([x, x]), t.expand(2 * len(x)), y).sample
    eps, rest = out[:, :guided], out[:, guided:]
    cond, null = eps.chunk(2)
    return torch.cat([null + scale * (cond - null), rest[: len(x)]], dim=1)


@pytest.mark.parametrize("guided", [3, 4])
@pytest.mark.parametrize("learned", [False, True], ids=["ddim", "ddpm, learned variance"])
def test_guidance_of_the_first_channels_is_the_published_one(guided: int, learned: bool) -> None:
    scale = 4.0
    made = (
        DDPMScheduler(clip_sample=False, variance_type="learned_range") if learned else DDIMScheduler(clip_sample=False)
    )
    pipe = a_dit(made)
    made.set_timesteps(STEPS)
    x, drawn, replayed = x_T(), torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for t in made.timesteps:
            out = published_rule(pipe.transformer, x, t, scale, guided)
            x = made.step(out if learned else out[:, :4], t, x, generator=drawn).prev_sample
    noise = torch.stack([torch.randn(N, *LATENT, generator=replayed) for _ in range(STEPS)]) if learned else None
    model = dit_model(pipe, guided_channels=guided)
    assert model.variance == "learned_range"
    ours = fastdiff.sample(model, LABELS, scale - 1, steps=STEPS, x_T=x_T(), noise=noise, decode=False)
    assert_latents(ours, x, scale)


def test_a_dits_folder_is_its_pipeline(folder: Path, tmp_path: Path) -> None:
    pipe, state = DiTPipeline.from_pretrained(folder), torch.random.get_rng_state()
    model, expected = dit_model(folder), dit_model(pipe)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (model.name, model.num_classes, model.null_label) == ("dit", 10, 10)
    options: dict[str, Any] = {"steps": 3, "x_T": x_T()}
    assert torch.equal(fastdiff.sample(model, [0, 9], 2, **options), fastdiff.sample(expected, [0, 9], 2, **options))
    with pytest.raises(ValueError, match="labels"):
        fastdiff.sample(model, 10)

    # what the published ones were saved as
    rename = folder / "model_index.json"
    rename.write_text(rename.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    assert torch.equal(
        fastdiff.sample(dit_model(folder), [0, 9], 2, **options), fastdiff.sample(model, [0, 9], 2, **options)
    )

    digest = hashlib.sha256((folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert model.provenance == {"format": "diffusers", "sha256": {"diffusion_pytorch_model.safetensors": digest}}
    assert expected.provenance == {}

    bare = dit_model(folder / "transformer", scheduler=folder / "scheduler")
    latents = fastdiff.sample(model, [0, 9], 2, decode=False, **options)
    assert bare.decode is None and torch.equal(fastdiff.sample(bare, [0, 9], 2, **options), latents)
    refused(folder / "transformer", "has a network but no scheduler", by=dit_model)
    half = dit_model(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_scheduler_in_place_of_the_sources(tmp_path: Path) -> None:
    pipe = a_dit(DPMSolverMultistepScheduler())
    with pytest.raises(ValueError, match=r"scheduler's _class_name must be 'DDPMScheduler' or .* got 'DPMSolver"):
        dit_model(pipe)
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    for given in (scheduler, {**scheduler.config, "_class_name": "DDIMScheduler"}):
        assert dit_model(pipe, scheduler=given).prediction == "v"
        assert dit_model(pipe.transformer, scheduler=given).decode is None
    with pytest.raises(ValueError, match="scheduler must be given with a DiTTransformer2DModel alone"):
        dit_model(pipe.transformer)
    a_dit(scheduler).save_pretrained(tmp_path)
    assert dit_model(pipe, scheduler=tmp_path).prediction == "v"
    with pytest.raises(TypeError, match="scheduler must be a DDPMScheduler"):
        dit_model(pipe, scheduler=3)


def test_what_is_no_source(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(TypeError, match="source must be a pipeline with a DiTTransformer2DModel as its transformer"):
        dit_model(DDIMPipeline(UNet2DModel(**UNET), DDIMScheduler()))
    with pytest.raises(TypeError, match="source must be a pipeline with a UNet2DModel as its unet"):
        unet_model(a_dit())
    with pytest.raises(ValueError, match="device and variant are for folders"):
        dit_model(a_dit(), device="cpu")
    with pytest.raises(ValueError, match="dtype must be one of"):
        dit_model(a_dit(), dtype=torch.int8)
    with pytest.raises(ValueError, match="out_channels must be in_channels=4"):
        dit_model(a_dit(out_channels=5))
    with pytest.raises(ValueError, match=r"out_channels must be in_channels=4, or 8 where .* 4 and 'learned_range'"):
        dit_model(a_dit(DDPMScheduler(variance_type="learned_range"), out_channels=4))
    with pytest.raises(ValueError, match=r"guided_channels must be an integer in \[1, 4\]"):
        dit_model(a_dit(), guided_channels=5)
    refused(folder, "must hold a UNet2DModel as its unet, got 'DiTTransformer2DModel'", by=unet_model)
    refused(folder, "fastdiff.integrations.diffusers.dit_model", by=load_folder)
    refused(tmp_path / "nowhere", "is no folder", by=dit_model)


def test_sizes_that_no_image_has_are_the_folders_fault(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": -4}))
    refused(folder, by=dit_model)


def test_load_opens_the_folder_of_a_dit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastdiff.load(folder, guided_channels=3)
    assert isinstance(model.network, DiTNetwork) and model.guided_channels == 3 and model.decode is not None
    options = {"steps": 2, "seed": 0, "decode": False}
    assert torch.equal(fastdiff.sample(folder, [1], **options), fastdiff.sample(dit_model(folder), [1], **options))
    with pytest.raises(ValueError, match="attention_order must be left out: a folder of diffusers tells it"):
        fastdiff.load(folder, attention_order="new")
    monkeypatch.setitem(sys.modules, "fastdiff.integrations.diffusers", None)
    refused(folder, "needs diffusers; pip install diffusers", by=fastdiff.load)


def test_latents_are_those_of_an_autoencoder_kl(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("AutoencoderKL", "VQModel"))
    refused(folder, str(index), "vae must be an AutoencoderKL, got 'VQModel'", by=dit_model)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_part_says_which_class_it_is(part: str, folder: Path) -> None:
    """diffusers itself would warn, and make another of it"""
    path = folder / part / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    refused(folder, str(path), "_class_name must be", "got 'UNet2DModel'", by=dit_model)
    path.write_text(json.dumps(config)[:-1] + ', "_class_name": "x"}')
    refused(folder, str(path), "twice", by=dit_model)


def test_a_folder_is_read_strictly(folder: Path) -> None:
    """diffusers itself would leave what is missing random"""
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()

    def damaged(change: Any) -> None:
        tensors = safetensors.torch.load(data)
        change(tensors)
        safetensors.torch.save_file(tensors, weights, {"format": "pt"})

    damaged(lambda tensors: tensors.pop("proj_out_2.bias"))
    refused(folder, "missing keys", "proj_out_2.bias", by=dit_model)
    damaged(lambda tensors: tensors.update(extra=torch.zeros(1)))
    refused(folder, "unexpected keys", "extra", by=dit_model)
    damaged(lambda tensors: tensors.update({"proj_out_2.bias": torch.zeros(3)}))
    refused(folder, "proj_out_2.bias", by=dit_model)
    damaged(lambda tensors: tensors["proj_out_2.bias"].fill_(float("inf")))
    refused(folder, "NaN or infinite weights in proj_out_2.bias", by=dit_model)
    assert dit_model(folder, allow_nonfinite=True).network.transformer.proj_out_2.bias.isinf().all()
    for bad in (b"", data[:-1], data + b"\0"):
        weights.write_bytes(bad)
        refused(folder, "DiTTransformer2DModel.from_pretrained refuses it", by=dit_model)
    weights.unlink()
    torch.save(safetensors.torch.load(data), weights.with_suffix(".bin"))
    refused(folder, "from_pretrained refuses it", by=dit_model)
    weights.write_bytes(data)
    (folder / "vae" / "config.json").write_text("{")
    refused(folder, "vae", by=dit_model)
    shutil.rmtree(folder / "vae")
    refused(folder, "vae", by=dit_model)


UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
# by what fastdiff's UNet cannot be
FOREIGN: dict[str, dict[str, Any]] = {
    "ddpm": {"freq_shift": 1, "flip_sin_to_cos": False, "norm_eps": 1e-6, "downsample_padding": 0},
    "asymmetric": {"up_block_types": ("UpBlock2D", "UpBlock2D")},
    "learned times": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "skips": {
        "block_out_channels": (32, 32),
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    },
    "no middle": {"mid_block_type": None},
    "centred": {"center_input_sample": True},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_unet_that_ours_cannot_hold_runs_as_it_is(name: str, tmp_path: Path) -> None:
    config = {**UNET, **FOREIGN[name]}
    pipe = DDIMPipeline(randomised(UNet2DModel(**config)), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"for fastdiff's UNet|up_block_types"):
        unet_from_diffusers(pipe.unet.config, pipe.unet.state_dict())
    theirs = pipe(N, torch.Generator().manual_seed(0), num_inference_steps=STEPS, output_type="pt").images
    pipe.save_pretrained(tmp_path / "pipe")
    for source in (pipe, tmp_path / "pipe"):
        model = unet_model(source)
        ours = fastdiff.sample(model, num_images=N, steps=STEPS, x_T=x_T(shape=(3, 8, 8)))
        torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=TOLERANCE)


def test_labels_and_sizes_of_a_unet() -> None:
    scheduler = DDPMScheduler()

    def made(num_classes: int | None = None, image_size: int | None = None, **changes: Any) -> fastdiff.DiffusionModel:
        unet = UNet2DModel(**{**UNET, **changes})
        return unet_model(unet, scheduler=scheduler, num_classes=num_classes, image_size=image_size)

    assert (made().num_classes, made().null_label, made().image_shape) == (None, None, (3, 8, 8))
    assert [(m.num_classes, m.null_label) for m in (made(num_class_embeds=5), made(4, num_class_embeds=5))] == [
        (5, None),
        (4, 4),
    ]
    assert made(sample_size=(8, 4)).image_shape == (3, 8, 4)
    assert made(sample_size=None, image_size=16).image_shape == (3, 16, 16)
    assert made(7, class_embed_type="timestep").num_classes == 7
    for options, match in (
        ({"num_classes": 3, "num_class_embeds": 5}, "num_classes must be 5, or 4 with a null label, got 3"),
        ({"class_embed_type": "timestep"}, "num_classes must be given"),
        ({"class_embed_type": "identity"}, "class_embed_type must be None or 'timestep'"),
        ({"sample_size": None}, "image_size must be given where sample_size is None"),
        ({"image_size": 16}, "image_size must be given where sample_size is None, and equal"),
        ({"out_channels": 6}, "out_channels must be in_channels=3"),
    ):
        with pytest.raises(ValueError, match=match):
            made(**options)
    model = made(7, class_embed_type="timestep")
    assert not torch.equal(*(fastdiff.sample(model, y, steps=2, seed=0) for y in (0, 6)))


def test_a_step_reads_nothing_on_the_host() -> None:
    """No .item() and no copy to the host inside a network, which would break a CUDA graph's capture"""
    unet = UNet2DModel(**UNET, num_class_embeds=5).eval()
    for network, shape in ((DiTNetwork(transformer()), LATENT), (UNet2DNetwork(unet), (3, 8, 8))):
        x, t, y = torch.randn(2, *shape), torch.tensor([999.0, 0.5]), torch.tensor([0, 4])
        with torch.no_grad(), NoHostReads():
            network.eval()(x, t, y)


def test_saved_labels_are_known(tmp_path: Path) -> None:
    pipe = DDPMPipeline(UNet2DModel(**UNET, num_class_embeds=5), DDPMScheduler())
    pipe.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_fastdiff": {"num_classes": 4, "null_label": 4}}))
    for model in (fastdiff.load(tmp_path), unet_model(tmp_path)):
        assert (model.num_classes, model.null_label) == (4, 4)
