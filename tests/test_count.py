"""The counter of launches and bytes: by hand on single ops, and on whole networks against the design's counts"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import count as counting
from benchmarks import published
from benchmarks.count import Counted, count, main, row_of, scheduler_table
from benchmarks.registry import passes, tier_bytes
from benchmarks.sites import NETWORKS, blocks, network
from benchmarks.traffic import moved
from fastdiff.evaluation.results import read_rows
from fastdiff.model import UNet, UNetConfig
from fastdiff.schedule import Schedule
from fastdiff.solvers import ddpm
from fastdiff_kernels import COEFS, _plan, ada_group_norm, philox_normal, reference, residual
from fastdiff_kernels._impl import HAS_TRITON
from fastdiff_kernels._plan import Plan

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed, and plans are built with it")

SMALL = UNetConfig(
    image_size=8,
    out_channels=6,
    channels=16,
    channel_mult=(1, 2),
    num_blocks=1,
    attention_resolutions=(4,),
    head_channels=8,
    num_labels=5,
    groups=4,
)

# launches a step of one image and GB, "eager as published" in the design's table; launches of T3 there
DESIGN = {"adm-64": (1290, 2.89, 271), "adm-128": (1170, 5.29, 242), "adm-256": (1340, 19.06, 277)}


def random_network(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    network = UNet(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    return network


# ---------------------------------------------------------------------------------------- the network as published


@pytest.mark.parametrize(
    "changed",
    [{}, {"num_labels": None}, {"head_channels": None, "num_heads": 2}, {"channel_mult": (1, 2, 2), "num_blocks": 2}],
    ids=lambda changed: "-".join(changed) or "small",
)
def test_the_published_composition_computes_what_the_network_does(changed: dict[str, Any]) -> None:
    config = dataclasses.replace(SMALL, **changed)
    network = random_network(config)
    theirs = published.Network(config).eval().load(network)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 17.5, 999.0])
    y = None if config.num_labels is None else torch.tensor([0, 4, 2])
    with torch.no_grad():
        expected, got = network(x, t, y), theirs(x, t, y)
        half = theirs.half_convolutions()(x, t, y)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    # float16 inside, float32 outside
    assert half.dtype == torch.float32 and not torch.equal(half, got)
    assert (half - got).norm() < 1e-2 * got.norm()
    assert {p.dtype for name, p in theirs.named_parameters() if "emb" in name or "norm" in name} == {torch.float32}


def test_what_was_never_published_is_refused() -> None:
    with pytest.raises(ValueError, match="scale_shift and resblock_updown"):
        published.Network(dataclasses.replace(SMALL, scale_shift=False))


@pytest.mark.parametrize("row", range(6))
def test_the_published_step_is_a_row_of_ddpm(row: int) -> None:
    table = ddpm(Schedule.named("cosine"), 6, variance="learned_range")
    generator = torch.Generator().manual_seed(row)
    x, noise = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    out = torch.randn(4, 6, 4, 4, generator=generator)
    w, seen = torch.tensor([1.5, 1.5]), []

    def network(both: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        seen.append((both, t))
        return out

    doubled = torch.cat([x, torch.full_like(x, 7.0)])
    got = published.sampling_step(network, table, row, doubled, None, 1.5, lambda like: torch.cat([noise, noise]))
    coefs = torch.from_numpy(table.pack(COEFS))[row].float()
    expected, _, _ = reference.guided_step(x, out, coefs, w, noise=noise, learned=True)
    torch.testing.assert_close(got[:2], expected, rtol=1e-5, atol=1e-5)
    (both, t), *_ = seen
    # the second half of the batch is the first again, whatever came
    assert torch.equal(both, torch.cat([x, x])) and torch.equal(t, torch.full((4,), float(table.t[row])))


# ----------------------------------------------------------------------------------------------- single ops by hand


def half(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(half(*shape))


def facts(counted: Counted) -> tuple[int, int, int]:
    return counted.launches, counted.bytes, counted.weight_bytes


def test_a_convolution_and_its_bias() -> None:
    x, weight, bias = half(2, 4, 6, 6), parameter(8, 4, 3, 3), parameter(8)
    size_x, size_y, size_w = 2 * 2 * 4 * 36, 2 * 2 * 8 * 36, 2 * 8 * 4 * 9
    with_bias = count(lambda: F.conv2d(x, weight, bias, padding=1))
    assert facts(with_bias) == (2, size_x + 3 * size_y, size_w + 16)
    assert facts(count(lambda: F.conv2d(x, weight, None, padding=1))) == (1, size_x + size_y, size_w)
    assert facts(count(lambda: F.conv1d(x.flatten(2), parameter(8, 4, 1), bias)))[0] == 2


@pytest.mark.parametrize("which", ["both", "input", "weight"])
def test_a_convolution_copies_what_lies_otherwise(which: str) -> None:
    x, weight = half(2, 4, 6, 6), parameter(8, 4, 3, 3)
    if which != "weight":
        x = x.to(memory_format=torch.channels_last)
    if which != "input":
        weight = nn.Parameter(weight.to(memory_format=torch.channels_last))
    made: list[torch.Tensor] = []
    counted = count(lambda: made.append(F.conv2d(x, weight, None, padding=1)))
    assert made[0].is_contiguous(memory_format=torch.channels_last)
    copied = {"both": [], "input": ["weight"], "weight": ["input"]}[which]
    assert counted.by_op == {"convolution": 1, **({"clone": 1} if copied else {})}
    assert [name.split()[4] for name in counted.layout_copies] == copied
    assert all("test_count.py:" in name for name in counted.layout_copies)


def test_a_group_norm_is_three_launches() -> None:
    x, weight, bias = half(2, 8, 4, 4), parameter(8), parameter(8)
    counted = count(lambda: F.group_norm(x, 4, weight, bias))
    size, moments, affine = 2 * 2 * 8 * 16, 2 * 2 * 4 * 2, 2 * 2 * 8 * 2
    assert facts(counted) == (3, 3 * size + 2 * moments + 2 * affine, 2 * 2 * 8)
    # on a GPU it takes NCHW, and copies what is not
    nhwc = x.to(memory_format=torch.channels_last)
    counted = count(lambda: F.group_norm(nhwc, 4, weight, bias))
    assert counted.by_op == {"clone": 1, "native_group_norm": 3} and counted.layout_copies.total() == 1


def test_products() -> None:
    a, weight, bias = half(5, 16), parameter(8, 16), parameter(8)
    sizes = (2 * 5 * 16, 2 * 5 * 8)
    assert facts(count(lambda: F.linear(a, weight, bias))) == (1, sum(sizes), 2 * 8 * 17)
    assert facts(count(lambda: F.linear(a, weight))) == (1, sum(sizes), 2 * 8 * 16)
    assert facts(count(lambda: torch.bmm(half(3, 5, 4), half(3, 4, 6)))) == (1, 2 * 3 * (20 + 24 + 30), 0)
    with pytest.raises(LookupError, match="addmm"):
        count(lambda: torch.addmm(half(5, 8), a, half(16, 8)))


def test_pointwise_ops_read_and_write_once() -> None:
    a, b = half(2, 8, 4, 4), half(2, 8, 1, 1)
    size, small = 2 * 2 * 8 * 16, 2 * 2 * 8
    assert facts(count(lambda: a + b)) == (1, 2 * size + small, 0)
    assert facts(count(lambda: a + b.expand(2, 8, 4, 4))) == (1, 2 * size + small, 0)
    assert facts(count(lambda: a.add_(b))) == (1, 2 * size + small, 0)
    assert facts(count(lambda: a.zero_())) == (1, size, 0)
    assert facts(count(lambda: a.float())) == (1, 3 * size, 0)
    assert facts(count(lambda: a.half())) == (0, 0, 0)
    assert facts(count(lambda: torch.cat([a, a], 1))) == (1, 4 * size, 0)
    assert facts(count(lambda: a.copy_(b))) == (1, size + small, 0)
    assert facts(count(lambda: F.avg_pool2d(a, 2))) == (1, size + size // 4, 0)
    assert facts(count(lambda: torch.softmax(a, -1))) == (1, 2 * size, 0)


def test_views_and_allocations_launch_nothing() -> None:
    a = half(2, 8, 4, 4)

    def views() -> None:
        first, second = a.permute(0, 2, 3, 1).reshape(2, 16, 8).chunk(2, dim=2)
        torch.empty_like(a)[0].unsqueeze(0).expand(3, 8, 4, 4).view(3, 8, 16).flatten(1)
        first.transpose(1, 2)[:, None].split(2), second.unbind(0), a.detach().squeeze(), a.new_empty(3)

    assert facts(count(views)) == (0, 0, 0)


def test_a_table_is_read_where_it_is_looked_up() -> None:
    table, rows = parameter(1000, 8), torch.empty(3, dtype=torch.int64, device="meta")
    assert facts(count(lambda: F.embedding(rows, table))) == (1, 3 * 8 + 2 * 3 * 8, 2 * 3 * 8)
    assert facts(count(lambda: half(1000, 8).index_select(0, rows))) == (1, 3 * 8 + 2 * 2 * 3 * 8, 0)
    assert facts(count(lambda: half(1000, 8)[rows])) == (1, 3 * 8 + 2 * 2 * 3 * 8, 0)


def test_attention_is_one_launch_and_keeps_the_layout_of_its_queries() -> None:
    q, k, v = half(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
    made: list[torch.Tensor] = []
    counted = count(lambda: made.append(F.scaled_dot_product_attention(q, k, v)))
    assert facts(counted) == (1, 4 * 2 * 2 * 16 * 4 * 8, 0) and counted.by_op == {"attention": 1}
    assert made[0].shape == q.shape and made[0].transpose(1, 2).is_contiguous()
    with pytest.raises(LookupError, match="attention"):
        count(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_a_copy_that_computes_nothing_is_listed() -> None:
    a = half(2, 8, 4, 4)

    def copies() -> None:
        a.transpose(2, 3).contiguous(), a.permute(0, 2, 3, 1).reshape(2, -1), a.to(memory_format=torch.channels_last)
        a.copy_(a.clone())

    counted = count(copies)
    assert counted.launches == counted.layout_copies.total() == 5
    assert not count(lambda: (a.float(), a.contiguous(), torch.ones(3).to("meta"))).layout_copies


def test_work_of_the_host_counts_nothing_and_an_upload_one() -> None:
    assert count(lambda: torch.arange(8).float().exp() * 2).launches == 0
    counted = count(lambda: torch.arange(8).to("meta"))
    assert counted.by_op == {"_to_copy": 1} and counted.bytes == 8 * 8


def test_an_op_that_nobody_looked_up_is_an_error() -> None:
    with pytest.raises(LookupError, match="cumsum"):
        count(lambda: half(4, 4).cumsum(0))
    assert not _plan.observers


# ------------------------------------------------------------------------------------------------------ fastdiff's ops


@needs_triton
def test_an_op_counts_its_plans() -> None:
    x = half(2, 192, 64, 64).to(memory_format=torch.channels_last)
    weight, bias = parameter(192), parameter(192)
    plans: list[Plan] = []
    _plan.observers.append(plans.append)
    try:
        counted = count(lambda: ada_group_norm(x, weight, bias, groups=32))
    finally:
        _plan.observers.remove(plans.append)
    assert counted.by_op.total() == len(plans) > 1 and set(counted.by_op) == {plan.name for plan in plans}
    assert counted.bytes == moved(plans) > 3 * 2 * x.numel()
    seeds, draw = torch.empty(2, dtype=torch.int64, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    assert count(lambda: philox_normal(seeds, (3, 8, 8), draw=draw, stream=1)).by_op == {"philox": 1}
    assert not count(lambda: ada_group_norm(x[:0], weight, bias, groups=32)).launches


@needs_triton
def test_a_product_of_ours_counts_as_a_product() -> None:
    h, skip = (half(2, c, 16, 16).to(memory_format=torch.channels_last) for c in (128, 64))
    weight, bias = parameter(128, 64), parameter(128)
    plans: list[Plan] = []
    _plan.observers.append(plans.append)
    try:
        counted = count(lambda: residual(h, bias, skip, weight=weight, stats=False))
    finally:
        _plan.observers.remove(plans.append)
    assert facts(counted) == (1, 2 * 2 * 256 * (128 + 64 + 128), 2 * 128 * 65)
    assert 0 < counted.reread_bytes == moved(plans) - counted.bytes - counted.weight_bytes


@needs_triton
def test_the_meta_device_runs_kernels_only_while_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = half(1, 8, 4, 4), half(8)
    assert ada_group_norm(x, weight, weight, groups=4).is_meta
    kinds: list[str] = []
    monkeypatch.setattr(_plan, "observers", [lambda plan: kinds.append(plan.name)])
    ada_group_norm(x, weight, weight, groups=4)
    ada_group_norm(x, weight, weight, groups=4, impl="reference")
    # of a dtype that no kernel takes
    ada_group_norm(x.double(), weight.double(), weight.double(), groups=4)
    assert kinds == ["slab"]


# ------------------------------------------------------------------------------------------------------ whole networks


published_network = functools.cache(counting.published_network)
fastdiff_step = functools.cache(counting.fastdiff_step)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_published_network_counts_what_the_design_counted(name: str, rows: int) -> None:
    counted = published_network(name, rows)
    launches, gigabytes, _ = DESIGN[name]
    assert counted.launches == pytest.approx(launches, rel=0.05)
    assert counted.bytes / rows / 1e9 == pytest.approx(gigabytes, rel=0.05)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_published_network_is_made_of_what_its_blocks_need(name: str) -> None:
    made, layout = published_network(name, 1).by_op, blocks(name)
    res = [block for block in layout if block.kind == "res"]
    attentions = len(layout) - len(res)
    assert made["native_group_norm"] == 3 * NETWORKS[name]
    assert made["_softmax"] == attentions and made["bmm"] == 2 * attentions
    widened = sum(block.channels != block.out_channels for block in res)
    assert made["convolution"] == made["convolution's bias"] == 2 * len(res) + widened + 2 * attentions + 2
    # every block has a product of its own, and the embedding two
    assert made["addmm"] == len(res) + 2
    # sines and cosines are joined, too
    assert made["cat"] == sum(block.split is not None for block in res) + 1
    assert made["avg_pool2d"] + made["upsample_nearest2d"] == 2 * sum(block.resample is not None for block in res)


@pytest.mark.parametrize("name", NETWORKS)
def test_t3_has_the_launches_that_the_design_counts(name: str) -> None:
    assert sum(1 for _ in passes(name, "T3")) == DESIGN[name][2]


def test_around_the_network_nothing_is_large() -> None:
    counted = counting.published_step("adm-64")
    assert 30 < counted.launches < 80 and counted.layout_copies.total() == 0
    assert counted.bytes < 0.01 * published_network("adm-64").bytes


@needs_triton
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_counted_whole_and_copies_nothing(name: str) -> None:
    counted = fastdiff_step(name)
    assert counted.by_op["load_row"] == counted.by_op["guided_step"] == 1
    assert counted.by_op["attention"] == sum(block.kind == "attention" for block in blocks(name))
    assert not counted.layout_copies
    assert counted.launches < published_network(name).launches / 2
    assert 2 * tier_bytes(name, "T3") < counted.bytes < published_network(name).bytes / 2
    # of the weights, 2 bytes each, those of the modulation are read once for all steps
    weights = {key: 2 * value.numel() for key, value in network(name).named_parameters()}
    hoisted = sum(size for key, size in weights.items() if key.split(".")[0] in ("time_embed", "label_emb", "mod"))
    assert counted.weight_bytes == pytest.approx(sum(weights.values()) - hoisted, rel=0.01)


@needs_triton
def test_a_step_is_near_the_fused_floor() -> None:
    counted = fastdiff_step("adm-64")
    assert counted.launches <= 300
    assert counted.bytes <= 1.15 * 2 * tier_bytes("adm-64", "T3")
    # what the tiles of our own products ask for again, from a cache where there is room
    assert counted.reread_bytes <= 0.75 * 2 * tier_bytes("adm-64", "T3")


@needs_triton
def test_the_page_holds_what_is_counted() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    for name in NETWORKS:
        made, step = counting.published_network(name), fastdiff_step(name)
        tiers = [tier_bytes(name, tier) for tier in ("T2", "T3")]
        launches = f"| {name.upper()}, launches | {made.launches} ("
        sizes = f"| {name.upper()}, GB | {made.bytes / 2e9:.3f} ("
        for head, last in ((launches, f"| {step.launches} |"), (sizes, f"| {step.bytes / 2e9:.4f} |")):
            (line,) = (line for line in page.splitlines() if line.startswith(head))
            assert line.endswith(last), line
        assert all(f"| {size / 1e9:.4f} (" in page for size in tiers)


@needs_triton
def test_a_row_hands_a_network_of_the_protocol_what_it_shares() -> None:
    seen: list[tuple[tuple[int, ...], ...]] = []

    class Shared:
        num_labels = 5

        def embedding(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.cos(t)[:, None].half().expand(-1, 4) + y[:, None]

        def modulation(self, embedding: torch.Tensor) -> torch.Tensor:
            return torch.cat([embedding, embedding], 1)

        def body(self, x: torch.Tensor, mod: torch.Tensor) -> torch.Tensor:
            seen.append((tuple(x.shape), tuple(mod.shape)))
            return half(len(mod), 6, *x.shape[2:]).to(memory_format=torch.channels_last)

    counted = count(row_of(Shared(), (3, 8, 8), 3, 2, torch.float16))
    assert seen == [((3, 3, 8, 8), (5, 8))]
    # the stand-in's own copy, and nothing of the conditioning but a row of its table
    assert counted.by_op == {"load_row": 1, "index_select": 1, "guided_step": 1, "_to_copy": 1}


@needs_triton
def test_the_table_is_printed_and_stored(tmp_path, capsys) -> None:
    main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = read_rows(tmp_path, "count")
    compositions = {"published", "published, around the network", "fastdiff", "T2", "T3"}
    steps = {(row["network"], row["composition"]) for row in scheduler_table()}
    assert {(row["network"], row["composition"]) for row in rows} == steps | {
        (n, c) for n in NETWORKS for c in compositions
    }
    for row in rows:
        begin = f"{row['network']:8} {row['composition']:30} {row['launches']:8} {row['bytes_per_image'] / 1e9:9.4f}"
        assert any(line.startswith(begin) for line in printed.splitlines())
        assert row["device"] == "computed" and row["commit"]
