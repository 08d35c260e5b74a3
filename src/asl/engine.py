"""The loop: `fit` trains, `evaluate` measures a checkpoint, `predict` labels images."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from timm.layers.norm_act import convert_sync_batchnorm
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from asl import report
from asl.config import RESUME_LAST, Config
from asl.data.annotations import UNANNOTATED, Annotations, without_missing
from asl.data.classes import match_classes, read_descriptions
from asl.data.partial import simulate
from asl.data.prior import RunningPrior, read_prior, write_prior
from asl.data.readers import default_split, read
from asl.distributed import (
    broadcast_buffers,
    from_rank_0,
    gather_dealt,
    process_group,
    rank,
    summed,
    world_size,
)
from asl.errors import DataError, Interrupted, TrainingError, UsageError
from asl.images.augment_device import apply_batch
from asl.images.cache import open_image_cache
from asl.images.decode import find_images
from asl.images.loader import Batch, Batches, default_workers
from asl.losses import AsymmetricLoss, AsymmetricLossOptimized, PartialSelectiveLoss
from asl.metrics import Protocol, evaluate_scores, f1_scores, mean_average_precision
from asl.models import checkpoint
from asl.models.build import create_model, fold_batchnorm, load_model, normalization
from asl.training.adaptive import AdaptiveAsymmetry
from asl.training.interrupts import Interrupts
from asl.training.run import Run, provenance, run_folder

T = TypeVar("T")
ESTIMATE = "estimate"  # `prior_path` where the prior is to be estimated first
SLOW_DATA = 0.1  # share of an epoch's time spent waiting for data from which on that is said
HALF_ABOVE = 2**27  # scores: larger tables are kept in half precision, 256 MB and up


class Training:
    """What a step changes: the model, its average, the optimizer, the schedule, the loss scale."""

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        config: Config,
        steps_per_epoch: int,
        device: torch.device,
    ) -> None:
        self.model, self.device, self.seed = model, device, config.seed
        self.forward: nn.Module = model
        if world_size() > 1:
            self.forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if config.compile:
            self.forward = torch.compile(self.forward)  # type: ignore[assignment]
        self.loss = loss.to(device)
        self.optimizer = create_optimizer(model, config)
        total = config.epochs * steps_per_epoch
        # torch divides by zero where the rise is exactly one step long.
        one_step = math.isclose(config.pct_start * total, 1)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=config.lr,
            total_steps=total,
            pct_start=1.001 / total if one_step else config.pct_start,
        )
        self.precision = precision(config.amp, device, training=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.grad_clip = config.grad_clip
        self.running_prior: RunningPrior | None = None
        if config.running_prior:
            num_classes: int = model.num_classes  # type: ignore[assignment]  # timm's models say
            self.running_prior = RunningPrior(num_classes).to(device)
        self.ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=config.ema_warmup)
        # Listed once. timm's own update makes both state dicts anew in every step, which takes as
        # long as the average itself.
        pairs = zip(self.ema.module.state_dict().values(), model.state_dict().values(), strict=True)
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        self._averages, self._sources = ([pair[which] for pair in floating] for which in (0, 1))
        self.steps = 0

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One update from this rank's normalised images (B, 3, S, S) and targets (B, C).

        Returns the loss, summed over classes and the batches of all ranks: 0-d, detached, on the
        device. Nothing here waits for the device.
        """
        # What dropout draws depends on (seed, step, rank) alone: no state of it is to be saved.
        drawn = np.random.SeedSequence([self.seed, self.steps, rank()]).generate_state(1)
        torch.manual_seed(int(drawn[0]))
        if not self.model.training:  # asking costs nothing, telling every layer a millisecond
            self.model.train()
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            logits = self.forward(images)
        logits = logits[: len(targets)]  # fewer than images: see `Batch`
        loss: Tensor = self.loss(logits, targets)
        # The loss is a sum, of which DistributedDataParallel averages the gradients.
        scaled = self.scaler.scale(loss * world_size())
        scaled.backward()  # type: ignore[no-untyped-call]
        if self.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.steps += 1
        if self.running_prior is not None:
            self.running_prior.update(logits)
        self.average()
        return summed(loss.detach())

    @torch.no_grad()
    def average(self) -> None:
        """Move the averaged parameters and running statistics towards the present ones."""
        # timm counts steps for the warm-up only: given them without one, it skips the first.
        decay = self.ema.get_decay(self.steps if self.ema.use_warmup else None)
        torch._foreach_lerp_(self._averages, self._sources, 1 - decay)

    def finite(self, losses: Sequence[Tensor], epoch: int) -> list[float]:
        """The losses of `epoch` (from 0) as numbers: waits for the device once, not once per step.

        Raises `TrainingError` where one is not finite, or the loss scale of float16 has collapsed.
        """
        values: list[float] = torch.stack(list(losses)).tolist()
        scale = f", with the loss scale at {self.scaler.get_scale():g}" * self.scaler.is_enabled()
        for step, value in enumerate(values, start=1):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is {value} at epoch {epoch + 1}, step {step}{scale}: lower --lr, or "
                    "train with --amp off. The checkpoints hold the state before that."
                )
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise TrainingError(
                f"epoch {epoch + 1}: gradients overflow float16 again and again, the last of more "
                "than 16 steps without an update: lower --lr, or train with --amp bf16 or off"
            )
        return values

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The averaged and the regular state dict."""
        return {"ema": self.ema.module.state_dict(), "regular": self.model.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on beside the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss": self.loss.state_dict(),
            "running_prior": self.running_prior and self.running_prior.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any], weights: dict[str, dict[str, Tensor]]) -> None:
        """Go on from a copy of what `state_dict` and `weights` returned."""
        self.model.load_state_dict(weights["regular"])
        self.ema.module.load_state_dict(weights["ema"])
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.loss.load_state_dict(state["loss"])
        if self.running_prior is not None:
            self.running_prior.load_state_dict(state["running_prior"])
        self.steps = state["steps"]


def create_loss(config: Config, partial: bool = False, prior: Tensor | None = None) -> nn.Module:
    """The loss for targets in {1, 0}, or in {1, 0, -1} where the training set is `partial`.

    `prior` is that of CSL, (C,) in [0, 1]. Focusing weights are detached: the official training
    scripts' choice.
    """
    gamma_neg, gamma_pos, clip = config.asymmetry
    loss: AsymmetricLoss | PartialSelectiveLoss
    if partial:
        unannotated = gamma_neg if config.gamma_unann is None else config.gamma_unann
        loss = PartialSelectiveLoss(
            config.unannotated,
            gamma_pos,
            gamma_neg,
            unannotated,
            clip=clip,
            likelihood_topk=config.likelihood_topk,
            prior=prior,
            prior_threshold=config.prior_threshold,
        )
    else:
        loss = AsymmetricLossOptimized(
            gamma_neg, gamma_pos, clip, disable_torch_grad_focal_loss=True
        )
    if config.adaptive_gamma is None:
        return loss
    return AdaptiveAsymmetry(loss, config.adaptive_gamma, config.adaptive_step)


def create_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Adam or AdamW with the official parameter groups: no decay of biases and 1-d parameters."""
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and not name.endswith(".bias")].append(parameter)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(
        [
            {"params": groups[False], "weight_decay": 0.0},
            {"params": groups[True], "weight_decay": config.weight_decay},
        ],
        lr=config.lr,
        fused=True,
    )


