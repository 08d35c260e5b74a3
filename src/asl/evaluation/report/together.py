"""Which labels, and which errors, come together."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from asl.evaluation.report.arrays import Array, Labels, Rows
from asl.evaluation.report.contents import Together
from asl.metrics import Floats

SHOWN = 20  # classes of a table
CLASSES = 200  # that are looked at, those with most positives


def together(
    scores: Floats, targets: Labels, names: Sequence[str], thresholds: Array
) -> list[Together]:
    """Labels beside labels, and false alarms at `thresholds` (C,) beside labels and misses."""
    counts = np.count_nonzero(targets == 1, axis=0)
    chosen = np.sort(np.argsort(-counts, kind="stable")[:CLASSES])
    predicted = scores[:, chosen] > thresholds[chosen]
    target = targets[:, chosen]
    present, alarm = target == 1, predicted & (target == 0)
    missed = ~predicted & present
    p, a, m, known, absent = (
        torch.from_numpy(np.ascontiguousarray(each)).float()
        for each in (present, alarm, missed, target != -1, target == 0)
    )
    named = [names[c] for c in chosen]
    return [
        _table(
            "labels together",
            "Of the images in which the class of the column is present, the share in which that of "
            "the row is present too.",
            *(named, p.T @ p, known.T @ p),
        ),
        _table(
            "false alarms beside labels",
            "Of the images in which the class of the column is present and that of the row absent, "
            "the share with a false alarm of the row.",
            *(named, a.T @ p, absent.T @ p),
        ),
        _table(
            "false alarms beside misses",
            "Of the images in which the class of the column is missed and that of the row absent, "
            "the share with a false alarm of the row: one is taken for the other.",
            *(named, a.T @ m, absent.T @ m),
        ),
    ]


def _table(
    title: str, explanation: str, names: Sequence[str], both: Tensor, images: Tensor
) -> Together:
    """The shares both / images of the classes with most of `both`; None where there is no image."""
    both = both.clone().fill_diagonal_(0)
    shown = _most(both.double().numpy())
    part = np.ix_(shown, shown)
    share = (both / images)[part]  # 0 of 0 is NaN
    share.fill_diagonal_(float("nan"))
    table = [[None if value != value else value for value in row] for row in share.tolist()]
    return {
        "title": title,
        "explanation": explanation,
        "classes": [names[c] for c in shown],
        "table": table,
    }


def _most(both: Array) -> Rows:
    sums = both.sum(axis=0) + both.sum(axis=1)
    most = np.argsort(-sums, kind="stable")[:SHOWN]
    return np.sort(most[sums[most] > 0])
