"""Average precision, mAP over full and partial annotations, precision, recall and F1.

`scores` and `targets` are (N, C) NumPy arrays or PyTorch tensors on any device. Scores are of any
floating type; but for thresholds only their order counts. Targets are 1 (present), 0 (absent) or
-1 (not annotated: the cell is left out of everything), of any type. A NaN score, a target of any
other value (both named with their place) and shapes that differ are a `ValueError`.

Memory: the tables are read in blocks of `BLOCK_CELLS`, so that a 100,000 x 9,605 table of float16
costs about 20 MB beside itself.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

Table = npt.NDArray[Any] | torch.Tensor
Floats = npt.NDArray[np.floating[Any]]
Counts = npt.NDArray[np.int64]

# Which classes a mean over classes runs over:
#   full      those with a positive: AP and recall of the others are not defined
#   partial   those with an annotated positive and an annotated negative (Open Images, CSL)
#   official  all; one without positives counts as AP 0 (the official ASL training script)
Protocol = Literal["full", "partial", "official"]

# 4 MB of float32 scores. Narrower blocks read the cache lines of a long table several times: at
# 50,000 x 2,000, a quarter of this costs 11 % of time, four times this saves 16 %.
BLOCK_CELLS = 1 << 20


def average_precision(scores: Table, targets: Table) -> npt.NDArray[np.float64]:
    """Return the average precision of every class: (C,) in [0, 1], NaN where there is no positive.

    Not interpolated: the mean, over the positives, of the precision among everything that scores at
    least as high. Equal scores are one threshold, so the order of the images does not matter. This
    is scikit-learn's `average_precision_score` and, without ties, the official ASL code's AP.
    """
    return _rank_classes(scores, targets)[0]


def mean_average_precision(
    scores: Table, targets: Table, *, protocol: Protocol = "full", weighted: bool = False
) -> float:
    """Return the mean of `average_precision` over classes, in percent; NaN if no class is left.

    `protocol` says which classes count (see `Protocol`); `evaluate_scores` lists what fell out and
    why. `weighted` weighs each class by its number of positives, as the ASL and CSL papers do in
    their second Open Images figure.
    """
    return _mean_over_classes(*_rank_classes(scores, targets), protocol, weighted)


def f1_scores(
    scores: Table,
    targets: Table,
    threshold: float | Floats = 0.5,
    *,
    top_k: int | None = None,
    protocol: Protocol = "full",
) -> dict[str, float]:
    """Return CP, CR, CF1, OP, OR, OF1 and macro_F1, all in percent.

    A label is predicted where its score is above `threshold` (one number, or one per class) and,
    with `top_k`, also among the k highest annotated scores of its image (of equal ones, the lower
    class first). Both conditions together are what the papers' top-3 columns report (the code they
    share comes from ML-GCN, arXiv 1904.03582); `threshold=-inf` gives k labels to every image.

    OP and OR are precision and recall over all cells, CP and CR the means of the classes' own; the
    precision of no predictions is 0. OF1 and CF1 are the harmonic means of the two beside them, as
    in the papers. macro_F1 is the mean of the classes' own F1: the official validate.py's F_C.
    Means over classes run over those that `protocol` counts; NaN where nothing is left.
    """
    scores, targets = _as_tables(scores, targets)
    num_classes = scores.shape[1]
    limit = np.asarray(threshold, dtype=np.float64)
    if limit.shape not in ((), (num_classes,)):
        raise ValueError(f"threshold has shape {limit.shape}; give one, or one per class")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")

    hits, predictions, positives, negatives = np.zeros((4, num_classes), dtype=np.int64)
    for score, target in blocks(scores, targets, axis=0):
        predicted = (score > limit) & (target != -1)
        if top_k is not None and top_k < num_classes:
            predicted &= _among_top(score, target != -1, top_k)
        present = target == 1
        hits += np.count_nonzero(predicted & present, axis=0)
        predictions += np.count_nonzero(predicted, axis=0)
        positives += np.count_nonzero(present, axis=0)
        negatives += np.count_nonzero(target == 0, axis=0)

    counted = _counted_classes(positives, negatives, protocol)
    precision, recall = _ratio(hits, predictions)[counted], _ratio(hits, positives)[counted]
    class_f1 = _ratio(2 * hits, predictions + positives)[counted]
    cp, cr, macro = _mean(precision), _mean(recall), _mean(class_f1)
    op = float(_ratio(hits.sum(), predictions.sum()))
    recalled = float(_ratio(hits.sum(), positives.sum())) if positives.any() else float("nan")
    figures = {
        "CP": cp,
        "CR": cr,
        "CF1": _harmonic_mean(cp, cr),
        "OP": op,
        "OR": recalled,
        "OF1": _harmonic_mean(op, recalled),
        "macro_F1": macro,
    }
    return {name: 100 * value for name, value in figures.items()}


def best_thresholds(scores: Table, targets: Table) -> npt.NDArray[np.float64]:
    """Return the threshold of best F1 of every class: (C,), NaN for a class without positives.

    To be used as `f1_scores(..., threshold=...)`. It lies half-way between the lowest score that it
    accepts and the highest that it rejects, and is the lowest of several equally good ones. Choose
    it on other images than those it is judged on.
    """

    def best_f1(true: Counts, false: Counts) -> int:
        # F1 = 2 TP / (2 TP + FP + FN), and TP + FN are all positives: those of the lowest score
        return int(np.argmax(2 * true / (true + false + true[0])))

    return _thresholds(scores, targets, best_f1)


def precision_thresholds(
    scores: Table, targets: Table, precision: float
) -> npt.NDArray[np.float64]:
    """Return the threshold of highest recall at which a class has at least this precision: (C,).

    The precision is in (0, 1]. Infinite for a class that reaches it nowhere, NaN for one without
    positives; else it lies between scores as that of `best_thresholds` does.
    """

    def lowest(true: Counts, false: Counts) -> int | None:
        reached = np.flatnonzero(true / (true + false) >= precision)
        return int(reached[0]) if len(reached) else None

    return _thresholds(scores, targets, lowest)


def _thresholds(
    scores: Table, targets: Table, choose: Callable[[Counts, Counts], int | None]
) -> npt.NDArray[np.float64]:
    """The threshold that accepts, of every class, the positives from the one chosen upwards.

    `choose` is given how many positives and negatives that would accept, for each positive, and may
    choose none.
    """
    scores, targets = _as_tables(scores, targets)
    thresholds = np.full(scores.shape[1], np.nan)
    for column, (positives, negatives) in enumerate(sorted_by_class(scores, targets)):
        if not len(positives):
            continue
        true, false = _accepted(positives, negatives)
        chosen = choose(true, false)
        if chosen is None:
            thresholds[column] = np.inf
            continue
        accepted = float(positives[chosen])
        # The highest that it rejects is a negative: to accept a positive there would be better yet.
        rejected = negatives[: len(negatives) - false[chosen]]
        just_below = np.nextafter(accepted, -np.inf)  # of two neighbours the middle is one of them
        middle = (float(rejected[-1]) + accepted) / 2 if len(rejected) else just_below
        thresholds[column] = min(just_below, middle)
    return thresholds


def evaluate_scores(
    scores: Table,
    targets: Table,
    classes: Sequence[str] | None = None,
    *,
    threshold: float | Floats = 0.5,
    top_k: int = 3,
    protocol: Protocol = "full",
) -> dict[str, Any]:
    """Return everything that a report needs, ready for `json.dump` (what is not defined is None).

    Keys: protocol, images, mAP and weighted_mAP in percent, averaged_classes (how many classes the
    means run over), classes_without_labels, classes_without_positives and classes_without_negatives
    (names; a class without labels is in the first list alone), threshold (a list if one per class
    was given), at_threshold (the dictionary of `f1_scores`), top_k, at_top_k (likewise), and
    per_class: a list of {name, AP in percent, positives, negatives}. Without `classes` the names
    are "0", "1", ...
    """
    scores, targets = _as_tables(scores, targets)
    names = [str(c) for c in range(scores.shape[1])] if classes is None else list(classes)
    if len(names) != scores.shape[1]:
        raise ValueError(f"{len(names)} class names for scores of {scores.shape[1]} classes")
    ap, positives, negatives = _rank_classes(scores, targets)
    per_class = [
        {"name": name, "AP": _defined(100 * ap_), "positives": int(pos), "negatives": int(neg)}
        for name, ap_, pos, neg in zip(names, ap, positives, negatives, strict=True)
    ]

    def named(chosen: npt.NDArray[np.bool_]) -> list[str]:
        return [names[c] for c in np.flatnonzero(chosen)]

    def f1_figures(top_k: int | None) -> dict[str, float | None]:
        figures = f1_scores(scores, targets, threshold, top_k=top_k, protocol=protocol)
        return {name: _defined(value) for name, value in figures.items()}

    return {
        "protocol": protocol,
        "images": len(scores),
        "mAP": _defined(_mean_over_classes(ap, positives, negatives, protocol, weighted=False)),
        "weighted_mAP": _defined(
            _mean_over_classes(ap, positives, negatives, protocol, weighted=True)
        ),
        "averaged_classes": int(_counted_classes(positives, negatives, protocol).sum()),
        "classes_without_labels": named((positives == 0) & (negatives == 0)),
        "classes_without_positives": named((positives == 0) & (negatives > 0)),
        "classes_without_negatives": named((positives > 0) & (negatives == 0)),
        "threshold": np.asarray(threshold).tolist(),
        "at_threshold": f1_figures(None),
        "top_k": top_k,
        "at_top_k": f1_figures(top_k),
        "per_class": per_class,
    }


def _rank_classes(
    scores: Table, targets: Table
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (C,) average precision, number of positives, number of negatives."""
    scores, targets = _as_tables(scores, targets)
    ap = np.full(scores.shape[1], np.nan)
    counts = np.zeros((2, scores.shape[1]), dtype=np.int64)
    for column, (positives, negatives) in enumerate(sorted_by_class(scores, targets)):
        counts[:, column] = len(positives), len(negatives)
        if len(positives):
            true, false = _accepted(positives, negatives)
            ap[column] = np.mean(true / (true + false))
    return ap, counts[0], counts[1]


