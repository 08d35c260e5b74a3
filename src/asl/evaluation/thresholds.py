"""Thresholds of each class, what they gain on images that did not choose them, and how surely.

Everything takes (N, C) scores in [0, 1] and targets in {1, 0, -1}; a cell of -1 is left out. A
label is predicted where its score is above the threshold. A rule says what a threshold is to be
best at: "f1", or "precision:P": the highest recall at which the precision is at least P.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from asl.evaluation.calibration import logit, sigmoid
from asl.evaluation.crossfit import FOLDS, Table, out_of_fold
from asl.metrics import (
    Protocol,
    best_thresholds,
    f1_scores,
    precision_thresholds,
    sorted_by_class,
)

Thresholds = npt.NDArray[np.float64]

# How many positives a class needs for its own threshold to count as much as the common one. From
# studies/threshold_shrinkage.py on VOC 2007: of 0 to 300 this is within 0.2 macro F1 of the best
# for 50 images and for 1,600.
SHRINKAGE = 20
# A common threshold is chosen among these many scores of positives.
CANDIDATES = 1000
OPERATING_POINTS = ("common", "f1", "precision:0.8")
_BLOCK = 256  # classes that are resampled together: 125,000 images of them are 128 MB


def tuned(scores: Table, targets: Table, rule: str, shrinkage: float = SHRINKAGE) -> Thresholds:
    """The threshold of every class by this rule, shrunk towards the common one: (C,) in (0, 1).

    A class with n positives gets n / (n + shrinkage) of its own threshold and the rest of the
    common one, as a mean of logits. One without positives gets the common one. A class that never
    has the precision counts with its highest score, above which nothing is predicted (`unreached`
    says which these are).
    """
    own = _own(scores, targets, rule)
    common = common_threshold(scores, targets, rule)
    own[np.isnan(own)] = common
    for c in np.flatnonzero(np.isinf(own)):
        own[c] = scores[targets[:, c] != -1, c].max()
    positives = np.count_nonzero(targets == 1, axis=0)
    share = positives / np.maximum(positives + shrinkage, 1)
    return sigmoid(share * logit(own) + (1 - share) * logit(np.asarray(common)))


def unreached(scores: Table, targets: Table, rule: str) -> npt.NDArray[np.bool_]:
    """The classes with positives that no threshold gives the precision of the rule: (C,)."""
    return np.isinf(_own(scores, targets, rule))


def _own(scores: Table, targets: Table, rule: str) -> Thresholds:
    if rule == "f1":
        return best_thresholds(scores, targets)
    return precision_thresholds(scores, targets, _precision(rule))


def _precision(rule: str) -> float:
    return float(rule.removeprefix("precision:"))


def common_threshold(scores: Table, targets: Table, rule: str) -> float:
    """The one threshold that is best for all classes together.

    For "f1" that of the highest macro F1, for a precision the lowest at which all cells together
    have it (the highest candidate where none has). It is one of `CANDIDATES` scores of positives at
    most, from the lowest to the highest in equal shares, and 1 where there is no positive.
    """
    positives = np.sort(scores[targets == 1].astype(np.float64))
    if not len(positives):
        return 1.0
    chosen = np.linspace(0, len(positives) - 1, min(CANDIDATES, len(positives))).round().astype(int)
    candidates = np.nextafter(np.unique(positives[chosen]), -np.inf)
    true, false, f1 = np.zeros((3, len(candidates)))
    for present, absent in sorted_by_class(scores, targets):
        hits = len(present) - np.searchsorted(present, candidates, side="right")
        alarms = len(absent) - np.searchsorted(absent, candidates, side="right")
        true, false = true + hits, false + alarms
        f1 += 2 * hits / np.maximum(hits + alarms + len(present), 1)
    if rule == "f1":
        return float(candidates[f1.argmax()])
    reached = np.flatnonzero(true / (true + false) >= _precision(rule))
    return float(candidates[reached[0] if len(reached) else -1])


def operating_points(scores: Table, targets: Table) -> dict[str, Thresholds]:
    """The thresholds (C,) of each of `OPERATING_POINTS`: one for all, of best F1, of precision 0.8.

    They are chosen on these images: what they reach on them is too good for others.
    """
    common = np.full(scores.shape[1], common_threshold(scores, targets, "f1"))
    return {"common": common} | {
        rule: tuned(scores, targets, rule) for rule in OPERATING_POINTS if rule != "common"
    }


def cross_fitted(
    scores: Table,
    targets: Table,
    rule: str,
    threshold: float,
    *,
    protocol: Protocol = "full",
    folds: int = FOLDS,
    seed: int = 0,
) -> dict[str, Any]:
    """What tuning gains on images that did not choose, beside what it seems to gain on those.

    Returns "rule", "folds", "seed", "shrinkage", "common" (the common threshold), "thresholds" (C
    numbers, those of `tuned`), "unreached" (numbers of classes), "at": the figures of `f1_scores`,
    in percent, for "threshold" (the one given), "common" and "per_class" (both cross-fitted),
    "common_same_images" and "per_class_same_images"; and "gain": that of the cross-fitted
    thresholds of each class in macro F1 over "threshold" and over "common", each with "interval" as
    `gain_in_macro_f1` has it. What is not defined is None.

    Raises `ValueError` for fewer images than folds.
    """

    def one(scores: Table, targets: Table) -> Callable[[Table], Table]:
        limit = common_threshold(scores, targets, rule)
        return lambda others: others > limit

    def each(scores: Table, targets: Table) -> Callable[[Table], Table]:
        limits = tuned(scores, targets, rule)
        return lambda others: others > limits

    common, limits = common_threshold(scores, targets, rule), tuned(scores, targets, rule)
    predicted: dict[str, Table] = {
        "threshold": scores > threshold,
        "common": out_of_fold(one, scores, targets, folds, seed) > 0,
        "per_class": out_of_fold(each, scores, targets, folds, seed) > 0,
        "common_same_images": scores > common,
        "per_class_same_images": scores > limits,
    }
    figures = {}
    for name, table in predicted.items():  # a prediction is a score of 0 or 1
        f1 = f1_scores(table, targets, 0.5, protocol=protocol)
        figures[name] = {key: None if np.isnan(value) else value for key, value in f1.items()}
    gains = {
        f"over_{name}": gain_in_macro_f1(
            predicted[name], predicted["per_class"], targets, protocol=protocol, seed=seed
        )
        for name in ("threshold", "common")
    }
    return {
        **{"rule": rule, "folds": folds, "seed": seed, "shrinkage": SHRINKAGE},
        **{"common": common, "thresholds": limits.tolist()},
        "unreached": np.flatnonzero(unreached(scores, targets, rule)).tolist(),
        **{"at": figures, "gain": gains},
    }


def gain_in_macro_f1(
    before: Table,
    after: Table,
    targets: Table,
    *,
    protocol: Protocol = "full",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The gain in macro F1 from predictions `before` to those `after` (both bool), in percent.

    "interval" is its paired bootstrap interval over images, of 95 % (percentiles). It says how much
    the gain depends on the images judged, and nothing of other images to choose thresholds on.
    """
    images = len(targets)
    random = np.random.default_rng(seed)
    gains = np.empty(resamples)
    for start in range(0, resamples, 100):  # 100 x N counts at a time
        block = gains[start : start + 100]
        weights = np.stack(
            [np.bincount(random.integers(images, size=images), minlength=images) for _ in block]
        )
        block[:] = _gains(before, after, targets, weights, protocol)
    [gain] = _gains(before, after, targets, np.ones((1, images)), protocol)
    low, high = np.percentile(gains, [2.5, 97.5])
    return {"macro_F1": float(gain), "interval": [float(low), float(high)]}


def _gains(
    before: Table, after: Table, targets: Table, weights: Table, protocol: Protocol
) -> npt.NDArray[np.float64]:
    """The gain in macro F1 for each row (R, N) of weights of the images: (R,) in percent."""
    weights = weights.astype(np.float32)  # counts below 2 ** 24 are exact
    gained, classes = np.zeros((2, len(weights)))
    for start in range(0, targets.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        target = targets[:, block]
        positives, negatives = (weights @ (target == each).astype(np.float32) for each in (1, 0))
        f1 = []
        for predicted in (before[:, block], after[:, block]):
            hits = weights @ (predicted & (target == 1)).astype(np.float32)
            alarms = weights @ (predicted & (target == 0)).astype(np.float32)
            f1.append(2 * hits / np.maximum(hits + alarms + positives, 1))
        counted = (positives > 0) & ((negatives > 0) | (protocol == "full"))
        gained += np.where(counted, f1[1] - f1[0], 0).sum(axis=1)
        classes += counted.sum(axis=1)
    return 100 * gained / np.maximum(classes, 1)
