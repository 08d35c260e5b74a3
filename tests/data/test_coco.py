"""The COCO reader, on small JSONs in the layouts of COCO 2014, LVIS v1 and of users' own sets."""

import json

import numpy as np
import pytest

from asl.data.readers.coco import coco, splits
from asl.errors import DataError, UsageError

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush"}]
IMAGES = [{"id": number, "file_name": f"{number}.jpg", "height": 48} for number in (7, 4, 1, 9)]
OBJECTS = [
    {"image_id": 1, "category_id": 90, "segmentation": [[1.5, 2, 3]], "iscrowd": 0},
    {"image_id": 7, "category_id": 3, "segmentation": [], "iscrowd": 0},
    {
        "image_id": 1,
        "category_id": 18,
        "segmentation": {"counts": [1], "size": [4, 4]},
        "iscrowd": 1,
    },
    {"image_id": 1, "category_id": 90, "segmentation": [[0, 1, 2]], "iscrowd": 0},
    {"image_id": 4, "category_id": 18, "segmentation": [], "iscrowd": 0},
]


def write(path, images=IMAGES, annotations=OBJECTS, categories=CATEGORIES):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "annotations" / "instances_train2014.json")
    (tmp_path / "train2014").mkdir()
    return tmp_path


def test_images_come_in_the_order_of_the_annotations_without_those_that_have_none(root):
    data = coco(root, "train2014")
    assert [data.path(i) for i in range(3)] == [f"{root}/train2014/{i}.jpg" for i in (1, 7, 4)]
    assert data.classes == ("dog", "car", "toothbrush")
    assert data.dense().tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 0]]


def test_all_images_come_in_file_order(root):
    data = coco(root, "train2014", all_images=True)
    assert data.files.tolist() == [b"7.jpg", b"4.jpg", b"1.jpg", b"9.jpg"]
    assert data.dense().tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]]


def test_a_crowd_counts_as_a_label(root):
    write(root / "annotations" / "instances_train2014.json", annotations=[OBJECTS[2]])
    assert coco(root, "train2014").labels(0).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("json_path", "split", "folder", "expected"),
    [
        ("annotations/instances_val2017.json", "val2017", "val2017", "val2017"),
        ("annotations/instances_default.json", "default", "images", "images"),
        ("annotations/mine.json", "mine", "images/mine", "images/mine"),
        ("annotations/mine.json", "annotations/mine.json", "elsewhere", "."),
        ("valid/_annotations.coco.json", "valid/_annotations.coco.json", "valid", "valid"),
    ],
)
def test_images_are_found_in_the_usual_layouts(tmp_path, json_path, split, folder, expected):
    write(tmp_path / json_path)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    assert coco(tmp_path, split).root == tmp_path / expected
    assert coco(tmp_path, split, image_folder="pics").root == tmp_path / "pics"


def test_file_names_may_lie_in_sub_folders(root):
    images = [{"id": "a", "file_name": "day 1/ä.jpg"}, {"id": "b", "file_name": "./day 2//b.JPG"}]
    objects = [{"image_id": "b", "category_id": 3}, {"image_id": "a", "category_id": 3}]
    write(root / "annotations" / "instances_train2014.json", images, objects)
    data = coco(root, "train2014")
    assert data.path(0) == f"{root}/train2014/day 2/b.JPG"
    assert data.path(1) == f"{root}/train2014/day 1/ä.jpg"


def test_lvis_cells_are_known_only_where_the_image_says_so(tmp_path):
    url = "http://images.cocodataset.org/train2017/000000391895.jpg"
    image = {"id": 1, "coco_url": url, "neg_category_ids": [3], "not_exhaustive_category_ids": [18]}
    objects = [{"image_id": 1, "category_id": 18}]
    categories = [*CATEGORIES, {"id": 2, "name": "zebra"}]
    write(tmp_path / "annotations" / "lvis_v1_train.json", [image], objects, categories)
    data = coco(tmp_path, "lvis_v1_train")
    assert data.labels(0).tolist() == [1, 0, -1, -1]
    assert data.path(0) == f"{tmp_path}/train2017/000000391895.jpg"
    image["not_exhaustive_category_ids"] = [2]
    image["neg_category_ids"] = [3, 77]
    path = write(tmp_path / "annotations" / "lvis_v1_train.json", [image], objects, categories)
    with pytest.raises(DataError, match=f"{path}: neg_category_ids of image 1: there is no 77"):
        coco(tmp_path, "lvis_v1_train")
    image["neg_category_ids"] = [3]
    write(tmp_path / "annotations" / "lvis_v1_train.json", [image], objects, categories)
    assert coco(tmp_path, "lvis_v1_train").labels(0).tolist() == [1, 0, -1, -1]


