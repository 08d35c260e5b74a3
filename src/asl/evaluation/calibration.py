"""Calibration: maps from scores to probabilities, one for each class, and how well they do.

The scores of a model that was trained with ASL rank images well and are far too high to be
probabilities: its loss lets easy negatives go. Everything here takes (N, C) scores in [0, 1] and
targets in {1, 0, -1}; a cell of -1 is left out. All maps rise, so that no order changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from asl.evaluation.crossfit import FOLDS, Table, out_of_fold

Floats = npt.NDArray[np.float64]
Method = Literal["temperature", "platt", "isotonic"]
METHODS: tuple[Method, ...] = get_args(Method)

# How many positives a class needs for its own map to count as much as the common one. From
# studies/threshold_shrinkage.py on VOC 2007: a class whose map is made from few must not get a
# silly one, and 50 is near the best for all three methods.
SHRINKAGE = 50
BINS = 15  # as Guo et al. have it
_COMMON_CELLS = 1_000_000  # the common map is fitted to about so many cells at most
_LOWEST_SLOPE = 0.01  # a class whose scores say the contrary of its labels still keeps their order


@dataclass(frozen=True)
class Logistic:
    """sigmoid(slope * logit(score) + bias), with (C,) slopes and biases."""

    method: Method
    slope: Floats
    bias: Floats

    def of_class(self, number: int, scores: npt.ArrayLike) -> Floats:
        """The probabilities that scores of one class stand for."""
        return sigmoid(self.slope[number] * logit(np.asarray(scores)) + self.bias[number])

    def __call__(self, scores: Table) -> Floats:
        """The probabilities that (N, C) scores stand for."""
        return _of_table(self, scores)

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores of it."""
        return {
            **{"method": self.method, "slope": torch.tensor(self.slope)},
            "bias": torch.tensor(self.bias),
        }


