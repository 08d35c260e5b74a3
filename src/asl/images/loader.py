"""From annotations to batches: uint8 images and their targets, in an order that can be resumed."""

import atexit
import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet, finalize

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from asl.data.annotations import Annotations
from asl.distributed import rank, world_size
from asl.errors import DataError
from asl.images.augment import apply, draw
from asl.images.cache import ImageCache
from asl.images.decode import read_squished
from asl.images.settings import AugmentSettings, ImageSettings, Policy
from asl.images.slots import Slots
from asl.images.torch_private import shut_down_workers

MAX_UNREADABLE = 0.01  # share of the images that may be replaced before that is an error
CPU = torch.device("cpu")
BLOCK = 64  # neighbours that are read together: 4 MB of JPEGs at 448 px, 39 MB of pixels
PREFETCH = 2  # batches that each worker makes ahead
log = logging.getLogger("asl")


class Batch(NamedTuple):
    """What a step takes: (B, 3, S, S) uint8 images and (B', C) targets, those of `labels`.

    In place of images there may be (B, F) float32 features of them: see `features.FeatureBatches`.

    B' is B, but for a rank that the last batch has too few images for: that rank gets an image
    without a target, because all ranks must take every step together. Such an image does not count.
    `augmentation` (B, 3, 7) is what `prepare.preparation` has yet to do to the images.
    """

    images: Tensor
    targets: Tensor
    augmentation: npt.NDArray[np.float32] | None = None


