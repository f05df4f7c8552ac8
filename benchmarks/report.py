"""What the rows of whole networks, of training and of pipelines say, as README's tables and two pictures

    python -m benchmarks.report [--results benchmarks/results] [--readme README.md] [--docs docs]

The tables go between <!-- networks --> and <!-- /networks -->, and those of training and pipeline likewise;
docs/ladder.png and docs/batch.png are drawn where there are rows of them (batch: of a GPU). Of every case and device
the rows of the last run count. A ratio is written where p20 to p80 of the two do not overlap, and only there; what is
absent is called so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import training
from benchmarks.networks import CONFIGS
from benchmarks.registry import ITEM, passes
from benchmarks.scheduler_steps import SHAPES
from benchmarks.sites import blocks
from benchmarks.timing import LEAST_ROUNDS
from fastdiff.evaluation.results import Row, read_rows
from fastdiff.model import PRESETS

Cell = Callable[[Row, Row], str]

ROOT = Path(__file__).resolve().parent.parent
NOT_MEASURED = "not measured"

PROVIDERS = {
    "fastdiff": "fastdiff",
    "again": "fastdiff again",
    "fastdiff-compile": "fastdiff, torch.compile",
    "diffusers-float32": "diffusers float32",
    "diffusers-eager": "diffusers",
    "diffusers-channels-last": "channels_last",
    "diffusers-compile": "torch.compile",
    "diffusers-freezing": "with freezing",
    "diffusers-graph": "CUDA graph",
}
# in a pipeline, beside the stock scheduler
PIPELINES = {
    "diffusers": "diffusers",
    "diffusers-again": "diffusers again",
    "diffusers-fused": "step fused",
    "fused-reference": "reference of the fused step",
    "fastdiff": "fastdiff",
}
BACKENDS = {"cpu": "a CPU", "cuda": "a GPU"}

NETWORKS = list(dict.fromkeys([*CONFIGS, *training.NETWORKS, *SHAPES]))
NAMES = {"dit": "DiT's latents"}

# what dense products in half precision and copies reach at most, by a part of the device's name
FLOP_PER_S = 790e12
BYTES_PER_S = {"H100": 3.0e12, "H200": 4.3e12}


def latest(rows: Iterable[Row], case: str, last: str = "fastdiff") -> dict[tuple[str, str], list[Row]]:
    """Rows of the last whole run by (id, device): those that were timed in turn; rehearsals left out

    last: the provider whose row is a run's last.
    """
    runs: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row.get("case") == case and row["network"] != "toy" and row.get("whole", True):
            runs.setdefault((row["id"], row["device"]), {}).setdefault(row["when"], []).append(row)
    found = {}
    for key, of in runs.items():
        whole = [when for when, run in of.items() if any(row["provider"] == last for row in run)]
        if whole:
            found[key] = of[max(whole)]
    return found


def times_as_fast(mine: Row, other: Row) -> float | None:
    """How many times as fast mine is, by medians; None where p20 to p80 overlap or are of fewer than LEAST_ROUNDS"""
    if min(mine["rounds"], other["rounds"]) < LEAST_ROUNDS:
        return None
    if mine["p80_ms"] < other["p20_ms"] or other["p80_ms"] < mine["p20_ms"]:
        return other["p50_ms"] / mine["p50_ms"]
    return None


def _with_ratio(value: float, ratio: float | None) -> str:
    return f"{value:.4g}" if ratio is None else f"{value:.4g} ({ratio:.2f}x)"


def step_cell(row: Row, mine: Row) -> str:
    return _with_ratio(row["p50_ms"], times_as_fast(mine, row))


def rate_cell(row: Row, mine: Row) -> str:
    return _with_ratio(row["images_per_s"], times_as_fast(mine, row))


def beside_stock_cell(row: Row, stock: Row) -> str:
    """Its ratio is how many times as fast the row is, not the one beside it"""
    return _with_ratio(row["p50_ms"], times_as_fast(row, stock))


def microseconds_cell(row: Row, stock: Row) -> str:
    return _with_ratio(1e3 * row["p50_ms"], times_as_fast(row, stock))


def need_cell(row: Row, mine: Row) -> str:
    memory = row.get("peak_memory_bytes")
    return f"{row['first_s']:.3g} s" + ("" if memory is None else f", {memory / 1e9:.2f} GB")


def gpu_cell(row: Row, mine: Row) -> str:
    launches, joules = row.get("launches"), row.get("J_per_image")
    parts = [NOT_MEASURED if launches is None else f"{launches:.0f}", "absent" if joules is None else f"{joules:.3g} J"]
    return ", ".join(parts)


def _cell(row: Row | None, mine: Row, cell: Cell) -> str:
    if row is None:
        return NOT_MEASURED
    return "absent" if "absent" in row else cell(row, mine)


def _lines(
    cases: list[list[Row]], cell: Cell, providers: Mapping[str, str] = PROVIDERS, beside: str = "fastdiff"
) -> list[str]:
    """A line a case, a column a provider that any of them has; beside: the provider that cells are compared with"""
    asked = [name for name in providers if any(row["provider"] == name for rows in cases for row in rows)]
    lines = ["| | " + " | ".join(providers[name] for name in asked) + " |", "| --- " * (len(asked) + 1) + "|"]
    for rows in cases:
        by = {row["provider"]: row for row in rows}
        mine = by[beside]
        lines.append(f"| {_name(mine)} | " + " | ".join(_cell(by.get(p), mine, cell) for p in asked) + " |")
    return lines


def _name(row: Row) -> str:
    parts = [NAMES.get(row["network"], row["network"].replace("adm", "ADM"))]
    if "solver" in row:
        parts.append(f"{row['solver'].upper()}-{row['steps']}")
    parts += [row["dtype"], "1 image" if row["images"] == 1 else f"{row['images']} images"]
    return ", ".join(parts + ([f"w = {row['w']:g}"] if "w" in row else []))


def table(rows: Iterable[Row]) -> str:
    """README's text on whole networks: a part a backend and device"""
    return _parts(rows, "network", _networks)


