"""Features in the place of images: batches for a head whose backbone gives the same every time."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from asl.data.annotations import Annotations
from asl.images.loader import CPU, Batch, Batches, RankSampler


class FeatureBatches:
    """What `Batches` is, for the (N, F) float32 `features` of a data set's images, on the host.

    The batches of an epoch, and a rank's share of them, are of the same images in the same order.
    """

    def __init__(
        self,
        annotations: Annotations,
        features: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        window: int = 0,
        device: torch.device = CPU,
    ) -> None:
        self._sampler = RankSampler(len(annotations), batch_size, shuffle, seed, window)
        self.features, self._pin_memory = features, device.type == "cuda"
        self.annotations = annotations
        self.batch_size, self.batch_size_per_rank = batch_size, self._sampler.per_rank
        self.waited = 0.0  # it is all there

    def __len__(self) -> int:
        return self._sampler.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from number `start` on."""
        self._sampler.set_epoch(epoch, start)
        for share in self._sampler:
            labels = [self.annotations.labels(row) for row in share.indices.tolist()]
            features, targets = self.features[share.indices], torch.from_numpy(np.stack(labels))
            if self._pin_memory:
                features, targets = features.pin_memory(), targets.pin_memory()
            yield Batch(features, targets[: share.num_targets])


AnyBatches = Batches | FeatureBatches
