"""Configs of diffusers' DDPMScheduler and DDIMScheduler, both ways; reads and writes mappings, never imports diffusers

Three habits of theirs are named by options of fastdiff's ddim: the network's own eps beside a clipped x0
(eps="network"), a previous time that is t - T // N whatever the next one is (stride=True), and a last step that need
not be clean (last="first").
"""

import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.diffusion_model import DiffusionModel
from fastdiff.schedule import MOST_TIMESTEPS, SCHEDULES, Schedule, cosine_betas

__all__ = ["SchedulerFacts", "scheduler_from_diffusers", "scheduler_to_diffusers"]

Array = npt.NDArray[np.float64]

# The defaults of both classes: a config of the Hub may leave keys out
_SHARED: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {**_SHARED, "variance_type": "fixed_small"},
    "DDIMScheduler": {**_SHARED, "set_alpha_to_one": True},
}
# Written by old releases, or left behind where one scheduler was made from another's config; read by neither class
_IGNORED: dict[str, Callable[[Any], bool]] = {
    "variance_type": lambda value: isinstance(value, str),
    "set_alpha_to_one": lambda value: isinstance(value, bool),
    "skip_prk_steps": lambda value: isinstance(value, bool),
    "timestep_values": lambda value: value is None,
    "tensor_format": lambda value: value in ("pt", "np") if isinstance(value, str) else False,
    "predict_epsilon": lambda value: value is True,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_OPTIONS = {"ddpm": {"x0_max"}, "ddim": {"eps", "eta", "stride", "last", "x0_max"}}


@dataclass(frozen=True)
class SchedulerFacts:
    """What a scheduler's config says of a model: arguments of DiffusionModel by name.

    A DDIM config says nothing of the variance, which is "fixed_small" then.
    """

    schedule: Schedule
    prediction: str
    variance: str
    clip_x0: bool
    solver: dict[str, Any]


def scheduler_from_diffusers(config: Mapping[str, Any]) -> SchedulerFacts:
    """What a DDPMScheduler or DDIMScheduler of this config samples, for a DiffusionModel that samples the same.

    config: scheduler_config.json's contents, or `scheduler.config` with a "_class_name". Keys left out have the class's
    defaults. The betas are computed in float64, where theirs are float32.

    Raises ValueError or TypeError naming the key for whatever fastdiff's solvers cannot say, or the class would refuse.
    """
    kind, config = _understood(config)
    schedule = _schedule(config)
    spacing, offset = config["timestep_spacing"], config["steps_offset"]
    solver: dict[str, Any] = {"name": "ddpm" if kind == "DDPMScheduler" else "ddim", "spacing": f"{spacing}:N"}
    if spacing != "leading":
        offset = 0
    if offset:
        solver["spacing"] += f"+{offset}"
    variance = "fixed_small"
    if kind == "DDPMScheduler":
        variance = config["variance_type"].removesuffix("_log")
        if variance != "fixed_small" and (offset or spacing == "trailing"):
            raise ValueError(
                f"variance_type={variance!r} must go with timestep_spacing 'linspace', or 'leading' and steps_offset=0,"
                f" got {spacing!r} and {config['steps_offset']}: DDPMScheduler adds noise after the last step there, "
                "which fastdiff does not; choose another spacing"
            )
    else:
        solver["eps"] = "network"
        # only without an offset is the next time always t - T // N, and nothing before the last one
        if offset or spacing != "leading":
            solver["stride"] = True
        if not config["set_alpha_to_one"]:
            solver["last"] = "first"
    if config["clip_sample"] and config["clip_sample_range"] != 1:
        solver["x0_max"] = float(config["clip_sample_range"])
    return SchedulerFacts(schedule, _PREDICTIONS[config["prediction_type"]], variance, config["clip_sample"], solver)


def scheduler_to_diffusers(model: DiffusionModel) -> dict[str, Any]:
    """The config of the DDPMScheduler or DDIMScheduler that samples what fastdiff samples by model.solver.

    Their `from_config` takes it, and scheduler_config.json may hold it. A model without a solver, which is sampled by
    whatever the caller names, gets a DDPMScheduler: solver="ddpm", steps="leading:N" are its images. A DDIMScheduler
    has no variance, so that the network must give it C channels.

    Raises ValueError naming what theirs cannot say.
    """
    solver = dict(model.solver or {"name": "ddpm", "spacing": "leading:N"})
    name, spacing = solver.pop("name"), solver.pop("spacing", None)
    if name not in _OPTIONS:
        raise ValueError(f"solver must have a name of {sorted(_OPTIONS)} for diffusers' schedulers, got {name!r}")
    if unknown := sorted(solver.keys() - _OPTIONS[name]):
        raise ValueError(f"solver has options {unknown}, which diffusers' schedulers cannot say; leave them out")
    match = re.fullmatch(r"(leading|linspace|trailing):N(?:\+(\d{1,9}))?", spacing or "")
    if match is None or (match[2] and match[1] != "leading"):
        raise ValueError(
            "solver must have a spacing of 'leading:N', 'leading:N+1', 'linspace:N' or 'trailing:N' for diffusers' "
            f"schedulers, got {spacing!r}; give the model a solver with one of them"
        )
    offset = int(match[2] or 0)
    shared = {
        **_betas_to_diffusers(model.schedule),
        "num_train_timesteps": model.schedule.num_train_timesteps,
        "prediction_type": {ours: theirs for theirs, ours in _PREDICTIONS.items()}[model.prediction],
        "clip_sample": model.clip_x0,
        "clip_sample_range": float(solver.get("x0_max", 1.0)),
        "timestep_spacing": match[1],
        "steps_offset": offset,
    }
    if name == "ddpm":
        if model.variance != "fixed_small" and (offset or match[1] == "trailing"):
            raise ValueError(
                f"spacing must be 'leading:N' or 'linspace:N' with variance={model.variance!r}, got {spacing!r}: "
                "DDPMScheduler would add noise after the last step"
            )
        return {**_named_defaults("DDPMScheduler"), **shared, "variance_type": model.variance}
    if solver.get("eta", 0) != 0:
        raise ValueError(f"solver's eta must be 0, got {solver['eta']!r}: it is an argument of theirs, not of a config")
    if model.clip_x0 and solver.get("eps", "x0") != "network":
        raise ValueError(
            "solver's eps must be 'network' where x0 is clipped, got 'x0': DDIMScheduler derives eps from the clipped "
            "x0 only by an argument, use_clipped_model_output=True"
        )
    if not solver.get("stride", False) and (offset or match[1] != "leading"):
        raise ValueError(
            f"solver's stride must be True with spacing={spacing!r}, got False: DDIMScheduler goes to t - T // N there"
        )
    end = solver.get("last", "clean") == "clean"
    return {**_named_defaults("DDIMScheduler"), **shared, "set_alpha_to_one": end}


def _named_defaults(kind: str) -> dict[str, Any]:
    return {"_class_name": kind, **_DEFAULTS[kind]}


def _understood(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class and all its keys, each of a type and value that fastdiff has"""
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise TypeError(f"config must be a mapping of names to values, got {reprlib.repr(given)}")
    kind = given.get("_class_name")
    kind = kind.removeprefix("Fused") if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise ValueError(
            f"_class_name must be {' or '.join(map(repr, _DEFAULTS))}, got {reprlib.repr(given.get('_class_name'))}; "
            "write it beside scheduler.config, or make one of them by from_config"
        )
    known = _DEFAULTS[kind]
    config = {**known, **{key: value for key, value in given.items() if key in known}}
    for key in sorted(key for key in given if key not in known and not key.startswith("_")):
        if key not in _IGNORED or not _IGNORED[key](given[key]):
            raise ValueError(
                f"config has an unknown key {reprlib.repr(key)}={reprlib.repr(given[key])} for {kind}; known are "
                f"{sorted(known)}; remove it if {kind} pays no attention to it"
            )
    for key, default in known.items():
        if isinstance(default, str):
            _check_choice(kind, key, config[key])
        elif isinstance(default, bool) and not isinstance(config[key], bool):
            raise TypeError(f"{key} must be True or False, got {reprlib.repr(config[key])}")
        elif isinstance(default, float):
            _check_number(key, config[key])
    _check_integer("num_train_timesteps", config["num_train_timesteps"], 1, MOST_TIMESTEPS)
    _check_integer("steps_offset", config["steps_offset"], 0, config["num_train_timesteps"] - 1)
    if config["thresholding"]:
        raise ValueError("thresholding must be False, got True: fastdiff's solvers clip x0 to a bound that is the same "
                         "for all images; keep the scheduler and call the network in its loop")  # fmt: skip
    if config["clip_sample"] and not config["clip_sample_range"] > 0:
        raise ValueError(f"clip_sample_range must be above 0, got {config['clip_sample_range']!r}")
    return kind, config


def _check_choice(kind: str, key: str, value: object) -> None:
    choices = [name for name in _CHOICES[key] if (kind, name) != ("DDIMScheduler", "sigmoid")]
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{key} must be one of {choices} for fastdiff's {kind}, got {reprlib.repr(value)}")


def _check_number(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{key} must be a number, got {reprlib.repr(value)}")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{key} must be finite, got {reprlib.repr(value)}")


def _check_integer(key: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key} must be an integer, got {reprlib.repr(value)}")
    if not low <= value <= high:
        raise ValueError(f"{key} must be in [{low}, {high}], got {reprlib.repr(value)}")


def _schedule(config: Mapping[str, Any]) -> Schedule:
    """Named where the name's betas are these, to the last bit"""
    betas, keys = _betas(config)
    try:
        schedule = Schedule(betas)
        if config["rescale_betas_zero_snr"]:
            keys += " and rescale_betas_zero_snr"
            schedule = Schedule(_with_zero_snr(schedule))
    except ValueError as error:
        raise ValueError(f"{keys} must give a noise schedule: {error}") from error
    for name, build in SCHEDULES.items():
        with suppress(ValueError):
            if np.array_equal(build(len(betas)), schedule.betas):
                return Schedule(schedule.betas, name)
    return schedule


def _betas(config: Mapping[str, Any]) -> tuple[Array, str]:
    """Theirs, float64 (T,), and the keys that they come from"""
    T, kind = config["num_train_timesteps"], config["beta_schedule"]
    if config["trained_betas"] is not None:
        return _trained_betas(config["trained_betas"], T), "trained_betas"
    if kind == "squaredcos_cap_v2":
        return cosine_betas(T), "beta_schedule"
    start, end = config["beta_start"], config["beta_end"]
    for key, beta in (("beta_start", start), ("beta_end", end)):
        if not 0 < beta <= 1:
            raise ValueError(f"{key} must be in (0, 1), got {reprlib.repr(beta)}")
    if kind == "linear":
        betas = np.linspace(start, end, T)
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, T) ** 2
    else:
        # the chain of GeoDiff (2203.02923)
        betas = start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, T)))
    return betas, "beta_start and beta_end"


