"""Solvers as tables: each is a function that returns a StepTable; none loops over images, none touches a device.

One row is one network evaluation. With g the guided network output, z unit noise and h the history:

    x0 = clamp(k_x * x + k_out * g, +-x0_max) + k_grad * grad
    x' = c_x * x + c_x0 * x0 + c_out * g + c_hist * h + c_grad * S * grad + c_noise * s * z
    h' = h_x * x + h_x0 * x0
    learned variance: S = exp(f * log_beta + (1 - f) * log_beta_tilde), s = sqrt(S), f = (v + 1) / 2; else S = s = 1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from fastdiff.prediction import named_prediction
from fastdiff.schedule import Schedule, Steps, timesteps

__all__ = ["SOLVERS", "Solver", "StepTable", "ddim", "ddpm"]

Array = npt.NDArray[np.float64]

CLASSIFIER_FORMS = ("score", "mean")
WORDS = ("prediction", "variance", "classifier_form", "foreign")


def _zero() -> Array:
    return np.zeros(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTable:
    """The rows of a solver, float64 (rows,) each, checked against their own physics when built.

    t is the network's time; alpha, sigma the level that a row starts from, alpha_next, sigma_next the one its output
    sits at (1, 0 in the last row). variance tells the law of the noise: rows of "exact" give alpha_next * x0 +
    sigma_next * eps in distribution; "learned" takes its noise from the network, with beta tilde for the law;
    "fixed_large" is DDPM's upper bound, exact for data of unit variance. Coefficients left out are zero in every row.

    reverse_variance is stated by solvers of DDPM's kind, whose step is a Gaussian p(x' | x) that a classifier moves by
    its variance: that variance, in units of S where learned, c_noise^2 but for the last row, which has no noise and may
    have one. classifier_form tells how k_grad and c_grad were made; None: both are zero, see with_classifier.

    foreign: somebody else's chain, kept for the sake of their images: a row need not start at the level where the one
    before ended, nor the last one end clean. All other laws hold.

    Raises ValueError naming the first row that breaks a law.
    """

    prediction: str
    variance: str = "exact"
    t: Array
    alpha: Array
    sigma: Array
    alpha_next: Array
    sigma_next: Array
    k_x: Array
    k_out: Array
    k_grad: Array = field(default_factory=_zero)
    x0_max: Array
    c_x: Array
    c_x0: Array
    c_out: Array = field(default_factory=_zero)
    c_hist: Array = field(default_factory=_zero)
    c_grad: Array = field(default_factory=_zero)
    c_noise: Array = field(default_factory=_zero)
    h_x: Array = field(default_factory=_zero)
    h_x0: Array = field(default_factory=_zero)
    log_beta: Array = field(default_factory=_zero)
    log_beta_tilde: Array = field(default_factory=_zero)
    reverse_variance: Array | None = None
    classifier_form: str | None = None
    foreign: bool = False

    def __post_init__(self) -> None:
        rows = len(self.t)
        for name, value in vars(self).items():
            if name not in WORDS and value is not None:
                vector = np.broadcast_to(np.asarray(value, dtype=np.float64), (rows,)).copy()
                vector.flags.writeable = False
                object.__setattr__(self, name, vector)
        self._check_laws()

    def _check_laws(self) -> None:
        rows = len(self.t)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and name != "x0_max" and not np.isfinite(value).all():
                raise ValueError(
                    f"row {np.flatnonzero(~np.isfinite(value))[0]} breaks a law of the table: {name} is finite"
                )
        self._law("x0_max > 0", (self.x0_max > 0).astype(np.float64), 1)
        if self.variance not in ("exact", "learned", "fixed_large"):
            raise ValueError(f"variance must be 'exact', 'learned' or 'fixed_large', got {self.variance!r}")
        g_x0, g_eps = named_prediction(self.prediction).target(self.alpha, self.sigma)
        # x0 from the network's own x0 and eps must be x0, whatever eps was
        self._law("k_x * alpha + k_out * g_x0 = 1", self.k_x * self.alpha + self.k_out * g_x0, 1, self.k_x)
        self._law("k_x * sigma + k_out * g_eps = 0", self.k_x * self.sigma + self.k_out * g_eps, 0, self.k_x)
        # what the row before left in the history, in units of its x0 and eps; the first row has none
        hist_x0 = np.concatenate(([0.0], (self.h_x * self.alpha + self.h_x0)[:-1]))
        hist_eps = np.concatenate(([0.0], (self.h_x * self.sigma)[:-1]))
        mean = self.c_x * self.alpha + self.c_x0 + self.c_out * g_x0 + self.c_hist * hist_x0
        self._law("the mean of x' = alpha_next * x0", mean, self.alpha_next, self.c_x0)
        least = np.exp(self.log_beta_tilde) if self.variance == "learned" else 1.0
        kept = self.c_x * self.sigma + self.c_out * g_eps + self.c_hist * hist_eps
        variance, expected = kept**2 + self.c_noise**2 * least, self.sigma_next**2
        if self.variance == "fixed_large":
            # on data of unit variance x has it too, the best x0 is alpha * x and eps sigma * x, and x' has it again
            kept = self.c_x + self.c_x0 * self.alpha + self.c_out * (g_x0 * self.alpha + g_eps * self.sigma)
            variance = np.append((kept**2 + self.c_noise**2)[:-1], variance[-1:])
            expected = np.append(np.ones(rows - 1), expected[-1:])
        self._law("the variance of x'", variance, expected, self.c_x0)
        self._law("alpha^2 + sigma^2 = 1", self.alpha**2 + self.sigma**2, 1)
        self._law("alpha_next^2 + sigma_next^2 = 1", self.alpha_next**2 + self.sigma_next**2, 1)
        if not self.foreign:
            self._law("the next row starts where this one ends", self.alpha_next[:-1], self.alpha[1:])
            self._law("the last row's alpha_next = 1", self.alpha_next[-1:], 1)
            self._law("the last row adds no noise", self.c_noise[-1:], 0)
        if self.c_hist[0] != 0 or self.c_hist[-1] != 0:
            raise ValueError("a table's first row has no history, and its last is first order: c_hist must be 0 there")
        if (self.log_beta < self.log_beta_tilde - 1e-12).any():
            raise ValueError("log_beta must be at least log_beta_tilde: they bound the learned variance")
        self._law("reverse_variance = c_noise^2", self._reverse_variance[:-1], self.c_noise[:-1] ** 2)
        self._law("reverse_variance >= 0", np.minimum(self._reverse_variance, 0), 0)
        k_grad, c_grad = self._gradient(self.classifier_form)
        # rows outside of guidance's interval take no gradient
        taken = (self.k_grad != 0) | (self.c_grad != 0)
        for name, got, expected in (("k_grad", self.k_grad, k_grad), ("c_grad", self.c_grad, c_grad)):
            self._law(f"{name} of classifier_form={self.classifier_form!r}", got, np.where(taken, expected, 0), got)

    @property
    def _reverse_variance(self) -> Array:
        return self.c_noise**2 if self.reverse_variance is None else self.reverse_variance

    def _gradient(self, form: str | None) -> tuple[Array, Array]:
        """k_grad and c_grad of every row; of "score", infinite or not a number where alpha = 0"""
        if form not in (None, *CLASSIFIER_FORMS):
            raise ValueError(f"classifier_form must be one of {list(CLASSIFIER_FORMS)} or None, got {form!r}")
        if form != "score":
            return np.zeros(len(self)), np.zeros(len(self)) if form is None else self._reverse_variance
        g_x0, g_eps = named_prediction(self.prediction).target(self.alpha, self.sigma)
        # eps - sigma * grad moves x0 by sigma^2 / alpha * grad, and g by what both do to it
        with np.errstate(divide="ignore", invalid="ignore"):
            k_grad = self.sigma**2 / self.alpha
            return k_grad, self.c_out * (g_x0 * k_grad - g_eps * self.sigma)

    def with_classifier(self, form: str | None, rows: npt.NDArray[np.bool_]) -> StepTable:
        """The table with coefficients for grad = d log p(y | x) / dx of a classifier, in the rows (rows,) that are True

        form: "score" puts eps - sigma * grad for eps (2105.05233 algorithm 2), after the clamp, in any solver; "mean"
        adds the variance of the reverse step times grad to x' (algorithm 1), in solvers that have one; None is "mean"
        where the solver states its reverse_variance, as ddpm does, and "score" elsewhere.

        Raises ValueError for a form that the solver cannot have, or where alpha = 0.
        """
        if form is None:
            form = "score" if self.reverse_variance is None else "mean"
        k_grad, c_grad = self._gradient(form)
        if form == "mean" and self.reverse_variance is None and not self.stochastic:
            raise ValueError(
                "classifier_form='mean' needs a solver that adds noise, and this one adds none; use 'score'"
            )
        if form == "score" and (rows & (self.alpha == 0)).any():
            raise ValueError(
                "classifier_form='score' needs alpha > 0, and alpha = 0 at "
                f"t = {self.t[rows & (self.alpha == 0)][0]:g}; leave it out by guidance_interval"
            )
        if form == "score" and self.learned and (rows & (self.c_out != 0)).any():
            raise ValueError("classifier_form='score' needs c_out = 0 where the variance is learned; use 'mean'")
        if rows.any() and not (rows & ((k_grad != 0) | (c_grad != 0))).any():
            raise ValueError(
                f"classifier_form={form!r} would move no row that is guided: none of them adds noise; use 'score'"
            )
        return replace(
            self,
            classifier_form=form,
            k_grad=np.where(rows, k_grad, 0),
            c_grad=np.where(rows, c_grad, 0),
        )

    def _law(self, law: str, got: Array, expected: Array | float, scale: Array | float = 1.0) -> None:
        tolerance = 1e-10 * np.maximum(1, np.abs(scale))
        wrong = np.flatnonzero(~(np.abs(got - expected) <= tolerance))
        if len(wrong):
            row = wrong[0]
            value = np.broadcast_to(expected, np.shape(got))[row]
            raise ValueError(f"row {row} breaks a law of the table: {law}: expected {value:.12g}, got {got[row]:.12g}")

    def __len__(self) -> int:
        return len(self.t)

    @property
    def learned(self) -> bool:
        """Whether the second half of the network's channels scales the noise."""
        return self.variance == "learned"

    @property
    def stochastic(self) -> bool:
        return bool((self.c_noise != 0).any())

    @property
    def has_history(self) -> bool:
        return bool((self.c_hist != 0).any())

    @property
    def sigma_edm(self) -> Array:
        """sigma / alpha of each row's input: EDM's noise level, infinite where alpha = 0."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha

    def pack(self, names: Sequence[str]) -> Array:
        """The named coefficients as the columns of one float64 matrix (rows, len(names))."""
        return np.stack([getattr(self, name) for name in names], axis=1)


Solver = Callable[..., StepTable]


def _levels(schedule: Schedule, steps: Steps) -> tuple[Array, Array, Array]:
    """Times of the rows, abar there, and abar where each row's output sits; the last output is clean."""
    t = timesteps(steps, schedule.num_train_timesteps)
    abar = schedule.abar(t)
    return t, abar, np.append(abar[1:], 1.0)


