"""What a published file says of the mAP that was measured with it, and whether it is so here."""

from collections.abc import Mapping, Sequence
from typing import Any

from asl.errors import DataError
from asl.models import checkpoint

MEASURED = "measured"  # the entry of a checkpoint
# What two measurements must have in common to give one mAP.
_CONDITIONS = ("dataset", "split", "evaluated_as", "images", "image_size", "tta", "weights")
# Points of mAP. Decoders differ, and a backbone in bfloat16 moved an mAP by 0.05 (MODEL_ZOO.md).
TOLERANCE = 0.1


def measured(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What to store of the figures of `evaluate`: the mAP, its conditions, and where it is from."""
    return {name: figures[name] for name in ("mAP", *_CONDITIONS, "command", "commit", "versions")}


def published(paths: Sequence[str], figures: Mapping[str, Any]) -> dict[str, Any]:
    """The mAP that the one checkpoint of `figures` was published with, under "published", if any.

    Beside that "mAP", "differing" has a line for each condition that is another here, and "agrees"
    says whether the mAP is the same, but for 0.1 points; None where a condition differs. Raises
    `DataError` for an entry that cannot be used.
    """
    stored = checkpoint.load(paths[0]).get(MEASURED) if len(paths) == 1 else None
    if stored is None:
        return {}
    if not isinstance(stored, Mapping) or not isinstance(stored.get("mAP"), float):
        raise DataError(f"{paths[0]}: its {MEASURED} cannot be used: it has no mAP")
    differing = [
        f"{name} {stored.get(name) or 'none'} (now {figures[name] or 'none'})"
        for name in _CONDITIONS
        if stored.get(name) != figures[name]
    ]
    agrees = None if differing else abs(stored["mAP"] - figures["mAP"]) <= TOLERANCE
    return {"published": {"mAP": stored["mAP"], "differing": differing, "agrees": agrees}}


def check_published(figures: Mapping[str, Any]) -> None:
    """Raise `DataError` where a model does not have the mAP that it was published with."""
    found = figures.get("published", {})
    if found.get("agrees") is False:
        raise DataError(
            f"{figures['checkpoint']} was published with {found['mAP']:.2f} mAP, and has "
            f"{figures['mAP']:.2f}: are these the images that it was measured on?"
        )