def fit(config: Config) -> Path:
    """Train as `config` says and return the folder of the run (`run.Run` says what is in it).

    Started by torchrun, the processes share every batch, and rank 0 writes. Raises `UsageError` and
    `DataError` for what is wrong with the input, `TrainingError` when the loss is no longer finite,
    and `Interrupted` on SIGINT and SIGTERM, after last.pt was written.
    """
    with process_group(pick_device(config.device)) as device:
        if config.prior_path == ESTIMATE:
            config = _with_estimated_prior(config)
        return _fit(config, device)


def _fit(config: Config, device: torch.device) -> Path:
    if config.batch_size < world_size():
        raise UsageError(f"batch_size is {config.batch_size}, but there are {world_size()} ranks")
    if config.sync_bn and device.type != "cuda":
        raise UsageError(f"sync_bn needs GPUs, and the device is {device.type}")
    _choose_algorithms(config.deterministic)
    train_set = _annotations(config, "train")
    if config.simulate_partial is not None:
        train_set = simulate(train_set, config.simulate_partial, config.partial_seed)
    val_set = _annotations(config, "val", train_set.classes)
    run = Run(config)
    torch.manual_seed(config.seed)
    fresh = replace(config, model_path="", pretrained=False) if run.resumed else config
    model = _on(device, _new_model(fresh, train_set.num_classes))
    _check_size(model, config)
    if config.sync_bn:
        model = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    prepare = preparation(model, device)
    partial = bool(train_set.counts(UNANNOTATED).any())
    prior = read_prior(config.prior_path, train_set.classes) if config.prior_path else None
    loss = create_loss(config, partial, prior)
    later = {"auto": device.type != "cpu", "workers": False, "device": True}[config.augment_on]
    batches = _batches(
        config,
        train_set,
        device,
        shuffle=True,
        augment=config.augment,
        augment_later=later,
        bad_images=config.bad_images,
    )
    val_batches = _batches(config, val_set, device)
    training = Training(model, loss, config, len(batches), device)
    first_epoch, losses = 0, list[Tensor]()
    if run.kept is not None:
        first_epoch, losses = run.kept["epoch"], list(run.kept["losses"].to(device, copy=True))
        try:
            training.load_state_dict(run.kept["training"], run.kept)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{run.last}: this run cannot go on from it: {reason}") from error
        run.kept = None  # its file is mapped: as long as that is so, a disk has no room for others
    last_epoch = min(config.stop_epoch, config.epochs)

    with run.owned(train_set.classes), Interrupts() as interrupts:
        if run.resumed:
            run.write_log(training)
        for epoch in range(first_epoch, last_epoch):
            try:
                started, batches.waited = time.perf_counter(), 0.0
                title = f"epoch {epoch + 1}/{last_epoch}"
                bar = _progress(batches, epoch, title, len(losses))
                steps = _traced(bar, run.folder) if config.profile and epoch == first_epoch else bar
                for batch in interrupts.until_stopped(steps):
                    targets = batch.targets.to(device, non_blocking=True)
                    losses.append(training.step(prepare(batch), targets))
                    if len(losses) % config.print_freq == 0:
                        latest = training.finite(losses, epoch)[-1]
                        bar.set_postfix(loss=f"{latest:.1f}", lr=f"{training.lr:.1e}")
                    if interrupts.save_asked() or run.is_due(training.steps):
                        training.finite(losses, epoch)
                        run.save(training, epoch, losses)
                row = {
                    "epoch": epoch + 1,
                    "lr": training.lr,
                    "loss": mean(training.finite(losses, epoch)),
                }
                waiting = batches.waited / (time.perf_counter() - started)
                if waiting > SLOW_DATA:
                    print(
                        f"waited for data {waiting:.0%} of the time: "
                        "raise --workers or use --cache-dir"
                    )
                if (epoch + 1) % config.val_every == 0 or epoch + 1 == last_epoch:
                    # A run that is lost while it validates has lost no step.
                    run.save(training, epoch, losses)
                    models = {"ema": training.ema.module, "regular": model}
                    for each in models.values():
                        broadcast_buffers(each)
                    rest = interrupts.until_stopped(_progress(val_batches, 0, "validation"))
                    folded = [fold_batchnorm(deepcopy(each)) for each in models.values()]
                    tables = _score_all(folded, rest, config, val_set, device)
                    for name, scores in zip(models, tables, strict=True):
                        row |= _figures(name, scores, val_set, config)
            except Interrupted:
                run.save(training, epoch, losses)
                raise
            if isinstance(loss, AdaptiveAsymmetry):
                row |= {"gap": loss.gap.item(), "gamma_neg": loss.gamma_neg.item()}
            losses = []
            run.end_epoch(training, row)
    # The other ranks wait here: what follows may read what rank 0 has written.
    from_rank_0(lambda: report.curves(run.history, run.folder / "curves.png"))
    return run.folder


