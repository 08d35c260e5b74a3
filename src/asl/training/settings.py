"""What train.py can be told."""

import re
from typing import Annotated, Literal, Self

import tyro
from pydantic import Field, model_validator

from asl.config import Config, OptionalFloat, OptionalInt, Settings
from asl.data.settings import DataSettings, LabelSettings
from asl.errors import UsageError
from asl.evaluation.settings import FigureSettings
from asl.images.settings import AugmentSettings, ImageSettings
from asl.models.settings import DeviceSettings, NewModelSettings

# What acts on a backbone that is trained, and would do nothing to a frozen one.
_OF_A_BACKBONE = ("head_lr_scale", "layer_decay", "checkpoint_activations", "sync_bn")
# gamma_neg, gamma_pos, clip: the official training script's ASL; focal loss and cross-entropy are
# the same formula with equal gammas and without margin (ASL paper, section 2.2).
_ASYMMETRY = {
    **{"asl": (4.0, 0.0, 0.05), "focal": (2.0, 2.0, 0.0), "bce": (0.0, 0.0, 0.0)},
    "asl_single": (4.0, 0.0, 0.0),  # that of the official class
}
# What some losses alone can be told.
OF_CELLS = ("asl", "focal", "bce")
_TAKEN_BY = {
    **dict.fromkeys(["adaptive_gamma", "unannotated", "gamma_unann"], OF_CELLS),
    "poly_epsilon": ("poly",),
    "hill_lamb": ("hill",),
    "splc_tau": ("splc",),
    "logit_margin": ("hill", "splc"),
}
# "poly", "zlpr", "db" and "twoway" by the names that timm gives them.
Loss = Literal["asl", "focal", "bce", "asl_single", "poly", "zlpr", "db", "twoway", "hill", "splc"]
ESTIMATE = "estimate"  # `prior_path` where the prior is to be estimated first


