"""The names of torch and torchvision that this project uses although they are not public.

All uses are here, so that a release which moves one of them is met in one place. Tried with torch
2.14.1 and torchvision 0.29.1.
"""

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode  # also registers the operators of torch.ops.image


def decode_jpeg(content: bytes) -> Tensor:
    """A JPEG as a (3, H, W) uint8 RGB tensor; raises `RuntimeError` where it cannot be decoded.

    This is the operator behind `torchvision.io.decode_jpeg`. The public function warns at every
    call since 0.29 that decoding will move to another package.
    """
    # A copy, because torch warns of memory that it may not write to.
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    image: Tensor = torch.ops.image.decode_jpeg(data, ImageReadMode.RGB.value, False)
    return image


def shared_memory(size: int, dtype: torch.dtype) -> Tensor:
    """A (`size`,) tensor that worker processes share; its pages are taken when they are touched.

    The public `Tensor.share_memory_` copies a tensor, and so touches all of them.
    """
    count = size * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(count, device="cpu")  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=dtype).set_(storage)


def shut_down_workers(loader: DataLoader[Any], owner: int) -> None:
    """End the persistent workers of a loader, also while something still iterates over it.

    A process forked from the `owner` of the workers has a copy of the loader: there this only keeps
    torch from trying to end them when the copy is collected, which prints an AssertionError.
    """
    iterator: Any = loader._iterator
    if iterator is not None:
        if os.getpid() == owner:
            iterator._shutdown_workers()
        iterator._shutdown = True
