import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from reference.networks import randomised

from fastdiff.model import PRESETS, UNet, UNetConfig, blocks, timestep_embedding
from fastdiff.model.blocks import AttentionBlock, Downsample, Features, ResBlock, Upsample
from fastdiff.model.convolution import Conv2d

TINY = UNetConfig(
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


def tiny_unet(dtype: torch.dtype = torch.float32, **changes: object) -> UNet:
    return randomised(UNet(dataclasses.replace(TINY, **changes)).to(dtype))


def inputs(batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.linspace(0, 999, batch), torch.arange(batch) % 4


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("adm-64", 295_904_454),
        ("adm-128", 421_529_606),
        ("adm-256", 553_838_086),
        ("adm-256-uncond", 552_814_086),
        ("adm-512", 558_997_638),
    ],
)
def test_presets_have_the_published_parameter_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        net = UNet(PRESETS[name])
    assert sum(p.numel() for p in net.parameters()) == count


def test_parameter_names_are_guided_diffusions() -> None:
    def named(prefix: str, *leaves: str) -> set[str]:
        return {f"{prefix}.{leaf}.{p}" for leaf in leaves for p in ("weight", "bias")}

    res = ("in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3")
    attn = ("norm", "qkv", "proj_out")
    expected = (
        {"label_emb.weight"} | named("time_embed", "0", "2") | named("out", "0", "2") | named("input_blocks.0", "0")
    )
    expected |= named("input_blocks.1.0", *res) | named("input_blocks.2.0", *res)
    expected |= named("input_blocks.3.0", *res, "skip_connection") | named("input_blocks.3.1", *attn)
    expected |= named("middle_block.0", *res) | named("middle_block.1", *attn) | named("middle_block.2", *res)
    for i in range(4):
        expected |= named(f"output_blocks.{i}.0", *res, "skip_connection")
    expected |= named("output_blocks.0.1", *attn) | named("output_blocks.1.1", *attn) | named("output_blocks.1.2", *res)
    net = UNet(TINY)
    assert set(net.state_dict()) - {"mod.weight", "mod.bias"} == expected
    assert net.middle_block[1].qkv.weight.shape == (96, 32, 1)
    assert [name for name, _ in net.mod_layout] == [
        "input_blocks.1.0", "input_blocks.2.0", "input_blocks.3.0", "middle_block.0", "middle_block.2",
        "output_blocks.0.0", "output_blocks.1.0", "output_blocks.1.2", "output_blocks.2.0", "output_blocks.3.0",
    ]  # fmt: skip


@pytest.mark.parametrize("scale_shift", [True, False])
def test_each_block_gets_the_rows_of_mod_that_mod_layout_names(scale_shift: bool) -> None:
    net = tiny_unet(scale_shift=scale_shift)
    seen: dict[str, torch.Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, ResBlock):
            module.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[1]}))
    x, t, y = inputs()
    net(x, t, y)
    mod, row = net.modulation(net.embedding(t, y)), 0
    assert set(seen) == {name for name, _ in net.mod_layout}
    for name, rows in net.mod_layout:
        assert rows == net.get_submodule(name).out_channels * (2 if scale_shift else 1)
        torch.testing.assert_close(seen[name], mod[:, row : row + rows], rtol=0, atol=0)
        row += rows
    assert row == net.mod.out_features


