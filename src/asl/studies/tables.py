"""What the figures of a study say: means, and differences with their intervals."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

from asl.studies.plan import Plan

ACCURACY = "ranked first"  # of images with one label: the share whose label is, in percent
UNNAMED = {"condition": "as it is", "view": "mAP"}


class Row(NamedTuple):
    """An arm in a condition, seen in some way; mAP or `ACCURACY` in percent."""

    condition: str
    view: str
    arm: str
    figures: Sequence[float]  # of each seed and fold, or their mean over the seeds of each fold
    trials: int
    difference: tuple[float, float, float] | None  # to the first arm: mean, and 95 % interval


def rows(plan: Plan, trials: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A row for every arm in every condition and view that has figures.

    Differences to the first arm are of pairs with the same seed and fold; their interval is
    Student's. The parts that folds are trained on share most of their images, so that their
    differences vary less than those of new images would: with folds, a pair is the mean over seeds
    of one fold, and the variance is corrected as Nadeau and Bengio (2003) do.
    """
    figures: dict[tuple[str, str, str], dict[tuple[int, int | None], float]] = {}
    for trial in trials:
        accuracy = {ACCURACY: trial["accuracy"]} if "accuracy" in trial else {}
        for view, value in {**trial["mAP"], **accuracy}.items():
            of_arm = figures.setdefault((trial["condition"], view, trial["arm"]), {})
            of_arm[trial["seed"], trial["fold"]] = value
    first, *_ = plan.compared
    found = []
    for condition in plan.conditions:
        for view in [*plan.views, ACCURACY]:
            for arm in plan.compared:
                own = figures.get((condition, view, arm), {})
                if not own:
                    continue
                base = figures.get((condition, view, first), {})
                paired = {key: own[key] - base[key] for key in own if key in base}
                difference = None if arm == first else interval(_by_fold(paired), plan.folds)
                values = [*_by_fold(own)]
                found.append(Row(condition, view, arm, values, len(own), difference))
    return found


def interval(
    differences: Sequence[float], folds: int | None = None
) -> tuple[float, float, float] | None:
    """Mean of paired differences and the ends of its 95 % interval; None of fewer than two.

    With `folds`, the differences are one of each fold of a cross-validation.
    """
    from scipy import stats

    n = len(differences)
    if n < 2:
        return None
    overlap = 1 / (folds - 1) if folds else 0  # images tested on, of each that is trained on
    error = stdev(differences) * (1 / n + overlap) ** 0.5
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    middle = mean(differences)
    return middle, middle - reach, middle + reach


def table(plan: Plan, found: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    first, *_ = plan.compared
    views = {row.view for row in found}
    several = {"condition": len(plan.conditions) > 1, "view": len(views) > 1}
    named = [name for name, wanted in several.items() if wanted]
    figure = "mean" if ACCURACY in views else "mAP, mean"
    head = [*named, "arm", figure, "standard deviation", "n", f"against {first}"]
    lines = [_line(head), _line(["---"] * (len(named) + 1) + ["---:"] * 4)]
    for row in found:
        spread = f"{stdev(row.figures):.2f}" if len(row.figures) > 1 else "-"
        against = "" if row.arm == first else "-"
        if row.difference:
            middle, low, high = row.difference
            against = f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"
        cells = [*(getattr(row, name) or UNNAMED[name] for name in named), row.arm]
        lines.append(_line([*cells, f"{mean(row.figures):.2f}", spread, str(row.trials), against]))
    return "\n".join(lines)


def cells_table(plan: Plan, trials: Sequence[Mapping[str, Any]]) -> str:
    """What the losses do to hidden and to absent cells (`pulls`), as means over the trainings."""
    head = [
        "condition",
        "arm",
        "hidden an image",
        "pull on hidden",
        "on absent",
        "left alone, hidden",
        "absent",
    ]
    names = ["hidden", "hidden_pull", "absent_pull", "hidden_free", "absent_free"]
    forms = ["{:.2f}", "{:.4f}", "{:.4f}", "{:.1f} %", "{:.1f} %"]
    lines = [_line(head), _line(["---"] * 2 + ["---:"] * 5)]
    for condition, arm in product(plan.conditions, plan.compared):
        own = [t["cells"] for t in trials if (t["condition"], t["arm"]) == (condition, arm)]
        if own:
            means = [mean(cells[name] for cells in own) for name in names]
            shown = [form.format(x) for form, x in zip(forms, means, strict=True)]
            lines.append(_line([condition or UNNAMED["condition"], arm, *shown]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _by_fold(values: Mapping[tuple[int, int | None], float]) -> list[float]:
    """The mean over seeds of each fold; without folds, the values of the seeds."""
    if None in {fold for _, fold in values}:
        return [value for _, value in sorted(values.items(), key=lambda item: item[0][0])]
    folds = sorted({fold for _, fold in values if fold is not None})
    return [float(np.mean([x for (_, f), x in values.items() if f == fold])) for fold in folds]
