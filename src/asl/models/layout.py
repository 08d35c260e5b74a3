"""Channels last through the whole model.

In channels last the numbers of one pixel lie together, as convolutions on GPUs want them. Two
layers of timm's TResNet give the usual layout whatever they are given (the second on CUDA alone),
and every layer behind them has it then, up to the next convolution, which copies it back.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers.blur_pool import BlurPool2d
from timm.layers.space_to_depth import SpaceToDepth
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d


def keep_channels_last(model: nn.Module) -> nn.Module:
    """Make timm's SpaceToDepth and BlurPool2d keep the layout of their input; returns the model.

    It is changed in place. Its logits stay the same, to the bit on a CPU, and so do the names in
    its state dict. Gradients differ at the corners of a blurred map alone, by the rounding of one
    sum. Input in another layout takes timm's own code.
    """
    for layer in model.modules():
        # Exact types: a subclass may do anything. With the class alone replaced, the layer keeps
        # its buffers and hooks, and its place in the model.
        if type(layer) is SpaceToDepth:
            layer.__class__ = ChannelsLastSpaceToDepth
        elif type(layer) is BlurPool2d and layer.pad_mode == "reflect":
            layer.__class__ = ChannelsLastBlurPool2d
    return model


class ChannelsLastSpaceToDepth(SpaceToDepth):
    """(B, C, H, W) -> (B, 16 C, H / 4, W / 4): the pixels of each 4 x 4 square become channels."""

    def forward(self, x: Tensor) -> Tensor:
        """One copy, from channels last to channels last."""
        if not _is_channels_last(x):
            return super().forward(x)  # type: ignore[no-any-return,no-untyped-call]
        batch, channels, height, width = x.shape
        side = self.bs
        squares = x.view(batch, channels, height // side, side, width // side, side)
        # By row and column of squares, then row and column in them, then channel: one copy.
        lined_up = squares.permute(0, 2, 4, 3, 5, 1).flatten(3)
        return lined_up.permute(0, 3, 1, 2)


class ChannelsLastBlurPool2d(BlurPool2d):
    """A blur with a stride: (B, C, H, W) -> (B, C, H / 2, W / 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """timm's, behind another padding."""
        before: Any = self.padding[0]
        if not _is_channels_last(x) or min(x.shape[2:]) <= before:
            return super().forward(x)  # which says so if there is nothing to mirror
        height, width = (self._ends(size, before) for size in x.shape[2:])
        weight = self.get_buffer("filt").expand(x.shape[1], -1, -1, -1)
        padded = _Reflected.apply(x, height, width)
        return conv2d(padded, weight, stride=self.stride, groups=x.shape[1])

    def _ends(self, size: int, before: int) -> tuple[int, int]:
        """How many pixels go before and behind so many: behind, only those that are read."""
        steps = (size + 2 * before - self.filt_size) // self.stride
        return before, max(0, steps * self.stride + self.filt_size - size - before)


class _Reflected(torch.autograd.Function):
    """(B, C, H, W) with more pixels at the ends of each side, mirrored at the outermost ones.

    torch's reflection_pad2d on CUDA returns the usual layout, and its gradient is a sum in any
    order, which makes it an error where only deterministic algorithms are wanted. This one copies
    the image once, as that does, and then the lines at the border.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, height: tuple[int, int], width: tuple[int, int]) -> Tensor:
        ctx.height, ctx.width = height, width
        (top, bottom), (left, right) = height, width
        batch, channels, rows, columns = x.shape
        padded = torch.empty(
            (batch, channels, top + rows + bottom, left + columns + right),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        middle = padded[..., top : top + rows, :]
        middle[..., left : left + columns] = x
        for lines, ends in ((middle, width), (padded.mT, height)):
            for outside, mirrored in _mirrored(lines.shape[-1], ends):
                lines[..., outside] = lines[..., mirrored]
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (top, bottom), width = ctx.height, ctx.width
        rows = grad.shape[2]
        inner = _folded(grad[..., top : rows - bottom, :], width)
        for outside, mirrored in _mirrored(rows, ctx.height):
            line = _folded(grad[..., outside : outside + 1, :], width)
            inner[..., mirrored - top, :].add_(line[..., 0, :])  # += would copy it back as well
        return inner, None, None


def _mirrored(size: int, ends: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """The pixels at the ends of a line of `size`, and those that they repeat."""
    before, last = ends[0], size - 1 - ends[1]
    yield from ((before - distance, before + distance) for distance in range(1, ends[0] + 1))
    yield from ((last + distance, last - distance) for distance in range(1, ends[1] + 1))


def _folded(lines: Tensor, ends: tuple[int, int]) -> Tensor:
    """The inside of each line, with its ends added to the pixels that they repeat."""
    before, behind = ends
    size = lines.shape[-1]
    inner = lines[..., before : size - behind].clone(memory_format=torch.channels_last)
    for outside, mirrored in _mirrored(size, ends):
        inner[..., mirrored - before].add_(lines[..., outside])
    return inner


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
