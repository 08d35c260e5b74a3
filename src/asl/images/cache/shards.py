"""The format of an image cache: shards, files of about a gigabyte that never change.

A shard is a page of JSON, a row for each image (`ROW`), the folder of the data set and the names of
the files in it, with a null byte behind each, and, from the next page on, the images one after the
other. It appears under its name when it is complete.
"""

import functools
import hashlib
import io
import json
import os
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from asl.data.extents import size_and_time
from asl.errors import DataError
from asl.images.decode import read_squished
from asl.images.settings import ImageSettings
from asl.images.torch_private import decode_jpeg

FORMAT = 2
FIRST_EDITION = ".images"  # one file for a split, which is no longer read
SUFFIX = ".shard"
PAGE = 4096  # bytes: images of 448 px are 147 pages, so that they begin at pages too
ROW = np.dtype(
    [
        ("path", "<u8"),  # `path_keys` of the file
        ("size", "<i8"),  # of the file in bytes
        ("time", "<i8"),  # when the file was changed, in nanoseconds
        ("offset", "<i8"),  # where the image begins in the shard
        ("length", "<u4"),  # of the image in bytes; 0: its file could not be read
        ("checksum", "<u4"),  # CRC-32 of the image
    ]
)
AT_ONCE = 10_000  # paths whose keys are computed together
PROBES = Path(__file__).parents[1] / "probes"
Rows = npt.NDArray[Any]  # of the type ROW


class Damaged(ValueError):
    """What is wrong with a shard."""


@dataclass(frozen=True)
class Kind:
    """What the images of a cache have in common; each kind has a folder of its own.

    `decoder` stands for what decoding and squishing do on this machine (`fingerprint`).
    """

    size: int
    storage: str
    exif_rotate: bool
    draft_decode: bool
    decoder: str

    @classmethod
    def of(cls, settings: ImageSettings) -> "Kind":
        """The kind that these settings ask for, here."""
        turned, draft = settings.exif_rotate, settings.draft_decode
        decoder = fingerprint(turned, draft)
        return cls(settings.image_size, settings.cache_format, turned, draft, decoder)

    @property
    def is_current(self) -> bool:
        """Whether decoding still gives the same pixels, here."""
        return self.decoder == fingerprint(self.exif_rotate, self.draft_decode)

    @property
    def name(self) -> str:
        """Of its folder."""
        return _name(self)

    @property
    def quality(self) -> int:
        """Of the JPEGs that are kept; 0 where the pixels are."""
        return int(self.storage.partition(":")[2] or 0)

    @property
    def raw_bytes(self) -> int:
        """What the pixels of an image take."""
        return 3 * self.size**2

    def pack(self, image: Tensor) -> bytes | memoryview:
        """What is kept of a (3, S, S) uint8 image."""
        if not self.quality:
            return image.numpy().reshape(-1).data
        file = io.BytesIO()
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        picture.save(file, "JPEG", quality=self.quality)
        return file.getvalue()

    def unpack(self, shard: int, offset: int, length: int, out: Tensor) -> None:
        """Read an image from an open shard into `out`, (3, S, S) uint8.

        Raises `Damaged` where that cannot be done; most wrong bits only make wrong pixels.
        """
        if self.quality:
            content = os.pread(shard, length, offset)
            if len(content) != length:
                raise Damaged("was cut short")
            try:
                out.copy_(decode_jpeg(content))
            except RuntimeError:
                raise Damaged("has a damaged image") from None
        # A memory map would be no faster (0.03 ms at 448 px), its pages would count as memory of
        # every worker, and a disk that fails would be a signal in place of an error.
        elif os.preadv(shard, [out.numpy().data], offset) != length:
            raise Damaged("was cut short")


@functools.cache
def _name(kind: Kind) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, asdict(kind)]).encode()).hexdigest()
    return f"{kind.size}px-{kind.storage.replace(':', '')}-{digest[:8]}"


@functools.cache
def fingerprint(exif_rotate: bool, draft_decode: bool) -> str:
    """A hash of the pixels that some built-in pictures give, made smaller and larger.

    Versions of libraries say less: most releases decode to the same bits, and one version may do so
    differently on two processors.
    """
    digest = hashlib.sha256()
    for probe in sorted(PROBES.iterdir()):
        for size in (16, 100):
            settings = ImageSettings(
                image_size=size, exif_rotate=exif_rotate, draft_decode=draft_decode
            )
            try:
                digest.update(read_squished(probe, settings).numpy().data)
            except DataError:
                digest.update(b"unreadable")
    return digest.hexdigest()[:16]


