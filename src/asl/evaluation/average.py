"""From logits to scores, and the mean of the scores of several models and views."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asl.models.build import Statistics


class Scores(nn.Module):
    """What a model says of images: (B, 3, S, S), prepared for it, to (B, C) scores in [0, 1].

    They are the sigmoid of its logits, or with `one_label` an image their softmax, in float32.
    """

    def __init__(self, model: nn.Module, one_label: bool = False) -> None:
        super().__init__()
        self.model, self.one_label = model, one_label

    def forward(self, images: Tensor) -> Tensor:
        """Map images to scores."""
        logits: Tensor = self.model(images).float()
        return logits.softmax(dim=1) if self.one_label else logits.sigmoid()


class MeanScores(nn.Module):
    """The mean of what several `Scores` say of the same images, with `flip` also of their mirror.

    It is made where the scores are, in float32. It costs as many forward passes as it averages.
    """

    def __init__(self, members: Sequence[nn.Module], flip: bool = False) -> None:
        super().__init__()
        self.members, self.flip = nn.ModuleList(members), flip

    def forward(self, images: Tensor) -> Tensor:
        """Map images, prepared for every member, to scores (B, C)."""
        views = (images, images.flip(-1)) if self.flip else (images,)
        scores = [member(view) for member in self.members for view in views]
        return torch.stack(scores).mean(dim=0)


class Renormalized(nn.Module):
    """A model made for images `of` this mean and deviation, which is `given` others."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: nn.Module, of: Statistics, given: Statistics, device: torch.device
    ) -> None:
        super().__init__()
        (mean, std), (given_mean, given_std) = (
            [torch.tensor(each, device=device).view(3, 1, 1) for each in statistics]
            for statistics in (of, given)
        )
        self.model = model
        self.register_buffer("scale", given_std / std)
        self.register_buffer("shift", (given_mean - mean) / std)

    def forward(self, images: Tensor) -> Tensor:
        """Map images that were `given` to logits."""
        logits: Tensor = self.model(self.renormalized(images))
        return logits

    def renormalized(self, images: Tensor) -> Tensor:
        """Images that were `given`, as the model takes them."""
        return images * self.scale + self.shift
