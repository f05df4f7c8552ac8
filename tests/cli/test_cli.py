"""The command line: what it writes can be drawn again, what it cannot do it says in one sentence."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import sys
import types
import typing
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import FAST, NETWORK, recipe, run
from PIL import Image

import fastdiff
from fastdiff import cli, images
from fastdiff.cli.arguments import parse_labels
from fastdiff.doctor import examine
from fastdiff.evaluation import evaluate
from fastdiff.model import UNet
from fastdiff.training import npz

COMMANDS = {
    **{"sample": cli.Sample, "train": cli.Train, "plot": cli.Plot, "evaluate": cli.Evaluate},
    **{"info": cli.Info, "doctor": cli.Doctor, "convert": cli.Convert},
}


def redrawn(facts: dict, model: str) -> torch.Tensor:
    """The picture that metadata describe, drawn through the API."""
    names = ("labels", "w", "num_images", "seed", "steps", "solver", "eta", "guidance_interval", "dtype")
    return images.to_uint8(fastdiff.sample(model, **{name: facts[name] for name in names}))


@pytest.mark.parametrize(
    ("text", "labels"),
    [("0-9", list(range(10))), ("3,1,4", [3, 1, 4]), ("0-3, 7", [0, 1, 2, 3, 7]), ("7-7,7", [7, 7]), ("None", None)],
)
def test_labels_are_read_as_written(text: str, labels: list[int] | None) -> None:
    assert parse_labels(text) == labels


@pytest.mark.parametrize("text", ["", "a", "3,", "9-0", "-1", "1.5", "1-2-3", "0-999999999", "none,1"])
def test_other_labels_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--labels must"):
        parse_labels(text)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_of_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    text, fields = capsys.readouterr().out, dataclasses.fields(COMMANDS[command])
    assert stop.value.code == 0
    for field in fields:
        option = f"--{field.name.replace('_', '-')}"
        assert option in text or field.name in ("model", "path", "runs", "src", "dst")
    assert "[MODEL" in text or command in ("train", "plot", "convert")
    assert "None" not in text, "a default that says nothing"


def test_help_and_version_do_not_wait_for_torch() -> None:
    code = """
import sys
from fastdiff.cli import main
assert main(["--version"]) == 0
try:
    main([])
except SystemExit as stop:
    assert stop.code == 0
print("torch" in sys.modules, "numpy" in sys.modules)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"fastdiff {fastdiff.__version__}\n")
    assert all(command in done.stdout for command in COMMANDS)
    assert done.stdout.endswith("False False\n")


def test_the_defaults_that_evaluate_tells_are_the_report_s() -> None:
    """What is not given is left to the report; help can only tell it"""
    takes = inspect.signature(evaluate).parameters
    told = typing.get_type_hints(cli.Evaluate, include_extras=True)
    for name in ("weights", "images", "seeds", "steps", "solver"):
        default = takes[name].default
        text = " ".join(f"{value:g}" for value in default) if isinstance(default, tuple) else str(default)
        assert re.match(rf"\(default: {text}[;)]", told[name].__metadata__[0].help_behavior_hint)
        assert getattr(cli.Evaluate(), name) is None


