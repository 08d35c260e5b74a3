"""The losses against the official code's numbers, the formula and autograd."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import asl.losses
from asl.losses import (
    ASLSingleLabel,
    AsymmetricLoss,
    AsymmetricLossOptimized,
    PartialSelectiveLoss,
    asymmetric_loss,
    check_targets,
)

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "reference.json").read_text())["losses"]
LOSSES = {
    "AsymmetricLoss": AsymmetricLoss,
    "AsymmetricLossOptimized": AsymmetricLossOptimized,
    "ASLSingleLabel": ASLSingleLabel,
    "PartialSelectiveLoss": PartialSelectiveLoss,
}
PARTS = {
    "AsymmetricLoss": "loss ASL",
    "AsymmetricLossOptimized": "loss ASL, optimized",
    "ASLSingleLabel": "loss ASL, one label",
    "PartialSelectiveLoss": "loss CSL, its modes and priors",
}
MULTI_LABEL = [AsymmetricLoss, AsymmetricLossOptimized]
GAMMAS = [(4, 1), (4, 0), (0, 0), (1, 1), (2, 2), (3, 1), (0, 2), (2.5, 0.5), (0.5, 0.3)]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "reference.safetensors")


def batch(kind: str = "hard", shape=(16, 37), dtype=torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=draw, dtype=dtype)
    uniform = torch.rand(shape, generator=draw, dtype=dtype)
    kinds = {
        "hard": (uniform < 0.05).to(dtype),
        "sparse": (uniform < 0.005).to(dtype),
        "dense": (uniform < 0.5).to(dtype),
        "soft": uniform,
        "smoothed": (uniform < 0.05).to(dtype) * 0.9,
        "empty": torch.zeros(shape, dtype=dtype),
        "partial": (3 * uniform).floor() - 1,
    }
    return logits, kinds[kind]


def value_and_grad(loss, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, targets)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), grad


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']}-{case['loss']}")
def test_values_and_gradients_of_the_official_code(case, golden, same):
    not_options = {"id", "loss", "targets", "value", "uses_prior"}
    options = {name: value for name, value in case.items() if name not in not_options}
    if case["loss"] == "PartialSelectiveLoss":
        options["mode"] = options["mode"] or "negative"  # the official default does the same
        options["prior"] = golden["prior"] if case["uses_prior"] else None
        if options["prior_threshold"] is None:
            options["prior"] = None
            del options["prior_threshold"]
    loss = LOSSES[case["loss"]](**options)
    value, grad = value_and_grad(loss, golden["logits"], golden[case["targets"]])
    expected = case.get("value", golden.get(f"value{case['id']}"))
    close = {"rtol": 2e-5, "atol": 1e-6}
    same(PARTS[case["loss"]], value, torch.as_tensor(expected).view_as(value), **close)
    same("gradients of these losses", grad, golden[f"grad{case['id']}"], **close)


def formula(x, y, gamma_neg, gamma_pos, clip, detached) -> Tensor:
    """RECIPES.md section 1, letter by letter, with q = min(1 - p + m, 1)."""
    p = torch.sigmoid(x)
    q = (1 - p + clip).clamp(max=1)
    pt = p * y + q * (1 - y)
    weight = (1 - pt) ** (gamma_pos * y + gamma_neg * (1 - y))
    weight = weight.detach() if detached else weight
    return -(y * p.log() + (1 - y) * q.log()) * weight


@pytest.mark.parametrize("loss", MULTI_LABEL)
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("clip", [0, 0.05, 0.3])
@pytest.mark.parametrize("detached", [False, True])
def test_formula_in_float64(loss, kind, clip, detached):
    logits, targets = batch(kind, dtype=torch.float64)
    for gamma_neg, gamma_pos in [(4, 1), (2, 2), (1, 0), (0, 3)]:
        options = gamma_neg, gamma_pos, clip
        actual = value_and_grad(loss(*options, 1e-8, detached, "none"), logits, targets)
        expected = value_and_grad(lambda x, y: formula(x, y, *options, detached), logits, targets)  # noqa: B023
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.2, 0.9])
def test_two_ways_to_write_the_shifted_probability_are_one(margin):
    logits = torch.linspace(-15, 15, 1001, dtype=torch.float64)
    p = torch.sigmoid(logits)
    p_m = (p - margin).clamp(min=0)
    q = (1 - p + margin).clamp(max=1)
    torch.testing.assert_close(1 - p_m, q)
    loss = asymmetric_loss(logits, torch.zeros_like(p), 2, 0, margin, reduction="none")
    torch.testing.assert_close(loss, -(p_m**2) * q.log(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("gammas", GAMMAS, ids=str)
@pytest.mark.parametrize("clip", [0, 0.05, None])
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("kind", ["hard", "sparse", "dense", "soft", "smoothed", "empty"])
def test_optimized_equals_plain(gammas, clip, detached, kind):
    logits, targets = batch(kind)
    logits[0, :6] = torch.tensor([-100.0, 100, -30, 30, 0, -2.9444389])
    for reduction in ("sum", "none"):
        options = *gammas, clip, 1e-8, detached, reduction
        plain = value_and_grad(AsymmetricLoss(*options), logits, targets)
        fast = value_and_grad(AsymmetricLossOptimized(*options), logits, targets)
        torch.testing.assert_close(fast, plain, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_optimized_works_in_chunks_and_on_strided_input(kind, reduction, monkeypatch):
    logits, targets = batch(kind, (9, 41))
    targets[7:] = batch("hard", (2, 41))[1]  # so that one chunk has hard targets in either case
    expected = value_and_grad(AsymmetricLoss(reduction=reduction), logits, targets)
    monkeypatch.setattr("asl.losses_cpu.CHUNK", 50)
    loss = AsymmetricLossOptimized(disable_torch_grad_focal_loss=True, reduction=reduction)
    torch.testing.assert_close(value_and_grad(loss, logits, targets), expected)
    strided = value_and_grad(loss, logits.t().contiguous().t(), targets.t().contiguous().t())
    torch.testing.assert_close(strided, expected)


@pytest.mark.parametrize("few", [True, False])
def test_optimized_finds_every_positive_wherever_it_lies(few):
    logits = torch.linspace(-3, 3, 4096).view(64, 64)
    for position in range(0, 4096, 37):
        targets = torch.zeros(4096) if few else (torch.arange(4096) % 3 == 0).float()
        targets[position] = 1 - targets[position]
        pair = logits, targets.view(64, 64)
        torch.testing.assert_close(AsymmetricLossOptimized()(*pair), AsymmetricLoss()(*pair))


@pytest.mark.parametrize("eps", [1e-8, 0.1, 0])
@pytest.mark.parametrize("gammas", [(4, 1), (1, 2), (0.5, 0.3), (1.5, 0)], ids=str)
@pytest.mark.parametrize("clip", [0, 0.05])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_below_eps_the_focusing_weight_is_constant(eps, gammas, clip, kind):
    logits, targets = batch(kind, dtype=torch.float64)
    logits[:2] = torch.linspace(-22, 22, 74, dtype=torch.float64).view(2, 37)
    targets[0] = 1
    options = *gammas, clip, eps, False, "none"
    plain = value_and_grad(AsymmetricLoss(*options), logits, targets)
    torch.testing.assert_close(
        value_and_grad(AsymmetricLossOptimized(*options), logits, targets), plain, rtol=0, atol=2e-8
    )
    if eps == 0.1:  # the same from the definition
        p_m = (torch.sigmoid(logits) - clip).clamp(min=0)
        b = targets * torch.sigmoid(-logits) + (1 - targets) * p_m
        gamma = gammas[1] * targets + gammas[0] * (1 - targets)
        unfocused = AsymmetricLoss(0, 0, clip, reduction="none")(logits, targets)
        torch.testing.assert_close(plain[0], unfocused * b.clamp(min=0.1) ** gamma)


@pytest.mark.parametrize("loss", MULTI_LABEL)
@pytest.mark.parametrize("gamma", [0, 1e-3, 0.5, 1])
@pytest.mark.parametrize("clip", [0, 0.05])
@pytest.mark.parametrize("detached", [False, True])
def test_without_eps_values_and_gradients_are_finite(loss, gamma, clip, detached):
    logits = torch.tensor(
        [-1e4, -103, -88, -40, -17, -3, math.log(0.05 / 0.95), 0, 17, 40, 88, 1e4]
    )
    logits = logits.expand(4, -1)
    targets = torch.tensor([0, 1, 0.5, 1e-7])[:, None].expand(logits.shape)
    loss = loss(gamma, gamma, clip, 0, detached, "none")
    for rows in (slice(0, 2), slice(0, 4)):  # hard targets alone, and soft ones with them
        value, grad = value_and_grad(loss, logits[rows], targets[rows])
        assert value.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("loss", MULTI_LABEL)
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("options", [(4, 1, 0.05), (2.5, 0.5, 0.1), (0, 0, 0), (1, 2, 0)], ids=str)
def test_gradcheck(loss, kind, options):
    logits, targets = batch(kind, (4, 6), torch.float64)
    loss = loss(*options, disable_torch_grad_focal_loss=False)
    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(), targets))


@pytest.mark.parametrize("loss", MULTI_LABEL)
@pytest.mark.parametrize("detached", [False, True])
def test_special_cases_are_cross_entropy_and_focal_loss(loss, detached):
    logits, targets = batch("soft")
    logits[0, :4] = torch.tensor([-100.0, 100, -20, 20])
    actual = value_and_grad(loss(0, 0, 0, 1e-8, detached, "none"), logits, targets)

    def bce(x: Tensor, y: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(x, y, reduction="none")

    torch.testing.assert_close(actual, value_and_grad(bce, logits, targets))
    _, targets = batch("hard")
    ce = bce(logits, targets)
    focal = loss(2, 2, None, reduction="none")(logits, targets)
    torch.testing.assert_close(focal, (1 - torch.exp(-ce)) ** 2 * ce, rtol=1e-4, atol=1e-6)
    index = targets.argmax(dim=1)
    torch.testing.assert_close(ASLSingleLabel(0, 0, 0)(logits, index), cross_entropy(logits, index))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16])
@pytest.mark.parametrize("loss", MULTI_LABEL)
def test_any_type_of_targets(loss, dtype):
    logits, targets = batch()
    torch.testing.assert_close(loss()(logits, targets.to(dtype)), loss()(logits, targets))
    logits, targets = logits[:3, :12], targets[:3, :12].to(dtype)
    expected = loss()(logits[1:], targets[1:].clone())
    assert loss()(logits[1:], targets.contiguous()[1:]) == expected  # a slice of a larger tensor


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16])
@pytest.mark.parametrize("mode", ["negative", "ignore", "ignore_normalize_classes", "selective"])
def test_any_type_of_targets_that_are_all_annotated(mode, dtype):
    logits, targets = batch()
    expected = PartialSelectiveLoss(mode)(logits, targets)
    assert PartialSelectiveLoss(mode)(logits, targets.to(dtype)) == expected


@pytest.mark.parametrize("loss", [*MULTI_LABEL, PartialSelectiveLoss])
@pytest.mark.parametrize("bad", [2, 255])
def test_unsigned_targets_out_of_range_are_named(loss, bad):
    logits, targets = batch()
    targets[2, 3] = bad
    with pytest.raises(ValueError, match=f"got {bad} \\(1 such"):
        loss()(logits, targets.to(torch.uint8))


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("clip", [0, 0.05])
def test_soft_targets_may_need_a_gradient(clip, detached):
    logits, targets = batch("soft", (4, 6), torch.float64)
    pair = logits.requires_grad_(), targets.requires_grad_()
    options = 2.5, 1, clip, 1e-8, detached, "none"
    loss = AsymmetricLoss(*options)
    if not detached:
        assert torch.autograd.gradcheck(loss, pair)
    else:  # the loss is then linear in the targets
        (grad,) = torch.autograd.grad(loss(*pair).sum(), targets)
        with torch.no_grad():
            ones, zeros = torch.ones_like(targets), torch.zeros_like(targets)
            unfocused = AsymmetricLoss(0, 0, clip, reduction="none")
            weight = loss(*pair) / unfocused(*pair)
            expected = weight * (unfocused(logits, ones) - unfocused(logits, zeros))
        torch.testing.assert_close(grad, expected)
    optimized = AsymmetricLossOptimized(*options)
    with pytest.raises(RuntimeError, match="no gradient for targets: use AsymmetricLoss"):
        optimized(*pair)
    with torch.no_grad():
        torch.testing.assert_close(optimized(*pair), loss(*pair))


@pytest.mark.parametrize("loss", [*MULTI_LABEL, PartialSelectiveLoss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_computes_in_float32(loss, dtype, autocast):
    logits, targets = batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, grad = value_and_grad(loss(), logits.to(dtype), targets)
    expected, expected_grad = value_and_grad(loss(), logits.to(dtype).float(), targets)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad.to(dtype))
    assert loss()(logits.double(), targets).dtype == torch.float64


@pytest.mark.parametrize("loss", MULTI_LABEL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("gammas", [(4, 1), (0.5, 0.5), (0, 0)], ids=str)
@pytest.mark.parametrize("clip", [0, 0.05])
@pytest.mark.parametrize("detached", [False, True])
def test_extreme_logits(loss, dtype, gammas, clip, detached):
    logits = torch.tensor([[-100.0, 100, -100, 100, -3, 3]], dtype=dtype)
    targets = torch.tensor([[1, 1, 0, 0, 0, 0]])
    loss = loss(*gammas, clip, 1e-8, detached, "none")
    value, grad = value_and_grad(loss, logits, targets)
    assert value.isfinite().all()
    assert grad.isfinite().all()
    assert (grad[:, :2] <= 0).all()
    assert (grad[:, 2:] >= 0).all()
    assert grad[0, 0] < -0.9  # a confidently missed positive
    assert grad[0, 5] > 1e-3
    if clip:
        assert grad[0, 4] == 0  # below the margin: out of the loss
    else:
        assert grad[0, 3] > 0.9  # a confident false alarm


@pytest.mark.parametrize("loss", MULTI_LABEL)
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("detached", [False, True])
def test_cells_that_cost_next_to_nothing_keep_their_digits(loss, kind, detached):
    logits = torch.tensor([[20.0, -20, 9, -9, 20, -20]])
    targets = torch.tensor([[1.0, 0, 1, 0, 1, 0 if kind == "hard" else 0.5]])
    loss = loss(1, 1, 0, 1e-30, detached, "none")
    single = value_and_grad(loss, logits, targets)
    double = value_and_grad(loss, logits.double(), targets.double())
    torch.testing.assert_close(single, double, rtol=1e-5, atol=0, check_dtype=False)


@pytest.mark.parametrize("loss", MULTI_LABEL)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_fractional_gamma_has_a_finite_slope_at_the_margin(loss, kind):
    logits, targets = batch(kind)
    logits[1] = math.log(0.05 / 0.95)
    targets[2] = 0
    logits[2] = -9
    loss = loss(0.5, 0.5, 0.05, disable_torch_grad_focal_loss=False)
    assert value_and_grad(loss, logits, targets)[1].isfinite().all()


@pytest.mark.parametrize("loss", MULTI_LABEL)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (2, r"in \[0, 1\], got 2 \(1 such"),
        (-1, "got -1 .*PartialSelectiveLoss"),
        (1.5, "got 1.5"),
        (math.nan, "got nan"),
        (math.inf, "got inf"),
    ],
)
@pytest.mark.parametrize("kind", ["hard", "empty", "soft"])
def test_a_target_out_of_range_is_named(loss, bad, message, kind):
    logits, targets = batch(kind)
    targets[3, 4] = bad
    with pytest.raises(ValueError, match=message):
        loss()(logits, targets)
    with pytest.raises(ValueError, match=message):
        check_targets(targets)


@pytest.mark.parametrize("loss", MULTI_LABEL)
def test_targets_out_of_range_are_counted_over_all_chunks(loss, monkeypatch):
    monkeypatch.setattr("asl.losses_cpu.CHUNK", 50)
    logits, targets = batch()
    targets[0, 3] = targets[9, 9] = targets[15, 36] = 7
    with pytest.raises(ValueError, match="got 7 \\(3 such"):
        loss()(logits, targets)


@pytest.mark.parametrize("bad", [2, -0.5, -2, math.nan])
def test_a_partial_target_that_is_neither_in_range_nor_minus_one_is_named(bad):
    logits, targets = batch("partial")
    check_targets(targets, partial=True)
    targets[3, 4] = bad
    with pytest.raises(ValueError, match=rf"in \[0, 1\] or -1, got {bad:g}"):
        PartialSelectiveLoss()(logits, targets)
    with pytest.raises(ValueError, match=f"got {bad:g}"):
        check_targets(targets, partial=True)


@pytest.mark.parametrize(
    ("loss", "targets", "bad"),
    [
        (AsymmetricLoss(), batch("hard")[1], 2),
        (AsymmetricLossOptimized(), batch("soft")[1], math.nan),
        (AsymmetricLossOptimized(), batch("hard")[1].long(), -1),
        (PartialSelectiveLoss(), batch("partial")[1], -0.5),
        (ASLSingleLabel(), torch.arange(16), 37),
    ],
    ids=lambda value: type(value).__name__,
)
def test_where_reading_targets_would_wait_a_bad_one_makes_loss_and_gradient_nan(loss, targets, bad):
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    logits, _ = batch()
    value, grad = value_and_grad(compiled, logits, targets)
    assert value.isfinite()
    assert grad.isfinite().all()
    targets = targets.clone()
    targets.view(-1)[3] = bad
    value, grad = value_and_grad(compiled, logits, targets)
    assert value.isnan()
    assert grad.isnan().any()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        *[
            (lambda loss=loss, d=detached, r=reduction: loss(4, 1, 0.05, 1e-8, d, r), kind)
            for loss in MULTI_LABEL
            for detached in (False, True)
            for reduction in ("sum", "none")
            for kind in ("hard", "soft", "empty")
        ],
        (PartialSelectiveLoss, "partial"),
    ],
)
def test_on_an_accelerator_a_bad_target_makes_loss_and_gradient_nan(make, kind, monkeypatch):
    monkeypatch.setattr("asl.losses._free_to_read", lambda targets: False)
    monkeypatch.setattr("asl.losses._in_chunks", None)
    logits, targets = batch(kind)
    assert all(each.isfinite().all() for each in value_and_grad(make(), logits, targets))
    for bad in (2, -2, math.nan, math.inf):
        targets[5, 6] = bad
        assert all(each.isnan().any() for each in value_and_grad(make(), logits, targets))


PRIOR = torch.linspace(0, 0.2, 37)
EVERY_LOSS = [
    *[(loss(reduction=reduction), "hard") for loss in MULTI_LABEL for reduction in ("sum", "none")],
    (AsymmetricLoss(2.5, 0.5, 0), "soft"),
    (AsymmetricLossOptimized(), "soft"),
    (ASLSingleLabel(), "index"),
    (PartialSelectiveLoss("negative"), "partial"),
    (PartialSelectiveLoss("ignore"), "partial"),
    (PartialSelectiveLoss("ignore_normalize_classes"), "partial"),
    (PartialSelectiveLoss("selective", prior=PRIOR, clip=0.05), "partial"),
]


@pytest.fixture(params=EVERY_LOSS, ids=lambda pair: f"{type(pair[0]).__name__}-{pair[1]}")
def any_loss(request):
    loss, kind = request.param
    logits, targets = batch("hard" if kind == "index" else kind)
    return loss, logits, torch.arange(16) if kind == "index" else targets


def test_compiles_as_one_graph(any_loss):
    loss, logits, targets = any_loss
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = value_and_grad(loss, logits, targets)
    actual = value_and_grad(compiled, logits, targets)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_exports(any_loss):
    loss, logits, targets = any_loss
    exported = torch.export.export(loss, (logits, targets)).module()
    torch.testing.assert_close(exported(logits, targets), loss(logits, targets))


def test_leaves_inputs_and_grad_mode_alone_and_repeats_itself(any_loss):
    loss, logits, targets = any_loss
    copies = logits.clone(), targets.clone()
    leaf = logits.clone().requires_grad_()
    first = value_and_grad(loss, logits, targets)
    with torch.no_grad():
        assert not loss(leaf, targets).requires_grad
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert loss(leaf, targets).is_inference()
        assert torch.is_inference_mode_enabled()
    assert torch.equal(logits, copies[0])
    assert torch.equal(targets, copies[1])
    again = value_and_grad(loss, logits, targets)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("loss", [*MULTI_LABEL, PartialSelectiveLoss])
def test_reductions(loss):
    logits, targets = batch()
    cells = loss(reduction="none")(logits, targets)
    assert cells.shape == logits.shape
    for reduction, divisor in {"sum": 1, "mean": cells.numel(), "batchmean": len(cells)}.items():
        value, grad = value_and_grad(loss(reduction=reduction), logits, targets)
        torch.testing.assert_close(value, cells.sum() / divisor)
        _, cell_grad = value_and_grad(loss(reduction="none"), logits, targets)
        torch.testing.assert_close(grad, cell_grad / divisor)


def test_module_is_the_function_and_optimized_only_differs_in_its_default():
    logits, targets = batch()
    options = {"gamma_neg": 3, "gamma_pos": 2, "clip": 0.1, "reduction": "mean"}
    assert AsymmetricLoss(**options)(logits, targets) == asymmetric_loss(logits, targets, **options)
    assert AsymmetricLoss().disable_torch_grad_focal_loss
    assert not AsymmetricLossOptimized().disable_torch_grad_focal_loss


def test_optimized_allows_a_second_backward_and_refuses_a_second_derivative():
    logits, targets = batch()
    logits.requires_grad_()
    value = AsymmetricLossOptimized()(logits, targets)
    (first,) = torch.autograd.grad(value, logits, retain_graph=True)
    (second,) = torch.autograd.grad(3 * value, logits, retain_graph=True)
    torch.testing.assert_close(second, 3 * first)
    with pytest.raises(RuntimeError, match="no second derivative: use AsymmetricLoss"):
        torch.autograd.grad(value, logits, create_graph=True)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_optimized_holds_a_single_tensor_for_backward(kind):
    logits, targets = batch(kind)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        value = AsymmetricLossOptimized()(logits.requires_grad_(), targets)
    (gradient,) = saved
    value.backward()
    assert torch.equal(gradient, logits.grad)


class Operations(TorchDispatchMode):
    """Counts what PyTorch dispatches, views and allocations included."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float32])
