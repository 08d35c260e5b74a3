"""Heads: the layers at the end of a model that map pooled features to logits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from asl.errors import UsageError


class BottleneckHead(nn.Module):
    """The official Open Images head: features -> 512 -> classes, both linear, nothing in between.

    With thousands of classes it has a fraction of the weights of a linear head. The names of its
    tensors are those of the official code.
    """

    def __init__(self, in_features: int, num_classes: int, width: int = 512) -> None:
        super().__init__()
        self.embedding_generator = nn.Sequential(nn.Linear(in_features, width))
        self.FC = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Map pooled features (B, F) to logits (B, C)."""
        logits: Tensor = self.FC(self.embedding_generator(features))
        return logits


def head_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a timm model's heads: one for most, two for a distilled transformer."""
    config: Any = model.pretrained_cfg
    names = config.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def set_bottleneck_head(model: nn.Module, num_classes: int) -> None:
    """Put a `BottleneckHead` in the place of the model's linear head.

    Raises `UsageError` for a model that does not end in one linear layer.
    """
    names = head_names(model)
    linear = model.get_submodule(names[0]) if len(names) == 1 else None
    if not isinstance(linear, nn.Linear):
        config: Any = model.pretrained_cfg
        raise UsageError(
            f"{config['architecture']} does not end in a linear layer: it has no bottleneck head"
        )
    model.set_submodule(names[0], BottleneckHead(linear.in_features, num_classes))


def init_heads(model: nn.Module) -> None:
    """Draw the weights of the heads from N(0, 0.01), biases 0, as the official TResNet code does.

    Some of timm's heads begin ten times as large (EfficientNet). Under a loss that is summed over
    classes, the first steps then undo what the backbone has learned (VOC 2007 at 160 px: 59 mAP,
    not 76).
    """
    for name in head_names(model):
        for layer in model.get_submodule(name).modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def describe_head(shapes: Mapping[str, torch.Size]) -> str:
    """Kind and number of classes of the head that has tensors of these names and shapes."""
    kind = "bottleneck" if any(".FC." in name for name in shapes) else "linear"
    classes = [shape[0] for name, shape in shapes.items() if ".embedding_generator." not in name]
    return f"{classes[0]:,} classes ({kind})" if classes else "no classes"
