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
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softshrink

Reduction = Literal["sum", "mean", "batchmean", "none"]
PartialMode = Literal["negative", "ignore", "ignore_normalize_classes", "selective"]

# Cells worked on at a time: enough to feed all threads, few enough that the buffers stay in cache.
_CPU_CHUNK = 1 << 18


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
    clip = _check_options(clip, reduction, gamma_neg, gamma_pos)
    logits = _check_logits(logits, targets)
    one_or_nan = _one_or_nan(targets)
    y = targets.to(logits.dtype)
    gamma = gamma_pos * y + gamma_neg * (1 - y)
    loss = _focused_nll(logits, y, gamma, clip, eps, disable_torch_grad_focal_loss)
    return _reduce(loss, reduction) * one_or_nan


class AsymmetricLoss(nn.Module):
    """`asymmetric_loss` as a module, with the official signature."""

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
        _check_options(clip, reduction, gamma_neg, gamma_pos)
        self.gamma_neg = gamma_neg
        self.gamma_pos = gamma_pos
        self.clip = clip
        self.eps = eps
        self.disable_torch_grad_focal_loss = disable_torch_grad_focal_loss
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `asymmetric_loss`."""
        return asymmetric_loss(
            logits,
            targets,
            self.gamma_neg,
            self.gamma_pos,
            self.clip,
            self.eps,
            self.disable_torch_grad_focal_loss,
            self.reduction,
        )


class AsymmetricLossOptimized(AsymmetricLoss):
    """`AsymmetricLoss`, several times faster, with a single tensor kept for the backward pass.

    The gradient is derived by hand and computed together with the loss. It is therefore
    differentiable once (``create_graph=True`` raises RuntimeError), and in the logits only. In a
    compiled or exported graph this is `AsymmetricLoss`, which the compiler fuses by itself. As in
    the official code, and unlike `AsymmetricLoss`, the gradient by default includes that of the
    focusing weight.
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
        logits = _check_logits(logits, targets)
        loss: Tensor = _SinglePass.apply(
            logits,
            targets,
            (
                self.gamma_neg,
                self.gamma_pos,
                self.clip or 0.0,
                self.eps,
                self.disable_torch_grad_focal_loss,
            ),
            self.reduction != "none",
            torch.is_grad_enabled() and logits.requires_grad,
        )
        loss = _reduce(loss, self.reduction, logits.shape)
        # on the CPU the single pass has looked at the targets
        return loss if loss.device.type == "cpu" else loss * _one_or_nan(targets)


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
        _check_options(None, reduction, gamma_pos, gamma_neg)
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
        one_or_nan = _one_or_nan(class_index, 0, num_classes - 1)
        log_p = _at_least_float32(logits).log_softmax(dim=1)
        # A comparison and not a scatter: an index out of range must not abort the device.
        y = (class_index[:, None] == torch.arange(num_classes, device=logits.device)).to(log_p)
        p = log_p.exp()
        b = y * (1 - p) + (1 - y) * p
        weight = b.clamp(min=1e-8) ** (self.gamma_pos * y + self.gamma_neg * (1 - y))
        smoothed = y * (1 - self.eps) + self.eps / num_classes
        loss = -(smoothed * weight * log_p).sum(dim=1)
        return _reduce(loss, self.reduction) * one_or_nan