def training_table(rows: Iterable[Row]) -> str:
    """README's text on training, likewise"""
    return _parts(rows, "training", _training)


def pipeline_table(rows: Iterable[Row]) -> str:
    """README's text on pipelines of diffusers, likewise, and that on a scheduler's step alone"""
    rows = list(rows)
    return _parts(rows, "pipeline", _pipelines) + "\n\n" + _parts(rows, "scheduler", _steps, "diffusers-fused")


def _parts(
    rows: Iterable[Row], case: str, part: Callable[[list[list[Row]], str], list[str]], last: str = "fastdiff"
) -> str:
    groups = latest(rows, case, last)
    parts = []
    for backend, where in BACKENDS.items():
        devices = sorted({device for (_, device), of in groups.items() if of[0]["backend"] == backend})
        if not devices:
            what = "A scheduler's step alone on" if case == "scheduler" else "On"
            parts.append(f"{what} {where}: {NOT_MEASURED}.")
        for device in devices:
            cases = [of for (_, at), of in sorted(groups.items(), key=_order) if at == device]
            parts += part(cases, backend)
    return "\n\n".join(parts)


def _order(item: tuple[tuple[str, str], list[Row]]) -> tuple[Any, ...]:
    row = item[1][0]
    solver = row.get("solver", "")
    return NETWORKS.index(row["network"]), solver, row["dtype"] != "float32", row["images"], row.get("w", 0.0)


def _head(cases: list[list[Row]], backend: str, what: str, whose: str = "fastdiff is") -> str:
    every = [row for rows in cases for row in rows]
    commits = sorted({row["commit"] + (" with changes" if row["dirty"] else "") for row in every})
    threads = f", {every[0]['threads']} threads" if backend == "cpu" else ""
    return (
        f"{every[0]['device']}{threads}, torch {every[0]['torch']}, commit {', '.join(commits)}: {what}, medians, and "
        f"how many times as fast {whose} where p20 to p80 of {LEAST_ROUNDS} calls or more do not overlap."
    )


def _networks(cases: list[list[Row]], backend: str) -> list[str]:
    parts = [_head(cases, backend, "milliseconds a step"), "\n".join(_lines(cases, step_cell))]
    parts += [
        f"Seconds to the first images, compiling included{', and peak memory' * (backend == 'cuda')}:",
        "\n".join(_lines(cases, need_cell)),
    ]
    if backend == "cuda":
        parts += ["Launches a step, and energy an image:", "\n".join(_lines(cases, gpu_cell))]
    return parts


def _training(cases: list[list[Row]], backend: str) -> list[str]:
    return [
        _head(cases, backend, "images a second"),
        "\n".join(_lines(cases, rate_cell)),
        "Seconds to the first step, compiling included, and peak memory of a later one:",
        "\n".join(_lines(cases, need_cell)),
    ]


def _pipelines(cases: list[list[Row]], backend: str) -> list[str]:
    lines = partial(_lines, cases, providers=PIPELINES, beside="diffusers")
    whose = "as the pipeline with the stock scheduler it is"
    parts = [_head(cases, backend, "milliseconds a step", whose), "\n".join(lines(beside_stock_cell))]
    parts += [
        f"Seconds to the first images, weights loaded{', and peak memory' * (backend == 'cuda')}:",
        "\n".join(lines(need_cell)),
    ]
    if backend == "cuda":
        parts += ["Launches a step, and energy an image:", "\n".join(lines(gpu_cell))]
    return parts


def _steps(cases: list[list[Row]], backend: str) -> list[str]:
    what = "microseconds of a scheduler's step alone"
    head = _head(cases, backend, what, "as the stock scheduler it is")
    return [head, "\n".join(_lines(cases, microseconds_cell, PIPELINES, "diffusers"))]


TABLES = {"networks": table, "training": training_table, "pipeline": pipeline_table}


def inserted(readme: str, name: str, text: str) -> str:
    """readme with text between the markers of this name; ValueError without them"""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if readme.count(start) != 1 or readme.count(end) != 1 or readme.index(start) > readme.index(end):
        raise ValueError(f"README must hold {start} and {end} once each, in this order")
    head, rest = readme.split(start)
    return f"{head}{start}\n{text}\n{end}{rest.split(end)[1]}"


