"""Models: any timm backbone, the papers' two heads, and weights from official, timm and own files.

The papers' TResNets are timm's `tresnet_m`, `tresnet_l`, `tresnet_xl` and `tresnet_v2_l`. Their
official weights were trained with InplaceABN, which scales by |w| + eps where BatchNorm scales by
w; timm's converter renames the tensors and changes the scales.
"""

import difflib
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

from asl.errors import DataError, UsageError
from asl.models import checkpoint

Head = Literal["linear", "bottleneck"]
Weights = Literal["ema", "regular", "best"]

# Blocks of the third stage, different in each TResNet: enough to tell whose weights a file holds.
_TRESNETS = {11: "tresnet_m", 18: "tresnet_l", 24: "tresnet_xl", 23: "tresnet_v2_l"}
# Some tensors of a file may be of no use to the model (auxiliary heads, lookup tables). With more
# than this part it is the file of a larger model: ResNet-101 has every tensor of ResNet-50 and as
# many again, and half a network fills a model but does not work.
_MOST_UNUSED = 0.2


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


def create_model(
    name: str,
    num_classes: int,
    head: Head = "linear",
    pretrained: bool = False,
    image_size: int | None = None,
) -> nn.Module:
    """Build a timm model that maps normalised images (B, 3, S, S) to logits (B, `num_classes`).

    `name` may carry timm's tag for pretrained weights (`tresnet_l.miil_in1k_448`). The weights are
    random, or with `pretrained` timm's from its hub, apart from the head. `image_size` is S; only
    models that are built for one size (vision transformers) look at it.

    Raises `UsageError` for a name that timm does not know or a head that the model cannot have, and
    `DataError` if pretrained weights cannot be fetched.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.lower(), timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        raise UsageError(f"no model is called {name!r}: {hint}")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag behind a known name
        known = ", ".join(timm.list_pretrained(name.partition(".")[0] + ".*")) or "none"
        raise UsageError(f"no weights are called {name!r}; there are: {known}") from error
    options: dict[str, Any] = {"num_classes": num_classes}
    if image_size and config and config.fixed_input_size:
        options["img_size"] = image_size
    try:
        model: nn.Module = timm.create_model(name, pretrained, **options)
    except Exception as error:
        if not pretrained:
            raise
        reason = str(error).partition("\n")[0]
        advice = "give a file of weights with --model-path"
        raise DataError(f"no pretrained weights for {name}: {reason}; {advice}") from error
    if head == "bottleneck":
        last = _head_layers(model)
        linear = model.get_submodule(last[0]) if len(last) == 1 else None
        if not isinstance(linear, nn.Linear):
            raise UsageError(f"{name} does not end in a linear layer: it has no bottleneck head")
        model.set_submodule(last[0], BottleneckHead(linear.in_features, num_classes))
    for layer in _head_layers(model):
        _draw_head(model.get_submodule(layer))
    return model


def _draw_head(head: nn.Module) -> None:
    # As the official TResNet code draws all linear layers. Some of timm's heads begin ten times as
    # large (EfficientNet): under a loss that is summed over classes, the first steps then undo what
    # the backbone has learned (VOC 2007 at 160 px: 59 mAP, not 76).
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, by channel, of the images in [0, 1] that a model was made for.

    0 and 1 for TResNet; what timm's weights were trained with for every other model.
    """
    config = _timm_config(model)
    return tuple(config["mean"]), tuple(config["std"])


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Fold BatchNorm into the convolutions before it, in place, and return the model.

    It is then for inference alone: in eval mode, without gradients, with the logits that it gave
    before up to rounding (1e-4). A BatchNorm stays where it does not follow a convolution, or where
    something else reads that convolution's output; all stay in a model that torch.fx cannot trace.
    """
    model.eval().requires_grad_(False)
    for conv_name, norm_name in _foldable(model):
        conv: Any = model.get_submodule(conv_name)
        norm: Any = model.get_submodule(norm_name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        model.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))
    return model


class _BatchNormTracer(fx.Tracer):
    """Takes what holds no BatchNorm as one step, whatever its code does."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        norms = (isinstance(layer, nn.BatchNorm2d) for layer in m.modules())
        return isinstance(m, nn.BatchNorm2d) or not any(norms)


