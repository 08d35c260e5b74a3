"""Figures of parts of the objects and images."""

import numpy as np

from asl.data.objects import SIZES
from asl.evaluation.report.arrays import Array, Labels, Mask
from asl.evaluation.report.contents import Bin
from asl.metrics import Floats, Protocol, mean_average_precision

MOST_LABELS = 5  # images with as many or more are one bin


def by_number_of_labels(
    scores: Floats, targets: Labels, thresholds: Array, protocol: Protocol
) -> list[Bin]:
    """mAP among the images with so many labels, and the recall of their labels at `thresholds`.

    Images with more labels have more positives among as many cells, which alone makes AP higher.
    """
    numbers = np.minimum(np.count_nonzero(targets == 1, axis=1), MOST_LABELS)
    bins: list[Bin] = []
    for number in np.unique(numbers).tolist():
        rows = numbers == number
        score, target = scores[rows], targets[rows]
        name = f"{number} label{'s' * (number != 1)}" + " or more" * (number == MOST_LABELS)
        bins.append(
            {
                "name": name,
                "count": int(rows.sum()),
                "AP": _defined(mean_average_precision(score, target, protocol=protocol)),
                "recall": _recall(score, target == 1, thresholds),
            }
        )
    return bins


def by_size(
    scores: Floats, targets: Labels, thresholds: Array, protocol: Protocol, sizes: Labels
) -> list[Bin]:
    """mAP and recall at `thresholds` of the positives whose largest object has that size.

    `sizes` (N, C) are those of `Objects.sizes`. Positives of another size, or of none, are left
    out; the negatives are all there, of every size alike.
    """
    bins: list[Bin] = []
    for number, name in enumerate(SIZES, start=1):
        chosen = (targets == 1) & (sizes == number)
        target = np.where((targets == 1) & ~chosen, np.int8(-1), targets)
        bins.append(
            {
                "name": name,
                "count": int(np.count_nonzero(chosen)),
                "AP": _defined(mean_average_precision(scores, target, protocol=protocol)),
                "recall": _recall(scores, chosen, thresholds),
            }
        )
    return bins


def _recall(scores: Floats, positives: Mask, thresholds: Array) -> float | None:
    """The share of the marked cells, in percent, that are predicted."""
    rows, columns = np.nonzero(positives)
    if not len(rows):
        return None
    return 100 * float((scores[rows, columns] > thresholds[columns]).mean())


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value
