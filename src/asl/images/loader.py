"""From annotations to batches: uint8 images and int8 targets, in an order that can be resumed."""

import atexit
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from asl.data.annotations import Annotations
from asl.distributed import rank, world_size
from asl.errors import DataError, UsageError
from asl.images.augment import apply, draw
from asl.images.cache import ImageCache
from asl.images.decode import MAX_PIXELS, read_image, squish

MAX_UNREADABLE = 0.01  # share of the images that may be replaced before that is an error
PREFETCH = 2  # batches that each worker makes ahead
SHARED_MEMORY = Path("/dev/shm")
log = logging.getLogger("asl")


class Batch(NamedTuple):
    """What a step takes: (B, 3, S, S) uint8 images and (B, C) int8 targets in {1, 0, -1}.

    `numbers` (B, 3, 7) is the augmentation that is still to be done, where the model is. There may
    be fewer targets than images: the images that are left over are there to keep a rank company
    (`Batches`), and do not count.
    """

    images: Tensor
    targets: Tensor
    numbers: npt.NDArray[np.float32] | None = None


class Batches:
    """The batches of a data set, epoch by epoch, or this rank's share of them.

    Images are squished to `image_size`. With `shuffle` the order of an epoch depends on (`seed`,
    epoch) and the augmentation of an image on (`seed`, epoch, index) alone: neither on `workers`,
    nor on where the epoch is entered. The last batch may be smaller.

    Several ranks split every batch of a shuffled epoch, so that together they make the steps of
    one; otherwise they are dealt whole batches, each made as one process would. All ranks see as
    many batches: one without a share of the last gets a single image, and no target.

    Workers fill shared memory of 2 `workers` + 1 batches over and over; `UsageError` if there is
    less of it. What comes out is a copy, with `pin_memory` one that a GPU can fetch while the host
    goes on.

    With `bad_images` "skip", an image that cannot be read is replaced by another, drawn by (`seed`,
    epoch, index), and named in a warning when the epoch ends.
    """

    def __init__(
        self,
        annotations: Annotations,
        image_size: int,
        batch_size: int,
        *,
        augment: str = "none",
        augment_later: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        cache: ImageCache | None = None,
        bad_images: str = "error",
        max_pixels: int = MAX_PIXELS,
        workers: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.batch_size, self.waited = batch_size, 0.0
        self._order = _Order(len(annotations), batch_size, shuffle, seed)
        workers = min(default_workers() if workers is None else workers, self._order.steps)
        self._slots = _Slots(
            # Another batch is asked for when one comes, which has yet to be copied.
            count=min(workers * PREFETCH + 1, self._order.steps),
            shape=(self._order.largest, 3, image_size, image_size),
            targets=annotations.num_classes,
            # Warps and look-ups want the channels apart. Decoders and models do not: to part them
            # is a fifth of the work of reading.
            planar=augment != "none" or cache is not None,
            shared=workers > 0,
        )
        self._samples = _Samples(
            annotations,
            self._slots,
            seed,
            augment="none" if augment_later else augment,
            cache=cache,
            skip=bad_images == "skip",
            max_pixels=max_pixels,
        )
        self._later, self._reported = augment if augment_later else None, 0
        self._pin_memory = pin_memory
        self._loader = DataLoader(
            self._samples,
            sampler=self._order,
            batch_size=None,  # a sample of this loader is a batch
            collate_fn=_as_is,
            num_workers=workers,
            worker_init_fn=_in_worker,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            # The loader draws a base seed for its workers, which nothing here uses. Drawn from a
            # generator of its own, it leaves the global one alone: a resumed run draws once more.
            generator=torch.Generator(),
        )
        _alive.add(self)

    def __len__(self) -> int:
        return self._order.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from number `start` on; adds the seconds for them to `waited`.

        Raises `DataError` where an image cannot be read, or with `bad_images` "skip" more than
        `MAX_UNREADABLE` of them.
        """
        self._order.epoch, self._order.start = epoch, start
        asked = None  # the first batch is not counted: it comes when the workers have started
        for error, share in zip(self._loader, self._order.shares(), strict=True):
            self.waited += time.perf_counter() - asked if asked else 0.0
            if error is not None:
                raise error
            images, targets = (self._copy(tensor) for tensor in self._slots.of(share))
            numbers = None
            if self._later is not None:
                numbers = draw(self._later, self._samples.seed, epoch, share.indices)
            yield Batch(images, targets[: share.counted], numbers)
            asked = time.perf_counter()
        self._report_unreadable()

    def _copy(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, pin_memory=self._pin_memory).copy_(tensor)

    def _stop(self) -> None:
        iterator = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _report_unreadable(self) -> None:
        rows = self._samples.unreadable.nonzero().flatten().tolist()
        if len(rows) > self._reported:
            names = ", ".join(str(self._samples.annotations.path(row)) for row in rows[:5])
            more = ", ..." if len(rows) > 5 else ""
            log.warning("%d images cannot be read and were replaced: %s%s", len(rows), names, more)
        self._reported = len(rows)


def default_workers() -> int:
    """One worker per core that this process may use, at most 16; ranks of a machine share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min((cores or 1) // ranks_here, 16))


# Workers ignore the signal with which Python would end them at exit, to wait for them for ever.
_alive: WeakSet[Batches] = WeakSet()


@atexit.register
def _stop_workers() -> None:
    for batches in _alive:
        batches._stop()


class _Share(NamedTuple):
    """A rank's samples of a step: with the seed, all that they depend on."""

    epoch: int
    step: int
    indices: npt.NDArray[np.int64]
    counted: int  # the rest keeps the rank company


class _Order(Sampler[_Share]):
    """Which samples make this rank's batches of an epoch."""

    def __init__(self, size: int, batch_size: int, shuffle: bool, seed: int) -> None:
        self.size, self.batch_size, self.shuffle, self.seed = size, batch_size, shuffle, seed
        together = batch_size if shuffle else batch_size * world_size()
        self.steps = -(-size // together)
        self.largest = -(-min(batch_size, size) // (world_size() if shuffle else 1))
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[_Share]:
        return self.shares()

    def shares(self) -> Iterator[_Share]:
        order, ranks, epoch = np.arange(self.size), world_size(), self.epoch
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        for step in range(self.start, self.steps):
            if self.shuffle:
                batch = order[step * self.batch_size : (step + 1) * self.batch_size]
                indices = batch[rank() :: ranks]
            else:
                first = (step * ranks + rank()) * self.batch_size
                indices = order[first : first + self.batch_size]
            yield _Share(epoch, step, indices if len(indices) else order[:1], len(indices))


class _Slots:
    """Memory of `count` batches, which steps use in turn.

    Memory new to both processes for every batch would have to be mapped page by page in each, which
    at 448 px takes several times as long as to read the images from a cache.
    """

    def __init__(
        self, count: int, shape: tuple[int, ...], targets: int, planar: bool, shared: bool
    ) -> None:
        batch, channels, height, width = shape
        if not planar:
            shape = (batch, height, width, channels)
        self.images = _memory(torch.uint8, (count, *shape), shared)
        if not planar:
            self.images = self.images.permute(0, 1, 4, 2, 3)
        self.targets = _memory(torch.int8, (count, batch, targets), shared)

    def of(self, share: _Share) -> tuple[Tensor, Tensor]:
        """The images and targets of a share: views of memory that a later step uses again."""
        slot, size = share.step % len(self.images), len(share.indices)
        return self.images[slot, :size], self.targets[slot, :size]


def _memory(dtype: torch.dtype, shape: tuple[int, ...], shared: bool) -> Tensor:
    if not shared:
        return torch.empty(shape, dtype=dtype)
    size = int(np.prod(shape))
    if SHARED_MEMORY.is_dir() and size > (free := shutil.disk_usage(SHARED_MEMORY).free):
        # It is taken when it is touched: a worker would be killed in the middle of an epoch.
        raise UsageError(
            f"the loader needs {size / 1e6:,.0f} MB of shared memory and {SHARED_MEMORY} has "
            f"{free / 1e6:,.0f}: fewer --workers, a smaller --batch-size, or for a container a "
            f"larger --shm-size"
        )
    storage = torch.UntypedStorage._new_shared(size, device="cpu")  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


@dataclass(eq=False)
class _Samples(Dataset[DataError | None]):
    """Fills the slots."""

    annotations: Annotations
    slots: _Slots
    seed: int
    augment: str
    cache: ImageCache | None
    skip: bool
    max_pixels: int

    def __post_init__(self) -> None:
        # Shared by the workers, which mark what they could not read.
        self.unreadable = torch.zeros(len(self.annotations), dtype=torch.bool)
        self.unreadable.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, share: _Share) -> DataError | None:
        images, targets = self.slots.of(share)
        raw = torch.empty(images.shape[1:], dtype=torch.uint8)
        numbers = draw(self.augment, self.seed, share.epoch, share.indices)
        try:
            for image, target, index, number in zip(
                images, targets, share.indices.tolist(), numbers, strict=True
            ):
                augmented = number.any()
                row = self._read(share.epoch, index, raw if augmented else image)
                target.copy_(torch.from_numpy(self.annotations.labels(row)))
                if augmented:
                    apply(raw, number, out=image)
        except DataError as error:
            # Returned, not raised: an exception that crosses processes becomes a printed traceback.
            return error
        return None

    def _read(self, epoch: int, row: int, image: Tensor) -> int:
        """Fill `image` with that of `row`, or the one that replaces it; returns its row."""
        wanted, others = row, list[int]()
        for attempt in range(100):
            try:
                if self.cache is not None:
                    self.cache.read(row, image)
                else:
                    path = self.annotations.path(row)
                    squish(read_image(path, self.max_pixels), image.shape[-1], out=image)
                return row
            except DataError as error:
                if not self.skip:
                    raise
                self.unreadable[row] = True
                bad = int(self.unreadable.sum())
                if bad > MAX_UNREADABLE * len(self):
                    raise DataError(
                        f"{bad} of {len(self):,} images cannot be read, more than 1 %; the last: "
                        f"{error}"
                    ) from None
                if not others:
                    random = np.random.default_rng([self.seed, epoch, wanted])
                    others = random.integers(len(self), size=100).tolist()
                row = others[attempt]
        raise AssertionError("a hundred images drawn at random, and not one of 99 % that is good")


def _as_is(batch: object) -> object:
    return batch


def _in_worker(worker: int) -> None:
    # Ctrl-C, `timeout` and batch schedulers signal every process of a group. The parent needs its
    # workers to end the step; they leave by themselves when it closes their queue or is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Where the model runs on the same cores, a worker in the way of one of its threads holds up all
    # of them at the next barrier: with one worker per core, steps took five times as long.
    if hasattr(os, "nice"):
        os.nice(19)
