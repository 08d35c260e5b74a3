"""The training step against the official one, and what the options of a run change."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from asl import engine
from asl.config import Config
from asl.engine import Training, create_loss, fit, pick_device, precision, score
from asl.errors import DataError, TrainingError, UsageError
from asl.images.loader import Batch
from asl.models import checkpoint

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
    config = Config(**{"amp": "off", **settings})
    return Training(model, create_loss(config), config, steps_per_epoch=5, device=CPU)


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


def settings(root, output, **changed):
    usual = {
        **{"model_name": "test_resnet", "image_size": 48, "batch_size": 8, "workers": 0},
        **{"lr": 1e-3, "epochs": 3, "ema_decay": 0.9, "amp": "off"},
    }
    return Config(data=str(root), output=str(output), **{**usual, **changed})


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, small_shapes):
    """A run of three epochs of five steps that nothing disturbed."""
    return fit(settings(small_shapes, tmp_path_factory.mktemp("whole")))


def test_a_loss_that_is_not_finite_ends_the_run_with_epoch_and_step(small_shapes, tmp_path):
    diverging = settings(small_shapes, tmp_path, optimizer="adamw", weight_decay=1e30)
    with pytest.raises(TrainingError, match=r"epoch 1, step \d+: lower --lr"):
        fit(diverging)
    assert not (tmp_path / "last.pt").exists()


def test_the_number_of_classes_is_checked_when_it_is_given(small_shapes, tmp_path):
    fit(settings(small_shapes, tmp_path, stop_epoch=1, num_classes=24))
    with pytest.raises(UsageError, match="num_classes is 80, but there are 24"):
        fit(settings(small_shapes, tmp_path, overwrite=True, num_classes=80))


@pytest.mark.parametrize("option", [{"optimizer": "adamw"}, {"grad_clip": 1e-9}, {"seed": 1}])
def test_every_option_of_the_step_changes_the_result(option, whole_run, small_shapes, tmp_path):
    changed = fit(settings(small_shapes, tmp_path, stop_epoch=1, **option))
    first = [
        json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        for run in (whole_run, changed)
    ]
    assert first[0]["loss"] != first[1]["loss"]


def test_a_compiled_model_takes_the_same_steps():
    torch.manual_seed(0)
    images, targets = torch.rand(4, 3, 16, 16), torch.randint(0, 2, (4, 20))
    losses = []
    for compiled in (False, True):
        torch.manual_seed(1)
        training = training_of(golden_network(), compile=compiled, lr=1e-2, epochs=1)
        losses.append([training.step(images, targets).item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bfloat16_steps_stay_near_those_in_float32():
    images, targets = torch.rand(4, 3, 16, 16), torch.randint(0, 2, (4, 20))
    losses = []
    for amp in ("off", "bf16"):
        torch.manual_seed(1)
        training = training_of(golden_network(), amp=amp, lr=1e-2, epochs=1)
        losses.append([training.step(images, targets).item() for _ in range(3)])
        assert all(p.dtype == torch.float32 for p in training.model.parameters())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_precision_is_float32_for_training_on_a_cpu_unless_asked_for():
    assert precision("auto", CPU, training=True) is None
    assert precision("off", CPU, training=False) is None
    assert precision("bf16", CPU, training=True) == torch.bfloat16


def test_scores_of_several_models_come_from_one_pass():
    taken = []

    def batches():
        for size in (3, 2):
            taken.append(size)
            yield Batch(torch.rand(size, 4), torch.empty(size, 5))

    models = [nn.Linear(4, 5), nn.Linear(4, 5)]
    first, second = score(models, batches(), prepare=lambda batch: batch.images)
    assert taken == [3, 2]
    assert first.shape == second.shape == (5, 5)
    assert not torch.equal(first, second)
    assert ((first > 0) & (first < 1)).all()


def test_a_device_that_is_not_there_is_an_error_of_usage():
    assert pick_device("cpu") == CPU
    with pytest.raises(UsageError, match="nonsense"):
        pick_device("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="cuda"):
            pick_device("cuda")


@pytest.mark.parametrize("option", [{"ema_warmup": True}, {"ema_decay": 0.5}])
def test_every_option_of_the_average_changes_it(option, small_shapes, tmp_path):
    folders = [
        fit(settings(small_shapes, tmp_path / name, stop_epoch=1, **more))
        for name, more in (("usual", {}), ("other", option))
    ]
    usual, other = (checkpoint.load(folder / "last.pt") for folder in folders)
    name = next(iter(usual["ema"]))
    assert torch.equal(usual["regular"][name], other["regular"][name])
    assert not torch.equal(usual["ema"][name], other["ema"][name])


@pytest.mark.parametrize(
    "settings_of_the_data_side", [{"cache_dir": "cache"}, {"augment_on": "device"}], ids=str
)
def test_where_images_come_from_and_are_augmented_changes_no_result(
    settings_of_the_data_side, small_shapes, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    plain = settings(small_shapes, "plain", augment="flip", epochs=1)
    other = settings(small_shapes, "other", augment="flip", epochs=1, **settings_of_the_data_side)
    logs = [(fit(config) / "metrics.jsonl").read_text() for config in (plain, other)]
    assert logs[0] == logs[1]
    if "cache_dir" in settings_of_the_data_side:
        assert len(list(Path("cache").glob("*.images"))) == 2  # training and validation


@pytest.mark.parametrize(("slow", "said"), [(-1, True), (2, False)])
def test_waiting_for_data_is_said(slow, said, small_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "SLOW_DATA", slow)
    fit(settings(small_shapes, tmp_path, epochs=1))
    assert ("of the time: raise --workers or use --cache-dir" in capsys.readouterr().out) is said


def test_validation_can_be_rarer_than_epochs(small_shapes, tmp_path):
    run = fit(settings(small_shapes, tmp_path, val_every=2))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ["mAP_ema" in row for row in rows] == [False, True, True]


def test_tensorboard_gets_the_figures_when_asked(small_shapes, tmp_path):
    run = fit(settings(small_shapes, tmp_path / "with", stop_epoch=1, tensorboard=True))
    assert list(run.glob("events.out.tfevents.*"))
    run = fit(settings(small_shapes, tmp_path / "without", stop_epoch=1))
    assert not list(run.glob("events.*"))


def test_missing_images_end_a_run_before_it_starts_or_are_left_out(small_shapes, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(small_shapes, root)
    gone = sorted((root / "train2014").iterdir())[7]
    gone.unlink()
    with pytest.raises(DataError, match=f"1 of 40 images are missing: {gone}"):
        fit(settings(root, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    fit(settings(root, tmp_path / "run", stop_epoch=1, missing_images="skip"))
    assert "39 images (1 missing, skipped)" in capsys.readouterr().out


def test_an_image_that_cannot_be_read_is_named_also_by_a_worker(small_shapes, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(small_shapes, root)
    broken = sorted((root / "train2014").iterdir())[7]
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(DataError, match=rf"^{broken}: [^\n]+$"):
        fit(settings(root, tmp_path / "run", workers=1))
