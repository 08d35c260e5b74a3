"""Near-duplicates: copies that were changed a little are found, other photographs are not."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from asl.data.__main__ import main
from asl.data.annotations import Annotations
from asl.data.readers import read
from asl.errors import DataError
from asl.evaluation.report.twins import twins
from asl.images import near_duplicates as module
from asl.images.near_duplicates import MOST_BITS, near_duplicates, perceptual_hashes


def scene(number, size=(160, 120)):
    """A blurred picture of random blocks, with the large shapes that photographs have."""
    blocks = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def write(root, **pictures):
    root.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        picture.save(root / f"{name}.jpg", quality=90)
    files = np.array([f"{name}.jpg".encode() for name in pictures])
    ones = np.ones(len(files))
    return Annotations.from_cells(
        root, files, ("cat",), np.arange(len(files)), np.zeros(len(files)), ones
    )


@pytest.fixture
def train(tmp_path):
    return write(tmp_path / "train", **{f"t{number}": scene(number) for number in range(40)})


def test_changed_copies_are_found_and_other_pictures_are_not(tmp_path, train):
    smaller = scene(3).resize((90, 70))
    brighter = ImageEnhance.Brightness(scene(4)).enhance(1.1)
    blurred = scene(5).filter(ImageFilter.GaussianBlur(2))
    grey = scene(6).convert("L")
    others = {f"o{number}": scene(number) for number in range(100, 140)}
    val = write(tmp_path / "val", **others, small=smaller, bright=brighter, soft=blurred, grey=grey)
    pairs = near_duplicates([train, val])
    found = {val.files[p.row].decode(): train.files[p.other_row].decode() for p in pairs}
    assert found == {
        "small.jpg": "t3.jpg",
        "bright.jpg": "t4.jpg",
        "soft.jpg": "t5.jpg",
        "grey.jpg": "t6.jpg",
    }
    assert [p.bits for p in pairs] == sorted(p.bits for p in pairs)
    assert all((p.split, p.other_split) == (1, 0) and p.bits <= MOST_BITS for p in pairs)


def test_a_hash_does_not_depend_on_the_size_and_others_differ_in_half_of_the_bits(tmp_path):
    pictures = {f"p{n}": scene(n, size) for n in range(30) for size in [(160, 120)]}
    doubled = {f"p{n}": scene(n, (320, 240)) for n in range(30)}
    one, two = (
        perceptual_hashes(write(tmp_path / name, **each))
        for name, each in (("one", pictures), ("two", doubled))
    )
    differ = np.bitwise_count(one[:, None] ^ two)
    assert np.diag(differ).max() <= 2
    apart = differ[~np.eye(30, dtype=bool)]
    assert 28 < apart.mean() < 34
    assert np.bitwise_count(one).tolist() == [32] * 30  # half of the frequencies are above


def test_the_nearest_of_all_earlier_splits_counts_and_blocks_change_nothing(
    tmp_path, train, monkeypatch
):
    monkeypatch.setattr(module, "AT_ONCE", 3)
    second = write(tmp_path / "second", a=scene(200), b=scene(201))
    third = write(tmp_path / "third", c=scene(201), d=scene(7), **{
        f"o{n}": scene(n) for n in range(300, 310)
    })  # fmt: skip
    pairs = near_duplicates([train, second, third])
    assert [tuple(pair) for pair in pairs] == [(2, 0, 1, 1, 0), (2, 1, 0, 7, 0)]


def test_a_file_in_several_splits_is_no_pair(tmp_path, train):
    assert near_duplicates([train, train.subset([3, 1])]) == []
    assert near_duplicates([train]) == []
    copy = write(tmp_path / "copy", same=scene(1))
    assert [tuple(p) for p in near_duplicates([train, train.subset([1]), copy])] == [
        (2, 0, 0, 1, 0)
    ]


def test_a_broken_picture_is_named(tmp_path, train):
    val = write(tmp_path / "val", bad=scene(1))
    (tmp_path / "val" / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match=r"bad\.jpg"):
        near_duplicates([train, val])


def test_twins_of_a_report_are_named_from_the_root_of_the_split_that_is_scored(tmp_path, train):
    val = write(tmp_path / "val", a=scene(9))
    found, number = twins([train, val], ["train", "val"])
    assert number == 1
    assert found == [
        {
            **{"file": "a.jpg", "other": "../train/t9.jpg", "split": "val", "other_split": "train"},
            **{"bits": 0, "labels": ["cat"], "other_labels": ["cat"]},
        }
    ]


def test_the_summary_of_a_data_set_counts_names_and_draws_them(tmp_path, capsys):
    pictures = {f"{n}.jpg": scene(n) for n in range(6)} | {"copy.png": scene(2, (80, 60))}
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    for split, names in {"train": list(pictures)[:6], "val": ["copy.png"]}.items():
        rows = "".join(f"{name},cat\n" for name in names)
        (tmp_path / f"{split}.csv").write_text(f"path,labels\n{rows}")
    main("table", tmp_path, output=tmp_path / "out", near_duplicates=True)
    said = capsys.readouterr().out
    picture = tmp_path / "out" / "table_near_duplicates.png"
    assert said.endswith(
        f"nearly equal images in different splits: 1\n"
        f"  {tmp_path}/2.jpg ~ {tmp_path}/copy.png\n"
        f"  picture             {picture}\n"
    )
    with Image.open(picture) as drawn:
        assert drawn.width > 600
    main("table", tmp_path, output=tmp_path / "out")
    assert "nearly" not in capsys.readouterr().out


def test_of_photographs_only_one_pair_of_two_hundred_is_nearly_the_same(voc_root):
    splits = [read("voc", voc_root, name) for name in ("train", "val")]
    wanted = {0: "001172", 1: "003848"}  # one photograph of a locomotive, brighter in val
    chosen = []
    for number, split in enumerate(splits):
        names = [file.decode()[11:17] for file in split.files]
        rows = [names.index(wanted[number]), *range(0, 1000, 10)]
        chosen.append(split.subset(rows))
    assert [(p.row, p.other_row) for p in near_duplicates(chosen)] == [(0, 0)]