@pytest.mark.parametrize("clip", [0, 0.05])
@pytest.mark.parametrize("detached", [False, True])
def test_optimized_dispatches_at_most_three_fifths_of_the_operations(dtype, clip, detached):
    """Device "meta" takes the way of an accelerator: all that is not the CPU does."""
    counts = []
    for loss in MULTI_LABEL:
        logits = torch.empty(8, 5, device="meta", requires_grad=True)
        targets = torch.empty(8, 5, device="meta", dtype=dtype)
        with Operations() as operations:
            loss(clip=clip, disable_torch_grad_focal_loss=detached)(logits, targets).backward()
        counts.append(operations.count)
    plain, optimized = counts
    assert optimized <= 0.6 * plain


def test_on_a_cpu_optimized_takes_half_of_the_memory_of_the_transcription():
    path = Path(__file__).parents[1] / "bench" / "losses.py"
    spec = importlib.util.spec_from_file_location("bench_losses", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    logits, targets = batch("sparse", (64, 9605))
    logits.requires_grad_()
    plain = bench.peak_mebibytes(bench.transcription, logits, targets)
    optimized = bench.peak_mebibytes(AsymmetricLossOptimized(), logits, targets)
    assert optimized < plain / 2


@pytest.mark.parametrize("loss", [*MULTI_LABEL, PartialSelectiveLoss])
def test_an_empty_batch_costs_nothing(loss):
    value, grad = value_and_grad(loss(), torch.zeros(0, 5), torch.zeros(0, 5))
    assert value == 0
    assert grad.shape == (0, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AsymmetricLoss(reduction="max"), "unknown reduction 'max'"),
        (lambda: AsymmetricLoss(gamma_neg=-1), "gamma_neg must be at least 0 .* got -1"),
        (lambda: AsymmetricLoss(gamma_pos=math.inf), "gamma_pos must be .* finite, got inf"),
        (lambda: AsymmetricLossOptimized(gamma_neg=math.nan), "gamma_neg must be .* got nan"),
        (lambda: AsymmetricLoss(eps=-1e-8), "eps must be at least 0"),
        (lambda: AsymmetricLoss(eps=math.nan), "eps must be .* got nan"),
        (lambda: asymmetric_loss(*batch(), gamma_neg=math.nan), "gamma_neg must be .* got nan"),
        (lambda: asymmetric_loss(*batch(), clip=-0.1), "clip must be .* got -0.1"),
        (lambda: AsymmetricLoss(clip=1), "clip must be .* got 1"),
        (lambda: asymmetric_loss(*batch(), clip=1e-7), "clip must be .* got 1e-07"),
        (lambda: asymmetric_loss(*batch(), clip=math.nan), "clip must be .* got nan"),
        (lambda: ASLSingleLabel(gamma_pos=math.inf), "gamma_pos must be .* got inf"),
        (lambda: ASLSingleLabel(gamma_neg=-2), "gamma_neg must be .* got -2"),
        (lambda: ASLSingleLabel(eps=math.nan), "eps must be .* got nan"),
        (lambda: ASLSingleLabel(reduction="max"), "unknown reduction 'max'"),
        (lambda: PartialSelectiveLoss(gamma_pos=math.nan), "gamma_pos must be .* got nan"),
        (lambda: PartialSelectiveLoss(gamma_neg=math.inf), "gamma_neg must be .* got inf"),
        (lambda: PartialSelectiveLoss(gamma_unann=math.nan), "gamma_unann must be .* got nan"),
        (lambda: PartialSelectiveLoss(alpha_pos=math.nan), "alpha_pos must be .* got nan"),
        (lambda: PartialSelectiveLoss(alpha_neg=math.inf), "alpha_neg must be .* got inf"),
        (lambda: PartialSelectiveLoss(alpha_unann=-1), "alpha_unann must be .* got -1"),
        (lambda: PartialSelectiveLoss(clip=2), "clip must be .* got 2"),
        (lambda: PartialSelectiveLoss(prior=torch.zeros(2, 3)), "prior must be a vector"),
        (lambda: AsymmetricLossOptimized(clip=1.5), "clip must be .* got 1.5"),
        (lambda: PartialSelectiveLoss("some"), "unknown mode 'some'"),
        (lambda: PartialSelectiveLoss(likelihood_topk=-1), "likelihood_topk"),
        (lambda: PartialSelectiveLoss(prior=torch.tensor([0.1, 7])), "prior must be"),
        (lambda: PartialSelectiveLoss(prior=PRIOR)(torch.zeros(2, 3), torch.zeros(2, 3)), "37"),
        (lambda: AsymmetricLoss()(torch.zeros(2, 3), torch.zeros(2)), r"\(2, 3\) and \(2,\)"),
        (lambda: AsymmetricLossOptimized()(torch.zeros(2, 3), torch.zeros(3, 2)), "same shape"),
        (lambda: AsymmetricLoss()(torch.zeros(2, 3).long(), torch.zeros(2, 3)), "floating point"),
        (lambda: ASLSingleLabel()(torch.zeros(2, 3), torch.zeros(2, 3)), r"indices \(N,\)"),
        (lambda: ASLSingleLabel()(torch.zeros(2, 3), torch.zeros(2)), "must be integers"),
        (lambda: ASLSingleLabel()(torch.zeros(2, 3), torch.tensor([True, False])), "integers, got"),
        (lambda: ASLSingleLabel()(torch.zeros(2, 3), torch.tensor([0, 3])), r"\[0, 2\], got 3"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def selective(logits: Tensor, targets: Tensor, topk: float, prior: Tensor | None = None) -> Tensor:
    """Which cells count, read off the loss."""
    loss = PartialSelectiveLoss(
        likelihood_topk=topk, prior=prior, prior_threshold=0.5, gamma_unann=0, reduction="none"
    )
    return loss(logits, targets) > 0


def test_selection_takes_the_first_of_equal_cells():
    unannotated = torch.full((2, 4), -1)
    equal = torch.zeros(2, 4)
    assert selective(equal, unannotated, 1).tolist() == [[False, False, True, True], [True] * 4]
    equal[1, 3] = 1
    assert selective(equal, unannotated, 1).tolist() == [[False, *[True] * 3], [*[True] * 3, False]]


def test_selection_may_be_a_share_of_the_cells_that_are_not_annotated():
    logits = torch.arange(16.0).reshape(2, 8)
    targets = torch.full((2, 8), -1)
    targets[1, 4:] = 0  # the four highest are known: twelve are left
    for share, left_out in ((0.25, [9, 10, 11]), (0.01, []), (0.05, [11]), (0.99, range(12))):
        counted = selective(logits, targets, share).flatten()
        assert (~counted).nonzero().flatten().tolist() == list(left_out)
    assert selective(logits, targets.clamp(min=0), 0.5).all()


def test_selection_spends_its_budget_on_classes_that_the_prior_left_out():
    logits = torch.tensor([[9.0, 8, 7, 6], [5, 4, 3, 2]])
    targets = torch.tensor([[-1, -1, -1, -1], [-1, 0, 1, -1]])
    counted = selective(logits, targets, 1, prior=torch.tensor([0.9, 0, 0, 0]))
    assert counted.tolist() == [[False, False, True, True], [False, True, True, True]]
    assert selective(logits, targets, 0).all()
    assert selective(logits, targets, 9).equal(targets != -1)


def test_a_class_as_frequent_as_the_threshold_is_assumed_absent():
    prior = torch.tensor([0.5, math.nextafter(0.5, 1) + 1e-6])
    unannotated = torch.full((1, 2), -1)
    assert selective(torch.zeros(1, 2), unannotated, 0, prior).tolist() == [[True, False]]


def test_selection_is_by_likelihood_among_unannotated_cells_alone():
    logits = torch.tensor([[9.0, -9, 8, -8], [1, 2, 3, 4]])
    targets = torch.tensor([[1, -1, 0, -1], [-1, -1, -1, -1]])
    expected = [[True, True, True, True], [True, True, False, False]]
    assert selective(logits, targets, 1).tolist() == expected


@pytest.mark.parametrize("clip", [None, 0.1])
def test_partial_loss_weighs_each_kind_by_its_own_gamma_and_alpha(clip):
    logits, targets = batch("partial", dtype=torch.float64)
    gammas, alphas = (0.3, 1.1, 2.7), (0.9, 0.6, 0.7)
    loss = PartialSelectiveLoss("negative", *gammas, *alphas, clip=clip, reduction="none")
    value, grad = value_and_grad(loss, logits, targets)
    for kind, gamma, alpha in zip((1, 0, -1), gammas, alphas, strict=True):
        alike = (targets == kind, torch.full_like(targets, float(kind == 1)))
        plain = AsymmetricLoss(gamma, gamma, clip, reduction="none")
        expected = value_and_grad(plain, logits, alike[1])
        torch.testing.assert_close(value[alike[0]], alpha * expected[0][alike[0]])
        torch.testing.assert_close(grad[alike[0]], alpha * expected[1][alike[0]])


@pytest.mark.parametrize("mode", ["ignore", "ignore_normalize_classes"])
def test_cells_that_are_not_annotated_count_nothing(mode):
    logits, targets = batch("partial")
    cells = PartialSelectiveLoss(mode, reduction="none")(logits, targets)
    everything = PartialSelectiveLoss("negative", reduction="none")(logits, targets)
    annotated = targets != -1
    weight = 1 + 1 / (1 + annotated.sum(dim=1, keepdim=True)) if "normalize" in mode else 1
    torch.testing.assert_close(cells, everything * annotated * weight)


@pytest.mark.parametrize("eps", [0, 0.1])
def test_single_label_formula(eps):
    logits, _ = batch(dtype=torch.float64)
    index = torch.arange(16)
    p, y = logits.softmax(dim=1), torch.eye(37, dtype=torch.float64)[:16]
    smoothed = y * (1 - eps) + eps / 37
    expected = -smoothed * p.log() * torch.where(y == 1, (1 - p) ** 2, p**3)
    cells = ASLSingleLabel(2, 3, eps, reduction="none")(logits, index)
    torch.testing.assert_close(cells, expected.sum(dim=1))
    for reduction in ("mean", "batchmean"):
        loss = ASLSingleLabel(2, 3, eps, reduction)
        torch.testing.assert_close(loss(logits, index), cells.mean())


def test_prior_is_state_and_moves_with_the_module():
    loss = PartialSelectiveLoss(prior=PRIOR)
    other = PartialSelectiveLoss(prior=torch.zeros(37))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.prior, PRIOR)
    mine = PRIOR.clone()
    loss = PartialSelectiveLoss(prior=mine)
    mine.zero_()
    assert torch.equal(loss.prior, PRIOR)
    assert loss.to("meta").prior.is_meta
    assert not PartialSelectiveLoss().state_dict()


def on_device(device: str) -> tuple[Tensor, Tensor]:
    return torch.empty(4, 37, device=device), torch.empty(4, 37, device=device, dtype=torch.int8)


@pytest.mark.parametrize("kind", [*MULTI_LABEL, PartialSelectiveLoss])
def test_no_loss_waits_for_the_device(kind):
    """A look at a value raises on device "meta" and under FakeTensorMode: there are none."""
    loss = kind().to("meta")
    if kind is PartialSelectiveLoss:
        loss.prior = PRIOR.to("meta")
    logits, targets = on_device("meta")
    value = loss(logits.requires_grad_(), targets)
    value.backward()
    assert value.is_meta
    with FakeTensorMode():
        logits, targets = on_device("cuda")
        if kind is PartialSelectiveLoss:
            loss.prior = torch.empty(37, device="cuda")
        assert loss(logits, targets).is_cuda


def test_works_when_the_file_is_copied_alone(tmp_path):
    """In a process that has nothing of this project, with the same results."""
    (tmp_path / "copied.py").write_text(Path(asl.losses.__file__).read_text())
    torch.save([batch(kind) for kind in ("hard", "soft", "partial")], tmp_path / "batches.pt")
    (tmp_path / "use.py").write_text(
        "import sys\n"
        "import torch\n"
        "import copied\n"
        "results = []\n"
        "for logits, targets in torch.load('batches.pt')[:2]:\n"
        "    leaf = logits.requires_grad_()\n"
        "    value = copied.AsymmetricLossOptimized()(leaf, targets)\n"
        "    results.append((value.detach(), *torch.autograd.grad(value, leaf)))\n"
        "partial = copied.PartialSelectiveLoss()(*torch.load('batches.pt')[2])\n"
        "single = copied.ASLSingleLabel()(torch.zeros(2, 3), torch.tensor([0, 2]))\n"
        "assert 'asl' not in sys.modules\n"
        "torch.save([*results, (partial,), (single,)], 'results.pt')\n"
    )
    subprocess.run([sys.executable, "use.py"], cwd=tmp_path, check=True, env={"PYTHONPATH": ""})
    hard, soft, partial, single = torch.load(tmp_path / "results.pt")
    torch.testing.assert_close(hard, value_and_grad(AsymmetricLossOptimized(), *batch("hard")))
    torch.testing.assert_close(soft, value_and_grad(AsymmetricLossOptimized(), *batch("soft")))
    torch.testing.assert_close(partial[0], PartialSelectiveLoss()(*batch("partial")))
    indices = torch.tensor([0, 2])
    torch.testing.assert_close(single[0], ASLSingleLabel()(torch.zeros(2, 3), indices))


def test_soft_targets_beside_cells_that_are_not_annotated():
    logits, soft = batch("soft")
    unannotated = batch("partial")[1] == -1
    targets = soft.masked_fill(unannotated, -1)
    cells = asymmetric_loss(logits, soft, 1, 0, 0, reduction="none", eps=0.0)
    ignoring = PartialSelectiveLoss("ignore", gamma_pos=0, gamma_neg=1, reduction="none")
    torch.testing.assert_close(ignoring(logits, targets), cells.masked_fill(unannotated, 0))
    negative = PartialSelectiveLoss("negative", 0, 1, 1, reduction="none")
    as_negative = asymmetric_loss(
        logits, soft.masked_fill(unannotated, 0), 1, 0, 0, reduction="none", eps=0.0
    )
    torch.testing.assert_close(negative(logits, targets), as_negative)
