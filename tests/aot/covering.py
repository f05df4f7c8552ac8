"""Covering arrays: few rows that hold every combination of t factor values which any allowed row holds"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
SAMPLE = 1 << 13


def product(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every choice of one value a factor, or a sample of so many that short combinations are all in it"""
    count = math.prod(map(len, factors.values()))
    chosen: Iterable[int] = range(count)
    if count > SAMPLE:
        chosen = sorted(random.Random(0).sample(chosen, SAMPLE))
    return [dict(_row(factors, number)) for number in chosen]


def _row(factors: Mapping[str, Sequence[Any]], number: int) -> Iterator[tuple[str, Any]]:
    for name, values in factors.items():
        number, index = divmod(number, len(values))
        yield name, values[index]


def combinations(row: Row, strength: int) -> Iterable[tuple[tuple[str, Any], ...]]:
    """Every choice of `strength` factors of a row, or all of them where it has fewer"""
    return itertools.combinations(row.items(), min(strength, len(row)))


def covering(rows: Sequence[Row], strength: int = 2) -> list[Row]:
    """Some of rows, in their order, so that every combination of `strength` values in rows is in one of them

    Greedy: the row that adds most comes next, the first of equals, so that the choice is the same everywhere.
    """
    numbers: dict[Any, int] = {}
    masks = []
    for row in rows:
        mask = 0
        for combination in combinations(row, strength):
            mask |= 1 << numbers.setdefault(combination, len(numbers))
        masks.append(mask)
    missing = (1 << len(numbers)) - 1
    chosen = []
    # what a row adds only shrinks: one that still adds what it did when it was queued is the best of all
    queue = [(-mask.bit_count(), index) for index, mask in enumerate(masks)]
    heapq.heapify(queue)
    while missing:
        queued, index = queue[0]
        adds = -(masks[index] & missing).bit_count()
        if adds == queued:
            heapq.heappop(queue)
            chosen.append(index)
            missing &= ~masks[index]
        else:
            heapq.heapreplace(queue, (adds, index))
    return [rows[index] for index in sorted(chosen)]
