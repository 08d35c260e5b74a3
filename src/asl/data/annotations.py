"""`Annotations`: what every reader returns and everything behind the readers takes.

A data set is four things: a folder, file names in it, class names, and labels. Labels are stored
by row (compressed sparse rows) with one implied value for the cells that are not stored, so that
MS-COCO (every cell known, three of 80 positive) and Open Images (nine million images, 9,605
classes, a handful of known cells each) go the same way. All of it lives in a few NumPy arrays,
because worker processes share them with the parent. Nine million Python strings would be copied
into each worker.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from asl.errors import DataError

PRESENT, ABSENT, UNANNOTATED = 1, 0, -1


@dataclass(frozen=True, eq=False)
class Annotations:
    """N files under `root` and their labels over C classes.

    `files` holds N paths relative to `root` as bytes (file system encoding), `indptr` N + 1 offsets
    into `indices` (class numbers, ascending in a row) and `values` (labels in {1, 0, -1}); every
    other cell of the N x C table has the value `implied`: 0 where the set is annotated in full, -1
    where it is partial.
    """

    root: Path
    files: npt.NDArray[np.bytes_]
    classes: tuple[str, ...]
    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    values: npt.NDArray[np.int8]
    implied: int = ABSENT

    @classmethod
    def from_cells(
        cls,
        root: Path,
        files: npt.NDArray[np.bytes_],
        classes: tuple[str, ...],
        rows: npt.ArrayLike,
        columns: npt.ArrayLike,
        values: npt.ArrayLike,
        implied: int = ABSENT,
    ) -> "Annotations":
        """Build from known cells in any order; of a cell given twice, the largest value stays.

        So "present" wins over "absent", and both over "not annotated": several objects of one
        class, or several annotators of one image, are the usual reasons for repetition. `values`
        may be a single one for all cells.
        """
        # Each cell becomes one number, so that one sort in place puts the cells in order, and the
        # largest value of a repeated cell first. A lexsort of three arrays takes longer and copies
        # all three: gigabytes for the sixty million cells of Open Images.
        cell = np.asarray(rows, dtype=np.int64) * len(classes)
        cell += np.asarray(columns, dtype=np.int32)
        cell *= 4
        cell += PRESENT - np.asarray(values, dtype=np.int8)
        cell.sort()
        value = PRESENT - (cell & 3).astype(np.int8)
        cell >>= 2
        stored = value != implied
        stored[1:] &= cell[1:] != cell[:-1]
        cell, value = cell[stored], value[stored]
        column = (cell % len(classes)).astype(np.int32)
        cell //= len(classes)
        indptr = np.zeros(len(files) + 1, dtype=np.int64)
        np.cumsum(np.bincount(cell, minlength=len(files)), out=indptr[1:])
        return cls(root, files, classes, indptr, column, value, implied)

    @classmethod
    def unlabelled(
        cls, root: Path, files: npt.NDArray[np.bytes_], classes: tuple[str, ...]
    ) -> "Annotations":
        """Files of which nothing is known: every cell is -1."""
        return cls.from_cells(root, files, classes, [], [], [], implied=UNANNOTATED)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_classes(self) -> int:
        """The number of classes, C."""
        return len(self.classes)

    def path(self, index: int) -> str:
        """The path of one image: `root` joined with its file name."""
        return os.path.join(self.root, os.fsdecode(bytes(self.files[index])))  # noqa: PTH118 (hot)

    def labels(self, index: int) -> npt.NDArray[np.int8]:
        """One row made dense: (C,) int8 in {1, 0, -1}."""
        row = np.full(len(self.classes), self.implied, dtype=np.int8)
        stored = slice(self.indptr[index], self.indptr[index + 1])
        row[self.indices[stored]] = self.values[stored]
        return row

    def dense(self) -> npt.NDArray[np.int8]:
        """The whole table: (N, C) int8 in {1, 0, -1}. Costs N x C bytes."""
        table = np.full((len(self), self.num_classes), self.implied, dtype=np.int8)
        rows = np.repeat(np.arange(len(self)), np.diff(self.indptr))
        table[rows, self.indices] = self.values
        return table

    def counts(self, value: int) -> npt.NDArray[np.int64]:
        """How many images have this label (1, 0 or -1), by class: (C,) int64."""
        stored = np.bincount(self.indices[self.values == value], minlength=self.num_classes)
        if value == self.implied:
            stored += len(self) - np.bincount(self.indices, minlength=self.num_classes)
        return stored

    def estimated_counts(self) -> npt.NDArray[np.float64]:
        """In how many images each class is, if it is as frequent where it is not annotated: (C,).

        0 for a class without any annotation.
        """
        present = self.counts(PRESENT)
        share: npt.NDArray[np.float64] = present / np.maximum(present + self.counts(ABSENT), 1)
        return len(self) * share

    def subset(self, rows: npt.ArrayLike) -> "Annotations":
        """The given rows (numbers or a mask), in that order, as `Annotations` of their own."""
        rows = np.asarray(rows)
        if not rows.size:
            rows = rows.astype(np.int64)  # NumPy makes floats of an empty list
        chosen = np.arange(len(self))[rows]
        lengths = np.diff(self.indptr)[chosen]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        stored = np.repeat(self.indptr[chosen] - indptr[:-1], lengths) + np.arange(indptr[-1])
        return replace(
            self,
            files=self.files[chosen],
            indptr=indptr,
            indices=self.indices[stored],
            values=self.values[stored],
        )

    def with_classes(self, columns: npt.ArrayLike, names: Sequence[str]) -> "Annotations":
        """Only the given classes, by number and in that order, under new names."""
        new_column = np.full(self.num_classes, -1, dtype=np.int32)
        new_column[np.asarray(columns)] = np.arange(len(names))
        rows = np.repeat(np.arange(len(self)), np.diff(self.indptr))
        columns = new_column[self.indices]
        chosen = columns >= 0
        cells = rows[chosen], columns[chosen], self.values[chosen]
        return self.from_cells(self.root, self.files, tuple(names), *cells, self.implied)


def files_exist(annotations: Annotations) -> npt.NDArray[np.bool_]:
    """Whether the file of each image exists: (N,) bool."""
    # Each folder is listed once. A stat for each of 9 million files takes minutes where the listing
    # takes 2 s, and hours on a network file system.
    root = os.fsencode(annotations.root)
    listing = cache(lambda folder: _listing(root + b"/" + folder))
    parts = (bytes(file).rpartition(b"/") for file in annotations.files)
    exists = (name in listing(folder) for folder, _, name in parts)
    return np.fromiter(exists, bool, len(annotations))


def _listing(folder: bytes) -> set[bytes]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 (bytes)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise DataError(f"{os.fsdecode(folder)} cannot be listed: {error.strerror}") from error


def without_missing(
    annotations: Annotations, policy: Literal["error", "skip"]
) -> tuple[Annotations, int]:
    """Look for every image file; `policy` "error" raises, "skip" leaves out the missing ones.

    Returns the annotations of the files that exist and the number of those that were left out.
    Raises `DataError` that counts the missing files and names the first three, or if no file at all
    is left.
    """
    exists = files_exist(annotations)
    missing = np.flatnonzero(~exists)
    if not len(missing):
        return annotations, 0
    named = ", ".join(annotations.path(i) for i in missing[:3])
    message = f"{len(missing):,} of {len(annotations):,} images are missing: {named}"
    message += ", ..." if len(missing) > 3 else ""
    message += _other_case(Path(annotations.path(missing[0])))
    if len(missing) == len(annotations):
        raise DataError(f"{message}. Is {annotations.root} the right folder?")
    if policy == "error":
        raise DataError(f"{message}. Use --missing-images skip to go on without them.")
    return annotations.subset(exists), len(missing)


def _other_case(path: Path) -> str:
    # A list may say .jpg where the disk has .JPG: one file on Windows and macOS, elsewhere two.
    if path.parent.is_dir():
        for entry in path.parent.iterdir():
            if entry.name.casefold() == path.name.casefold():
                return f" (there is {entry.name}: upper and lower case count)"
    return ""
