"""Which cells of the table of labels are shown with their photographs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from asl.evaluation.report.arrays import Array, Labels, Mask, Rows
from asl.evaluation.report.contents import Example, Gallery, Label, Outline
from asl.metrics import Floats, blocks

SHOWN = 48  # examples of a gallery
OF_A_CLASS = 4  # of them: one bad class shall not fill it
PREDICTED = 8  # labels named beside a photograph, those with the highest scores

Cells = tuple[Rows, Rows]  # rows and columns


@dataclass(frozen=True, eq=False)
class Scored:
    """What is known of the images: (N, C) scores and targets, C names and thresholds.

    `files` are N names, or none. `outlines` gives the objects of an image by its row.
    """

    scores: Floats
    targets: Labels
    names: Sequence[str]
    thresholds: Array
    files: Sequence[str] = ()
    outlines: Callable[[int], list[Outline]] | None = None

    def example(self, row: int, column: int) -> Example:
        """A cell with what there is to see beside it."""
        score, target = self.scores[row].astype(np.float64), self.targets[row]
        predicted = np.flatnonzero(score > self.thresholds)
        predicted = predicted[np.argsort(-score[predicted], kind="stable")][:PREDICTED]
        labels: list[Label] = [
            {"name": self.names[c], "score": float(score[c])} for c in predicted.tolist()
        ]
        return {
            "row": row,
            "file": self.files[row] if len(self.files) else "",
            "name": self.names[column],
            "score": float(score[column]),
            "annotated": None if target[column] == -1 else bool(target[column] == 1),
            "truth": [self.names[c] for c in np.flatnonzero(target == 1).tolist()],
            "predicted": labels,
            "objects": self.outlines(row) if self.outlines else [],
        }


def galleries(scored: Scored) -> list[Gallery]:
    """The false alarms that score highest and the misses that score lowest."""
    limit = f"At most {SHOWN}, and {OF_A_CLASS} of a class."
    alarms = _extreme(scored, label=0, sign=1)
    misses = _extreme(scored, label=1, sign=-1)
    return [
        {
            "key": "false_alarms",
            "title": "false alarms with the highest scores",
            "explanation": f"The class is annotated as absent. {limit}",
            "examples": [scored.example(*cell) for cell in alarms],
        },
        {
            "key": "misses",
            "title": "misses with the lowest scores",
            "explanation": f"The class is annotated as present. {limit}",
            "examples": [scored.example(*cell) for cell in misses],
        },
    ]


def _extreme(scored: Scored, label: int, sign: int) -> list[tuple[int, int]]:
    """The errors at cells of a label whose score, times `sign`, is highest."""
    found: list[tuple[float, int, int]] = []
    column = 0
    for scores, targets in blocks(scored.scores, scored.targets, axis=1):
        for score, target in zip(scores, targets, strict=True):
            predicted = score > scored.thresholds[column]
            error: Mask = (target == label) & (predicted != bool(label))
            rows = np.flatnonzero(error)
            best = rows[np.argsort(-sign * score[rows], kind="stable")[:OF_A_CLASS]]
            found += [(-sign * float(score[row]), int(row), column) for row in best]
            column += 1
    return [(row, column) for _, row, column in sorted(found)[:SHOWN]]
