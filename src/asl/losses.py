"""The Asymmetric Loss (ASL, arXiv 2009.14119) and the Class-aware Selective Loss (CSL, 2110.10955).

One cell, a logit x with its target y in [0, 1], costs (ASL paper, eq. 4 to 7; soft targets as in
the official code)

    L = -(y log p + (1 - y) log q) * b ** gamma        gamma = gamma_pos y + gamma_neg (1 - y)

    p   = sigmoid(x)                    the score
    p_m = max(p - m, 0)                 the score shifted by the margin m = ``clip``
    q   = 1 - p_m                       the same number as min(1 - p + m, 1)
    b   = y (1 - p) + (1 - y) p_m       how wrong the cell is: the paper's 1 - p_t

log p is a log-sigmoid, as is log q where m = 0: a confident mistake keeps its gradient. Half
precision logits are computed in float32, and the loss is then float32; float64 stays float64.

**Targets out of range.** On the CPU a target out of range, or NaN, raises ValueError at once. On an
accelerator, and in a compiled or exported graph, looking at the values would make every step wait
for the device. There one such target turns the loss and its gradients into NaN instead: it cannot
pass unnoticed, and costs one small reduction. Whoever reads a NaN then calls `check_targets`, to
learn whether the targets are to blame and which value it is.

This file needs PyTorch alone: copy it into another project, and it works there.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softshrink, threshold

try:
    # The same results, quicker on CPUs. Where this file was copied alone, it does without.
    from .losses_cpu import loss_and_gradient as _in_chunks
except ImportError:
    _in_chunks = None  # type: ignore[assignment]

Reduction = Literal["sum", "mean", "batchmean", "none"]
PartialMode = Literal["negative", "ignore", "ignore_normalize_classes", "selective"]


def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    gamma_neg: float = 4,
    gamma_pos: float = 1,
    clip: float | None = 0.05,
    eps: float = 1e-8,
    disable_torch_grad_focal_loss: bool = True,
    reduction: Reduction = "sum",
) -> Tensor:
    """Asymmetric loss of multi-label logits (arXiv 2009.14119, eq. 7; formula: module docstring).

    Gammas 0 and 0 without clip are binary cross-entropy, equal gammas without clip the focal loss.

    Args:
        logits: (N, C), before the sigmoid.
        targets: (N, C), hard or soft, in [0, 1].
        gamma_neg: The paper's gamma-, the focusing of negatives.
        gamma_pos: The paper's gamma+, the focusing of positives.
        clip: The paper's m, the probability margin of negatives; 0 or None for none. Negatives
            with p <= m cost nothing.
        eps: Floor of b in the focusing weight: the slope of a power below 1 stays finite. (The
            official code puts it under the logarithms, which need none here.)
        disable_torch_grad_focal_loss: Hold the focusing weight constant in the gradient.
        reduction: "sum" (official) or "mean" over all cells, "batchmean" (the sum divided by N),
            or "none".

    Returns:
        A scalar >= 0; (N, C) for reduction "none".

    Raises:
        ValueError: For an option or shape that makes no sense; on the CPU for a target outside
            [0, 1].
    """
    _check_options(reduction, clip, eps, gamma_neg=gamma_neg, gamma_pos=gamma_pos)
    logits = _check_logits(logits, targets)
    one = _or_nan(1.0, targets)
    y = targets.to(logits.dtype)
    gamma = gamma_pos * y + gamma_neg * (1 - y)
    loss = _focused_nll(logits, y, gamma, clip or 0.0, eps, disable_torch_grad_focal_loss)
    return _reduce(loss, reduction) * one


def _focused_nll(
    x: Tensor, y: Tensor, gamma: Tensor, clip: float, eps: float, detached: bool
) -> Tensor:
    """-(y log p + (1 - y) log q) b ** gamma per cell: the formula that both papers share."""
    p_m = (torch.sigmoid(x) - clip).clamp(min=0)
    log_q = torch.log1p(-p_m) if clip else logsigmoid(-x)
    b = y * torch.sigmoid(-x) + (1 - y) * p_m
    if detached:
        b, gamma = b.detach(), gamma.detach()
    tiny = torch.finfo(torch.float32).tiny  # autograd divides by b: 0 would give NaN
    weight = b.clamp(min=max(eps, tiny)) ** gamma
    return -(y * logsigmoid(x) + (1 - y) * log_q) * weight


class AsymmetricLoss(nn.Module):
    """`asymmetric_loss` as a module, with the official signature.

    Differentiable in logits and soft targets, and more than once.
    """

    def __init__(
        self,
        gamma_neg: float = 4,
        gamma_pos: float = 1,
        clip: float | None = 0.05,
        eps: float = 1e-8,
        disable_torch_grad_focal_loss: bool = True,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        _check_options(reduction, clip, eps, gamma_neg=gamma_neg, gamma_pos=gamma_pos)
        self.gamma_neg = gamma_neg
        self.gamma_pos = gamma_pos
        self.clip = clip
        self.eps = eps
        self.disable_torch_grad_focal_loss = disable_torch_grad_focal_loss
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `asymmetric_loss`."""
        return asymmetric_loss(logits, targets, *self._formula_options(), self.reduction)

    def _formula_options(self) -> tuple[float, float, float, float, bool]:
        detached = self.disable_torch_grad_focal_loss
        return self.gamma_neg, self.gamma_pos, self.clip or 0.0, self.eps, detached


