"""Labels that are likely wrong: confident learning, one class at a time.

Northcutt, Jiang and Chuang 2021 (arXiv 1911.00068, section 3.1), one class against the rest, as
cleanlab does it for several labels. Cells that are not annotated take no part, which cleanlab does
not know. The scores should be of models that have not seen these labels: one that has says what it
was told.
"""

import numpy as np

from asl.evaluation.report.arrays import Array, Labels, Mask, Rows
from asl.evaluation.report.contents import Gallery
from asl.evaluation.report.examples import Scored
from asl.metrics import Floats, blocks

SHOWN = 100  # those whose labels fit worst


def suspected(scores: Floats, targets: Labels) -> tuple[Rows, Rows, Array]:
    """Rows and columns of the cells whose label is likely wrong, and the quality of each label.

    The quality, in [0, 1], is what `label_quality` says; the worst come first. A class without an
    annotated positive or an annotated negative has none.
    """
    rows, columns, qualities = [], [], []
    column = 0
    for block_scores, block_targets in blocks(scores, targets, axis=1):
        for score, target in zip(block_scores, block_targets, strict=True):
            quality, doubted = label_quality(score.astype(np.float64), target)
            wrong = np.flatnonzero(doubted)
            rows.append(wrong)
            columns.append(np.full(len(wrong), column))
            qualities.append(quality[wrong])
            column += 1
    row, quality = np.concatenate(rows), np.concatenate(qualities)
    order = np.argsort(quality, kind="stable")
    return row[order], np.concatenate(columns)[order], quality[order]


def label_quality(score: Array, target: Labels) -> tuple[Array, Mask]:
    """How well the labels of a class fit its scores, (N,) in [0, 1], and which are likely wrong.

    Each of the two labels has a threshold: the mean score, for that label, of the cells that have
    it. A label is likely wrong where the other one is at its threshold and is the more likely. The
    quality is the score of the label over that of both, after each was lowered by its threshold
    (cleanlab's self-confidence with `adjust_pred_probs`): without that, the labels of rare and of
    hard classes would all fit worst where they say "present".
    """
    present, absent = target == 1, target == 0
    if not present.any() or not absent.any():
        return np.ones(len(target)), np.zeros(len(target), dtype=bool)
    threshold = score[present].mean(), (1 - score[absent]).mean()
    likely = score >= threshold[0], 1 - score >= threshold[1]
    doubted: Mask = (absent & likely[0] & (score > 0.5)) | (present & likely[1] & (score < 0.5))
    as_present = score - threshold[0] + max(threshold)
    as_absent = 1 - score - threshold[1] + max(threshold)
    return np.where(present, as_present, as_absent) / (as_present + as_absent), doubted


def gallery(scored: Scored, out_of_fold: Floats | None) -> Gallery:
    """The suspected label errors by `out_of_fold` scores, or by the model's own."""
    scores = scored.scores if out_of_fold is None else out_of_fold
    rows, columns, quality = suspected(scores, scored.targets)
    source = (
        "The scores are the model's own: where it was trained on these labels it repeats them, and "
        "few errors show (--folds 5 asks models that have not seen them)."
        if out_of_fold is None
        else "The scores are of linear heads on the model's features, each fitted to the other "
        "folds: none has seen the label that it doubts."
    )
    examples = []
    for row, column, fit in zip(
        rows[:SHOWN].tolist(), columns[:SHOWN].tolist(), quality[:SHOWN].tolist(), strict=True
    ):
        example = scored.example(row, column)
        example["quality"] = fit
        examples.append(example)
    return {
        "key": "suspects",
        "title": "suspected label errors",
        "explanation": f"{len(rows):,} labels that confident learning doubts, those that fit worst "
        f"first, at most {SHOWN}. {source}",
        "examples": examples,
    }
