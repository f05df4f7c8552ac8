"""Configs of diffusers' schedulers: their whole trajectories by fastdiff.sample, there and back, and what is refused"""

from __future__ import annotations

import functools
import inspect
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers")

import diffusers.schedulers.scheduling_ddpm
from diffusers import DDIMScheduler, DDPMScheduler
from reference.networks import NULL, mixing, mixing_learned, randomness

import fastdiff
from fastdiff import DiffusionModel, Schedule
from fastdiff.convert import scheduler_from_diffusers, scheduler_to_diffusers
from fastdiff.convert.schedulers import _DEFAULTS
from fastdiff.request import build_table
from fastdiff.schedule import timesteps
from fastdiff.solvers import ddim

KINDS = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}
DDIM, DDPM = "DDIMScheduler", "DDPMScheduler"
SHAPE, LABELS = (2, 4, 4), torch.tensor([3, 0, 7])


def a_model(config: dict[str, Any], network: Any = None) -> DiffusionModel:
    """What a config says, around a network of its variance"""
    facts = scheduler_from_diffusers(config)
    network = network or (mixing_learned if facts.variance == "learned_range" else mixing)
    return DiffusionModel(
        network,
        facts.schedule,
        facts.prediction,
        facts.variance,
        10,
        NULL,
        SHAPE,
        clip_x0=facts.clip_x0,
        solver=facts.solver,
    )


def their_scheduler(config: dict[str, Any], schedule: Schedule | None = None) -> Any:
    """Theirs; on a float64 chain where a schedule is given"""
    scheduler = KINDS[config["_class_name"]].from_config(config)
    if schedule is not None:
        scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod.copy())
        if isinstance(scheduler, DDPMScheduler):
            scheduler.one = scheduler.one.double()
        elif scheduler.config.set_alpha_to_one:
            scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
        else:
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def their_images(config: dict[str, Any], steps: int, monkeypatch, *, exact: bool = True, eta: float = 0.0):
    """From the x_T and the noise of randomness(steps, 3), in float64; exact: on a float64 chain"""
    model = a_model(config)
    scheduler = their_scheduler(config, model.schedule if exact else None)
    scheduler.set_timesteps(steps)
    x, noise = randomness(steps, len(LABELS))
    rest = iter(noise)
    monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda *_, **__: z)
    for t in scheduler.timesteps:
        z = next(rest)
        out = model.network(x, t.double().expand(len(x)), LABELS)
        if isinstance(scheduler, DDIMScheduler):
            x = scheduler.step(out[:, :2], t, x, eta=eta, variance_noise=z if eta else None).prev_sample
        else:
            x = scheduler.step(out, t, x).prev_sample
    return x


def our_images(config: dict[str, Any], steps: int, dtype: str = "float64", **options: Any) -> torch.Tensor:
    """fastdiff's, without a word about the solver"""
    x_T, noise = (values.to(getattr(torch, dtype)) for values in randomness(steps, len(LABELS)))
    return fastdiff.sample(a_model(config), LABELS, steps=steps, x_T=x_T, noise=noise, dtype=dtype, **options)


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """The tolerance is in units of the image: unclipped, this network drives images to hundreds"""
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
BETAS = (0.5 * np.linspace(1e-2, 0.3, 100) ** 1.5).tolist()
OF_BOTH = [
    {},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    {"steps_offset": 1},
    {"steps_offset": 1, "timestep_spacing": "trailing"},
    {"clip_sample": False},
    {"clip_sample_range": 2.0},
    {"prediction_type": "sample", "clip_sample_range": 0.5},
    {"prediction_type": "v_prediction"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 4000},
    {"trained_betas": BETAS, "num_train_timesteps": 100},
    {**ZERO_SNR, "timestep_spacing": "trailing"},
    {**ZERO_SNR, "timestep_spacing": "linspace", "beta_schedule": "scaled_linear"},
]
CONFIGS = [
    *({"_class_name": kind, **config} for kind in KINDS for config in OF_BOTH),
    {"_class_name": DDIM, "set_alpha_to_one": False},
    {"_class_name": DDIM, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False},
    {"_class_name": DDIM, "set_alpha_to_one": False, "timestep_spacing": "trailing"},
    {"_class_name": DDPM, "beta_schedule": "sigmoid"},
    {"_class_name": DDPM, "variance_type": "fixed_small_log"},
    {"_class_name": DDPM, "variance_type": "fixed_large"},
    {"_class_name": DDPM, "variance_type": "fixed_large", "timestep_spacing": "linspace"},
    {"_class_name": DDPM, "variance_type": "learned_range"},
]


