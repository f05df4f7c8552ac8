"""The upsampler of ADM: a U-Net that also sees a smaller image (2105.05233, section 5.2)"""

import dataclasses

import torch
import torch.nn.functional as F

from fastdiff.model.trunk import check_positive
from fastdiff.model.unet import UNet, UNetConfig


@dataclasses.dataclass(frozen=True)
class SuperResolutionConfig(UNetConfig):
    """Everything that fixes a SuperResolutionUNet's architecture: UNetConfig's fields, and

    low_res_size: side in pixels of the smaller images it is made for, at most image_size.
    low_res_channels: theirs. in_channels counts x's own channels only; the first convolution takes the sum.
    """

    low_res_size: int = dataclasses.field(kw_only=True)
    low_res_channels: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("low_res_size", self.low_res_size)
        check_positive("low_res_channels", self.low_res_channels)
        if self.low_res_size > self.image_size:
            raise ValueError(f"low_res_size must be at most image_size={self.image_size}, got {self.low_res_size}")

    @property
    def first_channels(self) -> int:
        """Channels that the first convolution takes: x's, then low_res's"""
        return self.in_channels + self.low_res_channels


class SuperResolutionUNet(UNet):
    """A UNet that paints an image after a smaller one: (x, t, y, low_res) -> what UNet returns"""

    config: SuperResolutionConfig

    @property
    def extra_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(C, H, W) of the tensors that forward and body take for each image besides x, by argument name"""
        size = self.config.low_res_size
        return {"low_res": (self.config.low_res_channels, size, size)}

    def body(self, x: torch.Tensor, mod: torch.Tensor, low_res: torch.Tensor | None = None) -> torch.Tensor:
        """The image path, as UNet's; low_res: (N, low_res_channels, h, w), in [-1, 1] as x's data; required

        It is resized bilinearly to x's size (align_corners=False) and takes its place behind x's channels.
        """
        self._check_images(x)
        low_res = self._checked(low_res, len(x))
        resized = F.interpolate(low_res, x.shape[2:], mode="bilinear", align_corners=False)
        return self._image_path(torch.cat((x, resized), 1), mod)

    def _checked(self, low_res: torch.Tensor | None, rows: int) -> torch.Tensor:
        channels, got = self.config.low_res_channels, None if low_res is None else tuple(low_res.shape)
        if low_res is None or low_res.ndim != 4 or low_res.shape[:2] != (rows, channels) or 0 in low_res.shape[2:]:
            raise ValueError(f"low_res must have shape ({rows}, {channels}, h, w), one for each of x, got {got}")
        if not low_res.is_floating_point():
            raise TypeError(f"low_res must be floating-point, scaled as x's data are, got {low_res.dtype}")
        return low_res

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x, t, y: as UNet's; low_res: (B, low_res_channels, h, w), required -> (B, out_channels, H, W)"""
        self._check_times(t, x)
        return self.body(x, self.modulation(self.embedding(t, y)), low_res)


# guided-diffusion's published upsamplers; 1000 ImageNet classes and no null row, learned variance
_TO_256 = SuperResolutionConfig(
    image_size=256,
    out_channels=6,
    channel_mult=(1, 1, 2, 2, 4, 4),
    num_blocks=2,
    num_heads=4,
    head_channels=None,
    num_labels=1000,
    low_res_size=64,
)
UPSAMPLER_PRESETS: dict[str, SuperResolutionConfig] = {
    "upsampler-64-256": _TO_256,
    "upsampler-128-512": dataclasses.replace(
        _TO_256,
        image_size=512,
        attention_resolutions=(32, 16),
        num_heads=None,
        head_channels=64,
        low_res_size=128,
    ),
}
