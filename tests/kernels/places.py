"""Where a kernel's cases run: the reference and Triton's interpreter on a CPU, Triton on a GPU"""

from __future__ import annotations

import dataclasses

import pytest

from fastdiff_kernels._impl import HAS_TRITON, INTERPRETED


@dataclasses.dataclass(frozen=True)
class Place:
    """device and impl to pass to an op; the interpreter is slow, and truncates to bfloat16 where a GPU rounds

    split: ada_group_norm takes several launches where one would do, so that small shapes show them.
    """

    name: str
    device: str
    impl: str
    split: bool = False

    @property
    def interpreted(self) -> bool:
        return self.name == "interpreter"


REFERENCE = pytest.param(Place("reference", "cpu", "reference"), id="reference")
# why no kernel is interpreted here, if so; nothing where kernels are
WHY_NOT = "" if HAS_TRITON and INTERPRETED else "triton runs on a GPU here" if HAS_TRITON else "triton is not installed"
NO_INTERPRETER = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
NO_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
INTERPRETER = pytest.param(Place("interpreter", "cpu", "triton"), id="interpreter", marks=NO_INTERPRETER)
GPU = pytest.param(Place("gpu", "cuda", "triton"), id="gpu", marks=pytest.mark.gpu)
PATHS = [
    REFERENCE,
    INTERPRETER,
    pytest.param(Place("interpreter", "cpu", "triton", True), id="interpreter-split", marks=NO_INTERPRETER),
    GPU,
    pytest.param(Place("gpu", "cuda", "triton", True), id="gpu-split", marks=pytest.mark.gpu),
]
