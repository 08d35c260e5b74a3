"""Losses of others, as a step takes them: sums over the images of targets in {1, 0, -1}.

Cells that are not annotated, -1, cost nothing and have no gradient. All compute in float32.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from asl.data.annotations import ABSENT, PRESENT, UNANNOTATED
from asl.losses import ASLSingleLabel

# The logit of a cell that does not count: exp(-1e4) is 0, and finite numbers have gradients.
NOWHERE = -1e4


class OfTimm(nn.Module):
    """A multi-label loss of timm for targets that may be -1, which timm's know nothing of.

    A cell that is not annotated becomes an absent one with a logit of -1e4. It then costs 0 in each
    of them, exactly, and its weight in the sums of ZLPR is 0. `averages` says that the loss is a
    mean over the images: it is made a sum.
    """

    def __init__(self, loss: nn.Module, averages: bool = False) -> None:
        super().__init__()
        self.loss = loss
        self.averages = averages

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of (N, C) logits and targets, N may be 0: 0-d, float32."""
        if not len(targets):  # a rank may have none, and their mean would be NaN
            return logits.float().sum()
        logits = logits.masked_fill(targets == UNANNOTATED, NOWHERE)
        loss: Tensor = self.loss(logits, targets.clamp(min=ABSENT))
        return loss * len(targets) if self.averages else loss


class TwoWayLoss(nn.Module):
    """Two-way multi-label loss (Kobayashi, CVPR 2023), times the number of images.

    Where an image has positives, their soft minimum is set against the soft maximum of its other
    classes; where a class has positives in the batch, against its other images. Each costs
    softplus(maximum - minimum), and the means over such images and over such classes are added.

    The second mean is none over images: batches and ranks do not add up to a larger batch. The
    values are those of timm's class of that name, which waits for the device in every step.

    Args:
        tp: Temperature of the minimum.
        tn: Temperature of the maximum.
    """

    def __init__(self, tp: float = 4.0, tn: float = 1.0) -> None:
        super().__init__()
        self.tp = tp
        self.tn = tn

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of (N, C) logits and targets: 0-d, float32."""
        logits, present = logits.float(), targets == PRESENT
        positives = (-logits / self.tp).masked_fill(~present, NOWHERE)
        negatives = (logits / self.tn).masked_fill(targets != ABSENT, NOWHERE)
        loss = torch.zeros((), device=logits.device)
        for direction in (0, 1):
            maximum = self.tn * negatives.logsumexp(direction)
            minimum = -self.tp * positives.logsumexp(direction)
            counts = present.any(direction)
            costs = softplus(maximum - minimum) * counts
            loss = loss + costs.sum() / counts.sum().clamp(min=1)
        return loss * len(targets)


class OneLabelLoss(nn.Module):
    """`ASLSingleLabel`, summed, of targets (N, C) that have one 1 in each row."""

    def __init__(self, gamma_pos: float, gamma_neg: float) -> None:
        super().__init__()
        self.loss = ASLSingleLabel(gamma_pos, gamma_neg, reduction="sum")

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of (N, C) logits and targets: 0-d, float32."""
        loss: Tensor = self.loss(logits, targets.argmax(dim=1))
        return loss
