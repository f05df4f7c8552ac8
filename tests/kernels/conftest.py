"""The place that a kernel's case runs in"""

from __future__ import annotations

import pytest
import torch
from guided_step_cases import Step
from places import GPU, INTERPRETER, REFERENCE, Place


@pytest.fixture(params=[REFERENCE, INTERPRETER, GPU])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param.interpreted and any(value is torch.bfloat16 for value in request.node.callspec.params.values()):
        pytest.skip("the interpreter truncates to bfloat16")
    if request.param.split:
        from fastdiff_kernels.jit import ada_group_norm, ada_group_norm_backward

        monkeypatch.setattr(ada_group_norm, "SLAB_ELEMENTS", 0)
        monkeypatch.setattr(ada_group_norm_backward, "SLAB_ELEMENTS", 0)
    return request.param


@pytest.fixture
def step(place: Place) -> Step:
    return Step(place.device, place.impl)