def test_one_image_with_absent_classes_makes_the_set_a_partial_one(root):
    images = [{**IMAGES[0], "neg_category_ids": [18]}, *IMAGES[1:]]
    write(root / "annotations" / "instances_train2014.json", images)
    data = coco(root, "train2014")
    assert data.dense().tolist() == [[1, -1, 1], [0, 1, -1], [1, -1, -1]]


NULLS = [
    {"id": 1, "file_name": "a.jpg", "coco_url": None, "neg_category_ids": None, "license": None},
    {"id": 2, "file_name": None, "coco_url": "http://x/y/b.jpg"},
]


@pytest.mark.parametrize(
    ("images", "change"),
    [
        (NULLS, lambda text: text),
        (NULLS, lambda text: b"\xef\xbb\xbf" + text),
        (NULLS, lambda text: text.replace(b'"area": 0', b'"area": NaN')),
        (NULLS, lambda text: text.replace(b'"area": 0', b'"area": [-Infinity, Infinity]')),
        (NULLS, lambda text: text.replace(b'"area": 0', b'"area": [NaN, ' + b"9" * 40 + b"]")),
        (NULLS, lambda text: b"\xef\xbb\xbf" + text.replace(b'"area": 0', b'"area": NaN')),
        (NULLS, lambda text: text.replace(b'_id": 2', b'_id": 2.0').replace(b": 3,", b": 3.0,")),
        (NULLS, lambda text: text.replace(b'"id": 2', b'"id": 2.0')),
    ],
    ids=[
        "null",
        "BOM",
        "NaN",
        "Infinity",
        "NaN and a huge number",
        "BOM and NaN",
        "whole ids",
        "whole ids of images",
    ],
)
def test_what_converters_write_is_read(root, images, change):
    objects = [{"image_id": i, "category_id": 3, "area": 0} for i in (1, 2)]
    path = write(root / "annotations" / "instances_train2014.json", images, objects)
    text = path.read_bytes()
    path.write_bytes(change(text))
    data = coco(root, "train2014")
    assert data.files.tolist() == [b"a.jpg", b"y/b.jpg"]
    assert data.dense().tolist() == [[0, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"image_id": 7', b'"image_id": NaN', r"got `null` - at `\$.annotations\[1\].image_id`"),
        (b'"info": {}', b'"info": NaN, nothing', "Expecting property name"),
        (b'"info": {}', b'"info": NaN, "date": "\\ud800"', "surrogates not allowed"),
        (b'"info": {}', b'"info": [NaN, ' + b"9" * 5000 + b"]", "is not a JSON in"),
        (b'"info": {}', b'"info": [NaN, ' + b"[" * 100_000, "recursion"),
        (b'"image_id": 7', b'"image_id": true', "got `bool`"),
        (b'"image_id": 7', b'"image_id": 1.5', r"annotations\[1\].image_id: there is no 1.5$"),
        (b'"info": {}', b"", "malformed"),
    ],
)
def test_what_cannot_be_meant_is_an_error_all_the_same(root, old, new, message):
    path = root / "annotations" / "instances_train2014.json"
    text = path.read_bytes()
    assert old in text
    path.write_bytes(text.replace(old, new))
    with pytest.raises(DataError, match=message) as error:
        coco(root, "train2014")
    assert str(path) in str(error.value)


def test_a_name_may_be_nan(root):
    categories = [*CATEGORIES, {"id": 1, "name": "NaN"}]
    write(root / "annotations" / "instances_train2014.json", categories=categories)
    assert coco(root, "train2014").classes[3] == "NaN"


