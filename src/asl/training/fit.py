"""The loop: `fit` builds what a training needs, then trains, validates and records its epochs."""

import os
import time
from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import torch
from timm.layers.norm_act import convert_sync_batchnorm

from asl.config import RESUME_LAST
from asl.data.annotations import UNANNOTATED, Annotations
from asl.data.prior import read_prior
from asl.data.splits import check_apart, check_one_label, read_split
from asl.distributed import (
    broadcast_buffers,
    from_rank_0,
    pick_device,
    process_group,
    world_size,
)
from asl.errors import UsageError
from asl.evaluation.average import Scores
from asl.evaluation.evaluate import epoch_figures, estimate_prior
from asl.evaluation.pictures import curves
from asl.evaluation.score import Scorer, progress, score_data_set
from asl.evaluation.text import sparks_text
from asl.images.features import AnyBatches
from asl.images.loader import Batches
from asl.images.mix import mixing
from asl.images.prepare import augments_on_device, preparation
from asl.models.build import check_size, normalization, place
from asl.models.inference import for_inference
from asl.models.settings import TrainedModelSettings
from asl.models.weights import new_model
from asl.training.adaptive import AdaptiveAsymmetry
from asl.training.features import features_once
from asl.training.interrupts import Interrupts
from asl.training.log import Row, peak_memory_gb
from asl.training.loss import create_loss
from asl.training.memory import out_of_memory_explained
from asl.training.run import Run, run_folder
from asl.training.settings import ESTIMATE, OF_CELLS, TrainConfig
from asl.training.step import Training

T = TypeVar("T")
MANY_EPOCHS = 3  # from so many on a line of their mAP ends the training
SLOW_DATA = 0.1  # a message appears where an epoch waits for data for a larger share of its time


def fit(config: TrainConfig) -> Path:
    """Train as `config` says and return the folder of the run (`run.Run` says what is in it).

    Processes that were started together share every batch, and rank 0 writes. Raises `UsageError`
    and `DataError` for what is wrong with the input, `TrainingError` when the loss is no longer
    finite, and `Interrupted` on SIGINT and SIGTERM, after last.pt was written.
    """
    with process_group(pick_device(config.compute.device)) as device:
        if config.loss.prior_path == ESTIMATE:
            config = _with_estimated_prior(config, device)
        return _fit(config, device)


def _fit(config: TrainConfig, device: torch.device) -> Path:
    train_set, val_set = read_splits(config, device)
    run = Run(config)
    batches: AnyBatches = training_batches(config, train_set, device)
    val_batches: AnyBatches = Batches(val_set, config.images, device=device)
    training = new_training(config, train_set, len(batches), device, resumed=run.resumed)
    run.restore(training)

    with (
        run.owned(training, train_set.classes),
        Interrupts() as interrupts,
        out_of_memory_explained(config, training, batches.batch_size_per_rank),
    ):
        if config.step.cache_features and training.epoch < config.last_epoch:
            batches, val_batches = features_once(
                config, training, train_set, val_set, interrupts.until_stopped
            )
        while training.epoch < config.last_epoch and not from_rank_0(run.has_stalled):
            row = train_epoch(training, batches, run, interrupts)
            if run.validates(training.epoch):
                row |= validate(training, val_batches, run, interrupts)
            run.record(training, row)
    # The other ranks wait here: the caller may read what rank 0 has written.
    from_rank_0(lambda: curves(run.history, run.folder / "curves.png"))
    if len(run.history) >= MANY_EPOCHS:
        print(f"mAP:         {sparks_text(run.history)}")
    if run.reference and run.history:
        print(f"reference:   {run.reference.verdict(run.history)}")
    return run.folder


