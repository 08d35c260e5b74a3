"""What costs mAP: kinds of error, and the mAP if one kind were repaired.

After TIDE (Bolya et al. 2020, arXiv 2008.08115), which asks this of detectors. An error is a cell
on the wrong side of its class's threshold, and of one kind alone: the first of `KINDS` that fits.
Repairs are made one kind at a time, and what they gain does not add up to 100 - mAP: on each side
of the threshold there are wrong orders too, and one repair makes room for another.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from asl.evaluation.report.arrays import Array, Labels, Mask, Rows
from asl.evaluation.report.contents import Repair
from asl.metrics import Floats, Protocol, blocks, mean_average_precision

SURE = 0.9  # precision at a score, below which no absent label is likely a missing one
OFTEN = 0.1  # share of a class's images in which a class that often stands beside it is
MORE_OFTEN = 2.0  # times as often as in all images
TAIL = 0.05  # share of the images without a class that are its most likely ones
SIMILAR = 0.15  # share of a similar class's images that are among those
FEWEST = 10  # images from which on two classes are compared
RELATED = 500  # classes that are compared with each other, those with most positives


class Kind(NamedTuple):
    """A kind of error in words; `repair` changes (scores, targets) of the marked cells."""

    name: str
    explanation: str
    repair: Callable[[Floats, Labels, Mask], tuple[Floats, Labels]]


def _labelled(scores: Floats, targets: Labels, cells: Mask) -> tuple[Floats, Labels]:
    return scores, np.where(cells, np.int8(1), targets)


def _left_out(scores: Floats, targets: Labels, cells: Mask) -> tuple[Floats, Labels]:
    return scores, np.where(cells, np.int8(-1), targets)


def _found(scores: Floats, targets: Labels, cells: Mask) -> tuple[Floats, Labels]:
    return np.where(cells, scores.dtype.type(np.inf), scores), targets


# The numbers of the kinds in the (N, C) table of `kinds_of_error`; 0 is no error.
KINDS = {
    1: Kind(
        "likely a missing label",
        "A false alarm that scores as high as the class's present cells do on average, where at "
        "least 90 % of the cells that score as high are present. Repaired: the label is present.",
        _labelled,
    ),
    2: Kind(
        "false alarm of a class that often stands beside a present one",
        "The class is in at least 10 % of the images of a class that is present here, and there "
        "at least twice as often as in all images. Repaired: the cell is left out.",
        _left_out,
    ),
    3: Kind(
        "false alarm of a class similar to a present one",
        "Of the images with a class that is present here but without this one, at least 15 % are "
        "among the 5 % of all images without this one that score highest for it: the model takes "
        "one for the other. Repaired: the cell is left out.",
        _left_out,
    ),
    4: Kind(
        "other false alarm",
        "A score above the threshold where the class is annotated as absent, and none of the "
        "above. Repaired: the cell is left out.",
        _left_out,
    ),
    5: Kind(
        "small object missed",
        "A score not above the threshold where the class is present, and its largest object in "
        "the image is small. Repaired: the score is the highest.",
        _found,
    ),
    6: Kind(
        "other miss",
        "A score not above the threshold where the class is present. Repaired: the score is the "
        "highest.",
        _found,
    ),
}


def kinds_of_error(
    scores: Floats, targets: Labels, thresholds: Array, small: Mask | None = None
) -> Labels:
    """The number in `KINDS` of every cell that is an error at `thresholds` (C,), else 0: (N, C).

    `small` marks the cells whose largest object is small. A threshold that is NaN predicts nothing.
    """
    beside, similar = related_classes(scores, targets)
    kinds = np.zeros(targets.shape, dtype=np.int8)
    column = 0
    for score, target in blocks(scores, targets, axis=1):
        part = slice(column, column + len(score))
        column = part.stop
        predicted = score > thresholds[part, None]
        alarm, miss = predicted & (target == 0), ~predicted & (target == 1)
        kind = np.where(alarm, np.int8(4), np.int8(0))
        for number, related in ((3, similar), (2, beside)):
            kind[alarm & _in_image(targets, related, part)] = number
        kind[alarm & _sure(score, target, alarm)] = 1
        kind[miss] = 6
        if small is not None:
            kind[miss & small[:, part].T] = 5
        kinds[:, part] = kind.T
    return kinds


def repairs(
    scores: Floats, targets: Labels, kinds: Labels, protocol: Protocol, with_sizes: bool
) -> list[Repair]:
    """The mAP if one kind of error were repaired, for each kind; small objects if `with_sizes`."""
    before = mean_average_precision(scores, targets, protocol=protocol)
    rows: list[Repair] = []
    for number, kind in KINDS.items():
        if number == 5 and not with_sizes:
            continue
        errors = int(np.count_nonzero(kinds == number))
        after = before
        if errors:
            repaired = kind.repair(scores, targets, kinds == number)
            after = mean_average_precision(*repaired, protocol=protocol)
        defined = not (np.isnan(after) or np.isnan(before))
        rows.append(
            {
                "kind": kind.name,
                "mAP": after if defined else None,
                "gain": after - before if defined else None,
                "errors": errors,
                "explanation": kind.explanation,
            }
        )
    return rows


def related_classes(scores: Floats, targets: Labels) -> tuple[Mask, Mask]:
    """Which classes often stand beside which, and which are similar: (C, C) each.

    Row c, column d: whether c is, where d is present. Both are found on these images themselves.
    """
    counts = np.count_nonzero(targets == 1, axis=0)
    chosen = np.sort(np.argsort(-counts, kind="stable")[:RELATED])
    target = torch.from_numpy(np.ascontiguousarray(targets[:, chosen]))
    present, known = (target == 1).float(), (target != -1).float()
    images = known.T @ present  # of class d, in which c is annotated
    together = present.T @ present
    share = together / images.clamp(min=1)
    overall = present.sum(0) / known.sum(0).clamp(min=1)
    enough = (images >= FEWEST) & ~torch.eye(len(chosen), dtype=torch.bool)
    beside = enough & (share >= OFTEN) & (share >= MORE_OFTEN * overall[:, None])

    likely = torch.from_numpy(_most_likely(scores, targets, chosen)).float()
    without = (target == 0).float().T @ present
    taken_for = likely.T @ present / without.clamp(min=1)
    similar = enough & (without >= FEWEST) & (taken_for >= SIMILAR)
    return _spread(beside, chosen, len(counts)), _spread(similar, chosen, len(counts))


def _most_likely(scores: Floats, targets: Labels, chosen: Rows) -> Mask:
    """The images without a class that score highest for it, by class: (N, len(chosen))."""
    marked = np.zeros((len(scores), len(chosen)), dtype=bool)
    column = 0
    for score, target in blocks(scores[:, chosen], targets[:, chosen], axis=1):
        for of_class, label in zip(score, target, strict=True):
            absent = label == 0
            if absent.any():
                limit = np.quantile(of_class[absent], 1 - TAIL)
                marked[:, column] = absent & (of_class > limit)
            column += 1
    return marked


def _spread(table: Tensor, chosen: Rows, classes: int) -> Mask:
    """A table of the chosen classes as one of all."""
    whole = np.zeros((classes, classes), dtype=bool)
    whole[np.ix_(chosen, chosen)] = table.numpy()
    return whole


def _in_image(targets: Labels, related: Mask, part: slice) -> Mask:
    """Whether an image has a class to which a class of the part is related: (classes, N)."""
    columns = np.flatnonzero(related[part].any(axis=0))
    present = torch.from_numpy((targets[:, columns] == 1).astype(np.float32))
    to = torch.from_numpy(related[part][:, columns].astype(np.float32))
    marked: Mask = (to @ present.T > 0).numpy()
    return marked


def _sure(scores: Floats, targets: Labels, cells: Mask) -> Mask:
    """Where a cell scores as a present one does: (classes, N).

    As their mean, and where at least `SURE` of the cells that score as high are present. The first
    is what confident learning asks (`suspects.py`), the second that a class is known well.
    """
    marked = np.zeros(cells.shape, dtype=bool)
    for row, (score, target) in enumerate(zip(scores, targets, strict=True)):
        positives, negatives = np.sort(score[target == 1]), np.sort(score[target == 0])
        if not len(positives):
            continue
        asked = score[cells[row]]
        hits = len(positives) - np.searchsorted(positives, asked)
        alarms = len(negatives) - np.searchsorted(negatives, asked)
        known = hits >= SURE * (hits + alarms)
        marked[row, cells[row]] = known & (asked >= positives.mean(dtype=np.float64))
    return marked