class Batches:
    """The batches of a data set, epoch by epoch, or this rank's share of them.

    With `augment` it is a training set; without, images are not augmented, and one that cannot be
    read is an error. With `shuffle` the order of an epoch depends on (`seed`, epoch) and the
    augmentation of an image on (`seed`, epoch, index) alone: neither on the number of workers nor
    on where the epoch is entered. `on_device` leaves augmentation to `prepare.preparation`.

    With `augment.shuffle` blocks:N, that order is the one of `shuffled`, and each rank tells the
    system in time which images of the cache it will need, in the order in which they lie there.

    `batch_size` is that of all ranks together, `batch_size_per_rank` a rank's part of it, rounded
    up, and the largest that it makes. All ranks make `len(self)` batches. Shuffled batches are
    those of one process, split between the ranks. Otherwise the data set is cut into batches of
    `batch_size_per_rank`, and rank r of n makes number r, n + r, 2 n + r, ... of them.

    The last batch may be smaller. In a shuffled epoch it is left out where a rank would get fewer
    than two images of it, which batch normalisation cannot use, if full batches give every rank two
    or more: that is a rest of 1 image on one rank, and of up to 15 on eight.

    Workers fill shared memory of 2 `workers` + 1 batches over and over. What comes out is a copy on
    the host. `device` is where the model is: a CUDA device can fetch it while the host goes on.

    With `augment.bad_images` "skip", an image that cannot be read is replaced by another, drawn by
    (`seed`, epoch, index), and named in a warning when the epoch ends.

    Raises `UsageError` if there is too little shared memory, and what `ImageCache.open` does.
    """

    def __init__(
        self,
        annotations: Annotations,
        settings: ImageSettings,
        *,
        augment: AugmentSettings | None = None,
        on_device: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device = CPU,
    ) -> None:
        policy: Policy = augment.augment if augment else "none"
        bad_images = augment.bad_images if augment else "error"
        workers = default_workers() if settings.workers is None else settings.workers
        cache = None
        if settings.cache_dir:
            cache = ImageCache.open(annotations, settings, workers=workers, bad=bad_images)
        window = augment.shuffle_window if augment else 0
        if cache is not None and shuffle and not window:
            _say_if_larger_than_memory(cache)
        self._sampler = RankSampler(len(annotations), settings.batch_size, shuffle, seed, window)
        workers = min(workers, self._sampler.steps)
        self._slots = Slots(
            # A worker is given its next batch when one comes, which has yet to be copied.
            min(workers * PREFETCH + 1, self._sampler.steps),
            min(self._sampler.per_rank, len(annotations)),
            settings.image_size,
            annotations.num_classes,
            targets=torch.float32 if annotations.soft else torch.int8,
            # To part the channels is a fifth of the work of reading.
            planar=policy != "none" or (cache is not None and cache.planar),
            shared=workers > 0,
        )
        self._filler = _SlotFiller(
            annotations,
            settings,
            self._slots,
            seed,
            policy="none" if on_device else policy,
            cache=cache,
            skip=bad_images == "skip",
        )
        self._loader = _loader(self._filler, self._sampler, workers, nice=device.type == "cpu")
        self.annotations = annotations
        self.batch_size, self.batch_size_per_rank = settings.batch_size, self._sampler.per_rank
        self.waited = 0.0
        self._device_policy, self._pin_memory = policy if on_device else None, device.type == "cuda"
        self._unreadable_reported = 0
        _alive.add(self)
        # When Python collects a cycle it closes the queues of a loader before torch can tell the
        # workers to end, and then waits for them for ever at exit.
        finalize(self, shut_down_workers, self._loader, os.getpid()).atexit = False

    def __len__(self) -> int:
        return self._sampler.steps

    @property
    def shared_bytes(self) -> int:
        """The memory that is shared with the workers of this process, once they have filled it."""
        return self._slots.shared_bytes

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from number `start` on; adds the seconds for them to `waited`.

        Raises `DataError` where an image cannot be read, or with `bad_images` "skip" more than
        `MAX_UNREADABLE` of them.
        """
        self._sampler.set_epoch(epoch, start)
        asked = None  # the first batch is not counted: it comes when the workers have started
        for share, error in self._loader:
            self.waited += time.perf_counter() - asked if asked else 0.0
            if error is not None:
                raise error
            images, targets = map(self._copy, self._slots.batch(share.step, len(share.indices)))
            augmentation = None
            if self._device_policy is not None:
                augmentation = draw(self._device_policy, self._filler.seed, epoch, share.indices)
            yield Batch(images, targets[: share.num_targets], augmentation)
            asked = time.perf_counter()
        self._report_unreadable()

    def _copy(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, pin_memory=self._pin_memory).copy_(tensor)

    def _report_unreadable(self) -> None:
        rows = self._filler.unreadable.nonzero().flatten().tolist()
        if len(rows) > self._unreadable_reported:
            names = ", ".join(str(self.annotations.path(row)) for row in rows[:5])
            dots = ", ..." if len(rows) > 5 else ""
            log.warning("%d images cannot be read and were replaced: %s%s", len(rows), names, dots)
        self._unreadable_reported = len(rows)


def _loader(
    filler: "_SlotFiller", sampler: "RankSampler", workers: int, nice: bool
) -> DataLoader[Any]:
    return DataLoader(
        filler,
        sampler=sampler,
        batch_size=None,  # a sample of this loader is a batch
        collate_fn=_as_is,
        num_workers=workers,
        worker_init_fn=partial(_in_worker, nice),
        prefetch_factor=PREFETCH if workers else None,
        persistent_workers=workers > 0,
        # The loader draws a base seed for its workers, which nothing here uses. Drawn from a
        # generator of its own, it leaves the global one alone: a resumed run draws once more.
        generator=torch.Generator(),
    )


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
        shut_down_workers(batches._loader, os.getpid())


class RankBatch(NamedTuple):
    """The samples of one rank in one step: with the seed, all that its batch depends on."""

    epoch: int
    step: int
    indices: npt.NDArray[np.int64]
    num_targets: int  # 0 where the only image keeps this rank in step; else one for each image
    ahead: npt.NDArray[np.int64]  # what later steps need, and the disk may read by then


class RankSampler(Sampler[RankBatch]):
    """Which samples make this rank's batches of an epoch; `Batches` says how ranks share them."""

    def __init__(
        self, size: int, batch_size: int, shuffle: bool, seed: int, window: int = 0
    ) -> None:
        self.size, self.batch_size, self.shuffle, self.seed = size, batch_size, shuffle, seed
        self.window = window
        ranks = world_size()
        self.per_rank = -(-batch_size // ranks)
        together = batch_size if shuffle else self.per_rank * ranks
        self.steps, rest = divmod(size, together)
        if shuffle and 0 < rest < 2 * ranks <= batch_size and self.steps:
            log.warning(
                "each epoch leaves out %d of %d images, drawn anew: some process would get fewer "
                "than two of a last batch so small, and batch normalisation needs two",
                rest,
                size,
            )
        elif rest:
            self.steps += 1
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose what the next iteration gives: the batches of `epoch` from number `start` on."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[RankBatch]:
        epoch, order, ranks = self.epoch, np.arange(self.size), world_size()
        if self.shuffle:
            order = shuffled(self.size, self.seed, epoch, self.window)
        for step in range(self.start, self.steps):
            if self.shuffle:
                batch = order[step * self.batch_size : (step + 1) * self.batch_size]
                indices = batch[rank() :: ranks]
            else:
                first = (step * ranks + rank()) * self.per_rank
                indices = order[first : first + self.per_rank]
            ahead = self._ahead(order, step)
            num_targets = len(indices)
            yield RankBatch(epoch, step, indices if num_targets else order[:1], num_targets, ahead)

    def _ahead(self, order: npt.NDArray[np.int64], step: int) -> npt.NDArray[np.int64]:
        """This step's share of what this rank needs in the next window, in the order of the disk.

        A window is counted in whole steps here: what is read early or late is of no consequence.
        """
        if not (self.window and self.shuffle):
            return order[:0]
        steps = max(1, self.window // self.batch_size)
        part = step % steps
        if part == 0 or step == self.start:
            first = (step - part + steps) * self.batch_size
            window = order[first : first + steps * self.batch_size]
            own = np.arange(len(window)) % self.batch_size % world_size() == rank()
            self._next = np.array_split(np.sort(window[own]), steps)
        return self._next[part]


def shuffled(size: int, seed: int, epoch: int, window: int = 0) -> npt.NDArray[np.int64]:
    """The numbers below `size` in the order of an epoch, which depends on these arguments alone.

    Any order is as likely as another. With a `window`, blocks of 64 neighbours come in any order,
    and then each `window` numbers of that are shuffled: an image meets those of `window` / 64
    random blocks, its neighbours more often than in a full shuffle, and every one once.
    """
    random = np.random.default_rng([seed, epoch])
    order = np.arange(size)
    if not window:
        random.shuffle(order)
        return order
    blocks = random.permutation(-(-size // BLOCK))
    order = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
    order = order[order < size]
    for start in range(0, size, window):
        random.shuffle(order[start : start + window])
    return order


@dataclass(eq=False)
class _SlotFiller(Dataset[tuple[RankBatch, DataError | None]]):
    """Reads the images and targets of a batch into its slot; the item is what was asked for."""

    annotations: Annotations
    settings: ImageSettings
    slots: Slots
    seed: int
    policy: Policy
    cache: ImageCache | None
    skip: bool

    def __post_init__(self) -> None:
        # Shared by the workers, which mark what they could not read.
        self.unreadable = torch.zeros(len(self.annotations), dtype=torch.bool)
        self.unreadable.share_memory_()  # type: ignore[no-untyped-call]

    def __getitem__(self, share: RankBatch) -> tuple[RankBatch, DataError | None]:
        if self.cache is not None:
            self.cache.read_ahead(share.ahead)
        images, targets = self.slots.batch(share.step, len(share.indices))
        raw = torch.empty(images.shape[1:], dtype=torch.uint8)
        augmentation = draw(self.policy, self.seed, share.epoch, share.indices)
        try:
            for image, target, index, transforms in zip(
                images, targets, share.indices.tolist(), augmentation, strict=True
            ):
                augmented = transforms.any()
                row = self._read(share.epoch, index, raw if augmented else image)
                target.copy_(torch.from_numpy(self.annotations.labels(row)))
                if augmented:
                    apply(raw, transforms, out=image)
        except DataError as error:
            # It is returned because an exception that crosses processes is printed as a traceback.
            return share, error
        return share, None

    def _read(self, epoch: int, index: int, image: Tensor) -> int:
        """Fill `image` with that of `index`, or of the row that replaces it; returns the row."""
        row, others = index, list[int]()
        for attempt in range(100):
            try:
                if self.cache is not None:
                    self.cache.read(row, image)
                else:
                    read_squished(self.annotations.path(row), self.settings, out=image)
                return row
            except DataError as error:
                if not self.skip:
                    raise
                self._count_unreadable(row, error)
                if not others:
                    random = np.random.default_rng([self.seed, epoch, index])
                    others = random.integers(len(self.annotations), size=100).tolist()
                row = others[attempt]
        raise AssertionError("a hundred images drawn at random, and not one of 99 % that is good")

    def _count_unreadable(self, row: int, error: DataError) -> None:
        self.unreadable[row] = True
        bad, size = int(self.unreadable.sum()), len(self.annotations)
        if bad > MAX_UNREADABLE * size:
            raise DataError(
                f"{bad} of {size:,} images cannot be read, more than 1 %; the last: {error}"
            ) from None


def _say_if_larger_than_memory(cache: ImageCache) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if cache.bytes > memory:
        window = max(BLOCK, memory * len(cache) // (4 * cache.bytes))  # two of them, and room
        print(
            f"the images of an epoch take {cache.bytes / 1e9:,.0f} GB, and the memory has "
            f"{memory / 1e9:,.0f}: --shuffle blocks:{window} reads them in an order that disks like"
        )


def _as_is(batch: object) -> object:
    return batch


def _in_worker(nice: bool, worker: int) -> None:
    # Ctrl-C, `timeout` and batch schedulers signal every process of a group. The parent needs its
    # workers to end the step; they leave by themselves when it closes their queue or is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Where the model runs on the same cores, a worker in the way of one of its threads holds up all
    # of them at the next barrier: with one worker per core, steps took five times as long. A GPU
    # waits for its workers, and they are not to give way to whatever else the machine does.
    if nice and hasattr(os, "nice"):
        os.nice(19)
