"""The mean score by class that training keeps."""

import pytest
import torch
import torch.distributed as dist

from asl.training.prior import RunningPrior


def test_the_running_prior_is_the_mean_over_all_images():
    logits = torch.randn(100, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    running = RunningPrior(5)
    assert running.prior.isnan().all()
    for batch in logits.split([40, 40, 13, 7]):
        running.update(batch)
    torch.testing.assert_close(running.prior, logits.sigmoid().mean(dim=0).detach())


def test_the_running_prior_goes_on_where_it_was_kept():
    first, second = RunningPrior(3), RunningPrior(3)
    first.update(torch.zeros(10, 3))
    second.load_state_dict(first.state_dict())
    second.update(torch.full((30, 3), 100, dtype=torch.float16))
    torch.testing.assert_close(second.prior, torch.full((3,), (10 * 0.5 + 30) / 40))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_logits_are_summed_in_full(dtype):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3000, 4, generator=random).sub(4).to(dtype)
    running = RunningPrior(4)
    for batch in logits.split(1000):
        running.update(batch)
    expected = logits.double().sigmoid().mean(dim=0).float()
    torch.testing.assert_close(running.prior, expected, rtol=1e-5, atol=0)


def two_ranks(rank, init, queue):
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    running = RunningPrior(2)
    # Rank 1 has three images with a score of 1, rank 0 one with a score of 0.
    running.update(torch.full((1 + 2 * rank, 2), 200.0 * rank - 100))
    queue.put(running.prior.tolist())
    dist.destroy_process_group()


def test_the_running_prior_is_that_of_all_ranks(answers_of_two_ranks):
    assert answers_of_two_ranks(two_ranks) == [[0.75, 0.75]] * 2
