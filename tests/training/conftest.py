"""Where the tests of training run: on a device, or in processes of their own."""

import pytest
import torch

from asl.training.step import Training


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.cuda)])
def device(request, without_waiting, monkeypatch):
    """The device of a test. On CUDA, a step that makes the host wait is an error."""
    if request.param != "cpu":
        step = Training.step

        def step_without_waiting(training, images, targets):
            with without_waiting():
                return step(training, images, targets)

        monkeypatch.setattr(Training, "step", step_without_waiting)
        # Else convolutions in float32 would round to ten bits, and could not be compared.
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)


@pytest.fixture
def answers_of_two_ranks(tmp_path):
    """Runs work(rank, address of the group, queue) in two processes; what they put in the queue."""

    def answers(work):
        context = torch.multiprocessing.get_context("spawn")
        queue = context.Queue()
        init = f"file://{tmp_path}/rendezvous"
        ranks = [context.Process(target=work, args=(rank, init, queue)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        found = [queue.get(timeout=60) for _ in ranks]
        for rank in ranks:
            rank.join()
        return found

    return answers
