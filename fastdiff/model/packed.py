"""The UNet for inference on a CPU: convolutions whose weights oneDNN has laid out once, not in every call

A packed network shares every parameter with the network it was made from; only the packed weights are its own. What
the packed weights cannot do (autograd, autocast, another dtype, tracing) falls to the shared parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.model.blocks import AdaGroupNorm, AttentionBlock, Downsample, Features, ResBlock, Stage, Upsample
from fastdiff.model.convolution import Conv2d
from fastdiff.model.super_resolution import SuperResolutionUNet
from fastdiff.model.unet import UNet

__all__ = ["packed"]

_KNOWN = {
    *(AdaGroupNorm, AttentionBlock, Conv2d, Downsample, ResBlock, Stage, SuperResolutionUNet, UNet, Upsample),
    *(nn.AvgPool2d, nn.Conv1d, nn.Embedding, nn.Identity, nn.Linear, nn.ModuleDict, nn.ModuleList),
    *(nn.Sequential, nn.SiLU),
}
_OPS = ("_reorder_convolution_weight", "_convolution_pointwise", "_linear_pointwise")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# oneDNN lays a weight out for the batch it is told; two rows are one image and its null row
_BATCH = 2
# from so many positions on, scores by oneDNN's product are faster than scaled_dot_product_attention on a CPU
_MANY_POSITIONS = 512
# scores of one product, which should stay in cache
_MAX_SCORES = 1 << 20


def packed(network: nn.Module) -> nn.Module:
    """A UNet with the same methods and results for inference, or the network itself where there is nothing to gain

    It is the network that is given back where it is no plain UNet or SuperResolutionUNet in evaluation mode, with
    parameters on a CPU that are all float32 or all bfloat16, or where torch has no oneDNN for them. The network stays
    as it is and can still be trained; a change of its weights makes the packed one stale. Takes any batch, H and W.
    """
    if not isinstance(network, UNet) or not _packs(network):
        return network
    return _pack(network, network.config.image_size)


def _packs(network: UNet) -> bool:
    mkldnn = torch.backends.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled and all(hasattr(torch.ops.mkldnn, name) for name in _OPS)):
        return False
    for module in network.modules():
        changed = "forward" in vars(module) or any(vars(module)[name] for name in _HOOKS)
        if type(module) not in _KNOWN or module.training or changed:
            return False
    tensors = [*network.parameters(), *network.buffers()]
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes == {torch.bfloat16}:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        supported = dtypes == {torch.float32}
    plain = all(t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter) for t in tensors)
    return supported and plain


def _pack(network: UNet, size: int) -> UNet:
    """size: the side of the images that the weights are laid out for; others are right, and may be slower"""
    whole = _sharing(network)
    modules = whole._modules
    sizes = [size]
    modules["input_blocks"] = _sharing(network.input_blocks)
    for i, stage in enumerate(network.input_blocks):
        modules["input_blocks"]._modules[str(i)] = _pack_stage(stage, sizes)
    modules["middle_block"] = _pack_stage(network.middle_block, sizes)
    modules["output_blocks"] = _sharing(network.output_blocks)
    for i, stage in enumerate(network.output_blocks):
        modules["output_blocks"]._modules[str(i)] = _pack_stage(stage, sizes)
    modules["out"] = _sharing(network.out)
    modules["out"]._modules["2"] = _PackedConv2d.of(network.out["2"], sizes[-1])
    return whole


def _sharing(module: Any, cls: Any = None) -> Any:
    """A module with the same parameters and children, whose own tables of them can be changed"""
    clone = object.__new__(cls or type(module))
    vars(clone).update(vars(module))
    for table in ("_parameters", "_buffers", "_modules"):
        vars(clone)[table] = dict(vars(module)[table])
    return clone


def _pack_stage(stage: Any, sizes: list[int]) -> Any:
    """sizes: the side that the layers see, last; a layer that resamples appends its own"""
    clone = _sharing(stage)
    for name, layer in stage._modules.items():
        side = sizes[-1]
        if isinstance(layer, ResBlock):
            clone._modules[name] = _PackedResBlock.of(layer, side)
            sizes.append({"up": 2 * side, "down": side // 2, None: side}[layer.resample])
        elif isinstance(layer, AttentionBlock):
            clone._modules[name] = _PackedAttentionBlock.of(layer, side)
        elif isinstance(layer, Upsample):
            clone._modules[name] = _PackedUpsample.of(layer, side)
            sizes.append(2 * side)
        elif isinstance(layer, Downsample):
            clone._modules[name] = _sharing(layer)
            if isinstance(layer.op, Conv2d):
                clone._modules[name]._modules["op"] = _PackedConv2d.of(layer.op, side)
            sizes.append(side // 2)
        elif isinstance(layer, Conv2d):
            clone._modules[name] = _PackedConv2d.of(layer, side)
    return clone


class _Weight:
    """A convolution's weight as oneDNN wants it, stride 1 unless given, and its bias"""

    def __init__(self, weight: Tensor, bias: Tensor | None, padding: list[int], stride: list[int], side: int) -> None:
        weight = weight.detach()
        self.dtype = weight.dtype
        self.bias = bias.detach() if bias is not None else None
        self.options = (padding, stride, [1, 1], 1)
        shape = [_BATCH, weight.shape[1], side, side]
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight.contiguous(), *self.options, shape)

    def usable(self, x: Tensor) -> bool:
        return x.dtype == self.dtype and x.device.type == "cpu" and x.numel() > 0 and _eager()

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """The convolution of x, plus `added` of the output's shape"""
        x = x.contiguous(memory_format=torch.channels_last)
        if added is None:
            return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.options, "none", [], "")
        added = added.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, added, self.weight, self.bias, *self.options, "add", 1.0, None, [], None
        )


