"""What kernels are timed on: each op at the shapes of the networks, beside the PyTorch that users write for the same"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import Outputs
from benchmarks.sites import TIMED, Block, Site, blocks, network, norm_sites
from benchmarks.traffic import nbytes
from fastdiff_kernels import (
    COEFS,
    STREAM_STEP,
    STREAM_TRAINING,
    STREAM_X_T,
    ada_group_norm,
    guided_step,
    philox_normal,
    q_sample,
    reference,
    residual,
)
from fastdiff_kernels._impl import HAS_TRITON
from fastdiff_kernels._tuning import num_chunks

Arguments = dict[str, Tensor]

# rows that a network sees with guidance: 1, 8 and 64 images, each with its null row
BATCHES = (2, 16, 128)


@dataclasses.dataclass(frozen=True)
class Work:
    """A case with its data; every function takes the arguments by name

    ours: what is measured. eager: the same as users write it. exact: its formula on float64 arguments of some rows,
    with the noise that ours draws; None where users' code draws its own, so that eager's noise cannot be compared.
    rows: images; shared: arguments that are not one or two rows an image. private: arguments that only ours takes.
    written: arguments that ours writes. floor: bytes that any implementation must move.
    """

    arguments: Arguments
    ours: Callable[..., Outputs]
    eager: Callable[..., Outputs]
    exact: Callable[..., Outputs]
    rows: int
    floor: int
    random: bool = False
    shared: frozenset[str] = frozenset()
    private: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()

    @property
    def public(self) -> Arguments:
        return {name: value for name, value in self.arguments.items() if name not in self.private}

    def take(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """These images' rows, and their null rows where tensor has those"""
        return tensor[torch.cat([rows + start for start in range(0, len(tensor), self.rows)])]

    def some(self, rows: Tensor) -> Arguments:
        """Public arguments of these images in float64; seeds stay integers"""
        chosen = {k: v if k in self.shared else self.take(v, rows) for k, v in self.public.items()}
        return {k: v.double() if v.is_floating_point() else v for k, v in chosen.items()}


@dataclasses.dataclass(frozen=True)
class Case:
    """make(generator, dtype) draws new data on the generator's device"""

    op: str
    network: str
    batch: int
    shape: str
    make: Callable[[torch.Generator, torch.dtype], Work]

    @property
    def id(self) -> str:
        return f"{self.op}-{self.network.replace('-', '')}-b{self.batch}-{self.shape}"


