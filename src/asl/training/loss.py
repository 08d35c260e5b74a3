"""The training loss that the settings ask for."""

from collections.abc import Sequence

from timm.loss.distribution_balanced_loss import DistributionBalancedLoss
from timm.loss.poly_loss import PolyBinaryCrossEntropy
from timm.loss.zlpr_loss import ZlprLoss
from torch import Tensor, nn

from asl.losses import AsymmetricLoss, AsymmetricLossOptimized, PartialSelectiveLoss
from asl.robust_losses import SPLC, Hill
from asl.training.adaptive import AdaptiveAsymmetry
from asl.training.other_losses import OfTimm, OneLabelLoss, TwoWayLoss
from asl.training.settings import LossSettings


def create_loss(
    settings: LossSettings,
    partial: bool = False,
    prior: Tensor | None = None,
    class_counts: Sequence[float] = (),
    num_samples: int = 0,
    num_classes: int | None = None,
) -> nn.Module:
    """The loss for targets in {1, 0}, or in {1, 0, -1} where the training set is `partial`.

    `prior` is that of CSL, (C,) in [0, 1]; how many cells it spares depends on `num_classes` where
    the settings do not say. The distribution-balanced loss alone needs to know in how many of
    `num_samples` images each class is. Focusing weights of ASL are detached: the official training
    scripts' choice.

    All are called with (logits, targets), but `SPLC`, which takes the epoch too.
    """
    match settings.loss:
        case "asl_single":
            gamma_neg, gamma_pos, _ = settings.asymmetry
            return OneLabelLoss(gamma_pos, gamma_neg)
        case "poly":
            return OfTimm(PolyBinaryCrossEntropy(settings.poly_epsilon, reduction="sum"))
        case "zlpr":
            return OfTimm(ZlprLoss(), averages=True)
        case "db":
            counted = class_counts, num_samples
            return OfTimm(DistributionBalancedLoss(*counted, reduction="sum"))
        case "twoway":
            return TwoWayLoss()
        case "hill":
            return Hill(settings.hill_lamb, settings.logit_margin)
        case "splc":
            return SPLC(settings.splc_tau, margin=settings.logit_margin)
    return _asymmetric(settings, partial, prior, num_classes)


def _asymmetric(
    settings: LossSettings, partial: bool, prior: Tensor | None, num_classes: int | None
) -> nn.Module:
    gamma_neg, gamma_pos, clip = settings.asymmetry
    loss: AsymmetricLoss | PartialSelectiveLoss
    if partial:
        topk = settings.likelihood_topk
        unannotated = gamma_neg if settings.gamma_unann is None else settings.gamma_unann
        loss = PartialSelectiveLoss(
            settings.unannotated,
            gamma_pos,
            gamma_neg,
            unannotated,
            clip=clip,
            likelihood_topk=_spared(num_classes) if topk is None else topk,
            prior=prior,
            prior_threshold=settings.prior_threshold,
        )
    else:
        loss = AsymmetricLossOptimized(
            gamma_neg, gamma_pos, clip, disable_torch_grad_focal_loss=True
        )
    if settings.adaptive_gamma is None:
        return loss
    return AdaptiveAsymmetry(loss, settings.adaptive_gamma, settings.adaptive_step)


def _spared(num_classes: int | None) -> float:
    """What CSL takes for likely present: cells of an image, or a share of those not annotated.

    Five in the official recipes, for COCO's 80 classes and for 9,605. Of twenty classes these would
    be a quarter of all cells, and most of them absent: fewer classes have COCO's share, one in
    sixteen (docs/studies/partial_labels.md).
    """
    return 5 if num_classes is None or num_classes >= 80 else 1 / 16
