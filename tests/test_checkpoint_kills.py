"""Savers that are killed, or whose disk fills up: real processes, real signals, real limits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastdiff.checkpoint import load, save
from fastdiff.diffusion_model import DiffusionModel
from fastdiff.model import UNet, UNetConfig

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and RLIMIT_FSIZE are POSIX")

MODELS = """
import torch
from test_checkpoint_kills import load, model, save
"""

SAVE_FOR_EVER = """
import sys
folder, models = sys.argv[1], [model(0), model(1)]
print("ready", flush=True)
while True:
    for one in models:
        save(one, folder, overwrite=True)
"""

# Forked from a process that has torch loaded already: 100 starts of Python would take minutes
KILL_100 = """
import json, os, random, signal, sys, time
from pathlib import Path
torch.set_num_threads(1)
folder, dice, models = Path(sys.argv[1]), random.Random(0), [model(0), model(1)]
names = [one.name for one in models]
save(models[0], folder)
started = time.perf_counter()
for i in range(4):
    save(models[i % 2], folder, overwrite=True)
one_save = (time.perf_counter() - started) / 4
seen = {"killed": 0, "loaded": [0, 0], "broken": [], "left behind": 0}
for i in range(100):
    if (child := os.fork()) == 0:
        try:
            while True:
                for one in models if i % 2 else models[::-1]:
                    save(one, folder, overwrite=True)
        finally:
            os._exit(1)
    time.sleep(dice.uniform(0, 4 * one_save))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    seen["killed"] += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    seen["left behind"] += len(list(folder.iterdir())) > 2
    try:
        loaded = load(folder)
        which = names.index(loaded.name)
        expected, got = models[which].network.state_dict(), loaded.network.state_dict()
        assert expected.keys() == got.keys() and all(torch.equal(got[key], expected[key]) for key in expected)
        seen["loaded"][which] += 1
    except Exception as error:
        seen["broken"].append(repr(error))
save(models[0], folder, overwrite=True)
seen["files at the end"] = len(list(folder.iterdir()))
print(json.dumps(seen))
"""

FULL_DISK = """
import resource, sys
from pathlib import Path
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
second = model(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
save(second, folder, overwrite=True)
"""


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", MODELS + script, *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def model(seed: int) -> DiffusionModel:
    network = UNet(UNetConfig(8, 1, 1, 32, (1, 2), 1, (4,), num_heads=1, head_channels=None, num_labels=11, groups=8))
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return DiffusionModel(network, "cosine", image_shape=(1, 8, 8), name=f"model {seed}")


def assert_whole(folder: Path) -> None:
    loaded = load(folder)
    expected = model(int(str(loaded.name)[-1])).network.state_dict()
    got = loaded.network.state_dict()
    assert expected.keys() == got.keys() and all(torch.equal(got[key], expected[key]) for key in expected)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_100_savers_killed_at_random_moments_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        command(KILL_100, tmp_path / "m"), env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["killed"] == 100
    assert seen["broken"] == []
    assert sum(seen["loaded"]) == 100 and min(seen["loaded"]) > 0
    assert seen["left behind"] > 0, "no kill fell into the middle of a save"
    assert seen["files at the end"] == 2


def test_a_killed_program_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    folder, dice = tmp_path / "m", random.Random(1)
    save(model(0), folder)
    for _ in range(2):
        with subprocess.Popen(command(SAVE_FOR_EVER, folder), env=environment(), stdout=subprocess.PIPE) as saver:
            assert saver.stdout is not None and saver.stdout.readline() == b"ready\n"
            time.sleep(dice.uniform(0.05, 0.3))
            saver.send_signal(signal.SIGKILL)
        assert saver.returncode == -signal.SIGKILL
        assert_whole(folder)
    save(model(0), folder, overwrite=True)
    assert len(files(folder)) == 2


@pytest.mark.parametrize(
    ("limit", "old"),
    [(0, True), (100_000, True), (100_000, False)],
    ids=["at once, over an old checkpoint", "half-way, over an old checkpoint", "half-way, into a new folder"],
)
def test_a_full_disk_leaves_the_old_checkpoint_as_it_was(limit: int, old: bool, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    if old:
        save(model(0), folder)
        (folder / "notes.txt").write_text("mine")
    before = files(folder) if old else None
    done = subprocess.run(
        command(FULL_DISK, folder, limit), env=environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert f"CheckpointError: {folder}: " in done.stderr and "File too large" in done.stderr
    assert before == (files(folder) if old else None)
    assert folder.exists() == old
    save(model(1), folder, overwrite=True)
    assert_whole(folder)
