"""`Annotations`: what every reader returns and everything behind the readers takes.

A data set is four things: a folder, file names in it, class names, and labels. Labels are stored
by row (compressed sparse rows) with one implied value for the cells that are not stored, so that
MS-COCO (every cell known, three of 80 positive) and Open Images (nine million images, 9,605
classes, a handful of known cells each) go the same way. All of it lives in a few NumPy arrays:
worker processes share them with the parent, where nine million Python strings would be copied into
each.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
        class, or several annotators of one image, are the usual reasons for repetition.
        """
        # One number per cell, so that one sort in place brings the cells in order, and of each the
        # largest value to the front. A lexsort of three arrays takes longer and copies all three,
        # which for the sixty million cells of Open Images is gigabytes.
        cell = np.asarray(rows, dtype=np.int64) * len(classes)
        cell += np.asarray(columns, dtype=np.int32)
        cell *= 4
        cell += PRESENT - np.asarray(values, dtype=np.int8)
        cell.sort()
        value = PRESENT - (cell & 3).astype(np.int8)
        cell >>= 2
        keep = value != implied
        keep[1:] &= cell[1:] != cell[:-1]
        cell, value = cell[keep], value[keep]
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

    def subset(self, rows: npt.ArrayLike) -> "Annotations":
        """The given rows (numbers or a mask), in that order, as `Annotations` of their own."""
        keep = np.arange(len(self))[np.asarray(rows)]
        lengths = np.diff(self.indptr)[keep]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        stored = np.repeat(self.indptr[keep] - indptr[:-1], lengths) + np.arange(indptr[-1])
        return replace(
            self,
            files=self.files[keep],
            indptr=indptr,
            indices=self.indices[stored],
            values=self.values[stored],
        )

    def with_classes(self, columns: npt.ArrayLike, names: Sequence[str]) -> "Annotations":
        """Keep the given classes, by number and in that order, under new names."""
        place = np.full(self.num_classes, -1, dtype=np.int32)
        place[np.asarray(columns)] = np.arange(len(names))
        rows = np.repeat(np.arange(len(self)), np.diff(self.indptr))
        keep = place[self.indices] >= 0
        return self.from_cells(
            self.root,
            self.files,
            tuple(names),
            rows[keep],
            place[self.indices[keep]],
            self.values[keep],
            self.implied,
        )


def files_exist(annotations: Annotations) -> npt.NDArray[np.bool_]:
    """Whether the file of each image is there: (N,) bool."""
    # One directory listing in place of a stat per file: 2 s where 9 million stats take minutes,
    # and on network file systems hours.
    listings: dict[bytes, set[bytes]] = {}
    there = np.zeros(len(annotations), dtype=bool)
    root = os.fsencode(annotations.root)
    for index, name in enumerate(annotations.files):
        folder, _, leaf = bytes(name).rpartition(b"/")
        if folder not in listings:
            listings[folder] = _listing(root + b"/" + folder)
        there[index] = leaf in listings[folder]
    return there


def _listing(folder: bytes) -> set[bytes]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 (bytes)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise DataError(f"{os.fsdecode(folder)} cannot be listed: {error.strerror}") from error


def without_missing(annotations: Annotations, missing: str) -> tuple[Annotations, int]:
    """Look for every image file; `missing` "error" raises, "skip" leaves out those not there.

    Returns the annotations of what is there and the number that was left out. Raises `DataError`
    that counts the missing files and names the first three, or if no file at all is left.
    """
    there = files_exist(annotations)
    absent = np.flatnonzero(~there)
    if not len(absent):
        return annotations, 0
    named = ", ".join(annotations.path(i) for i in absent[:3])
    message = f"{len(absent):,} of {len(annotations):,} images are missing: {named}"
    message += ", ..." if len(absent) > 3 else ""
    message += _other_case(Path(annotations.path(absent[0])))
    if len(absent) == len(annotations):
        raise DataError(f"{message}. Is {annotations.root} the right folder?")
    if missing == "error":
        raise DataError(f"{message}. Use --missing-images skip to go on without them.")
    return annotations.subset(there), len(absent)


def _other_case(path: Path) -> str:
    # .jpg in the list and .JPG on the disk is one file on Windows and macOS, and two elsewhere.
    if path.parent.is_dir():
        for entry in path.parent.iterdir():
            if entry.name.casefold() == path.name.casefold():
                return f" (there is {entry.name}: upper and lower case count)"
    return ""
