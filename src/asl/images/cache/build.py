"""Building what an image cache lacks, shard by shard, together with whoever else does so.

A builder takes the next images that are in no shard and in nobody's draft, and writes their rows
into a draft of its own. It looks and writes under one lock; decoding it does under another, which
the system takes back when it dies. So ranks, runs and machines build disjoint shards, and what a
killed one had finished stays.
"""

import errno
import fcntl
import logging
import os
import shutil
import signal
import uuid
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from asl.atomic import replacing
from asl.distributed import world_size
from asl.errors import DataError, UsageError
from asl.images.cache.find import Missing
from asl.images.cache.shards import FIRST_EDITION, SUFFIX, Damaged, Kind, Shard
from asl.images.decode import read_squished
from asl.images.settings import BadImages, ImageSettings

SHARD_BYTES = 10**9  # of images: seconds of work, which a killed build loses
SAMPLES = 16  # images whose JPEGs say how large all are: up to twice as many
CHUNK = 16  # images that a worker squishes before it writes them
PLANNING = 0  # the byte of the lock file that a builder holds while it looks for work
DRAFTS = f".*{SUFFIX}.*.part"  # what `atomic.replacing` calls them
log = logging.getLogger("asl")


def build_shards(
    missing: Missing, folder: Path, settings: ImageSettings, workers: int, bad: BadImages
) -> None:
    """Add the images to the shards in `folder`, with `workers` processes; others may do so, too.

    Raises what `ImageCache.open` says. The shards that are finished then stay, a draft does not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    builder = _Builder(missing, folder, Kind.of(settings))
    each = image_bytes(missing, settings)
    _check_space(builder, each)
    # Ranks share what is little; what is much makes full shards.
    per_shard = min(-(-len(missing) // world_size()), max(1, SHARD_BYTES // each))
    title = f"image cache at {settings.image_size} px"
    with (
        (folder / ".lock").open("ab") as locks,
        tqdm(desc=title, total=len(missing), unit="img", leave=False) as progress,
    ):
        while builder.wanted.any():
            with ExitStack() as stack:
                with _held(locks, PLANNING):
                    others, chosen = builder.plan(locks, per_shard)
                    progress.update(len(missing) - int(builder.wanted.sum()) - progress.n)
                    if len(chosen):
                        draft = stack.enter_context(builder.draft(locks, chosen))
                if len(chosen):
                    images = _Chunks(missing, chosen, draft.path, settings, bad)
                    _fill(draft.shard, images, workers, progress)
            if not len(chosen):
                builder.wait(locks, others)


def image_bytes(missing: Missing, settings: ImageSettings) -> int:
    """What an image takes: in JPEGs, the mean of some, rounded up."""
    kind, lengths = Kind.of(settings), list[int]()
    if not kind.quality:
        return kind.raw_bytes
    for index in missing.indices[:: max(1, len(missing) // SAMPLES)].tolist():
        with suppress(DataError):
            image = read_squished(missing.annotations.path(index), settings)
            lengths.append(len(kind.pack(image)))
    return -(-sum(lengths) // len(lengths)) if lengths else kind.raw_bytes


class _Draft(NamedTuple):
    """The file that is to become a shard."""

    shard: Shard
    file: BinaryIO

    @property
    def path(self) -> Path:
        return Path(self.file.name)


class _Builder:
    """What one process knows of who builds what."""

    def __init__(self, missing: Missing, folder: Path, kind: Kind) -> None:
        self.missing, self.folder, self.kind = missing, folder, kind
        self.wanted = np.ones(len(missing), bool)  # the images that are in no shard yet
        self._known = set[str]()  # shards
        self._waited = False

    def plan(self, locks: BinaryIO, most: int) -> tuple[list[int], npt.NDArray[np.int64]]:
        """The locks of drafts that others fill with our images, and up to `most` for a new draft.

        Marks what has come in new shards, too. Drafts are looked at first: one that is finished
        meanwhile is then found among the shards.
        """
        others, theirs = [], [np.empty(0, np.int64)]
        for path, number in _live_drafts(self.folder, locks):
            theirs.append(self._within(path))
            others += [number] if len(theirs[-1]) else []
        for path in self.folder.glob(f"*{SUFFIX}"):
            if path.name not in self._known:
                self._known.add(path.name)
                self.wanted[self._within(path)] = False
        free = self.wanted.copy()
        free[np.concatenate(theirs)] = False
        return others, np.flatnonzero(free)[:most]

    def _within(self, path: Path) -> npt.NDArray[np.int64]:
        try:
            return self.missing.within(Shard.load(path).rows)
        except (FileNotFoundError, Damaged):  # a draft that is being finished
            return np.empty(0, np.int64)

    @contextmanager
    def draft(self, locks: BinaryIO, chosen: npt.NDArray[np.int64]) -> Iterator[_Draft]:
        """A draft that says it is of these images; it becomes a shard at the end."""
        name, missing = uuid.uuid4().hex, self.missing
        files = missing.annotations.files[missing.indices[chosen]].tolist()
        names = b"\0".join([os.fsencode(missing.annotations.root.absolute()), *files, b""])
        path = self.folder / f"{name}{SUFFIX}"
        shard = Shard(path, self.kind, missing.rows[chosen], names)
        with _held(locks, _number(name)), replacing(path) as file:
            shard.write_head(file)
            yield _Draft(shard, file)
            shard.write_head(file)
        self.wanted[chosen] = False
        self._known.add(path.name)

    def wait(self, locks: BinaryIO, others: list[int]) -> None:
        """Wait until one of these drafts is finished or given up."""
        for number in others[:1]:
            if not self._waited:
                print(f"image cache: waiting for another run, which builds in {self.folder}")
                self._waited = True
            with _held(locks, number):
                pass


def _check_space(builder: _Builder, each: int) -> None:
    folder, images = builder.folder, len(builder.missing)
    needed, free = images * each, shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"the image cache {folder} needs {needed:,} bytes more, and {free:,} are free"
        )
    print(
        f"image cache: {images:,} images of {builder.kind.size} px as {builder.kind.storage}, "
        f"{needed / 1e9:,.2f} GB, are added to {folder}, which has {free / 1e9:,.2f} GB free"
    )
    if old := [path.stat().st_size for path in folder.parent.glob(f"*{FIRST_EDITION}")]:
        log.warning(
            "%s holds %d files of an earlier version, %.2f GB, which are of no use any more: "
            "python -m asl.images.cache %s --prune removes them",
            *(folder.parent, len(old), sum(old) / 1e9, folder.parent),
        )


def remove_dead_drafts(folder: Path) -> None:
    """Remove what killed builds have left in the folder of a kind."""
    with (folder / ".lock").open("ab") as locks, _held(locks, PLANNING):
        _live_drafts(folder, locks)


def _live_drafts(folder: Path, locks: BinaryIO) -> list[tuple[Path, int]]:
    """The drafts that somebody fills, and the bytes that their owners lock; removes the others."""
    live = []
    for path in folder.glob(DRAFTS):
        number = _number(path.name.split(".")[1])
        try:
            with _held(locks, number, wait=False):
                path.unlink(missing_ok=True)
        except (BlockingIOError, PermissionError):
            live.append((path, number))
    return live


def _fill(shard: Shard, images: "_Chunks", workers: int, progress: "tqdm[Any]") -> None:
    """Append the images to the draft, and note in the rows of the shard where they are."""
    loader = DataLoader(
        images,
        batch_size=None,
        num_workers=min(workers, len(images)),
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # or it would draw from the global one
    )
    first = 0
    try:
        for made in loader:
            if isinstance(made, Exception):
                raise made
            part = shard.rows[first : first + len(made)]
            part["offset"], part["length"], part["checksum"] = np.array(made).T
            first += len(made)
            progress.update(len(made))
    except KeyboardInterrupt as error:
        # The traceback holds the loader, and with it the workers, until the process ends.
        raise error.with_traceback(None) from None


class _Chunks(Dataset[list[tuple[int, int, int]] | Exception]):
    """Squishes and writes images, `CHUNK` at a time; the items are where, how long, checksums."""

    def __init__(
        self,
        missing: Missing,
        chosen: npt.NDArray[np.int64],
        draft: Path,
        settings: ImageSettings,
        bad: BadImages,
    ) -> None:
        self.annotations, self.indices = missing.annotations, missing.indices[chosen]
        self.draft, self.settings, self.bad = draft, settings, bad
        self.kind = Kind.of(settings)

    def __len__(self) -> int:
        return -(-len(self.indices) // CHUNK)

    def __getitem__(self, chunk: int) -> list[tuple[int, int, int]] | Exception:
        indices = self.indices[chunk * CHUNK : (chunk + 1) * CHUNK].tolist()
        try:
            packed = [self._packed(index) for index in indices]
            lengths = np.array([len(each) for each in packed])
            offsets = _append(self.draft, packed) + lengths.cumsum() - lengths
            checksums = map(zlib.crc32, packed)
            return list(zip(offsets.tolist(), lengths.tolist(), checksums, strict=True))
        except (DataError, OSError) as error:
            # It is returned because an exception that crosses processes is printed as a traceback.
            return error

    def _packed(self, index: int) -> bytes | memoryview:
        try:
            image = read_squished(self.annotations.path(index), self.settings)
        except DataError:
            if self.bad == "error":
                raise
            return b""
        return self.kind.pack(image)


def _append(path: Path, parts: list[bytes | memoryview]) -> int:
    """Write to the end of a file that other processes append to as well; where that begins."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        total = sum(map(len, parts))
        if os.writev(file, parts) < total:
            os.write(file, b"\0")  # which says why
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.lseek(file, 0, os.SEEK_CUR) - total
    finally:
        os.close(file)


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too; the parent acts


@contextmanager
def _held(locks: BinaryIO, number: int, wait: bool = True) -> Iterator[None]:
    # POSIX locks of single bytes: the system takes them back when their owner dies, however that
    # happens, and worker processes do not inherit them. The file stays: to delete it would be a
    # race.
    fcntl.lockf(locks, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
    try:
        yield
    finally:
        fcntl.lockf(locks, fcntl.LOCK_UN, 1, number)


def _number(name: str) -> int:
    """The byte of the lock file that the owner of a draft holds."""
    return 1 + int(name[:12], 16)
