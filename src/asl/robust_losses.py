"""Hill and SPLC (arXiv 2112.07368): losses of others for labels of which positives are missing.

In such sets some 0 are present: nobody wrote them down. Both losses trust a negative the less, the
surer the model is that it is none. Targets are 1 or 0; a cell that is marked as not annotated, -1,
costs nothing and has no gradient. Half precision logits are computed in float32, and a target out
of range is met as `asl.losses` says. No gradient is stopped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asl.losses import (
    Reduction,
    _check_logits,
    _check_options,
    _or_nan,
    _reduce,
    asymmetric_loss,
)


def hill_loss(
    logits: Tensor,
    targets: Tensor,
    lamb: float = 1.5,
    margin: float = 1.0,
    gamma: float = 2.0,
    reduction: Reduction = "sum",
) -> Tensor:
    """Hill loss of multi-label logits (arXiv 2112.07368 and its official code).

    A positive costs -(1 - s) ** gamma log s with s = sigmoid(logit - margin), the focal loss of a
    logit that was made smaller. A negative costs (lamb - p) p ** 2 with p = sigmoid(logit): its
    gradient rises with p, and falls again before p is 1.

    Args:
        logits: (N, C), before the sigmoid.
        targets: (N, C) in {1, 0}, or -1 for cells that are left out.
        lamb: The paper's lambda. With 1.5 the gradient of a certain negative is 0.
        margin: Taken from the logits of the positives.
        gamma: Focusing of the positives.
        reduction: As in `asl.losses.asymmetric_loss`; left-out cells count in a mean.

    Returns:
        A scalar; (N, C) for reduction "none".

    Raises:
        ValueError: For an option or shape that makes no sense; on the CPU for another target.
    """
    _check_options(reduction, lamb=lamb, margin=margin, gamma=gamma)
    logits = _check_logits(logits, targets)
    one = _or_nan(1.0, targets, -1, 1, hard=True)
    present, p = targets == 1, logits.sigmoid()
    positives = _focal_loss(logits - margin, present, gamma)
    loss = torch.where(present, positives, (lamb - p) * p**2)
    return _reduce(loss.masked_fill(targets == -1, 0), reduction) * one


def splc_loss(
    logits: Tensor,
    targets: Tensor,
    epoch: int,
    tau: float = 0.6,
    change_epoch: int = 1,
    margin: float = 1.0,
    gamma: float = 2.0,
    reduction: Reduction = "sum",
) -> Tensor:
    """Self-paced loss correction of multi-label logits (arXiv 2112.07368).

    The focal loss, after two changes (official code): the logits of the positives lose `margin`,
    and from `change_epoch` on a negative whose score is above `tau` is taken for a positive.

    Args:
        logits: (N, C), before the sigmoid.
        targets: (N, C) in {1, 0}, or -1 for cells that are left out: they stay so.
        epoch: Number of the epoch, from 0.
        tau: Score above which a negative is believed to be a label that is missing.
        change_epoch: First epoch in which that is done: the model has to know something by then.
        margin: Taken from the logits of the positives that are in the targets.
        gamma: Focusing of positives and negatives.
        reduction: As in `asl.losses.asymmetric_loss`; left-out cells count in a mean.

    Returns:
        A scalar >= 0; (N, C) for reduction "none".

    Raises:
        ValueError: For an option or shape that makes no sense; on the CPU for another target.
    """
    _check_options(reduction, tau=tau, margin=margin, gamma=gamma)
    logits = _check_logits(logits, targets)
    one = _or_nan(1.0, targets, -1, 1, hard=True)
    present = targets == 1
    logits = torch.where(present, logits - margin, logits)
    if epoch >= change_epoch:
        present = present | (logits.sigmoid() > tau)
    loss = _focal_loss(logits, present, gamma)
    return _reduce(loss.masked_fill(targets == -1, 0), reduction) * one


def _focal_loss(logits: Tensor, present: Tensor, gamma: float) -> Tensor:
    """Per cell, with the gradient of the focusing weight."""
    return asymmetric_loss(
        logits,
        present,
        gamma,
        gamma,
        clip=0,
        disable_torch_grad_focal_loss=False,
        reduction="none",
    )


class Hill(nn.Module):
    """`hill_loss` as a module, with the official signature."""

    def __init__(
        self,
        lamb: float = 1.5,
        margin: float = 1.0,
        gamma: float = 2.0,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        _check_options(reduction, lamb=lamb, margin=margin, gamma=gamma)
        self.lamb = lamb
        self.margin = margin
        self.gamma = gamma
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `hill_loss`."""
        return hill_loss(logits, targets, self.lamb, self.margin, self.gamma, self.reduction)


class SPLC(nn.Module):
    """`splc_loss` as a module, with the official signature."""

    def __init__(
        self,
        tau: float = 0.6,
        change_epoch: int = 1,
        margin: float = 1.0,
        gamma: float = 2.0,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        _check_options(reduction, tau=tau, margin=margin, gamma=gamma)
        self.tau = tau
        self.change_epoch = change_epoch
        self.margin = margin
        self.gamma = gamma
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor, epoch: int) -> Tensor:
        """See `splc_loss`."""
        options = self.tau, self.change_epoch, self.margin, self.gamma
        return splc_loss(logits, targets, epoch, *options, self.reduction)
