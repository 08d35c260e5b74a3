"""The trainings of a study: each is done once, and its figures are kept in a file of its own."""

import hashlib
import json
import shlex
import time
from pathlib import Path
from typing import Any

from asl.atomic import write_result
from asl.config import RESUME_LAST
from asl.distributed import launched
from asl.errors import DataError, UsageError
from asl.evaluation.evaluate import evaluate
from asl.evaluation.provenance import provenance
from asl.evaluation.settings import ValidateConfig
from asl.models.zoo import is_name
from asl.studies.on_features import OnFeatures
from asl.studies.plan import Study, StudyConfig, Trial, config_of
from asl.training.fit import fit

Figures = dict[str, Any]
RUNS = Path("runs", "studies")


def run_study(study: Study, config: StudyConfig) -> list[Figures]:
    """Do what is missing of a study, and return the figures of all its trainings.

    Those of one are "arm", "condition", "seed", "fold", "lr", "mAP" (in percent, of the averaged
    weights after the last epoch, by the name of the views), "seconds", where they come from, and
    "accuracy", "cells" (`pulls`) and "history" where the plan asks for them. Each has a file in
    runs/studies/NAME; what is there, or in the results that are published, with the same settings
    is not done again. With `tables` nothing is done at all.

    Raises `UsageError` and `DataError` for what is wrong with the input.
    """
    if launched():
        raise UsageError("study.py runs in one process: its trainings are small")
    done = _done(study, config)
    if config.study.tables:
        return [done[trial.name] for trial in study.plan.trials() if trial.name in done]
    missing = [trial for trial in study.plan.trials() if trial.name not in done]
    if missing:
        rates = {(x["arm"], x["condition"], x["fold"]): x["lr"] for x in done.values()}
        train = OnFeatures(study, config, rates) if study.on_features else EndToEnd(study, config)
    for number, trial in enumerate(missing, start=1):
        started = time.perf_counter()
        figures = {
            **vars(trial),
            **train(trial),
            "seconds": round(time.perf_counter() - started, 1),
            "settings": _digest(study, trial),
            **provenance(),
            "command": _command(config),
        }
        write_result(RUNS / study.name / f"{trial.name}.json", json.dumps(figures).encode())
        done[trial.name] = figures
        views = ", ".join(f"{name} {x:.2f}".strip() for name, x in figures["mAP"].items())
        print(f"{number}/{len(missing)}  {trial.name}: {views}, {figures['seconds']} s", flush=True)
    return [done[trial.name] for trial in study.plan.trials()]


def _command(config: StudyConfig) -> str:
    """What anybody can run again: without the folders of this machine."""
    wanted = config.study
    command = ["python", "study.py", wanted.study, Path(wanted.data).name]
    path = wanted.model_path
    weights = ["--model-path", path if is_name(path) else Path(path).name] if path else []
    amp = config.compute.amp
    precision = ["--amp", amp] if amp != StudyConfig().compute.amp else []
    return shlex.join([*command, *weights, *precision])


def _done(study: Study, config: StudyConfig) -> dict[str, Figures]:
    """The figures that are there, by the name of their training."""
    published = Path(config.study.output, f"{study.name}.json")
    found = _read(published)["trials"] if published.exists() else []
    found += [_read(path) for path in sorted((RUNS / study.name).glob("*.json"))]
    trials = {trial.name: trial for trial in study.plan.trials()}
    done = {}
    for figures in found:
        name = Trial(**{each: figures[each] for each in Trial.__dataclass_fields__}).name
        if name in trials and figures["settings"] == _digest(study, trials[name]):
            done[name] = figures
    return done


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _digest(study: Study, trial: Trial) -> str:
    """What the figures of other settings are told by."""
    settings = study.settings(trial.condition, trial.arm)
    plan = study.plan
    described: list[Any] = [settings, plan.folds, plan.rates, plan.views]
    described += [name for name in ("one_label", "cells", "history") if getattr(plan, name)]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


class EndToEnd:
    """Trainings of whole networks, in run folders below runs/studies/NAME."""

    def __init__(self, study: Study, config: StudyConfig) -> None:
        self._study, self._config = study, config

    def __call__(self, trial: Trial) -> Figures:
        """Train, or go on with what was interrupted, and measure."""
        folder = RUNS / self._study.name / trial.name
        begun = any((folder / name).exists() for name in ("last.pt", "prior"))
        resume = RESUME_LAST if begun else ""
        train = config_of(self._study, self._config, trial, output=str(folder), resume=resume)
        fit(train)
        flat = train.flat()
        same = (*ValidateConfig.from_checkpoint, "workers", "cache_dir", "cache_format")
        same += ("device", "amp")
        validate = ValidateConfig.of(
            **{name: flat[name] for name in same},
            model_path=(str(folder / "last.pt"),),
            weights="ema",
        )
        figures = {
            name: evaluate(validate.with_settings(tta=views))["mAP"]
            for name, views in self._study.plan.views.items()
        }
        return {"lr": train.step.lr, "mAP": figures}