def _eager() -> bool:
    """Whether oneDNN's own operations may run: they have no autograd, no autocast and no tracing"""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


class _PackedConv2d(Conv2d):
    packed_weight: _Weight

    @classmethod
    def of(cls, conv: Any, side: int) -> Any:
        """The packed form of a Conv2d that pads with zeros; any other convolution as it is"""
        ordinary = conv.groups == 1 and conv.padding_mode == "zeros" and conv.dilation == (1, 1)
        if not ordinary or isinstance(conv.padding, str):
            return conv
        clone = _sharing(conv, cls)
        clone.packed_weight = _Weight(conv.weight, conv.bias, list(conv.padding), list(conv.stride), side)
        return clone

    def forward(self, x: Tensor) -> Tensor:
        return self.packed_weight(x) if self.packed_weight.usable(x) else super().forward(x)

    def plus(self, x: Tensor, added: Tensor) -> Tensor:
        """The convolution of x, plus `added`, in one rounding"""
        return self.packed_weight(x, added) if self.packed_weight.usable(x) else super().forward(x) + added


class _PackedUpConv:
    """Nearest-neighbour doubling and a 3x3 convolution as four 2x2 convolutions of the small image

    Output pixel (2 i + a, 2 j + b) sees source rows i - 1 + a and i + a only, so the rows of the kernel that meet the
    same source row are summed: 4/9 of the arithmetic. With padding 1 on every side, one convolution computes all four.
    """

    def __init__(self, conv: nn.Conv2d, side: int) -> None:
        self.channels = conv.out_channels
        weight = conv.weight.detach().to(torch.float32)
        phases = [_phase(_phase(weight, 2, a), 3, b) for a in (0, 1) for b in (0, 1)]
        bias = None if conv.bias is None else conv.bias.repeat(4)
        self.weight = _Weight(torch.cat(phases).to(conv.weight.dtype), bias, [1, 1], [1, 1], side)

    def __call__(self, x: Tensor) -> Tensor:
        rows, _, height, width = x.shape
        z = self.weight(x)  # (B, 4 C, H + 1, W + 1)
        y = z.new_empty((rows, height, 2, width, 2, self.channels))
        for i, part in enumerate(z.permute(0, 2, 3, 1).split(self.channels, 3)):
            a, b = divmod(i, 2)
            y[:, :, a, :, b] = part[:, a : a + height, b : b + width]
        return y.view(rows, 2 * height, 2 * width, self.channels).permute(0, 3, 1, 2)


def _phase(weight: Tensor, dim: int, which: int) -> Tensor:
    """Two taps of three along dim: [w0, w1 + w2] for the even outputs, [w0 + w1, w2] for the odd ones"""
    first, middle, last = weight.split(1, dim)
    return torch.cat((first + middle, last) if which else (first, middle + last), dim)


def _doubles(conv: nn.Conv2d) -> bool:
    """Whether a convolution has the shape that _PackedUpConv takes"""
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


