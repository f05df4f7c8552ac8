"""The benchmark of pipelines, rehearsed on a small network: nothing is timed that does not draw the same images"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

from benchmarks import bench_pipeline, pipelines, report, scheduler_steps, versions
from benchmarks import count as counting
from benchmarks.pipelines import Case, Ours, Pipeline, Problem
from benchmarks.versions import Exact
from fastdiff.evaluation.results import Row, read_rows
from fastdiff.integrations.diffusers import FusedDDIMScheduler, FusedDDPMScheduler, schedulers
from fastdiff_kernels._impl import HAS_TRITON

ROOT = Path(__file__).parent.parent
TOY = Case("ddim", "toy", "cpu", "float32", 2, steps=5)
CASES = [
    Case(solver, "toy", "cpu", dtype, 2, steps=5) for solver in ("ddim", "ddpm") for dtype in ("float32", "bfloat16")
]
STEP = scheduler_steps.Case("ddpm", "digits", "cpu", "float32", 2)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed, and plans are built with it")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.id)
def problem(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Problem:
    folder = tmp_path_factory.mktemp("pipeline")
    pipelines.write_folder(request.param, folder)
    return Problem(request.param, folder)


@pytest.fixture
def toy(tmp_path: Path) -> Problem:
    pipelines.write_folder(TOY, tmp_path)
    return Problem(TOY, tmp_path)


def stock_of(problem: Problem, dtype: torch.dtype | None = None, *, fused: bool = False) -> Pipeline:
    return Pipeline(problem, pipelines.load_unet(problem, dtype), fused=fused)


@pytest.fixture(scope="module")
def exact(problem: Problem) -> Exact:
    return Exact(stock_of(problem, torch.float32).replayed(), stock_of(problem).replayed())


def test_all_versions_draw_the_same_images(problem: Problem, exact: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    right = schedulers.guided_step

    def seen(*args: Any, **kwargs: Any) -> None:
        launched.append(1)
        right(*args, **kwargs)

    # a pipeline's own, and what it is with the network in float32
    assert (problem.dtype == torch.float32) == (exact.rounding == 0) and exact.rounding < bench_pipeline.HALF_ALONE
    # on a CPU the fused scheduler would leave it all to the stock one
    monkeypatch.setattr(schedulers, "FUSED_ON", ("cpu",))
    monkeypatch.setattr(schedulers, "guided_step", seen)
    for version in (stock_of(problem, fused=True), Ours(problem, pipelines.load_ours(problem))):
        error = exact.check(version.replayed(), problem.dtype)
        assert error < 1e-4 if problem.dtype == torch.float32 else error > 0
    assert len(launched) == problem.case.steps


def test_the_folder_tells_all_versions_what_they_are(problem: Problem) -> None:
    stock, fused = (stock_of(problem, fused=fused) for fused in (False, True))
    ddim = problem.case.solver == "ddim"
    assert type(stock.scheduler) is (diffusers.DDIMScheduler if ddim else diffusers.DDPMScheduler)
    assert type(fused.scheduler) is (FusedDDIMScheduler if ddim else FusedDDPMScheduler)
    configs = [dict(version.scheduler.config, _class_name=None) for version in (stock, fused)]
    assert configs[0] == configs[1] and len(configs[0]) > 10
    ours = Ours(problem, pipelines.load_ours(problem))
    stock.scheduler.set_timesteps(problem.case.steps)
    assert list(ours.sampler.timesteps) == stock.scheduler.timesteps.tolist()
    assert ours.sampler.dtype == stock.network.dtype == problem.dtype


def wrong_labels(problem: Problem) -> None:
    problem.labels = (problem.labels + 1) % problem.null_label


def wrong_start(problem: Problem) -> None:
    problem.x_T = problem.x_T.flip(0)


def wrong_guidance(problem: Problem) -> None:
    problem.case = dataclasses.replace(problem.case, w=0.0)


def wrong_steps(problem: Problem) -> None:
    problem.case = dataclasses.replace(problem.case, steps=4)
    problem.noise = None if problem.noise is None else problem.noise[:4]


def wrong_noise(problem: Problem) -> None:
    if problem.noise is None:
        pytest.skip("DDIM draws none")
    problem.noise = problem.noise.flip(1)


@pytest.mark.parametrize("spoil", [wrong_labels, wrong_start, wrong_guidance, wrong_steps, wrong_noise])
@pytest.mark.parametrize("whose", ["fused", "ours"])
def test_other_images_are_found(problem: Problem, exact: Exact, spoil: Callable[[Problem], None], whose: str) -> None:
    other = Problem(problem.case, problem.folder)
    spoil(other)
    version = stock_of(other, fused=True) if whose == "fused" else Ours(other, pipelines.load_ours(other))
    with pytest.raises(AssertionError):
        exact.check(version.replayed(), problem.dtype)


def test_the_pipeline_is_the_one_of_transformers(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """DiTPipeline itself, with the network, this start and this noise"""
    stock, case = stock_of(problem), problem.case
    monkeypatch.setattr(diffusers.pipelines.dit.pipeline_dit, "randn_tensor", lambda **_: problem.x_T.to(problem.dtype))
    latents: list[torch.Tensor] = []

    class Transformer:
        dtype, config = problem.dtype, diffusers.configuration_utils.FrozenDict(
            sample_size=problem.x_T.shape[-1], in_channels=problem.x_T.shape[1], out_channels=problem.x_T.shape[1]
        )  # fmt: skip

        def __call__(self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> Any:
            # its null label is written into it
            return stock.network(x, timestep, class_labels=class_labels.clamp(max=problem.null_label))

    class VAE:
        config = diffusers.configuration_utils.FrozenDict(scaling_factor=1.0)

        def decode(self, x: torch.Tensor) -> Any:
            latents.append(x)
            return diffusers.models.autoencoders.vae.DecoderOutput(sample=x)

    pipe: Any = diffusers.DiTPipeline(Transformer(), VAE(), stock.scheduler)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.zeros_like(problem.x_T)[None].expand(case.steps, -1, -1, -1, -1)
    with pipelines.replaying(noise if problem.noise is None else problem.noise):
        pipe(problem.labels.tolist(), 1 + case.w, num_inference_steps=case.steps, output_type="pt")
    assert torch.equal(latents[0], stock.replayed())


def test_a_call_for_one_row_ends_there(toy: Problem) -> None:
    stock, ours = stock_of(toy), Ours(toy, pipelines.load_ours(toy))
    for call in (stock, ours):
        rows: list[int] = []
        with pytest.raises(StopIteration):
            call(lambda rows=rows: rows.append(1) or next(iter(())))
        assert len(rows) == 1
        versions.one_step(call)


def test_a_timed_call_draws_noise_of_its_own(tmp_path: Path) -> None:
    case = dataclasses.replace(TOY, solver="ddpm")
    pipelines.write_folder(case, tmp_path)
    problem = Problem(case, tmp_path)
    for version in (stock_of(problem), Ours(problem, pipelines.load_ours(problem))):
        images = version()
        assert (images - version.replayed()).abs().mean() > 1e-3
        # the same once more: a call has a seed
        assert torch.equal(images, version())


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
    with torch.no_grad():
        bench_pipeline.measure(case, chosen, 2, recorder)  # type: ignore[arg-type]
    return {row["provider"]: row for row in recorder.rows}


def test_every_version_has_a_row() -> None:
    rows = measured()
    assert list(rows)[-1] == "fastdiff", "its row says that the case is whole"
    assert set(rows) == {"diffusers", "diffusers-again", "diffusers-fused", "fastdiff"}
    for row in rows.values():
        assert len(row["times"]) == 2 and row["first_s"] > 0 and row["whole"] and row["mean_error"] < 1e-4
        assert (row["case"], row["id"], row["solver"], row["steps"]) == ("pipeline", f"pipeline-{TOY.id}", "ddim", 5)
        assert row["call_p50_ms"] == pytest.approx(5 * sum(row["times"]) / 2)
    assert set(measured(chosen=[])) == {"diffusers", "fastdiff"}


def test_a_fused_step_that_fails_or_is_wrong_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FusedDDIMScheduler.step

    def wrong(self: Any, out: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return right(self, 1.1 * out, *args, **kwargs)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    for step, said in ((wrong, "AssertionError"), (broken, "RuntimeError: no such kernel")):
        monkeypatch.setattr(FusedDDIMScheduler, "step", step)
        rows = measured(chosen=["diffusers-fused"])
        assert said in rows["diffusers-fused"]["absent"] and "times" not in rows["diffusers-fused"]
        assert len(rows["diffusers"]["times"]) == len(rows["fastdiff"]["times"]) == 2


def test_a_sampler_that_draws_other_images_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ours.__call__
    monkeypatch.setattr(Ours, "__call__", lambda self, *args, **kwargs: right(self, *args, **kwargs) + 0.02)
    with pytest.raises(AssertionError):
        measured(chosen=[])


def test_a_pipeline_that_rounding_destroys_is_nothing_to_go_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_pipeline, "HALF_ALONE", 1e-4)
    with pytest.raises(AssertionError):
        measured(dataclasses.replace(TOY, dtype="bfloat16"), [])


# ------------------------------------------------------------------------------------------------------ steps alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", list(scheduler_steps.SHAPES))
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_steps_are_equal_before_they_are_timed(solver: str, network: str, dtype: str) -> None:
    problem = scheduler_steps.Problem(dataclasses.replace(STEP, solver=solver, network=network, dtype=dtype))
    made = scheduler_steps.chains(problem)
    errors = scheduler_steps.check_chains(problem, made)
    assert set(errors) == {"diffusers", "diffusers-fused", "fused-reference"}
    # a state of float32 inside the step rounds once
    assert dtype == "float32" or errors["fused-reference"] < errors["diffusers"]
    assert errors["fused-reference"] != errors["diffusers-fused"] == errors["diffusers"]
    for chain in made.values():
        assert chain().shape == problem.x_T.shape and chain().isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changed", [{"beta_schedule": "squaredcos_cap_v2"}, {"clip_sample": False}, {"steps": 49}])
def test_other_steps_are_found(changed: dict[str, Any], dtype: str) -> None:
    problem = scheduler_steps.Problem(dataclasses.replace(STEP, dtype=dtype))
    made = scheduler_steps.chains(problem)
    config = {key: value for key, value in changed.items() if key != "steps"}
    other = FusedDDPMScheduler.from_config(made["diffusers"].scheduler.config, **config)
    other.set_timesteps(scheduler_steps.STEPS)
    if "steps" in changed:
        # all but the last, which has no noise, one later
        other.timesteps = torch.cat([other.timesteps[1:], other.timesteps[-1:]])
    made["fused-reference"].scheduler = other
    with pytest.raises(AssertionError):
        scheduler_steps.check_chains(problem, made)


def test_a_chain_launches_on_the_host_only_where_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    right = schedulers.guided_step
    monkeypatch.setattr(schedulers, "guided_step", lambda *args, **kwargs: launched.append(1) or right(*args, **kwargs))
    for name, chain in scheduler_steps.chains(scheduler_steps.Problem(STEP)).items():
        launched.clear()
        chain()
        assert len(launched) == (scheduler_steps.STEPS if name == "fused-reference" else 0)
    assert schedulers.FUSED_ON == ("cuda",)


def test_steps_have_rows_with_the_fused_one_last() -> None:
    recorder = Recorder()
    bench_pipeline.measure_steps(STEP, 3, recorder)  # type: ignore[arg-type]
    names = [row["provider"] for row in recorder.rows]
    assert sorted(names) == ["diffusers", "diffusers-again", "diffusers-fused", "fused-reference"]
    assert names[-1] == "diffusers-fused", "its row says that the case is whole"
    for row in recorder.rows:
        assert len(row["times"]) == 3 and min(row["times"]) > 0 and row["error"] <= scheduler_steps.TOLERANCE
        assert (row["case"], row["id"], row["shape"]) == ("scheduler", f"scheduler-{STEP.id}", [2, 1, 16, 16])


# launches of a float16 step, stock and fused: a copy of the state, the step, the clean image in half precision; where
# there is noise its drawing and its cast besides; without clipping the stock one has a launch less
LAUNCHES = {("adm-64", "DDIM"): (7, 3), ("adm-64", "DDPM"): (10, 5), ("dit", "DDIM"): (6, 3), ("dit", "DDPM"): (9, 5)}


@needs_triton
def test_launches_of_a_step_are_counted() -> None:
    made = {(row["network"], row["composition"]): row for row in counting.scheduler_table()}
    for (network, name), (stock, fused) in LAUNCHES.items():
        assert made[network, f"{name}Scheduler.step"]["launches"] == stock
        row = made[network, f"Fused{name}Scheduler.step"]
        assert row["launches"] == fused and row["by_op"]["guided_step"] == 1
        # no casts in float32
        in_float32 = scheduler_steps.meta_step(name.lower(), network, fused=True, dtype=torch.float32)
        assert counting.count(in_float32).launches == {"DDIM": 2, "DDPM": 3}[name]
    assert len(made) == 2 * len(LAUNCHES) and schedulers.FUSED_ON == ("cuda",)
    page = (ROOT / "benchmarks" / "README.md").read_text()
    for name in ("DDIM", "DDPM"):
        numbers = [count for network in ("adm-64", "dit") for count in LAUNCHES[network, name]]
        assert f"| {name} | " + " | ".join(map(str, numbers)) + " |" in page


def test_without_diffusers_no_step_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert list(counting.scheduler_table()) == []


# ------------------------------------------------------------------------------------------------- cases and tables


@pytest.mark.slow
def test_a_rehearsal_writes_its_rows_once(tmp_path: Path) -> None:
    def rehearse() -> None:
        command = [sys.executable, "-m", "pytest", "benchmarks/bench_pipeline.py", "-q", "--device", "cpu", "--resume"]
        command += ["--results", str(tmp_path), "--rounds", "2", "-p", "no:cacheprovider"]
        command += ["--commit", "0123456789ab", "--state", "clean"]
        command += ["-k", "pipeline-ddim-toy-cpu-float32 or scheduler-ddim-digits-cpu-float32-n1"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr

    rehearse()
    rows = read_rows(tmp_path, "benchmark")
    found = [(row["case"], row["provider"]) for row in rows]
    assert len(found) == len(set(found)) == 8
    assert found[3] == ("pipeline", "fastdiff") and found[7] == ("scheduler", "diffusers-fused")
    for row in rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["rounds"] == 2
    rehearse()
    assert read_rows(tmp_path, "benchmark") == rows


def test_every_gpu_case_is_one_of_the_makefiles_shards() -> None:
    command = ["make", "--dry-run", "gpu-bench", "PYTHON=python3"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shards = text.split("for shard in ")[1].split(";")[0].split()
    ids = [f"pipeline-{case.id}" for case in bench_pipeline.GPU_CASES]
    ids += [f"scheduler-{case.id}" for case in bench_pipeline.GPU_STEPS]
    for id in ids:
        assert sum(shard in id for shard in shards) == 1, id


def test_ids_tell_cases_apart() -> None:
    for cases in (
        [*bench_pipeline.CPU_CASES, *bench_pipeline.GPU_CASES],
        [*bench_pipeline.CPU_STEPS, *bench_pipeline.GPU_STEPS],
    ):
        assert len({case.id for case in cases}) == len(cases)
    assert TOY.id == "ddim-toy-cpu-float32-n2-w1.5" and STEP.id == "ddpm-digits-cpu-float32-n2"


def row(provider: str, times: tuple[float, float, float] | None, of: Any = None, **facts: Any) -> Row:
    case = of or Case("ddim", "digits", "cpu", "float32", 1, steps=50)
    kind = "pipeline" if isinstance(case, Case) else "scheduler"
    made: Row = {
        **{"kind": "benchmark", "case": kind, "id": f"{kind}-{case.id}", "provider": provider, "when": "2030"},
        **{"network": case.network, "dtype": case.dtype, "images": case.images, "backend": case.device, "threads": 2},
        **{"device": "Some CPU" if case.device == "cpu" else "NVIDIA H100", "torch": "2.13.0", "steps": 50},
        **{"commit": "0123456789ab", "dirty": False, "solver": case.solver},
    }
    if kind == "pipeline":
        made["w"] = case.w
    if times is not None:
        made |= dict(zip(("p20_ms", "p50_ms", "p80_ms"), times, strict=True)) | {"first_s": 12.34, "rounds": 3}
    return made | facts


RUN = [
    row("diffusers-again", (9, 20, 30)),
    row("diffusers-fused", (16, 17, 18)),
    row("diffusers", (19, 20, 21)),
    row("fastdiff", (9, 10, 11)),
]
STEPS = [
    row("diffusers", (0.19, 0.2, 0.21), STEP),
    row("diffusers-again", (0.18, 0.2, 0.21), STEP),
    row("fused-reference", (0.3, 0.4, 0.5), STEP),
    row("diffusers-fused", (0.15, 0.16, 0.17), STEP),
]


def test_the_table_is_what_the_rows_say() -> None:
    where = "Some CPU, 2 threads, torch 2.13.0, commit 0123456789ab: "
    overlap = "it is where p20 to p80 of 3 calls or more do not overlap."
    assert report.pipeline_table(RUN + STEPS) == "\n\n".join(
        [
            f"{where}milliseconds a step, medians, and how many times as fast as the pipeline with the stock scheduler "
            + overlap,
            "| | diffusers | diffusers again | step fused | fastdiff |\n| --- | --- | --- | --- | --- |\n"
            "| digits, DDIM-50, float32, 1 image, w = 1.5 | 20 | 20 | 17 (1.18x) | 10 (2.00x) |",
            "Seconds to the first images, weights loaded:",
            "| | diffusers | diffusers again | step fused | fastdiff |\n| --- | --- | --- | --- | --- |\n"
            "| digits, DDIM-50, float32, 1 image, w = 1.5 | 12.3 s | 12.3 s | 12.3 s | 12.3 s |",
            "On a GPU: not measured.",
            f"{where}microseconds of a scheduler's step alone, medians, and how many times as fast as the stock "
            f"scheduler {overlap}",
            "| | diffusers | diffusers again | step fused | reference of the fused step |\n"
            "| --- | --- | --- | --- | --- |\n"
            "| digits, DDPM-50, float32, 2 images | 200 | 200 | 160 (1.25x) | 400 (0.50x) |",
            "A scheduler's step alone on a GPU: not measured.",
        ]
    )


def test_the_table_says_what_is_absent_and_leaves_rehearsals_out() -> None:
    nothing = "On a CPU: not measured.\n\nOn a GPU: not measured."
    alone = "A scheduler's step alone on a CPU: not measured.\n\nA scheduler's step alone on a GPU: not measured."
    assert report.pipeline_table([]) == f"{nothing}\n\n{alone}"
    others = [row("fastdiff", (1, 2, 3), TOY), row("fastdiff", (1, 2, 3), case="network", id="network-x")]
    assert report.pipeline_table(others) == f"{nothing}\n\n{alone}"
    cut_off = [*RUN[:3], *STEPS[:3]]
    assert report.pipeline_table(cut_off) == f"{nothing}\n\n{alone}"
    failed = [row("diffusers-fused", None, absent="RuntimeError: no such kernel"), *RUN[2:]]
    assert "| 20 | absent | 10 (2.00x) |" in report.pipeline_table(failed)
    gpu = {"launches": 300.0, "J_per_image": 1.5, "peak_memory_bytes": 2_000_000_000}
    case = dataclasses.replace(TOY, network="adm-64", device="cuda")
    text = report.pipeline_table([row(r["provider"], (1, 2, 3), case, **gpu) for r in RUN])
    assert "NVIDIA H100, torch" in text and "12.3 s, 2.00 GB" in text and "300, 1.5 J" in text
