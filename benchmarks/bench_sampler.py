"""The bundled model: a whole sampling call, and one network evaluation inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

import fastdiff
from benchmarks.versions import as_benchmarked

LABELS = [label for label in range(10) for _ in range(4)]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _as_benchmarked(device: torch.device) -> Iterator[None]:
    with as_benchmarked(device):
        yield


@cache
def reference(w: float) -> torch.Tensor:
    """The same call in float64 on the CPU."""
    return fastdiff.sample("digits", LABELS, w, seed=0, device="cpu", dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w", [0.0, 1.5])
def test_forty_digits_in_fifty_steps(
    record: Callable[..., None], device: torch.device, w: float, dtype: torch.dtype
) -> None:
    sampler = fastdiff.Sampler("digits", steps=50, device=device, dtype=dtype)
    images = sampler(LABELS, w, seed=0).double().cpu()
    error = (images - reference(w)).abs()
    # float32 follows float64 through 50 steps; bfloat16 draws a nearby image
    assert error.max() < 1e-2 if dtype == torch.float32 else error.mean() < 0.1
    record(
        lambda: sampler(LABELS, w, seed=0),
        case="sample-digits",
        rounds=5,
        images=len(LABELS),
        steps=50,
        w=w,
        dtype=str(dtype).removeprefix("torch."),
        max_error=float(error.max()),
        mean_error=float(error.mean()),
    )


@pytest.mark.parametrize("check_finite", [False, True])
def test_looking_for_nan(record: Callable[..., None], device: torch.device, check_finite: bool) -> None:
    sampler = fastdiff.Sampler("digits", steps=10, device=device, check_finite=check_finite)
    assert torch.isfinite(sampler(LABELS, 0.0, seed=0)).all()
    record(
        lambda: sampler(LABELS, 0.0, seed=0),
        case="check-finite",
        rounds=10,
        images=len(LABELS),
        steps=10,
        w=0.0,
        check_finite=check_finite,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_doubled_evaluation(record: Callable[..., None], device: torch.device, dtype: torch.dtype) -> None:
    network = fastdiff.load("digits", device=device, dtype=dtype).network
    exact = fastdiff.load("digits", dtype=torch.float64).network
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 1, 16, 16, generator=generator, dtype=torch.float64)
    t, y = torch.linspace(0, 999, 80, dtype=torch.float64), torch.arange(80) % 11
    on_device = (x.to(device, dtype), t.to(device, torch.float32), y.to(device))
    with torch.no_grad():
        error = (network(*on_device).double().cpu() - exact(x, t, y)).abs().mean()
        assert error < (1e-5 if dtype == torch.float32 else 0.05)
        record(
            lambda: network(*on_device),
            case="forward-digits",
            rounds=20,
            rows=80,
            dtype=str(dtype).removeprefix("torch."),
            mean_error=float(error),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("images", [2, 3, 8, 40])
def test_an_image_of_a_batch_beside_itself_alone(
    record: Callable[..., None], device: torch.device, images: int, dtype: torch.dtype
) -> None:
    """How far libraries' choices by batch size move an image; of two batches of one bucket under graphs: nowhere"""
    sampler = fastdiff.Sampler("digits", steps=50, device=device, dtype=dtype)
    seeds, labels = fastdiff.image_seeds(0, images), LABELS[:images]
    together = sampler(labels, 1.5, seed=seeds)
    alone = torch.cat([sampler(label, 1.5, seed=[seed]) for label, seed in zip(labels, seeds, strict=True)])
    difference = (together - alone).abs()
    assert difference.max() < 1e-2 if dtype == torch.float32 else difference.mean() < 0.1
    record(
        lambda: sampler(labels, 1.5, seed=seeds),
        case="batch-invariance",
        rounds=1,
        images=images,
        steps=50,
        w=1.5,
        dtype=str(dtype).removeprefix("torch."),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
    )
