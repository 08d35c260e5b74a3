"""The prior of a class: how often it is present, as a model trained on partial labels sees it.

Labels that are known in part do not tell how frequent a class is, so the CSL paper (arXiv
2110.10955) trains a temporary model that ignores the cells not annotated, and takes the mean of its
scores over the training set. The file is that of the official code:

Classes,avg_pred
person,0.5502
bicycle,0.0279
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from asl.atomic import write_result
from asl.data.classes import match_classes
from asl.data.files import read_rows
from asl.errors import DataError

HEADER = ["Classes", "avg_pred"]
log = logging.getLogger("asl")


def write_prior(path: str | Path, classes: Sequence[str], prior: Tensor) -> None:
    """Write the (C,) prior as CSV; the folder is made. Raises `UsageError` if that fails."""
    # Polars writes float32 with the digits that it needs, and no more.
    table = pl.DataFrame(dict(zip(HEADER, (classes, prior.float().cpu().numpy()), strict=True)))
    write_result(path, table.write_csv().encode())


def read_prior(path: str | Path, classes: Sequence[str]) -> Tensor:
    """Read a prior, whatever the order of its rows: (C,) float32 in [0, 1], one per class.

    A last row without a class name (empty, or a bare number that is no class) is ignored with a
    warning, because official files end with one. Other columns than the two of the format are
    ignored too.

    Raises `DataError` that names the file, the class and, if it has one, the row, where a class is
    missing, unknown or given twice, or its value is not a number in [0, 1].
    """
    path = Path(path)
    header, *rows = read_rows(path) or [[]]
    if not set(header) >= set(HEADER):
        raise DataError(f"{path}: the header is {','.join(header)!r}, not {','.join(HEADER)!r}")
    name_at, value_at = map(header.index, HEADER)
    numbered = {number: row for number, row in enumerate(rows, start=2) if row}
    if numbered and _names_no_class(numbered[last := max(numbered)], name_at, classes):
        ignored = ",".join(numbered.pop(last))
        log.warning("%s: row %d has no class and is ignored: %s", path, last, ignored)

    row_of: dict[str, int] = {}
    values: list[float] = []
    for number, row in numbered.items():
        if len(row) != len(header):
            raise DataError(f"{path}: row {number} has {len(row)} cells, not {len(header)}")
        name = row[name_at]
        if row_of.setdefault(name, number) != number:
            raise DataError(f"{path}: row {number}: {name!r} is already in row {row_of[name]}")
        values.append(_probability(row[value_at], f"{path}: row {number}, {name}"))
    try:
        found = match_classes(list(row_of), classes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    for position, (name, number) in enumerate(row_of.items()):
        if position not in found:
            raise DataError(f"{path}: row {number}: {name!r} is not a class of the data set")
    return torch.tensor(values)[torch.from_numpy(found)]


def _names_no_class(row: Sequence[str], name_at: int, classes: Sequence[str]) -> bool:
    name = "".join(row[name_at : name_at + 1])
    return name not in classes and (not name.strip() or name.strip().isdecimal())


def _probability(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise DataError(f"{place}: {text!r} is not a number from 0 to 1")
    return value
