"""The byte formulas of the kernels against the bytes that Triton's interpreter counts"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.traffic import FORMULAS, plan_bytes
from fastdiff_kernels import (
    COEFS,
    ada_group_norm,
    guided_step,
    load_row,
    philox_normal,
    philox_uint32,
    q_sample,
    reference,
    residual,
)
from tests.kernels.counting import counting
from tests.kernels.places import WHY_NOT

if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)

from triton.runtime.errors import InterpreterError

from fastdiff_kernels import _tuning, jit
from fastdiff_kernels.jit.load_row import plan_load_row


def images(b: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(b, h, w, c).to(dtype).permute(0, 3, 1, 2)


def philox(n: int, *shape: int, on_device: bool) -> None:
    draw = torch.tensor([3]) if on_device else 3
    philox_normal(torch.arange(n), shape, draw=draw, stream=0, dtype=torch.float16, impl="triton")
    philox_uint32(torch.arange(n), shape, draw=draw, stream=0, impl="triton")


def step(n: int, m: int, c: int, side: int, *, learned: bool, layout: torch.memory_format, extras: bool) -> None:
    def draw(rows: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(rows, channels, side, side).to(dtype).contiguous(memory_format=layout)

    x, out = draw(n, c, torch.float32), draw(n + m, 2 * c if learned else c, torch.float16)
    more = {name: draw(n, c, torch.float32) for name in ("x0", "hist", "grad", "noise")} if extras else {}
    drawn = {} if extras else {"seeds": torch.arange(n), "draw": torch.tensor([2])}
    guided_step(
        *(x, out, torch.full((len(COEFS),), 0.5), torch.ones(n)),
        x_net=draw(n + m, c, torch.float16),
        learned=learned,
        **more,
        **drawn,
        impl="triton",
    )


def head(rows: int, b: int) -> None:
    table, times = torch.randn(rows, len(COEFS)), torch.arange(float(rows))
    counter, draw = torch.tensor([1]), torch.tensor([0])
    load_row(table, times, counter, torch.empty(len(COEFS)), torch.empty(b), draw, impl="triton")


def forward_process(n: int, c: int, side: int, *, noise: bool, prediction: str = "eps") -> None:
    given = {"noise": images(n, c, side, side)} if noise else {"seeds": torch.arange(n), "draw": 2}
    alpha = torch.full((n,), 0.6)
    q_sample(images(n, c, side, side), alpha, alpha, **given, prediction=prediction, impl="triton")


def end_of_block(
    b: int,
    c: int,
    h: int,
    w: int,
    *,
    resample: str | None = None,
    skip: bool = True,
    stats: bool = True,
    shared: int = 0,
) -> None:
    factor = {"down": 2, "up": 0.5, None: 1}[resample]
    added = images(b - shared, c, int(h * factor), int(w * factor)) if skip else None
    residual(images(b, c, h, w), torch.randn(c), added, resample=resample, stats=stats, impl="triton")


def end_of_wide_block(
    b: int,
    c: int,
    h: int,
    w: int,
    *,
    parts: tuple[int, ...],
    bias: bool = True,
    weight_bias: torch.dtype | None = None,
    stats: bool = True,
    shared: int = 0,
) -> None:
    skips = [images(b - shared * i, part, h, w) for i, part in enumerate(parts)]
    weight = torch.randn(c, sum(parts)).half()
    residual(
        *(images(b, c, h, w), torch.randn(c) if bias else None, skips[0], skips[1] if len(skips) > 1 else None, weight),
        None if weight_bias is None else torch.randn(c).to(weight_bias),
        stats=stats,
        impl="triton",
    )


def norm(
    b: int,
    c: int,
    h: int,
    w: int,
    *,
    groups: int,
    split: int = 0,
    modulated: bool = False,
    folded: bool = False,
    handed: bool = False,
    shared: int = 0,
    shared2: int = 0,
    resample: str | None = None,
    backward: bool = False,
) -> None:
    x, x2 = images(b, c - split, h, w), images(b - shared2, split, h, w) if split else None
    weight, bias = torch.randn(2, c).half()
    scale, shift = torch.randn(b + shared, 2 * c).half().chunk(2, dim=1) if modulated else (None, None)
    stats, stats2 = (reference.chunk_statistics(t, 4) if handed and t is not None else None for t in (x, x2))
    y = ada_group_norm(
        *(x.requires_grad_(backward), weight, bias, scale, shift),
        groups=groups,
        x2=x2,
        x_bias=torch.randn(c).requires_grad_(backward) if folded else None,
        resample=resample,
        stats=stats,
        stats2=stats2,
        impl="triton",
    )
    if backward:
        y.backward(torch.randn_like(y))


CL = torch.channels_last
CASES: dict[str, tuple[Callable[..., None], tuple[int, ...], dict[str, object]]] = {
    "philox": (philox, (3, 3, 7, 5), {"on_device": True}),
    "philox_by_value": (philox, (2, 3, 32, 32), {"on_device": False}),
    "step_drawn": (step, (3, 2, 3, 6), {"learned": True, "layout": CL, "extras": False}),
    "step_unguided": (step, (3, 0, 3, 6), {"learned": False, "layout": torch.contiguous_format, "extras": False}),
    "step_everything": (step, (3, 3, 3, 5), {"learned": True, "layout": CL, "extras": True}),
    "step_mixed": (step, (2, 1, 1, 8), {"learned": False, "layout": torch.contiguous_format, "extras": True}),
    "load_row": (head, (5, 3), {}),
    "load_row_long": (head, (2, 100), {}),
    "q_sample_drawn": (forward_process, (3, 3, 6), {"noise": False}),
    "q_sample_odd": (forward_process, (2, 3, 5), {"noise": False, "prediction": "v"}),
    "q_sample_given": (forward_process, (2, 70, 4), {"noise": True, "prediction": "x0"}),
    "residual": (end_of_block, (2, 48, 9, 10), {}),
    "residual_bare": (end_of_block, (1, 96, 3, 5), {"stats": False}),
    "residual_down": (end_of_block, (2, 64, 5, 4), {"resample": "down"}),
    "residual_up": (end_of_block, (2, 40, 10, 14), {"resample": "up"}),
    "residual_shared": (end_of_block, (3, 24, 5, 7), {"shared": 1}),
    "residual_shared_up": (end_of_block, (2, 24, 4, 6), {"shared": 1, "resample": "up"}),
    "residual_of_bias": (end_of_block, (2, 48, 9, 10), {"skip": False}),
    "residual_of_bias_bare": (end_of_block, (1, 70, 3, 5), {"skip": False, "stats": False}),
    "projection": (end_of_wide_block, (3, 70, 9, 10), {"parts": (24, 48), "shared": 1}),
    "projection_with_bias": (end_of_wide_block, (2, 70, 9, 10), {"parts": (24, 48), "weight_bias": torch.float32}),
    "projection_of_its_bias": (
        end_of_wide_block,
        (2, 40, 12, 12),
        {"parts": (64,), "bias": False, "weight_bias": torch.float16},
    ),
    "projection_of_one": (end_of_wide_block, (2, 64, 12, 12), {"parts": (64,), "bias": False}),
    "projection_bare": (end_of_wide_block, (1, 5, 3, 5), {"parts": (3, 7), "stats": False}),
    "norm": (norm, (2, 48, 5, 6), {"groups": 8}),
    "norm_modulated": (norm, (2, 36, 7, 9), {"groups": 3, "modulated": True, "folded": True}),
    "norm_shared": (norm, (2, 24, 6, 4), {"groups": 4, "modulated": True, "shared": 1}),
    "norm_shared_down": (norm, (2, 24, 6, 4), {"groups": 4, "modulated": True, "shared": 1, "resample": "down"}),
    "norm_concat": (norm, (2, 72, 10, 10), {"groups": 6, "split": 24, "handed": True}),
    "norm_concat_shared": (
        norm,
        (3, 72, 5, 6),
        {"groups": 4, "split": 40, "shared2": 1, "folded": True, "handed": True},
    ),
    "norm_concat_up": (norm, (1, 72, 6, 6), {"groups": 4, "split": 40, "folded": True, "resample": "up"}),
    "norm_down": (norm, (2, 40, 10, 8), {"groups": 5, "resample": "down"}),
    "backward": (norm, (2, 48, 9, 10), {"groups": 3, "modulated": True, "folded": True, "backward": True}),
    "backward_up": (norm, (1, 48, 6, 4), {"groups": 8, "split": 24, "resample": "up", "backward": True}),
    "backward_down": (
        norm,
        (2, 24, 6, 4),
        {"groups": 4, "modulated": True, "shared": 1, "resample": "down", "backward": True},
    ),
}
# one launch where a slab of whole groups fits, more where it does not
SPLIT = {f"{name}_split": case for name, case in CASES.items() if case[0] is norm}


def launches(name: str) -> list[str]:
    """What a case is made of; a backward pass that nothing wants dx of folds and ends"""
    run, _, options = (CASES | SPLIT)[name]
    if run is not norm:
        return {
            philox: ["philox"] * 2,
            step: ["guided_step"],
            head: ["load_row"],
            forward_process: ["q_sample"],
            end_of_block: ["residual"],
            end_of_wide_block: ["projection"],
        }[run]
    backward = bool(options.get("backward"))
    if name in CASES:
        return ["slab"] + ["slab_backward"] * backward
    statistics = 0 if options.get("handed") else 1 + ("split" in options)
    return ["statistics"] * statistics + ["apply"] + ["sums", "fold_sums", "dx"] * backward


@pytest.mark.parametrize("name", [name for name in SPLIT if name.startswith("norm")])
def test_the_formula_of_apply_holds_for_programs_of_several_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_tuning.trial, "apply", {"BLOCK_P": 8, "TILES": 3, "BLOCK_C": 16})
    test_a_formula_is_what_the_interpreter_counts(name, monkeypatch)


@pytest.mark.parametrize("name", [*CASES, *SPLIT])
def test_a_formula_is_what_the_interpreter_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if name in SPLIT:
        for module in ("ada_group_norm", "ada_group_norm_backward"):
            monkeypatch.setattr(f"fastdiff_kernels.jit.{module}.SLAB_ELEMENTS", 0)
    asked: list[str] = []
    monkeypatch.setattr(_tuning, "observers", [lambda kernel, *_: asked.append(kernel)])
    run, shape, options = (CASES | SPLIT)[name]
    with counting() as counts:
        run(*shape, **options)
    assert [count.name for count in counts] == launches(name)
    # the tuner times the launches that have the name of the settings
    assert set(asked) <= {count.name for count in counts}
    for count in counts:
        found = plan_bytes(count.plan)
        assert (found.loads, found.stores) == (count.loads.total(), count.stores.total()), (count.name, count)


def test_every_kernel_has_a_formula_that_a_case_holds() -> None:
    folder = Path(jit.__file__).parent
    kernels = re.findall(r"^def _(\w+)_kernel\(", "\n".join(p.read_text() for p in folder.glob("*.py")), re.MULTILINE)
    held = {launch for name in CASES | SPLIT for launch in launches(name)}
    assert set(kernels) == set(FORMULAS) == held


def test_counting_by_hand() -> None:
    seeds, draw = torch.arange(3), torch.tensor([1])
    with counting() as counts:
        philox_normal(seeds, (3, 20, 20), draw=draw, stream=1, impl="triton")
        philox_normal(seeds[:0], (3, 20, 20), draw=draw, stream=1, impl="triton")
    philox_normal(seeds, (4,), draw=draw, stream=1, impl="triton")
    first, empty = counts
    # two programs of 1,024 elements an image, each reads its seed and the draw
    assert dict(first.loads) == {"seeds_ptr": 3 * 2 * 8, "draw_ptr": 3 * 2 * 8}
    assert dict(first.stores) == {"out_ptr": 3 * 1200 * 4}
    assert empty.total == plan_bytes(empty.plan).total == 0


def test_an_access_outside_every_argument_is_seen() -> None:
    table, times = torch.randn(8, len(COEFS)), torch.arange(8.0)
    buffers = torch.zeros(len(COEFS)), torch.zeros(3), torch.tensor([0])
    plan = plan_load_row(table, times, torch.tensor([1]), *buffers)
    with counting() as counts:
        plan.launch()
    assert counts[0].total > 0
    # the same storage, a view that ends before the row that the counter names
    plan = plan_load_row(table, times, torch.tensor([5]), *buffers)
    stray = dataclasses.replace(plan, args={**plan.args, "table_ptr": table[:4]})
    with pytest.raises(InterpreterError, match="load_row loads outside its arguments"), counting():
        stray.launch()
