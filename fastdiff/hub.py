"""Checkpoints of the Hugging Face Hub: the files that fastdiff reads, fetched by huggingface_hub, every hash checked.

The Hub addresses files by their content: one in LFS or Xet by its sha256, any other by its git blob id. Both are known
again from the cache, where a snapshot's file is a link to a blob of that name, so a copy is checked offline too.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fastdiff.checkpoint import CheckpointError
from fastdiff.manifest import listed

__all__ = ["FILES", "is_name", "local_path", "snapshot"]

# where a network lies
_FOLDERS = ("", "unet/", "transformer/")
_PARTS = (*_FOLDERS, "vae/")
_OWN = f"model-{'[0-9a-f]' * 12}.safetensors"
_CONFIGS = (
    "model_index.json",
    *(f"{folder}scheduler_config.json" for folder in ("", "scheduler/")),
    *(f"{folder}config.json" for folder in _PARTS),
)


def _weights(folders: tuple[str, ...], variant: str | None = None) -> tuple[str, ...]:
    """One file or shards, as diffusers names them"""
    name = "diffusion_pytorch_model" + ("" if variant is None else f".{variant}")
    return tuple(f"{folder}{name}{shard}.safetensors" for shard in ("", "-?????-of-?????") for folder in folders)


def _indices(folders: tuple[str, ...], variant: str | None = None) -> tuple[str, ...]:
    name = "diffusion_pytorch_model.safetensors.index" + ("" if variant is None else f".{variant}")
    return tuple(f"{folder}{name}.json" for folder in folders)


# Of a repository; no pickle, and no second copy of anything
FILES = (*_CONFIGS, *_indices(_PARTS), _OWN, *_weights(_PARTS))

_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_NAME = re.compile(
    rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[^@:]*))?(?::(?P<file>.*))?", re.ASCII | re.DOTALL
)
_REVISION = re.compile(r"[A-Za-z0-9_][\w.-]*(?:/[\w.-]+)*", re.ASCII)
_FILE = re.compile(r"[\w.+-][\w.+ -]*(?:/[\w.+-][\w.+ -]*)*", re.ASCII)
_LONGEST = 96
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# of what becomes part of a pattern
_WORDS = {"variant": re.compile(r"[\w-]+", re.ASCII), "weights_file": re.compile(r"\w[\w.-]*", re.ASCII)}


@dataclass(frozen=True)
class _Place:
    repository: str
    revision: str | None
    file: str | None


def is_name(src: object) -> bool:
    """Whether src is "org/name", alone or followed by "@revision", ":file" or both, and so may be a repository's."""
    match = _NAME.fullmatch(src) if isinstance(src, str) else None
    return match is not None and _is_repository(match["repository"])


def local_path(src: str | os.PathLike[str], *, variant: str | None = None, weights_file: str | None = None) -> Path:
    """Where src lies on this machine, fetched from the Hub if it is an "org/name" and no path; else CheckpointError.

    variant, weights_file: as for snapshot; they change nothing about a path.
    """
    path = Path(src)
    # whose end says that a file was meant is no repository, though it could be one's name
    meant = path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors") and ":" not in str(src)
    if isinstance(src, str) and is_name(src) and not meant and not os.path.lexists(path):
        return snapshot(src, variant=variant, weights_file=weights_file)
    return path


def snapshot(
    name: str,
    *,
    revision: str | None = None,
    file: str | None = None,
    variant: str | None = None,
    weights_file: str | None = None,
) -> Path:
    """The local folder of a repository of the Hub, or one file of it, fetched where the cache has it not.

    name: "org/name", "org/name@revision", "org/name:folder/file.pt" or "org/name@revision:folder/file.pt".
    revision, file: the same apart; a branch, tag or commit ("main"), and a path inside the repository.
    variant: of the weights, such as "fp16"; diffusers' safetensors of that kind are fetched in place of the others.
    weights_file: name of another file of weights, fetched in place of the network's; only so a pickle, too.
    Without a file only FILES are fetched: configs and safetensors, never a pickle; that takes its name. Every file is
    hashed and compared with what the Hub says, or said when it was fetched. HF_HUB_OFFLINE, HF_HOME and HF_TOKEN hold.

    Raises ValueError or TypeError for what is no name, and CheckpointError naming the repository for the rest: no
    huggingface_hub, no such repository, revision or file, no permission, no network and no copy, a damaged copy.
    """
    place = _parse(name, revision, file)
    patterns, weights = _wanted(place, variant, weights_file)
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{place.repository}: no such local folder, and huggingface_hub, which would fetch it from the Hub, is not "
            "installed; pip install huggingface_hub, or give the path of a local copy"
        ) from error
    with _blaming(place):
        if place.file is not None:
            path = Path(huggingface_hub.hf_hub_download(place.repository, place.file, revision=place.revision))
            folder = path.parents[place.file.count("/")]
            files = [place.file]
        else:
            path = folder = Path(
                huggingface_hub.snapshot_download(place.repository, revision=place.revision, allow_patterns=[*patterns])
            )
            files = [found for found in _files(folder) if _matches(found, patterns)]
        known = _known_hashes(place.repository, folder.name)
        _check_hashes(folder, files, known)
        if place.file is None and not any(_matches(found, weights) for found in files):
            _refuse_without_weights(known, weights)
    return path


def _is_repository(name: str) -> bool:
    return len(name) <= _LONGEST and not re.search(r"--|\.\.|\.git$", name)


