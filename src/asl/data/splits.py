"""The splits that a model is trained and validated on, as the settings say."""

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np

from asl.data.annotations import PRESENT, UNANNOTATED, Annotations, without_missing
from asl.data.cache import cache_folder
from asl.data.classes import match_classes
from asl.data.duplicates import in_both
from asl.data.partial import simulate
from asl.data.readers import default_split, read
from asl.data.settings import DataSettings, LabelSettings
from asl.errors import DataError, UsageError

Role = Literal["train", "val"]
log = logging.getLogger("asl")


def read_split(
    settings: DataSettings,
    role: Role,
    labels: LabelSettings | None = None,
    *,
    classes: Sequence[str] | None = None,
    write_cache: bool = True,
) -> Annotations:
    """Read the split for training or validation, say what is in it, and leave out missing images.

    `labels` say how the labels of the training split are changed; validation is always on those of
    the data set. With `classes`, the result has these classes, matched by name, in this order.
    Without `write_cache` a list that is parsed is not kept for the next start.

    Raises `UsageError` for settings that the data set does not have, and `DataError` for files that
    are missing or wrong and for classes without a match.
    """
    split = split_name(settings, role)
    labels = labels if labels and role == "train" else LabelSettings()
    difficult = labels.train_difficult if role == "train" else settings.val_difficult
    if settings.dataset == "voc" and role == "val":
        difficult = difficult or "ignore"  # as the VOC challenge and the papers evaluate
    annotations = read(
        settings.dataset,
        settings.data,
        split,
        cache_dir=cache_folder(),
        write_cache=write_cache,
        # A reader refuses an option that it does not have, unless it is None.
        all_images=settings.all_images or None,
        difficult=difficult,
        machine_generated=labels.machine_generated,
        class_list=settings.class_list,
        val_share=settings.val_share,
        split_seed=settings.split_seed,
        stratify=settings.stratify or None,
        folds=settings.folds,
        fold=settings.fold,
        image_folder=settings.image_folder,
    )
    if classes is not None:
        annotations = annotations.with_classes(match_classes(annotations.classes, classes), classes)
    annotations, skipped = without_missing(annotations, settings.missing_images)
    note = f" ({skipped:,} missing, skipped)" if skipped else ""
    soft = ", soft labels" if annotations.soft else ""
    print(f"{split}: {len(annotations):,} images{note}, {annotations.num_classes} classes{soft}")
    if labels.simulate_partial is not None:
        annotations = simulate(annotations, labels.simulate_partial, labels.partial_seed)
    return annotations


def split_name(settings: DataSettings, role: Role) -> str:
    """The split for training or validation: that of the settings, or the usual one of the data set.

    Raises `UsageError` if no data set is named, or if it has only splits of other names.
    """
    if not settings.data:
        raise UsageError(
            "name the folder of the data set: DATA (an address is not taken from a checkpoint)"
        )
    chosen = settings.train_split if role == "train" else settings.val_split
    return chosen or default_split(settings.dataset, settings.data, role)


def check_apart(settings: DataSettings, train: Annotations, val: Annotations) -> None:
    """Check that no image file stands in both splits.

    Raises `DataError` that counts such images and names the first. If `settings` name one split for
    both, that is meant (can the model overfit?): it costs a warning only.
    """
    if settings.train_split and settings.train_split == settings.val_split:
        log.warning(
            "mAP will be that of the training images: both splits are %s", settings.val_split
        )
        return
    shared = np.flatnonzero(in_both(val, train))
    if len(shared):
        raise DataError(
            f"{len(shared):,} of {len(val):,} validation images are training images too, the first "
            f"is {val.path(shared[0])}: choose splits without common images"
        )


def check_one_label(annotations: Annotations) -> None:
    """Check that every image has exactly one label, and that the other classes are absent.

    Raises `DataError` that counts the other images and names the first.
    """
    if annotations.counts(UNANNOTATED).any():
        raise DataError(
            "loss asl_single takes exactly one label an image, and all other classes as absent: it "
            "cannot leave out cells that are not annotated"
        )
    stored = np.repeat(np.arange(len(annotations)), np.diff(annotations.indptr))
    labels = np.bincount(stored[annotations.values == PRESENT], minlength=len(annotations))
    wrong = np.flatnonzero(labels != 1)
    if len(wrong):
        raise DataError(
            f"loss asl_single takes exactly one label an image: {len(wrong):,} of "
            f"{len(annotations):,} have another number, the first is {annotations.path(wrong[0])} "
            f"with {labels[wrong[0]]}"
        )
