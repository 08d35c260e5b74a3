"""Every layout, from a few files to a trained and validated model; and real photographs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asl.data.annotations import PRESENT
from asl.data.readers import read
from asl.evaluation.evaluate import evaluate
from asl.evaluation.predict import predict
from asl.images.features import FeatureBatches
from asl.images.loader import Batches
from asl.images.settings import ImageSettings
from asl.training.fit import fit

CLASSES = ("bird", "boat", "cat")
# Four images a split: the names of what is in each.
LABELS = {
    "train": (("bird",), ("boat", "cat"), ("cat",), ("bird", "cat")),
    "val": (("cat",), ("bird", "boat"), ("boat",), ()),
}


def draw(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_coco(root, year):
    for split, images in LABELS.items():
        entries, objects = [], []
        for number, names in enumerate(images, 1):
            prefix = f"COCO_{split}2014_" if year == "2014" else ""
            entries.append({"id": number, "file_name": f"{prefix}{number:012d}.jpg"})
            draw(root / f"{split}{year}" / entries[-1]["file_name"], number)
            objects += [{"image_id": number, "category_id": CLASSES.index(n)} for n in names]
        categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
        path = root / "annotations" / f"instances_{split}{year}.json"
        path.parent.mkdir(exist_ok=True)
        content = {"images": entries, "annotations": objects, "categories": categories}
        path.write_text(json.dumps(content))
    return root


def write_coco_2014(root):
    return write_coco(root, "2014")


def write_coco_2017(root):
    return write_coco(root, "2017")


def write_voc(root):
    year = root / "VOCdevkit" / "VOC2007"
    for split, images in {"trainval": LABELS["train"], "test": LABELS["val"]}.items():
        for name in CLASSES:
            marks = (f"{split}{i}  {1 if name in names else -1}" for i, names in enumerate(images))
            path = year / "ImageSets" / "Main" / f"{name}_{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(marks) + "\n")
        for i in range(len(images)):
            draw(year / "JPEGImages" / f"{split}{i}.jpg", i)
    return root / "VOCdevkit"


def write_nus_wide(root):
    lines = ["filepath,label,split_name"]
    for split, images in LABELS.items():
        for i, names in enumerate(images):
            lines.append(f'images/{split}{i}.jpg,"{list(names)}",{split}')
            draw(root / "images" / f"{split}{i}.jpg", i)
    (root / "nus_wid_data.csv").write_text("\n".join(lines) + "\n")
    return root


def write_openimages(root):
    root.mkdir()
    (root / "oidv6-classes-trainable.txt").write_text("".join(f"/m/{name}\n" for name in CLASSES))
    for split, file in {"train": "oidv6-train", "val": "test"}.items():
        lines = ["ImageID,Source,LabelName,Confidence"]
        for i, names in enumerate(LABELS[split]):
            image = f"{i:016x}"
            lines += [f"{image},verification,/m/{name},1" for name in names]
            lines += [
                f"{image},verification,/m/{name},0" for name in CLASSES[:2] if name not in names
            ]
            draw(root / ("train" if split == "train" else "test") / f"{image}.jpg", i)
        (root / f"{file}-annotations-human-imagelabels.csv").write_text("\n".join(lines) + "\n")
    return root


def write_table(root):
    for split, images in LABELS.items():
        lines = ["path,labels"]
        for i, names in enumerate(images):
            lines.append(f"img/{split}{i}.png,{'|'.join(names)}")
            draw(root / "img" / f"{split}{i}.png", i)
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root


def write_folders(root):
    for split, images in LABELS.items():
        for i, names in enumerate(images):
            draw(root / split / (names or CLASSES)[0] / f"{i}.png", i)
    return root


def write_soft_table(root):
    lines = ["path;split;bird;boat;cat"]
    for split, images in LABELS.items():
        for i, names in enumerate(images):
            marks = ["0,9" if name in names else "0,1" for name in CLASSES]
            lines.append(f"img/{split}{i}.png;{split};{';'.join(marks)}")
            draw(root / "img" / f"{split}{i}.png", i)
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


SMALL = {"image_size": 32, "batch_size": 2, "ema_decay": 0.5, "epochs": 1}
SMALL_MODEL = {"image_size": 32, "batch_size": 2}


@pytest.mark.parametrize(
    ("dataset", "write"),
    [
        ("coco", write_coco_2014),
        ("coco", write_coco_2017),
        ("voc", write_voc),
        ("nus_wide", write_nus_wide),
        ("openimages", write_openimages),
        ("table", write_table),
        ("table", write_soft_table),
        ("folders", write_folders),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.removeprefix("write_"),
)
def test_a_tree_in_the_real_layout_trains_for_two_steps_and_validates(
    settings, measuring, dataset, write, tmp_path
):
    root = write(tmp_path / "data")
    run = fit(settings(root, tmp_path / "run", dataset=dataset, **SMALL))
    [row] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = evaluate(measuring(root, run / "best.pt", dataset=dataset, **SMALL_MODEL))
    assert result["mAP"] == max(row["mAP_ema"], row["mAP_regular"])
    assert [c["name"].removeprefix("/m/") for c in result["per_class"]] == list(CLASSES)
    assert result["evaluated_as"].startswith(f"{dataset}: ")
    assert result["protocol"] == ("partial" if dataset == "openimages" else "full")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_soft_targets_where_labels_are_soft(tmp_path, workers):
    train = read("table", write_soft_table(tmp_path), "train")
    settings = ImageSettings(image_size=32, batch_size=3, workers=workers)
    expected = np.where([[c in names for c in CLASSES] for names in LABELS["train"]], 0.9, 0.1)
    features = FeatureBatches(train, torch.zeros(4, 1), 3)
    for batches in (Batches(train, settings), features):
        targets = torch.cat([batch.targets for batch in batches.epoch(0)])
        np.testing.assert_array_equal(targets.numpy(), expected.astype(np.float32))


def test_class_descriptions_are_shown_in_place_of_ids(settings, measuring, labelling, tmp_path):
    root = write_openimages(tmp_path / "data")
    names = tmp_path / "names.csv"
    names.write_text("LabelName,DisplayName\n/m/cat,House cat\n")
    run = fit(settings(root, tmp_path / "run", dataset="openimages", **SMALL))
    shown = {"class_descriptions": str(names), **SMALL_MODEL}
    measured = evaluate(measuring(root, run / "best.pt", dataset="openimages", **shown))
    assert [c["name"] for c in measured["per_class"]] == ["/m/bird", "/m/boat", "House cat"]
    predictions = predict(labelling(root / "test", run / "best.pt", **shown))
    named = {label["name"] for each in predictions for label in each["labels"]}
    assert named == {"/m/bird", "/m/boat", "House cat"}


def test_the_summary_of_a_data_set_counts_and_draws_it(tmp_path):
    root = write_table(tmp_path / "data")
    (root / "img" / "val0.png").unlink()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "asl.data", "table", root, "--output", tmp_path],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PATH": ""},
    )
    train, val, identical = done.stdout.strip().split("\n\n")
    assert train.startswith("train\n")
    assert "images              4 in" in train
    assert "labels              6, 1.50 an image" in train
    assert "most frequent       cat 3, bird 2, boat 1" in train
    assert "missing files       1:" in val
    # Number n of either split is the same drawing; one of val is missing.
    assert identical.startswith("identical images in different splits: 3\n")
    for split in ("train", "val"):
        with Image.open(tmp_path / f"table_{split}.png") as picture:
            assert picture.width > 800


def as_coco(voc_root, root, images_per_split):
    """Photographs and labels of VOC, as a stranger would convert them to COCO 2014's layout."""
    for split in ("train", "val"):
        voc = read("voc", voc_root, split)
        entries, objects = [], []
        (root / f"{split}2014").mkdir(parents=True)
        for row in range(0, images_per_split):
            name = f"COCO_{split}2014_{row:012d}.jpg"
            shutil.copyfile(voc.path(row), root / f"{split}2014" / name)
            entries.append({"id": row, "file_name": name, "width": 320, "height": 240})
            for column in np.flatnonzero(voc.labels(row) == PRESENT):
                box = {"bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0}
                objects.append(
                    {"id": len(objects), "image_id": row, "category_id": int(column), **box}
                )
        categories = [{"id": i, "name": name} for i, name in enumerate(voc.classes)]
        content = {"images": entries, "annotations": objects, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(content))


def test_photographs_converted_to_cocos_layout_train_validate_and_infer(
    settings, measuring, labelling, voc_root, tmp_path
):
    root = tmp_path / "coco"
    as_coco(voc_root, root, images_per_split=24)
    run = fit(settings(root, tmp_path / "run", **SMALL))
    result = evaluate(measuring(root, run / "best.pt", **SMALL_MODEL))
    assert result["images"] == 24
    assert 0 < result["mAP"] <= 100
    predictions = predict(labelling(root / "val2014", run / "best.pt", top_k=3, **SMALL_MODEL))
    assert len(predictions) == 24
    assert all(len(each["labels"]) == 3 for each in predictions)
