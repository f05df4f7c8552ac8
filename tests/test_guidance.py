"""Classifier-free guidance in sample(): the paper's equation 6, the order of images, the interval, w = 0 and w = -1"""

import functools
import math

import numpy as np
import pytest
import torch
from reference import ddim as paper_ddim
from reference import ddpm as paper_ddpm
from reference import schedule as paper
from reference.guidance import guided
from reference.networks import NULL, Recorder, mixing, mixing_learned, randomness

import fastdiff
from fastdiff import DiffusionModel, Schedule
from fastdiff.guidance import guided_rows, plan_guidance, resolve_labels, resolve_w
from fastdiff.solvers import ddim

SHAPE, STEPS = (2, 4, 4), 8
BETAS = paper.linear_betas(1000)
TIMES = paper.sections([STEPS], 1000)[::-1]
ABARS = [paper.abar_at(t, BETAS) for t in TIMES]
SIGMA_EDM = [math.sqrt((1 - abar) / abar) for abar in ABARS]
LABELS = [3, 0, 9, 3, 7]
WEIGHTS = {
    "scalar 1.5": 1.5,
    "scalar -0.4": -0.4,
    "scalar -1": -1.0,
    "per image": [0.0, 1.5, -1.0, 4.0, -0.5],
    "guided last": [0.0, 0.0, -1.0, 0.0, 2.0],
}
INTERVALS = {"everywhere": None, "interval": (0.2, 3.0), "no row": (1e-5, 2e-5)}
SOLVER = {
    "ddim": (paper_ddim, {}, {"solver": "ddim"}),
    "ddim eta 0.3": (paper_ddim, {"eta": 0.3}, {"solver": "ddim", "eta": 0.3}),
    "ddim eps network": (paper_ddim, {"eps_from": "network"}, {"solver": functools.partial(ddim, eps="network")}),
    "ddpm": (paper_ddpm, {"variance": "learned_range"}, {"solver": "ddpm"}),
}


def a_model(network=mixing, **options) -> DiffusionModel:
    return DiffusionModel(network, "linear", **{"image_shape": SHAPE, "null_label": NULL} | options)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("solver", SOLVER)
def test_guided_sampling_is_the_literal_loop(solver, weights, interval, prediction):
    loop, options, ours = SOLVER[solver]
    x_T, noise = randomness(STEPS, len(LABELS))
    images = fastdiff.sample(
        a_model(mixing_learned, variance="learned_range", prediction=prediction),
        LABELS,
        WEIGHTS[weights],
        steps=STEPS,
        guidance_interval=INTERVALS[interval],
        x_T=x_T,
        noise=noise,
        dtype=torch.float64,
        **ours,
    )
    for i, (label, w) in enumerate(zip(LABELS, np.broadcast_to(WEIGHTS[weights], len(LABELS)), strict=True)):
        predict = guided(
            mixing_learned,
            label,
            float(w),
            null_label=NULL,
            channels=SHAPE[0],
            interval=INTERVALS[interval],
            betas=BETAS,
        )
        expected = loop.sample(
            predict, x_T[i].numpy(), noise[:, i].numpy(), TIMES, ABARS, prediction=prediction, **options
        )
        np.testing.assert_allclose(images[i].numpy(), expected, rtol=0, atol=1e-10)


def test_w_zero_is_bitwise_the_conditional_model_and_runs_no_null_row():
    with_null, without = Recorder(), Recorder()
    options = {"steps": STEPS, "seed": 5, "dtype": torch.float32}
    images = fastdiff.sample(a_model(with_null), LABELS, 0.0, **options)
    conditional = fastdiff.sample(a_model(without, null_label=None), LABELS, **options)
    assert torch.equal(images, conditional)
    assert with_null.batches == [len(LABELS)] * STEPS
    assert all(y == LABELS for y in with_null.y)


@pytest.mark.parametrize("label", [0, 9])
def test_w_minus_1_is_bitwise_no_label_in_one_evaluation(label):
    network = Recorder()
    options = {"num_images": 3, "steps": STEPS, "seed": 5, "guidance_interval": (0.1, 2.0)}
    images = fastdiff.sample(a_model(network), label, -1.0, **options)
    assert torch.equal(images, fastdiff.sample(a_model(network), None, **options))
    assert torch.equal(images, fastdiff.sample(a_model(network), None, -1, **options))
    assert network.batches == [3] * STEPS * 3
    assert all(y == [NULL] * 3 for y in network.y)


