"""The training step against the official one, and what a run promises."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from asl import checkpoint
from asl.config import Config
from asl.engine import Training, fit, pick_device, precision, score
from asl.errors import Interrupted, TrainingError, UsageError

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")


def golden_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.01),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 20),
    ).to(memory_format=torch.channels_last)


def training_of(model, **settings):
    return Training(model, Config(amp="off", **settings), steps_per_epoch=5, device=CPU)


def states_of(tensors, name):
    state = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def test_losses_learning_rates_and_weights_follow_the_official_trajectory():
    tensors = load_file(GOLDEN / "reference.safetensors")
    golden = json.loads((GOLDEN / "reference.json").read_text())["training"]
    model = golden_network()
    model.load_state_dict(states_of(tensors, "init"), strict=False)
    taken = ("lr", "weight_decay", "ema_decay", "epochs", "pct_start", "gamma_neg", "gamma_pos")
    training = training_of(model, clip=golden["clip"], **{name: golden[name] for name in taken})

    losses, rates = [], []
    for _ in range(golden["epochs"]):
        for images in tensors["images"]:
            rates.append(training.lr)
            losses.append(training.step(images, tensors["targets"]).item())

    assert losses == pytest.approx(golden["losses"], rel=1e-4)
    assert rates == pytest.approx(golden["lrs"], rel=1e-9)
    for name, state in (("final", model), ("ema", training.ema.module)):
        for key, expected in states_of(tensors, name).items():
            torch.testing.assert_close(state.state_dict()[key], expected, rtol=1e-4, atol=1e-4)


class Signalled:
    """Sends this process a signal after a number of training steps."""

    def __init__(self, monkeypatch, step, number=signal.SIGINT):
        self.taken, self.step, self.number = 0, Training.step, number
        monkeypatch.setattr(Training, "step", lambda *batch: self(step, *batch))

    def __call__(self, step, *batch):
        self.taken += 1
        if self.taken == step:
            os.kill(os.getpid(), self.number)
        return self.step(*batch)


def settings(root, output, **more):
    return Config(
        data=str(root),
        model_name="test_resnet",
        image_size=48,
        batch_size=8,
        lr=1e-3,
        ema_decay=0.9,
        epochs=3,
        amp="off",
        output=str(output),
        **{"workers": 0, **more},
    )


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, small_shapes):
    """A run of three epochs of five steps that nothing disturbed."""
    return fit(settings(small_shapes, tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("step", [1, 5, 8, 15])
def test_a_run_that_goes_on_after_a_signal_equals_one_without(
    step, whole_run, small_shapes, tmp_path
):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        Signalled(patch, step)
        fit(settings(small_shapes, tmp_path))
    # Another number of workers gives the same samples.
    fit(settings(small_shapes, tmp_path, resume=True, workers=1))

    assert (tmp_path / "metrics.jsonl").read_text() == (whole_run / "metrics.jsonl").read_text()
    for name in ("last.pt", "best.pt"):
        resumed, whole = checkpoint.load(tmp_path / name), checkpoint.load(whole_run / name)
        for which in ("ema", "regular"):
            for key, value in whole[which].items():
                assert torch.equal(resumed[which][key], value), (name, which, key)
