"""Which labels a score stands for: thresholds and probabilities, as given or from a checkpoint.

validate.py stores, under "thresholds" and "calibration" of a checkpoint, what it chose there and
the facts of `Origin`, all in one dictionary of plain values and tensors:

    thresholds: {"rule", "values": (C,) tensor, "common": the one for all, **facts}
    calibration: {"method", tensors of `calibration.Logistic` or `calibration.Isotonic`, **facts}
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from asl.errors import DataError
from asl.evaluation.calibration import Calibration, from_state
from asl.evaluation.score import Scorer
from asl.evaluation.settings import DEFAULT_THRESHOLD
from asl.models import checkpoint

THRESHOLDS, CALIBRATION = ENTRIES = ("thresholds", "calibration")


@dataclass(frozen=True)
class Origin:
    """The scores that something was chosen on: of which weights and views, and of which images."""

    weights: str
    image_size: int
    tta: str
    dataset: str
    split: str
    images: int

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Self:
        """The facts among what a checkpoint stores. Raises `ValueError` if there is a wrong one."""
        facts = {field.name: stored.get(field.name) for field in fields(cls)}
        for field in fields(cls):
            if type(facts[field.name]) is not field.type:
                raise ValueError(f"{field.name} is {facts[field.name]!r}")
        return cls(**facts)  # type: ignore[arg-type]  # as just checked

    def misfit(self, scorer: Scorer, tta: str) -> str:
        """Why what was chosen does not hold for these scores; empty if it does."""
        if len(scorer.weights) > 1:
            return "they hold for that checkpoint alone, not for a mean of scores"
        now = {"weights": scorer.weights[0], "image_size": scorer.images.image_size, "tta": tta}
        return ", ".join(
            f"they are for {name} {getattr(self, name) or 'none'}, not {value or 'none'}"
            for name, value in now.items()
            if getattr(self, name) != value
        )

    def __str__(self) -> str:
        return f"{self.dataset} {self.split}"


@dataclass(frozen=True)
class Judge:
    """What makes labels of scores.

    A label is predicted where its score is above that of `thresholds` (C,). `rule` is what they
    were tuned for, "" if one was given for all; `tuned_on` and `calibrated_on` tell where these
    come from. `notes` has a line for all that a checkpoint stores and that is not used.
    """

    thresholds: npt.NDArray[np.float64]
    rule: str = ""
    tuned_on: Origin | None = None
    calibration: Calibration | None = None
    calibrated_on: Origin | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        paths: Sequence[str],
        scorer: Scorer,
        threshold: float | None,
        tta: str,
        without: Collection[str] = (),
    ) -> Self:
        """The judge of what `scorer` says, who has loaded these checkpoints.

        `threshold` is the one that was asked for: it wins over those of the checkpoint, and they
        over `DEFAULT_THRESHOLD`. Entries that are `without` are taken for not there.

        Raises `DataError` for entries that cannot be used.
        """
        classes = len(scorer.classes)
        given = DEFAULT_THRESHOLD if threshold is None else threshold
        found: dict[str, Any] = {"thresholds": np.full(classes, given, np.float64)}
        notes = []
        for path in paths:
            content = checkpoint.load(path)
            for name in ENTRIES:
                if content.get(name) is None or name in without:
                    continue
                try:
                    made, origin = _read(name, content[name], classes)
                except (TypeError, ValueError, AttributeError) as error:
                    raise DataError(f"{path}: its {name} cannot be used: {error}") from error
                why = origin.misfit(scorer, tta)
                if name == THRESHOLDS and threshold is not None:
                    why = f"--threshold {threshold:g} is given"
                if why:
                    notes.append(f"the {name} stored in {path} are not used: {why}")
                else:
                    found |= made
        return cls(**found, notes=tuple(notes))

    def label(self, number: int, score: float) -> dict[str, Any]:
        """What is to be said of class `number` with this score.

        "score", whether it is "predicted", the "threshold", and with a calibration "probability",
        all in [0, 1].
        """
        limit = float(self.thresholds[number])
        label = {
            "score": round(score, 4),
            "predicted": score > limit,
            "threshold": round(limit, 4),
        }
        if self.calibration is not None:
            label["probability"] = round(float(self.calibration.of_class(number, score)), 4)
        return label

    def lines(self) -> list[str]:
        """What stands above labels: which numbers they show, and by what they are predicted."""
        shown = "scores: they rank, they are no probabilities"
        if self.calibration is not None:
            shown = f"probabilities ({self.calibration.method}, {self.calibrated_on})"
        tuned = [f"thresholds of each class ({self.rule}, {self.tuned_on})"] if self.rule else []
        return [*self.notes, shown, *tuned]


def _read(name: str, stored: Any, classes: int) -> tuple[dict[str, Any], Origin]:
    """The fields of a `Judge` that a stored entry gives, and where that comes from."""
    if not isinstance(stored, Mapping):
        raise TypeError(f"a {type(stored).__name__} in place of names and values")
    origin = Origin.of(stored)
    if name == CALIBRATION:
        return {"calibration": from_state(stored, classes), "calibrated_on": origin}, origin
    values = stored.get("values")
    if not isinstance(values, torch.Tensor) or values.shape != (classes,):
        raise ValueError(f"not {classes} values")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("a value is outside of [0, 1]")
    made = {
        "thresholds": values.double().numpy(),
        "rule": str(stored.get("rule")),
        "tuned_on": origin,
    }
    return made, origin


def stored_thresholds(figures: Mapping[str, Any], origin: Origin) -> dict[str, Any]:
    """What to store of the figures of `thresholds.cross_fitted`."""
    return {
        "rule": figures["rule"],
        "values": torch.tensor(figures["thresholds"], dtype=torch.float64),
        "common": figures["common"],
        **asdict(origin),
    }


def stored_calibration(calibration: Calibration, origin: Origin) -> dict[str, Any]:
    """What to store of a calibration."""
    return calibration.state() | asdict(origin)
