"""The numbers of `asl.images.augment.draw` carried out on a whole uint8 batch, where the model is.

Samples are grouped by what is done to them. The host knows the numbers, so it lists each group's
samples, works out its parameters and sends all of them in one transfer; the device waits for
nothing else and nothing waits for it. A batch of any size takes the same number of kernels.

The results are those of `asl.images.augment.apply` to the bit, but for the shears, whose sums may
round differently: within one grey level.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from asl.images.augment import CORNER_GREY, LUMA, OPERATIONS, ROUND_UP, shears

Array = npt.NDArray[Any]

CODES = {operation.name: code for code, operation in enumerate(OPERATIONS)}


def apply_batch(images: Tensor, numbers: npt.NDArray[np.float32]) -> Tensor:
    """(B, 3, S, S) uint8 images, on any device, after their (B, 3, 7) numbers of `draw`.

    Pure: the batch is left as it is, and comes back itself where nothing is to do.
    """
    work: list[tuple[Callable[..., Tensor], int]] = []
    arrays: list[Array] = []
    for rows in numbers.astype(np.float64).swapaxes(0, 1):
        group_of = GROUP_OF[rows[:, 0].astype(int)]
        for group in set(group_of.tolist()) - {NO_GROUP}:
            chosen = np.flatnonzero(group_of == group)
            parameters = GROUPS[group].parameters(rows[chosen], images.shape[-1])
            work.append((GROUPS[group].pixels, len(parameters)))
            arrays += chosen, *parameters
    if not work:
        return images
    images = images.clone()
    sent = iter(_sent(arrays, images.device))
    for pixels, count in work:
        samples = next(sent)
        done = pixels(images.index_select(0, samples), *islice(sent, count))
        images.index_copy_(0, samples, done)
    return images


def _sent(arrays: list[Array], device: torch.device) -> list[Tensor]:
    """The same on the device, in one copy that nothing waits for."""
    lengths = [-(-array.nbytes // 8) * 8 for array in arrays]  # each starts where any type may
    padded = (a.tobytes().ljust(length) for a, length in zip(arrays, lengths, strict=True))
    packed = torch.frombuffer(bytearray().join(padded), dtype=torch.uint8)
    if device.type == "cuda":
        packed = packed.pin_memory()
    pieces = torch.split(packed.to(device, non_blocking=True), lengths)
    return [
        piece[: array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
        for piece, array in zip(pieces, arrays, strict=True)
    ]


# Of each group two functions. The first turns the (n, 7) float64 rows of `Step` and the side of the
# images into arrays; the second gets these as tensors, after the (n, 3, S, S) images.


def _holes(rows: Array, size: int) -> tuple[Array, ...]:
    """(n, 2) first and last + 1 rows and columns, (n, 3) colours."""
    side = np.rint(rows[:, 1] * np.where(rows[:, 0] == CODES["Cutout"], size, 1)).astype(np.int64)
    starts = (rows[:, 3:1:-1] * size).astype(np.int64) - side[:, None] // 2
    return starts, starts + side[:, None], rows[:, 4:].astype(np.uint8)


def _cut(pixels: Tensor, starts: Tensor, stops: Tensor, colours: Tensor) -> Tensor:
    at = torch.arange(pixels.shape[-1], device=pixels.device)
    inside = (at >= starts[..., None]) & (at < stops[..., None])
    hole = inside[:, 0, :, None] & inside[:, 1, None, :]
    return torch.where(hole[:, None], colours[..., None, None], pixels)


def _matrices(rows: Array, size: int) -> tuple[Array]:
    """(n, 2, 3): from where in the image x and y come, in Pillow's 16-bit fixed point."""
    codes, amounts = rows[:, 0], rows[:, 1]
    angles = -np.radians(np.where(codes == CODES["Rotate"], amounts, 0))
    cos, sin = np.cos(angles).round(15), np.sin(angles).round(15)
    matrices = np.stack((cos, sin, np.zeros_like(cos), -sin, cos, np.zeros_like(cos)), 1)
    matrices = matrices.reshape(-1, 2, 3)
    matrices[:, :, 2] = matrices[:, :, :2] @ [-size / 2, -size / 2] + size / 2
    matrices[:, :, 2] += (matrices[:, :, 0] + matrices[:, :, 1]) / 2
    for axis, name in enumerate(("TranslateX", "TranslateY")):
        matrices[:, axis, 2] += np.where(codes == CODES[name], np.floor(amounts * size + 0.5), 0)
    matrices[codes == CODES["Flip"], 0] = -1, 0, size - 0.5
    return (np.floor(matrices * 65536 + 0.5).astype(np.int64),)


