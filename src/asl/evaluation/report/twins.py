"""Near-duplicates of a report: photographs that stand in two splits."""

import os
from collections.abc import Sequence

from asl.data.annotations import Annotations
from asl.evaluation.report.contents import Twin
from asl.images.near_duplicates import near_duplicates

SHOWN = 100  # pairs, the nearest


def twins(splits: Sequence[Annotations], names: Sequence[str]) -> tuple[list[Twin], int]:
    """The nearest pairs of images of different splits with their labels, and how many there are.

    `names` are those of the splits. File names are relative to the root of the last split, the one
    that is scored, whatever root their own has. Raises `DataError` for an image that cannot be
    read.
    """
    root = splits[-1].root
    pairs = near_duplicates(splits)
    found: list[Twin] = [
        {
            "file": os.path.relpath(splits[pair.split].path(pair.row), root),
            "other": os.path.relpath(splits[pair.other_split].path(pair.other_row), root),
            "split": names[pair.split],
            "other_split": names[pair.other_split],
            "bits": pair.bits,
            "labels": _labels(splits[pair.split], pair.row),
            "other_labels": _labels(splits[pair.other_split], pair.other_row),
        }
        for pair in pairs[:SHOWN]
    ]
    return found, len(pairs)


def _labels(images: Annotations, row: int) -> list[str]:
    return [images.classes[column] for column in images.present(row)]
