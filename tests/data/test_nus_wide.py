"""The NUS-WIDE reader, on small trees in the layout of the zoo's CSV and of the original lists."""

import pytest

from asl.data.readers.nus_wide import nus_wide, splits
from asl.errors import DataError, UsageError

ZOO = """filepath,label,split_name
images/1.jpg,"['sky', 'cat']",train
images/2.jpg,[],train
images/3.jpg,"['boats']",val
"""
LISTS = {"Train": ["actor\\1.jpg ", "actor\\2.jpg"], "Test": ["zoo\\3.jpg"]}
MARKS = {
    "sky": {"Train": "1 \n0 \n", "Test": "0\n"},
    "boats": {"Train": "0\n0\n", "Test": "1\n"},
    "cat": {"Train": "1\n0\n", "Test": "0\n"},
}


@pytest.fixture
def zoo(tmp_path):
    (tmp_path / "nus_wid_data.csv").write_text(ZOO)
    return tmp_path


@pytest.fixture
def original(tmp_path):
    (tmp_path / "ImageList").mkdir()
    (tmp_path / "TrainTestLabels").mkdir()
    for name, images in LISTS.items():
        (tmp_path / "ImageList" / f"{name}Imagelist.txt").write_text("\r\n".join(images) + "\r\n")
        for concept, marks in MARKS.items():
            path = tmp_path / "TrainTestLabels" / f"Labels_{concept}_{name}.txt"
            path.write_text(marks[name])
    return tmp_path


def test_both_forms_give_the_same_classes_and_labels(zoo, original):
    (zoo / "nus_wid_data.csv").rename(zoo / "zoo.csv_")
    lists = nus_wide(original, "train"), nus_wide(original, "val")
    assert splits(original) == ["train", "val"]
    (zoo / "zoo.csv_").rename(zoo / "zoo.csv")
    assert splits(zoo) == ["train", "val"]
    for data, split in zip(lists, ("train", "val"), strict=True):
        csv = nus_wide(zoo, split)
        assert csv.classes == data.classes == ("boats", "cat", "sky")
        assert csv.dense().tolist() == data.dense().tolist()


def test_images_lie_where_the_two_forms_keep_them(zoo):
    assert nus_wide(zoo, "train").path(0) == f"{zoo}/images/1.jpg"
    assert nus_wide(zoo / "nus_wid_data.csv", "val").path(0) == f"{zoo}/images/3.jpg"
    assert nus_wide(zoo, "val", image_folder="NUS").path(0) == f"{zoo}/NUS/images/3.jpg"


def test_backslashes_of_the_original_lists_are_folders(original):
    assert nus_wide(original, "val").path(0) == f"{original}/Flickr/zoo/3.jpg"
    assert nus_wide(original, "val", image_folder=".").path(0) == f"{original}/zoo/3.jpg"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("label,", "labels,", "no column label, only: filepath, labels, split_name"),
        ("[],", "sky,", "row 3, column label: 'sky' is not a list of names"),
        ("[],", "[1],", "row 3, column label: '\\[1\\]' is not"),
        ("[],", '"{[]: 1}",', "row 3, column label: .* is not"),
        ("[],", "\"['sky'\",", "row 3, column label: .* is not"),
        ("[],", ",", "row 3, column label: a cell is empty"),
        ("images/2", "../2", "row 3: '../2.jpg' is not a path inside"),
        ("images/2", "images/1", "row 3: 'images/1.jpg' is already at .*row 2"),
        ("\nimages/1", "\nx.jpg,[],val\n\nimages/2", "row 5: 'images/2.jpg' is .* at .*row 4"),
    ],
)
def test_a_wrong_csv_is_an_error_that_names_the_row(zoo, old, new, message):
    path = zoo / "nus_wid_data.csv"
    path.write_text(ZOO.replace(old, new))
    with pytest.raises(DataError, match=message) as error:
        nus_wide(zoo, "train")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("TrainTestLabels/Labels_cat_Train.txt", "1\n2\n", "line 2: '2' is not 1 or 0"),
        ("TrainTestLabels/Labels_cat_Train.txt", "1\n", "has 1 lines for 2 images"),
        ("TrainTestLabels/Labels_cat_Train.txt", None, "is not there"),
        ("ImageList/TrainImagelist.txt", "", "is empty"),
        ("ImageList/TrainImagelist.txt", "a.jpg\na.jpg\n", "line 2: 'a.jpg' is already at"),
        ("ImageList/TrainImagelist.txt", "a.jpg\n..\\b.jpg\n", "line 2: '../b.jpg' is not a path"),
        ("ImageList/TrainImagelist.txt", "a.jpg\n\n", "line 2: '' is not a path"),
    ],
)
def test_a_wrong_list_is_an_error_that_names_the_line(original, file, text, message):
    (original / file).unlink()
    if text is not None:
        (original / file).write_text(text)
    with pytest.raises(DataError, match=message) as error:
        nus_wide(original, "train")
    assert str(original / file) in str(error.value)


def test_what_is_there_is_said_for_what_is_not(tmp_path, zoo):
    with pytest.raises(
        DataError, match=r"nus_wid_data.csv is not there: .* holds nus_wid_data.csv"
    ):
        nus_wide(tmp_path / "none", "train")
    with pytest.raises(UsageError, match=r"no split 'test' .* choose from train, val"):
        nus_wide(zoo, "test")
    (zoo / "more.csv").touch()
    with pytest.raises(UsageError, match=r"several CSVs, name one: .*more.csv, .*nus_wid_data.csv"):
        nus_wide(zoo, "train")


def test_a_split_without_a_list_is_named(original):
    (original / "ImageList" / "TestImagelist.txt").unlink()
    with pytest.raises(UsageError, match=r"no split 'val' .*TestImagelist.txt.* choose from train"):
        nus_wide(original, "val")
