"""The operations of `asl.images.augment` on the pixels of one image, in NumPy and Pillow.

The results are Pillow's to the bit, but for the bicubic shears (within one grey level, 0.01 on
average), in a quarter of Pillow's time: most are look-ups and arithmetic on whole planes.

Each function takes a (3, S, S) uint8 image and its `Transform`, and writes all of `out`, which is
never the image itself.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

Pixels = npt.NDArray[np.uint8]  # (3, S, S)
T = TypeVar("T")

CORNER_GREY = 128  # official training script: where a warp leaves nothing
LUMA = (19595, 38470, 7471)  # ITU-R 601-2 in Pillow's 16-bit fixed point
ROUND_UP = 2**-10  # Pillow's bicubic rounds down: 127.9999 is 128
GREYS = np.arange(256, dtype=np.uint8)


class Transform(NamedTuple, Generic[T]):
    """One operation with what was drawn for it: of one image, or as arrays of several.

    `operation` is an index into `augment.OPERATIONS`, `magnitude` in the unit of that operation.
    A cut also has its centre, (`x`, `y`) as fractions of width and height in [0, 1), and its
    colour in 0..255.
    """

    operation: T
    magnitude: T
    x: T
    y: T
    red: T
    green: T
    blue: T


Operate = Callable[[Pixels, Transform[float], Pixels], None]


def nothing(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """Copy the image."""
    out[:] = image


# Geometry. Warps are Pillow's affine ones: pixel centres at + 0.5, nearest neighbour unless stated.


def flip(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """Mirror left and right."""
    # NumPy copies a reversed axis byte by byte, torch a vector at a time: 13 times as fast.
    out[:] = torch.from_numpy(image).flip(2).numpy()


def shear_x(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """Shift each row by `magnitude` pixels more than the row above it, bicubic."""
    # Every row has its own shift: a filter of four taps per row, then copies of blocks.
    size = image.shape[2]
    taps, blocks = _shear_plan(transform.magnitude, size)
    columns = np.empty((size, size + 4), np.float32)
    between = torch.empty(size, size + 1)  # columns x and x + 1, for x = -1 .. size - 1
    rows = np.empty((3, size, size + 1), np.uint8)
    for plane, row in zip(
        image, rows, strict=True
    ):  # one plane at a time fits into the CPU's cache
        columns[:, 2:-2], columns[:, :2], columns[:, -2:] = plane, plane[:, :1], plane[:, -1:]
        sums = torch.tensor(ROUND_UP)
        for first, tap in enumerate(taps):  # torch's addcmul takes a third of NumPy's time
            pixels = torch.from_numpy(columns[:, first : first + size + 1])
            sums = torch.addcmul(sums, tap, pixels, out=between)
        row[:] = between.clamp_(0, 255).numpy()
    sheared = np.full_like(rows, CORNER_GREY, shape=image.shape)
    for top, bottom, start, stop, shift in blocks:
        sheared[:, top:bottom, start:stop] = rows[:, top:bottom, start + shift : stop + shift]
    out[:] = sheared


@lru_cache(64)  # the recipe has 18 magnitudes; a plan takes a third of the time of the shear
def _shear_plan(magnitude: float, size: int) -> tuple[Tensor, list[tuple[int, ...]]]:
    """(4, S, 1) taps, and the blocks of rows that move alike: top, bottom, start, stop, shift."""
    taps, spans = shears(np.array([magnitude]), size)
    starts, stops, whole = spans[0]
    moves = np.stack((starts, stops, whole + 1), 1)
    tops = np.flatnonzero(np.r_[True, (moves[1:] != moves[:-1]).any(1)])
    blocks = np.column_stack((tops, np.r_[tops[1:], size], moves[tops]))
    return torch.from_numpy(taps[0, :, :, None]), [tuple(block) for block in blocks.tolist()]


def shears(
    magnitudes: npt.NDArray[np.float64], size: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """What n shears do to each of S rows: (n, 4, S) taps and (n, 3, S) starts, stops and shifts.

    Pixel x of a row, for x from start to stop, is the sum of taps times pixels x + shift - 1 .. 2.
    """
    shift = magnitudes[:, None] * (np.arange(size) + 0.5)
    whole = np.floor(shift)
    t = (shift - whole).astype(np.float32)
    # Pillow's cubic convolution (a = -1), which repeats the border outside of the image.
    taps = np.stack((-t + 2 * t**2 - t**3, 1 - 2 * t**2 + t**3, t + t**2 - t**3, t**3 - t**2), 1)
    starts = np.ceil(-shift - 0.5).clip(0, size)
    stops = np.ceil(size - shift - 0.5).clip(0, size)
    return taps, np.stack((starts, stops, whole), 1).astype(np.int32)


def translate_x(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """Shift to the left by `magnitude`, a fraction of the side."""
    width = image.shape[2]
    shift = int(np.floor(transform.magnitude * width + 0.5))
    left, right = max(0, -shift), min(width, width - shift)
    out[:] = CORNER_GREY
    out[:, :, left:right] = image[:, :, left + shift : right + shift]


def shear_y(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """`shear_x` along y."""
    shear_x(image.swapaxes(1, 2), transform, out.swapaxes(1, 2))


def translate_y(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """`translate_x` along y: up."""
    translate_x(image.swapaxes(1, 2), transform, out.swapaxes(1, 2))


def rotate(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """Turn counter-clockwise by `magnitude` degrees."""
    turned = _picture(image).rotate(transform.magnitude, fillcolor=(CORNER_GREY,) * 3)
    for band, plane in zip("RGB", out, strict=True):
        plane[:] = np.frombuffer(turned.tobytes("raw", band), np.uint8).reshape(plane.shape)


def _picture(image: Pixels) -> Image.Image:
    return Image.merge("RGB", [Image.fromarray(plane) for plane in image])


def cutout(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """Fill a square around (x, y), `magnitude` of the side, with one colour."""
    reach = round(transform.magnitude * image.shape[1]) // 2
    # The official script draws Pillow's rectangle, which includes its end: 113 px at 224.
    _fill(image, transform, out, before=reach, after=reach + 1)


def patch(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """RandAugment's own Cutout: `magnitude` pixels, rounded to an integer and then down to even."""
    reach = round(transform.magnitude) // 2  # the official package fills pixel by pixel, without it
    _fill(image, transform, out, before=reach, after=reach)