@pytest.mark.parametrize("scale_shift", [True, False], ids=["adagn", "add"])
@pytest.mark.parametrize(
    "out_channels, resample, split",
    [(8, None, 0), (8, "up", 0), (8, "down", 0), (12, None, 0), (12, None, 3), (12, None, 4)],
)
def test_resblock_is_the_equation(out_channels: int, resample: str | None, split: int, scale_shift: bool) -> None:
    """split: channels of the first of two tensors that stand for their concatenation"""
    block = randomised(ResBlock(8, out_channels, groups=4, scale_shift=scale_shift, resample=resample).double())
    x = torch.randn(2, 8, 6, 4, dtype=torch.float64)
    parts = [Features(part) for part in (x.split((split, 8 - split), 1) if split else (x,))]
    mod = torch.randn(2, block.mod_rows, dtype=torch.float64)
    p = block.state_dict()

    def norm(h: torch.Tensor, name: str) -> torch.Tensor:
        g = h.reshape(h.shape[0], 4, -1)
        g = (g - g.mean(2, keepdim=True)) / (g.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return g.reshape(h.shape) * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def resampled(h: torch.Tensor) -> torch.Tensor:
        if resample == "up":
            return h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if resample == "down":
            return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
        return h

    h = norm(x, "in_layers.0")
    h = F.conv2d(resampled(h * h.sigmoid()), p["in_layers.2.weight"], p["in_layers.2.bias"], padding=1)
    if scale_shift:
        scale, shift = mod[:, :out_channels, None, None], mod[:, out_channels:, None, None]
        h = norm(h, "out_layers.0") * (1 + scale) + shift
    else:
        h = norm(h + mod[:, :, None, None], "out_layers.0")
    h = F.conv2d(h * h.sigmoid(), p["out_layers.3.weight"], p["out_layers.3.bias"], padding=1)
    skip = resampled(x)
    if out_channels != 8:
        weight = p["skip_connection.weight"][:, :, 0, 0]
        skip = torch.einsum("oc,bchw->bohw", weight, skip) + p["skip_connection.bias"][:, None, None]
    out = block(parts[0], mod, *parts[1:]).x
    torch.testing.assert_close(out, skip + h, rtol=1e-10, atol=1e-10)


def test_a_block_that_resamples_keeps_its_channels() -> None:
    with pytest.raises(ValueError, match="must keep its channels, got 8 and 12"):
        ResBlock(8, 12, groups=4, resample="up")


@pytest.mark.parametrize("scale_shift", [True, False], ids=["adagn", "add"])
@pytest.mark.parametrize("m", [0, 1, 2, 3])
def test_what_both_rows_of_an_image_share_is_computed_once(m: int, scale_shift: bool) -> None:
    """x of N rows under mod of N + M is x with its first M rows once more"""
    net = tiny_unet(torch.float64, scale_shift=scale_shift)
    x, t, y = inputs(3, torch.float64)
    mod = net.modulation(net.embedding(torch.cat((t, t[:m])), torch.cat((y, (y[:m] + 1) % 3))))
    rows: list[int] = []
    block = net.get_submodule("input_blocks.1.0")
    for module in (net.conv_first, block.in_layers["0"], block.conv_in, block.out_layers["0"], net.middle_block[0]):
        module.register_forward_hook(lambda _, __, out: rows.append(len(out[0] if isinstance(out, tuple) else out)))
    out = net.body(x, mod)
    assert rows == [3, 3, 3, 3 + m, 3 + m]
    torch.testing.assert_close(out, net.body(torch.cat((x, x[:m])), mod), rtol=1e-10, atol=1e-10)
    assert m == 0 or (out[3:] - out[:m]).abs().max() > 1e-3
    for wrong in (mod[:2], torch.cat((mod, mod, mod))):
        with pytest.raises(ValueError, match="mod must have N to 2N rows, N = 3"):
            net.body(x, wrong)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("most_rows", [1, blocks.MOST_ROWS])
def test_attention_is_a_softmax_per_head_of_qkv_rows(
    monkeypatch: pytest.MonkeyPatch, heads: int, layout: torch.memory_format, most_rows: int
) -> None:
    """Also where a batch has more rows than a grid"""
    monkeypatch.setattr(blocks, "MOST_ROWS", most_rows)
    seen: list[int] = []
    op = F.scaled_dot_product_attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append(len(q))
        return op(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    C, ch = 16, 16 // heads
    block = randomised(AttentionBlock(C, heads, groups=4).double())
    x = torch.randn(2, C, 3, 5, dtype=torch.float64).contiguous(memory_format=layout)
    tokens = F.group_norm(x, 4, block.norm.weight, block.norm.bias, 1e-5).flatten(2)  # (B, C, HW)
    qkv = torch.einsum("oc,bcn->bon", block.qkv.weight[:, :, 0], tokens) + block.qkv.bias[:, None]
    h = torch.empty_like(tokens)
    for b in range(2):
        for head in range(heads):
            rows = slice(head * ch, (head + 1) * ch)
            q, k, v = qkv[b, :C][rows], qkv[b, C : 2 * C][rows], qkv[b, 2 * C :][rows]  # each (ch, HW)
            a = torch.exp(q.T @ k / math.sqrt(ch))
            h[b, rows] = v @ (a / a.sum(1, keepdim=True)).T
    h = torch.einsum("oc,bcn->bon", block.proj_out.weight[:, :, 0], h) + block.proj_out.bias[:, None]
    out = block(Features(x)).x
    assert seen == ([1, 1] if most_rows == 1 else [2])
    torch.testing.assert_close(out, x + h.view_as(x), rtol=1e-10, atol=1e-10)
    assert out.stride() == x.stride()


def test_resampling_with_and_without_convolution() -> None:
    x = torch.randn(2, 4, 6, 6)
    down, up = Downsample(4, conv=True), Upsample(4, conv=True)
    assert down(Features(x)).x.shape == (2, 4, 3, 3)
    torch.testing.assert_close(down(Features(x)).x, F.conv2d(x, down.op.weight, down.op.bias, padding=1)[..., ::2, ::2])
    copies = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(Features(x)).x, F.conv2d(copies, up.conv.weight, up.conv.bias, padding=1))
    torch.testing.assert_close(Downsample(4, conv=False)(Features(copies)).x, x)
    torch.testing.assert_close(Upsample(4, conv=False)(Features(x)).x, copies)
    assert not list(Downsample(4, conv=False).parameters()) and not list(Upsample(4, conv=False).parameters())


@pytest.mark.parametrize("t", [0.0, 1.0, 13.0, 999.0, 412.375])
def test_timestep_embedding_is_cos_then_sin(t: float) -> None:
    freqs = [10000 ** (-i / 8) for i in range(8)]
    expected = [math.cos(t * f) for f in freqs] + [math.sin(t * f) for f in freqs]
    out = timestep_embedding(torch.tensor([t], dtype=torch.float64), 16)
    torch.testing.assert_close(out, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-12)
    low = timestep_embedding(torch.tensor([t]), 16)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), out, rtol=0, atol=1e-7 * max(t, 1))