def _trained_betas(given: object, T: int) -> Array:
    values = given.tolist() if isinstance(given, np.ndarray) and given.size <= MOST_TIMESTEPS else given
    if not isinstance(values, list | tuple):
        raise TypeError(f"trained_betas must be a list of numbers or None, got {reprlib.repr(given)}")
    if len(values) != T:
        raise ValueError(f"trained_betas must be num_train_timesteps={T} numbers, got {len(values)}")
    for beta in values:
        _check_number("trained_betas", beta)
    return np.array(values, dtype=np.float64)


def _with_zero_snr(schedule: Schedule) -> Array:
    """Common Diffusion Noise Schedules and Sample Steps are Flawed (2305.08891), algorithm 1"""
    alpha = np.sqrt(schedule.alphas_cumprod)
    with np.errstate(divide="ignore", invalid="ignore"):
        abar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        return np.append(1 - abar[0], 1 - abar[1:] / abar[:-1])


def _betas_to_diffusers(schedule: Schedule) -> dict[str, Any]:
    """The keys that give these betas: a formula of theirs where one gives them to the last bit, else the betas"""
    betas, T = schedule.betas, schedule.num_train_timesteps
    if np.array_equal(cosine_betas(T), betas):
        return {"beta_schedule": "squaredcos_cap_v2"}
    if np.array_equal(np.linspace(betas[0], betas[-1], T), betas):
        return {"beta_schedule": "linear", "beta_start": float(betas[0]), "beta_end": float(betas[-1])}
    return {"trained_betas": betas.tolist()}
