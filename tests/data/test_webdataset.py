"""Shards of others and our own: an image in a tar file is an image like any other."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from asl.data.__main__ import shard
from asl.data.annotations import files_exist, without_missing
from asl.data.duplicates import Pair, identical_files
from asl.data.readers.table import table
from asl.data.readers.webdataset import splits, webdataset
from asl.data.settings import DataSettings
from asl.data.splits import read_split
from asl.errors import DataError, UsageError
from asl.images.decode import read_image
from asl.images.loader import Batches
from asl.images.settings import ImageSettings


def jpeg(number):
    content = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def write(path, **members):
    """A shard with these members, in which "_" stands for the dot of a name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name.replace("_", "."))
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path.parent


def labels(*names, **values):
    return json.dumps({"labels": list(names) or values}).encode()


def test_names_and_numbers_by_name_are_labels(tmp_path):
    root = write(
        tmp_path / "train-000000.tar",
        **{
            "1_jpg": jpeg(1),
            "1_json": labels("dog", "cat"),
            "2_txt": b"-",
            "2_json": b'{"labels": []}',
        },
        **{"2_png": jpeg(2)},
    )
    write(root / "train-000001.tar", a_json=labels("dog"), a_jpg=jpeg(3))
    write(root / "val-000000.tar", b_jpg=jpeg(4), b_json=labels("ant"))
    data = webdataset(root, "train")
    assert splits(root) == ["train", "val"]
    assert data.classes == ("ant", "cat", "dog")
    assert data.dense().tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 1]]
    for row, number in enumerate((1, 2, 3)):
        expected = read_image(jpeg(number))
        assert (read_image(data.path(row)) == expected).all()
    assert webdataset(root, "val").dense().tolist() == [[1, 0, 0]]

    other = write(
        tmp_path / "other/train/0.tar", c_jpg=jpeg(1), c_json=labels(cat=0.25, dog=1, ant=-1)
    )
    data = webdataset(other.parent, "train")
    np.testing.assert_array_equal(data.labels(0), np.float32([-1, 0.25, 1]))


@pytest.mark.parametrize("listed", [True, False])
def test_a_number_is_a_class_of_the_list_or_a_name_of_its_own(tmp_path, listed):
    members = {
        f"{n}_{end}": each
        for n in range(3)
        for end, each in (("jpg", jpeg(n)), ("cls", b"%d\n" % (10 - n)))
    }
    root = write(tmp_path / "train-0.tar", **members)
    if listed:
        (root / "classes.txt").write_text("".join(f"name {n}\n" for n in range(11)))
    data = webdataset(root, "train")
    names = [data.classes[c] for row in range(3) for c in data.present(row)]
    assert names == (["name 10", "name 9", "name 8"] if listed else ["10", "9", "8"])
    assert len(data.classes) == (11 if listed else 3)
    assert data.classes[:2] == (("name 0", "name 1") if listed else ("8", "9"))


@pytest.mark.parametrize("ends", [("cls", "json"), ("json", "cls")])
def test_what_others_note_in_a_json_beside_a_number_is_not_read(tmp_path, ends):
    noted = {"cls": b"3", "json": b'{"width": 32}'}
    members = {f"1_{end}": noted[end] for end in ends}
    data = webdataset(write(tmp_path / "train-0.tar", **members, **{"1_jpg": jpeg(1)}), "train")
    assert data.classes == ("3",)
    assert data.dense().tolist() == [[1]]


@pytest.mark.parametrize("pair", [("train2014", "val2014"), ("trainval", "test")])
def test_splits_keep_the_names_that_data_sets_give_them(tmp_path, pair):
    write(tmp_path / f"{pair[1]}-000000.tar", **{"1_jpg": jpeg(1), "1_cls": b"1"})
    settings = DataSettings(data=str(tmp_path), dataset="webdataset")
    assert splits(tmp_path) == [pair[1]]  # alone it is not drawn from
    assert len(read_split(settings, "val")) == 1
    members = {f"{n}_{end}": each for n in "12" for end, each in (("jpg", jpeg(2)), ("cls", b"1"))}
    write(tmp_path / f"{pair[0]}-000000.tar", **members)
    assert [len(read_split(settings, role)) for role in ("train", "val")] == [2, 1]


def test_shards_without_splits_are_drawn_from(tmp_path):
    members = {
        f"{n}_{end}": each for n in range(50) for end, each in (("jpg", jpeg(n)), ("cls", b"1"))
    }
    write(tmp_path / "00000.tar", **members)
    settings = DataSettings(data=str(tmp_path), dataset="webdataset", folds=5, stratify=True)
    parts = [read_split(settings, role).files.tolist() for role in ("train", "val")]
    assert (len(parts[0]), len(parts[1]), len({*parts[0], *parts[1]})) == (40, 10, 50)


@pytest.fixture
def pictures(tmp_path):
    """A table of five images and what is in them, one of which is missing."""
    rows = ["cat", "dog|cat", "", "dog", "cat"]
    for number in range(4):
        (tmp_path / f"{number}.JPG").write_bytes(jpeg(number))
    lines = "".join(f"{number}.JPG,{names},train\n" for number, names in enumerate(rows))
    (tmp_path / "labels.csv").write_text(f"path,labels,split\n{lines}")
    return tmp_path


