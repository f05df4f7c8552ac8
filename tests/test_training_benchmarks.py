"""The benchmark of training, rehearsed on a small network: nothing is timed that is not the same step"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff
from benchmarks import bench_training, network_peers, observe, report, training, training_peers
from benchmarks.networks import CONFIGS, STEPS
from benchmarks.training import Case, Draws, Exact, Ours, Problem, Trainer, flat
from benchmarks.training_peers import Theirs
from fastdiff.evaluation.results import Row, read_rows
from fastdiff.model import UNet

ROOT = Path(__file__).parent.parent
TOY = Case("toy", "cpu", "float32", 4)
HALF = dataclasses.replace(TOY, dtype="bfloat16")


def theirs_of(unet: UNet) -> Any:
    pytest.importorskip("diffusers")
    return network_peers.to_diffusers(unet)


def exact_of(case: Case, peer: Callable[..., Trainer] = Theirs) -> Exact:
    unet = training.build(case.network)
    theirs = theirs_of(unet)
    return Exact(Problem(case), unet, lambda problem: peer(problem, theirs))


def test_networks_are_the_published_ones_without_dropout_or_variance() -> None:
    digits = fastdiff.load("digits").network
    assert isinstance(digits, UNet) and digits.config.dropout == 0.1
    assert training.config_of("digits") == dataclasses.replace(digits.config, dropout=0.0)
    assert training.config_of("adm-64") == dataclasses.replace(CONFIGS["adm-64"], dropout=0.0, out_channels=3)


@pytest.mark.parametrize("case", [TOY, HALF, Case("digits", "cpu", "bfloat16", 4)], ids=lambda case: case.id)
def test_steps_are_equal_before_they_are_timed(case: Case) -> None:
    errors = exact_of(case).errors
    assert errors["to_diffusers"] < 1e-5
    assert errors["weights_to_diffusers"] < 1e-3 and errors["average_to_diffusers"] < 1e-3
    assert (case.dtype == "float32") == ("diffusers_to_float32" not in errors)
    assert errors.get("diffusers_to_float32", 0.01) < 0.02


class Spoilt(Theirs):
    """The step of diffusers with one thing changed"""

    def __init__(self, problem: Problem, theirs: Any, *, what: str) -> None:
        from diffusers import DDPMScheduler

        super().__init__(problem, theirs)
        self.what = what
        if what == "weights":
            with torch.no_grad():
                self.network.conv_out.bias[0] += 1e-2
        elif what == "schedule":
            self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
        elif what == "clipping":
            self.config = dataclasses.replace(self.config, grad_clip=1e3)
        elif what == "rate":
            self.optimizer.param_groups[0]["lr"] *= 1.1
        elif what == "betas":
            self.optimizer.param_groups[0]["betas"] = (0.5, 0.99)
        elif what == "decay":
            self.ema.min_decay = 0.9

    def step(self, draws: Draws) -> torch.Tensor:
        if self.what == "labels":
            draws = draws._replace(y=(draws.y + 1) % 11)
        return super().step(draws)


@pytest.mark.parametrize("what", ["weights", "labels", "schedule", "clipping", "rate", "betas", "decay"])
def test_another_step_is_not_the_same(what: str) -> None:
    with pytest.raises(AssertionError):
        exact_of(TOY, partial(Spoilt, what=what))


def test_half_precision_must_be_as_near_as_the_other_is() -> None:
    unet, exact = training.build("toy"), exact_of(HALF)
    right = Ours(Problem(HALF), unet)
    assert 0 < exact.check(right, right.step()) <= exact.limit < 0.05
    for name, p in unet.named_parameters():
        if name == "out.2.weight":
            with torch.no_grad():
                p.mul_(1.05)
    wrong = Ours(Problem(HALF), unet)
    with pytest.raises(AssertionError):
        exact.check(wrong, wrong.step())


def test_every_setting_takes_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, Any]] = []

    def compile(network: Any, **options: Any) -> Any:
        compiled.append(options)
        return network

    monkeypatch.setattr(torch, "compile", compile)
    exact, problem = exact_of(TOY), Problem(TOY)
    theirs = theirs_of(training.build("toy"))
    for make in training_peers.peers(problem).values():
        trainer = make(theirs)
        assert exact.check(trainer, trainer.step(exact.draws)) < 1e-5
    assert compiled == [{"dynamic": False}]
    on_gpu = training_peers.peers(Problem(dataclasses.replace(TOY, device="cuda")))
    assert set(on_gpu) - set(training_peers.peers(problem)) == {"diffusers-graph"}


def test_the_layout_asked_for_is_the_one_that_runs() -> None:
    unet, problem = training.build("toy"), Problem(TOY)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        trainer = Theirs(problem, theirs_of(unet), memory_format=memory_format)
        seen: list[torch.Tensor] = []
        trainer.network.conv_in.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        trainer(1)
        assert seen[0].is_contiguous(memory_format=memory_format)
        assert trainer.network.conv_in.weight.is_contiguous(memory_format=memory_format)


def test_the_peer_draws_what_a_run_draws() -> None:
    problem = Problem(dataclasses.replace(TOY, images=64))
    trainer = Theirs(problem, theirs_of(training.build("toy")))
    torch.manual_seed(0)
    draws = [trainer.draw() for _ in range(training.BATCHES)]
    x0, y, eps, t = (torch.cat(parts) for parts in zip(*draws, strict=True))
    of_image = {
        image.numpy().tobytes(): int(k) for image, k in zip(problem.data.images, problem.data.labels, strict=True)
    }
    drawn = [image.contiguous().numpy().tobytes() for image in x0]
    assert set(drawn) == set(of_image) and len(drawn) == len(problem.data), "every image once an epoch"
    dropped = y == problem.null_label
    assert problem.training().p_uncond == 0.1 and 0.07 < dropped.float().mean() < 0.13
    assert all(label == problem.null_label or label == of_image[image] for image, label in zip(drawn, y, strict=True))
    assert abs(float(eps.mean())) < 0.02 and abs(float(eps.std()) - 1) < 0.02
    assert t.min() >= 0 and t.max() < 1000 and t.unique().numel() > 500
    assert len(trainer.order) == 0 and trainer.draw().x0.shape == problem.data.images[:64].shape


def test_a_restarted_step_is_the_first_again() -> None:
    unet, exact = training.build("toy"), exact_of(TOY)
    trainers: list[Trainer] = [Ours(Problem(TOY), unet), Theirs(Problem(TOY), theirs_of(unet))]
    for trainer in trainers:
        trainer(2)
        with pytest.raises(AssertionError):
            exact.check(trainer, trainer.step(exact.draws))
        trainer.restart()
        assert exact.check(trainer, trainer.step(exact.draws)) < 1e-5


def test_a_call_is_so_many_steps_that_train() -> None:
    unet = training.build("toy")
    trainers: list[Trainer] = [Ours(Problem(TOY), unet), Theirs(Problem(TOY), theirs_of(unet))]
    for trainer in trainers:
        before, average = flat(trainer.weights()), flat(trainer.average())
        losses = trainer(3)
        assert losses.shape == (3,) and losses.isfinite().all() and len(losses.unique()) == 3
        assert not torch.equal(flat(trainer.weights()), before) and not torch.equal(flat(trainer.average()), average)


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
    bench_training.measure(case, chosen, 2, recorder)  # type: ignore[arg-type]
    return {row["provider"]: row for row in recorder.rows}


def test_settings_that_fail_or_take_another_step_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")

    def peers(problem: Problem) -> dict[str, Any]:
        def broken(theirs: Any) -> Trainer:
            raise RuntimeError("no such kernel\nand more")

        wrong = partial(Spoilt, problem, what="labels")
        return {"broken": broken, "wrong": wrong, "diffusers-eager": partial(Theirs, problem)}

    monkeypatch.setattr(training_peers, "peers", peers)
    rows = measured(chosen=["broken", "wrong", "diffusers-eager"])
    assert list(rows)[-1] == "fastdiff", "its row says that the case is whole"
    assert set(rows) == {"broken", "wrong", "diffusers-eager", "again", "fastdiff"}
    assert rows["broken"]["absent"] == "RuntimeError: no such kernel"
    assert "AssertionError" in rows["wrong"]["absent"]
    for name in ("diffusers-eager", "again", "fastdiff"):
        row = rows[name]
        assert "absent" not in row and len(row["times"]) == 2 and row["gradient_error"] < 1e-5
        assert row["images_per_s_p20"] <= row["images_per_s"] <= row["images_per_s_p80"]
        assert sys.platform != "linux" or 0 < row["peak_memory_bytes"] < 2**30
    assert rows["fastdiff"]["to_diffusers"] < 1e-5


def test_a_run_that_takes_another_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halved(Ours):
        def gradients(self) -> training.Tensors:
            return {name: gradient / 2 for name, gradient in super().gradients().items()}

    monkeypatch.setattr(bench_training, "Ours", Halved)
    with pytest.raises(AssertionError):
        measured(chosen=[])


def test_without_diffusers_all_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    rows = measured(HALF, ["diffusers-eager"])
    assert {name for name in rows if "absent" in rows[name]} == {"diffusers-eager"}
    assert "import" in rows["diffusers-eager"]["absent"].lower()
    assert 0 < rows["fastdiff"]["gradient_error"] < 0.05 and rows["fastdiff"]["images_per_s"] > 0


@pytest.mark.slow
def test_a_rehearsal_writes_its_rows_once(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")

    def rehearse() -> None:
        command = [sys.executable, "-m", "pytest", "benchmarks/bench_training.py", "-q", "--device", "cpu", "--resume"]
        command += ["--results", str(tmp_path), "--providers", "diffusers-eager", "-p", "no:cacheprovider"]
        command += ["--rounds", "1", "--commit", "0123456789ab", "--state", "clean", "-k", "toy-cpu-float32"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr

    rehearse()
    rows = read_rows(tmp_path, "benchmark")
    assert [row["provider"] for row in rows] == ["diffusers-eager", "again", "fastdiff"]
    for row in rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["rounds"] == 1 and not row["whole"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["images"] / row["p50_ms"])
        assert (row["case"], row["id"], row["steps"], row["dtype"]) == (
            "training",
            f"training-{TOY.id}",
            STEPS,
            "float32",
        )
    assert len({row["when"] for row in rows}) == 1
    rehearse()
    assert read_rows(tmp_path, "benchmark") == rows


def test_every_gpu_case_is_one_of_the_makefiles_shards() -> None:
    command = ["make", "--dry-run", "gpu-bench", "PYTHON=python3"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shards = text.split("for shard in ")[1].split(";")[0].split()
    for case in bench_training.GPU_CASES:
        assert sum(shard in f"training-{case.id}" for shard in shards) == 1, case.id


def test_ids_tell_cases_apart() -> None:
    cases = [*bench_training.CPU_CASES, *bench_training.GPU_CASES]
    assert len({case.id for case in cases}) == len(cases)
    assert TOY.id == "toy-cpu-float32-b4"


PEAK = """
import torch
from benchmarks import observe