def test_a_class_without_an_object_stays_a_class(root):
    write(root / "annotations" / "instances_train2014.json", annotations=OBJECTS[:1])
    assert coco(root, "train2014").counts(1).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"annotations": [{"image_id": 5, "category_id": 3}]}, r"annotations\[0\].image_id: .* 5$"),
        (
            {"annotations": [*OBJECTS, {"image_id": 1, "category_id": 2}]},
            r"annotations\[5\].category_id: there is no 2$",
        ),
        ({"annotations": [{"category_id": 3}]}, r"field `image_id` - at `\$.annotations\[0\]`"),
        ({"annotations": []}, "annotations is empty"),
        ({"images": []}, "images is empty"),
        ({"categories": []}, "categories is empty"),
        ({"images": [*IMAGES, IMAGES[1]]}, r"images\[4\].id: 4 is also that of \[1\]"),
        ({"images": [*IMAGES, {**IMAGES[2], "id": 2}]}, None),  # not annotated: left out
        (
            {"images": [*IMAGES[:3], {"id": 2, "file_name": "1.jpg"}], "annotations": "both"},
            r"images\[3\].file_name: '1.jpg' is already at .*images\[2\].file_name",
        ),
        (
            {"categories": [*CATEGORIES, {"id": 1, "name": "dog"}]},
            r"categories\[3\].name: 'dog' is also that of \[0\]",
        ),
        (
            {"images": [{"id": 1, "file_name": "../x.jpg"}], "annotations": "1"},
            r"'../x.jpg' is not",
        ),
        (
            {"images": [{"id": 1, "file_name": "/etc/x.jpg"}], "annotations": "1"},
            "is not a path in",
        ),
        ({"images": [{"id": 1}], "annotations": "1"}, r"images\[0\].file_name: '' is not a path"),
        ({"categories": "none"}, r"Expected `array`, got `str` - at `\$.categories`"),
    ],
)
def test_a_wrong_json_is_an_error_that_names_the_field(root, parts, message):
    objects = {
        "1": [{"image_id": 1, "category_id": 3}],
        "both": [{"image_id": 1, "category_id": 3}, {"image_id": 2, "category_id": 3}],
    }
    if isinstance(parts.get("annotations"), str):
        parts = {**parts, "annotations": objects[parts["annotations"]]}
    path = write(root / "annotations" / "instances_train2014.json", **parts)
    if message is None:
        assert len(coco(root, "train2014")) == 3
        return
    with pytest.raises(DataError, match=message) as error:
        coco(root, "train2014")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "truncated"),
        (lambda text: b"", "is empty"),
        (lambda text: text.replace(b"dog", b"d\xffg"), "utf-8"),
        (lambda text: b"<html>", "malformed"),
        (lambda text: b'{"info": ' + b"[" * 100_000, "maximum recursion depth"),
    ],
)
def test_a_damaged_file_is_named(root, damage, message):
    path = root / "annotations" / "instances_train2014.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        coco(root, "train2014")
    assert str(path) in str(error.value)


def test_what_is_there_is_said_for_what_is_not(root):
    (root / "annotations" / "instances_val2014.json").touch()
    assert splits(root) == ["train2014", "val2014"]
    with pytest.raises(UsageError, match=r"no split 'test'.*choose from train2014, val2014"):
        coco(root, "test")
    with pytest.raises(DataError, match=r"annotations.* is not there: .*/train2014 holds nothing"):
        coco(root / "train2014", "train2014")
    with pytest.raises(DataError, match=r"holds annotations/, train2014/"):
        coco(root / "coco", "train2014")


def test_the_splits_are_those_of_the_instances_else_those_of_any_json(tmp_path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    for name in ("mine", "train"):
        (folder / f"{name}.json").touch()
    assert splits(tmp_path) == ["mine", "train"]
    for name in ("captions_val2014", "person_keypoints_val2014", "instances_val2014"):
        (folder / f"{name}.json").touch()
    assert splits(tmp_path) == ["val2014"]
    write(folder / "mine.json")
    assert len(coco(tmp_path, "mine")) == 3


def test_a_repeated_object_costs_nothing(root):
    write(root / "annotations" / "instances_train2014.json", annotations=OBJECTS * 50)
    assert np.diff(coco(root, "train2014").indptr).tolist() == [2, 1, 1]
