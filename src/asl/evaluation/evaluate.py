"""A checkpoint measured on a data set, and the figures that an epoch is judged by."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asl.atomic import check_result
from asl.data.annotations import PRESENT, UNANNOTATED, Annotations
from asl.data.classes import read_descriptions
from asl.data.objects import read_objects
from asl.data.prior import write_prior
from asl.data.settings import DataSettings
from asl.data.splits import read_split, split_name
from asl.distributed import pick_device, process_group
from asl.errors import DataError, UsageError
from asl.evaluation import calibration, thresholds
from asl.evaluation.crossfit import FOLDS, Table
from asl.evaluation.judge import Judge, Origin, stored_calibration, stored_thresholds
from asl.evaluation.provenance import provenance
from asl.evaluation.published import published
from asl.evaluation.score import Scorer
from asl.evaluation.settings import DEFAULT_THRESHOLD, MeasureSettings, ValidateConfig
from asl.metrics import Protocol, evaluate_scores, f1_scores, mean_average_precision
from asl.models import checkpoint

if TYPE_CHECKING:
    from asl.evaluation.report.compare import Resampled
    from asl.evaluation.report.contents import Twin


def evaluate(config: ValidateConfig) -> dict[str, Any]:
    """Measure a checkpoint, or the mean scores of several, on the validation split.

    Returns what `metrics.evaluate_scores` does, with "checkpoint", "weights" (lists of several),
    "dataset", "split", "image_size", "tta", "evaluated_as" and `provenance` beside it. Of several
    processes rank 0 returns it, and the others nothing. Classes are matched by name. With
    `estimate_prior` the mean score of every class over the training split becomes that file; the
    labels of that split play no part. It is the prior of CSL, if the model was trained with
    unannotated cells ignored.

    "tuned_on" and "calibration" are there if the checkpoint has thresholds and a calibration of its
    own: where they come from, and what the calibration does to ECE and Brier score here. "notes"
    tells which of these are not used, and why. "published" compares with the mAP that the
    checkpoint was published with, if it was.

    With `tune_thresholds` the figures of `thresholds.cross_fitted` are under "tuning", with
    `calibrate` those of `calibration.cross_fitted` are under "calibration". What was chosen, on all
    of these images, is stored in the checkpoint, and its own plays no part.

    With `report` the page of `build_report` is written into that folder.

    Raises `UsageError` and `DataError` for what is wrong with the input.
    """
    wanted, paths = config.evaluation, config.model.model_path
    for path in filter(None, (wanted.json_file, wanted.estimate_prior)):
        check_result(path)
    changes = {"thresholds": wanted.tune_thresholds, "calibration": wanted.calibrate}
    chosen_anew = [name for name, how in changes.items() if how]
    other = _prepared(wanted)
    with process_group(pick_device(config.run.device)) as device:
        version = _version(paths) if chosen_anew else ()
        scorer = Scorer.load(
            config.model, config.images, config.run, device, wanted.flip, wanted.scales
        )
        judge = Judge.load(paths, scorer, wanted.threshold, wanted.tta, without=chosen_anew)
        dataset = read_split(config.data, "val", classes=scorer.classes)
        if chosen_anew:
            _check_enough(dataset)
        names = display_names(wanted.class_descriptions, scorer.classes)
        scores = scorer.scores(dataset, "validation")
        features = _features(config, dataset, device) if wanted.report_folds else None
        if wanted.estimate_prior:
            images = read_split(config.data, "train", config.labels, classes=scorer.classes)
            estimate_prior(scorer, images, wanted.estimate_prior)
    if scores is None:
        return {}
    targets, split = dataset.dense(), split_name(config.data, "val")
    figures = evaluate_scores(
        scores,
        targets,
        names,
        # one number if it is one for all
        threshold=judge.thresholds if judge.rule else float(judge.thresholds[0]),
        top_k=wanted.top_k or 3,
        protocol=protocol(dataset),
    )
    origin = Origin(
        weights=scorer.weights[0],
        image_size=config.images.image_size,
        tta=wanted.tta,
        dataset=config.data.dataset,
        split=split,
        images=len(dataset),
    )
    judged = _judged(judge, scores.numpy(), targets)
    if chosen_anew:
        made, entries = _chosen(wanted, scores.numpy(), targets, names, origin, protocol(dataset))
        checkpoint.amend(paths[0], entries, version)
        judged |= made
    about = {
        "checkpoint": _alone(paths),
        "weights": _alone(scorer.weights),
        "dataset": config.data.dataset,
        "split": split,
        "image_size": config.images.image_size,
        "tta": wanted.tta,
        "evaluated_as": evaluated_as(config.data),
    }
    if wanted.report:
        _report(config, about, scores.numpy(), dataset, names, judge, other, features)
    found = {**about, **figures, **judged, **provenance()}
    return found | published(paths, found)


def _prepared(wanted: MeasureSettings) -> "Resampled | None":
    """What a report needs, before the scoring: that its folder is writable, and the other one."""
    if not wanted.report:
        return None
    from asl.evaluation.report.compare import Resampled
    from asl.evaluation.report.page import check_folder

    check_folder(wanted.report)
    return Resampled.read(wanted.compare) if wanted.compare else None


def _report(
    config: ValidateConfig,
    about: Mapping[str, Any],
    scores: Table,
    dataset: Annotations,
    names: Sequence[str],
    judge: Judge,
    other: "Resampled | None",
    features: Tensor | None,
) -> None:
    from asl.evaluation.report.build import build_report
    from asl.evaluation.report.folds import out_of_fold

    targets, folds = dataset.dense(), config.evaluation.report_folds
    pairs, notes = _twins(config.data, dataset)
    rule = judge.rule or f"{judge.thresholds[0]:g} for all"
    build_report(
        scores,
        targets,
        names,
        config.evaluation.report,
        title=f"{', '.join(config.model.model_path)} on {about['dataset']} {about['split']}",
        protocol=protocol(dataset),
        evaluated_as=about["evaluated_as"],
        thresholds={f"{rule} (stored)" if judge.rule else rule: judge.thresholds},
        files=[os.fsdecode(file) for file in dataset.files.tolist()],
        root=dataset.root,
        objects=read_objects(config.data, dataset),
        fold_scores=None if features is None else out_of_fold(features, targets, folds or 2),
        twins=pairs,
        other=other,
        compared_with=config.evaluation.compare,
        about={**about, "data": str(dataset.root), **provenance()},
        settings=config.flat(),
        notes=notes,
    )


def _features(config: ValidateConfig, dataset: Annotations, device: torch.device) -> Tensor | None:
    from asl.evaluation.report.folds import features_of

    return features_of(dataset, config.model, config.images, config.run, device)


def _twins(data: DataSettings, dataset: Annotations) -> tuple[list["Twin"], list[str]]:
    """The images of the training split that are nearly one of these, and what is to be said."""
    from asl.evaluation.report.twins import twins

    names = [split_name(data, role) for role in ("train", "val")]
    if names[0] == names[1]:
        return [], ["Near-duplicates were not looked for: both splits are the same."]
    try:
        train = read_split(data, "train", classes=dataset.classes)
        found, number = twins([train, dataset], names)
    except (DataError, UsageError) as error:  # people have the one split without the other
        return [], [f"Near-duplicates were not looked for: {error}"]
    shown = f", of which the page shows {len(found)}" if number > len(found) else ""
    return found, [f"Near-duplicates of {names[0]} and {names[1]}: {number:,}{shown}."]


def _version(paths: Sequence[str]) -> tuple[int, ...]:
    """The version of the one checkpoint that thresholds and calibrations are to be stored in."""
    if len(paths) > 1:
        raise UsageError(
            "tune_thresholds and calibrate store in a checkpoint what holds for its scores: "
            "name one checkpoint, not several whose scores are averaged"
        )
    return checkpoint.version(paths[0]) if paths else ()


def _check_enough(dataset: Annotations) -> None:
    if len(dataset) < FOLDS:
        raise DataError(
            f"{dataset.root} has {len(dataset)} images to choose thresholds or a calibration on: "
            f"at least {FOLDS} are needed, as each is judged by what others chose"
        )
    if not dataset.counts(PRESENT).any():
        raise DataError(f"{dataset.root}: no image has a label to choose thresholds by")


def _judged(judge: Judge, scores: Table, targets: Table) -> dict[str, Any]:
    """What the figures say of the judge that they come from."""
    about: dict[str, Any] = {"notes": list(judge.notes)} if judge.notes else {}
    if judge.tuned_on:
        about["tuned_on"] = {"rule": judge.rule, **asdict(judge.tuned_on)}
    if judge.calibration and judge.calibrated_on:
        method = judge.calibration.method
        tables = {"scores": scores, method: judge.calibration(scores)}
        about["calibration"] = {
            "stored": {"method": method, **asdict(judge.calibrated_on)},
            **calibration.calibration_errors(tables, targets),
        }
    return about


def _chosen(
    wanted: MeasureSettings,
    scores: Table,
    targets: Table,
    names: Sequence[str],
    origin: Origin,
    counted: Protocol,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of what is chosen anew, and what is to be stored of it."""
    figures: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    if wanted.tune_thresholds:
        usual = DEFAULT_THRESHOLD if wanted.threshold is None else wanted.threshold
        tuning = thresholds.cross_fitted(
            scores, targets, wanted.tune_thresholds, usual, protocol=counted
        )
        entries["thresholds"] = stored_thresholds(tuning, origin)
        figures["tuning"] = tuning | {"unreached": [names[c] for c in tuning["unreached"]]}
    if wanted.calibrate:
        figures["calibration"] = {
            "chosen": wanted.calibrate,
            **calibration.cross_fitted(scores, targets),
        }
        made = calibration.fitted(scores, targets, wanted.calibrate)
        entries["calibration"] = stored_calibration(made, origin)
    return figures, entries


