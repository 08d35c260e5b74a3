"""The files of a data set: errors for missing ones, reading text and CSVs, names of images."""

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asl.errors import DataError, UsageError

# A file of such a name may be an image; what it is, its content says.
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))


def not_found(path: Path) -> DataError:
    """The error for a file or folder that is missing: it says what is there instead."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return DataError(f"{path} is not there: {folder} is not a folder")
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    listed = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
    return DataError(f"{path} is not there: {folder} holds {listed or 'nothing'}")


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file or folder that exists, but that the system does not let us read."""
    return DataError(f"{path} cannot be read: {error.strerror}")


def no_split(split: str, existing: Sequence[str], path: Path) -> UsageError | DataError:
    """The error for a split that was looked for at `path`: it names the existing ones."""
    if not existing:
        return not_found(path)
    return UsageError(f"no split {split!r} ({path}): choose from {', '.join(existing)}")


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, without a byte order mark.

    Raises `DataError` if the file is missing, cannot be read, or a line is not UTF-8.
    """
    return _read_text(path).splitlines()


def read_rows(path: Path, delimiter: str = ",") -> list[list[str]]:
    """The rows of a CSV in UTF-8, each a list of cells; that of a blank line is empty.

    Raises `DataError` as `read_lines` does, and for quotes that do not match.
    """
    # The parser gets the text with its line breaks: those between quotes belong to a cell.
    rows = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True, delimiter=delimiter)
    try:
        return list(rows)
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num}: {error}") from None


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise not_found(path)
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not UTF-8 (byte {error.start:,})") from None


def image_names(
    names: Sequence[str], root: Path, place: Callable[[int], str]
) -> npt.NDArray[np.bytes_]:
    """File names as `Annotations.files` wants them: (N,) bytes, relative to `root`, each once.

    An absolute path is taken if it lies under `root`. A name that is empty, leads out of `root` or
    is given twice raises a `DataError`, in which `place(i)` says where name i stands.
    """
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        relative = _relative(name, root)
        if relative is None:
            raise DataError(f"{place(index)}: {name!r} is not a path inside {root}")
        if first.setdefault(relative, index) != index:
            raise DataError(f"{place(index)}: {name!r} is already at {place(first[relative])}")
    return np.array([os.fsencode(name) for name in first], dtype=np.bytes_)


def _relative(name: str, root: Path) -> str | None:
    if name.startswith("/"):
        name = os.path.relpath(name, os.path.abspath(root))  # noqa: PTH100 (it does not follow links)
    path = os.path.normpath(name)
    return None if path in (".", "..") or path.startswith("../") or "\0" in path else path
