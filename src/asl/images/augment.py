"""Cutout and RandAugment as the official training script uses them, on squished uint8 images.

Augmentation is two steps. `draw` makes the random choices for the samples of a batch and returns
them as numbers; `apply` (one image, on the host) and `apply_batch` (a batch, on any device) are
pure and carry them out. What sample i of epoch e looks like depends on (seed, e, i) alone: not on
the number of workers or ranks, on the rest of its batch, nor on where a run was interrupted.

The numbers of a sample are three `Transform`s, seven float32 columns each, done in order; a row of
zeros does nothing. They are independent of the image size.

Both implementations exist because each is slow where the other one runs: on one core of a CPU the
device's takes 4.6 ms an image of 448 px and the host's 0.69.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asl.images import augment_device as device
from asl.images import augment_host as host
from asl.images.augment_host import Operate, Transform
from asl.images.settings import Policy

Array = npt.NDArray[Any]
Kernel = Callable[..., Tensor]
Arrays = Callable[[device.Transforms, int], tuple[Array, ...]]

PATCH_GREY = (125, 122, 113)  # official training script: RandAugment's small Cutout


class Operation(NamedTuple):
    """One entry of the table: how it is done on the host and on a device, and its magnitudes.

    At level 1..9 the magnitude is `start + span * level / 9`, where the sign of the span is drawn
    if it is `signed`.
    """

    name: str
    host: Operate
    kernel: Kernel
    arrays: Arrays  # for the kernel
    start: float = 0.0
    span: float = 0.0
    signed: bool = False


SIGNED = True
OPERATIONS = (
    Operation("Nothing", host.nothing, torch.clone, device.no_arrays),
    Operation("Flip", host.flip, device.warp, device.flips),
    Operation("Cutout", host.cutout, device.cut, device.cutout_holes),
    # RandAugment of the official training script
    Operation("ShearX", host.shear_x, device.shear, device.shears_x, 0.0, 0.3, SIGNED),
    Operation("ShearY", host.shear_y, device.shear, device.shears_y, 0.0, 0.3, SIGNED),
    Operation("TranslateX", host.translate_x, device.warp, device.shifts_x, 0.0, 150 / 331, SIGNED),
    Operation("TranslateY", host.translate_y, device.warp, device.shifts_y, 0.0, 150 / 331, SIGNED),
    Operation("Rotate", host.rotate, device.warp, device.rotations, 0.0, 30.0),
    Operation("Color", host.color, device.color, device.factors, 1.0, 0.9, SIGNED),
    Operation("Contrast", host.contrast, device.contrast, device.factors, 1.0, 0.9, SIGNED),
    Operation("Sharpness", host.sharpness, device.sharpness, device.factors, 1.0, 0.9, SIGNED),
    Operation(
        "Brightness", host.brightness, device.look_up, device.brightness_luts, 1.0, 0.9, SIGNED
    ),
    Operation("Posterize", host.posterize, device.look_up, device.posterize_luts, 8.0, -4.0),
    Operation("Solarize", host.solarize, device.look_up, device.solarize_luts, 256.0, -256.0),
    Operation("Patch", host.patch, device.cut, device.patch_holes, 0.0, 20.0),
    Operation("AutoContrast", host.auto_contrast, device.auto_contrast, device.no_arrays),
    Operation("Equalize", host.equalize, device.equalize, device.no_arrays),
    Operation("Invert", host.invert, device.look_up, device.invert_luts),
)
NOTHING, FLIP, CUTOUT, RANDAUGMENT = range(4)  # codes; RandAugment's 15 come last
MAGNITUDES = np.array([operation[4:] for operation in OPERATIONS]).T  # start, span, signed by code
# The operations that a kernel does together, by code.
KERNELS = {
    kernel: [code for code, each in enumerate(OPERATIONS) if each.kernel is kernel]
    for kernel in (operation.kernel for operation in OPERATIONS[FLIP:])
}


def draw(
    policy: Policy, seed: int, epoch: int, indices: Sequence[int] | npt.NDArray[np.integer]
) -> npt.NDArray[np.float32]:
    """The (B, 3, 7) numbers of B samples in `epoch`: of each three rows of `Transform`.

    - "recipe": Cutout of half the side in a random colour, then two of the 15 operations, each with
      a level 1..9, uniformly and with repetition, and each applied with probability 0.5
      (official training script; no flip).
    - "cutout", "randaugment": the one or the other alone, with the same numbers.
    - "flip": mirrored left to right with probability 0.5.
    - "none": nothing.
    """
    augmentation = np.zeros((len(indices), 3, len(Transform._fields)), np.float32)
    if policy in ("recipe", "cutout", "randaugment"):
        uniform = _uniform(seed, epoch, indices, 5 + 2 * 6)
        cuts, transforms = augmentation[:, 0], augmentation[:, 1:]
        cuts[:, :2] = CUTOUT, 0.5
        cuts[:, 2:4] = uniform[:, :2]
        cuts[:, 4:] = np.floor(256 * uniform[:, 2:5])
        choice, level, applied, sign, x, y = np.moveaxis(uniform[:, 5:].reshape(-1, 2, 6), 2, 0)
        codes = RANDAUGMENT + (choice * (len(OPERATIONS) - RANDAUGMENT)).astype(int)
        start, span, signed = MAGNITUDES[:, codes]
        span = np.where((sign < 0.5) & (signed > 0), -span, span)
        transforms[..., 0] = codes
        transforms[..., 1] = start + span * (1 + np.floor(9 * level)) / 9
        transforms[..., 2], transforms[..., 3], transforms[..., 4:] = x, y, PATCH_GREY
        transforms[applied >= 0.5] = 0
        if policy != "recipe":
            (transforms if policy == "cutout" else cuts)[:] = 0
    elif policy == "flip":
        augmentation[:, 0, 0] = np.where(
            _uniform(seed, epoch, indices, 1)[:, 0] < 0.5, FLIP, NOTHING
        )
    return augmentation


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


def apply(
    image: Tensor, augmentation: npt.NDArray[np.float32], out: Tensor | None = None
) -> Tensor:
    """A (3, S, S) uint8 image on the host after its (3, 7) numbers, in `out` if that is given.

    Pure: the image is left as it is, and `out` must not be its memory. Without `out` the image
    itself comes back where there is nothing to do.
    """
    transforms = [Transform[float](*row) for row in augmentation.tolist() if row[0] != NOTHING]
    if not transforms:
        return image if out is None else out.copy_(image)
    if out is None:
        out = torch.empty_like(image)
    *earlier, last = transforms
    pixels = image.numpy()
    for transform in earlier:
        before, pixels = pixels, np.empty_like(pixels)
        OPERATIONS[int(transform.operation)].host(before, transform, pixels)
    OPERATIONS[int(last.operation)].host(pixels, last, out.numpy())
    return out


def apply_batch(images: Tensor, augmentation: npt.NDArray[np.float32]) -> Tensor:
    """(B, 3, S, S) uint8 images, on any device, after their (B, 3, 7) numbers.

    Pure: the batch is left as it is, and comes back itself where there is nothing to do. The host
    knows the numbers, so it works out which samples each kernel takes and with which arrays, and
    sends all of that in one transfer. The device waits for nothing else, and nothing waits for the
    device. A batch of any size takes the same number of kernels.
    """
    calls: list[tuple[Kernel, int]] = []
    arrays: list[Array] = []
    for columns in augmentation.astype(np.float64).transpose(1, 2, 0):
        for kernel, codes in KERNELS.items():
            needed = _needed(columns, codes, images.shape[-1])
            if needed:
                calls.append((kernel, len(needed)))
                arrays += needed
    if not calls:
        return images
    images = images.clone()
    sent = iter(_sent(arrays, images.device))
    for kernel, count in calls:
        samples, *rest = islice(sent, count)
        done = kernel(images.index_select(0, samples), *rest)
        images.index_copy_(0, samples, done)
    return images


def _needed(columns: Array, codes: list[int], size: int) -> list[Array]:
    """Which samples have one of these operations, and the arrays for their kernel; else nothing."""
    parts = []
    for code in codes:
        samples = np.flatnonzero(columns[0] == code)
        if len(samples):
            transforms = Transform(*columns[:, samples])
            parts.append((samples, *OPERATIONS[code].arrays(transforms, size)))
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def _sent(arrays: list[Array], target: torch.device) -> list[Tensor]:
    """The same on the device, in one copy that nothing waits for."""
    lengths = [-(-array.nbytes // 8) * 8 for array in arrays]  # each starts where any type may
    padded = (a.tobytes().ljust(length) for a, length in zip(arrays, lengths, strict=True))
    packed = torch.frombuffer(bytearray().join(padded), dtype=torch.uint8)
    if target.type == "cuda":
        packed = packed.pin_memory()
    pieces = torch.split(packed.to(target, non_blocking=True), lengths)
    return [
        piece[: array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
        for piece, array in zip(pieces, arrays, strict=True)
    ]
