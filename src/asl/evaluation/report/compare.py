"""Two reports on the same images: what each class gains, with paired bootstrap intervals.

A report keeps the average precision of its classes in every resample of the images. Resamples are
drawn from a seed, so those of two reports on the same images are the same, and the difference in
each is one draw of the paired bootstrap. No scores have to be kept.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from asl.atomic import write_result
from asl.data.classes import match_classes
from asl.data.files import not_found, unreadable
from asl.errors import DataError
from asl.evaluation.report.arrays import Array, Labels
from asl.evaluation.report.bootstrap import interval, resampled_map
from asl.evaluation.report.contents import ClassDifference, Comparison
from asl.metrics import Floats, Protocol, average_precision

FILE = "resamples.npz"  # beside report.json


@dataclass(frozen=True, eq=False)
class Resampled:
    """The classes of a report, with AP in [0, 1]: `ap` (C,) and `samples` (C, R), NaN for none.

    `labels` is a digest of the labels of each class on all images.
    """

    classes: Sequence[str]
    labels: Sequence[str]
    ap: Array
    samples: Array

    @classmethod
    def of(cls, scores: Floats, targets: Labels, classes: Sequence[str], samples: Array) -> Self:
        """Those of (N, C) scores and targets, with their `resampled_ap`."""
        return cls(
            classes,
            [_digest(targets[:, column]) for column in range(targets.shape[1])],
            np.asarray(average_precision(scores, targets), dtype=np.float64),
            # As they are kept: equal scores have no difference.
            samples.astype(np.float32).astype(np.float64),
        )

    @classmethod
    def read(cls, report: str | Path) -> Self:
        """Those that `write` left beside a report, given as its folder or its report.json.

        Raises `DataError` where there are none.
        """
        path = Path(report)
        path = (path if path.is_dir() else path.parent) / FILE
        if not path.is_file():
            raise not_found(path)
        try:
            with np.load(path, allow_pickle=False) as stored:
                classes, labels = (stored[name].tolist() for name in ("classes", "labels"))
                ap, samples = (stored[name].astype(np.float64) for name in ("ap", "samples"))
        except OSError as error:
            raise unreadable(path, error) from error
        except (KeyError, ValueError, EOFError, BadZipFile) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        if not len(classes) == len(labels) == len(ap) == len(samples) or samples.ndim != 2:
            raise DataError(f"{path} cannot be read: its parts are not of the same classes")
        return cls(classes, labels, ap, samples)

    def write(self, folder: str | Path) -> None:
        """Keep them in the folder of a report: 4 bytes for each class and resample, at most."""
        file = io.BytesIO()
        np.savez_compressed(
            file,
            classes=np.array(self.classes),
            labels=np.array(self.labels),
            ap=self.ap,
            samples=self.samples.astype(np.float32),
        )
        write_result(Path(folder) / FILE, file.getvalue())


def compare(
    own: Resampled,
    other: Resampled,
    name: str,
    targets: Labels,
    counts: Tensor,
    protocol: Protocol,
) -> Comparison:
    """The differences in points: own minus `other`, which is called `name`.

    `targets` (N, C) and `counts` (N, R) are those of `own`. Classes are matched by name.

    Raises `DataError` for classes without a match, and for other images or labels.
    """
    try:
        columns = match_classes(other.classes, own.classes)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    for class_, labels, column in zip(own.classes, own.labels, columns.tolist(), strict=True):
        if labels != other.labels[column]:
            raise DataError(
                f"{name} is a report on other images or labels ({class_} differs): two reports "
                "compare on the same alone"
            )
    draws = min(own.samples.shape[1], other.samples.shape[1])  # the first ones are the same
    ap, samples = other.ap[columns], other.samples[columns, :draws]
    differences = own.samples[:, :draws] - samples

    def mean(table: Array, weights: Tensor) -> Array:
        return resampled_map(table, targets, weights, protocol)

    once, drawn = torch.ones(len(targets), 1), counts[:, :draws]
    gain = mean(own.ap[:, None], once) - mean(ap[:, None], once)
    gains = mean(own.samples[:, :draws], drawn) - mean(samples, drawn)
    classes: list[ClassDifference] = [
        {
            "name": own.classes[c],
            "AP": _percent(own.ap[c]),
            "other": _percent(ap[c]),
            "difference": interval(100 * (own.ap[c] - ap[c]), 100 * differences[c]),
        }
        for c in range(len(own.classes))
    ]
    return {"other": name, "mAP": interval(float(gain[0]), gains), "classes": classes}


def _percent(value: Any) -> float | None:
    return None if np.isnan(value) else float(100 * value)


def _digest(labels: Labels) -> str:
    return hashlib.blake2b(labels.astype(np.int8).tobytes(), digest_size=16).hexdigest()
