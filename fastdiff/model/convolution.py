"""The 2-D convolution of the networks, whose bias the next operation may add"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Conv2d"]


class Conv2d(nn.Conv2d):
    """torch's, which can leave its bias to what follows"""

    def unbiased(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The convolution, and the bias that is still to be added, or None where it has been

        cuDNN adds a bias in a pass of its own, oneDNN for nothing.
        """
        # a hook is called by a call alone
        if (not x.is_cuda and not x.is_meta) or self._forward_hooks or self._forward_pre_hooks:
            return self(x), None
        return self._conv_forward(x, self.weight, None), self.bias
