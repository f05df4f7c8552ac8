"""load_row: the head of a step"""

import io

import pytest
import torch
from places import GPU, INTERPRETER
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff_kernels import NUM_COEFS, load_row

CAPACITY, BATCH = 5, 3
NAN = float("nan")
KERNEL = pytest.mark.parametrize("place", [INTERPRETER, GPU])


class NoHostRead(TorchDispatchMode):
    """Refuses the operator behind .item(), which would break a CUDA graph's capture"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a device value was read on the host"
        return func(*args, **(kwargs or {}))


def buffers(dtype=torch.float32, device="cpu", batch=BATCH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        "table": torch.randn(CAPACITY, NUM_COEFS, generator=generator, dtype=dtype),
        "times": 900 * torch.rand(CAPACITY, generator=generator, dtype=dtype),
        "counter": torch.tensor([0]),
        "coefs": torch.full((NUM_COEFS,), NAN, dtype=dtype),
        "t": torch.full((batch,), NAN, dtype=dtype),
        "draw": torch.tensor([-1]),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def check_rows_in_order(b: dict[str, torch.Tensor], impl: str) -> None:
    addresses = {name: tensor.data_ptr() for name, tensor in b.items()}
    for row in range(CAPACITY):
        load_row(**b, impl=impl)
        assert torch.equal(b["coefs"], b["table"][row])
        assert b["t"].tolist() == [b["times"][row].item()] * len(b["t"])
        assert b["draw"].tolist() == [row] and b["counter"].tolist() == [row + 1]
    assert addresses == {name: tensor.data_ptr() for name, tensor in b.items()}


@pytest.mark.parametrize("batch", [0, 1, BATCH, 32, 70], ids="B{}".format)
def test_rows_come_in_order_and_the_counter_moves_on(place, batch):
    check_rows_in_order(buffers(device=place.device, batch=batch), place.impl)


def test_float64_stays_float64():
    check_rows_in_order(buffers(torch.float64), "auto")


def test_a_nan_row_is_copied_as_it_is(place):
    b = buffers(device=place.device)
    b["table"][0, 3] = float("inf")
    b["table"][0, 4] = NAN
    load_row(**b, impl=place.impl)
    assert torch.equal(b["coefs"].nan_to_num(7, 8), b["table"][0].nan_to_num(7, 8))


@pytest.mark.parametrize("row", [CAPACITY, 2**40, -1])
def test_a_counter_outside_the_table_raises_on_a_cpu_and_writes_nothing(row):
    b = buffers()
    b["counter"].fill_(row)
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        load_row(**b)
    assert b["coefs"].isnan().all() and b["t"].isnan().all()
    assert b["counter"].tolist() == [row] and b["draw"].tolist() == [-1]
    b["counter"].zero_()
    load_row(**b)
    assert torch.equal(b["coefs"], b["table"][0])


@KERNEL
@pytest.mark.parametrize("row", [CAPACITY, 2**40, -1])
def test_a_counter_outside_the_table_gives_nan_in_triton_and_reads_nothing_there(place, row):
    b = buffers(device=place.device)
    for name, size in (("table", (CAPACITY + 2, NUM_COEFS)), ("times", (CAPACITY + 2,))):
        around = torch.full(size, 3.0, device=place.device)
        around[1:-1] = b[name]
        b[name] = around[1:-1]
    b["coefs"].zero_()
    b["t"].zero_()
    b["counter"].fill_(row)
    load_row(**b, impl=place.impl)
    assert b["coefs"].isnan().all() and b["t"].isnan().all()
    assert b["counter"].tolist() == [row + 1] and b["draw"].tolist() == [row]


def test_views_are_read_and_written_within_their_bounds(place):
    b = buffers(device=place.device)
    bases = {}
    for name, tensor in b.items():
        bases[name] = torch.full([2 * size + 2 for size in tensor.shape], -7, dtype=tensor.dtype, device=place.device)
        inside = tuple(slice(1, -1, 2) for _ in tensor.shape)
        bases[name][inside] = tensor
        b[name] = bases[name][inside]
    check_rows_in_order(b, place.impl)
    for name, base in bases.items():
        b[name].fill_(-7)
        assert (base == -7).all(), f"something was written outside the view of {name}"


def test_nothing_is_read_on_the_host(place):
    b = buffers(device=place.device)
    with pytest.raises(AssertionError, match="read on the host"), NoHostRead():
        b["counter"].item()
    with NoHostRead():
        load_row(**b, impl=place.impl)


def test_opcheck(place):
    b = buffers(device=place.device)
    torch.library.opcheck(torch.ops.fastdiff_kernels.load_row.default, (*b.values(), place.impl))


def advance(table, times, counter, coefs, t, draw, impl):
    load_row(table * 2, times, counter, coefs, t, draw, impl=impl)
    load_row(table * 2, times, counter, coefs, t, draw, impl=impl)
    return coefs + 1


def test_torch_compile_traces_it_whole_and_writes_the_same(place):
    torch.compiler.reset()
    results = []
    for call in (advance, torch.compile(advance, backend="aot_eager", fullgraph=True)):
        b = buffers(device=place.device)
        results.append((call(**b, impl=place.impl), *b.values()))
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))
    assert results[0][3].tolist() == [2]


class Advance(torch.nn.Module):
    def __init__(self, impl: str) -> None:
        super().__init__()
        self.impl = impl

    def forward(self, table, times, counter, coefs, t, draw):
        return advance(table, times, counter, coefs, t, draw, self.impl)


def test_torch_export_round_trip(place):
    file, module = io.BytesIO(), Advance(place.impl)
    torch.export.save(torch.export.export(module, tuple(buffers(device=place.device).values())), file)
    file.seek(0)
    results = []
    for call in (module, torch.export.load(file).module()):
        b = tuple(buffers(device=place.device).values())
        results.append((call(*b), *b))
    assert all(torch.equal(eager, loaded) for eager, loaded in zip(*results, strict=True))


@pytest.mark.parametrize("place", [INTERPRETER])
@pytest.mark.parametrize("name", ["table", "times"])
def test_what_triton_does_not_do_is_an_error_when_asked_for(place, name):
    b = buffers()
    for each in ("table", "coefs") if name == "table" else ("times", "t"):
        b[each] = b[each].double()
    with pytest.raises(ValueError, match=f"impl='triton' needs {name} to be torch.float32, got torch.float64"):
        load_row(**b, impl=place.impl)
    assert b["counter"].tolist() == [0] and b["coefs"].isnan().all()
    load_row(**b)
    assert b["counter"].tolist() == [1]


ERRORS = {
    "table_columns": (
        {"table": torch.zeros(5, 3)},
        ValueError,
        r"table must have shape \(capacity, 14\), got \(5, 3\)",
    ),
    "table_empty": (
        {"table": torch.zeros(0, NUM_COEFS), "times": torch.zeros(0)},
        ValueError,
        r"table must have at least one row, got \(0, 14\)",
    ),
    "table_int": ({"table": torch.zeros(5, NUM_COEFS).long()}, TypeError, "table must be .* got torch.int64"),
    "times_length": (
        {"times": torch.zeros(4)},
        ValueError,
        r"times must have shape \(5,\), got \(4,\); one time a row",
    ),
    "times_int": ({"times": torch.zeros(5).long()}, TypeError, "times must be .* got torch.int64"),
    "t_2d": ({"t": torch.zeros(3, 1)}, ValueError, r"t must have shape \(B,\), got \(3, 1\)"),
    "t_dtype": ({"t": torch.zeros(3).half()}, TypeError, "t must be torch.float32, got torch.float16"),
    "t_expanded": ({"t": torch.zeros(1).expand(3)}, ValueError, "t is written in place and must not be expanded"),
    "coefs_shape": ({"coefs": torch.zeros(3)}, ValueError, r"coefs must have shape \(14,\), got \(3,\)"),
    "coefs_dtype": ({"coefs": torch.zeros(NUM_COEFS).double()}, TypeError, "coefs must be torch.float32, got"),
    "coefs_expanded": (
        {"coefs": torch.zeros(1).expand(NUM_COEFS)},
        ValueError,
        "coefs is written in place and must not be expanded",
    ),
    "counter_shape": ({"counter": torch.tensor(0)}, ValueError, r"counter must have shape \(1,\), got \(\)"),
    "counter_int32": ({"counter": torch.zeros(1).int()}, TypeError, "counter must be torch.int64, got torch.int32"),
    "counter_not_a_tensor": ({"counter": 0}, TypeError, "counter must be a torch.Tensor, got int"),
    "draw_shape": ({"draw": torch.zeros(2).long()}, ValueError, r"draw must have shape \(1,\), got \(2,\)"),
    "draw_dtype": ({"draw": torch.zeros(1)}, TypeError, "draw must be torch.int64, got torch.float32"),
    "impl": ({"impl": "gpu"}, ValueError, "impl must be one of 'auto', 'triton', 'reference', got 'gpu'"),
    "t_device": ({"t": torch.zeros(3, device="meta")}, ValueError, "t must be on the device of table, cpu, got meta"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument_and_write_nothing(case):
    change, kind, message = ERRORS[case]
    b = buffers()
    with pytest.raises(kind, match=message):
        load_row(**(b | change))
    assert b["counter"].tolist() == [0] and b["coefs"].isnan().all()


def test_buffers_that_are_one_are_refused():
    b = buffers()
    with pytest.raises(ValueError, match="draw must not overlap counter: both are written"):
        load_row(**b | {"draw": b["counter"]})
    assert b["counter"].tolist() == [0] and b["coefs"].isnan().all()
