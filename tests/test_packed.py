import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastdiff import placement
from fastdiff.model import UNet, UNetConfig
from fastdiff.model import packed as module
from fastdiff.model.convolution import Conv2d
from fastdiff.model.packed import packed
from fastdiff.placement import fingerprint, structure

SMALL = UNetConfig(
    image_size=8,
    in_channels=1,
    out_channels=2,
    channels=16,
    channel_mult=(1, 2),
    num_blocks=1,
    attention_resolutions=(4,),
    head_channels=8,
    num_labels=4,
    groups=4,
)
KINDS: dict[str, dict[str, Any]] = {
    "adm": {},
    "embedding-added": {"scale_shift": False},
    "conv-resample": {"resblock_updown": False},
    "pool-resample": {"resblock_updown": False, "conv_resample": False},
    "three-levels": {"channel_mult": (1, 2, 3), "num_blocks": 2, "attention_resolutions": (8, 2)},
    "no-labels-rgb": {"num_labels": None, "in_channels": 3, "out_channels": 6},
    "constant-heads": {"num_heads": 2, "head_channels": None},
}
HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported() if torch.backends.mkldnn.is_available() else False
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not HAS_BF16, reason="oneDNN has no bfloat16 here")),
]

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")


def network(dtype: torch.dtype = torch.float32, **changes: Any) -> UNet:
    """Every parameter random: a fresh network is zero and would hide mistakes"""
    net = UNet(dataclasses.replace(SMALL, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) / fan_in**0.5)
    return net.to(dtype).to(memory_format=torch.channels_last).eval()


def inputs(net: UNet, batch: int = 2, height: int = 8, width: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, net.config.in_channels, height, width, generator=generator)
    y = None if net.num_labels is None else torch.arange(batch) % 4
    return x.to(net.mod.weight.dtype), torch.linspace(0, 999, batch), y


def assert_same(out: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor) -> None:
    """float32: within 1e-5; bfloat16: no farther from the float64 result than the network is, but for a half"""
    assert out.shape == expected.shape and out.dtype == expected.dtype and exact.std() > 0.1
    if out.dtype == torch.float32:
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    else:
        error = (out.double() - exact).square().mean().sqrt()
        assert error < 1.5 * (expected.double() - exact).square().mean().sqrt()


def in_float64(net: UNet) -> UNet:
    copy = UNet(net.config).double().eval()
    copy.load_state_dict(net.state_dict())
    return copy


