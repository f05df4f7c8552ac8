"""The sampler's graphs, without a GPU: functions stand for graphs, and everything around them is the same"""

from __future__ import annotations

import functools
import gc
import itertools
import threading
import warnings
import weakref

import pytest
import torch
from reference.networks import Recorder, mixing
from sampling_cases import STEPS, TABLES, a_model, sampled

import fastdiff
import fastdiff.step
from fastdiff import OutOfMemoryError, Sampler
from fastdiff.model import UNet, UNetConfig
from fastdiff.sampler import KEPT
from fastdiff.step import LEAST_CAPACITY, bucket


class WithoutTimes(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        return self.inner(x)


def a_unet_model(dtype: torch.dtype = torch.float64, **options: object) -> fastdiff.DiffusionModel:
    torch.manual_seed(0)
    config = UNetConfig(
        **{"image_size": 8, "in_channels": 1, "out_channels": 1, "channels": 16, "channel_mult": (1, 2)},
        **{"num_blocks": 1, "attention_resolutions": (4,), "head_channels": 8, "num_labels": 11, "groups": 4},
    )
    network = UNet(config).to(dtype)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) / (p[0].numel() if p.ndim > 1 else 4) ** 0.5)
    return fastdiff.DiffusionModel(network, "cosine", image_shape=(1, 8, 8), **options)


def test_buckets_waste_at_most_half() -> None:
    sizes = [bucket(n) for n in range(1, 1000)]
    assert sorted(set(sizes))[:9] == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert all(n <= size <= 1.5 * n for n, size in enumerate(sizes, 1))
    assert [bucket(size) for size in sizes] == sizes and bucket(0) == 0


@pytest.mark.parametrize("table", TABLES)
def test_replays_give_the_images_of_an_eager_run(captured, table: str) -> None:
    expected = sampled(table, graph=False)
    assert not captured
    images = sampled(table)
    assert len(captured) == (2 if "guided in part" in table else 1)
    assert sum(graph.replays for graph in captured) == STEPS
    # the eager run has three images, the graph's bucket as many
    assert torch.equal(images, expected)


@pytest.mark.parametrize("w", [0.0, 1.5, [1.5, 0.0, -1.0, 2.0, 0.0]])
@pytest.mark.parametrize("model", [a_model, a_unet_model])
def test_a_batch_is_padded_to_its_bucket(captured, model, w) -> None:
    options = {"steps": STEPS, "solver": "ddpm", "dtype": "float64"}
    labels = [1, 2, 3, 4, 5]
    expected = Sampler(model(), **options, graph=False)(labels, w, seed=0)
    sampler = Sampler(model(), **options)
    torch.testing.assert_close(sampler(labels, w, seed=0), expected, rtol=0, atol=1e-12)
    assert [step.shape.n for step in sampler._steps.values()] == [6]
    sixth = w if isinstance(w, float) else [*w, 1.0]
    sampler([*labels, 6], sixth, seed=0)
    assert len(captured) == (1 if isinstance(w, float) else 2)


def test_a_short_last_batch_takes_the_graph_of_the_others(captured) -> None:
    network = Recorder()
    sampler = Sampler(a_model(network), steps=STEPS, batch_size=4, dtype="float64")
    images = sampler(range(10), 1.5, seed=0)
    assert len(captured) == 1 and set(network.batches) == {8}
    together = fastdiff.sample(a_model(), range(10), 1.5, seed=0, steps=STEPS, dtype="float64", graph=False)
    torch.testing.assert_close(images, together, rtol=0, atol=1e-12)


