"""A checkpoint measured on a data set, and the figures that an epoch is judged by."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asl.atomic import check_result
from asl.data.annotations import UNANNOTATED, Annotations
from asl.data.classes import read_descriptions
from asl.data.prior import write_prior
from asl.data.settings import DataSettings
from asl.data.splits import read_split, split_name
from asl.distributed import pick_device, process_group
from asl.evaluation.provenance import provenance
from asl.evaluation.score import Scorer
from asl.evaluation.settings import ValidateConfig
from asl.metrics import Protocol, evaluate_scores, f1_scores, mean_average_precision


def evaluate(config: ValidateConfig) -> dict[str, Any]:
    """Measure a checkpoint, or the mean scores of several, on the validation split.

    Returns what `metrics.evaluate_scores` does, with "checkpoint", "weights" (lists of several),
    "dataset", "split", "image_size", "tta", "evaluated_as" and `provenance` beside it. Of several
    processes rank 0 returns it, and the others nothing. Classes are matched by name. With
    `estimate_prior` the mean score of every class over the training split becomes that file; the
    labels of that split play no part. It is the prior of CSL, if the model was trained with
    unannotated cells ignored.

    Raises `UsageError` and `DataError` for what is wrong with the input.
    """
    wanted = config.evaluation
    for path in filter(None, (wanted.json_file, wanted.estimate_prior)):
        check_result(path)
    with process_group(pick_device(config.run.device)) as device:
        scorer = Scorer.load(
            config.model, config.images, config.run, device, wanted.flip, wanted.scales
        )
        dataset = read_split(config.data, "val", classes=scorer.classes)
        names = display_names(wanted.class_descriptions, scorer.classes)
        scores = scorer.scores(dataset, "validation")
        if wanted.estimate_prior:
            images = read_split(config.data, "train", config.labels, classes=scorer.classes)
            estimate_prior(scorer, images, wanted.estimate_prior)
    if scores is None:
        return {}
    figures = evaluate_scores(
        scores,
        dataset.dense(),
        names,
        threshold=wanted.threshold,
        top_k=wanted.top_k or 3,
        protocol=protocol(dataset),
    )
    return {
        "checkpoint": _alone(config.model.model_path),
        "weights": _alone(scorer.weights),
        "dataset": config.data.dataset,
        "split": split_name(config.data, "val"),
        "image_size": config.images.image_size,
        "tta": wanted.tta,
        "evaluated_as": evaluated_as(config.data),
        **figures,
        **provenance(),
    }


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
