"""One thing at a time undone: what each thing that fastdiff does on the way to an image is worth

`undone` wraps the ops by the names under which the network's blocks call them, and replaces each option by a pass of
its own, as it is written without it; `network` and `options` undo what the sampler does. The images stay the same.
Where a composition has nothing to undo (no convolution leaves its bias to others on a CPU), `used` does not name it.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.diffusion_model import is_conditioned_apart
from fastdiff.model import blocks
from fastdiff.model import packed as packing

# in the order in which one op at a time, in the network's dtype, becomes fastdiff's step
LADDER: dict[str, str] = {
    "norm": "norm, modulation and SiLU in one op",
    "bias": "biases of convolutions added by what follows",
    "concat": "skips not concatenated",
    "statistics": "statistics from what wrote the tensor",
    "resample": "resampling on the way in and out",
    "skip": "skip convolutions in the sum",
    "hoisting": "modulations of all rows before the first",
    "prefix": "what both halves share computed once",
    "packed": "weights packed for the CPU",
    "graph": "one CUDA graph a step",
}
# so small a weight runs the null half and adds nothing of it
NULL_HALF = 1e-30

Used = Counter[str]


def repeated(x: Tensor, rows: int) -> Tensor:
    """Row b is row b, or b - len(x) from there on"""
    return x if len(x) == rows else torch.cat([x, x[: rows - len(x)]])


def resampled(x: Tensor, how: str | None) -> Tensor:
    if how == "down":
        return F.avg_pool2d(x, 2)
    return x if how is None else F.interpolate(x, scale_factor=2.0, mode="nearest")


def biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)[:, None, None]


class Concatenated:
    """torch.cat of two tensors, made once for the norm and the skip that both read it"""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, x2: Tensor, rows: int) -> Tensor:
        """rows: of what is made from them"""
        if len(x) == len(x2):
            rows = len(x)
        if self.kept is None or self.kept[0] is not x or self.kept[1] is not x2 or len(self.kept[2]) != rows:
            self.kept = x, x2, torch.cat([repeated(x, rows), repeated(x2, rows)], dim=1)
        return self.kept[2]


def plain_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    groups: int,
    eps: float,
    silu: bool,
    x2: Tensor | None,
    x_bias: Tensor | None,
    resample: str | None,
    stats: Tensor | None,
    stats2: Tensor | None,
) -> Tensor:
    """The norm in PyTorch's own ops, every option a pass; statistics that are handed in are of no use to it"""
    if x2 is not None:
        x = Concatenated()(x, x2, len(x))
    x = F.group_norm(biased(x, x_bias), groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None and shift is not None:
        x = repeated(x, len(scale)) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return resampled(F.silu(x) if silu else x, resample)


def norm_without(names: Collection[str], used: Used, norm: Callable[..., Tensor], cat: Concatenated) -> Any:
    def ada_group_norm(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        groups: int,
        eps: float = 1e-5,
        silu: bool = True,
        x2: Tensor | None = None,
        x_bias: Tensor | None = None,
        resample: str | None = None,
        stats: Tensor | None = None,
        stats2: Tensor | None = None,
    ) -> Tensor:
        after = None
        if "concat" in names and x2 is not None:
            used["concat"] += 1
            alike = stats is not None and stats2 is not None and stats.shape[:3] == stats2.shape[:3]
            stats = torch.cat([stats, stats2], dim=3) if alike and stats is not None and stats2 is not None else None
            x, x2, stats2 = cat(x, x2, len(x)), None, None
        if "bias" in names and x_bias is not None:
            used["bias"] += 1
            first, second = x_bias.split([x.shape[1], len(x_bias) - x.shape[1]])
            x, x2 = biased(x, first), None if x2 is None else biased(x2, second)
            # statistics of the tensor before its bias
            x_bias = stats = stats2 = None
        if "statistics" in names and not (stats is None and stats2 is None):
            used["statistics"] += 1
            stats = stats2 = None
        if "resample" in names and resample is not None:
            used["resample"] += 1
            resample, after = None, resample
        used["norm"] += "norm" in names
        inner = plain_norm if "norm" in names else norm
        options: dict[str, Any] = {"x2": x2, "x_bias": x_bias, "resample": resample, "stats": stats, "stats2": stats2}
        return resampled(inner(x, weight, bias, scale, shift, groups=groups, eps=eps, silu=silu, **options), after)

    return ada_group_norm


def product(skip: Tensor, skip2: Tensor | None, weight: Tensor, rows: int) -> Tensor:
    """The 1x1 convolution of [skip, skip2], which is not stored, for a sum of so many rows"""
    c1 = skip.shape[1]
    weight = weight.reshape(*weight.shape[:2], 1, 1)
    # the second product adds to the first
    y = F.conv2d(skip, weight[:, :c1])
    if skip2 is None:
        return y
    rows = len(skip) if len(skip) == len(skip2) else rows
    y, skip2 = repeated(y, rows), repeated(skip2, rows)
    tokens, tokens2 = (v.permute(0, 2, 3, 1).reshape(-1, v.shape[1]) for v in (y, skip2))
    total = torch.addmm(tokens, tokens2, weight[:, c1:, 0, 0].t())
    return total.view(rows, *y.shape[2:], -1).permute(0, 3, 1, 2)


def residual_without(names: Collection[str], used: Used, residual: Callable[..., Any], cat: Concatenated) -> Any:
    def wrapped(
        h: Tensor,
        bias: Tensor | None,
        skip: Tensor | None,
        skip2: Tensor | None = None,
        weight: Tensor | None = None,
        weight_bias: Tensor | None = None,
        *,
        resample: str | None = None,
        stats: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        if "bias" in names and bias is not None:
            used["bias"] += 1
            h, bias = biased(h, bias), None
        if "bias" in names and weight_bias is not None and h.device.type != "cpu":
            used["bias"] += 1
            h, weight_bias = biased(h, weight_bias), None
        if "concat" in names and skip is not None and skip2 is not None:
            used["concat"] += 1
            skip, skip2 = cat(skip, skip2, len(h)), None
        if "skip" in names and skip is not None and weight is not None:
            used["skip"] += 1
            skip, skip2, weight = product(skip, skip2, weight, len(h)), None, None
            skip, weight_bias = biased(skip, weight_bias), None
        if "resample" in names and skip is not None and resample is not None:
            used["resample"] += 1
            skip, resample = resampled(skip, resample), None
        if "statistics" in names and stats:
            used["statistics"] += 1
            stats = False
        if skip is None and bias is None and not stats:
            return h, None
        projection = {} if weight is None else {"skip2": skip2, "weight": weight, "weight_bias": weight_bias}
        return residual(h, bias, skip, **projection, resample=resample, stats=stats)

    return wrapped


@contextlib.contextmanager
def undone(names: Collection[str], used: Used | None = None) -> Iterator[Used]:
    """Networks run in here do without what names lists; used counts how often each of them was undone"""
    used = Counter() if used is None else used
    cat = Concatenated()
    replacements: dict[str, tuple[Any, Any]] = {}
    norm, residual = blocks.ada_group_norm, blocks.residual
    replacements["ada_group_norm"] = norm, norm_without(names, used, norm, cat)
    replacements["residual"] = residual, residual_without(names, used, residual, cat)
    if "packed" in names:

        def as_it_is(network: nn.Module, *_: Any, **__: Any) -> nn.Module:
            used["packed"] += 1
            return network

        replacements["packed"] = packing.packed, as_it_is
    patched = []
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "fastdiff"]:
        for name, (original, replacement) in replacements.items():
            if vars(module).get(name) is original:
                setattr(module, name, replacement)
                patched.append((module, name, original))
    try:
        yield used
    finally:
        for module, name, original in patched:
            setattr(module, name, original)


class Whole(nn.Module):
    """A network that shows nothing of its inside: every row computes its own modulation, with x"""

    def __init__(self, inner: Any, used: Used) -> None:
        super().__init__()
        self.inner, self.used = inner, used

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.used["hoisting"] += is_conditioned_apart(self.inner)
        self.used["prefix"] += is_conditioned_apart(self.inner)
        return self.inner(x, t, y)


class Unshared(nn.Module):
    """A network whose image path is given every image as often as there are modulations of it"""

    def __init__(self, inner: Any, used: Used) -> None:
        super().__init__()
        self.inner, self.used = inner, used
        self.num_labels = inner.num_labels

    def embedding(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.inner.embedding(t, y)

    def modulation(self, embedding: Tensor) -> Tensor:
        return self.inner.modulation(embedding)

    def body(self, x: Tensor, mod: Tensor) -> Tensor:
        self.used["prefix"] += len(mod) > len(x)
        return self.inner.body(repeated(x, len(mod)), mod)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.inner(x, t, y)


def network(names: Collection[str], unet: nn.Module, used: Used) -> nn.Module:
    """What the sampler is given so that it can do none of names"""
    if "hoisting" in names:
        return Whole(unet, used)
    return Unshared(unet, used) if "prefix" in names else unet


def options(names: Collection[str]) -> dict[str, Any]:
    """What the sampler is told so that it does none of names"""
    return {"graph": False} if "graph" in names else {}
