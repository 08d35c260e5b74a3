"""Identical images in different splits, and what `python -m asl.data` says of a data set."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from asl.data.__main__ import main
from asl.data.annotations import Annotations
from asl.data.duplicates import END, Pair, identical_files
from asl.errors import DataError
from asl.evaluation.pictures import pairs_picture

SOURCE = Path(__file__).parents[2] / "src"


def write(root, **contents):
    """Files in a folder, as annotations."""
    root.mkdir(exist_ok=True)
    for name, content in contents.items():
        (root / name).write_bytes(content)
    return Annotations.unlabelled(root, np.array([name.encode() for name in contents]), ("cat",))


def test_images_of_other_splits_with_the_same_content_are_paired(tmp_path):
    train = write(tmp_path / "train", a=b"1", b=b"22", c=b"333")
    val = write(tmp_path / "val", d=b"22", e=b"99", f=b"333", g=b"22")
    test = write(tmp_path / "test", h=b"99", i=b"22")
    pairs = identical_files([train, val, test])
    # d is b, f is c, g is b, h is e, and i is b
    assert [pair[:4] for pair in pairs] == [
        *[(1, 0, 0, 1), (1, 2, 0, 2), (1, 3, 0, 1), (2, 0, 1, 1), (2, 1, 0, 1)]
    ]
    assert identical_files([train, test]) == [Pair(1, 1, 0, 1)]


@pytest.mark.parametrize("place", [0, END - 1, END, 3 * END, -END - 1, -END, -1])
def test_a_single_byte_makes_a_difference(tmp_path, place):
    content = bytearray(os.urandom(5 * END))
    train = write(tmp_path / "train", a=content)
    content[place] ^= 1
    assert identical_files([train, write(tmp_path / "val", b=content)]) == []
    content[place] ^= 1
    assert len(identical_files([train, write(tmp_path / "val", b=content)])) == 1


def test_equal_ends_of_files_of_other_sizes_are_no_identical_images(tmp_path):
    end = os.urandom(2 * END)
    first = write(tmp_path / "train", a=b"1" + end, b=b"x" * (len(end) + 2))
    second = write(tmp_path / "val", c=b"11" + end, d=b"y" * (len(end) + 1))
    assert identical_files([first, second]) == []


def test_copies_within_a_split_and_images_of_several_splits_are_none(tmp_path):
    train = write(tmp_path / "all", a=b"1", b=b"1", c=b"2")
    trainval = write(tmp_path / "all", a=b"1", b=b"1", c=b"2", d=b"3")
    assert identical_files([train, trainval]) == []
    assert identical_files([train, trainval.subset([3, 2, 1, 0])]) == []
    assert identical_files([train, train.subset([])]) == []


def test_what_no_other_split_has_the_size_of_is_not_read(tmp_path):
    train, val = write(tmp_path / "train", a=b"1", b=b"22"), write(tmp_path / "val", c=b"333")
    for name in "ab":  # a folder has a size, but cannot be read
        (tmp_path / "train" / name).unlink()
        (tmp_path / "train" / name).mkdir()
    assert identical_files([train, val]) == []


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    train = write(tmp_path / "train", a=b"1")
    val = write(tmp_path / "val", b=b"1")
    (tmp_path / "val" / "b").unlink()
    with pytest.raises(DataError, match=r"val/b cannot be read: No such file"):
        identical_files([train, val])


@pytest.fixture
def coco(tmp_path):
    """A folder as the official archives leave it; 1.png of val2014 is 2.png of train2014."""
    root = tmp_path / "coco"
    for split, shift in {"train2014": 0, "val2014": 1}.items():
        (root / split).mkdir(parents=True)
        for number in (1, 2):
            pixels = np.full((20, 30, 3), number + shift, dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / f"{number}.png")
        images = [{"id": number, "file_name": f"{number}.png"} for number in (1, 2)]
        objects = [{"image_id": i, "category_id": c} for i, c in ((1, 1), (2, 1), (2, 2))]
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        content = {"images": images, "annotations": objects, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        instances = root / "annotations" / f"instances_{split}.json"
        instances.write_text(json.dumps(content))
        captions = {"images": images, "annotations": [{"image_id": 1, "caption": "a cat"}]}
        instances.with_name(f"captions_{split}.json").write_text(json.dumps(captions))
    return root


def test_the_official_archive_is_counted_drawn_and_compared(coco, tmp_path):
    (coco / "train2014" / "1.png").unlink()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "asl.data", "coco", coco, "--output", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    train, val, compared = done.stdout.strip().split("\n\n")
    assert train.splitlines() == [
        "train2014",
        f"  images              2 in {coco}/train2014",
        f"  missing files       1: {coco}/train2014/1.png, ...",
        "  classes             2",
        "  labels              3, 1.50 an image",
        "  most frequent       cat 2, dog 1",
        "  least frequent      dog 1, cat 2",
        f"  samples             {tmp_path}/coco_train2014.png",
    ]
    assert val.startswith("val2014\n")
    assert "missing files       0\n" in val
    assert compared.splitlines() == [
        "identical images in different splits: 1",
        f"  {coco}/train2014/2.png = {coco}/val2014/1.png",
        f"  picture             {tmp_path}/coco_identical.png",
    ]
    for split in ("train2014", "val2014", "identical"):
        with Image.open(tmp_path / f"coco_{split}.png") as picture:
            assert picture.width > 300


def test_files_of_several_splits_are_counted_by_name(tmp_path, capsys):
    write(tmp_path, **{f"{number}.jpg": bytes([number]) for number in range(3)})
    for split, numbers in {"train": "01", "trainval": "012", "val": "2"}.items():
        rows = "".join(f"{number}.jpg,cat\n" for number in numbers)
        (tmp_path / f"{split}.csv").write_text(f"path,labels\n{rows}")
    with patch("asl.data.__main__.samples_picture"):
        main("table", tmp_path)
    said = capsys.readouterr().out.split("\n\n")[-1]
    assert said.splitlines() == [
        "files in both train and trainval: 2",
        "files in both trainval and val: 1",
        "identical images in different splits: 0",
    ]


def test_a_picture_of_pairs_says_which_labels_differ(tmp_path):
    """Three pairs, of which the second has other labels in the other split."""
    names = np.array([b"a.png", b"b.png", b"c.png"])
    for name in names.tolist():
        Image.fromarray(np.zeros((30, 40, 3), dtype=np.uint8)).save(tmp_path / name.decode())
    train, val = (
        Annotations.from_cells(tmp_path, names, ("cat", "dog"), range(3), columns, 1)
        for columns in ([0, 0, 1], [0, 1, 1])
    )
    drawn = []
    with patch("matplotlib.axes.Axes.set_title", autospec=True) as titled:
        pairs = [Pair(1, row, 0, row) for row in range(3)]
        pairs_picture(pairs, ["train", "val"], [train, val], tmp_path / "pairs.png")
        drawn = [(call.args[1], call.kwargs["color"]) for call in titled.call_args_list]
    assert [text for text, _ in drawn[2:4]] == ["train: b.png\ncat", "val: b.png\ndog"]
    colors = [color for _, color in drawn]
    assert colors[0] == colors[1] == colors[4] == colors[5] != colors[2] == colors[3]
    with Image.open(tmp_path / "pairs.png") as picture:
        assert picture.width > 600


def test_a_single_split_is_compared_with_none(coco, tmp_path, capsys):
    main("coco", coco, split="val2014", output=tmp_path)
    said = capsys.readouterr().out
    assert said.startswith("val2014\n")
    assert "identical" not in said


def test_cells_that_are_not_annotated_are_counted(tmp_path, capsys):
    (tmp_path / "train.csv").write_text("path,cat,dog\na.jpg,1,\nb.jpg,0,1\n")
    main("table", tmp_path)
    said = capsys.readouterr().out
    assert "verified absent     1\n" in said
    assert "not annotated       1 (25.0% of the cells)" in said


def test_twelve_of_many_images_are_drawn_others_with_another_seed(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr("asl.data.__main__.samples_picture", lambda chosen, _: drawn.append(chosen))
    names = [f"{number}.jpg" for number in range(40)]
    write(tmp_path, **dict.fromkeys(names, b""))
    (tmp_path / "train.csv").write_text("path,labels\n" + "".join(f"{n},cat\n" for n in names))
    for seed in (0, 0, 1):
        main("table", tmp_path, seed=seed)
    first, again, other = [set(chosen.files.tolist()) for chosen in drawn]
    assert len(first) == 12
    assert first == again != other
