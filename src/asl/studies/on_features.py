"""Trainings of heads on features that are computed once: hundreds in an hour."""

import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from asl.data.annotations import ABSENT, PRESENT, Annotations
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
from asl.images.settings import ImageSettings
from asl.metrics import mean_average_precision
from asl.models.heads import take_features
from asl.studies.plan import Study, StudyConfig, Trial, config_of
from asl.training.features import features_once
from asl.training.fit import new_training
from asl.training.other_losses import OneLabelLoss
from asl.training.settings import ESTIMATE, TrainConfig
from asl.training.step import Training

HELD_OUT = 5  # one image in so many decides on the learning rate
BATCH = 32  # images whose cells a loss is asked about together: some compare them
Labels = npt.NDArray[np.int8]
Place = tuple[str, str, int | None]  # an arm in a condition, and the part that is held out


def _nothing(training: Training) -> None:
    pass


class OnFeatures:
    """Trainings of heads on features that are computed once for each way to read the images.

    `rates` are the learning rates that were chosen already, by arm, condition and fold.
    """

    def __init__(
        self, study: Study, config: StudyConfig, rates: Mapping[Place, float] | None = None
    ) -> None:
        if not config.study.model_path:
            raise UsageError("features come from a trained backbone: name its file, --model-path")
        self._study, self._config = study, config
        self._device = pick_device(config.compute.device)
        base = config_of(study, config, next(study.plan.trials()))
        if study.plan.folds:
            base = base.with_settings(val_split=split_name(base.data, "train"))
        self._base = base
        train_set = self._labelled(base.labels)
        self._val_set = self._chosen(read_split(base.data, "val", classes=train_set.classes))
        if not study.plan.folds:
            check_apart(base.data, train_set, self._val_set)
        self._rates = {**(rates or {})}

    def _labelled(self, labels: LabelSettings) -> Annotations:
        """The images to train on with all their labels."""
        return self._read(labels.replace(simulate_partial=None, partial_seed=0))

    @cache  # noqa: B019 (lives as long as the study)
    def _read(self, labels: LabelSettings) -> Annotations:
        return self._chosen(read_split(self._base.data, "train", labels))

    def _chosen(self, images: Annotations) -> Annotations:
        if not self._study.plan.one_label:
            return images
        present = (images.dense() == PRESENT).sum(axis=1)
        return images.subset(np.flatnonzero(present == 1))

    @cache  # noqa: B019
    def _features(self, images: ImageSettings) -> tuple[torch.Tensor, torch.Tensor]:
        """The features of the images to train on, and of those to measure on."""
        base = self._base.with_settings(**dict(images), prior_path="")  # which may not be there yet
        train_set = self._labelled(base.labels)
        training = new_training(base, train_set, 1, self._device, resumed=False)
        train, val = features_once(base, training, train_set, self._val_set, iter)
        return train.features, val.features

    def __call__(self, trial: Trial) -> dict[str, Any]:
        """Train a head and measure it."""
        config = config_of(self._study, self._config, trial)
        train_set = self._labelled(config.labels)
        rows = np.arange(len(train_set))
        val_set, (_, val_features) = self._val_set, self._features(config.images)
        if trial.fold is not None:
            parts = stratified_parts(train_set, self._study.plan.folds or 1, seed=0)
            rows, held_out = (
                np.flatnonzero(parts != trial.fold),
                np.flatnonzero(parts == trial.fold),
            )
            val_set, val_features = val_set.subset(held_out), val_features[held_out]
        config, plan = self._with_rate(config, trial, train_set, rows), self._study.plan
        targets, history = val_set.dense(), list[float]()

        def record(training: Training) -> None:
            if plan.history or training.epoch == config.step.epochs:
                scores = scores_of(training, val_features)
                reached = mean_average_precision(scores, targets, protocol=protocol(val_set))
                history.append(reached)

        training = self._trained(config, train_set, rows, record)
        figures: dict[str, Any] = {"lr": config.step.lr, "mAP": {"": history[-1]}}
        if plan.history:
            figures["history"] = history
        if plan.one_label:
            likeliest = scores_of(training, val_features).argmax(dim=1).numpy()
            first = targets[np.arange(len(targets)), likeliest]
            figures["accuracy"] = 100 * float((first == PRESENT).mean())
        if plan.cells:
            known, features = self._known(config, train_set, rows)
            truth = train_set.subset(rows).dense()
            figures["cells"] = pulls(training, features, known.dense(), truth)
        return figures

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
            features = self._features(config.images)[0][held_out]

            def reached(rate: float) -> float:
                tried = config.with_settings(lr=rate, seed=0)
                scores = scores_of(self._trained(tried, train_set, learned), features)
                return mean_average_precision(scores, targets)

            self._rates[key] = max(self._study.plan.rates, key=reached)
        return config.with_settings(lr=self._rates[key])

    def _known(
        self, config: TrainConfig, train_set: Annotations, rows: npt.NDArray[np.int64]
    ) -> tuple[Annotations, torch.Tensor]:
        """What a training on these rows knows of the labels, and the features."""
        labels, known = config.labels, train_set.subset(rows)
        if labels.simulate_partial:
            known = simulate(known, labels.simulate_partial, labels.partial_seed)
        return known, self._features(config.images)[0][rows]

    def _trained(
        self,
        config: TrainConfig,
        train_set: Annotations,
        rows: npt.NDArray[np.int64],
        after_epoch: Callable[[Training], None] = _nothing,
    ) -> Training:
        """The training of a head on these rows, when it is over."""
        known, features = self._known(config, train_set, rows)
        if config.loss.prior_path != ESTIMATE:
            return self._on(config, known, features, after_epoch)
        first = config.with_settings(unannotated="ignore", prior_path="")
        prior = scores_of(self._on(first, known, features, _nothing), features).mean(0)
        with tempfile.NamedTemporaryFile(suffix=".csv") as file:
            write_prior(file.name, known.classes, prior)
            second = config.with_settings(prior_path=file.name)
            return self._on(second, known, features, after_epoch)

    def _on(
        self,
        config: TrainConfig,
        known: Annotations,
        features: torch.Tensor,
        after_epoch: Callable[[Training], None],
    ) -> Training:
        batches = FeatureBatches(
            known,
            features,
            config.images.batch_size,
            shuffle=True,
            seed=config.step.seed,
            window=config.augment.shuffle_window,
            device=self._device,
        )
        training = new_training(config, known, len(batches), self._device, resumed=True)
        for model in (training.model, training.ema.module):
            take_features(model)
        for _ in range(config.step.epochs):
            for batch in batches.epoch(training.epoch):
                training.step(batch.images.to(self._device), batch.targets.to(self._device))
            training.end_epoch()
            after_epoch(training)
        return training


