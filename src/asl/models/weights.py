"""Models with weights from files: official ones, timm's, and those of this project.

Official TResNets were trained with InplaceABN, which scales by |w| + eps where BatchNorm scales by
w. timm's converter renames their tensors and changes the scales.
"""

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asl.errors import DataError, UsageError
from asl.models import checkpoint
from asl.models.build import create_model
from asl.models.heads import describe_head, head_names, with_timm_names
from asl.models.settings import NewModelSettings, TrainedModelSettings, Weights

# Blocks of the third stage, different in each TResNet: enough to tell whose weights a file holds.
_TRESNETS = {11: "tresnet_m", 18: "tresnet_l", 24: "tresnet_xl", 23: "tresnet_v2_l"}
# Some tensors of a file may be of no use to the model (auxiliary heads, lookup tables). With more
# than this part it is the file of a larger model: ResNet-101 has every tensor of ResNet-50 and as
# many again, and half a network fills a model but does not work.
_MOST_UNUSED = 0.2


@dataclass(frozen=True)
class Loaded:
    """What became of a file of weights; as text, a report of a few lines.

    `weights` is the set that was taken: "ema", "regular", or "only" from a file that has one.
    `matched` counts the tensors that went from the file into the model. `fresh` names those of the
    model that did not get a value from it: all of the head, or none. `left_out` maps tensors of the
    file that were not used to the reason.
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
            lines.append(f"  start from random values: {_first_and_count(self.fresh)}")
        for reason in dict.fromkeys(self.left_out.values()):
            names = [name for name, why in self.left_out.items() if why == reason]
            lines.append(f"  left out: {_first_and_count(names)}: {reason}")
        return "\n".join(lines)


def new_model(settings: NewModelSettings, num_classes: int, image_size: int) -> nn.Module:
    """The model that a training starts from; prints what was loaded if it starts from a file.

    Raises what `create_model` and `load_weights` raise.
    """
    name, head, pretrained = settings.model_name, settings.head, settings.pretrained
    model = create_model(name, num_classes, head, pretrained, image_size, settings.drop_path)
    if settings.model_path:
        print(load_weights(model, settings.model_path))
    return model


def trained_model(
    settings: TrainedModelSettings, image_size: int
) -> tuple[nn.Module, tuple[str, ...], Loaded]:
    """The model of a checkpoint, the names of its classes in order, and what was loaded.

    Of several checkpoints it is that of the first. Raises `UsageError` without a checkpoint or for
    another number of classes than it has, and `DataError` if it does not name its classes or does
    not fit.
    """
    if not settings.model_path:
        raise UsageError("name the checkpoint: --model-path")
    path = settings.model_path[0]
    names = checkpoint.load(path)["idx_to_class"]
    if not names:
        raise DataError(f"{path} does not name its classes (idx_to_class)")
    if settings.num_classes not in (None, len(names)):
        raise UsageError(f"num_classes is {settings.num_classes}, the checkpoint's {len(names)}")
    model = create_model(settings.model_name, len(names), settings.head, image_size=image_size)
    loaded = load_weights(model, path, settings.weights, fresh_head=False)
    return model, tuple(names.values()), loaded


def load_weights(
    model: nn.Module, path: str | Path, weights: Weights = "best", fresh_head: bool = True
) -> Loaded:
    """Fill a model of `create_model` from a file: official, timm's or this project's.

    `weights` chooses among several sets in a file; "best" is the one that `checkpoint.load` has as
    "model". A file with one set gives that one. Official names and InplaceABN scales are converted,
    once. All of the model but the head must be in the file. A head for other classes than the
    model's stays as it is, or with `fresh_head=False` is an error.

    Raises `DataError`, and leaves the model as it was, if the file does not fit (naming the TResNet
    that it belongs to, or the counts), or if it holds values that are not finite.
    """
    state, taken = _read(path, weights)
    state = with_timm_names(state, model)
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
        why = f"a head for {describe_head(head)}, the model's is for {describe_head(own_head)}"
        if not fresh_head:
            raise DataError(f"{path}: holds {why}: check --head and --num-classes")
        fresh, left_out = tuple(own_head), left_out | dict.fromkeys(head, why)
    used = {name: state[name] for name in own if name in state and name not in left_out}
    _check_values(used, own, path)
    model.load_state_dict(used, strict=False)
    return Loaded(str(path), taken, len(used), fresh, left_out)


def _read(path: str | Path, weights: Weights) -> tuple[dict[str, Tensor], str]:
    """The tensors of the set that was asked for, and the name of that set."""
    content = checkpoint.load(path)
    if content.get("ema") is None:
        return content["model"], "only"
    taken = content["best"] if weights == "best" else weights
    return content[taken], taken


_Shapes = dict[str, torch.Size]


def _shapes(state: Mapping[str, Tensor], model: nn.Module) -> tuple[_Shapes, _Shapes]:
    """Shapes by name, of the model's body and of its head.

    BatchNorm's counters stay out: official files lack them, and nothing here depends on them.
    """
    prefixes = tuple(f"{name}." for name in head_names(model))
    body: _Shapes = {}
    head: _Shapes = {}
    for name, tensor in state.items():
        if not name.endswith("num_batches_tracked"):
            (head if name.startswith(prefixes) else body)[name] = tensor.shape
    return body, head


def _converted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors as timm itself converts downloaded ones: it knows their original names.

    Only for names or shapes that do not fit as they are: scales must not be converted twice.
    """
    convert = getattr(inspect.getmodule(type(model)), "checkpoint_filter_fn", None)
    try:
        return dict(convert(state, model)) if convert else state
    except Exception:  # the file holds something else; `load_weights` then says what does not fit
        return state


def _check_values(used: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path) -> None:
    for name, tensor in used.items():
        dtype = own[name].dtype
        if not dtype.is_floating_point:
            continue
        if not tensor.is_floating_point():
            raise DataError(f"{path}: {name} is {tensor.dtype}, the model's is {dtype}")
        # aminmax passes NaN on, and costs a tenth of isfinite: 20 ms for TResNet-L
        if not all(math.isfinite(x) for x in tensor.to(dtype).aminmax()):
            raise DataError(f"{path}: {name} holds values that are not finite (NaN or infinity)")


def _misfit(own: _Shapes, body: _Shapes, model: nn.Module) -> str:
    """Say in one line why tensors of these shapes (`body`) are not the model's (`own`)."""
    config: Any = model.pretrained_cfg
    architecture = config["architecture"]
    counts = (
        f"{len(own.items() & body.items())} of the model's {len(own)} tensors are in the file, "
        f"{len(body.keys() - own.keys())} of the file's {len(body)} are not in the model"
    )
    blocks = [re.match(r"body\.layer3\.(\d+)\.", name) for name in body]
    theirs = _TRESNETS.get(1 + max((int(block[1]) for block in blocks if block), default=-1))
    if theirs and theirs != architecture:
        advice = f"pass --model-name {theirs}"
        return f"holds weights of {theirs}, not {architecture}: {advice} ({counts})"
    wrong = next((name for name in own if name in body and own[name] != body[name]), None)
    example = f"; {wrong}: {tuple(body[wrong])} for {tuple(own[wrong])}" if wrong else ""
    return f"holds weights of another model than {architecture}: {counts}{example}"


def _first_and_count(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if others else first
