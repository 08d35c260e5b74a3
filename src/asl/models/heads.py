"""Heads: the layers at the end of a model that map pooled features to logits.

And models in two: a frozen backbone, what it gives to the head, and the head alone.
"""

from collections.abc import Mapping
from copy import deepcopy
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


def heads_of(model: nn.Module) -> list[nn.Module]:
    """A timm model's heads. Raises `UsageError` for one without."""
    names = head_names(model)
    if not names:
        raise UsageError(f"{type(model).__name__} has no head: timm does not name one")
    return [model.get_submodule(name) for name in names]


def freeze_backbone(model: nn.Module) -> None:
    """Leave a timm model's heads alone to be trained.

    The rest has no gradients, and is in eval mode: its running statistics stay as they are, and it
    drops nothing.
    """
    model.eval().requires_grad_(False)
    for head in heads_of(model):
        head.train().requires_grad_(True)


def without_head(model: nn.Module, image_size: int) -> nn.Module:
    """A copy of a timm model, in eval mode, that returns what its head is given: (B, F) features.

    Raises `UsageError` for a model that has two heads, whose head is given more than a vector, or
    that does something with its answers: an image is tried.
    """
    backbone, names = deepcopy(model).eval(), head_names(model)
    calls = list[tuple[Tensor, Tensor]]()
    head = heads_of(backbone)[0]
    head.register_forward_hook(lambda _, given, made: calls.append((given[0], made)))
    side = torch.linspace(-1, 1, image_size, device=next(model.parameters()).device)
    with torch.inference_mode():
        logits = backbone((side[:, None] * side).expand(1, 3, -1, -1))
    features, made = calls[0]
    if len(names) > 1 or features.ndim != 2 or not torch.equal(made, logits):
        raise UsageError(
            f"{type(model).__name__} is more than a backbone and a head of its pooled features: "
            "they cannot be cached"
        )
    backbone.set_submodule(names[0], nn.Identity())
    return backbone


def feature_width(model: nn.Module) -> int:
    """How many features, F, the head of a model maps to logits."""
    return next(heads_of(model)[0].parameters()).shape[1]


def take_features(model: nn.Module) -> None:
    """Let a model, in place, map (B, F) features of `without_head` to logits: by its head alone.

    It keeps all of its weights under their names.
    """
    # As in `layout.keep_channels_last`: with the class alone replaced, all else stays.
    kind = type(model)
    model.__class__ = type(f"{kind.__name__}OfFeatures", (_OfFeatures, kind), {})


class _OfFeatures(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = heads_of(self)[0](features)
        return logits


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
