"""Matching class names of a model with those of a data set."""

import pytest

from asl.data.classes import match_classes, read_descriptions
from asl.errors import DataError

COCO = ["person", "airplane", "tv", "dining table", "potted plant", "cat"]


def test_order_does_not_matter_and_more_classes_do_no_harm():
    assert match_classes(COCO, ["cat", "person"]).tolist() == [5, 0]


def test_the_names_of_voc_are_found_among_those_of_coco():
    voc = ["aeroplane", "diningtable", "person", "pottedplant", "tvmonitor"]
    assert match_classes(COCO, voc).tolist() == [1, 3, 0, 4, 2]
    assert match_classes(voc, ["TV", "Airplane", "dining_table"]).tolist() == [4, 0, 1]


def test_an_equal_name_goes_before_a_synonym():
    assert match_classes(["tv", "tvmonitor", "TV"], ["tvmonitor", "tv"]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("have", "want", "message"),
    [
        (COCO, ["cat", "sofa", "zebra"], "2 of 3 classes have no match: sofa, zebra .*the 6 there"),
        (["tv", "television"], ["tvmonitor"], "no match: tvmonitor"),
        (["tv"], ["tv", "tvmonitor"], "2 of 2 classes have no match: tv, tvmonitor"),
        (["a"] * 2, ["a"], "no match: a"),
        ([], [f"c{i}" for i in range(12)], r"12 of 12 .*c8, c9, \.\.\. .*there: none"),
    ],
)
def test_a_difference_is_an_error_that_lists_it(have, want, message):
    with pytest.raises(DataError, match=message):
        match_classes(have, want)


@pytest.mark.parametrize("header", ["LabelName,DisplayName\n", ""])
def test_machine_ids_have_display_names(tmp_path, header):
    path = tmp_path / "oidv6-class-descriptions.csv"
    path.write_text(f'{header}/m/01,Cat\n/m/02,"Table, round"\n/m/03,Cat\n')
    assert read_descriptions(path) == {"/m/01": "Cat", "/m/02": "Table, round", "/m/03": "Cat"}
    path.write_text(f"{header}/m/01,Cat\n/m/02\n")
    with pytest.raises(DataError, match=f"row {2 + bool(header)}: '/m/02' is not a class and"):
        read_descriptions(path)
    path.write_text(f'{header}/m/01,Cat\n"/m/02"2,Dog\n')
    with pytest.raises(DataError, match=f"line {2 + bool(header)}: ',' expected after"):
        read_descriptions(path)
    path.write_text(f'{header}/m/01,Cat\n"/m/02"2,Dog\n')
    with pytest.raises(DataError, match=f"line {2 + bool(header)}: ',' expected after"):
        read_descriptions(path)


def test_a_file_that_the_system_does_not_let_us_read_is_named(tmp_path):
    (tmp_path / "classes.csv").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"classes.csv cannot be read: Input/output error"):
        read_descriptions(tmp_path / "classes.csv")