def test_sample_writes_a_labelled_grid_and_says_how(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", tiny, "--steps", "2"]) == 0
    printed = capsys.readouterr()
    said = dict(line.split(maxsplit=1) for line in printed.out.splitlines())
    assert said.keys() == {"seed", "device", "dtype", "time", "file"}
    assert "sampling" in printed.err and "2/2" in printed.err, "the progress bar belongs on stderr"
    facts = images.read_metadata("samples.png")
    assert facts["labels"] == [label for label in range(10) for _ in range(4)]
    assert (facts["w"], facts["steps"], facts["solver"], facts["model"]) == (1.5, 2, "ddim", "tiny")
    assert str(facts["seed"]) == said["seed"] and said["file"] == "samples.png"
    assert facts["model_sha256"] == fastdiff.checkpoint.info(tiny)["sha256"]
    height = images.grid_size(16, 16, 10, 4)[1]
    picture = Image.open("samples.png")
    assert picture.height == height and np.asarray(picture.convert("L"))[:, :16].min() < 128

    again = [*("--steps", "2"), *("--seed", said["seed"])]
    assert cli.main(["sample", tiny, *again]) == 0
    assert Path("samples-2.png").read_bytes() == Path("samples.png").read_bytes()
    assert cli.main(["sample", tiny, "--steps", "2", "--force"]) == 0
    assert Path("samples-2.png").read_bytes() != Path("samples.png").read_bytes(), "a seed of its own each time"
    assert not Path("samples-3.png").exists()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--solver", "ddim", "--eta", "0.7", "--w", "0.5"],
        ["--solver", "ddpm", "--steps", "ddim4", "--guidance-interval", "0.1", "20"],
        ["--dtype", "float64", "--batch-size", "3", "--w", "-0.5"],
        ["--labels", "none", "--seed", str(2**63 - 1)],
    ],
    ids=["defaults", "eta", "interval", "float64", "unconditional"],
)
def test_a_picture_can_be_drawn_again_from_its_metadata(tiny: str, options: list[str]) -> None:
    assert cli.main(["sample", tiny, *FAST, *options, "-q", "-o", "a.npz"]) == 0
    facts = images.read_metadata("a.npz")
    with np.load("a.npz") as arrays:
        pixels = arrays["arr_0"].astype(int)
        assert ("arr_1" not in arrays) == ("none" in options)
    assert len(pixels) == facts["num_images"] == (2 if "none" in options else 4)
    assert len(np.unique(pixels)) > 16, "nothing to compare"
    assert np.abs(redrawn(facts, tiny).numpy().astype(int) - pixels).max() <= 1


def test_what_sample_writes_can_be_trained_on(tiny: str) -> None:
    assert cli.main(["sample", tiny, *FAST, "-q", "-o", "a.npz"]) == 0
    assert npz("a.npz").labels.tolist() == [3, 3, 1, 1]


