"""Partial labels from full ones, as the CSL paper (arXiv 2110.10955) simulates them.

Both schemes hide labels: a hidden cell becomes -1, and nothing in the result tells what it was.
Cells that are not annotated stay so. The cells that stay known are drawn class by class, each from
a random stream of its own that depends on the seed and the number of the class alone.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from asl.data.annotations import ABSENT, PRESENT, UNANNOTATED, Annotations
from asl.errors import UsageError

Rows = npt.NDArray[np.int64]


def simulate(annotations: Annotations, scheme: str, seed: int) -> Annotations:
    """Hide labels by `scheme`: "fpc:1000" is `fixed_per_class`, "rps:0.5" `random_per_sample`.

    Raises `UsageError` for any other scheme.
    """
    name, _, text = scheme.partition(":")
    try:
        amount = float(text)
    except ValueError:
        amount = -1
    if name == "fpc":
        if amount < 1 or not amount.is_integer():
            raise UsageError(f"{scheme!r}: fpc takes a whole number from 1 on, as in fpc:1000")
        return fixed_per_class(annotations, int(amount), seed)
    if name == "rps":
        if not 0 <= amount < 1:
            raise UsageError(f"{scheme!r}: rps takes a number from 0 to below 1, as in rps:0.5")
        return random_per_sample(annotations, amount, seed)
    raise UsageError(f"there is no simulation {scheme!r}: choose fpc:N or rps:P")


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
