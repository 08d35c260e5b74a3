"""The same scores under the protocols that other code has."""

import numpy as np

from asl.evaluation.report.arrays import Array, Labels
from asl.evaluation.report.contents import ProtocolFigure
from asl.metrics import Floats, blocks, mean_average_precision

ELEVEN = np.linspace(0, 1, 11)


def protocols(scores: Floats, targets: Labels) -> list[ProtocolFigure]:
    """The mAP under each protocol, in percent: a box that says what a number may be compared with.

    Classes without a positive count as the explanations say.
    """
    absent = np.where(targets == -1, np.int8(0), targets)
    envelope, eleven = interpolated(scores, targets)
    rows = {
        "full": (
            mean_average_precision(scores, targets),
            "This project's: the mean, over the classes with a positive, of AP that is not "
            "interpolated. Cells that are not annotated are left out.",
        ),
        "partial": (
            mean_average_precision(scores, targets, protocol="partial"),
            "The same over the classes with an annotated positive and an annotated negative: Open "
            "Images and the Class-aware Selective Loss.",
        ),
        "official": (
            mean_average_precision(scores, targets, protocol="official"),
            "The official ASL training script's: as full, but a class without a positive counts as "
            "0.",
        ),
        "timm": (
            mean_average_precision(scores, absent, protocol="official"),
            "timm's MultiLabelClassificationEvaluator: as official, and a cell that is not "
            "annotated counts as absent.",
        ),
        "interpolated": (
            100 * _mean(envelope),
            "The area below the highest precision at each recall or any higher one (VOC from 2010 "
            "on, several repositories): never lower than full.",
        ),
        "11 points": (
            100 * _mean(eleven),
            "The mean of that precision at recall 0, 0.1, ..., 1 (VOC 2007).",
        ),
    }
    return [
        {"name": name, "mAP": None if np.isnan(value) else float(value), "explanation": said}
        for name, (value, said) in rows.items()
    ]


def interpolated(scores: Floats, targets: Labels) -> tuple[Array, Array]:
    """AP below the envelope of precision, and at eleven recalls: (C,) each, NaN without positives.

    Everingham et al. 2010, section 4.2, for the second, and the development kit of VOC 2010 for the
    first. Equal scores are one threshold.
    """
    envelope, eleven = np.full((2, scores.shape[1]), np.nan)
    column = 0
    for block_scores, block_targets in blocks(scores, targets, axis=1):
        for score, target in zip(block_scores, block_targets, strict=True):
            if (target == 1).any():
                envelope[column], eleven[column] = _of_class(score[target == 1], score[target == 0])
            column += 1
    return envelope, eleven


def _of_class(positives: Floats, negatives: Floats) -> tuple[float, float]:
    positives, negatives = np.sort(positives), np.sort(negatives)
    thresholds = np.unique(positives)[::-1]
    hits = len(positives) - np.searchsorted(positives, thresholds)
    alarms = len(negatives) - np.searchsorted(negatives, thresholds)
    recall, precision = hits / len(positives), hits / (hits + alarms)
    highest = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or any higher one
    at = np.searchsorted(recall, ELEVEN - 1e-12)
    return float(np.diff(recall, prepend=0) @ highest), float(highest[at].mean())


def _mean(ap: Array) -> float:
    defined = ap[~np.isnan(ap)]
    return float(defined.mean()) if len(defined) else float("nan")
