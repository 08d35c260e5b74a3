"""The operations of `asl.images.augment` on many images at once, where the model is.

Each operation has two functions here. One turns the drawn numbers of n images into arrays, on the
host; the kernel gets these as tensors, after the (n, 3, S, S) uint8 images, on the device. Several
operations share a kernel. No kernel waits for the device.

The results are those of `asl.images.augment_host` to the bit, but for the shears, whose sums may
round differently: within one grey level. AutoContrast needs float64, which Apple's GPUs lack.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from asl.images import augment_host as host
from asl.images.augment_host import CORNER_GREY, GREYS, LUMA, ROUND_UP, Transform

Array = npt.NDArray[Any]
Transforms = Transform[npt.NDArray[np.float64]]  # those of n images, of `size` x `size` pixels


def no_arrays(transforms: Transforms, size: int) -> tuple[()]:
    """Of an operation that nothing is drawn for."""
    return ()


def cutout_holes(transforms: Transforms, size: int) -> tuple[Array, ...]:
    """(n, 2) first and last + 1 rows and columns, (n, 3) colours."""
    reach = np.rint(transforms.magnitude * size) // 2
    return _holes(transforms, size, before=reach, after=reach + 1)


def patch_holes(transforms: Transforms, size: int) -> tuple[Array, ...]:
    """The same for RandAugment's own Cutout."""
    reach = np.rint(transforms.magnitude) // 2
    return _holes(transforms, size, before=reach, after=reach)


def _holes(transforms: Transforms, size: int, before: Array, after: Array) -> tuple[Array, ...]:
    centres = np.floor(np.stack((transforms.y, transforms.x), 1) * size)
    starts, stops = centres - before[:, None], centres + after[:, None]
    colours = np.stack((transforms.red, transforms.green, transforms.blue), 1)
    return starts.astype(np.int64), stops.astype(np.int64), colours.astype(np.uint8)


def cut(pixels: Tensor, starts: Tensor, stops: Tensor, colours: Tensor) -> Tensor:
    """Fill rectangles."""
    at = torch.arange(pixels.shape[-1], device=pixels.device)
    inside = (at >= starts[..., None]) & (at < stops[..., None])
    hole = inside[:, 0, :, None] & inside[:, 1, None, :]
    return torch.where(hole[:, None], colours[..., None, None], pixels)


def flips(transforms: Transforms, size: int) -> tuple[Array]:
    """(n, 2, 3): from where in the image x and y come, in Pillow's 16-bit fixed point."""
    return _fixed_point(np.tile([[-1, 0, size - 0.5], [0, 1, 0.5]], (len(transforms.x), 1, 1)))


def shifts_x(transforms: Transforms, size: int) -> tuple[Array]:
    """The same for a shift along x."""
    matrices = np.tile([[1, 0, 0.5], [0, 1, 0.5]], (len(transforms.x), 1, 1))
    matrices[:, 0, 2] += np.floor(transforms.magnitude * size + 0.5)
    return _fixed_point(matrices)


def shifts_y(transforms: Transforms, size: int) -> tuple[Array]:
    """The same for a shift along y."""
    [matrices] = shifts_x(transforms, size)
    return (matrices[:, ::-1, [1, 0, 2]],)


def rotations(transforms: Transforms, size: int) -> tuple[Array]:
    """The same for a turn about the centre of the image."""
    angles = -np.radians(transforms.magnitude)
    cos, sin = np.cos(angles).round(15), np.sin(angles).round(15)
    turns = np.stack((cos, sin, -sin, cos), 1).reshape(-1, 2, 2)
    starts = turns @ [-size / 2, -size / 2] + size / 2 + turns.sum(2) / 2
    return _fixed_point(np.concatenate((turns, starts[..., None]), 2))


def _fixed_point(matrices: Array) -> tuple[Array]:
    return (np.floor(matrices * 65536 + 0.5).astype(np.int64),)


def warp(pixels: Tensor, matrices: Tensor) -> Tensor:
    """Pillow's affine warps, nearest neighbour."""
    size = pixels.shape[-1]
    at = torch.arange(size, device=pixels.device)
    by_x, by_y, start = matrices[..., None, None].unbind(2)
    sources = (by_x * at + (by_y * at[:, None] + start)) >> 16
    nearest = sources.clamp(0, size - 1)
    outside = (nearest != sources).any(1, keepdim=True)
    where = (nearest[:, 1:] * size + nearest[:, :1]).flatten(2).expand(-1, 3, -1)
    warped = pixels.flatten(2).gather(2, where).view_as(pixels)
    return warped.masked_fill_(outside, CORNER_GREY)


def shears_x(transforms: Transforms, size: int) -> tuple[Array, ...]:
    """(n,) whether along y, then taps and spans of `augment_host.shears`."""
    return np.zeros(len(transforms.x), bool), *host.shears(transforms.magnitude, size)


def shears_y(transforms: Transforms, size: int) -> tuple[Array, ...]:
    """The same along y."""
    return np.ones(len(transforms.x), bool), *host.shears(transforms.magnitude, size)


