"""The drawn data set: its layout, its statistics, and that it is whole or not there."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from asl.data.annotations import PRESENT
from asl.data.readers import read
from asl.data.readers.shapes import CLASSES, FREQUENCIES, VERSION, draw_shapes
from asl.errors import DataError

SPLITS = {"train2014": 200, "val2014": 40}
SOURCE = Path(__file__).resolve().parents[2] / "src"


def draw(root, processes=2):
    draw_shapes(root, *SPLITS.values(), processes=processes)
    return root


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*.j*") if p.name[0] != "."}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module", params=SPLITS)
def coco(request, root):
    return COCO(root / "annotations" / f"instances_{request.param}.json")


def test_has_cocos_layout_and_every_image_that_it_lists(root):
    for split, length in SPLITS.items():
        names = [f"COCO_{split}_{i:012d}.jpg" for i in range(1, length + 1)]
        listed = json.loads((root / f"annotations/instances_{split}.json").read_text())["images"]
        assert names == [image["file_name"] for image in listed]
        assert names == sorted(path.name for path in (root / split).iterdir())
        for image in listed:
            with Image.open(root / split / image["file_name"]) as picture:
                assert picture.format == "JPEG"
                assert picture.size == (image["width"], image["height"])


def test_boxes_lie_within_the_image_and_hold_the_area(coco):
    for annotation in coco.dataset["annotations"]:
        x, y, width, height = annotation["bbox"]
        image = coco.imgs[annotation["image_id"]]
        assert 0 <= x < x + width <= image["width"]
        assert 0 <= y < y + height <= image["height"]
        assert 0 < annotation["area"] <= width * height
        assert annotation["iscrowd"] == 0


def test_images_show_one_to_eight_objects(coco):
    counts = {len(coco.getAnnIds(image)) for image in coco.getImgIds()}
    assert counts <= set(range(1, 9))
    assert len(counts) > 5
    assert len(coco.anns) == len(coco.dataset["annotations"])


def test_boxes_are_where_the_objects_are(root):
    """A box differs more from its surroundings than the same box laid elsewhere."""
    coco = COCO(root / "annotations/instances_train2014.json")
    inside, elsewhere = [], []
    for image in coco.imgs.values():
        with Image.open(root / "train2014" / image["file_name"]) as picture:
            saturation = np.asarray(picture.convert("HSV"))[..., 1]
        covered = np.zeros(saturation.shape, dtype=bool)
        for annotation in coco.imgToAnns[image["id"]]:
            x, y, width, height = annotation["bbox"]
            covered[y : y + height, x : x + width] = True
        inside.append(saturation[covered].mean())
        elsewhere.append(saturation[~covered].mean())
    assert np.mean(np.array(inside) > elsewhere) > 0.7


def test_labels_are_few_and_long_tailed(root):
    annotations = read("coco", root, "train2014")
    frequencies = annotations.counts(PRESENT) / len(annotations)
    assert len(set(annotations.classes)) == len(CLASSES) >= 24
    assert 2.1 < frequencies.sum() < 2.9  # labels per image; their standard error is 0.1
    assert 0.4 < frequencies[0] < 0.6
    np.testing.assert_allclose(frequencies, FREQUENCIES, atol=0.13)
    assert 0.01 <= FREQUENCIES.min() <= 0.02


def test_the_bytes_do_not_depend_on_the_number_of_processes(root, tmp_path):
    assert contents(draw(tmp_path, processes=1)) == contents(root)


def test_splits_do_not_share_images(root):
    images = [path.read_bytes() for path in root.rglob("*.jpg")]
    assert len(set(images)) == len(images) == sum(SPLITS.values())


def test_what_is_complete_is_not_drawn_again(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    draw(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_changed_generator_draws_anew(tmp_path, monkeypatch):
    draw_shapes(tmp_path, 2, 1, processes=1)
    picture = tmp_path / "val2014" / "COCO_val2014_000000000001.jpg"
    expected = picture.read_bytes()
    picture.write_bytes(b"as an older version drew it")
    monkeypatch.setattr("asl.data.readers.shapes.VERSION", VERSION + 1)
    draw_shapes(tmp_path, 2, 1, processes=1)
    assert picture.read_bytes() == expected


@pytest.mark.skipif(sys.platform == "win32", reason="needs process groups and SIGKILL")
def test_a_killed_drawing_leaves_no_process_and_is_completed_by_the_next(root, tmp_path):
    code = "import sys; from pathlib import Path; from asl.data.readers.shapes import draw_shapes\n"
    code += f"draw_shapes(Path(sys.argv[1]), {SPLITS['train2014']}, {SPLITS['val2014']}, 2)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
    wait_until(lambda: len(list(tmp_path.glob("train2014/*.jpg"))) > 20)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    wait_until(lambda: not group_exists(child.pid))
    assert not list(tmp_path.glob("annotations/*.json"))
    assert contents(draw(tmp_path)) == contents(root)


def wait_until(happened, seconds=30):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def group_exists(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("content", ['{"info": {"description": "COCO 2014"}}', "{", "[]"])
def test_another_data_set_is_not_overwritten(tmp_path, content):
    file = tmp_path / "annotations" / "instances_train2014.json"
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(DataError, match="another data set"):
        draw(tmp_path)
    assert file.read_text() == content
    assert list(tmp_path.iterdir()) == [file.parent]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be drawn into .*file/shapes: Not a directory"):
        read("shapes", tmp_path / "file" / "shapes", "train2014")


def test_the_reader_draws_what_is_not_there(tmp_path, monkeypatch):
    few = functools.partial(draw_shapes, train=6, val=4, processes=1)
    monkeypatch.setattr("asl.data.readers.shapes.draw_shapes", few)
    data = read("shapes", tmp_path / "new", "val2014")
    assert (len(data), data.num_classes) == (4, 24)
    assert all(Path(data.path(row)).exists() for row in range(4))
