"""ada_group_norm's forward pass in plain PyTorch; on a CPU what exceeds its cache goes through it in parts"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

# from so many elements on, images so many elements at a time
BLOCKED, BLOCK = 2**20, 2**19
# from so many elements an image on, lines of one image, about so many elements at a time
TILED, TILE = 2**20, 2**18


@dataclass(frozen=True)
class HostNorm:
    """The arguments of ada_group_norm, checked; moments: (2, B, groups), each group's mean and 1 / sqrt(var + eps)"""

    x: Tensor
    x2: Tensor | None
    x_bias: Tensor | None
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    groups: int
    eps: float
    silu: bool
    resample: str | None

    def _image_elements(self) -> int:
        channels = self.x.shape[1] + (0 if self.x2 is None else self.x2.shape[1])
        return channels * self.x.shape[2] * self.x.shape[3]

    def exceeds_cache(self) -> bool:
        image = self._image_elements()
        return self.x.device.type == "cpu" and (image >= TILED or len(self.x) * image >= BLOCKED)

    def at_once(self, stats: Tensor | None = None, stats2: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y, still in the dtype of the statistics, and moments"""
        x, x2, groups = self.x, self.x2, self.groups
        whole = in_statistics_dtype(x, x2, self.x_bias)
        if stats is not None and (x2 is None or stats2 is not None):
            pixels = x.shape[2] * x.shape[3]
            moments = reference.group_moments(stats, stats2, self.x_bias, pixels, groups, self.eps).to(whole.dtype)
            centred = whole - reference.spread(moments[0], whole)
        else:
            centred, moments = reference.centre(whole, groups, self.eps)
        gain, offset = reference.modulated_affine(self.weight, self.bias, self.scale, self.shift, whole.dtype)
        rows = len(x) if self.scale is None else len(self.scale)
        slope = reference.repeat_rows(reference.spread(moments[1], whole), rows) * gain
        y = reference.repeat_rows(centred, rows).mul_(slope).add_(offset)
        return self._activated(y), moments

    def through_cache(self, y: Tensor, moments: Tensor) -> None:
        """Fills both a part at a time, whose wide values stay in the cache"""
        if self._image_elements() >= TILED:
            for image in range(len(self.x)):
                self._image_in_tiles(image, y, moments)
            return
        b, b2 = len(self.x), len(self.x if self.x2 is None else self.x2)
        images = max(1, BLOCK // self._image_elements())
        # no block has images on both sides of b2, where the rows of x2 start again
        for first in (*range(0, b2, images), *range(b2, b, images)):
            end = min(first + images, b2 if first < b2 else b)
            part, again = slice(first, end), slice(b + first, b + end)
            scale, shift = (v if v is None else torch.cat((v[part], v[again])) for v in (self.scale, self.shift))
            x2 = None if self.x2 is None else self.x2[first % b2 :][: end - first]
            wide, moments[:, part] = replace(self, x=self.x[part], x2=x2, scale=scale, shift=shift).at_once()
            y[part].copy_(wide[: end - first])
            y[again].copy_(wide[end - first :])

    def _image_in_tiles(self, n: int, y: Tensor, moments: Tensor) -> None:
        """Image n, some of its lines at a time"""
        b, _, height, width = self.x.shape
        c, wide = y.shape[1], moments.dtype
        gain, offset = reference.modulated_affine(self.weight, self.bias, self.scale, self.shift, wide)
        step = max(2, TILE // (c * width) // 2 * 2)
        tiles = [slice(start, start + step) for start in range(0, height, step)]

        def tile(lines: slice) -> Tensor:
            x2 = None if self.x2 is None else self.x2[n % len(self.x2), None, :, lines]
            return in_statistics_dtype(self.x[n, None, :, lines], x2, self.x_bias)

        means, m2s, counts = [], [], []
        for lines in tiles:
            part = tile(lines)
            counts.append(part.shape[2] * width)
            means.append(part.sum((2, 3)) / counts[-1])
            m2s.append((part - means[-1][..., None, None]).square_().sum((2, 3)))
        # Chan's formula, over tiles and then over the channels of a group
        count, mean, m2 = torch.tensor(counts, dtype=wide)[:, None], torch.cat(means), torch.cat(m2s)
        pixels = height * width
        centre = (count * mean).sum(0) / pixels
        m2 = (m2 + count * (mean - centre).square()).sum(0)
        centre, m2 = centre.view(self.groups, -1), m2.view(self.groups, -1)
        group_mean = centre.mean(1)
        var = m2.mean(1) / pixels + (centre - group_mean[:, None]).square().mean(1)
        moments[:, n] = torch.stack((group_mean, torch.rsqrt(var + self.eps)))
        group_mean, rstd = (reference.spread(value[None], y) for value in moments[:, n])
        for row in range(n, y.shape[0], b):
            of_row = row if gain.shape[0] > 1 else 0
            slope, shifted = rstd * gain[of_row], offset[of_row]
            for lines in tiles:
                part = self._activated((tile(lines) - group_mean).mul_(slope).add_(shifted))
                first = {"up": 2 * lines.start, "down": lines.start // 2, None: lines.start}[self.resample]
                y[row, None, :, first : first + part.shape[2]].copy_(part)

    def _activated(self, y: Tensor) -> Tensor:
        return reference.resampled(F.silu(y, inplace=True) if self.silu else y, self.resample)


def in_statistics_dtype(x: Tensor, x2: Tensor | None, x_bias: Tensor | None) -> Tensor:
    """[x, x2] + x_bias in float32, or float64 for float64"""
    whole = reference.joined(x, x2).to(torch.promote_types(x.dtype, torch.float32))
    return whole if x_bias is None else whole + x_bias.to(whole.dtype)[:, None, None]
