"""A Gaussian data set, whose network is known exactly: every solver reaches its mean and covariance

For x0 ~ N(mu, Sigma) the exact network is eps(x, t) = sigma (alpha^2 Sigma + sigma^2 I)^-1 (x - alpha mu), so an
unclipped sampler is an affine map of x_T and the noise. Pushing zero and every basis vector through sample() gives that
map, and with it the mean and covariance of the samples without Monte Carlo error; what is left is the discretisation.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from reference import ddim as paper_ddim
from reference import schedule as paper

import fastdiff
from fastdiff import SOLVERS, DiffusionModel, Schedule, StepTable
from fastdiff.schedule import timesteps
from fastdiff.solvers import ddim

T, SHAPE, D = 1000, (1, 2, 2), 4
BETAS = paper.linear_betas(T)
ABAR = np.array(paper.alphas_cumprod(BETAS))
LOG_SNR = np.log(ABAR / (1 - ABAR))
MU = np.array([0.5, -0.3, 0.1, 0.8])
# neighbouring pixels agree, opposite ones do not
SIGMA = 0.4 * np.array([[1.0, 0.6, 0.5, -0.2], [0.6, 1.2, 0.1, 0.0], [0.5, 0.1, 0.9, 0.3], [-0.2, 0.0, 0.3, 0.7]])
EIGENVALUES, EIGENVECTORS = np.linalg.eigh(SIGMA)


def levels(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma at t (B,), as (B, 1)"""
    log_snr = np.interp(t.double().numpy(), np.arange(T), LOG_SNR)
    abar = torch.from_numpy(1 / (1 + np.exp(-log_snr)))[:, None]
    return abar.sqrt(), (1 - abar).sqrt()


def exact_network(prediction: str = "eps", v: float | None = None):
    vectors, values, mu = (torch.from_numpy(a) for a in (EIGENVECTORS, EIGENVALUES, MU))

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        alpha, sigma = levels(t)
        flat = x.double().flatten(1)
        eps = sigma * (((flat - alpha * mu) @ vectors) / (alpha**2 * values + sigma**2)) @ vectors.T
        x0 = (flat - sigma * eps) / alpha
        g = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[prediction].reshape(x.shape).to(x.dtype)
        return g if v is None else torch.cat([g, torch.full_like(g, v)], dim=1)

    return network


def a_model(prediction: str = "eps", variance: str = "fixed_small", v: float | None = None) -> DiffusionModel:
    return DiffusionModel(
        exact_network(prediction, v),
        "linear",
        prediction,
        variance,
        num_classes=None,
        null_label=None,
        image_shape=SHAPE,
        clip_x0=False,
    )


def affine_map(sampler: fastdiff.Sampler) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """offset (D,), A (D, D) and B (rows * D, D): the samples are offset + x_T @ A + noise @ B"""
    rows, stochastic = len(sampler.timesteps), sampler.table.stochastic
    n = 1 + D + (rows * D if stochastic else 0)
    x_T = torch.zeros(n, D, dtype=torch.float64)
    x_T[1 : 1 + D] = torch.eye(D)
    noise = torch.zeros(rows, n, D, dtype=torch.float64)
    if stochastic:
        noise[:, 1 + D :] = torch.eye(rows * D, dtype=torch.float64).reshape(rows * D, rows, D).transpose(0, 1)
    images = sampler(x_T=x_T.reshape(n, *SHAPE), noise=noise.reshape(rows, n, *SHAPE)).reshape(n, D).numpy()
    return images[0], images[1 : 1 + D] - images[0], images[1 + D :] - images[0]


