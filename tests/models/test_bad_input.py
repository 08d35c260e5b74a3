"""Models and checkpoints that are wrong: one line that says why, nothing left behind."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from bad_input import cut, put

FIRST = "conv1.0.weight"  # of test_resnet


def content(**parts):
    """The checkpoint with other entries; those that are None go."""

    def spoil(root):
        whole = {**torch.load(root / "model.pt", weights_only=True), **parts}
        kept = {name: value for name, value in whole.items() if value is not None}
        torch.save(kept, root / "model.pt")

    return spoil


def weights(change):
    """The checkpoint after `change` of its weights, alone."""

    def spoil(root):
        whole = torch.load(root / "model.pt", weights_only=True)
        change(whole["model"])
        names = ("model", "idx_to_class", "num_classes", "config")
        torch.save({name: whole[name] for name in names}, root / "model.pt")

    return spoil


def fill(state, value):
    state[FIRST][0] = value


def cast(kind):
    return lambda state: state.update({name: x.to(kind) for name, x in state.items()})


def bomb(root):
    with zipfile.ZipFile(root / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))


class RunsCode:
    def __reduce__(self):
        return Path.mkdir, (Path("was_run"),)


OPTIONS = {
    "unknown model": ("train coco --model-name tresnet_n", 2, "did you mean tresnet"),
    "unknown weights of a model": ("train coco --model-name resnet50.none", 2, "no weights"),
    "images too small for the model": (
        "train coco --model-name test_convnext --image-size 8",
        2,
        "test_convnext",
    ),
    "size that patches do not fill": ("train coco --model-name test_vit --image-size 33", 2, "33"),
    "size that windows do not fill": ("train coco --model-name test_maxvit --image-size 8", 2, "8"),
    "device that is not there": ("train coco --device cuda:9", 2, "device 'cuda:9'"),
    "no device": ("validate coco --device gpu", 2, "device 'gpu'"),
    "device without memory": ("infer --device meta", 2, "device 'meta'"),
    "other number than the checkpoint": ("infer --num-classes 3", 2, "num_classes is 3"),
    "unknown set of weights": ("infer --weights averaged", 2, "averaged"),
    "no checkpoint": ("infer --model-path ''", 2, "--model-path"),
}

CHECKPOINTS = {
    "checkpoint that is not there": ("infer --model-path none.pt", 1, "No such file"),
    "checkpoint that is a folder": ("validate coco --model-path coco", 1, "directory"),
    "checkpoint that is empty": ("infer", 1, "it is empty", put("model.pt")),
    "checkpoint that is HTML": (
        "infer",
        1,
        "download",
        put("model.pt", "<!DOCTYPE html><title>403"),
    ),
    "checkpoint that is cut off": ("validate coco", 1, "damaged", cut("model.pt", 9999)),
    "checkpoint that is text": (
        "train coco --model-path model.pt",
        1,
        "not a checkpoint",
        put("model.pt", "hello"),
    ),
    "checkpoint that is a picture": (
        "infer --model-path coco/train2014/1.png",
        1,
        "not a checkpoint",
    ),
    "checkpoint with code": ("infer", 1, "would run code", content(extra=RunsCode())),
    "pickle with code": ("infer", 1, "would run code", put("model.pt", pickle.dumps(RunsCode()))),
    "checkpoint that is a bomb": ("infer", 1, "would unpack to 50,000,000", bomb),
    "checkpoint of a list": (
        "infer",
        1,
        "holds a list",
        lambda root: torch.save([1], root / "model.pt"),
    ),
    "checkpoint without weights": (
        "infer",
        1,
        "no weights",
        lambda root: torch.save({"model": {}}, root / "model.pt"),
    ),
    "other architecture": ("validate coco --model-name test_efficientnet", 1, "another model"),
    "other architecture to start from": (
        "train coco --model-path model.pt --model-name test_vit",
        1,
        "another model",
    ),
    "other head": ("infer --head bottleneck", 1, "--head"),
    "a decoder where there is none": ("infer --head ml_decoder", 1, "--head"),
    "a decoder for a model that cannot have it": (
        "train coco --head ml_decoder --model-name deit_tiny_distilled_patch16_224",
        2,
        "deit_tiny_distilled_patch16_224 can have no ML-Decoder head",
    ),
    "other head by data set": ("infer --dataset-type OpenImages", 1, "--head"),
    "missing keys": ("infer", 1, "tensors", weights(lambda state: state.pop(FIRST))),
    "wrong shapes": (
        "infer",
        1,
        FIRST,
        weights(lambda state: state.update({FIRST: torch.zeros(3, 3)})),
    ),
    "nan weights": ("infer", 1, "not finite", weights(lambda state: fill(state, torch.nan))),
    "infinite weights": (
        "train coco --model-path model.pt",
        1,
        "not finite",
        weights(lambda state: fill(state, torch.inf)),
    ),
    "whole numbers for weights": ("infer", 1, "int8", weights(cast(torch.int8))),
    "complex weights": ("validate coco", 1, "complex", weights(cast(torch.complex64))),
    "sparse weights": (
        "infer",
        1,
        FIRST,
        weights(lambda state: state.update({FIRST: state[FIRST].to_sparse()})),
    ),
    "weights without values": (
        "infer",
        1,
        FIRST,
        weights(lambda state: state.update({FIRST: state[FIRST].to("meta")})),
    ),
    "no class names": ("infer", 1, "does not name its classes", content(idx_to_class=None)),
    "class names of another number": (
        "infer",
        1,
        "classes",
        content(idx_to_class={0: "cat"}, num_classes=None),
    ),
    "class names that are no list": ("infer", 1, "idx_to_class", content(idx_to_class=3)),
    "class names without numbers": (
        "infer",
        1,
        "idx_to_class",
        content(idx_to_class={"cat": 0, "dog": 1}),
    ),
    "class names that are numbered beyond": (
        "infer",
        1,
        "idx_to_class",
        content(idx_to_class={0: "cat", float("inf"): "dog"}),
    ),
    "settings of a wrong type": ("infer", 1, "image_size", content(config={"image_size": "large"})),
    "settings out of range": ("infer", 1, "image_size", content(config={"image_size": -3})),
    "settings that are no settings": ("infer", 1, "config", content(config=3)),
    "weights of a set that is no set": ("infer", 1, "holds a int", content(ema=3)),
}
CASES = {**OPTIONS, **CHECKPOINTS}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message_and_leaves_nothing(name, refused):
    refused(*CASES[name])


def test_a_process_of_its_own_ends_the_same_way(refused):
    refused(*CASES["checkpoint with code"], alone=True)
