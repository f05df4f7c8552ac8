"""Mutations of JSON trees, and texts that say the same tree or another"""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Callable
from typing import Any

__all__ = ["mutated_text", "mutated_tree", "paths"]

Tree = Any
Path = tuple[Any, ...]

ODD: tuple[Tree, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e-5, 1e308, 5e-324, math.nan, math.inf, -math.inf),
    *(2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30)),
    *(
        "",
        "x",
        "1",
        "None",
        "null",
        "true",
        "\0",
        "é",
        "\u202e",
        "\ud800",
        "a" * 10_000,
        "../x",
        "linear",
        "cosine",
        "v",
    ),
    *([], [None], [[]], [0], [1] * 1000, {}, {"a": 1}, {"": {}}),
)
NAMES = ("", "x", "_x", "__class__", "type", "\0", "É", "name", "config", "format", "weights")
# of texts alone: what json.dumps does not write
NUMBERS = ("1e400", "-1e400", "1e-400", "9" * 5000, "-0", "01", "0x10", "1_000", ".5", "+1", "NaN", "Infinity", "nan")
TEXTS = (
    b"",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"0",
    b"\xff\xfe{\0}\0",
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"a":' * 50_000,
)


def paths(tree: Tree, path: Path = ()) -> list[Path]:
    """Of every value in a tree, its own first"""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(inner for key, value in items for inner in paths(value, (*path, key)))]


def at(tree: Tree, path: Path) -> Tree:
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Tree, path: Path, value: Tree) -> Tree:
    if not path:
        return value
    at(tree, path[:-1])[path[-1]] = value
    return tree


def anywhere(rng: random.Random, tree: Tree, kind: type | tuple[type, ...] = object) -> Path | None:
    """A path to a value of a kind, not to the whole tree where there is another; None where there is none"""
    found = [path for path in paths(tree) if isinstance(at(tree, path), kind)]
    return rng.choice([path for path in found if path] or found or [None])


def replace(rng: random.Random, tree: Tree) -> Tree:
    return put(tree, anywhere(rng, tree) or (), copy.deepcopy(rng.choice(ODD)))


def nearby(rng: random.Random, tree: Tree) -> Tree:
    """Another value of the same kind"""
    path = anywhere(rng, tree, (bool, int, float, str)) or ()
    value = at(tree, path)
    if isinstance(value, bool):
        return put(tree, path, not value)
    if isinstance(value, int):
        changes = (
            value + 1,
            value - 1,
            2 * value,
            value // 2,
            -value,
            10 * value,
            value + rng.choice((32, 2**31, 2**63)),
        )
        return put(tree, path, rng.choice(changes))
    if isinstance(value, float):
        return put(tree, path, rng.choice((value * (1 + 1e-7), value * 2, -value, value + 1, 1 - value)))
    if not isinstance(value, str):
        return replace(rng, tree)
    i = rng.randrange(len(value) + 1)
    changed = (value[:i] + value[i + 1 :], value.swapcase(), f"{value} ", value[:i] + "x" + value[i:], value[::-1])
    return put(tree, path, rng.choice(changed))


def other_type(rng: random.Random, tree: Tree) -> Tree:
    path = anywhere(rng, tree) or ()
    value = at(tree, path)
    numeric = isinstance(value, int | float)
    made: list[Tree] = [str(value), [value], {"value": value}, bool(value)]
    made += [float(value)] if numeric and abs(value) < 1e300 else []
    made += [dict(enumerate(map(str, value)))] if isinstance(value, list) else []
    made += [list(value)] if isinstance(value, dict | str) else []
    return put(tree, path, rng.choice(made))


def remove(rng: random.Random, tree: Tree) -> Tree:
    path = anywhere(rng, tree)
    if not path:
        return None
    del at(tree, path[:-1])[path[-1]]
    return tree


def rename(rng: random.Random, tree: Tree) -> Tree:
    path = anywhere(rng, tree, dict)
    if path is None or not (keys := list(at(tree, path))):
        return replace(rng, tree)
    owner, key = at(tree, path), rng.choice(keys)
    # an edit before may have put anything in a name's place
    text = str(key)
    name = rng.choice(
        (*NAMES, text.upper(), f"{text} ", text[:-1], f"_{text}", text.replace("_", "-"), rng.choice(keys))
    )
    owner[name] = owner.pop(key)
    return tree


