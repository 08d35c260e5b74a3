"""The VOC reader, on small trees in VOC's layout and on the real lists of VOC 2007."""

import pytest

from asl.data.readers.voc import splits, voc
from asl.errors import DataError, UsageError

LISTS = {"cat": "000012 -1\n000017  1\n000023  0\n", "bird": "000012  1\n000017 -1\n000023  1\n"}


def write(year, lists=LISTS, split="train"):
    folder = year / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in lists.items():
        (folder / f"{name}_{split}.txt").write_text(text)
    (folder / f"{split}.txt").write_text("000012\n000017\n000023\n")
    return folder


@pytest.mark.parametrize("root", [".", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_the_root_may_be_the_year_or_a_folder_above_it(tmp_path, root):
    write(tmp_path / "VOCdevkit" / "VOC2007")
    data = voc(tmp_path / root, "train")
    assert data.classes == ("bird", "cat")
    assert data.path(1) == f"{tmp_path}/VOCdevkit/VOC2007/JPEGImages/000017.jpg"


def test_the_photographs_may_lie_elsewhere(tmp_path):
    write(tmp_path / "VOC2007")
    data = voc(tmp_path, "train", image_folder="crops")
    assert data.path(1) == f"{tmp_path}/crops/000017.jpg"


@pytest.mark.parametrize(("difficult", "label"), [("present", 1), ("absent", 0), ("ignore", -1)])
def test_difficult_counts_as_asked(tmp_path, difficult, label):
    write(tmp_path)
    data = voc(tmp_path, "train", difficult=difficult)
    assert data.dense().tolist() == [[1, 0], [0, 1], [1, label]]


def test_a_byte_order_mark_does_no_harm(tmp_path):
    write(tmp_path, {name: f"\N{ZERO WIDTH NO-BREAK SPACE}{text}" for name, text in LISTS.items()})
    assert voc(tmp_path, "train").files[0] == b"JPEGImages/000012.jpg"


def test_each_list_may_have_an_order_of_its_own(tmp_path):
    write(tmp_path, {**LISTS, "cat": "000023 -1\n000012 -1\n000017 1\n"})
    data = voc(tmp_path, "train")
    assert data.files.tolist() == [
        f"JPEGImages/{i}.jpg".encode() for i in LISTS["bird"].split()[::2]
    ]
    assert data.dense().tolist() == [[1, 0], [0, 1], [1, 0]]


def test_blank_lines_do_no_harm(tmp_path):
    write(tmp_path, {"cat": LISTS["cat"] + "\n", "bird": "\n" + LISTS["bird"] + " \n\n"})
    assert voc(tmp_path, "train").dense().tolist() == [[1, 0], [0, 1], [1, 1]]
    write(tmp_path, {"cat": "\n", "bird": "\n"})
    with pytest.raises(DataError, match=r"bird_train.txt is empty"):
        voc(tmp_path, "train")


def test_several_years_have_to_be_told_apart(tmp_path):
    write(tmp_path / "VOC2007")
    write(tmp_path / "VOC2012")
    with pytest.raises(UsageError, match=r"several years, name one: .*VOC2007, .*VOC2012"):
        voc(tmp_path, "train")
    assert voc(tmp_path / "VOC2012", "train").root == tmp_path / "VOC2012"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("000012 -1\n000017 2\n", r"cat_train.txt: line 2: '000017 2' is not an image and 1, 0"),
        ("000012 -1\n000017 yes\n", "line 2: '000017 yes'"),
        ("000012\n", "line 1: '000012'"),
        ("000012 -1\n000012 1\n", "line 2: image 000012 is listed twice"),
        ("000012 -1\n000017 1\n", "different images: one has no 000023"),
        ("../x -1\n", "different images"),
        ("", "different images"),
    ],
)
def test_a_wrong_list_is_an_error_that_names_the_line(tmp_path, text, message):
    write(tmp_path, {**LISTS, "cat": text})
    with pytest.raises(DataError, match=message):
        voc(tmp_path, "train")


def test_a_list_that_is_not_utf_8_or_empty_is_an_error(tmp_path):
    folder = write(tmp_path)
    (folder / "bird_train.txt").write_bytes(b"000012 -1\n\xe9 1\n")
    with pytest.raises(DataError, match=r"bird_train.txt: line 2 is not UTF-8"):
        voc(tmp_path, "train")
    (folder / "bird_train.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"bird_train.txt is empty"):
        voc(tmp_path, "train")


def test_an_image_name_cannot_leave_the_folder(tmp_path):
    write(tmp_path, {"cat": "../../../etc/x 1\n"})
    with pytest.raises(DataError, match="is not a path inside"):
        voc(tmp_path, "train")


def test_what_is_there_is_said_for_what_is_not(tmp_path):
    folder = write(tmp_path)
    write(tmp_path, split="val")
    assert splits(tmp_path) == ["train", "val"]
    with pytest.raises(UsageError, match=r"no split 'test'.*choose from train, val"):
        voc(tmp_path, "test")
    with pytest.raises(UsageError, match="difficult 'no': choose from present, absent, ignore"):
        voc(tmp_path, "train", difficult="no")
    (folder / "cat_val.txt").unlink()
    with pytest.raises(DataError, match=r"cat_val.txt is not there"):
        voc(tmp_path, "val")
    with pytest.raises(DataError, match=r"VOC2007/ImageSets/Main is not there: .* holds .*Main/"):
        voc(tmp_path / "ImageSets", "train")


@pytest.mark.parametrize(("split", "images", "cats"), [("train", 2501, 163), ("val", 2510, 174)])
def test_voc_2007_has_its_published_counts(voc_root, split, images, cats):
    data = voc(voc_root, split)
    assert len(data) == images
    assert data.num_classes == 20
    assert data.classes == tuple(sorted(data.classes))
    ignored = voc(voc_root, split, difficult="ignore")
    assert (data.counts(1) == ignored.counts(1) + ignored.counts(-1)).all()
    assert ignored.counts(1)[data.classes.index("cat")] == cats
