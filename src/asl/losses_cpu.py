"""`AsymmetricLossOptimized` on a CPU: the same numbers in a fraction of the time and memory.

On a CPU the passes over memory are the cost. So the cells are worked on in chunks that stay in the
cache. And most targets are 0, the others 1: such a chunk is computed in place as if all were 0, and
then its few positives are put right. `losses.py` uses this file where it is, and works without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softshrink

# Enough cells to feed all threads, and few enough that their buffers stay in the cache.
CHUNK = 1 << 18


def loss_and_gradient(
    formula: Callable[..., tuple[Tensor, Tensor]],
    logits: Tensor,
    targets: Tensor,
    options: tuple[Any, ...],
    summed: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss, per cell or ``summed``, and its gradient in the logits: (N, C).

    ``formula(logits, targets, *options)`` returns both for targets of any kind, which lie in
    [0, 1]. The options begin with gamma_neg, gamma_pos, clip, eps and whether the focusing weight
    is held constant in the gradient.
    """
    gamma_neg, gamma_pos, clip, eps, detached = options[:5]
    gammas = float(gamma_neg), float(gamma_pos)
    # `_negative_cells` has no floor. A power between 0 and 1 is too steep at 0 to go without.
    suited = eps <= 1e-6 and all(gamma == 0 or gamma >= 1 for gamma in gammas)
    x, y = logits.flatten(), targets.flatten()
    gradient = torch.empty_like(x)
    losses = []
    for start in range(0, max(1, x.numel()), CHUNK):
        cells = slice(start, start + CHUNK)
        positives = _positives(y[cells]) if suited else None
        if positives is None:
            loss, gradient[cells] = formula(x[cells], y[cells], *options)
            losses.append(loss.sum() if summed else loss)
        else:
            minus_loss = _hard_cells(x[cells], positives, gradient[cells], *gammas, clip, detached)
            losses.append(-minus_loss.sum() if summed else minus_loss.neg_())
    loss = torch.stack(losses).sum() if summed else torch.cat(losses).view(logits.shape)
    return loss, gradient.view(logits.shape)


def _positives(targets: Tensor) -> Tensor | None:
    """Return the indices of the ones among hard targets, None for soft targets."""
    present = targets != 0
    cells = None
    if len(present) % 8 == 0:
        # `nonzero` visits cells one by one. Where few are present, visit eight at a time first.
        octets = present.view(torch.int64).nonzero()
        if 64 * len(octets) < len(present):
            cells = (8 * octets + torch.arange(8)).flatten()
            cells = cells[present[cells]]
    if cells is None:
        cells = present.nonzero().flatten()
    return cells if bool((targets[cells] == 1).all()) else None


def _hard_cells(
    x: Tensor,
    positives: Tensor,
    gradient: Tensor,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    detached: bool,
) -> Tensor:
    """Return minus the loss where y is 1 at the indices ``positives``, else 0.

    Fills in the gradient of the loss.
    """
    minus_loss = _negative_cells(x, gradient, gamma_neg, clip, detached)
    mirrored = -x[positives]  # a positive is a negative at -x, without margin
    slope = torch.empty_like(mirrored)
    minus_loss[positives] = _negative_cells(mirrored, slope, gamma_pos, 0, detached)
    gradient[positives] = slope.neg_()
    return minus_loss


def _negative_cells(
    x: Tensor, gradient: Tensor, gamma: float, clip: float, detached: bool
) -> Tensor:
    """Return minus the loss where y is 0, log q p_m ** gamma; fill in the gradient of the loss.

    gamma is 0 or at least 1: then the floor of p_m, eps, would change either by less than eps, and
    is left out.
    """
    p = torch.sigmoid(x)
    p_m = softshrink(p, clip) if clip else p  # p - clip, and 0 up to clip
    base = p_m if gamma else p_m.clamp(min=1e-8)  # of the power 0, which must not be 0 / 0
    power = base ** (gamma - 1)  # PyTorch multiplies up to exponent 3, so gamma 4 is quick too
    log_q = torch.neg(p_m).log1p_() if clip else logsigmoid(-x)
    focus = 0 if detached else gamma
    # p (1 - p) power (base / q - gamma log q), where without a margin q = 1 - p
    if clip:
        torch.div(base, torch.sub(1, p_m, out=gradient), out=gradient)
        if focus:
            gradient.sub_(log_q, alpha=focus)
    else:
        torch.addcmul(base, log_q, 1 - p, value=-focus, out=gradient)
    gradient.mul_(power)
    minus_loss = log_q.mul_(power).mul_(base)
    if clip:
        gradient.mul_(torch.sub(1, p, out=power))  # the buffer is free: no new one is allocated
        if not gamma:
            gradient.mul_(p > clip)
    gradient.mul_(p)
    return minus_loss
