"""Intervals by the bootstrap over images: what a figure would have been on other such images.

A resample draws N of the N images with replacement (Efron and Tibshirani 1993, chapter 13). It is
kept as how often each image was drawn, so that the scores are put in order once and not once for
every resample.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from asl.evaluation.report.arrays import Array, Labels, Mask, Rows
from asl.evaluation.report.contents import Interval
from asl.metrics import Floats, Protocol, blocks

LEVEL = 95  # percent of the resamples between the ends of an interval


def resample(images: int, number: int, seed: int = 0) -> Tensor:
    """How often each image stands in each of so many resamples: (images, number) float32."""
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, images, images) for _ in range(number))
    counts = [np.bincount(drawn, minlength=images).astype(np.float32) for drawn in draws]
    return torch.from_numpy(np.stack(counts, axis=1))


def resampled_ap(scores: Floats, targets: Labels, counts: Tensor) -> Array:
    """`metrics.average_precision` in every resample: (C, R) in [0, 1], NaN without a positive.

    `counts` (N, R) are those of `resample`, or any other whole weights of the images.
    """
    ap = np.full((scores.shape[1], counts.shape[1]), np.nan)
    column = 0
    with tqdm(total=scores.shape[1], desc="intervals", unit="class", leave=False) as bar:
        for block_scores, block_targets in blocks(scores, targets, axis=1):
            for score, target in zip(block_scores, block_targets, strict=True):
                if (target == 1).any():
                    ap[column] = _ap_of_class(score, target, counts)
                column += 1
                bar.update()
    return ap


def _ap_of_class(score: Floats, target: Labels, counts: Tensor) -> Array:
    # Precision changes at the scores of positives alone. An image counts at the highest of them
    # that it reaches; those that reach none count nowhere.
    thresholds = np.unique(score[target == 1])
    positives, reaching = target == 1, (target != -1) & (score >= thresholds[0])
    true = _down_to(np.flatnonzero(positives), score, thresholds, counts)
    every = _down_to(np.flatnonzero(reaching), score, thresholds, counts).cumsum(0)
    found = true.cumsum(0)  # those that score at least as high
    precision = found.double() / every.clamp(min=1)
    ap: Array = ((true * precision).sum(0) / found[-1]).numpy()  # 0 of 0 is NaN
    return ap


def _down_to(images: Rows, score: Floats, thresholds: Floats, counts: Tensor) -> Tensor:
    """How often images were drawn that reach each threshold, the highest first, but none above.

    (thresholds, R) float32, which is exact up to 16 million images.
    """
    step = len(thresholds) - np.searchsorted(thresholds, score[images], side="right")
    order = np.argsort(step, kind="stable")
    starts = np.searchsorted(step[order], np.arange(len(thresholds)))
    rows, offsets = torch.from_numpy(images[order]), torch.from_numpy(starts)
    # Sums of rows of a table are what PyTorch's embeddings do: eight times as fast as NumPy's.
    return torch.nn.functional.embedding_bag(rows, counts, offsets, mode="sum")


def resampled_map(ap: Array, targets: Labels, counts: Tensor, protocol: Protocol) -> Array:
    """The mAP, in percent, of every resample: (R,), from the (C, R) `resampled_ap`.

    It runs over the classes that `protocol` counts in the resample; NaN where there is none.
    """
    counted = ~np.isnan(ap)
    if protocol == "official":
        return np.asarray(100 * np.nan_to_num(ap).mean(axis=0))
    if protocol == "partial":
        counted &= np.concatenate([_drawn(t == 0, counts) > 0 for _, t in _parts(targets)])
    return 100 * _mean(np.nan_to_num(ap), counted)


def resampled_f1(
    scores: Floats, targets: Labels, thresholds: Array, counts: Tensor, protocol: Protocol
) -> dict[str, Array]:
    """CF1 and OF1 of `metrics.f1_scores`, in percent, in every resample: (R,) each."""
    sums = []
    for part, target in _parts(targets):
        predicted, present = (scores[:, part] > thresholds[part]) & (target != -1), target == 1
        cells = (predicted & present, predicted, present, target == 0)
        sums.append([_drawn(each, counts) for each in cells])
    hits, predictions, positives, negatives = map(np.concatenate, zip(*sums, strict=True))
    counted = np.ones(hits.shape, dtype=bool) if protocol == "official" else positives > 0
    if protocol == "partial":
        counted &= negatives > 0
    cp = _mean(hits / np.maximum(predictions, 1), counted)
    cr = _mean(hits / np.maximum(positives, 1), counted)
    hit, either = hits.sum(axis=0), predictions.sum(axis=0) + positives.sum(axis=0)
    return {
        "CF1": 200 * cp * cr / np.maximum(cp + cr, np.finfo(float).tiny),
        "OF1": 200 * hit / np.maximum(either, 1),
    }


def interval(value: float, samples: npt.NDArray[np.floating[Any]]) -> Interval:
    """A figure with the ends of the middle `LEVEL` percent of its `samples`; NaN is no sample."""
    defined = samples[~np.isnan(samples)]
    if np.isnan(value) or not len(defined):
        return {"value": None if np.isnan(value) else float(value), "low": None, "high": None}
    low, high = np.percentile(defined, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return {"value": float(value), "low": float(low), "high": float(high)}


def _parts(targets: Labels) -> Iterator[tuple[slice, Labels]]:
    """A few classes at a time: what is multiplied with the resamples must be float32."""
    for start in range(0, targets.shape[1], 64):
        part = slice(start, start + 64)
        yield part, targets[:, part]


def _drawn(cells: Mask, counts: Tensor) -> Array:
    """How many of the marked cells of each class are in each resample: (C, R)."""
    number: Array = (torch.from_numpy(cells.astype(np.float32)).T @ counts).double().numpy()
    return number


def _mean(values: Array, counted: Mask) -> Array:
    """Means over the classes that count, by resample; NaN where none does."""
    number = counted.sum(axis=0)
    total = np.where(counted, values, 0).sum(axis=0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
