"""GraphedStep: on a CPU the function stands for the graph, under the same contract"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastdiff import cuda_graph
from fastdiff.cuda_graph import GraphedStep, NotCapturable, Pool, _captured, _told, is_out_of_memory

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=pytest.mark.gpu, id="gpu")]


class Accumulator:
    """total += x, count += 1, over buffers that live as long as it does"""

    def __init__(self, device: str) -> None:
        self.x, self.total = torch.ones(3, device=device), torch.ones(3, device=device)
        self.count = torch.ones(1, dtype=torch.int64, device=device)
        self.static = [self.x, self.total, self.count]

    def __call__(self) -> None:
        self.total += self.x * 2
        self.count += 1


@pytest.mark.parametrize("device", DEVICES)
def test_replays_are_calls(device: str) -> None:
    step = Accumulator(device)
    replay = GraphedStep(step, step.static)
    for x in (1.0, 5.0):
        step.x.fill_(x), step.total.zero_(), step.count.zero_()
        for _ in range(3):
            replay()
        assert step.total.tolist() == [6 * x] * 3 and step.count.item() == 3


@pytest.mark.parametrize("device", DEVICES)
def test_what_nobody_fills_is_poison(device: str) -> None:
    step = Accumulator(device)
    replay = GraphedStep(step, step.static)
    assert step.x.isnan().all() and step.total.isnan().all() and step.count.item() == -(2**63)
    step.total.zero_()
    replay()
    assert step.total.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_warming_up_starts_from_zero(device: str) -> None:
    """A counter that a warm-up leaves behind its table would be an index of nothing"""
    counts: list[int] = []
    step = Accumulator(device)
    step.count.fill_(7)

    def seen() -> None:
        # a copy on the device: reading is what a step must not do
        counts.append(step.count.clone())
        step()

    GraphedStep(seen, step.static)
    assert counts[0].item() == 0


def reads(x: torch.Tensor) -> torch.Tensor:
    return x * float(x.sum())


def branches(x: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > 0 else -x


def selects(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0].sum() * x


def finds(x: torch.Tensor) -> torch.Tensor:
    return x.nonzero().sum() * x


def compares(x: torch.Tensor) -> torch.Tensor:
    return x if torch.equal(x, x * 2) else x * 3


def counts(x: torch.Tensor) -> torch.Tensor:
    return x * x.unique().sum()


@pytest.mark.parametrize("function", [reads, branches, selects, finds, compares, counts], ids=lambda f: f.__name__)
@pytest.mark.parametrize("device", DEVICES)
def test_a_host_read_is_named(device: str, function) -> None:
    x = torch.ones(3, device=device)
    with pytest.raises(NotCapturable, match=r"aten\.\w+.* reads the device's data on the host"):
        GraphedStep(lambda: x.copy_(function(x)), [x])
    # and the device goes on working
    assert float((x * 0).nan_to_num().sum()) == 0


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_upload_is_named(device: str) -> None:
    x = torch.ones(3)
    with pytest.raises(NotCapturable, match="moves data between cpu and"):
        GraphedStep(lambda: x.to(device), [x])


def test_numbers_of_another_device_may_be_read() -> None:
    x, number = torch.ones(3, device="meta"), torch.tensor(2.0)
    GraphedStep(lambda: x.mul_(float(number)), [x])


def test_a_conversion_on_one_device_is_no_upload() -> None:
    x = torch.ones(3)
    GraphedStep(lambda: x.copy_(x.to("cpu", torch.float64)), [x])


@pytest.mark.parametrize("device", DEVICES)
def test_out_of_memory_is_passed_on(device: str) -> None:
    x = torch.ones(3, device=device)

    def full() -> None:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        GraphedStep(full, [x])


def test_a_graph_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="static must hold at least one tensor"):
        GraphedStep(lambda: None, [])


def test_what_only_the_watch_cannot_run_is_let_pass() -> None:
    """Operators of higher order, and whatever compiles itself, refuse a mode around them"""
    x = torch.ones(3)

    def refuses_a_mode() -> None:
        if _get_current_dispatch_mode() is not None:
            raise NotImplementedError("no rule registered for a mode")
        x.add_(1)

    replay = GraphedStep(refuses_a_mode, [x])
    x.zero_()
    replay()
    assert x.tolist() == [1] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_of_the_step_is_its_own(device: str) -> None:
    x = torch.ones(3, device=device)
    with pytest.raises(ZeroDivisionError):
        GraphedStep(lambda: x.mul_(1 / 0), [x])
    with pytest.raises(RuntimeError, match="must match the size") as e:
        GraphedStep(lambda: x.add_(torch.ones(2, device=x.device)), [x])
    assert not isinstance(e.value, NotCapturable)


@pytest.mark.parametrize("end_fails", [False, True])
@pytest.mark.parametrize(
    "said, kind",
    [("not permitted when a stream is capturing", NotCapturable), ("out of memory", torch.OutOfMemoryError)],
)
def test_the_first_error_of_a_capture_is_told(
    monkeypatch: pytest.MonkeyPatch, end_fails: bool, said: str, kind: type[RuntimeError]
) -> None:
    """torch's capture stands in; the caller is handling an error of its own, which is no part of this one"""
    given_up: list[Pool] = []

    class Capture(contextlib.AbstractContextManager[None]):
        def __init__(self, graph: object, **options: object) -> None: ...

        def __exit__(self, *_: object) -> None:
            if end_fails:
                raise RuntimeError("the capture was invalidated before")

    def step() -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(cuda_graph, "_give_up", given_up.append)
    pool: Any = SimpleNamespace(handle=(0, 1), stream=None)
    try:
        raise MemoryError("of the caller's")
    except MemoryError:
        with pytest.raises(kind, match=said) as e:
            _captured(step, pool)
    assert type(e.value) is kind and given_up == [pool]


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_device_usable() -> None:
    """A tensor of a list is uploaded where no dispatch sees it"""
    x = torch.ones(3, device="cuda")
    before = torch.cuda.current_stream()
    with pytest.raises(NotCapturable):
        GraphedStep(lambda: x.copy_(torch.tensor([1.0, 2.0, 3.0], device=x.device)), [x])
    assert torch.cuda.current_stream() == before
    assert float((x * 0).nan_to_num().sum()) == 0
    step = Accumulator("cuda")
    replay = GraphedStep(step, step.static)
    step.x.fill_(1.0), step.total.zero_(), step.count.zero_()
    replay()
    assert step.total.tolist() == [2.0] * 3