def sorted_by_class(scores: Table, targets: Table) -> Iterator[tuple[Floats, Floats]]:
    """Yield, class by class, the scores of its positives and of its negatives, each ascending.

    They are float32, or float64 where the scores were wider.

    Two sorts of values instead of one argsort: NumPy sorts values with vector instructions, five
    times faster than it sorts indices, and what is not annotated falls out by itself.
    """
    for block_scores, block_targets in blocks(scores, targets, axis=1):
        for score, target in zip(block_scores, block_targets, strict=True):
            yield np.sort(score[target == 1]), np.sort(score[target == 0])


def _accepted(
    positives: Floats, negatives: Floats
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count, for every positive, the positives and the negatives that score at least as high."""
    true = len(positives) - np.searchsorted(positives, positives)
    false = len(negatives) - np.searchsorted(negatives, positives)
    return true, false


def _among_top(score: Floats, annotated: npt.NDArray[np.bool_], k: int) -> npt.NDArray[np.bool_]:
    """Mark the k highest annotated scores of every row; of equal ones the first."""
    ranked = np.where(annotated, score, -np.inf)
    kth = np.partition(ranked, -k, axis=1)[:, [-k]]
    above = ranked > kth
    equal: npt.NDArray[np.bool_] = (ranked == kth) & annotated
    room = k - np.count_nonzero(above, axis=1, keepdims=True)
    return above | (equal & (equal.cumsum(axis=1, dtype=np.int32) <= room))


def _counted_classes(
    positives: npt.NDArray[np.int64], negatives: npt.NDArray[np.int64], protocol: Protocol
) -> npt.NDArray[np.bool_]:
    """Mark the classes over which `protocol` takes a mean: (C,) bool."""
    if protocol == "full":
        return positives > 0
    if protocol == "partial":
        return (positives > 0) & (negatives > 0)
    if protocol == "official":
        return np.ones(len(positives), dtype=bool)
    raise ValueError(f"protocol is {protocol!r}; it must be 'full', 'partial' or 'official'")


def _mean_over_classes(
    ap: npt.NDArray[np.float64],
    positives: npt.NDArray[np.int64],
    negatives: npt.NDArray[np.int64],
    protocol: Protocol,
    weighted: bool,
) -> float:
    counted = _counted_classes(positives, negatives, protocol)
    weights = positives if weighted else np.ones_like(positives)
    return 100 * _mean(np.nan_to_num(ap[counted]), weights[counted])


def _mean(values: npt.NDArray[np.float64], weights: npt.NDArray[np.int64] | None = None) -> float:
    total = len(values) if weights is None else weights.sum()
    return float(np.average(values, weights=weights)) if total else float("nan")


def _ratio(numerator: Any, denominator: Any) -> npt.NDArray[np.float64]:
    """Divide counts; 0 of 0 is 0, as in the official validate.py."""
    return np.asarray(numerator / np.maximum(denominator, 1), dtype=np.float64)


def _harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _as_tables(scores: Table, targets: Table) -> tuple[Table, Table]:
    """Return both as arrays or tensors of the same (N, C), without a copy."""
    scores, targets = (
        x if isinstance(x, torch.Tensor) else np.asarray(x) for x in (scores, targets)
    )
    if scores.ndim != 2 or tuple(scores.shape) != tuple(targets.shape):
        raise ValueError(
            "scores and targets must both be (N, C); "
            f"they are {tuple(scores.shape)} and {tuple(targets.shape)}"
        )
    return scores, targets


def blocks(
    scores: Table, targets: Table, axis: Literal[0, 1]
) -> Iterator[tuple[Floats, npt.NDArray[Any]]]:
    """Cut the tables into checked, contiguous blocks of rows (axis 0) or of classes (axis 1).

    Yields scores (float32, or float64 where they were wider) and targets, with `axis` first. A
    class is a strided column of the table: copied alone it would cost a cache line for every cell,
    so neighbouring classes are transposed together.
    """
    length, across = scores.shape[axis], scores.shape[1 - axis]
    step = max(1, BLOCK_CELLS // max(1, across))
    for start in range(0, length, step):
        part = slice(start, start + step)
        score, target = (
            _to_numpy(x[part] if axis == 0 else x[:, part].T) for x in (scores, targets)
        )
        score = np.ascontiguousarray(score, dtype=np.result_type(score, np.float32))
        target = np.ascontiguousarray(target)
        nan = np.isnan(score)
        if nan.any():
            raise ValueError(f"scores[{_first(nan, start, axis)}] is NaN")
        wrong = (target != 0) & (target != 1) & (target != -1)
        if wrong.any():
            raise ValueError(
                f"targets[{_first(wrong, start, axis)}] is {target[wrong][0]}; "
                "a target is 1 (present), 0 (absent) or -1 (not annotated)"
            )
        yield score, target


def _first(marked: npt.NDArray[np.bool_], start: int, axis: Literal[0, 1]) -> str:
    along, across = np.argwhere(marked)[0]
    row, column = (start + along, across) if axis == 0 else (across, start + along)
    return f"{row}, {column}"


def _to_numpy(block: Table) -> npt.NDArray[Any]:
    if isinstance(block, torch.Tensor):
        block = block.detach().cpu()
        block = (block.float() if block.dtype == torch.bfloat16 else block).numpy()
    return block
