"""From scores and labels to what stands on a report."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asl.data.objects import Objects
from asl.evaluation.report.arrays import Array, Labels
from asl.evaluation.report.bootstrap import (
    LEVEL,
    interval,
    resample,
    resampled_ap,
    resampled_f1,
    resampled_map,
)
from asl.evaluation.report.classes import CURVES, FEW, all_cells, class_figures
from asl.evaluation.report.contents import Comparison, Headline, Outline, Report, Twin
from asl.evaluation.report.errors import kinds_of_error, repairs
from asl.evaluation.report.examples import Scored, galleries
from asl.evaluation.report.protocols import protocols
from asl.evaluation.report.sizes import by_number_of_labels, by_size
from asl.evaluation.report.suspects import gallery as suspects
from asl.evaluation.report.together import together
from asl.metrics import Floats, Protocol, Table, f1_scores, mean_average_precision


def report_contents(
    scores: Table,
    targets: Table,
    classes: Sequence[str],
    *,
    title: str,
    protocol: Protocol,
    thresholds: Mapping[str, npt.ArrayLike],
    files: Sequence[str] = (),
    objects: Objects | None = None,
    fold_scores: Table | None = None,
    about: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
    twins: Sequence[Twin] = (),
    comparison: Comparison | None = None,
    notes: Sequence[str] = (),
    drawn: tuple[Tensor, Array] | None = None,
    resamples: int | None = None,
    seed: int = 0,
) -> Report:
    """Everything that stands on a report of (N, C) `scores` in [0, 1] and `targets` in {1, 0, -1}.

    `thresholds` are (C,) for each rule by which they were chosen, NaN for a class without one. The
    headline's F1 is that of the first rule; errors are those of "f1", or of the first rule where
    there is no "f1". `files` are the N images, relative to the root of the data set, or none;
    with `objects`, those of these images and classes, there are figures by size. Label errors
    are suspected by `fold_scores` (N, C), of models that have not seen these labels, or else by
    `scores`. Intervals come from `resamples` draws of the images (default: `number_of_resamples`),
    or are those `drawn` already by `draws`.

    Raises `ValueError` as `asl.metrics` does, and where `thresholds` are none or of other classes.
    """
    scores, targets = _numpy(scores), _numpy(targets).astype(np.int8, copy=False)
    names = [str(name) for name in classes]
    limits = _limits(thresholds, len(names))
    rule = "f1" if "f1" in limits else next(iter(limits))
    counts, ap_samples = drawn or draws(scores, targets, resamples, seed)
    rows = class_figures(scores, targets, names, limits, ap_samples)
    sizes = None if objects is None else objects.sizes(len(names))
    kinds = kinds_of_error(scores, targets, limits[rule], None if sizes is None else sizes == 1)
    curve, histogram, reliability = all_cells(scores, targets)
    scored = Scored(scores, targets, names, limits[rule], files, _outlines(objects, names))
    doubting = None if fold_scores is None else _numpy(fold_scores)
    said = _said(counts.shape[1], rule, len(names), sizes is not None)
    return {
        "title": title,
        "protocol": protocol,
        "images": len(scores),
        "about": dict(about or {}),
        "settings": dict(settings or {}),
        "headline": _headline(scores, targets, limits, ap_samples, counts, protocol),
        "protocols": protocols(scores, targets),
        "classes": rows,
        "repairs": repairs(scores, targets, kinds, protocol, with_sizes=sizes is not None),
        "sizes": [] if sizes is None else by_size(scores, targets, limits[rule], protocol, sizes),
        "numbers_of_labels": by_number_of_labels(scores, targets, limits[rule], protocol),
        "together": together(scores, targets, names, limits[rule]),
        "curve": curve,
        "scores": histogram,
        "reliability": reliability,
        "galleries": [*galleries(scored), suspects(scored, doubting)],
        "twins": list(twins),
        "comparison": comparison,
        "notes": [*said, *notes],
    }


def _outlines(
    objects: Objects | None, names: Sequence[str]
) -> Callable[[int], list[Outline]] | None:
    if objects is None:
        return None

    def of_image(row: int) -> list[Outline]:
        outlines = objects.polygons(row)
        return [{"name": names[column], "polygons": polygons} for column, polygons in outlines]

    return of_image


def _said(resamples: int, rule: str, classes: int, with_sizes: bool) -> list[str]:
    """What a reader of the figures has to know."""
    said = [
        f"Intervals hold the middle {LEVEL} % of {resamples:,} draws of the images with "
        "replacement.",
        f"An error is one at the threshold of the rule {rule}.",
        f"A class with fewer than {FEW} positives is marked: its figures mean little.",
    ]
    if not with_sizes:
        said.append("Nothing is known of where objects are: no figures by size, no outlines.")
    if classes > CURVES:
        said.append(f"Only the {CURVES} classes with most positives have a curve.")
    return said


def draws(
    scores: Floats, targets: Labels, resamples: int | None = None, seed: int = 0
) -> tuple[Tensor, Array]:
    """How often each image stands in each resample, (N, R), and the AP of each class there."""
    counts = resample(len(scores), resamples or number_of_resamples(scores.size), seed)
    return counts, resampled_ap(scores, targets, counts)


def number_of_resamples(cells: int) -> int:
    """As many as take a minute or so: 1,000 up to 1.5 million cells, fewer to 200 above."""
    return int(np.clip(1_500_000_000 // max(1, cells), 200, 1000))


def _headline(
    scores: Floats,
    targets: Labels,
    limits: Mapping[str, Array],
    ap_samples: Array,
    counts: Tensor,
    protocol: Protocol,
) -> list[Headline]:
    rule, limit = next(iter(limits.items()))
    value = mean_average_precision(scores, targets, protocol=protocol)
    samples = resampled_map(ap_samples, targets, counts, protocol)
    f1 = f1_scores(scores, targets, limit, protocol=protocol)
    f1_samples = resampled_f1(scores, targets, limit, counts, protocol)
    explanations = {
        "CF1": "harmonic mean of the mean precision and the mean recall of the classes",
        "OF1": "harmonic mean of precision and recall over all cells",
    }
    head: Headline = {
        "name": "mAP",
        "figure": interval(value, samples),
        "explanation": f"mean average precision, protocol {protocol}",
    }
    return [
        head,
        *(
            Headline(
                name=name,
                figure=interval(f1[name], f1_samples[name]),
                explanation=f"{said}; thresholds of the rule {rule}",
            )
            for name, said in explanations.items()
        ),
    ]


def _limits(thresholds: Mapping[str, npt.ArrayLike], classes: int) -> dict[str, Array]:
    limits = {rule: np.asarray(each, dtype=np.float64) for rule, each in thresholds.items()}
    if not limits:
        raise ValueError("thresholds are none; give those of one rule at least")
    for rule, limit in limits.items():
        if limit.shape != (classes,):
            raise ValueError(f"thresholds[{rule!r}] has shape {limit.shape}, not ({classes},)")
    return limits


def _numpy(table: Table) -> npt.NDArray[Any]:
    if isinstance(table, torch.Tensor):
        table = table.detach().cpu()
        table = (table.float() if table.dtype == torch.bfloat16 else table).numpy()
    return np.asarray(table)
