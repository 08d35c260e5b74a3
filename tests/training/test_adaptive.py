"""Adaptive asymmetry: the rule, what does not count, and that the gap reaches its target."""

import math

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from asl.losses import AsymmetricLoss, AsymmetricLossOptimized, PartialSelectiveLoss
from asl.training.adaptive import AdaptiveAsymmetry


def adaptive(gamma_neg=2.0, target=0.1, step=0.5, kind=AsymmetricLossOptimized):
    return AdaptiveAsymmetry(kind(gamma_neg=gamma_neg, gamma_pos=0), target, step)


# Scores 0.8 and 0.6 for the positives, 0.5, 0.1 and 0.3 for the negatives: gap 0.7 - 0.7 = 0.
SCORES = torch.tensor([[0.8, 0.5], [0.6, 0.1], [0.3, 0.9]])
TARGETS = torch.tensor([[1, 0], [1, 0], [0, -1]], dtype=torch.int8)
FULL = torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.int8)  # gap 2.3 / 3 - 0.7


@pytest.mark.parametrize("kind", [AsymmetricLoss, AsymmetricLossOptimized])
def test_gamma_neg_moves_by_what_the_gap_lacks(kind):
    loss = adaptive(target=0.1, step=0.5, kind=kind)
    loss(SCORES.logit(), FULL)
    gap = 2.3 / 3 - 0.7
    assert loss.gap.item() == pytest.approx(gap, abs=1e-6)
    assert loss.gamma_neg.item() == pytest.approx(2 + 0.5 * (0.1 - gap), abs=1e-6)


def test_cells_that_are_not_annotated_do_not_count():
    loss = adaptive(target=0.2, kind=PartialSelectiveLoss)
    loss(SCORES.logit(), TARGETS)
    assert loss.gap.item() == pytest.approx(0, abs=1e-6)
    assert loss.gamma_neg.item() == pytest.approx(2.1, abs=1e-6)


@pytest.mark.parametrize("kind", [AsymmetricLoss, AsymmetricLossOptimized, PartialSelectiveLoss])
def test_the_loss_is_that_of_the_gamma_neg_before_the_step(kind):
    loss, logits = adaptive(kind=kind), SCORES.logit().requires_grad_()
    for _ in range(3):
        gamma_neg = loss.gamma_neg.item()
        value = loss(logits, FULL)
        expected = kind(gamma_neg=gamma_neg, gamma_pos=0)(logits, FULL)
        torch.testing.assert_close(value, expected)
        gradients = [torch.autograd.grad(each, logits)[0] for each in (value, expected)]
        torch.testing.assert_close(*gradients)
        assert loss.gamma_neg.item() != gamma_neg


