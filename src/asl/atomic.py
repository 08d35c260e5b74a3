"""Writing files that are never seen half-written."""

import os
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


def write_result(path: str | Path, content: bytes) -> None:
    """Write a file that the user asked for by an option; its folder is made.

    Raises `UsageError` where it cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    # The name of a file is part of its folder: without this a power cut can undo the rename.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
