"""What a study is: arms that are compared, in conditions that they share, over seeds and folds."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

import tyro
from pydantic import Field, model_validator

from asl.config import Config, OptionalInt, Settings, read_recipe, read_yaml
from asl.errors import UsageError
from asl.models.settings import DeviceSettings
from asl.training.settings import LossSettings, TrainConfig

VARIED = ("seed", "data", "model_path", "output", "resume", "overwrite")  # by the study itself
ON_FEATURES = ("folds", "rates", "one_label", "cells", "history")  # what heads alone can be asked


@dataclass(frozen=True)
class Trial:
    """One training of a study."""

    arm: str
    condition: str
    seed: int
    fold: int | None = None

    @property
    def name(self) -> str:
        """What its files are called."""
        fold = [] if self.fold is None else [f"fold{self.fold}"]
        return "_".join([*filter(None, [self.condition]), self.arm, str(self.seed), *fold])


class Plan(Settings):
    """A file of configs/studies: everything but the data and where it runs.

    Settings are those of train.py: the recipe's, then the study's, the condition's and the arm's.
    The last wins, and one that names a loss drops all that was said of the loss before it. A recipe
    with cache_features makes a study of heads on features that are computed once; any other is
    trained end to end.
    """

    question: str
    """what is asked"""
    recipe: str
    """a file beside the folder of the study"""
    settings: dict[str, Any] = Field(default_factory=dict)
    """what all trainings have"""
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """what is compared, by name: the first with all others"""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """in place of arms: one for every combination of these values of one or two settings"""
    conditions: dict[str, dict[str, Any]] = Field({"": {}}, min_length=1)
    """in what it is compared"""
    seeds: Annotated[int, Field(ge=1)] = 3
    """how many: of the head at the start, the order of the images, and the labels that are hidden
    or changed"""
    folds: Annotated[OptionalInt, Field(ge=2)] = None
    """train on all parts but one of the training split, measure on that one, for each; default:
    measure on the validation split"""
    rates: tuple[float, ...] = ()
    """learning rates to choose from, for each arm on a fifth of what is trained on"""
    views: dict[str, str] = Field({"": ""}, min_length=1)
    """views that scores are averaged over (--tta), by name"""
    one_label: bool = False
    """only the images with exactly one label, and beside mAP how often it is ranked first"""
    cells: bool = False
    """also what the loss does to the training cells whose label was hidden or changed"""
    history: bool = False
    """also mAP after each epoch"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.arms) == bool(self.grid):
            raise UsageError("a study compares arms or a grid: name one of them")
        if len(self.grid) > 2:
            raise UsageError("a grid is drawn as a map: it has one or two settings")
        return self

    @cached_property
    def compared(self) -> dict[str, dict[str, Any]]:
        """The arms by name, be they listed or those of the grid."""
        if self.arms:
            return self.arms
        combined = (
            dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())
        )
        return {", ".join(f"{n} {x}" for n, x in arm.items()): arm for arm in combined}

    def trials(self) -> Iterator[Trial]:
        """All trainings. Seed by seed: what there is of an unfinished study is balanced."""
        folds = [None] if self.folds is None else range(self.folds)
        for seed, fold, condition, arm in product(
            range(self.seeds), folds, self.conditions, self.compared
        ):
            yield Trial(arm, condition, seed, fold)


@dataclass(frozen=True)
class Study:
    """A plan with the name of its file, and the settings of its recipe."""

    name: str
    plan: Plan
    recipe: dict[str, Any]

    def settings(self, condition: str = "", arm: str = "") -> dict[str, Any]:
        """What train.py would be told, but for what varies from training to training."""
        plan, settings = self.plan, self.recipe
        for own in (plan.settings, plan.conditions.get(condition, {}), plan.compared.get(arm, {})):
            if "loss" in own:  # the numbers of another loss mean nothing to this one
                of_loss = LossSettings.model_fields.keys()
                settings = {name: settings[name] for name in settings if name not in of_loss}
            settings = {**settings, **own}
        return settings

    @property
    def on_features(self) -> bool:
        """Whether heads are trained on features that are computed once."""
        return bool(self.settings().get("cache_features"))


def read_study(path: str | Path) -> Study:
    """The study of a YAML file. Raises `UsageError` that names the file, and the arm that is wrong.

    Relative to the file, the recipe lies in the folder above: configs/ holds studies/.
    """
    path = Path(path)
    try:
        plan = Plan(**{str(name): value for name, value in read_yaml(path).items()})
    except UsageError as error:
        where = "" if str(path) in str(error) else f"{path}: "
        raise UsageError(f"{where}{error}") from None
    recipe = read_recipe(path.parent.parent / plan.recipe, TrainConfig)
    study = Study(path.stem, plan, recipe)
    for condition, arm in product(plan.conditions, plan.compared):
        settings = study.settings(condition, arm)
        where = f"{path}: arm {arm!r}" + f", condition {condition!r}" * bool(condition)
        for name in VARIED:
            if name in settings:
                raise UsageError(f"{where}: {name} is for the study itself to set: drop it")
        try:
            TrainConfig.of(**{**settings, "cache_dir": "named on the command line"})
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
    if study.on_features and set(plan.views.values()) != {""}:
        raise UsageError(f"{path}: cached features are of one view: drop views")
    alone = [name for name in ON_FEATURES if getattr(plan, name)]
    if alone and not study.on_features:
        named = " and ".join(alone)
        raise UsageError(f"{path}: {named} is for studies on features (cache_features) alone")
    return study


class StudySettings(Settings):
    """Which study, and on what."""

    study: Annotated[str, tyro.conf.Positional] = ""
    """its file, of configs/studies"""
    data: Annotated[str, tyro.conf.Positional] = ""
    """folder of the data set"""
    model_path: str = ""
    """weights to start from"""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """processes that load images"""
    cache_dir: str = ""
    """folder to keep squished images in"""
    output: str = "results/studies"
    """where its figures go: NAME.json, NAME.md and NAME.png"""
    tables: bool = False
    """only show what is there already"""


class StudyConfig(Config):
    """All settings of study.py."""

    study: StudySettings = StudySettings()
    compute: DeviceSettings = DeviceSettings()


def config_of(study: Study, config: StudyConfig, trial: Trial, **more: Any) -> TrainConfig:
    """What train.py would be told for this training."""
    settings = study.settings(trial.condition, trial.arm)
    if settings.get("simulate_partial"):
        settings["partial_seed"] = trial.seed
    wanted, compute = config.study, config.compute
    return TrainConfig.of(
        **{**settings, "data": wanted.data, "model_path": wanted.model_path},
        **{"workers": wanted.workers, "cache_dir": wanted.cache_dir},
        **{"device": compute.device, "amp": compute.amp},
        seed=trial.seed,
        **more,
    )