def blocks():
    # 32 MiB in parts so small that the allocator keeps them for itself once they are freed
    return [torch.ones(2**13) for _ in range(1024)]

freed = blocks()
# what lies behind them holds them in the process
behind = torch.ones(2**13)
del freed
memory = observe.PeakMemory(torch.device("cpu"))
kept = torch.ones(2**22)
print(memory.of(blocks), memory.of(blocks), float(kept.sum() + behind.sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process its largest size")
def test_peak_memory_is_what_a_call_holds_at_most_and_what_is_kept() -> None:
    """32 MiB at most and 16 kept, in a process of its own: this one has the memory of other tests to give back"""
    root = Path(__file__).resolve().parent.parent
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", PEAK], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for peak in map(int, done.stdout.split()[:2]):
        assert 44 * 2**20 < peak < 56 * 2**20


def test_peak_memory_is_none_where_linux_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path, *_: Any, **__: Any) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(Path, "write_text", missing)
    assert observe.PeakMemory(torch.device("cpu")).of(lambda: None) is None


def row(provider: str, times: tuple[float, float, float] | None, of: Case | None = None, **facts: Any) -> Row:
    case = of or Case("digits", "cpu", "float32", 32)
    made: Row = {
        **{"kind": "benchmark", "case": "training", "id": f"training-{case.id}", "provider": provider, "when": "2030"},
        **{"network": case.network, "dtype": case.dtype, "images": case.images, "backend": case.device, "threads": 2},
        **{"device": "Some CPU" if case.device == "cpu" else "NVIDIA H100", "torch": "2.13.0"},
        **{"commit": "0123456789ab", "dirty": False},
    }
    if times is not None:
        made |= dict(zip(("p20_ms", "p50_ms", "p80_ms"), times, strict=True))
        made |= {"images_per_s": 1e3 * case.images / times[1], "first_s": 12.34, "peak_memory_bytes": 234_000_000}
    return made | {"rounds": 3} | facts


RUN = [
    row("diffusers-compile", None, absent="TookTooLong: more than 600 s to be made and called once"),
    row("diffusers-eager", (390, 400, 410)),
    row("fastdiff-compile", (105, 160, 200), peak_memory_bytes=None),
    row("again", (195, 201, 205)),
    row("fastdiff", (190, 200, 210)),
]


def test_the_table_is_what_the_rows_say() -> None:
    head = "| | fastdiff | fastdiff again | fastdiff, torch.compile | diffusers | torch.compile |\n"
    head += "| --- " * 6 + "|\n"
    assert report.training_table(RUN) == "\n\n".join(
        [
            "Some CPU, 2 threads, torch 2.13.0, commit 0123456789ab: images a second, medians, and how many times as "
            "fast fastdiff is where p20 to p80 of 3 calls or more do not overlap.",
            head + "| digits, float32, 32 images | 160 | 159.2 | 200 | 80 (2.00x) | absent |",
            "Seconds to the first step, compiling included, and peak memory of a later one:",
            head + "| digits, float32, 32 images | 12.3 s, 0.23 GB | 12.3 s, 0.23 GB | 12.3 s | 12.3 s, 0.23 GB "
            "| absent |",
            "On a GPU: not measured.",
        ]
    )


def test_the_table_has_a_part_a_device_and_no_rehearsals() -> None:
    nothing = "On a CPU: not measured.\n\nOn a GPU: not measured."
    assert report.training_table([]) == nothing
    others = [row("fastdiff", (1, 2, 3), TOY), row("fastdiff", (1, 2, 3), case="network", id="network-x", w=1.5)]
    assert report.training_table(others) == nothing
    gpu = [row("fastdiff", (1, 2, 3), Case(name, "cuda", "bfloat16", 16)) for name in ("digits", "adm-64")]
    text = report.training_table(RUN + gpu)
    assert text.index("Some CPU") < text.index("NVIDIA H100") < text.index("| ADM-64, bfloat16, 16 images | 8000 |")
    assert report.training_table(RUN) == report.training_table(RUN + others) and "network-x" not in report.table(RUN)
