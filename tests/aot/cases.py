"""What is built: for each op the factors that change its code, and a function from their values to its launches

An op is one function under @op(factor=(values), ...): it takes `new`, which makes tensors, and one value of every
factor, and yields a Build for each launch. Imports of its plan builder belong inside it. `allowed` leaves out
combinations that no caller can reach; of a product too large to build, `strength` keeps rows that hold every
combination of so many values. With check=False only the full matrix has the op, not the check before every commit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.sites import TIMED, Site, norm_sites
from fastdiff_kernels._plan import ALIGNMENT, Plan

from .covering import covering, product

if TYPE_CHECKING:
    from fastdiff_kernels.jit.norm import Norm

WIDE = 128
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "int64": torch.int64}
Factors = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Build:
    """One launch; bits: how wide every access to a parameter must be, of_amd: how wide on AMD where that differs

    tile: elements of a parameter that one program has, where that can be fewer than 16 bytes for each thread because
    the image has no more; then what a thread has must come in one access. Without it nothing is an excuse.
    """

    plan: Plan
    bits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    tile: Mapping[str, int] = dataclasses.field(default_factory=dict)
    of_amd: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def needed(self, threads: int, amd: bool) -> dict[str, int]:
        """Bits by parameter for programs of this many threads"""
        return {
            name: min(bits, self.plan.args[name].element_size() * 8 * max(1, self.tile.get(name, 1 << 30) // threads))
            for name, bits in {**self.bits, **(self.of_amd if amd else {})}.items()
        }


@dataclasses.dataclass(frozen=True)
class New:
    """Makes tensors: on the meta device for a build, on the CPU for what a launch would make of them"""

    device: str = "meta"

    def __call__(self, *shape: int, dtype: str = "fp32", layout: str = "nchw", offset: int = 0) -> Tensor:
        """offset: elements that the tensor begins after an aligned address"""
        strides, size = [0] * len(shape), 1
        order = list(range(len(shape)))
        if layout == "nhwc":
            order = [0, 2, 3, 1]
        for dim in reversed(order):
            strides[dim] = size
            size *= max(shape[dim], 1)
        memory = torch.empty(size + offset, dtype=DTYPES[dtype], device=self.device)
        return memory.as_strided(shape, strides, offset)


@dataclasses.dataclass(frozen=True)
class Op:
    name: str
    factors: Mapping[str, Sequence[Any]]
    launches: Callable[..., Iterator[Build]]
    allowed: Callable[..., bool]
    strength: int | None
    check: bool

    @functools.cached_property
    def cases(self) -> list[Factors]:
        rows = [row for row in product(self.factors) if self.allowed(**row)]
        return rows if self.strength is None else covering(rows, self.strength)

    def builds(self, factors: Factors, new: New) -> dict[str, Build]:
        """By kernel name; the second launch of a kernel in one case has .2 behind it"""
        found: dict[str, Build] = {}
        for build in self.launches(new, **factors):
            name, count = build.plan.name, 1
            while name in found:
                count += 1
                name = f"{build.plan.name}.{count}"
            found[name] = build
        if not found:
            raise ValueError(f"{self.name} launches nothing for {case_id(factors)}")
        return found


OPS: dict[str, Op] = {}


def op(
    *,
    allowed: Callable[..., bool] = lambda **_: True,
    strength: int | None = None,
    check: bool = True,
    **factors: Sequence[Any],
) -> Callable[[Callable[..., Iterator[Build]]], Callable[..., Iterator[Build]]]:
    def register(launches: Callable[..., Iterator[Build]]) -> Callable[..., Iterator[Build]]:
        name = launches.__name__
        OPS[name] = Op(name, factors, launches, allowed, strength, check)
        return launches

    return register


def case_id(factors: Factors) -> str:
    """What is on by its name, what has a value with it; what is off or absent is left out"""
    words = [name if value is True else f"{name}={value}" for name, value in factors.items() if value]
    return " ".join(word for word in words if not word.endswith("=none"))


def in_vectors(tensor: Tensor, inner: int) -> bool:
    """Whether 16 bytes along dimension `inner` always lie together and aligned: the base, its size, other strides"""
    others = [dim for dim in range(tensor.dim()) if dim != inner and tensor.shape[dim] > 1]
    counts = [tensor.storage_offset(), tensor.shape[inner], *(tensor.stride(dim) for dim in others)]
    return tensor.stride(inner) == 1 and all(count * tensor.element_size() % ALIGNMENT == 0 for count in counts)


def wide(plan: Plan, *names: str, tile: Mapping[str, int] | None = None) -> Build:
    """128 bits for the activations (B, C, H, W) among these parameters, where the channels of all lie in vectors"""
    given = {f"{name}_ptr": plan.args.get(f"{name}_ptr") for name in names}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    together = all(in_vectors(tensor, 1) for tensor in tensors.values())
    return Build(plan, dict.fromkeys(tensors, WIDE) if together else {}, tile or {})


PLACES = ("whole", "single", "cropped", "unaligned", "huge")


def batch(place: str, *shape: int) -> int:
    """Images of this shape: 2, or 1 if single, or as many as pass 2 GB in every dtype if huge"""
    return {"single": 1, "huge": 2**30 // math.prod(shape) + 1}.get(place, 2)


def images(
    new: New, place: str, b: int, channels: int, size: Sequence[int], dtype: str, layout: str = "nhwc"
) -> Tensor:
    height, width = size
    if place == "cropped":
        return new(b, channels, height, width + 16, dtype=dtype, layout=layout)[..., 8 : 8 + width]
    return new(b, channels, height, width, dtype=dtype, layout=layout, offset=int(place == "unaligned"))


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))


FLOATS = ("fp16", "bf16", "fp32")


@op(
    out=(*FLOATS, "int64"),
    image=("3x64x64", "4x8x8", "1x5x7", "3x1024x1024"),
    draw=("tensor", "value"),
    offset=(0, 1),
)
def philox(new: New, out: str, image: str, draw: str, offset: int) -> Iterator[Build]:
    from fastdiff_kernels.jit.philox import plan_philox

    written = new(3, *sizes(image), dtype=out, offset=offset)
    plan = plan_philox(new(3, dtype="int64"), new(1, dtype="int64") if draw == "tensor" else 7, 0, written)
    # an image is one row, and Triton knows where rows begin only to 16 elements
    whole = written[0].numel() % 16 == 0 and offset * written.element_size() % ALIGNMENT == 0
    yield Build(plan, {"out_ptr": WIDE} if whole else {})


@op(batch=(1, 7, 16), capacity=(1, 50, 1000), strided=(False, True))
def load_row(new: New, batch: int, capacity: int, strided: bool) -> Iterator[Build]:
    from fastdiff_kernels import NUM_COEFS
    from fastdiff_kernels.jit.load_row import plan_load_row

    step = 1 + strided
    yield Build(
        plan_load_row(
            new(capacity, NUM_COEFS * step)[:, ::step],
            new(capacity * step)[::step],
            new(1, dtype="int64"),
            new(NUM_COEFS * step)[::step],
            new(batch * step)[::step],
            new(1, dtype="int64"),
        )
    )


@op(
    out=FLOATS,
    image=("3x64x64", "4x8x8", "1x28x28", "3x5x7"),
    state=("nchw", "nhwc"),
    net=("nchw", "nhwc"),
    null_rows=(False, True),
    x_net=("none", "N", "2N"),
    noise=("none", "given", "seeds"),
    learned=(False, True),
    x0=(False, True),
    hist=(False, True),
    grad=(False, True),
    place=PLACES,
    strength=3,
)
def guided_step(
    new: New, out: str, image: str, state: str, net: str, null_rows: bool, x_net: str, noise: str, learned: bool,
    x0: bool, hist: bool, grad: bool, place: str,
) -> Iterator[Build]:  # fmt: skip
    from fastdiff_kernels import NUM_COEFS
    from fastdiff_kernels.jit.guided_step import plan_guided_step

    channels, *size = sizes(image)
    n = batch(place, channels, *size)
    rows = {"none": 0, "N": n, "2N": 2 * n}[x_net]

    def of_state() -> Tensor:
        return images(new, place, n, channels, size, "fp32", state)

    plan = plan_guided_step(
        of_state(),
        images(new, place, n * (1 + null_rows), channels * (1 + learned), size, out, net),
        new(NUM_COEFS),
        new(n),
        x_net=images(new, place, rows, channels, size, out, net) if rows else None,
        x0=of_state() if x0 else None,
        hist=of_state() if hist else None,
        grad=of_state() if grad else None,
        noise=of_state() if noise == "given" else None,
        seeds=new(n, dtype="int64") if noise == "seeds" else None,
        draw=new(1, dtype="int64") if noise == "seeds" else None,
        learned=learned,
    )
    # the state is walked in its own order; the network's tensors follow it if they have its layout, v or not
    followed = ["x", "x0", "hist", "grad", "noise"]
    if state == net or channels == 1:
        followed += ["x_net"] if learned and net == "nhwc" else ["x_net", "out"]
    given = [f"{name}_ptr" for name in followed if plan.args[f"{name}_ptr"] is not None]
    # a counter of Philox is four elements, and four elements are an access
    bits = {name: min(WIDE, 4 * plan.args[name].element_size() * 8) for name in given}
    aligned = place in ("whole", "single", "huge") and math.prod(size) % 16 == 0
    yield Build(plan, bits if aligned else {}, dict.fromkeys(given, 4 * plan.constexprs["BLOCK"]))


@op(
    dtype=FLOATS,
    channels=(6, 48, 100, 192, 288, 1344),
    image=("8x8", "16x16", "6x10", "64x64"),
    layout=("nhwc", "nchw"),
    resample=(None, "down", "up"),
    bias=("none", "fp32", "same"),
    stats=(False, True),
    # what a weight takes channels from; without it skip is added as it is, or there is no skip
    parts=("none", "no_skip", "192", "96+192", "60+43"),
    weight_bias=("none", "fp32", "same"),
    shared=(False, True),
    place=PLACES,
    allowed=lambda resample, parts, weight_bias, shared, **_: (
        (parts == "none" or resample is None)
        and (parts not in ("none", "no_skip") or weight_bias == "none")
        and (parts != "no_skip" or not shared)
    ),
    strength=3,
)
def residual(
    new: New,
    dtype: str,
    channels: int,
    image: str,
    layout: str,
    resample: str | None,
    bias: str,
    stats: bool,
    parts: str,
    weight_bias: str,
    shared: bool,
    place: str,
) -> Iterator[Build]:
    from fastdiff_kernels._tuning import num_chunks
    from fastdiff_kernels.jit.projection import plan_projection
    from fastdiff_kernels.jit.residual import plan_residual

    height, width = sizes(image)
    of_skip = {None: (height, width), "down": (2 * height, 2 * width), "up": (height // 2, width // 2)}[resample]
    b = batch(place, channels, height, width)
    h, y = (images(new, place, b, channels, (height, width), dtype, layout) for _ in "hy")
    rows = -(-b // 2) if shared else b

    def added(kind: str) -> Tensor | None:
        return None if kind == "none" else new(channels, dtype=dtype if kind == "same" else kind)

    bias_like = added(bias)
    written = new(2, b, num_chunks(height * width), channels) if stats else None
    if parts in ("none", "no_skip"):
        skip = images(new, place, rows, channels, of_skip, dtype, layout) if parts == "none" else None
        yield wide(plan_residual(h, bias_like, skip, y, written, resample), "h", "skip", "y")
        return
    c1, *more = (int(part) for part in parts.split("+"))
    # of two, the second has fewer rows
    plan = plan_projection(
        h,
        bias_like,
        images(new, place, b if more else rows, c1, (height, width), dtype, layout),
        images(new, place, rows, more[0], (height, width), dtype, layout) if more else None,
        new(channels, c1 + sum(more), dtype=dtype),
        added(weight_bias),
        y,
        written,
    )
    of = plan.constexprs
    tile = dict.fromkeys(("h_ptr", "y_ptr"), of["BLOCK_P"] * of["BLOCK_C"])
    if dtype == "fp32":
        # without tensor cores a thread holds few channels of the skips
        tile |= dict.fromkeys(("skip_ptr", "skip2_ptr"), of["BLOCK_P"] * of["BLOCK_K"])
    made = wide(plan, "h", "skip", "skip2", "y", tile=tile)
    # where nothing else wants y, Triton's AMD backend stores it as its matrix cores hold it, 4 elements together
    together = {} if stats or not made.bits else {"y_ptr": 4 * y.element_size() * 8}
    yield dataclasses.replace(made, of_amd=together)


@op(
    x0=FLOATS,
    x_t=FLOATS,
    noise=("seeds", "same", "fp32"),
    draw=("tensor", "value"),
    prediction=("eps", "v", "x0"),
    image=("3x64x64", "4x8x8", "1x28x28", "3x5x7", "192x16x16"),
    layout=("nchw", "nhwc"),
    place=PLACES,
    allowed=lambda noise, draw, **_: noise == "seeds" or draw == "value",
    strength=3,
)
def q_sample(
    new: New, x0: str, x_t: str, noise: str, draw: str, prediction: str, image: str, layout: str, place: str
) -> Iterator[Build]:
    from fastdiff_kernels.jit.q_sample import plan_q_sample

    channels, *size = sizes(image)
    n = batch(place, channels, *size)

    def of(dtype: str) -> Tensor:
        return images(new, place, n, channels, size, dtype, layout)

    drawn = noise == "seeds"
    plan = plan_q_sample(
        of(x0),
        new(n),
        new(n),
        None if drawn else of(x0 if noise == "same" else noise),
        new(n, dtype="int64") if drawn else None,
        new(1, dtype="int64") if draw == "tensor" else 7,
        2,
        of(x_t),
        of("fp32"),
        prediction,
    )
    written = plan.args["target_ptr"]
    if written.shape[1] == 1:
        # each image is one row, and Triton knows where rows begin only to 16 elements
        given = [name for name in ("x0_ptr", "noise_ptr", "x_t_ptr", "target_ptr") if plan.args[name] is not None]
        whole = place != "unaligned" and plan.args["HW"] % 16 == 0 and plan.constexprs["FLAT"]
        yield Build(plan, dict.fromkeys(given, WIDE) if whole else {})
    else:
        yield wide(plan, "x0", "noise", "x_t", "target")


# every width of the ADM-64 networks, some of ADM-128 and 256, small ones, one off the grid of 8; with groups, and the
# first part of each where it is two tensors
WIDTHS = {
    "192/32": 96,
    "576/32": 384,
    "960/32": 576,
    "1344/32": 768,
    "1536/32": 768,
    "2048/32": 1024,
    "32/8": 16,
    "60/5": 28,
}
NORM: dict[str, Any] = {
    "dtype": FLOATS,
    "channels": tuple(WIDTHS),
    "image": ("8x8", "16x16", "64x64", "6x10"),
    "layout": ("nhwc", "nchw"),
    "two": (False, True),
    "modulation": ("none", "fp32", "same", "rows"),
    "x_bias": (False, True),
    "silu": (True, False),
    "resample": (None, "down", "up"),
    "place": ("whole", "cropped", "unaligned", "huge"),
}


def norm(
    new: New, dtype: str, channels: str, image: str, layout: str, two: bool, modulation: str, x_bias: bool, silu: bool,
    resample: str | None, place: str, shared: bool = False,
) -> tuple[Norm, Tensor, Tensor]:  # fmt: skip
    """The inputs of a launch, y and the moments; modulation "rows" is that of twice as many rows as x has

    shared: x2 has half the rows of x.
    """
    from fastdiff_kernels.jit.norm import Norm

    c, groups = (int(part) for part in channels.split("/"))
    c1 = WIDTHS[channels] if two else c
    height, width = sizes(image)
    out = {None: (height, width), "down": (height // 2, width // 2), "up": (2 * height, 2 * width)}[resample]
    b = (1 + shared) * batch(place, c, height, width)
    rows = 2 * b if modulation == "rows" else b
    parameters = "fp32" if modulation == "fp32" else dtype
    # scale and shift are halves of a wider matrix
    mod = None if modulation == "none" else new(rows, 4 * c, dtype=parameters)
    inputs = Norm(
        x=images(new, place, b, c1, (height, width), dtype, layout),
        x2=images(new, place, b // (1 + shared), c - c1, (height, width), dtype, layout) if two else None,
        x_bias=new(c, dtype=parameters) if x_bias else None,
        weight=new(c, dtype=parameters),
        bias=new(c, dtype=parameters),
        scale=None if mod is None else mod[:, c : 2 * c],
        shift=None if mod is None else mod[:, 2 * c : 3 * c],
        silu=silu,
        resample=resample,
    )
    return inputs, images(new, place, rows, c, out, dtype, layout), new(2, b, groups)


def tiles(plan: Plan, resample: str | None) -> dict[str, int]:
    """A slab has all pixels of an image and no more, of the smaller tensor a quarter"""
    if "SLAB" not in plan.constexprs:
        return {}
    here = plan.constexprs["BLOCK_P"] * plan.constexprs["BLOCK_C"]
    return dict.fromkeys(("x_ptr", "x2_ptr", "dx_ptr", "dx2_ptr"), here) | dict.fromkeys(
        ("y_ptr", "g_ptr"), here // 4 if resample == "down" else here
    )


@op(
    strength=3,
    stats=(False, True),
    moments=(False, True),
    shared=(False, True),
    allowed=lambda two, modulation, shared, **_: not shared or (two and modulation != "rows"),
    **NORM,
)
def ada_group_norm(
    new: New, resample: str | None, stats: bool, moments: bool, shared: bool, **factors: Any
) -> Iterator[Build]:
    from fastdiff_kernels.jit.ada_group_norm import new_statistics, plan_ada_group_norm

    inputs, y, written = norm(new, resample=resample, shared=shared, **factors)
    made = [new_statistics(x) if stats and x is not None else None for x in (inputs.x, inputs.x2)]
    for plan in plan_ada_group_norm(inputs, y, written if moments else None, written.shape[2], 1e-5, *made):
        yield wide(plan, "x", "x2", "y", tile=tiles(plan, resample))


@op(strength=3, dx=(True, False), **NORM)
def ada_group_norm_backward(new: New, resample: str | None, dx: bool, **factors: Any) -> Iterator[Build]:
    from fastdiff_kernels.jit.ada_group_norm_backward import dx_blocks, plan_ada_group_norm_backward

    inputs, g, moments = norm(new, resample=resample, **factors)
    x, x2, c = inputs.x, inputs.x2, g.shape[1]
    plans = plan_ada_group_norm_backward(
        inputs,
        g,
        moments,
        new(2, len(g), c),
        torch.empty_like(x) if dx else None,
        torch.empty_like(x2) if dx and x2 is not None else None,
        new(len(x), dx_blocks(inputs, moments.shape[2]), c) if dx and inputs.x_bias is not None else None,
    )
    for plan in plans:
        yield wide(plan, "x", "x2", "g", "dx", "dx2", tile=tiles(plan, resample))


@functools.cache
def sites() -> dict[str, Site]:
    """The norms of ADM-64 and ADM-256 up to 16 x 16 pixels, alone and with all that can be fused, by what they read"""
    found = {}
    for name in TIMED:
        for site in (each for one in norm_sites(name) for each in (one.plain, one.fused) if each.side <= 16):
            parts = "+".join(map(str, site.split or (site.channels,)))
            options = [word for word in ("modulated", "silu", "folded") if getattr(site, word)]
            found["/".join([parts, f"{site.side}x{site.side}", *options, site.resample or "same"])] = site
    return found


def launches_of_site(new: New, site: str, dtype: str) -> Iterator[Build]:
    """Those of one launch: what a slab holds depends on the shape, other tiles do not"""
    from fastdiff_kernels.jit.ada_group_norm import plan_ada_group_norm
    from fastdiff_kernels.jit.ada_group_norm_backward import dx_blocks, plan_ada_group_norm_backward
    from fastdiff_kernels.jit.norm import Norm

    s, b = sites()[site], batch("whole")
    (c1, c2), c = s.split or (s.channels, 0), s.channels
    side = {None: s.side, "down": s.side // 2, "up": 2 * s.side}[s.resample]
    mod = new(b, 2 * c, dtype=dtype) if s.modulated else None
    inputs = Norm(
        x=new(b, c1, s.side, s.side, dtype=dtype, layout="nhwc"),
        x2=new(b, c2, s.side, s.side, dtype=dtype, layout="nhwc") if c2 else None,
        x_bias=new(c, dtype=dtype) if s.folded else None,
        weight=new(c, dtype=dtype),
        bias=new(c, dtype=dtype),
        scale=None if mod is None else mod[:, :c],
        shift=None if mod is None else mod[:, c:],
        silu=s.silu,
        resample=s.resample,
    )
    y, moments = new(b, c, side, side, dtype=dtype, layout="nhwc"), new(2, b, s.groups)
    dx, dx2 = torch.empty_like(inputs.x), None if inputs.x2 is None else torch.empty_like(inputs.x2)
    dx_sums = new(b, dx_blocks(inputs, s.groups), c) if s.folded else None
    for plan in (
        *plan_ada_group_norm(inputs, y, moments, s.groups, 1e-5),
        *plan_ada_group_norm_backward(inputs, y, moments, new(2, b, c), dx, dx2, dx_sums),
    ):
        if plan.name.startswith("slab"):
            yield wide(plan, "x", "x2", "y", "g", "dx", "dx2", tile=tiles(plan, s.resample))


@op(
    check=False,
    allowed=lambda site, dtype: any(launches_of_site(New(), site, dtype)),
    site=tuple(sites()),
    dtype=FLOATS,
)
def network_norms(new: New, site: str, dtype: str) -> Iterator[Build]:
    return launches_of_site(new, site, dtype)