class PartialSelectiveLoss(nn.Module):
    """Class-aware Selective Loss: targets are 1 present, 0 absent, -1 not annotated (2110.10955).

    A cell that is not annotated is scored as a negative, with a gamma and an alpha of its own; the
    focusing weight never has a gradient. ``mode`` says which of these cells count:

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
        likelihood_topk: Cells, on average over the samples, left out as likely present.
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
        likelihood_topk: int = 5,
        prior: Tensor | None = None,
        prior_threshold: float = 0.05,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        self.clip = _check_options(clip, reduction, gamma_pos, gamma_neg, gamma_unann)
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
        self.likelihood_topk = likelihood_topk
        self.prior_threshold = prior_threshold
        self.reduction = reduction
        self.register_buffer("prior", None if prior is None else prior.detach().clone())

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of (N, C) logits and targets 1, 0 or -1; others raise ValueError on the CPU."""
        logits = _check_logits(logits, targets)
        if self.prior is not None and self.prior.shape != logits.shape[-1:]:
            raise ValueError(
                f"the prior has {len(self.prior)} classes, the logits {logits.shape[-1]}"
            )
        one_or_nan = _one_or_nan(targets, -1, 1)
        present, unannotated = targets == 1, targets == -1

        def by_kind(pos: float, neg: float, unann: float) -> Tensor:
            absent_or_unannotated = torch.where(unannotated, unann, neg)
            return torch.where(present, pos, absent_or_unannotated).to(logits.dtype)

        gamma = by_kind(self.gamma_pos, self.gamma_neg, self.gamma_unann)
        alpha = by_kind(self.alpha_pos, self.alpha_neg, self.alpha_unann)
        nll = _focused_nll(logits, present.to(logits.dtype), gamma, self.clip, 0.0, detached=True)
        loss = nll * alpha * self._cell_weights(logits.detach(), unannotated)
        return _reduce(loss, self.reduction) * one_or_nan

    def _cell_weights(self, logits: Tensor, unannotated: Tensor) -> Tensor | float:
        if self.mode == "negative":
            return 1.0
        if self.mode == "ignore":
            return (~unannotated).to(logits.dtype)
        if self.mode == "ignore_normalize_classes":
            annotated = (~unannotated).to(logits.dtype)
            return annotated * (1 + 1 / (1 + annotated.sum(dim=-1, keepdim=True)))
        left_out = _most_likely(logits, unannotated, self.likelihood_topk * logits.shape[0])
        if self.prior is not None:
            left_out = left_out | (unannotated & (self.prior > self.prior_threshold))
        return (~left_out).to(logits.dtype)


def check_targets(targets: Tensor, partial: bool = False) -> None:
    """Raise ValueError naming the first target not in [0, 1], or if ``partial`` not 1, 0 or -1.

    Reads the values, so it waits for the device. The losses call it themselves on the CPU.
    """
    _check_range(targets, -1 if partial else 0, 1)


def _check_range(targets: Tensor, low: int, high: int) -> None:
    if bool(_inside(targets, low, high)):
        return
    outside = (targets < low) | (targets > high) | targets.isnan()
    if low == -1:
        outside |= targets != targets.round()
    value, count = targets[outside][0].item(), int(outside.sum())
    allowed = "exactly 1, 0 or -1" if low == -1 else f"in [{low}, {high}]"
    advice = "; for -1, not annotated, use PartialSelectiveLoss" if (low, value) == (0, -1) else ""
    raise ValueError(f"targets must be {allowed}, got {value:g} ({count} such cells){advice}")


def _inside(targets: Tensor, low: int, high: int) -> Tensor:
    """Scalar bool: is every target in range. NaN is not."""
    if targets.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=targets.device)
    smallest, largest = targets.aminmax()
    inside = (smallest >= low) & (largest <= high)
    if low == -1 and targets.is_floating_point():  # partial targets: whole numbers
        inside = inside & (targets == targets.round()).all()
    return inside


def _one_or_nan(targets: Tensor, low: int = 0, high: int = 1) -> Tensor | float:
    """1, or for targets out of range NaN; on the CPU an error instead. See the module docstring."""
    if targets.dtype == torch.bool:
        return 1.0
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(targets, low, high)
        return 1.0
    return torch.where(_inside(targets, low, high), 1.0, torch.nan)


