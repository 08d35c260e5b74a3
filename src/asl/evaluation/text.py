"""What a person reads: lines and tables of text, and the JSON that a program reads."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asl.atomic import write_result
from asl.data.annotations import ABSENT, PRESENT, Annotations

MAX_CLASSES_IN_FULL = 100
EXTREMES = 10
MAX_NAMES = 5
RUNNERS_UP = 3
BARS = "▁▂▃▄▅▆▇█"
SPARKS = 60  # bars in a line

_F1_FIGURES = ("CP", "CR", "CF1", "OP", "OR", "OF1", "macro_F1")
_F1_NAMES = (*_F1_FIGURES[:-1], "mean F1")
_LEFT_OUT = {
    "full": ("labels", "positives"),
    "partial": ("labels", "positives", "negatives"),
    "official": (),
}
_PROTOCOLS = {
    "full": "full: every class with a positive counts",
    "partial": "partial: every class with an annotated positive and negative counts",
    "official": "official: a class without positives counts as AP 0",
}


def epoch_line(row: Mapping[str, Any]) -> str:
    """One line of the training log, from "epoch", "lr", "loss" and whatever else was measured."""

    def show(name: str, width: int, digits: int) -> str:
        return _number(row[name], digits).rjust(width)

    line = f"epoch {show('epoch', 3, 0)}   lr {row['lr']:.1e}   loss {show('loss', 9, 2)}"
    if "mAP_ema" in row:
        line += f"   mAP {show('mAP_ema', 5, 2)} (EMA) {show('mAP_regular', 5, 2)} (regular)"
    if "images_per_second" in row:
        line += f"   {row['images_per_second']:,.0f} images/s"
    if "gamma_neg" in row:
        line += f"   gap {show('gap', 6, 3)}   gamma_neg {show('gamma_neg', 5, 2)}"
    return line


def sparks_text(history: Sequence[Mapping[str, Any]]) -> str:
    """The mAP of a run in one line, of the better set of weights in each epoch that was validated.

    A bar for each, from the lowest to the highest of them (of more than 60 epochs, 60 that are
    evenly spread), and the first, best and last in figures.
    """
    maps = {}
    for row in history:
        known = [row[key] for key in ("mAP_ema", "mAP_regular") if row.get(key) is not None]
        if known:
            maps[row["epoch"]] = max(known)
    if not maps:
        return "no mAP yet"
    values = list(maps.values())
    low, high = min(values), max(values)
    spread = np.linspace(0, len(values) - 1, min(len(values), SPARKS)).round().astype(int)
    heights = 1 - (high - np.array(values)[spread]) / ((high - low) or 1)
    bars = "".join(BARS[round(height * (len(BARS) - 1))] for height in heights.tolist())
    best = max(maps, key=lambda epoch: maps[epoch])
    return f"{bars}  first {values[0]:.2f}, best {high:.2f} (epoch {best}), last {values[-1]:.2f}"


def runs_text(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A line for each run: its name, how many epochs it has, and `sparks_text`."""
    rows = []
    for name, history in histories.items():
        *bars, figures = sparks_text(history).split("  ")  # no bars where there is no mAP
        epochs = f"{len(history):,} epoch{'s' if len(history) != 1 else ' '}"
        rows.append((name, epochs, "".join(bars), figures))
    names, counts, sparks = (max(len(row[column]) for row in rows) for column in range(3))
    return "\n".join(
        f"{name:{names}}  {count:>{counts}}  {bars:{sparks}}  {figures}".rstrip()
        for name, count, bars, figures in rows
    )


def evaluation_text(figures: Mapping[str, Any]) -> str:
    """The report on what `metrics.evaluate_scores` returned.

    Says first which checkpoint was measured on which data, where `figures` tells ("checkpoint",
    "weights", "dataset", "split", "image_size", "evaluated_as"). Of more than 100 classes, only the
    10 best and the 10 worst are listed.
    """
    classes = figures["per_class"]
    lines = []
    if "checkpoint" in figures:
        named = [figures["checkpoint"], figures["weights"]]
        if isinstance(figures["checkpoint"], str):
            named = [[each] for each in named]
        for path, weights in zip(*named, strict=True):
            checked = "; SHA-256 as published" if path.startswith("zoo:") else ""
            lines.append(f"checkpoint  {path} ({weights} weights{checked})")
        data = f"{figures['dataset']} {figures['split']} at {figures['image_size']} px"
        lines.append(f"data        {data}")
        if figures.get("tta"):
            lines.append(f"views       {figures['tta']}")
    lines.append(f"evaluated   {figures['images']:,} images, {len(classes):,} classes")
    if "evaluated_as" in figures:
        lines.append(f"protocol    {figures['evaluated_as']}")
    lines.append(f"annotation  {_PROTOCOLS[figures['protocol']]}")
    left_out = []
    for what in _LEFT_OUT[figures["protocol"]]:
        if names := figures[f"classes_without_{what}"]:
            left_out += names
            lines.append(f"left out    {len(names):,} without {what}: {_listed(names)}")

    averaged = f"mean over {figures['averaged_classes']:,} classes"
    lines += ["", f"mAP         {_number(figures['mAP'], 2)} ({averaged})"]
    if figures["protocol"] == "partial":
        weighted = _number(figures["weighted_mAP"], 2)
        lines.append(f"            {weighted} (weighted by the positives of each class)")
    if "published" in figures:
        lines.append(_published(figures["published"]))

    lines += _at_thresholds(figures)
    if "tuning" in figures:
        lines += _tuning(figures["tuning"], figures["threshold"])
    if "calibration" in figures:
        lines += _calibration(figures)

    if len(classes) > MAX_CLASSES_IN_FULL:
        counted = [c for c in classes if c["AP"] is not None and c["name"] not in set(left_out)]
        ranked = sorted(counted, key=lambda c: -c["AP"])
        best, worst = ranked[:EXTREMES], ranked[EXTREMES:][-EXTREMES:]
        for which, chosen in (("best", best), ("worst", worst)):
            lines += ["", f"the {len(chosen)} {which} classes", *_class_table(chosen)]
        lines += ["", f"(all {len(classes):,} classes are in the JSON: --json FILE)"]
    else:
        lines += ["", *_class_table(classes)]
    return "\n".join(lines)