def test_what_is_written_as_shards_is_read_back(pictures, tmp_path, capsys):
    out = tmp_path / "shards"
    shard("table", pictures, out, images=3)
    assert capsys.readouterr().out == "train: 4 images (1 missing, left out) in 2 shards\n"
    data, original = webdataset(out, "train"), table(pictures, "train").subset(range(4))
    assert sorted(path.name for path in out.iterdir()) == [
        *("classes.txt", "train-000000.tar", "train-000001.tar")
    ]
    assert (data.classes, data.dense().tolist()) == (original.classes, original.dense().tolist())
    assert [Path(data.path(row)).name for row in range(4)] == [f"{n:09}.jpg" for n in range(4)]
    assert identical_files([original, data]) == [Pair(1, row, 0, row) for row in range(4)]
    settings = ImageSettings(image_size=16, batch_size=4, workers=0)
    for cached in (settings, settings.replace(cache_dir=str(tmp_path / "cache"))):
        [batch], [expected] = Batches(data, cached).epoch(0), Batches(original, settings).epoch(0)
        assert (batch.images == expected.images).all()
    shard("webdataset", out, tmp_path / "again")
    assert len(webdataset(tmp_path / "again", "train")) == 4
    with pytest.raises(UsageError, match="shards holds shards already"):
        shard("table", pictures, out)


def test_soft_and_partial_labels_survive(pictures, tmp_path):
    (pictures / "labels.csv").write_text("path,cat,dog,split\n0.JPG,0.3,,train\n1.JPG,0,1,train\n")
    shard("table", pictures, tmp_path / "out")
    data = webdataset(tmp_path / "out", "train")
    np.testing.assert_array_equal(data.labels(0), np.float32([0.3, -1]))
    np.testing.assert_array_equal(data.labels(1), np.float32([0, 1]))


def test_a_shard_that_is_gone_is_missing_with_its_images(pictures, tmp_path):
    shard("table", pictures, tmp_path / "out", images=3)
    data = webdataset(tmp_path / "out", "train")
    assert files_exist(data).all()
    (tmp_path / "out" / "train-000001.tar").unlink()
    assert files_exist(data).tolist() == [True, True, True, False]
    assert without_missing(data, "skip")[1] == 1
    with pytest.raises(DataError, match="No such file"):
        read_image(data.path(3))


def test_shards_are_written_from_the_command_line(pictures, tmp_path):
    arguments = ["shard", "table", pictures, "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "asl.data", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "train: 4 images (1 missing, left out) in 1 shards\n"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1_jpg": b"x"}, "train-0.tar: 1 has an image, but no .json or .cls"),
        ({"1_json": labels("cat")}, "holds no image"),
        ({"1_jpg": b"x", "1_png": b"x", "1_cls": b"1"}, "1.png: there is another image of that"),
        ({"1_jpg": b"x", "1_cls": b"cat"}, "1.cls: 'cat' is not the number of a class"),
        ({"1_jpg": b"x", "1_cls": b"7" * 5000}, "1.cls: '777.* is not the number of a class"),
        ({"1_jpg": b"x", "1_json": b"{"}, r'1.json is not a JSON with "labels" in it'),
        ({"1_jpg": b"x", "1_json": b"[1]"}, r'1.json is not a JSON with "labels" in it'),
        ({"1_jpg": b"x", "1_json": labels(cat=2)}, "1.json: labels are not names, nor numbers"),
        ({"1_jpg": b"x", "1_json": labels(cat="x")}, "1.json: labels are not names, nor numbers"),
        (
            {"1_jpg": b"x", "1_json": labels("a"), "2_jpg": b"x", "2_json": labels(a=1)},
            "labels are lists in some samples and objects in others",
        ),
    ],
)
def test_a_wrong_sample_is_named(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        webdataset(write(tmp_path / "train-0.tar", **members), "train")


def test_a_wrong_shard_is_named(tmp_path):
    root = write(tmp_path / "train-0.tar", **{"1_cls": b"7", "1_jpg": jpeg(1)})
    whole = (root / "train-0.tar").read_bytes()
    (root / "classes.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"1.jpg: label 7 is not in .*classes.txt"):
        webdataset(root, "train")
    large = bytearray(whole)  # a header of further names, which says that it has 2 ** 87 bytes
    large[124:136], large[156:157] = b"\x80" + b"\xff" * 11, b"x"
    large[148:156] = b"%06o\0 " % sum(large[:148] + b" " * 8 + large[156:512])
    for content in (b"no tar", whole[:1600], b"", bytes(large)):
        (root / "train-0.tar").write_bytes(content)
        with pytest.raises(
            DataError, match=r"train-0.tar (is not a tar file|is cut off|holds no im)"
        ):
            webdataset(root, "train")
    with pytest.raises(UsageError, match=r"no split 'val' .* choose from train"):
        webdataset(root, "val")
    with pytest.raises(DataError, match=r"none/train-000000.tar is not there"):
        webdataset(tmp_path / "none", "train")
