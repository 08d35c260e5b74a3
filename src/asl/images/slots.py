"""The memory that workers fill with batches: allocated once, and used over and over."""

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asl.errors import UsageError
from asl.images.torch_private import shared_memory

SHARED_MEMORY = Path("/dev/shm")


class Slots:
    """Memory for `count` batches of up to `batch_size` images, which steps use in turn.

    If every batch came in memory of its own, both processes would have to map that page by page,
    which at 448 px takes several times as long as to read the images from a cache.

    `planar` keeps the channels of an image apart, which warps and look-ups want; else they lie
    together, as decoders and models want them. `shared` memory is shared with worker processes;
    raises `UsageError` if the system has less of it. `shared_bytes` is how much that is.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        image_size: int,
        num_classes: int,
        *,
        targets: torch.dtype = torch.int8,
        planar: bool,
        shared: bool,
    ) -> None:
        shape = (3, image_size, image_size) if planar else (image_size, image_size, 3)
        shapes = (count, batch_size, *shape), (count, batch_size, num_classes)
        sizes = [int(np.prod(shapes[0])), int(np.prod(shapes[1])) * targets.itemsize]
        self.shared_bytes = sum(sizes) if shared else 0
        _check_shared_memory(self.shared_bytes)
        self.images = _memory(torch.uint8, shapes[0], shared)
        if not planar:
            self.images = self.images.permute(0, 1, 4, 2, 3)
        self.targets = _memory(targets, shapes[1], shared)

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """The images and targets of a step, of `size` samples: views that a later step overwrites.

        (size, 3, S, S) uint8 and (size, C) of the type of `targets`.
        """
        slot = step % len(self.images)
        return self.images[slot, :size], self.targets[slot, :size]


def free_shared_memory() -> int | None:
    """How many bytes of shared memory nobody has touched; None where the system does not tell."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None


def _check_shared_memory(size: int) -> None:
    # It is taken when it is touched: a worker would be killed in the middle of an epoch.
    free = free_shared_memory()
    if free is not None and size > free:
        raise UsageError(
            f"the loader needs {size / 1e6:,.0f} MB of shared memory and {SHARED_MEMORY} has "
            f"{free / 1e6:,.0f}: fewer --workers, a smaller --batch-size, or for a container a "
            f"larger --shm-size"
        )


def _memory(dtype: torch.dtype, shape: tuple[int, ...], shared: bool) -> Tensor:
    if shared:
        return shared_memory(int(np.prod(shape)), dtype).view(shape)
    return torch.empty(shape, dtype=dtype)
