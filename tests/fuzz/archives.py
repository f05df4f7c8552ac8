"""Mutations of what torch.save writes: zip archives, the pickles in them, and objects that no checkpoint should hold"""

from __future__ import annotations

import functools
import io
import os
import pickle
import pickletools
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from .blobs import ANY, EXTREMES, mutated_bytes

__all__ = ["SPRUNG", "mutated_archive", "mutated_legacy", "saved"]

Entries = dict[str, bytes]
State = dict[str, torch.Tensor]

# what a malicious pickle did
SPRUNG: list[str] = []


def spring(what: str) -> None:
    SPRUNG.append(what)


class Call:
    """Unpickling one calls a function, if it is let."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def saved(value: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def opened(data: bytes) -> Entries:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def closed(entries: Entries, *, compression: int = zipfile.ZIP_STORED, also: Entries | None = None) -> bytes:
    """also: more entries, whose names may be there already"""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in (*entries.items(), *(also or {}).items()):
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


@functools.lru_cache(maxsize=16)
def integers(pickled: bytes) -> list[tuple[int, int]]:
    """Where a pickle holds integers: (start, end) of each with its opcode"""
    ops = list(pickletools.genops(pickled))
    ends = [position for _, _, position in ops[1:]]
    return [
        (int(start or 0), int(end or 0))
        for (op, _, start), end in zip(ops, ends, strict=False)
        if op.name in ("BININT", "BININT1", "BININT2", "LONG1")
    ]


def other_integer(rng: random.Random, pickled: bytes) -> bytes:
    """A shape, stride, offset or number of elements is another"""
    start, end = rng.choice(integers(pickled))
    value = rng.choice((*EXTREMES, 2, 3, 11, 64, 128, -1, -(2**31)))
    number = pickle.dumps(value, protocol=2)[2:-1]
    return pickled[:start] + number + pickled[end:]


def in_pickle(rng: random.Random, data: bytes) -> bytes:
    entries = opened(data)
    name = next(name for name in entries if name.endswith("data.pkl"))
    choose = rng.random()
    if choose < 0.5:
        entries[name] = other_integer(rng, entries[name])
    elif choose < 0.6:
        storages = (
            b"FloatStorage",
            b"HalfStorage",
            b"DoubleStorage",
            b"IntStorage",
            b"QInt8Storage",
            b"UntypedStorage",
        )
        globals_ = (
            b"_rebuild_tensor_v2",
            b"_rebuild_tensor",
            b"_rebuild_parameter",
            b"_rebuild_qtensor",
            b"cpu",
            b"meta",
        )
        words = storages if rng.random() < 0.5 else globals_
        entries[name] = entries[name].replace(rng.choice(words), rng.choice(words), rng.choice((1, -1)))
    else:
        entries[name] = mutated_bytes(rng, entries[name])[1]
    return closed(entries)


def in_entry(rng: random.Random, data: bytes) -> bytes:
    """Bytes of one file of the archive, its checksum honest"""
    entries = opened(data)
    name = rng.choice([*entries, *(name for name in entries if "/data/" not in name)])
    entries[name] = rng.choice((b"", b"big", b"little", b"0", b"9" * 30, mutated_bytes(rng, entries[name])[1]))
    return closed(entries)


def entries_changed(rng: random.Random, data: bytes) -> bytes:
    """Files of the archive dropped, doubled, renamed, exchanged or added"""
    entries = opened(data)
    one, two = rng.sample(sorted(entries), 2)
    kind = rng.choice(("drop", "rename", "exchange", "double", "add", "top"))
    if kind == "drop":
        del entries[one]
    elif kind == "rename":
        entries[rng.choice(("../x", "/x", "x", one.upper(), one + "/", two, "\u202e", one.replace("/", "\\")))] = (
            entries.pop(one)
        )
    elif kind == "exchange":
        entries[one], entries[two] = entries[two], entries[one]
    elif kind == "double":
        return closed(entries, also={one: entries[rng.choice((one, two))]})
    elif kind == "add":
        entries[rng.choice(("evil.py", "archive/extra", "archive/data/9999", "constants.pkl"))] = rng.choice(ANY)
    else:
        entries = {f"other/{name}": value for name, value in entries.items()}
    return closed(entries)


def compressed(rng: random.Random, data: bytes) -> bytes:
    """A zip that is compressed, as torch.save never does; sometimes a bomb"""
    entries = opened(data)
    if rng.random() < 0.3:
        name = rng.choice(sorted(entries))
        entries[name] = b"\0" * rng.choice((10**6, 2 * 10**7))
    return closed(entries, compression=rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))


def nested(rng: random.Random, data: bytes) -> bytes:
    """An archive in an archive, or around"""
    entries = opened(data)
    name = rng.choice(sorted(entries))
    if rng.random() < 0.5:
        entries[name] = data
        return closed(entries)
    return closed({rng.choice((name, "archive/data.pkl", "model.pt")): data})


def central(rng: random.Random, data: bytes) -> bytes:
    """The directory at the end lies"""
    start = data.rfind(b"PK\x01\x02") if rng.random() < 0.5 else data.rfind(b"PK\x05\x06")
    start = rng.choice((start, data.find(b"PK\x01\x02"))) + rng.randrange(46)
    width = rng.choice((1, 2, 4))
    value = rng.choice(EXTREMES) % 256**width
    return data[:start] + value.to_bytes(width, "little") + data[start + width :]


def odd_objects(state: State) -> list[Any]:
    """What torch.save takes and no state dict holds; most of it is harmless"""
    key = max(state, key=lambda name: state[name].ndim)
    tensor = state[key]
    big = torch.empty(1, dtype=tensor.dtype).expand(2**40)
    swaps: list[Any] = [
        *(tensor.to(torch.complex64), tensor.to(torch.int64), tensor > 0, tensor.to_sparse(), tensor.to("meta")),
        *(
            big,
            tensor[:0],
            tensor[None],
            tensor.T.contiguous() if tensor.ndim == 2 else tensor.flatten(),
            tensor.double(),
        ),
        *(tensor.clone().requires_grad_(), torch.nn.Parameter(tensor.clone()), torch.full_like(tensor, torch.nan)),
        *(torch.full_like(tensor, torch.inf), tensor.flatten()[:1].expand(tensor.numel()).view(tensor.shape)),
        *(tensor.transpose(0, 1), tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor),
        torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        *(tensor.numpy(), tensor.tolist(), None, 1.0, "x", b"x", {"a": tensor}, [tensor], (tensor,), torch.Size([1])),
        *(Call(spring, "call"), Call(os.system, "true"), Call(eval, "1"), Call(bytearray, 2**40), Call(bytearray, -1)),
        *(Call(OrderedDict, 1), Call(torch.Size, [2**63 - 1]), Call(getattr, tensor, "shape"), torch.device("cuda", 7)),
        *(torch.float16, torch.nn.Linear(1, 1), torch.randn, int, set(), bytearray(b"x"), complex(1, 2)),
    ]
    whole: list[Any] = [
        {"state_dict": state},
        {"model": state, "step": 1},
        [state],
        tensor,
        None,
        {},
        [],
        0,
        "x",
        torch.float,
    ]
    whole += [{**state, 0: tensor}, {**state, None: tensor}, {**state, (1, 2): tensor}, OrderedDict(state)]
    whole += [{f"module.{name}": value for name, value in state.items()}, dict(reversed(state.items()))]
    whole += [{name: state[key] for name in state}, {name: value for name, value in state.items() if name != key}]
    return [*({**state, key: value} for value in swaps), *({**state, "extra": value} for value in swaps), *whole]


@functools.lru_cache(maxsize=512)
def odd_archive(data: bytes, number: int, legacy: bool) -> bytes | None:
    """None for what torch.save refuses itself"""
    options = odd_objects(torch.load(io.BytesIO(data), weights_only=True))
    try:
        return saved(options[number % len(options)], legacy=legacy)
    except Exception:
        return None


def odd(rng: random.Random, data: bytes) -> bytes:
    return odd_archive(data, rng.randrange(100), False) or ANY[0]


def raw_pickle(rng: random.Random, data: bytes) -> bytes:
    """A pickle of Python's own, as the archive's or in place of it"""
    evil = pickle.dumps(
        rng.choice((Call(spring, "raw"), {"x": Call(spring, "raw")}, Call(exec, "1"))), rng.choice((0, 2, 4))
    )
    if rng.random() < 0.3:
        return evil
    entries = opened(data)
    name = next(name for name in entries if name.endswith("data.pkl"))
    if rng.random() < 0.5:
        return closed({**entries, name: evil})
    # run on the way to a pickle that is fine
    return closed(
        {**entries, name: entries[name][:2] + evil[2 if evil[:1] == b"\x80" else 0 : -1] + b"0" + entries[name][2:]}
    )


EDITS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(
        in_pickle,
        in_pickle,
        in_pickle,
        in_entry,
        entries_changed,
        entries_changed,
        compressed,
        nested,
        central,
        odd,
        odd,
    ),
    raw_pickle,
)


def mutated_archive(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    if rng.random() < 0.3:
        return mutated_bytes(rng, data)
    edit = rng.choice(EDITS)
    return edit.__name__, edit(rng, data)


def mutated_legacy(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """Of torch.save's format before zip, a few pickles one after another and then the bytes"""
    if rng.random() < 0.2:
        return "odd", odd_archive(data, rng.randrange(100), True) or ANY[0]
    if rng.random() < 0.4:
        # the pickles are at the start
        name, head = mutated_bytes(rng, data[: rng.choice((200, 20_000))])
        return f"head {name}", head + data[len(head) :]
    return mutated_bytes(rng, data)
