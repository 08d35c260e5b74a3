"""Trainings of heads on features that are computed once: hundreds in an hour."""

import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from asl.data.annotations import Annotations
from asl.data.partial import simulate
from asl.data.prior import write_prior
from asl.data.settings import LabelSettings
from asl.data.splits import check_apart, read_split, split_name
from asl.data.stratify import stratified_parts
from asl.distributed import pick_device
from asl.errors import UsageError
from asl.evaluation.average import Scores
from asl.evaluation.evaluate import protocol
from asl.images.features import FeatureBatches
from asl.metrics import mean_average_precision
from asl.models.heads import take_features
from asl.studies.plan import Study, StudyConfig, Trial, config_of
from asl.training.features import features_once
from asl.training.fit import new_training
from asl.training.settings import ESTIMATE, TrainConfig

HELD_OUT = 5  # one image in so many decides on the learning rate


class OnFeatures:
    """Trainings of heads on features that are computed when this is made."""

    def __init__(self, study: Study, config: StudyConfig) -> None:
        if not config.study.model_path:
            raise UsageError("features come from a trained backbone: name its file, --model-path")
        self._study, self._config = study, config
        self._device = pick_device(config.compute.device)
        base = config_of(study, config, next(study.plan.trials()))
        if study.plan.folds:
            base = base.with_settings(val_split=split_name(base.data, "train"))
        self._data = base.data
        train_set = self._labelled(base.labels.replace(simulate_partial=None))
        val_set = read_split(base.data, "val", classes=train_set.classes)
        if not study.plan.folds:
            check_apart(base.data, train_set, val_set)
        plain = base.with_settings(prior_path="")  # which may have to be estimated first
        training = new_training(plain, train_set, 1, self._device, resumed=False)
        tables = features_once(base, training, train_set, val_set, iter)
        self._features = tables[0].features
        self._val = val_set, tables[1].features
        self._rates: dict[tuple[str, str, int | None], float] = {}

    @cache  # noqa: B019 (lives as long as the study)
    def _labelled(self, labels: LabelSettings) -> Annotations:
        return read_split(self._data, "train", labels)

    def __call__(self, trial: Trial) -> dict[str, Any]:
        """Train a head and measure it."""
        config = config_of(self._study, self._config, trial)
        train_set = self._labelled(config.labels.replace(simulate_partial=None, partial_seed=0))
        rows = np.arange(len(train_set))
        val_set, val_features = self._val
        if trial.fold is not None:
            parts = stratified_parts(train_set, self._study.plan.folds or 1, seed=0)
            rows, held_out = (
                np.flatnonzero(parts != trial.fold),
                np.flatnonzero(parts == trial.fold),
            )
            val_set, val_features = val_set.subset(held_out), val_features[held_out]
        config = self._with_rate(config, trial, train_set, rows)
        scores = self._scores(config, train_set, rows, val_features)
        mean = mean_average_precision(scores, val_set.dense(), protocol=protocol(val_set))
        return {"lr": config.step.lr, "mAP": {"": mean}}

    def _with_rate(
        self, config: TrainConfig, trial: Trial, train_set: Annotations, rows: npt.NDArray[np.int64]
    ) -> TrainConfig:
        """The learning rate that is best on a fifth of what is trained on, with the first seed."""
        if not self._study.plan.rates:
            return config
        key = trial.arm, trial.condition, trial.fold
        if key not in self._rates:
            parts = stratified_parts(train_set.subset(rows), HELD_OUT, seed=0)
            learned, held_out = rows[parts != 0], rows[parts == 0]
            targets = train_set.subset(held_out).dense()

            def reached(rate: float) -> float:
                tried = config.with_settings(lr=rate, seed=0)
                scores = self._scores(tried, train_set, learned, self._features[held_out])
                return mean_average_precision(scores, targets)

            self._rates[key] = max(self._study.plan.rates, key=reached)
        return config.with_settings(lr=self._rates[key])

    def _scores(
        self,
        config: TrainConfig,
        train_set: Annotations,
        rows: npt.NDArray[np.int64],
        features: torch.Tensor,
    ) -> torch.Tensor:
        """What a head that was trained on these rows says of other features."""
        labelled = train_set.subset(rows)
        if config.labels.simulate_partial:
            labelled = simulate(
                labelled, config.labels.simulate_partial, config.labels.partial_seed
            )
        own = self._features[rows]
        if config.loss.prior_path != ESTIMATE:
            return self._trained(config, labelled, own)(features)
        first = config.with_settings(unannotated="ignore", prior_path="")
        prior = self._trained(first, labelled, own)(own).mean(0)
        with tempfile.NamedTemporaryFile(suffix=".csv") as file:
            write_prior(file.name, labelled.classes, prior)
            second = config.with_settings(prior_path=file.name)
            return self._trained(second, labelled, own)(features)

    def _trained(
        self, config: TrainConfig, labelled: Annotations, features: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The averaged weights of a head that was trained on these features: features to scores."""
        batches = FeatureBatches(
            labelled,
            features,
            config.images.batch_size,
            shuffle=True,
            seed=config.step.seed,
            device=self._device,
        )
        training = new_training(config, labelled, len(batches), self._device, resumed=True)
        averaged = training.ema.module
        for model in (training.model, averaged):
            take_features(model)
        for _ in range(config.step.epochs):
            for batch in batches.epoch(training.epoch):
                training.step(batch.images.to(self._device), batch.targets.to(self._device))
            training.end_epoch()
        model = Scores(averaged.eval(), one_label=config.loss.loss == "asl_single")

        @torch.inference_mode()
        def scores(of: torch.Tensor) -> torch.Tensor:
            said: torch.Tensor = model(of.to(self._device))
            return said.cpu()

        return scores
