"""sample() with every solver against the papers' literal loops, and the laws that a table must keep"""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from reference import ddim as paper_ddim
from reference import ddpm as paper_ddpm
from reference import schedule as paper
from reference.guidance import guided
from reference.networks import NULL, mixing, mixing_learned, randomness

import fastdiff
from fastdiff import SOLVERS, DiffusionModel, Schedule, StepTable
from fastdiff.solvers import ddim, ddpm

T = 1000
BETAS = {"linear": paper.linear_betas(T), "cosine": paper.cosine_betas(T)}
SHAPE, LABELS = (2, 4, 4), [3, 0]
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
DDIM_EPS = {"x0": "ddim", "network": functools.partial(ddim, eps="network")}


def a_model(schedule="linear", **options) -> DiffusionModel:
    network = mixing_learned if options.get("variance") == "learned_range" else mixing
    return DiffusionModel(network, schedule, image_shape=SHAPE, null_label=NULL, **options)


def literal(loop, times, x_T, noise, *, schedule="linear", learned=False, **options) -> np.ndarray:
    abars = [paper.abar_at(t, BETAS[schedule]) for t in times]
    network = mixing_learned if learned else mixing
    images = []
    for i, label in enumerate(LABELS):
        predict = guided(network, label, 0.0, null_label=NULL, channels=SHAPE[0])
        images.append(loop.sample(predict, x_T[i].numpy(), noise[:, i].numpy(), times, abars, **options))
    return np.stack(images)


def assert_images(got: torch.Tensor, expected: np.ndarray, atol: float = 1e-10) -> None:
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=atol * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm_is_algorithm_2(variance, prediction, schedule, clip):
    x_T, noise = randomness(12, 2)
    images = fastdiff.sample(
        a_model(schedule, prediction=prediction, variance=variance, clip_x0=clip),
        LABELS,
        steps=12,
        solver="ddpm",
        x_T=x_T,
        noise=noise,
        dtype=torch.float64,
    )
    learned = variance == "learned_range"
    times, options = paper.sections([12], T)[::-1], {"prediction": prediction, "variance": variance, "clip": clip}
    assert_images(images, literal(paper_ddpm, times, x_T, noise, schedule=schedule, learned=learned, **options))


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("eps", sorted(DDIM_EPS))
@pytest.mark.parametrize("eta", [0, 0.3, 1])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_is_equation_12(schedule, prediction, eta, eps, clip):
    x_T, noise = randomness(12, 2)
    images = fastdiff.sample(
        a_model(schedule, prediction=prediction, clip_x0=clip),
        LABELS,
        steps=12,
        solver=DDIM_EPS[eps],
        eta=eta,
        x_T=x_T,
        noise=noise,
        dtype=torch.float64,
    )
    times, options = paper.sections([12], T)[::-1], {"prediction": prediction, "eta": eta, "clip": clip}
    assert_images(images, literal(paper_ddim, times, x_T, noise, schedule=schedule, eps_from=eps, **options))