def path_keys(files: npt.NDArray[np.bytes_]) -> npt.NDArray[np.uint64]:
    """A hash of 64 bits of each path, the same whatever the longest of them is.

    Two of nine million are equal with a chance of 2e-6; they are then told apart as two versions of
    one file are.
    """
    # In NumPy, as 1.7 million calls of hashlib take 1.7 s and this 0.2 s: eight bytes at a time go
    # through the last steps of splitmix64 (Steele, Lea and Flood, 2014). In parts, as what is
    # computed on the way would else take gigabytes for 9 million.
    keys = np.zeros(len(files), np.uint64)
    width = -(-files.itemsize // 8)
    for first in range(0, len(files), AT_ONCE):
        part, key = files[first : first + AT_ONCE], keys[first : first + AT_ONCE]
        words = part.astype(f"S{8 * width}").view("<u8").reshape(len(part), width)
        for word in words.T:
            mixed = key ^ word
            mixed = (mixed ^ (mixed >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> 27)) * np.uint64(0x94D049BB133111EB)
            np.copyto(key, mixed ^ (mixed >> 31), where=word != 0)  # 0: behind the end of the path
    return keys


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard without its images: its rows, and the folder and the names of their files."""

    path: Path
    kind: Kind
    rows: Rows
    names: bytes

    @classmethod
    def load(cls, path: Path) -> "Shard":
        """Raises `Damaged` if it is not whole; the images are not looked at."""
        with path.open("rb") as file:
            try:
                about = json.loads(file.read(PAGE))
                count, length = int(about["images"]), int(about["names"])
                kind = Kind(**about["kind"])
            except (ValueError, TypeError, KeyError):
                raise Damaged("has no header of a shard") from None
            table, names = file.read(count * ROW.itemsize), file.read(length)
            if zlib.crc32(names, zlib.crc32(table)) != about.get("table"):
                raise Damaged("has a damaged table")
            rows = np.frombuffer(table, ROW, count)
            found, needed = os.fstat(file.fileno()).st_size, _end(rows)
        if found < needed:
            raise Damaged(f"was cut short: it has {found:,} of {needed:,} bytes")
        if path.parent.name != kind.name:
            raise Damaged(f"belongs into a folder {kind.name}")
        return cls(path, kind, rows, names)

    def write_head(self, file: BinaryIO) -> None:
        """Write all but the images, which stand behind it, to the begin of an open file."""
        table = self.rows.tobytes() + self.names
        about = {
            "asl image cache": FORMAT,
            "kind": asdict(self.kind),
            "images": len(self.rows),
            "names": len(self.names),
            "table": zlib.crc32(table),
        }
        file.seek(0)
        head = json.dumps(about).encode().ljust(PAGE) + table
        file.write(head.ljust(-(-len(head) // PAGE) * PAGE, b"\0"))
        file.flush()

    @property
    def root(self) -> str:
        """The folder of the data set, as it was when the shard was built."""
        return os.fsdecode(self.names.partition(b"\0")[0])

    def files(self) -> list[bytes]:
        """The paths of the images in that folder."""
        return self.names.split(b"\0")[1:-1]

    def outdated(self) -> bool:
        """Whether the data set is there and none of the files is as it was."""
        return Path(self.root).is_dir() and not any(
            _about(f"{self.root}/{os.fsdecode(file)}") == (row["size"], row["time"])
            for file, row in zip(self.files(), self.rows, strict=True)
        )


def check(shard: Path, row: Any) -> None:
    """Raises `Damaged` if an image, that of `row` of type ROW, is not what was written."""
    with shard.open("rb") as file:
        file.seek(row["offset"])
        if zlib.crc32(file.read(row["length"])) != row["checksum"]:
            raise Damaged(f"has a damaged image (at byte {row['offset']:,})")


def _about(path: str) -> tuple[int, int] | None:
    with suppress(OSError):
        return size_and_time(path)
    return None


def _end(rows: Rows) -> int:
    return int((rows["offset"] + rows["length"]).max(initial=0))
