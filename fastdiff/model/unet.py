"""The ADM U-Net (Dhariwal & Nichol 2021, 2105.05233), one code for training and sampling"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from fastdiff.model.blocks import AdaGroupNorm, Stage, zero_init
from fastdiff.model.convolution import Conv2d
from fastdiff.model.trunk import Trunk, TrunkConfig, check_positive


@dataclasses.dataclass(frozen=True)
class UNetConfig(TrunkConfig):
    """Everything that fixes a UNet's architecture: TrunkConfig's fields, and

    out_channels: in_channels, or twice that with a learned variance.
    num_blocks: ResBlocks a level on the way down, one more on the way up.
    num_labels: rows of label_emb, the null row included (num_classes + 1 with guidance); None: no labels.
    """

    num_labels: int | None = None

    def __post_init__(self) -> None:
        if self.num_labels is not None:
            check_positive("num_labels", self.num_labels)
        super().__post_init__()


class UNet(Trunk):
    """The network of ADM: (x, t, y) -> eps, or eps and the variance interpolation with twice the channels

    A fresh network returns exactly zero.
    """

    config: UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config, config.num_labels)
        self.num_labels = config.num_labels
        skips = list(self.input_widths)
        ch = config.widths[-1]
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(config.widths))):
            for i in range(config.num_blocks + 1):
                layers = [self._res_block(ch + skips.pop(), width), *self._attention(level)]
                ch = width
                if level and i == config.num_blocks:
                    layers.append(self._resample(ch, "up"))
                self.output_blocks.append(Stage(layers))
        conv_out = zero_init(Conv2d(ch, config.out_channels, 3, padding=1))
        self.out = nn.ModuleDict({"0": AdaGroupNorm(ch, config.groups), "2": conv_out})
        self._add_modulation()

    @property
    def extra_shapes(self) -> dict[str, tuple[int, int, int]]:
        """What forward and body take of each image besides x: nothing"""
        return {}

    def embedding(self, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """silu(time embedding + label embedding), (B, 4 * channels): what the modulation is a product of

        t: (B,), fractional allowed; y: (B,) int64 rows of label_emb, or None exactly if the network has no labels.
        """
        if (y is None) != (self.config.num_labels is None):
            expected = "None" if self.config.num_labels is None else f"labels in [0, {self.config.num_labels})"
            raise ValueError(f"y must be {expected} for num_labels={self.config.num_labels}, got {y}")
        emb = self._embedded_time(t)
        if y is not None:
            emb = emb + self.label_emb(y)
        return F.silu(emb)

    def modulation(self, embedding: torch.Tensor) -> torch.Tensor:
        """All blocks' modulation in one product, (B, rows of mod)"""
        return self.mod(embedding)

    def body(self, x: torch.Tensor, mod: torch.Tensor) -> torch.Tensor:
        """The image path: x (N, in_channels, H, W), mod (N + M, rows of mod) -> (N + M, out_channels, H, W)

        M in [0, N]: row N + j is image j under a modulation of its own, and what no modulation has reached yet is
        computed once for both. H and W may differ from image_size but are multiples of 2 ** (levels - 1).
        """
        self._check_images(x)
        return self._image_path(x, mod)

    def _image_path(self, x: torch.Tensor, mod: torch.Tensor) -> torch.Tensor:
        """body of what the first convolution takes: x (N, first_channels, H, W)"""
        if not len(x) <= len(mod) <= 2 * len(x):
            raise ValueError(f"mod must have N to 2N rows, N = {len(x)} of x, got {len(mod)}")
        mods = self._mods(mod)
        *hs, h = self._encode(x, mods)
        for block in self.output_blocks:
            h = block(h, mods, hs.pop())
        return self.out["2"](self.out["0"](h))

    def packed(self) -> nn.Module:
        """This network for inference on a CPU with the weights of today, as fast as oneDNN can be, or itself"""
        from fastdiff.model.packed import packed

        return packed(self)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """x: (B, in_channels, H, W); t: (B,), in [0, T); y: (B,) int64 or None -> (B, out_channels, H, W)"""
        self._check_times(t, x)
        return self.body(x, self.modulation(self.embedding(t, y)))


# Table 4 and section 4 of 2105.05233; 1000 ImageNet classes and no null row, learned variance
_ADM_64 = UNetConfig(image_size=64, out_channels=6, num_labels=1000, dropout=0.1)
_ADM_256 = dataclasses.replace(
    _ADM_64, image_size=256, channels=256, channel_mult=(1, 1, 2, 2, 4, 4), num_blocks=2, dropout=0.0
)
PRESETS: dict[str, UNetConfig] = {
    "adm-64": _ADM_64,
    "adm-128": dataclasses.replace(
        _ADM_256, image_size=128, channel_mult=(1, 1, 2, 3, 4), num_heads=4, head_channels=None
    ),
    "adm-256": _ADM_256,
    "adm-256-uncond": dataclasses.replace(_ADM_256, num_labels=None),
    "adm-512": dataclasses.replace(_ADM_256, image_size=512, channel_mult=(0.5, 1, 1, 2, 2, 4, 4)),
}
