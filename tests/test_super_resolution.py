"""The upsampler: a U-Net that sees a smaller image, resized, behind its own channels."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from reference.networks import randomised

from fastdiff.diffusion_model import is_conditioned_apart
from fastdiff.model import UPSAMPLER_PRESETS, SuperResolutionConfig, SuperResolutionUNet, UNet, UNetConfig
from fastdiff.model import packed as module
from fastdiff.model.packed import packed

TINY = SuperResolutionConfig(
    image_size=8,
    in_channels=2,
    out_channels=4,
    channels=16,
    channel_mult=(1, 2),
    num_blocks=1,
    attention_resolutions=(4,),
    head_channels=8,
    num_labels=4,
    groups=4,
    low_res_size=4,
    low_res_channels=3,
)


def tiny(dtype: torch.dtype = torch.float64, **changes: object) -> SuperResolutionUNet:
    return randomised(SuperResolutionUNet(dataclasses.replace(TINY, **changes)).to(dtype))


def inputs(batch: int = 3, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """x, t, y, low_res"""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    low_res = torch.randn(batch, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.linspace(0, 999, batch), torch.arange(batch) % 4, low_res


@pytest.mark.parametrize(
    ("name", "count", "sizes"),
    [("upsampler-64-256", 311_795_910, (64, 256)), ("upsampler-128-512", 308_835_270, (128, 512))],
)
def test_presets_have_the_published_parameter_counts(name: str, count: int, sizes: tuple[int, int]) -> None:
    config = UPSAMPLER_PRESETS[name]
    with torch.device("meta"):
        net = SuperResolutionUNet(config)
    assert sum(p.numel() for p in net.parameters()) == count
    assert (config.low_res_size, config.image_size) == sizes
    assert net.extra_shapes == {"low_res": (3, sizes[0], sizes[0])}
    assert net.conv_first.weight.shape == (192, 6, 3, 3)


def bilinear(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Each output pixel from the four about its centre, which lies where it lies in the picture (half-pixel centres)"""

    def ends(size: int, old: int) -> list[tuple[int, int, float]]:
        centres = [max((i + 0.5) * old / size - 0.5, 0.0) for i in range(size)]
        return [(int(c), min(int(c) + 1, old - 1), c - int(c)) for c in centres]

    out = image.new_empty(*image.shape[:2], height, width)
    for i, (top, bottom, down) in enumerate(ends(height, image.shape[2])):
        for j, (left, right, across) in enumerate(ends(width, image.shape[3])):
            upper = (1 - across) * image[:, :, top, left] + across * image[:, :, top, right]
            lower = (1 - across) * image[:, :, bottom, left] + across * image[:, :, bottom, right]
            out[:, :, i, j] = (1 - down) * upper + down * lower
    return out


def as_unet(net: SuperResolutionUNet) -> UNet:
    """The same weights as a U-Net of images with low_res's channels behind"""
    kept = {field.name for field in dataclasses.fields(UNetConfig)}
    fields = {name: value for name, value in net.config.to_dict().items() if name in kept}
    unet = UNet(UNetConfig.from_dict(fields | {"in_channels": 5})).double().eval()
    unet.load_state_dict(net.state_dict())
    return unet


@pytest.mark.parametrize("size", [(4, 4), (1, 1), (3, 5), (8, 8), (11, 2)], ids=str)
def test_it_is_a_unet_of_the_image_and_the_resized_one_behind(size: tuple[int, int]) -> None:
    net, (x, t, y, _) = tiny(), inputs()
    low_res = torch.randn(3, 3, *size, dtype=torch.float64)
    out = net(x, t, y, low_res=low_res)
    torch.testing.assert_close(
        out, as_unet(net)(torch.cat((x, bilinear(low_res, 8, 8)), 1), t, y), rtol=1e-10, atol=1e-10
    )
    assert out.shape == (3, 4, 8, 8)
    assert ((out - net(x, t, y, low_res=low_res.roll(1, 0))).flatten(1).abs().amax(1) > 1e-3).all()


def test_sizes_other_than_image_size_run() -> None:
    net, (_, t, y, low_res) = tiny(), inputs()
    x = torch.randn(3, 2, 16, 6, dtype=torch.float64)
    expected = as_unet(net)(torch.cat((x, bilinear(low_res, 16, 6)), 1), t, y)
    torch.testing.assert_close(net(x, t, y, low_res), expected, rtol=1e-10, atol=1e-10)


def test_a_fresh_network_is_zero_and_has_guided_diffusions_names() -> None:
    net = SuperResolutionUNet(TINY)
    x, t, y, low_res = inputs(dtype=torch.float32)
    assert torch.equal(net(x, t, y, low_res), torch.zeros(3, 4, 8, 8))
    shapes = {name: p.shape for name, p in as_unet(net.double()).state_dict().items()}
    assert {name: p.shape for name, p in net.state_dict().items()} == shapes
    assert shapes["input_blocks.0.0.weight"] == (16, 5, 3, 3)


def test_it_is_conditioned_apart_and_says_what_else_it_takes() -> None:
    net = tiny()
    assert is_conditioned_apart(net) and net.num_labels == 4
    assert net.extra_shapes == {"low_res": (3, 4, 4)}
    x, t, y, low_res = inputs()
    assert torch.equal(net.body(x, net.modulation(net.embedding(t, y)), low_res=low_res), net(x, t, y, low_res=low_res))
    unlabelled = tiny(num_labels=None)
    assert unlabelled(x, t, None, low_res=low_res).shape == (3, 4, 8, 8)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("m", [0, 1, 3])
