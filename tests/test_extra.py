"""Further per-image inputs, network(x, t, y, **extra): doubled like x, in its order, and checked where they are told"""

from __future__ import annotations

import pytest
import torch
from reference.networks import Recorder, mixing, randomness
from sampling_cases import EXTRA, SHAPE, STEPS, a_classifier, a_model, tinted
from test_engine import a_unet_model

import fastdiff
from fastdiff import DiffusionModel, Sampler
from fastdiff.model import UNet

OPTIONS = {"steps": STEPS, "solver": "ddpm", "dtype": "float64"}
LABELS, W = [1, 2, 3], [0.0, 1.5, -1.0]


class Enlarging(UNet):
    """Of fastdiff's protocol, and asks for pictures of half its size"""

    extra_shapes = {"low_res": (1, 4, 4)}  # noqa: RUF012

    def body(self, x: torch.Tensor, mod: torch.Tensor, *, low_res: torch.Tensor) -> torch.Tensor:
        assert len(low_res) == len(x) and low_res.dtype == x.dtype
        return super().body(x + torch.nn.functional.interpolate(low_res, scale_factor=2.0), mod)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None, *, low_res: torch.Tensor):
        low_res = torch.nn.functional.interpolate(low_res, scale_factor=2.0)
        return super().body(x + low_res, self.modulation(self.embedding(t, y)))

    def packed(self) -> torch.nn.Module:
        return self


def an_enlarging_model(seed_shift: float = 0.0, **options: object) -> DiffusionModel:
    source = a_unet_model()
    network = Enlarging(source.network.config).double()
    network.load_state_dict(source.network.state_dict())
    with torch.no_grad():
        network.mod.bias.add_(seed_shift)
    return DiffusionModel(network, "cosine", image_shape=(1, 8, 8), **options)


def plainly(model: DiffusionModel) -> DiffusionModel:
    """The same, through a function that hides the protocol"""
    network = model.network
    return DiffusionModel(
        lambda x, t, y, **extra: network(x, t, y, **extra), "cosine", image_shape=(1, 8, 8), dtype=torch.float64
    )


LOW_RES = {"low_res": randomness(0, 3, (1, 4, 4))[0]}


def test_each_row_gets_its_own_image_s() -> None:
    network = Recorder(tinted)
    sampler = Sampler(a_model(network), **OPTIONS)
    w = [0.0, 1.5, 2.0]
    images = sampler(LABELS, w, seed=[4, 5, 6], extra=EXTRA)
    # guided first, and their null rows last
    order = [1, 2, 0, 1, 2]
    for given in network.extra:
        assert given.keys() == EXTRA.keys()
        assert all(torch.equal(given[name], EXTRA[name][order]) for name in given)
    for i in range(3):
        one = {name: values[i : i + 1] for name, values in EXTRA.items()}
        alone = sampler(LABELS[i], w[i], seed=[4 + i], extra=one)
        torch.testing.assert_close(alone, images[i : i + 1], rtol=0, atol=1e-12)
    in_parts = Sampler(a_model(tinted), **OPTIONS, batch_size=2)(LABELS, w, seed=[4, 5, 6], extra=EXTRA)
    torch.testing.assert_close(in_parts, images, rtol=0, atol=1e-12)
    assert (sampler(LABELS, w, seed=[4, 5, 6], extra=EXTRA | {"tint": -EXTRA["tint"]}) - images).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_floats_are_cast_to_the_compute_dtype_and_others_stay(dtype: str) -> None:
    network = Recorder(tinted)
    before = {name: values.clone() for name, values in EXTRA.items()}
    fastdiff.sample(a_model(network), LABELS, steps=STEPS, dtype=dtype, extra=EXTRA)
    (given, *_) = network.extra
    assert given["tint"].dtype == getattr(torch, dtype) and given["kind"].dtype == torch.int64
    assert all(torch.equal(EXTRA[name], before[name]) for name in EXTRA)


@pytest.mark.parametrize("w", [0.0, W])
def test_a_network_of_the_protocol_takes_them_once_an_image(w) -> None:
    model = an_enlarging_model()
    images = Sampler(model, **OPTIONS)(LABELS, w, seed=0, extra=LOW_RES)
    expected = Sampler(plainly(model), **OPTIONS)(LABELS, w, seed=0, extra=LOW_RES)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-10)
    assert (Sampler(a_unet_model(), **OPTIONS)(LABELS, w, seed=0) - images).abs().max() > 1e-3


