"""The variational bound against the papers' formulas, and on Gaussian data, where the best bound is the entropy"""

import itertools
import math

import numpy as np
import pytest
import torch
from reference import schedule as paper
from reference import variational_bound as literal

from fastdiff.images import to_uint8
from fastdiff.prediction import PREDICTIONS, named_prediction
from fastdiff.schedule import Schedule
from fastdiff.solvers import ddpm
from fastdiff.variational_bound import VariationalBound, discretized_gaussian_log_likelihood, normal_kl

T, SHAPE = 1000, (2, 3, 3)
BETAS = {"linear": paper.linear_betas(T), "cosine": paper.cosine_betas(T)}
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
# steps, and the chain's times, ascending
CHAINS = {
    "whole": (None, list(range(T))),
    "ddim25": ("ddim25", paper.integer_stride(25, T)),
    "fractional": ([998.5, 610.25, 40.125, 0.5], [0.5, 40.125, 610.25, 998.5]),
    "one": (1, [T - 1]),
}


def abars_of(chain: str, schedule: str) -> list[float]:
    every = paper.alphas_cumprod(BETAS[schedule])
    return [every[t] if isinstance(t, int) else paper.abar_at(t, BETAS[schedule]) for t in CHAINS[chain][1]]


def inputs(bound: VariationalBound, index: list[int], channels: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x0 of 8-bit pixels with both ends among them, x_t, a network's output that errs, and index, in float64"""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (len(index), *SHAPE))
    pixels[:, 0, 0, :2] = 0, 255
    x0 = torch.from_numpy(pixels / 127.5 - 1)
    eps, wrong, v = (torch.from_numpy(rng.standard_normal(x0.shape)) for _ in range(3))
    which = torch.tensor(index)
    alpha, sigma = bound.alpha.double()[which], bound.sigma.double()[which]
    x_t = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * eps
    target = named_prediction(bound.prediction).training_target(x0, eps, alpha, sigma)
    # at index 0 a few standard deviations off, not dozens
    scale = sigma[:, None, None, None] if bound.prediction == "x0" else 1.0
    return x0, x_t, torch.cat([target + 0.4 * scale * wrong, 0.8 * v], 1)[:, : channels * SHAPE[0]], which


def literal_terms(bound: VariationalBound, abars: list[float], x0, x_t, output, index) -> np.ndarray:
    return np.array(
        [
            literal.term(
                *(part[i].numpy() for part in (x0, x_t, output)),
                int(index[i]),
                abars,
                prediction=bound.prediction,
                variance=bound.variance,
                clip=bound.clip_x0,
            )
            for i in range(len(x0))
        ]
    )


def some_of(rows: int) -> list[int]:
    return sorted({0, min(1, rows - 1), rows // 2, rows - 1})


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("schedule", sorted(BETAS))
@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
@pytest.mark.parametrize("variance", VARIANCES)
def test_every_term_is_the_papers(variance, prediction, schedule, chain, clip):
    steps, times = CHAINS[chain]
    abars = abars_of(chain, schedule)
    options = {"steps": steps, "clip_x0": clip, "dtype": torch.float64}
    bound = VariationalBound(Schedule.named(schedule), prediction, variance, **options)
    assert bound.times.tolist() == times and len(bound) == len(times)
    x0, x_t, output, index = inputs(bound, some_of(len(bound)))
    expected = literal_terms(bound, abars, x0, x_t, output, index)
    got = bound.terms(x0, x_t, output, index)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(
        bound.prior(x0).numpy(), [literal.prior(image.numpy(), abars[-1]) for image in x0], rtol=1e-8, atol=1e-14
    )


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("chain", ["whole", "ddim25"])
@pytest.mark.parametrize("schedule", sorted(BETAS))
@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
@pytest.mark.parametrize("variance", VARIANCES)
def test_float32_errs_by_its_conditioning_alone(variance, prediction, schedule, chain, clip):
    steps, abars = CHAINS[chain][0], abars_of(chain, schedule)
    bound = VariationalBound(Schedule.named(schedule), prediction, variance, steps=steps, clip_x0=clip)
    narrow = [part.float() if part.is_floating_point() else part for part in inputs(bound, some_of(len(bound)))]
    got = bound.terms(*narrow)
    assert got.dtype == torch.float32
    # rounded inputs are the question's, not the answer's
    wide = [part.double() if part.is_floating_point() else part for part in narrow]
    expected = literal_terms(bound, abars, *wide)
    table = ddpm(Schedule.named(schedule), steps or T, prediction=prediction)
    atol = max(1e-5, 8 * 2**-24 * np.abs(table.c_x0 * table.k_x).max())
    assert (np.abs(got.double().numpy() - expected) <= atol * np.maximum(1, expected)).all()
    prior = [literal.prior(image.numpy(), abars[-1]) for image in wide[0]]
    np.testing.assert_allclose(bound.prior(narrow[0]).double().numpy(), prior, rtol=1e-5)


def test_the_first_term_is_about_the_pixels_to_which_x0_rounds():
    bound = VariationalBound(Schedule.named("linear"), "eps", "fixed_small", clip_x0=False, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(4, 1, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    x0[0, 0, 0, :4] = torch.tensor([-1.0, -0.998, 0.998, 1.0])
    x_t, output = (torch.randn(x0.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x_t = x0 + 0.01 * x_t
    rounded = to_uint8(x0).movedim(-1, 1).double() / 127.5 - 1
    first, last = torch.zeros(4, dtype=torch.int64), torch.full((4,), 999)
    assert torch.equal(bound.terms(x0, x_t, output, first), bound.terms(rounded, x_t, output, first))
    assert not torch.equal(bound.terms(x0, x_t, output, last), bound.terms(rounded, x_t, output, last))


def test_a_pixel_s_256_masses_sum_to_1():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in itertools.product((-1.2, -1.0, 0.3, 0.9), (0.002, 0.01, 0.3)):
        log_mass = discretized_gaussian_log_likelihood(
            levels, torch.tensor(mean, dtype=torch.float64), torch.tensor(2 * math.log(std), dtype=torch.float64)
        )
        assert float(log_mass.exp().sum()) == pytest.approx(1, abs=256e-12 + 1e-12)


def test_a_pixel_s_mass_is_the_gaussian_s():
    """The tanh stands in for erf to 1.8e-4, twice"""
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, std = 0.1, 0.2
    edges = [0.5 * math.erfc(-(float(x) + 1 / 255 - mean) / (std * math.sqrt(2))) for x in levels[:-1]]
    expected = np.diff([0.0, *edges, 1.0])
    got = discretized_gaussian_log_likelihood(levels, torch.tensor(mean), torch.tensor(2 * math.log(std))).exp()
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=3.6e-4)


@pytest.mark.parametrize("sign", [-1, 1])
def test_small_masses_keep_their_digits_in_float32(sign):
    """Six standard deviations off, where 1 - 1e-9 is 1 in float32"""
    x, mean, log_variance = torch.tensor([sign * 100 / 127.5]), torch.tensor([sign * 0.05]), torch.tensor([-4.2])
    wide = discretized_gaussian_log_likelihood(x.double(), mean.double(), log_variance.double())
    assert -27 < float(wide) < -20
    narrow = discretized_gaussian_log_likelihood(x, mean, log_variance)
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=0)


def test_normal_kl_broadcasts_and_vanishes_where_equal():
    mean, log_variance = torch.randn(3, 1), torch.randn(3, 1)
    assert not normal_kl(mean, log_variance, mean, log_variance).any()
    other = torch.randn(4)
    got = normal_kl(mean.double(), log_variance.double(), other.double(), torch.zeros(1).double())
    assert got.shape == (3, 4)
    for i, j in itertools.product(range(3), range(4)):
        expected = literal.kl(float(mean[i]), math.exp(log_variance[i]), float(other[j]), 1.0)
        assert float(got[i, j]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_reverse_step_is_the_sampler_s(variance):
    """Mean and noise of the ancestral table, which test_solvers holds to algorithm 2; it adds no noise at index 0"""
    schedule, steps = Schedule.named("linear"), 12
    bound = VariationalBound(schedule, "eps", variance, steps=steps, clip_x0=True, dtype=torch.float64)
    table = ddpm(schedule, steps, variance=variance, clip_x0=True)
    _, x_t, output, index = inputs(bound, list(range(steps)))
    mean, log_variance = bound.reverse(x_t, output, index)
    for i in range(steps):
        row = steps - 1 - i
        g, v = output[i, :2], output[i, 2:]
        x0 = (table.k_x[row] * x_t[i] + table.k_out[row] * g).clamp(-1, 1)
        torch.testing.assert_close(mean[i], table.c_x[row] * x_t[i] + table.c_x0[row] * x0, rtol=0, atol=1e-12)
        if i > 0:
            f = (v + 1) / 2
            scale = f * table.log_beta[row] + (1 - f) * table.log_beta_tilde[row] if variance == "learned_range" else 0
            expected = 2 * math.log(table.c_noise[row]) + scale + torch.zeros(SHAPE, dtype=torch.float64)
            torch.testing.assert_close(log_variance[i], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("index", [[0], [1], [T - 1], [0, 400]], ids=str)
@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
def test_gradients(prediction, index):
    bound = VariationalBound(Schedule.named("linear"), prediction, "learned_range", clip_x0=False, dtype=torch.float64)
    x0, x_t, output, which = inputs(bound, index)
    assert torch.autograd.gradcheck(
        lambda x_t, output: bound.terms(x0, x_t, output, which), (x_t.requires_grad_(), output.requires_grad_())
    )


def test_the_fixed_variances_ignore_a_second_half():
    for variance in ("fixed_small", "fixed_large"):
        bound = VariationalBound(Schedule.named("linear"), "eps", variance, clip_x0=True)
        x0, x_t, output, index = inputs(bound, [0, 7])
        expected = bound.terms(x0, x_t, output[:, :2], index)
        assert torch.equal(bound.terms(x0, x_t, output, index), expected)


@pytest.mark.parametrize("which", ["g", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_an_image_does_not_take_spoils_no_gradient(dtype, which):
    """At index 0 the KL overflows and the discretised mass does not"""
    bound = VariationalBound(Schedule.named("linear"), "eps", "learned_range", clip_x0=False, dtype=dtype)
    x0, x_t, output, index = inputs(bound, [0, 1, 600])
    # the square of a prediction, or of 1 / std, past the dtype's largest
    if which == "g":
        output[0, :2] = 1e25 if dtype == torch.float32 else 1e200
    else:
        output[0, 2:] = -400.0 if dtype == torch.float32 else -4000.0
    given = output.to(dtype).requires_grad_()
    terms = bound.terms(x0.to(dtype), x_t.to(dtype), given, index)
    (gradient,) = torch.autograd.grad(terms.sum(), given)
    assert torch.isfinite(terms).all() and torch.isfinite(gradient).all()
    assert gradient[1:].any()


def test_nan_stays_in_its_image():
    bound = VariationalBound(Schedule.named("linear"), "v", "learned_range", clip_x0=True, dtype=torch.float64)
    x0, x_t, output, index = inputs(bound, [0, 5, 999])
    expected = bound.terms(x0, x_t, output, index)
    spoilt = output.clone()
    spoilt[1, 3, 1, 1] = torch.nan
    got = bound.terms(x0, x_t, spoilt, index)
    assert torch.isnan(got).tolist() == [False, True, False]
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


def test_half_precision_outputs_are_widened():
    bound = VariationalBound(Schedule.named("linear"), "eps", "learned_range", clip_x0=True)
    x0, x_t, output, index = inputs(bound, [0, 5, 999])
    half = output.bfloat16()
    got = bound.terms(x0.float(), x_t.float(), half, index)
    assert got.dtype == torch.float32
    assert torch.equal(got, bound.terms(x0.float(), x_t.float(), half.float(), index))


def test_no_value_reaches_the_host():
    """On the meta device there are no values, so any read of one raises"""
    bound = VariationalBound(Schedule.named("linear"), "v", "learned_range", clip_x0=True, device="meta")
    x = torch.empty(4, *SHAPE, device="meta")
    index = torch.zeros(4, dtype=torch.int64, device="meta")
    assert bound.terms(x, x, torch.cat([x, x], 1), index).shape == (4,)
    assert bound.prior(x).shape == (4,)


# Gaussian data: independent pixels, whose exact network, bound and reverse variance are known in closed form.
MU = torch.tensor([0.5, -0.3, 0.1, 0.8], dtype=torch.float64).view(1, 2, 2)
DATA_VARIANCE = torch.tensor([0.05, 0.2, 0.5, 0.9], dtype=torch.float64).view(1, 2, 2)
# 9 points whose weighted mean is the expectation of any quadratic over x0 and eps
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(3)
POINTS = torch.tensor([[a, b] for a in NODES for b in NODES], dtype=torch.float64)
POINT_WEIGHTS = torch.tensor([a * b for a in WEIGHTS for b in WEIGHTS], dtype=torch.float64) / (2 * math.pi)


def gaussian_inputs(bound: VariationalBound, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x0 and x_t (9, 1, 2, 2) at the points, and the exact network's output"""
    alpha, sigma = bound.alpha[i], bound.sigma[i]
    x0 = MU + DATA_VARIANCE.sqrt() * POINTS[:, 0, None, None, None]
    x_t = alpha * x0 + sigma * POINTS[:, 1, None, None, None]
    eps = sigma * (x_t - alpha * MU) / (alpha**2 * DATA_VARIANCE + sigma**2)
    g_x0, g_eps = named_prediction(bound.prediction).target(np.array(float(alpha)), np.array(float(sigma)))
    return x0, x_t, float(g_x0) * (x_t - sigma * eps) / alpha + float(g_eps) * eps


def exact_reverse_variance(bound: VariationalBound, i: int) -> torch.Tensor:
    """Of x_{i-1} given x_i, (1, 2, 2), from the marginals' regression: no coefficient of the bound"""
    abar = bound.alpha[i] ** 2
    abar_prev = bound.alpha[i - 1] ** 2 if i > 0 else torch.ones(())
    before = abar_prev * DATA_VARIANCE + 1 - abar_prev
    now = abar * DATA_VARIANCE + 1 - abar
    return before - (abar / abar_prev) * before**2 / now


def v_of(bound: VariationalBound, i: int, variance: torch.Tensor) -> torch.Tensor:
    """The output that learned_range turns into a variance, (9, 1, 2, 2)"""
    probe = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    index = torch.full((2,), i)
    low, high = bound.reverse(probe, torch.cat([probe, probe], 1), index)[1]
    return (2 * (variance.log() - low) / (high - low) - 1).expand(9, 1, 2, 2)


def expected_bound(bound: VariationalBound) -> float:
    """Bits per dimension of the whole chain in expectation; at index 0 the density of N(E[x0 | x_0], Var[x0 | x_0])"""
    total = float(POINT_WEIGHTS @ bound.prior(gaussian_inputs(bound, 0)[0]))
    for i in range(len(bound)):
        x0, x_t, output = gaussian_inputs(bound, i)
        variance, index = exact_reverse_variance(bound, i), torch.full((9,), i)
        if i == 0:
            mean = bound.predicted_x0(x_t, torch.cat([output, output], 1), index)
            nats = 0.5 * ((2 * math.pi * variance).log() + (x0 - mean) ** 2 / variance)
            total += float(POINT_WEIGHTS @ nats.flatten(1).mean(1)) / math.log(2)
        else:
            both = torch.cat([output, v_of(bound, i, variance)], 1) if bound.variance == "learned_range" else output
            total += float(POINT_WEIGHTS @ bound.terms(x0, x_t, both, index))
    return total


def entropy_and_prior(bound: VariationalBound) -> tuple[float, float]:
    """Entropy of the data, and KL(q(x_T) || N(0, I)) of the marginal, in bits per dimension"""
    entropy = 0.5 * (2 * math.pi * math.e * DATA_VARIANCE).log().mean() / math.log(2)
    abar = float(bound.alpha[-1] ** 2)
    marginal = abar * DATA_VARIANCE + 1 - abar
    kl = 0.5 * (marginal + abar * MU**2 - 1 - marginal.log()).mean() / math.log(2)
    return float(entropy), float(kl)


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
def test_the_exact_variance_reaches_the_entropy_at_any_number_of_steps(prediction):
    """x_{i-1} given x_i is Gaussian here, so nothing is lost but what N(0, I) misses of x_T"""
    for steps in (2, 10, 100):
        bound = VariationalBound(
            Schedule.named("linear"), prediction, "learned_range", steps=steps, clip_x0=False, dtype=torch.float64
        )
        assert expected_bound(bound) == pytest.approx(sum(entropy_and_prior(bound)), abs=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_fixed_variance_nears_the_entropy_from_above_as_the_chain_grows(variance):
    """At first order, where the chain's levels are uniform in log-SNR"""
    gaps = []
    for levels in (50, 100, 200, 400):
        abar = 1 / (1 + np.exp(np.linspace(-8, 8, levels)))
        chain = Schedule(1 - abar / np.append(1, abar[:-1]))
        bound = VariationalBound(chain, "v", variance, clip_x0=False, dtype=torch.float64)
        gaps.append(expected_bound(bound) - sum(entropy_and_prior(bound)))
    assert gaps[-1] > 1e-3
    for coarse, fine in itertools.pairwise(gaps):
        assert 0.45 < fine / coarse < 0.52


def test_the_discretised_first_term_is_the_density_s_where_bins_are_small():
    """A bin of 2/255 turns a density into a mass: 6.99 bits a dimension more"""
    options = {"steps": "trailing:10", "clip_x0": False, "dtype": torch.float64}
    bound = VariationalBound(Schedule.named("linear"), "v", "fixed_small", **options)
    rng = np.random.default_rng(0)
    x0 = torch.from_numpy(rng.integers(60, 190, (64, *SHAPE)) / 127.5 - 1)
    # within two standard deviations, where the tanh is close to erf
    eps = torch.from_numpy(rng.uniform(-2, 2, x0.shape))
    index = torch.zeros(64, dtype=torch.int64)
    log_variance = bound.reverse(x0, x0, index)[1]
    assert float(log_variance.max()) > 2 * math.log(20 / 255)
    x_t = bound.alpha[0] * x0 + bound.sigma[0] * eps
    # v such that the predicted x0 is eps standard deviations off
    output = (bound.alpha[0] * x_t - x0 - eps * torch.exp(0.5 * log_variance)) / bound.sigma[0]
    density = 0.5 * (math.log(2 * math.pi) + log_variance + eps**2)
    difference = bound.terms(x0, x_t, output, index) - density.flatten(1).mean(1) / math.log(2)
    np.testing.assert_allclose(difference.numpy(), math.log2(255 / 2), rtol=0, atol=0.01)


@pytest.mark.parametrize("i", [1, 2, 5, 9])
def test_the_best_learned_variance_is_the_posterior_s(i):
    """Descent on v alone ends at the variance of x_{i-1} given x_i"""
    bound = VariationalBound(
        Schedule.named("linear"), "v", "learned_range", steps=10, clip_x0=False, dtype=torch.float64
    )
    x0, x_t, output = gaussian_inputs(bound, i)
    v, index = torch.zeros(1, 1, 2, 2, dtype=torch.float64, requires_grad=True), torch.full((9,), i)
    descent = torch.optim.LBFGS(
        [v], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        descent.zero_grad()
        value = POINT_WEIGHTS @ bound.terms(x0, x_t, torch.cat([output, v.expand_as(output)], 1), index)
        value.backward()
        return value

    descent.step(loss)
    found = bound.reverse(x_t, torch.cat([output, v.expand_as(output)], 1), index)[1][0].detach().exp()
    torch.testing.assert_close(found, exact_reverse_variance(bound, i), rtol=1e-5, atol=0)


def arguments(**changes):
    return {
        "schedule": Schedule.named("linear"),
        "prediction": "eps",
        "variance": "fixed_small",
        "clip_x0": True,
    } | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(schedule="linear"), TypeError, "schedule must be a Schedule, got str; use Schedule.named"),
        (dict(prediction="score"), ValueError, "prediction must be one of .*got 'score'"),
        (dict(variance="learned"), ValueError, "variance must be 'fixed_small', 'fixed_large' or .*got 'learned'"),
        (dict(steps=0), ValueError, "steps must be in"),
        (dict(clip_x0=None), TypeError, "clip_x0 must be True or False, got None"),
        (dict(dtype=torch.bfloat16), TypeError, "dtype must be torch.float32 or torch.float64, got torch.bfloat16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bound_that_cannot_be_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        VariationalBound(**arguments(**changes))


X, ONE = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("variance", "given", "error", "message"),
    [
        ("fixed_small", (X[:1], X, X, ONE), ValueError, r"x0 must have the shape of x_t, \(2, 3, 4, 4\)"),
        ("fixed_small", (X[0], X[0], X[0], ONE), ValueError, r"x_t must be \(B, C, H, W\), got shape \(3, 4, 4\)"),
        ("fixed_small", (X, X, X[:, :2], ONE), ValueError, r"output must .*\(2, 3, 4, 4\) or \(2, 6, 4, 4\)"),
        ("learned_range", (X, X, X, ONE), ValueError, r"output must have shape \(2, 6, 4, 4\) .*got \(2, 3, 4, 4\)"),
        ("fixed_small", (X, X, X, ONE.int()), TypeError, "index must be int64, got torch.int32"),
        ("fixed_small", (X, X, X, ONE[:1]), ValueError, r"index must have shape \(2,\), one an image, got \(1,\)"),
    ],
    ids=["x0", "x_t", "output", "learned output", "index dtype", "index"],
)
def test_inputs_that_do_not_fit_are_named(variance, given, error, message):
    with pytest.raises(error, match=message):
        VariationalBound(**arguments(variance=variance)).terms(*given)
