"""`--dry-run`: what it says, that it writes nothing, and what it refuses as a training does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asl.data.readers import coco
from asl.data.shards import write_shards
from asl.data.splits import read_split
from asl.errors import DataError, TrainingError, UsageError
from asl.images import slots as slots_module
from asl.models.build import create_model
from asl.training import dry_run as dry_run_module
from asl.training.dry_run import dry_run
from asl.training.fit import fit
from asl.training.step import Training

REPOSITORY = Path(__file__).parents[2]
SMALL = (
    *("--model-name", "test_resnet", "--image-size", "48", "--batch-size", "8", "--workers", "2"),
    *("--epochs", "2"),
)


def tree(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def train_py(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", str(REPOSITORY / "train.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cwd / "cache"), **environment},
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_script_says_what_is_needed_and_writes_nothing(device, small_shapes, tmp_path):
    before = tree(small_shapes), tree(tmp_path)
    cached = ("--cache-dir", tmp_path / "images", "--dry-run", "--device", device)
    done = train_py(small_shapes, *SMALL, *cached, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tree(small_shapes), tree(tmp_path)) == before
    assert "train2014: 40 images, 24 classes" in done.stdout
    assert "5 an epoch, of 8 images in 1 process; 10 in 2 epochs" in done.stdout
    assert f"B on {device} with 8 images a process" in done.stdout
    assert all(f"{size} GB: " in done.stdout for size in (16, 24, 40, 80))
    if device == "cpu":
        assert re.search(r"one on cpu with 8 of 8 images, .* loss \d", done.stdout)
    elif not torch.cuda.is_available():
        assert "rehearsed: there is no cuda here" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_only_rehearsed(small_shapes, tmp_path):
    done = train_py(small_shapes, *SMALL, "--device", "cuda", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: device 'cuda'")
    done = train_py(small_shapes, *SMALL, "--device", "nowhere", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def said(settings, small_shapes, tmp_path, **changed):
    return dry_run(settings(small_shapes, tmp_path / "run", **changed))


def test_sizes_are_those_that_the_run_would_take(settings, small_shapes, tmp_path):
    text = said(settings, small_shapes, tmp_path, workers=2, image_size=256, cache_dir="images")
    parameters = sum(p.numel() for p in create_model("test_resnet", 24).parameters())
    assert f"{parameters / 1e6:.1f} million parameters" in text
    # 5 slots for training and 3, all there are, for validation: 8 images with 24 labels each.
    assert f"{8 * 8 * (3 * 256**2 + 24) / 1e6:.1f} MB for the loaders" in text
    assert f"{60 * 3 * 256**2 / 1e6:.1f} MB to be written" in text


def test_accumulated_batches_make_fewer_and_larger_steps(settings, small_shapes, tmp_path):
    text = said(settings, small_shapes, tmp_path, accumulate=3)
    assert "2 an epoch, of 24 images in 1 process; 6 in 3 epochs" in text


def test_flops_are_those_that_one_counts_by_hand():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.Flatten(), torch.nn.Linear(128, 5)
    )
    assert dry_run_module._forward_flops(model, 4) == 2 * (16 * 3 * 8 * 9 + 128 * 5)


def test_the_steps_of_a_cpu_are_cut_to_what_takes_seconds(
    settings, small_shapes, tmp_path, monkeypatch
):
    seen, step = [], Training.step
    monkeypatch.setattr(Training, "step", lambda *a: seen.append(a[1].shape) or step(*a))
    monkeypatch.setattr(dry_run_module, "CPU_FLOPS", 10)
    text = said(settings, small_shapes, tmp_path, device="cpu")
    assert "with 2 of 8 images" in text
    assert seen[-1] == (2, 3, 48, 48)


def test_a_model_that_cannot_be_rehearsed_still_makes_its_step(
    settings, small_shapes, tmp_path, monkeypatch
):
    def unable(*_):
        raise RuntimeError("it looks at values\nand so on")

    monkeypatch.setattr(dry_run_module, "estimate", unable)
    monkeypatch.setattr(dry_run_module, "growth", unable)
    text = said(settings, small_shapes, tmp_path, device="cpu")
    assert "not known, the model cannot be rehearsed: it looks at values\n" in text
    assert "one on cpu" in text


def test_parsed_annotations_are_read_where_they_are_cached(
    settings, small_shapes, tmp_path, monkeypatch
):
    config = settings(small_shapes, tmp_path / "run")
    read_split(config.data, "train")
    read_split(config.data, "val")
    monkeypatch.setattr(coco, "coco", None)
    monkeypatch.setattr("asl.data.readers.coco.coco", None)
    assert "memory" in dry_run(config)


def test_the_prior_that_is_estimated_first_is_no_obstacle(settings, small_shapes, tmp_path):
    partial = {"simulate_partial": "rps:0.5", "unannotated": "selective", "prior_path": "estimate"}
    assert "memory" in said(settings, small_shapes, tmp_path, **partial)


def test_what_a_training_refuses_is_refused(settings, small_shapes, tmp_path, monkeypatch):
    refused = [
        ({"num_classes": 7}, UsageError, "num_classes is 7"),
        ({"train_split": "none"}, UsageError, "none"),
        ({"model_name": "no_model"}, UsageError, "no model is called"),
        ({"sync_bn": True, "device": "cpu"}, UsageError, "sync_bn needs GPUs"),
        ({"lr": 1e30, "epochs": 1, "device": "cpu", "resume": "last"}, UsageError, "no run"),
    ]
    for changed, error, message in refused:
        with pytest.raises(error, match=message):
            said(settings, small_shapes, tmp_path, **changed)
    monkeypatch.setattr(slots_module, "free_shared_memory", lambda: 1000)
    with pytest.raises(UsageError, match="of shared memory"):
        said(settings, small_shapes, tmp_path, workers=1)


def test_shards_by_address_are_fetched_and_that_is_said(
    settings, small_shapes, tmp_path, served, capsys
):
    for split in ("train", "val"):
        write_shards(coco.coco(small_shapes, f"{split}2014"), split, tmp_path / "set", 40)
    address = f"{served(tmp_path).address}/set/{{train,val}}-000000.tar"
    out = said(settings, address, tmp_path, dataset="webdataset", device="cpu")
    assert out.endswith("nothing was written but shards that were not here yet")
    assert "fetching 2 of 2 files" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"set", "cache"}


def test_images_that_cannot_be_read_are_found(settings, small_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr("asl.images.loader.read_squished", _unreadable)
    with pytest.raises(DataError, match="broken"):
        said(settings, small_shapes, tmp_path)


def _unreadable(path, *settings, **named):
    raise DataError(f"{path}: broken")


def test_a_loss_that_is_not_finite_is_found(settings, small_shapes, tmp_path, monkeypatch):
    step = Training.step

    def broken(training, images, targets):
        return step(training, images * float("nan"), targets)

    monkeypatch.setattr(Training, "step", broken)
    with pytest.raises(TrainingError, match="the loss is nan"):
        said(settings, small_shapes, tmp_path, device="cpu")


def test_a_dry_run_may_ask_about_a_run_that_goes_on(settings, small_shapes, tmp_path):
    config = settings(small_shapes, tmp_path / "run", epochs=1)
    fit(config)
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="holds a run"):
        dry_run(config)
    assert "the run is complete" in dry_run(config.with_settings(resume="last", dry_run=True))
    assert tree(tmp_path) == before
