"""A folder for each class, with folders of splits above them or without."""

import os

import pytest

from asl.data.annotations import files_exist
from asl.data.readers.folders import folders, splits
from asl.errors import DataError, UsageError


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def labels(data):
    names = [os.fsdecode(file) for file in data.files.tolist()]
    present = [[data.classes[c] for c in data.present(row)] for row in range(len(data))]
    return dict(zip(names, present, strict=True))


def test_folders_of_splits_hold_folders_of_classes(tmp_path):
    root = write(
        tmp_path,
        *("train/dog/1.jpg", "train/cat/1.PNG", "train/cat/deep/er/2.jpeg", "val/cat/3.webp"),
        *("val/cat/notes.txt", "val/loose.jpg", "val/.hidden/4.jpg", "val/cat/.hidden.jpg"),
        *("val/ant/none.txt", "other/bird/5.jpg"),
    )
    data = folders(root, "train")
    assert data.classes == ("ant", "cat", "dog")
    assert labels(data) == {
        "cat/1.PNG": ["cat"],
        "cat/deep/er/2.jpeg": ["cat"],
        "dog/1.jpg": ["dog"],
    }
    assert data.dense().tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert data.path(2) == f"{root}/train/dog/1.jpg"
    val = folders(root, "val")
    assert (val.classes, labels(val)) == (data.classes, {"cat/3.webp": ["cat"]})
    assert splits(root) == ["train", "val"]


def test_without_folders_of_splits_they_are_drawn(tmp_path):
    names = [f"{kind}/{number}.jpg" for kind in ("train", "car") for number in range(100)]
    root = write(tmp_path, *names)  # a train is a class here: images lie in its folder
    parts = {split: labels(folders(root, split)) for split in ("train", "val")}
    assert splits(root) == ["train", "val"]
    assert not {*parts["train"]} & {*parts["val"]}
    assert {**parts["train"], **parts["val"]} == {name: [name.split("/")[0]] for name in names}
    assert len(parts["val"]) == pytest.approx(40, abs=20)
    assert len(folders(root, "val", stratify=True)) == 40
    assert folders(root, "val", stratify=True).counts(1).tolist() == [20, 20]


def test_a_link_to_the_folder_of_a_class_is_followed(tmp_path):
    write(tmp_path, "elsewhere/1.jpg")
    write(tmp_path / "data", "train/dog/2.jpg")
    (tmp_path / "data/train/cat").symlink_to(tmp_path / "elsewhere")
    assert labels(folders(tmp_path / "data", "train")) == {
        "cat/1.jpg": ["cat"],
        "dog/2.jpg": ["dog"],
    }


def test_images_may_have_any_name_and_classes_one_that_can_be_written(tmp_path):
    write(tmp_path, os.fsdecode(b"train/caf\xc3\xa9/\xff.jpg"))
    data = folders(tmp_path, "train")
    assert data.classes == ("caf\xe9",)
    assert files_exist(data).all()
    write(tmp_path, os.fsdecode(b"train/caf\xe9/1.jpg"))
    with pytest.raises(DataError, match=r"the name of folder .*/train/caf.* is not UTF-8"):
        folders(tmp_path, "train")


@pytest.mark.parametrize(
    ("names", "split", "error", "message"),
    [
        ((), "train", DataError, "holds no folder of a class with images in it"),
        (("cat/1.txt",), "train", DataError, "holds no folder of a class with images in it"),
        (("1.jpg",), "train", DataError, "holds no folder of a class with images in it"),
        (("train/cat/1.jpg",), "val", UsageError, r"no split 'val' \(.*/val\): choose from train"),
        (("cat/1.jpg",), "test", UsageError, "no split 'test' .* choose from train, val"),
        (("cat/1.jpg",), "val", UsageError, "of 1 images none is drawn for val"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, names, split, error, message):
    with pytest.raises(error, match=message):
        folders(write(tmp_path, *names), split)
    with pytest.raises(DataError, match="none is not there"):
        splits(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg")
    (tmp_path / "train/cat").chmod(0)
    with pytest.raises(DataError, match="train/cat cannot be read: Permission denied"):
        folders(tmp_path, "train")