def shear(pixels: Tensor, along_y: Tensor, taps: Tensor, spans: Tensor) -> Tensor:
    """Bicubic along each row or column."""
    size = pixels.shape[-1]
    along_y = along_y[:, None, None, None]
    rows = torch.where(along_y, pixels.mT, pixels)
    # Each row is gathered where it goes, with the neighbours that the taps need.
    at = torch.arange(-1, size + 2, device=pixels.device)
    starts, stops, shift = spans[..., None].unbind(1)
    columns = (at + shift).clamp_(0, size - 1)[:, None].expand(-1, 3, -1, -1)
    moved = rows.gather(3, columns).float()
    sums = torch.full_like(rows, ROUND_UP, dtype=torch.float32)
    for first, tap in enumerate(taps[:, :, None, :, None].unbind(1)):
        sums.addcmul_(tap, moved[..., first : first + size])
    at = at[1:-2]
    outside = (at < starts) | (at >= stops)
    sheared = sums.clamp_(0, 255).byte().masked_fill_(outside[:, None], CORNER_GREY)
    return torch.where(along_y, sheared.mT, sheared)


def factors(transforms: Transforms, size: int) -> tuple[Array]:
    """(n,) float32 factors of a blend."""
    return (transforms.magnitude.astype(np.float32),)


def _blend(degenerate: Tensor, image: Tensor, factors: Tensor) -> Tensor:
    # Three kernels for what could be one: a fused multiply-add rounds differently.
    mix = (image - degenerate).mul_(factors).add_(degenerate)
    return mix.clamp_(0, 255).byte()


def _luma(pixels: Tensor) -> Tensor:
    """(n, S, S): ITU-R 601-2 in Pillow's 16-bit fixed point."""
    red, green, blue = pixels.int().unbind(1)
    luma = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    return luma.add_(1 << 15).bitwise_right_shift_(16)


def color(pixels: Tensor, factors: Tensor) -> Tensor:
    """Blends with the grey image."""
    return _blend(_luma(pixels)[:, None].float(), pixels, factors[:, None, None, None])


def sharpness(pixels: Tensor, factors: Tensor) -> Tensor:
    """Blends with Pillow's SMOOTH: 3 x 3 mean, the centre counted five times, the border as is."""
    smooth = pixels.float()
    mean = avg_pool2d(smooth, 3, stride=1, padding=1)
    mean.mul_(9).add_(smooth, alpha=4).add_(6.5).div_(13).floor_()
    smooth[..., 1:-1, 1:-1] = mean[..., 1:-1, 1:-1]
    return _blend(smooth, pixels, factors[:, None, None, None])


def contrast(pixels: Tensor, factors: Tensor) -> Tensor:
    """Blends with the mean grey."""
    luma = _luma(pixels).flatten(1)
    mean = (2 * luma.sum(1, keepdim=True) + luma.shape[1]) // (2 * luma.shape[1])
    greys = torch.arange(256, device=pixels.device)
    return look_up(pixels, _blend(mean.float(), greys, factors[:, None])[:, None])


def brightness_luts(transforms: Transforms, size: int) -> tuple[Array]:
    """(n, 1, 256): what becomes of each grey level, whatever the image."""
    bright = transforms.magnitude.astype(np.float32)[:, None, None] * GREYS.astype(np.float32)
    return (bright.clip(0, 255).astype(np.uint8),)


def posterize_luts(transforms: Transforms, size: int) -> tuple[Array]:
    """The same for Posterize."""
    steps = 2 ** (8 - np.rint(transforms.magnitude)).astype(int)[:, None, None]
    return ((GREYS - GREYS % steps).astype(np.uint8),)


def solarize_luts(transforms: Transforms, size: int) -> tuple[Array]:
    """The same for Solarize."""
    return (np.where(transforms.magnitude[:, None, None] > GREYS, GREYS, ~GREYS),)


def invert_luts(transforms: Transforms, size: int) -> tuple[Array]:
    """The same for Invert."""
    return (np.tile(~GREYS, (len(transforms.x), 1, 1)),)


def look_up(pixels: Tensor, tables: Tensor) -> Tensor:
    """Each channel of each image through its (n, 3, 256) table, or through one of (n, 1, 256)."""
    levels = pixels.flatten(2).long()
    return tables.expand(-1, 3, -1).gather(2, levels).view_as(pixels)


def auto_contrast(pixels: Tensor) -> Tensor:
    """Stretches each channel to 0..255."""
    low, high = pixels.flatten(2).aminmax(dim=2, keepdim=True)
    # In float64, as Pillow does it: in float32 three of 400 levels would come out one off.
    low, span = low.double(), (high - low).double()
    greys = torch.arange(256, device=pixels.device)
    scale = span.new_full((), 255) / span.clamp(min=1)  # 255 / x would multiply by 1 / x
    stretched = (greys * scale).sub_(low * scale).clamp_(0, 255)
    return look_up(pixels, torch.where(span > 0, stretched, greys).byte())


def equalize(pixels: Tensor) -> Tensor:
    """Flattens the histogram of each channel."""
    planes = pixels.flatten(0, 1).flatten(1).long()
    counts = planes.new_zeros(len(planes), 256)
    counts.scatter_add_(1, planes, planes.new_ones(1).expand_as(planes))
    spread = (planes.shape[1] - counts.gather(1, planes.amax(1, keepdim=True))) // 255
    below = counts.cumsum(1) - counts
    equal = ((below + spread // 2) // spread.clamp(min=1)).clamp_(max=255)
    greys = torch.arange(256, device=pixels.device)
    tables = torch.where(spread > 0, equal, greys).byte()
    return look_up(pixels, tables.view(-1, 3, 256))