class _PackedUpsample(Upsample):
    packed_conv: _PackedUpConv | None

    @classmethod
    def of(cls, layer: Upsample, side: int) -> Any:
        clone = _sharing(layer, cls)
        conv = layer.conv
        clone.packed_conv = _PackedUpConv(conv, side) if isinstance(conv, Conv2d) and _doubles(conv) else None
        return clone

    def forward(self, h: Features) -> Features:
        if self.packed_conv is None or not self.packed_conv.weight.usable(h.x):
            return super().forward(h)
        return Features(self.packed_conv(h.x))


class _PackedResBlock(ResBlock):
    packed_up: _PackedUpConv | None

    @classmethod
    def of(cls, block: ResBlock, side: int) -> Any:
        clone = _sharing(block, cls)
        conv: Any = block.in_layers["2"]
        clone.packed_up = _PackedUpConv(conv, side) if block.resample == "up" and _doubles(conv) else None
        side = {"up": 2 * side, "down": side // 2, None: side}[block.resample]
        for name, leaf in (("in_layers", "2"), ("out_layers", "3")):
            layers = clone._modules[name] = _sharing(block._modules[name])
            if clone.packed_up is None or name == "out_layers":
                layers._modules[leaf] = _PackedConv2d.of(layers._modules[leaf], side)
        if isinstance(block.skip_connection, Conv2d):
            clone._modules["skip_connection"] = _PackedConv2d.of(block.skip_connection, side)
        return clone

    def forward(self, h: Features, mod: Tensor, h2: Features | None = None) -> Features:
        conv_out = self.out_layers["3"]
        if not isinstance(conv_out, _PackedConv2d) or not conv_out.packed_weight.usable(h.x):
            return super().forward(h, mod, h2)
        # two inputs cost a CPU more than one concatenation
        x = h.x if h2 is None else torch.cat((h.x, _repeated(h2.x, len(h.x))), 1)
        if self.packed_up is not None:
            u = self.packed_up(self.in_layers["0"](Features(x)))
        else:
            u = self.in_layers["2"](self.in_layers["0"](Features(x), resample=self.resample))
        if self.scale_shift:
            scale, shift = mod.chunk(2, dim=1)
            u = self.out_layers["0"](Features(u), scale=scale, shift=shift)
        else:
            u = self.out_layers["0"](Features(_repeated(u, len(mod)) + mod[:, :, None, None]))
        if self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self.resample == "down":
            x = F.avg_pool2d(x, 2)
        return Features(conv_out.plus(u, _repeated(self.skip_connection(x), len(u))))


def _repeated(x: Tensor, rows: int) -> Tensor:
    """Row b of the result is row b of x, or b - B from row B on"""
    return x if len(x) == rows else torch.cat((x, x[: rows - len(x)]))


class _PackedAttentionBlock(AttentionBlock):
    packed_qkv: _Weight
    packed_out: _Weight

    @classmethod
    def of(cls, block: AttentionBlock, side: int) -> Any:
        clone = _sharing(block, cls)
        for name, conv in (("packed_qkv", block.qkv), ("packed_out", block.proj_out)):
            setattr(clone, name, _Weight(conv.weight[..., None], conv.bias, [0, 0], [1, 1], side))
        return clone

    def forward(self, h: Features) -> Features:
        if not self.packed_qkv.usable(h.x):
            return super().forward(h)
        B, C, H, W = h.x.shape
        qkv = self.packed_qkv(self.norm(h, silu=False))
        a = _attention(qkv.permute(0, 2, 3, 1).reshape(B, H * W, 3, self.num_heads, C // self.num_heads))
        return Features(self.packed_out(a.view(B, H, W, C).permute(0, 3, 1, 2), h.x))


def _attention(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(ch)) v, (B, L, heads, ch) of q, k, v (B, L, 3, heads, ch); scores and softmax in float32"""
    B, L, _, heads, ch = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, L, ch)
    if L < _MANY_POSITIONS:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()
    q, k = ((part.to(torch.float32) * ch**-0.25).contiguous() for part in (q, k))
    v = v.transpose(2, 3).contiguous()
    out = qkv.new_empty((B, L, heads, ch))
    rows = max(_MAX_SCORES // L, 64)
    for b in range(B):
        for head in range(heads):
            for part, into in zip(q[b, head].split(rows), out[b, :, head].split(rows), strict=True):
                weights = torch.softmax(_product(part, k[b, head]), 1).to(v.dtype)
                into.copy_(_product(weights, v[b, head]))
    return out


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y^T by oneDNN; torch's own float32 product is MKL's, which is half as fast on AMD's cores"""
    return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")
