"""The registry of norm sites, against a forward pass, and the bytes of whole networks, against the design's counts"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.registry import (
    DESIGN,
    _attention,
    _res_block,
    launched_bytes,
    main,
    norm_plans,
    residual_plan,
    tier_bytes,
)
from benchmarks.sites import NETWORKS, Block, Site, blocks, network, norm_sites
from benchmarks.traffic import nbytes
from fastdiff.evaluation.results import read_rows
from fastdiff.model import PRESETS, UNet
from fastdiff.model.blocks import AdaGroupNorm, Stage
from fastdiff_kernels._impl import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed, and plans are built with it")


@pytest.mark.parametrize("name", NETWORKS)
def test_sites_are_what_a_forward_pass_sees(name: str) -> None:
    seen: dict[str, tuple[int, int, bool, bool]] = {}
    written: list[int] = []

    def hook(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            # statistics have four dimensions too, two for the image
            activations = [v for v in given if v.dim() == 4 and len(v) == 1]
            silu = kwargs.get("silu", not (len(args) > 3 and args[3] is False))
            channels = sum(v.shape[1] for v in activations)
            seen[path] = (channels, activations[0].shape[2], any(v.dim() == 2 for v in given), silu)

        return record

    with FakeTensorMode(), torch.no_grad():
        net = UNet(PRESETS[name])
        for path, module in net.named_modules():
            if isinstance(module, AdaGroupNorm):
                module.register_forward_pre_hook(hook(path), with_kwargs=True)
            if isinstance(module, Stage):
                module.register_forward_hook(lambda module, args, out: written.append(out.shape[1]))
        side = net.config.image_size
        net(torch.empty(1, 3, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    sites = norm_sites(name)
    assert [site.name for site in sites] == list(seen)
    assert [(site.channels, site.side, site.modulated, site.silu) for site in sites] == list(seen.values())
    assert len(sites) == NETWORKS[name]
    # a decoder block concatenates what the stage before it wrote and, last in first out, what the encoder's wrote
    splits = [site.split for site in sites if site.split]
    decoder = len(splits)
    assert splits == list(zip(written[-decoder - 1 : -1], reversed(written[:decoder]), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_surrounds_a_site_fits_it(name: str) -> None:
    by_name = {site.name: site for site in norm_sites(name)}
    skips = [block for block in blocks(name) if block.split]
    config = network(name).config
    assert len(skips) == len(config.widths) * (config.num_blocks + 1)
    for block in blocks(name):
        if block.kind == "attention":
            continue
        site = by_name[f"{block.name}.in_layers.0"]
        assert sum(block.split or (block.channels,)) == block.channels
        assert (site.split, site.resample) == (block.split, block.resample)
        assert by_name[f"{block.name}.out_layers.0"].side == block.out_side
    # what the input convolution writes is read by the first block and by the last one, and a residual wrote all else
    without = [site.name for site in norm_sites(name) if not site.folded and not site.stats]
    assert without == ["input_blocks.1.0.in_layers.0"]
    assert [site for site in by_name.values() if site.split and not site.stats2] == [
        by_name[f"{skips[-1].name}.in_layers.0"]
    ]


@pytest.mark.parametrize(("name", "tier"), DESIGN)
def test_bytes_are_those_that_the_design_counts(name: str, tier: str) -> None:
    assert tier_bytes(name, tier) == pytest.approx(1e9 * DESIGN[name, tier], abs=0.5e6)


def test_a_tier_by_hand() -> None:
    """One ResBlock 4 -> 8 channels at side 2 and an attention, counted in elements"""
    block, pixels = Block("", "res", 4, 8, 2, None, (3, 1)), 4
    # concat 2, norm 3, conv, norm 3, conv, skip, residual 3
    t2 = pixels * (2 * 4 + 3 * 4 + (4 + 8) + 3 * 8 + 2 * 8 + (4 + 8) + 3 * 8)
    assert sum(p.reads + p.writes for p in _res_block(block, "T2")) == t2
    # norm 2, conv, norm 3, conv, residual with the skip's product
    t3 = pixels * (2 * 4 + (4 + 8) + 3 * 8 + 2 * 8 + (8 + 4 + 8))
    assert sum(p.reads + p.writes for p in _res_block(block, "T3")) == t3
    attention = Block("", "attention", 8, 8, 2)
    assert sum(p.reads + p.writes for p in _attention(attention, "T2")) == pixels * 8 * (3 + 4 + 4 + 2 + 3)
    assert sum(p.reads + p.writes for p in _attention(attention, "T3")) == pixels * 8 * (2 + 4 + 4 + 3)


@needs_triton
@pytest.mark.parametrize("name", NETWORKS)
def test_launches_stay_between_the_floor_and_what_is_not_fused(name: str) -> None:
    parts = launched_bytes(name)
    floor = 0
    for site in norm_sites(name):
        plans = norm_plans(site, 1, torch.float16)
        tensors = {key: plans[-1].args[f"{key}_ptr"] for key in ("x", "x2", "y")}
        floor += nbytes(*(v for v in tensors.values() if isinstance(v, torch.Tensor)))
    assert floor < parts["norms"] < 1.6 * floor
    assert tier_bytes(name, "rest") == parts["others"] < sum(parts.values()) < tier_bytes(name, "T2")
    # nothing depends on the batch but what grows with it
    assert sum(launched_bytes(name, 3).values()) == pytest.approx(sum(parts.values()), rel=1e-6)


@needs_triton
def test_a_handed_statistic_saves_a_launch() -> None:
    site = Site("", 192, 64, 32, modulated=False, silu=True, stats=True)
    names = [[plan.name for plan in norm_plans(s, 2, torch.float16)] for s in (site.plain, site.fused)]
    assert names == [["statistics", "apply"], ["apply"]]
    assert residual_plan(blocks("adm-64")[0], 2, torch.float16).name == "residual"


@needs_triton
@pytest.mark.parametrize("name", NETWORKS)
def test_a_site_computes_the_statistics_that_nobody_hands_in(name: str) -> None:
    for site in norm_sites(name):
        plans = [plan.name for plan in norm_plans(site, 2, torch.float16)]
        wanted = [not site.stats] + [not site.stats2] * (site.split is not None)
        assert plans == ["slab"] or plans == ["statistics"] * sum(wanted) + ["apply"], site


@needs_triton
@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_of_two_gives_every_multiprocessor_a_program(name: str) -> None:
    """But for images of 16 x 16 and less, which have little to divide"""
    grids = {
        (plan.name, site): plan.grid[0]
        for norm in norm_sites(name)
        for site in (norm.plain, norm.fused)
        for plan in norm_plans(site, 2, torch.float16)
        if site.side > 16
    }
    grids |= {("residual", b): residual_plan(b, 2, torch.float16).grid[0] for b in blocks(name) if b.out_side > 16}
    assert len(grids) > 10 and min(grids.values()) >= 132, sorted(grids.items(), key=lambda item: item[1])[0]


@needs_triton
def test_the_table_is_printed_and_stored(tmp_path, capsys) -> None:
    main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = read_rows(tmp_path, "bytes")
    assert {(row["network"], row["composition"]) for row in rows} == {
        (name, tier) for name in NETWORKS for tier in ("T2", "T3", "launches")
    }
    for row in rows:
        assert f"{row['bytes_per_image'] / 1e9:.4f}" in printed
        assert row["device"] == "computed" and row["commit"]
