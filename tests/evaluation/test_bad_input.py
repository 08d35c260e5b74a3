"""Results that cannot be made or written: one line that says so, nothing left behind."""

import pytest
import torch
from bad_input import edit
from safetensors.torch import save_file

from asl.models import checkpoint

ORIGIN = {
    **{"weights": "ema", "image_size": 32, "tta": ""},
    **{"dataset": "coco", "split": "val2014", "images": 2},
}


def stored(name, entry):
    def spoil(root):
        path = root / "model.pt"
        checkpoint.amend(path, {name: entry}, checkpoint.version(path))

    return spoil


CASES = {
    "threshold above one": ("infer --threshold 1.5", 2, "threshold is 1.5"),
    "no labels wanted": ("infer --top-k 0", 2, "top_k is 0"),
    "no view": ("infer --tta flop", 2, "tta is 'flop'"),
    "size that is too large": ("validate coco --tta scales:200", 2, "image_size is 6400"),
    "a data set behind checkpoints": (
        "validate --model-path model.pt coco",
        2,
        "coco is a folder, and --model-path takes",
    ),
    "second checkpoint that is not there": (
        "infer --model-path model.pt none.pt",
        1,
        "none.pt: cannot be read",
    ),
    "no rule for thresholds": ("validate coco --tune-thresholds f2", 2, "tune_thresholds is 'f2'"),
    "a precision of nothing": (
        "validate coco --tune-thresholds precision:0.0",
        2,
        "tune_thresholds is 'precision:0.0'",
    ),
    "no way to calibrate": ("validate coco --calibrate beta", 2, "calibrate"),
    "too few images to choose thresholds on": (
        "validate coco --tune-thresholds f1",
        1,
        "2 images to choose thresholds or a calibration on: at least 5",
    ),
    "thresholds for a mean of scores": (
        "validate coco --calibrate platt --model-path model.pt model.pt",
        2,
        "name one checkpoint",
    ),
    "thresholds into a file of weights alone": (
        "validate coco --tune-thresholds f1 --model-path weights.safetensors",
        2,
        "weights.safetensors holds weights alone",
        lambda root: save_file({"fc.weight": torch.ones(2, 3)}, root / "weights.safetensors"),
    ),
    "thresholds of other classes": (
        "infer",
        1,
        "model.pt: its thresholds cannot be used: not 2 values",
        stored("thresholds", {**ORIGIN, "values": torch.ones(3)}),
    ),
    "thresholds outside of all scores": (
        "infer",
        1,
        "a value is outside of [0, 1]",
        stored("thresholds", {**ORIGIN, "values": torch.tensor([0.5, torch.nan])}),
    ),
    "thresholds that are a list": (
        "infer",
        1,
        "its thresholds cannot be used: a list in place of",
        stored("thresholds", [0.5, 0.5]),
    ),
    "a calibration of images unknown": (
        "validate coco",
        1,
        "its calibration cannot be used: images is None",
        stored("calibration", {**ORIGIN, "images": None}),
    ),
    "a calibration of no method": (
        "validate coco",
        1,
        "its calibration cannot be used: its method is None",
        stored("calibration", ORIGIN),
    ),
    "no picture": ("infer --pic-path ''", 2, "--pic-path"),
    "pictures below a file": ("infer --output prior.csv/pictures", 2, "prior.csv"),
    "json below a file": ("validate coco --json prior.csv/x.json", 2, "prior.csv"),
    "json is a folder": ("infer --no-draw --json coco", 2, "coco"),
    "csv is a folder": ("infer --no-draw --csv coco", 2, "cannot write coco: Is a directory"),
    "a contact sheet of another kind": ("infer --contact-sheet a.gif", 2, "must end in .png"),
    "two results in one file": ("infer --csv a --jsonl ./a", 2, "are one file"),
    "no attention to look at": ("infer --explain attention", 2, "head is not ml_decoder"),
    "a map of one pixel": ("infer --explain gradcam", 2, "one pixel"),
    "an address of another machine": ("infer --serve --host 192.0.2.1", 2, "cannot serve at"),
    "a page that explains what it cannot": (
        "infer --serve --port 0 --explain attention",
        2,
        "head is not ml_decoder",
    ),
    "no port": ("infer --serve --port 70000", 2, "port is 70000"),
    "prior below a file": ("validate coco --estimate-prior prior.csv/x.csv", 2, "prior.csv"),
    "other classes than the data": (
        "validate zoo --dataset nus_wide --val-split train",
        1,
        "no match: dog",
        edit("zoo/nus_wid_data.csv", "dog", "cow"),
    ),
    "one class of the data is missing": (
        "validate voc --dataset voc",
        1,
        "no match: dog",
        lambda root: [
            (root / f"voc/ImageSets/Main/dog_{split}.txt").unlink()
            for split in ("test", "trainval")
        ],
    ),
    "descriptions that are not there": ("infer --class-descriptions none.csv", 1, "none.csv"),
    "descriptions of three columns": ("infer --class-descriptions table.csv", 1, "row 1"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message_and_leaves_nothing(name, refused):
    refused(*CASES[name])