def test_only_guided_images_have_null_rows_and_they_come_first():
    network = Recorder()
    weights = [0.0, 1.5, -1.0, 0.0, 3.0]
    x_T, _ = randomness(0, 5)
    images = fastdiff.sample(a_model(network), LABELS, weights, steps=STEPS, x_T=x_T, dtype="float64")
    # guided images 1 and 4, then 0, 2 and 3, then the null rows of 1 and 4; image 2 has the null label as its own
    assert all(y == [0, 7, 3, NULL, 3, NULL, NULL] for y in network.y)
    assert torch.equal(network.x[0], x_T[[1, 4, 0, 2, 3, 1, 4]])
    for x in network.x:
        assert torch.equal(x[:2], x[5:])
    for i, (label, w) in enumerate(zip(LABELS, weights, strict=True)):
        alone = fastdiff.sample(a_model(), [label], w, steps=STEPS, x_T=x_T[i : i + 1], dtype="float64")
        torch.testing.assert_close(images[i : i + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("w", [1.5, torch.tensor(1.5), np.float32(1.5), [1.5, 1.5, 1.5, 1.5, 1.5]], ids=str)
def test_w_may_be_any_number_or_one_an_image(w):
    x_T, _ = randomness(0, 5)
    options = {"steps": STEPS, "x_T": x_T, "dtype": torch.float64}
    expected = fastdiff.sample(a_model(), LABELS, np.full(5, 1.5), **options)
    assert torch.equal(fastdiff.sample(a_model(), torch.tensor(LABELS), w, **options), expected)
    assert torch.equal(fastdiff.sample(a_model(), np.array(LABELS, np.int32), w, **options), expected)


def test_guidance_moves_the_image_as_far_as_w_says():
    """One row of an x0 network is its output: (1 + w) * conditional - w * null"""
    x_T, _ = randomness(0, 1)
    options = {"steps": 1, "x_T": x_T, "dtype": torch.float64, "clip_x0": False}
    model = a_model(prediction="x0")
    conditional, null = (fastdiff.sample(model, labels, **options) for labels in ([4], None))
    for w in (0.5, 1.0, 7.0, -0.3):
        expected = (1 + w) * conditional - w * null
        torch.testing.assert_close(fastdiff.sample(model, [4], w, **options), expected, rtol=0, atol=1e-12)


EDGES = {  # the interval from the rows' own sigma_edm, and the rows that it guides
    "everywhere": (lambda sigma: (0.0, math.inf), range(STEPS)),
    "lo is outside, hi inside": (lambda sigma: (sigma[4], sigma[1]), range(1, 4)),
    "the noisiest rows": (lambda sigma: (sigma[4], math.inf), range(4)),
    "the last row": (lambda sigma: (0, sigma[STEPS - 1]), range(STEPS - 1, STEPS)),
    "no row": (lambda sigma: (sigma[0], math.inf), range(0)),
}


@pytest.mark.parametrize("edges", EDGES)
def test_which_rows_an_interval_guides(edges):
    interval_of, rows = EDGES[edges]
    sigma_edm = ddim(Schedule.named("linear"), STEPS).sigma_edm
    np.testing.assert_allclose(sigma_edm, SIGMA_EDM, rtol=1e-12)
    network = Recorder()
    sampler = fastdiff.Sampler(a_model(network), steps=STEPS, guidance_interval=interval_of(sigma_edm))
    sampler([1, 2, 3], [2.0, 0.0, 1.0], seed=0)
    assert network.batches == [5 if row in rows else 3 for row in range(STEPS)]


def test_guided_rows_by_hand():
    sigma = np.array([math.inf, 5.0, 1.0, 0.1])
    assert guided_rows(sigma, None).tolist() == [True] * 4
    assert guided_rows(sigma, (0.1, 5.0)).tolist() == [False, True, True, False]
    assert guided_rows(sigma, (1.0, math.inf)).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    "interval", [(3.0, 1.0), (1.0, 1.0), (-1.0, 2.0), (math.nan, 1.0), (0.0, math.nan), (math.inf, math.inf)], ids=str
)
def test_an_interval_that_is_none(interval):
    with pytest.raises(ValueError, match="guidance_interval must satisfy 0 <= lo < hi"):
        fastdiff.sample(a_model(), 1, 1.0, guidance_interval=interval)


@pytest.mark.parametrize("interval", [1.0, (1.0,), (0.1, 1.0, 2.0), ("low", "high")], ids=str)
def test_an_interval_of_another_kind(interval):
    with pytest.raises(TypeError, match="guidance_interval must be a pair"):
        fastdiff.sample(a_model(), 1, 1.0, guidance_interval=interval)


def test_an_unconditional_model_has_no_labels_at_all():
    network = Recorder()
    model = a_model(network, num_classes=None, null_label=None)
    images = fastdiff.sample(model, num_images=2, steps=STEPS, seed=1)
    assert images.shape == (2, *SHAPE) and network.y == [None] * STEPS
    assert torch.equal(images, fastdiff.sample(model, None, -1, num_images=2, steps=STEPS, seed=1))
    with pytest.raises(ValueError, match="labels must be None: the model is unconditional"):
        fastdiff.sample(model, [1, 2], steps=STEPS)
    with pytest.raises(ValueError, match="w must be 0 or -1 where labels=None"):
        fastdiff.sample(model, w=1.0, steps=STEPS)


@pytest.mark.parametrize("w", [1.0, -1.0, [0.0, 2.0]], ids=str)
def test_a_model_without_a_null_label_cannot_be_guided(w):
    network = Recorder()
    model = a_model(network, null_label=None)
    with pytest.raises(ValueError, match="w must be 0: guidance needs a null label"):
        fastdiff.sample(model, [1, 2], w, steps=STEPS)
    with pytest.raises(ValueError, match="labels=None needs a null label"):
        fastdiff.sample(model, steps=STEPS)
    assert network.batches == []


def test_nothing_to_guide_towards():
    with pytest.raises(ValueError, match=r"w must be 0 or -1 where labels=None .* got 1\.5"):
        fastdiff.sample(a_model(), None, [0.0, 1.5, -1.0], steps=STEPS)


def test_a_plan_by_hand():
    labels, w = resolve_labels([5, 6, 7, 8], 10, NULL), resolve_w([0.0, 2.0, -1.0, 3.0])
    plan = plan_guidance(labels, w, 4, num_classes=10, null_label=NULL)
    assert (plan.N, plan.M) == (4, 2)
    assert plan.order.tolist() == [1, 3, 0, 2] and plan.inverse.tolist() == [2, 0, 3, 1]
    assert plan.y is not None and plan.y.tolist() == [6, 8, 5, NULL]
    assert plan.w.tolist() == [2.0, 3.0, 0.0, 0.0]
