"""load_row: the head of a step"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff_kernels import NUM_COEFS, load_row

CAPACITY, BATCH = 5, 3


class NoHostRead(TorchDispatchMode):
    """Refuses the operator behind .item(), which would break a CUDA graph's capture"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a device value was read on the host"
        return func(*args, **(kwargs or {}))


def buffers(dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "table": torch.randn(CAPACITY, NUM_COEFS, generator=generator, dtype=dtype),
        "times": 900 * torch.rand(CAPACITY, generator=generator, dtype=dtype),
        "counter": torch.tensor([0]),
        "coefs": torch.full((NUM_COEFS,), float("nan"), dtype=dtype),
        "t": torch.full((BATCH,), float("nan"), dtype=dtype),
        "draw": torch.tensor([-1]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_come_in_order_and_the_counter_moves_on(dtype):
    b = buffers(dtype)
    addresses = {name: tensor.data_ptr() for name, tensor in b.items()}
    for row in range(CAPACITY):
        load_row(**b)
        assert torch.equal(b["coefs"], b["table"][row])
        assert b["t"].tolist() == [b["times"][row].item()] * BATCH
        assert b["draw"].tolist() == [row] and b["counter"].tolist() == [row + 1]
    assert addresses == {name: tensor.data_ptr() for name, tensor in b.items()}


def test_a_nan_row_is_copied_as_it_is():
    b = buffers()
    b["table"][0, 3] = float("inf")
    b["table"][0, 4] = float("nan")
    load_row(**b)
    assert torch.equal(b["coefs"].nan_to_num(7, 8), b["table"][0].nan_to_num(7, 8))


def test_a_counter_past_the_capacity_raises_and_writes_nothing():
    b = buffers()
    b["counter"].fill_(CAPACITY)
    with pytest.raises(IndexError):
        load_row(**b)
    assert b["coefs"].isnan().all() and b["t"].isnan().all()
    assert b["counter"].tolist() == [CAPACITY] and b["draw"].tolist() == [-1]
    b["counter"].zero_()
    load_row(**b)
    assert torch.equal(b["coefs"], b["table"][0])


def test_views_are_written_within_their_bounds():
    b = buffers()
    base = torch.full((2 * BATCH + 2,), -7.0)
    b["t"] = base[1:-1:2]
    load_row(**b)
    assert base[1:-1:2].tolist() == [b["times"][0].item()] * BATCH
    assert (base[0::2] == -7).all() and base[-1] == -7


def test_an_empty_batch_of_times():
    b = buffers() | {"t": torch.empty(0)}
    load_row(**b)
    assert b["counter"].tolist() == [1]


def test_nothing_is_read_on_the_host():
    b = buffers()
    with pytest.raises(AssertionError, match="read on the host"), NoHostRead():
        b["counter"].item()
    with NoHostRead():
        load_row(**b)


ERRORS = {
    "table_columns": (
        {"table": torch.zeros(5, 3)},
        ValueError,
        r"table must have shape \(capacity, 14\), got \(5, 3\)",
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
    "t_device": ({"t": torch.zeros(3, device="meta")}, ValueError, "t must be on the device of table, cpu, got meta"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument_and_write_nothing(case):
    change, kind, message = ERRORS[case]
    b = buffers()
    with pytest.raises(kind, match=message):
        load_row(**(b | change))
    assert b["counter"].tolist() == [0] and b["coefs"].isnan().all()
