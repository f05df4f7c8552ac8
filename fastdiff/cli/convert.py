"""fastdiff convert: other people's checkpoints into fastdiff's, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from fastdiff.cli.arguments import option

if TYPE_CHECKING:
    from fastdiff.classifier import Classifier
    from fastdiff.diffusion_model import DiffusionModel

__all__ = ["Convert"]

KINDS = ("fastdiff", "guided-diffusion", "diffusers")
FLAGS = (
    *("attention_order", "num_heads", "head_channels", "image_size", "schedule", "num_train_timesteps"),
    *("rescale_timesteps", "dtype", "low_res_size", "image_channels", "num_blocks", "num_classes", "prediction"),
    "variance",
)
ASKED = "the published network's, else asked for"


@dataclass(frozen=True)
class Convert:
    """Turn a checkpoint of guided-diffusion, improved-diffusion or diffusers into fastdiff's, or back.

    What the weights do not show is known of the published networks. For others the error names what to give.
    """

    src: Annotated[Positional[str], arg(metavar="SRC")]
    """A .pt or .safetensors, a folder of diffusers or fastdiff, a bundled name, or org/name of the Hub."""
    dst: Annotated[Positional[str], arg(metavar="DST")]
    """A folder; or a .pt or .safetensors, which is written as guided-diffusion's."""
    to: Annotated[str | None, option("KIND", "guided-diffusion for a file, else fastdiff")] = None
    """fastdiff, guided-diffusion or diffusers."""
    attention_order: Annotated[str | None, option("ORDER", ASKED)] = None
    """Rows of qkv: legacy, or new for use_new_attention_order; writing guided-diffusion's: as its reader has it."""
    num_heads: Annotated[int | None, option("N", ASKED)] = None
    """Heads of every attention; or --head-channels."""
    head_channels: Annotated[int | None, option("N", ASKED)] = None
    """Channels of every head (num_head_channels); or --num-heads."""
    image_size: Annotated[int | None, option("SIDE", ASKED)] = None
    """Side of the images in pixels."""
    schedule: Annotated[str | None, option("NAME", ASKED)] = None
    """linear or cosine (noise_schedule)."""
    num_train_timesteps: Annotated[int | None, option("T", ASKED)] = None
    """Length of the chain (diffusion_steps)."""
    rescale_timesteps: Annotated[Literal["yes", "no"] | None, option("yes|no", ASKED)] = None
    """Whether the network was trained on t * 1000 / T."""
    dtype: Annotated[str | None, option("DTYPE", ASKED)] = None
    """The compute dtype to record: float32, or float16 for use_fp16."""
    low_res_size: Annotated[int | None, option("SIDE", ASKED)] = None
    """Side of a super-resolution network's smaller images."""
    image_channels: Annotated[int | None, option("C", "asked for where there is a choice")] = None
    """Channels of an image."""
    num_blocks: Annotated[int | None, option("N", "asked for where there is a choice")] = None
    """ResBlocks a level (num_res_blocks)."""
    num_classes: Annotated[int | None, option("N", "as many as there are labels")] = None
    """Classes, where the last label means none."""
    prediction: Annotated[str | None, option("KIND", "eps")] = None
    """x0 for predict_xstart."""
    variance: Annotated[str | None, option("KIND", "fixed_large")] = None
    """fixed_small for sigma_small, where the variance is not learned."""
    scheduler: Annotated[str | None, option("PATH", "the pipeline's")] = None
    """Of diffusers: a folder with scheduler_config.json, for a network that was saved alone."""
    variant: Annotated[str | None, option("NAME", "none")] = None
    """Of diffusers: which of several files of weights, such as fp16."""
    weights_file: Annotated[str | None, option("NAME", "safetensors")] = None
    """Of diffusers: another file of weights; only so is a pickle (.bin) read."""
    storage_dtype: Annotated[str | None, option("DTYPE", "as they are")] = None
    """Of the weights that are written, fastdiff's only; float16 halves the file."""
    allow_nonfinite: bool = False
    """Take NaN and infinite weights as they are."""
    force: bool = False
    """Replace what is at DST."""

    def run(self) -> int:
        """Reads, checks, writes, and tells what was understood."""
        from fastdiff.convert.state_files import SUFFIXES

        to = self.to or ("guided-diffusion" if Path(self.dst).suffix in SUFFIXES else "fastdiff")
        if to not in KINDS:
            raise ValueError(f"--to must be one of {list(KINDS)}, got {to!r}")
        if to != "fastdiff" and self.storage_dtype is not None:
            raise ValueError(f"--storage-dtype must be left out where {to}'s files are written, as the weights are")
        # before the weights are read, which takes its time
        taken = Path(self.dst, {"fastdiff": "config.json", "diffusers": "model_index.json"}.get(to, ""))
        if taken.exists() and not self.force:
            raise ValueError(f"{taken} is there already; --force replaces it")
        model = self._read(to)
        print(_described(model, to), flush=True)
        print(self._write(model, to))
        return 0

    def _read(self, to: str) -> DiffusionModel | Classifier:
        """The model of SRC, its weights as they are stored"""
        from fastdiff import checkpoint
        from fastdiff.hub import local_path
        from fastdiff.loading import kind_of_source

        which = {"variant": self.variant, "weights_file": self.weights_file}
        path = checkpoint.BUNDLED.get(self.src) or local_path(self.src, **which)
        kind = kind_of_source(path)
        if kind == "fastdiff":
            facts = checkpoint.info(path)
        if kind == to:
            raise ValueError(f"SRC is {kind}'s already, as DST is to be; --to says what else to write")
        if kind == "guided-diffusion":
            from fastdiff.convert.state_files import read_model

            return read_model(path, allow_nonfinite=self.allow_nonfinite, **self._flags(kind, FLAGS))
        # what is written may need one
        flags = self._flags(kind, ("num_classes", "image_size") if kind == "diffusers" else (), leave=to)
        if kind == "diffusers":
            from fastdiff.convert.diffusers_folder import DIT_CLASSES, load_folder, network_class

            if network_class(path) in DIT_CLASSES:
                raise ValueError("SRC holds a DiT, which stays diffusers' and cannot be converted; sample it as it is")
            flags |= which | {"scheduler": self.scheduler}
            model = load_folder(path, allow_nonfinite=self.allow_nonfinite, **flags)
            network: Any = model.network
            # a CPU is given float32 for float16
            network.to(model.dtype)
            return model
        from fastdiff.placement import DTYPES

        load = checkpoint.load_classifier if "classifier" in facts["config"] else checkpoint.load
        stored = facts["storage"][0] if len(facts["storage"]) == 1 else "float32"
        return load(path, dtype=DTYPES[stored], allow_nonfinite=self.allow_nonfinite)

    def _flags(self, kind: str, taken: tuple[str, ...], leave: str = "") -> dict[str, Any]:
        """Those given, of which SRC takes the ones named; leave: what is written, which may take the order"""
        from fastdiff.placement import resolve_dtype

        flags: dict[str, Any] = {name: getattr(self, name) for name in FLAGS if getattr(self, name) is not None}
        if leave == "guided-diffusion":
            flags.pop("attention_order", None)
        if told := sorted(flags.keys() - set(taken)):
            raise ValueError(f"--{told[0].replace('_', '-')} must be left out: a checkpoint of {kind} tells it")
        if "dtype" in flags:
            flags["dtype"] = resolve_dtype(flags["dtype"])
        if "rescale_timesteps" in flags:
            flags["rescale_timesteps"] = flags["rescale_timesteps"] == "yes"
        return flags

    def _write(self, model: Any, to: str) -> Path:
        if to == "guided-diffusion":
            from fastdiff.convert.state_files import save_file

            return save_file(model, self.dst, attention_order=self.attention_order, overwrite=self.force)
        if to == "diffusers":
            from fastdiff.convert.diffusers_folder import save_folder

            return save_folder(model, self.dst, overwrite=self.force)
        from fastdiff.checkpoint import save
        from fastdiff.placement import resolve_dtype

        return save(model, self.dst, overwrite=self.force, storage_dtype=resolve_dtype(self.storage_dtype))


def _described(model: DiffusionModel | Classifier, to: str) -> str:
    from fastdiff.classifier import Classifier

    # a pipeline has a scheduler, whatever the model says
    written = "ddpm, leading:N, for the model has none of its own" if to == "diffusers" else None
    network: Any = model.network
    parameters = sum(parameter.numel() for parameter in network.parameters())
    source = model.provenance
    facts = {
        "network": f"{type(network).__name__}, {parameters:,} parameters",
        "published": (source["published"] or "no, taken as told") if "published" in source else None,
        "config": network.config.to_dict(),
        "schedule": f"{model.schedule.name or 'own betas'}, T = {model.schedule.num_train_timesteps}",
        "solver": None if isinstance(model, Classifier) else model.solver or written,
        "dtype": model.dtype and str(model.dtype).removeprefix("torch."),
        "attention_order": source.get("attention_order"),
    }
    return "\n".join(f"{key:<16}{value}" for key, value in facts.items() if value is not None)