def train_epoch(training: Training, batches: AnyBatches, run: Run, interrupts: Interrupts) -> Row:
    """Train for an epoch, or for the rest of one that was interrupted.

    Returns its line of the log: its number from 1, the learning rate, the mean loss of a step, and
    what it took. Raises `Interrupted` after the step in which a signal came.
    """
    config, device = run.config, training.device
    prepare = preparation(*normalization(training.model), device, training.precision)
    pace, batches.waited = Pace(), 0.0
    title = f"epoch {training.epoch + 1}/{config.last_epoch}"
    bar = progress(batches, training.epoch, title, start=training.batches)
    steps = traced(bar, run.folder) if run.traces(training.epoch) else bar
    mix = mixing(config.augment, config.step.seed)
    batches_seen = count(training.batches)
    for batch in interrupts.until_stopped(steps, lambda: training.between_steps):
        images, targets = prepare(batch), batch.targets.to(device, non_blocking=True)
        if mix is not None:
            targets = mix(images, targets, training.epoch, next(batches_seen))
        training.step(images, targets)
        pace.add(len(batch.targets) * world_size())
        if not training.between_steps:
            continue
        if len(training.losses) % config.run.print_freq == 0:
            run.record_step(training, pace.lately())
            bar.set_postfix(loss=f"{training.losses[-1]:.1f}", lr=f"{training.lr:.1e}")
        if interrupts.save_asked() or run.is_due(training.steps):
            run.save(training)
    row: Row = {"epoch": training.epoch + 1, "lr": training.lr}
    row["loss"] = mean(training.finite_losses())
    if isinstance(training.loss, AdaptiveAsymmetry):
        row |= {"gap": training.loss.gap.item(), "gamma_neg": training.loss.gamma_neg.item()}
    if training.gradient_norms:
        norms = torch.stack(training.gradient_norms)
        # float16 has steps whose gradients overflow, and skips them.
        row["gradient_norm"] = norms[norms.isfinite()].mean().item()
    waited = batches.waited / pace.seconds
    _say_if_slow(waited)
    return row | {
        "images_per_second": round(pace.overall(), 1),
        "seconds_training": round(pace.seconds, 2),
        "waited_for_data": round(waited, 3),
        "peak_memory_gb": round(peak_memory_gb(device), 2),
    }


class Pace:
    """How many images go by in a second."""

    def __init__(self) -> None:
        self._started = self._looked = time.perf_counter()
        self._images = self._since = 0

    def add(self, images: int) -> None:
        """Count these."""
        self._images += images
        self._since += images

    def lately(self) -> float:
        """Images per second since this was last asked."""
        now = time.perf_counter()
        rate = self._since / (now - self._looked)
        self._looked, self._since = now, 0
        return rate

    def overall(self) -> float:
        """Images per second since the start."""
        return self._images / self.seconds

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started


def validate(training: Training, batches: AnyBatches, run: Run, interrupts: Interrupts) -> Row:
    """The figures of the averaged and of the regular weights, on rank 0 (`epoch_figures`)."""
    run.save(training)  # A run that is lost while it validates has lost no step.
    started = time.perf_counter()
    models = {"ema": training.ema.module, "regular": training.model}
    for model in models.values():
        broadcast_buffers(model)
    one_label = run.config.loss.loss == "asl_single"
    scorers = [Scores(for_inference(deepcopy(model)), one_label) for model in models.values()]
    tables = score_data_set(
        scorers,
        batches,
        normalization(training.model),
        training.device,
        run.config.compute.amp,
        "validation",
        interrupts.until_stopped,
    )
    scores = dict(zip(models, tables, strict=True))
    row: Row = {**epoch_figures(scores, batches.annotations, run.config.evaluation.threshold)}
    return row | {"seconds_validation": round(time.perf_counter() - started, 2)}


def read_splits(
    config: TrainConfig, device: torch.device, write_cache: bool = True
) -> tuple[Annotations, Annotations]:
    """What is trained and validated on, after all checks that need no more than that."""
    _check_processes(config, device)
    _choose_algorithms(config.run.deterministic)
    train_set = read_split(config.data, "train", config.labels, write_cache=write_cache)
    _check_classes(config.model.num_classes, train_set)
    if train_set.soft and config.loss.loss not in OF_CELLS:
        raise UsageError(
            f"loss {config.loss.loss} takes no soft labels: choose {', '.join(OF_CELLS)}"
        )
    if config.loss.loss == "asl_single":
        check_one_label(train_set)
    val_set = read_split(config.data, "val", classes=train_set.classes, write_cache=write_cache)
    check_apart(config.data, train_set, val_set)
    return train_set, val_set


def training_batches(config: TrainConfig, train_set: Annotations, device: torch.device) -> Batches:
    """The shuffled and augmented batches of this rank."""
    return Batches(
        train_set,
        config.images,
        augment=config.augment,
        on_device=augments_on_device(config.augment, device.type),
        shuffle=True,
        seed=config.step.seed,
        device=device,
    )


