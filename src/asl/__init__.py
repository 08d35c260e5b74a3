"""Multi-label classification with the Asymmetric Loss and the Class-aware Selective Loss."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asl.evaluation.predictor import Predictor
    from asl.losses import (
        ASLSingleLabel,
        AsymmetricLoss,
        AsymmetricLossOptimized,
        PartialSelectiveLoss,
        asymmetric_loss,
    )

__all__ = [
    "ASLSingleLabel",
    "AsymmetricLoss",
    "AsymmetricLossOptimized",
    "PartialSelectiveLoss",
    "Predictor",
    "asymmetric_loss",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: not paid for `python train.py --help`, only for a loss.
    if name == "Predictor":  # it needs the extra `train`
        from asl.evaluation.predictor import Predictor

        return Predictor
    if name in __all__:
        from asl import losses

        return getattr(losses, name)
    raise AttributeError(f"module 'asl' has no attribute {name!r}")