def _check_options(clip: float | None, reduction: str, *gammas: float) -> float:
    """The margin as a number. Below 1e-6 it would be lost in float32, and log q with it."""
    if min(gammas) < 0:
        raise ValueError(f"gammas must be at least 0, got {min(gammas)}")
    if clip and not 1e-6 <= clip < 1:
        raise ValueError(f"clip must be 0 or None, or in [1e-6, 1), got {clip}")
    if reduction not in ("sum", "mean", "batchmean", "none"):
        raise ValueError(f"unknown reduction {reduction!r}: sum, mean, batchmean or none")
    return clip or 0.0


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
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _reduce(loss: Tensor, reduction: str, shape: torch.Size | None = None) -> Tensor:
    """Reduce a loss per cell, or, given their ``shape``, one already summed over the cells."""
    if reduction == "none":
        return loss
    if shape is None:
        loss, shape = loss.sum(), loss.shape
    if reduction == "sum":
        return loss
    return loss / (shape.numel() if reduction == "mean" else shape[0])


def _focused_nll(
    logits: Tensor, y: Tensor, gamma: Tensor, clip: float, eps: float, detached: bool
) -> Tensor:
    """-(y log p + (1 - y) log q) b ** gamma per cell: the formula that both papers share."""
    log_p, log_q, p_m = _probabilities(logits, clip)
    b = y * torch.sigmoid(-logits) + (1 - y) * p_m
    if detached:
        b = b.detach()
    return -(y * log_p + (1 - y) * log_q) * b.clamp(min=eps) ** gamma


