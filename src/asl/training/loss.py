"""The training loss that the settings ask for."""

from torch import Tensor, nn

from asl.losses import AsymmetricLoss, AsymmetricLossOptimized, PartialSelectiveLoss
from asl.training.adaptive import AdaptiveAsymmetry
from asl.training.settings import LossSettings


def create_loss(
    settings: LossSettings, partial: bool = False, prior: Tensor | None = None
) -> nn.Module:
    """The loss for targets in {1, 0}, or in {1, 0, -1} where the training set is `partial`.

    `prior` is that of CSL, (C,) in [0, 1]. Focusing weights are detached: the official training
    scripts' choice.
    """
    gamma_neg, gamma_pos, clip = settings.asymmetry
    loss: AsymmetricLoss | PartialSelectiveLoss
    if partial:
        unannotated = gamma_neg if settings.gamma_unann is None else settings.gamma_unann
        loss = PartialSelectiveLoss(
            settings.unannotated,
            gamma_pos,
            gamma_neg,
            unannotated,
            clip=clip,
            likelihood_topk=settings.likelihood_topk,
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
