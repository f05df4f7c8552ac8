"""What sample() and Sampler refuse: the argument is named, the network never ran, and the next call succeeds"""

import functools
import math

import numpy as np
import pytest
import torch
from reference.networks import NULL, Recorder, judging, mixing

import fastdiff
import fastdiff.sampler
from fastdiff import Classifier, DiffusionModel, Sampler
from fastdiff.solvers import ddim

SHAPE, STEPS = (2, 4, 4), 6


def a_model(network=mixing, **options) -> DiffusionModel:
    return DiffusionModel(network, "linear", **{"image_shape": SHAPE, "null_label": NULL} | options)


def a_classifier(schedule="linear", classes=10, shape=SHAPE) -> Classifier:
    return Classifier(judging, schedule, classes, shape)


IMAGES = torch.zeros(2, *SHAPE)
BAD_CALLS = {
    "label -1": ({"labels": -1}, ValueError, r"labels must be in \[0, 10\), got -1"),
    "label num_classes + 1": ({"labels": [1, 11]}, ValueError, r"labels must be in \[0, 10\), got 11"),
    "the null label": ({"labels": [1, NULL]}, ValueError, "labels .* got 10; the null label is added for you"),
    "labels float": ({"labels": [1.0, 2.0]}, TypeError, "labels must be integers, got float64"),
    "labels float tensor": ({"labels": torch.tensor([1.0])}, TypeError, "labels must be integers"),
    "labels bool": ({"labels": [True, False]}, TypeError, "labels must be integers, got bool"),
    "labels partly bool": ({"labels": [True, 2]}, TypeError, "labels must be integers, got bool"),
    "w partly bool": ({"labels": [1, 2], "w": [True, 2.0]}, TypeError, "w must be a number"),
    "labels partly bool, partly lists": ({"labels": [True, [1, 2]]}, TypeError, "labels must be"),
    "label True": ({"labels": True}, TypeError, "labels must be integers"),
    "labels text": ({"labels": "3"}, TypeError, "labels must be integers, got str"),
    "labels with None": ({"labels": [1, None]}, TypeError, "labels must be integers"),
    "label past int64": ({"labels": 2**70}, ValueError, r"labels must be in \[0, 10\)"),
    "labels 2-D": ({"labels": [[1, 2]]}, ValueError, r"labels must be .* got shape \(1, 2\)"),
    "labels ragged": ({"labels": [[1, 2], [3]]}, TypeError, "labels must be"),
    "labels too few": ({"labels": [1, 2], "num_images": 3}, ValueError, "num_images has 3, labels has 2"),
    "w NaN": ({"labels": 1, "w": math.nan}, ValueError, "w must be finite, got nan"),
    "w infinite": ({"labels": [1, 2], "w": [0.0, -math.inf]}, ValueError, "w must be finite, got -inf"),
    "w past float32": ({"labels": 1, "w": 1e39}, ValueError, "w must be"),
    "w too long": ({"labels": [1, 2], "w": [1.0, 1.0, 1.0]}, ValueError, "labels has 2, w has 3"),
    "w 2-D": ({"labels": [1, 2], "w": [[1.0, 1.0]]}, ValueError, r"w must be .* got shape \(1, 2\)"),
    "w text": ({"labels": 1, "w": "1.5"}, TypeError, "w must be a number"),
    "w bool": ({"labels": 1, "w": True}, TypeError, "w must be a number"),
    "w None": ({"labels": 1, "w": None}, TypeError, "w must be a number"),
    "w without labels": ({"w": 1.5}, ValueError, "w must be 0 or -1 where labels=None"),
    "num_images -1": ({"num_images": -1}, ValueError, "num_images must be at least 0, got -1"),
    "num_images 2.0": ({"num_images": 2.0}, TypeError, "num_images must be an integer, got 2.0"),
    "num_images True": ({"num_images": True}, TypeError, "num_images must be an integer"),
    "seed negative": ({"seed": -1}, ValueError, "seed must be in"),
    "seed too large": ({"seed": 2**63}, ValueError, "seed must be in"),
    "seed float": ({"seed": 1.5}, TypeError, "seed must be an integer"),
    "seed True": ({"seed": True}, TypeError, "seed must be an integer"),
    "seeds too few": ({"labels": [1, 2, 3], "seed": [1, 2]}, ValueError, "labels has 3, seed has 2"),
    "seeds negative": ({"seed": [1, -2]}, ValueError, r"seed\[1\] must be in"),
    "seed text": ({"seed": "1"}, TypeError, "seed must be an integer"),
    "x_T shape": ({"x_T": torch.zeros(2, 2, 4, 5)}, ValueError, r"x_T must have shape \(2, 2, 4, 4\)"),
    "x_T of one image": ({"x_T": torch.zeros(SHAPE)}, ValueError, "x_T must be a tensor"),
    "x_T array": ({"x_T": np.zeros((2, *SHAPE))}, ValueError, "x_T must be a tensor"),
    "x_T integers": ({"x_T": IMAGES.long()}, TypeError, "x_T must be floating point"),
    "x_T and labels": ({"labels": [1, 2, 3], "x_T": IMAGES}, ValueError, "labels has 3, x_T has 2"),
    "noise shape": ({"labels": [1, 2], "noise": IMAGES}, ValueError, r"noise must have shape \(6, 2, 2, 4, 4\)"),
    "noise integers": ({"noise": torch.zeros(STEPS, 1, *SHAPE).long()}, TypeError, "noise must be floating point"),
    "noise array": ({"noise": np.zeros((STEPS, 1, *SHAPE))}, TypeError, "noise must be a tensor"),
    "scale without classifier": ({"classifier_scale": 2.0}, ValueError, "classifier_scale needs a classifier, got 2.0"),
    "scales without classifier": ({"classifier_scale": [1.0]}, ValueError, "classifier_scale needs a classifier"),
    "extra tensor": ({"extra": IMAGES}, TypeError, "extra must be a mapping of names to tensors or None, got Tensor"),
    "extra array": ({"extra": {"low": np.ones(1)}}, TypeError, "extra must hold tensors by name, got 'low': ndarray"),
    "extra number": ({"extra": {3: IMAGES}}, TypeError, "extra must hold tensors by name, got 3: Tensor"),
    "extra 0-d": ({"extra": {"low": torch.ones(())}}, ValueError, r"extra\['low'\] must have shape \(N, ...\)"),
    "extra rows": (
        {"labels": [1, 2, 3], "extra": {"low": IMAGES}},
        ValueError,
        r"number of images: labels has 3, extra\['low'\] has 2",
    ),
    "callback": ({"callback": 3}, TypeError, "callback must be a function or None, got int"),
}
GUIDED = {"classifier": a_classifier()}
BAD_OPTIONS = {
    "classifier function": ({"classifier": judging}, TypeError, "classifier must be a Classifier, .* got function"),
    "classifier's images": (
        {"classifier": a_classifier(shape=(2, 4, 8))},
        ValueError,
        r"classifier must have image_shape=\(2, 4, 4\) as the model, got \(2, 4, 8\)",
    ),
    "classifier's schedule": (
        {"classifier": a_classifier("cosine")},
        ValueError,
        "classifier must have the model's schedule: the same alphas_cumprod",
    ),
    "classifier's classes": (
        {"classifier": a_classifier(classes=9)},
        ValueError,
        "classifier must have num_classes=10 as the model, got 9",
    ),
    "form without classifier": ({"classifier_form": "mean"}, ValueError, "classifier_form needs a classifier, got 'm"),
    "form unknown": (GUIDED | {"classifier_form": "eps"}, ValueError, r"classifier_form must be one of .* got 'eps'"),
    "form of ddim": (GUIDED | {"classifier_form": "mean"}, ValueError, "classifier_form='mean' needs a solver that"),
    "scale NaN": (GUIDED | {"classifier_scale": math.nan}, ValueError, "classifier_scale must be finite, got nan"),
    "scale text": (GUIDED | {"classifier_scale": "1"}, TypeError, "classifier_scale must be a number"),
    "scale True": (GUIDED | {"classifier_scale": True}, TypeError, "classifier_scale must be a number"),
    "scale 2-D": (
        GUIDED | {"classifier_scale": [[1.0]]},
        ValueError,
        r"classifier_scale .* got shape \(1, 1\)",
    ),
    "scales too many": (
        GUIDED | {"labels": [1, 2], "classifier_scale": [1.0] * 3},
        ValueError,
        "labels has 2, classifier_scale has 3",
    ),
    "classifier without labels": (GUIDED | {"labels": None}, ValueError, "labels must be given: .*classifier_scale=0"),
    "steps 0": ({"steps": 0}, ValueError, "steps must be in .*the nearest is 1"),
    "steps -1": ({"steps": -1}, ValueError, "steps must be in .*the nearest is 1"),
    "steps 2.5": ({"steps": 2.5}, ValueError, "steps must be a whole number.*the nearest is 2"),
    "steps > T": ({"steps": 1001}, ValueError, "steps must be in .*the nearest is 1000"),
    "steps ddim7": ({"steps": "ddim300"}, ValueError, "steps='ddim300'.*nearest: 'ddim250' and 'ddim334'"),
    "steps None": ({"steps": None}, (TypeError, ValueError), "steps"),
    "eta < 0": ({"eta": -0.1}, ValueError, r"eta must be a number in \[0, 1\], got -0.1"),
    "eta > 1": ({"eta": 1.1}, ValueError, r"eta must be a number in \[0, 1\], got 1.1"),
    "eta NaN": ({"eta": math.nan}, ValueError, r"eta must be a number in \[0, 1\]"),
    "eta of ddpm": ({"solver": "ddpm", "eta": 0.5}, ValueError, "eta: solver 'ddpm' has none"),
    "eta of ddpm 0": ({"solver": "ddpm", "eta": 0.0}, ValueError, "eta: solver 'ddpm' has none"),
    "eta fixed twice": ({"solver": functools.partial(ddim, eta=0.5), "eta": 0.3}, ValueError, "eta"),
    "solver unknown": ({"solver": "dpm"}, ValueError, r"solver must be one of \['ddim', 'ddpm'\].* got 'dpm'"),
    "solver number": ({"solver": 3}, TypeError, "solver must be a name or a function"),
    "solver's prediction": (
        {"solver": functools.partial(ddim, prediction="v")},
        ValueError,
        "solver must build its table for prediction='eps', got 'v'",
    ),
    "solver's result": ({"solver": lambda schedule, steps: None}, TypeError, "solver must return a StepTable"),
    "dtype unknown": ({"dtype": "fp8"}, ValueError, r"dtype must be one of \['bfloat16', .*'float64'\], got 'fp8'"),
    "dtype int32": ({"dtype": torch.int32}, ValueError, "dtype must be one of"),
    "device unknown": ({"device": "gpu"}, ValueError, "device must be one of .*'cpu'.* got 'gpu'"),
    "device meta": ({"device": "meta"}, ValueError, "device must be one of .*'cpu'.* got 'meta'"),
    "device number": ({"device": 1.5}, ValueError, "device must be"),
    "graph=1": ({"graph": 1}, ValueError, "graph must be 'auto', True or False, got 1"),
    "check_finite text": ({"check_finite": "no"}, TypeError, "check_finite must be True or False"),
    "more sections than timesteps": ({"steps": ",".join(["1"] * 1001)}, ValueError, "1001 sections do not fit"),
    "endless digits": ({"steps": "9" * 5000}, ValueError, "steps must be"),
    "graph=True": ({"graph": True}, ValueError, "graph=True needs a CUDA device, got cpu"),
    "graph unknown": ({"graph": "yes"}, ValueError, "graph must be 'auto', True or False, got 'yes'"),
    "clip_x0 text": ({"clip_x0": "no"}, TypeError, "clip_x0 must be"),
    "batch_size 0": ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    "batch_size 1.0": ({"batch_size": 1.0}, TypeError, "batch_size must be an integer or None"),
    "interval text": ({"guidance_interval": "12"}, TypeError, "guidance_interval must be a pair"),
    "interval": ({"guidance_interval": (2.0, 1.0)}, ValueError, "guidance_interval must satisfy"),
    "model": ({"model": mixing}, TypeError, "model must be a DiffusionModel, a name or a folder, got function"),
}