def short(config: dict[str, Any]) -> str:
    return " ".join(str(value)[:20] for key, value in config.items())


@pytest.mark.parametrize("config", CONFIGS, ids=short)
def test_a_loaded_scheduler_samples_what_theirs_samples(config: dict[str, Any], monkeypatch) -> None:
    """With N that divides T and N that does not; in float32 by the rule"""
    for steps in (7, 20):
        scheduler = their_scheduler(config)
        scheduler.set_timesteps(steps)
        sampler = fastdiff.Sampler(a_model(config), steps=steps, dtype="float64")
        assert sampler.timesteps == scheduler.timesteps.tolist()
        theirs = their_images(config, steps, monkeypatch)
        # DDPM's last variance is 1e-20 there, and none here
        assert_close(our_images(config, steps), theirs, 1e-9)
        table = build_table(a_model(config), None, steps, None, None)
        gain = np.abs(table.c_x0 * table.k_x).max()
        assert_close(our_images(config, steps, "float32"), theirs, max(1e-5, 8 * 2**-24 * gain))


@pytest.mark.parametrize("config", CONFIGS, ids=short)
def test_the_chain_that_theirs_computes_in_float32(config: dict[str, Any], monkeypatch) -> None:
    """1000 rounded factors, each off by 2^-24 at most; a chain that ends at 0 subtracts nearly equal ones besides"""
    theirs = their_images(config, 10, monkeypatch, exact=False)
    tolerance = 1e-2 if config.get("rescale_betas_zero_snr") else 1000 * 2**-24
    assert_close(our_images(config, 10), theirs, tolerance)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_eta_is_theirs(spacing: str, monkeypatch) -> None:
    """The last step's noise too, of which a chain that does not end clean has some"""
    config = {"_class_name": DDIM, "timestep_spacing": spacing, "set_alpha_to_one": False}
    for eta in (0.5, 1.0):
        theirs = their_images(config, 7, monkeypatch, eta=eta)
        assert_close(our_images(config, 7, eta=eta), theirs, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_an_offset_beyond_the_stride(kind: str, monkeypatch) -> None:
    """DDIM's last step goes from t = 5 to t = 4 then, and DDPM's to the clean image"""
    config = {"_class_name": kind, "num_train_timesteps": 60, "steps_offset": 5}
    assert_close(our_images(config, 37), their_images(config, 37, monkeypatch), 1e-9)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_without_the_stride_images_are_others(spacing: str, monkeypatch) -> None:
    config = {"_class_name": DDIM, "timestep_spacing": spacing}
    solver = functools.partial(ddim, eps="network")
    for steps in (3, 6, 7, 9, 11, 30):
        theirs = their_images(config, steps, monkeypatch)
        assert_close(our_images(config, steps), theirs, 1e-10)
        x_T, noise = randomness(steps, len(LABELS))
        without = fastdiff.sample(
            a_model(config), LABELS, steps=f"{spacing}:{steps}", solver=solver, x_T=x_T, noise=noise, dtype="float64"
        )
        assert (without - theirs).abs().max() > 1e-4


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_number_of_steps_visits_their_times(spacing: str) -> None:
    """Their "linspace" of one step is t = 0; ours is T - 1. Their "trailing" may go on to t = -1; ours does not"""
    theirs = DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing)
    longer = 0
    for steps in range(1 + (spacing == "linspace"), 1001):
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.tolist()
        if len(expected) > steps:
            assert spacing == "trailing" and expected.pop() == -1
            longer += 1
        assert timesteps(f"{spacing}:{steps}", 1000).tolist() == expected
    assert longer == (62 if spacing == "trailing" else 0)


