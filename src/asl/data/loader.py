"""From annotations to batches: uint8 images and int8 targets, in an order that can be resumed."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from asl.data.annotations import Annotations
from asl.data.augment import apply, draw
from asl.data.images import read_image, squish
from asl.errors import DataError

# A sample is asked for by (epoch, index): with the seed, all that its augmentation depends on.
Key = tuple[int, int]


class Batches:
    """The batches of a data set, epoch by epoch.

    A batch is (B, 3, S, S) uint8 images, squished to `image_size`, and (B, C) int8 targets in
    {1, 0, -1}. With `shuffle` the order of an epoch depends on (`seed`, epoch) and the augmentation
    of an image on (`seed`, epoch, index) alone: neither on `workers`, nor on where the epoch is
    entered. The last batch may be smaller.
    """

    def __init__(
        self,
        annotations: Annotations,
        image_size: int,
        batch_size: int,
        *,
        augment: str = "none",
        shuffle: bool = False,
        seed: int = 0,
        workers: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self._order = _Order(len(annotations), batch_size, shuffle, seed)
        workers = min(default_workers() if workers is None else workers, self._order.steps)
        self._loader = DataLoader(
            _Samples(annotations, image_size, augment, seed),
            batch_sampler=self._order,
            collate_fn=_as_is,
            num_workers=workers,
            worker_init_fn=_in_worker,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            # The loader draws a base seed for its workers, which nothing here uses. Drawn from a
            # generator of its own, it leaves the global one alone: a resumed run draws once more.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return self._order.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, from number `start` on.

        Raises `DataError` where an image cannot be read.
        """
        self._order.epoch, self._order.start = epoch, start
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


def default_workers() -> int:
    """One worker per core that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 16)


class _Order(Sampler[list[Key]]):
    def __init__(self, size: int, batch_size: int, shuffle: bool, seed: int) -> None:
        self.size, self.batch_size, self.shuffle, self.seed = size, batch_size, shuffle, seed
        self.steps = -(-size // batch_size)
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, start = self.epoch, self.start
        order = np.arange(self.size)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        for first in range(start * self.batch_size, self.size, self.batch_size):
            yield [(epoch, int(index)) for index in order[first : first + self.batch_size]]


class _Samples(Dataset[tuple[Tensor, Tensor] | DataError]):
    def __init__(self, annotations: Annotations, image_size: int, augment: str, seed: int) -> None:
        self.annotations, self.image_size = annotations, image_size
        self.augment, self.seed = augment, seed

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, Tensor] | DataError:
        images = torch.empty(len(keys), 3, self.image_size, self.image_size, dtype=torch.uint8)
        targets = torch.empty(len(keys), self.annotations.num_classes, dtype=torch.int8)
        try:
            for slot, (epoch, index) in enumerate(keys):
                image = squish(read_image(self.annotations.path(index)), self.image_size)
                images[slot] = apply(image, draw(self.augment, self.seed, epoch, index))
                targets[slot] = torch.from_numpy(self.annotations.labels(index))
        except DataError as error:
            # Returned, not raised: an exception that crosses processes becomes a printed traceback.
            return error
        return images, targets


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
