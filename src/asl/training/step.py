"""One training step: forward, loss, backward, update, average."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from itertools import chain
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from asl.distributed import precision, rank, summed, world_size
from asl.errors import TrainingError, UsageError
from asl.models.heads import freeze_backbone, heads_of
from asl.robust_losses import SPLC
from asl.training.prior import RunningPrior
from asl.training.settings import StepSettings


class Training:
    """What a step changes: the model, its average, the optimizer, the schedule, the loss scale.

    A step is one update of the weights, from `settings.accumulate` batches. `steps` counts the
    steps so far, `epoch` is the number of the epoch from 0, and `losses` are those of its steps,
    summed over classes and images: 0-d, on the device. `gradient_norms` are as many, where
    gradients are clipped: their norms before that.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        settings: StepSettings,
        *,
        batches_per_epoch: int,
        device: torch.device,
        amp: str = "off",
    ) -> None:
        self.model, self.device, self.settings = model, device, settings
        self.batches_per_epoch = batches_per_epoch
        if settings.freeze == "backbone":
            freeze_backbone(model)
        self._trained = trained_parts(model, settings)
        self._distributed = None
        if world_size() > 1:
            self._distributed = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.forward: nn.Module = self._distributed or model
        if settings.compile:
            self.forward = torch.compile(self.forward)  # type: ignore[assignment]
        self.loss = loss.to(device)
        self.optimizer = create_optimizer(model, settings)
        steps_per_epoch = -(-batches_per_epoch // settings.accumulate)
        self.schedule = create_schedule(self.optimizer, settings, steps_per_epoch)
        self.precision = precision(amp, device, training=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.ema = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=settings.ema_warmup)
        # The tensors are listed once. timm's own update builds both state dicts in every step, and
        # that takes as long as the average itself.
        averaged = trained_parts(self.ema.module, settings)
        self._averages, self._sources = map(_floating, (averaged, self._trained))
        self.running_prior: RunningPrior | None = None
        if settings.running_prior:
            num_classes: int = model.num_classes  # type: ignore[assignment]  # timm's models say
            self.running_prior = RunningPrior(num_classes).to(device)
        self._seen_twice = list[_BatchNorm]()
        if settings.checkpoint_activations:
            checkpoint_activations(model)
            self._seen_twice = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
        self.steps = self.epoch = self._batches = 0  # _batches: of the step that is being taken
        self.losses: list[Tensor] = []
        self.gradient_norms: list[Tensor] = []

    @property
    def between_steps(self) -> bool:
        """Whether all batches so far are in the weights."""
        return self._batches == 0

    @property
    def batches(self) -> int:
        """How many batches of the epoch are in the weights."""
        steps = len(self.losses) - (not self.between_steps)
        return min(steps * self.settings.accumulate, self.batches_per_epoch)

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        """Take this rank's normalised images (B, 3, S, S) and targets (B, C) into a step.

        A model that takes features (`heads.take_features`) is given those, (B, F).

        The last of `settings.accumulate` batches, or of an epoch, ends it: the weights are updated
        by the gradient of all of its batches together.

        Returns the loss, summed over classes and the batches of all ranks: 0-d, detached, on the
        device. Nothing here waits for the device.
        """
        if self.between_steps:
            self.losses.append(torch.zeros((), device=self.device))
        self._seed()
        self._batches += 1
        last = (
            self._batches == self.settings.accumulate
            or self.batches + self._batches == self.batches_per_epoch
        )
        for part in self._trained:
            if not part.training:  # to ask is free, to tell every layer takes a millisecond
                part.train()
        # Only the last backward pass of a step sums the gradients over the ranks.
        with self._distributed.no_sync() if self._distributed and not last else nullcontext():
            amp = self.precision is not None
            with torch.autocast(self.device.type, self.precision, enabled=amp):
                logits = self.forward(images)
            logits = logits[: len(targets)]  # there may be fewer targets than images: see `Batch`
            loss = self.loss_of(logits, targets)
            # The loss is a sum over images, and DistributedDataParallel averages over the ranks.
            with _statistics_kept(self._seen_twice):
                self.scaler.scale(loss * world_size()).backward()  # type: ignore[no-untyped-call]
        if self.running_prior is not None:
            self.running_prior.update(logits)
        loss = summed(loss.detach())
        self.losses[-1] = self.losses[-1] + loss
        if last:
            self._update()
        return loss

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch in the present epoch, summed over images and classes: 0-d."""
        # The loss that changes with the epoch is told its number. It has no state of its own, so a
        # run that goes on needs nothing else.
        epoch = (self.epoch,) if isinstance(self.loss, SPLC) else ()
        loss: Tensor = self.loss(logits, targets, *epoch)
        return loss

    def _update(self) -> None:
        if self.settings.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
            self.gradient_norms.append(norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.steps += 1
        self._batches = 0
        self.average()

    def _seed(self) -> None:
        # What dropout draws depends on these four alone: a checkpoint needs no generator.
        source = np.random.SeedSequence([self.settings.seed, self.steps, rank(), self._batches])
        number = int(source.generate_state(1)[0])
        # torch.manual_seed seeds accelerators too, and on a machine without one it first notes
        # down where it was called from: a quarter of the step of a small head.
        seed = torch.default_generator if self.device.type == "cpu" else torch
        seed.manual_seed(number)

    @torch.no_grad()
    def average(self) -> None:
        """Move the averaged parameters and running statistics towards the present ones."""
        # timm counts steps for the warm-up only: given them without one, it skips the first.
        decay = self.ema.get_decay(self.steps if self.ema.use_warmup else None)
        torch._foreach_lerp_(self._averages, self._sources, 1 - decay)

    def end_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch += 1
        self.losses, self.gradient_norms = [], []

    def finite_losses(self) -> list[float]:
        """The losses of this epoch as numbers. It waits for the device: once, not once per step.

        Raises `TrainingError` where one is not finite, or the loss scale of float16 has collapsed.
        """
        if not self.losses:
            return []
        values: list[float] = torch.stack(self.losses).tolist()
        scale = f", with the loss scale at {self.scaler.get_scale():g}" * self.scaler.is_enabled()
        for step, value in enumerate(values, start=1):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is {value} at epoch {self.epoch + 1}, step {step}{scale}: lower "
                    "--lr, or train with --amp off. The checkpoints hold the state before that."
                )
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise TrainingError(
                f"epoch {self.epoch + 1}: gradients overflow float16 again and again, the last of "
                "more than 16 steps without an update: lower --lr, or train with --amp bf16 or off"
            )
        return values

    @property
    def lr(self) -> float:
        """The learning rate of the next step, before `head_lr_scale` and `layer_decay`."""
        first = self.optimizer.param_groups[0]
        return float(first["lr"] * (self.settings.lr / first["max_lr"]))

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The averaged and the regular state dict, as "ema" and "regular"."""
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
        schedule = dict(state["schedule"])
        if schedule["total_steps"] < self.schedule.total_steps:
            # Fewer processes may have a last batch that more of them left out.
            del schedule["total_steps"], schedule["_schedule_phases"]
        self.schedule.load_state_dict(schedule)
        self.scaler.load_state_dict(state["scaler"])
        self.loss.load_state_dict(state["loss"])
        if self.running_prior is not None:
            self.running_prior.load_state_dict(state["running_prior"])
        self.steps = state["steps"]


def trained_parts(model: nn.Module, settings: StepSettings) -> list[nn.Module]:
    """What of a model is trained: all of it, or its heads alone."""
    return heads_of(model) if settings.freeze == "backbone" else [model]


def _floating(parts: Iterable[nn.Module]) -> list[Tensor]:
    """What of the parts can be averaged."""
    tensors = chain.from_iterable(part.state_dict().values() for part in parts)
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def checkpoint_activations(model: nn.Module) -> None:
    """Let a timm model compute most of its activations again in the backward pass, to save memory.

    Raises `UsageError` for a model that cannot.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        config: Any = model.pretrained_cfg
        raise UsageError(
            f"{config['architecture']} cannot checkpoint its activations: timm has no code for it"
        ) from None


@contextmanager
def _statistics_kept(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Inside the block these layers, which see a batch for the second time, count it no more."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def create_optimizer(model: nn.Module, settings: StepSettings) -> torch.optim.Optimizer:
    """Adam or AdamW with the official parameter groups: no decay of biases and 1-d parameters.

    With `head_lr_scale` and `layer_decay` each of the two becomes one group per learning rate.
    Raises `UsageError` for a model in which timm knows no layers.
    """
    scales = _lr_scales(model, settings)
    groups: dict[tuple[bool, float], list[Tensor]] = {(False, 1.0): [], (True, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias")
            groups.setdefault((decays, scales.get(parameter, 1.0)), []).append(parameter)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(
        [
            {
                "params": groups[decays, scale],
                "weight_decay": settings.weight_decay if decays else 0.0,
                "lr": settings.lr * scale,
            }
            for decays, scale in sorted(groups)
        ],
        lr=settings.lr,
        fused=True,
    )


def _lr_scales(model: nn.Module, settings: StepSettings) -> dict[Tensor, float]:
    """The learning rate of parameters as a multiple of `settings.lr`, where it may be another."""
    scales = dict[Tensor, float]()
    if settings.layer_decay is not None:
        for group in param_groups_layer_decay(model, layer_decay=settings.layer_decay):
            scales |= dict.fromkeys(group["params"], group["lr_scale"])
        if settings.layer_decay < 1 and len(set(scales.values())) < 2:
            raise UsageError(
                f"{type(model).__name__} has no layer_decay: timm does not know its layers"
            )
    if settings.head_lr_scale != 1:
        for head in heads_of(model):
            for parameter in head.parameters():
                scales[parameter] = scales.get(parameter, 1.0) * settings.head_lr_scale
    return scales


def create_schedule(
    optimizer: torch.optim.Optimizer, settings: StepSettings, steps_per_epoch: int
) -> torch.optim.lr_scheduler.OneCycleLR:
    """One cycle over all `epochs`, even where a run stops earlier (official training script)."""
    total = settings.epochs * steps_per_epoch
    # torch divides by zero where the rise is exactly one step long.
    one_step = math.isclose(settings.pct_start * total, 1)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=total,
        pct_start=1.001 / total if one_step else settings.pct_start,
    )
