"""Where the bytes of an image lie: in a file of its own, or in a part of a tar file (a shard).

A path such as `train-000000.tar/1536+20480/0001.jpg` stands for the 20,480 bytes of that tar file
from byte 1,536 on, which its index says are 0001.jpg. So nothing is unpacked, and any image of a
shard can be read at once.
"""

import os
import re
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

INSIDE = re.compile(r"(.+\.tar)/(\d+)\+(\d+)/[^/]*", re.DOTALL)


class Extent(NamedTuple):
    """`size` bytes of `file` from byte `start` on; without a size, all of them."""

    file: str
    start: int = 0
    size: int | None = None


def extent(path: str | os.PathLike[str]) -> Extent:
    """Where the image of this path lies."""
    path = os.fspath(path)
    found = INSIDE.fullmatch(path) if ".tar/" in path else None
    return Extent(found[1], int(found[2]), int(found[3])) if found else Extent(path)


def size_of(path: str) -> int:
    """How many bytes an image has. Raises `OSError` where its file or shard is not there."""
    return size_and_time(path)[0]


def size_and_time(path: str) -> tuple[int, int]:
    """How many bytes an image has, and when its file was changed, in nanoseconds.

    Raises `OSError` where the file or shard is not there.
    """
    file, _, size = extent(path)
    status = os.stat(file)  # noqa: PTH116 (hot)
    return status.st_size if size is None else size, status.st_mtime_ns


def content_of(path: str, start: int = 0) -> bytes:
    """The bytes of an image from number `start` on. Raises `OSError` where they cannot be read."""
    file, first, size = extent(path)
    with open(file, "rb") as opened:  # noqa: PTH123 (hot)
        opened.seek(first + start)
        return opened.read(-1 if size is None else size - start)


def files_of(paths: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bytes_]:
    """The files that images of these paths lie in: (N,) bytes."""
    if not (np.char.find(paths, b".tar/") >= 0).any():
        return paths
    return np.array([os.fsencode(extent(os.fsdecode(bytes(path))).file) for path in paths])