@pytest.fixture
def many_positions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of large attention maps at every size, in pieces of 64 rows where there are as many"""
    if request.param:
        monkeypatch.setattr(module, "_MANY_POSITIONS", 0)
        monkeypatch.setattr(module, "_MAX_SCORES", 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("many_positions", [False, True], ids=["sdpa", "products"], indirect=True)
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_packed_computes_what_the_network_does(
    changes: dict[str, Any], many_positions: None, dtype: torch.dtype
) -> None:
    net = network(dtype, **changes)
    fast = packed(net)
    assert fast is not net
    # sizes and batches that nothing was packed for
    for batch, height, width in ((2, 8, 8), (1, 16, 4), (3, 4, 12), (5, 24, 24)):
        x, t, y = inputs(net, batch, height, width)
        with torch.no_grad():
            assert_same(fast(x, t, y), net(x, t, y), in_float64(net)(x.double(), t, y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_rows_that_share_an_image_do(changes: dict[str, Any], dtype: torch.dtype) -> None:
    net = network(dtype, **changes)
    fast, exact = packed(net), in_float64(net)
    x, t, y = inputs(net, 3)
    shared = torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        t, y = t[shared] + torch.arange(5), None if y is None else y.flip(0)[shared]
        out = fast.body(x, fast.modulation(fast.embedding(t, y)))
        assert_same(out, net(x[shared], t, y), exact(x[shared].double(), t, y))


def weights_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in net.state_dict().items()}


def test_parameters_are_shared_and_the_network_is_left_alone() -> None:
    net = network()
    before, modules, print_before = weights_of(net), list(net.named_modules()), fingerprint(net)
    fast = packed(net)
    theirs = dict(fast.named_parameters())
    assert theirs.keys() == dict(net.named_parameters()).keys()
    assert all(p is theirs[name] for name, p in net.named_parameters())
    assert list(net.named_modules()) == modules and fingerprint(net) == print_before

    # what a caller does to the modules of one is not done to the other
    fast.out["0"] = nn.Identity()
    assert dict(net.named_modules()) == dict(modules)
    x, t, y = inputs(net)
    net.train()
    net(x, t, y).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())


def test_gradients_and_autocast_go_through_the_shared_parameters() -> None:
    net = network()
    fast = packed(net)
    x, t, y = inputs(net)
    g = torch.randn(net(x, t, y).shape)
    grads = []
    for either in (net, fast):
        net.zero_grad()
        either(x, t, y).backward(g)
        grads.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x, t, y), net(x, t, y), rtol=0, atol=0)


def test_inference_mode_and_an_empty_batch() -> None:
    net = network()
    with torch.inference_mode():
        fast = packed(net)
        x, t, y = inputs(net)
        torch.testing.assert_close(fast(x, t, y), net(x, t, y))
        assert fast(x[:0], t[:0], y[:0]).shape == (0, 2, 8, 8)


class TheirConv2d(Conv2d):
    pass


def with_their_convolution(net: UNet) -> nn.Module:
    net.out["2"] = TheirConv2d(16, 2, 3, padding=1).eval()
    return net


def with_a_hook(net: UNet) -> nn.Module:
    net.middle_block[0].register_forward_hook(lambda *_: None)
    return net


def with_a_forward(net: UNet) -> nn.Module:
    block = net.middle_block[0]
    block.forward = block.forward  # type: ignore[method-assign]
    return net


def with_two_dtypes(net: UNet) -> nn.Module:
    net.mod.double()
    return net


@pytest.mark.parametrize(
    "unfit",
    [
        lambda net: net.double(),
        lambda net: net.half(),
        lambda net: net.to("meta"),
        lambda net: net.train(),
        lambda net: nn.Sequential(net),
        with_their_convolution,
        with_a_hook,
        with_a_forward,
        with_two_dtypes,
    ],
    ids=["float64", "float16", "meta", "training", "no-unet", "subclass", "hook", "forward", "two-dtypes"],
)
def test_what_cannot_be_packed_comes_back_itself(unfit: Callable[[UNet], nn.Module]) -> None:
    net = unfit(network())
    assert packed(net) is net


def test_without_onednn_the_network_comes_back_itself() -> None:
    net = network()
    with torch.backends.mkldnn.flags(enabled=False):
        assert packed(net) is net
    assert packed(net) is not net


@pytest.mark.parametrize("shape", [(3, 3), (1, 3), (5, 2)], ids=str)
def test_four_phases_are_the_convolution_of_the_doubled_image(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    conv, x = Conv2d(5, 7, 3, padding=1), torch.randn(2, 5, *shape)
    with torch.no_grad():
        out = module._PackedUpConv(conv, 4)(x)
        expected = conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_every_convolution_is_packed() -> None:
    """One that is left out would cost time and no digit"""
    fast = packed(network(channel_mult=(1, 2, 3), attention_resolutions=(4, 2)))
    plain = {name for name, m in fast.named_modules() if type(m) is Conv2d}
    doubled = {name for name, m in fast.named_modules() if getattr(m, "packed_up", None) is not None}
    assert len(doubled) == 2 and plain == {f"{name}.in_layers.2" for name in doubled}
    for resample in (True, False):
        fast = packed(network(resblock_updown=False, conv_resample=resample))
        plain = {name for name, m in fast.named_modules() if type(m) is Conv2d}
        doubled = {name for name, m in fast.named_modules() if getattr(m, "packed_conv", None) is not None}
        assert len(doubled) == int(resample) and plain == {f"{name}.conv" for name in doubled}


def in_place(net: UNet) -> None:
    with torch.no_grad():
        net.middle_block[0].in_layers["2"].weight[3, 1, 2, 0] += 0.5


def through_data(net: UNet) -> None:
    weight = net.middle_block[0].in_layers["2"].weight
    weight.data.copy_(weight.data.flip(0))


def last_element_through_data(net: UNet) -> None:
    net.label_emb.weight.data[-1, -1] += 1


def two_rows_change_places(net: UNet) -> None:
    weight = net.mod.weight
    weight.data[[0, 1]] = weight.data[[1, 0]]


def replaced(net: UNet) -> None:
    net.mod.weight = nn.Parameter(net.mod.weight.detach().clone())


def moved(net: UNet) -> None:
    net.mod.weight.data = net.mod.weight.data.clone()


def restrided(net: UNet) -> None:
    net.to(memory_format=torch.contiguous_format)


def cast(net: UNet) -> None:
    net.bfloat16()


def buffer(net: UNet) -> None:
    net.table.data[2] = 7


def hooked(net: UNet) -> None:
    with_a_hook(net)


def with_another_forward(net: UNet) -> None:
    net.middle_block[0].forward = lambda *args: args[0]


def with_fewer_heads(net: UNet) -> None:
    net.middle_block[1].num_heads = 1


def with_another_activation(net: UNet) -> None:
    net.time_embed[1] = torch.nn.Tanh()


@pytest.mark.parametrize("inference", [False, True], ids=["normal", "inference-tensors"])
@pytest.mark.parametrize(
    "change",
    [
        in_place, through_data, last_element_through_data, two_rows_change_places, replaced, moved, restrided, cast,
        buffer, hooked, with_another_forward, with_fewer_heads, with_another_activation,
    ],
)  # fmt: skip
def test_a_fingerprint_sees(change: Callable[[UNet], None], inference: bool) -> None:
    with torch.inference_mode() if inference else contextlib.nullcontext():
        net = network()
        net.register_buffer("table", torch.zeros(3))
        before = structure(net), fingerprint(net)
        assert (structure(net), fingerprint(net)) == before and hash((structure(net), fingerprint(net))) == hash(before)
        change(net)
        assert (structure(net), fingerprint(net)) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool], ids=str)
def test_every_byte_counts_in_any_layout(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(3 * 5 * 70 * 31 + 1, generator=generator).gt(0).to(dtype)
    for tensor in (whole[1:], whole[1:].view(3, 5, 70, 31).permute(0, 3, 1, 2), whole[::2]):
        before = placement._checksum(tensor)
        for index in (0, 1, 511, tensor.numel() - 1):
            place = tensor[tuple(int(i) for i in torch.unravel_index(torch.tensor(index), tensor.shape))]
            old = place.clone()
            place.copy_(torch.logical_not(old))
            assert placement._checksum(tensor) != before
            place.copy_(old)
        assert placement._checksum(tensor) == before


def test_a_packed_network_is_stale_after_a_change_that_the_fingerprint_sees() -> None:
    """Why a caller must compare fingerprints"""
    net = network()
    fast, before = packed(net), fingerprint(net)
    x, t, y = inputs(net)
    through_data(net)
    with torch.no_grad():
        assert not torch.allclose(fast(x, t, y), net(x, t, y))
        assert fingerprint(net) != before
        torch.testing.assert_close(packed(net)(x, t, y), net(x, t, y))


def test_a_cpu_samples_the_packed_network() -> None:
    """Also where the network could be used in place: it would cost time and no digit"""
    net, place = network(), placement.Placed(torch.device("cpu"), None)
    for _ in range(2):
        with place.current(net) as running:
            assert running is not net and any(type(m) is module._PackedConv2d for m in running.modules())
            first = running
    through_data(net)
    with place.current(net) as running:
        assert running is not first and running is not net
    with place.current(net) as again:
        assert again is running