def test_the_network_that_guidance_leads_away_from_takes_them_too() -> None:
    def weak(x, t, y, *, tint, kind):
        return 0.7 * tinted(x, t, y, tint=tint, kind=kind) + 0.1

    weaker = Recorder(weak)
    null = a_model(weaker, null_label=None)
    images = Sampler(a_model(tinted, null_label=None, null_model=null), **OPTIONS)(
        LABELS, [0, 1.5, 0], seed=0, extra=EXTRA
    )

    def both(x, t, y, **extra):
        return 2.5 * tinted(x, t, y, **extra) - 1.5 * weak(x, t, y, **extra)

    expected = Sampler(a_model(both), **OPTIONS)(LABELS, seed=0, extra=EXTRA)
    torch.testing.assert_close(images[1], expected[1], rtol=0, atol=1e-12)
    assert [given["kind"].tolist() for given in weaker.extra] == [[5]] * STEPS


def test_a_second_network_of_the_protocol_takes_them_too() -> None:
    weaker = an_enlarging_model(0.3, null_label=None)
    model = an_enlarging_model(null_label=None, null_model=weaker)
    images = Sampler(model, **OPTIONS)(LABELS, [1.5, 0, 2.0], seed=0, extra=LOW_RES)
    factor = torch.tensor([1.5, 0, 2.0], dtype=torch.float64)[:, None, None, None]

    def both(x, t, y, *, low_res):
        strong, weak = (m.network(x, t, y, low_res=low_res) for m in (model, weaker))
        return (1 + factor) * strong - factor * weak

    expected = Sampler(DiffusionModel(both, "cosine", image_shape=(1, 8, 8)), **OPTIONS)
    torch.testing.assert_close(images, expected(LABELS, seed=0, extra=LOW_RES), rtol=0, atol=1e-10)


def test_networks_of_two_dtypes_are_fed_each_its_own() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=dtype))

        def forward(self, x, t, y, *, tint, kind):
            assert x.dtype == tint.dtype == self.scale.dtype and kind.dtype == torch.int64
            return self.scale * tinted(x, t, y, tint=tint, kind=kind)

    null = a_model(Scaled(torch.bfloat16), null_label=None)
    model = a_model(Scaled(torch.float32), null_label=None, null_model=null)
    assert Sampler(model, steps=STEPS)(LABELS, 1.5, seed=0, extra=EXTRA).isfinite().all()


@pytest.mark.parametrize("w", [0.0, 1.5, [1.5, 0.0, -1.0, 2.0, 0.0]])
@pytest.mark.parametrize("hoisted", [False, True], ids=["plain", "protocol"])
def test_a_padded_batch_is_an_eager_one(captured, hoisted: bool, w) -> None:
    model = an_enlarging_model() if hoisted else a_model(tinted)
    extra = {"low_res": randomness(0, 5, (1, 4, 4))[0]}
    if not hoisted:
        extra = {"tint": randomness(0, 5, (2, 1, 1))[0], "kind": torch.arange(5)}
    call = {"labels": [1, 2, 3, 4, 5], "w": w, "seed": 0}
    expected = Sampler(model, **OPTIONS, graph=False)(**call, extra=extra)
    sampler = Sampler(model, **OPTIONS)
    torch.testing.assert_close(sampler(**call, extra=extra), expected, rtol=0, atol=1e-12)
    assert len(captured) == 1 and [step.shape.n for step in sampler._steps.values()] == [6]
    # other values are data of the same graph, and so is another floating dtype, which is cast
    other = {name: (values * 2).float() if values.is_floating_point() else values for name, values in extra.items()}
    images = sampler(**call, extra=other)
    assert len(captured) == 1
    torch.testing.assert_close(images, Sampler(model, **OPTIONS, graph=False)(**call, extra=other), rtol=0, atol=1e-12)


def test_other_shapes_and_kinds_are_other_graphs(captured) -> None:
    sampler = Sampler(a_model(tinted), **OPTIONS)
    wide = EXTRA | {"tint": EXTRA["tint"].expand(3, *SHAPE)}
    narrow = EXTRA | {"kind": EXTRA["kind"].to(torch.int32)}
    images = [sampler(LABELS, seed=0, extra=extra) for extra in (EXTRA, wide, narrow, EXTRA)]
    assert len(captured) == 3
    assert all(torch.equal(image, images[0]) for image in images)


