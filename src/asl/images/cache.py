"""The image cache: the squished images of a data set in one file, so that no epoch decodes them.

The file is a header of 4,096 bytes, then N images of 3 x S x S bytes, then a table with the CRC-32
of each (int64, -1 for one that could not be read), then the table's own CRC-32. It appears under
its name when it is complete.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import torch
import torchvision
from PIL import features
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from asl.atomic import replacing
from asl.data.annotations import Annotations
from asl.data.extents import size_of
from asl.errors import DataError, UsageError
from asl.images.decode import read_image, squish
from asl.images.settings import MAX_PIXELS, BadImages

FORMAT = 1  # of the file, and of what `read_image` and `squish` make of a picture
HEADER = 4096  # bytes: a page, so that images of 448 px (147 pages) begin at pages too
CHUNK = 16  # images that a worker squishes before it writes them
UNREADABLE = -1
# At least so many file sizes are looked at when a cache is opened, and all of a set of fewer than
# twice as many. A stat takes 5 to 20 microseconds on a local disk: for 1.7 million files that is 8
# to 35 s, in every process, and many times that on a network file system.
SIZES = 200_000
log = logging.getLogger("asl")


class ImageCache:
    """The N squished images of a data set in one file. `open` finds or builds it.

    May be used in forked and in spawned processes, all of which share the pages of the file that
    are in memory.
    """

    def __init__(
        self,
        folder: Path,
        annotations: Annotations,
        size: int,
        max_pixels: int = MAX_PIXELS,
        exif_rotate: bool = False,
    ) -> None:
        self.annotations, self.size = annotations, size
        self.max_pixels, self.exif_rotate = max_pixels, exif_rotate
        key = _key(annotations, size, exif_rotate)
        self.path = folder / f"{annotations.root.resolve().name}-{size}px-{key[:16]}.images"
        about = {"asl image cache": FORMAT, "key": key, "images": len(self), "size": size}
        self._header = json.dumps(about).encode().ljust(HEADER)
        self._image_bytes = 3 * size * size
        self._unreadable: frozenset[int] = frozenset()
        self._descriptor: int | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        annotations: Annotations,
        size: int,
        *,
        workers: int,
        max_pixels: int = MAX_PIXELS,
        exif_rotate: bool = False,
        bad: BadImages = "error",
    ) -> "ImageCache":
        """The cache of these images at `size` px in `folder`, built by `workers` processes if new.

        What it returns for an image is `squish(read_image(path, max_pixels, exif_rotate), size)`,
        to the bit.

        A cache belongs to the names of the files in their order, their sizes in bytes (of large
        sets to those of `SIZES` files or more), the image size, whether EXIF turns the images, and
        the versions of the decoders.
        Other images go into another file, and none is deleted. Modification times do not count, so
        a data set may be moved or copied. A picture that is replaced by one of as many bytes goes
        unnoticed: delete the cache.

        Every opening checks the header, the length, the table and 16 or more images: a file that
        fails is built anew, with a warning. Of several runs and ranks one builds and the others
        wait.

        Raises `DataError` that names an image which cannot be read; with `bad` "skip", `read`
        raises it for that image alone. Raises `UsageError` if the disk has too little space, before
        anything is built, and if `folder` cannot be written to. Neither leaves a part of a cache
        behind.
        """
        cache = cls(folder, annotations, size, max_pixels, exif_rotate)
        try:
            try:
                cache._load()
            except (FileNotFoundError, ValueError):
                with _locked(folder):
                    cache._load_or_build(workers, bad)
        except OSError as error:
            raise UsageError(f"the image cache {cache.path}: {error.strerror or error}") from error
        if bad == "error":  # the cache may have been built with "skip"
            for index in sorted(cache._unreadable):
                cache._decoded(index)
        return cache

    def __len__(self) -> int:
        return len(self.annotations)

    def read(self, index: int, out: Tensor) -> None:
        """Copy image `index` into `out`, a contiguous (3, size, size) uint8 tensor on the CPU.

        An image that could not be read when the cache was built is read from its file: usually that
        raises the same `DataError` as then.
        """
        if index in self._unreadable:
            squish(self._decoded(index), self.size, out)
            return
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            # A memory map would be no faster (0.03 ms at 448 px), its pages would count as memory
            # of every worker, and a disk that fails would be a signal in place of an error.
            copied = os.preadv(self._descriptor, [out.numpy().data], self.offset(index))
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from error
        if copied != self._image_bytes:
            raise DataError(f"{self.path} was cut short: start again, and it is built anew")

    def _decoded(self, index: int) -> Tensor:
        return read_image(self.annotations.path(index), self.max_pixels, self.exif_rotate)

    def offset(self, index: int) -> int:
        """Where image `index` begins in the file; where the table does, for N."""
        return HEADER + index * self._image_bytes

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}  # a spawned process opens the file itself

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    @property
    def bytes(self) -> int:
        """The length of the file."""
        return self.offset(len(self)) + 8 * len(self) + 4

    def _load_or_build(self, workers: int, bad: BadImages) -> None:
        try:
            self._load()  # another run may have built it while this one waited for the lock
        except (FileNotFoundError, ValueError) as error:
            if isinstance(error, ValueError):
                log.warning("%s %s: it is built anew", self.path, error)
            self._build(workers, bad)
            self._load()

    def _load(self) -> None:
        # Raises FileNotFoundError, or ValueError that says what is wrong with the file.
        with self.path.open("rb") as file:
            if file.read(HEADER) != self._header:
                raise ValueError("is not the cache that its name says")
            if (found := os.fstat(file.fileno()).st_size) != self.bytes:
                raise ValueError(f"has {found:,} bytes, not {self.bytes:,}")
            file.seek(self.offset(len(self)))
            table = file.read(8 * len(self))
            if file.read(4) != zlib.crc32(table).to_bytes(4, "little"):
                raise ValueError("has a damaged table")
            checksums = np.frombuffer(table, "<i8")
            for index in _spread(len(self), 16):
                file.seek(self.offset(index))
                checksum = zlib.crc32(file.read(self._image_bytes))
                if checksums[index] not in (checksum, UNREADABLE):
                    raise ValueError(f"has a damaged image (number {index})")
        self._unreadable = frozenset(np.flatnonzero(checksums == UNREADABLE).tolist())

    def _build(self, workers: int, bad: BadImages) -> None:
        for draft in self.path.parent.glob(".*.images.*.part"):  # of a build that was killed
            draft.unlink(missing_ok=True)
        free = shutil.disk_usage(self.path.parent).free
        if self.bytes > free:
            raise UsageError(
                f"the image cache {self.path} needs {self.bytes:,} bytes, and {free:,} are free"
            )
        checksums: list[npt.NDArray[np.int64]] = []
        title = f"image cache at {self.size} px"
        with (
            replacing(self.path) as file,
            tqdm(desc=title, total=len(self), unit="img", leave=False) as progress,
        ):
            chunks = _Chunks(self, Path(file.name), bad)
            loader = DataLoader(
                chunks,
                batch_size=None,
                num_workers=min(workers, len(chunks)),
                worker_init_fn=_ignore_interrupts,
                generator=torch.Generator(),  # or it would draw from the global one
            )
            try:
                for chunk in loader:
                    if isinstance(chunk, Exception):
                        raise chunk
                    checksums.append(np.array(chunk))
                    progress.update(len(chunk))
            except KeyboardInterrupt as error:
                # The traceback holds the loader, and with it the workers, until the process ends.
                raise error.with_traceback(None) from None
            file.write(self._header)
            file.seek(self.offset(len(self)))
            table = np.concatenate(checksums).astype("<i8").tobytes()
            file.write(table + zlib.crc32(table).to_bytes(4, "little"))


class _Chunks(Dataset[list[int] | Exception]):
    """Squishes and writes images, `CHUNK` at a time; the items are their checksums."""

    def __init__(self, cache: ImageCache, draft: Path, bad: BadImages) -> None:
        self.cache, self.draft, self.bad = cache, draft, bad

    def __len__(self) -> int:
        return -(-len(self.cache) // CHUNK)

    def __getitem__(self, chunk: int) -> list[int] | Exception:
        cache, checksums = self.cache, []
        first, last = chunk * CHUNK, min((chunk + 1) * CHUNK, len(cache))
        images = torch.zeros(last - first, 3, cache.size, cache.size, dtype=torch.uint8)
        try:
            for index, out in enumerate(images, first):
                try:
                    image = squish(cache._decoded(index), cache.size, out)
                    checksums.append(zlib.crc32(image.numpy().data))
                except DataError:
                    if self.bad == "error":
                        raise
                    checksums.append(UNREADABLE)
            with self.draft.open("r+b") as file:
                file.seek(cache.offset(first))
                file.write(images.numpy().data)
        except (DataError, OSError) as error:
            # It is returned because an exception that crosses processes is printed as a traceback.
            return error
        return checksums


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too; the parent acts


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build at a time in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # A POSIX lock: the system takes it back when its owner dies, however that happens, and worker
    # processes do not inherit it. The file stays: to delete it would be a race.
    with (folder / ".lock").open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            log.info("waiting for another run, which builds an image cache in %s", folder)
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _key(annotations: Annotations, size: int, exif_rotate: bool) -> str:
    # The resize is torch's; JPEGs are decoded by torchvision, the rest by Pillow.
    made_by = torch.__version__, torchvision.__version__, PIL.__version__
    about = [FORMAT, size, *made_by, features.version("libjpeg_turbo")]
    if exif_rotate:  # only then: caches that are there already stay of use
        about.append("exif_rotate")
    digest = hashlib.sha256(json.dumps(about).encode())
    count = len(annotations)
    for start in range(0, count, 1 << 16):
        digest.update(b"\0".join(annotations.files[start : start + (1 << 16)].tolist()) + b"\0")
    for index in _spread(count, SIZES):
        try:
            digest.update(b"%d " % size_of(annotations.path(index)))
        except OSError:
            digest.update(b"- ")
    return digest.hexdigest()


def _spread(count: int, least: int) -> range:
    """Numbers below `count`, evenly spread: at least `least`, and all of fewer than twice that."""
    return range(0, count, max(1, count // least))
