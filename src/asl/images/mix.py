"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of whole batches, where the model is.

The mixing is timm's. An image is mixed with that on the other end of the batch, so both are of the
same rank: unlike all else, what is mixed depends on the number of processes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor

from asl.distributed import rank
from asl.images.settings import AugmentSettings

# Mixes (B, 3, S, S) images in place and (B, C) targets: those of a batch, by epoch and number.
Mixing = Callable[[Tensor, Tensor, int, int], Tensor]


def mixing(settings: AugmentSettings, seed: int) -> Mixing | None:
    """What mixes the batches of a training; None where the settings ask for nothing.

    The images are mixed in place. The targets that come back are soft, float32 in [0, 1], and -1
    where a cell is not annotated in either of the two images. What is drawn depends on (`seed`,
    epoch, number of the batch, rank) alone. Nothing waits for the device.

    An odd last image stays as it is, and so do images without a target.
    """
    if not (settings.mixup or settings.cutmix):
        return None

    def mix(images: Tensor, targets: Tensor, epoch: int, number: int) -> Tensor:
        pairs = len(targets) // 2 * 2
        classes = targets.shape[1]
        # Beside the targets it is mixed who is annotated: both are where the mixture is 1.
        annotated = (targets >= 0).to(torch.float32)
        cells = torch.cat((targets.to(torch.float32).clamp(min=0), annotated), 1)
        mixer: Any = Mixup(  # type: ignore[no-untyped-call]
            settings.mixup,
            settings.cutmix,
            prob=settings.mixup_prob,
            label_smoothing=0.0,
            num_classes=2 * classes,
            multi_label=True,
        )
        if pairs:
            with _numpy_seeded(seed, epoch, number, rank()):
                _, mixed = mixer(images[:pairs], cells[:pairs])
            cells = torch.cat((mixed, cells[pairs:]))
        return cells[:, :classes].masked_fill(cells[:, classes:] < 1 - 1e-6, -1)

    return mix


@contextmanager
def _numpy_seeded(*key: int) -> Iterator[None]:
    """timm draws from NumPy's global generator: inside the block it is one of this key."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(np.random.SeedSequence(key).generate_state(4))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
