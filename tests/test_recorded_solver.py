"""What a model says of how it is sampled: its solver, the channels that guidance combines, what decodes its latents"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import MODEL, digits, refused, unet
from reference.networks import NULL, mixing, mixing_learned, randomness

import fastdiff
from fastdiff import DiffusionModel, Schedule
from fastdiff.solvers import SOLVERS, ddim, ddpm

SHAPE, LABELS = (2, 4, 4), torch.tensor([3, 0, 7])
LEADING = {"name": "ddim", "spacing": "leading:N", "eps": "network"}


def a_model(solver: Any = None, variance: str = "fixed_small", **options: Any) -> DiffusionModel:
    network = mixing_learned if variance == "learned_range" else mixing
    return DiffusionModel(network, "linear", "eps", variance, 10, NULL, SHAPE, solver=solver, **options)


def test_a_model_without_a_record_is_sampled_by_ddim_at_a_fractional_stride() -> None:
    model = a_model()
    images = fastdiff.sample(model, LABELS, steps=7, seed=0)
    assert torch.equal(images, fastdiff.sample(model, LABELS, steps=7, solver="ddim", seed=0))


def test_the_record_says_solver_spacing_and_options() -> None:
    model = a_model(LEADING)
    sampler = fastdiff.Sampler(model, steps=7)
    assert sampler.timesteps == fastdiff.Sampler(model, steps="leading:7", solver="ddim").timesteps
    images = sampler(LABELS, seed=0)
    solver = functools.partial(ddim, eps="network")
    assert torch.equal(images, fastdiff.sample(a_model(), LABELS, steps="leading:7", solver=solver, seed=0))
    # what is given counts for more, spacing and all
    images = fastdiff.sample(model, LABELS, steps=7, solver="ddim", seed=0)
    assert torch.equal(images, fastdiff.sample(a_model(), LABELS, steps=7, seed=0))
    # a string says its own spacing
    assert fastdiff.Sampler(model, steps="trailing:7").timesteps[0] == 999
    assert fastdiff.Sampler(model, steps=np.int64(7)).timesteps == sampler.timesteps
    assert not torch.equal(sampler(LABELS, seed=0), fastdiff.sample(model, LABELS, steps=7, eta=1.0, seed=0))


def test_a_record_of_ddpm_takes_no_eta() -> None:
    model = a_model({"name": "ddpm", "x0_max": 2.0}, "learned_range")
    images = fastdiff.sample(model, LABELS, steps=5, seed=1, dtype=torch.float64)
    solver = functools.partial(ddpm, x0_max=2.0)
    expected = fastdiff.sample(
        a_model(None, "learned_range"), LABELS, steps=5, solver=solver, seed=1, dtype=torch.float64
    )
    assert torch.equal(images, expected)
    with pytest.raises(ValueError, match="eta"):
        fastdiff.Sampler(model, steps=5, eta=0.5)


@pytest.mark.parametrize(
    ("solver", "error", "match"),
    [
        ("ddim", TypeError, "solver must be a mapping"),
        ({"spacing": "leading:N"}, ValueError, "solver must have the 'name'"),
        ({"name": 3}, ValueError, "solver must have the 'name'"),
        ({"name": "ddim", "spacing": "leading"}, ValueError, "'spacing' must be a string with one N"),
        ({"name": "ddim", "spacing": 5}, ValueError, "'spacing' must be a string with one N"),
        ({"name": "ddim", "eps": None}, TypeError, "'eps' must be a number, a string, True or False"),
        ({"name": "ddim", 3: 4}, TypeError, "solver must be a mapping"),
    ],
    ids=str,
)
def test_records_of_no_form_are_refused(solver: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        a_model(solver)


@pytest.mark.parametrize(
    ("solver", "match"),
    [
        ({"name": "pndm"}, r"model.solver's name must be one of \['ddim', 'ddpm'\], got 'pndm'"),
        ({"name": "ddpm", "eps": "network"}, r"model.solver has options \['eps'\]"),
        ({"name": "ddim", "schedule": 3}, r"model.solver has options \['schedule'\]"),
        ({"name": "ddim", "eps": "mine"}, "eps must be 'x0' or 'network'"),
        ({"name": "ddim", "spacing": "every:N"}, "steps must be"),
    ],
    ids=str,
)
def test_records_that_no_solver_understands_are_refused_before_sampling(solver: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fastdiff.Sampler(a_model(solver), steps=5)


# ---- options of the solvers for other people's chains


def test_a_stride_of_its_own_leaves_gaps_between_rows() -> None:
    schedule = Schedule.named("linear")
    table = ddim(schedule, "linspace:7", stride=True)
    assert table.foreign
    stride = 1000 // 7
    for t, alpha_next in zip(table.t, table.alpha_next, strict=True):
        before = int(t) - stride
        expected = schedule.alphas_cumprod[before] ** 0.5 if before >= 0 else 1.0
        assert alpha_next == pytest.approx(expected, abs=1e-15)
    # nothing is foreign where the stride is the next time's
    for steps in ("leading:7", "trailing:10"):
        own, strided = ddim(schedule, steps), ddim(schedule, steps, stride=True)
        assert not strided.foreign and np.array_equal(own.c_x0, strided.c_x0)


def test_the_last_row_may_stop_at_the_first_time() -> None:
    schedule = Schedule.named("cosine")
    table = ddim(schedule, "leading:7+1", last="first")
    assert table.foreign and table.t[-1] == 1
    assert table.alpha_next[-1] == schedule.alphas_cumprod[0] ** 0.5
    assert not ddim(schedule, "leading:7+1").foreign


def test_a_table_that_is_not_foreign_still_joins_its_rows() -> None:
    table = ddim(Schedule.named("linear"), "linspace:7", stride=True)
    with pytest.raises(ValueError, match="the next row starts where this one ends"):
        replace(table, foreign=False)
    table = ddim(Schedule.named("linear"), "leading:7", last="first")
    with pytest.raises(ValueError, match="the last row's alpha_next = 1"):
        replace(table, foreign=False)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_x0_is_clipped_at_x0_max(name: str) -> None:
    schedule = Schedule.named("linear")
    assert (SOLVERS[name](schedule, 5, x0_max=2.5).x0_max == 2.5).all()
    assert np.isinf(SOLVERS[name](schedule, 5, x0_max=2.5, clip_x0=False).x0_max).all()
    for wrong in (0, -1.0, float("nan"), True, "1"):
        with pytest.raises(ValueError, match="x0_max must be a number above 0"):
            SOLVERS[name](schedule, 5, x0_max=wrong)


@pytest.mark.parametrize(("option", "error"), [({"stride": 1}, TypeError), ({"last": "second"}, ValueError)], ids=str)
def test_wrong_options_of_ddim(option: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(option))):
        ddim(Schedule.named("linear"), 5, **option)


def test_leading_with_an_offset() -> None:
    assert fastdiff.Sampler(a_model(), steps="leading:4+1").timesteps == [751, 501, 251, 1]
    assert fastdiff.Sampler(a_model(), steps="leading:4+249").timesteps[0] == 999
    with pytest.raises(ValueError, match="begins beyond t = 999; the largest offset is 249"):
        fastdiff.Sampler(a_model(), steps="leading:4+250")


# ---- guided channels


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("weight", [1.5, [0.0, 2.0, -1.0]], ids=["one w", "a w an image"])
def test_guidance_of_some_channels_leaves_the_others_conditional(variance: str, weight: Any) -> None:
    """A network of the two halves by hand: channel 0 combined, channel 1 the conditional row's own"""
    network = mixing_learned if variance == "learned_range" else mixing
    w = torch.as_tensor(weight, dtype=torch.float64).expand(3).view(3, 1, 1, 1)
    null = torch.full_like(LABELS, NULL)

    def by_hand(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        conditional = network(x, t, LABELS)
        combined = (1 + w) * conditional - w * network(x, t, null)
        return torch.cat((combined[:, :1], conditional[:, 1:]), 1)

    x_T, noise = randomness(6, 3)
    options: dict[str, Any] = dict(steps=6, solver="ddpm", x_T=x_T, noise=noise, dtype=torch.float64)
    guided = a_model(None, variance, guided_channels=1)
    expected = DiffusionModel(by_hand, "linear", "eps", variance, None, image_shape=SHAPE)
    images = fastdiff.sample(guided, LABELS, w=weight, **options)
    torch.testing.assert_close(images, fastdiff.sample(expected, num_images=3, **options), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(images, fastdiff.sample(a_model(None, variance), LABELS, w=weight, **options))


def test_all_channels_are_the_default() -> None:
    assert a_model(guided_channels=2).guided_channels is None
    for wrong in (0, 3, True, 1.0):
        with pytest.raises(ValueError, match=r"guided_channels must be an integer in \[1, 2\] or None"):
            a_model(guided_channels=wrong)


# ---- decoding


def test_latents_are_decoded_batch_by_batch() -> None:
    sizes = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        sizes.append(len(latents))
        return latents.repeat_interleave(2, 2)[:, :1]

    model = a_model(decode=decode)
    latents = fastdiff.sample(a_model(), LABELS, steps=4, seed=3)
    images = fastdiff.sample(model, LABELS, steps=4, seed=3, batch_size=2)
    assert sizes == [2, 1] and images.shape == (3, 1, 8, 4)
    torch.testing.assert_close(images, latents.repeat_interleave(2, 2)[:, :1])
    assert torch.equal(fastdiff.sample(model, LABELS, steps=4, seed=3, decode=False), latents)
    assert fastdiff.sample(model, [], steps=4).shape == (0, *SHAPE)


def test_what_does_not_decode_is_named() -> None:
    with pytest.raises(TypeError, match="decode must be a function"):
        a_model(decode=3)
    with pytest.raises(TypeError, match="decode must be True or False"):
        fastdiff.Sampler(a_model(), decode="no")  # type: ignore[arg-type]
    for wrong in (lambda latents: None, lambda latents: latents[:1], lambda latents: latents.sum()):
        with pytest.raises(ValueError, match=r"model.decode must return a tensor \(3, ...\)"):
            fastdiff.sample(a_model(decode=wrong), LABELS, steps=2)


def test_a_decode_that_runs_out_of_memory_counts_in_what_fits() -> None:
    def decode(latents: torch.Tensor) -> torch.Tensor:
        if len(latents) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return latents

    with pytest.raises(fastdiff.OutOfMemoryError, match="batch_size=1 fits"):
        fastdiff.sample(a_model(decode=decode), [1, 2, 3, 4], steps=2)

    def never(latents: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(fastdiff.OutOfMemoryError, match="not even one image fits"):
        fastdiff.sample(a_model(decode=never), [1, 2, 3, 4], steps=2)


def test_a_null_model_is_checked_whenever_it_is_set() -> None:
    model = a_model()
    with pytest.raises(ValueError, match="null_model must have the model's schedule"):
        model.null_model = DiffusionModel(mixing, "cosine", "eps", "fixed_small", 10, NULL, SHAPE)
    assert model.null_model is None


# ---- in a checkpoint


def test_a_checkpoint_keeps_solver_and_guided_channels(tmp_path: Path) -> None:
    model = digits(solver=LEADING)
    fastdiff.save(model, tmp_path / "a")
    assert fastdiff.load(tmp_path / "a").solver == LEADING
    fastdiff.save(MODEL, tmp_path / "b")
    loaded = fastdiff.load(tmp_path / "b")
    assert loaded.solver is None and loaded.guided_channels is None
    assert "solver" not in (tmp_path / "b" / "config.json").read_text()


def test_a_checkpoint_refuses_what_it_cannot_keep_or_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must have decode=None"):
        fastdiff.save(digits(decode=lambda x: x), tmp_path / "a")
    fastdiff.save(digits(solver=LEADING), tmp_path / "b")
    config = tmp_path / "b" / "config.json"
    text = config.read_text()
    for old, new, word in (
        ('"leading:N"', "7", "spacing"),
        ('"eps": "network"', '"eps": []', "eps"),
        ('"solver": {', '"solver": null, "x": {', "unknown"),
    ):
        config.write_text(text.replace(old, new))
        refused(tmp_path / "b", word)
    config.write_text(text.replace('"clip_x0": true', '"clip_x0": true, "guided_channels": null'))
    refused(tmp_path / "b", "guided_channels must be left out")


# ---- dtypes that a CPU emulates


def test_a_recorded_float16_runs_in_float32_on_a_cpu(tmp_path: Path) -> None:
    model = digits(dtype=torch.float16)
    assert fastdiff.Sampler(model, device="cpu").dtype == torch.float32
    assert fastdiff.Sampler(model, device="cpu", dtype="float16").dtype == torch.float16
    fastdiff.save(model, tmp_path / "a")
    loaded = fastdiff.load(tmp_path / "a")
    assert loaded.dtype == torch.float16 and loaded.parameters()[0].dtype == torch.float32
    assert fastdiff.load(tmp_path / "a", dtype=torch.float16).parameters()[0].dtype == torch.float16


def test_a_time_scale_is_a_network_of_other_times() -> None:
    scaled, plain = unet(time_scale=0.25).double(), unet().double()
    x, y = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 2])
    t = torch.tensor([12.0, 800.0], dtype=torch.float64)
    torch.testing.assert_close(scaled(x, t, y), plain(x, t / 4, y), rtol=0, atol=0)
    assert not torch.equal(scaled(x, t, y), plain(x, t, y))
    for wrong in (0, -1, float("inf"), True, "1"):
        with pytest.raises(ValueError, match="time_scale must be a positive number"):
            unet(time_scale=wrong)


def test_a_config_of_before_has_no_time_scale() -> None:
    config = unet().config
    fields = {key: value for key, value in config.to_dict().items() if key != "time_scale"}
    assert type(config).from_dict(fields) == config