SPACINGS = {
    "int": (7, paper.sections([7], T)[::-1]),
    "N": ("9", paper.sections([9], T)[::-1]),
    "all": (T, list(range(T))[::-1]),
    "one": (1, [T - 1]),
    "ddimN": ("ddim8", paper.integer_stride(8, T)[::-1]),
    "sections": ("2,3,5", paper.sections([2, 3, 5], T)[::-1]),
    "leading": ("leading:7", paper.leading(7, T)),
    "linspace": ("linspace:7", paper.linspace(7, T)),
    "trailing": ("trailing:8", paper.trailing(8, T)),
    "explicit": ([990, 600, 41, 5], [990, 600, 41, 5]),
    "fractional": ([998.5, 610.25, 40.125, 0.5], [998.5, 610.25, 40.125, 0.5]),
}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_every_spacing_visits_its_own_chain(solver, spacing):
    steps, times = SPACINGS[spacing]
    x_T, noise = randomness(len(times), 2)
    sampler = fastdiff.Sampler(
        a_model("cosine", variance="learned_range"),
        steps=steps,
        solver=solver,
        eta=0.3 if solver == "ddim" else None,
        dtype=torch.float64,
    )
    assert sampler.timesteps == times
    options = {"eta": 0.3} if solver == "ddim" else {"variance": "learned_range"}
    loop = paper_ddim if solver == "ddim" else paper_ddpm
    expected = literal(loop, times, x_T, noise, schedule="cosine", learned=True, **options)
    assert_images(sampler(LABELS, x_T=x_T, noise=noise), expected)


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("solver", [*VARIANCES, "ddim", "ddim eta 0.3", "ddim eps network"])
@pytest.mark.parametrize("steps", [1, 10, 50])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_float32_errs_by_its_conditioning_alone(schedule, steps, solver, clip):
    x_T, noise = randomness(steps, 2)
    times = paper.sections([steps], T)[::-1] if steps > 1 else [T - 1]
    if solver in VARIANCES:
        model, build, eta = a_model(schedule, variance=solver, clip_x0=clip), "ddpm", None
        loop, options = paper_ddpm, {"variance": solver}
        table = ddpm(model.schedule, steps, variance=solver)
    else:
        eps, eta = "network" if "network" in solver else "x0", 0.3 if "0.3" in solver else 0.0
        model, build = a_model(schedule, clip_x0=clip), DDIM_EPS[eps]
        loop, options = paper_ddim, {"eta": eta, "eps_from": eps}
        table = ddim(model.schedule, steps, eps=eps, eta=eta)
    images = fastdiff.sample(model, LABELS, steps=steps, solver=build, eta=eta, x_T=x_T, noise=noise)
    assert images.dtype == torch.float32
    learned = solver == "learned_range"
    expected = literal(loop, times, x_T, noise, schedule=schedule, learned=learned, clip=clip, **options)
    # unclipped, this network drives images to hundreds: the bound is in units of the image
    assert_images(images, expected, max(1e-5, 8 * 2**-24 * np.abs(table.c_x0 * table.k_x).max()))


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("steps", [1, 10, 50, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_is_ddim_with_eta_1(schedule, steps, clip):
    model = a_model(schedule, clip_x0=clip)
    x_T, noise = randomness(steps, 2)
    options = {"steps": steps, "x_T": x_T, "noise": noise, "dtype": torch.float64}
    first = fastdiff.sample(model, LABELS, solver="ddpm", **options)
    second = fastdiff.sample(model, LABELS, solver="ddim", eta=1, **options)
    assert_images(first, second.numpy(), 1e-11)


def test_the_two_eps_conventions_differ_only_where_x0_is_clipped():
    x_T, _ = randomness(20, 2)
    images = {
        (eps, clip): fastdiff.sample(a_model(clip_x0=clip), LABELS, steps=20, solver=solver, x_T=x_T, dtype="float64")
        for eps, solver in DDIM_EPS.items()
        for clip in (True, False)
    }
    assert (images["x0", True] - images["network", True]).abs().max() > 1e-3
    assert_images(images["x0", False], images["network", False].numpy(), 1e-12)


def test_the_clip_of_the_call_goes_before_the_models():
    x_T, _ = randomness(10, 2)
    options = {"steps": 10, "x_T": x_T, "dtype": torch.float64}
    clipped = fastdiff.sample(a_model(clip_x0=False), LABELS, clip_x0=True, **options)
    assert torch.equal(clipped, fastdiff.sample(a_model(clip_x0=True), LABELS, **options))
    assert not torch.equal(clipped, fastdiff.sample(a_model(clip_x0=False), LABELS, **options))
    # the last row of DDIM is its x0
    assert clipped.abs().max() <= 1


def zero_terminal_snr() -> Schedule:
    """Its last beta is 1: x_T holds no signal"""
    return Schedule(np.append(np.array(BETAS["linear"][:-1]), 1.0))


def test_zero_terminal_snr_wants_another_prediction_than_eps():
    with pytest.raises(ValueError, match="alpha = 0"):
        fastdiff.Sampler(a_model(zero_terminal_snr()), steps=10)
    for solver in SOLVERS:
        images = fastdiff.sample(a_model(zero_terminal_snr(), prediction="v"), LABELS, steps=10, solver=solver, seed=0)
        assert torch.isfinite(images).all()


TABLES = {
    "ddim": functools.partial(ddim, eta=0.0),
    "ddim eta 0.3": functools.partial(ddim, eta=0.3),
    "ddim eta 1": functools.partial(ddim, eta=1.0),
    "ddim eps network": functools.partial(ddim, eps="network"),
    **{f"ddpm {variance}": functools.partial(ddpm, variance=variance) for variance in VARIANCES},
}
LAW = r"row \d+ breaks a law of the table"


def a_table(name: str, prediction: str = "eps") -> StepTable:
    return TABLES[name](Schedule.named("linear"), 9, prediction=prediction)


def perturbed(table: StepTable, coefficient: str, row: int, by: float = 1e-3) -> dict:
    values = getattr(table, coefficient).copy()
    values[row] += by
    return {coefficient: values}


@pytest.mark.parametrize(
    "coefficient", ["alpha", "sigma", "alpha_next", "sigma_next", "k_x", "k_out", "c_x", "c_x0", "c_out", "c_noise"]
)
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", TABLES)
def test_a_wrong_coefficient_breaks_a_law(name, prediction, coefficient):
    table = a_table(name, prediction)
    for row in range(len(table)):
        for by in (1e-3, -1e-3):
            with pytest.raises(ValueError, match=LAW):
                dataclasses.replace(table, **perturbed(table, coefficient, row, by))


@pytest.mark.parametrize("row", [0, 4])
def test_the_bounds_of_a_learned_variance_are_laws_too(row):
    table = a_table("ddpm learned_range")
    with pytest.raises(ValueError, match=LAW):
        dataclasses.replace(table, **perturbed(table, "log_beta_tilde", row, -1e-3))
    low = table.log_beta_tilde - 1e-3
    with pytest.raises(ValueError, match="log_beta must be at least log_beta_tilde"):
        dataclasses.replace(table, log_beta=low)


@pytest.mark.parametrize("row", [0, -1], ids=["first", "last"])
def test_the_first_and_the_last_row_have_no_history(row):
    table = a_table("ddim")
    with pytest.raises(ValueError, match="c_hist must be 0 there"):
        dataclasses.replace(table, **perturbed(table, "c_hist", row))


def vectors(table: StepTable) -> dict[str, np.ndarray]:
    return {name: value for name, value in vars(table).items() if isinstance(value, np.ndarray)}


COEFFICIENTS = sorted(vectors(a_table("ddim")).keys() - {"x0_max", "t"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize("name", TABLES)
def test_what_is_not_finite_is_no_coefficient(name, coefficient, value):
    with pytest.raises(ValueError, match=LAW):
        dataclasses.replace(a_table(name), **perturbed(a_table(name), coefficient, 3, value))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_clamp_needs_room(value):
    with pytest.raises(ValueError, match="x0_max > 0"):
        dataclasses.replace(a_table("ddim"), x0_max=[value])


@pytest.mark.parametrize("name", TABLES)
def test_rows_follow_one_another(name):
    table = a_table(name)
    order = [0, 2, 1, *range(3, len(table))]
    rows = {name: values[order] for name, values in vectors(table).items()}
    with pytest.raises(ValueError, match="the next row starts where this one ends"):
        dataclasses.replace(table, **rows)


def test_a_table_that_does_not_end_clean():
    table = a_table("ddim")
    rows = {name: values[:-1] for name, values in vectors(table).items()}
    with pytest.raises(ValueError, match="the last row's alpha_next = 1"):
        StepTable(prediction="eps", **rows)


def test_an_unknown_variance_of_a_table():
    with pytest.raises(ValueError, match="variance must be 'exact', 'learned' or 'fixed_large', got 'small'"):
        dataclasses.replace(a_table("ddim"), variance="small")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_only_and_tells_what_it_is(name):
    table = a_table(name)
    assert len(table) == 9
    assert table.learned == ("learned" in name)
    assert table.stochastic == (name not in ("ddim", "ddim eps network"))
    assert not table.has_history
    assert table.c_noise[-1] == 0
    np.testing.assert_allclose(table.sigma_edm, table.sigma / table.alpha)
    with pytest.raises(ValueError, match="read-only"):
        table.c_x[0] = 1


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), True, "0.5", None], ids=str)
def test_ddim_refuses_an_eta_outside_0_to_1(eta):
    with pytest.raises(ValueError, match=r"eta must be a number in \[0, 1\]"):
        ddim(Schedule.named("linear"), 10, eta=eta)


def test_solver_options_list_their_choices():
    schedule = Schedule.named("linear")
    with pytest.raises(ValueError, match="eps must be 'x0' or 'network', got 'clipped'"):
        ddim(schedule, 10, eps="clipped")
    with pytest.raises(ValueError, match=r"variance must be 'fixed_small', .* got 'tiny'"):
        ddpm(schedule, 10, variance="tiny")


EVERYWHERE, PART = np.ones(9, dtype=bool), np.arange(9) % 3 != 1


@pytest.mark.parametrize("rows", [EVERYWHERE, PART], ids=["everywhere", "interval"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", TABLES)
def test_the_score_form_is_what_a_moved_eps_does(name, prediction, rows):
    """x' of one row for eps - sigma * grad in place of eps, alpha * x0 + sigma * eps = x, unclipped"""
    table = a_table(name, prediction)
    guided = table.with_classifier("score", rows)
    assert guided.classifier_form == "score" and not (guided.k_grad[~rows].any() or guided.c_grad[~rows].any())
    x, eps, grad = np.random.default_rng(0).standard_normal((3, 9))

    def step(of: StepTable, eps: np.ndarray, grad: np.ndarray) -> np.ndarray:
        x0 = (x - of.sigma * eps) / of.alpha
        g = {"eps": eps, "v": of.alpha * eps - of.sigma * x0, "x0": x0}[prediction]
        x0 = of.k_x * x + of.k_out * g + of.k_grad * grad
        return of.c_x * x + of.c_x0 * x0 + of.c_out * g + of.c_grad * grad

    moved = step(table, np.where(rows, eps - table.sigma * grad, eps), 0 * grad)
    np.testing.assert_allclose(step(guided, eps, grad), moved, rtol=0, atol=1e-9)


REVERSE = {"ddim eta 0.3": "eta", "ddim eta 1": "small", "ddpm fixed_small": "small", "ddpm fixed_large": "large"}


@pytest.mark.parametrize("rows", [EVERYWHERE, PART], ids=["everywhere", "interval"])
@pytest.mark.parametrize("name", [*REVERSE, "ddpm learned_range"])
def test_the_mean_form_is_the_variance_of_the_step(name, rows):
    table = a_table(name)
    guided = table.with_classifier("mean", rows)
    beta = 1 - table.alpha**2 / table.alpha_next**2
    beta_tilde = beta * table.sigma_next**2 / table.sigma**2
    expected = {"eta": 0.09 * beta_tilde, "small": beta_tilde, "large": beta}.get(REVERSE.get(name), np.ones(9)).copy()
    if name == "ddpm fixed_large":
        expected[-1] = beta_tilde[-2]
    np.testing.assert_allclose(guided.c_grad, np.where(rows, expected, 0), rtol=1e-12, atol=1e-15)
    assert not guided.k_grad.any()


@pytest.mark.parametrize(("variance", "expected"), [("fixed_large", None), ("learned_range", 1)])
def test_the_mean_form_of_a_single_row(variance, expected):
    """Whose clipped variance is beta"""
    table = ddpm(Schedule.named("linear"), 1, variance=variance).with_classifier("mean", np.ones(1, dtype=bool))
    np.testing.assert_allclose(table.c_grad, [1 - table.alpha[0] ** 2 if expected is None else expected], rtol=1e-12)


def test_the_mean_form_of_rows_without_a_variance_is_refused():
    """The small one of a last row is 0; beside others it is the paper's own"""
    last = ddpm(Schedule.named("linear"), 1)
    with pytest.raises(ValueError, match="'mean' would move no row that is guided"):
        last.with_classifier("mean", np.ones(1, dtype=bool))
    assert not last.with_classifier("mean", np.zeros(1, dtype=bool)).c_grad.any()
    assert last.with_classifier("score", np.ones(1, dtype=bool)).k_grad.all()
    table = ddpm(Schedule.named("linear"), 2)
    with pytest.raises(ValueError, match="'mean' would move no row that is guided"):
        table.with_classifier("mean", np.array([False, True]))
    assert (table.with_classifier("mean", np.ones(2, dtype=bool)).c_grad != 0).tolist() == [True, False]


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "score") for name in TABLES), *((name, "mean") for name in REVERSE)]
)
def test_a_wrong_gradient_breaks_a_law(name, form):
    table = a_table(name).with_classifier(form, PART)
    for coefficient in ("k_grad", "c_grad"):
        for row in range(9):
            with pytest.raises(ValueError, match=f"{LAW}: [kc]_grad of classifier_form='{form}'"):
                dataclasses.replace(table, **perturbed(table, coefficient, row))
            with pytest.raises(ValueError, match=f"{LAW}: {coefficient} of classifier_form=None"):
                dataclasses.replace(a_table(name), **perturbed(a_table(name), coefficient, row))