def evaluate(config: Config) -> dict[str, Any]:
    """Measure the checkpoint `config.model_path` on the validation split.

    Returns what `metrics.evaluate_scores` does, with "checkpoint", "weights", "dataset", "split",
    "image_size" and `provenance` beside it; started by torchrun, on rank 0, and nothing on others.
    Classes are matched by name. With `config.estimate_prior` the mean score of every class over the
    training split, whose labels are not looked at, is written there: the prior of CSL, if the model
    was trained with unannotated cells ignored.

    Raises `UsageError` and `DataError` for what is wrong with the input.
    """
    with process_group(pick_device(config.device)) as device:
        model, classes, about = _trained_model(config, device)
        dataset = _annotations(config, "val", classes)
        names = _display_names(config, classes)
        scores = _scores(model, config, dataset, device, "validation")
        if config.estimate_prior:
            _estimate_prior(config, model, classes, device)
    if scores is None:
        return {}
    figures = evaluate_scores(
        scores,
        dataset.dense(),
        names,
        threshold=config.threshold,
        top_k=config.top_k or 3,
        protocol=_protocol(dataset),
    )
    return {
        **about,
        "dataset": config.dataset,
        "split": _split(config, "val"),
        "image_size": config.image_size,
        "evaluated_as": _evaluated_as(config),
        **figures,
        **provenance(),
    }