class _Draw:
    """Random tensors; (B, C, H, W) in channels_last"""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype) -> None:
        self.generator, self.dtype, self.device = generator, dtype, generator.device

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, mean: float = 0.0) -> Tensor:
        nhwc = (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape
        x = torch.empty(nhwc, dtype=dtype or self.dtype, device=self.device).normal_(mean, generator=self.generator)
        return x.permute(0, 3, 1, 2) if len(shape) == 4 else x

    def seeds(self, n: int) -> Tensor:
        return torch.randint(0, 2**63 - 1, (n,), generator=self.generator, device=self.device)


def _passes_twice(channels: int, groups: int, pixels: int) -> bool:
    """Whether no slab of x fits on chip, so that it is read once more for statistics that nobody hands in"""
    if not HAS_TRITON:
        return False
    from fastdiff_kernels.jit.ada_group_norm import SLAB_ELEMENTS
    from fastdiff_kernels.jit.norm import slab_elements

    return slab_elements(channels, channels // groups, pixels) > SLAB_ELEMENTS


def _norm(site: Site, batch: int, generator: torch.Generator, dtype: torch.dtype) -> Work:
    draw = _Draw(generator, dtype)
    c, side = site.channels, site.side
    c1, c2 = site.split or (c, 0)
    x = draw(batch, c1, side, side, mean=0.5)
    arguments: Arguments = {"x": x, "weight": draw(c), "bias": draw(c)}
    if c2:
        arguments["x2"] = draw(batch, c2, side, side)
    if site.folded:
        arguments["x_bias"] = draw(c)
    if site.modulated:
        # halves of one product, as a network hands them over
        arguments["scale"], arguments["shift"] = draw(batch, 2 * c).chunk(2, dim=1)
    read = nbytes(*arguments.values())
    for name, source, given in (("stats", "x", site.stats), ("stats2", "x2", site.stats2)):
        if given:
            # a few rows at a time: the reference keeps several copies in float32
            parts = [reference.chunk_statistics(rows, num_chunks(side * side)) for rows in arguments[source].split(8)]
            arguments[name] = torch.cat(parts, 1)
    if _passes_twice(c, site.groups, side * side):
        alone = [source for source, given in (("x", site.stats), ("x2", site.stats2)) if not given]
        read += nbytes(*(arguments[source] for source in alone if source in arguments))
    options: dict[str, Any] = {"groups": site.groups, "silu": site.silu}

    def ours(**given: Tensor) -> Outputs:
        return (ada_group_norm(**given, **options, resample=site.resample),)  # type: ignore[arg-type]

    return Work(
        arguments,
        ours,
        eager := partial(peers.norm, **options, how=site.resample),
        eager,
        rows=batch,
        floor=read + int(batch * c * side**2 * dtype.itemsize * {"up": 4, "down": 0.25, None: 1}[site.resample]),
        shared=frozenset({"weight", "bias", "x_bias"}),
        private=frozenset({"stats", "stats2"}),
    )


def _backward(site: Site, batch: int, generator: torch.Generator, dtype: torch.dtype) -> Work:
    """The norm and the gradients of what differs from image to image, as training runs them"""
    forward = _norm(site, batch, generator, dtype)
    x = forward.arguments["x"]
    arguments = forward.arguments | {"g": _Draw(generator, dtype)(*x.shape)}
    leaves = [name for name in ("x", "scale", "shift") if name in arguments]

    def graded(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
        def run(g: Tensor, **given: Tensor) -> Outputs:
            with torch.enable_grad():
                wanted = {name: given[name].detach().requires_grad_() for name in leaves}
                (y,) = function(**(given | wanted))
                return torch.autograd.grad(y, list(wanted.values()), g)

        return run

    return dataclasses.replace(
        forward,
        arguments=arguments,
        ours=graded(forward.ours),
        eager=graded(forward.eager),
        exact=graded(forward.exact),
        # x and g are read, dx written
        floor=forward.floor + 3 * nbytes(x),
    )


def _residual(block: Block, batch: int, generator: torch.Generator, dtype: torch.dtype) -> Work:
    draw = _Draw(generator, dtype)
    c, side = block.out_channels, block.out_side
    h, skip, bias = draw(batch, c, side, side), draw(batch, c, block.side, block.side), draw(c)

    def ours(h: Tensor, bias: Tensor, skip: Tensor) -> Outputs:
        # the statistics for the next norm come with it
        return (residual(h, bias, skip, resample=block.resample)[0],)

    return Work(
        {"h": h, "bias": bias, "skip": skip},
        ours,
        eager := partial(peers.residual, how=block.resample),
        eager,
        rows=batch,
        floor=nbytes(h, skip, bias, h),
        shared=frozenset({"bias"}),
    )


def _step(n: int, side: int, learned: bool, generator: torch.Generator, dtype: torch.dtype) -> Work:
    draw = _Draw(generator, dtype)
    row = peers.ROW if learned else {**peers.ROW, "c_noise": 0.0}
    coefs = torch.tensor([row.get(name, 0.0) for name in COEFS], device=draw.device)
    x, out = draw(n, 3, side, side, dtype=torch.float32), draw(2 * n, 6 if learned else 3, side, side)
    x_net = torch.empty_like(out[:, :3], memory_format=torch.channels_last)
    w = torch.rand(n, generator=generator, device=draw.device) + 0.5
    at = torch.tensor([7], device=draw.device)
    arguments = {"x": x, "out": out, "w": w} | ({"seeds": draw.seeds(n)} if learned else {})

    def ours(x: Tensor, out: Tensor, w: Tensor, seeds: Tensor | None = None) -> Outputs:
        draws = None if seeds is None else at
        guided_step(x, out, coefs, w, x_net=x_net, seeds=seeds, draw=draws, learned=learned)
        return x, x_net

    def eager(x: Tensor, out: Tensor, w: Tensor, seeds: Tensor | None = None) -> Outputs:
        return peers.step(x, out, w, None, learned=learned, dtype=dtype)

    def exact(x: Tensor, out: Tensor, w: Tensor, seeds: Tensor | None = None) -> Outputs:
        noise = None if seeds is None else _normals(seeds, x.shape[1:], 7, STREAM_STEP)
        return peers.step(x, out, w, noise, learned=learned, dtype=x.dtype)

    # the null half's variance is not read
    read = nbytes(out) * 3 // 4 if learned else nbytes(out)
    return Work(
        *(arguments, ours, eager, exact),
        rows=n,
        floor=nbytes(x, x, x_net, w) + read,
        random=learned,
        written=frozenset({"x"}),
    )


def _normals(seeds: Tensor, shape: tuple[int, ...], draw: int, stream: int) -> Tensor:
    return reference.philox_normal(seeds, shape, draw=draw, stream=stream, dtype=torch.float64)


def _q_sample(n: int, side: int, generator: torch.Generator, dtype: torch.dtype) -> Work:
    draw = _Draw(generator, dtype)
    angle = torch.rand(n, generator=generator, device=draw.device) * 1.4 + 0.1
    x0 = draw(n, 3, side, side)
    arguments = {"x0": x0, "alpha": angle.cos(), "sigma": angle.sin(), "seeds": draw.seeds(n)}

    def ours(x0: Tensor, alpha: Tensor, sigma: Tensor, seeds: Tensor) -> Outputs:
        return q_sample(x0, alpha, sigma, seeds=seeds, draw=3)

    def eager(x0: Tensor, alpha: Tensor, sigma: Tensor, seeds: Tensor) -> Outputs:
        return peers.forward_process(x0, alpha, sigma, None)

    def exact(x0: Tensor, alpha: Tensor, sigma: Tensor, seeds: Tensor) -> Outputs:
        return peers.forward_process(x0, alpha, sigma, _normals(seeds, x0.shape[1:], 3, STREAM_TRAINING))

    return Work(arguments, ours, eager, exact, rows=n, floor=2 * nbytes(x0) + 4 * x0.numel(), random=True)


def _philox(n: int, side: int, generator: torch.Generator, dtype: torch.dtype) -> Work:
    draw, shape = _Draw(generator, dtype), (3, side, side)

    def ours(seeds: Tensor) -> Outputs:
        return (philox_normal(seeds, shape, draw=0, stream=STREAM_X_T),)

    def eager(seeds: Tensor) -> Outputs:
        return (torch.randn((len(seeds), *shape), device=seeds.device),)

    def exact(seeds: Tensor) -> Outputs:
        return (_normals(seeds, shape, 0, STREAM_X_T),)

    floor = 4 * n * 3 * side * side
    return Work({"seeds": draw.seeds(n)}, ours, eager, exact, rows=n, floor=floor, random=True)


def _describe(site: Site) -> str:
    """Everything that tells sites apart"""
    parts = [f"{site.channels}x{site.side}x{site.side}"]
    parts += ["mod"] * site.modulated + ["nosilu"] * (not site.silu) + [site.resample or ""]
    parts += [f"cat{site.split[1]}"] if site.split else []
    parts += ["folded"] * site.folded
    parts += ["stats"] * site.stats + ["stats2"] * site.stats2
    return "-".join(part for part in parts if part)


def _pointwise(name: str, side: int, rows: int) -> Iterator[Case]:
    """Ops on images, of which a doubled batch has half as many as rows"""
    n = max(1, rows // 2)
    yield Case("guided_step", name, rows, f"{n}x3x{side}x{side}-ddim", partial(_step, n, side, False))
    yield Case("guided_step", name, rows, f"{n}x3x{side}x{side}-learned", partial(_step, n, side, True))
    yield Case("q_sample", name, rows, f"{rows}x3x{side}x{side}", partial(_q_sample, rows, side))
    yield Case("philox", name, rows, f"{n}x3x{side}x{side}", partial(_philox, n, side))


def network_cases(name: str, batch: int) -> Iterator[Case]:
    """Each op once at every shape that a network has; "norm" alone, "fused" with all that its place allows"""
    sites = norm_sites(name)
    plain = dict.fromkeys(site.plain for site in sites)
    for site in plain:
        yield Case("norm", name, batch, _describe(site), partial(_norm, site, batch))
    for site in dict.fromkeys(site.fused for site in sites):
        if site not in plain:
            yield Case("fused", name, batch, _describe(site), partial(_norm, site, batch))
    # training at the middle batch
    for site in plain if batch == BATCHES[1] else ():
        yield Case("backward", name, batch, _describe(site), partial(_backward, site, batch))
    for block in dict.fromkeys(block._replace(name="", kind="", channels=0, split=None) for block in blocks(name)):
        shape = f"{block.out_channels}x{block.out_side}x{block.out_side}" + (f"-{block.resample or ''}".rstrip("-"))
        yield Case("residual", name, batch, shape, partial(_residual, block, batch))
    yield from _pointwise(name, network(name).config.image_size, batch)


def gpu_cases() -> list[Case]:
    return [case for name in TIMED for batch in BATCHES for case in network_cases(name, batch)]


def cpu_cases() -> list[Case]:
    """A few shapes that a CPU takes no time for: they prove that every case can be made, checked and timed"""
    plain = Site("", 48, 8, 8, modulated=True, silu=True)
    fused = Site("", 48, 8, 8, False, True, resample="down", split=(32, 16), stats=True, stats2=True)
    block = Block("", "", 0, 48, 8, "up")
    cases = [
        Case("norm", "tiny", 2, _describe(plain), partial(_norm, plain, 2)),
        Case("fused", "tiny", 2, _describe(fused), partial(_norm, fused, 2)),
        Case("backward", "tiny", 2, _describe(plain), partial(_backward, plain, 2)),
        Case("residual", "tiny", 2, "48x16x16-up", partial(_residual, block, 2)),
    ]
    return cases + list(_pointwise("tiny", 8, 4))