def moments(sampler: fastdiff.Sampler, mean: np.ndarray, cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of the samples, for x_T ~ N(mean, cov)"""
    offset, from_x_T, from_noise = affine_map(sampler)
    return offset + mean @ from_x_T, from_x_T.T @ cov @ from_x_T + from_noise.T @ from_noise


def marginal(t: int) -> tuple[np.ndarray, np.ndarray]:
    return math.sqrt(ABAR[t]) * MU, ABAR[t] * SIGMA + (1 - ABAR[t]) * np.eye(D)


DDPM, LEARNED = {"solver": "ddpm"}, {"variance": "learned_range"}
# the model, the solver, and C such that the covariance is within C / steps of the data's
CASES = {
    "ddim": (a_model(), {"solver": "ddim"}, 2.5),
    "ddim v": (a_model("v"), {"solver": "ddim"}, 2.5),
    "ddim x0": (a_model("x0"), {"solver": "ddim"}, 2.5),
    "ddim eps network": (a_model(), {"solver": functools.partial(ddim, eps="network")}, 2.5),
    "ddim eta 0.3": (a_model(), {"solver": "ddim", "eta": 0.3}, 2.6),
    "ddim eta 1": (a_model(), {"solver": "ddim", "eta": 1}, 5.5),
    "ddpm fixed_small": (a_model(), DDPM, 5.5),
    "ddpm fixed_small v": (a_model("v"), DDPM, 5.5),
    "ddpm fixed_large": (a_model(variance="fixed_large"), DDPM, 1.0),
    "ddpm learned, low": (a_model(**LEARNED, v=-1.0), DDPM, 5.5),
    "ddpm learned, middle": (a_model(**LEARNED, v=0.0), DDPM, 2.6),
    "ddpm learned, high": (a_model(**LEARNED, v=1.0), DDPM, 1.0),
}


def test_every_solver_meets_the_gaussian():
    assert {name.split()[0] for name in CASES} == set(SOLVERS)


@pytest.mark.parametrize("case", CASES)
def test_mean_and_covariance_within_the_discretisation_error(case):
    """From the exact marginal at T - 1 the mean is exact, and the covariance errs by C / steps, at first order"""
    model, options, C = CASES[case]
    errors = []
    for steps in (25, 50, 100, 200):
        sampler = fastdiff.Sampler(model, steps=steps, dtype=torch.float64, **options)
        mean, cov = moments(sampler, *marginal(T - 1))
        np.testing.assert_allclose(mean, MU, rtol=0, atol=1e-10)
        errors.append(np.abs(cov - SIGMA).max())
        assert errors[-1] < C / steps
    for coarse, fine in itertools.pairwise(errors):
        assert 0.45 < fine / coarse < 0.62


@pytest.mark.parametrize("case", CASES)
def test_standard_normal_x_T_misses_the_signal_that_is_left_at_T(case):
    """abar at T - 1 is 4e-5, so x_T ~ N(0, I) lacks alpha_T = 0.0064 of the mean and no more"""
    model, options, C = CASES[case]
    sampler = fastdiff.Sampler(model, steps=100, dtype=torch.float64, **options)
    mean, cov = moments(sampler, np.zeros(D), np.eye(D))
    assert np.abs(mean - MU).max() < math.sqrt(ABAR[-1]) * np.abs(MU).max()
    assert np.abs(cov - SIGMA).max() < C / 100 + 1e-4


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_samples_from_seeds_have_the_moments_of_the_map(solver):
    """4000 samples of counter-based noise, within five standard errors of what unit noise gives exactly"""
    options = {"steps": 20, "solver": solver} | ({"eta": 0.5} if solver == "ddim" else {})
    mean, cov = moments(fastdiff.Sampler(a_model(), dtype=torch.float64, **options), np.zeros(D), np.eye(D))
    n = 4000
    samples = fastdiff.sample(a_model(), num_images=n, seed=0, **options).double().reshape(n, D).numpy()
    variance = np.diag(cov)
    assert (np.abs(samples.mean(0) - mean) < 5 * np.sqrt(variance / n)).all()
    standard_error = np.sqrt((np.outer(variance, variance) + cov**2) / n)
    assert (np.abs(np.cov(samples.T) - cov) < 5 * standard_error).all()


def posterior_mean_after_exact_flow(x_T: np.ndarray) -> np.ndarray:
    """The probability-flow ODE from T - 1 to 0 keeps (x - alpha mu) / std in every eigendirection; then E[x0 | x_0]"""
    std = [np.sqrt(ABAR[t] * EIGENVALUES + 1 - ABAR[t]) for t in (T - 1, 0)]
    z = (x_T - math.sqrt(ABAR[-1]) * MU) @ EIGENVECTORS / std[0] * std[1]
    return MU + z * math.sqrt(ABAR[0]) * EIGENVALUES / std[1] ** 2 @ EIGENVECTORS.T


def uniform_log_snr(steps: int) -> list[float]:
    """Fractional times on a uniform log-SNR grid from T - 1 to 0"""
    grid = np.linspace(LOG_SNR[-1], LOG_SNR[0], steps)
    times = np.interp(grid, LOG_SNR[::-1], np.arange(T)[::-1].astype(float))
    times[0], times[-1] = T - 1, 0
    return times.tolist()


def dpm_solver_pp_2m(schedule: Schedule, steps, *, prediction: str, clip_x0: bool) -> StepTable:
    """DPM-Solver++(2M) (2211.01095 algorithm 2) by hand: the history is the x0 of the row before"""
    assert prediction == "eps" and not clip_x0
    t = timesteps(steps, schedule.num_train_timesteps)
    alpha, sigma = schedule.alpha_sigma(t)
    alpha_next, sigma_next = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    half_log_snr = np.log(alpha / sigma)
    h = np.append(np.diff(half_log_snr), np.inf)
    r = np.append(np.nan, h[:-1]) / h
    second = np.zeros(len(t))
    second[1:-1] = 1 / (2 * r[1:-1])
    gain = alpha_next * -np.expm1(-h)
    return StepTable(
        prediction=prediction,
        t=t,
        alpha=alpha,
        sigma=sigma,
        alpha_next=alpha_next,
        sigma_next=sigma_next,
        k_x=1 / alpha,
        k_out=-sigma / alpha,
        x0_max=np.full(len(t), np.inf),
        c_x=sigma_next / sigma,
        c_x0=gain * (1 + second),
        c_hist=-gain * second,
        h_x0=np.ones(len(t)),
    )


def flow_error(solver, steps: int) -> float:
    x_T = np.random.default_rng(0).standard_normal((6, D))
    images = fastdiff.sample(
        a_model(),
        x_T=torch.from_numpy(x_T).reshape(6, *SHAPE),
        steps=uniform_log_snr(steps),
        solver=solver,
        dtype=torch.float64,
    )
    return float(np.abs(images.reshape(6, D).numpy() - posterior_mean_after_exact_flow(x_T)).max())


@pytest.mark.parametrize(
    ("solver", "low", "high"), [("ddim", 0.95, 1.1), (dpm_solver_pp_2m, 1.85, 2.1)], ids=["ddim", "history"]
)
def test_measured_order_on_a_uniform_log_snr_grid(solver, low, high):
    """Against the exact flow: DDIM is first order, a table with history second"""
    errors = [flow_error(solver, steps) for steps in (20, 40, 80, 160)]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(low < order < high for order in orders), orders


def test_history_does_not_outlive_its_call():
    sampler = fastdiff.Sampler(a_model(), steps=uniform_log_snr(12), solver=dpm_solver_pp_2m, dtype=torch.float64)
    assert sampler.table.has_history
    first = sampler(num_images=3, seed=1)
    exact, largest = sampler.model.network, []

    def watched(x, t, y):
        largest.append(float(next(iter(sampler._steps.values())).hist.abs().max()))
        return exact(x, t, y)

    sampler.model.network = watched
    assert torch.equal(sampler(num_images=3, seed=1), first)
    assert largest[0] == 0 and min(largest[1:]) > 0
    torch.testing.assert_close(sampler(num_images=5, seed=1)[:3], first, rtol=0, atol=1e-12)


@pytest.mark.parametrize("row", [1, 6, 10])
def test_a_wrong_history_breaks_a_law(row):
    table = dpm_solver_pp_2m(Schedule.named("linear"), 12, prediction="eps", clip_x0=False)
    for name in ("c_hist", "h_x0", "h_x"):
        values = getattr(table, name).copy()
        values[row - (name != "c_hist")] += 1e-3
        with pytest.raises(ValueError, match="breaks a law of the table"):
            dataclasses.replace(table, **{name: values})


def test_encoding_by_small_steps_and_decoding_gives_the_image_back():
    """The ODE upward, then sample() downward; explicit steps upward make the round trip first order"""
    images = MU + np.random.default_rng(3).standard_normal((4, D)) @ np.linalg.cholesky(SIGMA).T
    network = exact_network()

    def predict(x: np.ndarray, t: float) -> np.ndarray:
        return network(torch.from_numpy(x)[None], torch.tensor([t]), None)[0].numpy()

    errors = []
    for steps in (250, 500, 1000):
        times = paper.sections([steps], T)[::-1]
        x_T = [paper_ddim.encode(predict, image.reshape(SHAPE), times, ABAR[times].tolist()) for image in images]
        decoded = fastdiff.sample(a_model(), x_T=torch.from_numpy(np.stack(x_T)), steps=steps, dtype=torch.float64)
        errors.append(np.abs(decoded.reshape(4, D).numpy() - images).max())
    assert errors[-1] < 5e-3
    assert errors[2] < 0.6 * errors[1] < 0.4 * errors[0]
