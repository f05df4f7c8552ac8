"""Launches and bytes of a whole step, counted on tensors without memory: no GPU is needed, and none is guessed at

    python -m benchmarks.count [--out benchmarks/results]

A torch op counts the launches that PyTorch's CUDA backend makes of it, a view none, one of fastdiff's ops its plans. A
launch reads each tensor that it is given once and writes what it returns once, wherever that lies; plans move what
traffic.py says. Products, ours too, take activations once and weights, which are counted apart; what tiles of our own
products ask for again is a count of its own, that of a library's is unknown. An op that is not listed is an error.
Work that PyTorch leaves on the host counts nothing, an upload one launch. What a library does inside one call (split-K,
a layout that a product makes for itself) is not seen.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import published
from benchmarks.registry import passes, tier_bytes
from benchmarks.scheduler_steps import counted_steps
from benchmarks.sites import NETWORKS
from benchmarks.traffic import plan_bytes
from fastdiff.evaluation.results import Row, append_row, git_state, results_file
from fastdiff.model import PRESETS, UNet
from fastdiff.networks import Networks
from fastdiff.schedule import Schedule
from fastdiff.solvers import StepTable, ddpm
from fastdiff.step import Shape, Step
from fastdiff_kernels import _plan
from fastdiff_kernels._plan import Plan

# allocations, and a view that PyTorch does not call one
NONE = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"))

# of one dtype and device they compute nothing
COPIES = frozenset(("_to_copy", "clone", "copy"))

# an op in place is the same launch, and has its name here without the underscore
ONE = COPIES | {
    *("add", "sub", "rsub", "mul", "div", "neg", "reciprocal", "pow", "exp", "log", "sqrt", "rsqrt", "sin", "cos"),
    *("silu", "sigmoid", "clamp", "minimum", "maximum", "where", "eq", "ne", "lt", "le", "gt", "ge"),
    *("arange", "fill", "zero", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like"),
    *("randn", "randn_like", "normal", "cat", "stack", "avg_pool2d", "upsample_nearest2d"),
    # a row of up to 1024 stays in registers, a longer one in shared memory: both read it once
    "_softmax",
}

# each operand once, and weights apart
PRODUCTS = frozenset(("convolution", "addmm", "mm", "bmm", "projection"))

# the first operand is only written
OVERWRITE = frozenset(("copy", "fill", "zero", "normal"))


@dataclasses.dataclass
class Counted:
    """launches, bytes of activations, bytes of weights; by_op and bytes_by_op by the name of the op or kernel

    reread_bytes: what tiles of fastdiff's own products ask for besides, all of which a perfect cache would answer.
    layout_copies: the launches among them that compute nothing, copies in one dtype, by the line that asks for them.
    """

    by_op: Counter[str] = dataclasses.field(default_factory=Counter)
    bytes_by_op: Counter[str] = dataclasses.field(default_factory=Counter)
    weight_bytes: int = 0
    reread_bytes: int = 0
    layout_copies: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def launches(self) -> int:
        return self.by_op.total()

    @property
    def bytes(self) -> int:
        return self.bytes_by_op.total()

    def add(self, name: str, moved: int, launches: int = 1) -> None:
        self.by_op[name] += launches
        self.bytes_by_op[name] += moved


def count(function: Callable[[], object]) -> Counted:
    """What one call launches and moves on a GPU; its tensors lie on the meta device, no gradients are taken

    LookupError for an op whose launches nobody has looked up.
    """
    counted = Counted()
    ops = _Ops(counted)
    _plan.observers.append(ops.launch)
    try:
        with torch.no_grad(), _no_autocast(), _Attention(ops), ops:
            function()
    finally:
        _plan.observers.remove(ops.launch)
    return counted


def _no_autocast() -> contextlib.AbstractContextManager[object]:
    """The meta device knows no autocast, and torch raises where a network asks"""
    return mock.patch.object(torch, "is_autocast_enabled", return_value=False)


class _Ops(TorchDispatchMode):
    """Counts every op that reaches a backend"""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted
        self._parameters: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and _channels_last(*args[:2]):
            # as cuDNN allocates it; the meta device has rules of its own
            result = torch.empty_like(result, memory_format=torch.channels_last)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._remember(given)
        on_host = all(tensor.device.type == "cpu" for tensor in (*given, *made))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if not (on_host or func.is_view or name in NONE):
            self._count(name, args, given, made)
        return result

    def _remember(self, tensors: Iterable[object]) -> None:
        for tensor in tensors:
            if isinstance(tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                self._parameters[storage._cdata] = storage

    def launch(self, plan: Plan) -> None:
        """A plan; one that is a product is counted as other products are"""
        if 0 in plan.grid:
            return
        asked = plan_bytes(plan).total
        if plan.name in PRODUCTS:
            self._remember(plan.args.values())
            tensors = [value for value in plan.args.values() if isinstance(value, Tensor)]
            self.counted.reread_bytes += asked - sum(map(distinct, tensors))
            self.counted.add(plan.name, self.moved(*tensors))
        else:
            self.counted.add(plan.name, asked)

    def _count(self, name: str, args: tuple[Any, ...], given: list[Tensor], made: list[Tensor]) -> None:
        if name in PRODUCTS:
            self._product(name, args, made[0])
        elif name == "native_group_norm":
            self._group_norm(args[0], given[1:], made)
        elif name == "embedding":
            # of the table only the rows that are returned
            self.counted.weight_bytes += distinct(made[0])
            self.counted.add(name, distinct(args[1]) + distinct(made[0]))
        elif name in ("index", "index_select"):
            # as many elements as are returned, and the indices
            self.counted.add(name, 2 * distinct(made[0]) + self.moved(*given[1:]))
        elif name in ONE:
            read = given[1:] if name in OVERWRITE else given
            self.counted.add(name, self.moved(*read) + sum(map(distinct, made)))
            if name in COPIES and (read[-1].dtype, read[-1].device) == (made[0].dtype, made[0].device):
                self._layout_copy(name, read[-1])
        else:
            raise LookupError(f"the launches of {name} are not known: look them up and say so in {__name__}")

    def _product(self, name: str, args: tuple[Any, ...], y: Tensor) -> None:
        """A product is one launch; addmm's bias of one dimension is added on its way out, by cuBLASLt

        cuDNN's convolution takes channels_last operands where either is, so that the other is copied first, and
        PyTorch adds the bias behind it in a launch of its own.
        """
        if name != "convolution":
            if name == "addmm" and args[0].dim() != 1:
                raise LookupError(f"addmm of a bias of {args[0].dim()} dimensions is not known to be one launch")
            self.counted.add(name, self.moved(*args[:3]) + distinct(y))
            return
        x, weight, bias = args[:3]
        if _channels_last(x, weight):
            for operand, what in ((x, "its input"), (weight, "its weight")):
                if not operand.is_contiguous(memory_format=torch.channels_last):
                    self.counted.add("clone", self.moved(operand) + self.moved(operand))
                    self._layout_copy(f"convolution of {what}", operand)
        self.counted.add(name, self.moved(x, weight) + distinct(y))
        if bias is not None:
            self.counted.add("convolution's bias", self.moved(bias) + 2 * distinct(y))

    def _group_norm(self, x: Tensor, affine: list[Tensor], made: list[Tensor]) -> None:
        """Moments, a scale and a shift for each channel of each image, and those applied"""
        y, *moments = made
        small = sum(map(distinct, moments))
        folded = 2 * x.shape[0] * x.shape[1] * moments[0].element_size()
        self.counted.add("native_group_norm", 2 * self.moved(x) + distinct(y), launches=3)
        self.counted.add("native_group_norm", 2 * small + self.moved(*affine) + 2 * folded, launches=0)

    def moved(self, *tensors: Tensor | None) -> int:
        """Bytes of activations among them; those of parameters are counted as weights"""
        total = 0
        for tensor in tensors:
            if tensor is None or tensor.device.type == "cpu":
                continue
            if tensor.untyped_storage()._cdata in self._parameters:
                self.counted.weight_bytes += distinct(tensor)
            else:
                total += distinct(tensor)
        return total

    def _layout_copy(self, what: str, tensor: Tensor) -> None:
        self.counted.layout_copies[f"{_line()}: {what} {tuple(tensor.shape)} {tensor.dtype}"] += 1


class _Attention(TorchFunctionMode):
    """scaled_dot_product_attention as the one launch that it is on a GPU, with a result in the layout of q"""

    def __init__(self, ops: _Ops) -> None:
        super().__init__()
        self.ops = ops

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v, *rest = args
        if rest or kwargs:
            raise LookupError("the launches of attention with a mask or other options are not known")
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        self.ops.counted.add("attention", self.ops.moved(q, k, v) + distinct(out))
        return out


def _channels_last(x: Tensor, weight: Tensor) -> bool:
    return x.dim() == 4 and torch.channels_last in map(suggest_memory_format, (x, weight))


def distinct(tensor: Tensor) -> int:
    """Bytes of the elements that differ in address: an expanded tensor is read once"""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= size if stride or not size else 1
    return numel * tensor.element_size()


def _line() -> str:
    """The line that led here, outside of torch and of this file"""
    frame = sys._getframe(1)
    own = {__file__, torch.__file__}
    libraries = str(Path(torch.__file__).parent)
    while frame.f_back is not None and (frame.f_code.co_filename in own or libraries in frame.f_code.co_filename):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def step_table() -> StepTable:
    return ddpm(Schedule.named("linear"), 50, variance="learned_range")


def published_network(name: str, rows: int = 2) -> Counted:
    """One forward pass of the network as published, in float16 with norms in float32"""
    config = PRESETS[name]
    with torch.device("meta"):
        network = published.Network(config).eval().half_convolutions()
        x = torch.empty(rows, config.in_channels, config.image_size, config.image_size)
        t, y = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    return count(lambda: network(x, t, y))


def published_step(name: str, n: int = 1) -> Counted:
    """What surrounds the network in a guided step as published, n images and their null rows"""
    config = PRESETS[name]
    with torch.device("meta"):
        x = torch.empty(2 * n, config.in_channels, config.image_size, config.image_size)
        out = torch.empty(2 * n, 2 * config.in_channels, config.image_size, config.image_size)
    return count(lambda: published.sampling_step(lambda *_: out, step_table(), 0, x, None, 1.5))


def fastdiff_step(name: str, n: int = 1, m: int = 1, dtype: torch.dtype = torch.float16) -> Counted:
    """A row of the sampler on n images and m null rows: all that its graph captures"""
    config = PRESETS[name]
    with torch.device("meta"):
        network = UNet(config).eval().to(dtype)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return count(row_of(network, (config.in_channels, config.image_size, config.image_size), n, m, dtype))


def row_of(network: Any, image_shape: tuple[int, int, int], n: int, m: int, dtype: torch.dtype) -> Callable[[], None]:
    """One row of DDPM with a learned variance; what the sampler computes once for all rows has been computed"""
    networks = Networks(
        network=network,
        null_network=None,
        image_shape=image_shape,
        has_labels=True,
        null_label=0,
        null_unlabelled=False,
        device=torch.device("meta"),
        dtype=dtype,
        null_dtype=None,
        state_dtype=torch.float32,
    )
    with torch.no_grad(), _no_autocast():
        step = Step(networks, Shape.of(step_table(), n, m, has_noise=False, wants_x0=False))
    return functools.partial(step.run, guided=True)


def table() -> Iterator[Row]:
    """Rows of kind "count": a doubled step of one image, bytes divided by the two rows that the network sees"""
    for name in NETWORKS:
        common: Row = {"kind": "count", "network": name, "dtype": "float16", "rows": 2}
        for composition, made in (
            ("published", published_network(name)),
            ("published, around the network", published_step(name)),
            ("fastdiff", fastdiff_step(name)),
        ):
            yield common | {
                "composition": composition,
                "launches": made.launches,
                "bytes_per_image": made.bytes // 2,
                "weight_bytes": made.weight_bytes,
                "reread_bytes_per_image": made.reread_bytes // 2,
                "by_op": dict(made.by_op.most_common()),
                "bytes_by_op": dict(made.bytes_by_op.most_common()),
                "layout_copies": dict(made.layout_copies),
            }
        for tier in ("T2", "T3"):
            launches = sum(1 for _ in passes(name, tier))
            yield common | {"composition": tier, "launches": launches, "bytes_per_image": tier_bytes(name, tier)}


def scheduler_table() -> Iterator[Row]:
    """Rows of kind "count": a step of diffusers' schedulers alone and of the fused ones, one float16 image"""
    for network, name, step in counted_steps():
        made = count(step)
        yield {
            **{"kind": "count", "network": network, "dtype": "float16", "rows": 1, "composition": name},
            **{"launches": made.launches, "bytes_per_image": made.bytes, "by_op": dict(made.by_op.most_common())},
        }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.count", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=None, help="folder or .jsonl file to append the rows to; default: only prints")
    out = parser.parse_args(arguments).out
    heads = f"{'launches':>8} {'GB/image':>9} {'weights GB':>10} {'read again':>10} {'layout copies':>13}"
    print(f"{'network':8} {'composition':30} {heads}")
    rows = [*table(), *scheduler_table()]
    for row in rows:
        line = f"{row['network']:8} {row['composition']:30} {row['launches']:8} {row['bytes_per_image'] / 1e9:9.4f}"
        if "layout_copies" in row:
            copies = sum(row["layout_copies"].values())
            line += f" {row['weight_bytes'] / 1e9:10.3f} {row['reread_bytes_per_image'] / 1e9:10.4f} {copies:13}"
        print(line)
    if out is not None:
        commit, dirty = git_state()
        path = results_file(out, commit, "computed")
        for row in rows:
            append_row(path, row | {"device": "computed", "backend": "none", "commit": commit, "dirty": dirty})
        print(f"wrote {len(rows)} rows to {path}")


if __name__ == "__main__":
    main()
