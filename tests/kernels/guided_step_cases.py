"""What the tests of guided_step share: its place, random inputs, and the formulas written out in NumPy"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from fastdiff_kernels import COEFS, STREAM_STEP, guided_step, philox_normal

N, C, H, W = 4, 2, 3, 5
NAN, INF = float("nan"), float("inf")
CANARY = -7.0
FULL_ROW = {
    "k_x": 1.3,
    "k_out": -0.7,
    "k_grad": 0.2,
    "x0_max": 1.0,
    "c_x": 0.8,
    "c_x0": 0.35,
    "c_out": -0.15,
    "c_hist": 0.25,
    "c_grad": 0.6,
    "c_noise": 0.4,
    "h_x": -0.3,
    "h_x0": 0.9,
    "log_beta": -1.0,
    "log_beta_tilde": -2.0,
}
SEEDS = (-1, 2**62 + 5, 7, 0)


@dataclasses.dataclass(frozen=True)
class Step:
    """guided_step in one place, in the widest state that it takes there"""

    device: str
    impl: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.impl == "reference" else torch.float32

    @property
    def tolerance(self) -> float:
        return 1e-13 if self.impl == "reference" else 1e-5

    def row(self, dtype: torch.dtype | None = None, **coefs: float) -> Tensor:
        values = FULL_ROW | coefs
        return torch.tensor([values[name] for name in COEFS], dtype=dtype or self.dtype, device=self.device)

    def weights(self, *w: float, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(w if len(w) > 1 else w * N, dtype=dtype or self.dtype, device=self.device)

    def draw(self, m=N, shape=(N, C, H, W), *, dtype=None, variance=False, seed=0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        n, c, h, w = shape
        shapes = dict.fromkeys(("x", "out", "hist", "grad", "noise"), shape)
        shapes["out"] = (n + m, 2 * c if variance else c, h, w)
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, dtype or self.dtype)
            for name, shape in shapes.items()
        }

    def seeds(self, draw: int = 13, n: int = N) -> dict[str, Tensor]:
        return {
            "seeds": torch.tensor(SEEDS[:n], device=self.device),
            "draw": torch.tensor([draw], device=self.device),
        }

    def __call__(self, x, out, coefs, w=None, *, hist=None, **options) -> tuple[Tensor, Tensor, Tensor | None]:
        """The in-place op on copies, its outputs poisoned beforehand"""
        x, x0 = x.clone(), torch.full_like(x, NAN)
        hist = None if hist is None else hist.clone()
        guided_step(x, out, coefs, w, x0=x0, hist=hist, impl=self.impl, **options)
        return x, x0, hist

    def check(self, got, want, tolerance: float | None = None) -> None:
        tolerance = tolerance or self.tolerance
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a.double().cpu().numpy(), b, rtol=tolerance, atol=tolerance)


def by_image(x, out, coefs, w=None, *, hist=None, grad=None, noise=None, learned=False) -> tuple[np.ndarray, ...]:
    """(x', x0, h') in NumPy float64, an image at a time, a missing tensor being zero"""
    n, c = x.shape[:2]
    k = dict(zip(COEFS, coefs.double().tolist(), strict=True))
    x, out = x.double().cpu().numpy(), out.double().cpu().numpy()
    hist, grad, noise = (np.zeros_like(x) if t is None else t.double().cpu().numpy() for t in (hist, grad, noise))
    states, predictions, histories = [], [], []
    for i in range(n):
        g = out[i, :c]
        if i < len(out) - n and w[i] != 0:
            g = (1 + float(w[i])) * out[i, :c] - float(w[i]) * out[n + i, :c]
        variance = np.ones_like(x[i])
        if learned:
            f = (out[i, c:] + 1) / 2
            variance = np.exp(f * k["log_beta"] + (1 - f) * k["log_beta_tilde"])
        x0 = np.clip(k["k_x"] * x[i] + k["k_out"] * g, -k["x0_max"], k["x0_max"]) + k["k_grad"] * grad[i]
        predictions.append(x0)
        states.append(
            k["c_x"] * x[i]
            + k["c_x0"] * x0
            + k["c_out"] * g
            + k["c_hist"] * hist[i]
            + k["c_grad"] * variance * grad[i]
            + k["c_noise"] * np.sqrt(variance) * noise[i]
        )
        histories.append(k["h_x"] * x[i] + k["h_x0"] * x0)
    return np.array(states), np.array(predictions), np.array(histories)


def laid_out(tensor: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A copy in memory full of canaries, and that memory"""
    n, c, h, w = tensor.shape
    order = {"contiguous": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "rows_inside": (0, 3, 1, 2)}
    if layout == "sliced":
        memory = tensor.new_full((n + 2, c + 2, h + 2, 2 * w + 2), CANARY)
        view = memory[1:-1, 1:-1, 1:-1, 1:-1:2]
    elif layout == "sliced_channels_last":
        memory = tensor.new_full((n + 1, h, w, c + 3), CANARY)
        view = memory[1:, :, :, 2:-1].permute(0, 3, 1, 2)
    else:
        memory = tensor.new_full((tensor.numel() + 64,), CANARY)
        strides, size = [0] * 4, 1
        for dim in reversed(order[layout]):
            strides[dim] = size
            size *= tensor.shape[dim]
        view = memory[32:-32].as_strided(tensor.shape, strides)
    return view.copy_(tensor), memory


LAYOUTS = ["contiguous", "channels_last", "rows_inside", "sliced", "sliced_channels_last"]


def normals(step: Step, shape: tuple[int, ...], draw: int = 13, n: int = N) -> Tensor:
    seeds = torch.tensor(SEEDS[:n])
    return philox_normal(seeds, shape, draw=draw, stream=STREAM_STEP, dtype=step.dtype, impl="reference")
