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

SHOWN = 100


def suspected(scores: Floats, targets: Labels) -> tuple[Rows, Rows, Array]:
    """Rows and columns of the cells whose label is likely wrong, and the quality of each label.

    The quality, in [0, 1], is the score of what the label says: the score where it is present, one
    minus the score where it is absent. Labels that say "present" and "absent" come by turns, of
    each the worst first: most cells are absent, and scores so much nearer to 0 than to 1 that one
    order for both would show a single kind. A class without an annotated positive or an annotated
    negative has none.
    """
    cells = []
    column = 0
    for block_scores, block_targets in blocks(scores, targets, axis=1):
        for score, target in zip(block_scores, block_targets, strict=True):
            wrong = np.flatnonzero(likely_wrong(score.astype(np.float64), target))
            quality = np.where(target == 1, score, 1 - score)[wrong]
            cells.append((wrong, np.full(len(wrong), column), quality, target[wrong]))
            column += 1
    rows, columns, qualities, labels = map(np.concatenate, zip(*cells, strict=True))
    turn = np.empty(len(rows), dtype=np.int64)
    for label in (0, 1):
        chosen = np.flatnonzero(labels == label)
        worst_first = chosen[np.argsort(qualities[chosen], kind="stable")]
        turn[worst_first] = np.arange(len(chosen))
    order = np.lexsort((qualities, turn))
    return rows[order], columns[order], qualities[order].astype(np.float64)


def likely_wrong(score: Array, target: Labels) -> Mask:
    """Which labels of a class are likely wrong, of its N scores and labels.

    Each of the two labels has a threshold: the mean score, for that label, of the cells that have
    it. A label is likely wrong where the other one is at its threshold and is the more likely.
    """
    present, absent = target == 1, target == 0
    if not present.any() or not absent.any():
        return np.zeros(len(target), dtype=bool)
    as_present = score >= score[present].mean()
    as_absent = 1 - score >= (1 - score[absent]).mean()
    doubted: Mask = (absent & as_present & (score > 0.5)) | (present & as_absent & (score < 0.5))
    return doubted


def gallery(scored: Scored, out_of_fold: Floats | None) -> Gallery:
    """The suspected label errors by `out_of_fold` scores, or by the model's own."""
    scores = scored.scores if out_of_fold is None else out_of_fold
    rows, columns, quality = suspected(scores, scored.targets)
    source = (
        "The scores are the model's own: where it was trained on these labels it repeats them, and "
        "few errors show (--report-folds 5 asks models that have not seen them)."
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
        "explanation": f"{len(rows):,} labels that confident learning doubts, at most {SHOWN} "
        f"shown: those that say present and those that say absent by turns, of each those that fit "
        f"worst first. {source}",
        "examples": examples,
    }
