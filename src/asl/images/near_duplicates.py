"""Photographs that stand in several splits nearly the same: resized, compressed anew, cut a little.

Each becomes a perceptual hash of 64 bits, of the lowest frequencies of its luminance (pHash,
Zauner 2010): nearly equal photographs differ in a few of them, others in about half.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from asl.data.annotations import Annotations
from asl.data.duplicates import Pair
from asl.images.decode import read_image

MOST_BITS = 6  # in which near-duplicates differ; docs/report.md says how it was chosen
SIDE = 32  # px that an image is shrunk to
LOW = 8  # frequencies in each direction
AT_ONCE = 256  # images that are compared with all others: 256 MB for a million of them

Hashes = npt.NDArray[np.uint64]


def near_duplicates(splits: Sequence[Annotations], most_bits: int = MOST_BITS) -> list[Pair]:
    """Images of later splits with their nearest image in an earlier one, the nearest pairs first.

    A pair's hashes differ in at most `most_bits` bits. A file that stands in several splits itself
    counts in the first of them. Of images without anything in them all are alike.

    Costs a decoding of every image, and the comparison of all pairs: 30 s for 80,000 and 40,000.
    Raises `DataError` for an image that cannot be read.
    """
    seen: set[str] = set()
    own: list[list[int]] = []  # the rows of each split that no earlier one has
    for each in splits:
        paths = [each.path(row) for row in range(len(each))]
        own.append([row for row, path in enumerate(paths) if path not in seen])
        seen |= set(paths)
    hashes = [perceptual_hashes(each.subset(rows)) for each, rows in zip(splits, own, strict=True)]
    places = [(number, row) for number, rows in enumerate(own) for row in rows]
    found = []
    for number in range(1, len(splits)):
        earlier = np.concatenate(hashes[:number])
        nearest, bits = _nearest(hashes[number], earlier)
        for index in np.flatnonzero(bits <= most_bits).tolist():
            other_split, other_row = places[nearest[index]]
            pair = number, own[number][index], other_split, other_row, int(bits[index])
            found.append(Pair(*pair))
    return sorted(found, key=lambda pair: (pair.bits, pair.split, pair.row))


def perceptual_hashes(images: Annotations) -> Hashes:
    """The hash of every image: (N,) uint64."""
    paths = [images.path(row) for row in range(len(images))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding does not hold Python's lock
        found = pool.map(partial(_hash, frequencies=_cosines()), paths)
        bar = tqdm(found, "comparing images", len(paths), unit="img", leave=False, disable=None)
        return np.fromiter(bar, np.uint64, len(paths))


def _hash(path: str, frequencies: torch.Tensor) -> int:
    red, green, blue = read_image(path).float()
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    small = torch.nn.functional.adaptive_avg_pool2d(luminance[None], SIDE)[0]
    low = frequencies @ small @ frequencies.T
    # Where there is nothing but rounding errors, they shall not be what is compared.
    bits = (low > low.median() + 1e-3).flatten().numpy()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _cosines() -> torch.Tensor:
    """The lowest basis functions of the discrete cosine transform (DCT-II): (LOW, SIDE)."""
    frequency, place = torch.arange(LOW)[:, None], torch.arange(SIDE)
    return torch.cos(torch.pi * frequency * (2 * place + 1) / (2 * SIDE))


def _nearest(hashes: Hashes, others: Hashes) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.uint8]]:
    """For each hash the place of the nearest of the others, and in how many bits they differ."""
    nearest = np.zeros(len(hashes), dtype=np.intp)
    bits = np.full(len(hashes), 64, dtype=np.uint8)
    if len(others):
        for start in range(0, len(hashes), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            differ = np.bitwise_count(hashes[part, None] ^ others)
            nearest[part] = differ.argmin(axis=1)
            bits[part] = differ.min(axis=1)
    return nearest, bits
