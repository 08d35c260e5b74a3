"""Processes that the tests of sums over ranks start."""

import pytest
import torch


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
