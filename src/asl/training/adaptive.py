"""Adaptive asymmetry (ASL, arXiv 2009.14119, section 2.7): gamma_neg set by the training itself."""

import torch
from torch import Tensor, nn

from asl.distributed import summed
from asl.losses import AsymmetricLoss, PartialSelectiveLoss


class AdaptiveAsymmetry(nn.Module):
    """A loss whose gamma_neg follows the probability gap between positives and negatives.

    In place of a gamma_neg one chooses the gap that training should end up with, and after every
    step in training mode

        gap       = mean of p over the positives - mean of 1 - p over the negatives
        gamma_neg = max(0, gamma_neg + step * (target - gap))

    From the paper: the gap, that gamma_neg moves after each batch by a step size lambda, and the
    direction (a gap below the target raises gamma_neg, and with it the weight of the positives). It
    reports that the gap meets targets of 0.1 and 0.2 after a tenth of the training, with gamma_pos
    0 and a margin of 0.05.

    Our reading, as no implementation was ever published: the move is proportional to what is
    missing; p is the score before the margin; the batch is that of all ranks together; gamma_neg
    stays at least 0 (and has no upper bound: a target that cannot be met lets it grow); a batch
    without positives or without negatives moves nothing; cells that are neither, not annotated or
    soft, do not count.

    gamma_neg and the gap live on the device, as buffers: no step waits for it, and the state dict
    has them.

    Args:
        loss: The loss to steer; its gamma_neg is where it starts.
        target: The paper's target of the gap, in (-1, 1).
        step: The paper's lambda, above 0.

    Raises:
        ValueError: For a target or step out of range.
    """

    gamma_neg: Tensor
    gap: Tensor

    def __init__(
        self, loss: AsymmetricLoss | PartialSelectiveLoss, target: float, step: float
    ) -> None:
        super().__init__()
        if not -1 < target < 1:
            raise ValueError(f"the target of the gap must be above -1 and below 1, got {target}")
        if not step > 0:
            raise ValueError(f"step must be above 0, got {step}")
        self.loss: nn.Module = loss
        self.target = target
        self.step = step
        self.register_buffer("gamma_neg", torch.tensor(float(loss.gamma_neg)))
        # Of the last batch that had both; NaN before the first.
        self.register_buffer("gap", torch.tensor(torch.nan))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of (N, C) logits and targets, by the gamma_neg that earlier steps led to."""
        self.loss.gamma_neg = self.gamma_neg
        loss: Tensor = self.loss(logits, targets)
        if self.training:
            self._adapt(logits, targets)
        return loss

    @torch.no_grad()
    def _adapt(self, logits: Tensor, targets: Tensor) -> None:
        p = logits.float().sigmoid()
        present, absent = (targets == 1).float(), (targets == 0).float()
        sums = summed(
            torch.stack(
                [(p * present).sum(), present.sum(), ((1 - p) * absent).sum(), absent.sum()]
            )
        )
        gap = sums[0] / sums[1] - sums[2] / sums[3]
        moved = (self.gamma_neg + self.step * (self.target - gap)).clamp(min=0)
        # A batch without positives or without negatives has the gap 0 / 0. The buffers get new
        # tensors: the backward pass of this step may need the old ones.
        self.gamma_neg = torch.where(gap.isnan(), self.gamma_neg, moved)
        self.gap = torch.where(gap.isnan(), self.gap, gap)
