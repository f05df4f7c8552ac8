"""The evaluation's figures against independent formulas, and its verdicts on models whose worth is known."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from evaluation_cases import HELDOUT, OPTIONS, SCHEDULE, SHAPE, SMALL, TRAIN, WORLD, K, diffusion, memoriser

from fastdiff.diffusion_model import DiffusionModel
from fastdiff.evaluation import (
    Judge,
    evaluate,
    features,
    frechet_distance,
    nearest_distance,
    plot,
    real_split_distance,
    results,
    spread,
    table,
)
from fastdiff.evaluation.criteria import criteria


@pytest.fixture(scope="module")
def exact_report():
    return evaluate(diffusion(WORLD.denoise), TRAIN, HELDOUT, **OPTIONS)


def verdicts(report):
    return {c["name"]: c["met"] for c in report["criteria"]}


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_torchs_average_pool(size, channels):
    images = torch.randn(3, channels, size, size)
    expected = torch.nn.functional.adaptive_avg_pool2d(images.double(), 8).flatten(1).numpy()
    assert features(images).dtype == np.float64
    np.testing.assert_allclose(features(images), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 1, 12, 16), (2, 1, 0, 16)])
def test_features_refuse_other_sizes(shape):
    with pytest.raises(ValueError, match="images must be"):
        features(torch.zeros(shape))


def test_spread_is_a_loop_over_classes():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(50, 4)) * [1, 2, 3, 4], rng.integers(0, 3, 50)
    traces = [np.trace(np.cov(x[labels == k].T)) for k in range(3)]
    assert spread(x, labels) == pytest.approx(np.sqrt(sum(traces) / 3), rel=1e-12)
    # class means do not count, scale does
    shifted = x + 100 * labels[:, None]
    assert spread(shifted, labels) == pytest.approx(spread(x, labels), rel=1e-9)
    assert spread(3 * x, labels) == pytest.approx(3 * spread(x, labels), rel=1e-12)


def test_spread_needs_two_images_a_class():
    with pytest.raises(ValueError, match="at least twice"):
        spread(np.zeros((3, 2)), np.array([0, 0, 1]))


def test_frechet_distance_of_diagonal_gaussians_in_closed_form():
    # samples whose mean and covariance are exactly known: +-s_i on each axis
    def exact(mean, std):
        d = len(std)
        points = np.concatenate([np.diag(std), -np.diag(std)]) * np.sqrt((2 * d - 1) / 2)
        return points + mean

    a, b = exact(np.array([1.0, 2, 3]), np.array([1.0, 2, 0])), exact(np.array([0.0, 2, 5]), np.array([3.0, 1, 0]))
    assert frechet_distance(a, b) == pytest.approx((1 + 0 + 4) + (1 - 3) ** 2 + (2 - 1) ** 2, rel=1e-12)


def test_frechet_distance_against_scipys_square_root():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(80, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(90, 6)) @ rng.normal(size=(6, 6)) + 1
    A, B = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2 * np.real(sqrtm(A @ B)))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("b", [np.zeros((5, 3)), np.zeros((1, 2)), np.zeros(5)], ids=["width", "one", "vector"])
def test_frechet_distance_refuses_what_has_no_covariance(b):
    with pytest.raises(ValueError, match="a and b must be"):
        frechet_distance(np.zeros((5, 2)), b)


def test_real_split_distance_shrinks_with_the_sample_and_repeats():
    x = np.random.default_rng(0).normal(size=(2000, 8))
    few, many = real_split_distance(x[:200]), real_split_distance(x)
    assert len(few) == 20 and np.array_equal(few, real_split_distance(x[:200]))
    # the bias of a Fréchet distance falls as 1 / N
    assert few.mean() > 5 * many.mean() > 0


def test_nearest_distance_is_a_double_loop():
    a, b = torch.randn(5, *SHAPE), torch.randn(7, *SHAPE)
    expected = [min(float(((p - q) ** 2).mean() ** 0.5) for q in b) for p in a]
    np.testing.assert_allclose(nearest_distance(a, b), expected, rtol=1e-6)
    assert (nearest_distance(b[3:4], b) == 0).all()


def test_judge_learns_from_what_it_is_given():
    images, labels = WORLD.draw(300)
    assert Judge(images, labels.numpy()).accuracy(TRAIN[0], TRAIN[1].numpy()) > 0.6
    swapped = (labels + 1) % K
    assert Judge(images, swapped.numpy()).accuracy(TRAIN[0], TRAIN[1].numpy()) < 0.2


def test_exact_model_meets_every_criterion(exact_report):
    assert verdicts(exact_report) == dict.fromkeys(
        ("accuracy", "spread", "frechet", "accuracy_rises", "spread_falls", "near_copies", "nearest"), True
    ), table(exact_report)
    at_zero = exact_report["points"][0]
    assert at_zero["spread_ratio"]["mean"] == pytest.approx(1, abs=0.1)
    assert at_zero["accuracy"]["mean"] == pytest.approx(exact_report["real"]["accuracy"]["mean"], abs=0.04)
    json.dumps(exact_report, allow_nan=False)


def test_memoriser_misses_the_copy_criteria_and_no_fidelity_one():
    found = verdicts(evaluate(memoriser(*TRAIN), TRAIN, HELDOUT, **OPTIONS))
    assert not found["near_copies"] and not found["nearest"]
    assert found["accuracy"] and found["spread"] and found["frechet"]


def test_noise_misses_the_frechet_distance_and_the_accuracy():
    found = verdicts(evaluate(diffusion(lambda x, t, y: torch.sin(37 * x)), TRAIN, HELDOUT, **OPTIONS))
    assert not found["frechet"] and not found["accuracy"] and not found["accuracy_rises"]


def test_wrong_labels_miss_the_accuracy_alone():
    model = diffusion(lambda x, t, y: WORLD.denoise(x, t, torch.where(y == K, y, (y + 1) % K)))
    found = verdicts(evaluate(model, TRAIN, HELDOUT, **OPTIONS))
    assert not found["accuracy"] and found["frechet"] and found["spread"]


def test_collapse_to_class_means_misses_the_spread():
    def network(x, t, y):
        return WORLD.means[y.clamp(max=K - 1)].to(x.dtype).view_as(x) + 0.01 * torch.tanh(x)

    found = verdicts(evaluate(diffusion(network), TRAIN, HELDOUT, **OPTIONS))
    assert not found["spread"] and found["accuracy"]


PERFECT = {"accuracy": 0.95, "spread_ratio": 1.0, "frechet": 0.1, "near_copies": 0.01, "nearest_ratio": 1.0}


@pytest.mark.parametrize(
    ("name", "w", "figure", "bound", "sign"),
    [
        ("accuracy", 1.5, "accuracy", 0.97 * 0.95, 1),
        ("spread", 0.0, "spread_ratio", 0.8, 1),
        ("frechet", 0.0, "frechet", 3 * 0.1, -1),
        ("near_copies", 0.0, "near_copies", 0.05, -1),
        ("nearest", 0.0, "nearest_ratio", 0.8, 1),
        ("accuracy_rises", 4.0, "accuracy", 0.95 + 0.02, 1),
        ("spread_falls", 4.0, "spread_ratio", 1.0 - 0.02, -1),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_each_criterion_turns_at_its_bound_and_weight(name, w, figure, bound, sign):
    real = {"accuracy": {"mean": 0.95}, "frechet_halves": {"mean": 0.1, "sizes": [1, 1]}}

    def met(at, value):
        points = [
            {
                "w": each,
                **{f: {"mean": value if (each, f) == (at, figure) else v, "std": 0.01} for f, v in PERFECT.items()},
            }
            for each in (0.0, 1.5, 4.0)
        ]
        return {c["name"]: c["met"] for c in criteria(real, points)}[name]

    assert met(w, bound + sign * 0.001) and not met(w, bound - sign * 0.001)
    # the same figure elsewhere on the curve does not decide
    others = {0.0, 1.5, 4.0} - ({0.0, 4.0} if w == 4.0 else {w})
    assert len({met(other, bound + d) for other in others for d in (-0.1, 0.1)}) == 1


def test_weights_that_were_not_measured_have_no_verdict():
    report = evaluate(diffusion(WORLD.denoise), TRAIN, HELDOUT, **{**OPTIONS, "weights": (0.5,)})
    assert set(verdicts(report).values()) == {None}
    assert table(report).count("not measured") == 7


def test_judge_never_sees_a_training_label(exact_report):
    images, labels = TRAIN
    report = evaluate(diffusion(WORLD.denoise), (images, (labels + 1) % K), HELDOUT, **OPTIONS)
    assert report["real"]["accuracy"]["mean"] < 0.2 < 0.6 < exact_report["real"]["accuracy"]["mean"]
    for mine, exact in zip(report["points"], exact_report["points"], strict=True):
        assert mine["accuracy"] == exact["accuracy"]


def test_batch_size_and_order_of_weights_change_nothing(exact_report):
    options = {**OPTIONS, "weights": (4.0, 0.0, 1.5), "batch_size": 77}
    report = evaluate(diffusion(WORLD.denoise), TRAIN, HELDOUT, **options)
    for mine, exact in zip(report["points"], exact_report["points"], strict=True):
        assert mine["w"] == exact["w"]
        for figure in ("accuracy", "spread_ratio", "frechet", "near_copies", "nearest_ratio"):
            assert mine[figure]["mean"] == pytest.approx(exact[figure]["mean"], rel=1e-4)


def test_error_bars_are_the_spread_over_seeds(exact_report, tmp_path):
    evaluate(diffusion(WORLD.denoise), TRAIN, HELDOUT, **OPTIONS, out=tmp_path)
    rows = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    for point in exact_report["points"]:
        values = [row["frechet"] for row in rows if row.get("w") == point["w"]]
        assert len(set(values)) == 3
        assert point["frechet"]["mean"] == pytest.approx(sum(values) / 3)
        variance = sum((v - sum(values) / 3) ** 2 for v in values) / 2
        assert point["frechet"]["std"] == pytest.approx(variance**0.5)


class Killed(Exception):
    pass


class Stopping:
    """A network that is killed after some calls, as a run might be."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self, x, t, y):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return WORLD.denoise(x, t, y)


