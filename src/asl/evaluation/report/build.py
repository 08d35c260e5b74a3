"""A report in a folder, from scores and labels: of a checkpoint, or of any origin."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy.typing as npt

from asl.data.objects import Objects
from asl.evaluation.report.compare import Resampled, compare
from asl.evaluation.report.contents import Twin
from asl.evaluation.report.figures import draws, report_contents
from asl.evaluation.report.page import write_report
from asl.evaluation.thresholds import operating_points
from asl.metrics import Floats, Protocol

CHOSEN_HERE = (
    "The thresholds of the rules {} were chosen on these very images: what they reach here is too "
    "good for others."
)


def build_report(
    scores: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    classes: Sequence[str],
    folder: str | Path,
    *,
    title: str,
    protocol: Protocol,
    thresholds: Mapping[str, npt.ArrayLike],
    evaluated_as: str = "",
    files: Sequence[str] = (),
    root: str | Path | None = None,
    objects: Objects | None = None,
    fold_scores: Floats | None = None,
    twins: Sequence[Twin] = (),
    other: Resampled | None = None,
    compared_with: str = "",
    about: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write the report on (N, C) scores and targets, and return the path of the page.

    `thresholds` are (C,) by their names; those of `operating_points` come beside them. Photographs
    are `files` below `root`. `evaluated_as` names the data's part of the protocol. With the
    resamples of an `other` report, `compared_with` is its name. The rest is as in
    `report_contents`, `compare` and `write_report`, as are the errors.
    """
    chosen = operating_points(scores, targets)
    counts, samples = draws(scores, targets)
    own, comparison = Resampled.of(scores, targets, classes, samples), None
    if other is not None:
        comparison = compare(own, other, compared_with, targets, counts, protocol)
    report = report_contents(
        scores,
        targets,
        classes,
        title=title,
        protocol=protocol,
        thresholds={**thresholds, **chosen},
        files=files,
        objects=objects,
        fold_scores=fold_scores,
        twins=twins,
        comparison=comparison,
        drawn=(counts, samples),
        about=_text({**(about or {}), "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}),
        settings=_text(settings or {}),
        notes=[CHOSEN_HERE.format(", ".join(chosen)), *notes],
    )
    report["protocol"] = "; ".join(filter(None, (evaluated_as, protocol)))
    page = write_report(report, folder, root)
    own.write(folder)
    return page


def _text(facts: Mapping[str, Any]) -> dict[str, str]:
    """What there is to say, as text."""
    return {name: _words(value) for name, value in facts.items() if value not in ("", None, (), [])}


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
