"""diffusers' DDPMScheduler and DDIMScheduler whose arithmetic is one launch of guided_step

Everything but `step` is theirs, and so is the step itself where one row of coefficients cannot say it: dynamic
thresholding, a variance that is learned by itself, an eta outside [0, 1], images that are not (N, C, H, W), a tensor
that requires grad, torch.compile. On a CPU, where guided_step is several operations like theirs, all steps are theirs.

A step reads nothing from the device, but rows are dropped with their chain: whoever captures steps in a graph of
their own keeps the scheduler as it is. The rows of a chain are computed on the host, in float64, when step first meets
what set_timesteps made; a timestep that is an element of `scheduler.timesteps`, as every pipeline's is, is known by its
address, in whatever order elements come. Any other tensor on a GPU has to be read, which makes the host wait.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.autograd import forward_ad

from fastdiff.prediction import Prediction, named_prediction
from fastdiff_kernels import COEFS, guided_step

__all__ = ["FusedDDIMScheduler", "FusedDDPMScheduler", "SchedulerMixin"]

Array = npt.NDArray[np.float64]
Generators = torch.Generator | list[torch.Generator] | None

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
# DDPMScheduler's own bound, which keeps the logarithm of the last variance finite
LEAST_VARIANCE = 1e-20
FUSED_ON = ("cuda",)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# floats from row to row: all begin at 64 bytes, and one kernel serves them
PITCH = 16
# options of a step, such as etas, whose rows are kept
MOST_OPTIONS = 8


@dataclass
class _Chain:
    """What steps need of a scheduler as set_timesteps left it

    origins: what it was made from, held so that nothing else can have its identity; state: what that was like; times:
    scheduler.timesteps; abar: float64 (T,); rows: for each set of options, dtype and device, the coefficients
    (NUM_COEFS,) of a time, None where one is not finite.
    """

    state: Hashable
    origins: tuple[object, ...]
    times: list[int]
    abar: Array
    rows: dict[Hashable, dict[int, Tensor | None]] = field(default_factory=dict)


class _OneLaunch(ABC):
    """What both schedulers share: which time a step is at, and its row"""

    _chain: _Chain | None = None
    config: Any
    timesteps: Tensor
    alphas_cumprod: Tensor

    @abstractmethod
    def _origins(self) -> tuple[object, ...]:
        """What rows depend on beside config, timesteps and alphas_cumprod"""

    @abstractmethod
    def _next_times(self, times: Sequence[int], chain: _Chain) -> list[int] | None:
        """Where the outputs of steps at times sit, negative for clean; None where theirs raises an error"""

    @abstractmethod
    def _coefs(self, kind: Prediction, abar: Array, abar_next: Array, options: Hashable) -> dict[str, Array]:
        """Columns of a row by name, of the level that a step starts from and the one its output sits at"""

    @abstractmethod
    def _clean(self) -> Tensor:
        """abar of the output of the last step"""

    def _current_chain(self) -> _Chain:
        origins = (self.config, self.timesteps, self.alphas_cumprod, *self._origins())
        state = tuple(_identity(origin) for origin in origins)
        if self._chain is None or self._chain.state != state:
            abar = self.alphas_cumprod.detach().to("cpu", torch.float64).numpy()
            self._chain = _Chain(state, origins, self.timesteps.tolist(), abar)
        return self._chain

    def _row(
        self, timestep: Any, options: Hashable, dtype: torch.dtype, device: torch.device
    ) -> tuple[int, Tensor] | None:
        """The time of a step and its coefficients, or None where theirs must decide"""
        if self.timesteps.dim() != 1 or self.timesteps.dtype not in INTEGERS:
            return None
        chain = self._current_chain()
        time = _time(timestep, self.timesteps, chain.times)
        if time is None:
            return None
        if len(chain.rows) >= MOST_OPTIONS and (options, dtype, device) not in chain.rows:
            chain.rows.clear()
        rows = chain.rows.setdefault((options, dtype, device), {})
        if time not in rows:
            together = chain.times if not rows and time in chain.times else [time]
            rows.update(self._new_rows(together, chain, options, dtype, device))
        row = rows[time]
        return None if row is None else (time, row)

    def _new_rows(
        self, times: Sequence[int], chain: _Chain, options: Hashable, dtype: torch.dtype, device: torch.device
    ) -> dict[int, Tensor | None]:
        after = self._next_times(times, chain)
        x0_max = self.config.clip_sample_range if self.config.clip_sample else np.inf
        if after is None or not x0_max > 0:
            return dict.fromkeys(times)
        now, then, end = np.array(times), np.array(after), len(chain.abar) - 1
        # what is out of range is theirs to refuse
        sound = (now >= 0) & (now <= end) & (then <= end)
        abar = chain.abar[now.clip(0, end)]
        abar_next = np.where(then < 0, float(self._clean()), chain.abar[then.clip(0, end)])
        kind = named_prediction(PREDICTIONS[self.config.prediction_type])
        table = np.zeros((len(times), PITCH))
        with np.errstate(all="ignore"):
            for name, values in self._coefs(kind, abar, abar_next, options).items():
                table[:, COEFS.index(name)] = values
            narrow = table.astype(np.float64 if dtype == torch.float64 else np.float32)
        sound &= np.isfinite(narrow).all(1)
        narrow[:, COEFS.index("x0_max")] = x0_max
        rows = torch.from_numpy(narrow).to(device)[:, : len(COEFS)]
        return {time: row if ok else None for time, row, ok in zip(times, rows, sound, strict=True)}


class FusedDDPMScheduler(_OneLaunch, DDPMScheduler):
    """DDPMScheduler with a fused step: same signature, noise, dtypes and, but for rounding, results.

    All arithmetic is one launch of guided_step, beside a copy of the sample and, in half precision, casts.

    Coefficients are float64 until they are stored and a step is float32 throughout, whatever the dtype of sample and
    model_output. `FusedDDPMScheduler.from_config(pipe.scheduler.config)` puts it in place of the stock one, and back.
    A pipeline saved with it inside is loaded where fastdiff has been imported.
    """

    # where a pipeline's model_index.json has it looked for
    __module__ = "fastdiff"

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """See DDPMScheduler.step."""
        # before anything that a compiler cannot follow
        if torch.compiler.is_compiling():
            return super().step(model_output, timestep, sample, generator, return_dict)
        kind = self.config.variance_type
        learned = kind == "learned_range"
        # theirs goes by the attribute here and by the config there
        known = self.variance_type == kind and (learned or kind in FIXED_VARIANCES) and _is_clipped_plainly(self.config)
        found = None
        if known and _fits(model_output, sample, 2 if learned else 1):
            found = self._row(timestep, (), _state_dtype(model_output, sample), sample.device)
        if found is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        time, row = found
        noise = None
        if time > 0:
            noise = randn_tensor(
                sample.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
        is_x0 = self.config.prediction_type == "sample"
        x, x0 = _launched(model_output, sample, row, noise, is_x0=is_x0, learned=learned)
        return DDPMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)

    def _origins(self) -> tuple[object, ...]:
        return self.one, self.custom_timesteps, self.num_inference_steps

    def _clean(self) -> Tensor:
        return self.one

    def _next_times(self, times: Sequence[int], chain: _Chain) -> list[int] | None:
        if not (self.custom_timesteps or self.num_inference_steps):
            return [time - 1 for time in times]
        # their first place in the list counts
        after = dict(zip(reversed(chain.times), reversed([*chain.times[1:], -1]), strict=True))
        return [after[time] for time in times] if all(time in after for time in times) else None

    def _coefs(self, kind: Prediction, abar: Array, abar_next: Array, options: Hashable) -> dict[str, Array]:
        beta = 1 - abar / abar_next
        beta_tilde = np.maximum((1 - abar_next) / (1 - abar) * beta, LEAST_VARIANCE)
        # DDPM (2006.11239) equation 7
        coefs = _prediction(kind, abar) | {
            "c_x": np.sqrt(abar / abar_next) * (1 - abar_next) / (1 - abar),
            "c_x0": np.sqrt(abar_next) * beta / (1 - abar),
        }
        if self.variance_type == "learned_range":
            return coefs | {
                "c_noise": np.ones_like(abar),
                "log_beta": np.log(beta),
                "log_beta_tilde": np.log(beta_tilde),
            }
        return coefs | {"c_noise": np.sqrt(beta if self.config.variance_type == "fixed_large" else beta_tilde)}


class FusedDDIMScheduler(_OneLaunch, DDIMScheduler):
    """DDIMScheduler with a fused step: same signature, noise, dtypes and, but for rounding, results.

    All arithmetic is one launch of guided_step, beside a copy of the sample and, in half precision, casts.

    Coefficients are float64 until they are stored and a step is float32 throughout, whatever the dtype of sample and
    model_output. `FusedDDIMScheduler.from_config(pipe.scheduler.config)` puts it in place of the stock one, and back.
    A pipeline saved with it inside is loaded where fastdiff has been imported.
    """

    # where a pipeline's model_index.json has it looked for
    __module__ = "fastdiff"

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """See DDIMScheduler.step."""
        theirs = (eta, use_clipped_model_output, generator, variance_noise, return_dict)
        # before anything that a compiler cannot follow
        if torch.compiler.is_compiling():
            return super().step(model_output, timestep, sample, *theirs)
        known = isinstance(eta, int | float) and 0 <= eta <= 1 and _is_clipped_plainly(self.config)
        if variance_noise is not None and eta > 0:
            alike = (
                generator is None and _fits(variance_noise, sample, 1) and variance_noise.dtype == model_output.dtype
            )
            known = known and alike
        found = None
        if known and self.num_inference_steps and _fits(model_output, sample, 1):
            options = (float(eta), bool(use_clipped_model_output))
            found = self._row(timestep, options, _state_dtype(model_output, sample), sample.device)
        if found is None:
            return super().step(model_output, timestep, sample, *theirs)
        _, row = found
        noise = variance_noise if eta > 0 else None
        if eta > 0 and noise is None:
            noise = randn_tensor(
                sample.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
        x, x0 = _launched(model_output, sample, row, noise, is_x0=self.config.prediction_type == "sample")
        return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)

    def _origins(self) -> tuple[object, ...]:
        return self.final_alpha_cumprod, self.num_inference_steps

    def _clean(self) -> Tensor:
        return self.final_alpha_cumprod

    def _next_times(self, times: Sequence[int], chain: _Chain) -> list[int] | None:
        stride = self.config.num_train_timesteps // self.num_inference_steps
        return [time - stride for time in times]

    def _coefs(self, kind: Prediction, abar: Array, abar_next: Array, options: Any) -> dict[str, Array]:
        eta, clipped = options
        alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
        # DDIM (2010.02502) equations 12 and 16
        c_noise = eta * np.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
        direction = np.sqrt(np.maximum(1 - abar_next - c_noise**2, 0))
        coefs = _prediction(kind, abar) | {"c_noise": c_noise}
        if clipped:
            return coefs | {"c_x": direction / sigma, "c_x0": np.sqrt(abar_next) - direction * alpha / sigma}
        eps_x, eps_out = kind.to_eps(alpha, sigma)
        return coefs | {"c_x": direction * eps_x, "c_x0": np.sqrt(abar_next), "c_out": direction * eps_out}


def _identity(origin: object) -> Hashable:
    """A tensor's with its version, which writing changes; by id alone what is replaced to be changed, as a config is"""
    if isinstance(origin, Tensor):
        return id(origin), 0 if origin.is_inference() else origin._version
    return origin if isinstance(origin, Hashable) else id(origin)