def _foldable(model: nn.Module) -> list[tuple[str, str]]:
    """The names of each convolution and of the BatchNorm that alone reads its output."""
    try:
        graph = _BatchNormTracer().trace(model)
    except Exception:  # code that branches on values or shapes: it fails in many ways
        return []
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # A layer that is held in two places may be called by a name that the trace does not show.
    holders = Counter(layer for holder in model.modules() for layer in holder._modules.values())

    def layer_of(node: fx.Node) -> Any:
        if node.op != "call_module":
            return None
        layer = model.get_submodule(str(node.target))
        hooked = layer._forward_pre_hooks or layer._forward_hooks  # spectral_norm works by them
        return layer if calls[node.target] == holders[layer] == 1 and not hooked else None

    found = []
    for node in graph.nodes:
        norm = layer_of(node)
        # Not isinstance: a subclass may do anything with its weights, standardise them for one.
        if type(norm) in (nn.BatchNorm2d, BatchNormAct2d) and norm.running_mean is not None:
            [source] = node.all_input_nodes
            if type(layer_of(source)) in (nn.Conv2d, Conv2dSame) and len(source.users) == 1:
                found.append((str(source.target), str(node.target)))
    return found


@dataclass(frozen=True)
class Loaded:
    """What became of a file of weights; as text, a report of a few lines.

    `matched` counts the tensors that went from the file into the model, `fresh` names those of the
    model that did not get a value from it (of the head, or none), `left_out` says of tensors of the
    file why they were not used. `weights` is the set that was taken: "ema", "regular", "best", or
    "only" from a file that has one.
    """

    path: str
    weights: str
    matched: int
    fresh: tuple[str, ...]
    left_out: dict[str, str]

    def __str__(self) -> str:
        which = "" if self.weights == "only" else f" ({self.weights} weights)"
        lines = [f"{self.path}: {self.matched} tensors loaded{which}"]
        if self.fresh:
            lines.append(f"  start from random values: {_some(self.fresh)}")
        for reason in dict.fromkeys(self.left_out.values()):
            names = [name for name, why in self.left_out.items() if why == reason]
            lines.append(f"  left out: {_some(names)}: {reason}")
        return "\n".join(lines)


def load_weights(
    model: nn.Module, path: str | Path, weights: Weights = "ema", fresh_head: bool = True
) -> Loaded:
    """Fill a model of `create_model` from a file: official, timm's or this project's.

    Of a file with several sets of weights it takes `weights`, else the only one. Official names and
    InplaceABN scales are converted, once. All of the model but the head must be in the file; a head
    for other classes than the model's stays as it is, or with `fresh_head=False` is an error.

    Raises `DataError`, and leaves the model as it was, if the file does not fit (naming the TResNet
    that it belongs to, or the counts), or if it holds values that are not finite.
    """
    return _fill(model, *_read(path, weights), str(path), fresh_head)


def load_model(
    name: str,
    num_classes: int,
    path: str | Path,
    head: Head = "linear",
    weights: Weights = "ema",
    fresh_head: bool = True,
    image_size: int | None = None,
) -> tuple[nn.Module, Loaded]:
    """`create_model` and `load_weights` in one, without drawing random weights to be overwritten.

    Saves the larger part of the time that building a model takes (TResNet-L: 0.06 s, not 0.4 s).
    Arguments, what is returned and what is raised are theirs.
    """
    state, chosen = _read(path, weights)
    shapes = {tensor.shape for tensor in state.values() if tensor.dim() > 1}
    with _WithoutDrawing(shapes):
        model = create_model(name, num_classes, head, image_size=image_size)
    loaded = _fill(model, state, chosen, str(path), fresh_head)
    if any(model.get_parameter(tensor).shape in shapes for tensor in loaded.fresh):
        # a new head with the very shape of something in the file was not drawn: once more in full
        model = create_model(name, num_classes, head, image_size=image_size)
        loaded = _fill(model, state, chosen, str(path), fresh_head)
    return model, loaded


