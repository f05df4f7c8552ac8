"""The sampling loop: what it gives back, whose randomness it takes, and its hooks"""

import functools
import math
import threading

import pytest
import torch
from reference import schedule as paper
from reference.networks import NULL, Recorder, mixing, mixing_learned, randomness
from torch import nn

import fastdiff
import fastdiff.sampler
from fastdiff import Cancelled, DiffusionModel, Sampler
from fastdiff.placement import eval_mode
from fastdiff.solvers import ddpm

SHAPE, STEPS = (2, 4, 4), 6


def a_model(network=mixing, **options) -> DiffusionModel:
    return DiffusionModel(network, "linear", **{"image_shape": SHAPE, "null_label": NULL} | options)


def test_images_are_float32_of_the_models_shape_and_finite():
    images = fastdiff.sample(a_model(), [1, 2, 3], 1.5, steps=STEPS, seed=0)
    assert images.shape == (3, *SHAPE) and images.dtype == torch.float32 and torch.isfinite(images).all()
    assert images.abs().max() <= 1


@pytest.mark.parametrize(
    ("dtype", "state"),
    [(None, "float32"), ("float32", "float32"), ("bfloat16", "float32"), (torch.float16, "float32"), ("float64",) * 2],
    ids=str,
)
def test_the_network_sees_the_compute_dtype_and_the_state_keeps_its_own(dtype, state):
    network = Recorder()
    images = fastdiff.sample(a_model(network), [1, 2], 1.0, steps=STEPS, dtype=dtype, seed=0)
    expected = getattr(torch, str(dtype or "float32").removeprefix("torch."))
    assert {x.dtype for x in network.x} == {expected}
    assert {t.dtype for t in network.t} == {getattr(torch, state)}
    assert images.dtype == getattr(torch, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_recorded_dtype_is_used_and_the_call_goes_before_it(dtype):
    assert Sampler(a_model(dtype=dtype), steps=STEPS).dtype == dtype
    assert Sampler(a_model(dtype=dtype), steps=STEPS, dtype="float32").dtype == torch.float32
    parameters = nn.Linear(1, 1).to(dtype)
    assert Sampler(a_model(parameters), steps=STEPS).dtype == dtype


def test_the_sampler_tells_what_was_chosen():
    sampler = Sampler(a_model(), steps="ddim25", dtype="float32")
    assert sampler.timesteps == list(range(0, 1000, 40))[::-1]
    assert (sampler.dtype, sampler.device) == (torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("n", "given"),
    [
        (1, {}),
        (1, {"labels": 3}),
        (4, {"num_images": 4}),
        (4, {"labels": 3, "num_images": 4}),
        (2, {"labels": [1, 2]}),
        (3, {"labels": 3, "w": [0.0, 1.0, 2.0]}),
        (2, {"labels": 1, "seed": [5, 6]}),
        (2, {"x_T": randomness(0, 2)[0]}),
        (2, {"labels": [1, 2], "w": [1, 1], "seed": [1, 2], "num_images": 2, "x_T": randomness(0, 2)[0]}),
        (0, {"labels": []}),
        (0, {"labels": torch.zeros(0, dtype=torch.int64), "w": []}),
        (0, {"num_images": 0}),
        (0, {"labels": 1, "seed": []}),
    ],
    ids=str,
)
def test_whatever_says_the_number_of_images(n, given):
    network = Recorder()
    images = fastdiff.sample(a_model(network), steps=STEPS, **given)
    assert images.shape == (n, *SHAPE) and images.dtype == torch.float32
    assert len(network.x) == (STEPS if n else 0)


def test_the_result_outlives_the_next_call():
    sampler = Sampler(a_model(), steps=STEPS)
    first = sampler([1, 2], seed=0)
    kept = first.clone()
    second = sampler([3, 4], seed=1)
    assert torch.equal(first, kept) and not torch.equal(second, first)
    first.fill_(7)
    assert torch.equal(sampler([3, 4], seed=1), second)


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_a_sampler_used_again_equals_a_fresh_one(solver):
    x_T, noise = randomness(STEPS, 2)
    calls = [
        {"labels": [1, 2, 3], "w": 1.5, "seed": 0},
        {"labels": [1, 2, 3], "w": [0, 2.0, 0], "seed": 0},
        {"labels": [4, 5, 6], "w": [2.0, 0, 0], "seed": 1},
        {"labels": 7, "seed": 0},
        {"labels": None, "num_images": 5, "seed": 2},
        {"labels": [1, 2], "w": 3.0, "x_T": x_T, "noise": noise},
        {"labels": [1, 2], "w": 3.0, "seed": 3},
        {"labels": [1, 2], "w": 3.0, "seed": 3, "callback": lambda *_: None},
        {"labels": [1, 2, 3], "w": 1.5, "seed": 0},
    ]
    options = {"steps": STEPS, "solver": solver, "guidance_interval": (0.1, 5.0)}
    sampler = Sampler(a_model(), **options)
    for call in calls:
        assert torch.equal(sampler(**call), Sampler(a_model(), **options)(**call))


def test_threads_share_a_sampler():
    sampler = Sampler(a_model(), steps=STEPS, solver="ddpm")
    alone = [sampler([i, i], float(i % 3), seed=i) for i in range(8)]
    shared: list = [None] * 8

    def work(i: int) -> None:
        shared[i] = sampler([i, i], float(i % 3), seed=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_noise_may_be_a_function_of_the_row_asked_only_where_noise_is_added():
    x_T, noise = randomness(STEPS, 4)
    asked = []

    def by_row(row: int) -> torch.Tensor:
        asked.append(row)
        return noise[row]

    options = {"labels": [1, 2, 3, 4], "w": [0, 1.0, 0, 2.0], "x_T": x_T}
    sampler = Sampler(a_model(), steps=STEPS, solver="ddpm", dtype="float64")
    assert torch.equal(sampler(**options, noise=by_row), sampler(**options, noise=noise))
    assert asked == list(range(STEPS - 1))
    assert torch.equal(
        Sampler(a_model(), steps=STEPS, dtype="float64")(**options, noise=by_row),
        Sampler(a_model(), steps=STEPS, dtype="float64")(**options),
    )
    assert asked == list(range(STEPS - 1))


def test_the_callers_tensors_are_left_alone():
    x_T, noise = randomness(STEPS, 3)
    labels, w = torch.tensor([1, 2, 3]), torch.tensor([0.0, -1.0, 2.0])
    given = [x_T, noise, labels, w]
    before = [tensor.clone() for tensor in given]
    fastdiff.sample(a_model(), labels, w, x_T=x_T, noise=noise, steps=STEPS, solver="ddpm", dtype="float64")
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("w", [0.0, 1.5, -0.5])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_is_k_diffusions_euler(schedule, w):
    """dx / dsigma_edm = (x - denoised) / sigma_edm (2206.00364 algorithm 1), its x ours times sqrt(1 + sigma_edm^2)"""
    model = DiffusionModel(mixing, schedule, image_shape=SHAPE, clip_x0=False)
    sampler = Sampler(model, steps=40, dtype=torch.float64)
    betas = paper.linear_betas(1000) if schedule == "linear" else paper.cosine_betas(1000)
    sigmas = [math.sqrt(1 / paper.abar_at(t, betas) - 1) for t in sampler.timesteps] + [0.0]
    x_T, _ = randomness(0, 3)
    labels, cond_scale = torch.tensor([1, 2, 3]), 1 + w

    def denoise(x: torch.Tensor, sigma: float, t: float, y: torch.Tensor) -> torch.Tensor:
        return x - sigma * mixing(x / math.sqrt(1 + sigma**2), torch.full((3,), t, dtype=torch.float64), y)

    x = x_T * math.sqrt(1 + sigmas[0] ** 2)
    for t, sigma, sigma_next in zip(sampler.timesteps, sigmas[:-1], sigmas[1:], strict=True):
        uncond = denoise(x, sigma, t, torch.full((3,), NULL))
        denoised = uncond + (denoise(x, sigma, t, labels) - uncond) * cond_scale
        x = x + (x - denoised) / sigma * (sigma_next - sigma)
    scale = max(1.0, x.abs().max().item())
    torch.testing.assert_close(sampler(labels, w, x_T=x_T), x, rtol=0, atol=5e-13 * scale)


@pytest.mark.parametrize("w", [0.0, [0.0, 2.0, -1.0]], ids=["w 0", "mixed w"])
def test_the_callback_sees_every_row_in_the_callers_order(w):
    x_T, noise = randomness(STEPS, 3)
    seen = []

    def callback(row: int, rows: int, t: float, x: torch.Tensor, x0: torch.Tensor) -> None:
        seen.append((row, rows, t, x.clone(), x0.clone()))

    sampler = Sampler(a_model(), steps=STEPS, solver="ddpm", dtype="float64")
    images = sampler([1, 2, 3], w, x_T=x_T, noise=noise, callback=callback)
    assert torch.equal(images, sampler([1, 2, 3], w, x_T=x_T, noise=noise))
    assert [s[:3] for s in seen] == [(row, STEPS, t) for row, t in enumerate(sampler.timesteps)]
    assert torch.equal(seen[-1][3], images)
    # equation 7 from x to the next x by x0, with the coefficients of the table
    x, table = x_T, sampler.table
    for row, _, _, x_next, x0 in seen:
        assert x0.abs().max() <= 1
        expected = table.c_x[row] * x + table.c_x0[row] * x0 + table.c_noise[row] * noise[row]
        torch.testing.assert_close(x_next, expected, rtol=0, atol=1e-12)
        x = x_next


def test_a_callback_may_keep_and_spoil_what_it_sees():
    kept = []

    def spoil(row: int, rows: int, t: float, x: torch.Tensor, x0: torch.Tensor) -> None:
        kept.append(x)
        x.fill_(math.nan)
        x0.fill_(math.nan)

    sampler = Sampler(a_model(), steps=STEPS)
    assert torch.equal(sampler([1, 2], seed=0, callback=spoil), sampler([1, 2], seed=0))


@pytest.mark.parametrize("stop", [0, 3, STEPS - 1])
def test_a_callback_that_returns_false_cancels(stop):
    network = Recorder()
    sampler = Sampler(a_model(network), steps=STEPS)
    with pytest.raises(Cancelled, match=f"after row {stop} of {STEPS}"):
        sampler([1, 2], 1.0, seed=0, callback=lambda row, *_: row != stop)
    assert len(network.x) == stop + 1
    assert torch.equal(sampler([1, 2], 1.0, seed=0), fastdiff.sample(a_model(), [1, 2], 1.0, steps=STEPS, seed=0))
    assert issubclass(Cancelled, RuntimeError)


@pytest.mark.parametrize("answer", [None, True, 0, ""], ids=repr)
def test_only_false_itself_cancels(answer):
    fastdiff.sample(a_model(), 1, steps=STEPS, callback=lambda *_: answer)


def test_a_callback_that_samples_with_its_own_sampler_is_answered():
    """Buffers in use cannot serve a second call: an error, or the right images, but no deadlock"""
    sampler = Sampler(a_model(), steps=STEPS)
    expected, answers = sampler([1, 2], seed=0), []

    def work() -> None:
        try:
            answers.append(sampler([1, 2], seed=0, callback=lambda *_: sampler([3, 4], seed=1)))
        except RuntimeError as error:
            answers.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert answers and (isinstance(answers[0], RuntimeError) or torch.equal(answers[0], expected))


def test_progress_counts_rows(capfd):
    fastdiff.sample(a_model(), [1, 2, 3], steps=STEPS, seed=0, batch_size=2, progress=True)
    assert f"{2 * STEPS}/{2 * STEPS}" in capfd.readouterr().err
    fastdiff.sample(a_model(), [1, 2, 3], steps=STEPS, seed=0)
    assert capfd.readouterr().err == ""


def spoiled(row: int, label: int, value: float):
    """mixing, whose images of a label hold one bad value at the row's time"""
    t_bad = paper.sections([STEPS], 1000)[::-1][row]

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = mixing(x, t, y)
        out[(y == label) & (t == t_bad), 0, 1, 2] = value
        return out

    return network


@pytest.mark.parametrize("batch_size", [None, 2], ids=["one batch", "chunks"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("row", [0, 2, STEPS - 1])
def test_check_finite_names_row_and_image(row, value, batch_size):
    """Image 3 of the caller's, which guidance moves to the front of its batch"""
    model = a_model(spoiled(row, 7, value), clip_x0=False)
    sampler = Sampler(model, steps=STEPS, check_finite=True, batch_size=batch_size)
    labels, w = [1, 2, 3, 7, 4], [0, 0, 0, 1.0, 0]
    with pytest.raises(FloatingPointError, match=rf"image 3 is not finite after row {row} of {STEPS} \(t = \d+\)"):
        sampler(labels, w, seed=0)
    assert torch.isfinite(sampler([1, 2, 3, 8, 4], w, seed=0)).all()
    unchecked = fastdiff.sample(model, labels, w, seed=0, steps=STEPS)
    assert torch.isfinite(unchecked).flatten(1).all(1).tolist() == [True, True, True, False, True]


class Trained(nn.Module):
    """A module whose answer tells its mode"""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout(0.5))
        self.frozen = nn.BatchNorm2d(2).eval()
        self.modes: set[tuple[bool, ...]] = set()
        self.fail = False

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.modes.add(tuple(m.training for m in self.modules()))
        if self.fail:
            raise RuntimeError("the network failed")
        return self.frozen(self.inner(x)).tanh()


@pytest.mark.parametrize("fail", [False, True], ids=["returns", "raises"])
def test_a_network_in_training_is_evaluated_in_eval_mode_and_restored(fail):
    network = Trained().train()
    network.frozen.eval()
    before = [m.training for m in network.modules()]
    statistics = network.frozen.running_mean.clone()
    assert set(before) == {True, False}
    model = a_model(network)
    network.fail = fail
    if fail:
        with pytest.raises(RuntimeError, match="the network failed"):
            fastdiff.sample(model, [1, 2], steps=STEPS, seed=0)
    else:
        images = fastdiff.sample(model, [1, 2], steps=STEPS, seed=0)
        assert not images.requires_grad
        assert torch.equal(images, fastdiff.sample(model, [1, 2], steps=STEPS, seed=0))
    assert network.modes == {(False,) * len(before)}
    assert [m.training for m in network.modules()] == before
    assert torch.equal(network.frozen.running_mean, statistics)


def test_a_converted_network_leaves_the_models_own_alone():
    network = Trained().train()
    images = fastdiff.sample(a_model(network), [1, 2], steps=STEPS, seed=0, dtype="float64")
    assert images.dtype == torch.float64
    assert {p.dtype for p in network.parameters()} == {torch.float32} and network.training


def test_changed_weights_are_seen_by_the_next_call():
    network = Trained()
    sampler = Sampler(a_model(network), steps=STEPS)
    first = sampler([1, 2], seed=0)
    with torch.no_grad():
        network.inner[0].weight.mul_(-1)
    second = sampler([1, 2], seed=0)
    assert not torch.equal(first, second)
    assert torch.equal(second, fastdiff.sample(a_model(network), [1, 2], steps=STEPS, seed=0))


def test_options_of_a_partial_stay_as_they_are():
    x_T, noise = randomness(STEPS, 2)
    options = {"labels": [1, 2], "steps": STEPS, "x_T": x_T, "noise": noise}
    model = a_model(mixing_learned, variance="learned_range")
    large = fastdiff.sample(model, solver=functools.partial(ddpm, variance="fixed_large"), **options)
    assert torch.equal(large, fastdiff.sample(a_model(variance="fixed_large"), solver="ddpm", **options))
    assert not torch.equal(large, fastdiff.sample(model, solver="ddpm", **options))


def test_weights_that_change_after_construction_are_never_stale():
    """In place, through a converted copy, and where the network is replaced or moved to another dtype"""

    def built(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)

        class Tiny(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.mix = torch.nn.Conv2d(2, 2, 3, padding=1)

            def forward(self, x, t, y):
                return torch.tanh(self.mix(x))

        return Tiny()

    for dtype in (torch.float32, torch.float64):
        model = a_model(built(0))
        sampler = Sampler(model, steps=STEPS, dtype=dtype)
        before = sampler([1, 2], seed=0)
        # .data hides the change from autograd's version counters, as some averages of weights do
        model.network.mix.weight.data.mul_(0.5)
        after = sampler([1, 2], seed=0)
        assert not torch.equal(before, after)
        assert torch.equal(after, Sampler(model, steps=STEPS, dtype=dtype)([1, 2], seed=0))
        model.network = built(1)
        replaced = sampler([1, 2], seed=0)
        assert torch.equal(replaced, Sampler(model, steps=STEPS, dtype=dtype)([1, 2], seed=0))
        model.network.to(torch.float64 if dtype == torch.float32 else torch.float32)
        assert sampler.dtype == dtype and (sampler([1, 2], seed=0) - replaced).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_torchs_default_dtype_changes_no_image(dtype):
    """Serving engines set it"""
    expected = fastdiff.sample(a_model(), [1, 2], 1.5, steps=STEPS, solver="ddpm", seed=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = fastdiff.sample(a_model(), [1, 2], 1.5, steps=STEPS, solver="ddpm", seed=0)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got, expected)


def test_torchs_default_device_changes_no_image():
    """meta stands for a GPU: whatever is made there by mistake cannot be read"""
    expected = fastdiff.sample(a_model(), [1, 2], [1.5, -1.0], steps=STEPS, solver="ddpm", seed=[3, 4])
    with torch.device("meta"):
        got = fastdiff.sample(a_model(), [1, 2], [1.5, -1.0], steps=STEPS, solver="ddpm", seed=[3, 4])
        drawn = fastdiff.sample(a_model(), [1, 2], steps=STEPS)
    assert torch.equal(got, expected) and drawn.device.type == "cpu"


def test_a_sampler_serves_calls_in_and_out_of_inference_mode():
    sampler = Sampler(a_model(WithoutTimes(nn.Conv2d(2, 2, 1))), steps=STEPS, dtype="float64")
    with torch.inference_mode():
        first = sampler([1, 2], seed=0)
    assert torch.equal(sampler([1, 2], seed=0), first)
    with torch.inference_mode():
        assert torch.equal(sampler([1, 2], seed=0), first)


class Mixed(nn.Module):
    """bfloat16 but for one float32 table"""

    embedding, num_labels = "names that our protocol uses as well", 2

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(2, 2, 1, dtype=torch.bfloat16)
        self.register_buffer("table", torch.linspace(0, 1, 1000))

    def forward(self, x, t, y):
        assert x.dtype == torch.bfloat16 and self.table.dtype == torch.float32
        return self.mix(x)


def test_a_foreign_network_keeps_every_parameters_dtype():
    sampler = Sampler(a_model(Mixed()), steps=STEPS)
    sampler([1], seed=0)
    assert sampler.dtype == torch.bfloat16 and sampler._networks.network is sampler.model.network


def test_dropout_stays_off_while_anybody_samples_the_network():
    """Each call of sample() has a Sampler of its own; the first to end must not switch dropout on under the others"""
    network = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout(0.5))
    model = a_model(WithoutTimes(network))
    expected, wrong = fastdiff.sample(model, 1, steps=STEPS, seed=0), []

    def work() -> None:
        for _ in range(5):
            if not torch.equal(fastdiff.sample(model, 1, steps=STEPS, seed=0), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and all(module.training for module in network.modules())


class WithoutTimes(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t, y):
        return self.network(x)


def test_dropout_stays_off_under_a_network_that_is_sampled_inside_another():
    inner = nn.Dropout(0.5)
    with eval_mode(nn.Sequential(inner)):
        with eval_mode(inner):
            assert not inner.training
        assert not inner.training
    assert inner.training


def test_a_failed_conversion_leaves_no_network_of_before():
    class Shifted(WithoutTimes):
        def __init__(self, shift, copies=True):
            super().__init__(nn.Conv2d(2, 2, 1))
            self.shift, self.copies = shift, copies

        def __deepcopy__(self, memo):
            if not self.copies:
                raise MemoryError("no room")
            copied = Shifted(self.shift)
            copied.load_state_dict(self.state_dict())
            return copied

        def forward(self, x, t, y):
            return torch.tanh(self.network(x) + self.shift)

    sampler = Sampler(a_model(Shifted(0.0)), steps=STEPS, dtype="float64")
    sampler([1], seed=0)
    sampler.model.network = Shifted(1.0, copies=False)
    with pytest.raises(MemoryError):
        sampler([1], seed=0)
    sampler.model.network.copies = True
    expected = Sampler(sampler.model, steps=STEPS, dtype="float64")([1], seed=0)
    assert torch.equal(sampler([1], seed=0), expected)