def _estimate_prior(
    config: Config, model: nn.Module, classes: Sequence[str], device: torch.device
) -> None:
    dataset = _annotations(config, "train", classes)
    scores = _scores(model, config, dataset, device, "prior")
    if scores is not None:
        write_prior(config.estimate_prior, classes, scores.mean(0, dtype=torch.float32))


def _with_estimated_prior(config: Config) -> Config:
    """Train a model that ignores unannotated cells, in the run's folder `prior`, and ask it."""
    folder = from_rank_0(lambda: run_folder(config))
    path = folder / "prior" / "prior.csv"
    if not from_rank_0(path.exists):
        interrupted = config.resume and from_rank_0((path.parent / "last.pt").exists)
        first = replace(
            config,
            unannotated="ignore",
            prior_path="",
            output=str(path.parent),
            overwrite=True,
            resume=RESUME_LAST if interrupted else "",
        )
        best = replace(first, model_path=str(fit(first) / "best.pt"), pretrained=False)
        device = pick_device(config.device)
        model, classes, _ = _trained_model(best, device)
        _estimate_prior(replace(best, estimate_prior=str(path)), model, classes, device)
    begun = from_rank_0((folder / "last.pt").exists)
    resume = "" if config.resume == RESUME_LAST and not begun else config.resume
    return replace(config, prior_path=str(path), output=str(folder), resume=resume)


def predict(config: Config) -> list[dict[str, Any]]:
    """Label the image `config.pic_path`, or all images in that folder and below.

    Returns, for every image, its "file" and its "labels": the `top_k` (10) with the highest scores,
    from high to low, each with "name", "score" in [0, 1] and "predicted" (score above
    `threshold`); started by torchrun, on rank 0, and nothing on others. Raises `UsageError` and
    `DataError` for what is wrong with the input.
    """
    if not config.pic_path:
        raise UsageError("name an image or a folder of images: --pic-path")
    with process_group(pick_device(config.device)) as device:
        model, classes, _ = _trained_model(config, device)
        names = _display_names(config, classes)
        images = Annotations.unlabelled(*find_images(config.pic_path), classes)
        scores = _scores(model, config, images, device, "images")
    if scores is None:
        return []
    top_scores, top_classes = scores.topk(min(config.top_k or 10, len(classes)))
    return [
        {
            "file": images.path(row),
            "labels": [
                {"name": names[c], "score": round(s, 4), "predicted": s > config.threshold}
                for s, c in zip(top_scores[row].tolist(), top_classes[row].tolist(), strict=True)
            ],
        }
        for row in range(len(images))
    ]


