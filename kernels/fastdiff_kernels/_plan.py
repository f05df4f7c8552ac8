"""One launch as data: the interpreter, the ahead-of-time build and the GPU all consume the same plan"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes that make a 128-bit access, and the divisor that Triton specialises on
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
}

observers: list[Callable[["Plan"], None]] = []
"""Called with every plan before it is launched: what counts launches and bytes"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A Triton kernel with everything that its launch needs

    args: tensors, integers, floats or None by parameter name, whose values Triton may specialise on.
    constexprs: what the code is generated for. A grid with a zero launches nothing.
    Tensors on the meta device have shape, strides and no memory: such a plan can be built ahead of time, and its launch
    is seen by observers and does nothing.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Tensor | int | float | None]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.strip("_").removesuffix("_kernel")

    def launch(self) -> None:
        for observe in observers:
            observe(self)
        tensor = next(value for value in self.args.values() if isinstance(value, Tensor))
        if 0 in self.grid or tensor.is_meta:
            return
        # Triton launches on the current device, which need not be that of the tensors
        with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
            self.kernel[self.grid](**self.args, **self.constexprs, num_warps=self.num_warps, num_stages=self.num_stages)

    def signature(self) -> dict[str, str]:
        """Triton's type of each parameter in order, "constexpr" for what the code is generated for"""
        types = {name: _type(value) for name, value in self.args.items()}
        return {name: types.get(name, "constexpr") for name in self.kernel.arg_names}

    def compile_time(self) -> dict[str, Any]:
        """Values of the parameters whose signature is constexpr; a launch takes integers of 1 and None for such, too"""
        fixed = {name: value for name, value in self.args.items() if _type(value) == "constexpr"}
        return {**fixed, **self.constexprs}

    def aligned(self) -> list[str]:
        """Parameters that Triton may take as divisible by 16: addresses in bytes, integers as they are"""
        return [name for name, value in self.args.items() if _type(value) != "constexpr" and _divisible(value)]


def _type(value: object) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int), value
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def address_of(tensor: Tensor) -> int:
    """Where it starts, in bytes; on the meta device in a storage that starts at 0"""
    return int(tensor.storage_offset()) * tensor.element_size() if tensor.is_meta else tensor.data_ptr()


def _divisible(value: object) -> bool:
    if isinstance(value, Tensor):
        return address_of(value) % ALIGNMENT == 0
    return isinstance(value, int) and value % ALIGNMENT == 0
