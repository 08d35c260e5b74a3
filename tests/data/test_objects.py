"""Where objects are: COCO's boxes, areas and outlines against pycocotools, and VOC's XML files."""

import io
import json
import warnings
from contextlib import redirect_stdout

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from asl.data.annotations import PRESENT
from asl.data.objects import SIZES, read_objects
from asl.data.readers import read
from asl.data.settings import DataSettings
from asl.errors import DataError


def settings(root, dataset="coco", **more):
    return DataSettings(data=str(root), dataset=dataset, **more)


def judge(root, split):
    with redirect_stdout(io.StringIO()):
        return COCO(str(root / "annotations" / f"instances_{split}.json"))


def write_coco(root, objects, names=("cat", "dog"), size=(100, 80)):
    """Two images of 100 x 80 px, 1.jpg and 2.jpg, with these objects."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2014").mkdir()
    images = [
        {"id": i, "file_name": f"{i}.jpg", "width": size[0], "height": size[1]} for i in (1, 2)
    ]
    content = {
        "images": images,
        "annotations": [{"id": i, "iscrowd": 0, **each} for i, each in enumerate(objects, 1)],
        "categories": [{"id": 7 + i, "name": name} for i, name in enumerate(names)],
    }
    (root / "annotations" / "instances_val2014.json").write_text(json.dumps(content))
    return read("coco", root, "val2014")


def test_boxes_and_areas_are_those_that_pycocotools_reads(small_shapes):
    annotations = read("coco", small_shapes, "val2014")
    objects = read_objects(settings(small_shapes), annotations)
    coco = judge(small_shapes, "val2014")
    names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
    for row, file in enumerate(annotations.files):
        [image] = [i for i in coco.imgs.values() if i["file_name"].encode() == file]
        expected = sorted(
            (names[a["category_id"]], a["area"], a["bbox"])
            for a in coco.loadAnns(coco.getAnnIds(image["id"]))
        )
        part = slice(objects.indptr[row], objects.indptr[row + 1])
        found = zip(*(objects.columns[part], objects.areas[part], objects.boxes[part]), strict=True)
        assert expected == sorted(
            (annotations.classes[column], area, box.tolist()) for column, area, box in found
        )
        assert objects.extents[row].tolist() == [image["width"], image["height"]]


def test_sizes_are_those_of_pycocotools_and_the_largest_object_counts(small_shapes):
    annotations = read("coco", small_shapes, "train2014")
    objects = read_objects(settings(small_shapes), annotations, "train")
    coco = judge(small_shapes, "train2014")
    with redirect_stdout(io.StringIO()):
        ranges = COCOeval(coco, iouType="bbox").params
    limits = dict(zip(ranges.areaRngLbl, ranges.areaRng, strict=True))
    table = objects.sizes(annotations.num_classes)
    ids = {i["file_name"].encode(): i["id"] for i in coco.imgs.values()}
    columns = {c["name"]: c["id"] for c in coco.cats.values()}
    seen = set()
    for row, column in np.argwhere(annotations.dense() == PRESENT):
        image, category = ids[bytes(annotations.files[row])], columns[annotations.classes[column]]
        of_size = [
            bool(coco.getAnnIds([image], [category], areaRng=limits[name])) for name in SIZES
        ]
        largest = 3 - of_size[::-1].index(True)
        assert table[row, column] == largest
        seen.add(largest)
    assert len(seen) > 1
    assert np.array_equal(table > 0, annotations.dense() == PRESENT)


def test_at_the_limits_an_object_is_of_the_larger_size(tmp_path):
    box = {"image_id": 1, "bbox": [0, 0, 5, 5]}
    areas = [1023.9, 1024, 9215.9, 9216]
    names = [f"class {i}" for i in range(4)]
    objects = [{**box, "category_id": 7 + i, "area": area} for i, area in enumerate(areas)]
    found = read_objects(settings(tmp_path), write_coco(tmp_path, objects, names))
    assert found.sizes(4).tolist() == [[1, 2, 2, 3]]


def test_a_crowd_gives_a_cell_its_size_only_where_nothing_else_does(tmp_path):
    small, large = {"bbox": [0, 0, 9, 9], "area": 81}, {"bbox": [0, 0, 99, 79], "area": 9999}
    objects = [
        {"image_id": 1, "category_id": 7, **small},
        {"image_id": 1, "category_id": 7, **large, "iscrowd": 1},
        {"image_id": 2, "category_id": 7, **large, "iscrowd": 1},
    ]
    annotations = write_coco(tmp_path, objects)
    assert read_objects(settings(tmp_path), annotations).sizes(2).tolist() == [[1, 0], [3, 0]]


def covered(polygons, width, height):
    """The pixels that outlines in [0, 1] cover, as pycocotools draws them."""
    scaled = [[v * (height if i % 2 else width) for i, v in enumerate(p)] for p in polygons]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy, at pycocotools
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(scaled, height, width)))


@pytest.mark.parametrize("compressed", [True, False])
def test_masks_become_outlines_that_cover_the_same_pixels(tmp_path, compressed):
    mask = np.zeros((80, 100), dtype=np.uint8)
    mask[0:30, 0:20] = 1  # along the border
    mask[50:70, 40:95] = 1
    encoded = coco_mask.encode(np.asfortranarray(mask))
    rle = {"size": [80, 100], "counts": encoded["counts"].decode()}
    if not compressed:
        flat = mask.ravel(order="F")
        ends = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *ends, len(flat)]).tolist()
        rle["counts"] = [0, *runs] if flat[0] else runs
    polygon = [[10, 10, 60, 10, 60, 50]]
    objects = [
        {"image_id": 1, "category_id": 8, "bbox": [0, 0, 95, 70], "segmentation": rle},
        {"image_id": 1, "category_id": 7, "bbox": [10, 10, 50, 40], "segmentation": polygon},
        {"image_id": 2, "category_id": 7, "bbox": [10, 20, 50, 40]},
    ]
    found = read_objects(settings(tmp_path), write_coco(tmp_path, objects))
    (first, outline), (second, triangle) = found.polygons(0)
    assert (first, second) == (1, 0)
    assert len(outline) == 2
    again = covered(outline, 100, 80)
    assert (again & mask).sum() / (again | mask).sum() > 0.97
    assert triangle == [[0.1, 0.125, 0.6, 0.125, 0.6, 0.625]]
    assert found.polygons(1) == [(0, [[0.1, 0.25, 0.6, 0.25, 0.6, 0.75, 0.1, 0.75]])]


def test_objects_follow_images_and_classes_that_were_chosen_renamed_or_left_out(tmp_path):
    box = {"bbox": [0, 0, 50, 50], "area": 2500}
    objects = [
        {"image_id": 2, "category_id": 7, **box},
        {"image_id": 1, "category_id": 8, **box},
        {"image_id": 1, "category_id": 7, "bbox": [0, 0, None, 1]},  # not known where
        {"image_id": 1, "category_id": 9, **box},
    ]
    annotations = write_coco(tmp_path, objects, ("cat", "tvmonitor", "dog"))
    chosen = annotations.subset([1]).with_classes([1, 0], ("TV", "cat"))
    assert chosen.files.tolist() == [b"1.jpg"]
    found = read_objects(settings(tmp_path), chosen)
    assert found.sizes(2).tolist() == [[2, 0]]
    assert found.columns.tolist() == [0]


def write_voc(root, xml):
    year = root / "VOC2007"
    (year / "ImageSets" / "Main").mkdir(parents=True)
    for name in ("cat", "dog"):
        (year / "ImageSets" / "Main" / f"{name}_test.txt").write_text("000001 1\n000002 -1\n")
    (year / "Annotations").mkdir()
    for number, text in enumerate(xml, 1):
        (year / "Annotations" / f"{number:06d}.xml").write_text(text)
    return read("voc", root, "test")


def voc_xml(*objects):
    rows = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        f"<xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, difficult, x0, y0, x1, y1 in objects
    )
    return f"<annotation><size><width>200</width><height>100</height></size>{rows}</annotation>"


def test_voc_boxes_count_pixels_from_one(tmp_path):
    first = voc_xml(
        ("dog", 0, 1, 1, 200, 100), ("cat", 1, 1, 1, 96, 96), ("cat", 0, 11, 11, 20, 60)
    )
    annotations = write_voc(tmp_path, [first, voc_xml()])
    found = read_objects(settings(tmp_path, "voc"), annotations)
    assert found.areas.tolist() == [20000, 9216, 500]
    assert found.sizes(2).tolist() == [[1, 3], [0, 0]]
    assert found.ignored.tolist() == [False, True, False]
    assert found.polygons(0)[2] == (0, [[0.05, 0.1, 0.1, 0.1, 0.1, 0.6, 0.05, 0.6]])


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<annotation>", "is not XML"),
        ("<annotation><object><name>cat</name></object></annotation>", "the box of 'cat' is"),
    ],
)
def test_a_wrong_xml_is_named(tmp_path, xml, message):
    annotations = write_voc(tmp_path, [voc_xml(), xml])
    with pytest.raises(DataError, match=f"000002.xml.*{message}"):
        read_objects(settings(tmp_path, "voc"), annotations)


def test_a_missing_xml_is_an_error_and_a_missing_folder_says_nothing(tmp_path):
    annotations = write_voc(tmp_path, [voc_xml()])
    with pytest.raises(DataError, match=r"000002\.xml is not there"):
        read_objects(settings(tmp_path, "voc"), annotations)
    (tmp_path / "VOC2007" / "Annotations" / "000001.xml").unlink()
    (tmp_path / "VOC2007" / "Annotations").rmdir()
    assert read_objects(settings(tmp_path, "voc"), annotations) is None