def test_killed_run_resumes_and_ends_as_if_never_killed(tmp_path):
    whole = evaluate(diffusion(WORLD.denoise), TRAIN, HELDOUT, **SMALL)
    out = tmp_path / "rows.jsonl"
    with pytest.raises(Killed):
        evaluate(diffusion(Stopping(12)), TRAIN, HELDOUT, **SMALL, out=out)
    assert len(out.read_text().splitlines()) == 2
    # the kill may also fall into the middle of a line
    with open(out, "a") as file:
        file.write('{"kind": "evaluation", "w": 1.0, "se')
    counted = Stopping(10)
    resumed = evaluate(diffusion(counted), TRAIN, HELDOUT, **SMALL, out=out)
    assert counted.left == 0
    assert resumed["environment"]["points_reused"] == resumed["environment"]["points_sampled"] == 2
    for mine, never in zip(resumed["points"], whole["points"], strict=True):
        for figure in ("accuracy", "spread_ratio", "frechet", "near_copies", "nearest_ratio"):
            assert mine[figure] == never[figure]
    finished = evaluate(diffusion(Stopping(0)), TRAIN, HELDOUT, **SMALL, out=out)
    assert finished["points"] == resumed["points"]
    assert out.read_text().count('"evaluation-real"') == 1


@pytest.mark.parametrize(
    "changed",
    [
        dict(model_sha256="cd" * 32),
        dict(model_sha256=None),
        dict(images=33),
        dict(steps=6),
        dict(solver="ddpm"),
        dict(dtype="float64"),
        dict(seeds=(2, 3)),
        dict(weights=(0.25, 0.75)),
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_nothing_is_reused_from_other_settings(tmp_path, changed):
    evaluate(diffusion(WORLD.denoise), TRAIN, HELDOUT, **SMALL, out=tmp_path)
    report = evaluate(diffusion(WORLD.denoise), TRAIN, HELDOUT, **{**SMALL, **changed}, out=tmp_path)
    assert report["environment"]["points_reused"] == 0


def test_nothing_is_reused_where_the_weights_are_unknown(tmp_path):
    for _ in range(2):
        report = evaluate(
            diffusion(WORLD.denoise), TRAIN, HELDOUT, **{**SMALL, "model_sha256": None}, out=tmp_path / "rows.jsonl"
        )
        assert report["environment"]["points_reused"] == 0


def test_nothing_is_reused_from_other_data(tmp_path):
    evaluate(diffusion(WORLD.denoise), TRAIN, HELDOUT, **SMALL, out=tmp_path)
    other = (HELDOUT[0].flip(0), HELDOUT[1].flip(0))
    report = evaluate(diffusion(WORLD.denoise), TRAIN, other, **SMALL, out=tmp_path)
    assert report["environment"]["points_reused"] == 0


def test_rows_say_where_they_come_from(tmp_path):
    report = evaluate(diffusion(WORLD.denoise), TRAIN, HELDOUT, **SMALL, dirty=True, out=tmp_path / "results")
    (file,) = (tmp_path / "results").iterdir()
    assert "-c0ffee-" in file.name
    *drawn, real = map(json.loads, file.read_text().splitlines())
    assert (real["kind"], real["commit"], len(drawn)) == ("evaluation-real", "c0ffee", 4)
    assert report["real"].items() <= real.items()
    for row in drawn:
        assert row["commit"] == "c0ffee" and row["dirty"] is True and row["model_sha256"] == "ab" * 32
        assert row["torch"] == torch.__version__ and row["dtype"] == "float32" and row["device"]
        assert row["images_per_second"] == pytest.approx(30 / row["seconds"])


def test_unwritable_results_are_refused_before_sampling(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out=.*cannot be written"):
        evaluate(diffusion(Stopping(0)), TRAIN, HELDOUT, **SMALL, out=tmp_path / "file" / "folder")


def test_git_state_sees_commit_and_changes(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "results.py").write_text("a")
    monkeypatch.setattr(results, "__file__", str(package / "results.py"))
    assert results.git_state() == ("unknown", None)

    def git(*arguments):
        identity = [
            "-c",
            "user.name=n",
            "-c",
            "user.email=e",
            "-c",
            "commit.gpgsign=false",
            "-c",
            "core.hooksPath=/dev/null",
        ]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    # a repository that does not track the package says nothing about it
    assert results.git_state() == ("unknown", None)
    git("add", "package")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")[:12]
    assert results.git_state() == (commit, False)
    (package / "results.py").write_text("b")
    assert results.git_state() == (commit, True)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(weights=()), ValueError, "weights"),
        (dict(weights=(0, -1)), ValueError, "weights"),
        (dict(weights=(0, float("nan"))), ValueError, "weights"),
        (dict(weights=(1, 1.0)), ValueError, "weights"),
        (dict(weights=1.5), TypeError, "weights"),
        (dict(seeds=(0,)), ValueError, "seeds.*error bars"),
        (dict(seeds=(0, 0)), ValueError, "seeds"),
        (dict(seeds=3), TypeError, "seeds"),
        (dict(seeds=(0, True)), TypeError, "seeds"),
        (dict(images=2 * K - 1), ValueError, f"images must be an integer of at least {2 * K}"),
        (dict(images=30.0), ValueError, "images"),
        (dict(real_train=TRAIN[0]), TypeError, "real_train"),
        (dict(real_train=(TRAIN[0][..., :4], TRAIN[1])), ValueError, r"real_train.*\(N, 1, 8, 8\)"),
        (dict(real_heldout=(HELDOUT[0], HELDOUT[1][:-1])), ValueError, "real_heldout: labels"),
        (dict(real_heldout=(HELDOUT[0], HELDOUT[1].float())), ValueError, "real_heldout: labels"),
        (dict(real_heldout=(HELDOUT[0], HELDOUT[1] % 2)), ValueError, "real_heldout: labels must hold every class"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named_before_sampling(wrong, error, message):
    arguments = {"real_train": TRAIN, "real_heldout": HELDOUT, **SMALL, **wrong}
    with pytest.raises(error, match=message):
        evaluate(diffusion(Stopping(0)), **arguments)


def test_unconditional_and_unguidable_models_are_refused():
    options = {"variance": "fixed_small", "image_shape": SHAPE, "prediction": "x0"}
    unconditional = DiffusionModel(WORLD.denoise, SCHEDULE, num_classes=None, null_label=None, **options)
    with pytest.raises(ValueError, match="class-conditional"):
        evaluate(unconditional, TRAIN, HELDOUT, **SMALL)
    unguidable = DiffusionModel(WORLD.denoise, SCHEDULE, num_classes=K, null_label=None, **options)
    with pytest.raises(ValueError, match="null_label=None"):
        evaluate(unguidable, TRAIN, HELDOUT, **SMALL)


def test_images_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="w = 0, seed 0"):
        evaluate(diffusion(lambda x, t, y: x * torch.nan), TRAIN, HELDOUT, **SMALL)


def test_table_shows_every_point_and_verdict(exact_report):
    report = json.loads(json.dumps(exact_report))
    report["criteria"][0]["met"] = False
    text = table(report)
    for point in report["points"]:
        accuracy = point["accuracy"]
        row = f"| {point['w']:g} | {100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} % | "
        assert row in text
    assert text.count("**MISSED**") == 1 and text.count("| met |") == 6
    assert "halves of 375 and 375" in text and "40 evaluations" in text
    columns = {line.count("|") for line in text.split("\n\n")[0].splitlines()}
    assert columns == {7}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_tradeoff_picture(exact_report, tmp_path, suffix):
    path = plot.tradeoff(exact_report, tmp_path / f"tradeoff.{suffix}")
    if suffix == "png":
        from PIL import Image

        with Image.open(path) as picture:
            assert picture.size == (900, 350)
    else:
        assert "guidance weight" in path.read_text() or "<svg" in path.read_text()


def test_importing_the_evaluation_loads_neither_sklearn_nor_matplotlib():
    code = "import sys, fastdiff.evaluation.plot; print({'sklearn', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ".:kernels"}
    )
    assert done.stdout.strip() == "set()"