def test_timestep_embedding_takes_integers_and_stays_on_its_device() -> None:
    torch.testing.assert_close(timestep_embedding(torch.tensor([7]), 8), timestep_embedding(torch.tensor([7.0]), 8))
    # A meta tensor refuses host reads and operands from the host
    assert timestep_embedding(torch.zeros(3, device="meta"), 8).device.type == "meta"


@pytest.mark.parametrize(("shape", "dim", "match"), [((), 8, "t must"), ((2, 1), 8, "t must"), ((2,), 7, "dim must")])
def test_timestep_embedding_errors(shape: tuple[int, ...], dim: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        timestep_embedding(torch.zeros(shape), dim)


VARIANTS = [
    pytest.param({}, id="adm"),
    pytest.param({"scale_shift": False}, id="add"),
    pytest.param({"resblock_updown": False}, id="conv-resample"),
    pytest.param({"resblock_updown": False, "conv_resample": False}, id="pool-resample"),
    pytest.param({"channel_mult": (0.5, 1, 2), "num_blocks": 2, "head_channels": 8}, id="half-width"),
    pytest.param({"num_heads": 4, "head_channels": None, "attention_resolutions": (8, 4)}, id="four-heads"),
    pytest.param({"channel_mult": (1,), "attention_resolutions": ()}, id="one-level"),
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_fresh_network_is_zero_and_a_random_one_sees_x_t_and_y(changes: dict[str, object]) -> None:
    x, t, y = inputs()
    fresh = UNet(dataclasses.replace(TINY, **changes))
    assert torch.equal(fresh(x, t, y), torch.zeros(3, 2, 8, 8))
    net = tiny_unet(**changes)
    with torch.no_grad():
        out = net(x, t, y)
        assert out.shape == (3, 2, 8, 8) and out.isfinite().all()
        assert torch.equal(net(x, t, y), out)
        for moved in (net(x.roll(1, 0), t, y), net(x, t + 0.25, y), net(x, t, (y + 1) % 4)):
            assert ((moved - out).flatten(1).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_parameter_gets_a_gradient(changes: dict[str, object]) -> None:
    net = tiny_unet(**changes)
    net(*inputs()).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("changes", VARIANTS)
def test_biases_can_be_left_to_the_next_op(monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]) -> None:
    """As on a GPU; also where rows of an image share what comes before the first label"""
    net = tiny_unet(**changes).double()
    x, t, y = inputs()
    embedding = net.embedding(torch.cat((t, t[:2])), torch.cat((y, y[1:])))

    def body() -> torch.Tensor:
        return net.body(x.double(), net.modulation(embedding))

    expected = body()
    monkeypatch.setattr(Conv2d, "unbiased", lambda self, x: (self._conv_forward(x, self.weight, None), self.bias))
    torch.testing.assert_close(body(), expected, rtol=1e-10, atol=1e-10)


def test_unconditional_network_takes_no_labels() -> None:
    net = tiny_unet(num_labels=None)
    x, t, y = inputs()
    assert net(x, t).shape == (3, 2, 8, 8)
    assert "label_emb.weight" not in net.state_dict()
    with pytest.raises(ValueError, match="y must be None for num_labels=None"):
        net(x, t, y)


def test_embedding_modulation_and_body_compose_to_forward() -> None:
    net = tiny_unet()
    x, t, y = inputs()
    assert torch.equal(net.body(x, net.modulation(net.embedding(t, y))), net(x, t, y))


def test_images_of_a_batch_do_not_see_each_other() -> None:
    net = tiny_unet(torch.float64)
    x, t, y = inputs(4, torch.float64)
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(net(x, t, y), alone, rtol=1e-10, atol=1e-10)


def test_sizes_other_than_image_size_run() -> None:
    net = tiny_unet()
    _, t, y = inputs()
    assert net(torch.randn(3, 1, 16, 6), t, y).shape == (3, 2, 16, 6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_layout_changes_no_value_and_activations_are_channels_last(layout: torch.memory_format) -> None:
    x, t, y = inputs(3, torch.float64)
    expected = tiny_unet(torch.float64)(x, t, y)
    net = tiny_unet(torch.float64).to(memory_format=layout)
    strays: list[str] = []

    def watch(name: str, out: Features) -> None:
        if not out.x.is_contiguous(memory_format=torch.channels_last):
            strays.append(name)

    for name, module in net.named_modules():
        if isinstance(module, ResBlock | AttentionBlock):
            module.register_forward_hook(lambda _, __, out, name=name: watch(name, out))
    out = net(x.contiguous(memory_format=layout), t, y)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert strays == []


def test_bfloat16_network_follows_float32() -> None:
    x, t, y = inputs()
    exact = tiny_unet()(x, t, y)
    out = tiny_unet().to(torch.bfloat16)(x, t, y)
    assert out.dtype == torch.bfloat16
    # 8 bits of mantissa through some 30 roundings
    assert (out.float() - exact).norm() < 0.05 * exact.norm()


def test_autocast_leaves_float32_parameters_and_runs_in_bfloat16() -> None:
    net = tiny_unet()
    x, t, y = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x, t, y)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in net.parameters())
    exact = net(x, t, y)
    assert (out.float() - exact).norm() < 0.05 * exact.norm()


def test_dropout_acts_in_training_only() -> None:
    net = tiny_unet(dropout=0.5)
    x, t, y = inputs()
    assert torch.equal(net(x, t, y), tiny_unet()(x, t, y))
    net.train()
    assert not torch.equal(net(x, t, y), net(x, t, y))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_recomputes_the_same_gradients(dropout: float) -> None:
    x, t, y = inputs()
    grads, calls = [], []
    for checkpointing in (False, True):
        net = tiny_unet(gradient_checkpointing=checkpointing, dropout=dropout).train()
        calls.append(0)

        def count(*_: object) -> None:
            calls[-1] += 1

        net.middle_block[0].register_forward_pre_hook(count)
        torch.manual_seed(3)
        net(x, t, y).square().mean().backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    assert calls == [1, 2]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)
    # a gradient with respect to x alone, as guidance takes it, recomputes nothing: that would read generators' states
    net.eval()(x.requires_grad_(), t, y).sum().backward()
    assert calls == [1, 3] and x.grad is not None


