"""The losses against the official code's numbers, the formula and autograd."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

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
def test_values_and_gradients_of_the_official_code(case, golden):
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
    close = {"rtol": 2e-5, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(value, torch.as_tensor(expected).view_as(value), **close)
    torch.testing.assert_close(grad, golden[f"grad{case['id']}"], **close)


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


def test_optimized_works_in_chunks_and_on_strided_input(monkeypatch):
    logits, targets = batch(shape=(9, 41))
    expected = value_and_grad(AsymmetricLoss(reduction="none"), logits, targets)
    monkeypatch.setattr("asl.losses._CPU_CHUNK", 50)
    loss = AsymmetricLossOptimized(disable_torch_grad_focal_loss=True, reduction="none")
    torch.testing.assert_close(value_and_grad(loss, logits, targets), expected)
    strided = value_and_grad(loss, logits.t().contiguous().t(), targets.t().contiguous().t())
    torch.testing.assert_close(strided, expected)


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


@pytest.mark.parametrize("bad", [2, 0.5, -0.5, math.nan])
def test_a_partial_target_other_than_three_values_is_named(bad):
    logits, targets = batch("partial")
    check_targets(targets, partial=True)
    targets[3, 4] = bad
    with pytest.raises(ValueError, match=f"exactly 1, 0 or -1, got {bad:g}"):
        PartialSelectiveLoss()(logits, targets)
    with pytest.raises(ValueError, match=f"got {bad:g}"):
        check_targets(targets, partial=True)


@pytest.mark.parametrize(
    ("loss", "targets", "bad"),
    [
        (AsymmetricLoss(), batch("hard")[1], 2),
        (AsymmetricLossOptimized(), batch("soft")[1], math.nan),
        (AsymmetricLossOptimized(), batch("hard")[1].long(), -1),
        (PartialSelectiveLoss(), batch("partial")[1], 0.5),
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


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(any_loss, backend):
    loss, logits, targets = any_loss
    torch.compiler.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
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


def test_optimized_keeps_a_single_tensor_of_its_own_for_backward():
    logits, targets = batch()
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        value = AsymmetricLossOptimized()(logits.requires_grad_(), targets)
    assert all(kept is logits or kept is targets for kept in saved)
    where = value.grad_fn.gradient.data_ptr()
    value.backward()
    assert logits.grad.data_ptr() == where


@pytest.mark.parametrize("loss", [*MULTI_LABEL, PartialSelectiveLoss])
def test_an_empty_batch_costs_nothing(loss):
    value, grad = value_and_grad(loss(), torch.zeros(0, 5), torch.zeros(0, 5))
    assert value == 0
    assert grad.shape == (0, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AsymmetricLoss(reduction="max"), "unknown reduction 'max'"),
        (lambda: AsymmetricLoss(gamma_neg=-1), "gammas must be at least 0, got -1"),
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
        (lambda: ASLSingleLabel()(torch.zeros(2, 3), torch.tensor([0, 3])), r"\[0, 2\], got 3"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def selective(logits: Tensor, targets: Tensor, topk: int, prior: Tensor | None = None) -> Tensor:
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


def test_selection_spends_its_budget_on_classes_that_the_prior_left_out():
    logits = torch.tensor([[9.0, 8, 7, 6], [5, 4, 3, 2]])
    targets = torch.tensor([[-1, -1, -1, -1], [-1, 0, 1, -1]])
    kept = selective(logits, targets, 1, prior=torch.tensor([0.9, 0, 0, 0]))
    assert kept.tolist() == [[False, False, True, True], [False, True, True, True]]
    assert selective(logits, targets, 0).all()
    assert selective(logits, targets, 9).equal(targets != -1)


def test_prior_is_state_and_moves_with_the_module():
    loss = PartialSelectiveLoss(prior=PRIOR)
    other = PartialSelectiveLoss(prior=torch.zeros(37))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.prior, PRIOR)
    assert loss.to("meta").prior.is_meta
    assert not PartialSelectiveLoss().state_dict()


def test_other_devices_take_the_same_code():
    logits, targets = batch()
    for loss in (AsymmetricLoss(), AsymmetricLossOptimized()):
        value = loss(logits.to("meta").requires_grad_(), targets.to("meta"))
        value.backward()  # a look at a value would raise here, as meta tensors have none
        assert value.is_meta
    partial = PartialSelectiveLoss(prior=PRIOR).to("meta")
    assert partial(logits.to("meta"), targets.to("meta")).is_meta


def test_works_when_the_file_is_copied_alone(tmp_path):
    import runpy

    import asl.losses

    copy = tmp_path / "copied.py"
    copy.write_text(Path(asl.losses.__file__).read_text())
    assert runpy.run_path(str(copy))["AsymmetricLoss"]()(*batch()) > 0