def new_training(
    config: TrainConfig,
    train_set: Annotations,
    batches_per_epoch: int,
    device: torch.device,
    resumed: bool,
) -> Training:
    """The training of a model that was just made, on the device."""
    torch.manual_seed(config.step.seed)
    # A run that goes on brings its weights: those that it once started from may be gone.
    settings = config.model.replace(model_path="", pretrained=False) if resumed else config.model
    size = config.images.image_size
    model = place(new_model(settings, train_set.num_classes, size), device)
    check_size(model, settings.model_name, size)
    if config.step.sync_bn:
        model = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    partial = bool(train_set.counts(UNANNOTATED).any())
    path = config.loss.prior_path
    prior = read_prior(path, train_set.classes) if path else None
    counted: dict[str, Any] = {"num_classes": train_set.num_classes}
    if config.loss.loss == "db":  # it alone asks; to count takes seconds in a set of millions
        counted["class_counts"] = train_set.estimated_counts().tolist()
        counted["num_samples"] = max(2, len(train_set))  # timm's least is 2
    return Training(
        model,
        create_loss(config.loss, partial, prior, **counted),
        config.step,
        batches_per_epoch=batches_per_epoch,
        device=device,
        amp=config.compute.amp,
    )


def _with_estimated_prior(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Train a model that ignores unannotated cells, in the run's folder `prior`, and ask it."""
    folder = from_rank_0(lambda: run_folder(config))
    path = folder / "prior" / "prior.csv"
    if not from_rank_0(path.exists):
        interrupted = config.run.resume and from_rank_0((path.parent / "last.pt").exists)
        first = config.with_settings(
            unannotated="ignore",
            prior_path="",
            reference="",  # of runs with the loss that comes after it
            output=str(path.parent),
            overwrite=True,
            resume=RESUME_LAST if interrupted else "",
        )
        best = fit(first) / "best.pt"
        model = TrainedModelSettings(
            model_name=config.model.model_name, head=config.model.head, model_path=(str(best),)
        )
        scorer = Scorer.load(model, config.images, config.compute, device)
        images = read_split(config.data, "train", config.labels, classes=scorer.classes)
        estimate_prior(scorer, images, path)
    begun = from_rank_0((folder / "last.pt").exists)
    resume = "" if config.run.resume == RESUME_LAST and not begun else config.run.resume
    return config.with_settings(prior_path=str(path), output=str(folder), resume=resume)


def _check_processes(config: TrainConfig, device: torch.device) -> None:
    if config.images.batch_size < world_size():
        raise UsageError(
            f"batch_size is {config.images.batch_size}, but there are {world_size()} ranks"
        )
    if config.loss.loss == "twoway" and world_size() > 1:
        raise UsageError(
            "loss twoway compares the images of a batch, and of several processes each would see "
            "its own part: train with one process"
        )
    if config.step.sync_bn and device.type != "cuda":
        raise UsageError(f"sync_bn needs GPUs, and the device is {device.type}")


def _check_classes(expected: int | None, train_set: Annotations) -> None:
    if expected not in (None, train_set.num_classes):
        raise UsageError(f"num_classes is {expected}, but there are {train_set.num_classes}")


def _say_if_slow(waiting: float) -> None:
    if waiting > SLOW_DATA:
        print(f"waited for data {waiting:.0%} of the time: raise --workers or use --cache-dir")


def _choose_algorithms(deterministic: bool) -> None:
    if deterministic:
        # cuBLAS reads this when it starts; without it some of its sums change from run to run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def traced(items: Iterable[T], folder: Path) -> Iterator[T]:
    """The items, while a trace of the work between the fourth and the eighth is taken.

    It becomes trace.json in `folder`, to be opened in a browser at ui.perfetto.dev.
    """
    from torch.profiler import profile, schedule

    def write(profiler: Any) -> None:
        profiler.export_chrome_trace(str(folder / "trace.json"))
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))

    # The first steps set things up and are left out. The profiler itself warms up for one.
    steps = schedule(wait=2, warmup=1, active=5, repeat=1)
    with profile(schedule=steps, on_trace_ready=write) as profiler:
        for item in items:
            yield item
            profiler.step()