def _prediction(kind: Prediction, abar: Array) -> dict[str, Array]:
    """k_x and k_out, NaN where they do not exist"""
    alpha = np.sqrt(abar)
    if kind.name == "eps":
        alpha = np.where(abar > 0, alpha, np.nan)
    k_x, k_out = kind.to_x0(alpha, np.sqrt(1 - abar))
    return {"k_x": k_x, "k_out": k_out}


def _is_clipped_plainly(config: Any) -> bool:
    return config.prediction_type in PREDICTIONS and not config.thresholding


def _time(timestep: Any, timesteps: Tensor, times: Sequence[int]) -> int | None:
    """A timestep as a number of the host; None for what is none"""
    if not isinstance(timestep, Tensor):
        whole = isinstance(timestep, int | np.integer) and not isinstance(timestep, bool)
        return int(timestep) if whole else None
    if type(timestep) is not Tensor or timestep.dim() or timestep.dtype not in INTEGERS:
        return None
    place = _place(timestep, timesteps)
    return int(timestep) if place is None else times[place]


def _place(element: Tensor, vector: Tensor) -> int | None:
    """i where element is the memory of vector[i], found without reading it"""
    if (element.device, element.dtype) != (vector.device, vector.dtype) or vector.dim() != 1:
        return None
    if element.untyped_storage().data_ptr() != vector.untyped_storage().data_ptr():
        return None
    place, between = divmod(int(element.storage_offset() - vector.storage_offset()), max(vector.stride(0), 1))
    return place if between == 0 and 0 <= place < len(vector) else None