def flops(name: str) -> int:
    """Of one evaluation for one image, 2 a multiply-add: convolutions, products and attention; name: a preset's"""
    config = PRESETS[name]
    pixels, width, emb = config.image_size**2, config.widths[0], 4 * config.channels
    total = 9 * (config.in_channels + config.out_channels) * width * pixels + config.channels * emb + emb**2
    for block in blocks(name):
        c, c_out, area = block.channels, block.out_channels, block.out_side**2
        if block.kind == "attention":
            total += 4 * c * c * area + 2 * c * area**2
            continue
        total += (9 * c * c_out + 9 * c_out**2 + c * c_out * (c != c_out)) * area + emb * 2 * c_out
    return 2 * total


def bound_ms(name: str, rows: int, device: str) -> float | None:
    """A step's products at the peak and its norms and sums at the copying speed (T3); None for devices without figures

    rows: that the network sees.
    """
    speed = next((value for part, value in BYTES_PER_S.items() if part in device), None)
    if speed is None:
        return None
    preset = name.removesuffix("-hc64")
    moved = ITEM * sum(p.reads + p.writes for p in passes(preset, "T3") if p.what in ("norm", "residual"))
    return 1e3 * rows * (flops(preset) / FLOP_PER_S + moved / speed)


def draw_ladder(rows: Iterable[Row], path: Path) -> bool:
    """Bars a rung, a panel a case; False where there are no rows"""
    cases = [(key, of) for key, of in sorted(latest(rows, "ladder").items(), key=_order) if of[0]["w"]]
    if not cases:
        return False
    from benchmarks.ablations import LADDER

    figure, axes = _figure(len(cases))
    for panel, ((_, device), of) in zip(axes, cases, strict=True):
        rungs = sorted((row for row in of if "absent" not in row), key=lambda row: row["rung"])
        labels = [LADDER.get(str(row["added"]), str(row["added"])) for row in rungs]
        p50 = [row["p50_ms"] for row in rungs]
        errors = [[m - r["p20_ms"] for m, r in zip(p50, rungs, strict=True)]]
        errors.append([r["p80_ms"] - m for m, r in zip(p50, rungs, strict=True)])
        panel.barh(range(len(rungs)), p50, xerr=errors, color="#1f5fa8", height=0.6, ecolor="#777777", capsize=3)
        panel.set_yticks(range(len(rungs)), [("+ " if i else "") + label for i, label in enumerate(labels)])
        panel.invert_yaxis()
        panel.set_xlabel("ms a step, p50, p20 to p80")
        row = of[0]
        panel.set_title(
            f"{row['network']}, {row['dtype']}, n = {row['images']}, w = {row['w']:g}\n{device}", fontsize=9
        )
    figure.savefig(path)
    return True


def draw_batch(rows: Iterable[Row], path: Path) -> bool:
    """Milliseconds a step and image over the batch, with guidance, on GPUs; False where there are no rows"""
    series: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for (_, device), of in latest(rows, "network").items():
        for row in of:
            if row["backend"] == "cuda" and row["w"] and "absent" not in row:
                lines = series.setdefault((row["network"], device), {})
                lines.setdefault(row["provider"], {})[row["images"]] = row["p50_ms"] / row["images"]
    if not series:
        return False
    figure, axes = _figure(len(series))
    for panel, ((name, device), lines) in zip(axes, sorted(series.items()), strict=True):
        for provider, label in PROVIDERS.items():
            points = sorted(lines.get(provider, {}).items())
            if points and provider != "again":
                panel.plot(
                    *zip(*points, strict=True), marker="o", linewidth=2 if provider == "fastdiff" else 1, label=label
                )
        batches = sorted({n for points in lines.values() for n in points})
        bounds = [(n, bound) for n in batches if (bound := bound_ms(name, 2 * n, device)) is not None]
        if bounds:
            panel.plot(batches, [bound / n for n, bound in bounds], "k--", linewidth=1, label="bound (T3)")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(batches, [str(n) for n in batches])
        panel.set_xlabel("images, each with its null row")
        panel.set_ylabel("ms a step and image")
        panel.set_title(f"{name}\n{device}", fontsize=9)
        panel.legend(fontsize=8, frameon=False)
    figure.savefig(path)
    return True


def _figure(columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0 * columns, 4.0), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    return figure, list(axes)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", default=str(ROOT / "benchmarks" / "results"), help="folder or .jsonl file of rows")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with the markers")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pictures")
    given = parser.parse_args(arguments)
    rows = read_rows(given.results, "benchmark")
    readme = given.readme.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        text = make(rows)
        print(text)
        readme = inserted(readme, name, text)
    given.readme.write_text(readme, encoding="utf-8")
    for name, draw in (("ladder", draw_ladder), ("batch", draw_batch)):
        path = given.docs / f"{name}.png"
        print(f"wrote {path}" if draw(rows, path) else f"{path}: {NOT_MEASURED}")


if __name__ == "__main__":
    main()
