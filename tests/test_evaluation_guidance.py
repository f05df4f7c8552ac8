"""The evaluation under a classifier and with another variance: whose the points are, and which are reused."""

import json

import numpy as np
import pytest
import torch
from evaluation_cases import HELDOUT, SCHEDULE, SHAPE, SMALL, TRAIN, WORLD, K, diffusion
from PIL import Image

from fastdiff import Classifier, Sampler
from fastdiff.evaluation import evaluate, plot, report, table
from fastdiff.evaluation.real import Real


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sure(x, t):
    """A classifier of images by their mean"""
    return -(x.flatten(1).mean(1, keepdim=True) - torch.linspace(-0.3, 0.3, K, dtype=x.dtype)).square() * 10


GUIDED = dict(SMALL, weights=(0.0,), solver="ddpm", classifier_scales=(2.0, 9.0), classifier_sha256="ef" * 32)


def test_points_of_a_classifier_are_its_samplers_and_not_those_of_another(tmp_path):
    out, model = tmp_path / "rows.jsonl", diffusion(WORLD.denoise)
    judge = Classifier(sure, SCHEDULE, K, SHAPE)
    report = evaluate(model, TRAIN, HELDOUT, **GUIDED, classifier=judge, out=out)
    assert [point["classifier_scale"] for point in report["classifier_points"]] == [2.0, 9.0]
    (row,) = [row for row in rows_of(out) if row.get("classifier_scale") == 9.0 and row["seed"] == 1]
    assert row["classifier_form"] == report["settings"]["classifier_form"] == "mean"
    labels = np.arange(30) % K
    images = Sampler(model, steps=5, solver="ddpm", classifier=judge)(
        labels.tolist(), 0.0, seed=row["sampler_seed"], classifier_scale=9.0
    )
    assert row["accuracy"] == Real(TRAIN, HELDOUT, K, SHAPE).measure(images, labels)["accuracy"]
    assert "classifier efefefefefef as mean" in table(report) and "| 0, classifier_scale 9 |" in table(report)
    # all of it is there, but not for another classifier, another form or none that says which it is
    for changed, sampled in (({}, 0), ({"classifier_sha256": "aa" * 32}, 4), ({"classifier_form": "score"}, 4)):
        again = evaluate(model, TRAIN, HELDOUT, **(GUIDED | changed), classifier=judge, out=out)
        assert again["environment"]["points_sampled"] == sampled
    unknown = evaluate(model, TRAIN, HELDOUT, **(GUIDED | {"classifier_sha256": None}), classifier=judge, out=out)
    assert unknown["environment"]["points_sampled"] == 4
    # the points over w are the same with and without
    alone = {name: value for name, value in GUIDED.items() if not name.startswith("classifier")}
    assert evaluate(model, TRAIN, HELDOUT, **alone, out=out)["points"] == report["points"]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (dict(classifier=Classifier(sure, SCHEDULE, K, SHAPE)), "given together"),
        (dict(classifier_scales=(1.0,)), "given together"),
        (dict(classifier_form="mean"), "classifier_form='mean' needs a classifier"),
        (dict(classifier=Classifier(sure, SCHEDULE, K, SHAPE), classifier_scales=(1.0, 1e39)), "finite numbers"),
        (dict(weights=(0.0, 1e39)), "finite numbers"),
        (dict(classifier=Classifier(sure, SCHEDULE, K, SHAPE), classifier_scales=(0.0,)), "above 0"),
        (dict(variance="fixed_large"), "variance must be"),
        (dict(variance="learned_range", solver="ddpm"), "needs a model that learned one"),
    ],
)
def test_guidance_that_cannot_be_is_refused(changed, word):
    with pytest.raises(ValueError, match=word):
        evaluate(diffusion(WORLD.denoise), TRAIN, HELDOUT, **(SMALL | changed))


def test_another_variance_is_that_of_the_sampler_and_has_rows_of_its_own(tmp_path):
    out, found = tmp_path / "rows.jsonl", {}
    for variance in ("fixed_small", "fixed_large", None):
        options = SMALL | {"weights": (0.0,), "solver": "ddpm", "variance": variance, "out": out}
        found[variance] = evaluate(diffusion(WORLD.denoise), TRAIN, HELDOUT, **options)
    assert found[None]["environment"]["points_sampled"] == 0  # the model's own is fixed_small
    assert found[None]["points"] == found["fixed_small"]["points"] != found["fixed_large"]["points"]


def test_scales_may_be_an_array():
    judge = Classifier(sure, SCHEDULE, K, SHAPE)
    options = GUIDED | {"classifier_scales": np.array([2.0, 9.0]), "weights": np.array([0.0]), "classifier": judge}
    points = evaluate(diffusion(WORLD.denoise), TRAIN, HELDOUT, **options)["classifier_points"]
    assert [point["classifier_scale"] for point in points] == [2.0, 9.0]


def test_a_named_model_of_another_variance_is_where_a_sampler_would_load_it(monkeypatch):
    wanted = []

    def load(name, *, device):
        wanted.append((name, device))
        return diffusion(WORLD.denoise)

    monkeypatch.setattr(report, "load", load)
    monkeypatch.setattr(report, "resolve_device", lambda device: torch.device("cpu") if device is None else device)
    options = SMALL | {"weights": (0.0,), "solver": "ddpm", "variance": "fixed_large"}
    evaluate("a name", TRAIN, HELDOUT, **options)
    evaluate("a name", TRAIN, HELDOUT, **options, device="cpu")
    assert wanted == [("a name", torch.device("cpu")), ("a name", "cpu")]


def test_a_network_that_takes_more_than_images_is_refused():
    def enlarging(x, t, y, low_res):
        raise AssertionError

    enlarging.extra_shapes = {"low_res": (1, 4, 4)}
    with pytest.raises(ValueError, match=r"must take images alone, its network takes \['low_res'\]"):
        evaluate(diffusion(enlarging), TRAIN, HELDOUT, **SMALL)


def test_a_picture_of_several_samplers_of_which_one_has_no_classifier(tmp_path):
    model, judge = diffusion(WORLD.denoise), Classifier(sure, SCHEDULE, K, SHAPE)
    one = evaluate(model, TRAIN, HELDOUT, **GUIDED, classifier=judge)
    other = evaluate(model, TRAIN, HELDOUT, **(SMALL | {"weights": (1.0,)}))
    path = plot.tradeoff({"a": one, "b": other, "c": other, "d": one}, tmp_path / "a.png")
    assert Image.open(path).size == (900, 700)
