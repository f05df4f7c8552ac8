"""Mutations of bytes, and of the headers of safetensors files"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from .trees import mutated_text, mutated_tree

__all__ = ["ANY", "mutated_bytes", "mutated_safetensors"]

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU"
ANY = (
    b"",
    b"\0",
    PNG,
    b"PK\x03\x04",
    b"PK\x05\x06" + b"\0" * 18,
    b"\x80\x02}.",
    b"\x80\x04.",
    b"{}",
    b"<html>",
    b"\0" * 4096,
)
EXTREMES = (0, 1, 7, 8, 2**8 - 1, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "U64",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "C64",
    "F4",
    "",
    "f32",
)


def span(rng: random.Random, data: bytes, most: int = 4096) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 8, rng.randrange(1, most))))


def flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    start, end = span(rng, data, 32)
    fill = rng.choice((b"\0", b"\xff", b"\x7f", b"9", b'"', b"{", b"\xc0\x7f"))
    return data[:start] + (fill * (end - start) if rng.random() < 0.5 else rng.randbytes(end - start)) + data[end:]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice((rng.randrange(len(data) + 1), max(0, len(data) - rng.randrange(1, 9))))]


def extend(rng: random.Random, data: bytes) -> bytes:
    more = rng.choice((b"\0", b" ", b"\n", b"\0" * 8, rng.randbytes(rng.randrange(1, 64)), data[:1000], data))
    return data + more if rng.random() < 0.7 else more + data


def duplicate(rng: random.Random, data: bytes) -> bytes:
    start, end = span(rng, data)
    return data[:end] + data[start:]


def delete(rng: random.Random, data: bytes) -> bytes:
    start, end = span(rng, data)
    return data[:start] + data[end:]


def swap(rng: random.Random, data: bytes) -> bytes:
    a, b, c, d = sorted(rng.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def number(rng: random.Random, data: bytes) -> bytes:
    """An integer of any width in place of what is there"""
    width = rng.choice((1, 2, 4, 8))
    start = rng.choice((0, 0, rng.randrange(len(data) + 1)))
    value = (rng.choice(EXTREMES) + rng.choice((-1, 0, 1))) % 256**width
    return data[:start] + value.to_bytes(width, rng.choice(("little", "big"))) + data[start + width :]


def another(rng: random.Random, data: bytes) -> bytes:
    return rng.choice(ANY)


BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(flip, flip, overwrite, overwrite, truncate, extend, duplicate, delete, swap, number, number, another),
)


def mutated_bytes(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    edit = rng.choice(BYTES)
    return edit.__name__, edit(rng, data)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def tensors(header: dict[str, Any]) -> list[str]:
    return sorted(key for key in header if key != "__metadata__")


def joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def header_size(rng: random.Random, data: bytes) -> bytes:
    true = int.from_bytes(data[:8], "little")
    value = rng.choice((*EXTREMES, true + 1, true - 1, true + 8, len(data), len(data) - 8, 10**8, 10**8 + 1))
    return value.to_bytes(8, "little") + data[8:]


def header_tree(rng: random.Random, data: bytes) -> bytes:
    header, body = split(data)
    return joined(mutated_tree(rng, header)[1], body)


def header_text(rng: random.Random, data: bytes) -> bytes:
    header, body = split(data)
    return joined(mutated_text(rng, header)[1], body)


def offsets(rng: random.Random, data: bytes) -> bytes:
    """Overlaps, gaps, ranges outside the file and of another tensor"""
    header, body = split(data)
    one, two = rng.sample(tensors(header), 2)
    begin, end = header[one]["data_offsets"]
    options = [[begin + 1, end], [begin, end + 4], [begin - 4, end - 4], [end, begin], [begin, begin], [0, len(body)]]
    options += [header[two]["data_offsets"], [rng.choice(EXTREMES), rng.choice(EXTREMES)], [begin], [begin, end, end]]
    header[one]["data_offsets"] = rng.choice(options)
    return joined(header, body)


def shapes(rng: random.Random, data: bytes) -> bytes:
    header, body = split(data)
    key = rng.choice(tensors(header))
    given = header[key]["shape"]
    options = [
        given[::-1],
        [1, *given],
        [*given, 1],
        given[1:],
        [*given, 0],
        [2**32, 2**32],
        [rng.choice(EXTREMES)] * 3,
    ]
    options += [[-1, *given[1:]], [given[0] * 2, *given[1:]], [0], [1] * 100, [given[0] + 1, *given[1:]], [2**62, 4]]
    options += [[value * 2 if i == 0 else value // 2 if i == 1 else value for i, value in enumerate(given)]]
    header[key]["shape"] = rng.choice(options)
    return joined(header, body)


def dtypes(rng: random.Random, data: bytes) -> bytes:
    header, body = split(data)
    keys = tensors(header)
    for key in keys if rng.random() < 0.2 else [rng.choice(keys)]:
        header[key]["dtype"] = rng.choice(DTYPES)
    return joined(header, body)


def exchanged(rng: random.Random, data: bytes) -> bytes:
    """Two tensors under each other's name, or one under another's too"""
    header, body = split(data)
    one, two = rng.sample(tensors(header), 2)
    header[one], header[two] = header[two], header[one] if rng.random() < 0.7 else header[two]
    return joined(header, body)


def metadata(rng: random.Random, data: bytes) -> bytes:
    header, body = split(data)
    header["__metadata__"] = rng.choice(({}, {"format": "pt"}, {"a": 1}, None, [], "x", {"x": "y" * 10_000}))
    return joined(header, body)


def padded(rng: random.Random, data: bytes) -> bytes:
    header, body = split(data)
    keys = rng.sample(sorted(header), len(header))
    return joined(json.dumps({key: header[key] for key in keys}).encode() + b" " * rng.randrange(64), body)


HEADERS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(
        header_size,
        header_tree,
        header_tree,
        header_text,
        offsets,
        offsets,
        shapes,
        shapes,
        dtypes,
        exchanged,
        metadata,
    ),
    padded,
)


def mutated_safetensors(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    if rng.random() < 0.4:
        return mutated_bytes(rng, data)
    edit = rng.choice(HEADERS)
    return edit.__name__, edit(rng, data)