@torch.inference_mode()
def scores_of(training: Training, features: torch.Tensor) -> torch.Tensor:
    """What the averaged weights of a head say of (N, F) features: (N, C), on the host."""
    one_label = isinstance(training.loss, OneLabelLoss)
    model = Scores(training.ema.module.eval(), one_label=one_label)
    said: torch.Tensor = model(features.to(training.device))
    return said.cpu()


def pulls(
    training: Training, features: torch.Tensor, known: Labels, truth: Labels
) -> dict[str, float]:
    """What a loss does to the cells that it takes for negatives, at the end of a training.

    Its pull on a cell is the size of its derivative by the logit of the averaged weights. `known`
    are the labels (N, C) that the training saw, and `truth` all of them. Cells that are present in
    truth, but not known to be, are hidden; those that are absent in truth are the others.

    "hidden" is their number for each image; "hidden_pull" and "absent_pull" are the mean pulls on
    the two kinds; "hidden_free" and "absent_free" are the shares of them in percent that the loss
    leaves alone, with a pull of less than a thousandth of its largest on any cell.
    """
    pull, model = [], training.ema.module.eval()
    targets = torch.from_numpy(known)
    for start in range(0, len(targets), BATCH):
        of, labels = features[start : start + BATCH], targets[start : start + BATCH]
        logits = model(of.to(training.device)).detach().requires_grad_()
        training.loss_of(logits, labels.to(training.device)).backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        pull.append(logits.grad.abs().cpu())
    pulled = torch.cat(pull).numpy()
    hidden, absent = (truth == PRESENT) & (known != PRESENT), truth == ABSENT
    figures = {"hidden": float(hidden.sum() / len(truth))}
    for name, cells in (("hidden", hidden), ("absent", absent)):
        of_cells = pulled[cells]
        figures[f"{name}_pull"] = float(of_cells.mean())
        figures[f"{name}_free"] = 100 * float((of_cells < pulled.max() / 1000).mean())
    return figures
