"""README's tables of whole networks, of training and of pipelines say what the rows say"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.networks import Case
from fastdiff.evaluation.results import Row, append_row, read_rows

ROOT = Path(__file__).parent.parent
EARLY, LATE = "2030-01-01T00:00:00+00:00", "2030-01-02T00:00:00+00:00"


def row(provider: str, times: tuple[float, float, float] | None, of: Case | None = None, **facts: Any) -> Row:
    case = of or Case("adm-64", "cpu", "float32", 1, 1.5)
    made: Row = {
        **{"kind": "benchmark", "case": "network", "id": f"network-{case.id}", "provider": provider, "when": EARLY},
        **{"network": case.network, "dtype": case.dtype, "images": case.images, "w": case.w, "backend": case.device},
        **{"device": "Some CPU" if case.device == "cpu" else "NVIDIA H100 80GB", "threads": 2, "torch": "2.13.0"},
        **{"commit": "0123456789ab", "dirty": False},
    }
    if times is not None:
        made |= dict(zip(("p20_ms", "p50_ms", "p80_ms"), times, strict=True))
        made |= {"first_s": 12.34, "peak_memory_bytes": None if case.device == "cpu" else 2_345_000_000, "rounds": 3}
    return made | facts


RUN = [
    row("diffusers-channels-last", None, absent="RuntimeError: no such kernel"),
    row("diffusers-eager", (190, 200, 210)),
    row("again", (99, 101, 103)),
    row("fastdiff", (95, 100, 105)),
]


def test_the_table_is_what_the_rows_say() -> None:
    assert report.table(RUN) == "\n\n".join(
        [
            "Some CPU, 2 threads, torch 2.13.0, commit 0123456789ab: milliseconds a step, medians, and how many times "
            "as fast fastdiff is where p20 to p80 of 3 calls or more do not overlap.",
            "| | fastdiff | fastdiff again | diffusers | channels_last |\n"
            "| --- | --- | --- | --- | --- |\n"
            "| ADM-64, float32, 1 image, w = 1.5 | 100 | 101 | 200 (2.00x) | absent |",
            "Seconds to the first images, compiling included:",
            "| | fastdiff | fastdiff again | diffusers | channels_last |\n"
            "| --- | --- | --- | --- | --- |\n"
            "| ADM-64, float32, 1 image, w = 1.5 | 12.3 s | 12.3 s | 12.3 s | absent |",
            "On a GPU: not measured.",
        ]
    )


@pytest.mark.parametrize(
    ("times", "ratio"),
    [((106, 150, 160), 1.5), ((105, 150, 160), None), ((40, 50, 94), 0.5), ((40, 50, 95), None), ((1, 100, 999), None)],
)
def test_a_ratio_needs_times_that_do_not_overlap(times: tuple[float, float, float], ratio: float | None) -> None:
    assert report.times_as_fast(RUN[-1], row("diffusers-eager", times)) == ratio
    text = report.table([*RUN[2:], row("diffusers-eager", times)])
    assert ("x)" in text) == (ratio is not None)
    assert ratio is None or f"({ratio:.2f}x)" in text
    few = row("diffusers-eager", times, rounds=2)
    assert report.times_as_fast(RUN[-1], few) is None and report.times_as_fast(few, RUN[-1]) is None


def test_the_last_whole_run_counts() -> None:
    again = [row(r["provider"], (9, 10, 11), when=LATE) for r in RUN[1:]]
    assert "200 (2.00x)" not in report.table(RUN + again) and "| 10 | 10 | 10 |" in report.table(RUN + again)
    assert report.table(again + RUN) == report.table(RUN + again)
    assert report.table(RUN + again[:-1]) == report.table(RUN), "a run that was cut off has no row of fastdiff"


def test_commits_and_changes_are_named() -> None:
    other = Case("adm-128-hc64", "cpu", "bfloat16", 1, 1.5)
    text = report.table([*RUN, row("fastdiff", (1, 2, 3), other, commit="ffffffffffff", dirty=True)])
    assert "commit 0123456789ab, ffffffffffff with changes" in text
    line = next(line for line in text.splitlines() if line.startswith("| ADM-128-hc64"))
    assert line == "| ADM-128-hc64, bfloat16, 1 image, w = 1.5 | 2 | not measured | not measured | not measured |"


def test_rehearsals_and_other_rows_are_left_out() -> None:
    toy = row("fastdiff", (1, 2, 3), Case("toy", "cpu", "float32", 2, 1.5))
    assert report.table([toy, {"kind": "benchmark", "case": "sample-digits"}]) == (
        "On a CPU: not measured.\n\nOn a GPU: not measured."
    )


def gpu_rows() -> list[Row]:
    cases = [Case("adm-64", "cuda", "float16", n, w) for n in (1, 8) for w in (0.0, 1.5)]
    measured = {"launches": 271.0, "J_per_image": 3.456}
    return [row("fastdiff", (1.0, 2.0 * case.images, 3.0), case, **measured) for case in cases]


def test_a_gpu_has_launches_and_energy() -> None:
    text = report.table(gpu_rows())
    assert text.startswith("On a CPU: not measured.") and "NVIDIA H100 80GB, torch" in text
    assert text.count("| 271, 3.46 J |") == 4
    assert "included, and peak memory:" in text and text.count("12.3 s, 2.35 GB") == 4
    unseen = [r | {"launches": None, "J_per_image": None} for r in gpu_rows()]
    assert report.table(unseen).count("| not measured, absent |") == 4


def test_readme_holds_the_table_of_the_rows() -> None:
    text = (ROOT / "README.md").read_text()
    rows = read_rows(ROOT / "benchmarks" / "results", "benchmark")
    for name, table in report.TABLES.items():
        assert report.inserted(text, name, table(rows)) == text, "python -m benchmarks.report writes it"


@pytest.mark.parametrize("text", ["", "<!-- x -->", "<!-- /x --><!-- x -->", 2 * "<!-- x --><!-- /x -->"])
def test_a_readme_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="<!-- x --> and <!-- /x --> once each"):
        report.inserted(text, "x", "table")


def test_the_report_is_written_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    marked = "before\n<!-- networks -->\n{}\n<!-- /networks -->\n<!-- training -->\n{}\n<!-- /training -->\nafter\n"
    marked += "<!-- pipeline -->\n{}\n<!-- /pipeline -->\n"
    readme.write_text(marked.format("old", "older", "oldest"))
    ladder = [
        row("fastdiff", (9 - i, 10 - i, 11 - i), case="ladder", id="ladder-x", rung=i, added=name)
        for i, name in enumerate(["as published", "norm", "concat"])
    ]
    ladder.append(row("fastdiff", None, case="ladder", id="ladder-x", rung=3, added="graph", absent="no GPU"))
    for one in RUN + ladder:
        append_row(tmp_path / "rows.jsonl", one)
    arguments = ["--results", str(tmp_path), "--readme", str(readme), "--docs", str(tmp_path)]
    report.main(arguments)
    assert readme.read_text() == marked.format(report.table(RUN), report.training_table([]), report.pipeline_table([]))
    assert (tmp_path / "ladder.png").stat().st_size > 1000
    assert not (tmp_path / "batch.png").exists() and "batch.png: not measured" in capsys.readouterr().out
    for one in gpu_rows():
        append_row(tmp_path / "rows.jsonl", one)
    report.main(arguments)
    assert (tmp_path / "batch.png").stat().st_size > 1000


# of the design, two digits or three
@pytest.mark.parametrize(("name", "gflop"), [("adm-64", 219.4), ("adm-128", 613.9), ("adm-256", 2239.7)])
def test_arithmetic_of_a_network(name: str, gflop: float) -> None:
    assert report.flops(name) / 1e9 == pytest.approx(gflop, rel=3e-4)


@pytest.mark.parametrize(
    ("rows", "device", "ms"),
    [(16, "NVIDIA H100 80GB HBM3", 5.75), (16, "NVIDIA H200", 5.29), (128, "NVIDIA H100", 45.9), (128, "H200", 42.3)],
)
def test_the_bound_is_the_designs(rows: int, device: str, ms: float) -> None:
    assert report.bound_ms("adm-64", rows, device) == pytest.approx(ms, rel=0.02)


def test_no_bound_is_claimed_where_none_is_known() -> None:
    assert report.bound_ms("adm-64", 2, "AMD EPYC") is None
    assert report.bound_ms("adm-128-hc64", 2, "H100") == report.bound_ms("adm-128", 2, "H100")