@pytest.mark.parametrize("case", BAD_CALLS | BAD_OPTIONS)
def test_bad_input_names_the_argument_before_any_work(case):
    bad, error, message = (BAD_CALLS | BAD_OPTIONS)[case]
    network = Recorder()
    good = {"model": a_model(network), "labels": 1 if case in BAD_OPTIONS else None, "steps": STEPS}
    with pytest.raises(error, match=message):
        fastdiff.sample(**good | bad)
    assert network.x == []
    assert fastdiff.sample(a_model(network), 1, steps=STEPS).shape == (1, *SHAPE)


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_sampler_survives_a_bad_call(case):
    bad, error, message = BAD_CALLS[case]
    network = Recorder()
    sampler = Sampler(a_model(network), steps=STEPS)
    expected = sampler([1, 2], 1.0, seed=0)
    network.x.clear()
    with pytest.raises(error, match=message):
        sampler(**bad)
    assert network.x == []
    assert torch.equal(sampler([1, 2], 1.0, seed=0), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda")], ids=str)
def test_a_gpu_asked_for_by_name_is_never_replaced(device):
    with pytest.raises(ValueError, match="torch sees no GPU; got 'cuda"):
        fastdiff.sample(a_model(), 1, device=device)


@pytest.mark.parametrize(
    ("network", "got"),
    [
        (lambda x, t, y: x[:, :1], r"\(2, 1, 4, 4\)"),
        (lambda x, t, y: x[:1], r"\(1, 2, 4, 4\)"),
        (lambda x, t, y: None, "NoneType"),
        (lambda x, t, y: (x,), "tuple"),
    ],
    ids=["channels", "images", "None", "tuple"],
)
def test_a_network_that_returns_something_else(network, got):
    with pytest.raises(ValueError, match=rf"network\(x, t, y\) must return a tensor of shape .*, got {got}"):
        fastdiff.sample(a_model(network), [1, 2], steps=STEPS)


def test_a_learned_variance_needs_its_channels():
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4, 4\), got \(1, 2, 4, 4\)"):
        fastdiff.sample(a_model(mixing, variance="learned_range"), 1, steps=STEPS, solver="ddpm")