def test_callers_noise_and_x_T_reach_a_padded_batch(captured) -> None:
    options = {"steps": STEPS, "solver": "ddpm", "dtype": "float64"}
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(5, 2, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(STEPS, 5, 2, 4, 4, generator=generator, dtype=torch.float64)
    call = {"labels": range(5), "w": [0, 1, 2, 0, 1], "x_T": x_T, "noise": noise}
    expected = Sampler(a_model(), **options, graph=False)(**call)
    torch.testing.assert_close(Sampler(a_model(), **options)(**call), expected, rtol=0, atol=1e-12)


def test_the_null_half_is_run_where_it_is_needed_only(captured) -> None:
    network = Recorder()
    sampler = Sampler(a_model(network), steps=STEPS)
    sampler([1, 2, 3], 0.0)
    assert set(network.batches) == {3}
    network.x.clear()
    sampler([1, 2, 3], [0.0, 2.0, 0.0])
    assert set(network.batches) == {4}
    network.x.clear()
    sampler = Sampler(a_model(network), steps=STEPS, guidance_interval=(0.1, 5.0))
    made = len(captured)
    network.x.clear()
    sampler([1, 2, 3], 2.0)
    # one warm-up of each graph, then the rows
    assert len(captured) == made + 2
    guided = [6 if g else 3 for g in sampler._tabled.guided]
    assert network.batches[2:] == guided and {3, 6} == set(guided)
    network.x.clear()
    nowhere = Sampler(a_model(network), steps=STEPS, guidance_interval=(1e6, 1e7))
    nowhere([1, 2, 3], 2.0)
    assert set(network.batches) == {3} and next(iter(nowhere._steps.values())).shape.m == 0


def test_the_graphs_used_last_are_kept(captured) -> None:
    sampler = Sampler(a_model(), steps=STEPS)
    for n in (1, 2, 3, 4, 1, 6):
        sampler(num_images=n, seed=0)
    assert len(captured) == 5 and len(sampler._steps) == KEPT
    sampler(num_images=1, seed=0)
    assert len(captured) == 5
    # the one used longest ago went
    sampler(num_images=2, seed=0)
    assert len(captured) == 6


@pytest.mark.parametrize("graph", ["auto", False])
def test_weights_of_today_are_used(captured, graph: str | bool) -> None:
    """Changed in place, moved, replaced, or the network itself"""
    model = a_unet_model()
    options = {"steps": STEPS, "graph": graph, "dtype": "float64"}
    sampler = Sampler(model, **options)
    call = {"labels": [1, 2, 3], "w": 1.5, "seed": 0}

    before = [torch.zeros(3, 1, 8, 8)]

    def check(graphs: int) -> None:
        images = sampler(**call)
        assert torch.equal(images, Sampler(model, **options)(**call))
        assert not torch.equal(images, before[-1])
        before.append(images)
        assert graph is False or len(captured) == graphs

    network = model.network
    check(2)
    with torch.no_grad():
        network.mod.bias.add_(0.1)
    check(3)
    network.out["2"].weight.data = network.out["2"].weight.data * 1.1
    check(5)
    network.conv_first.weight = torch.nn.Parameter(network.conv_first.weight.detach() * 0.9)
    check(7)
    model.network = a_unet_model().network
    with torch.no_grad():
        model.network.mod.bias.sub_(0.1)
    check(9)


def test_a_copy_follows_its_network(captured) -> None:
    model = a_unet_model(torch.float32)
    sampler = Sampler(model, steps=STEPS, dtype="float64")
    first = sampler([1, 2], seed=0)
    with torch.no_grad():
        model.network.mod.bias.add_(0.5)
    second = sampler([1, 2], seed=0)
    assert len(captured) == 1 and not torch.equal(first, second)
    assert torch.equal(second, Sampler(model, steps=STEPS, dtype="float64", graph=False)([1, 2], seed=0))


@pytest.mark.parametrize("graph", ["auto", False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_network_that_was_rebuilt_is_run_as_it_is(captured, dtype: str, graph: str | bool) -> None:
    """In place or as a copy: another submodule, a hook, another forward"""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), torch.nn.Sigmoid())
    # clipped images may be equal by chance
    model = a_model(WithoutTimes(network), clip_x0=False)
    options = {"steps": STEPS, "dtype": dtype, "graph": graph}
    sampler = Sampler(model, **options)
    seen = [sampler([1], seed=0)]

    def hooked() -> None:
        network[0].register_forward_hook(lambda module, args, out: 0.5 * out)

    def patched() -> None:
        network.forward = lambda x: 0.3 * x

    for change in (lambda: network.__setitem__(1, torch.nn.Tanh()), hooked, patched):
        change()
        images = sampler([1], seed=0)
        assert torch.equal(images, Sampler(model, **options)([1], seed=0))
        assert not any(torch.equal(images, other) for other in seen)
        seen.append(images)


@pytest.mark.parametrize("wrapped", ["closure", "partial", "method", "object"])
def test_weights_behind_a_function_are_noticed(captured, wrapped: str) -> None:
    network = WithoutTimes(torch.nn.Conv2d(2, 2, 1))

    class Holder:
        def __init__(self) -> None:
            self.inner = {"network": network}

        def __call__(self, x, t, y):
            return self.inner["network"](x, t, y)

    functions = {
        "closure": lambda x, t, y: network(x, t, y),
        "partial": functools.partial(lambda inner, x, t, y: inner(x, t, y), network),
        "method": Holder().__call__,
        "object": Holder(),
    }
    sampler = Sampler(a_model(functions[wrapped]), steps=STEPS)
    sampler([1], seed=0)
    with torch.no_grad():
        network.inner.weight.mul_(0.5)
    sampler([1], seed=0)
    assert len(captured) == 1, "in place, a graph sees it by itself"
    network.inner.weight.data = network.inner.weight.data * 0.5
    sampler([1], seed=0)
    assert len(captured) == 2


def test_an_autocast_around_a_call_changes_nothing() -> None:
    expected = Sampler(a_unet_model(torch.float32), steps=STEPS, dtype="float32")([1, 2], 1.5, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = Sampler(a_unet_model(torch.float32), steps=STEPS, dtype="float32")([1, 2], 1.5, seed=0)
    assert torch.equal(images, expected)


def test_a_network_that_its_owner_converts_is_fed_what_it_wants(captured) -> None:
    network = WithoutTimes(torch.nn.Conv2d(2, 2, 1))
    sampler = Sampler(a_model(network), steps=STEPS)
    assert sampler([1], seed=0).dtype == torch.float32
    for dtype, state in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        network.to(dtype)
        images = sampler([1], seed=0)
        assert sampler.dtype == dtype and images.dtype == state
        assert torch.equal(images, Sampler(a_model(network), steps=STEPS)([1], seed=0))


def test_another_table_takes_the_same_graph(captured) -> None:
    sampler = Sampler(a_unet_model(), steps=STEPS, solver="ddim")
    sampler([1, 2], 1.5, seed=0)
    for steps in (1, STEPS - 2, LEAST_CAPACITY):
        sampler.set_table(steps=steps)
        assert len(sampler.timesteps) == steps
        images = sampler([1, 2], 1.5, seed=0)
        assert torch.equal(images, fastdiff.sample(a_unet_model(), [1, 2], 1.5, seed=0, steps=steps, graph=False))
    assert len(captured) == 1
    sampler.set_table(steps=STEPS, solver="ddpm")
    sampler([1, 2], 1.5, seed=0)
    assert len(captured) == 2
    sampler.set_table(steps=LEAST_CAPACITY + 1)
    sampler([1, 2], 1.5, seed=0)
    assert len(captured) == 3
    for bad in ({"steps": 0}, {"solver": "nonsense"}, {"solver": "ddpm", "eta": 1.0}, {"clip_x0": 1}):
        with pytest.raises((ValueError, TypeError)):
            sampler.set_table(**bad)
    assert len(sampler.timesteps) == LEAST_CAPACITY + 1


def nosy(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return mixing(x, t, y) * (1.0 if float(t[0]) >= 0 else 0.0)


def test_a_network_that_cannot_be_captured_runs_eagerly_and_says_so_once(captured) -> None:
    sampler = Sampler(a_model(nosy), steps=STEPS)
    with pytest.warns(UserWarning, match=r"sampling eagerly: .*_local_scalar_dense"):
        images = sampler([1, 2, 3], 1.5, seed=0)
    assert torch.equal(images, fastdiff.sample(a_model(), [1, 2, 3], 1.5, seed=0, steps=STEPS, graph=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler([1, 2, 3], 1.5, seed=0)
    assert not captured


def test_a_graph_that_was_asked_for_and_cannot_be_is_an_error(captured) -> None:
    sampler = Sampler(a_model(nosy), steps=STEPS, graph=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"graph=True: the network cannot be captured: .*; use graph='auto'"):
            sampler([1], seed=0)


class Roomy:
    """Memory for so many rows"""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if len(x) > self.rows:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(x)} rows\nand more lines")
        return mixing(x, t, y)


@pytest.mark.parametrize("graph", ["auto", False])
@pytest.mark.parametrize(("w", "fits"), [(0.0, 8), (1.5, 4)])
def test_out_of_memory_names_a_batch_size_that_fits(captured, graph: str | bool, w: float, fits: int) -> None:
    network = Roomy(8)
    sampler = Sampler(a_model(network), steps=STEPS, graph=graph)
    small = sampler(range(2), w, seed=0)
    kept = [weakref.ref(step) for step in sampler._steps.values()]
    # (N, M): doubled where guided
    labels = [i % 10 for i in range(32)]
    with pytest.raises(OutOfMemoryError, match=rf"batch_size: 32 images .* batch_size={fits} fits: CUDA out of") as e:
        sampler(labels, w, seed=0)
    assert e.value.batch_size == fits and "\n" not in str(e.value)
    captured.clear()
    gc.collect()
    assert not sampler._steps and kept[0]() is None
    assert torch.equal(sampler(range(2), w, seed=0), small)
    in_parts = Sampler(a_model(network), steps=STEPS, graph=graph, batch_size=e.value.batch_size)(labels, w, seed=0)
    expected = Sampler(a_model(), steps=STEPS, graph=False)(labels, w, seed=0)
    torch.testing.assert_close(in_parts, expected, rtol=0, atol=1e-5)


def test_the_size_that_fits_holds_any_images_of_the_call(captured) -> None:
    """Those with a null row may meet in one batch"""
    sampler = Sampler(a_model(Roomy(3)), steps=STEPS, graph=False, batch_size=8)
    w = [0.0] * 6 + [1.5] * 3
    with pytest.raises(OutOfMemoryError, match="batch_size=1 fits") as e:
        sampler(range(9), w, seed=0)
    Sampler(a_model(Roomy(3)), steps=STEPS, graph=False, batch_size=e.value.batch_size)(range(9), w, seed=0)


def test_a_cpu_without_memory_is_out_of_memory_too() -> None:
    def greedy(x, t, y):
        return mixing(x, t, y) if len(x) < 4 else torch.empty(2**60)

    with pytest.raises(OutOfMemoryError, match="batch_size=2 fits"):
        Sampler(a_model(greedy), steps=STEPS)([1] * 5, seed=0)


def test_out_of_memory_with_one_image(captured) -> None:
    sampler = Sampler(a_model(Roomy(1)), steps=STEPS)
    sampler([1])
    with pytest.raises(OutOfMemoryError, match="not even one image fits") as e:
        sampler([1], 1.5)
    assert e.value.batch_size == 0 and not sampler._steps


@pytest.mark.parametrize("graph", ["auto", False])
def test_a_result_is_a_copy(captured, graph: str | bool) -> None:
    sampler = Sampler(a_model(), steps=STEPS, graph=graph)
    first = sampler([1, 2], 1.5, seed=0)
    kept = first.clone()
    second = sampler([3, 4], 1.5, seed=1)
    assert torch.equal(first, kept) and not torch.equal(first, second)
    seen: list[torch.Tensor] = []
    sampler([1, 2], 1.5, seed=0, callback=lambda row, rows, t, x, x0: seen.append(x))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("graph", ["auto", False])
def test_threads_are_served_in_turn(captured, graph: str | bool) -> None:
    sampler = Sampler(a_unet_model(), steps=STEPS, graph=graph)
    calls = [{"labels": [i] * (1 + i % 3), "w": float(i % 2), "seed": i} for i in range(8)]
    expected = [Sampler(a_unet_model(), steps=STEPS, graph=graph)(**call) for call in calls]
    results: list[torch.Tensor | None] = [None] * 8

    def work(i: int) -> None:
        for _ in range(2):
            results[i] = sampler(**calls[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True) if got is not None)
    assert None not in results


def test_an_image_is_bitwise_the_same_in_every_batch_of_its_bucket(captured) -> None:
    sampler = Sampler(a_unet_model(torch.float32), steps=STEPS, solver="ddpm", dtype="float32")
    seeds = fastdiff.image_seeds(0, 6)
    together = sampler(range(6), 1.5, seed=seeds)
    five = sampler(range(5), 1.5, seed=seeds[:5])
    assert torch.equal(five, together[:5]) and len(captured) == 1


@pytest.mark.parametrize("limit", [0, 2**40])
@pytest.mark.parametrize("w", [0.0, [0.0, 1.5, 2.0]])
def test_conditioning_is_computed_once_for_all_rows(monkeypatch, limit: int, w) -> None:
    """As one table of modulations, or of embeddings where that would not fit; in any number of parts"""
    model, calls = a_unet_model(), {"embedding": 0, "modulation": 0}
    labels = [1, 2, 3]
    # what the sampler does not see the protocol of
    expected = Sampler(
        fastdiff.DiffusionModel(
            lambda *args: model.network(*args), "cosine", image_shape=(1, 8, 8), dtype=torch.float64
        ),
        steps=STEPS,
    )(labels, w, seed=0)
    for name in calls:
        function = getattr(model.network, name)

        def counted(*args, name=name, function=function):
            calls[name] += 1
            return function(*args)

        monkeypatch.setattr(model.network, name, counted)
    monkeypatch.setattr(fastdiff.step, "MODULATION_BYTES", limit)
    monkeypatch.setattr(fastdiff.step, "CONDITIONED_AT_ONCE", 10)
    sampler = Sampler(model, steps=STEPS, dtype="float64")
    images = sampler(labels, w, seed=0)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-10)
    parts = -(-STEPS // (10 // (3 if w == 0.0 else 5)))
    (step,) = sampler._steps.values()
    assert len(step.x_net) == 3, "both rows of an image share its x"
    # one more call of each finds their sizes
    assert calls == {"embedding": 1 + parts, "modulation": 1 + (parts if limit else STEPS)}
