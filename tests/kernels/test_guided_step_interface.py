"""guided_step as an op of torch.library, and its errors"""

import io

import pytest
import torch
from guided_step_cases import C, H, N, Step, W
from places import INTERPRETER
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff_kernels import NUM_COEFS, _impl, guided_step


def test_nothing_is_read_on_the_host(step):
    class NoHostRead(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a device value was read on the host"
            return func(*args, **(kwargs or {}))

    inputs = step.draw(variance=True)
    del inputs["noise"]
    coefs, w, x_net = step.row(), step.weights(1.0), torch.empty(2 * N, C, H, W, device=step.device)
    with pytest.raises(AssertionError, match="read on the host"), NoHostRead():
        coefs[0].item()
    seeds = step.seeds()
    with NoHostRead():
        guided_step(**inputs, coefs=coefs, w=w, x_net=x_net, **seeds, learned=True, impl=step.impl)


def test_gradients_are_neither_tracked_nor_silently_wrong(step):
    inputs, a = step.draw(0), torch.ones((), dtype=step.dtype, device=step.device, requires_grad=True)
    inputs["out"].requires_grad_()
    loss = (inputs["x"] * a).sum()
    guided_step(**inputs, coefs=step.row(), impl=step.impl)
    assert not inputs["x"].requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def operands(**tensors: Tensor | None) -> list[Tensor | None]:
    """Arguments of the library op before learned and impl"""
    names = ("x", "out", "coefs", "w", "x_net", "x0", "hist", "grad", "noise", "seeds", "draw")
    return [tensors.get(name) for name in names]


@pytest.mark.parametrize("given", ["everything", "nothing", "seeds"])
def test_opcheck(step, given):
    inputs = step.draw(1, dtype=torch.float32, variance=given == "everything") | {"coefs": step.row(torch.float32)}
    inputs["w"] = step.weights(1.5, dtype=torch.float32)
    if given == "everything":
        inputs |= {"x0": inputs["x"].clone(), "x_net": inputs["x"].half().contiguous(memory_format=torch.channels_last)}
    else:
        inputs = {name: inputs[name] for name in ("x", "out", "coefs", "w")}
    if given == "seeds":
        inputs |= step.seeds()
    op = torch.ops.fastdiff_kernels.guided_step.default
    torch.library.opcheck(op, (*operands(**inputs), given == "everything", step.impl))


@pytest.mark.parametrize("tracked", [(), ("out",), ("x", "out", "hist")], ids=["plain", "out_tracked", "all_tracked"])
@pytest.mark.parametrize("noise", ["given", "seeds"])
def test_torch_compile_traces_it_whole_and_writes_the_same(step, noise, tracked):
    inputs = step.draw(variance=True, dtype=torch.float32)
    inputs |= {"x0": torch.zeros_like(inputs["x"]), "x_net": torch.zeros_like(inputs["x"]).half()}
    inputs |= {"coefs": step.row(torch.float32), "w": step.weights(1.5, dtype=torch.float32)}
    if noise == "seeds":
        del inputs["noise"]
        inputs |= step.seeds()
    names = tuple(inputs)
    torch.compiler.reset()  # or the cases add up to dynamo's limit of recompilations

    def function(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        scaled = given["out"] * 0.5
        guided_step(**given | {"out": scaled}, learned=True, impl=step.impl)
        return given["x"] + given["x0"]

    results = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        copies = [tensor.clone().requires_grad_(name in tracked) for name, tensor in inputs.items()]
        results.append([tensor.detach() for tensor in (call(*copies), *copies)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    assert not torch.equal(results[0][1], inputs["x"])


class Guided(torch.nn.Module):
    def __init__(self, impl: str) -> None:
        super().__init__()
        self.impl = impl

    def forward(self, x: Tensor, out: Tensor, coefs: Tensor, x_net: Tensor) -> Tensor:
        guided_step(x, out * 2, coefs, x_net=x_net, impl=self.impl)
        return x_net * 2


def test_torch_export_round_trip(step):
    inputs = step.draw(0, dtype=torch.float32)
    arguments = (inputs["x"], inputs["out"], step.row(torch.float32), torch.zeros_like(inputs["x"]).half())
    file, module = io.BytesIO(), Guided(step.impl)
    torch.export.save(torch.export.export(module, tuple(a.clone() for a in arguments)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    results = []
    for call in (module, loaded):
        copies = [a.clone() for a in arguments]
        results.append([call(*copies), *copies])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][1], arguments[0])


@pytest.mark.parametrize("place", [INTERPRETER])
def test_what_triton_does_not_do_is_an_error_when_asked_for(place, monkeypatch):
    double = {name: tensor.double() for name, tensor in valid().items()}
    with pytest.raises(ValueError, match=r"impl='triton' needs x to be torch.float32, got torch.float64"):
        guided_step(**double, impl="triton")
    monkeypatch.setattr(_impl, "INTERPRETED", False)
    arguments = valid()
    before = arguments["x"].clone()
    with pytest.raises(ValueError, match="impl='triton' needs x on a CUDA device, got cpu"):
        guided_step(**arguments, impl="triton")
    assert torch.equal(arguments["x"], before)


@pytest.mark.parametrize(("first", "second"), [("x", "x0"), ("x", "hist"), ("x", "x_net"), ("x0", "hist")])
def test_buffers_that_are_one_are_refused(first, second):
    arguments = valid()
    x = arguments["x"].clone()
    buffer = arguments["x"] if first == "x" else torch.zeros_like(x)
    with pytest.raises(ValueError, match=f"{second} must not overlap {first}: both are written"):
        guided_step(**arguments | {first: buffer, second: buffer})
    assert torch.equal(arguments["x"], x)


def test_an_inference_tensor_is_refused_outside_of_its_mode():
    arguments = valid()
    with torch.inference_mode():
        x = arguments["x"].clone()
    before = x.clone()
    with pytest.raises(ValueError, match="x is written in place, and an inference tensor"):
        guided_step(**arguments | {"x": x})
    assert torch.equal(x, before)
    with torch.inference_mode():
        guided_step(**arguments | {"x": x})
    assert not torch.equal(x, before)


def test_a_negated_view_is_refused():
    arguments = valid()
    x = torch.complex(arguments["x"], arguments["x"]).conj().imag
    with pytest.raises(ValueError, match="x is written in place and must not be negated by a flag"):
        guided_step(**arguments | {"x": x})


def valid() -> dict:
    step = Step("cpu", "reference")
    return {**step.draw(1, dtype=torch.float32), "coefs": step.row(torch.float32), "w": torch.ones(N)}


def seeded(**change) -> dict:
    return {"noise": None, "seeds": torch.zeros(N).long(), "draw": torch.tensor([0])} | change


ERRORS = {
    "learned": ({"learned": "no"}, TypeError, "learned must be a bool, got str"),
    "x_3d": ({"x": torch.zeros(4, 2, 3)}, ValueError, r"x must have shape \(N, C, H, W\), got \(4, 2, 3\)"),
    "x_half": ({"x": torch.zeros(N, C, H, W).half()}, TypeError, "x must be torch.float32 or torch.float64, got"),
    "x_expanded": (
        {"x": torch.zeros(1, C, H, W).expand(N, C, H, W)},
        ValueError,
        "x is written in place and must not be expanded",
    ),
    "out_size": ({"out": torch.zeros(5, C, H, 4)}, ValueError, r"out must have shape \(N \+ M, C or 2C, 3, 5\), got"),
    "out_rows_few": ({"out": torch.zeros(3, C, H, W)}, ValueError, "0 <= M <= N = 4, got 3"),
    "out_rows_many": ({"out": torch.zeros(9, C, H, W)}, ValueError, "0 <= M <= N = 4, got 9"),
    "out_channels": ({"out": torch.zeros(5, 3, H, W)}, ValueError, "out must have 2 or 4 channels for x of 2, got 3"),
    "out_not_learned": ({"learned": True}, ValueError, r"out must have 4 channels \(learned=True\) .* got 2"),
    "out_wider_dtype": ({"out": torch.zeros(5, C, H, W).double()}, TypeError, "out must be .* got torch.float64"),
    "out_int": ({"out": torch.zeros(5, C, H, W).int()}, TypeError, "out must be .* got torch.int32"),
    "coefs_shape": ({"coefs": torch.zeros(3)}, ValueError, r"coefs must have shape \(14,\), got \(3,\)"),
    "coefs_dtype": (
        {"coefs": torch.zeros(NUM_COEFS).double()},
        TypeError,
        "coefs must be torch.float32, got torch.float64",
    ),
    "w_missing": ({"w": None}, ValueError, "w must be given: out has 1 null rows"),
    "w_float": ({"w": 1.5}, TypeError, "w must be a torch.Tensor, got float"),
    "w_shape": ({"w": torch.ones(1)}, ValueError, r"w must have shape \(4,\), got \(1,\)"),
    "w_dtype": ({"w": torch.ones(N).double()}, TypeError, "w must be torch.float32, got torch.float64"),
    "hist_shape": ({"hist": torch.zeros(1, C, H, W)}, ValueError, "hist must have shape"),
    "hist_expanded": (
        {"hist": torch.zeros(1, C, H, W).expand(N, C, H, W)},
        ValueError,
        "hist is written in place and must not be expanded",
    ),
    "grad_dtype": ({"grad": torch.zeros(N, C, H, W).half()}, TypeError, "grad must be torch.float32, got"),
    "noise_shape": ({"noise": torch.zeros(N, C, H, 1)}, ValueError, "noise must have shape"),
    "x0_dtype": ({"x0": torch.zeros(N, C, H, W).double()}, TypeError, "x0 must be torch.float32, got torch.float64"),
    "x_net_size": ({"x_net": torch.zeros(5, C, H, 4)}, ValueError, r"x_net must have shape \(N \+ M', 2, 3, 5\), got"),
    "x_net_rows_few": ({"x_net": torch.zeros(3, C, H, W)}, ValueError, "x_net must have N to 2N rows, N = 4, got 3"),
    "x_net_rows_many": ({"x_net": torch.zeros(9, C, H, W)}, ValueError, "x_net must have N to 2N rows, N = 4, got 9"),
    "x_net_expanded": (
        {"x_net": torch.zeros(1, C, H, W).expand(5, C, H, W)},
        ValueError,
        "x_net is written in place and must not be expanded",
    ),
    "x_net_int": ({"x_net": torch.zeros(5, C, H, W).int()}, TypeError, "x_net must be .* got torch.int32"),
    "both_noises": (
        {"seeds": torch.zeros(N).long(), "draw": torch.tensor([0])},
        ValueError,
        "noise and seeds must not both be given",
    ),
    "seeds_alone": (seeded(draw=None), ValueError, "seeds and draw must be given together"),
    "draw_alone": (seeded(seeds=None), ValueError, "seeds and draw must be given together"),
    "seeds_shape": (seeded(seeds=torch.zeros(3).long()), ValueError, r"seeds must have shape \(4,\), got \(3,\)"),
    "seeds_dtype": (seeded(seeds=torch.zeros(N)), TypeError, "seeds must be torch.int64, got torch.float32"),
    "draw_int": (seeded(draw=3), TypeError, "draw must be a torch.Tensor, got int"),
    "draw_shape": (seeded(draw=torch.zeros(2).long()), ValueError, r"draw must have shape \(1,\), got \(2,\)"),
    "draw_device": (
        seeded(draw=torch.zeros(1, device="meta").long()),
        ValueError,
        "draw must be on the device of x, cpu, got meta",
    ),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'triton', 'reference', got 'cuda'"),
    "w_device": ({"w": torch.ones(N, device="meta")}, ValueError, "w must be on the device of x, cpu, got meta"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument_and_write_nothing(case):
    change, kind, message = ERRORS[case]
    arguments = valid() | change
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises(kind, match=message):
        guided_step(**arguments)
    for name, value in before.items():
        assert value.device.type == "meta" or torch.equal(arguments[name], value)
    guided_step(**valid())
