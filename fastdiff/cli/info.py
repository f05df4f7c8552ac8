"""fastdiff info and fastdiff doctor: what a file holds, and what a machine can do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from fastdiff.cli.arguments import Device, ModelName, option

__all__ = ["Doctor", "Info"]


@dataclass(frozen=True)
class Info:
    """Show what a model or classifier is, or how a picture was made."""

    path: Annotated[Positional[str], option("[MODEL|PICTURE]")] = "digits"
    """A bundled model's name, a checkpoint's folder, or a .png or .npz that fastdiff sample wrote."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        """Prints facts; a model's weights are hashed, no network is built."""
        from fastdiff import checkpoint, images

        if Path(self.path).suffix.lower() in (".pt", ".pth", ".ckpt", ".bin", ".safetensors"):
            raise ValueError(
                f"{self.path}: is a file of weights; fastdiff convert makes a checkpoint of it, and tells of it"
            )
        if Path(self.path).is_file() or self.path.lower().endswith((".png", ".npz")):
            facts = images.read_metadata(self.path)
        else:
            facts = _model_facts(checkpoint.info(self.path))
        if self.json:
            print(json.dumps(facts, indent=2))
        else:
            _print_table({key: v if isinstance(v, str) else json.dumps(v) for key, v in facts.items()})
        return 0


@dataclass(frozen=True)
class Doctor:
    """Look whether everything that sampling needs is there, and say what will be used."""

    model: ModelName = "digits"
    """A bundled model's name, or a checkpoint's folder."""
    device: Device = None
    """cpu, cuda or cuda:N."""

    def run(self) -> int:
        """Prints a line a finding; 1 where one of them would keep sampling from working."""
        from fastdiff.doctor import examine

        ok = True
        for finding in examine(self.model, self.device):
            print(f"{'ok ' if finding.ok else 'BAD'}  {finding.name:<9}  {finding.text}", flush=True)
            ok = ok and finding.ok
        return 0 if ok else 1


def _model_facts(info: dict[str, Any]) -> dict[str, Any]:
    config = info["config"]
    section = "classifier" if "classifier" in config else "diffusion"
    cards = sorted(Path(info["path"]).glob("*.md"))
    return {
        "name": config["name"],
        "kind": section,
        "path": info["path"],
        "card": str(cards[0]) if cards else None,
        "parameters": info["parameters"],
        "bytes": info["bytes"],
        "storage": info["storage"],
        "sha256": info["sha256"],
        "dtype": config["dtype"],
        **config[section],
        "network": config["network"],
        "provenance": config["provenance"],
    }


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