def add(rng: random.Random, tree: Tree) -> Tree:
    path = anywhere(rng, tree, dict)
    if path is None:
        return replace(rng, tree)
    at(tree, path)[rng.choice((*NAMES, *(str(key) for where in paths(tree) for key in where)))] = rng.choice(ODD)
    return tree


def swap(rng: random.Random, tree: Tree) -> Tree:
    """Two leaves in each other's place"""
    leaves = [path for path in paths(tree) if path and not isinstance(at(tree, path), dict | list)]
    if len(leaves) < 2:
        return replace(rng, tree)
    one, two = rng.sample(leaves, 2)
    first, second = at(tree, one), at(tree, two)
    return put(put(tree, one, second), two, first)


def repeat(rng: random.Random, tree: Tree) -> Tree:
    """One value in another's place too"""
    source, target = (anywhere(rng, tree) or () for _ in range(2))
    return put(tree, target, copy.deepcopy(at(tree, source)))


def relist(rng: random.Random, tree: Tree) -> Tree:
    path = anywhere(rng, tree, list)
    if path is None:
        return replace(rng, tree)
    given = list(at(tree, path))
    changed = [
        given[:-1],
        given[1:],
        given * 2,
        given[::-1],
        [*given, rng.choice(ODD)],
        [given],
        rng.sample(given, len(given)),
    ]
    return put(tree, path, rng.choice(changed))


def nest(rng: random.Random, tree: Tree) -> Tree:
    path = anywhere(rng, tree) or ()
    value = at(tree, path)
    for _ in range(rng.choice((1, 2, 30, 200))):
        value = [value] if rng.random() < 0.5 else {"x": value}
    return put(tree, path, value)


def reorder(rng: random.Random, tree: Tree) -> Tree:
    """The same tree, its keys in another order"""
    if isinstance(tree, dict):
        return {key: reorder(rng, tree[key]) for key in rng.sample(list(tree), len(tree))}
    return [reorder(rng, value) for value in tree] if isinstance(tree, list) else tree


EDITS: tuple[Callable[[random.Random, Tree], Tree], ...] = (
    *(replace, replace, replace, nearby, nearby, nearby, other_type, other_type, remove, remove, rename, rename),
    *(add, swap, repeat, relist, nest, reorder),
)


def mutated_tree(rng: random.Random, tree: Tree) -> tuple[str, Tree]:
    """One edit, or a few, of a copy; and what they are called"""
    tree, names = copy.deepcopy(tree), []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        edit = rng.choice(EDITS)
        tree = edit(rng, tree)
        names.append(edit.__name__)
    return " ".join(names), tree


def mutated_text(rng: random.Random, tree: Tree) -> tuple[str, bytes]:
    """JSON of a mutated tree in any notation, or what is no JSON"""
    kind = rng.choice(("tree", "tree", "tree", "tree", "notation", "number", "key twice", "deep", "text"))
    name = kind
    if kind == "tree":
        name, tree = mutated_tree(rng, tree)
    if kind == "text":
        return kind, rng.choice(TEXTS)
    notation = {"indent": rng.choice((None, 0, 2, "\t")), "ensure_ascii": rng.random() < 0.5}
    text = json.dumps(tree, **notation)
    if kind == "notation":
        text = rng.choice((f"\n {text} \t", f"{text}\n", text.replace(":", " : "), text.replace("e", "\\u0065", 1)))
    leaves = list(re.finditer(r"(?<=[:\[,] )-?\d[\d.e+-]*|\"[^\"]*\"(?![^\"]*\":)", text))
    if kind in ("number", "deep") and leaves:
        match = rng.choice(leaves)
        inside = rng.choice(NUMBERS) if kind == "number" else "[" * (n := rng.choice((10, 900, 100_000))) + "]" * n
        text = text[: match.start()] + inside + text[match.end() :]
    if kind == "key twice" and (keys := list(re.finditer(r'"[^"]*"\s*:', text))):
        match = rng.choice(keys)
        text = (
            f"{text[: match.start()]}{match[0]} {json.dumps(rng.choice((0, None, 'x', 1000)))}, {text[match.start() :]}"
        )
    return name, text.encode("utf-8", "surrogatepass")