def _probabilities(logits: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """log p, log q and p_m."""
    p = torch.sigmoid(logits)
    if not clip:
        return logsigmoid(logits), logsigmoid(-logits), p
    p_m = (p - clip).clamp(min=0)
    return logsigmoid(logits), torch.log1p(-p_m), p_m


def _most_likely(logits: Tensor, unannotated: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` cells not annotated with the highest logits: those with the smallest q.

    A stable sort would settle ties as well, and take sixty times as long.
    """
    scores = logits.masked_fill(~unannotated, -torch.inf).flatten()
    count = min(count, scores.numel())
    if count == 0:
        return torch.zeros_like(unannotated)
    lowest = scores.topk(count).values[-1]
    above, level = scores > lowest, scores == lowest
    chosen = above | (level & (level.cumsum(0) <= count - above.sum()))
    return chosen.view_as(unannotated) & unannotated


class _SinglePass(torch.autograd.Function):
    """Loss and gradient at once; `backward` scales the gradient in place and hands it over.

    So no second tensor of that size is ever made. A second backward, after one with retain_graph,
    computes the gradient anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        parameters: tuple[float, float, float, float, bool],
        summed: bool,
        with_gradient: bool,
    ) -> Tensor:
        loss, ctx.gradient = _loss_and_gradient(logits, targets, parameters, summed, with_gradient)
        if with_gradient:
            ctx.save_for_backward(logits, targets)
            ctx.parameters, ctx.summed = parameters, summed
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would take the gradient for a constant here, and say nothing.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "AsymmetricLossOptimized has no second derivative: use AsymmetricLoss"
            )
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            logits, targets = ctx.saved_tensors
            _, gradient = _loss_and_gradient(logits, targets, ctx.parameters, ctx.summed, True)
            assert gradient is not None
        return gradient.mul_(grad_output), None, None, None, None


def _loss_and_gradient(
    logits: Tensor,
    targets: Tensor,
    parameters: tuple[float, float, float, float, bool],
    summed: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    x, y = logits.flatten(), targets.flatten()
    gradient = torch.empty_like(x) if with_gradient else None
    on_cpu = x.device.type == "cpu"
    chunk = _CPU_CHUNK if on_cpu else max(1, x.numel())
    parts = []
    for start in range(0, max(1, x.numel()), chunk):
        cells = slice(start, start + chunk)
        out = None if gradient is None else gradient[cells]
        positives = _positives(y[cells]) if on_cpu else None
        if positives is None:
            part = _soft_cells(x[cells], y[cells], out, *parameters)
        else:
            part = _hard_cells(x[cells], positives, out, *parameters)
        parts.append(part.sum() if summed else part)
    minus_loss = torch.stack(parts).sum() if summed else torch.cat(parts).view(logits.shape)
    return -minus_loss, None if gradient is None else gradient.view(logits.shape)


def _soft_cells(
    x: Tensor,
    y: Tensor,
    gradient: Tensor | None,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    eps: float,
    detached: bool,
) -> Tensor:
    """Minus the loss of each cell. Fills in the gradient, by the product rule; d... is d / dx."""
    y = y.to(x.dtype)
    log_p, log_q, p_m = _probabilities(x, clip)
    p, not_p, not_y = torch.sigmoid(x), torch.sigmoid(-x), 1 - y
    gamma = gamma_pos * y + gamma_neg * not_y
    b = y * not_p + not_y * p_m
    base = b.clamp(min=eps)
    weight = base**gamma
    log_likelihood = y * log_p + not_y * log_q
    if gradient is None:
        return weight * log_likelihood
    dp = p * (1 - p)  # rounded as autograd rounds it
    dp_m = dp * (p > clip)
    dlog_q = -dp_m / (1 - p_m) if clip else -p
    torch.mul(weight, -(y * not_p + not_y * dlog_q), out=gradient)
    if not detached:
        db = (not_y * dp_m - y * dp) * (b >= eps)
        gradient -= gamma * weight / base * db * log_likelihood
    return weight * log_likelihood


def _hard_cells(
    x: Tensor,
    positives: Tensor,
    gradient: Tensor | None,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    eps: float,
    detached: bool,
) -> Tensor:
    """`_soft_cells` for y in {0, 1}, few of them 1: takes half the time or less."""
    minus_loss = _negative_cells(x, gradient, gamma_neg, clip, eps, detached)
    mirrored = -x[positives]  # a positive is a negative at -x, without margin
    slope = None if gradient is None else torch.empty_like(mirrored)
    minus_loss[positives] = _negative_cells(mirrored, slope, gamma_pos, 0, eps, detached)
    if gradient is not None and slope is not None:
        gradient[positives] = slope.neg_()
    return minus_loss


def _negative_cells(
    x: Tensor,
    gradient: Tensor | None,
    gamma: float,
    clip: float,
    eps: float,
    detached: bool,
) -> Tensor:
    """`_soft_cells` for y = 0: b is p_m, gamma one number. Passes over memory are the cost."""
    p = torch.sigmoid(x)
    p_m = softshrink(p, clip) if clip else p  # p - clip, and 0 below clip
    base = p_m if gamma >= 1 else p_m.clamp(min=eps)
    slope = base ** (gamma - 1)  # PyTorch multiplies up to exponent 3, so gamma 4 is quick too
    log_q = torch.neg(p_m).log1p_() if clip else logsigmoid(-x)
    if gradient is not None:
        focus = 0 if detached else gamma
        if clip:  # p (1 - p) slope (base / q - gamma log q)
            torch.div(base, torch.sub(1, p_m, out=gradient), out=gradient)
            if focus:
                gradient.sub_(log_q, alpha=focus)
            gradient.mul_(slope)
            if gamma < 1:
                gradient.mul_(p > clip)
            torch.ops.aten.sigmoid_backward.grad_input(gradient, p, grad_input=gradient)
        else:  # the same with q = 1 - p
            torch.addcmul(base, log_q, 1 - p, value=-focus, out=gradient).mul_(slope).mul_(p)
    return log_q.mul_(slope).mul_(base)


def _positives(targets: Tensor) -> Tensor | None:
    """Flat indices of the ones among hard targets on the CPU, None for soft targets.

    Targets out of range raise ValueError; zeros are in range, so only the others need a look.
    """
    targets = targets.flatten()
    present = targets.bool()
    cells = None
    if len(present) % 8 == 0:
        # `nonzero` visits cells one by one: where few are present, visit octets of cells first.
        octets = present.view(torch.int64).nonzero()
        if 64 * len(octets) < len(present):
            cells = (8 * octets + torch.arange(8)).flatten()
            cells = cells[present[cells]]
    if cells is None:
        cells = present.nonzero().flatten()
    values = targets[cells]
    if bool((values == 1).all()):
        return cells
    check_targets(values)
    return None
