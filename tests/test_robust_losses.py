"""Hill and SPLC against the official code's numbers and the formulas."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import logsigmoid

from asl.losses import asymmetric_loss
from asl.robust_losses import SPLC, Hill, hill_loss, splc_loss

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "robust.json").read_text())["cases"]
# By name: what each is called with behind logits and targets.
LOSSES = {"Hill": (Hill, ()), "SPLC": (SPLC, (0,)), "SPLC, later": (SPLC, (1,))}
each_loss = pytest.mark.parametrize("name", LOSSES)


def value_and_grad(loss, logits, *arguments):
    logits = logits.clone().requires_grad_()
    value = loss(logits, *arguments)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), grad


def batch(partial=False, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(8, 12, generator=draw, dtype=dtype)
    targets = torch.randint(-1 if partial else 0, 2, (8, 12), generator=draw)
    return logits, targets


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']}-{case['class']}")
def test_values_and_gradients_of_the_official_code(case, same):
    inputs = load_file(GOLDEN / "reference.safetensors")
    loss = {"Hill": Hill, "SPLC": SPLC}[case["class"]](**case["parameters"])
    epoch = () if case["epoch"] is None else (case["epoch"],)
    value, grad = value_and_grad(loss, inputs["logits"], inputs["targets"], *epoch)
    expected = load_file(GOLDEN / "robust.safetensors")[f"grad{case['id']}"]
    same("losses Hill and SPLC, and gradients", value, case["value"], rtol=1e-5)
    same("losses Hill and SPLC, and gradients", grad, expected, rtol=1e-5, atol=1e-5)


def test_the_formulas_in_float64():
    x, y = batch(dtype=torch.float64)
    s, p = torch.sigmoid(x - 0.5), torch.sigmoid(x)
    hill = torch.where(y == 1, -((1 - s) ** 3) * s.log(), (1.2 - p) * p**2)
    torch.testing.assert_close(hill_loss(x, y, 1.2, 0.5, 3.0, "none"), hill)

    for epoch in (0, 1, 2):
        shifted = torch.where(y == 1, x - 0.5, x)
        corrected = (y == 1) | ((shifted.sigmoid() > 0.7) & (epoch >= 2))
        right = torch.where(corrected, shifted, -shifted)
        focal = -((1 - right.sigmoid()) ** 3) * logsigmoid(right)
        found = splc_loss(x, y, epoch, 0.7, 2, 0.5, 3.0, "none")
        torch.testing.assert_close(found, focal)
        assert (corrected != (y == 1)).any() == (epoch == 2)


def test_without_margin_and_correction_splc_is_the_focal_loss():
    x, y = batch()
    focal = asymmetric_loss(x, y, 2, 2, 0, disable_torch_grad_focal_loss=False)
    torch.testing.assert_close(SPLC(margin=0, change_epoch=5)(x, y, 4), focal)


@each_loss
def test_cells_that_are_not_annotated_cost_nothing(name):
    kind, epoch = LOSSES[name]
    logits, targets = batch(partial=True)
    logits[0] = 9.0  # SPLC would take these for present
    targets[0] = -1
    known = targets != -1
    cells, grad = value_and_grad(kind(reduction="none"), logits, targets, *epoch)
    assert (cells[~known] == 0).all()
    assert (grad[~known] == 0).all()
    others = kind(reduction="none")(logits, targets.clamp(min=0), *epoch)
    assert torch.equal(cells[known], others[known])
    assert (grad[known] != 0).all()


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(name, dtype):
    kind, epoch = LOSSES[name]
    logits, targets = batch()
    logits[0, :2] = torch.tensor([-60.0, 60.0])
    logits = logits.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value, grad = value_and_grad(kind(), logits, targets, *epoch)
    expected, expected_grad = value_and_grad(kind(), logits.float(), targets, *epoch)
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)
    assert value == expected
    assert torch.equal(grad, expected_grad.to(dtype))


@each_loss
@pytest.mark.parametrize("bad", [2, -2, 0.5, float("nan")])
def test_a_target_out_of_range_is_an_error_here_and_nan_on_a_device(name, bad, monkeypatch):
    kind, epoch = LOSSES[name]
    logits, targets = batch()
    targets = targets.float()
    targets[2, 3] = bad
    with pytest.raises(ValueError, match=r"targets must be exactly 1, 0 or -1, got .* \(1 such"):
        kind()(logits, targets, *epoch)
    monkeypatch.setattr("asl.losses._free_to_read", lambda targets: False)
    value, grad = value_and_grad(kind(), logits, targets, *epoch)
    assert value.isnan()
    assert grad.isnan().all()


@each_loss
def test_no_value_is_waited_for_on_a_device(name):
    kind, epoch = LOSSES[name]
    with FakeTensorMode():
        logits = torch.zeros(8, 12, device="cuda:0", requires_grad=True)
        assert kind()(logits, torch.zeros(8, 12, device="cuda:0"), *epoch).shape == ()


@each_loss
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.float16])
def test_any_type_of_targets(name, dtype):
    kind, epoch = LOSSES[name]
    logits, targets = batch()
    assert kind()(logits, targets.to(dtype), *epoch) == kind()(logits, targets, *epoch)


@each_loss
def test_reductions(name):
    kind, epoch = LOSSES[name]
    logits, targets = batch(partial=True)
    cells = kind(reduction="none")(logits, targets, *epoch)
    for reduction, divisor in (("sum", 1), ("mean", 96), ("batchmean", 8)):
        found = kind(reduction=reduction)(logits, targets, *epoch)
        torch.testing.assert_close(found, cells.sum() / divisor)


@pytest.mark.parametrize("kind", [Hill, SPLC])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, "gamma must be at least 0"),
        ({"margin": float("inf")}, "margin must be at least 0 and finite"),
        ({"reduction": "max"}, "unknown reduction 'max'"),
    ],
)
def test_options_that_make_no_sense(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_logits_and_targets_of_other_shapes():
    for kind, epoch in LOSSES.values():
        with pytest.raises(ValueError, match="same shape"):
            kind()(torch.zeros(2, 3), torch.zeros(2, 4), *epoch)
