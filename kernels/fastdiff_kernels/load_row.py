"""The head of a sampling step: the current row of the table into the buffers that the step reads"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import reference
from ._checks import FLOATS, check_apart, check_device, check_dtype, check_shape, check_writable
from ._impl import check_impl, plain, uses_triton
from .guided_step import NUM_COEFS

ROW_DTYPES = (torch.float32,)


def _load_row(table: Tensor, times: Tensor, counter: Tensor, coefs: Tensor, t: Tensor, draw: Tensor, impl: str) -> None:
    if times.dtype in ROW_DTYPES and uses_triton(impl, table, ROW_DTYPES):
        from .jit.load_row import plan_load_row

        plan_load_row(table, times, counter, coefs, t, draw).launch()
        # a launch is nothing that autograd sees
        increment_version((coefs, t, draw, counter))
        return
    row, time, counter_next = reference.load_row(table, times, counter)
    coefs.copy_(row)
    t.copy_(time.expand_as(t))
    draw.copy_(counter)
    counter.copy_(counter_next)


_load_row_op = torch.library.custom_op(
    "fastdiff_kernels::load_row", _load_row, mutates_args=("counter", "coefs", "t", "draw")
)
_load_row_op.register_fake(lambda *args: None)


def load_row(
    table: Tensor, times: Tensor, counter: Tensor, coefs: Tensor, t: Tensor, draw: Tensor, *, impl: str = "auto"
) -> None:
    """coefs = table[counter], t[:] = times[counter], draw = counter, then counter += 1, all in place

    Layout:    table (capacity, NUM_COEFS), coefs (NUM_COEFS,) of its dtype; times (capacity,), t (B,) of its dtype;
               counter, draw int64 (1,). The buffers must not overlap.
    Traffic:   one row; nothing is read on the host, so the launch can be captured and replayed.
               Triton, which impl="auto" takes on a GPU and impl="triton" demands, holds table and times in float32.
    Reference: reference.load_row

    A counter outside the table is an IndexError on the CPU, with nothing written. Triton cannot raise: it reads nothing
    outside the table and fills coefs and t with NaN, which shows in every image, while draw and counter move on.
    Raises ValueError for a shape or device that does not fit, TypeError for a dtype.
    """
    check_shape("table", table, ("capacity", NUM_COEFS))
    check_dtype("table", table, FLOATS)
    if table.shape[0] < 1:
        raise ValueError(f"table must have at least one row, got {tuple(table.shape)}")
    check_shape("times", times, (table.shape[0],), "one time a row of table")
    check_dtype("times", times, FLOATS)
    check_shape("t", t, ("B",))
    check_dtype("t", t, (times.dtype,), "times and t must share a dtype")
    check_shape("coefs", coefs, (NUM_COEFS,))
    check_dtype("coefs", coefs, (table.dtype,), "table and coefs must share a dtype")
    for name, index in (("counter", counter), ("draw", draw)):
        check_shape(name, index, (1,))
        check_dtype(name, index, (torch.int64,))
    for name, tensor in (("times", times), ("counter", counter), ("coefs", coefs), ("t", t), ("draw", draw)):
        check_device(name, tensor, table.device, like="table")
    for name, tensor in (("counter", counter), ("coefs", coefs), ("t", t), ("draw", draw)):
        check_writable(name, tensor)
    check_apart(counter=counter, coefs=coefs, t=t, draw=draw)
    check_impl(impl, table, "table", ROW_DTYPES)
    check_impl(impl, times, "times", ROW_DTYPES)

    tensors = (table, times, counter, coefs, t, draw)
    if torch.compiler.is_compiling():
        # in place of torch.no_grad: torch.export refuses such a region where it returns nothing
        _load_row_op(*(tensor.detach() for tensor in tensors), impl)
        return
    with torch.no_grad():
        run = _load_row if plain(*tensors) else _load_row_op
        run(*tensors, impl)
