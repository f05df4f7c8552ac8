"""Activation bytes of one image through whole networks in float16, by what is fused: a table, and rows of kind "bytes"

    python -m benchmarks.registry [--out benchmarks/results]

T2: a norm with its modulation and SiLU is 2 reads + 1 write, biases are folded into it, all else stands alone.
T3: besides, no concatenation is stored; a norm whose input a residual wrote reads it once, its statistics handed in;
    resampling happens on the way out of the norm, which writes the pooled skip too, and on the way into the sum;
    the 1x1 convolution of a skip and the projection after attention take the sum with them.
What our own steps launch and move is count.py's.
A convolution or a matrix product is 1 read + 1 write of activations, attention 3 reads + 1 write. Weights, embeddings
and the modulation product are no activations.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.sites import NETWORKS, Block, Site, blocks, network, norm_sites
from fastdiff.evaluation.results import Row, append_row, git_state, results_file
from fastdiff_kernels._plan import Plan

ITEM = 2

# GB an image that the design was made with, to three decimals
DESIGN = {
    **{("adm-64", "T2"): 0.610, ("adm-64", "T3"): 0.457},
    **{("adm-128", "T2"): 1.659, ("adm-128", "T3"): 1.217},
    **{("adm-256", "T2"): 6.185, ("adm-256", "T3"): 4.505},
}


class Pass(NamedTuple):
    """Elements that one launch reads and writes"""

    what: str
    reads: int
    writes: int


def passes(name: str, tier: str) -> Iterator[Pass]:
    """Every pass over activations of one image; tier "T2" or "T3"; what their launches are, too"""
    config = network(name).config
    pixels, width = config.image_size**2, config.widths[0]
    yield Pass("conv", config.in_channels * pixels, width * pixels)
    for block in blocks(name):
        yield from (_attention if block.kind == "attention" else _res_block)(block, tier)
    yield _norm(width * pixels, width * pixels, tier == "T3")
    yield Pass("conv", width * pixels, config.out_channels * pixels)


def _norm(size: int, out: int, handed: bool) -> Pass:
    return Pass("norm", size if handed else 2 * size, out)


def _attention(block: Block, tier: str) -> Iterator[Pass]:
    size = block.channels * block.side**2
    yield _norm(size, size, tier == "T3")
    yield Pass("product", size, 3 * size)
    yield Pass("attention", 3 * size, size)
    if tier == "T3":
        yield Pass("product", 2 * size, size)
    else:
        yield Pass("product", size, size)
    if tier == "T2":
        yield Pass("residual", 2 * size, size)


def _res_block(block: Block, tier: str) -> Iterator[Pass]:
    before, after = block.channels * block.side**2, block.channels * block.out_side**2
    size = block.out_channels * block.out_side**2
    widened = block.channels != block.out_channels
    yield Pass("conv", after, size)
    yield Pass("conv", size, size)
    yield _norm(size, size, handed=False)
    if tier == "T2":
        if block.split:
            yield Pass("concat", before, before)
        yield _norm(before, before, handed=False)
        if block.resample:
            yield from [Pass("resample", before, after)] * 2
        if widened:
            yield Pass("skip", after, size)
        yield Pass("residual", 2 * size, size)
        return
    # the norm has the pixels of a 2x2 cell at hand, and writes their mean for the skip as well
    pooled = after if block.resample == "down" else 0
    yield _norm(before, after + pooled, handed=True)
    yield Pass("residual", size + (before if block.resample == "up" else after), size)


def tier_bytes(name: str, tier: str) -> int:
    return ITEM * sum(p.reads + p.writes for p in passes(name, tier))


def norm_plans(site: Site, rows: int, dtype: torch.dtype) -> list[Plan]:
    """The launches at a site, from tensors without memory"""
    from fastdiff_kernels._tuning import num_chunks
    from fastdiff_kernels.jit.ada_group_norm import plan_ada_group_norm
    from fastdiff_kernels.jit.norm import Norm

    pixels, factor = site.side**2, {"up": 2.0, "down": 0.5, None: 1.0}[site.resample]
    out_side = int(site.side * factor)
    c1, c2 = site.split or (site.channels, 0)

    def activation(channels: int, side: int) -> torch.Tensor | None:
        shape = (rows, channels, side, side)
        return _meta(*shape, dtype=dtype).to(memory_format=torch.channels_last) if channels else None

    def statistics(channels: int, given: bool) -> torch.Tensor | None:
        return _meta(2, rows, num_chunks(pixels), channels) if given and channels else None

    x, y = activation(c1, site.side), activation(site.channels, out_side)
    assert x is not None and y is not None
    vector = _meta(site.channels, dtype=dtype)
    modulation = _meta(rows, site.channels, dtype=dtype) if site.modulated else None
    norm = Norm(
        x=x,
        x2=activation(c2, site.side),
        x_bias=vector if site.folded else None,
        weight=vector,
        bias=vector,
        scale=modulation,
        shift=modulation,
        silu=site.silu,
        resample=site.resample,
    )
    made = statistics(c1, site.stats), statistics(c2, site.stats2)
    return plan_ada_group_norm(norm, y, None, site.groups, 1e-5, *made)


def residual_plan(block: Block, rows: int, dtype: torch.dtype) -> Plan:
    """The launch at the end of a block"""
    from fastdiff_kernels._tuning import num_chunks
    from fastdiff_kernels.jit.residual import plan_residual

    side, c = block.out_side, block.out_channels
    h, skip = (_meta(rows, c, s, s, dtype=dtype).to(memory_format=torch.channels_last) for s in (side, block.side))
    stats = _meta(2, rows, num_chunks(side * side), c)
    return plan_residual(h, _meta(c, dtype=dtype), skip, torch.empty_like(h), stats, block.resample)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def table() -> list[Row]:
    rows: list[Row] = []
    for name in NETWORKS:
        common = {"kind": "bytes", "network": name, "dtype": "float16", "norm_sites": len(norm_sites(name))}
        for tier in ("T2", "T3"):
            found = {"composition": tier, "bytes_per_image": tier_bytes(name, tier), "design_GB": DESIGN[name, tier]}
            rows.append(common | found)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.registry", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=None, help="folder or .jsonl file to append the rows to; default: only prints")
    out = parser.parse_args(arguments).out
    print(f"{'network':8} {'composition':12} {'GB/image':>9} {'design':>7} {'off by':>7}")
    rows = table()
    for row in rows:
        found, design = row["bytes_per_image"] / 1e9, row.get("design_GB")
        compared = "" if design is None else f" {design:7.3f} {found / design - 1:+7.2%}"
        print(f"{row['network']:8} {row['composition']:12} {found:9.4f}{compared}")
    if out is not None:
        commit, dirty = git_state()
        path = results_file(out, commit, "computed")
        for row in rows:
            append_row(path, row | {"device": "computed", "backend": "none", "commit": commit, "dirty": dirty})
        print(f"wrote {len(rows)} rows to {path}")


if __name__ == "__main__":
    main()