class AsymmetricLossOptimized(AsymmetricLoss):
    """`AsymmetricLoss` with a gradient derived by hand and computed together with the loss.

    What it saves: between forward and backward pass it holds one tensor as large as the logits,
    where `AsymmetricLoss` holds twelve or more. On a CPU, with hard targets, it takes a quarter of
    the time and a fifth of the memory at 64 x 9,605, but little less time with soft targets
    (`bench/losses.py`; both need `losses_cpu.py`). On other devices it dispatches at most 60 % of
    the operations, which is what small batches wait for; no time was measured there.

    It is differentiable once (``create_graph=True`` raises RuntimeError), and in the logits only
    (targets that require a gradient raise RuntimeError). In a compiled or exported graph this is
    `AsymmetricLoss`, which the compiler fuses by itself. As in the official code, and unlike
    `AsymmetricLoss`, the gradient by default includes that of the focusing weight.
    """

    def __init__(
        self,
        gamma_neg: float = 4,
        gamma_pos: float = 1,
        clip: float | None = 0.05,
        eps: float = 1e-8,
        disable_torch_grad_focal_loss: bool = False,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__(gamma_neg, gamma_pos, clip, eps, disable_torch_grad_focal_loss, reduction)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `asymmetric_loss`."""
        if torch.compiler.is_compiling():
            return super().forward(logits, targets)
        if targets.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "AsymmetricLossOptimized has no gradient for targets: use AsymmetricLoss"
            )
        logits = _check_logits(logits, targets)
        options = (*self._formula_options(), _or_nan(-1.0, targets))
        loss: Tensor = _LossAndGradient.apply(logits, targets, options, self.reduction != "none")
        return _reduce(loss, self.reduction, logits.shape)


class _LossAndGradient(torch.autograd.Function):
    """The loss, per cell or ``summed``; its gradient is ready when `backward` is called."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, options: tuple[Any, ...], summed: bool
    ) -> Tensor:
        if _in_chunks is not None and logits.device.type == "cpu":
            loss, gradient = _in_chunks(_loss_and_gradient, logits, targets, options, summed)
        else:
            loss, gradient = _loss_and_gradient(logits, targets, *options)
            loss = loss.sum() if summed else loss
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would take the gradient for a constant here, and say nothing.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "AsymmetricLossOptimized has no second derivative: use AsymmetricLoss"
            )
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None, None


