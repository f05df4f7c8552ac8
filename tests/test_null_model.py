"""Guidance away from another network: an unconditional one, or a weaker one (autoguidance, 2406.02507)"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from reference.networks import Recorder, mixing, mixing_learned
from sampling_cases import SHAPE, STEPS, a_model
from test_engine import a_unet_model

import fastdiff
from fastdiff import DiffusionModel, Sampler
from fastdiff.model import UNet

OPTIONS = {"steps": STEPS, "solver": "ddpm", "dtype": "float64"}


def weak(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    return 0.7 * mixing(x, t, y) + 0.1


def blind(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    assert y is None
    return weak(x, t, None)


def both(w: float):
    """One network that is what the two are together, without guidance"""
    return lambda x, t, y: (1 + w) * mixing(x, t, y) - w * weak(x, t, y)


def other(network=weak, **options) -> DiffusionModel:
    return DiffusionModel(network, "linear", **{"image_shape": SHAPE, "null_label": None} | options)


def test_a_weaker_network_takes_the_same_labels() -> None:
    weaker = Recorder(weak)
    model = a_model(null_label=None, null_model=other(weaker))
    got = Sampler(model, **OPTIONS)([1, 2, 3], 1.5, seed=0)
    want = Sampler(a_model(both(1.5)), **OPTIONS)([1, 2, 3], seed=0)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert weaker.y == [[1, 2, 3]] * STEPS


def test_an_unconditional_network_takes_none() -> None:
    strong, blinder = Recorder(), Recorder(blind)
    model = a_model(strong, null_label=None, null_model=other(blinder, num_classes=None))
    got = Sampler(model, **OPTIONS)([1, 2, 3], 1.5, seed=0)
    want = Sampler(a_model(lambda x, t, y: 2.5 * mixing(x, t, y) - 1.5 * weak(x, t, None)), **OPTIONS)(
        [1, 2, 3], seed=0
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert set(strong.batches) == set(blinder.batches) == {3}


def test_it_runs_for_guided_images_and_rows_alone() -> None:
    strong, weaker = Recorder(), Recorder(weak)
    model = a_model(strong, null_label=None, null_model=other(weaker))
    sampler = Sampler(model, **OPTIONS, guidance_interval=(0.1, 5.0))
    w = [0.0, 1.5, 2.0]
    got = sampler([1, 2, 3], w, seed=0)
    rows = int(sampler._tabled.guided.sum())
    assert 0 < rows < STEPS and weaker.batches == [2] * rows and strong.batches == [3] * STEPS
    assert weaker.y == [[2, 3]] * rows
    seeds = fastdiff.image_seeds(0, 3)
    for i in range(3):
        alone = sampler([1 + i], w[i], seed=[seeds[i]])
        torch.testing.assert_close(alone, got[i : i + 1], rtol=0, atol=1e-12)
    weaker.x.clear()
    sampler([1, 2, 3], 0.0)
    assert not weaker.batches


def test_an_unconditional_model_is_guided_by_a_weaker_one() -> None:
    model = DiffusionModel(
        mixing, "linear", num_classes=None, image_shape=SHAPE, null_model=other(blind, num_classes=None)
    )
    got = Sampler(model, **OPTIONS)(None, 1.5, num_images=2, seed=0)
    want = DiffusionModel(both(1.5), "linear", num_classes=None, image_shape=SHAPE)
    torch.testing.assert_close(got, Sampler(want, **OPTIONS)(num_images=2, seed=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("null_network", [weak, lambda x, t, y: torch.cat((weak(x, t, y), x * torch.nan), 1)])
def test_a_learned_variance_stays_the_models_own(null_network) -> None:
    model = a_model(mixing_learned, variance="learned_range", null_label=None, null_model=other(null_network))

    def together(x, t, y):
        out = mixing_learned(x, t, y)
        return torch.cat((2.5 * out[:, :2] - 1.5 * weak(x, t, y), out[:, 2:]), 1)

    got = Sampler(model, **OPTIONS)([1, 2], 1.5, seed=0)
    want = Sampler(a_model(together, variance="learned_range"), **OPTIONS)([1, 2], seed=0)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_networks_of_the_protocol_are_hoisted_both() -> None:
    strong, weaker = a_unet_model().network, a_unet_model().network
    with torch.no_grad():
        weaker.mod.bias.add_(0.3)
    blinded = UNet(dataclasses.replace(strong.config, num_labels=None)).double()
    blinded.load_state_dict({k: v for k, v in weaker.state_dict().items() if k != "label_emb.weight"})
    for null_network, classes in ((weaker, 10), (blinded, None)):
        common = {"null_label": None, "image_shape": (1, 8, 8)}
        null_model = DiffusionModel(null_network, "cosine", num_classes=classes, **common)
        model = DiffusionModel(strong, "cosine", null_model=null_model, **common)

        def together(x, t, y, null_network=null_network, classes=classes):
            return 2.5 * strong(x, t, y) - 1.5 * null_network(x, t, y if classes else None)

        got = Sampler(model, **OPTIONS)([1, 2], 1.5, seed=0)
        want = Sampler(DiffusionModel(together, "cosine", **common), **OPTIONS)([1, 2], seed=0)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_networks_of_two_dtypes_are_fed_each_its_own() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=dtype))

        def forward(self, x, t, y):
            assert x.dtype == self.scale.dtype
            return self.scale * weak(x, t, y).to(x.dtype)

    for mine, others in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        model = a_model(Scaled(mine), null_label=None, null_model=other(Scaled(others)))
        sampler = Sampler(model, steps=STEPS)
        assert sampler.dtype == mine
        exact = Sampler(a_model(weak), steps=STEPS)([1, 2], seed=0)
        torch.testing.assert_close(sampler([1, 2], 1.5, seed=0), exact, rtol=0, atol=0.4)


def test_weights_of_the_second_network_are_todays() -> None:
    strong, weaker = a_unet_model(), a_unet_model()
    model = DiffusionModel(strong.network, "cosine", null_label=None, image_shape=(1, 8, 8), null_model=weaker)
    sampler = Sampler(model, steps=STEPS, dtype="float32")
    assert torch.allclose(sampler([1], 3.0, seed=0), sampler([1], 0.0, seed=0), atol=1e-4)
    with torch.no_grad():
        weaker.network.mod.bias.add_(0.5)
    got = sampler([1], 3.0, seed=0)
    assert torch.equal(got, Sampler(model, steps=STEPS, dtype="float32")([1], 3.0, seed=0))
    assert not torch.allclose(got, sampler([1], 0.0, seed=0), atol=1e-2)


WRONG = {
    "no model": (lambda: weak, TypeError, "null_model must be a DiffusionModel or None, got function"),
    "another shape": (lambda: other(image_shape=(2, 4, 8)), ValueError, "null_model must have image_shape="),
    "another prediction": (lambda: other(prediction="v"), ValueError, "null_model must have prediction='eps'"),
    "another schedule": (
        lambda: DiffusionModel(weak, "cosine", image_shape=SHAPE, null_label=None),
        ValueError,
        "null_model must have the model's schedule",
    ),
    "other classes": (lambda: other(num_classes=9), ValueError, "null_model must have num_classes=10 .*, got 9"),
    "a null model of its own": (lambda: other(null_model=other()), ValueError, "must not have a null_model of its own"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_null_model_that_does_not_fit_is_refused(case: str) -> None:
    make, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        a_model(null_label=None, null_model=make())


def test_without_a_null_label_there_is_no_unconditional_sampling() -> None:
    model = a_model(null_label=None, null_model=other(blind, num_classes=None))
    with pytest.raises(ValueError, match=r"w must not be -1: .* sample its null_model by itself"):
        fastdiff.sample(model, [1], -1.0, steps=STEPS)
    with pytest.raises(ValueError, match="labels=None needs a null label"):
        fastdiff.sample(model, steps=STEPS)


def test_a_checkpoint_of_two_networks_is_refused(tmp_path) -> None:
    model = a_unet_model(null_model=a_unet_model())
    with pytest.raises(ValueError, match="null_model"):
        fastdiff.save(model, tmp_path / "both")
    assert not (tmp_path / "both").exists()
