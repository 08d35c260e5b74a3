"""Which split a model is trained and validated on, with which labels and classes; both apart."""

import json

import numpy as np
import pytest

from asl.data.partial import simulate
from asl.data.readers import read
from asl.data.settings import DataSettings, LabelSettings
from asl.data.splits import check_apart, read_split, split_name
from asl.errors import DataError, UsageError


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def voc(tmp_path):
    """Images 1 and 2 in trainval, 3 and 4 in test; the cats in 2 and 4 are difficult."""
    for split, images in {"trainval": "12", "test": "34"}.items():
        lists = tmp_path / "voc" / "ImageSets" / "Main"
        write(lists / f"cat_{split}.txt", f"{images[0]} 1\n{images[1]} 0\n")
        write(lists / f"dog_{split}.txt", f"{images[0]} -1\n{images[1]} 1\n")
        for image in images:
            write(tmp_path / "voc" / "JPEGImages" / f"{image}.jpg")
    return DataSettings(data=str(tmp_path / "voc"), dataset="voc")


@pytest.fixture
def openimages(tmp_path):
    root, header = tmp_path / "openimages", "ImageID,Source,LabelName,Confidence\n"
    who_labels = ("human", "machine")
    write(root / "oidv6-classes-trainable.txt", "cat\ndog\n")
    for split, image in {"train": "0" * 16, "test": "f" * 16}.items():
        human, machine = (root / f"{split}-annotations-{who}-imagelabels.csv" for who in who_labels)
        write(human, f"{header}{image},verification,cat,1\n")
        write(machine, f"{header}{image},machine,dog,0.9\n")
        write(root / split / f"{image}.jpg")
    return DataSettings(data=str(root), dataset="openimages")


def write_table(root, **splits):
    """A table for each split, with rows such as "a.jpg,cat", and their images."""
    for split, rows in splits.items():
        write(root / f"{split}.csv", "\n".join(["path,labels", *rows]))
        for row in rows:
            write(root / row.partition(",")[0])
    return DataSettings(data=str(root), dataset="table")


def test_no_data_set_is_a_usage_error():
    for role in ("train", "val"):
        with pytest.raises(UsageError, match="name the folder of the data set: DATA"):
            read_split(DataSettings(), role)


def test_the_split_is_the_one_named_else_the_usual_one(voc):
    named = voc.replace(train_split="test", val_split="trainval")
    assert [split_name(voc, role) for role in ("train", "val")] == ["trainval", "test"]
    assert [split_name(named, role) for role in ("train", "val")] == ["test", "trainval"]
    assert read_split(named, "train").files.tolist() == [b"JPEGImages/3.jpg", b"JPEGImages/4.jpg"]


def test_what_is_read_is_said_in_a_line(voc, capsys):
    read_split(voc, "val")
    assert capsys.readouterr().out == "test: 2 images, 2 classes\n"


def test_missing_images_are_an_error_or_left_out_and_counted(voc, tmp_path, capsys):
    (tmp_path / "voc" / "JPEGImages" / "3.jpg").unlink()
    with pytest.raises(DataError, match="1 of 2 images are missing"):
        read_split(voc, "val")
    assert len(read_split(voc.replace(missing_images="skip"), "val")) == 1
    assert capsys.readouterr().out == "test: 1 images (1 missing, skipped), 2 classes\n"


def test_difficult_objects_of_voc_count_in_training_and_are_ignored_in_validation(voc):
    assert read_split(voc, "train").labels(1).tolist() == [1, 1]
    assert read_split(voc, "val").labels(1).tolist() == [-1, 1]
    labels = LabelSettings(train_difficult="absent")
    assert read_split(voc, "train", labels).labels(1).tolist() == [0, 1]
    assert read_split(voc, "val", labels).labels(1).tolist() == [-1, 1]
    present = voc.replace(val_difficult="present")
    assert read_split(present, "val", labels).labels(1).tolist() == [1, 1]
    assert read_split(present, "train", labels).labels(1).tolist() == [0, 1]


def test_labels_of_machines_are_for_training_only(openimages):
    labels = LabelSettings(machine_generated=0.5)
    assert read_split(openimages, "train").labels(0).tolist() == [1, -1]
    assert read_split(openimages, "train", labels).labels(0).tolist() == [1, 1]
    assert read_split(openimages, "val", labels).labels(0).tolist() == [1, -1]


