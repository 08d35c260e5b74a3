"""The prior of a class: how often it is present, as a model trained on partial labels sees it.

Labels that are known in part do not tell how frequent a class is, so the CSL paper (arXiv
2110.10955) trains a temporary model that ignores the cells not annotated, and takes
the mean of its scores over the training set. The file is that of the official code:

Classes,avg_pred
person,0.5502
bicycle,0.0279
"""

import csv
import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from asl.atomic import replacing
from asl.data.classes import match_classes
from asl.data.files import read_rows
from asl.distributed import summed
from asl.errors import DataError, UsageError

HEADER = ["Classes", "avg_pred"]
log = logging.getLogger("asl")


class RunningPrior(nn.Module):
    """Mean score by class over all training steps so far, as the official code keeps it.

    It comes for free, but from the scores that training saw: those of augmented images, of the
    weights at the time, and from the first step on. The mean over the training set after training
    is closer to the class frequencies. The state (a buffer) is the same on all ranks.
    """

    totals: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("totals", torch.zeros(num_classes + 1))

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Count in the (B, C) logits of a step, on all ranks. Does not wait for the device."""
        # A last column of ones counts the images, so that one reduction does for both.
        self.totals += summed(pad(logits.float().sigmoid(), (0, 1), value=1.0).sum(dim=0))

    @property
    def prior(self) -> Tensor:
        """(C,) in [0, 1], float32; NaN before the first step."""
        return self.totals[:-1] / self.totals[-1]


def write_prior(path: str | Path, classes: Sequence[str], prior: Tensor) -> None:
    """Write the (C,) prior as CSV; the folder is made. Raises `UsageError` if that fails."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(HEADER)
    # As float32 in NumPy the numbers are written with the digits that they need, and no more.
    rows.writerows(zip(classes, map(str, prior.float().cpu().numpy()), strict=True))
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text.getvalue().encode())
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def read_prior(path: str | Path, classes: Sequence[str]) -> Tensor:
    """Read a prior, whatever the order of its rows: (C,) float32 in [0, 1], one per class.

    A last row without a class name (empty, or a bare number that is no class) is ignored with a
    warning: official files end with one. Columns other than the two of the format do not count.

    Raises `DataError` that names the file, the class and, if it has one, the row, where a class is
    missing, unknown or given twice, or its value is not a number in [0, 1].
    """
    path = Path(path)
    header, *rows = read_rows(path) or [[]]
    if not set(header) >= set(HEADER):
        raise DataError(f"{path}: the header is {','.join(header)!r}, not {','.join(HEADER)!r}")
    name_at, value_at = map(header.index, HEADER)
    numbered = {number: row for number, row in enumerate(rows, start=2) if row}
    if numbered and _is_stray(numbered[last := max(numbered)], name_at, classes):
        stray = ",".join(numbered.pop(last))
        log.warning("%s: row %d has no class and is ignored: %s", path, last, stray)
    for number, row in numbered.items():
        if len(row) != len(header):
            raise DataError(f"{path}: row {number} has {len(row)} cells, not {len(header)}")

    first: dict[str, int] = {}
    for number, row in numbered.items():
        name = row[name_at]
        if first.setdefault(name, number) != number:
            raise DataError(f"{path}: row {number}: {name!r} is already in row {first[name]}")
    try:
        found = match_classes(list(first), classes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    for at, (name, number) in enumerate(first.items()):
        if at not in found:
            raise DataError(f"{path}: row {number}: {name!r} is not a class of the data set")
    values = [
        _share(numbered[n][value_at], f"{path}: row {n}, {name}") for name, n in first.items()
    ]
    return torch.tensor(values)[torch.from_numpy(found)]


def _is_stray(row: Sequence[str], name_at: int, classes: Sequence[str]) -> bool:
    name = "".join(row[name_at : name_at + 1]).strip()
    return not name or (name.isdecimal() and name not in classes)


def _share(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise DataError(f"{place}: {text!r} is not a number from 0 to 1")
    return value
