"""The benchmark of whole networks, rehearsed on a small one: nothing is timed that is not the same"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_ladder, bench_networks, conftest, network_peers, networks, observe, versions
from benchmarks.networks import CONFIGS, STEPS, Case, Ours, Problem
from benchmarks.timing import LEAST_ROUNDS
from fastdiff.evaluation.results import Row, append_row, device_name, read_rows
from fastdiff.model import PRESETS, UNet
from fastdiff.model.blocks import AttentionBlock

ROOT = Path(__file__).parent.parent
FILES = ("benchmarks/bench_networks.py", "benchmarks/bench_ladder.py")
TOY = Case("toy", "cpu", "float32", 2, 1.5)


def theirs_of(unet: UNet) -> Any:
    pytest.importorskip("diffusers")
    return network_peers.to_diffusers(unet)


def in_dtype(problem: Problem, theirs: Any) -> Callable[[torch.dtype], networks.Network]:
    return lambda dtype: network_peers.as_ours(networks.placed(theirs, problem, dtype, channels_last=False))


def test_random_weights_are_the_same_every_time_and_none_is_zero() -> None:
    unet, again, other = networks.build("toy"), networks.build("toy"), networks.build("toy", seed=1)
    assert all((p != 0).all() for p in unet.parameters())
    for p, q, r in zip(unet.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q) and not torch.equal(p, r)


def test_networks_are_the_published_ones_with_a_null_row() -> None:
    for name, preset in (("adm-64", "adm-64"), ("adm-128-hc64", "adm-128")):
        heads = {"num_heads": None, "head_channels": 64}
        assert CONFIGS[name] == dataclasses.replace(PRESETS[preset], num_labels=1001, **heads)
        assert CONFIGS[name].out_channels == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_networks_are_equal_before_they_are_timed(dtype: str) -> None:
    problem, unet = Problem(dataclasses.replace(TOY, dtype=dtype)), networks.build("toy")
    theirs = theirs_of(unet)
    errors = networks.check_networks(problem, unet, in_dtype(problem, theirs))
    assert errors["to_diffusers"] < 1e-5
    assert (dtype == "float32") == ("to_float32" not in errors)
    with torch.no_grad():
        theirs.conv_out.bias[0] += 1e-2
    with pytest.raises(AssertionError):
        networks.check_networks(problem, unet, in_dtype(problem, theirs))


def test_half_precision_must_be_as_near_as_the_other_is(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, unet = Problem(dataclasses.replace(TOY, dtype="bfloat16")), networks.build("toy")
    theirs = theirs_of(unet)
    right = UNet.forward

    def spoilt(self: UNet, x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        out = right(self, x, *given)
        return out if x.dtype == torch.float32 else out * 1.03

    monkeypatch.setattr(UNet, "forward", spoilt)
    with pytest.raises(AssertionError):
        networks.check_networks(problem, unet, in_dtype(problem, theirs))


@pytest.mark.parametrize("w", [0.0, 1.5])
def test_the_loop_by_hand_draws_the_samplers_images(w: float) -> None:
    problem, unet = Problem(dataclasses.replace(TOY, w=w)), networks.build("toy")
    by_hand = network_peers.loop_over(problem, unet)()
    assert (Ours(problem, unet)() - by_hand).abs().max() < 1e-3
    theirs = theirs_of(unet)
    assert (network_peers.eager(problem, theirs, channels_last=True)() - by_hand).abs().max() < 1e-3
    assert len(problem.y) == (4 if w else 2)


def test_a_call_for_one_row_ends_there() -> None:
    problem, unet = Problem(TOY), networks.build("toy")
    calls: list[networks.Call] = [Ours(problem, unet), network_peers.loop_over(problem, unet)]
    for call in calls:
        rows: list[int] = []
        hook = unet.conv_first.register_forward_pre_hook(lambda *_, rows=rows: rows.append(1))
        versions.one_step(call)
        assert len(rows) == 1
        hook.remove()
        images, elapsed = versions.timed(call, problem.device)
        assert images.shape == problem.x_T.shape and elapsed > 0


def in_bfloat16(w: float = 1.5) -> tuple[Problem, UNet]:
    problem = Problem(dataclasses.replace(TOY, dtype="bfloat16", w=w))
    return problem, networks.placed(networks.build("toy"), problem, channels_last=True)


def without_guidance() -> networks.Call:
    return Ours(*in_bfloat16(w=0.0))


def with_other_labels() -> networks.Call:
    problem, unet = in_bfloat16()
    problem.labels = [(label + 1) % 10 for label in problem.labels]
    return Ours(problem, unet)


def without_attention() -> networks.Call:
    problem, unet = in_bfloat16()
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, AttentionBlock):
                module.proj_out.weight.zero_()
    return Ours(problem, unet)


def test_half_precision_is_held_to_the_rounding_of_a_loop_by_hand() -> None:
    """Most pixels are clipped: the images of a wrong call are near the right ones, and further than rounding"""
    problem, unet = in_bfloat16()
    float32 = networks.placed(networks.build("toy"), problem, torch.float32, channels_last=False)
    exact = versions.Exact(
        network_peers.loop_over(problem, float32, torch.float32)(), network_peers.loop_over(problem, unet)()
    )
    assert 0 < exact.check(Ours(problem, unet)(), torch.bfloat16) < 0.01
    for wrong in (without_guidance, with_other_labels, without_attention):
        with pytest.raises(AssertionError):
            exact.check(wrong()(), torch.bfloat16)


class Recorder:
    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __call__(self, function: Callable[[], object], **facts: Any) -> None:
        function()
        self.rows.append(facts)

    def row(self, **facts: Any) -> None:
        self.rows.append(facts)


def measured(case: Case = TOY, chosen: list[str] | None = None) -> dict[str, Row]:
    recorder = Recorder()
    bench_networks.measure(case, chosen, 2, recorder)  # type: ignore[arg-type]
    return {row["provider"]: row for row in recorder.rows}


def test_peers_that_fail_or_draw_other_images_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")

    def peers(problem: Problem) -> dict[str, Any]:
        def broken(theirs: Any) -> networks.Call:
            raise RuntimeError("no such kernel\nand more")

        def slow(theirs: Any) -> networks.Call:
            time.sleep(5)
            raise NotImplementedError

        def wrong(theirs: Any) -> networks.Call:
            right = network_peers.eager(problem, theirs, channels_last=False)
            return lambda on_row=None: right(on_row) + 0.02

        right = {"diffusers-eager": lambda theirs: network_peers.eager(problem, theirs, channels_last=False)}
        return {"broken": broken, "slow": slow, "wrong": wrong, **right}

    monkeypatch.setattr(network_peers, "peers", peers)
    monkeypatch.setattr(bench_networks, "PEER_S", {"cpu": 2.0})
    rows = measured()
    assert list(rows)[-1] == "fastdiff", "its row says that the case is whole"
    assert rows["broken"]["absent"] == "RuntimeError: no such kernel"
    assert "more than 2 s" in rows["slow"]["absent"] and "AssertionError" in rows["wrong"]["absent"]
    assert set(rows) == {"broken", "slow", "wrong", "diffusers-eager", "again", "fastdiff"}
    for name in ("diffusers-eager", "again", "fastdiff"):
        assert "absent" not in rows[name] and len(rows[name]["times"]) == 2


def test_a_sampler_that_draws_other_images_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ours.__call__
    monkeypatch.setattr(Ours, "__call__", lambda self, on_row=None: right(self, on_row) + 0.02)
    with pytest.raises(AssertionError):
        measured(chosen=[])


def test_without_diffusers_all_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    rows = measured(dataclasses.replace(TOY, dtype="bfloat16"))
    assert {name for name in rows if "absent" in rows[name]} == {
        *("diffusers-eager", "diffusers-channels-last", "diffusers-compile", "diffusers-freezing"),
        "diffusers-float32",
    }
    assert "import" in rows["diffusers-eager"]["absent"].lower()
    assert rows["fastdiff"]["to_float32"] < 0.05 and rows["fastdiff"]["call_p50_ms"] > 0


@pytest.mark.slow
def test_a_rehearsal_writes_its_rows_once(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")

    def rehearse() -> None:
        command = [sys.executable, "-m", "pytest", *FILES, "-q", "--device", "cpu", "--rounds", "1", "--resume"]
        command += ["--results", str(tmp_path), "--providers", "diffusers-eager", "-p", "no:cacheprovider"]
        command += ["--commit", "0123456789ab", "--state", "clean", "-k", "toy-cpu-float32"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr

    rehearse()
    rows = read_rows(tmp_path, "benchmark")
    found = [row for row in rows if row["id"] == f"network-{TOY.id}"]
    assert sorted(row["provider"] for row in found) == ["again", "diffusers-eager", "fastdiff"]
    for row in found:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["rounds"] == 1 and not row["whole"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["images"] / row["call_p50_ms"])
        assert row["peak_memory_bytes"] is None and row["first_s"] > 0
        assert (row["network"], row["dtype"], row["w"], row["steps"]) == ("toy", "float32", 1.5, STEPS)
    assert len({row["when"] for row in found}) == 1
    ladders = {row["id"] for row in rows if row["case"] == "ladder"}
    assert ladders == {f"ladder-{dataclasses.replace(TOY, w=w).id}" for w in (0.0, 1.5)}
    rehearse()
    assert read_rows(tmp_path, "benchmark") == rows
    # what was cut off before its last row is measured again
    (file,) = tmp_path.glob("*.jsonl")
    file.unlink()
    for row in rows:
        if (row["id"], row["provider"]) != (f"network-{TOY.id}", "fastdiff"):
            append_row(file, row)
    rehearse()
    assert len(read_rows(tmp_path, "benchmark")) == len(rows) - 1 + 3


def test_every_gpu_case_is_one_of_the_makefiles_shards() -> None:
    command = ["make", "--dry-run", "gpu-bench", "PYTHON=python3"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shards = text.split("for shard in ")[1].split(";")[0].split()
    for kind, cases in (("network", bench_networks.GPU_CASES), ("ladder", bench_ladder.GPU_CASES)):
        for case in cases:
            assert sum(shard in f"{kind}-{case.id}" for shard in shards) == 1, case.id


def test_ids_tell_cases_apart() -> None:
    cases = [*bench_networks.CPU_CASES, *bench_networks.GPU_CASES]
    assert len({case.id for case in cases}) == len(cases)
    assert TOY.id == "toy-cpu-float32-n2-w1.5"


def test_what_takes_too_long_is_stopped_and_what_does_not_is_left_alone() -> None:
    start = time.perf_counter()
    with pytest.raises(observe.TookTooLong, match=r"more than 0.2 s"), observe.limit(0.2):
        time.sleep(5)
    assert time.perf_counter() - start < 4
    with observe.limit(0.2):
        pass
    time.sleep(0.3)


def test_a_slow_case_has_the_fewest_rounds_that_make_a_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.ROUNDS_S, "cpu", 0.0)
    for wanted, rounds in ((5, LEAST_ROUNDS), (2, 2)):
        version = versions.Version(lambda on_row=None: torch.zeros(1), 0.0, 0.0, {})
        versions.take_turns({"one": version}, torch.device("cpu"), wanted)
        assert len(version.times) == len(version.calls) == rounds


def test_compilers_find_nothing_of_an_earlier_case(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    for name in names:
        monkeypatch.setenv(name, "kept")
    seen: set[str] = set()
    for _ in range(2):
        with versions.as_benchmarked(torch.device("cpu")):
            folders = [Path(os.environ[name]) for name in names]
            assert not any(folder.exists() for folder in folders)
            assert seen.isdisjoint(map(str, folders))
            seen.update(map(str, folders))
            folders[0].mkdir()
        assert not folders[0].exists() and all(os.environ[name] == "kept" for name in names)


def test_first_images_come_before_the_checks_that_would_compile_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    first_images = versions.drawn

    def drawn(*args: Any) -> Any:
        order.append("drawn")
        return first_images(*args)

    def check(*_: object) -> None:
        order.append("checked")
        raise RuntimeError("checked")

    monkeypatch.setattr(bench_networks, "drawn", drawn)
    monkeypatch.setattr(networks, "check_networks", check)
    with pytest.raises(RuntimeError, match="checked"), torch.no_grad():
        bench_networks.measure(TOY, [], 1, None)  # type: ignore[arg-type]
    assert order == ["drawn", "checked"]


def test_resuming_sees_rows_that_came_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every command is given an empty folder for its rows"""
    monkeypatch.setattr(conftest, "RESULTS", tmp_path / "here")
    record: Any = object.__new__(conftest.Recorder)
    record.resume, record.origin, record.device = True, {"commit": "c", "dirty": False}, torch.device("cpu")
    record.out = str(tmp_path / "out")
    for folder in ("here", "out"):
        (tmp_path / folder).mkdir()
        assert not record.has(id=folder)
        row = {"kind": "benchmark", "id": folder, "device": device_name(record.device), **record.origin}
        append_row(tmp_path / folder / "rows.jsonl", row)
        assert record.has(id=folder) and not record.has(id="another")
    record.resume = False
    assert not record.has(id="here")


def test_energy_of_the_images_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def run() -> None:
        calls.append(1)
        time.sleep(0.01)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(observe, "_meter", lambda: (lambda seconds: 300.0 * seconds, "a meter"))
    found = observe.energy(run, 4, window=0.1)
    assert found["energy"] == "a meter" and len(calls) > 2
    # 300 W over at least the window
    assert 30 <= found["J_per_image"] * 4 * len(calls) < 3000

    def nothing() -> None:
        raise FileNotFoundError("neither")

    monkeypatch.setattr(observe, "_meter", nothing)
    assert observe.energy(run, 4) == {"J_per_image": None, "energy": "absent: FileNotFoundError: neither"}