def _fill(image: Pixels, transform: Transform[float], out: Pixels, before: int, after: int) -> None:
    _, height, width = image.shape
    x, y = int(transform.x * width), int(transform.y * height)
    out[:] = image
    hole = out[:, max(0, y - before) : y + after, max(0, x - before) : x + after]
    colour = transform.red, transform.green, transform.blue
    for plane, grey in zip(hole, colour, strict=True):
        plane.fill(grey)


# Colour. ImageEnhance's blends between the image and a degenerate one, and look-ups per channel.


def _blend(
    degenerate: npt.NDArray[np.unsignedinteger], image: Pixels, factor: float, out: Pixels
) -> None:
    """In float32, cut off at 0 and 255 and rounded down, as Pillow does."""
    starts = np.broadcast_to(degenerate.astype(np.float32), image.shape)
    mix = np.empty(image.shape[1:], np.float32)
    for start, plane, result in zip(starts, image, out, strict=True):
        mix[:] = plane
        mix -= start
        mix *= np.float32(factor)
        mix += start
        if factor > 1:
            mix.clip(np.float32(0), np.float32(255), out=mix)
        np.copyto(result, mix, casting="unsafe")


def _luma(image: Pixels) -> npt.NDArray[np.uint32]:
    channels = image.astype(np.uint32)
    channels *= np.array(LUMA, np.uint32)[:, None, None]
    luma: npt.NDArray[np.uint32] = channels[0]
    luma += channels[1]
    luma += channels[2]
    luma += 1 << 15
    luma >>= 16
    return luma


