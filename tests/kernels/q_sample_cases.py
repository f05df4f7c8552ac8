"""What the tests of q_sample share: its inputs"""

import pytest
import torch
from torch import Tensor

PREDICTION = pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "batch_inside": lambda x: x.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
    "batch_innermost": lambda x: x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
}


def inputs(shape, dtype=torch.float32, *, layout="channels_last", device="cpu", seed=0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    angle = torch.rand(shape[0], generator=generator)
    given = {"x0": LAYOUTS[layout](x0), "alpha": angle.cos(), "sigma": angle.sin(), "noise": LAYOUTS[layout](noise)}
    return {name: value.to(device) for name, value in given.items()}


def seeds_of(n: int, device="cpu") -> Tensor:
    return torch.tensor([7, 2**62 + 5, -3, 2**31, 0][:n], dtype=torch.int64, device=device)
