"""Features once: what a frozen backbone makes of every image, computed when a run starts."""

import os
import time
from collections.abc import Callable, Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn

from asl.data.annotations import Annotations
from asl.distributed import gather_dealt, precision, rank
from asl.errors import UsageError
from asl.evaluation.score import progress, score
from asl.images.features import FeatureBatches
from asl.images.loader import Batch, Batches
from asl.images.prepare import preparation
from asl.models.build import normalization
from asl.models.heads import feature_width, take_features, without_head
from asl.models.inference import for_inference
from asl.training.memory import GB
from asl.training.settings import TrainConfig
from asl.training.step import Training

Watched = Callable[[Iterable[Batch]], Iterable[Batch]]


def features_once(
    config: TrainConfig,
    training: Training,
    train_set: Annotations,
    val_set: Annotations,
    watched: Watched,
) -> tuple[FeatureBatches, FeatureBatches]:
    """Let a training whose backbone is frozen go on with features in the place of images.

    Returns the batches to train and to validate with, from which it computes what it would from
    the images. Every rank holds the features of all images. Both sets of weights map features to
    logits from here on.

    Raises `UsageError` for a model whose features `without_head` cannot give, and where the memory
    of the machine is too small.
    """
    started, device, images = time.perf_counter(), training.device, config.images
    backbone = without_head(training.model, images.image_size)
    memory = features_bytes(training.model, train_set, val_set)
    # As without this option: the validation has a precision of its own, and folds BatchNorm.
    for_scores = precision(config.compute.amp, device, training=False)
    tables = []
    for dataset, model, computed_in in (
        (train_set, backbone, training.precision),
        (val_set, for_inference(deepcopy(backbone)), for_scores),
    ):
        batches = Batches(dataset, images, device=device)
        tables.append(_features(model, batches, device, computed_in, watched))
    for model in (training.model, training.ema.module):
        take_features(model)
    if rank() == 0:
        numbers = " and ".join(f"{len(table):,}" for table in tables)
        print(
            f"features of {numbers} images, {tables[0].shape[1]:,} each: {memory / 10**6:,.1f} MB, "
            f"computed in {time.perf_counter() - started:.1f} s"
        )
    size, order = (
        images.batch_size,
        {"seed": config.step.seed, "window": config.augment.shuffle_window},
    )
    return (
        FeatureBatches(train_set, tables[0], size, shuffle=True, **order, device=device),
        FeatureBatches(val_set, tables[1], size, device=device),
    )


def features_bytes(model: nn.Module, *sets: Annotations) -> int:
    """The memory that the features of all images of these data sets take, in float32.

    Raises `UsageError` where the machine has less than twice that: they are made in batches, which
    become one table.
    """
    size = 4 * feature_width(model) * sum(map(len, sets))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * size > memory:
        raise UsageError(
            f"the features of all images take {size / GB:,.1f} GB, too much for a machine of "
            f"{memory / GB:,.1f} GB: drop cache_features"
        )
    return size


def _features(
    backbone: nn.Module,
    batches: Batches,
    device: torch.device,
    computed_in: torch.dtype | None,
    watched: Watched,
) -> Tensor:
    """What the backbone makes of all images: (N, F) float32, on the host of every rank."""
    prepare = preparation(*normalization(backbone), device, computed_in)
    seen = watched(progress(batches, 0, "features"))
    [rows] = score([backbone], seen, prepare, computed_in)
    number = len(batches.annotations)
    table = gather_dealt(rows, batches.batch_size_per_rank, number, on_all=True)
    assert table is not None
    return table
