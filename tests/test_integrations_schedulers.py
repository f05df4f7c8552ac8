"""FusedDDPMScheduler and FusedDDIMScheduler against the schedulers that they stand in for"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import diffusers.schedulers.scheduling_ddpm
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from scheduler_cases import FUSED, PREDICTION, STOCK, a_pair, fused_everywhere, stepped, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.integrations.diffusers import schedulers

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
CLIP = pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
SHAPE = (3, 2, 4, 4)


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> list[torch.Tensor]:
    return fused_everywhere(monkeypatch)


def in_float64(scheduler: Any) -> Any:
    """The same chain, with which their arithmetic is float64 throughout"""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    for name in ("one", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def output_shape(config: Any) -> tuple[int, ...]:
    return (3, 4, 4, 4) if config.get("variance_type") == "learned_range" else SHAPE


def the_rule(theirs: Any, t: int) -> float:
    """What float32 may differ by from float64: 1e-5, or 8 * 2^-24 times the gain from x to x0 to the next x"""
    stride = 1000 // (theirs.num_inference_steps or 1000)
    abar, before = theirs.alphas_cumprod[t].item(), theirs.alphas_cumprod[max(t - stride, 0)].item()
    gain = (before / abar) ** 0.5 if theirs.config.prediction_type == "epsilon" else 1.0
    return max(1e-5, 8 * 2**-24 * gain)


def assert_steps(ours: Any, theirs: Any, out: torch.Tensor, t: Any, x: torch.Tensor, atol: float, **options) -> None:
    for got, expected in zip(stepped(ours, out, t, x, **options), stepped(theirs, out, t, x, **options), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@CLIP
@PREDICTION
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_ddpm_steps_are_theirs_to_the_last_digits_of_float64(schedule, variance, prediction, clip, launches) -> None:
    config = {"beta_schedule": schedule, "variance_type": variance, "prediction_type": prediction, "clip_sample": clip}
    for steps in (None, 7, 1000):
        theirs, ours = map(in_float64, a_pair(DDPMScheduler, steps, **config))
        x, out = tensors(SHAPE, output_shape(config), dtype=torch.float64)
        times = theirs.timesteps.tolist()
        for t in [*times[:2], times[len(times) // 2], *times[-2:]]:
            assert_steps(ours, theirs, out, t, x, 1e-9)
    assert len(launches) == 15


@CLIP
@PREDICTION
@pytest.mark.parametrize("to_one", [True, False], ids=["to one", "to first"])
@pytest.mark.parametrize("eta", [0, 0.5, 1.0])
@pytest.mark.parametrize("clipped", [False, True], ids=["network eps", "clipped eps"])
def test_ddim_steps_are_theirs_to_the_last_digits_of_float64(clipped, eta, to_one, prediction, clip, launches) -> None:
    config = {"prediction_type": prediction, "clip_sample": clip, "set_alpha_to_one": to_one}
    for steps in (7, 1000):
        theirs, ours = map(in_float64, a_pair(DDIMScheduler, steps, **config))
        x, out = tensors(SHAPE, SHAPE, dtype=torch.float64)
        # any time will do, of the list or not
        for t in (999, 571, 142, 3, 0):
            assert_steps(ours, theirs, out, t, x, 1e-9, eta=eta, use_clipped_model_output=clipped)
    assert len(launches) == 10


@STOCK
@PREDICTION
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_float32_steps_keep_the_rule(stock: type, prediction: str, schedule: str, monkeypatch) -> None:
    def noise_in_float32(shape, generator=None, device=None, dtype=None):
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    config = {"prediction_type": prediction, "beta_schedule": schedule}
    exact, ours = a_pair(stock, 10, **config)
    in_float64(exact)
    for module in (diffusers.schedulers.scheduling_ddpm, diffusers.schedulers.scheduling_ddim):
        monkeypatch.setattr(module, "randn_tensor", noise_in_float32)
    options = {"eta": 0.5} if stock is DDIMScheduler else {}
    for t in exact.timesteps.tolist():
        # as large as a sample and its noise are at this time
        x, out = tensors(SHAPE, SHAPE, seed=t)
        for got, expected in zip(
            stepped(ours, out, t, x, **options), stepped(exact, out.double(), t, x.double(), **options), strict=True
        ):
            assert got.dtype == torch.float32
            assert (got - expected).abs().max() <= the_rule(exact, t)


@STOCK
@pytest.mark.parametrize(
    "dtypes",
    [
        "float16 float16",
        "bfloat16 bfloat16",
        "float32 bfloat16",
        "float16 float32",
        "float64 float32",
        "float32 float64",
    ],
)
@PREDICTION
def test_dtypes_are_theirs_and_no_less_accurate(stock: type, dtypes: str, prediction: str) -> None:
    theirs, ours = a_pair(stock, 10, prediction_type=prediction)
    exact = in_float64(a_pair(stock, 10, prediction_type=prediction)[0])
    x, out = tensors(SHAPE, SHAPE)
    x, out = (values.to(getattr(torch, name)) for values, name in zip((x, out), dtypes.split(), strict=True))
    # at t = 0 there is no noise, whose bits depend on the dtype
    for t, options in (
        (0, {}),
        *([(500, {"eta": 0.5, "variance_noise": tensors(SHAPE, seed=3)[0].to(out.dtype)})] * (stock is DDIMScheduler)),
    ):
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        reference = stepped(exact, out.double(), t, x.double(), **wide)
        for got, expected, true in zip(
            stepped(ours, out, t, x, **options), stepped(theirs, out, t, x, **options), reference, strict=True
        ):
            assert got.dtype == expected.dtype
            assert (got - true).abs().max() <= (expected - true).abs().max() + 1e-6


def layouts() -> list[Any]:
    flipped = torch.randn(3, 4, 8, 4).transpose(2, 3)[:, ::2, :, ::2]
    return [
        pytest.param(lambda x: x.contiguous(memory_format=torch.channels_last), id="channels-last"),
        pytest.param(lambda x: torch.empty_like(flipped).copy_(x) if x.shape == SHAPE else x, id="permuted"),
        pytest.param(lambda x: torch.stack((x, x), -1)[..., 0], id="with-gaps"),
        pytest.param(lambda x: x[:1].expand(x.shape), id="expanded"),
    ]


@STOCK
@pytest.mark.parametrize("of_x", layouts())
@pytest.mark.parametrize("of_out", layouts())
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_layouts_are_theirs_and_inputs_are_left_alone(stock: type, of_x, of_out, prediction: str) -> None:
    theirs, ours = a_pair(stock, 10, prediction_type=prediction)
    x, out = tensors(SHAPE, SHAPE)
    x, out = of_x(x), of_out(out)
    kept = x.clone(), out.clone()
    got, expected = stepped(ours, out, 500, x), stepped(theirs, out, 500, x)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=2e-5)
    if not {0} & {*x.stride(), *out.stride()}:
        assert got[0].stride() == expected[0].stride()
    assert torch.equal(x, kept[0]) and torch.equal(out, kept[1])
    assert got[0].data_ptr() not in (x.data_ptr(), out.data_ptr())


@STOCK
def test_any_time_in_any_order_and_twice(stock: type, launches) -> None:
    theirs, ours = a_pair(stock, 10)
    x, out = tensors(SHAPE, SHAPE)
    elements = list(ours.timesteps)
    for i in (4, 9, 0, 4, 4, 1, 8):
        t = int(elements[i])
        expected = stepped(theirs, out, t, x)
        for spelled in (
            t,
            np.int64(t),
            torch.tensor(t),
            torch.tensor(t, dtype=torch.int32),
            elements[i],
            ours.timesteps[i],
        ):
            got = stepped(ours, out, spelled, x)
            torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-5)
    assert len(launches) == 42


@STOCK
@pytest.mark.parametrize("start", [0, 6], ids=["whole", "from the middle"])
def test_an_element_of_the_timesteps_is_not_read(stock: type, start: int, launches) -> None:
    """The host never waits for the device: neither for the time nor for the coefficients"""

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket is not torch.ops.aten._local_scalar_dense
            return func(*args, **(kwargs or {}))

    _, ours = a_pair(stock, 10)
    x, out = tensors(SHAPE, SHAPE)
    stepped(ours, out, ours.timesteps[0], x)
    with NoReads():
        for t in ours.timesteps[start:]:
            ours.step(out, t, x)
    assert len(launches) == 11 - start
    with NoReads(), pytest.raises(AssertionError):
        ours.step(out, ours.timesteps[3].clone(), x)


CHANGES = [
    pytest.param(lambda s: s.set_timesteps(4), id="set_timesteps"),
    pytest.param(lambda s: s.register_to_config(clip_sample_range=0.5), id="clip"),
    pytest.param(lambda s: s.register_to_config(prediction_type="v_prediction"), id="prediction"),
    pytest.param(lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**2), id="chain"),
    pytest.param(lambda s: s.alphas_cumprod.mul_(0.9), id="chain-in-place"),
]
OF_DDIM = [
    pytest.param(lambda s: setattr(s, "num_inference_steps", 4), id="num_inference_steps"),
    pytest.param(lambda s: setattr(s, "timesteps", s.timesteps.double()), id="timesteps-of-floats"),
]
OF_DDPM = [
    pytest.param(lambda s: setattr(s, "timesteps", torch.tensor([900, 500, 350, 500, 9])), id="repeated-timesteps"),
    pytest.param(lambda s: setattr(s, "timesteps", torch.tensor([900, 500, 250, 1])), id="timesteps"),
    pytest.param(lambda s: s.timesteps[5:].sub_(50), id="timesteps-in-place"),
    pytest.param(lambda s: s.set_timesteps(timesteps=[500, 100]), id="timesteps-of-ones-own"),
    pytest.param(lambda s: s.register_to_config(variance_type="fixed_large"), id="variance-in-config"),
    pytest.param(lambda s: setattr(s, "variance_type", "fixed_large"), id="variance"),
]


@pytest.mark.parametrize(
    ("stock", "change"),
    [pytest.param(stock, *case.values, id=f"{stock.__name__}-{case.id}")
     for stock, cases in ((DDPMScheduler, CHANGES + OF_DDPM), (DDIMScheduler, CHANGES + OF_DDIM)) for case in cases],
)  # fmt: skip
def test_a_changed_scheduler_has_new_rows(stock: type, change, launches) -> None:
    theirs, ours = a_pair(stock, 10, variance_type="fixed_small") if stock is DDPMScheduler else a_pair(stock)
    x, out = tensors(SHAPE, SHAPE)
    before = stepped(ours, out, 500, x)
    change(theirs)
    change(ours)
    got, expected = stepped(ours, out, 500, x), stepped(theirs, out, 500, x)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-5)
    mixed = stock is DDPMScheduler and theirs.variance_type != theirs.config.variance_type
    if mixed or theirs.timesteps.is_floating_point():
        assert len(launches) == 1 and torch.equal(got[0], expected[0])
    else:
        assert len(launches) == 2 and not torch.equal(got[0], before[0])


def test_ddim_may_end_elsewhere() -> None:
    """final_alpha_cumprod is an attribute, which may be set"""
    theirs, ours = a_pair(DDIMScheduler)
    x, out = tensors(SHAPE, SHAPE)
    for end in (1.0, 0.99):
        theirs.final_alpha_cumprod = ours.final_alpha_cumprod = torch.tensor(end)
        assert_steps(ours, theirs, out, 50, x, 1e-5)


def test_noise_that_is_not_asked_for_is_not_looked_at(launches) -> None:
    theirs, ours = a_pair(DDIMScheduler)
    x, out = tensors(SHAPE, SHAPE)
    assert_steps(ours, theirs, out, 500, x, 1e-5, variance_noise=torch.zeros(7))
    assert len(launches) == 1


@STOCK
def test_inference_mode(stock: type, launches) -> None:
    """Its tensors count no versions"""
    with torch.inference_mode():
        theirs, ours = a_pair(stock)
        x, out = tensors(SHAPE, SHAPE)
        for t in ours.timesteps:
            assert_steps(ours, theirs, out, t, x, 1e-5)
    assert len(launches) == 10


def test_ddpm_with_timesteps_of_ones_own(launches) -> None:
    theirs, ours = a_pair(DDPMScheduler, None)
    theirs.set_timesteps(timesteps=[900, 333, 20, 5])
    ours.set_timesteps(timesteps=[900, 333, 20, 5])
    x, out = tensors(SHAPE, SHAPE)
    for t in ours.timesteps:
        torch.testing.assert_close(stepped(ours, out, t, x)[0], stepped(theirs, out, t, x)[0], rtol=0, atol=1e-5)
    assert len(launches) == 4


def test_rows_of_many_etas_are_forgotten() -> None:
    theirs, ours = a_pair(DDIMScheduler)
    x, out = tensors(SHAPE, SHAPE)
    for eta in np.linspace(0, 1, 40).tolist():
        expected = stepped(theirs, out, 500, x, eta=eta)[0]
        torch.testing.assert_close(stepped(ours, out, 500, x, eta=eta)[0], expected, rtol=0, atol=1e-5)
        assert len(ours._chain.rows) <= schedulers.MOST_OPTIONS


def test_rows_of_a_table_are_aligned_alike(launches) -> None:
    """Triton compiles a kernel for every alignment of its pointers"""
    _, ours = a_pair(DDIMScheduler)
    x, out = tensors(SHAPE, SHAPE)
    for t in ours.timesteps:
        ours.step(out, t, x)
    first = launches[0].data_ptr()
    assert {(row.data_ptr() - first) % 64 for row in launches} == {0} and len({r.data_ptr() for r in launches}) == 10


EPSILON_AT_ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
THEIRS = [
    pytest.param(DDPMScheduler, {"thresholding": True}, {}, SHAPE, 500, id="thresholding"),
    pytest.param(DDIMScheduler, {"thresholding": True}, {}, SHAPE, 500, id="ddim-thresholding"),
    pytest.param(DDPMScheduler, {"variance_type": "fixed_large_log"}, {}, SHAPE, 500, id="fixed_large_log"),
    pytest.param(DDPMScheduler, {"variance_type": "learned"}, {}, (3, 4, 4, 4), 500, id="learned"),
    pytest.param(DDPMScheduler, {"variance_type": "learned_range"}, {}, SHAPE, 0, id="no-learned-channels-at-0"),
    pytest.param(DDIMScheduler, {}, {"eta": 1.5}, SHAPE, 500, id="large-eta"),
    pytest.param(DDIMScheduler, {}, {"eta": -0.5}, SHAPE, 500, id="negative-eta"),
    pytest.param(DDIMScheduler, {}, {}, SHAPE, -1, id="negative-time"),
    pytest.param(DDIMScheduler, {}, {}, SHAPE, torch.tensor([500]), id="time-in-a-vector"),
    pytest.param(DDIMScheduler, {"clip_sample_range": -1.0}, {}, SHAPE, 500, id="negative-range"),
    pytest.param(DDIMScheduler, EPSILON_AT_ZERO_SNR, {}, SHAPE, 999, id="epsilon-without-signal"),
    pytest.param(DDPMScheduler, EPSILON_AT_ZERO_SNR, {}, SHAPE, 999, id="ddpm-epsilon-without-signal"),
]  # fmt: skip


@pytest.mark.parametrize(("stock", "config", "options", "shape", "t"), THEIRS)
def test_what_one_row_cannot_say_is_their_own_step(stock, config, options, shape, t, launches) -> None:
    theirs, ours = a_pair(stock, 10, **config)
    x, out = tensors(SHAPE, shape)
    for got, expected in zip(stepped(ours, out, t, x, **options), stepped(theirs, out, t, x, **options), strict=True):
        assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
    assert not launches


@STOCK
def test_three_dimensions_are_their_own_step(stock: type, launches) -> None:
    theirs, ours = a_pair(stock)
    x, out = tensors((3, 5, 7), (3, 5, 7))
    assert torch.equal(stepped(ours, out, 500, x)[0], stepped(theirs, out, 500, x)[0]) and not launches


def test_on_a_cpu_all_steps_are_theirs(launches, monkeypatch) -> None:
    monkeypatch.undo()
    theirs, ours = a_pair(DDIMScheduler)
    x, out = tensors(SHAPE, SHAPE)
    assert torch.equal(stepped(ours, out, 500, x)[0], stepped(theirs, out, 500, x)[0]) and ours._chain is None


@pytest.mark.parametrize(
    ("stock", "steps", "t", "options", "error"),
    [
        pytest.param(DDIMScheduler, None, 500, {}, ValueError, id="no-timesteps"),
        pytest.param(DDIMScheduler, 10, 1000, {}, IndexError, id="beyond-the-chain"),
        pytest.param(DDIMScheduler, 10, 500.5, {}, (IndexError, TypeError), id="fraction"),
        pytest.param(DDPMScheduler, 10, 501, {}, IndexError, id="not-in-the-list"),
        pytest.param(
            DDIMScheduler, 10, 500, {"eta": 0.5, "variance_noise": torch.zeros(SHAPE), "generator": torch.Generator()},
            ValueError, id="two-noises",
        ),
    ],
)  # fmt: skip
def test_errors_are_theirs(stock: type, steps: int | None, t: Any, options: dict[str, Any], error: Any) -> None:
    theirs, ours = a_pair(stock, steps)
    x, out = tensors(SHAPE, SHAPE)
    with pytest.raises(error) as expected:
        theirs.step(out, t, x, **options)
    with pytest.raises(error) as got:
        ours.step(out, t, x, **options)
    assert str(got.value) == str(expected.value) and type(got.value) is type(expected.value)


@STOCK
def test_the_surface_is_theirs(stock: type) -> None:
    ours, theirs = inspect.signature(FUSED[stock].step), inspect.signature(stock.step)
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in theirs.parameters.values()
    ]
    assert FUSED[stock].order == 1 and issubclass(FUSED[stock], stock)
    a, b = a_pair(stock)
    x, out = tensors(SHAPE, SHAPE)
    assert type(b.step(out, 500, x)) is type(a.step(out, 500, x))
    assert type(b.step(out, 500, x, return_dict=False)) is tuple


@STOCK
def test_configs_there_and_back(stock: type, tmp_path: Path) -> None:
    config = {
        "beta_schedule": "squaredcos_cap_v2",
        "steps_offset": 1,
        "clip_sample_range": 2.0,
        "num_train_timesteps": 99,
    }
    theirs = stock(**config)
    ours = FUSED[stock].from_config(theirs.config)
    back = stock.from_config(ours.config)
    ours.save_pretrained(tmp_path)
    saved = FUSED[stock].from_pretrained(tmp_path)
    as_theirs = stock.from_pretrained(tmp_path)

    def known(scheduler: Any) -> dict[str, Any]:
        return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}

    assert known(theirs) == known(ours) == known(back) == known(saved) == known(as_theirs)
    assert [type(s) for s in (ours, back, saved, as_theirs)] == [FUSED[stock], stock, FUSED[stock], stock]


def test_a_copy_steps_alike() -> None:
    _, ours = a_pair(DDIMScheduler)
    x, out = tensors(SHAPE, SHAPE)
    first = stepped(ours, out, 500, x)[0]
    assert torch.equal(stepped(copy.deepcopy(ours), out, 500, x)[0], first)


@pytest.mark.gpu
@STOCK
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(stock: type, dtype: torch.dtype, launches) -> None:
    """Times on the device, from the middle on, and no wait for it"""
    theirs, ours = a_pair(stock, None)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10, device="cuda")
    x, out = (tensor.cuda().to(dtype) for tensor in tensors(SHAPE, SHAPE))
    ours.step(out, ours.timesteps[0], x)
    results = []
    for scheduler in (theirs, ours):
        generator, sample = torch.Generator("cuda").manual_seed(0), x
        if scheduler is ours:
            torch.cuda.set_sync_debug_mode("error")
        try:
            for t in scheduler.timesteps[4:]:
                sample = scheduler.step(out, t, sample, generator=generator).prev_sample
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append(sample)
    assert results[1].dtype == dtype and len(launches) == 7
    tolerance = 1000 * 2**-24 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(*results, rtol=0, atol=tolerance * max(1.0, results[0].abs().max().item()))
