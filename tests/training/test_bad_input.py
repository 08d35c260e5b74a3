"""Trainings that cannot begin or go on: one line that says why, nothing left behind."""

import shutil

import pytest
import torch
from bad_input import cut

RESUME = "train coco --output run --resume"


def resumed_from(root, **parts):
    whole = torch.load(root / "run/last.pt", weights_only=True)
    torch.save({**whole, **parts}, root / "run/last.pt")


OPTIONS = {
    "infinite focusing": ("train coco --gamma-neg inf", 2, "gamma_neg is inf"),
    "infinite decay": ("train coco --weight-decay inf", 2, "weight_decay is inf"),
    "no epochs": ("train coco --epochs 0", 2, "epochs is 0"),
    "no stop": ("train coco --stop-epoch 0", 2, "stop_epoch is 0"),
    "huge seed": ("train coco --seed 99999999999", 2, "must be less than or equal to 2147483647"),
    "all of the schedule rises": ("train coco --pct-start 1", 2, "pct_start is 1"),
    "decay of one": ("train coco --ema-decay 1", 2, "ema_decay is 1"),
    "clip too small to count": ("train coco --clip 1e-9", 2, "clip is 1e-09: a margin below"),
    "clip of one": ("train coco --clip 1", 2, "clip is 1"),
    "a checkpoint every zero steps": (
        "train coco --checkpoint-every 0",
        2,
        "checkpoint_every is '0'",
    ),
    "a checkpoint every so often": ("train coco --checkpoint-every 5s", 2, "checkpoint_every is"),
    "a checkpoint never": (f"train coco --checkpoint-every {'9' * 5000}", 2, "checkpoint_every"),
    "gap out of range": ("train coco --adaptive-gamma 2", 2, "adaptive_gamma is 2"),
    "gap step of zero": ("train coco --adaptive-step 0", 2, "adaptive_step is 0"),
    "cross-entropy with focusing": ("train coco --loss bce --gamma-neg 2", 2, "bce takes neither"),
    "focal loss with a margin": ("train coco --loss focal --clip 0.1", 2, "no clip"),
    "prior without selective": ("train coco --prior-path prior.csv", 2, "prior_path has a meaning"),
    "prior to be estimated without selective": (
        "train coco --prior-path estimate",
        2,
        "prior_path has a meaning",
    ),
    "mixed labels for a loss without": (
        "train coco --loss hill --mixup 0.2",
        2,
        "loss hill takes no soft labels",
    ),
    "statistics of all processes on a CPU": ("train coco --sync-bn", 2, "sync_bn needs GPUs"),
    "two sources of weights": (
        "train coco --pretrained --model-path model.pt",
        2,
        "model_path and pretrained",
    ),
    "other number of classes": ("train coco --num-classes 3", 2, "num_classes is 3"),
    "output is a file": ("train coco --output prior.csv", 1, "cannot write into prior.csv"),
    "output below a file": ("train coco --output prior.csv/run", 1, "Not a directory"),
    "output cannot be written": ("train coco --output /proc/run", 1, "cannot write into /proc"),
    "output of too long a name": (f"train coco --output {'a' * 300}", 1, "too long"),
    "output holds a run": ("train coco --output run", 2, "holds a run"),
    "nothing to resume": ("train coco --resume", 2, "no run to resume in new"),
}

RESUMED = {
    "resume from a file that is not there": ("train coco --resume none.pt", 1, "none.pt"),
    "resume from a file of weights": ("train coco --resume model.pt", 2, "holds weights"),
    "resume without a checkpoint": (
        RESUME,
        1,
        "last.pt",
        cut("run/last.pt", 0),
    ),
    "resume of a cut checkpoint": (
        RESUME,
        1,
        "damaged",
        cut("run/last.pt", 5000),
    ),
    "resume with other settings": (
        f"{RESUME} --lr 0.5",
        2,
        "other settings (lr",
    ),
    "resume of mere weights": (
        RESUME,
        2,
        "holds weights and no run",
        lambda root: shutil.copy(root / "model.pt", root / "run/last.pt"),
    ),
    "resume of another model": (
        RESUME,
        1,
        "last.pt",
        lambda root: resumed_from(root, regular={"w": torch.zeros(1)}),
    ),
    "resume of another state": (
        RESUME,
        1,
        "last.pt",
        lambda root: resumed_from(root, training={}),
    ),
}
CASES = {**OPTIONS, **RESUMED}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message_and_leaves_nothing(name, refused):
    refused(*CASES[name])


def test_a_rank_that_knows_no_group_is_refused(refused, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    refused("train coco", 2, "a RANK, but not WORLD_SIZE and MASTER_PORT", alone=True)
