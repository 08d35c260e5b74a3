"""The loop: `fit` trains, `evaluate` measures a checkpoint, `predict` labels images."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from types import FrameType
from typing import Any, TypeVar

import timm
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from asl import __version__, checkpoint, report
from asl.adaptive import AdaptiveAsymmetry
from asl.atomic import replacing
from asl.config import Config
from asl.data import default_split, read
from asl.data.annotations import UNANNOTATED, Annotations, without_missing
from asl.data.classes import match_classes, read_descriptions
from asl.data.images import find_images
from asl.data.loader import Batches
from asl.data.partial import simulate
from asl.errors import DataError, Interrupted, TrainingError, UsageError
from asl.losses import AsymmetricLoss, AsymmetricLossOptimized, PartialSelectiveLoss
from asl.metrics import Protocol, evaluate_scores, f1_scores, mean_average_precision
from asl.models import create_model, load_model, normalization
from asl.prior import RunningPrior, read_prior, write_prior

T = TypeVar("T")
Batch = tuple[Tensor, Tensor]
# uint8 images (B, 3, S, S) on the host to normalised float32 ones on the device.
Prepare = Callable[[Tensor], Tensor]


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
        self.model, self.device = model, device
        self.forward = torch.compile(model) if config.compile else model
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
        self.steps = 0

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One update from normalised images (B, 3, S, S) and targets (B, C).

        Returns the loss, summed over batch and classes: 0-d, detached, on the device. Nothing here
        waits for the device.
        """
        self.model.train()
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            logits = self.forward(images)
        loss: Tensor = self.loss(logits, targets)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
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
        # timm counts steps for the warm-up only: given them without one, it skips the first.
        self.ema.update(self.model, step=self.steps if self.ema.use_warmup else None)
        return loss.detach()

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The averaged and the regular state dict."""
        return {"ema": self.ema.module.state_dict(), "regular": self.model.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on beside the weights."""
        on_cuda = self.device.type == "cuda"
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss": self.loss.state_dict(),
            "running_prior": self.running_prior and self.running_prior.state_dict(),
            "steps": self.steps,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if on_cuda else None,
        }

    def load_state_dict(self, state: dict[str, Any], weights: dict[str, dict[str, Tensor]]) -> None:
        """Go on from what `state_dict` and `weights` returned."""
        self.model.load_state_dict(weights["regular"])
        self.ema.module.load_state_dict(weights["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.loss.load_state_dict(state["loss"])
        if self.running_prior is not None:
            self.running_prior.load_state_dict(state["running_prior"])
        self.steps = state["steps"]
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)


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
    """Train as `config` says and return the folder of the run.

    The folder holds config.yaml, metrics.jsonl (a line per epoch), curves.png, last.pt (what
    `--resume` goes on from) and best.pt (the epoch with the highest mAP, be it of the averaged or
    of the regular weights; both are in it).

    Raises `UsageError` and `DataError` for what is wrong with the input, `TrainingError` when the
    loss is no longer finite, and `Interrupted` on SIGINT and SIGTERM, after last.pt was written.
    """
    if config.prior_path == "estimate":
        config = _with_estimated_prior(config)
    device = pick_device(config.device)
    train_set = _annotations(config, "train")
    if config.simulate_partial is not None:
        train_set = simulate(train_set, config.simulate_partial, config.partial_seed)
    val_set = _annotations(config, "val", train_set.classes)
    batches = _batches(config, train_set, device, shuffle=True, augment=config.augment)
    val_batches = _batches(config, val_set, device)
    torch.manual_seed(config.seed)
    model = _on(device, _new_model(config, train_set.num_classes))
    prepare = _prepare(model, device)
    partial = bool(train_set.counts(UNANNOTATED).any())
    prior = read_prior(config.prior_path, train_set.classes) if config.prior_path else None
    loss = create_loss(config, partial, prior)
    training = Training(model, loss, config, len(batches), device)
    run = _Run(config, train_set.classes)
    first_epoch, losses = run.start(training)
    last_epoch = min(config.stop_epoch, config.epochs)

    with _signals() as until_signal:
        for epoch in range(first_epoch, last_epoch):
            try:
                bar = _progress(batches, epoch, f"epoch {epoch + 1}/{last_epoch}", len(losses))
                for images, targets in until_signal(bar):
                    losses.append(training.step(prepare(images), targets.to(device)))
                    if len(losses) % config.print_freq == 0:
                        latest = _finite(losses, epoch)[-1]
                        bar.set_postfix(loss=f"{latest:.1f}", lr=f"{training.lr:.1e}")
                row = {
                    "epoch": epoch + 1,
                    "lr": training.lr,
                    "loss": mean(_finite(losses, epoch)),
                }
                if (epoch + 1) % config.val_every == 0 or epoch + 1 == last_epoch:
                    models = {"ema": training.ema.module, "regular": model}
                    bar = _progress(val_batches, 0, "validation")
                    dtype = precision(config.amp, device, training=False)
                    scores = score(models.values(), until_signal(bar), prepare, dtype)
                    row |= _figures(dict(zip(models, scores, strict=True)), val_set, config)
            except Interrupted:
                run.save(training, epoch, losses)
                raise
            if isinstance(loss, AdaptiveAsymmetry):
                row |= {"gap": loss.gap.item(), "gamma_neg": loss.gamma_neg.item()}
            losses = []
            run.end_epoch(training, row)
    report.curves(run.history, run.folder / "curves.png")
    return run.folder


def evaluate(config: Config) -> dict[str, Any]:
    """Measure the checkpoint `config.model_path` on the validation split.

    Returns what `metrics.evaluate_scores` does, with "checkpoint", "weights", "dataset", "split",
    "image_size" and `provenance` beside it. Classes are matched by name. Raises `UsageError` and
    `DataError` for what is wrong with the input.
    """
    device = pick_device(config.device)
    model, classes, about = _trained_model(config, device)
    dataset = _annotations(config, "val", classes)
    names = _display_names(config, classes)
    batches = _progress(_batches(config, dataset, device), 0, "validation")
    dtype = precision(config.amp, device, training=False)
    [scores] = score([model], batches, _prepare(model, device), dtype)
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


def estimate_prior(config: Config) -> Path:
    """Write the mean score of every class over the training split to `config.estimate_prior`.

    That is the prior of CSL, if the model was trained with unannotated cells ignored. The labels of
    the split are not looked at. Returns the path.
    """
    device = pick_device(config.device)
    model, classes, _ = _trained_model(config, device)
    batches = _progress(
        _batches(config, _annotations(config, "train", classes), device), 0, "prior"
    )
    dtype = precision(config.amp, device, training=False)
    [scores] = score([model], batches, _prepare(model, device), dtype)
    write_prior(config.estimate_prior, classes, scores.mean(0))
    return Path(config.estimate_prior)


def _with_estimated_prior(config: Config) -> Config:
    """Train a model that ignores unannotated cells, in the run's folder `prior`, and ask it."""
    folder = _run_folder(config)
    path = folder / "prior" / "prior.csv"
    if not path.exists():
        first = replace(
            config,
            unannotated="ignore",
            prior_path="",
            output=str(path.parent),
            overwrite=True,
            resume=config.resume and (path.parent / "last.pt").exists(),
        )
        best = fit(first) / "best.pt"
        estimate_prior(
            replace(first, model_path=str(best), pretrained=False, estimate_prior=str(path))
        )
    resume = config.resume and (folder / "last.pt").exists()
    return replace(config, prior_path=str(path), output=str(folder), resume=resume)


def predict(config: Config) -> list[dict[str, Any]]:
    """Label the image `config.pic_path`, or all images in that folder and below.

    Returns, for every image, its "file" and its "labels": the `top_k` (10) with the highest scores,
    from high to low, each with "name", "score" in [0, 1] and "predicted" (score above
    `threshold`). Raises `UsageError` and `DataError` for what is wrong with the input.
    """
    if not config.pic_path:
        raise UsageError("name an image or a folder of images: --pic-path")
    device = pick_device(config.device)
    model, classes, _ = _trained_model(config, device)
    names = _display_names(config, classes)
    images = Annotations.unlabelled(*find_images(config.pic_path), classes)
    batches = _progress(_batches(config, images, device), 0, "images")
    dtype = precision(config.amp, device, training=False)
    [scores] = score([model], batches, _prepare(model, device), dtype)
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
    models: Iterable[nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    prepare: Prepare,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The scores that each of several models gives, in one pass over the batches.

    One (N, C) float32 tensor per model, on the host, values in [0, 1]. With `dtype` the forward
    passes run in that precision.
    """
    models = [model.eval() for model in models]
    parts: list[list[Tensor]] = [[] for _ in models]
    for images, _ in batches:
        images = prepare(images)
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            logits = [model(images) for model in models]
        for part, each in zip(parts, logits, strict=True):
            part.append(each.float().sigmoid().cpu())
    return [torch.cat(part) for part in parts]


def pick_device(name: str = "") -> torch.device:
    """The device of that name; without one, the first that is there of CUDA, MPS and the CPU.

    Raises `UsageError` for a device that is not there.
    """
    if not name:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if torch.backends.mps.is_available() else name
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
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


def provenance() -> dict[str, str]:
    """What a published number should say of itself: the command, the commit, the versions."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "versions": f"asl {__version__}, torch {torch.__version__}, timm {timm.__version__}",
    }


class _Run:
    """The folder of a training run: its settings, its log, its checkpoints."""

    def __init__(self, config: Config, classes: Sequence[str]) -> None:
        self.config, self.classes = config, classes
        self.folder = _run_folder(config)
        self.last, self.best = self.folder / "last.pt", self.folder / "best.pt"
        self.history: list[dict[str, float]] = []

    def start(self, training: Training) -> tuple[int, list[Tensor]]:
        """Begin, or go on where last.pt was written: the epoch, and the losses of its steps."""
        epoch, losses = self._restore(training) if self.config.resume else (0, [])
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.config.resume:
            for stale in (self.last, self.best):
                stale.unlink(missing_ok=True)
        with replacing(self.folder / "config.yaml") as file:
            file.write(self.config.to_yaml().encode())
        return epoch, losses

    def _restore(self, training: Training) -> tuple[int, list[Tensor]]:
        kept = checkpoint.load(self.last)
        differing = [
            f"{name}: {kept['config'].get(name)} then, {value} now"
            for name, value in asdict(self.config).items()
            if name not in _MAY_CHANGE and kept["config"].get(name) != value
        ]
        if differing:
            raise UsageError(
                f"{self.last} is of a run with other settings ({'; '.join(differing)})"
            )
        training.load_state_dict(kept["training"], kept)
        self.history = kept["history"]
        return kept["epoch"], list(kept["losses"].to(training.device))

    def save(self, training: Training, epoch: int, losses: Sequence[Tensor] = ()) -> None:
        """Write last.pt: `training` in `epoch` (from 0), after the steps that gave `losses`."""
        state = self._checkpoint(training)
        state |= {"training": training.state_dict(), "epoch": epoch}
        state["losses"] = torch.stack(list(losses)).cpu() if losses else torch.empty(0)
        checkpoint.save(self.last, state)

    def end_epoch(self, training: Training, row: dict[str, float]) -> None:
        """Log the figures of an epoch and write the checkpoints that it earned."""
        earlier = [_best_map(old) for old in self.history]
        self.history.append(row)
        with replacing(self.folder / "metrics.jsonl") as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in self.history)
        if training.running_prior is not None:
            write_prior(self.folder / "prior.csv", self.classes, training.running_prior.prior)
        if self.config.tensorboard:
            self._to_tensorboard(row)
        if "mAP_ema" in row and _best_map(row) > max(earlier, default=-1.0):
            checkpoint.save(self.best, self._checkpoint(training))
        self.save(training, int(row["epoch"]))
        print(report.epoch_line(row))

    def _checkpoint(self, training: Training) -> dict[str, Any]:
        row = next((row for row in reversed(self.history) if "mAP_ema" in row), None)
        regular_leads = row is not None and row["mAP_regular"] > row["mAP_ema"]
        return {
            **training.weights(),
            "best": "regular" if regular_leads else "ema",
            "num_classes": len(self.classes),
            "idx_to_class": dict(enumerate(self.classes)),
            "config": asdict(self.config),
            "history": self.history,
            "provenance": provenance(),
        }

    def _to_tensorboard(self, row: dict[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder)) as writer:
            for name in row.keys() - {"epoch"}:
                writer.add_scalar(name, row[name], int(row["epoch"]))