@dataclass(frozen=True)
class Isotonic:
    """Piecewise linear, non-decreasing maps, each class's own and the common one mixed.

    Map c has the knots (scores, probabilities) from ends[c] to ends[c + 1]; the common one is the
    last, behind those of the C classes. `share` (C,) is how much a class's own counts.
    """

    scores: Floats
    probabilities: Floats
    ends: npt.NDArray[np.int64]
    share: Floats
    method: Method = "isotonic"

    def of_class(self, number: int, scores: npt.ArrayLike) -> Floats:
        """The probabilities that scores of one class stand for."""
        own, common = (
            np.interp(np.asarray(scores, np.float64), self.scores[knots], self.probabilities[knots])
            for knots in (
                slice(self.ends[which], self.ends[which + 1]) for which in (number, len(self.share))
            )
        )
        mixed: Floats = self.share[number] * own + (1 - self.share[number]) * common
        return mixed

    def __call__(self, scores: Table) -> Floats:
        """The probabilities that (N, C) scores stand for."""
        return _of_table(self, scores)

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores of it."""
        names = ("scores", "probabilities", "ends", "share")
        return {"method": self.method} | {name: torch.tensor(getattr(self, name)) for name in names}


Calibration = Logistic | Isotonic


def from_state(state: Mapping[str, Any], num_classes: int) -> Calibration:
    """The calibration that a checkpoint stores; `ValueError` if it is not one for these classes."""

    def read(name: str, length: int | None = num_classes) -> Floats:
        values = state.get(name)
        if not isinstance(values, torch.Tensor) or values.ndim != 1 or not values.isfinite().all():
            raise ValueError(f"{name} is no list of finite numbers")
        if length not in (None, len(values)):
            raise ValueError(f"{name} has {len(values)} numbers for {num_classes} classes")
        return values.double().numpy()

    method = state.get("method")
    if method in ("temperature", "platt"):
        return Logistic(method, read("slope"), read("bias"))
    if method != "isotonic":
        raise ValueError(f"its method is {method!r}")
    made = Isotonic(
        read("scores", None),
        read("probabilities", None),
        read("ends", num_classes + 2).astype(np.int64),
        read("share"),
    )
    ends, knots = made.ends, len(made.scores)
    if ends[0] != 0 or ends[-1] != knots or (np.diff(ends) < 1).any():
        raise ValueError("its knots do not belong to its classes")
    if len(made.probabilities) != knots:
        raise ValueError(f"{knots} scores for {len(made.probabilities)} probabilities")
    return made


def fitted(
    scores: Table, targets: Table, method: Method, shrinkage: float = SHRINKAGE
) -> Calibration:
    """Fit the map of every class.

    - "temperature" (Guo et al., arXiv 1706.04599) divides the logits by one number per class. It
      leaves 0.5 where it is, so that it cannot mend scores that are all too high, as ASL's are.
    - "platt" adds a bias to that: Platt (1999), Probabilistic outputs for support vector machines.
      Both minimise cross-entropy to his targets, (n + 1) / (n + 2) and 1 / (m + 2) of n positives
      and m negatives in place of 1 and 0, so that a class whose scores separate has a finite map.
    - "isotonic" (Zadrozny and Elkan, 2002) takes the non-decreasing map of least squares. One
      absent cell is added at the highest score and one present at the lowest, so that
      no probability is 0 or 1.

    A class with n positives gets n / (n + shrinkage) of its own map and the rest of the one that
    is fitted to the cells of all classes together: a mean of logits for the first two, of
    probabilities for the third. A class without positives has the common map.
    """
    thinned = slice(None, None, max(1, scores.size // _COMMON_CELLS))
    common_scores, common_targets = (table[thinned].ravel() for table in (scores, targets))
    positives = np.count_nonzero(targets == 1, axis=0)
    share = positives / np.maximum(positives + shrinkage, 1)
    columns = [(scores[:, c], targets[:, c]) for c in range(scores.shape[1])]
    columns = [*columns, (common_scores, common_targets)]
    if method == "isotonic":
        knots = [_isotonic(*_annotated(*column)) for column in columns]
        ends = np.cumsum([0, *(len(x) for x, _ in knots)])
        x, y = (np.concatenate(each) for each in zip(*knots, strict=True))
        return Isotonic(x, y, ends, share)
    lines = np.array([_logistic(*_annotated(*column), method == "platt") for column in columns])
    own, common = lines[:-1].T, lines[-1][:, None]
    return Logistic(method, *(share * own + (1 - share) * common))


def cross_fitted(
    scores: Table, targets: Table, folds: int = FOLDS, seed: int = 0
) -> dict[str, Any]:
    """ECE and Brier score of the scores as they are, and calibrated by each method.

    Both are means over the classes that have an annotated cell, in [0, 1], under "ECE" and "Brier"
    by name ("scores" and those of `METHODS`). Every image is judged by maps that were fitted to
    other folds.

    Raises `ValueError` for fewer images than folds.
    """
    tables: dict[str, Table] = {"scores": scores}
    for method in METHODS:
        # the default of the argument holds this method, not the last
        def fit(scores: Table, targets: Table, method: Method = method) -> Calibration:
            return fitted(scores, targets, method)

        tables[method] = out_of_fold(fit, scores, targets, folds, seed)
    return {"folds": folds, "seed": seed, **calibration_errors(tables, targets)}


def calibration_errors(
    tables: Mapping[str, Table], targets: Table
) -> dict[str, dict[str, float | None]]:
    """The "ECE" and the "Brier" score of tables by name: means over classes, in [0, 1].

    Classes without an annotated cell are left out; None where nothing is left.
    """

    def mean(errors: Floats) -> float | None:
        known = errors[~np.isnan(errors)]
        return float(known.mean()) if len(known) else None

    return {
        "ECE": {name: mean(ece(each, targets)) for name, each in tables.items()},
        "Brier": {name: mean(brier(each, targets)) for name, each in tables.items()},
    }


def ece(probabilities: Table, targets: Table, bins: int = BINS) -> Floats:
    """The expected calibration error of every class: (C,) in [0, 1], NaN without annotated cells.

    The mean distance between the mean probability and the share of positives in `bins` bins of
    equal width, weighted by their cells (Guo et al., arXiv 1706.04599), class by class (the
    classwise ECE of Kull et al., arXiv 1910.12656, whose mean over classes is usually given).
    """
    errors = np.full(targets.shape[1], np.nan)
    for c in range(len(errors)):
        values, present = _annotated(probabilities[:, c], targets[:, c])
        if len(values):
            which = np.minimum((values * bins).astype(int), bins - 1)
            gap = np.bincount(which, values - present, minlength=bins)
            errors[c] = np.abs(gap).sum() / len(values)
    return errors


def brier(probabilities: Table, targets: Table) -> Floats:
    """The mean squared distance of every class from its labels: (C,), NaN without annotated cells.

    Brier (1950), Verification of forecasts expressed in terms of probability.
    """
    errors = np.full(targets.shape[1], np.nan)
    for c in range(len(errors)):
        values, present = _annotated(probabilities[:, c], targets[:, c])
        if len(values):
            errors[c] = np.mean((values - present) ** 2)
    return errors


def logit(scores: Table) -> Floats:
    """The inverse of the sigmoid, in float64. Scores nearer than 1e-7 to 0 or 1 count as that."""
    inside = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    values: Floats = np.log(inside / (1 - inside))
    return values


def sigmoid(logits: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logits))


def _annotated(scores: Table, targets: Table) -> tuple[Floats, npt.NDArray[np.bool_]]:
    there = targets != -1
    return scores[there].astype(np.float64), targets[there] == 1


def _of_table(calibration: Calibration, scores: Table) -> Floats:
    made = np.empty(scores.shape)
    for c in range(scores.shape[1]):
        made[:, c] = calibration.of_class(c, scores[:, c])
    return made


def _logistic(scores: Floats, present: npt.NDArray[np.bool_], with_bias: bool) -> Floats:
    """Slope and bias of least cross-entropy, by Newton's method; 1 and 0 where there is no cell.

    A step that is too long is halved: Lin, Lin and Weng (2007), A note on Platt's probabilistic
    outputs. scikit-learn's LogisticRegression gives the same in twenty times the time.
    """
    if not len(scores):
        return np.array([1.0, 0.0])
    positives = np.count_nonzero(present)
    wanted = np.where(
        present, (positives + 1) / (positives + 2), 1 / (len(present) - positives + 2)
    )
    x = np.stack([logit(scores), np.ones(len(scores))])[: 1 + with_bias]

    def loss(line: Floats) -> float:
        logits = line @ x
        return float(np.mean(np.logaddexp(0, logits) - wanted * logits))

    line = np.zeros(len(x))
    for _ in range(100):
        values = sigmoid(line @ x)
        curvature = (x * (values * (1 - values))) @ x.T
        curvature += 1e-9 * np.trace(curvature) * np.eye(len(x))  # equal scores have one direction
        step = np.linalg.solve(curvature, x @ (values - wanted))
        while loss(line - step) > loss(line) and np.abs(step).max() > 1e-9:
            step /= 2
        line -= step
        if np.abs(step).max() < 1e-7:
            break
    if line[0] < _LOWEST_SLOPE:  # next to nothing but the share of the positives
        line = np.array([_LOWEST_SLOPE, *logit(wanted.mean(keepdims=True))])
    return np.array([line[0], line[1] if with_bias else 0.0])


def _isotonic(scores: Floats, present: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """The knots of the map, scores ascending; of no cells, those of no change."""
    from sklearn.isotonic import IsotonicRegression

    if not len(scores):
        return np.array([0.0, 1.0]), np.array([0.0, 1.0])
    x, y = np.append(scores, [scores.max(), scores.min()]), np.append(present, [0, 1])
    map_ = IsotonicRegression().fit(x, y)
    return map_.X_thresholds_, map_.y_thresholds_