@pytest.mark.parametrize(
    "noise", [lambda row: None, lambda row: IMAGES[:1], lambda row: IMAGES.long()], ids=["None", "shape", "int"]
)
def test_a_noise_function_that_returns_something_else(noise):
    sampler = Sampler(a_model(), steps=STEPS, solver="ddpm")
    with pytest.raises((TypeError, ValueError), match=r"noise\(0\) must"):
        sampler([1, 2], noise=noise)
    assert torch.isfinite(sampler([1, 2], seed=0)).all()


MODEL = {"network": mixing, "schedule": "linear"}
BAD_MODELS = {
    "network": ({"network": 3}, TypeError, "network must be a callable"),
    "schedule": ({"schedule": "quadratic"}, ValueError, "schedule must be one of"),
    "schedule array": ({"schedule": np.ones(3)}, TypeError, "schedule must be a Schedule or a name"),
    "prediction": ({"prediction": "score"}, ValueError, "prediction must be one of"),
    "prediction list": ({"prediction": []}, ValueError, "prediction must be one of"),
    "provenance": ({"provenance": 5}, TypeError, "provenance must be a mapping"),
    "variance": ({"variance": "tiny"}, ValueError, "variance must be one of"),
    "num_classes": ({"num_classes": 0}, ValueError, "num_classes must be an integer of at least 1"),
    "null_label": ({"null_label": -1}, ValueError, "null_label must be an integer of at least 0"),
    "null without classes": (
        {"num_classes": None, "null_label": 10},
        ValueError,
        "null_label must be None for an unconditional",
    ),
    "image_shape": ({"image_shape": (16, 16)}, ValueError, "image_shape must be three positive integers"),
    "image_shape 0": ({"image_shape": (0, 16, 16)}, ValueError, "image_shape must be three positive integers"),
    "dtype": ({"dtype": torch.int64}, TypeError, "dtype must be a floating torch.dtype"),
    "dtype of 8 bits": ({"dtype": torch.float8_e4m3fn}, TypeError, "dtype must be a floating torch.dtype"),
    "image_shape 5": ({"image_shape": 5}, ValueError, "image_shape must be three positive integers"),
    "clip_x0": ({"clip_x0": None}, TypeError, "clip_x0 must be True or False"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_cannot_be(case):
    bad, error, message = BAD_MODELS[case]
    with pytest.raises(error, match=message):
        DiffusionModel(**MODEL | bad)


def test_labels_of_an_unconditional_model_are_the_classifiers():
    model = a_model(num_classes=None, null_label=None)
    with pytest.raises(ValueError, match="labels must be None: the model is unconditional"):
        fastdiff.sample(model, 1, steps=STEPS)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 10\), got 10"):
        fastdiff.sample(model, 10, steps=STEPS, **GUIDED)
    with pytest.raises(ValueError, match=r"w must be 0 or -1: the model is unconditional, .*; got 1.5"):
        fastdiff.sample(model, 1, 1.5, steps=STEPS, **GUIDED)
    assert fastdiff.sample(model, 1, steps=STEPS, **GUIDED).isfinite().all()


def test_a_null_label_inside_the_classes_cannot_be_passed_by_hand():
    model = a_model(num_classes=10, null_label=0)
    with pytest.raises(ValueError, match="labels must not hold the null label 0"):
        fastdiff.sample(model, [1, 0], steps=STEPS)