@torch.inference_mode()
def score(
    models: Sequence[nn.Module],
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Tensor],
    dtype: torch.dtype | None = None,
    kept: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The scores that each of several models gives, in one pass over the batches.

    One (N, C) tensor of type `kept` per model, on the host, values in [0, 1]. With `dtype` the
    forward passes run in that precision.
    """
    models = [model.eval() for model in models]
    parts: list[list[Tensor]] = [[] for _ in models]
    for batch in batches:
        images = prepare(batch)
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            logits = [model(images)[: len(batch.targets)] for model in models]
        for part, each in zip(parts, logits, strict=True):
            part.append(each.float().sigmoid().to("cpu", kept))
    return [torch.cat(part) for part in parts]


def _scores(
    model: nn.Module, config: Config, dataset: Annotations, device: torch.device, title: str
) -> Tensor | None:
    """The (N, C) scores of `dataset`, of all ranks, on rank 0."""
    batches = _progress(_batches(config, dataset, device), 0, title)
    [scores] = _score_all([model], batches, config, dataset, device)
    return scores


def _score_all(
    models: Sequence[nn.Module],
    batches: Iterable[Batch],
    config: Config,
    dataset: Annotations,
    device: torch.device,
) -> list[Tensor | None]:
    """What `score` returns for the batches of `dataset`, of all ranks, on rank 0."""
    cells = len(dataset) * dataset.num_classes
    try:
        tables = score(
            models,
            batches,
            preparation(models[0], device),
            precision(config.amp, device, training=False),
            torch.float16 if cells > HALF_ABOVE else torch.float32,
        )
    except (RuntimeError, AssertionError, ArithmeticError, ValueError):
        _check_size(models[0], config)  # if it is that, it says so
        raise
    return [gather_dealt(table, config.batch_size, len(dataset)) for table in tables]


def pick_device(name: str = "") -> torch.device:
    """The device of that name; without one, the first that is there of CUDA, MPS and the CPU.

    Raises `UsageError` for a device that is not there.
    """
    if not name:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if torch.backends.mps.is_available() else name
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def precision(amp: str, device: torch.device, training: bool) -> torch.dtype | None:
    """The type that the forward pass computes in; None for float32 throughout.

    "auto" on a GPU is bfloat16, or on older ones float16 with a loss scale. On a CPU that has
    bfloat16 instructions it is bfloat16 for scores, which is faster for all models measured, and
    float32 for training, where it is for some and takes twice as long for others
    (bench/precision.py).
    """
    if amp == "auto" and device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if amp == "auto":
        known = torch.cpu.get_capabilities() if device.type == "cpu" and not training else {}
        native = known.get("avx512_bf16", False) or known.get("amx_bf16", False)
        return torch.bfloat16 if native else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def _split(config: Config, role: str) -> str:
    chosen = config.train_split if role == "train" else config.val_split
    return chosen or default_split(config.dataset, config.data, role)


# Settings that go to the reader as they are; one that it does not have must be None.
_READER_OPTIONS = ("image_folder", "class_list", "val_share", "split_seed")


def _annotations(config: Config, role: str, classes: Sequence[str] | None = None) -> Annotations:
    """The split for training or validation; with `classes`, those in that order."""
    if not config.data:
        raise UsageError("name the folder of the data set: DATA")
    split = _split(config, role)
    difficult = config.train_difficult if role == "train" else config.val_difficult
    if config.dataset == "voc" and role == "val":
        difficult = difficult or "ignore"  # as the VOC challenge and the papers evaluate
    found = read(
        config.dataset,
        config.data,
        split,
        cache_dir=cache_folder(),
        difficult=difficult,
        all_images=config.all_images or None,
        machine_generated=config.machine_generated if role == "train" else None,
        **{name: getattr(config, name) for name in _READER_OPTIONS},
    )
    if classes is not None:
        found = found.with_classes(match_classes(found.classes, classes), classes)
    if config.num_classes not in (None, found.num_classes):
        raise UsageError(f"num_classes is {config.num_classes}, but there are {found.num_classes}")
    there, skipped = without_missing(found, config.missing_images)
    note = f" ({skipped:,} missing, skipped)" if skipped else ""
    print(f"{split}: {len(there):,} images{note}, {found.num_classes} classes")
    return there


def cache_folder() -> Path:
    """Where parsed annotations are kept: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asl"


def _batches(
    config: Config,
    annotations: Annotations,
    device: torch.device,
    bad_images: Literal["error", "skip"] = "error",
    **more: Any,
) -> Batches:
    cache = None
    if config.cache_dir:
        workers = default_workers() if config.workers is None else config.workers
        folder, size = Path(config.cache_dir), config.image_size
        cache = open_image_cache(
            folder,
            annotations,
            size,
            workers=workers,
            max_pixels=config.max_pixels,
            bad=bad_images,
        )
    return Batches(
        annotations,
        config.image_size,
        config.batch_size,
        seed=config.seed,
        cache=cache,
        bad_images=bad_images,
        max_pixels=config.max_pixels,
        workers=config.workers,
        pin_memory=device.type == "cuda",
        **more,
    )


def _new_model(config: Config, num_classes: int) -> nn.Module:
    name, head, size = config.model_name, config.head, config.image_size
    if not config.model_path:
        return create_model(name, num_classes, head, config.pretrained, image_size=size)
    model, loaded = load_model(name, num_classes, config.model_path, head, image_size=size)
    print(loaded)
    return model


def _trained_model(
    config: Config, device: torch.device
) -> tuple[nn.Module, tuple[str, ...], dict[str, str]]:
    """The model of `config.model_path`, its classes, and what to call it in a report."""
    if not config.model_path:
        raise UsageError("name the checkpoint: --model-path")
    names = checkpoint.load(config.model_path)["idx_to_class"]
    if not names:
        raise DataError(f"{config.model_path} does not name its classes (idx_to_class)")
    if config.num_classes not in (None, len(names)):
        raise UsageError(f"num_classes is {config.num_classes}, the checkpoint's {len(names)}")
    bottleneck = config.dataset_type == "OpenImages"
    model, loaded = load_model(
        config.model_name,
        len(names),
        config.model_path,
        "bottleneck" if bottleneck else config.head,
        weights=config.weights,
        fresh_head=False,
        image_size=config.image_size,
    )
    about = {"checkpoint": config.model_path, "weights": loaded.weights}
    return fold_batchnorm(_on(device, model)), tuple(names.values()), about