def test_each_picture_of_a_folder_can_be_drawn_again_alone(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", tiny, *FAST, "-q", "-o", "many/"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("many/\n", "")
    names = sorted(os.listdir("many"))
    assert names == ["00000_label3.png", "00001_label3.png", "00002_label1.png", "00003_label1.png"]
    for name in names:
        alone = redrawn(images.read_metadata(f"many/{name}"), tiny)[0, ..., 0].numpy().astype(int)
        assert np.abs(alone - np.asarray(Image.open(f"many/{name}"))).max() <= 1
    assert cli.main(["sample", tiny, *FAST, "-q", "-o", "many"]) == 2
    assert cli.main(["sample", tiny, *FAST, "-q", "-o", "many", "--labels", "2", "--force"]) == 0
    assert sorted(os.listdir("many")) == ["00000_label2.png", "00001_label2.png"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--labels", "3-1"], "--labels must be such as"),
        (["--labels", "10"], "labels must be in [0, 10), got 10"),
        (["--w", "nan"], "w must be finite"),
        (["--labels", "none", "--w", "2"], "w must be 0 or -1"),
        (["--steps", "2000"], "the nearest is 1000"),
        (["--steps", "2.5"], "steps must be"),
        (["--solver", "magic"], "solver must be one of"),
        (["--solver", "ddpm", "--eta", "0.5"], "eta"),
        (["--eta", "1.5"], "eta"),
        (["--guidance-interval", "2", "1"], "guidance_interval must"),
        (["--seed", "-1"], "seed must be in"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--device", "toaster"], "device must be"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["-n", "0"], "--images-per-label must be at least 1"),
        (["-n", "9999999"], "write a folder or an .npz"),
        (["-o", "there.png"], "there.png exists; --force"),
        (["-o", "a.gif"], "'a.gif': the name must end in"),
        (["-o", "missing/a.png"], "missing/a.png cannot be written"),
        (["nowhere"], "no such file or folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_sentence_and_exit_2(
    tiny: str, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there.png").write_text("kept")
    model = [] if arguments == ["nowhere"] else [tiny]
    assert cli.main(["sample", *model, "--steps", "2", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastdiff: ") and error.count("\n") == 1 and sentence in error
    assert os.listdir() == ["there.png"] and Path("there.png").read_text() == "kept"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_explicit_gpu_is_not_replaced_by_the_cpu(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", tiny, *FAST, "--device", "cuda"]) == 2
    assert "device must be one of ['cpu'] here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["paint"], ["sample", "--wrong"], ["sample", "--w", "much"], ["sample", "--seed", "None"], ["train"]]
)
def test_what_cannot_be_parsed_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert "--help" in printed.err and not printed.out


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (FloatingPointError("NaN\nhere"), 2), (OSError(28, "full"), 2)]
)
def test_what_stops_a_run_ends_it_without_a_traceback(
    tiny: str,
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(fastdiff.Sampler, "__call__", stop)
    assert cli.main(["sample", tiny, *FAST]) == code
    assert capsys.readouterr().err.count("\n") == 1
    assert not os.listdir()


def test_a_machine_without_gpu_triton_or_home_samples_with_one_warning(tiny: str) -> None:
    code = """
import sys, warnings, torch
def broken():
    warnings.warn("CUDA initialization: the driver is too old")
    return False
torch.cuda.is_available = broken
sys.modules["triton"] = None
from fastdiff.cli import main
assert main(["sample", sys.argv[1], "--steps", "2", "-n", "1", "-q"]) == 0
sys.exit(main(["sample", sys.argv[1], "--w", "inf", "--device", "cpu"]))
"""
    nowhere = "/proc/self/nowhere"
    done = run("-c", code, tiny, HOME=nowhere, XDG_CACHE_HOME=nowhere, TRITON_CACHE_DIR=nowhere)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("samples.png\n") and Path("samples.png").exists()
    lines = done.stderr.splitlines()
    assert lines[-1] == "fastdiff: w must be finite, got inf"
    assert sum("Warning" in line for line in lines) == 1 and "Traceback" not in done.stderr


def test_python_m_fastdiff_is_the_same_program() -> None:
    assert run("-m", "fastdiff", "--version").stdout == f"fastdiff {fastdiff.__version__}\n"
    assert run("-m", "fastdiff", "paint").returncode == 2


def test_info_of_a_model_and_of_a_picture(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", tiny]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["name"] == "tiny" and lines["card"] == f"{tiny}/README.md"
    assert int(lines["parameters"]) == sum(p.numel() for p in UNet(NETWORK).parameters())
    assert json.loads(lines["schedule"]) == {"name": "linear", "num_train_timesteps": 1000}
    assert (lines["num_classes"], lines["storage"]) == ("10", '["float32"]')
    assert lines["sha256"].startswith(next(Path(tiny).glob("model-*")).name[6:18])
    assert cli.main(["sample", tiny, *FAST, "--seed", "7", "-q", "-o", "a.png"]) == 0
    capsys.readouterr()
    assert cli.main(["info", "a.png", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["seed"], facts["labels"]) == (7, [3, 3, 1, 1])
    assert cli.main(["info", "b.png"]) == 2
    assert cli.main(["info", "."]) == 2


def test_doctor_finds_a_sound_machine_sound(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", tiny, "--device", "cpu"]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert {line[0] for line in lines} == {"ok"}
    said = {name: text for _, name, text in lines}
    names = "fastdiff python torch numpy triton cpu gpu kernels device model dtype sample"
    assert list(said) == names.split()
    assert (said["torch"], said["numpy"]) == (torch.__version__, np.__version__)
    assert f"{torch.get_num_threads()} threads" in said["cpu"]
    assert "reference (PyTorch)" in said["kernels"] and "verified" in said["model"]


def test_doctor_reports_a_damaged_model(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in Path(tiny).iterdir():
        data = bytearray(file.read_bytes())
        data[-1] ^= file.suffix == ".safetensors"
        (folder / file.name).write_bytes(data)
    assert cli.main(["doctor", str(folder)]) == 1
    printed = capsys.readouterr()
    assert "BAD  model" in printed.out and "is damaged" in printed.out and "ok   torch" in printed.out
    assert "Traceback" not in printed.out + printed.err


def test_doctor_reports_what_is_broken_in_a_line(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        warnings.warn("CUDA initialization: the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setitem(sys.modules, "triton", None)
    findings = {finding.name: finding for finding in examine(tiny)}
    assert all(finding.ok for finding in findings.values())
    assert findings["triton"].text.startswith("absent")
    assert [f.name for f in findings.values() if "driver is too old" in f.text] == ["gpu"]

    def hopeless() -> bool:
        raise RuntimeError("libcuda.so:\nwrong ELF class")

    monkeypatch.setattr(torch.cuda, "is_available", hopeless)
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))  # no __version__
    findings = {finding.name: finding for finding in examine(tiny, "cpu")}
    assert "wrong ELF class" in findings["gpu"].text and "AttributeError" in findings["triton"].text
    assert all(finding.ok and "\n" not in finding.text for finding in findings.values())
    assert not {finding.name: finding for finding in examine(tiny)}["device"].ok


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE is POSIX")
@pytest.mark.parametrize("command", ["sample", "train"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(command: str, tiny: str) -> None:
    Path("old.png").write_bytes(b"old")
    arguments = ["sample", tiny, *FAST, "--out", "old.png", "--force", "-q"]
    if command == "train":
        arguments = ["train", "--recipe", str(recipe()), "--out", "run", "-q"]
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)); import fastdiff.cli as c"
    done = run("-c", f"{code}; sys.exit(c.main(sys.argv[1:]))", *arguments)
    written = "old.png" if command == "sample" else "run/state.safetensors"
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "File too large" in done.stderr and written in done.stderr
    assert Path("old.png").read_bytes() == b"old"
    assert not [name for name in os.listdir() if name.startswith(".tmp")]
    assert command == "sample" or os.listdir("run") == ["log.jsonl"]


def test_evaluate_prints_its_table_and_draws_it(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", tiny, "--weights", "0", "2", "--images", "20", "--seeds", "0", "1", "--steps", "1", "-q"]
    assert cli.main([*arguments, "--out", "rows", "--plot", "a.png"]) == 0
    printed = capsys.readouterr().out
    assert "| w |" in printed and "| 2 |" in printed and "steps=1" in printed
    assert Image.open("a.png").width > 100
    (rows,) = Path("rows").iterdir()
    kinds = [json.loads(row)["kind"] for row in rows.read_text().splitlines()]
    assert kinds == ["evaluation"] * 4 + ["evaluation-real"]
    assert cli.main([*arguments, "--plot", "a.png"]) == 2
    assert cli.main([*arguments, "--plot", "a.npz"]) == 2
    assert cli.main(["evaluate", tiny, "--seeds", "0"]) == 2
    assert "at least two" in capsys.readouterr().err.splitlines()[-1]


def test_without_arguments_sample_draws_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", "--steps", "2"]) == 0
    facts = images.read_metadata("samples.png")
    assert (facts["labels"], facts["w"]) == ([label for label in range(10) for _ in range(4)], 1.5)
    assert cli.Sample().steps == "50" and facts["solver"] == "ddim"
    assert cli.main(["info"]) == 0
    assert facts["model_sha256"] in capsys.readouterr().out


def test_doctor_finds_the_bundled_model_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert "ok   model" in capsys.readouterr().out
