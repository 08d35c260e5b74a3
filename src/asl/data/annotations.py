"""`Annotations`: what every reader returns and everything behind the readers takes.

A data set is four things: a folder, file names in it, class names, and labels. Labels are stored
by row (compressed sparse rows) with one implied value for the cells that are not stored, so that
MS-COCO (every cell known, three of 80 positive) and Open Images (nine million images, 9,605
classes, a handful of known cells each) go the same way. All of it lives in a few NumPy arrays,
because worker processes share them with the parent. Nine million Python strings would be copied
into each worker.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from asl.data.extents import files_of
from asl.distributed import from_rank_0
from asl.errors import DataError

PRESENT, ABSENT, UNANNOTATED = 1, 0, -1
PRESENT_FROM = 0.5  # a soft label at which a class counts as present
AT_ONCE = 100_000  # names of a folder, or cells, that are held in memory: 10 MB


@dataclass(frozen=True, eq=False)
class Annotations:
    """N files under `root` and their labels over C classes.

    `files` holds N paths relative to `root` as bytes (file system encoding), `indptr` N + 1 offsets
    into `indices` (class numbers, ascending in a row) and `values` (labels in {1, 0, -1}); every
    other cell of the N x C table has the value `implied`: 0 where the set is annotated in full, -1
    where it is partial.

    Where a label is soft, between 0 and 1, all `values` are float32. A model is trained on what
    they are (`labels`); wherever images are counted or ranked, such a class is present from 0.5 on.
    """

    root: Path
    files: npt.NDArray[np.bytes_]
    classes: tuple[str, ...]
    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    values: npt.NDArray[np.int8] | npt.NDArray[np.float32]
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
        cell = np.asarray(rows, dtype=np.int64) * len(classes)
        cell += np.asarray(columns, dtype=np.int32)
        values = np.asarray(values)
        value: npt.NDArray[np.int8] | npt.NDArray[np.float32]
        if values.dtype.kind != "f" or np.isin(values, (PRESENT, ABSENT, UNANNOTATED)).all():
            # Each cell becomes one number, so that one sort in place puts the cells in order, and
            # the largest value of a repeated cell first. A lexsort of three arrays takes longer and
            # copies all three: gigabytes for the sixty million cells of Open Images.
            cell *= 4
            cell += PRESENT - values.astype(np.int8)
            cell.sort()
            value = PRESENT - (cell & 3).astype(np.int8)
            cell >>= 2
        else:
            order = np.lexsort((-values, cell))
            cell, value = cell[order], values[order].astype(np.float32)
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

    @property
    def soft(self) -> bool:
        """Whether labels may lie between absent and present."""
        return self.values.dtype.kind == "f"

    def path(self, index: int) -> str:
        """The path of one image: `root` joined with its file name."""
        return os.path.join(self.root, os.fsdecode(bytes(self.files[index])))  # noqa: PTH118 (hot)

    def labels(self, index: int) -> npt.NDArray[np.int8] | npt.NDArray[np.float32]:
        """One row made dense: (C,) int8 in {1, 0, -1}, or float32 where labels are soft."""
        row = np.full(len(self.classes), self.implied, dtype=self.values.dtype)
        stored = slice(self.indptr[index], self.indptr[index + 1])
        row[self.indices[stored]] = self.values[stored]
        return row

    def present(self, index: int) -> npt.NDArray[np.intp]:
        """The numbers of the classes that are present in one image, ascending."""
        return np.flatnonzero(self.labels(index) >= PRESENT_FROM)

    def hard(self) -> "Annotations":
        """The same images with labels in {1, 0, -1}: a soft one is present from 0.5 on."""
        if not self.soft:
            return self
        values = np.where(self.values < 0, UNANNOTATED, self.values >= PRESENT_FROM)
        return replace(self, values=values.astype(np.int8))

    def dense(self) -> npt.NDArray[np.int8]:
        """The whole table: (N, C) int8 in {1, 0, -1}, as `hard` has it. Costs N x C bytes."""
        table = np.full((len(self), self.num_classes), self.implied, dtype=np.int8)
        rows = np.repeat(np.arange(len(self)), np.diff(self.indptr))
        table[rows, self.indices] = self.hard().values
        return table

    def counts(self, value: int) -> npt.NDArray[np.int64]:
        """How many images have this label (1, 0 or -1), as `hard` has it, by class: (C,) int64."""
        values, counts = self.hard().values, np.zeros(self.num_classes, dtype=np.int64)
        if value == self.implied:
            counts += len(self)
        # In parts: NumPy counts in copies of 64 bits, half a gigabyte for Open Images.
        for first in range(0, len(values), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            columns, chosen = self.indices[part], values[part] == value
            counts += np.bincount(columns[chosen], minlength=self.num_classes)
            if value == self.implied:
                counts -= np.bincount(columns, minlength=self.num_classes)
        return counts

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
    # takes seconds, and hours on a network file system. Listings go by in parts, which are looked
    # up among the files: to hold the names as Python's would take 95 bytes each.
    files = files_of(annotations.files)
    order = np.argsort(files, kind="stable")
    files = files[order]
    new = np.ones(len(files), dtype=bool)  # a shard is the file of many images
    new[1:] = files[1:] != files[:-1]
    if not new.all():
        files = files[new]
    there = np.zeros(len(files), dtype=bool)
    root = os.fsencode(annotations.root)
    for folder in {bytes(file).rpartition(b"/")[0] for file in files}:
        for names in _listed(root, folder, files.itemsize):
            at = np.minimum(files.searchsorted(names), len(files) - 1)
            there[at[files[at] == names]] = True
    del files  # the peak of the memory would be here
    exists = np.empty(len(order), dtype=bool)
    exists[order] = there[np.cumsum(new) - 1]
    return exists


def _listed(root: bytes, folder: bytes, longest: int) -> Iterator[npt.NDArray[np.bytes_]]:
    """Paths from `root` of what is in a folder, in parts; those of more bytes are left out."""
    before = folder + b"/" if folder else b""
    try:
        with os.scandir(root + b"/" + folder) as entries:
            paths = (before + entry.name for entry in entries)
            fitting = (path for path in paths if len(path) <= longest)
            while part := list(islice(fitting, AT_ONCE)):
                # In order, neighbours are looked up in the same memory: a tenth of the time.
                yield np.sort(np.array(part, dtype=f"S{longest}"))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        name = os.fsdecode(root + b"/" + folder)
        raise DataError(f"{name} cannot be listed: {error.strerror}") from error


def without_missing(
    annotations: Annotations, policy: Literal["error", "skip"]
) -> tuple[Annotations, int]:
    """Look for every image file; `policy` "error" raises, "skip" leaves out the missing ones.

    Of several processes, which call this together, rank 0 looks and tells the others.

    Returns the annotations of the files that exist and the number of those that were left out.
    Raises `DataError` that counts the missing files and names the first three, or if no file at all
    is left.
    """
    exists = from_rank_0(lambda: files_exist(annotations))
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