def _smooth(image: Pixels) -> npt.NDArray[np.uint16]:
    """Pillow's SMOOTH: 3 x 3 mean with the centre counted five times; the border stays."""
    width = image.shape[2]
    smooth = image.astype(np.uint16)
    # Each plane is taken as one line, where neighbours are 1 and `width` apart: long loops are
    # fast, and what wraps around from row to row is border.
    line = smooth.reshape(3, -1)
    sums = line[:, :-2] + line[:, 1:-1]
    sums += line[:, 2:]
    inner = sums[:, : -2 * width] + sums[:, width:-width]
    inner += sums[:, 2 * width :]
    inner += 4 * line[:, width + 1 : -width - 1]
    inner *= 2
    inner += 13
    inner //= 26
    line[:, width + 1 : -width - 1] = inner
    smooth[:, :, 0], smooth[:, :, -1] = image[:, :, 0], image[:, :, -1]
    return smooth


def _look_up(image: Pixels, tables: npt.NDArray[np.uint8], out: Pixels) -> None:
    """Each channel through its table of 256, or all through the same one."""
    # bytearray.translate takes half the time of np.take and two thirds of bytes.translate.
    for plane, table, result in zip(image, np.broadcast_to(tables, (3, 256)), out, strict=True):
        looked_up = np.frombuffer(bytearray(plane).translate(table), np.uint8)
        result[:] = looked_up.reshape(plane.shape)


def color(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """Saturation times `magnitude`."""
    _blend(_luma(image), image, transform.magnitude, out)


def sharpness(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """Distance from the smoothed image times `magnitude`."""
    _blend(_smooth(image), image, transform.magnitude, out)


def contrast(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """Distance from the mean grey times `magnitude`."""
    luma = _luma(image)
    mean = (2 * int(luma.sum(dtype=np.uint64)) + luma.size) // (2 * luma.size)
    factor = np.float32(transform.magnitude)
    _look_up(image, _levels(mean + factor * (GREYS - np.float32(mean))), out)


def brightness(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """Values times `magnitude`."""
    _look_up(image, _levels(np.float32(transform.magnitude) * GREYS), out)


def posterize(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """Keep the upper `magnitude` bits, rounded."""
    np.bitwise_and(image, 256 - 2 ** (8 - round(transform.magnitude)), out=out)


def solarize(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """Invert values of `magnitude` and more."""
    bright = (image >= math.ceil(transform.magnitude)).view(np.uint8)
    np.bitwise_xor(image, np.negative(bright, out=bright), out=out)


def auto_contrast(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """Stretch each channel to 0..255."""
    channels = image.reshape(3, -1)
    low, high = channels.min(1, keepdims=True), channels.max(1, keepdims=True)
    scale = 255.0 / np.maximum(high - low, 1)
    _look_up(image, np.where(high > low, _levels(GREYS * scale - low * scale), GREYS), out)


def equalize(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """Flatten the histogram of each channel."""
    # Pillow counts three interleaved channels in less time than anybody counts one after another.
    counts = np.reshape(_picture(image).histogram(), (3, 256))
    _look_up(image, np.stack([_equalizing(channel) for channel in counts]), out)


def _equalizing(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    spread = int(counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
    if spread == 0:
        return GREYS
    return _levels((counts.cumsum() - counts + spread // 2) // spread)


def invert(image: Pixels, transform: Transform[float], out: Pixels) -> None:
    """255 minus the values."""
    np.invert(image, out=out)


def _levels(values: npt.NDArray[np.number]) -> npt.NDArray[np.uint8]:
    """Cut off at 0 and 255 and rounded down, as Pillow does."""
    return values.clip(0, 255).astype(np.uint8)
