"""What train.py can be told."""

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from asl.config import Config, OptionalFloat, OptionalInt, Settings
from asl.data.settings import DataSettings, LabelSettings
from asl.errors import UsageError
from asl.evaluation.settings import FigureSettings
from asl.images.settings import AugmentSettings, ImageSettings
from asl.models.settings import DeviceSettings, NewModelSettings

# gamma_neg, gamma_pos, clip: the official training script's ASL; focal loss and cross-entropy are
# the same formula with equal gammas and without margin (ASL paper, section 2.2).
_ASYMMETRY = {"asl": (4.0, 0.0, 0.05), "focal": (2.0, 2.0, 0.0), "bce": (0.0, 0.0, 0.0)}
ESTIMATE = "estimate"  # `prior_path` where the prior is to be estimated first


class LossSettings(Settings):
    """The training loss, and what it makes of cells that are not annotated."""

    loss: Literal["asl", "focal", "bce"] = Field("asl", description="training loss")
    gamma_neg: OptionalFloat = Field(
        None, ge=0, description="focusing of the negatives; default: 4 for asl, 2 for focal"
    )
    gamma_pos: OptionalFloat = Field(
        None, ge=0, description="focusing of the positives; default: 0 for asl, 2 for focal"
    )
    clip: OptionalFloat = Field(
        None, ge=0, le=0.99, description="probability margin m of asl; default: 0.05"
    )
    adaptive_gamma: OptionalFloat = Field(
        None,
        gt=-1,
        le=0.99,
        description="gap of scores between positives and negatives towards which gamma_neg is "
        "moved",
    )
    adaptive_step: float = Field(0.005, gt=0, description="how fast adaptive_gamma moves it")
    unannotated: Literal["ignore", "negative", "selective"] = Field(
        "ignore",
        description="cells that are not annotated: no loss, that of a negative, or that of a "
        "negative but for classes and cells that are likely present (CSL)",
    )
    gamma_unann: OptionalFloat = Field(
        None, ge=0, description="their focusing; default: that of the negatives"
    )
    likelihood_topk: int = Field(
        5, ge=0, description="selective: cells per image, on average, that count as likely present"
    )
    prior_path: str = Field(
        "",
        description="selective: CSV of how frequent each class is (validate.py --estimate-prior), "
        "or the word estimate, to train a model that tells first",
    )
    prior_threshold: float = Field(
        0.5,
        ge=0,
        le=1,
        description="selective: classes more frequent than this are likely present",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        gamma_neg, gamma_pos, clip = self.asymmetry
        if self.loss == "focal" and (clip or gamma_neg != gamma_pos):
            raise UsageError("loss focal takes equal gamma_neg and gamma_pos and no clip")
        if self.loss == "bce" and (gamma_neg or gamma_pos or clip):
            raise UsageError("loss bce takes neither gamma_neg, gamma_pos nor clip")
        if self.clip is not None and 0 < self.clip < 1e-6:
            raise UsageError(f"clip is {self.clip}: a margin below 1e-6 is lost in rounding, use 0")
        if self.prior_path and self.unannotated != "selective":
            raise UsageError("prior_path has a meaning for unannotated selective alone")
        return self

    @property
    def asymmetry(self) -> tuple[float, float, float]:
        """(gamma_neg, gamma_pos, clip), with what the loss usually has where nothing was given."""
        usual = _ASYMMETRY[self.loss]
        given = (self.gamma_neg, self.gamma_pos, self.clip)
        neg, pos, clip = (u if g is None else g for u, g in zip(usual, given, strict=True))
        return neg, pos, clip


class StepSettings(Settings):
    """What one update of the weights is."""

    optimizer: Literal["adam", "adamw"] = Field(
        "adam", description="adam adds the decay to the gradient (official), adamw decouples it"
    )
    lr: float = Field(1e-4, gt=0, description="peak learning rate of the one-cycle schedule")
    weight_decay: float = Field(1e-4, ge=0, description="of weights with more than one dimension")
    epochs: int = Field(80, ge=1, description="length of the one-cycle schedule")
    pct_start: float = Field(
        0.2, gt=0, le=0.99, description="share of the schedule in which the learning rate rises"
    )
    ema_decay: float = Field(
        0.9997, ge=0, le=0.999999, description="decay per step of the averaged weights"
    )
    ema_warmup: bool = Field(
        False,
        description="let the decay grow from 0 over the first steps: for runs of few steps",
    )
    grad_clip: OptionalFloat = Field(None, gt=0, description="largest norm of the gradient")
    sync_bn: bool = Field(False, description="batch statistics of all processes, on GPUs")
    running_prior: bool = Field(
        False, description="keep the mean score of each class during training, in prior.csv"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of everything random")
    compile: bool = Field(False, description="compile the model with torch.compile")


class RunSettings(Settings):
    """How long a run lasts, where it is written, and how it is watched."""

    config: str = Field("", description="recipe: a YAML file of settings")
    output: str = Field(
        "", description="folder of the run; default: runs/<recipe>, numbered if taken"
    )
    stop_epoch: OptionalInt = Field(
        None, ge=1, description="stop after this many epochs, before the schedule is over"
    )
    val_every: int = Field(1, ge=1, description="validate every N epochs, and after the last")
    resume: str = Field(
        "",
        description="go on from the last checkpoint of the run folder; --resume FILE: else from "
        "that file",
    )
    checkpoint_every: str = Field(
        "",
        description="also write last.pt within an epoch: every N steps, or every Nmin minutes",
    )
    overwrite: bool = Field(False, description="start anew in a folder that already holds a run")
    deterministic: bool = Field(
        False,
        description="only operations that give the same bits again, on GPUs at the cost of speed",
    )
    profile: bool = Field(
        False, description="write a trace of a few steps to trace.json in the run folder"
    )
    print_freq: int = Field(100, ge=1, description="steps between looks at the loss")
    tensorboard: bool = Field(False, description="also log to TensorBoard in the run folder")

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
        return self

    @property
    def last_epoch(self) -> int:
        """How many epochs are trained."""
        return min(self.run.stop_epoch or self.step.epochs, self.step.epochs)

    def explicit(self) -> Self:
        """The same settings, with the numbers of the loss in place of "what it usually has"."""
        neg, pos, clip = self.loss.asymmetry
        return self.with_settings(gamma_neg=neg, gamma_pos=pos, clip=clip)