@pytest.mark.parametrize("config", CONFIGS, ids=short)
def test_there_and_back(config: dict[str, Any]) -> None:
    model = a_model(config)
    back = scheduler_to_diffusers(model)
    assert json.loads(json.dumps(back)) == back
    again = a_model(back)
    assert (again.prediction, again.variance, again.clip_x0, again.solver) == (
        model.prediction,
        model.variance,
        model.clip_x0,
        model.solver,
    )
    assert model.schedule.name is None or back["trained_betas"] is None
    assert np.array_equal(again.schedule.betas, model.schedule.betas) and again.schedule.name == model.schedule.name
    theirs, ours = their_scheduler(config), KINDS[back["_class_name"]].from_config(back)
    theirs.set_timesteps(9)
    ours.set_timesteps(9)
    assert torch.equal(theirs.timesteps, ours.timesteps)
    torch.testing.assert_close(theirs.alphas_cumprod, ours.alphas_cumprod, rtol=1e-3, atol=1e-6)
    if type(theirs) is DDIMScheduler:
        torch.testing.assert_close(theirs.final_alpha_cumprod, ours.final_alpha_cumprod)
    read = {"prediction_type", "clip_sample", "set_alpha_to_one", "thresholding", "num_train_timesteps"}
    read |= {"clip_sample_range"} if model.clip_x0 else set()
    assert {key: theirs.config.get(key) for key in read} == {key: ours.config.get(key) for key in read}


def test_missing_keys_have_their_defaults() -> None:
    for name, kind in KINDS.items():
        parameters = inspect.signature(kind.__init__).parameters
        assert {key: p.default for key, p in parameters.items() if key != "self"} == _DEFAULTS[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, "linear"),
        ({"beta_end": 0.03}, None),
        ({"num_train_timesteps": 4000, "beta_start": 0.000025, "beta_end": 0.005}, "linear"),
        ({"num_train_timesteps": 4000}, None),
        ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 77}, "cosine"),
        ({"beta_schedule": "scaled_linear"}, None),
        ({"rescale_betas_zero_snr": True}, None),
        ({"trained_betas": Schedule.named("linear").betas.tolist()}, "linear"),
        ({"trained_betas": np.array(BETAS), "num_train_timesteps": 100}, None),
    ],
    ids=str,
)
def test_the_betas_are_theirs_in_float64(kind: str, config: dict[str, Any], name: str | None) -> None:
    schedule = scheduler_from_diffusers({"_class_name": kind, **config}).schedule
    assert schedule.name == name
    theirs = KINDS[kind](**config)
    np.testing.assert_allclose(theirs.alphas_cumprod.numpy(), schedule.alphas_cumprod, rtol=1e-3, atol=1e-6)
    if config.get("rescale_betas_zero_snr"):
        assert schedule.alphas_cumprod[-1] == 0
    else:
        np.testing.assert_allclose(theirs.betas.numpy(), schedule.betas, rtol=1e-5, atol=1e-7)


def test_what_their_classes_leave_in_a_config_is_taken() -> None:
    ddpm, ddim = DDPMScheduler(variance_type="fixed_large", beta_end=0.03), DDIMScheduler(steps_offset=1, beta_end=0.03)
    for scheduler in (DDIMScheduler.from_config(ddpm.config), DDPMScheduler.from_config(ddim.config)):
        facts = scheduler_from_diffusers({"_class_name": type(scheduler).__name__, **scheduler.config})
        assert facts.schedule.betas[-1] == 0.03
        saved = json.loads(scheduler.to_json_string())
        assert scheduler_from_diffusers(saved).solver == facts.solver
    # as diffusers 0.1 wrote it
    old = {"beta_end": 0.02, "clip_sample": True, "timestep_values": None, "tensor_format": "pt", "trained_betas": None}
    assert scheduler_from_diffusers({"_class_name": DDPM, **old}).variance == "fixed_small"
    assert scheduler_from_diffusers({"_class_name": "FusedDDIMScheduler"}).solver["name"] == "ddim"


