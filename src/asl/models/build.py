"""Any timm backbone under a head of the papers.

The papers' TResNets are timm's `tresnet_m`, `tresnet_l`, `tresnet_xl` and `tresnet_v2_l`.
"""

import difflib
from typing import Any

import timm
import torch
from torch import nn

from asl.errors import DataError, UsageError
from asl.models.heads import init_heads, set_bottleneck_head, set_ml_decoder_head
from asl.models.layout import keep_channels_last
from asl.models.settings import Head

# Mean and standard deviation of images in [0, 1], each by channel.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def create_model(
    name: str,
    num_classes: int,
    head: Head = "linear",
    pretrained: bool = False,
    image_size: int | None = None,
    drop_path: float | None = None,
) -> nn.Module:
    """Build a timm model that maps normalised images (B, 3, S, S) to logits (B, `num_classes`).

    `name` may carry timm's tag for pretrained weights (`tresnet_l.miil_in1k_448`). The weights are
    random, or with `pretrained` timm's from its hub, apart from the head. `image_size` is S; only
    models that are built for one size (vision transformers) look at it. `drop_path` is the chance
    with which training skips the residual branch of the last block for an image (stochastic depth,
    arXiv 1603.09382); without it the model's own.

    Raises `UsageError` for a name that timm does not know, or a head, size or `drop_path` that the
    model cannot have, and `DataError` if pretrained weights cannot be fetched.
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
    if drop_path is not None:
        options["drop_path_rate"] = drop_path
    try:
        model: nn.Module = timm.create_model(name, pretrained, **options)
    except AssertionError as error:  # some vision transformers check the size here
        raise UsageError(_wrong_size(name, image_size, error)) from error
    except Exception as error:
        if "drop_path_rate" in str(error):
            raise UsageError(
                f"{name} has no branches that training could skip: drop drop_path"
            ) from error
        if not pretrained:
            raise
        reason = str(error).partition("\n")[0]
        advice = "give a file of weights with --model-path"
        raise DataError(f"no pretrained weights for {name}: {reason}; {advice}") from error
    if head == "bottleneck":
        set_bottleneck_head(model, num_classes)
    init_heads(model)
    if head == "ml_decoder":  # after that: it begins as large as the official one
        set_ml_decoder_head(model, num_classes, options.get("img_size"))
    return keep_channels_last(model)


def normalization(model: nn.Module) -> Statistics:
    """Mean and standard deviation, by channel, of the images in [0, 1] that a model was made for.

    0 and 1 for TResNet; what timm's weights were trained with for every other model.
    """
    config: Any = model.pretrained_cfg
    return tuple(config["mean"]), tuple(config["std"])


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on a device, in channels last: convolutions are fastest so, on GPUs and CPUs.

    cuDNN is told to search for the fastest algorithm, unless torch is to be deterministic: all
    images have one size, so that a search pays.
    """
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    return model.to(device).to(memory_format=torch.channels_last)


def check_size(model: nn.Module, name: str, image_size: int) -> None:
    """Raise `UsageError` if the model, called `name`, cannot take images of `image_size` pixels.

    The model sees one black image, and is left in eval mode: what a size is too small for, or no
    multiple of, is in the model's own code.
    """
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    except (RuntimeError, AssertionError, ArithmeticError, ValueError) as error:
        raise UsageError(_wrong_size(name, image_size, error)) from error


def _wrong_size(name: str, size: int | None, error: Exception) -> str:
    reason = str(error).partition("\n")[0]
    return f"{name} cannot take images of {size} x {size} pixels: {reason}"