def test_labels_are_hidden_in_training_only_by_their_own_seed(tmp_path):
    rows = [f"{i}.jpg,cat|dog" if i % 3 else f"{i}.jpg,dog" for i in range(60)]
    settings = write_table(tmp_path, train=rows[:40], val=rows[40:])
    labels = LabelSettings(simulate_partial="rps:0.5", partial_seed=7)
    full = read("table", tmp_path, "train")
    hidden = read_split(settings, "train", labels).dense()
    np.testing.assert_array_equal(hidden, simulate(full, "rps:0.5", 7).dense())
    assert (hidden != simulate(full, "rps:0.5", 0).dense()).any()
    assert (read_split(settings, "val", labels).dense() != -1).all()
    assert (read_split(settings, "train").dense() != -1).all()


def test_classes_are_those_asked_for_matched_by_name(tmp_path):
    settings = write_table(tmp_path, val=["a.jpg,cat", "b.jpg,sofa|dog"])
    data = read_split(settings, "val", classes=["couch", "cat"])
    assert data.classes == ("couch", "cat")
    assert data.dense().tolist() == [[0, 1], [1, 0]]
    with pytest.raises(DataError, match="1 of 1 classes have no match: zebra"):
        read_split(settings, "val", classes=["zebra"])


def test_every_setting_of_a_reader_reaches_it(openimages, tmp_path):
    root = tmp_path / "openimages"
    write(root / "mine.txt", "cat\n")
    write(root / "pics" / ("f" * 16 + ".jpg"))
    data = read_split(openimages.replace(class_list="mine.txt", image_folder="pics"), "val")
    assert data.classes == ("cat",)
    assert data.root == root / "pics"

    rows = [f"{i}.jpg,cat" for i in range(50)]
    table = write_table(tmp_path / "table", all=rows)
    usual, other, half = (
        read_split(table.replace(**changed), "val")
        for changed in ({}, {"split_seed": 1}, {"val_share": 0.5})
    )
    assert set(usual.files.tolist()) != set(other.files.tolist())
    assert len(half) > len(usual)

    coco = {"images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}]}
    coco |= {"annotations": [{"image_id": 2, "category_id": 1}]}
    coco |= {"categories": [{"id": 1, "name": "cat"}]}
    write(tmp_path / "coco" / "annotations" / "instances_val2017.json", json.dumps(coco))
    for image in "12":
        write(tmp_path / "coco" / "val2017" / f"{image}.jpg")
    settings = DataSettings(data=str(tmp_path / "coco"))
    assert len(read_split(settings, "val")) == 1
    assert len(read_split(settings.replace(all_images=True), "val")) == 2


@pytest.mark.parametrize(
    ("changed", "labels", "message"),
    [
        ({"val_share": 0.5}, {}, "data set voc has no option 'val_share', only: difficult"),
        ({"all_images": True}, {}, "no option 'all_images'"),
        ({}, {"machine_generated": 0.5}, "no option 'machine_generated'"),
        ({}, {"simulate_partial": "half"}, "no simulation 'half'"),
    ],
)
def test_a_setting_that_the_data_set_does_not_have_is_a_usage_error(voc, changed, labels, message):
    with pytest.raises(UsageError, match=message):
        read_split(voc.replace(**changed), "train", LabelSettings(**labels))


def test_what_was_parsed_is_cached_in_the_folder_of_the_user(voc, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    first = read_split(voc, "train")
    [file] = (tmp_path / "xdg" / "asl").iterdir()
    assert file.name.startswith("voc-")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    np.testing.assert_array_equal(read_split(voc, "train").dense(), first.dense())
    assert (tmp_path / "home" / ".cache" / "asl" / file.name).is_file()


# --- splits that share images ------------------------------------------------------------------


def check(settings):
    check_apart(settings, read_split(settings, "train"), read_split(settings, "val"))


def write_shared(root, dataset):
    """A data set whose training images a and b and validation images b and c lie in one folder."""
    for image in "abc":
        write(root / f"{image}.jpg")
    match dataset:
        case "coco":
            for split, images in {"train": "ab", "val": "cb"}.items():
                entries = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate(images)]
                objects = [{"image_id": i, "category_id": 1} for i in (0, 1)]
                content = {"images": entries, "annotations": objects}
                content |= {"categories": [{"id": 1, "name": "cat"}]}
                write(root / "annotations" / f"{split}.json", json.dumps(content))
        case "voc":
            for split, images in {"train": "ab", "val": "cb"}.items():
                marks = "".join(f"{image} 1\n" for image in images)
                write(root / "ImageSets" / "Main" / f"cat_{split}.txt", marks)
            (root / "JPEGImages").symlink_to(root)
        case "table":
            write_table(root, train=["a.jpg,cat", "b.jpg,cat"], val=["c.jpg,cat", "b.jpg,cat"])
        case "nus_wide":
            rows = ["a.jpg,['cat'],train", "b.jpg,['cat'],train"]
            rows += ["c.jpg,['cat'],val", "b.jpg,['cat'],val"]
            write(root / "zoo.csv", "\n".join(["filepath,label,split_name", *rows]))
        case "openimages":
            write(root / "oidv6-classes-trainable.txt", "cat\n")
            for split, images in {"train": "ab", "test": "cb"}.items():
                path = root / f"{split}-annotations-human-imagelabels.csv"
                rows = "".join(f"{i * 16},verification,cat,1\n" for i in images)
                write(path, f"ImageID,Source,LabelName,Confidence\n{rows}")
            for image in "abc":
                write(root / "images" / f"{image * 16}.jpg")
            return DataSettings(data=str(root), dataset=dataset, image_folder="images")
    return DataSettings(data=str(root), dataset=dataset)


@pytest.mark.parametrize("dataset", ["coco", "voc", "nus_wide", "table", "openimages"])
def test_an_image_in_both_splits_is_an_error_that_names_it(tmp_path, dataset):
    with pytest.raises(DataError, match=r"1 of 2 validation images are training .*/b+\.jpg: "):
        check(write_shared(tmp_path, dataset))


def test_splits_that_are_apart_pass(voc, openimages, tmp_path):
    check(voc)
    check(openimages)
    check(write_table(tmp_path / "table", train=["a.jpg,cat", "b.jpg,cat"], val=["c.jpg,cat"]))


def test_the_first_shared_image_is_the_first_of_the_validation_split(tmp_path):
    train = [f"{i}.jpg,cat" for i in range(30)]
    settings = write_table(tmp_path, train=train, val=["x.jpg,cat", *reversed(train[5:])])
    with pytest.raises(DataError, match=r"25 of 26 validation images .* first is .*/29\.jpg: "):
        check(settings)


@pytest.mark.parametrize("inner", ["train", "val"])
def test_a_file_is_known_by_its_path_whatever_folder_the_names_start_from(tmp_path, inner):
    above = write_table(tmp_path, all=["in/a.jpg,cat", "in/b.jpg,cat", "a.jpg,cat"])
    below = write_table(tmp_path / "in", all=["b.jpg,cat", "c.jpg,cat"])
    parts = [read(s.dataset, s.data, "train", val_share=0) for s in (above, below)]
    train, val = parts if inner == "val" else reversed(parts)
    with pytest.raises(DataError, match=r"1 of \d validation images .*/in/b\.jpg: "):
        check_apart(above, train, val)


def test_folders_that_are_one_by_a_link_share_their_images(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "all").mkdir(exist_ok=True)
        (tmp_path / split).symlink_to(tmp_path / "all")
    write_shared(tmp_path, "coco")
    for image in "abc":
        write(tmp_path / "all" / f"{image}.jpg")
    with pytest.raises(DataError, match=r"1 of 2 validation images .*/val/b\.jpg: "):
        check(DataSettings(data=str(tmp_path)))


def test_equal_names_in_folders_of_their_own_are_different_images(tmp_path):
    write_shared(tmp_path, "coco")
    for split in ("train", "val"):
        for image in "abc":
            write(tmp_path / split / f"{image}.jpg")
    check(DataSettings(data=str(tmp_path)))


def test_one_split_for_both_on_purpose_costs_a_warning(voc, caplog):
    check(voc.replace(train_split="test", val_split="test"))
    assert "mAP will be that of the training images: both splits are test" in caplog.text
    with pytest.raises(DataError, match="2 of 2 validation images are training images"):
        check(voc.replace(train_split="test"))