def _alone(each: Sequence[str]) -> str | list[str]:
    return each[0] if len(each) == 1 else list(each)


def estimate_prior(scorer: Scorer, images: Annotations, path: str | Path) -> None:
    """Write the mean score of every class over these images to `path`, on rank 0."""
    scores = scorer.scores(images, "prior")
    if scores is not None:
        write_prior(path, scorer.classes, scores.mean(0, dtype=torch.float32))


def epoch_figures(
    scores: Mapping[str, Tensor | None], dataset: Annotations, threshold: float
) -> dict[str, float]:
    """What an epoch is judged by: mAP, CF1 and OF1, in percent, of each set of weights by name.

    NaN where no class has a positive; nothing without scores, as on all ranks but 0.
    """
    tables = {name: table for name, table in scores.items() if table is not None}
    if not tables:
        return {}
    targets, counted = dataset.dense(), protocol(dataset)
    figures = {}
    for name, table in tables.items():
        f1 = f1_scores(table, targets, threshold, protocol=counted)
        figures[f"mAP_{name}"] = mean_average_precision(table, targets, protocol=counted)
        figures |= {f"{which}_{name}": f1[which] for which in ("CF1", "OF1")}
    return figures


def protocol(dataset: Annotations) -> Protocol:
    """Over which classes a mean runs: see `metrics.Protocol`."""
    return "partial" if dataset.implied == UNANNOTATED else "full"


def evaluated_as(data: DataSettings) -> str:
    """The protocol by name: what a figure must say to be compared with the literature's."""
    if data.dataset == "coco":
        return "coco: all images" if data.all_images else "coco: annotated images only (official)"
    if data.dataset == "voc":
        if data.val_difficult in (None, "ignore"):
            return "voc: difficult objects ignored (official)"
        return f"voc: difficult objects taken as {data.val_difficult}"
    return {
        "openimages": "openimages: verified labels only (official)",
        "nus_wide": "nus_wide: all listed images (official)",
    }.get(data.dataset, f"{data.dataset}: all listed images")


def display_names(descriptions: str, classes: Sequence[str]) -> list[str]:
    """What to call the classes: as the CSV `descriptions` says, where there is one.

    Where that calls several by one name, the class is in brackets behind it.
    """
    if not descriptions:
        return list(classes)
    known = read_descriptions(Path(descriptions))
    names = [known.get(name, name) for name in classes]
    count = Counter(names)
    return [
        name if count[name] == 1 else f"{name} ({own})"
        for name, own in zip(names, classes, strict=True)
    ]