@pytest.mark.gpu
def test_a_capture_that_fails_holds_no_memory() -> None:
    x = torch.ones(1, device="cuda")

    def step() -> None:
        torch.zeros(2**30, dtype=torch.uint8, device="cuda")
        x.copy_(torch.tensor([1.0], device=x.device))

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(2):
        with pytest.raises(NotCapturable):
            GraphedStep(step, [x])
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() < before + 2**29


@pytest.mark.parametrize(
    "error, kind",
    [
        (RuntimeError("Triton Error [CUDA]: out of memory"), torch.OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), torch.OutOfMemoryError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("operation not permitted\nwhen a stream is capturing"), NotCapturable),
        (RuntimeError(), NotCapturable),
    ],
    ids=str,
)
def test_memory_that_runs_out_is_told_from_what_no_graph_can_hold(
    error: RuntimeError, kind: type[RuntimeError]
) -> None:
    assert is_out_of_memory(error) == (kind is torch.OutOfMemoryError)
    assert not is_out_of_memory(ValueError("out of memory"))
    told = _told(error)
    assert type(told) is kind and told.__context__ is None
    assert str(told) == (str(error) or "RuntimeError").splitlines()[0]


def test_memory_that_runs_out_behind_a_refused_mode_has_no_other_cause() -> None:
    """A network with an operator that takes no mode around it"""
    calls: list[int] = []

    def step() -> None:
        calls.append(1)
        raise RuntimeError("refuses modes") if len(calls) == 1 else torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as e:
        GraphedStep(step, [torch.zeros(1)])
    assert e.value.__context__ is None


@pytest.mark.gpu
def test_a_replay_runs_no_code_of_the_host() -> None:
    step, calls = Accumulator("cuda"), []

    def counted() -> None:
        calls.append(1)
        step()

    replay = GraphedStep(counted, step.static, warmups=3)
    assert len(calls) == 4
    replay()
    assert len(calls) == 4
