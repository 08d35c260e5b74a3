"""The prior of CSL that training estimates on the way: `asl.data.prior` says what a prior is."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from asl.distributed import summed


class RunningPrior(nn.Module):
    """Mean score by class over all training steps so far, as the official code keeps it.

    It costs nothing, but its scores are those that training saw: of augmented images, of the
    weights at the time, and from the first step on. The mean over the training set after training
    is closer to the class frequencies. The state (a buffer) is the same on all ranks.
    """

    totals: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("totals", torch.zeros(num_classes + 1))

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Add the (B, C) logits of a step, of all ranks. Does not wait for the device."""
        # A last column of ones counts the images: one reduction sums scores and counts.
        self.totals += summed(pad(logits.float().sigmoid(), (0, 1), value=1.0).sum(dim=0))

    @property
    def prior(self) -> Tensor:
        """(C,) in [0, 1], float32; NaN before the first step."""
        return self.totals[:-1] / self.totals[-1]
