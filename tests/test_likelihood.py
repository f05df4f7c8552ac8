"""Bits per dimension of a whole model against the sum of the papers' terms, and the rows that keep them"""

import json
import math
import typing

import numpy as np
import pytest
import torch
from PIL import Image
from reference import schedule as paper
from reference import variational_bound as literal
from reference.ddpm import predicted_x0
from reference.networks import NULL, Recorder, mixing, mixing_learned

import fastdiff
from fastdiff import DiffusionModel, cli, image_seeds, to_uint8
from fastdiff.evaluation import bits_per_dimension, likelihood_table, plot
from fastdiff.model import UNet, UNetConfig
from fastdiff.training import digits
from fastdiff_kernels import philox_normal

SHAPE, N, STEPS, LABELS = (1, 4, 4), 5, 6, [3, 0, 9, 9, 1]
TIMES = paper.sections([STEPS], 1000)
ABARS = [paper.abar_at(t, paper.cosine_betas(1000)) for t in TIMES]
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
IMAGES = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (N, *SHAPE)))
IMAGES[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])
OPTIONS = {"steps": STEPS, "seed": 7, "dtype": torch.float64, "progress": False}
ROWS = {**OPTIONS, "model_sha256": "ab" * 32, "commit": "c0ffee"}


def a_model(network=mixing_learned, **options) -> DiffusionModel:
    options = {"variance": "learned_range" if network is mixing_learned else "fixed_small"} | options
    return DiffusionModel(network, "cosine", **{"image_shape": SHAPE, "null_label": NULL} | options)


def bound_of(report, variance):
    (found,) = [bound for bound in report["bounds"] if bound["variance"] == variance]
    return found