REFUSED = [
    ({"_class_name": "PNDMScheduler"}, "_class_name must be 'DDPMScheduler' or 'DDIMScheduler', got 'PNDMScheduler'"),
    ({"_class_name": None}, "_class_name must be .*got None; write it beside scheduler.config"),
    ({"_class_name": ["DDPMScheduler"]}, "_class_name must be"),
    ({"thresholding": True}, "thresholding must be False, got True: .*keep the scheduler"),
    ({"variance_type": "fixed_large_log"}, "variance_type must be one of .*'learned_range'.*got 'fixed_large_log'"),
    ({"variance_type": "learned"}, "variance_type must be one of .*got 'learned'"),
    ({"prediction_type": "flow"}, "prediction_type must be one of .*got 'flow'"),
    ({"timestep_spacing": "middle"}, "timestep_spacing must be one of .*got 'middle'"),
    ({"beta_schedule": "laplace"}, "beta_schedule must be one of .*got 'laplace'"),
    ({"_class_name": DDIM, "beta_schedule": "sigmoid"}, "beta_schedule must be one of .*got 'sigmoid'"),
    ({"depth": 3}, "unknown key 'depth'=3 for DDPMScheduler; known are .*remove it if"),
    ({"predict_epsilon": False}, "unknown key 'predict_epsilon'=False"),
    ({"timestep_values": [1, 2]}, "unknown key 'timestep_values'"),
    ({"num_train_timesteps": 10**12}, r"num_train_timesteps must be in \[1, 1048576\], got 1000000000000"),
    ({"num_train_timesteps": 0}, r"num_train_timesteps must be in .*got 0"),
    ({"num_train_timesteps": -3}, "num_train_timesteps must be in"),
    ({"steps_offset": -1}, r"steps_offset must be in \[0, 999\], got -1"),
    ({"steps_offset": 1000}, "steps_offset must be in"),
    ({"beta_start": 0.0}, "beta_start must be in .*got 0.0"),
    ({"beta_end": 10**400}, "beta_end must be finite"),
    ({"beta_end": 2.0}, "beta_end must be in .*got 2.0"),
    ({"beta_end": math.nan}, "beta_end must be finite, got nan"),
    ({"beta_start": 1.0}, r"beta_start and beta_end must give a noise schedule: betas must be"),
    ({"beta_start": -0.1, "beta_schedule": "scaled_linear"}, "beta_start must be in"),
    ({"clip_sample_range": 0.0}, "clip_sample_range must be above 0"),
    ({"clip_sample_range": -math.inf}, "clip_sample_range must be finite"),
    ({"trained_betas": [0.1, 0.2]}, "trained_betas must be num_train_timesteps=1000 numbers, got 2"),
    ({"trained_betas": [0.1, 1.2], "num_train_timesteps": 2}, "trained_betas must give a noise schedule"),
    ({"trained_betas": [0.1, math.nan], "num_train_timesteps": 2}, "trained_betas must be finite, got nan"),
    ({"rescale_betas_zero_snr": True, "num_train_timesteps": 1}, "and rescale_betas_zero_snr must give"),
    ({"variance_type": "fixed_large", "timestep_spacing": "trailing"}, "adds noise after the last step there"),
    ({"variance_type": "learned_range", "steps_offset": 1}, "adds noise after the last step there"),
]
WRONG_TYPES = [
    ({"beta_start": "0.1"}, "beta_start must be a number, got '0.1'"),
    ({"beta_start": True}, "beta_start must be a number, got True"),
    ({"beta_end": None}, "beta_end must be a number, got None"),
    ({"beta_end": [[0.1]]}, "beta_end must be a number"),
    ({"clip_sample": 1}, "clip_sample must be True or False, got 1"),
    ({"_class_name": DDIM, "set_alpha_to_one": "no"}, "set_alpha_to_one must be True or False, got 'no'"),
    ({"num_train_timesteps": 1000.0}, "num_train_timesteps must be an integer, got 1000.0"),
    ({"num_train_timesteps": "1000"}, "num_train_timesteps must be an integer"),
    ({"steps_offset": False}, "steps_offset must be an integer, got False"),
    ({"trained_betas": "linear"}, "trained_betas must be a list of numbers or None, got 'linear'"),
    ({"trained_betas": {"0": 0.1}}, "trained_betas must be a list"),
    ({"trained_betas": [[0.1], [0.2]], "num_train_timesteps": 2}, "trained_betas must be a number"),
]