@pytest.mark.parametrize(
    ("x", "t", "y", "match"),
    [
        pytest.param((3, 1, 8, 7), (3,), (3,), "x must have shape", id="odd-width"),
        pytest.param((3, 2, 8, 8), (3,), (3,), "x must have shape", id="channels"),
        pytest.param((1, 8, 8), (1,), (1,), "x must have shape", id="no-batch"),
        pytest.param((3, 1, 8, 8), (2,), (3,), r"t must have shape \(3,\)", id="t-length"),
        pytest.param((3, 1, 8, 8), (), (3,), r"t must have shape \(3,\)", id="t-scalar"),
        pytest.param((3, 1, 8, 8), (3,), None, r"y must be labels in \[0, 4\)", id="no-labels"),
    ],
)
def test_forward_errors(x: tuple[int, ...], t: tuple[int, ...], y: tuple[int, ...] | None, match: str) -> None:
    labels = None if y is None else torch.zeros(y, dtype=torch.long)
    with pytest.raises(ValueError, match=match):
        UNet(TINY)(torch.zeros(x), torch.zeros(t), labels)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"image_size": 9}, ValueError, "image_size must be divisible by 2"),
        ({"image_size": 8.0}, TypeError, "image_size must be an int"),
        ({"channels": 0}, ValueError, "channels must be at least 1"),
        ({"channels": 17, "groups": 17}, ValueError, "channels must be even"),
        ({"num_blocks": True}, TypeError, "num_blocks must be an int"),
        ({"groups": 5}, ValueError, "groups must divide"),
        ({"channel_mult": (1, 0.1)}, ValueError, "groups must divide"),
        ({"channel_mult": ()}, ValueError, "channel_mult must hold"),
        ({"channel_mult": (1, -2)}, ValueError, "channel_mult must hold"),
        ({"channel_mult": (1, 1e308)}, ValueError, "channel_mult must hold"),
        ({"channel_mult": "12"}, TypeError, "channel_mult must be a sequence"),
        ({"attention_resolutions": (2,)}, ValueError, r"attention_resolutions must be among .*got \[2\]"),
        ({"num_heads": 2}, ValueError, "exactly one of num_heads and head_channels"),
        ({"head_channels": None}, ValueError, "exactly one of num_heads and head_channels"),
        ({"head_channels": 12}, ValueError, "head_channels must divide"),
        ({"head_channels": None, "num_heads": 5}, ValueError, "num_heads must divide"),
        ({"num_labels": 0}, ValueError, "num_labels must be at least 1"),
        ({"dropout": 1.0}, ValueError, r"dropout must be a number in \[0, 1\)"),
        ({"scale_shift": 1}, TypeError, "scale_shift must be True or False"),
    ],
    ids=str,
)
def test_config_errors(changes: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json(name: str) -> None:
    text = json.dumps(PRESETS[name].to_dict())
    assert UNetConfig.from_dict(json.loads(text)) == PRESETS[name]


def test_from_dict_names_unknown_and_missing_keys() -> None:
    fields = TINY.to_dict()
    fields["depth"] = fields.pop("num_blocks")
    with pytest.raises(ValueError, match=r"unknown keys \['depth'\] and lacks keys \['num_blocks'\]"):
        UNetConfig.from_dict(fields)