class LossSettings(Settings):
    """The training loss, and what it makes of cells that are not annotated."""

    loss: Loss = "asl"
    """training loss; asl_single: for images with one label each; hill, splc: for missing labels"""
    gamma_neg: Annotated[OptionalFloat, Field(ge=0)] = None
    """focusing of the negatives; default: 4 for asl and asl_single, 2 for focal"""
    gamma_pos: Annotated[OptionalFloat, Field(ge=0)] = None
    """focusing of the positives; default: 0 for asl and asl_single, 2 for focal"""
    clip: Annotated[OptionalFloat, Field(ge=0, le=0.99)] = None
    """probability margin m of asl; default: 0.05"""
    adaptive_gamma: Annotated[OptionalFloat, Field(gt=-1, le=0.99)] = None
    """gap of scores between positives and negatives towards which gamma_neg is moved"""
    adaptive_step: Annotated[float, Field(gt=0)] = 0.005
    """how fast adaptive_gamma moves it"""
    unannotated: Literal["ignore", "negative", "selective"] = "ignore"
    """cells that are not annotated: no loss, that of a negative, or that of a negative but for
    classes and cells that are likely present (CSL)"""
    gamma_unann: Annotated[OptionalFloat, Field(ge=0)] = None
    """their focusing; default: that of the negatives"""
    likelihood_topk: Annotated[OptionalFloat, Field(ge=0)] = None
    """selective: cells per image, on average, that count as likely present; below 1: their share of
    the cells that are not annotated; default: the official 5, of fewer than 80 classes a
    sixteenth of those cells"""
    prior_path: str = ""
    """selective: CSV of how frequent each class is (validate.py --estimate-prior), or the word
    estimate, to train a model that tells first"""
    prior_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """selective: classes more frequent than this are likely present"""
    poly_epsilon: Annotated[float, Field(ge=-1)] = 2.0
    """poly: weight of its term 1 - p; below -1 it would pay to be wrong"""
    hill_lamb: Annotated[float, Field(ge=1)] = 1.5
    """hill: lambda; the smaller, the less a negative with a high score counts"""
    splc_tau: Annotated[float, Field(ge=0, le=1)] = 0.6
    """splc: score above which a negative is taken for a positive, from the second epoch on"""
    logit_margin: Annotated[float, Field(ge=0)] = 1.0
    """hill, splc: what the logits of the positives lose"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        gamma_neg, gamma_pos, clip = self.asymmetry
        if self.loss == "focal" and (clip or gamma_neg != gamma_pos):
            raise UsageError("loss focal takes equal gamma_neg and gamma_pos and no clip")
        if self.loss == "asl_single" and clip:
            raise UsageError("loss asl_single takes no clip")
        asymmetric = self.loss in ("asl", "focal", "asl_single")
        if not asymmetric and (gamma_neg or gamma_pos or clip):
            raise UsageError(f"loss {self.loss} takes neither gamma_neg, gamma_pos nor clip")
        for name, losses in _TAKEN_BY.items():
            usual = type(self).model_fields[name].default
            if self.loss not in losses and getattr(self, name) != usual:
                raise UsageError(f"{name} has a meaning for loss {' and '.join(losses)} alone")
        if self.clip is not None and 0 < self.clip < 1e-6:
            raise UsageError(f"clip is {self.clip}: a margin below 1e-6 is lost in rounding, use 0")
        if self.prior_path and self.unannotated != "selective":
            raise UsageError("prior_path has a meaning for unannotated selective alone")
        return self

    @property
    def asymmetry(self) -> tuple[float, float, float]:
        """(gamma_neg, gamma_pos, clip), with what the loss usually has where nothing was given."""
        usual = _ASYMMETRY.get(self.loss, (0.0, 0.0, 0.0))
        given = (self.gamma_neg, self.gamma_pos, self.clip)
        neg, pos, clip = (u if g is None else g for u, g in zip(usual, given, strict=True))
        return neg, pos, clip


class StepSettings(Settings):
    """What one update of the weights is."""

    optimizer: Literal["adam", "adamw"] = "adam"
    """adam adds the decay to the gradient (official), adamw decouples it"""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """peak learning rate of the one-cycle schedule"""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """of weights with more than one dimension"""
    head_lr_scale: Annotated[float, Field(gt=0)] = 1.0
    """learning rate of the head, as a multiple of that of the backbone"""
    layer_decay: Annotated[OptionalFloat, Field(gt=0, le=1)] = None
    """learning rate of each layer of the backbone, as a multiple of that of the layer behind it"""
    freeze: Literal["none", "backbone"] = "none"
    """backbone: train the head alone; running statistics stay as they are too"""
    cache_features: bool = False
    """with a frozen backbone: compute its features of each image once, and keep them in memory"""
    epochs: Annotated[int, Field(ge=1)] = 80
    """length of the one-cycle schedule"""
    pct_start: Annotated[float, Field(gt=0, le=0.99)] = 0.2
    """share of the schedule in which the learning rate rises"""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """batches that an update is made from, one after the other: as one of N times the size"""
    checkpoint_activations: bool = False
    """compute activations again in the backward pass: less memory, one forward pass more"""
    ema_decay: Annotated[float, Field(ge=0, le=0.999999)] = 0.9997
    """decay per step of the averaged weights"""
    ema_warmup: bool = False
    """let the decay grow from 0 over the first steps: for runs of few steps"""
    grad_clip: Annotated[OptionalFloat, Field(gt=0)] = None
    """largest norm of the gradient"""
    sync_bn: bool = False
    """batch statistics of all processes, on GPUs"""
    running_prior: bool = False
    """keep the mean score of each class during training, in prior.csv"""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """of everything random"""
    compile: bool = False
    """compile the model with torch.compile"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.compile and self.checkpoint_activations:
            raise UsageError(
                "compile decides itself what is computed again: drop checkpoint_activations"
            )
        fields = type(self).model_fields
        idle = [name for name in _OF_A_BACKBONE if getattr(self, name) != fields[name].default]
        if idle and self.freeze == "backbone":
            raise UsageError(f"a frozen backbone has no use for {' and '.join(idle)}: drop that")
        return self


