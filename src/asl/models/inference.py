"""A trained model made ready to give scores: quicker, and exact where its scores are made."""

from collections import Counter
from itertools import product
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import matches_module_pattern
from torch.nn.utils.fusion import fuse_conv_bn_eval

from asl.models.heads import head_names
from asl.models.ml_decoder import MLDecoder

# Exact types: a subclass may do anything with its weights (StdConv2d standardises them).
_PAIRS = list(product((nn.Conv2d, Conv2dSame), (nn.BatchNorm2d, BatchNormAct2d)))


def for_inference(model: nn.Module) -> nn.Module:
    """Make a model ready to give scores, in place, and return it: for that alone.

    BatchNorm is folded, and the heads compute in float32, whatever autocast makes of the backbone.
    """
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(False)  # type: ignore[operator]  # of use in training alone
    fold_batchnorm(model)
    for name in head_names(model):
        head = model.get_submodule(name)
        if not isinstance(head, MLDecoder):  # whose last product is in float32 as it is
            model.set_submodule(name, _InFloat32(head))
    return model


class _InFloat32(nn.Module):
    """A head whose logits are not rounded.

    bfloat16 has eight bits: logits between 4 and 8 are multiples of 1/32. Images with equal logits
    have no order, and average precision depends on the order.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(features.float())
        return logits


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Fold BatchNorm into the convolutions before it, in place, and return the model.

    The model is then for inference alone: it is in eval mode, has no gradients, and gives the same
    logits as before up to rounding (1e-4). A BatchNorm stays where it does not follow a
    convolution, or where something else reads the output of that convolution. All stay in a model
    that torch.fx cannot trace.

    `torch.fx.experimental.optimization.fuse` does this for torch's own layers only. It leaves every
    BatchNorm of TResNet, which has timm's `BatchNormAct2d`, and cannot trace `Conv2dSame`.
    """
    model.eval().requires_grad_(False)
    try:
        graph = _BatchNormTracer().trace(model)
    except Exception:  # code that branches on values or shapes fails in many ways
        return model
    layers = _called_once(model, graph)
    for node in graph.nodes:
        if any(matches_module_pattern(pair, node, layers) for pair in _PAIRS):
            [source] = node.all_input_nodes
            conv_name, norm_name = str(source.target), str(node.target)
            norm = layers[norm_name]
            if len(source.users) == 1 and norm.running_mean is not None:
                model.set_submodule(conv_name, fuse_conv_bn_eval(layers[conv_name], norm))
                model.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))
    return model


class _BatchNormTracer(fx.Tracer):
    """Does not look into modules without BatchNorm: their code may be more than it can trace."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        norms = (isinstance(layer, nn.BatchNorm2d) for layer in m.modules())
        return isinstance(m, nn.BatchNorm2d) or not any(norms)


def _called_once(model: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    """The layers by name that can be replaced: called in one place, held in one, without hooks."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # The graph has one name of a layer. A layer that has two would be replaced under one of them.
    names = Counter(layer for _, layer in model.named_modules(remove_duplicate=False))
    return {
        name: layer
        for name, layer in model.named_modules()
        if calls[name] == names[layer] == 1
        # spectral_norm, for one, computes a convolution's weights in a hook
        and not (layer._forward_pre_hooks or layer._forward_hooks)
    }