def _loss_and_gradient(
    x: Tensor,
    targets: Tensor,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    eps: float,
    detached: bool,
    minus_one: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """`_focused_nll` and its derivative by x, with as few operations as possible.

    lerp(c, a, y) is y a + (1 - y) c. With d for d/dx, and [p > m] for 1 where that holds, else 0:

        L         = -likelihood b ** gamma             likelihood = y log p + (1 - y) log q
        dL        = -b ** gamma d likelihood + L gamma db / b             (the product rule)
        d log p   = 1 - p
        d log q   = -dp_m / q                          without a margin this is -p
        dp_m      = p (1 - p) [p > m]
        db        = (1 - y) dp_m - y p (1 - p)

    ``minus_one`` is NaN where a target is out of range, and so are then the loss and its gradient.
    """
    y = targets.to(x.dtype)
    minus_x = -x
    p, not_p = torch.sigmoid(x), torch.sigmoid(minus_x)
    if clip:
        p_m = softshrink(p, clip)  # p - clip, and 0 up to clip
        log_q = torch.log1p(-p_m)
        dp_m = threshold(p, clip, 0) * not_p
        dlog_q = dp_m / (p_m - 1)
    else:
        p_m, log_q = p, logsigmoid(minus_x)
        dp_m, dlog_q = p * not_p, -p
    likelihood = torch.lerp(log_q, logsigmoid(x), y)
    b = torch.lerp(p_m, not_p, y)
    gamma = gamma_neg + (gamma_pos - gamma_neg) * y
    minus_weight = b.clamp(min=eps) ** gamma * minus_one
    loss = minus_weight * likelihood
    gradient = minus_weight * torch.lerp(dlog_q, not_p, y)
    if not detached:
        db = torch.lerp(dp_m, -p * not_p, y)
        # Up to its floor the weight is constant: divided by infinity, its slope is 0.
        gradient.addcmul_(gamma * loss / threshold(b, eps, torch.inf), db)
    return loss, gradient


class ASLSingleLabel(nn.Module):
    """Asymmetric loss over a softmax, for images with exactly one label (from the official code).

    With p the softmax and y the one-hot label, class c costs -log(p_c) (1 - p_c) ** gamma_pos where
    y_c = 1 and -log(p_c) p_c ** gamma_neg elsewhere; the classes are summed with the smoothed label
    y (1 - eps) + eps / C. With gamma_pos = 0 and eps = 0 this is cross-entropy. The loss is one per
    sample: "mean" and "batchmean" agree, and "none" gives (N,).
    """

    def __init__(
        self,
        gamma_pos: float = 0,
        gamma_neg: float = 4,
        eps: float = 0.1,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(reduction, eps=eps, gamma_pos=gamma_pos, gamma_neg=gamma_neg)
        self.gamma_pos = gamma_pos
        self.gamma_neg = gamma_neg
        self.eps = eps
        self.reduction = reduction

    def forward(self, logits: Tensor, class_index: Tensor) -> Tensor:
        """Loss of (N, C) logits whose true classes are ``class_index``: (N,) integers in 0..C-1.

        Raises ValueError for other shapes or types, and on the CPU for an index out of range.
        """
        if logits.ndim != 2 or class_index.shape != logits.shape[:1]:
            raise ValueError(
                "expected logits (N, C) and class indices (N,), "
                f"got {tuple(logits.shape)} and {tuple(class_index.shape)}"
            )
        if class_index.is_floating_point() or class_index.dtype == torch.bool:
            raise ValueError(f"class indices must be integers, got {class_index.dtype}")
        num_classes = logits.shape[1]
        one = _or_nan(1.0, class_index, 0, num_classes - 1)
        log_p = _at_least_float32(logits).log_softmax(dim=1)
        # A comparison and not a scatter: an index out of range must not abort the device.
        y = (class_index[:, None] == torch.arange(num_classes, device=logits.device)).to(log_p)
        p = log_p.exp()
        b = y * (1 - p) + (1 - y) * p
        weight = b.clamp(min=1e-8) ** (self.gamma_pos * y + self.gamma_neg * (1 - y))
        smoothed = y * (1 - self.eps) + self.eps / num_classes
        loss = -(smoothed * weight * log_p).sum(dim=1)
        return _reduce(loss, self.reduction) * one


class PartialSelectiveLoss(nn.Module):
    """Class-aware Selective Loss: targets are 1 present, 0 absent, -1 not annotated (2110.10955).

    What is annotated may be soft. A cell that is not is scored as a negative, with a gamma and an
    alpha of its own; the focusing weight never has a gradient. ``mode`` says which of these count:

    - "negative": all of them.
    - "ignore": none.
    - "ignore_normalize_classes": none; a sample with n annotated cells weighs 1 + 1 / (1 + n).
    - "selective": all but (1) those of classes with ``prior`` > ``prior_threshold``, if a prior is
      given, and (2) the ``likelihood_topk`` x N of the whole batch with the highest logits, be they
      left out by (1) or not. Among equal logits the first in row-major order are taken.

    Args:
        mode: As above.
        gamma_pos: Focusing of the present cells.
        gamma_neg: Focusing of the absent cells.
        gamma_unann: Focusing of the cells not annotated.
        alpha_pos: Weight of the present cells.
        alpha_neg: Weight of the absent cells.
        alpha_unann: Weight of the cells not annotated.
        clip: Probability margin of absent and not annotated cells, as in `asymmetric_loss`.
        likelihood_topk: Cells, on average over the samples, left out as likely present (official);
            below 1, the share of the batch's cells not annotated that is.
        prior: (C,) in [0, 1], how often each class is present. Part of the state dict.
        prior_threshold: Classes more frequent than this are not assumed absent.
        reduction: As in `asymmetric_loss`; left-out cells count in the N and C of a mean.
    """

    prior: Tensor | None

    def __init__(
        self,
        mode: PartialMode = "selective",
        gamma_pos: float = 0,
        gamma_neg: float = 1,
        gamma_unann: float = 2,
        alpha_pos: float = 1,
        alpha_neg: float = 1,
        alpha_unann: float = 1,
        clip: float | None = 0,
        likelihood_topk: float = 5,
        prior: Tensor | None = None,
        prior_threshold: float = 0.05,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        gammas = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "gamma_unann": gamma_unann}
        alphas = {"alpha_pos": alpha_pos, "alpha_neg": alpha_neg, "alpha_unann": alpha_unann}
        _check_options(reduction, clip, **gammas, **alphas)
        if mode not in ("negative", "ignore", "ignore_normalize_classes", "selective"):
            raise ValueError(
                f"unknown mode {mode!r}: negative, ignore, ignore_normalize_classes or selective"
            )
        if likelihood_topk < 0:
            raise ValueError(f"likelihood_topk must be at least 0, got {likelihood_topk}")
        if prior is not None and not (prior.ndim == 1 and bool(_inside(prior, 0, 1))):
            raise ValueError("prior must be a vector of one number in [0, 1] per class")
        self.mode = mode
        self.gamma_pos = gamma_pos
        self.gamma_neg = gamma_neg
        self.gamma_unann = gamma_unann
        self.alpha_pos = alpha_pos
        self.alpha_neg = alpha_neg
        self.alpha_unann = alpha_unann
        self.clip = clip
        self.likelihood_topk = likelihood_topk
        self.prior_threshold = prior_threshold
        self.reduction = reduction
        self.register_buffer("prior", None if prior is None else prior.detach().clone())

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of (N, C) logits and targets in [0, 1] or -1; others raise ValueError on the CPU."""
        logits = _check_logits(logits, targets)
        if self.prior is not None and self.prior.shape != logits.shape[-1:]:
            raise ValueError(
                f"the prior has {len(self.prior)} classes, the logits {logits.shape[-1]}"
            )
        one = _or_nan(1.0, targets, -1, 1)
        unannotated = targets == -1
        y_pos, y_unann = targets.to(logits.dtype).clamp(min=0), unannotated.to(logits.dtype)
        y_neg = 1 - y_pos - y_unann
        gamma = self.gamma_pos * y_pos + self.gamma_neg * y_neg + self.gamma_unann * y_unann
        alpha = self.alpha_pos * y_pos + self.alpha_neg * y_neg + self.alpha_unann * y_unann
        nll = _focused_nll(logits, y_pos, gamma, self.clip or 0.0, eps=0.0, detached=True)
        loss = alpha * nll * self._cell_weights(logits.detach(), unannotated)
        return _reduce(loss, self.reduction) * one

    def _cell_weights(self, logits: Tensor, unannotated: Tensor) -> Tensor | float:
        if self.mode == "negative":
            return 1.0
        if self.mode == "selective":
            left_out = _most_likely(logits, unannotated, self.likelihood_topk)
            if self.prior is not None:
                left_out = left_out | (unannotated & (self.prior > self.prior_threshold))
            return (~left_out).to(logits.dtype)
        annotated = (~unannotated).to(logits.dtype)
        if self.mode == "ignore":
            return annotated
        return annotated * (1 + 1 / (1 + annotated.sum(dim=-1, keepdim=True)))


def _most_likely(logits: Tensor, unannotated: Tensor, topk: float) -> Tensor:
    """Mask of the cells not annotated with the highest logits: those with the smallest q.

    A stable sort would settle ties as well, and take sixty times as long.
    """
    scores, cells = logits.masked_fill(~unannotated, -torch.inf).flatten(), logits.numel()
    most = min(int(topk * cells) + 1 if topk < 1 else round(topk * len(logits)), cells)
    if most == 0:
        return torch.zeros_like(unannotated)
    # How many cells a share is stays on the device: nothing waits for it.
    count = (topk * unannotated.sum()).round() if topk < 1 else scores.new_full((), most)
    lowest = scores.topk(most).values.take((count - 1).clamp(min=0).long())
    above, level = scores > lowest, scores == lowest
    chosen = above | (level & (level.cumsum(0) <= count - above.sum()))
    return chosen.view_as(unannotated) & unannotated


def check_targets(targets: Tensor, partial: bool = False) -> None:
    """Raise ValueError naming the first target not in [0, 1], nor -1 if ``partial``.

    Reads the values, so it waits for the device. The losses call it themselves on the CPU.
    """
    _check_range(targets, -1 if partial else 0, 1)


def _check_range(targets: Tensor, low: int, high: int, hard: bool = False) -> None:
    if bool(_inside(targets, low, high, hard)):
        return
    values = targets.double().flatten()
    outside = ~((values >= low) & (values <= high))
    if low == -1:
        outside |= (values != values.round()) & ((values < 0) | hard)
    value, count = values[outside][0].item(), int(outside.sum())
    allowed = "exactly 1, 0 or -1" if hard else f"in [0, {high}]" + " or -1" * (low == -1)
    advice = "; for -1, not annotated, use PartialSelectiveLoss" if (low, value) == (0, -1) else ""
    raise ValueError(f"targets must be {allowed}, got {value:g} ({count} such cells){advice}")


def _inside(targets: Tensor, low: int, high: int, hard: bool = False) -> Tensor:
    """Scalar bool: is every target in range, and a whole number if ``hard``. NaN is not."""
    if targets.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=targets.device)
    smallest, largest = targets.aminmax()
    if not targets.dtype.is_signed:  # as an unsigned number, -1 would be the largest of all
        return largest <= high
    inside = (smallest >= low) & (largest <= high)
    if low == -1 and targets.is_floating_point():  # partial targets: nothing between -1 and 0
        inside = inside & ((targets.frac() == 0) | ((targets > 0) & (not hard))).all()
    return inside


def _or_nan(
    number: float, targets: Tensor, low: int = 0, high: int = 1, hard: bool = False
) -> Tensor | float:
    """The number; NaN where a target is out of range, on the CPU an error (module docstring)."""
    if targets.dtype == torch.bool:
        return number
    if _free_to_read(targets):
        _check_range(targets, low, high, hard)
        return number
    return torch.where(_inside(targets, low, high, hard), number, torch.nan)


def _free_to_read(targets: Tensor) -> bool:
    return targets.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_options(
    reduction: str, clip: float | None = None, eps: float = 0.0, **factors: float
) -> None:
    """A margin below 1e-6 would be lost in float32. Tensors are not looked at: that would wait."""
    for name, factor in {**factors, "eps": eps}.items():
        if not isinstance(factor, Tensor) and not 0 <= factor < torch.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {factor}")
    if clip and not 1e-6 <= clip < 1:
        raise ValueError(f"clip must be 0 or None, or in [1e-6, 1), got {clip}")
    if reduction not in ("sum", "mean", "batchmean", "none"):
        raise ValueError(f"unknown reduction {reduction!r}: sum, mean, batchmean or none")


def _check_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """The logits in the type to compute in."""
    if logits.shape != targets.shape:
        raise ValueError(
            "logits and targets must have the same shape, "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    return _at_least_float32(logits)


def _at_least_float32(logits: Tensor) -> Tensor:
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    return logits if logits.dtype == torch.float64 else logits.float()


def _reduce(loss: Tensor, reduction: str, shape: torch.Size | None = None) -> Tensor:
    """Reduce a loss per cell, or, given their ``shape``, one already summed over the cells."""
    if reduction == "none":
        return loss
    if shape is None:
        loss, shape = loss.sum(), loss.shape
    if reduction == "sum":
        return loss
    return loss / (shape.numel() if reduction == "mean" else shape[0])