def _parse(name: str, revision: str | None, file: str | None) -> _Place:
    for argument, value in (("name", name), ("revision", revision), ("file", file)):
        if not isinstance(value, str) and (argument == "name" or value is not None):
            raise TypeError(f"{argument} must be a str, got {value!r}")
    match = _NAME.fullmatch(name)
    if match is None or not _is_repository(match["repository"]):
        raise ValueError(
            f"name must be a repository of the Hub, 'org/name', 'org/name@revision' or 'org/name:file', got {name!r}"
        )
    given = {"revision": revision, "file": file}
    for argument, value in given.items():
        if value is not None and match[argument] is not None:
            raise ValueError(f"{argument} must be given once, got {value!r} beside name={name!r}")
        given[argument] = match[argument] if value is None else value
    revision, file = given["revision"], given["file"]
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ValueError(f"revision must be a branch, a tag or a commit of {match['repository']}, got {revision!r}")
    if file is not None and (not _FILE.fullmatch(file) or {".", ".."} & set(file.split("/"))):
        raise ValueError(f"file must be a path inside {match['repository']}, as 'folder/file.pt', got {file!r}")
    return _Place(match["repository"], revision, file)


def _wanted(place: _Place, variant: str | None, weights_file: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Patterns of what is fetched without a file, and of the network's weights among it"""
    given = {"variant": variant, "weights_file": weights_file}
    for argument, value in given.items():
        if value is not None and (not isinstance(value, str) or not _WORDS[argument].fullmatch(value)):
            example = "fp16" if argument == "variant" else "diffusion_pytorch_model.bin"
            raise ValueError(f"{argument} must be a word such as {example!r}, got {value!r}")
        if value is not None and place.file is not None:
            raise ValueError(f"{argument} must be left out beside a file, got {value!r} and file={place.file!r}")
    if variant is not None and weights_file is not None:
        raise ValueError("variant and weights_file must not both be given")
    if weights_file is not None:
        weights = tuple(folder + weights_file for folder in _FOLDERS)
        return (*_CONFIGS, *_indices(("vae/",)), *_weights(("vae/",)), *weights), weights
    weights = (_OWN, *_weights(_FOLDERS, variant))
    return (*_CONFIGS, *_indices(_PARTS, variant), *_weights(("vae/",), variant), *weights), weights


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _known_hashes(repository: str, commit: str) -> dict[str, str]:
    """What the Hub says each file of a commit hashes to; nothing where it cannot be asked"""
    import huggingface_hub

    if not _COMMIT.fullmatch(commit):
        raise ValueError(f"the cache's folder must be named after a commit, got {commit!r}; another huggingface_hub?")
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=commit, files_metadata=True, timeout=10)
    # Offline, refused, down: the copy's own names are left, and a copy without them is refused
    except Exception:
        return {}
    hashes = {found.rfilename: found.lfs.sha256 if found.lfs else found.blob_id for found in info.siblings or ()}
    return {path: value for path, value in hashes.items() if value is not None}


def _check_hashes(folder: Path, files: list[str], known: Mapping[str, str]) -> None:
    for name in files:
        path = folder / name
        # One link, not the last of a chain: a blob may itself be a link to one that repositories share
        blob = Path(os.readlink(path)).name if path.is_symlink() else None
        expected = {value for value in (blob, known.get(name)) if value is not None and _HASH.fullmatch(value)}
        if not expected:
            raise ValueError(
                f"{path} cannot be checked: the cache holds it under no hash and the Hub cannot be asked; "
                "go online, or give the folder itself to trust it"
            )
        for value in expected:
            if (found := _digest(path, value)) != value:
                raise ValueError(
                    f"{path} is damaged or another commit's: its hash is {found}, {value} was expected; delete "
                    f"{os.path.realpath(path)} to fetch it again"
                )


def _digest(path: Path, like: str) -> str:
    """The sha256 of a file where `like` is one (64 hex), else its git blob id (40 hex)"""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _refuse_without_weights(known: Mapping[str, str], weights: tuple[str, ...]) -> None:
    pickles = listed(path for path in known if path.endswith((".pt", ".pth", ".bin", ".ckpt")))
    others = listed(path for path in known if path.endswith(".safetensors"))
    places = ", ".join(path for path in weights if "?" not in path and path != _OWN)
    raise ValueError(
        f"holds no weights where fastdiff looks for them, which is {places} and a checkpoint of its own; one file is "
        f"fetched by its name, 'org/name:file'; safetensors there: [{others}], pickles: [{pickles}]"
    )


@contextmanager
def _blaming(place: _Place) -> Iterator[None]:
    """Whatever goes wrong inside is a CheckpointError that names the repository and a remedy"""
    from huggingface_hub import errors

    asked = f"{place.repository}{'' if place.revision is None else '@' + place.revision}"
    # The first that fits: some are kinds of those below them
    remedies: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, "is gated: ask for access on its page of the Hub, then log in with hf auth login"),
        (errors.RepositoryNotFoundError, "is no local path, and not on the Hub, or private: check the name, or log "
         "in with hf auth login"),
        (errors.RevisionNotFoundError, f"has no revision {place.revision!r}; leave it out for the default branch"),
        (errors.LocalEntryNotFoundError, "is no local path, and not in the cache, or not all of it, and the Hub "
         "cannot be reached: go online, unset HF_HUB_OFFLINE, or give the path of a local copy"),
        (errors.EntryNotFoundError, f"has no file {place.file!r}; its page of the Hub lists those it has"),
    )  # fmt: skip
    try:
        yield
    except CheckpointError:
        raise
    # The library raises its own errors, those of whichever HTTP client it has, and those of the file system
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        remedy = next((remedy for kind, remedy in remedies if isinstance(error, kind)), None)
        raise CheckpointError(f"{asked}: {said if remedy is None else f'{remedy} ({said})'}") from error