def _check_size(model: nn.Module, config: Config) -> None:
    # One black image: what a size is too small for, or no multiple of, the models themselves know.
    size, device = config.image_size, next(model.parameters()).device
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, AssertionError, ArithmeticError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        message = f"{config.model_name} cannot take images of {size} x {size} pixels: {reason}"
        raise UsageError(message) from error


def _on(device: torch.device, model: nn.Module) -> nn.Module:
    # Channels last is the layout that convolutions are fastest in, on GPUs and CPUs alike.
    return model.to(device).to(memory_format=torch.channels_last)


def preparation(model: nn.Module, device: torch.device) -> Callable[[Batch], Tensor]:
    """What makes the model's input of a batch: normalised float32 images on the device."""
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in normalization(model))
    scale, shift = 1 / (255 * std), -mean / std

    def prepare(batch: Batch) -> Tensor:
        images = batch.images.to(device, non_blocking=True)
        if batch.numbers is not None:
            images = apply_batch(images, batch.numbers)
        pixels = images.to(torch.float32, memory_format=torch.channels_last)
        return torch.addcmul(shift, pixels, scale)

    return prepare


def _progress(batches: Batches, epoch: int, title: str, start: int = 0) -> "tqdm[Batch]":
    """The batches of an epoch behind a progress bar that counts images."""
    return tqdm(
        batches.epoch(epoch, start),
        title,
        len(batches),
        initial=start,
        unit="img",
        unit_scale=batches.batch_size,
        leave=False,
        disable=rank() != 0,
    )


def _figures(
    weights: str, scores: Tensor | None, dataset: Annotations, config: Config
) -> dict[str, float]:
    """What an epoch is judged by: mAP, CF1 and OF1 of a set of weights; nothing without scores."""
    if scores is None:
        return {}
    targets, protocol = dataset.dense(), _protocol(dataset)
    f1 = f1_scores(scores, targets, config.threshold, protocol=protocol)
    return {
        f"mAP_{weights}": mean_average_precision(scores, targets, protocol=protocol),
        **{f"{which}_{weights}": f1[which] for which in ("CF1", "OF1")},
    }


def _evaluated_as(config: Config) -> str:
    """The protocol by name: what a figure must say to be compared with the literature's."""
    if config.dataset == "coco":
        return "coco: all images" if config.all_images else "coco: annotated images only (official)"
    if config.dataset == "voc":
        if config.val_difficult in (None, "ignore"):
            return "voc: difficult objects ignored (official)"
        return f"voc: difficult objects taken as {config.val_difficult}"
    return {
        "openimages": "openimages: verified labels only (official)",
        "nus_wide": "nus_wide: all listed images (official)",
    }.get(config.dataset, f"{config.dataset}: all listed images")


def _display_names(config: Config, classes: Sequence[str]) -> list[str]:
    if not config.class_descriptions:
        return list(classes)
    descriptions = read_descriptions(Path(config.class_descriptions))
    return [descriptions.get(name, name) for name in classes]


def _protocol(dataset: Annotations) -> Protocol:
    return "partial" if dataset.implied == UNANNOTATED else "full"


def _traced(items: Iterable[T], folder: Path) -> Iterator[T]:
    """The items, while a trace of the work between the fourth and the eighth is taken.

    It becomes trace.json in `folder`, to be opened in a browser at ui.perfetto.dev.
    """
    from torch.profiler import profile, schedule

    def write(profiler: Any) -> None:
        profiler.export_chrome_trace(str(folder / "trace.json"))
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))

    # Without the first steps, which set things up; the profiler itself warms up for one.
    steps = schedule(wait=2, warmup=1, active=5, repeat=1)
    with profile(schedule=steps, on_trace_ready=write) as profiler:
        for item in items:
            yield item
            profiler.step()


def _choose_algorithms(deterministic: bool) -> None:
    if deterministic:
        # cuBLAS reads this when it starts; without it some of its sums change from run to run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Every image has the same size: the fastest algorithm for it is worth a search.
    torch.backends.cudnn.benchmark = not deterministic
