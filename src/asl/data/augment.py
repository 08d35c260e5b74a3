"""Cutout and RandAugment as the official training script uses them, on squished uint8 images.

Augmentation is two functions. `draw` makes the random choices for one sample and writes them down
as numbers; `apply` is pure and carries them out on pixels. What sample i of epoch e looks like
depends on (seed, e, i) alone: not on the number of workers or ranks, nor on where a run went on.

The numbers of a sample are three steps of seven float32 columns (see `Step`), done in order, of
which a zero row does nothing. They know nothing of the image size, so the numbers of a batch stack
into one (B, 3, 7) array.

The semantics are Pillow's, to the bit for everything but the bicubic shear (within one grey level,
0.01 on average), in less than half the time: look-up tables and arithmetic on whole planes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from asl.errors import UsageError

Pixels = npt.NDArray[np.uint8]  # (3, H, W)

POLICIES = ("recipe", "flip", "none")
CORNER_GREY = 128  # official training script: where a warp leaves nothing
PATCH_GREY = (125, 122, 113)  # official training script: RandAugment's small Cutout


class Step(NamedTuple):
    """One operation on one image: a row of the numbers.

    `operation` is an index into `OPERATIONS` and `amount` in its unit. (`x`, `y`), the centre of a
    cut as fractions of width and height in [0, 1), and its colour in 0..255 are 0 elsewhere.
    """

    operation: float
    amount: float = 0.0
    x: float = 0.0
    y: float = 0.0
    red: float = 0.0
    green: float = 0.0
    blue: float = 0.0


def draw(policy: str, seed: int, epoch: int, index: int) -> npt.NDArray[np.float32]:
    """The (3, 7) numbers of sample `index` in `epoch`: three rows of `Step`.

    - "recipe": Cutout of half the side in a random colour, then two of the 15 operations, each with
      a level 1..9, uniformly and with repetition, and each applied with probability 0.5
      (official training script; no flip).
    - "flip": mirrored left to right with probability 0.5.
    - "none": nothing.

    Raises `UsageError` for any other policy.
    """
    # A counter-based generator: (epoch, index) is an address in the stream of the seed.
    random = np.random.Generator(np.random.Philox(key=seed, counter=(0, 0, epoch, index)))
    numbers = np.zeros((3, len(Step._fields)), np.float32)
    if policy == "recipe":
        numbers[0] = CUTOUT, 0.5, *random.random(2), *random.integers(256, size=3)
        for row in numbers[1:]:
            code = random.integers(RANDAUGMENT, len(OPERATIONS))
            level = random.integers(1, 10)
            applied, negative = random.random(2) < 0.5
            if applied:
                _, _, start, span, signed = OPERATIONS[code]
                amount = start + span * level / 9 * (-1 if signed and negative else 1)
                row[:] = code, amount, *random.random(2), *PATCH_GREY
    elif policy == "flip":
        numbers[0, 0] = FLIP if random.random() < 0.5 else NOTHING
    elif policy != "none":
        raise UsageError(f"unknown augmentation {policy!r}: choose one of {', '.join(POLICIES)}")
    return numbers


def apply(image: Tensor, numbers: npt.NDArray[np.float32]) -> Tensor:
    """A (3, S, S) uint8 image after the (3, 7) numbers of `draw`.

    Pure: the image is left as it is, and comes back itself where there is nothing to do.
    """
    if not numbers[:, 0].any():
        return image
    pixels = image.numpy()
    for step in map(Step._make, numbers.tolist()):
        pixels = OPERATIONS[int(step.operation)].pixels(pixels, step)
    return torch.from_numpy(pixels)


# Geometry. Pillow's affine warps: pixel centres at + 0.5, nearest neighbour unless stated.


def _flip(image: Pixels, step: Step) -> Pixels:
    # NumPy copies a reversed axis byte by byte, torch a vector at a time: 13 times as fast.
    flipped: Pixels = torch.from_numpy(image).flip(2).numpy()
    return flipped


def _shear_x(image: Pixels, step: Step) -> Pixels:
    """Every row shifts by its own distance: a bicubic filter of four taps per row, then a copy."""
    _, height, width = image.shape
    shift = step.amount * (np.arange(height) + 0.5)
    whole = np.floor(shift)
    # Pillow's cubic (a = -1) between columns x and x + 1, for x = -1 .. width - 1; torch's addcmul
    # makes no temporaries and takes a third of NumPy's time.
    t = torch.from_numpy(shift - whole).float()[:, None]
    taps = (-t + 2 * t**2 - t**3, 1 - 2 * t**2 + t**3, t + t**2 - t**3, t**3 - t**2)
    columns = torch.from_numpy(np.pad(image, ((0, 0), (0, 0), (2, 2)), mode="edge")).float()
    between = torch.full((3, height, width + 1), 2**-10)  # Pillow rounds down: 127.9999 is 128
    for first, tap in enumerate(taps):
        between.addcmul_(tap, columns[:, :, first : first + width + 1])
    rows = between.clamp_(0, 255).numpy().astype(np.uint8)

    sheared = np.full(image.shape, CORNER_GREY, np.uint8)
    starts = np.ceil(-shift - 0.5).clip(0, width)
    stops = np.ceil(width - shift - 0.5).clip(0, width)
    spans = np.stack([starts, stops, whole + 1], 1).astype(int).tolist()
    for y, (start, stop, offset) in enumerate(spans):
        sheared[:, y, start:stop] = rows[:, y, start + offset : stop + offset]
    return sheared


def _translate_x(image: Pixels, step: Step) -> Pixels:
    width = image.shape[2]
    shift = int(np.floor(step.amount * width + 0.5))
    left, right = max(0, -shift), min(width, width - shift)
    moved = np.full_like(image, CORNER_GREY)
    moved[:, :, left:right] = image[:, :, left + shift : right + shift]
    return moved


def _transposed(along_x: Callable[[Pixels, Step], Pixels]) -> Callable[[Pixels, Step], Pixels]:
    def along_y(image: Pixels, step: Step) -> Pixels:
        return np.ascontiguousarray(along_x(image.swapaxes(1, 2), step).swapaxes(1, 2))

    return along_y


def _rotate(image: Pixels, step: Step) -> Pixels:
    picture = Image.merge("RGB", [Image.fromarray(plane) for plane in image])
    turned = picture.rotate(step.amount, fillcolor=(CORNER_GREY,) * 3)
    return np.stack([np.asarray(plane) for plane in turned.split()])


def _cut(image: Pixels, step: Step, side: int) -> Pixels:
    _, height, width = image.shape
    top, left = int(step.y * height) - side // 2, int(step.x * width) - side // 2
    cut = image.copy()
    hole = cut[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)]
    hole[:] = np.reshape((step.red, step.green, step.blue), (3, 1, 1))
    return cut


def _cutout(image: Pixels, step: Step) -> Pixels:
    return _cut(image, step, side=round(step.amount * image.shape[1]))


def _patch(image: Pixels, step: Step) -> Pixels:
    return _cut(image, step, side=round(step.amount))


# Colour. ImageEnhance's blends between the image and a degenerate one, and look-ups per channel.


def _blend(degenerate: npt.NDArray[np.number], image: Pixels, factor: float) -> Pixels:
    """In float32, cut off at 0 and 255 and rounded down, as Pillow does."""
    start = degenerate.astype(np.float32)
    mix = image - start
    mix *= np.float32(factor)
    mix += start
    return mix.clip(0, 255, out=mix).astype(np.uint8)


def _grey(image: Pixels) -> Pixels:
    # ITU-R 601-2 in Pillow's 16-bit fixed point; the sums stay below 2**24, so float32 is exact.
    red, green, blue = image
    weights = np.float32(19595 / 65536), np.float32(38470 / 65536), np.float32(7471 / 65536)
    luma = red * weights[0] + green * weights[1] + blue * weights[2] + np.float32(0.5)
    grey: Pixels = luma.astype(np.uint8)
    return grey


def _smooth(image: Pixels) -> Pixels:
    """Pillow's SMOOTH: 3 x 3 mean with the centre counted five times, the border kept."""
    rows = np.add(image[:, :-2], image[:, 1:-1], dtype=np.uint16) + image[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    sums += np.multiply(image[:, 1:-1, 1:-1], 4, dtype=np.uint16)
    smooth = image.copy()
    smooth[:, 1:-1, 1:-1] = (2 * sums + 13) // 26
    return smooth


def _look_up(image: Pixels, tables: npt.NDArray[np.uint8]) -> Pixels:
    """Each channel through its table of 256, or all through the same one."""
    # bytearray.translate takes half the time of np.take and two thirds of bytes.translate.
    planes = [
        np.frombuffer(bytearray(plane).translate(table), np.uint8)
        for plane, table in zip(image, np.broadcast_to(tables, (3, 256)), strict=True)
    ]
    return np.stack(planes).reshape(image.shape)


GREYS = np.arange(256, dtype=np.uint8)


def _color(image: Pixels, step: Step) -> Pixels:
    return _blend(_grey(image), image, step.amount)


def _contrast(image: Pixels, step: Step) -> Pixels:
    mean = np.floor(_grey(image).mean() + 0.5)
    return _look_up(image, _blend(mean, GREYS, step.amount))


def _sharpness(image: Pixels, step: Step) -> Pixels:
    return _blend(_smooth(image), image, step.amount)


def _brightness(image: Pixels, step: Step) -> Pixels:
    return _look_up(image, _blend(np.zeros(256), GREYS, step.amount))


def _posterize(image: Pixels, step: Step) -> Pixels:
    kept: Pixels = image & (256 - 2 ** (8 - round(step.amount)))
    return kept


def _solarize(image: Pixels, step: Step) -> Pixels:
    return _look_up(image, np.where(step.amount > GREYS, GREYS, ~GREYS))


def _auto_contrast(image: Pixels, step: Step) -> Pixels:
    channels = image.reshape(3, -1)
    low, high = channels.min(1, keepdims=True), channels.max(1, keepdims=True)
    scale = 255.0 / np.maximum(high - low, 1)
    tables = (GREYS * scale - low * scale).clip(0, 255).astype(np.uint8)
    return _look_up(image, np.where(high > low, tables, GREYS))


def _equalize(image: Pixels, step: Step) -> Pixels:
    return _look_up(image, np.stack([_equalizing(plane) for plane in image]))


def _equalizing(plane: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    # torch counts uint8 as they are; np.bincount copies them to int64 first, six times slower.
    counts = torch.bincount(torch.from_numpy(plane).flatten(), minlength=256).numpy()
    spread = int(counts.sum() - counts[plane.max()]) // 255
    if spread == 0:
        return GREYS
    below = counts.cumsum() - counts
    table: npt.NDArray[np.uint8] = ((below + spread // 2) // spread).clip(max=255).astype(np.uint8)
    return table


def _invert(image: Pixels, step: Step) -> Pixels:
    return ~image


class Operation(NamedTuple):
    """What a code means: the amount is `start + span * level / 9`, the span's sign drawn if so."""

    name: str
    pixels: Callable[[Pixels, Step], Pixels]
    start: float = 0.0
    span: float = 0.0
    signed: bool = False


OPERATIONS = (
    Operation("Nothing", lambda image, step: image),
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
