"""Cutout and RandAugment as the official training script uses them, on squished uint8 images.

Augmentation is two functions. `draw` makes the random choices for a batch of samples and writes
them down as numbers; `apply` is pure and carries them out on the pixels of one. What sample i of
epoch e looks like depends on (seed, e, i) alone: not on the number of workers or ranks, on what
else is in its batch, nor on where a run went on.

The numbers of a sample are three steps of seven float32 columns (see `Step`), done in order, of
which a zero row does nothing. They know nothing of the image size, so the numbers of a batch are
one (B, 3, 7) array. `asl.images.augment_device.apply_batch` carries them out on a whole batch.

The semantics are Pillow's, to the bit for everything but the bicubic shear (within one grey level,
0.01 on average), in a quarter of the time: look-ups and arithmetic on whole planes.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from asl.errors import UsageError

Pixels = npt.NDArray[np.uint8]  # (3, S, S)
Operate = Callable[[Pixels, "Step", Pixels], None]  # (image, step, out)

POLICIES = ("recipe", "flip", "none")
CORNER_GREY = 128  # official training script: where a warp leaves nothing
PATCH_GREY = (125, 122, 113)  # official training script: RandAugment's small Cutout


class Step(NamedTuple):
    """One operation on one image: a row of the numbers.

    `operation` is an index into `OPERATIONS` and `amount` in its unit. (`x`, `y`), the centre of a
    cut as fractions of width and height in [0, 1), and its colour in 0..255 do nothing elsewhere.
    """

    operation: float
    amount: float = 0.0
    x: float = 0.0
    y: float = 0.0
    red: float = 0.0
    green: float = 0.0
    blue: float = 0.0


def draw(
    policy: str, seed: int, epoch: int, indices: Sequence[int] | npt.NDArray[np.integer]
) -> npt.NDArray[np.float32]:
    """The (B, 3, 7) numbers of B samples in `epoch`: of each three rows of `Step`.

    - "recipe": Cutout of half the side in a random colour, then two of the 15 operations, each with
      a level 1..9, uniformly and with repetition, and each applied with probability 0.5
      (official training script; no flip).
    - "flip": mirrored left to right with probability 0.5.
    - "none": nothing.

    Raises `UsageError` for any other policy.
    """
    numbers = np.zeros((len(indices), 3, len(Step._fields)), np.float32)
    if policy == "recipe":
        uniform = _uniform(seed, epoch, indices, 5 + 2 * 6)
        cuts, steps = numbers[:, 0], numbers[:, 1:]
        cuts[:, :2] = CUTOUT, 0.5
        cuts[:, 2:4] = uniform[:, :2]
        cuts[:, 4:] = np.floor(256 * uniform[:, 2:5])
        choice, level, applied, sign, x, y = np.moveaxis(uniform[:, 5:].reshape(-1, 2, 6), 2, 0)
        codes = RANDAUGMENT + (choice * (len(OPERATIONS) - RANDAUGMENT)).astype(int)
        start, span, signed = AMOUNTS[:, codes]
        span = np.where((sign < 0.5) & (signed > 0), -span, span)
        steps[..., 0], steps[..., 1] = codes, start + span * (1 + np.floor(9 * level)) / 9
        steps[..., 2], steps[..., 3], steps[..., 4:] = x, y, PATCH_GREY
        steps[applied >= 0.5] = 0
    elif policy == "flip":
        numbers[:, 0, 0] = np.where(_uniform(seed, epoch, indices, 1)[:, 0] < 0.5, FLIP, NOTHING)
    elif policy != "none":
        raise UsageError(f"unknown augmentation {policy!r}: choose one of {', '.join(POLICIES)}")
    return numbers


def _uniform(
    seed: int, epoch: int, indices: Sequence[int] | npt.NDArray[np.integer], columns: int
) -> npt.NDArray[np.float32]:
    """(B, columns) numbers in [0, 1), multiples of 2**-24: those of a sample know of no other.

    Each sample reads a SplitMix64 stream of its own (Steele, Lea & Flood, "Fast splittable
    pseudorandom number generators", 2014), which starts at a hash of (seed, epoch, index). The n-th
    number of such a stream is a function of n, so all are made at once: `draw` takes 0.07 ms for 64
    samples, with a NumPy generator for each it took 1.6 ms.
    """
    state = np.zeros(1, np.uint64)
    for word in ([seed & (2**64 - 1)], [epoch], indices):
        state = _mixed((state ^ np.array(word, np.uint64)) + GOLDEN)
    bits = _mixed(state[:, None] + GOLDEN * np.arange(1, columns + 1, dtype=np.uint64))
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step: 2**64 over the golden ratio


def _mixed(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer: every bit of the result depends on every bit that went in."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def apply(image: Tensor, numbers: npt.NDArray[np.float32], out: Tensor | None = None) -> Tensor:
    """A (3, S, S) uint8 image after its (3, 7) numbers of `draw`, in `out` if that is given.

    Pure: the image is left as it is, and `out` must not be its memory. Without `out` the image
    itself comes back where nothing is to do.
    """
    steps = [step for step in map(Step._make, numbers.tolist()) if step.operation != NOTHING]
    if not steps:
        return image if out is None else out.copy_(image)
    if out is None:
        out = torch.empty_like(image)
    *earlier, last = steps
    pixels = image.numpy()
    for step in earlier:
        before, pixels = pixels, np.empty_like(pixels)
        OPERATIONS[int(step.operation)].pixels(before, step, pixels)
    OPERATIONS[int(last.operation)].pixels(pixels, last, out.numpy())
    return out


# Each operation writes all of `out`, which is never the image itself.

# Geometry. Pillow's affine warps: pixel centres at + 0.5, nearest neighbour unless stated.


def _flip(image: Pixels, step: Step, out: Pixels) -> None:
    # NumPy copies a reversed axis byte by byte, torch a vector at a time: 13 times as fast.
    out[:] = torch.from_numpy(image).flip(2).numpy()


def _shear_x(image: Pixels, step: Step, out: Pixels) -> None:
    """Every row shifts by its own distance: a bicubic filter of four taps per row, then copies."""
    size = image.shape[2]
    taps, blocks = _shear_plan(step.amount, size)
    columns = np.empty((size, size + 4), np.float32)
    between = torch.empty(size, size + 1)  # columns x and x + 1, for x = -1 .. size - 1
    rows = np.empty((3, size, size + 1), np.uint8)
    for plane, row in zip(image, rows, strict=True):  # one at a time, which the cache has room for
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


@lru_cache(64)  # the recipe has 18 amounts; a plan takes a third of the time of the shear
def _shear_plan(amount: float, size: int) -> tuple[Tensor, list[tuple[int, ...]]]:
    """(4, S, 1) taps, and the blocks of rows that move alike: top, bottom, start, stop, shift."""
    taps, spans = shears(np.array([amount]), size)
    starts, stops, whole = spans[:, 0]
    moves = np.stack((starts, stops, whole + 1), 1)
    tops = np.flatnonzero(np.r_[True, (moves[1:] != moves[:-1]).any(1)])
    blocks = np.column_stack((tops, np.r_[tops[1:], size], moves[tops]))
    return torch.from_numpy(taps[:, 0, :, None]), [tuple(block) for block in blocks.tolist()]


ROUND_UP = 2**-10  # Pillow's bicubic rounds down: 127.9999 is 128


def shears(
    amounts: npt.NDArray[np.float64], size: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """What n shears do to each of S rows: (4, n, S) taps and (3, n, S) starts, stops and shifts.

    Pixel x of a row, for x from start to stop, is the sum of taps times pixels x + shift - 1 .. 2.
    """
    shift = amounts[:, None] * (np.arange(size) + 0.5)
    whole = np.floor(shift)
    t = (shift - whole).astype(np.float32)
    # Pillow's cubic convolution (a = -1); outside of the image its border is repeated.
    taps = np.stack((-t + 2 * t**2 - t**3, 1 - 2 * t**2 + t**3, t + t**2 - t**3, t**3 - t**2))
    starts = np.ceil(-shift - 0.5).clip(0, size)
    stops = np.ceil(size - shift - 0.5).clip(0, size)
    return taps, np.stack((starts, stops, whole)).astype(np.int32)


def _translate_x(image: Pixels, step: Step, out: Pixels) -> None:
    width = image.shape[2]
    shift = int(np.floor(step.amount * width + 0.5))
    left, right = max(0, -shift), min(width, width - shift)
    out[:] = CORNER_GREY
    out[:, :, left:right] = image[:, :, left + shift : right + shift]


def _transposed(along_x: Operate) -> Operate:
    def along_y(image: Pixels, step: Step, out: Pixels) -> None:
        along_x(image.swapaxes(1, 2), step, out.swapaxes(1, 2))

    return along_y


def _rotate(image: Pixels, step: Step, out: Pixels) -> None:
    turned = _picture(image).rotate(step.amount, fillcolor=(CORNER_GREY,) * 3)
    for band, plane in zip("RGB", out, strict=True):
        plane[:] = np.frombuffer(turned.tobytes("raw", band), np.uint8).reshape(plane.shape)


def _picture(image: Pixels) -> Image.Image:
    return Image.merge("RGB", [Image.fromarray(plane) for plane in image])


def _cut(image: Pixels, step: Step, out: Pixels, side: int) -> None:
    _, height, width = image.shape
    top, left = int(step.y * height) - side // 2, int(step.x * width) - side // 2
    out[:] = image
    hole = out[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)]
    for plane, grey in zip(hole, (step.red, step.green, step.blue), strict=True):
        plane.fill(grey)


def _cutout(image: Pixels, step: Step, out: Pixels) -> None:
    _cut(image, step, out, side=round(step.amount * image.shape[1]))


def _patch(image: Pixels, step: Step, out: Pixels) -> None:
    _cut(image, step, out, side=round(step.amount))


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


LUMA = (19595, 38470, 7471)  # ITU-R 601-2 in Pillow's 16-bit fixed point


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
    """Pillow's SMOOTH: 3 x 3 mean with the centre counted five times, the border kept."""
    width = image.shape[2]
    smooth = image.astype(np.uint16)
    # On planes as one line each, where neighbours are 1 and `width` apart: long loops are fast, and
    # what wraps around from row to row is border.
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


def _color(image: Pixels, step: Step, out: Pixels) -> None:
    _blend(_luma(image), image, step.amount, out)


def _sharpness(image: Pixels, step: Step, out: Pixels) -> None:
    _blend(_smooth(image), image, step.amount, out)


def _contrast(image: Pixels, step: Step, out: Pixels) -> None:
    luma = _luma(image)
    mean = (2 * int(luma.sum(dtype=np.uint64)) + luma.size) // (2 * luma.size)
    _look_up(image, _levels(mean + np.float32(step.amount) * (GREYS - np.float32(mean))), out)


def _brightness(image: Pixels, step: Step, out: Pixels) -> None:
    _look_up(image, _levels(np.float32(step.amount) * GREYS), out)


def _posterize(image: Pixels, step: Step, out: Pixels) -> None:
    np.bitwise_and(image, 256 - 2 ** (8 - round(step.amount)), out=out)


def _solarize(image: Pixels, step: Step, out: Pixels) -> None:
    bright = (image >= math.ceil(step.amount)).view(np.uint8)
    np.bitwise_xor(image, np.negative(bright, out=bright), out=out)


def _auto_contrast(image: Pixels, step: Step, out: Pixels) -> None:
    channels = image.reshape(3, -1)
    low, high = channels.min(1, keepdims=True), channels.max(1, keepdims=True)
    scale = 255.0 / np.maximum(high - low, 1)
    _look_up(image, np.where(high > low, _levels(GREYS * scale - low * scale), GREYS), out)


def _equalize(image: Pixels, step: Step, out: Pixels) -> None:
    # Pillow counts three interleaved channels in less time than anybody counts one after another.
    counts = np.reshape(_picture(image).histogram(), (3, 256))
    _look_up(image, np.stack([_equalizing(channel) for channel in counts]), out)


def _equalizing(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    spread = int(counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
    if spread == 0:
        return GREYS
    return _levels((counts.cumsum() - counts + spread // 2) // spread)


def _invert(image: Pixels, step: Step, out: Pixels) -> None:
    np.invert(image, out=out)


GREYS = np.arange(256, dtype=np.uint8)


def _levels(values: npt.NDArray[np.number]) -> npt.NDArray[np.uint8]:
    """Cut off at 0 and 255 and rounded down, as Pillow does."""
    return values.clip(0, 255).astype(np.uint8)


class Operation(NamedTuple):
    """What a code means: the amount is `start + span * level / 9`, the span's sign drawn if so."""

    name: str
    pixels: Operate
    start: float = 0.0
    span: float = 0.0
    signed: bool = False


OPERATIONS = (
    Operation("Nothing", lambda image, step, out: np.copyto(out, image)),
    Operation("Flip", _flip),
    Operation("Cutout", _cutout),  # fraction of the side
    # RandAugment of the official training script, at level 0 and what level 9 adds
    Operation("ShearX", _shear_x, 0.0, 0.3, signed=True),  # pixels per row
    Operation("ShearY", _transposed(_shear_x), 0.0, 0.3, signed=True),
    Operation("TranslateX", _translate_x, 0.0, 150 / 331, signed=True),  # fraction of the side
    Operation("TranslateY", _transposed(_translate_x), 0.0, 150 / 331, signed=True),
    Operation("Rotate", _rotate, 0.0, 30.0),  # degrees, counter-clockwise
    Operation("Color", _color, 1.0, 0.9, signed=True),  # factor
    Operation("Contrast", _contrast, 1.0, 0.9, signed=True),
    Operation("Sharpness", _sharpness, 1.0, 0.9, signed=True),
    Operation("Brightness", _brightness, 1.0, 0.9, signed=True),
    Operation("Posterize", _posterize, 8.0, -4.0),  # bits kept, rounded
    Operation("Solarize", _solarize, 256.0, -256.0),  # inverted from this value on
    Operation("Patch", _patch, 0.0, 20.0),  # pixels, rounded: RandAugment's own Cutout
    Operation("AutoContrast", _auto_contrast),
    Operation("Equalize", _equalize),
    Operation("Invert", _invert),
)
NOTHING, FLIP, CUTOUT, RANDAUGMENT = range(4)  # codes; RandAugment's 15 come last
AMOUNTS = np.array([operation[2:] for operation in OPERATIONS]).T  # start, span, signed by code