@pytest.mark.parametrize("value", [0, 1, 0.5])
def test_a_batch_of_one_kind_moves_nothing(value):
    loss = adaptive()
    loss(SCORES.logit(), FULL)
    before = loss.state_dict()
    loss(SCORES.logit(), torch.full(SCORES.shape, value))
    loss(torch.zeros(0, 2), torch.zeros(0, 2))
    assert loss.state_dict() == before
    assert all(math.isfinite(value) for value in before.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gap_of_half_precision_logits_is_computed_in_float32(dtype):
    logits = torch.linspace(-2, 2, 600).view(100, 6).to(dtype)
    targets = (torch.arange(600).view(100, 6) % 7 > 4).to(torch.int8)
    half, single = adaptive(), adaptive()
    half(logits, targets)
    single(logits.float(), targets)
    assert half.gap == single.gap
    assert half.gamma_neg == single.gamma_neg


@pytest.mark.parametrize("kind", [AsymmetricLoss, AsymmetricLossOptimized, PartialSelectiveLoss])
def test_no_step_waits_for_the_device(kind):
    """A look at a value raises on device "meta" and under FakeTensorMode: there are none."""
    loss = adaptive(kind=kind).to("meta")
    logits = torch.empty(4, 5, device="meta", requires_grad=True)
    for _ in range(2):  # the second step has the gamma_neg that the first computed
        loss(logits, torch.empty(4, 5, device="meta", dtype=torch.int8)).backward()
    assert loss.gamma_neg.is_meta
    with FakeTensorMode():
        loss = adaptive(kind=kind).to("cuda")
        for _ in range(2):
            loss(torch.empty(4, 5, device="cuda"), torch.empty(4, 5, device="cuda"))
        assert loss.gamma_neg.is_cuda


def test_the_state_is_gamma_neg_and_the_gap():
    loss = adaptive(gamma_neg=3)
    assert set(loss.state_dict()) == {"gamma_neg", "gap"}
    assert loss.gamma_neg == 3
    assert loss.gap.isnan()


@pytest.mark.parametrize("kind", [AsymmetricLoss, AsymmetricLossOptimized, PartialSelectiveLoss])
def test_gamma_neg_and_the_gap_hold_no_graph_of_earlier_steps(kind):
    loss = adaptive(kind=kind)
    loss(SCORES.logit().requires_grad_(), FULL)
    assert not loss.gamma_neg.requires_grad
    assert not loss.gap.requires_grad


def test_the_backward_pass_may_come_after_gamma_neg_has_moved():
    soft = torch.tensor([[1, 0], [1, 0], [0.2, 0.9]], requires_grad=True)
    loss = AdaptiveAsymmetry(AsymmetricLoss(2, 0, disable_torch_grad_focal_loss=False), 0.1, 0.5)
    (grad,) = torch.autograd.grad(loss(SCORES.logit(), soft), soft)
    fixed = AsymmetricLoss(2, 0, disable_torch_grad_focal_loss=False)
    torch.testing.assert_close(grad, torch.autograd.grad(fixed(SCORES.logit(), soft), soft)[0])


def test_scores_that_are_no_numbers_move_nothing():
    loss = adaptive()
    loss(torch.full((3, 2), torch.nan), FULL)
    assert loss.gamma_neg.item() == 2


def test_gamma_neg_stays_at_least_0():
    loss = adaptive(gamma_neg=0.01, target=-0.9, step=1)
    loss(SCORES.logit(), FULL)
    assert loss.gamma_neg.item() == 0


def test_evaluation_moves_nothing():
    loss = adaptive().eval()
    loss(SCORES.logit(), FULL)
    assert loss.gamma_neg.item() == 2


def test_a_loaded_state_goes_on_as_if_nothing_had_happened():
    whole, resumed = adaptive(), adaptive(gamma_neg=4)
    whole(SCORES.logit(), FULL)
    resumed.load_state_dict(whole.state_dict())
    for loss in (whole, resumed):
        loss(SCORES.logit() + 1, FULL)
    assert resumed.state_dict() == whole.state_dict()
    assert resumed(SCORES.logit(), FULL) == whole(SCORES.logit(), FULL)


@pytest.mark.parametrize("target", [-0.2, 0.1, 0.3])
def test_training_reaches_the_target(target):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 8, generator=generator)
    noise = torch.randn(2000, 4, generator=generator)
    targets = (inputs[:, :4] + noise > 2).to(torch.int8)
    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    loss = adaptive(gamma_neg=1, target=target, step=0.05)
    for _ in range(1000):
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
    assert loss.gap.item() == pytest.approx(target, abs=0.02)
    assert 0 < loss.gamma_neg.item() < 10


@pytest.mark.parametrize(("target", "step"), [(1, 0.1), (-1, 0.1), (math.nan, 0.1), (0.1, 0)])
def test_values_out_of_range_are_refused(target, step):
    with pytest.raises(ValueError, match="must be above"):
        adaptive(target=target, step=step)


def two_ranks(rank, init, queue):
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    loss = adaptive()
    part = slice(0, 1) if rank == 0 else slice(1, 3)
    loss(SCORES[part].logit(), FULL[part])
    queue.put((loss.gap.item(), loss.gamma_neg.item()))
    dist.destroy_process_group()


def test_the_gap_is_that_of_all_ranks_together(answers_of_two_ranks):
    alone = adaptive()
    alone(SCORES.logit(), FULL)
    expected = (alone.gap.item(), alone.gamma_neg.item())
    assert answers_of_two_ranks(two_ranks) == [pytest.approx(expected, abs=1e-6)] * 2