class _WithoutDrawing(TorchFunctionMode):
    """While it is active, tensors of the given shapes are not filled with random numbers."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # all random initialisers of torch and timm end in one of these
        if getattr(func, "__name__", "") in {"normal_", "uniform_", "kaiming_uniform_"}:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.shape in self.shapes:
                return tensor
        return func(*args, **kwargs)


def _read(path: str | Path, weights: Weights) -> tuple[dict[str, Tensor], str]:
    content = checkpoint.load(path)
    several = content.get("ema") is not None
    if several and weights != "best":
        return content[weights], weights
    return content["model"], "best" if several else "only"


def _fill(
    model: nn.Module, state: dict[str, Tensor], weights: str, path: str, fresh_head: bool
) -> Loaded:
    own = model.state_dict()
    own_body, own_head = _shapes(own, model)
    body, head = _shapes(state, model)
    if not own_body.items() <= body.items():
        state = _converted(state, model)
        body, head = _shapes(state, model)
    unknown = [name for name in body if name not in own_body]
    if not own_body.items() <= body.items() or len(unknown) > _MOST_UNUSED * len(body):
        raise DataError(f"{path}: {_misfit(own_body, body, model)}")
    left_out = dict.fromkeys(unknown, "not in the model")
    fresh: tuple[str, ...] = ()
    if not own_head.items() <= head.items():
        why = f"a head for {_describe(head)}, the model's is for {_describe(own_head)}"
        if not fresh_head:
            raise DataError(f"{path}: holds {why}: check --head and --num-classes")
        fresh, left_out = tuple(own_head), left_out | dict.fromkeys(head, why)
    used = {name: state[name] for name in own if name in state and name not in left_out}
    for name, tensor in used.items():
        if own[name].is_floating_point() and not tensor.is_floating_point():
            raise DataError(f"{path}: {name} is {tensor.dtype}, the model's is {own[name].dtype}")
        # aminmax passes NaN on, and costs a tenth of isfinite: 20 ms for TResNet-L
        if tensor.is_floating_point() and not all(math.isfinite(x) for x in tensor.aminmax()):
            raise DataError(f"{path}: {name} holds values that are not finite (NaN or infinity)")
    model.load_state_dict(used, strict=False)
    return Loaded(path, weights, len(used), fresh, left_out)


def _head_layers(model: nn.Module) -> tuple[str, ...]:
    names = _timm_config(model).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _timm_config(model: nn.Module) -> Mapping[str, Any]:
    config: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return config


_Shapes = dict[str, torch.Size]


def _shapes(state: Mapping[str, Tensor], model: nn.Module) -> tuple[_Shapes, _Shapes]:
    """Shapes by name, of the model's body and of its head.

    BatchNorm's counters stay out: official files lack them, and nothing here depends on them.
    """
    prefixes = tuple(f"{layer}." for layer in _head_layers(model))
    body: _Shapes = {}
    head: _Shapes = {}
    for name, tensor in state.items():
        if not name.endswith("num_batches_tracked"):
            (head if name.startswith(prefixes) else body)[name] = tensor.shape
    return body, head


def _converted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    # What timm itself puts downloaded weights through: it knows their original names. Called where
    # names or shapes do not fit as they are, and only there, so that nothing is converted twice.
    convert = getattr(inspect.getmodule(type(model)), "checkpoint_filter_fn", None)
    try:
        return dict(convert(state, model)) if convert else state
    except Exception:  # not made for what is in this file: the caller says what does not fit
        return state


def _misfit(own: _Shapes, body: _Shapes, model: nn.Module) -> str:
    ours = _timm_config(model)["architecture"]
    counts = (
        f"{len(own.items() & body.items())} of the model's {len(own)} tensors are in the file, "
        f"{len(body.keys() - own.keys())} of the file's {len(body)} are not in the model"
    )
    blocks = [re.match(r"body\.layer3\.(\d+)\.", name) for name in body]
    theirs = _TRESNETS.get(1 + max((int(block[1]) for block in blocks if block), default=-1))
    if theirs and theirs != ours:
        return f"holds weights of {theirs}, not {ours}: pass --model-name {theirs} ({counts})"
    wrong = next((name for name in own if name in body and own[name] != body[name]), None)
    example = f"; {wrong}: {tuple(body[wrong])} for {tuple(own[wrong])}" if wrong else ""
    return f"holds weights of another model than {ours}: {counts}{example}"


def _describe(head: _Shapes) -> str:
    kind = "bottleneck" if any(".FC." in name for name in head) else "linear"
    classes = [shape[0] for name, shape in head.items() if ".embedding_generator." not in name]
    return f"{classes[0]:,} classes ({kind})" if classes else "no classes"


def _some(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if others else first
