"""The classes of a report one by one, and all their cells together."""

from collections.abc import Mapping, Sequence

import numpy as np

from asl.evaluation.report.arrays import Array, Counts, Labels
from asl.evaluation.report.bootstrap import interval
from asl.evaluation.report.contents import (
    ClassFigures,
    Curve,
    Histogram,
    OperatingPoint,
    Reliability,
)
from asl.metrics import Floats, average_precision, blocks

FEW = 10  # positives: below, one image more or less moves AP by several points
CURVES = 100  # classes with a curve, those with most positives
POINTS = 200  # of a curve, at most
BINS = 20  # of histograms and of the reliability diagram
STEPS = 10_000  # of the threshold of the curve over all cells


def class_figures(
    scores: Floats,
    targets: Labels,
    names: Sequence[str],
    thresholds: Mapping[str, Array],
    ap_samples: Array,
) -> list[ClassFigures]:
    """A row for every class, in order; `thresholds` are (C,) by rule, NaN where there is none.

    `ap_samples` (C, R) are AP in resamples, in [0, 1], or (C, 0).
    """
    ap = average_precision(scores, targets)
    frequent = np.argsort(-np.count_nonzero(targets == 1, axis=0), kind="stable")[:CURVES]
    drawn = {*frequent.tolist()}
    rows: list[ClassFigures] = []
    for block_scores, block_targets in blocks(scores, targets, axis=1):
        for score, target in zip(block_scores, block_targets, strict=True):
            column = len(rows)
            positives, negatives = score[target == 1], score[target == 0]
            points = [
                operating_point(rule, float(limits[column]), positives, negatives)
                for rule, limits in thresholds.items()
            ]
            rows.append(
                {
                    "name": names[column],
                    "AP": interval(100 * ap[column], 100 * ap_samples[column]),
                    "positives": len(positives),
                    "negatives": len(negatives),
                    "few": len(positives) < FEW,
                    "points": points,
                    "curve": _curve_of_class(positives, negatives) if column in drawn else None,
                    "scores": histogram(positives, negatives),
                }
            )
    return rows


def operating_point(
    rule: str, threshold: float, positives: Floats, negatives: Floats
) -> OperatingPoint:
    """Precision, recall and F1 of the class whose cells score so; predicted is what lies above."""
    hits, alarms = (int(np.count_nonzero(each > threshold)) for each in (positives, negatives))
    known = not np.isnan(threshold)
    return {
        "rule": rule,
        "threshold": threshold if np.isfinite(threshold) else None,
        "precision": _percent(hits, hits + alarms) if known else None,
        "recall": _percent(hits, len(positives)) if known else None,
        "f1": _percent(2 * hits, hits + alarms + len(positives)) if known else None,
    }


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _curve_of_class(positives: Floats, negatives: Floats) -> Curve | None:
    """The points at the scores of positives: between them, recall does not change."""
    if not len(positives):
        return None
    positives, negatives = np.sort(positives), np.sort(negatives)
    thresholds = np.unique(positives)[::-1]
    hits = len(positives) - np.searchsorted(positives, thresholds)
    alarms = len(negatives) - np.searchsorted(negatives, thresholds)
    return _curve(hits, alarms)


def _curve(hits: Counts, alarms: Counts) -> Curve:
    """From the numbers of hits and false alarms at falling thresholds; the last recalls all."""
    chosen = np.unique(np.linspace(0, len(hits) - 1, POINTS).round().astype(int))
    hit, alarm = hits[chosen], alarms[chosen]
    return {
        "recall": (hit / hits[-1]).tolist(),
        "precision": (hit / np.maximum(hit + alarm, 1)).tolist(),
    }


def histogram(positives: Floats, negatives: Floats) -> Histogram:
    """How many of the cells score in each of `BINS` equal parts of [0, 1]."""
    return {
        "edges": np.linspace(0, 1, BINS + 1).tolist(),
        "positives": _counts(positives, BINS).tolist(),
        "negatives": _counts(negatives, BINS).tolist(),
    }


def _bin(score: Floats, bins: int) -> Counts:
    return np.clip(score.astype(np.float64) * bins, 0, bins - 1).astype(np.intp)


def _counts(score: Floats, bins: int) -> Counts:
    return np.bincount(_bin(score, bins), minlength=bins)


def all_cells(
    scores: Floats, targets: Labels
) -> tuple[Curve | None, Histogram, Reliability | None]:
    """Precision over recall, histogram and reliability of all annotated cells of all classes.

    The curve is that of one threshold for all classes, in steps of 1 / `STEPS`. The calibration
    error is that of Guo et al. 2017 (arXiv 1706.04599, eq. 3), over cells and with `BINS` bins.
    """
    at_steps = np.zeros((2, STEPS), dtype=np.int64)  # of negatives, of positives
    in_bins = np.zeros((2, BINS), dtype=np.int64)
    score_sums, square = np.zeros(BINS), 0.0
    for score, target in blocks(scores, targets, axis=1):
        for label in (0, 1):
            of_label = score[target == label].astype(np.float64)
            at_steps[label] += _counts(of_label, STEPS)
            bins = _bin(of_label, BINS)
            in_bins[label] += np.bincount(bins, minlength=BINS)
            score_sums += np.bincount(bins, of_label, BINS)
            square += float(np.square(of_label - label).sum())
    shown: Histogram = {
        "edges": np.linspace(0, 1, BINS + 1).tolist(),
        "positives": in_bins[1].tolist(),
        "negatives": in_bins[0].tolist(),
    }
    alarms, hits = (each[::-1].cumsum() for each in at_steps)
    reached = np.flatnonzero(np.diff(hits, prepend=0))  # where recall grows
    curve = _curve(hits[reached], alarms[reached]) if len(reached) else None
    cells = in_bins.sum(axis=0)
    if not cells.any():
        return curve, shown, None
    filled = cells > 0
    mean, share = score_sums[filled] / cells[filled], in_bins[1][filled] / cells[filled]
    reliability: Reliability = {
        "score": mean.tolist(),
        "frequency": share.tolist(),
        "cells": cells[filled].tolist(),
        "ece": float((np.abs(mean - share) * cells[filled]).sum() / cells.sum()),
        "brier": float(square / cells.sum()),
    }
    return curve, shown, reliability
