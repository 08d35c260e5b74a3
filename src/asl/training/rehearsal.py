"""A device that is not there: tensors that have shapes, types and a place, and no values.

Code runs on them as it does on the device, in seconds and without its memory. It fails where it
mixes devices, and where it would wait for the device to learn a value. Beside
`asl.images.torch_private` this is where names are used that torch does not make public.
"""

import copy
import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode

M = TypeVar("M", bound=nn.Module)


class Rehearsal:
    """Inside `on(device)` all new tensors are fake; `copy_of` gives a model of such tensors."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode()

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Everything inside the block computes with fake tensors; `device` may have no driver."""
        with ExitStack() as stack:
            replaced = _WITHOUT_VALUES
            stack.enter_context(mock.patch.object(FakeTensor, "__deepcopy__", _copied, create=True))
            if device.type == "cuda" and not torch.cuda.is_available():
                stack.enter_context(without_engine())
                replaced = replaced | _WITHOUT_DRIVER
            for name, replacement in replaced.items():
                stack.enter_context(mock.patch(name, replacement))
            stack.enter_context(self._mode)
            yield

    def copy_of(self, module: M, device: torch.device) -> M:
        """The `module`, which stays as it is, with fake parameters and buffers on `device`."""
        memo: dict[int, Any] = {}
        with self._mode:
            for tensor in chain(module.parameters(), module.buffers()):
                fake: Tensor = torch.empty_strided(
                    tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
                )
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, tensor.requires_grad)
                memo[id(tensor)] = fake
        with FakeCopyMode(self._mode):
            return copy.deepcopy(module, memo)


def _copied(self: FakeTensor, memo: dict[int, Any]) -> Tensor:
    """What torch's own copy of a tensor does, but for a look at its memory."""
    copied: Tensor = self.detach().clone()
    if isinstance(self, nn.Parameter):
        copied = nn.Parameter(copied, self.requires_grad)
    memo[id(self)] = copied
    return copied


# What has no fake counterpart.
_WITHOUT_VALUES: dict[str, Any] = {
    "torch.frombuffer": lambda buffer, dtype: torch.empty(
        len(buffer) // dtype.itemsize, dtype=dtype
    ),
    "torch.Tensor.pin_memory": lambda tensor: tensor,
    # A rehearsal is alone: other processes would wait for what a fake tensor cannot send.
    "torch.distributed.is_initialized": lambda: False,
}


def _layout_of_convolution(images: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
    """cuDNN's choice, which takes every convolution; torch asks the driver if it takes bfloat16."""
    layouts = [suggest_memory_format(each) for each in (images, weight)]
    return torch.channels_last if torch.channels_last in layouts else torch.contiguous_format


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The attention that a GPU of 2020 or later computes, by FlashAttention or what is like it.

    Without a driver torch takes the formula instead, which keeps (B, heads, N, N) of weights.
    """
    if torch.is_autocast_enabled("cuda"):
        lower = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(lower), key.to(lower), value.to(lower)
    same: tuple[Any, ...] = (dropout_p, is_causal)
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out: Tensor = flash(query, key, value, *same, scale=scale)[0]
        return out
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    out = efficient(query, key, value, attn_mask, True, *same, scale=scale)[0]
    return out


_generator = torch.Generator
# What asks for the driver, though it could do without.
_WITHOUT_DRIVER: dict[str, Any] = {
    "torch.Generator": lambda device=None: _generator(),
    "torch.cuda.Event": mock.MagicMock,
    "torch._C._conv_determine_backend_memory_format": _layout_of_convolution,
    "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
    "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    "torch.nn.functional.scaled_dot_product_attention": _attention,
}


@contextmanager
def without_engine() -> Iterator[None]:
    """Inside the block `Tensor.backward` does without autograd's engine, which needs a driver.

    The graph is built as always, and each of its nodes computes what it always does. Only who calls
    them is replaced. A saved tensor is let go when its node has taken it, as the engine does. Hooks
    of tensors and nodes are not called.
    """

    def keep(tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def take(kept: list[Tensor]) -> Tensor:
        return kept.pop()

    with (
        mock.patch("torch.Tensor.backward", _backward),
        # Checkpointed activations ask for it.
        mock.patch("torch._C._current_graph_task_id", return_value=0),
        torch.autograd.graph.saved_tensors_hooks(keep, take),
    ):
        yield


@torch.no_grad()
def _backward(loss: Tensor) -> None:
    root: Any = loss.grad_fn
    calls = _calls_awaited(root)
    gradients: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    gradients[root][0] = torch.ones_like(loss)
    ready: list[tuple[float, int, Any]] = [(0, 0, root)]
    number_ready = 0
    while ready:
        *_, node = heapq.heappop(ready)
        received = gradients.pop(node, {})
        if hasattr(node, "variable"):
            _accumulate(node.variable, received.get(0))
            continue
        given = [received.get(number) for number in range(len(node._input_metadata))]
        call = getattr(node, "apply", node)  # nodes written in Python have a method
        results = call(*given) if received else (None,) * len(node.next_functions)
        results = results if isinstance(results, tuple) else (results,)
        # Nodes written in Python answer for arguments behind the tensors too.
        for (following, number), result in zip(node.next_functions, results, strict=False):
            if following is None:
                continue
            if result is not None:
                shape = following._input_metadata[number]
                result = result.sum_to_size(shape.shape).to(shape.dtype)
                other = gradients[following].get(number)
                gradients[following][number] = result if other is None else other + result
            calls[following] -= 1
            if calls[following] == 0:
                # The latest of the forward pass goes first, and leaves at once, as in the engine.
                leaf, number_ready = hasattr(following, "variable"), number_ready + 1
                turn = -math.inf if leaf else -following._sequence_nr()
                heapq.heappush(ready, (turn, number_ready, following))


def _calls_awaited(root: Any) -> Counter[Any]:
    """How many gradients each node of the graph is sent before its own turn comes."""
    calls, open_nodes = Counter[Any](), [root]
    while open_nodes:
        for following, _ in open_nodes.pop().next_functions:
            if following is not None:
                if following not in calls:
                    open_nodes.append(following)
                calls[following] += 1
    return calls


def _accumulate(leaf: Tensor, gradient: Tensor | None) -> None:
    if gradient is not None:
        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
