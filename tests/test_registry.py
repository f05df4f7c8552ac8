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
    main,
    norm_plans,
    residual_plan,
    tier_bytes,
)
from benchmarks.sites import NETWORKS, Block, Site, blocks, network, norm_sites
from fastdiff.evaluation.results import read_rows
from fastdiff.model import PRESETS, UNet
from fastdiff.model.blocks import AdaGroupNorm
from fastdiff_kernels._impl import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed, and plans are built with it")


@pytest.mark.parametrize("name", NETWORKS)
def test_sites_are_what_a_forward_pass_sees(name: str) -> None:
    seen: dict[str, tuple[int, int, bool, bool]] = {}
    around: dict[str, tuple[tuple[int, int] | None, str | None]] = {}

    def hook(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            parts = [part.x for part in args if part is not None]
            modulated, silu = kwargs.get("scale") is not None, kwargs.get("silu", True)
            seen[path] = (sum(x.shape[1] for x in parts), parts[0].shape[2], modulated, silu)
            split = (parts[0].shape[1], parts[1].shape[1]) if len(parts) == 2 else None
            around[path] = (split, kwargs.get("resample"))

        return record

    with FakeTensorMode(), torch.no_grad():
        net = UNet(PRESETS[name])
        for path, module in net.named_modules():
            if isinstance(module, AdaGroupNorm):
                module.register_forward_pre_hook(hook(path), with_kwargs=True)
        side = net.config.image_size
        net(torch.empty(1, 3, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    sites = norm_sites(name)
    assert [site.name for site in sites] == list(seen)
    assert [(site.channels, site.side, site.modulated, site.silu) for site in sites] == list(seen.values())
    assert len(sites) == NETWORKS[name]
    assert [(site.split, site.resample) for site in sites] == list(around.values())


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
    # what a convolution alone has written is not known yet; all else has passed a residual
    assert all(site.stats != site.folded and site.stats2 == (site.split is not None) for site in norm_sites(name))


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
        (name, tier) for name in NETWORKS for tier in ("T2", "T3")
    }
    for row in rows:
        assert f"{row['bytes_per_image'] / 1e9:.4f}" in printed
        assert row["device"] == "computed" and row["commit"]
