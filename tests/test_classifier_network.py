"""The encoder of noisy images: ADM's way down and every head, against the equations in float64."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from reference.networks import randomised

from fastdiff.model import CLASSIFIER_PRESETS, EncoderConfig, EncoderUNet
from fastdiff.model.classifier import POOLS, AttentionPool2d
from fastdiff.model.convolution import Conv2d

TINY = EncoderConfig(
    image_size=8,
    in_channels=1,
    out_channels=5,
    channels=16,
    channel_mult=(1, 2),
    num_blocks=1,
    attention_resolutions=(4,),
    head_channels=8,
    groups=4,
)


def tiny(dtype: torch.dtype = torch.float64, **changes: object) -> EncoderUNet:
    return randomised(EncoderUNet(dataclasses.replace(TINY, **changes)).to(dtype))


def inputs(batch: int = 3, dtype: torch.dtype = torch.float64, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 1, side, side, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.linspace(3, 900.5, batch)


# The published networks


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("classifier-64", 65_438_568),
        ("classifier-128", 42_568_040),
        ("classifier-256", 54_096_360),
        ("classifier-512", 54_448_360),
    ],
)
def test_presets_have_the_published_parameter_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        net = EncoderUNet(CLASSIFIER_PRESETS[name])
    assert sum(p.numel() for p in net.parameters()) == count
    assert net.out["2"].positional_embedding.shape[1] == 8 * 8 + 1


HEADS: dict[str, dict[str, tuple[int, ...]]] = {
    "attention": {
        "0.weight": (32,), "0.bias": (32,), "2.positional_embedding": (32, 17), "2.qkv_proj.weight": (96, 32, 1),
        "2.qkv_proj.bias": (96,), "2.c_proj.weight": (5, 32, 1), "2.c_proj.bias": (5,),
    },
    "adaptive": {"0.weight": (32,), "0.bias": (32,), "3.weight": (5, 32, 1, 1), "3.bias": (5,)},
    # 16 + 16 + 16 + 32 of the input blocks, 32 of the middle
    "spatial": {"0.weight": (2048, 112), "0.bias": (2048,), "2.weight": (5, 2048), "2.bias": (5,)},
    "spatial_v2": {
        "0.weight": (2048, 112), "0.bias": (2048,), "1.weight": (2048,), "1.bias": (2048,),
        "3.weight": (5, 2048), "3.bias": (5,),
    },
}  # fmt: skip


@pytest.mark.parametrize("pool", POOLS)
def test_parameter_names_are_guided_diffusions(pool: str) -> None:
    def named(prefix: str, *leaves: str) -> set[str]:
        return {f"{prefix}.{leaf}.{p}" for leaf in leaves for p in ("weight", "bias")}

    res = ("in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3")
    attn = ("norm", "qkv", "proj_out")
    expected = named("time_embed", "0", "2") | named("input_blocks.0", "0") | {f"out.{name}" for name in HEADS[pool]}
    expected |= named("input_blocks.1.0", *res) | named("input_blocks.2.0", *res)
    expected |= named("input_blocks.3.0", *res, "skip_connection") | named("input_blocks.3.1", *attn)
    expected |= named("middle_block.0", *res) | named("middle_block.1", *attn) | named("middle_block.2", *res)
    net = tiny(pool=pool)
    state = net.state_dict()
    assert state.keys() - {"mod.weight", "mod.bias"} == expected
    assert {name: tuple(state[f"out.{name}"].shape) for name in HEADS[pool]} == HEADS[pool]
    blocks = ["input_blocks.1.0", "input_blocks.2.0", "input_blocks.3.0", "middle_block.0", "middle_block.2"]
    assert [name for name, _ in net.mod_layout] == blocks


# The equations


class Literal:
    """The network in float64, every line an equation; weights by guided-diffusion's names, ADM's options"""

    def __init__(self, net: EncoderUNet) -> None:
        self.config, self.p = net.config, net.state_dict()
        weights, biases = (
            self.p[f"mod.{leaf}"].split([rows for _, rows in net.mod_layout]) for leaf in ("weight", "bias")
        )
        names = [name for name, _ in net.mod_layout]
        self.emb_layers = {name: (w, b) for name, w, b in zip(names, weights, biases, strict=True)}

    def linear(self, h: torch.Tensor, name: str) -> torch.Tensor:
        return h @ self.p[f"{name}.weight"].flatten(1).T + self.p[f"{name}.bias"]

    def conv(self, h: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.p[f"{name}.weight"]
        return F.conv2d(h, weight, self.p[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(self, h: torch.Tensor, name: str, groups: int = 4) -> torch.Tensor:
        g = h.reshape(len(h), groups, -1)
        g = (g - g.mean(2, keepdim=True)) / (g.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
        affine = (-1,) + (1,) * (h.ndim - 2)
        return g.reshape(h.shape) * self.p[f"{name}.weight"].view(affine) + self.p[f"{name}.bias"].view(affine)

    def res(self, h: torch.Tensor, emb: torch.Tensor, name: str, down: bool = False) -> torch.Tensor:
        u = silu(self.norm(h, f"{name}.in_layers.0"))
        if down:
            u, h = (F.avg_pool2d(part, 2) for part in (u, h))
        u = self.conv(u, f"{name}.in_layers.2")
        weight, bias = self.emb_layers[name]
        scale, shift = (emb @ weight.T + bias)[:, :, None, None].chunk(2, 1)
        u = self.conv(silu(self.norm(u, f"{name}.out_layers.0") * (1 + scale) + shift), f"{name}.out_layers.3")
        skip = f"{name}.skip_connection"
        return u + (self.conv(h, skip) if f"{skip}.weight" in self.p else h)

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """qkv: (B, L, 3 * heads * 8), columns [q, k, v][head][8] -> (B, L, heads * 8)"""
        q, k, v = qkv.chunk(3, 2)
        out = []
        for head in range(q.shape[2] // 8):
            one = slice(8 * head, 8 * head + 8)
            scores = torch.exp(q[..., one] @ k[..., one].transpose(1, 2) / math.sqrt(8))
            out.append(scores / scores.sum(2, keepdim=True) @ v[..., one])
        return torch.cat(out, 2)

    def attention(self, h: torch.Tensor, name: str) -> torch.Tensor:
        tokens = self.norm(h, f"{name}.norm").flatten(2).transpose(1, 2)
        a = self.linear(self.attend(self.linear(tokens, f"{name}.qkv")), f"{name}.proj_out")
        return h + a.transpose(1, 2).reshape(h.shape)

    def pooled(self, h: torch.Tensor) -> torch.Tensor:
        """Every query is answered, and the first answer taken"""
        tokens = h.flatten(2)
        tokens = torch.cat((tokens.mean(2, keepdim=True), tokens), 2) + self.p["out.2.positional_embedding"]
        a = self.attend(self.linear(tokens.transpose(1, 2), "out.2.qkv_proj"))
        return self.linear(a, "out.2.c_proj")[:, 0]

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        freqs = torch.tensor([10000 ** (-i / 8) for i in range(8)], dtype=torch.float64)
        features = torch.cat([(t[:, None] * freqs).cos(), (t[:, None] * freqs).sin()], 1)
        emb = silu(self.linear(silu(self.linear(features, "time_embed.0")), "time_embed.2"))
        hs = [self.conv(x, "input_blocks.0.0")]
        hs.append(self.res(hs[-1], emb, "input_blocks.1.0"))
        hs.append(self.res(hs[-1], emb, "input_blocks.2.0", down=True))
        hs.append(self.attention(self.res(hs[-1], emb, "input_blocks.3.0"), "input_blocks.3.1"))
        h = self.attention(self.res(hs[-1], emb, "middle_block.0"), "middle_block.1")
        h = self.res(h, emb, "middle_block.2")
        match self.config.pool:
            case "attention":
                return self.pooled(silu(self.norm(h, "out.0")))
            case "adaptive":
                return self.linear(silu(self.norm(h, "out.0")).mean((2, 3)), "out.3")
        means = self.linear(torch.cat([part.mean((2, 3)) for part in (*hs, h)], 1), "out.0")
        if self.config.pool == "spatial":
            return self.linear(means.clamp(min=0), "out.2")
        return self.linear(silu(self.norm(means, "out.1", groups=32)), "out.3")


def silu(h: torch.Tensor) -> torch.Tensor:
    return h * h.sigmoid()


@pytest.mark.parametrize("pool", POOLS)
def test_logits_are_the_equations(pool: str) -> None:
    net, (x, t) = tiny(pool=pool), inputs()
    expected = Literal(net)(x, t.double())
    torch.testing.assert_close(net(x, t.double()), expected, rtol=1e-10, atol=1e-10)
    assert expected.std() > 0.1


def test_the_attention_pool_is_the_first_answer_in_the_new_order() -> None:
    pool = randomised(AttentionPool2d(3, 16, 2, 7).double())
    x = torch.randn(2, 16, 3, 3, dtype=torch.float64)

    def answer(rows: torch.Tensor) -> torch.Tensor:
        literal = Literal.__new__(Literal)
        literal.p = {f"out.2.{name}": value for name, value in pool.state_dict().items()}
        for leaf in ("weight", "bias"):
            literal.p[f"out.2.qkv_proj.{leaf}"] = literal.p[f"out.2.qkv_proj.{leaf}"][rows]
        return literal.pooled(x)

    new = torch.arange(48)
    torch.testing.assert_close(pool(x), answer(new), rtol=1e-10, atol=1e-10)
    legacy = new.view(2, 3, 8).transpose(0, 1).flatten()
    swapped = new.view(3, 16).roll(1, 0).flatten()
    for wrong in (legacy, swapped):
        assert (pool(x) - answer(wrong)).abs().max() > 1e-2


def test_positions_start_random_at_the_size_of_a_token() -> None:
    torch.manual_seed(0)
    positions = AttentionPool2d(8, 512, 8, 10).positional_embedding
    assert positions.shape == (512, 65)
    assert positions.std().item() == pytest.approx(512**-0.5, rel=0.02)


# Laws


@pytest.mark.parametrize("pool", POOLS)
def test_the_gradient_of_the_logits_is_that_of_the_function(pool: str) -> None:
    net = tiny(pool=pool, image_size=4, attention_resolutions=(2,)).requires_grad_(False)
    x, t = inputs(2, side=4)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(x, t).log_softmax(1), (x,))


@pytest.mark.parametrize("pool", POOLS)
def test_every_parameter_gets_a_gradient(pool: str) -> None:
    net = tiny(pool=pool)
    net(*inputs()).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("pool", POOLS)
def test_images_of_a_batch_do_not_see_each_other_and_each_sees_x_and_t(pool: str) -> None:
    net, (x, t) = tiny(pool=pool), inputs()
    out = net(x, t)
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, out, rtol=1e-10, atol=1e-10)
    for moved in (net(x.roll(1, 0), t), net(x, t + 0.25)):
        assert ((moved - out).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("pool", POOLS)
def test_a_seed_fixes_a_fresh_network(pool: str) -> None:
    nets = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        nets.append(EncoderUNet(dataclasses.replace(TINY, pool=pool)))
    first, again, other = (net.state_dict() for net in nets)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["mod.weight"], other["mod.weight"])
    x, t = inputs(dtype=torch.float32)
    logits = nets[0](x, t)
    assert torch.equal(logits, nets[1](x, t)) and logits.shape == (3, 5)
    # guided-diffusion's adaptive pool ends in a convolution that starts as nothing
    assert logits.any() == (pool != "adaptive")


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_are_float32_whatever_the_parameters_are(dtype: torch.dtype, pool: str) -> None:
    x, t = inputs(dtype=torch.float32)
    exact = tiny(pool=pool)(x.double(), t)
    out = tiny(dtype, pool=pool)(x, t)
    assert out.dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 0.08}[dtype]
    assert (out - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("pool", POOLS)
def test_autocast_runs_in_bfloat16_and_gives_float32(pool: str) -> None:
    net, (x, t) = tiny(torch.float32, pool=pool), inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x, t)
    exact = net(x, t)
    assert out.dtype == torch.float32 and not torch.equal(out, exact)
    assert (out - exact).norm() < 0.08 * exact.norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_layout_and_biases_left_to_the_next_op_change_no_value(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, (x, t) = tiny(in_channels=3), inputs()
    x = x.repeat(1, 3, 1, 1)
    expected = net(x, t)
    net = net.to(memory_format=layout)
    torch.testing.assert_close(net(x.contiguous(memory_format=layout), t), expected, rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(Conv2d, "unbiased", lambda self, x: (self._conv_forward(x, self.weight, None), self.bias))
    torch.testing.assert_close(net(x, t), expected, rtol=1e-10, atol=1e-10)


def test_gradient_checkpointing_recomputes_the_same_gradients() -> None:
    grads, calls = [], []
    for checkpointing in (False, True):
        net = tiny(gradient_checkpointing=checkpointing, dropout=0.3).train()
        calls.append(0)

        def count(*_: object) -> None:
            calls[-1] += 1

        net.middle_block[0].register_forward_pre_hook(count)
        x, t = inputs()
        x.requires_grad_()
        torch.manual_seed(3)
        # of x alone, as guidance asks, which a reentrant checkpoint refuses
        (of_x,) = torch.autograd.grad(net(x, t).log_softmax(1)[:, 2].sum(), x)
        torch.manual_seed(3)
        net(x, t).square().mean().backward()
        grads.append({"x": of_x} | {name: p.grad for name, p in net.named_parameters()})
    assert calls == [2, 4]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pool", ["attention", "spatial_v2"])
def test_torch_compile_traces_it_whole(pool: str) -> None:
    torch.compiler.reset()
    net, (x, t) = tiny(torch.float32, pool=pool), inputs(dtype=torch.float32)
    results = []
    for call in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        seen = x.clone().requires_grad_()
        out = call(seen, t)
        results.append((out, *torch.autograd.grad(out.square().sum(), seen)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


# What is refused


def test_only_the_attention_pool_is_tied_to_a_size() -> None:
    x, t = torch.randn(3, 1, 16, 6, dtype=torch.float64), inputs()[1]
    for pool in POOLS[1:]:
        assert tiny(pool=pool)(x, t).shape == (3, 5)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 8, 8\).*attention pool.*got \(3, 1, 16, 6\)"):
        tiny()(x, t)


@pytest.mark.parametrize(
    ("x", "t", "match"),
    [
        pytest.param((3, 1, 8, 7), (3,), "x must have shape", id="odd-width"),
        pytest.param((3, 2, 8, 8), (3,), "x must have shape", id="channels"),
        pytest.param((1, 8, 8), (1,), "x must have shape", id="no-batch"),
        pytest.param((3, 1, 8, 8), (2,), r"t must have shape \(3,\)", id="t-length"),
        pytest.param((3, 1, 8, 8), (), r"t must have shape \(3,\)", id="t-scalar"),
    ],
)
def test_forward_errors(x: tuple[int, ...], t: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EncoderUNet(TINY)(torch.zeros(x), torch.zeros(t))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"pool": "mean"}, ValueError, r"pool must be one of \['attention', .*got 'mean'"),
        ({"pool": ["spatial"]}, ValueError, "pool must be one of"),
        ({"out_channels": 0}, ValueError, "out_channels must be at least 1"),
        ({"head_channels": 12}, ValueError, "head_channels must divide"),
        ({"groups": 5}, ValueError, "groups must divide"),
    ],
    ids=str,
)
def test_config_errors(changes: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize("name", CLASSIFIER_PRESETS)
def test_config_survives_json(name: str) -> None:
    text = json.dumps(CLASSIFIER_PRESETS[name].to_dict())
    assert EncoderConfig.from_dict(json.loads(text)) == CLASSIFIER_PRESETS[name]


def test_from_dict_names_unknown_and_missing_keys() -> None:
    fields = TINY.to_dict()
    fields["num_labels"] = fields.pop("pool")
    with pytest.raises(ValueError, match=r"EncoderConfig has unknown keys \['num_labels'\] and lacks keys \['pool'\]"):
        EncoderConfig.from_dict(fields)
