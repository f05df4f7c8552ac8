"""The tuner's choices under a made-up clock, and the settings that kernels then ask for"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator

import pytest
import torch

from benchmarks import tune
from benchmarks.cases import Case, cpu_cases
from benchmarks.tune import Settings, Target, candidates, note, read, search, targets, verdict, write
from fastdiff_kernels import _tuning

RULE = {"BLOCK_P": 64, "BLOCK_C": 32, "num_warps": 4}
BEST = {"BLOCK_P": 16, "BLOCK_C": 64, "num_warps": 8}


def never() -> bool:
    return False


def cost(settings: Settings, best: Settings = BEST) -> float:
    """Milliseconds that grow with the distance from best, in doublings"""
    return 1 + sum(abs(math.log2(settings[name] / best[name])) for name in settings)


def noisy(mean: float, seed: int) -> list[float]:
    generator = random.Random(seed)
    return [mean * generator.uniform(0.99, 1.01) for _ in range(40)]


class FakeBench:
    """A kernel whose time is cost; bad settings give wrong results"""

    def __init__(self, gain: float = 1.0, bad: tuple[Settings, ...] = ()) -> None:
        self.gain, self.bad, self.asked = gain, bad, list[Settings]()

    def measure(self, settings: Settings) -> float | None:
        self.asked.append(settings)
        return None if settings in self.bad else cost(settings)

    def compare(self, best: Settings) -> dict[str, list[float]]:
        return {"rule": noisy(1, 1), "again": noisy(1, 2), "best": noisy(1 / self.gain, 3)}


@pytest.mark.parametrize("name", ["BLOCK_P", "BLOCK", "num_warps"])
@pytest.mark.parametrize("value", [1, 4, 64, 1024])
def test_candidates_are_other_powers_of_two(name: str, value: int) -> None:
    found = candidates(name, value)
    assert len(set(found)) == len(found) and value not in found
    assert all(n > 0 and n & (n - 1) == 0 for n in found)
    assert max([1, *found]) <= (16 if name == "num_warps" else 1024)


def test_what_results_depend_on_is_not_varied() -> None:
    assert candidates("CHUNKS", 64) == []
    assert candidates("BLOCK_P", 48) == [] == candidates("BLOCK_P", 0)
    assert sorted(candidates("num_stages", 2)) == [1, 3, 4]


def test_the_search_finds_the_best_settings() -> None:
    bench = FakeBench()
    assert search(RULE, bench.measure, never) == BEST
    assert len({tuple(s.values()) for s in bench.asked}) == len(bench.asked), "a candidate is measured once"


def test_settings_that_fail_are_never_chosen() -> None:
    bench = FakeBench(bad=(BEST, RULE | {"BLOCK_P": 32}))
    found = search(RULE, bench.measure, never)
    assert found not in bench.bad and cost(found) < cost(RULE)
    assert search(RULE, lambda settings: None, never) == RULE


def test_an_expired_search_keeps_what_it_has() -> None:
    left = iter([False] * 3 + [True] * 100)
    found = search(RULE, FakeBench().measure, lambda: next(left))
    assert cost(BEST) < cost(found) < cost(RULE)


@pytest.mark.parametrize("case", cpu_cases(), ids=lambda case: case.id)
def test_other_results_than_the_rules_are_seen(case: Case) -> None:
    bench = tune.Bench(Target("statistics", "", RULE, [case]), torch.device("cpu"), torch.float32)
    assert bench.right(BEST) and not _tuning.trial
    for wrong in (0.01, float("nan")):
        bench.expected[0][0] += wrong
        assert not bench.right(BEST)


@pytest.mark.parametrize(("gain", "kept"), [(1.2, True), (1.005, False), (1.0, False), (0.8, False)])
def test_only_gains_beyond_the_noise_are_kept(gain: float, kept: bool) -> None:
    times = FakeBench(gain).compare(BEST)
    assert verdict(times["rule"], times["again"], times["best"]) is kept


def test_a_rule_that_differs_from_itself_is_kept() -> None:
    assert not verdict([10.0] * 9, [8.0] * 9, [7.5] * 9)
    assert verdict([10.0] * 9, [9.9] * 9, [7.5] * 9)


def target(bucket: str = "float16 C192 HW4096", kernel: str = "statistics") -> Target:
    return Target(kernel, bucket, RULE, cpu_cases()[:1])


def test_what_is_found_is_written_as_it_is_found_and_not_measured_again(tmp_path) -> None:
    path, todo = tmp_path / "gpu.json", [target(), target("float16 C384 HW1024"), target("late")]
    gains = {todo[0].bucket: 1.5, todo[1].bucket: 1.0}
    measured: list[str] = []

    def bench(asked: Target) -> FakeBench:
        if asked.bucket == "late":
            # the others lie on the disk by now
            assert set(json.loads(path.read_text())["measured"]["statistics"]) == set(gains)
            raise KeyboardInterrupt
        measured.append(asked.bucket)
        return FakeBench(gains[asked.bucket])

    with pytest.raises(KeyboardInterrupt):
        tune.tune(todo, path, bench, {"device": "fake", "commit": "0"}, never)
    found = read(path)
    assert found["settings"]["statistics"] == {todo[0].bucket: BEST}
    evidence = found["measured"]["statistics"]
    assert evidence[todo[0].bucket]["kept"] and not evidence[todo[1].bucket]["kept"]
    assert evidence[todo[0].bucket]["device"] == "fake" and evidence[todo[0].bucket]["best_ms"] < 0.7
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]
    tune.tune(todo[:2], path, bench, {}, never)
    assert measured == list(gains) and read(path) == found


def test_time_that_is_up_begins_nothing(tmp_path) -> None:
    tune.tune([target()], tmp_path / "gpu.json", lambda asked: pytest.fail("begun"), {}, lambda: True)
    assert not list(tmp_path.iterdir())


def test_a_setting_that_no_longer_helps_is_taken_back() -> None:
    found = {"settings": {"statistics": {target().bucket: BEST}}, "measured": {}}
    note(found, target(), RULE, False, {})
    assert found["settings"]["statistics"] == {}
    note(found, target(), RULE | {"num_warps": 8}, True, {})
    assert found["settings"]["statistics"] == {target().bucket: {"num_warps": 8}}


def test_cases_of_a_bucket_are_measured_together() -> None:
    cases = cpu_cases()

    def asked(case: Case) -> Iterator[tuple[str, str, Settings]]:
        yield "apply", "one bucket", RULE
        yield "apply", case.id, RULE

    found = targets(cases, asked)
    assert found[0].cases == cases[: tune.MAX_CASES] and found[0].bucket == "one bucket"
    assert [t.cases for t in found[1:]] == [[case] for case in cases]


def test_kernels_ask_for_what_was_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuning, "CONFIGS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fake-1 80GB")
    found = {"settings": {}, "measured": {}}
    asked: list[tuple[str, str, Settings]] = []
    monkeypatch.setattr(_tuning, "observers", [lambda *call: asked.append(call)])
    device, shape = torch.device("cuda"), (2, 192, 4096, torch.float16)
    _tuning._measured.cache_clear()
    try:
        assert _tuning.settings("statistics", device, *shape, **RULE) == RULE
        ((kernel, bucket, rule),) = asked
        note(found, Target(kernel, bucket, rule), BEST, True, {})
        write(_tuning.config_file("NVIDIA Fake-1 80GB"), found)
        _tuning._measured.cache_clear()
        assert _tuning.settings("statistics", device, *shape, **RULE) == BEST
        assert _tuning.settings("apply", device, *shape, **RULE) == RULE
        assert _tuning.settings("statistics", torch.device("cpu"), *shape, **RULE) == RULE
        # a trial stands before what was measured, for its kernel alone
        monkeypatch.setitem(_tuning.trial, "statistics", {"BLOCK_P": 128, "CHUNKS": 1})
        assert _tuning.settings("statistics", device, *shape, **RULE) == RULE | {"BLOCK_P": 128}
    finally:
        _tuning._measured.cache_clear()


def test_the_order_of_a_sum_is_one_for_all_batches() -> None:
    def places(kernel: str) -> set[str]:
        rule = {"BLOCK_P": 64}
        return {_tuning.bucket(kernel, rows, 192, 4096, torch.float16, rule) for rows in (1, 2, 16, 128)}

    # each program of apply merges statistics
    assert all(len(places(kernel)) == 1 for kernel in {*_tuning.SUMS, "apply"})
    assert len(places("q_sample")) == 4


def test_a_bucket_is_of_one_rule_and_of_one_size_of_element() -> None:
    def place(dtype: torch.dtype, block: int) -> str:
        return _tuning.bucket("residual", 2, 192, 4096, dtype, {"BLOCK_P": block})

    assert place(torch.bfloat16, 64) == place(torch.float16, 64)
    assert len({place(torch.float16, 64), place(torch.float16, 32), place(torch.float32, 64)}) == 3


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        tune.main(["--ops", "norm"])
    assert stop.value.code == 2
    assert "needs a CUDA device" in capsys.readouterr().err