def _warp(pixels: Tensor, matrices: Tensor) -> Tensor:
    """Nearest neighbour: Pillow's affine warps."""
    size = pixels.shape[-1]
    at = torch.arange(size, device=pixels.device)
    by_x, by_y, start = matrices[..., None, None].unbind(2)
    sources = (by_x * at + (by_y * at[:, None] + start)) >> 16
    nearest = sources.clamp(0, size - 1)
    outside = (nearest != sources).any(1, keepdim=True)
    where = (nearest[:, 1:] * size + nearest[:, :1]).flatten(2).expand(-1, 3, -1)
    warped = pixels.flatten(2).gather(2, where).view_as(pixels)
    return warped.masked_fill_(outside, CORNER_GREY)


def _shears(rows: Array, size: int) -> tuple[Array, ...]:
    return rows[:, 0] == CODES["ShearY"], *shears(rows[:, 1], size)


def _shear(pixels: Tensor, along_y: Tensor, taps: Tensor, spans: Tensor) -> Tensor:
    size = pixels.shape[-1]
    along_y = along_y[:, None, None, None]
    rows = torch.where(along_y, pixels.mT, pixels)
    # Each row is gathered where it goes, with the neighbours that the taps need.
    at = torch.arange(-1, size + 2, device=pixels.device)
    starts, stops, shift = spans[..., None]
    columns = (at + shift).clamp_(0, size - 1)[:, None].expand(-1, 3, -1, -1)
    moved = rows.gather(3, columns).float()
    sums = torch.full_like(rows, ROUND_UP, dtype=torch.float32)
    for first, tap in enumerate(taps[:, :, None, :, None]):
        sums.addcmul_(tap, moved[..., first : first + size])
    at = at[1:-2]
    outside = (at < starts) | (at >= stops)
    sheared = sums.clamp_(0, 255).byte().masked_fill_(outside[:, None], CORNER_GREY)
    return torch.where(along_y, sheared.mT, sheared)


def _factors(rows: Array, size: int) -> tuple[Array]:
    return (rows[:, 1].astype(np.float32),)


def _blend(degenerate: Tensor, image: Tensor, factors: Tensor) -> Tensor:
    # Three kernels for what could be one: a fused multiply-add rounds differently.
    mix = (image - degenerate).mul_(factors).add_(degenerate)
    return mix.clamp_(0, 255).byte()


def _luma(pixels: Tensor) -> Tensor:
    """(n, S, S): ITU-R 601-2 in Pillow's 16-bit fixed point."""
    red, green, blue = pixels.int().unbind(1)
    luma = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    return luma.add_(1 << 15).bitwise_right_shift_(16)


def _color(pixels: Tensor, factors: Tensor) -> Tensor:
    return _blend(_luma(pixels)[:, None].float(), pixels, factors[:, None, None, None])


def _sharpness(pixels: Tensor, factors: Tensor) -> Tensor:
    """Blends with Pillow's SMOOTH: 3 x 3 mean, the centre counted five times, the border kept."""
    smooth = pixels.float()
    mean = avg_pool2d(smooth, 3, stride=1, padding=1)
    mean.mul_(9).add_(smooth, alpha=4).add_(6.5).div_(13).floor_()
    smooth[..., 1:-1, 1:-1] = mean[..., 1:-1, 1:-1]
    return _blend(smooth, pixels, factors[:, None, None, None])