def _fits(given: Tensor, sample: Tensor, times_channels: int) -> bool:
    """Whether guided_step takes the two tensors, given of times_channels * C channels, and nothing is lost by it"""
    if type(given) is not Tensor or type(sample) is not Tensor or sample.dim() != 4 or given.dim() != 4:
        return False
    n, c, height, width = sample.shape
    return (
        given.shape == (n, times_channels * c, height, width)
        and sample.numel() > 0
        and given.device == sample.device
        and sample.device.type in FUSED_ON
        and all(x.dtype in FLOATS and x.layout == torch.strided and not x.is_neg() for x in (given, sample))
        and not (torch.is_grad_enabled() and (given.requires_grad or sample.requires_grad))
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _state_dtype(model_output: Tensor, sample: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (model_output.dtype, sample.dtype) else torch.float32


def _launched(
    model_output: Tensor, sample: Tensor, row: Tensor, noise: Tensor | None, *, is_x0: bool, learned: bool = False
) -> tuple[Tensor, Tensor]:
    """The next sample and the clean one, in the dtypes and layout that their own arithmetic would give them"""
    dtype = torch.promote_types(sample.dtype, model_output.dtype)
    like = model_output[:, : sample.shape[1]] if is_x0 else sample
    # guided_step works in place
    x = torch.empty_like(like, dtype=row.dtype).copy_(sample)
    x0 = torch.empty_like(x)
    rounded = None if dtype == x.dtype else torch.empty_like(x, dtype=dtype)
    guided_step(
        x,
        model_output,
        row,
        x_net=rounded,
        x0=x0,
        noise=None if noise is None else noise.to(x.dtype),
        learned=learned,
    )
    return x if rounded is None else rounded, x0.to(model_output.dtype if is_x0 else dtype)