# Settings in which a resumed run may differ from what it was: what is computed stays the same, but
# for rounding where the device differs.
_MAY_CHANGE = (
    *("config", "data", "missing_images", "output", "overwrite", "resume"),
    *("workers", "device", "compile", "print_freq", "tensorboard"),
)


def _best_map(row: dict[str, float]) -> float:
    return max(row.get("mAP_ema", -1.0), row.get("mAP_regular", -1.0))


def _run_folder(config: Config) -> Path:
    """Where the run lives, or lived that is resumed; refuses to overwrite one unasked."""
    if config.output:
        folder = Path(config.output)
        # A run that was stopped while it estimated its prior has no checkpoint of its own yet.
        taken = (folder / "last.pt").exists() or (config.resume and (folder / "prior").exists())
    else:
        name = Path(config.config).stem or f"{config.dataset}_{config.model_name}"
        folders = [Path("runs", name), *(Path("runs", f"{name}-{n}") for n in range(2, 1000))]
        free = next(i for i, folder in enumerate(folders) if not folder.exists())
        taken = config.resume and free > 0
        folder = folders[free - taken]
    if config.resume and not taken:
        raise UsageError(f"there is no run to resume in {folder}")
    if taken and not (config.resume or config.overwrite):
        raise UsageError(f"{folder} holds a run: pass --resume, --overwrite or another --output")
    return folder


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
    config: Config, annotations: Annotations, device: torch.device, **more: Any
) -> Batches:
    return Batches(
        annotations,
        config.image_size,
        config.batch_size,
        seed=config.seed,
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
    return _on(device, model), tuple(names.values()), about


def _on(device: torch.device, model: nn.Module) -> nn.Module:
    # Channels last is the layout that convolutions are fastest in, on GPUs and CPUs alike.
    return model.to(device).to(memory_format=torch.channels_last)


def _prepare(model: nn.Module, device: torch.device) -> Prepare:
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in normalization(model))
    scale, shift = 1 / (255 * std), -mean / std

    def prepare(images: Tensor) -> Tensor:
        images = images.to(device, non_blocking=True)
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
    )


