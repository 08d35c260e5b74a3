"""Parts of a data set in which every class is as frequent as in the whole, rare ones too."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from asl.data.annotations import PRESENT, Annotations


def stratified_parts(
    annotations: Annotations, parts: int | Sequence[float], seed: int
) -> npt.NDArray[np.int64]:
    """Deal the images into so many parts of one size, or of these shares: (N,) numbers of parts.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011): the rarest class that is left
    is dealt first, each of its images to the part that lacks that class most; of equal ones to the
    part that lacks images most, and by lot. Images without a present class come last.
    """
    random = np.random.default_rng(seed)
    weights = np.ones(parts) if isinstance(parts, int) else np.array(parts)
    parts, total = len(weights), weights.sum()
    present = annotations.hard().values == PRESENT
    rows = np.repeat(np.arange(len(annotations)), np.diff(annotations.indptr))[present]
    columns = annotations.indices[present]
    labels = np.split(columns, np.cumsum(np.bincount(rows, minlength=len(annotations)))[:-1])
    images = {c: random.permutation(rows[columns == c]) for c in np.unique(columns)}
    left = np.bincount(columns, minlength=annotations.num_classes)
    wanted = left[:, None] * weights / total
    room = len(annotations) * weights / total
    part_of = np.full(len(annotations), -1)

    def deal(row: int, lacking: npt.NDArray[np.float64]) -> None:
        part = np.lexsort((random.random(parts), -room, -lacking))[0]
        part_of[row] = part
        room[part] -= 1
        wanted[labels[row], part] -= 1
        left[labels[row]] -= 1

    while images:
        rarest = min(images, key=lambda c: left[c])
        for row in images.pop(rarest):
            if part_of[row] < 0:
                deal(row, wanted[rarest])
    for row in random.permutation(np.flatnonzero(part_of < 0)):
        deal(row, room)
    return part_of
