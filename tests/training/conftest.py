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