def test_a_stated_reverse_variance_is_that_of_the_noise():
    table = a_table("ddim eta 0.3")
    stated = dataclasses.replace(table, reverse_variance=table.c_noise**2 + 1e-3 * (np.arange(9) == 8))
    assert stated.with_classifier(None, EVERYWHERE).classifier_form == "mean"
    assert stated.with_classifier(None, EVERYWHERE).c_grad[-1] == pytest.approx(1e-3)
    assert table.with_classifier(None, EVERYWHERE).classifier_form == "score"
    for row in range(8):
        with pytest.raises(ValueError, match=f"row {row} breaks a law of the table: reverse_variance = c_noise"):
            dataclasses.replace(stated, **perturbed(stated, "reverse_variance", row))
    with pytest.raises(ValueError, match=f"{LAW}: reverse_variance >= 0"):
        dataclasses.replace(stated, **perturbed(stated, "reverse_variance", 8, -1))


def test_forms_that_a_solver_cannot_have():
    with pytest.raises(ValueError, match=r"classifier_form must be one of \['score', 'mean'\] or None, got 'eps'"):
        a_table("ddim").with_classifier("eps", EVERYWHERE)
    with pytest.raises(ValueError, match=r"classifier_form='mean' needs a solver that adds noise.*; use 'score'"):
        a_table("ddim").with_classifier("mean", EVERYWHERE)
    pure = ddim(zero_terminal_snr(), 9, prediction="v")
    with pytest.raises(ValueError, match=r"classifier_form='score' needs alpha > 0, .* t = 999; .*guidance_interval"):
        pure.with_classifier("score", EVERYWHERE)
    assert np.isfinite(pure.with_classifier("score", np.arange(9) > 0).k_grad).all()
    assert np.isfinite(ddpm(zero_terminal_snr(), 9, prediction="v").with_classifier(None, EVERYWHERE).c_grad).all()
    learned, out = a_table("ddpm learned_range"), 1e-3 * (np.arange(9) == 4)
    # g = eps is (x - alpha x0) / sigma
    mixed = dataclasses.replace(
        learned,
        c_out=out,
        c_x=learned.c_x - out / learned.sigma,
        c_x0=learned.c_x0 + out * learned.alpha / learned.sigma,
    )
    with pytest.raises(ValueError, match="classifier_form='score' needs c_out = 0 where the variance is learned"):
        mixed.with_classifier("score", EVERYWHERE)
    mixed.with_classifier("score", np.arange(9) != 4)
