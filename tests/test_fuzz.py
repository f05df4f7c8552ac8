"""The fuzzer itself: what it finds when there is something to find, and a short run over everything"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

if sys.platform != "linux":
    pytest.skip("the fuzzer forks, limits memory and reads /proc", allow_module_level=True)

from tests.fuzz import __main__ as command
from tests.fuzz import archives, blobs, trees
from tests.fuzz.harness import Case, Target, case_of, check_whole, run, run_case
from tests.fuzz.targets import KINDS, targets


def make(rng: random.Random) -> Case:
    return Case("plus", 1, 1 + rng.randrange(1, 100))


def judge(case: Case, loaded: int) -> str:
    assert loaded == case.mutated, f"{loaded} is not what it says"
    return "same" if case.mutated == case.original else "as told"


def refuse(value: int) -> int:
    if value > 1:
        raise ValueError(f"value must be 1, got {value}")
    return value


def target(load: Callable[[int], Any]) -> Target:
    return Target("planted", "native", make, load, judge, (ValueError,), (1,))


def on(number: int, act: Callable[[], Any]) -> Callable[[int], int]:
    """A loader that is right, but for one value"""

    def load(value: int) -> int:
        if value == number:
            act()
        return refuse(value)

    return load


def sleep_deaf() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)


def sleep_swallowing() -> None:
    try:
        time.sleep(60)
    except Exception:
        time.sleep(60)


def raising(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


PLANTED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "another exception": (lambda: {}["x"], "raised", "KeyError"),
    "no sentence": (raising(ValueError()), "raised", "0 letters"),
    "a sentence as long as a file": (raising(ValueError("x" * 10**5)), "raised", "100000 letters"),
    "a hang": (lambda: time.sleep(60), "hang", "no end within"),
    "a hang that swallows exceptions": (sleep_swallowing, "hang", "no end within"),
    "a hang that hears no alarm": (sleep_deaf, "hang", "deaf"),
    "a crash": (os.abort, "crash", "died"),
    "more memory than there may be": (lambda: bytearray(2**36), "raised", "MemoryError"),
    "the input's code run": (lambda: archives.spring("ran"), "executed", "ran"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found_and_the_run_goes_on(fault: str) -> None:
    act, outcome, reason = PLANTED[fault]
    values = [case_of(target(refuse), 0, number).mutated for number in range(30)]
    number = 12
    expected = [number for number, value in enumerate(values) if value == values[12]]
    tally = run([target(on(values[number], act))], 30, 0, limit=0.2)
    assert [found.number for found in tally.faults] == expected
    assert {found.outcome for found in tally.faults} == {outcome} and reason in tally.faults[0].reason
    assert tally.outcomes["planted"] == {"refused": 30 - len(expected), outcome: len(expected)}


def test_a_loader_that_accepts_anything_or_corrects_it_is_silent() -> None:
    for load in (lambda value: 1, lambda value: value + 1):
        assert run_case(target(load), 0, 3)[1] == "silent"
    # what it says is what it is
    assert run_case(target(lambda value: value), 0, 3)[1:] == ("as told", "")
    assert run_case(target(refuse), 0, 3)[1:] == ("refused", "")


def test_what_is_whole_must_load() -> None:
    check_whole(target(refuse))
    with pytest.raises(AssertionError, match="does not load what is not mutated"):
        check_whole(target(raising(ValueError("no"))))  # type: ignore[arg-type]


def test_the_alarm_is_as_it_was_before() -> None:
    before = signal.getsignal(signal.SIGALRM)
    run_case(target(refuse), 0, 0)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


# torch's and zipfile's, of inputs that are odd on purpose
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EVERY = {each.name: each for each in targets()}


@pytest.mark.parametrize("name", EVERY)
def test_a_case_is_made_from_its_numbers_alone(name: str) -> None:
    cases = [case_of(EVERY[name], 0, number) for number in range(12)]
    assert [repr(case) for case in cases] == [repr(case_of(EVERY[name], 0, number)) for number in range(12)]
    assert len({repr(case.mutated) for case in cases}) > 8
    assert repr(case_of(EVERY[name], 1, 0)) != repr(cases[0])
    assert EVERY[name].kind in KINDS


def test_mutators_change_what_they_are_given() -> None:
    data = safetensors.torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2)})
    archive = archives.saved({"a": torch.ones(3), "b": torch.zeros(2, 2)})
    tree = {"a": [1, 2.5, None], "b": {"c": "text", "d": True}}
    for mutate, given in (
        (blobs.mutated_bytes, data),
        (blobs.mutated_safetensors, data),
        (archives.mutated_archive, archive),
        (archives.mutated_legacy, archives.saved({"a": torch.ones(3, 2)}, legacy=True)),
        (trees.mutated_tree, tree),
    ):
        made = [mutate(random.Random(i), given)[1] for i in range(200)]
        assert sum(repr(value) != repr(given) for value in made) > 150, mutate
        assert len({repr(value) for value in made}) > 100, mutate
    texts = [trees.mutated_text(random.Random(i), tree)[1] for i in range(200)]
    assert all(isinstance(text, bytes) for text in texts) and len(set(texts)) > 100
    assert tree == {"a": [1, 2.5, None], "b": {"c": "text", "d": True}}


@pytest.mark.parametrize("edit", archives.EDITS, ids=lambda edit: edit.__name__)
def test_archives_stay_archives(edit: Callable[..., bytes]) -> None:
    archive = archives.saved({"a": torch.ones(3), "b": torch.zeros(2, 2)})
    assert len({edit(random.Random(i), archive) for i in range(40)}) > 3


@pytest.mark.slow
def test_nothing_is_loaded_that_is_not_what_it_says() -> None:
    tally = run(list(EVERY.values()), 1000, int.from_bytes(b"ci"))
    assert not tally.faults, tally.faults
    assert tally.cases == 1000
    for name, outcomes in tally.outcomes.items():
        # cases that are all refused, or all loaded, prove little
        assert outcomes["refused"] >= 30, (name, outcomes)
        # but for weights that are not those of the hash, which are never loaded
        told = outcomes["as told"]
        assert told == 0 if name == "native-weights" else outcomes["same"] + told >= 1, (name, outcomes)
    assert tally.peak_bytes < 2**31


def test_the_command_keeps_a_row_and_replays_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.fuzz import targets as registry

    monkeypatch.setattr(registry, "targets", lambda: [target(refuse)])
    options = ["--faults", str(tmp_path / "faults"), "--row", str(tmp_path / "rows.jsonl")]
    assert command.main(["--count", "20", *options]) == 0
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert (row["kind"], row["cases"], row["faults"], row["targets"]) == ("fuzz", 20, 0, {"planted": {"refused": 20}})
    assert {"commit", "dirty", "torch", "device", "safetensors", "seconds", "peak_bytes", "seed"} <= row.keys()

    monkeypatch.setattr(registry, "targets", lambda: [target(lambda value: {}["x"] if value > 50 else refuse(value))])
    assert command.main(["--count", "20", *options]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("--replay"))
    number = line.split()[3].rstrip(":")
    assert command.main(["--replay", "planted", "0", number, *options]) == 1
    assert "KeyError" in capsys.readouterr().out
    assert (tmp_path / "faults" / f"planted-0-{number}" / "input.txt").exists()
    with pytest.raises(SystemExit):
        command.main(["--only", "guided", *options])
    assert "has no targets here" in capsys.readouterr().err


def test_the_limit_of_a_run() -> None:
    begin = time.monotonic()
    tally = run([target(refuse)], 10**9, 0, seconds=0.3)
    assert time.monotonic() - begin < 5 and 0 < tally.cases < 10**9
