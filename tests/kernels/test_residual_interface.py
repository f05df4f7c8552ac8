"""residual as an op of torch.library, and its errors"""

import io

import pytest
import torch
from places import NO_TRITON
from residual_cases import FORM, draw, draw_wide, upstream_of
from torch import Tensor

from fastdiff_kernels import residual

OP = torch.ops.fastdiff_kernels.residual.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@FORM
def test_opcheck(resample, skip, layout, dtype):
    op = draw((2, 3, 8, 10), resample, dtype, layout=layout, skip=skip)
    for needs_grad, stats in ((True, True), (False, False)):
        operands = [None if value is None else value.clone().requires_grad_(needs_grad) for value in op.values()]
        torch.library.opcheck(OP, (*operands, None, None, None, resample, stats, "auto"))


def test_opcheck_without_bias_on_views():
    base = torch.randn(3, 8, 9, 10)
    rest = (None, None, None, None, True, "auto")
    torch.library.opcheck(OP, (base[1:, 1:4, 1:5, ::2], None, base[1:, 4:7, 1:5, 1::2], *rest))
    expanded = base[:1].expand(4, 8, 9, 10)
    torch.library.opcheck(OP, (expanded, None, expanded[:3], *rest))
    # an op may return nothing that it was given
    for h in (base, expanded):
        torch.library.opcheck(OP, (h, None, None, *rest))


@pytest.mark.parametrize(
    "parts,rows,layout,dtype",
    [
        ((4,), (2,), "channels_last", torch.float32),
        ((4, 3), (3, 2), "contiguous", torch.float64),
        ((4, 3), (2, 3), "channels_last", torch.bfloat16),
    ],
    ids=str,
)
def test_opcheck_of_a_product(parts, rows, layout, dtype):
    op = draw_wide((3, 5, 8, 10), parts, dtype, rows=rows, weight_bias=len(parts) == 2, layout=layout)
    for needs_grad, stats in ((True, True), (False, False)):
        given = [op.get(name) for name in ("h", "bias", "skip", "skip2", "weight", "weight_bias")]
        operands = [None if value is None else value.clone().requires_grad_(needs_grad) for value in given]
        torch.library.opcheck(OP, (*operands, None, stats, "auto"))