class RunSettings(Settings):
    """How long a run lasts, where it is written, and how it is watched."""

    config: str = ""
    """recipe: a YAML file of settings"""
    output: str = ""
    """folder of the run; default: runs/<recipe>, numbered if taken"""
    stop_epoch: Annotated[OptionalInt, Field(ge=1)] = None
    """stop after this many epochs, before the schedule is over"""
    val_every: Annotated[int, Field(ge=1)] = 1
    """validate every N epochs, and after the last"""
    resume: str = ""
    """go on from the last checkpoint of the run folder; --resume FILE: else from that file"""
    checkpoint_every: str = ""
    """also write last.pt within an epoch: every N steps, or every Nmin minutes"""
    dry_run: bool = False
    """only say what the run would need: memory, disk, steps; writes nothing, but for shards that it
    fetches"""
    overwrite: bool = False
    """start anew in a folder that already holds a run"""
    deterministic: bool = False
    """only operations that give the same bits again, on GPUs at the cost of speed"""
    profile: bool = False
    """write a trace of a few steps to trace.json in the run folder"""
    patience: Annotated[OptionalInt, Field(ge=1)] = None
    """stop when the best mAP is this many epochs old"""
    reference: str = ""
    """print beside the mAP what runs like this one reached: a file of results/reference, by name"""
    print_freq: Annotated[int, Field(ge=1)] = 100
    """steps between looks at the loss, each a line in steps.jsonl"""
    tensorboard: bool = False
    """also log to TensorBoard in the run folder"""
    wandb: Annotated[str, tyro.conf.arg(metavar="PROJECT")] = ""
    """also log to this project of Weights & Biases (requirements-wandb.txt)"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        every = self.checkpoint_every
        if every and not re.fullmatch(r"[1-9][0-9]{0,8}(min)?", every):
            raise UsageError(f"checkpoint_every is {every!r}: steps (500) or minutes (10min)")
        return self


class TrainConfig(Config):
    """All settings of train.py; their defaults are the official training script's COCO recipe."""

    data: DataSettings = DataSettings()
    labels: LabelSettings = LabelSettings()
    images: ImageSettings = ImageSettings()
    augment: AugmentSettings = AugmentSettings()
    model: NewModelSettings = NewModelSettings()
    loss: LossSettings = LossSettings()
    step: StepSettings = StepSettings()
    evaluation: FigureSettings = FigureSettings()
    run: RunSettings = RunSettings()
    compute: DeviceSettings = DeviceSettings()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model.pretrained and self.model.model_path:
            raise UsageError("model_path and pretrained both name weights to start from: drop one")
        if (self.augment.mixup or self.augment.cutmix) and self.loss.loss not in OF_CELLS:
            raise UsageError(
                f"loss {self.loss.loss} takes no soft labels, and mixup and cutmix make such"
            )
        if self.loss.loss == "twoway" and self.step.accumulate > 1:
            raise UsageError(
                "loss twoway compares the images of a batch: several batches do not add up to a "
                "larger one, drop accumulate"
            )
        if self.loss.loss == "asl_single" and self.step.running_prior:
            raise UsageError("running_prior is for losses of several labels, not for asl_single")
        if self.model.drop_path and self.step.freeze == "backbone":
            raise UsageError("a frozen backbone has no use for drop_path: drop that")
        needed = {
            **{"freeze": "backbone", "augment": "none", "bad_images": "error"},
            **{"mixup": 0, "cutmix": 0},
        }
        flat = self.flat()
        lacking = [f"{name} {value}" for name, value in needed.items() if flat[name] != value]
        if self.step.cache_features and lacking:
            raise UsageError(
                "cache_features needs images whose features never change: "
                f"it goes with {' and '.join(lacking)} alone"
            )
        return self

    @property
    def last_epoch(self) -> int:
        """How many epochs are trained."""
        return min(self.run.stop_epoch or self.step.epochs, self.step.epochs)

    def explicit(self) -> Self:
        """The same settings, with the numbers of the loss in place of "what it usually has"."""
        neg, pos, clip = self.loss.asymmetry
        return self.with_settings(gamma_neg=neg, gamma_pos=pos, clip=clip)
