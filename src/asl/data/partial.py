"""Poorer labels from full ones: hidden, as the CSL paper (arXiv 2110.10955) does it, or wrong.

A hidden cell becomes -1, and nothing in the result tells what it was. Cells that are not annotated
stay so. What changes is drawn class by class, each from a random stream of its own that depends on
the seed and the number of the class alone.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from asl.data.annotations import ABSENT, PRESENT, UNANNOTATED, Annotations
from asl.errors import UsageError

Rows = npt.NDArray[np.int64]


def simulate(annotations: Annotations, scheme: str, seed: int) -> Annotations:
    """Hide or change labels by `scheme`, the name of a function of this module and its number.

    "fpc:1000" is `fixed_per_class`, "rps:0.5" `random_per_sample`, "thin:0.25" `thinned`,
    "missing:0.25" `missing_positives`, and "single" `single_positive`.

    Raises `UsageError` for any other scheme.
    """
    name, colon, text = scheme.partition(":")
    if name not in _SCHEMES:
        raise UsageError(f"there is no simulation {scheme!r}: choose {SCHEMES}")
    if annotations.soft:
        raise UsageError(f"{scheme!r} is for labels of 1 and 0, and these are soft")
    act, allowed, wanted = _SCHEMES[name]
    try:
        amount = float(text) if colon else None
    except ValueError:
        amount = math.nan
    if not allowed(amount):
        raise UsageError(f"{scheme!r}: {name} takes {wanted}")
    return act(annotations, amount, seed)


def fixed_per_class(annotations: Annotations, n: int, seed: int) -> Annotations:
    """FPC: of every class keep `n` present and `n` absent cells, drawn without replacement.

    A class with fewer than `n` images keeps all its k present cells and k absent ones: the paper
    takes as many of either, so a rare class is rare among the known cells as well. One without any
    image ends up not annotated. With the same seed, a smaller `n` keeps a part of what a larger one
    keeps.
    """

    def choose(random: np.random.Generator, present: Rows, absent: Rows) -> list[Rows]:
        return [random.permutation(rows)[: min(n, len(present))] for rows in (present, absent)]

    return _with_cells(annotations, seed, choose)


def random_per_sample(annotations: Annotations, p: float, seed: int) -> Annotations:
    """RPS: hide every cell with probability `p`, independently of all others."""

    def choose(random: np.random.Generator, *known: Rows) -> list[Rows]:
        return [rows[random.random(len(rows)) >= p] for rows in known]

    return _with_cells(annotations, seed, choose)


def thinned(annotations: Annotations, share: float, seed: int) -> Annotations:
    """Of every class keep this share of the present cells, and hide the others.

    The class becomes rarer, and no other class changes. At least one present cell of a class stays.
    With the same seed, a smaller share keeps a part of what a larger one keeps.
    """

    def choose(random: np.random.Generator, present: Rows) -> Rows:
        return random.permutation(present)[max(1, round(share * len(present))) :]

    return _with_value(annotations, seed, choose, UNANNOTATED)


def missing_positives(annotations: Annotations, share: float, seed: int) -> Annotations:
    """Turn present cells into absent ones, each with this probability: labels that are wrong.

    With the same seed, a larger share turns those that a smaller one turns, and more.
    """

    def choose(random: np.random.Generator, present: Rows) -> Rows:
        return present[random.random(len(present)) < share]

    return _with_value(annotations, seed, choose, ABSENT)


def single_positive(annotations: Annotations, seed: int) -> Annotations:
    """Keep one present cell of every image, drawn by lot, and turn its others into absent ones.

    The setting of Cole et al. 2021 (arXiv 2106.09708), where all else is assumed to be absent.
    """
    rows = np.repeat(np.arange(len(annotations)), np.diff(annotations.indptr))
    lots = np.random.Generator(np.random.Philox([seed, annotations.num_classes])).random(len(rows))
    present = annotations.values == PRESENT
    order = np.lexsort((lots, ~present, rows))  # the first of a row is the one that stays
    first = np.ones(len(rows), dtype=bool)
    first[1:] = rows[order][1:] != rows[order][:-1]
    turned = np.zeros(len(rows), dtype=bool)
    turned[order] = ~first
    values = np.where(turned & present, ABSENT, annotations.values)
    return _of_values(annotations, rows, values)


SCHEMES = "fpc:N, rps:P, thin:SHARE, missing:SHARE or single"
# The function, the numbers that it takes, and those in words.
_SCHEMES: dict[str, tuple[Callable[..., Annotations], Callable[[Any], bool], str]] = {
    "fpc": (
        lambda labels, n, seed: fixed_per_class(labels, int(n), seed),
        lambda n: n and n >= 1 and n.is_integer(),
        "a whole number from 1 on, as in fpc:1000",
    ),
    "rps": (
        random_per_sample,
        lambda p: p is not None and 0 <= p < 1,
        "a number from 0 to below 1, as in rps:0.5",
    ),
    "thin": (
        thinned,
        lambda share: share is not None and 0 < share <= 1,
        "a number above 0 and to 1, as in thin:0.25",
    ),
    "missing": (
        missing_positives,
        lambda share: share is not None and 0 <= share < 1,
        "a number from 0 to below 1, as in missing:0.25",
    ),
    "single": (
        lambda labels, _, seed: single_positive(labels, seed),
        lambda number: number is None,
        "no number",
    ),
}


def _with_value(
    annotations: Annotations,
    seed: int,
    choose: Callable[[np.random.Generator, Rows], Rows],
    value: int,
) -> Annotations:
    """The same labels, but for the present cells that `choose` picks of each class."""
    rows = np.repeat(np.arange(len(annotations)), np.diff(annotations.indptr))
    values = annotations.values.copy()
    for column in range(annotations.num_classes):
        cells = np.flatnonzero((annotations.indices == column) & (annotations.values == PRESENT))
        values[choose(np.random.Generator(np.random.Philox([seed, column])), cells)] = value
    return _of_values(annotations, rows, values)


def _of_values(annotations: Annotations, rows: Rows, values: npt.NDArray[Any]) -> Annotations:
    a = annotations
    return Annotations.from_cells(a.root, a.files, a.classes, rows, a.indices, values, a.implied)


def _with_cells(
    annotations: Annotations,
    seed: int,
    choose: Callable[[np.random.Generator, Rows, Rows], list[Rows]],
) -> Annotations:
    """Only the cells that `choose` picks, for a class from its present rows and its absent rows."""
    chosen = [
        rows
        # Philox, because the order of the images is drawn from NumPy's default generator: with the
        # same numbers as seed, the two must not draw alike.
        for column, (present, absent) in enumerate(_by_class(annotations))
        for rows in choose(np.random.Generator(np.random.Philox([seed, column])), present, absent)
    ]
    counts = [len(rows) for rows in chosen]
    return Annotations.from_cells(
        annotations.root,
        annotations.files,
        annotations.classes,
        np.concatenate(chosen),
        np.repeat(np.repeat(np.arange(annotations.num_classes), 2), counts),
        np.repeat(np.tile([PRESENT, ABSENT], annotations.num_classes), counts),
        implied=UNANNOTATED,
    )


def _by_class(annotations: Annotations) -> Iterator[tuple[Rows, Rows]]:
    """The rows in which a class is present and those in which it is absent, for every class."""
    all_rows = np.arange(len(annotations))
    order = np.argsort(annotations.indices, kind="stable")
    rows = np.repeat(all_rows, np.diff(annotations.indptr))[order]
    values = annotations.values[order]
    ends = np.cumsum(np.bincount(annotations.indices, minlength=annotations.num_classes))[:-1]
    for stored, value in zip(np.split(rows, ends), np.split(values, ends), strict=True):
        implied = annotations.implied == ABSENT
        absent = np.delete(all_rows, stored) if implied else stored[value == ABSENT]
        yield stored[value == PRESENT], absent