def test_a_mask_is_an_input_too(captured) -> None:
    def masked(x, t, y, *, mask):
        assert mask.dtype == torch.bool
        return mixing(torch.where(mask, x, 0), t, y)

    mask = torch.arange(5 * 32).reshape(5, *SHAPE) % 3 == 0
    images = Sampler(a_model(masked), **OPTIONS)([1] * 5, 1.5, seed=0, extra={"mask": mask})
    expected = Sampler(a_model(masked), **OPTIONS, graph=False)([1] * 5, 1.5, seed=0, extra={"mask": mask})
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-12)
    assert len(captured) == 1


def test_they_say_how_many_images_there_are() -> None:
    assert len(fastdiff.sample(a_model(tinted), 1, steps=STEPS, extra=EXTRA)) == 3


def test_out_of_memory_tries_batches_with_them() -> None:
    def greedy(x, t, y, *, tint, kind):
        assert len(tint) == len(kind) == len(x)
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tinted(x, t, y, tint=tint, kind=kind)

    extra = {"tint": torch.zeros(9, 2, 1, 1), "kind": torch.arange(9)}
    with pytest.raises(fastdiff.OutOfMemoryError, match="batch_size=2 fits"):
        Sampler(a_model(greedy), **OPTIONS)([1] * 9, seed=0, extra=extra)


def test_a_classifier_goes_without_them() -> None:
    sampler = Sampler(a_model(tinted), **OPTIONS, classifier=a_classifier())
    images = sampler(LABELS, 1.5, seed=0, extra=EXTRA)
    assert images.isfinite().all()
    assert not torch.equal(images, sampler(LABELS, 1.5, seed=0, extra=EXTRA, classifier_scale=0))


BAD = {
    "none": (None, r"extra must have low_res \(N, 1, 4, 4\), as the network takes, got nothing"),
    "another": ({"high_res": torch.zeros(3, 1, 4, 4)}, r"extra must have low_res .*, got \['high_res'\]"),
    "one more": (LOW_RES | {"mask": torch.zeros(3)}, r"extra must have low_res .*, got \['low_res', 'mask'\]"),
    "shape": ({"low_res": torch.zeros(3, 1, 8, 8)}, r"extra must have low_res .*, got low_res of shape \(3, 1, 8, 8\)"),
    "rows": ({"low_res": torch.zeros(2, 1, 4, 4)}, r"labels has 3, extra\['low_res'\] has 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_network_tells_of_them_is_checked_before_any_work(monkeypatch, case: str) -> None:
    extra, message = BAD[case]
    sampler, ran = Sampler(an_enlarging_model(), **OPTIONS), []
    body = Enlarging.body
    monkeypatch.setattr(Enlarging, "body", lambda *args, **extra: ran.append(1) or body(*args, **extra))
    with pytest.raises(ValueError, match=message):
        sampler(LABELS, seed=0, extra=extra)
    assert not ran
    assert sampler(LABELS, seed=0, extra=LOW_RES).isfinite().all() and ran


@pytest.mark.parametrize("name", ["x", "t", "y", "mod"])
def test_arguments_of_every_network_are_not_extra(name: str) -> None:
    with pytest.raises(ValueError, match=f"extra must not hold '{name}'"):
        fastdiff.sample("digits", 3, steps=1, extra={name: torch.zeros(1, 3)})


def test_the_unet_takes_none() -> None:
    with pytest.raises(ValueError, match=r"extra must have nothing, as the network takes, got \['low_res'\]"):
        fastdiff.sample("digits", 3, steps=1, extra={"low_res": torch.zeros(1, 1, 8, 8)})


def test_a_network_that_takes_none_and_says_so() -> None:
    class Closed:
        extra_shapes: dict[str, tuple[int, ...]] = {}  # noqa: RUF012
        __call__ = staticmethod(mixing)

    with pytest.raises(ValueError, match=r"extra must have nothing, as the network takes, got \['kind', 'tint'\]"):
        fastdiff.sample(a_model(Closed()), LABELS, steps=STEPS, extra=EXTRA)
    assert len(fastdiff.sample(a_model(Closed()), LABELS, steps=STEPS, extra={})) == 3


def test_what_the_second_network_tells_is_checked_too() -> None:
    common = {"null_label": None}
    null = DiffusionModel(Enlarging(a_unet_model().network.config).double(), "cosine", image_shape=(1, 8, 8), **common)
    model = a_unet_model(**common, null_model=null)
    with pytest.raises(ValueError, match="extra must have low_res"):
        Sampler(model, **OPTIONS)(LABELS, 1.5)