@FORM
def test_torch_compile_traces_it_whole(place, resample, skip):
    op = draw((2, 6, 8, 10), resample, skip=skip, device=place.device)
    given = {name: value for name, value in op.items() if value is not None}
    names = tuple(given)

    def function(*operands: Tensor) -> tuple[Tensor, Tensor]:
        y, stats = residual(**{**op, **dict(zip(names, operands, strict=True))}, resample=resample, impl=place.impl)
        return y * 2, stats + 1

    leaves = [value.requires_grad_() for value in given.values()]
    upstream = upstream_of(op["h"])
    results = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        y, stats = call(*leaves)
        results.append((y, stats, *torch.autograd.grad(y, leaves, upstream)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rows", [(3, 3), (3, 2)], ids=str)
def test_torch_compile_traces_a_product_whole(place, rows):
    op = draw_wide((3, 6, 4, 5), (4, 7), rows=rows, weight_bias=True, device=place.device)
    names = tuple(op)

    def function(*operands: Tensor) -> tuple[Tensor, Tensor]:
        y, stats = residual(**dict(zip(names, operands, strict=True)), impl=place.impl)
        return y * 2, stats + 1

    leaves = [value.requires_grad_() for value in op.values()]
    upstream = upstream_of(op["h"])
    results = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        y, stats = call(*leaves)
        results.append((y, stats, *torch.autograd.grad(y, leaves, upstream)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-5)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(6))

    def forward(self, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor | None]:
        return residual(h, self.bias, skip, resample="up")


def test_torch_export_round_trip():
    op, block = draw((2, 6, 8, 10), "up"), Block()
    file = io.BytesIO()
    torch.export.save(torch.export.export(block, (op["h"], op["skip"])), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for got, want in zip(loaded(op["h"], op["skip"]), block(op["h"], op["skip"]), strict=True):
        assert torch.equal(got, want) and got.stride() == want.stride()


ERRORS = {
    "h_list": ({"h": [1.0]}, TypeError, "h must be a torch.Tensor, got list"),
    "h_3d": ({"h": torch.zeros(2, 6, 4)}, ValueError, r"h must have shape \(B, C, H, W\), got \(2, 6, 4\)"),
    "h_int": ({"h": torch.zeros(2, 6, 4, 4).long()}, TypeError, "h must be .* got torch.int64"),
    "h_pixels": (
        {"h": torch.zeros(1, 1, 1, 1).expand(1, 1, 1 << 15, 1 << 15)},
        ValueError,
        r"h must have fewer than 2\^30 pixels an image, got 32768 x 32768",
    ),
    "skip_list": ({"skip": [1.0]}, TypeError, "skip must be a torch.Tensor, got list"),
    "skip_left_out": (
        {"skip": None, "resample": "down"},
        ValueError,
        "skip must be given with weight or resample, got None",
    ),
    "skip2_without_skip": (
        {"skip": None, "skip2": torch.zeros(2, 6, 4, 4)},
        ValueError,
        "skip2 must be None without weight",
    ),
    "weight_without_skip": (
        {"skip": None, "weight": torch.zeros(6, 6)},
        ValueError,
        "skip must be given with weight or resample, got None",
    ),
    "weight_bias_alone": ({"weight_bias": torch.zeros(6)}, ValueError, "weight_bias must be None without weight"),
    "weight_bias_without_skip": (
        {"skip": None, "weight_bias": torch.zeros(6)},
        ValueError,
        "weight_bias must be None without weight",
    ),
    "skip_shape": (
        {"skip": torch.zeros(2, 6, 4, 5)},
        ValueError,
        r"skip must have shape \(ROWS, 6, 4, 4\), got \(2, 6, 4",
    ),
    "skip_down": (
        {"resample": "down"},
        ValueError,
        r"skip must have shape \(ROWS, 6, 8, 8\), got \(2, 6, 4, 4\); resample='down' halves it",
    ),
    "skip_up": (
        {"resample": "up"},
        ValueError,
        r"skip must have shape \(ROWS, 6, 2, 2\), got \(2, 6, 4, 4\); resample='up' doubles it",
    ),
    "h_odd_up": (
        {"h": torch.zeros(2, 6, 4, 3), "resample": "up"},
        ValueError,
        "h must have even height and width for resample='up', got 4 x 3",
    ),
    "resample": ({"resample": "left"}, ValueError, "resample must be one of None, 'down', 'up', got 'left'"),
    "stats_int": ({"stats": 1}, TypeError, "stats must be a bool, got int"),
    "skip_more_rows": (
        {"skip": torch.zeros(3, 6, 4, 4)},
        ValueError,
        "skip must have B / 2 to B rows, B = 2 of h, got 3",
    ),
    "skip_too_few_rows": ({"skip": torch.zeros(0, 6, 4, 4)}, ValueError, "skip must have .* B = 2 of h, got 0"),
    "skip2_alone": ({"skip2": torch.zeros(2, 6, 4, 4)}, ValueError, "skip2 must be None without weight"),
    "skip_dtype": (
        {"skip": torch.zeros(2, 6, 4, 4).half()},
        TypeError,
        "skip must be torch.float32, got torch.float16; it must have h's dtype",
    ),
    "skip_device": (
        {"skip": torch.zeros(2, 6, 4, 4, device="meta")},
        ValueError,
        "skip must be on the device of h, cpu, got meta",
    ),
    "bias_shape": ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
    "bias_dtype": ({"bias": torch.zeros(6).half()}, TypeError, "bias must be torch.float32, got torch.float16"),
    "bias_of_bf16": (
        {
            "h": torch.zeros(2, 6, 4, 4).bfloat16(),
            "skip": torch.zeros(2, 6, 4, 4).bfloat16(),
            "bias": torch.zeros(6).half(),
        },
        TypeError,
        "bias must be torch.bfloat16 or torch.float32, got torch.float16",
    ),
    "bias_device": (
        {"bias": torch.zeros(6, device="meta")},
        ValueError,
        "bias must be on the device of h, cpu, got meta",
    ),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'triton', 'reference', got 'cuda'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case):
    change, kind, message = ERRORS[case]
    valid = draw((2, 6, 4, 4))
    with pytest.raises(kind, match=message):
        residual(**{**valid, **change})
    residual(**valid)


WIDE_ERRORS = {
    "resample": ({"resample": "up"}, ValueError, "resample must be None with weight, got 'up'"),
    "skip_left_out": ({"skip": None}, ValueError, "skip must be given with weight or resample, got None"),
    "skip_channels": (
        {"skip": torch.zeros(2, 5, 4, 4)},
        ValueError,
        r"weight must have shape \(6, 8\), got \(6, 7\); C, and C1 \+ C2 of skips",
    ),
    "skip_size": (
        {"skip": torch.zeros(2, 4, 4, 5)},
        ValueError,
        r"skip must have shape \(ROWS, C1, 4, 4\), got \(2, 4, 4, 5\)",
    ),
    "skip2_size": (
        {"skip2": torch.zeros(2, 3, 5, 4)},
        ValueError,
        r"skip2 must have shape \(ROWS, C2, 4, 4\), got \(2, 3, 5, 4\)",
    ),
    "skip2_left_out": ({"skip2": None}, ValueError, r"weight must have shape \(6, 4\), got \(6, 7\)"),
    "skip2_rows": (
        {"skip2": torch.zeros(3, 3, 4, 4)},
        ValueError,
        "skip2 must have B / 2 to B rows, B = 2 of h, got 3",
    ),
    "skip2_list": ({"skip2": [1.0]}, TypeError, "skip2 must be a torch.Tensor, got list"),
    "skip2_dtype": (
        {"skip2": torch.zeros(2, 3, 4, 4).half()},
        TypeError,
        "skip2 must be torch.float32, got torch.float16",
    ),
    "skip2_device": (
        {"skip2": torch.zeros(2, 3, 4, 4, device="meta")},
        ValueError,
        "skip2 must be on the device of h, cpu, got meta",
    ),
    "weight_list": ({"weight": [[1.0]]}, TypeError, "weight must be a torch.Tensor, got list"),
    "weight_1d": ({"weight": torch.zeros(42)}, ValueError, r"weight must have shape \(6, 7\), got \(42,\)"),
    "weight_transposed": ({"weight": torch.zeros(7, 6)}, ValueError, r"weight must have shape \(6, 7\), got \(7, 6\)"),
    "weight_3x3": (
        {"weight": torch.zeros(6, 7, 3, 3)},
        ValueError,
        r"weight must have shape \(6, 7, 1, 1\), got \(6, 7, 3, 3\)",
    ),
    "weight_5d": ({"weight": torch.zeros(6, 7, 1, 1, 1)}, ValueError, r"weight must have shape \(6, 7, 1, 1\), got"),
    "weight_dtype": (
        {"weight": torch.zeros(6, 7).half()},
        TypeError,
        "weight must be torch.float32, got torch.float16",
    ),
    "weight_device": (
        {"weight": torch.zeros(6, 7, device="meta")},
        ValueError,
        "weight must be on the device of h, cpu, got meta",
    ),
    "weight_bias_list": ({"weight_bias": [1.0]}, TypeError, "weight_bias must be a torch.Tensor, got list"),
    "weight_bias_shape": (
        {"weight_bias": torch.zeros(7)},
        ValueError,
        r"weight_bias must have shape \(6,\), got \(7,\)",
    ),
    "weight_bias_dtype": (
        {"weight_bias": torch.zeros(6).half()},
        TypeError,
        "weight_bias must be torch.float32, got torch.float16",
    ),
    "weight_bias_device": (
        {"weight_bias": torch.zeros(6, device="meta")},
        ValueError,
        "weight_bias must be on the device of h, cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", WIDE_ERRORS)
def test_errors_of_a_product_name_the_argument(case):
    change, kind, message = WIDE_ERRORS[case]
    valid = draw_wide((2, 6, 4, 4), (4, 3), weight_bias=True)
    with pytest.raises(kind, match=message):
        residual(**{**valid, **change})
    residual(**valid)


@NO_TRITON
def test_float64_has_no_kernel():
    op = draw((2, 6, 4, 4), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"impl='triton' needs h to be .* got torch.float64; use impl='reference'"):
        residual(**op, impl="triton")
