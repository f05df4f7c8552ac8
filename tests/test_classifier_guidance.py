"""Classifier guidance in sample(): 2105.05233's two algorithms, alone and with w, for every image on its own"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from reference import schedule as paper
from reference.classifier_guidance import algorithm_1, algorithm_2, judged
from reference.guidance import guided
from reference.networks import NULL, Recorder, judging, mixing, mixing_learned, randomness
from sampling_cases import SHAPE, STEPS, a_classifier, a_model

import fastdiff
from fastdiff import Classifier, Sampler
from fastdiff.guidance import classifier_gradient
from fastdiff.model import EncoderConfig, EncoderUNet
from fastdiff.placement import preferred_dtype
from fastdiff.solvers import ddim, ddpm

BETAS = paper.linear_betas(1000)
LABELS = [3, 0, 9, 7]
W = {"no w": [0.0] * 4, "w": [1.5, 0.0, -1.0, 0.7]}
SCALES = [1.0, 2.5, 0.7, 0.0]
INTERVALS = {"everywhere": None, "interval": (0.2, 3.0)}


def literal(loop, x_T, noise, w, *, steps=STEPS, interval=None, learned=False, scales=SCALES, **options) -> np.ndarray:
    times = paper.sections([steps], 1000)[::-1] if steps > 1 else [999]
    abars = [paper.abar_at(t, BETAS) for t in times]
    network = mixing_learned if learned else mixing
    images = []
    for i, label in enumerate(LABELS):
        predict = guided(network, label, w[i], null_label=NULL, channels=SHAPE[0], interval=interval, betas=BETAS)
        gradient = judged(label, interval, BETAS)
        given = (x_T[i].numpy(), noise[:, i].numpy(), times, abars)
        images.append(loop(predict, gradient, scales[i], *given, **options))
    return np.stack(images)


def assert_images(got: torch.Tensor, expected: np.ndarray, atol: float = 1e-10) -> None:
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=atol * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("w", W)
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_the_mean_form_is_algorithm_1(variance, prediction, clip, w, interval) -> None:
    x_T, noise = randomness(STEPS, len(LABELS))
    learned = variance == "learned_range"
    sampler = Sampler(
        a_model(mixing_learned if learned else mixing, variance=variance, prediction=prediction, clip_x0=clip),
        steps=STEPS,
        solver="ddpm",
        dtype="float64",
        guidance_interval=INTERVALS[interval],
        classifier=a_classifier(),
    )
    images = sampler(LABELS, W[w], x_T=x_T, noise=noise, classifier_scale=SCALES)
    options = {"prediction": prediction, "variance": variance, "clip": clip, "learned": learned}
    assert_images(images, literal(algorithm_1, x_T, noise, W[w], interval=INTERVALS[interval], **options))


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("w", W)
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 0.3])
@pytest.mark.parametrize("eps", ["x0", "network"])
def test_the_score_form_is_algorithm_2(eps, eta, prediction, clip, w, interval) -> None:
    x_T, noise = randomness(STEPS, len(LABELS))
    sampler = Sampler(
        a_model(prediction=prediction, clip_x0=clip),
        steps=STEPS,
        solver=functools.partial(ddim, eps=eps),
        eta=eta,
        dtype="float64",
        guidance_interval=INTERVALS[interval],
        classifier=a_classifier(),
    )
    images = sampler(LABELS, W[w], x_T=x_T, noise=noise, classifier_scale=SCALES)
    options = {"prediction": prediction, "eta": eta, "clip": clip, "eps_from": eps}
    assert_images(images, literal(algorithm_2, x_T, noise, W[w], interval=INTERVALS[interval], **options))


SOLVERS = ["fixed_small", "fixed_large", "learned_range", "ddim", "ddim eps network"]


@pytest.mark.parametrize("w", W)
# the small variance of one row is 0, so that no gradient would move it
@pytest.mark.parametrize(("solver", "steps"), [*itertools.product(SOLVERS, [1, 2, 50])][1:])
def test_float32_errs_by_its_conditioning_alone(solver, steps, w) -> None:
    """One row, too, whose clipped variance is beta"""
    x_T, noise = randomness(steps, len(LABELS))
    learned = solver == "learned_range"
    if solver.startswith("ddim"):
        model, eps = a_model(), "network" if "network" in solver else "x0"
        build, loop, options = functools.partial(ddim, eps=eps), algorithm_2, {"eps_from": eps}
        table = ddim(model.schedule, steps, eps=eps)
    else:
        model, build = a_model(mixing_learned if learned else mixing, variance=solver), "ddpm"
        loop, options, table = algorithm_1, {"variance": solver, "learned": learned}, ddpm(model.schedule, steps)
    images = fastdiff.sample(
        *(model, LABELS, W[w]),
        **{"steps": steps, "solver": build, "x_T": x_T, "noise": noise},
        **{"classifier": a_classifier(), "classifier_scale": SCALES},
    )
    assert images.dtype == torch.float32
    expected = literal(loop, x_T, noise, W[w], steps=steps, **options)
    # (1 + w) and w are factors of the network's own errors
    bound = max(1e-5, 8 * 2**-24 * np.abs(table.c_x0 * table.k_x).max()) * (1 + 2 * max(W[w]))
    assert_images(images, expected, bound)


def test_the_form_of_a_solver_where_nobody_says() -> None:
    x_T, noise = randomness(STEPS, 2)
    call = {"labels": [1, 2], "x_T": x_T, "noise": noise}
    for solver, form, other in (("ddpm", "mean", "score"), ("ddim", "score", None)):
        options = {"steps": STEPS, "solver": solver, "dtype": "float64", "classifier": a_classifier()}
        sampler = Sampler(a_model(), **options)
        assert sampler.table.classifier_form == form
        images = sampler(**call)
        assert torch.equal(images, Sampler(a_model(), **options, classifier_form=form)(**call))
        if other:
            assert not torch.equal(images, Sampler(a_model(), **options, classifier_form=other)(**call))
    partial = Sampler(a_model(), solver=functools.partial(ddpm, variance="fixed_large"), classifier=a_classifier())
    assert partial.table.classifier_form == "mean"


def test_a_form_that_would_move_nothing_is_refused() -> None:
    """DDPM's last row with the small variance adds no noise: its variance times the gradient is 0"""
    options = {"solver": "ddpm", "classifier": a_classifier()}
    with pytest.raises(ValueError, match=r"'mean' would move no row that is guided.* use 'score'"):
        Sampler(a_model(), steps=1, **options)
    with pytest.raises(ValueError, match="'mean' would move no row that is guided"):
        Sampler(a_model(), steps=STEPS, **options, guidance_interval=(0.0, 0.02))
    x_T = randomness(1, 2)[0]
    moved, still = (
        Sampler(a_model(), steps=1, **options, classifier_form="score")([1, 2], x_T=x_T, classifier_scale=scale)
        for scale in (1.0, 0.0)
    )
    assert not torch.equal(moved, still)