def _published(found: Mapping[str, Any]) -> str:
    """What `published.published` found."""
    text = f"published   {_number(found['mAP'], 2)}"
    if found["differing"]:
        return f"{text}, but measured otherwise: {', '.join(found['differing'])}"
    return f"{text}: {'as measured here' if found['agrees'] else 'NOT what was measured here'}"


def _at_thresholds(figures: Mapping[str, Any]) -> list[str]:
    lines = [""]
    threshold, top_k = figures["threshold"], figures["top_k"]
    shown = "its threshold" if isinstance(threshold, list) else f"{threshold:g}"
    if "tuned_on" in figures:
        origin = figures["tuned_on"]
        lines.append(f"thresholds  of each class, for {origin['rule']}, {_source(origin, figures)}")
    lines += [f"note        {note}" for note in figures.get("notes", [])]
    rows = [["", *_F1_NAMES]]
    for name, key in (
        (f"score > {shown}", "at_threshold"),
        (f"score > {shown}, top {top_k}", "at_top_k"),
    ):
        rows.append([name, *_f1_cells(figures[key])])
    lines += _aligned(rows)
    return [*lines, "(CF1: harmonic mean of CP and CR; mean F1: mean of the F1 of each class)"]


def _source(origin: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """Where something stored was chosen, with a warning if that is what is measured here."""
    text = f"from {origin['images']:,} images of {origin['dataset']} {origin['split']}"
    same = all(origin[name] == figures[name] for name in ("dataset", "split", "images"))
    return text + (": these very images, so they fit them too well" if same else "")


def _tuning(tuning: Mapping[str, Any], threshold: float) -> list[str]:
    """What tuned thresholds gain: the figures of `thresholds.cross_fitted`."""
    rows = [["", *_F1_NAMES]]
    for name, key in (
        (f"score > {threshold:g}", "threshold"),
        ("one threshold for all", "common"),
        ("one for each class", "per_class"),
        ("one for all, same images", "common_same_images"),
        ("one for each class, same images", "per_class_same_images"),
    ):
        rows.append([name, *_f1_cells(tuning["at"][key])])
    lines = [
        "",
        f"thresholds tuned for {tuning['rule']}, in {tuning['folds']} folds",
        *_aligned(rows),
    ]
    lines.append("(judged on images that did not choose, but for the last two: those are too good)")
    for name, key in ((f"{threshold:g}", "threshold"), ("one tuned for all", "common")):
        gain = tuning["gain"][f"over_{key}"]
        low, high = gain["interval"]
        lines.append(
            f"mean F1 of one for each class over {name}: {gain['macro_F1']:+.2f}"
            f" (95 % interval {low:+.2f} to {high:+.2f})"
        )
    if tuning["unreached"]:
        lines.append(f"never that precise: {_listed(tuning['unreached'])}")
    return [*lines, "stored in the checkpoint: one for each class, chosen on all of these images"]


def _calibration(figures: Mapping[str, Any]) -> list[str]:
    """ECE and Brier score of scores and of probabilities, fitted here or stored."""
    found = figures["calibration"]
    rows = [["", "ECE", "Brier"]]
    for name in found["ECE"]:
        rows.append([name, *(_number(found[which][name], 4) for which in ("ECE", "Brier"))])
    if "stored" in found:
        title = f"calibration of each class, {_source(found['stored'], figures)}"
        return ["", title, *_aligned(rows), "(means over the classes)"]
    return [
        *("", f"calibration of each class, in {found['folds']} folds", *_aligned(rows)),
        "(means over the classes, judged on images that the maps were not fitted to)",
        f"stored in the checkpoint: {found['chosen']}, fitted to all of these images",
    ]


def _f1_cells(figures: Mapping[str, Any]) -> list[str]:
    return [_number(figures[name], 1) for name in _F1_FIGURES]


def prediction_text(prediction: Mapping[str, Any]) -> str:
    """The labels of one image: a line for each that was predicted, and one for the next three.

    `prediction` is {"file", "labels": [{"name", "score", "predicted"}]}, highest score first. Of
    labels with a "probability" that is shown instead of the score.
    """
    labels = prediction["labels"]
    shown = [percent(x.get("probability", x["score"])) for x in labels]
    each = list(zip(labels, shown, strict=True))
    found = [[f"  {x['name']}", number] for x, number in each if x["predicted"]]
    rest = [f"{x['name']} {number}" for x, number in each if not x["predicted"]]
    others = ", ".join(rest[:RUNNERS_UP])
    # The name of a file may be no UTF-8, which a terminal would refuse.
    file = os.fsencode(prediction["file"]).decode(errors="replace")
    lines = [file, *_aligned(found)]
    if not found:
        lines.append(f"  nothing is above the threshold; the highest: {others}")
    elif others:
        lines.append(f"  below the threshold: {others}")
    return "\n".join(lines)


def export_text(files: Sequence[Mapping[str, Any]]) -> str:
    """What `export` wrote: a line for each file, and how near its scores are to PyTorch's."""
    first = files[0]
    rows = [[x["file"], f"{x['bytes'] / 1e6:.1f} MB"] for x in files]
    for row, file in zip(rows, files, strict=True):
        row += [f"mAP {_number(file['mAP'], 2)}"] if "mAP" in file else []
    lines = _aligned(rows)
    if "mAP" in first:
        lines.append(f"(through onnxruntime, {first['images']:,} images of {first['split']})")
    lines.append(
        f"scores are at most {first['difference']:.1e} away from PyTorch's, on {first['pictures']} "
        f"pictures, alone and in batches"
    )
    if first["difference_resized"] is not None:
        lines.append(f"and {first['difference_resized']:.1e} where the file resizes them")
    return "\n".join(lines)


def frequencies_text(
    original: Annotations,
    partial: Mapping[str, Annotations],
    priors: Mapping[str, npt.ArrayLike],
) -> str:
    """How often each class is present, and what partial labels and priors say of it.

    A line per class, the most frequent first (of more than 100 classes: the first and last 10), of
    the images that it is present in and their share; for each `partial` version, by name, the cells
    that it keeps (+ present, - absent); and each of the `priors` (C,), by name. Under it, for each
    prior, how well it ranks the classes (Spearman), and the ten that it puts first.
    """
    share = original.counts(PRESENT) / len(original)
    order = np.argsort(-share, kind="stable")
    columns = {"images": original.counts(PRESENT), "share": share}
    for name, kept in partial.items():
        columns |= {f"{name} +": kept.counts(PRESENT), f"{name} -": kept.counts(ABSENT)}
    columns |= {f"prior {name}": np.asarray(prior) for name, prior in priors.items()}
    listed = order
    if len(order) > MAX_CLASSES_IN_FULL:
        listed = np.concatenate([order[:EXTREMES], order[-EXTREMES:]])
    rows = [["class", *columns]]
    for c in listed:
        cells = (column[c] for column in columns.values())
        rows.append(
            [original.classes[c], *(f"{x:,}" if x.dtype.kind == "i" else f"{x:.4f}" for x in cells)]
        )
    lines = [f"{len(original):,} images, {original.num_classes:,} classes", "", *_aligned(rows)]
    for name, prior in priors.items():
        top = np.argsort(-np.asarray(prior), kind="stable")[:EXTREMES]
        hits = len(np.intersect1d(top, order[:EXTREMES]))
        lines += ["", f"prior {name}: rank correlation {rank_correlation(share, prior):.3f}"]
        lines.append(
            f"top {len(top)} ({hits} rightly): " + ", ".join(original.classes[c] for c in top)
        )
    return "\n".join(lines)


def write_json(value: Any, path: str | Path) -> None:
    """Write to a JSON file, indented; the folder is made. Raises `UsageError` if that fails."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # The name of a file that is no UTF-8 becomes JSON's escapes, of which Python makes it again.
    write_result(path, text.encode(errors="backslashreplace"))


def rank_correlation(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Spearman's: that of the ranks, where equal values share the mean of theirs."""

    def ranks(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        mean_ranks: npt.NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
        return mean_ranks[place]

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def _class_table(classes: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [["class", "AP", "positives", "negatives"]]
    for each in classes:
        counts = (f"{each['positives']:,}", f"{each['negatives']:,}")
        rows.append([each["name"], _number(each["AP"], 2), *counts])
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns two spaces apart: the first flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for first, *rest in rows
    ]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(score: float) -> str:
    """A score in [0, 1] as text."""
    return f"{100 * score:.1f} %"