def _figures(scores: dict[str, Tensor], dataset: Annotations, config: Config) -> dict[str, float]:
    """What an epoch is judged by: mAP, CF1 and OF1 of every set of weights."""
    targets = dataset.dense()
    protocol = _protocol(dataset)
    figures = {}
    for name, table in scores.items():
        f1 = f1_scores(table, targets, config.threshold, protocol=protocol)
        figures[f"mAP_{name}"] = mean_average_precision(table, targets, protocol=protocol)
        figures |= {f"{which}_{name}": f1[which] for which in ("CF1", "OF1")}
    return figures


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


def _finite(losses: Sequence[Tensor], epoch: int) -> list[float]:
    """The losses of an epoch as numbers: waits for the device once, not once per step."""
    values: list[float] = torch.stack(list(losses)).tolist()
    for step, value in enumerate(values, start=1):
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at epoch {epoch + 1}, step {step}: lower --lr, or train with "
                "--amp off. The checkpoints hold the state before this epoch."
            )
    return values


@contextmanager
def _signals() -> Iterator[Callable[[Iterable[T]], Iterator[T]]]:
    """Turn SIGINT and SIGTERM into `Interrupted`, raised by the loop that the iterator is in.

    So a signal is heeded between two steps; a second one ends the process at once.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    def until_signal(items: Iterable[T]) -> Iterator[T]:
        for item in items:
            yield item
            if received:
                name = signal.Signals(received[0]).name
                raise Interrupted(received[0], f"stopped by {name}: --resume goes on from here")

    if threading.current_thread() is not threading.main_thread():
        yield until_signal
        return
    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield until_signal
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