def test_ddpm_is_ddim_with_eta_1_in_either_form() -> None:
    x_T, noise = randomness(STEPS, 3)
    call = {"labels": [1, 2, 3], "w": 1.5, "x_T": x_T, "noise": noise, "classifier_scale": 2.0}
    options = {"steps": STEPS, "dtype": "float64", "classifier": a_classifier()}
    for form in ("mean", "score"):
        first = Sampler(a_model(), **options, solver="ddpm", classifier_form=form)(**call)
        second = Sampler(a_model(), **options, solver="ddim", eta=1, classifier_form=form)(**call)
        torch.testing.assert_close(first, second, rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [0.0, [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_scale_0_is_bitwise_no_classifier_and_runs_none(solver, scale) -> None:
    network = Recorder(judging)
    options = {"steps": STEPS, "solver": solver}
    sampler = Sampler(a_model(), **options, classifier=a_classifier(network))
    expected = Sampler(a_model(), **options)([1, 2, 3], 1.5, seed=0)
    assert torch.equal(sampler([1, 2, 3], 1.5, seed=0, classifier_scale=scale), expected)
    assert not network.x
    # one image without, bitwise, and of no consequence what the classifier says of it
    mixed = sampler([1, 2, 3], 1.5, seed=0, classifier_scale=[1.0, 0.0, 1.0])
    assert torch.equal(mixed[1], expected[1])
    assert not torch.equal(mixed[0], expected[0]) and not torch.equal(mixed[2], expected[2])


def test_labels_are_not_needed_where_no_image_asks() -> None:
    sampler = Sampler(a_model(), steps=STEPS, classifier=a_classifier())
    without = fastdiff.sample(a_model(), num_images=2, steps=STEPS, seed=0)
    assert torch.equal(sampler(num_images=2, seed=0, classifier_scale=0), without)


def test_the_classifier_sees_x_t_of_each_image_and_the_time_of_the_whole_chain() -> None:
    network, seen = Recorder(judging), []
    sampler = Sampler(a_model(), steps=STEPS, dtype="float64", classifier=a_classifier(network))
    x_T, _ = randomness(0, 3)
    sampler([1, 2, 3], [0, 1.5, 0], x_T=x_T, callback=lambda row, rows, t, x, x0: seen.append(x))
    assert [t.tolist() for t in network.t] == [[t] * 3 for t in sampler.timesteps]
    # images with a null row come first
    assert all(torch.equal(x, y[[1, 0, 2]]) for x, y in zip(network.x, [x_T, *seen[:-1]], strict=True))


def test_rows_outside_the_interval_run_neither() -> None:
    network, judge = Recorder(), Recorder(judging)
    options = {"steps": STEPS, "guidance_interval": (0.1, 5.0)}
    sampler = Sampler(a_model(network), **options, classifier=a_classifier(judge))
    sampler([1, 2, 3], 1.5, seed=0)
    rows = sampler._tabled.guided
    assert 0 < rows.sum() < STEPS
    assert network.batches == [6 if row else 3 for row in rows]
    assert [t[0].item() for t in judge.t] == [t for t, row in zip(sampler.timesteps, rows, strict=True) if row]
    judge.x.clear()
    sampler.set_table(steps=STEPS, guidance_interval=(1e6, 1e7))
    assert torch.equal(sampler([1, 2], seed=0), fastdiff.sample(a_model(), [1, 2], steps=STEPS, seed=0))
    assert not judge.x


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_a_batch_is_its_images_one_by_one(solver) -> None:
    options = {"steps": STEPS, "solver": solver, "dtype": "float64", "classifier": a_classifier()}
    sampler = Sampler(a_model(), **options)
    seeds, w = fastdiff.image_seeds(0, 4), W["w"]
    together = sampler(LABELS, w, seed=seeds, classifier_scale=SCALES)
    in_parts = Sampler(a_model(), **options, batch_size=3)(LABELS, w, seed=seeds, classifier_scale=SCALES)
    torch.testing.assert_close(in_parts, together, rtol=0, atol=1e-12)
    for i in range(4):
        alone = sampler(LABELS[i], w[i], seed=[seeds[i]], classifier_scale=SCALES[i])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-12)


def test_nan_of_one_image_stays_in_it() -> None:
    def spoiled(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return judging(torch.cat((x[:2], x[2:3] * math.nan, x[3:])), t)

    options = {"steps": STEPS, "solver": "ddpm"}
    images = Sampler(a_model(), **options, classifier=a_classifier(spoiled))(LABELS, seed=0, classifier_scale=2.0)
    expected = Sampler(a_model(), **options, classifier=a_classifier())(LABELS, seed=0, classifier_scale=2.0)
    keep = [0, 1, 3]
    assert torch.equal(images[keep], expected[keep]) and images[2].isnan().all()
    # an image without a gradient does not read it
    scales = [2.0, 2.0, 0.0, 2.0]
    images = Sampler(a_model(), **options, classifier=a_classifier(spoiled))(LABELS, seed=0, classifier_scale=scales)
    assert images.isfinite().all()


def test_an_unconditional_model_leaves_its_labels_to_the_classifier() -> None:
    def blind(x, t, y):
        assert y is None
        return mixing(x, t, None)

    x_T, noise = randomness(STEPS, len(LABELS))
    model = a_model(blind, num_classes=None, null_label=None)
    options = {"steps": STEPS, "solver": "ddpm", "dtype": "float64", "classifier": a_classifier()}
    for w in (0.0, -1.0):
        images = Sampler(model, **options)(LABELS, w, x_T=x_T, noise=noise, classifier_scale=SCALES)
        # label 0 of mixing is none
        expected = Sampler(a_model(lambda x, t, y: mixing(x, t, None)), **options)
        assert torch.equal(images, expected(LABELS, x_T=x_T, noise=noise, classifier_scale=SCALES))


class Judge(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtypes: set[torch.dtype] = set()
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(math.prod(SHAPE), 10, dtype=dtype)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.dtypes.add(x.dtype)
        return self.head(self.drop(torch.tanh(x).flatten(1)))


@pytest.mark.parametrize("graph", ["auto", False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_of_today_guide(captured, dtype, graph) -> None:
    """In place or through a copy: changed, replaced, or the network itself"""
    classifier = a_classifier(Judge())
    options = {"steps": STEPS, "dtype": dtype, "graph": graph, "classifier": classifier}
    sampler = Sampler(a_model(), **options)
    call = {"labels": [1, 2, 3], "seed": 0, "classifier_scale": 5.0}
    seen = [sampler(**call)]

    def scaled() -> None:
        with torch.no_grad():
            classifier.network.head.weight.mul_(-1)

    def moved() -> None:
        classifier.network.head.weight.data = classifier.network.head.weight.data * 1.5

    def replaced() -> None:
        classifier.network = Judge()
        torch.nn.init.normal_(classifier.network.head.weight)

    for change in (scaled, moved, replaced):
        change()
        images = sampler(**call)
        assert torch.equal(images, Sampler(a_model(), **options)(**call))
        assert not any(torch.equal(images, other) for other in seen)
        seen.append(images)
    network = classifier.network
    assert network.training and all(p.grad is None for p in network.parameters())


def test_a_classifier_runs_in_the_dtype_of_the_call_or_its_own() -> None:
    judge = Judge(torch.bfloat16)
    Sampler(a_model(), steps=STEPS, classifier=a_classifier(judge))([1, 2])
    assert judge.dtypes == {torch.bfloat16}
    function = Recorder(judging)
    for dtype in (None, torch.bfloat16, torch.float64):
        Sampler(a_model(), steps=STEPS, dtype=dtype, classifier=a_classifier(function))([1, 2])
    assert [x.dtype for x in function.x[::STEPS]] == [torch.float32, torch.bfloat16, torch.float64]


def test_each_of_two_networks_has_a_dtype_of_its_own() -> None:
    """A model that records bfloat16 converts no stranger's classifier; what a classifier records is heeded"""
    model, judge, recorder = a_model(), Judge(torch.float32), Recorder(judging)
    model.dtype = torch.bfloat16
    Sampler(model, steps=STEPS, classifier=a_classifier(judge))([1, 2])
    assert judge.dtypes == {torch.float32}
    recording = a_classifier(recorder)
    recording.dtype = torch.float32
    Sampler(model, steps=STEPS, classifier=recording)([1, 2])
    assert {x.dtype for x in recorder.x} == {torch.float32}


def test_the_encoder_runs_in_what_suits_the_device_not_in_how_it_was_stored() -> None:
    config = EncoderConfig(
        **{"image_size": 8, "in_channels": 1, "out_channels": 10, "channels": 8, "channel_mult": (1,), "groups": 4},
        **{"num_blocks": 1, "attention_resolutions": (), "head_channels": 8, "pool": "adaptive"},
    )
    classifier = Classifier(EncoderUNet(config).half(), "linear", 10, (1, 8, 8))
    for amx, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
            assert preferred_dtype(classifier, torch.device("cpu")) == dtype
    classifier.dtype = torch.float16
    assert preferred_dtype(classifier, torch.device("cuda")) == torch.float16
    # which has no arithmetic for it
    assert preferred_dtype(classifier, torch.device("cpu")) == torch.float32


def test_a_classifier_of_a_wider_dtype_sees_the_state_itself() -> None:
    class Narrow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            assert x.dtype == torch.bfloat16
            return self.gain * mixing(x, t, y)

    class Wide(Judge):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append(x.detach().clone())
            return super().forward(x, t)

    x_T, seen = randomness(0, 2)[0], []
    sampler = Sampler(a_model(Narrow()), steps=STEPS, classifier=a_classifier(Wide()))
    sampler([1, 2], x_T=x_T)
    assert torch.equal(seen[0], x_T.float()) and not torch.equal(seen[0], x_T.bfloat16().float())


def test_a_compiled_classifier_guides() -> None:
    judge = Judge()
    compiled = torch.compile(judge, backend="aot_eager")
    call = {"labels": [1, 2], "seed": 0, "classifier_scale": 3.0}
    images = Sampler(a_model(), steps=STEPS, classifier=a_classifier(compiled))(**call)
    expected = Sampler(a_model(), steps=STEPS, classifier=a_classifier(judge))(**call)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_a_classifier_guides_in_inference_mode() -> None:
    sampler = Sampler(a_model(), steps=STEPS, dtype="float64", classifier=a_classifier(Judge()))
    expected = sampler([1, 2], seed=0)
    with torch.inference_mode():
        assert torch.equal(sampler([1, 2], seed=0), expected)
        with pytest.raises(ValueError, match=r"classifier must have weights .* made under torch.inference_mode\(\)"):
            Sampler(a_model(), classifier=a_classifier(Judge()))
        made_here = Sampler(a_model(), steps=STEPS, dtype="float64", classifier=sampler.classifier)
        assert torch.equal(made_here([1, 2], seed=0), expected)


@pytest.mark.parametrize("interval", [None, (0.1, 5.0)])
@pytest.mark.parametrize("w", [0.0, [1.5, 0.0, -1.0, 2.0, 0.0]])
def test_a_padded_batch_is_guided_as_an_eager_one(captured, w, interval) -> None:
    options = {"steps": STEPS, "solver": "ddpm", "dtype": "float64", "guidance_interval": interval}
    call = {"labels": [1, 2, 3, 4, 5], "w": w, "seed": 0, "classifier_scale": [1.0, 0.0, 3.0, 2.0, 0.5]}
    expected = Sampler(a_model(), **options, classifier=a_classifier(), graph=False)(**call)
    sampler = Sampler(a_model(), **options, classifier=a_classifier())
    torch.testing.assert_close(sampler(**call), expected, rtol=0, atol=1e-12)
    graphs = 1 if interval is None else 2
    assert len(captured) == graphs and [step.shape.n for step in sampler._steps.values()] == [6]
    # the scale and the labels are data of the same graph; no scale at all is another
    sampler(**call | {"classifier_scale": 7.0, "labels": [5] * 5})
    assert len(captured) == graphs
    without = sampler(**call | {"classifier_scale": 0.0})
    assert len(captured) > graphs
    assert torch.equal(without, Sampler(a_model(), **options)(call["labels"], w, seed=0))


def test_out_of_memory_counts_the_classifier() -> None:
    def greedy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return judging(x, t)

    sampler = Sampler(a_model(), steps=STEPS, classifier=a_classifier(greedy))
    # of one image's gradient, too: it may come in any batch
    for scale in (1.0, [0.0] * 8 + [1.0]):
        with pytest.raises(fastdiff.OutOfMemoryError, match="batch_size=2 fits"):
            sampler([1] * 9, seed=0, classifier_scale=scale)
    assert len(sampler([1] * 9, seed=0, classifier_scale=0)) == 9


WRONG = {
    "classes": (lambda x, t: judging(x, t)[:, :9], ValueError, r"logits of shape \(2, 10\), got \(2, 9\)"),
    "images": (lambda x, t: judging(x, t)[:1], ValueError, r"logits of shape \(2, 10\), got \(1, 10\)"),
    "None": (lambda x, t: None, TypeError, "must return a floating-point tensor, got NoneType"),
    "integers": (lambda x, t: judging(x, t).long(), TypeError, "must return a floating-point tensor, got torch.int64"),
    "constant": (lambda x, t: torch.zeros(2, 10), ValueError, "must be differentiable in x"),
    "detached": (lambda x, t: judging(x.detach(), t), ValueError, "must be differentiable in x"),
    "of another leaf": (
        lambda x, t: judging(x.detach(), t) * torch.ones(10, requires_grad=True),
        ValueError,
        "must be differentiable in x",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_classifier_that_returns_something_else(case) -> None:
    network, error, message = WRONG[case]
    with pytest.raises(error, match=rf"classifier's network\(x, t\) {'.*' + message}"):
        fastdiff.sample(a_model(), [1, 2], steps=STEPS, classifier=a_classifier(network))


def test_log_softmax_is_taken_in_float32_at_least() -> None:
    """In bfloat16 the probability of a class sure to be right rounds to 1, and its gradient to 0"""
    x = torch.linspace(-1, 1, 6).reshape(1, 1, 2, 3)

    def sure(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        s = x.flatten(1).sum(1, keepdim=True)
        return torch.cat((8 + s, -s), 1)

    labels, t, scale = torch.tensor([0]), torch.zeros(1), torch.ones(1)
    got = classifier_gradient(sure, x, t, labels, scale, num_classes=2, dtype=torch.bfloat16)
    assert got.dtype == torch.float32
    # d log sigmoid(8 + 2 s) / ds, s = 0
    torch.testing.assert_close(got, torch.full_like(x, 2 / (1 + math.exp(8))), rtol=1e-2, atol=0)


def test_names_and_folders_are_loaded(monkeypatch) -> None:
    asked = []

    def load_classifier(src: str, **options: object) -> Classifier:
        asked.append((src, options))
        return a_classifier(Judge())

    monkeypatch.setattr("fastdiff.checkpoint.load_classifier", load_classifier, raising=False)
    expected = fastdiff.sample(a_model(), [1, 2], steps=STEPS, seed=0, classifier=a_classifier(Judge()))
    with torch.inference_mode():
        images = fastdiff.sample(a_model(), [1, 2], steps=STEPS, seed=0, classifier="digits")
    assert torch.equal(images, expected)
    assert asked == [("digits", {"device": None, "dtype": None, "allow_nonfinite": False})]
