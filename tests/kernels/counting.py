"""Counts the bytes that plans move in Triton's interpreter, and refuses an access outside every argument"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from fastdiff_kernels import _plan
from fastdiff_kernels._plan import Plan


@dataclasses.dataclass
class Count:
    """Bytes of one launch's unmasked lanes, by argument: what several programs load counts several times, what several
    lanes of one access load counts once, as it does on a GPU"""

    plan: Plan
    loads: Counter[str] = dataclasses.field(default_factory=Counter)
    stores: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def total(self) -> int:
        return self.loads.total() + self.stores.total()


class _Argument:
    """Which addresses are elements of a tensor: strided, so that a view's gaps do not belong to it"""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.base, self.item = tensor.data_ptr(), tensor.element_size()
        offsets = np.zeros(1, dtype=np.int64)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = np.unique(np.add.outer(offsets, np.arange(size) * stride))
        self.inside = np.zeros(int(offsets[-1]) + 1 if len(offsets) else 0, dtype=bool)
        self.inside[offsets] = True

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        element, rest = np.divmod(addresses.astype(np.int64) - self.base, self.item)
        near = (rest == 0) & (element >= 0) & (element < len(self.inside))
        return near & self.inside[np.where(near, element, 0)] if len(self.inside) else near


@contextlib.contextmanager
def counting() -> Iterator[list[Count]]:
    """The list that every plan launched within is appended to, with its bytes; AssertionError for a stray access"""
    from triton.runtime.interpreter import InterpreterBuilder

    counts: list[Count] = []
    arguments: dict[str, _Argument] = {}

    def begin(plan: Plan) -> None:
        counts.append(Count(plan))
        arguments.clear()
        arguments.update((name, _Argument(v)) for name, v in plan.args.items() if isinstance(v, torch.Tensor))

    def tally(addresses: np.ndarray, mask: np.ndarray, item: int, stored: bool) -> None:
        addresses = np.unique(addresses[np.broadcast_to(mask.astype(bool), addresses.shape)])
        if not len(addresses):
            return
        for name, argument in arguments.items():
            if argument.item == item and argument.holds(addresses[:1])[0]:
                stray = ~argument.holds(addresses)
                if not stray.any():
                    (counts[-1].stores if stored else counts[-1].loads)[name] += item * len(addresses)
                    return
        raise AssertionError(f"{counts[-1].name} {'stores' if stored else 'loads'} outside its arguments")

    def size(ptr: object) -> int:
        return max(1, ptr.get_element_ty().primitive_bitwidth // 8)

    patched = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    plain = {name: getattr(InterpreterBuilder, name) for name in patched}

    # unmasked loads and stores, block pointers and descriptors all end in the masked pair
    def load(self, ptrs, mask, *args, **kwargs):
        tally(ptrs.data, mask.data, size(ptrs), stored=False)
        return plain["create_masked_load"](self, ptrs, mask, *args, **kwargs)

    def store(self, ptrs, value, mask, *args, **kwargs):
        tally(ptrs.data, mask.data, size(ptrs), stored=True)
        return plain["create_masked_store"](self, ptrs, value, mask, *args, **kwargs)

    def atomic(*_: object, **__: object) -> None:
        raise NotImplementedError("atomics are not counted: what they move depends on the cache")

    replaced = {"create_masked_load": load, "create_masked_store": store}
    for name in patched:
        setattr(InterpreterBuilder, name, replaced.get(name, atomic))
    _plan.observers.append(begin)
    try:
        yield counts
    finally:
        _plan.observers.remove(begin)
        for name, function in plain.items():
            setattr(InterpreterBuilder, name, function)
