"""The head of a sampling step: the current row of the table into the buffers that the step reads"""

import torch
from torch import Tensor

from . import reference
from ._checks import FLOATS, check_device, check_dtype, check_shape, check_writable
from .guided_step import NUM_COEFS


@torch.no_grad()
def load_row(table: Tensor, times: Tensor, counter: Tensor, coefs: Tensor, t: Tensor, draw: Tensor) -> None:
    """coefs = table[counter], t[:] = times[counter], draw = counter, then counter += 1, all in place

    Layout:    table (capacity, NUM_COEFS), coefs (NUM_COEFS,) of its dtype; times (capacity,), t (B,) of its dtype;
               counter, draw int64 (1,). The buffers must not overlap.
    Traffic:   one row; nothing is read on the host, so the launch can be captured and replayed.
    Reference: reference.load_row

    A counter past the capacity is an IndexError on the CPU, with nothing written, and a device assertion on a GPU.
    Raises ValueError for a shape or device that does not fit, TypeError for a dtype.
    """
    check_shape("table", table, ("capacity", NUM_COEFS))
    check_dtype("table", table, FLOATS)
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
    check_writable("coefs", coefs)
    check_writable("t", t)

    row, time, counter_next = reference.load_row(table, times, counter)
    coefs.copy_(row)
    t.copy_(time.expand_as(t))
    draw.copy_(counter)
    counter.copy_(counter_next)