def literal_figures(prediction: str, variance: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Terms (N, STEPS), prior (N,) and the errors (N, STEPS) of eps and x0, image by image"""
    terms, eps_mse, x0_mse = np.zeros((3, N, STEPS))
    priors = np.zeros(N)
    for n, key in enumerate(image_seeds(7, N)):
        x0 = np.floor(127.5 * IMAGES[n].numpy() + 128).clip(0, 255) / 127.5 - 1
        priors[n] = literal.prior(x0, ABARS[-1])
        for i, t in enumerate(TIMES):
            eps = philox_normal(torch.tensor([key]), SHAPE, draw=i, stream=3, dtype=torch.float64)[0].numpy()
            x_t = math.sqrt(ABARS[i]) * x0 + math.sqrt(1 - ABARS[i]) * eps
            batch = torch.from_numpy(x_t)[None], torch.tensor([t], dtype=torch.float64), torch.tensor([LABELS[n]])
            out = mixing_learned(*batch)[0].numpy()
            options = {"prediction": prediction, "variance": variance, "clip": True}
            terms[n, i] = literal.term(x0, x_t, out, i, ABARS, **options)
            guess = predicted_x0(x_t, out[:1], ABARS[i], prediction)
            own_eps = (x_t - math.sqrt(ABARS[i]) * guess) / math.sqrt(1 - ABARS[i])
            eps_mse[n, i] = np.mean((own_eps - eps) ** 2)
            x0_mse[n, i] = np.mean((guess.clip(-1, 1) - x0) ** 2)
    return terms, priors, eps_mse, x0_mse


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_bound_is_the_sum_of_the_papers_terms(prediction):
    report = bits_per_dimension(a_model(prediction=prediction), IMAGES, LABELS, **OPTIONS)
    assert [bound["variance"] for bound in report["bounds"]] == list(VARIANCES)
    assert report["t"] == TIMES
    for variance in VARIANCES:
        terms, priors, eps_mse, x0_mse = literal_figures(prediction, variance)
        totals, bound = priors + terms.sum(1), bound_of(report, variance)
        # the literal mass of a white pixel is 1 less a number close to it
        assert bound["total"]["mean"] == pytest.approx(totals.mean(), rel=1e-8)
        assert bound["total"]["standard_error"] == pytest.approx(totals.std(ddof=1) / math.sqrt(N), rel=1e-8)
        assert bound["prior"] == pytest.approx(priors.mean(), rel=1e-8)
        # kept to seven digits
        np.testing.assert_allclose(bound["terms"], terms.mean(0), rtol=6e-7)
        assert bound["decoder"] == bound["terms"][0]
        np.testing.assert_allclose(report["eps_mse"], eps_mse.mean(0), rtol=6e-7)
        np.testing.assert_allclose(report["x0_mse"], x0_mse.mean(0), rtol=6e-7)
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_batch_size_changes_nothing(batch_size):
    whole, parts = (bits_per_dimension(a_model(), IMAGES, LABELS, **OPTIONS, batch_size=b) for b in (N, batch_size))
    for mine, other in zip(parts["bounds"], whole["bounds"], strict=True):
        assert mine["total"] == pytest.approx(other["total"], rel=1e-12)
        assert mine["terms"] == pytest.approx(other["terms"], rel=1e-6)


def test_every_image_and_level_has_noise_of_its_own():
    recorder = Recorder()
    same = IMAGES[:1].expand(N, *SHAPE)
    bits_per_dimension(a_model(recorder), same, 3, **OPTIONS)
    noises = torch.stack([(x - a * same) for x, a in zip(recorder.x, np.sqrt(ABARS), strict=True)])
    noises = (noises / torch.tensor(1 - np.array(ABARS)).sqrt().view(-1, 1, 1, 1, 1)).flatten(0, 1)
    distances = torch.cdist(noises.flatten(1), noises.flatten(1)).fill_diagonal_(torch.inf)
    assert distances.min() > 1
    # nor is it that of training, whose stream has the same keys
    training = philox_normal(torch.tensor(image_seeds(7, N)), SHAPE, draw=0, stream=2, dtype=torch.float64)
    assert torch.cdist(noises.flatten(1), training.flatten(1)).min() > 1


def test_an_image_that_the_network_knows_costs_the_prior_and_its_pixels_alone():
    known = to_uint8(IMAGES).permute(0, 3, 1, 2).double() / 127.5 - 1
    model = a_model(lambda x, t, y: known.to(x.dtype), prediction="x0")
    # a chain that ends early, whose prior is no small thing
    options = OPTIONS | {"steps": [400, 200, 0], "variances": ["fixed_small"]}
    report = bits_per_dimension(model, IMAGES, LABELS, **options)
    (bound,) = report["bounds"]
    assert bound["terms"][1:] == [0, 0] and report["x0_mse"] == [0, 0, 0]
    assert bound["prior"] > 0.1 and 0 < bound["decoder"] < 8
    assert bound["total"]["mean"] == pytest.approx(bound["prior"] + bound["decoder"], rel=1e-6)


def test_the_chain_is_the_whole_one_by_default():
    recorder = Recorder()
    report = bits_per_dimension(a_model(recorder), IMAGES[:2], 1, progress=False)
    assert report["t"] == list(range(1000)) and len(recorder.t) == 1000
    assert [t[0].item() for t in recorder.t[:3]] == [0, 1, 2]
    # this network knows nothing of the images, and the bound sees it
    assert bound_of(report, "fixed_large")["total"]["mean"] > 8


def test_images_are_rounded_to_8_bits():
    expected = bits_per_dimension(a_model(), IMAGES, LABELS, **OPTIONS)
    rounded = (to_uint8(IMAGES).double() / 127.5 - 1).permute(0, 3, 1, 2)
    nudged = (rounded + 0.4 / 127.5 * torch.sin(37 * rounded)).clamp(-1, 1)
    for images in (rounded, nudged, rounded.float()):
        report = bits_per_dimension(a_model(), images, LABELS, **OPTIONS)
        assert report["bounds"] == expected["bounds"]
        assert report["settings"] == expected["settings"]


def test_labels_go_to_their_images_and_none_is_the_null_label():
    recorder = Recorder()
    for labels, expected in ((LABELS, LABELS), (4, [4] * N), (None, [NULL] * N)):
        recorder.y.clear()
        report = bits_per_dimension(a_model(recorder), IMAGES, labels, **OPTIONS, batch_size=3)
        assert recorder.y == [expected[:3]] * STEPS + [expected[3:]] * STEPS
        assert report["settings"]["conditional"] == (labels is not None)
    recorder.y.clear()
    unconditional = a_model(recorder, num_classes=None, null_label=None)
    bits_per_dimension(unconditional, IMAGES, **OPTIONS)
    assert recorder.y == [None] * STEPS


class Watching(torch.nn.Module):
    """Keeps what it was called with and how; a converted copy keeps it in the same place"""

    seen: typing.ClassVar[list[tuple]] = []

    def __init__(self) -> None:
        super().__init__()
        self.seen.clear()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, y):
        modes = self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        self.seen.append((*modes, x.dtype, t.dtype, self.scale.dtype))
        return x * self.scale


@pytest.mark.parametrize(("dtype", "times"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_the_network_runs_in_the_dtype_without_gradient_or_dropout(dtype, times):
    network = Watching().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = bits_per_dimension(a_model(network), IMAGES, LABELS, **OPTIONS | {"dtype": dtype})
    asked, table = getattr(torch, dtype), getattr(torch, times)
    assert set(network.seen) == {(False, False, False, asked, table, asked)}
    assert network.training and network.scale.dtype == torch.float32 and network.scale.grad is None
    assert report["settings"]["dtype"] == dtype
    wide = bits_per_dimension(a_model(network), IMAGES, LABELS, **OPTIONS)
    rel = {"bfloat16": 0.05, "float32": 1e-4, "float64": 1e-12}[dtype]
    for mine, exact in zip(report["bounds"], wide["bounds"], strict=True):
        assert mine["total"]["mean"] == pytest.approx(exact["total"]["mean"], rel=rel)


def test_likelihood_is_measured_in_float32_unless_told_otherwise():
    network = Watching()
    model = a_model(network)
    model.dtype = torch.bfloat16
    for parameters, dtype in ((torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.float64, "float64")):
        network.to(parameters)
        report = bits_per_dimension(model, IMAGES, LABELS, **OPTIONS | {"dtype": None})
        assert report["settings"]["dtype"] == dtype


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_device_s_bound_is_that_of_float64(device):
    options = OPTIONS | {"dtype": torch.float32, "device": device}
    reports = [bits_per_dimension(a_model(), IMAGES, LABELS, **given) for given in (options, OPTIONS)]
    for mine, exact in zip(*(report["bounds"] for report in reports), strict=True):
        assert mine["terms"] == pytest.approx(exact["terms"], rel=1e-3)


def test_variances_are_chosen_and_share_one_pass():
    recorder = Recorder(mixing_learned)
    model = a_model(recorder, variance="learned_range")
    report = bits_per_dimension(model, IMAGES, LABELS, **OPTIONS, variances=("learned_range", "fixed_small"))
    assert [bound["variance"] for bound in report["bounds"]] == ["learned_range", "fixed_small"]
    assert len(recorder.t) == STEPS
    # a model without a variance of its own has the other two
    plain = bits_per_dimension(a_model(mixing), IMAGES, LABELS, **OPTIONS)
    assert [bound["variance"] for bound in plain["bounds"]] == ["fixed_small", "fixed_large"]
    mine, shared = (bound_of(each, "fixed_small")["total"] for each in (plain, report))
    assert mine == pytest.approx(shared, rel=1e-12)


class Stopped(Exception):
    pass


def unmeasurable(x, t, y):
    raise Stopped


def test_rows_that_exist_are_not_measured_again(tmp_path):
    first = bits_per_dimension(a_model(), IMAGES, LABELS, **ROWS, variances=["fixed_small"], out=tmp_path)
    recorder = Recorder(mixing_learned)
    model = a_model(recorder, variance="learned_range")
    second = bits_per_dimension(model, IMAGES, LABELS, **ROWS, out=tmp_path)
    environment = second["environment"]
    assert (environment["variances_reused"], environment["variances_measured"]) == (1, 2) and len(recorder.t) == STEPS
    assert second["bounds"][0] == first["bounds"][0]
    stopped = a_model(unmeasurable, variance="learned_range")
    third = bits_per_dimension(stopped, IMAGES, LABELS, **ROWS, out=tmp_path)
    assert third["bounds"] == second["bounds"]
    (file,) = tmp_path.glob("*-c0ffee-*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["kind"], row["variance"]) for row in rows] == [("likelihood", name) for name in VARIANCES]
    assert all(row["seconds"] > 0 and row["t"] == TIMES and row["commit"] == "c0ffee" for row in rows)


@pytest.mark.parametrize(
    "changed",
    [
        dict(model_sha256="cd" * 32),
        dict(model_sha256=None),
        dict(images=IMAGES[:4], labels=LABELS[:4]),
        dict(images=IMAGES.flip(0)),
        dict(labels=LABELS[::-1]),
        dict(labels=None),
        dict(steps=5),
        dict(seed=8),
        dict(dtype="float32"),
        dict(model=a_model(unmeasurable, variance="learned_range", clip_x0=False)),
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_nothing_is_reused_from_other_settings(tmp_path, changed):
    bits_per_dimension(a_model(), IMAGES, LABELS, **ROWS, out=tmp_path)
    stopped = a_model(unmeasurable, variance="learned_range")
    arguments = {"model": stopped, "images": IMAGES, "labels": LABELS, **ROWS, **changed}
    with pytest.raises(Stopped):
        bits_per_dimension(**arguments, out=tmp_path)


def test_unwritable_results_are_refused_before_measuring(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out=.*cannot be written"):
        bits_per_dimension(a_model(unmeasurable), IMAGES, LABELS, **ROWS, out=tmp_path / "file" / "folder")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (dict(model="digits"), TypeError, "model must be a DiffusionModel, got str; fastdiff.load"),
        (dict(images=IMAGES.numpy()), TypeError, "images must be a floating-point tensor"),
        (dict(images=IMAGES.byte()), TypeError, "images must be a floating-point tensor .*got torch.uint8"),
        (dict(images=IMAGES[:1]), ValueError, r"images must be \(N, 1, 4, 4\) with N of at least 2, got .*\(1, 1"),
        (dict(images=IMAGES[..., :3]), ValueError, r"images must be \(N, 1, 4, 4\)"),
        (dict(images=2 * IMAGES), ValueError, r"images must be in \[-1, 1\]"),
        (dict(images=IMAGES * torch.nan), ValueError, r"images must be in \[-1, 1\], got nan"),
        (dict(labels=LABELS[:4]), ValueError, "labels must be one, or one an image: expected 5, got 4"),
        (dict(labels=[0, 1, 2, 3, 10]), ValueError, r"labels must be in \[0, 10\), got 10"),
        (dict(seed=-1), ValueError, "seed must be in"),
        (dict(seed=[1, 2, 3, 4, 5]), TypeError, "seed must be an integer, got list"),
        (dict(batch_size=0), ValueError, "batch_size must be an integer of at least 1, got 0"),
        (dict(steps=1001), ValueError, "steps must be in"),
        (dict(variances="fixed_small"), TypeError, "variances must be a sequence of names"),
        (dict(variances=[]), ValueError, "variances must be different ones of"),
        (dict(variances=["fixed_small"] * 2), ValueError, "variances must be different ones of"),
        (dict(variances=["learned_range"]), ValueError, r"\['fixed_small', 'fixed_large'\] for this model"),
        (dict(device="cuda:99"), ValueError, "device must be one of"),
        (dict(dtype="int8"), ValueError, "dtype must be one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named_before_measuring(wrong, error, message):
    arguments = {"model": a_model(unmeasurable), "images": IMAGES, "labels": LABELS, **OPTIONS, **wrong}
    with pytest.raises(error, match=message):
        bits_per_dimension(**arguments)


def test_a_class_conditional_model_without_a_null_label_needs_labels():
    with pytest.raises(ValueError, match="labels=None needs a null label"):
        bits_per_dimension(a_model(unmeasurable, null_label=None), IMAGES, **OPTIONS)


def test_a_term_that_is_not_finite_names_its_image_and_time():
    def network(x, t, y):
        return torch.where((y == 9)[:, None, None, None] & (t > 500)[:, None, None, None], torch.nan, x)

    with pytest.raises(FloatingPointError, match="image 2 is not finite at t = 599"):
        bits_per_dimension(a_model(network), IMAGES, LABELS, **OPTIONS, batch_size=2)


def test_the_table_holds_the_totals_and_the_chain_in_parts():
    report = json.loads(json.dumps(bits_per_dimension(a_model(), IMAGES, LABELS, **ROWS)))
    text = likelihood_table(report, parts=3)
    totals, tenths, note = text.split("\n\n")
    for bound in report["bounds"]:
        assert (
            f"| {bound['variance']} | {bound['total']['mean']:.4f} ± {bound['total']['standard_error']:.4f} |" in totals
        )
    rows = tenths.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| 0 to 200", "| 400 to 599", "| 799 to 999"]
    sums = [[float(cell) for cell in row.strip("| ").split(" | ")[1:4]] for row in rows]
    expected = [sum(bound["terms"]) for bound in report["bounds"]]
    np.testing.assert_allclose(np.sum(sums, 0), expected, rtol=0, atol=2e-4)
    assert "5 images given their labels, rounded to 8 bits; 6 levels" in note and "c0ffee" in note
    assert "given" not in likelihood_table(bits_per_dimension(a_model(), IMAGES, **OPTIONS))
    assert {line.count("|") for line in tenths.splitlines()} == {7}


def test_the_picture(tmp_path):
    path = plot.bits_by_t(bits_per_dimension(a_model(), IMAGES, LABELS, **OPTIONS), tmp_path / "bits.png")
    with Image.open(path) as picture:
        assert picture.size == (600, 350)


NETWORK = UNetConfig(
    **{"image_size": 16, "in_channels": 1, "out_channels": 2, "channels": 8, "channel_mult": (1,), "num_blocks": 1},
    **{"attention_resolutions": (), "num_heads": 1, "head_channels": None, "num_labels": 11, "groups": 4},
)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = UNet(NETWORK)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model = DiffusionModel(network, "linear", variance="learned_range")
    return model, str(fastdiff.save(model, tmp_path / "tiny"))


def test_the_command_prints_the_table_and_keeps_rows(tiny, tmp_path, capsys):
    model, folder = tiny
    arguments = ["evaluate", folder, "--likelihood", "--images", "4", "--steps", "3", "-q", "--out", "rows.jsonl"]
    assert cli.main([*arguments, "--plot", "bits.png"]) == 0
    data = digits("heldout")
    report = bits_per_dimension(model, data.images[:4], data.labels[:4], steps=3, progress=False)
    printed = capsys.readouterr().out
    assert printed.startswith(likelihood_table(report).split("\n\n")[0])
    assert "4 images given their labels" in printed
    assert "plot    bits.png" in printed and Image.open("bits.png").width == 600
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["variance"] for row in rows] == list(VARIANCES)
    assert {row["model_sha256"] for row in rows} == {fastdiff.checkpoint.info(folder)["sha256"]}
    assert cli.main([*arguments, "--seeds", "5"]) == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 6
    assert cli.main(arguments) == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--weights", "1"], "--weights must be left out with --likelihood"),
        (["--heldout", "digits"], "--heldout must be left out with --likelihood"),
        (["--solver", "ddim"], "--solver must be left out with --likelihood"),
        (["--seeds", "0", "1"], "--seeds must be one integer with --likelihood, got 0 1"),
        (["--images", "301"], "--images must be in [2, 300], as many as digits:heldout has, got 301"),
        (["--images", "-5"], "--images must be in [2, 300]"),
        (["--data", "x.npy"], "data must be 'digits'"),
        (["--steps", "1001"], "steps must be in [1, 1000]"),
        (["--plot", "bits.npz"], "--plot must end in .png"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_the_command_cannot_do_it_says(tiny, arguments, sentence, capsys):
    assert cli.main(["evaluate", tiny[1], "--likelihood", *arguments]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
