"""Heads: the layers at the end of a model that map features to logits.

And models in two: a frozen backbone, what it gives to the head, and the head alone.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from asl.errors import UsageError
from asl.models.ml_decoder import MLDecoder


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
    """The names of a model's heads: one for most, two for timm's distilled transformers."""
    decoders = [name for name, part in model.named_modules() if isinstance(part, MLDecoder)]
    names = decoders or _config(model).get("classifier") or ()
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
    drops nothing. What is fixed in a head, as the queries of an ML-Decoder are, stays so.
    """
    heads = heads_of(model)
    trained = [tensor for head in heads for tensor in head.parameters() if tensor.requires_grad]
    model.eval().requires_grad_(False)
    for head in heads:
        head.train()
    for tensor in trained:
        tensor.requires_grad_(True)


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
    if features.ndim != 2 or not torch.equal(made, logits):
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
    # As in `layout.keep_channels_last`: with the class alone replaced, all else stays. The name of
    # the head is looked up here, as that looks at every layer, and a step takes a millisecond.
    kind, name = type(model), {"head_name": head_names(model)[0]}
    model.__class__ = type(f"{kind.__name__}OfFeatures", (_OfFeatures, kind), name)


class _OfFeatures(nn.Module):
    head_name: str

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.get_submodule(self.head_name)(features)
        return logits


def set_bottleneck_head(model: nn.Module, num_classes: int) -> None:
    """Put a `BottleneckHead` in the place of the model's linear head.

    Raises `UsageError` for a model that does not end in one linear layer.
    """
    names = head_names(model)
    linear = model.get_submodule(names[0]) if len(names) == 1 else None
    if not isinstance(linear, nn.Linear):
        raise UsageError(
            f"{_config(model)['architecture']} does not end in a linear layer: "
            "it has no bottleneck head"
        )
    model.set_submodule(names[0], BottleneckHead(linear.in_features, num_classes))


def set_ml_decoder_head(model: nn.Module, num_classes: int, image_size: int | None) -> None:
    """Put an `MLDecoder` in the place of the model's pooling and of its head.

    It gets the whole last map, or all tokens. Class and register tokens are among them: the class
    token is what most pretrained transformers were trained by, and a query need not look at it.
    What a model has between pooling and head, as MobileNets have a convolution, stays where timm
    can apply it to each pixel.

    `image_size` is one that the model takes, or None for timm's own. Raises `UsageError` for a
    model that has several heads, whose features are neither a map nor tokens, or that changes what
    its head returns.
    """
    names, timm_model = head_names(model), _timm(model)
    refusal = f"{_config(model)['architecture']} can have no ML-Decoder head"
    if len(names) != 1:
        raise UsageError(f"{refusal}: it has {len(names) or 'no'} linear heads, not one")
    witness = _Witness(num_classes)
    try:
        place, width = _unpool(model, names[0])
        model.set_submodule(place, witness)
        _run_without_values(model, image_size or _config(model)["input_size"][-1])
    except Exception as error:  # timm's families fail in many ways
        raise UsageError(f"{refusal}: {str(error).partition(chr(10))[0]}") from error
    seen, channels_last = witness.seen, witness.seen[-1] == width
    is_map = len(seen) == 4 and width in (seen[1], seen[3])
    if not (is_map or (len(seen) == 3 and channels_last)):
        raise UsageError(f"{refusal}: of two images it gives it {[*seen]}, no map and no tokens")
    model.set_submodule(place, MLDecoder(width, num_classes, channels_last=channels_last))
    timm_model.num_classes = num_classes


class _Witness(nn.Module):
    """Stands where a head will, and has `seen` the shape of its features."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes, self.seen = num_classes, torch.Size([0])

    def forward(self, features: Tensor) -> Tensor:
        self.seen = features.shape
        return features.new_zeros(len(features), self.num_classes)


def _unpool(model: nn.Module, head: str) -> tuple[str, int]:
    """Take a model's pooling and head away: where a new head goes, and the width of its input."""
    timm_model = _timm(model)
    width: int = timm_model.head_hidden_size
    try:
        timm_model.reset_classifier(0, "")
    except AssertionError:  # "Cannot disable pooling": it goes with all that comes after it
        place, width = head.partition(".")[0], timm_model.num_features
        model.set_submodule(place, nn.Identity())
        return place, width
    # Some heads of several layers are one Identity now.
    left = {name for name, _ in model.named_modules()}
    while head not in left:
        head = head.rpartition(".")[0]
    return head, width


def _run_without_values(model: nn.Module, image_size: int) -> None:
    """Give the model two images that have a shape alone: nothing is computed, or changed in it."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    functional_call(model, shapes, images)


def init_heads(model: nn.Module) -> None:
    """Draw the weights of linear heads from N(0, 0.01), biases 0, as the official code does.

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


def with_timm_names(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors, with those of an ML-Decoder under the name that the model's head has.

    The official code puts the decoder in the place of pooling and head together (`head`), timm's
    TResNet has the two apart (`head.fc` is the head).
    """
    renamed = dict(state)
    for head in head_names(model):
        outer = head.partition(".")[0]
        for name in state:
            if name.startswith(f"{outer}.decoder."):
                renamed[head + name.removeprefix(outer)] = renamed.pop(name)
    return renamed


def describe_head(shapes: Mapping[str, torch.Size]) -> str:
    """Kind and number of classes of the head that has tensors of these names and shapes."""
    for name, shape in shapes.items():
        if name.endswith(".decoder.duplicate_pooling"):
            classes = shapes.get(f"{name}_bias", (0,))[0]
            return f"{classes:,} classes (ml_decoder, {shape[0]} queries)"
    kind = "bottleneck" if any(".FC." in name for name in shapes) else "linear"
    numbers = [shape[0] for name, shape in shapes.items() if ".embedding_generator." not in name]
    return f"{numbers[0]:,} classes ({kind})" if numbers else "no classes"


def _timm(model: nn.Module) -> Any:
    """The model as what it is: timm's own models have no common type."""
    return model


def _config(model: nn.Module) -> Any:
    return _timm(model).pretrained_cfg
