"""What can be said of a data set: where it lies, its splits, and what its labels mean."""

from typing import Annotated, Literal

import tyro
from pydantic import Field

from asl.config import OptionalFloat, OptionalInt, OptionalStr, Settings

Dataset = Literal[
    "coco", "voc", "nus_wide", "openimages", "table", "folders", "webdataset", "shapes"
]
Difficult = Literal["present", "absent", "ignore"]


class DataSettings(Settings):
    """Which images there are and how they are split. None stands for the reader's own default."""

    data: Annotated[str, tyro.conf.Positional] = ""
    """folder of the data set; webdataset: or the addresses of shards"""
    dataset: Dataset = "coco"
    """its layout (DATASETS.md)"""
    train_split: str = ""
    """split to train on; empty: the usual one of the data set"""
    val_split: str = ""
    """split to validate on; empty: the usual one of the data set"""
    all_images: bool = False
    """coco: also the images without any annotation"""
    val_difficult: Difficult | None = None
    """voc: what objects marked difficult are in validation; default: ignore"""
    class_list: OptionalStr = None
    """openimages: file of the class ids; default: the trainable ones"""
    val_share: Annotated[OptionalFloat, Field(gt=0, le=0.99)] = None
    """sets without splits: share of the images to validate on; default: 0.2"""
    split_seed: Annotated[OptionalInt, Field(ge=0)] = None
    """sets without splits: which images those are; default: 0"""
    stratify: bool = False
    """sets without splits: draw them so that rare classes are in both parts"""
    folds: Annotated[OptionalInt, Field(ge=2)] = None
    """sets without splits: draw so many folds, of which one is validated on"""
    fold: Annotated[OptionalInt, Field(ge=0)] = None
    """sets without splits: which one, from 0; default: 0"""
    image_folder: OptionalStr = None
    """folder of the images, from DATA; default: that of the layout"""
    missing_images: Literal["error", "skip"] = "error"
    """listed images whose file is not there: stop, or leave them out"""


class LabelSettings(Settings):
    """What the labels are that a model is trained on."""

    train_difficult: Difficult | None = None
    """voc: what objects marked difficult are in training; default: present"""
    machine_generated: Annotated[OptionalFloat, Field(ge=0, le=1)] = None
    """openimages: train also on the machine's labels of at least this confidence"""
    simulate_partial: OptionalStr = None
    """hide training labels: fpc:N keeps N positives and negatives per class, rps:P hides a cell
    with probability P, thin:S keeps a share S of each class's positives; or falsify them: missing:S
    turns a share S of the positives into negatives, single all but one of an image"""
    partial_seed: Annotated[int, Field(ge=0)] = 0
    """which labels are hidden, whatever --seed is"""
