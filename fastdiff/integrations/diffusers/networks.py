"""Networks of diffusers as they are, sampled by fastdiff: DiT (2212.09748) with its VAE, and every UNet2DModel

A network stays diffusers' own; what fastdiff takes over is the loop. Their `guidance_scale` is 1 + w.
"""

from __future__ import annotations

import contextlib
import functools
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DModel
from diffusers.utils import is_accelerate_available

from fastdiff import hub
from fastdiff.checkpoint import blaming
from fastdiff.convert.diffusers_folder import DIT_CLASSES, row_labels
from fastdiff.convert.diffusers_layout import (
    CONFIG,
    MODEL_INDEX,
    check_recorded,
    given_scheduler,
    hash_weights,
    look,
    read_json,
    scheduler_facts,
    variance_of,
)
from fastdiff.convert.schedulers import SchedulerFacts
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.manifest import listed
from fastdiff.placement import DTYPES, resolve_device

__all__ = ["DiTNetwork", "UNet2DNetwork", "dit_model", "unet_model"]


class DiTNetwork(torch.nn.Module):
    """network(x, t, y) of a DiTTransformer2DModel

    x: (B, C, size, size) latents; t: (B,), fractional allowed; y: (B,) int64, null_label for none.
    Returns (B, out_channels, size, size), a variance in the second half if there are 2C.
    """

    def __init__(self, transformer: DiTTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.transformer(x, timestep=t, class_labels=y, return_dict=False)[0]


class UNet2DNetwork(torch.nn.Module):
    """network(x, t, y) of a UNet2DModel

    x: (B, in_channels, H, W); t: (B,), whole numbers where the model's time embedding is "learned"; y: (B,) int64 or
    None. Returns (B, out_channels, H, W).
    """

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet
        self.whole_times = unet.config.time_embedding_type == "learned"

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        t = t.long() if self.whole_times else t
        return self.unet(x, t, class_labels=y, return_dict=False)[0]


def dit_model(
    source: Any,
    *,
    guided_channels: int | None = None,
    scheduler: Any = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    variant: str | None = None,
) -> DiffusionModel:
    """A DiT as a DiffusionModel of latents that its VAE decodes; it samples what DiTPipeline samples.

    source: a DiTPipeline, which goes on sharing its modules; the folder of one, or "org/name" of the Hugging Face Hub
        where no such path exists; or a transformer, or its folder, alone: then there is no decode, and `scheduler` must
        be given.
    guided_channels: how many of the latent channels guidance combines. None is all of them, as in DiTPipeline; 3 gives
        the images of the original code, which guides the first three of four.
    scheduler: a DDPMScheduler or DDIMScheduler, its config, or a path to that, to its folder or to a pipeline's; in
        place of the source's own.
    device, dtype, allow_nonfinite: as for fastdiff.load; of a pipeline in memory only dtype, the compute dtype.
    variant: of a folder's weights, such as "fp16". Only safetensors are read; from a pickle make the pipeline yourself.

    The null label is the row after the last class. Where the transformer returns a variance beside eps, it is kept if
    the scheduler can learn one or has none; a DDPMScheduler with a fixed variance drops it, as DiTPipeline does.
    model.decode(latents) gives images (N, C, H, W) in [-1, 1] on the VAE's device.
    Raises CheckpointError naming the path; ValueError or TypeError naming the argument.
    """
    placing: _Placing = {"device": device, "dtype": dtype, "allow_nonfinite": allow_nonfinite, "variant": variant}
    found = _sourced(source, "transformer", DiTTransformer2DModel, scheduler, **placing)
    transformer, facts = found.network, found.facts
    C, out, side = transformer.config.in_channels, transformer.out_channels, transformer.config.sample_size
    # the sampler reads no variance from a network whose model has a fixed one
    dropped = out == 2 * C and facts.solver["name"] == "ddpm" and facts.variance != "learned_range"
    embedder = transformer.transformer_blocks[0].norm1.emb.class_embedder
    num_classes, rows = embedder.num_classes, embedder.embedding_table.num_embeddings
    return found.model(
        DiTNetwork(transformer),
        variance_of(C, C if dropped else out, facts),
        num_classes,
        num_classes if rows > num_classes else None,
        (C, side, side),
        guided_channels=guided_channels,
        decode=None if found.vae is None else functools.partial(_decoded, found.vae),
    )


def unet_model(
    source: Any,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    scheduler: Any = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    variant: str | None = None,
) -> DiffusionModel:
    """Any UNet2DModel as a DiffusionModel, also one that fastdiff's own UNet cannot hold, with diffusers' images.

    source: a DDPMPipeline or DDIMPipeline, which goes on sharing its unet; the folder of one, or "org/name" of the
        Hugging Face Hub where no such path exists; or a UNet2DModel, or its folder, alone: then `scheduler` must be
        given.
    num_classes, image_size: as for fastdiff.convert.diffusers_folder.load_folder; num_classes must be given where
        class_embed_type is "timestep", and there is no null label then.
    scheduler, device, dtype, allow_nonfinite, variant: as for dit_model.

    fastdiff.load is faster where it can be: the network runs as diffusers wrote it, only the loop is fastdiff's.
    Raises CheckpointError naming the path; ValueError or TypeError naming the argument.
    """
    placing: _Placing = {"device": device, "dtype": dtype, "allow_nonfinite": allow_nonfinite, "variant": variant}
    found = _sourced(source, "unet", UNet2DModel, scheduler, **placing)
    config = found.network.config
    if config.class_embed_type not in (None, "timestep"):
        raise ValueError(
            f"class_embed_type must be None or 'timestep' for labels that are numbers, got {config.class_embed_type!r}"
        )
    if config.class_embed_type == "timestep":
        if num_classes is None:
            raise ValueError("num_classes must be given where class_embed_type is 'timestep', which has no rows")
        null_label = None
    else:
        num_classes, null_label = row_labels(config.num_class_embeds, num_classes, found.labels)
    size = image_size if config.sample_size is None else config.sample_size
    if size is None or (image_size is not None and image_size != size):
        raise ValueError(
            f"image_size must be given where sample_size is None, and equal to it elsewhere, got {image_size} and "
            f"sample_size={config.sample_size}"
        )
    return found.model(
        UNet2DNetwork(found.network),
        variance_of(config.in_channels, config.out_channels, found.facts),
        num_classes,
        null_label,
        (config.in_channels, *((size, size) if isinstance(size, int) else size)),
    )


class _Placing(TypedDict):
    device: torch.device | str | None
    dtype: torch.dtype | None
    allow_nonfinite: bool
    variant: str | None


@dataclass(frozen=True)
class _Sourced:
    """A source's parts; labels: as fastdiff recorded them; folder: None for parts in memory; sha256: of its files"""

    network: Any
    vae: AutoencoderKL | None
    facts: SchedulerFacts
    dtype: torch.dtype | None
    labels: Mapping[str, Any] | None = None
    folder: Path | None = None
    sha256: Mapping[str, str] | None = None

    def model(
        self,
        network: torch.nn.Module,
        variance: str,
        num_classes: int | None,
        null_label: int | None,
        image_shape: tuple[int, int, int],
        **options: Any,
    ) -> DiffusionModel:
        # a config of negative sizes makes a network all the same
        with contextlib.nullcontext() if self.folder is None else blaming(self.folder):
            return DiffusionModel(
                network,
                self.facts.schedule,
                self.facts.prediction,
                variance,
                num_classes,
                null_label,
                image_shape,
                clip_x0=self.facts.clip_x0,
                solver=self.facts.solver,
                dtype=self.dtype,
                name=None if self.folder is None else self.folder.resolve().name,
                provenance=None if self.sha256 is None else {"format": "diffusers", "sha256": dict(self.sha256)},
                **options,
            )


def _sourced(source: Any, part: str, kind: type[Any], scheduler: Any, **placing: Unpack[_Placing]) -> _Sourced:
    dtype = placing["dtype"]
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {list(DTYPES.values())} or None, got {dtype!r}")
    if isinstance(source, str | os.PathLike):
        return _from_folder(hub.local_path(source, variant=placing["variant"]), part, kind, scheduler, **placing)
    if placing["device"] is not None or placing["variant"] is not None:
        raise ValueError("device and variant are for folders; load and place the pipeline as you want it")
    network = source if isinstance(source, kind) else getattr(source, part, None)
    if not isinstance(network, kind):
        raise TypeError(
            f"source must be a pipeline with a {kind.__name__} as its {part}, a {kind.__name__} or a folder, got "
            f"{type(source).__name__}"
        )
    scheduler = getattr(source, "scheduler", None) if scheduler is None else scheduler
    if scheduler is None:
        raise ValueError(f"scheduler must be given with a {kind.__name__} alone: a DDPMScheduler or a DDIMScheduler")
    return _Sourced(network, _checked_vae(getattr(source, "vae", None)), given_scheduler(scheduler), dtype)


def _from_folder(folder: Path, part: str, kind: type[Any], scheduler: Any, **placing: Unpack[_Placing]) -> _Sourced:
    device, dtype = placing["device"], placing["dtype"]
    device = torch.device("cpu") if device is None else resolve_device(device)
    found = look(folder)
    with blaming(folder):
        if found.network_class not in _names(kind):
            raise ValueError(f"must hold a {kind.__name__} as its {part}, got {found.network_class[:80]!r}")
    if found.vae_class not in (None, AutoencoderKL.__name__):
        with blaming(folder / MODEL_INDEX):
            raise ValueError(f"vae must be an {AutoencoderKL.__name__}, got {found.vae_class[:80]!r}")
    facts = scheduler_facts(folder, found, scheduler)
    parts = (found.network, kind), (found.vae, AutoencoderKL)
    network, vae = (
        None if path is None else _loaded(of, path, placing["variant"], placing["allow_nonfinite"]).to(device, dtype)
        for path, of in parts
    )
    digests = hash_weights(found.network, placing["variant"])
    check_recorded(found, digests, another=placing["variant"] is not None)
    return _Sourced(network, vae, facts, dtype, found.labels, folder, digests)


def _names(kind: type[Any]) -> tuple[str, ...]:
    """What folders call a class"""
    return DIT_CLASSES if kind is DiTTransformer2DModel else (kind.__name__,)


def _checked_vae(vae: Any) -> AutoencoderKL | None:
    if vae is not None and not isinstance(vae, AutoencoderKL):
        raise TypeError(f"source.vae must be an AutoencoderKL, got {type(vae).__name__}")
    return vae


def _loaded(kind: type[Any], folder: Path, variant: str | None, allow_nonfinite: bool) -> Any:
    """A module of a folder in eval mode, strictly: diffusers itself leaves what the file lacks random"""
    with blaming(folder / CONFIG):
        # strictly, and the class too: diffusers warns of another and goes on
        name = read_json(folder / CONFIG).get("_class_name")
        if name not in _names(kind):
            raise ValueError(f"_class_name must be {kind.__name__!r}, got {reprlib.repr(name)}")
    with blaming(folder):
        try:
            module, told = kind.from_pretrained(
                folder,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=is_accelerate_available(),
                output_loading_info=True,
            )
        # a damaged folder ends in almost any error
        except Exception as error:
            raise ValueError(f"{kind.__name__}.from_pretrained refuses it: {error}") from error
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if told[fault]:
                raise ValueError(f"has {fault.replace('_', ' ')} for its config: [{listed(told[fault])}]")
        bad = [name for name, value in module.named_parameters() if not torch.isfinite(value).all()]
        if bad and not allow_nonfinite:
            raise ValueError(f"NaN or infinite weights in {listed(bad)}; allow_nonfinite=True loads them all the same")
        return module


@torch.no_grad()
def _decoded(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W) in [-1, 1] and the latents' dtype, of latents (N, C', H', W')"""
    scaled = (latents / vae.config.scaling_factor).to(vae.device, vae.dtype)
    return vae.decode(scaled, return_dict=False)[0].clamp(-1, 1).to(latents.dtype)