def _x0_max(clip_x0: bool, bound: float) -> Array:
    if isinstance(bound, bool) or not isinstance(bound, int | float | np.floating) or not bound > 0:
        raise ValueError(f"x0_max must be a number above 0, got {bound!r}")
    return np.array([bound if clip_x0 else np.inf], dtype=np.float64)


def ddim(
    schedule: Schedule,
    steps: Steps,
    *,
    prediction: str = "eps",
    eta: float = 0.0,
    clip_x0: bool = True,
    x0_max: float = 1.0,
    eps: str = "x0",
    stride: bool = False,
    last: str = "clean",
) -> StepTable:
    """DDIM (2010.02502) equations 12 and 16; eta in [0, 1]: 0 is deterministic, 1 is DDPM with the small variance.

    eps="x0" derives eps again from the clipped x0, so clipping bends the direction too (guided-diffusion's way);
    eps="network" keeps the network's own eps (diffusers' default). They differ only where x0 is clipped, which is to
    [-x0_max, x0_max] where clip_x0 is True.

    Two more are for the images of diffusers' DDIMScheduler, whose rows can miss one another. stride=True: a row's
    output sits at t - T // rows, whatever the next time is, and is clean where that is negative.
    last="first": where it would be clean it sits at t = 0 (set_alpha_to_one=False).
    """
    if isinstance(eta, bool) or not isinstance(eta, int | float | np.floating) or not 0 <= eta <= 1:
        raise ValueError(f"eta must be a number in [0, 1], got {eta!r}")
    if eps not in ("x0", "network"):
        raise ValueError(f"eps must be 'x0' or 'network', got {eps!r}")
    if not isinstance(stride, bool):
        raise TypeError(f"stride must be True or False, got {stride!r}")
    if last not in ("clean", "first"):
        raise ValueError(f"last must be 'clean' or 'first', got {last!r}")
    t, abar, abar_next = _levels(schedule, steps)
    end = 1.0 if last == "clean" else schedule.alphas_cumprod[0]
    abar_next = np.append(abar_next[:-1], end)
    if stride:
        before = t - schedule.num_train_timesteps // len(t)
        abar_next = np.where(before < 0, end, schedule.abar(np.maximum(before, 0)))
    own = abar_next[-1] == 1 and (abar_next[:-1] == abar[1:]).all()
    alpha, sigma, alpha_next, sigma_next = np.sqrt(abar), np.sqrt(1 - abar), np.sqrt(abar_next), np.sqrt(1 - abar_next)
    kind = named_prediction(prediction)
    k_x, k_out = kind.to_x0(alpha, sigma)
    noise = eta * sigma_next / sigma * np.sqrt(1 - abar / abar_next)
    direction = np.sqrt(np.maximum(sigma_next**2 - noise**2, 0))
    # x' = alpha_next * x0 + direction * eps + noise * z, with eps linear in x and in x0 or g
    if eps == "network":
        eps_x, eps_out = kind.to_eps(alpha, sigma)
        c_x, c_x0, c_out = direction * eps_x, alpha_next, direction * eps_out
    else:
        c_x, c_x0, c_out = direction / sigma, alpha_next - direction * alpha / sigma, np.zeros_like(t)
    return StepTable(
        prediction=prediction,
        t=t,
        alpha=alpha,
        sigma=sigma,
        alpha_next=alpha_next,
        sigma_next=sigma_next,
        k_x=k_x,
        k_out=k_out,
        x0_max=_x0_max(clip_x0, x0_max),
        c_x=c_x,
        c_x0=c_x0,
        c_out=c_out,
        c_noise=noise,
        foreign=not own,
    )


