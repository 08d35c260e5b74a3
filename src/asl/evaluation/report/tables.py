"""Scores and labels of any origin, from files: what a report of another trainer's model needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from asl.data.annotations import ABSENT, PRESENT, UNANNOTATED
from asl.data.classes import match_classes
from asl.data.files import not_found, unreadable
from asl.data.readers.table import PATH_COLUMNS, Table, all_rows, read_table
from asl.errors import DataError


class Cells(NamedTuple):
    """An (N, C) table with what its file says of rows and columns; nothing where it is an array."""

    path: Path
    values: npt.NDArray[Any]
    files: Sequence[str]
    classes: Sequence[str]


class ScoredImages(NamedTuple):
    """N images with their (N, C) scores in [0, 1] and labels in {1, 0, -1}; `files` may be none."""

    scores: npt.NDArray[np.float32]
    targets: npt.NDArray[np.int8]
    classes: Sequence[str]
    files: Sequence[str]


def read_scores(scores: Path, labels: Path) -> ScoredImages:
    """The scores of a file and the labels of another, brought together.

    Both may be an array of N x C (.npy), or a CSV or Parquet with a column for each class and
    perhaps one for the path of the image (`PATH_COLUMNS`); labels may also be in a column `labels`
    ("cat|dog"). Images are matched by path where both files have paths, else by their order;
    classes by name where both name them, else by their order. Images without scores are left out.

    Raises `DataError` that names file, row and column for what is wrong, what does not match, and
    scores outside of [0, 1].
    """
    scored, labelled = _read_scores(scores), _read_labels(labels)
    rows = _rows(scored, labelled)
    names, columns = _columns(scored, labelled)
    return ScoredImages(
        scored.values,
        labelled.values[rows][:, columns],
        names,
        scored.files or [labelled.files[row] for row in rows if labelled.files],
    )


def _rows(scored: Cells, labelled: Cells) -> npt.NDArray[np.int64]:
    """The row of `labelled` for each row of `scored`."""
    if scored.files and labelled.files:
        place = {file: row for row, file in enumerate(labelled.files)}
        for file in scored.files:
            if file not in place:
                raise DataError(f"{scored.path}: {file} has scores, but no row in {labelled.path}")
        return np.array([place[file] for file in scored.files])
    if len(scored.values) != len(labelled.values):
        raise DataError(
            f"{scored.path} has {len(scored.values):,} rows, {labelled.path} "
            f"{len(labelled.values):,}: give both a column path, or as many rows"
        )
    return np.arange(len(scored.values))


def _columns(scored: Cells, labelled: Cells) -> tuple[Sequence[str], npt.NDArray[np.int64]]:
    """The names of the classes, and the column of `labelled` for each column of `scored`."""
    if scored.classes and labelled.classes:
        try:
            return scored.classes, match_classes(labelled.classes, scored.classes)
        except DataError as error:
            raise DataError(f"{scored.path} and {labelled.path}: {error}") from None
    have, want = labelled.values.shape[1], scored.values.shape[1]
    if have != want:
        raise DataError(f"{scored.path} has {want} columns, {labelled.path} has {have} classes")
    names = scored.classes or labelled.classes or [f"class {number}" for number in range(want)]
    return names, np.arange(want)


def _read_scores(path: Path) -> Cells:
    cells = _read_array(path) if path.suffix == ".npy" else _score_table(path)
    values = cells.values
    if not np.issubdtype(values.dtype, np.floating):
        raise DataError(f"{path} holds {values.dtype}, not scores: floats from 0 to 1")
    wrong = np.argwhere(~((values >= 0) & (values <= 1)))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise DataError(
            f"{path}: {values[row, column]} in row {row + 1}, column {column + 1} of the scores is "
            "not from 0 to 1: of logits, take the sigmoid"
        )
    return cells._replace(values=values.astype(np.float32, copy=False))


def _read_labels(path: Path) -> Cells:
    if path.suffix != ".npy":
        annotations = all_rows(path)
        files = [file.decode("utf-8", "surrogateescape") for file in annotations.files.tolist()]
        return Cells(path, annotations.dense(), files, annotations.classes)
    cells = _read_array(path)
    if not np.isin(cells.values, (PRESENT, ABSENT, UNANNOTATED)).all():
        raise DataError(f"{path} holds other values than 1 (present), 0 (absent), -1 (not known)")
    return cells._replace(values=cells.values.astype(np.int8))


def _read_array(path: Path) -> Cells:
    try:
        values = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise not_found(path) from None
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, EOFError) as error:  # what is no array, or one of objects
        raise DataError(f"{path} cannot be read: {error}") from None
    if values.ndim != 2 or not values.size:
        raise DataError(f"{path} has shape {values.shape}, not (images, classes)")
    return Cells(path, values, (), ())


def _score_table(path: Path) -> Cells:
    if not path.is_file():
        raise not_found(path)
    table = read_table(path)
    named = next((name for name in PATH_COLUMNS if name in table.cells.columns), None)
    files = [] if named is None else table.column(named).to_list()
    columns = [each for each in table.cells.get_columns() if each.name != named]
    if not columns:
        raise DataError(f"{path} has no column with scores")
    values = np.stack([_numbers(each, table) for each in columns], axis=1)
    return Cells(path, values, files, [each.name for each in columns])


def _numbers(column: pl.Series, table: Table) -> npt.NDArray[np.float64]:
    numbers = column.cast(pl.Float64, strict=False)
    if numbers.has_nulls():
        row = int(numbers.is_null().arg_max() or 0)
        raise DataError(f"{table.place(row)}, column {column.name}: {column[row]!r} is no number")
    return numbers.to_numpy()
