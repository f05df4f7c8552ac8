"""The head of a sampling step: one row of the table into the buffers that the step reads"""

import triton
import triton.language as tl
from torch import Tensor

from .._plan import Plan


@triton.jit
def _load_row_kernel(
    table_ptr,
    table_r,
    table_k,
    times_ptr,
    times_r,
    counter_ptr,
    coefs_ptr,
    coefs_k,
    t_ptr,
    t_b,
    draw_ptr,
    CAPACITY,
    B,
    NUM_COEFS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """coefs = table[counter], t[:] = times[counter], draw = counter, counter += 1; NaN for a row outside the table

    Layout:    table (CAPACITY, NUM_COEFS), times (CAPACITY,), coefs (NUM_COEFS,), t (B,), any strides;
               counter, draw int64 (1,).
    Program:   one, of one warp: every warp reads the counter, so a second could read what the first has written
    Precision: copies
    Traffic:   one row
    Reference: reference.load_row
    """
    row = tl.load(counter_ptr)
    # nothing outside the table is read; NaN makes the fault visible in every image, where a stale row would not
    known = (row >= 0) & (row < CAPACITY)
    k = tl.arange(0, BLOCK)
    inside = k < NUM_COEFS
    coefs = tl.load(table_ptr + row * table_r + k * table_k, mask=inside & known, other=float("nan"))
    time = tl.load(times_ptr + row * times_r, mask=known, other=float("nan"))
    tl.store(coefs_ptr + k * coefs_k, coefs, mask=inside)
    for start in range(0, B, BLOCK):
        b = start + k
        tl.store(t_ptr + b.to(tl.int64) * t_b, tl.zeros([BLOCK], tl.float32) + time, mask=b < B)
    tl.store(draw_ptr, row)
    tl.store(counter_ptr, row + 1)


def plan_load_row(table: Tensor, times: Tensor, counter: Tensor, coefs: Tensor, t: Tensor, draw: Tensor) -> Plan:
    """table, times, coefs and t in float32"""
    num_coefs = table.shape[1]
    return Plan(
        kernel=_load_row_kernel,
        grid=(1,),
        args={
            "table_ptr": table,
            "table_r": table.stride(0),
            "table_k": table.stride(1),
            "times_ptr": times,
            "times_r": times.stride(0),
            "counter_ptr": counter,
            "coefs_ptr": coefs,
            "coefs_k": coefs.stride(0),
            "t_ptr": t,
            "t_b": t.stride(0),
            "draw_ptr": draw,
            "CAPACITY": table.shape[0],
            "B": t.shape[0],
        },
        constexprs={"NUM_COEFS": num_coefs, "BLOCK": max(32, triton.next_power_of_2(num_coefs))},
        num_warps=1,
    )