def ddpm(
    schedule: Schedule,
    steps: Steps,
    *,
    prediction: str = "eps",
    variance: str = "fixed_small",
    clip_x0: bool = True,
    x0_max: float = 1.0,
) -> StepTable:
    """DDPM (2006.11239) equation 7 on the respaced chain, whose betas are 1 - abar / abar_next.

    variance: "fixed_small" is beta tilde, "fixed_large" beta, "learned_range" interpolates between their logarithms by
    the network's v (2102.09672 equation 15). No noise in the last row; its variance, by which a classifier moves it, is
    0, the clipped beta tilde, or learned. x0 is clipped to [-x0_max, x0_max] where clip_x0 is True.
    """
    if variance not in ("fixed_small", "fixed_large", "learned_range"):
        raise ValueError(f"variance must be 'fixed_small', 'fixed_large' or 'learned_range', got {variance!r}")
    t, abar, abar_next = _levels(schedule, steps)
    beta = 1 - abar / abar_next
    beta_tilde = beta * (1 - abar_next) / (1 - abar)
    k_x, k_out = named_prediction(prediction).to_x0(np.sqrt(abar), np.sqrt(1 - abar))
    # beta tilde is 0 in the last row, so its logarithm is that of the row before; a single row has only beta
    clipped = np.append(beta_tilde[:-1], beta_tilde[-2] if len(t) > 1 else beta[-1])
    reverse_variance = {
        "fixed_small": beta_tilde,
        "fixed_large": np.append(beta[:-1], clipped[-1]),
        "learned_range": np.ones_like(beta),
    }[variance]
    return StepTable(
        prediction=prediction,
        variance={"fixed_small": "exact", "fixed_large": "fixed_large", "learned_range": "learned"}[variance],
        t=t,
        alpha=np.sqrt(abar),
        sigma=np.sqrt(1 - abar),
        alpha_next=np.sqrt(abar_next),
        sigma_next=np.sqrt(1 - abar_next),
        k_x=k_x,
        k_out=k_out,
        x0_max=_x0_max(clip_x0, x0_max),
        c_x=np.sqrt(1 - beta) * (1 - abar_next) / (1 - abar),
        c_x0=np.sqrt(abar_next) * beta / (1 - abar),
        c_noise=np.append(np.sqrt(reverse_variance[:-1]), 0.0),
        log_beta=np.log(beta),
        log_beta_tilde=np.log(clipped),
        reverse_variance=reverse_variance,
    )


SOLVERS: dict[str, Solver] = {"ddim": ddim, "ddpm": ddpm}