@pytest.mark.parametrize(("changes", "match"), REFUSED, ids=str)
def test_what_cannot_be_said_names_its_key(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        scheduler_from_diffusers({"_class_name": DDPM, **changes})


@pytest.mark.parametrize(("changes", "match"), WRONG_TYPES, ids=str)
def test_what_is_of_another_type_names_its_key(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        scheduler_from_diffusers({"_class_name": DDPM, **changes})


@pytest.mark.parametrize("config", [None, [], "x", {1: 2}, {None: 1, "_class_name": DDPM}], ids=str)
def test_a_config_is_a_mapping_of_names(config: Any) -> None:
    with pytest.raises(TypeError, match="config must be a mapping of names to values"):
        scheduler_from_diffusers(config)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = sorted({*_DEFAULTS[DDPM], *_DEFAULTS[DDIM], "_class_name", "tensor_format", "predict_epsilon"})


@pytest.mark.parametrize("key", KEYS)
def test_values_of_any_depth_are_refused(key: str) -> None:
    value: Any = 0.5
    for _ in range(10_000):
        value = [value]
    for kind in KINDS:
        with pytest.raises((ValueError, TypeError)) as refused:
            scheduler_from_diffusers({"_class_name": kind, key: value})
        assert key in str(refused.value) and len(str(refused.value)) < 1000


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_no_config_does_anything_but_load_or_be_refused(kind: str, changes: dict[str, Any]) -> None:
    config = {"_class_name": kind, "num_train_timesteps": 30, **changes}
    try:
        facts = scheduler_from_diffusers(config)
    except (ValueError, TypeError):
        return
    assert 1 <= facts.schedule.num_train_timesteps <= 2**20
    assert a_model(scheduler_to_diffusers(a_model(config))).solver == facts.solver


def exported(**changes: Any) -> dict[str, Any]:
    options = {"variance": "fixed_small", **changes}
    return scheduler_to_diffusers(
        DiffusionModel(mixing, "linear", num_classes=10, null_label=NULL, image_shape=SHAPE, **options)
    )


def test_a_model_without_a_solver_is_a_ddpm_chain(monkeypatch) -> None:
    config = exported(variance="fixed_large")
    assert (config["_class_name"], config["variance_type"]) == (DDPM, "fixed_large")
    assert_close(our_images(config, 10), their_images(config, 10, monkeypatch), 1e-9)


NETWORK_EPS = {"name": "ddim", "spacing": "leading:N", "eps": "network"}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"solver": {"name": "heun", "spacing": "leading:N"}},
            r"solver must have a name of \['ddim', 'ddpm'\].*'heun'",
        ),
        ({"solver": {"name": "ddim"}}, "solver must have a spacing of 'leading:N'.*got None"),
        ({"solver": {"name": "ddim", "spacing": "ddimN"}}, "solver must have a spacing of .*got 'ddimN'"),
        ({"solver": {"name": "ddim", "spacing": "linspace:N+1"}}, "solver must have a spacing of"),
        ({"solver": {**NETWORK_EPS, "eps": "x0"}}, "solver's eps must be 'network' where x0 is clipped, got 'x0'"),
        ({"solver": {**NETWORK_EPS, "eta": 0.5}}, "solver's eta must be 0, got 0.5"),
        ({"solver": {**NETWORK_EPS, "order": 2}}, r"solver has options \['order'\]"),
        (
            {"solver": {**NETWORK_EPS, "spacing": "trailing:N"}},
            "solver's stride must be True with spacing='trailing:N'",
        ),
        ({"solver": {**NETWORK_EPS, "spacing": "leading:N+1"}}, "solver's stride must be True"),
        (
            {"solver": {"name": "ddpm", "spacing": "trailing:N"}, "variance": "learned_range"},
            "spacing must be 'leading:N' or 'linspace:N' with variance='learned_range', got 'trailing:N'",
        ),
    ],
    ids=str,
)
def test_what_their_configs_cannot_say(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        exported(**changes)


def test_unclipped_ddim_has_one_eps() -> None:
    solver = {"name": "ddim", "spacing": "leading:N"}
    assert exported(solver=solver, clip_x0=False)["clip_sample"] is False