def test_rows_that_share_an_image_share_its_smaller_one(m: int, fast: bool) -> None:
    net = tiny(torch.float32 if fast else torch.float64)
    x, t, y, low_res = inputs(dtype=net.mod.weight.dtype)
    rows = torch.tensor([*range(3), *range(m)])
    t, y = t[rows] + torch.arange(3 + m), torch.cat((y, (y[:m] + 1) % 4))
    running = packed(net) if fast else net
    rtol = 1e-5 if fast else 1e-10
    with torch.no_grad():
        out = running.body(x, running.modulation(running.embedding(t, y)), low_res=low_res)
        torch.testing.assert_close(out, net(x[rows], t, y, low_res[rows]), rtol=rtol, atol=10 * rtol)
    assert m == 0 or (out[3:] - out[:m]).abs().max() > 1e-3


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
@pytest.mark.parametrize("changes", [{}, {"resblock_updown": False}, {"num_labels": None, "scale_shift": False}])
def test_packed_computes_what_the_network_does(changes: dict[str, object]) -> None:
    net = tiny(torch.float32, **changes)
    fast = net.packed()
    assert fast is not net and isinstance(fast, SuperResolutionUNet) and fast.extra_shapes == net.extra_shapes
    assert isinstance(fast.conv_first, module._PackedConv2d)
    for batch in (1, 2, 5):
        x, t, y, low_res = inputs(batch, torch.float32)
        y = None if net.num_labels is None else y
        with torch.no_grad():
            torch.testing.assert_close(fast(x, t, y, low_res), net(x, t, y, low_res), rtol=1e-5, atol=1e-4)


def test_every_parameter_gets_a_gradient_and_so_does_the_smaller_image() -> None:
    net, (x, t, y, low_res) = tiny(), inputs()
    low_res.requires_grad_()
    net(x, t, y, low_res).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert (low_res.grad.flatten(1).abs().amax(1) > 0).all()


def test_gradient_checkpointing_recomputes_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        net, (x, t, y, low_res) = tiny(gradient_checkpointing=checkpointing), inputs()
        net.train()(x, t, y, low_res).square().mean().backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


def test_a_float32_smaller_image_serves_a_bfloat16_network() -> None:
    x, t, y, low_res = inputs(dtype=torch.float32)
    out = tiny(torch.bfloat16)(x.bfloat16(), t, y, low_res)
    exact = tiny()(x.double(), t, y, low_res.double())
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() < 0.05 * exact.norm()


def test_torch_compile_traces_it_whole() -> None:
    torch.compiler.reset()
    net = tiny(torch.float32)
    given = inputs(dtype=torch.float32)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), net(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "got"),
    [
        (None, "None"),
        ((3, 2, 4, 4), r"\(3, 2, 4, 4\)"),
        ((1, 3, 4, 4), r"\(1, 3, 4, 4\)"),
        ((6, 3, 4, 4), r"\(6, 3, 4, 4\)"),
        ((3, 4, 4), r"\(3, 4, 4\)"),
        ((3, 3, 0, 4), r"\(3, 3, 0, 4\)"),
    ],
    ids=["none", "channels", "one", "doubled", "no-batch", "empty"],
)
def test_a_wrong_low_res_is_named(shape: tuple[int, ...] | None, got: str) -> None:
    net, (x, t, y, right) = tiny(), inputs()
    low_res = None if shape is None else torch.zeros(shape, dtype=torch.float64)
    mod = net.modulation(net.embedding(t.repeat(2), y.repeat(2)))
    for call in (lambda: net(x, t, y, low_res), lambda: net.body(x, mod, low_res=low_res)):
        with pytest.raises(ValueError, match=rf"low_res must have shape \(3, 3, h, w\).*got {got}"):
            call()
    with pytest.raises(TypeError, match=r"low_res must be floating-point.*got torch\.uint8"):
        net(x, t, y, right.to(torch.uint8))
    assert net(x[:0], t[:0], y[:0], right[:0]).shape == (0, 4, 8, 8)


def test_x_is_checked_without_the_smaller_images_channels() -> None:
    net, (x, t, y, low_res) = tiny(), inputs()
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2, H, W\).*got \(3, 5, 8, 8\)"):
        net(torch.cat((x, x, x), 1)[:, :5], t, y, low_res)
    with pytest.raises(ValueError, match=r"t must have shape \(3,\)"):
        net(x, t[:2], y, low_res)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"low_res_size": 16}, ValueError, "low_res_size must be at most image_size=8, got 16"),
        ({"low_res_size": 0}, ValueError, "low_res_size must be at least 1"),
        ({"low_res_size": 4.0}, TypeError, "low_res_size must be an int"),
        ({"low_res_channels": 0}, ValueError, "low_res_channels must be at least 1"),
        ({"low_res_channels": True}, TypeError, "low_res_channels must be an int"),
        ({"num_labels": 0}, ValueError, "num_labels must be at least 1"),
    ],
    ids=str,
)
def test_config_errors(changes: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("config", [TINY, *UPSAMPLER_PRESETS.values()], ids=["tiny", *UPSAMPLER_PRESETS])
def test_config_survives_json(config: SuperResolutionConfig) -> None:
    assert SuperResolutionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_names_unknown_and_missing_keys() -> None:
    fields = TINY.to_dict()
    fields["large_size"] = fields.pop("low_res_size")
    match = r"SuperResolutionConfig has unknown keys \['large_size'\] and lacks keys \['low_res_size'\]"
    with pytest.raises(ValueError, match=match):
        SuperResolutionConfig.from_dict(fields)