def _tables(rows: Array, size: int) -> tuple[Array]:
    """(n, 1, 256): what an operation does to each grey level, whatever the image."""
    codes, amounts = rows[:, :2].T[..., None]
    greys = np.arange(256)
    dropped = 2 ** (8 - np.rint(amounts)).clip(0, 8).astype(int)
    tables = np.select(
        [codes == CODES[name] for name in ("Brightness", "Posterize", "Solarize")],
        [
            (amounts.astype(np.float32) * greys.astype(np.float32)).clip(0, 255).astype(int),
            greys - greys % dropped,
            np.where(greys < amounts, greys, 255 - greys),
        ],
        255 - greys,
    )
    return (tables[:, None].astype(np.uint8),)


def _look_up(pixels: Tensor, tables: Tensor) -> Tensor:
    """Each channel of each image through its (n, 3, 256) table, or through one of (n, 1, 256)."""
    levels = pixels.flatten(2).long()
    return tables.expand(-1, 3, -1).gather(2, levels).view_as(pixels)


def _contrast(pixels: Tensor, factors: Tensor) -> Tensor:
    luma = _luma(pixels).flatten(1)
    mean = (2 * luma.sum(1, keepdim=True) + luma.shape[1]) // (2 * luma.shape[1])
    greys = torch.arange(256, device=pixels.device)
    return _look_up(pixels, _blend(mean.float(), greys, factors[:, None])[:, None])


def _no_parameters(rows: Array, size: int) -> tuple[()]:
    return ()


def _auto_contrast(pixels: Tensor) -> Tensor:
    low, high = pixels.flatten(2).aminmax(dim=2, keepdim=True)
    low, span = low.double(), (high - low).double()
    greys = torch.arange(256, device=pixels.device)
    scale = span.new_full((), 255) / span.clamp(min=1)  # 255 / x would multiply by 1 / x
    stretched = (greys * scale).sub_(low * scale).clamp_(0, 255)
    return _look_up(pixels, torch.where(span > 0, stretched, greys).byte())


def _equalize(pixels: Tensor) -> Tensor:
    planes = pixels.flatten(0, 1).flatten(1).long()
    counts = planes.new_zeros(len(planes), 256)
    counts.scatter_add_(1, planes, planes.new_ones(1).expand_as(planes))
    spread = (planes.shape[1] - counts.gather(1, planes.amax(1, keepdim=True))) // 255
    below = counts.cumsum(1) - counts
    equal = ((below + spread // 2) // spread.clamp(min=1)).clamp_(max=255)
    greys = torch.arange(256, device=pixels.device)
    tables = torch.where(spread > 0, equal, greys).byte()
    return _look_up(pixels, tables.view(-1, 3, 256))


class Group(NamedTuple):
    """Operations that are carried out together."""

    names: tuple[str, ...]
    parameters: Callable[[Array, int], tuple[Array, ...]]
    pixels: Callable[..., Tensor]


GROUPS = (
    Group(("Cutout", "Patch"), _holes, _cut),
    Group(("Flip", "TranslateX", "TranslateY", "Rotate"), _matrices, _warp),
    Group(("ShearX", "ShearY"), _shears, _shear),
    Group(("Color",), _factors, _color),
    Group(("Sharpness",), _factors, _sharpness),
    Group(("Brightness", "Posterize", "Solarize", "Invert"), _tables, _look_up),
    Group(("Contrast",), _factors, _contrast),
    Group(("AutoContrast",), _no_parameters, _auto_contrast),
    Group(("Equalize",), _no_parameters, _equalize),
)
NO_GROUP = -1
_group_of_name = {name: number for number, group in enumerate(GROUPS) for name in group.names}
GROUP_OF = np.array([_group_of_name.get(name, NO_GROUP) for name in CODES])
