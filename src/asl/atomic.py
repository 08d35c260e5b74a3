"""Writing files that are never seen half-written."""

import errno
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from asl.errors import UsageError


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` when the block ends: whole and on the disk.

    Until then, and for ever if the block raises, whatever is at `path` stays as it is. Raises
    OSError where it cannot be written. Costs an fsync of the file and one of its folder.
    """
    path = Path(path)
    # A name of its own for every call: ranks and threads may write the same file at the same time.
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            draft.unlink()


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends; nothing is left if it raises.

    Raises `UsageError` where there is something already, or nothing can be written.
    """
    path = Path(path)
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UsageError(f"{path} is there already: name a folder that is new or empty")
        path.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    with place:
        draft = Path(place.name, path.name)
        draft.mkdir()
        yield draft
        draft.replace(path)


def write_result(path: str | Path, content: bytes) -> None:
    """Write a file that the user asked for by an option; its folder is made.

    Raises `UsageError` where it cannot be written.
    """
    with result_file(path) as file:
        file.write(content)


@contextmanager
def result_file(path: str | Path) -> Iterator[BinaryIO]:
    """The same for a file that is written bit by bit inside the block."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            yield file
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def check_result(path: str | Path) -> None:
    """Raise `UsageError` if a file cannot be written there now; leaves nothing behind.

    For what takes long to compute: the mistake is known before.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        # Permissions do not tell all: a network folder, or one that is read-only, may refuse.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    # The name of a file is part of its folder: without this a power cut can undo the rename.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
