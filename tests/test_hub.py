"""What comes from the Hub is what the Hub says it is; a made-up Hub answers huggingface_hub's own requests."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MODEL, assert_same_model, files

import fastdiff
from fastdiff.checkpoint import CheckpointError, load, save
from fastdiff.hub import FILES, is_name, snapshot

huggingface_hub = pytest.importorskip("huggingface_hub")
httpx2 = pytest.importorskip("httpx2")

COMMIT = "c" * 40
NAME = "org/name"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Hub:
    """One repository with one commit, and what was asked of it"""

    files: dict[str, bytes]
    sent: dict[str, bytes] = field(default_factory=dict)  # in place of the true bytes
    status: int = 200
    code: str = ""
    without: tuple[str, ...] = ()  # parts of addresses that fail
    asked: list[str] = field(default_factory=list)
    cache: Path = Path()

    def __call__(self, request: Any) -> Any:
        path = request.url.path
        self.asked.append(f"{request.method} {path}")
        if self.status == 0 or any(part in str(request.url) for part in self.without):
            raise httpx2.ConnectError("no network")
        if self.status != 200:
            return httpx2.Response(self.status, headers={"x-error-code": self.code}, request=request)
        if "/api/models/" in path:
            return httpx2.Response(200, json=self._listing("/tree/" in path), request=request)
        file = path.partition("/resolve/")[2].partition("/")[2]
        if file not in self.files:
            return httpx2.Response(404, headers={"x-error-code": "EntryNotFound"}, request=request)
        true, data = self.files[file], self.sent.get(file, self.files[file])
        etag = sha256(true) if self._large(file) else git_blob(true)
        headers = {"etag": f'"{etag}"', "x-repo-commit": COMMIT, "content-length": str(len(data))}
        return httpx2.Response(200, headers=headers, content=b"" if request.method == "HEAD" else data, request=request)

    @staticmethod
    def _large(file: str) -> bool:
        return not file.endswith(".json")

    def _listing(self, tree: bool) -> Any:
        entries = []
        for file, data in self.files.items():
            lfs = {"size": len(data), "sha256": sha256(data), "oid": sha256(data), "pointerSize": 134}
            entry = {"size": len(data), **({"lfs": lfs} if self._large(file) else {})}
            name = {"type": "file", "path": file, "oid": git_blob(data)}
            entries.append(entry | (name if tree else {"rfilename": file, "blobId": git_blob(data)}))
        return entries if tree else {"id": NAME, "sha": COMMIT, "siblings": entries}

    def blob(self, file: str) -> Path:
        return (self.cache / "models--org--name" / "snapshots" / COMMIT / file).resolve()

    def downloads(self) -> list[str]:
        return sorted(line.partition("/resolve/")[2].partition("/")[2] for line in self.asked if line[:4] == "GET "
                      and "/resolve/" in line)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files(save(MODEL, tmp_path_factory.mktemp("native") / "model"))


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, bytes]], Hub]]:
    from huggingface_hub import _tree_cache, constants, file_download
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # its patience with a network that is down
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.1)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "")

    before = _http._GLOBAL_CLIENT_FACTORY

    def go(contents: dict[str, bytes]) -> Hub:
        hub = Hub(contents, cache=tmp_path / "cache")
        huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(hub)))
        _tree_cache._IN_MEMORY_TREE_CACHE.clear()
        return hub

    yield go
    huggingface_hub.set_client_factory(before)
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()


def refused(name: str, *words: str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        snapshot(name, **options)
    sentence = str(caught.value)
    assert sentence.startswith(NAME)
    for word in words:
        assert word in sentence, sentence
    return sentence


def test_a_native_checkpoint_is_fetched_loaded_and_fetched_once(online: Any, checkpoint: dict[str, bytes]) -> None:
    hub = online(checkpoint)
    folder = snapshot(NAME)
    assert (folder.name, folder.parent.parent.name) == (COMMIT, "models--org--name")
    assert_same_model(load(folder), MODEL)
    assert hub.downloads() == sorted(checkpoint)
    assert snapshot(f"{NAME}@main") == folder == snapshot(NAME, revision="main")
    assert len(hub.downloads()) == len(checkpoint)


PIPELINE = {
    "model_index.json": b'{"of": "a pipeline"}',
    "scheduler/scheduler_config.json": b'{"of": "a scheduler"}',
    "unet/config.json": b'{"of": "a UNet"}',
    "unet/diffusion_pytorch_model.safetensors": b"weights",
    "transformer/diffusion_pytorch_model.safetensors.index.json": b'{"of": "halves"}',
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": b"half",
    "diffusion_pytorch_model.safetensors": b"at the top",
    "config.json": b"{}",
    "vae/config.json": b'{"of": "a VAE"}',
    "vae/diffusion_pytorch_model.safetensors": b"a VAE",
}
LEFT = {
    "README.md": b"words",
    "unet/diffusion_pytorch_model.bin": b"another pickle",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"a second copy",
    "transformer/diffusion_pytorch_model.safetensors.index.fp16.json": b'{"of": "a second copy"}',
    "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors": b"half of a second copy",
    "vae/diffusion_pytorch_model.fp16.safetensors": b"a second VAE",
    "vae/diffusion_pytorch_model.bin": b"a VAE's pickle",
    "text_encoder/model.safetensors": b"not ours",
    "model.pt": b"a pickle",
    "weights.pkl": b"pickle",
    "v1.ckpt": b"pickle",
    "run.py": b"import os",
    "unet/tokenizer.json": b"{}",
}


def test_only_files_that_fastdiff_reads_are_fetched(online: Any) -> None:
    hub = online(PIPELINE | LEFT)
    folder = snapshot(NAME)
    assert hub.downloads() == sorted(PIPELINE)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(PIPELINE)
    assert not [pattern for pattern in FILES if pattern.endswith(("*", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py"))]


CONFIGS = sorted(file for file in PIPELINE if file.endswith("config.json") or file == "model_index.json")


def test_a_variant_is_fetched_in_place_of_the_others(online: Any) -> None:
    hub = online(PIPELINE | LEFT)
    snapshot(NAME, variant="fp16")
    assert hub.downloads() == sorted([*CONFIGS, *(file for file in LEFT if "fp16" in file)])


def test_a_file_of_weights_that_is_named_is_fetched_beside_the_configs(online: Any) -> None:
    hub = online(PIPELINE | LEFT)
    folder = snapshot(NAME, weights_file="diffusion_pytorch_model.bin")
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert hub.downloads() == sorted([*CONFIGS, vae, "unet/diffusion_pytorch_model.bin"])
    flip(folder / "unet/diffusion_pytorch_model.bin")
    refused(NAME, "damaged", "unet/diffusion_pytorch_model.bin", weights_file="diffusion_pytorch_model.bin")


def test_what_is_no_variant_asks_nothing(online: Any) -> None:
    hub = online(PIPELINE | LEFT)
    for argument in ("variant", "weights_file"):
        for value in ("*", "", "a/b", "../x", "?", "[a]", 16):
            with pytest.raises(ValueError, match=f"{argument} must be a word"):
                snapshot(NAME, **{argument: value})
        with pytest.raises(ValueError, match=f"{argument} must be left out beside a file"):
            snapshot(f"{NAME}:model.pt", **{argument: "fp16"})
    with pytest.raises(ValueError, match="must not both be given"):
        snapshot(NAME, variant="fp16", weights_file="x.bin")
    assert not hub.asked
    refused(NAME, "holds no weights", "unet/diffusion_pytorch_model.fp32.safetensors", variant="fp32")
    refused(NAME, "holds no weights", "transformer/x.bin", weights_file="x.bin")


@pytest.mark.parametrize("file", ["model.pt", "unet/diffusion_pytorch_model.bin"])
def test_a_pickle_comes_only_by_its_name(file: str, online: Any) -> None:
    hub = online(PIPELINE | LEFT)
    for path in (snapshot(f"{NAME}:{file}"), snapshot(f"{NAME}@main:{file}"), snapshot(NAME, file=file)):
        assert path.read_bytes() == LEFT[file] and path.as_posix().endswith(f"{COMMIT}/{file}")
    assert hub.downloads() == [file]


def test_a_repository_without_weights_says_what_it_has(online: Any) -> None:
    online({"config.json": b"{}", "64x64_diffusion.pt": b"pickle", "odd.safetensors": b"weights"})
    refused(NAME, "64x64_diffusion.pt", "odd.safetensors", "org/name:file")


def test_a_revision_is_the_one_that_is_asked_for(online: Any) -> None:
    hub = online(PIPELINE | LEFT)
    for options in ({"name": f"{NAME}@refs/pr/1"}, {"name": NAME, "revision": "refs/pr/1"}):
        hub.asked.clear()
        snapshot(**options)
        assert "GET /api/models/org/name/revision/refs/pr/1" in hub.asked
    for options in ({"name": f"{NAME}@v2:model.pt"}, {"name": NAME, "revision": "v2", "file": "model.pt"}):
        hub.asked.clear()
        snapshot(**options)
        assert "HEAD /org/name/resolve/v2/model.pt" in hub.asked
        # and what it hashes to is asked of the commit that came
        assert f"GET /api/models/org/name/revision/{COMMIT}" in hub.asked


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
STATES = {"online": {}, "its hashes unknown": {"without": ("blobs=",)}, "no network": {"status": 0}}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("now", STATES)
@pytest.mark.parametrize("file", [WEIGHTS, "unet/config.json"], ids=["sha256", "git blob"])
def test_a_flipped_bit_in_the_cache_is_refused(file: str, now: str, online: Any) -> None:
    hub = online(PIPELINE)
    folder = snapshot(NAME)
    for name, value in STATES[now].items():
        setattr(hub, name, value)
    assert snapshot(NAME) == folder
    flip(hub.blob(file))
    refused(NAME, "damaged", file, str(hub.blob(file)))
    refused(f"{NAME}:{file}", "damaged", file)
    # what it says helps
    hub.status = 200
    hub.blob(file).unlink()
    assert snapshot(NAME) == folder


@pytest.mark.parametrize("asked", [NAME, f"{NAME}:{WEIGHTS}"])
def test_bytes_that_are_not_those_that_the_hub_names_are_refused(asked: str, online: Any) -> None:
    hub = online(PIPELINE)
    hub.sent[WEIGHTS] = b"WEIGHTS"
    refused(asked, "damaged", WEIGHTS)


def test_another_file_in_its_place_is_refused_where_the_hub_can_be_asked(online: Any) -> None:
    hub = online(PIPELINE)
    place, other = snapshot(NAME) / WEIGHTS, hub.blob("diffusion_pytorch_model.safetensors")
    place.unlink()
    place.symlink_to(other)
    refused(NAME, "another commit's", WEIGHTS)


def test_copies_without_links_are_checked_by_the_hub_alone(online: Any) -> None:
    hub = online(PIPELINE)
    place = snapshot(NAME) / WEIGHTS
    place.unlink()
    place.write_bytes(PIPELINE[WEIGHTS])
    assert snapshot(NAME)
    hub.status = 0
    refused(NAME, "cannot be checked", WEIGHTS)
    hub.status = 200
    flip(place)
    refused(NAME, "damaged", WEIGHTS)


def test_a_blob_shared_by_repositories_is_a_link_to_one_under_another_name(online: Any) -> None:
    hub = online(PIPELINE)
    folder, blob = snapshot(NAME), hub.blob(WEIGHTS)
    shared = hub.cache / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    hub.status = 0
    assert snapshot(NAME) == folder
    flip(shared)
    refused(NAME, "damaged", WEIGHTS, str(shared))


@pytest.mark.parametrize("asked", [NAME, f"{NAME}:model.pt"])
def test_errors_of_the_hub_name_the_repository_and_the_remedy(asked: str, online: Any) -> None:
    hub = online(PIPELINE | LEFT)
    for status, code, word in (
        (401, "RepoNotFound", "check the name"),
        (401, "RepoNotFound", "is no local path"),
        (403, "GatedRepo", "is gated"),
        (404, "RevisionNotFound", "has no revision"),
        (500, "", "cannot be reached"),
        (0, "", "cannot be reached"),
        (0, "", "is no local path"),
    ):
        hub.status, hub.code = status, code
        refused(asked, word)
    hub.status = 200
    assert snapshot(asked)


def test_a_file_that_the_repository_lacks(online: Any) -> None:
    online(PIPELINE)
    refused(f"{NAME}:absent.pt", "has no file 'absent.pt'")


def test_offline_means_offline(online: Any, monkeypatch: pytest.MonkeyPatch, checkpoint: dict[str, bytes]) -> None:
    hub = online(checkpoint)
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.set_client_factory(_http.default_client_factory)
    refused(NAME, "cannot be reached", "HF_HUB_OFFLINE")
    assert hub.asked == []


@pytest.mark.parametrize("error", [RuntimeError("boom"), TimeoutError(), AssertionError("no etag"), OSError("disk")])
def test_whatever_the_library_raises_is_a_checkpoint_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    for asked in (NAME, f"{NAME}:model.pt"):
        assert str(error) in refused(asked) and not refused(asked).endswith(": ")


def test_without_the_library_its_name_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(NAME, "pip install huggingface_hub")


BAD = ["", "name", "org/name/more", "/org/name", "org//name", "../name", "org/..", "org/na..me", "./name", "org/name/",
       "~/name", "org\\name", "https://huggingface.co/org/name", "hf://org/name", "C:/name", "org/name.git",
       "org/na--me", "-org/name", "org/name-", "org/na me", "org/näme", "org/name\n", "org/\0", "o/" + "n" * 95,
       "file:org/name", "@main", ":file"]  # fmt: skip
BAD_REVISIONS = ["", "../main", "a/../b", "/main", "main/", "a//b", "-x", "a b", "a\\b", "a\n", "a@b", "é"]
BAD_FILES = ["", "/etc/passwd", "../model.pt", "a/../b", "a/./b", "a//b", "a/", "a\\b", "a\nb", "a:b", "\0", "~/a\0"]


@pytest.fixture
def nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.mark.usefixtures("nothing_asked")
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_name_of_a_repository_asks_nothing(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(ValueError, match="name must be a repository") as caught:
        snapshot(name)
    assert not isinstance(caught.value, CheckpointError)


@pytest.mark.usefixtures("nothing_asked")
def test_what_is_no_revision_or_file_asks_nothing() -> None:
    for revision in BAD_REVISIONS:
        for bad in (dict(name=f"{NAME}@{revision}"), dict(name=NAME, revision=revision)):
            with pytest.raises(ValueError, match="must be") as caught:
                snapshot(**bad)
            assert not isinstance(caught.value, CheckpointError), revision
    for file in BAD_FILES:
        for bad in (dict(name=f"{NAME}:{file}"), dict(name=NAME, file=file)):
            with pytest.raises(ValueError, match="file must be a path inside org/name") as caught:
                snapshot(**bad)
            assert not isinstance(caught.value, CheckpointError), file


@pytest.mark.usefixtures("nothing_asked")
def test_arguments_of_other_types_or_given_twice() -> None:
    for bad in (dict(name=Path(NAME)), dict(name=None), dict(name=NAME, revision=1), dict(name=NAME, file=Path("x"))):
        with pytest.raises(TypeError, match="must be a str"):
            snapshot(**bad)
    for twice in (dict(name=f"{NAME}@a", revision="b"), dict(name=f"{NAME}:a", file="b")):
        with pytest.raises(ValueError, match="given once"):
            snapshot(**twice)


def pipeline_of(kind: str, folder: Path) -> dict[str, bytes]:
    """Files of a pipeline that diffusers saves, in two precisions"""
    diffusers = pytest.importorskip("diffusers")
    sizes: dict[str, Any] = dict(sample_size=8, norm_num_groups=4)
    two = dict(block_out_channels=(8, 8), norm_num_groups=4)
    if kind == "dit":
        heads = dict(num_attention_heads=2, attention_head_dim=4, num_layers=1, patch_size=2)
        network = diffusers.DiTTransformer2DModel(
            **sizes, **heads, in_channels=4, out_channels=8, num_embeds_ada_norm=10
        )
        down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
        vae = diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, latent_channels=4, **two)
        pipe = diffusers.DiTPipeline(network, vae, diffusers.DDIMScheduler(clip_sample=False))
    else:
        down, up = ("DownBlock2D",) * 2, ("UpBlock2D",) * 2
        network = diffusers.UNet2DModel(down_block_types=down, up_block_types=up, sample_size=8, **two)
        pipe = diffusers.DDPMPipeline(network, diffusers.DDPMScheduler())
    pipe.save_pretrained(folder)
    pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
    pipe.to(torch.float32)
    network.save_pretrained(folder / ("transformer" if kind == "dit" else "unet"), safe_serialization=False)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_load_takes_a_native_checkpoint_of_the_hub(online: Any, checkpoint: dict[str, bytes]) -> None:
    hub = online(checkpoint)
    assert_same_model(fastdiff.load(NAME), MODEL)
    hub.status, hub.code = 401, "RepoNotFound"
    with pytest.raises(CheckpointError, match="is no local path"):
        fastdiff.load("results/run-3")


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_load_takes_a_pipeline_of_the_hub(kind: str, online: Any, tmp_path: Path) -> None:
    hub = online(pipeline_of(kind, tmp_path / "pipe"))
    from fastdiff.integrations.diffusers import dit_model, unet_model

    own = dit_model if kind == "dit" else unet_model
    options: dict[str, Any] = {"steps": 2, "seed": 0, "num_images": 1}
    expected = fastdiff.sample(own(tmp_path / "pipe"), **options)
    for model in (fastdiff.load(NAME), own(NAME), fastdiff.load(f"{NAME}@main")):
        torch.testing.assert_close(fastdiff.sample(model, **options), expected, rtol=0, atol=1e-4)
    assert not [file for file in hub.downloads() if "fp16" in file or file.endswith(".bin")]
    halves = [fastdiff.load(NAME, variant="fp16"), own(NAME, variant="fp16")]
    for model in halves:
        assert all("fp16" in file for file in model.provenance["sha256"])
    if kind == "unet":
        named = fastdiff.load(NAME, weights_file="diffusion_pytorch_model.bin")
        assert list(named.provenance["sha256"]) == ["diffusion_pytorch_model.bin"]
        # a UNet has no VAE to fetch
        assert not [file for file in hub.downloads() if "vae" in file]


def test_names_of_repositories() -> None:
    for name in (NAME, "google/ddpm-cifar10-32", "a/b", "o_1/N.2-x", f"{NAME}@refs/pr/1", f"{NAME}@v1:unet/a b.pt"):
        assert is_name(name), name
    assert not is_name(Path(NAME)) and not is_name(None)
