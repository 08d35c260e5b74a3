"""`read`: dispatch, default splits, and the cache of parsed annotations."""

import inspect
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from asl.data.readers import READERS, default_split, read, splits
from asl.data.settings import Dataset, DataSettings, LabelSettings
from asl.errors import DataError, UsageError


def write_voc(year, cats="000012 -1\n000017  1\n"):
    folder = year / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bird_train.txt").write_text("000012  1\n000017  0\n")
    (folder / "cat_train.txt").write_text(cats)
    return folder


@pytest.fixture
def root(tmp_path):
    write_voc(tmp_path / "VOC2007")
    return tmp_path / "VOC2007"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def parsed(monkeypatch):
    """Counts the calls of the reader."""
    calls = []

    def counted(root, split, **options):
        calls.append(split)
        return voc.read(root, split, **options)

    voc = READERS["voc"]
    monkeypatch.setitem(READERS, "voc", voc._replace(read=counted))
    return calls


def same(a, b):
    assert (a.root, a.classes, a.implied) == (b.root, b.classes, b.implied)
    for name in ("files", "indptr", "indices", "values"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def test_the_second_start_reads_the_cache(root, cache, parsed):
    first = read("voc", root, "train", cache_dir=cache)
    same(read("voc", root, "train", cache_dir=cache), first)
    same(read("voc", root, "train"), first)
    assert len(parsed) == 2  # once for the cache, once without
    assert [path.suffix for path in cache.iterdir()] == [".npz"]


def test_what_is_cached_can_be_read_without_adding_to_it(root, cache, parsed):
    for _ in range(2):
        read("voc", root, "train", cache_dir=cache, write_cache=False)
    assert len(parsed) == 2
    assert not cache.exists()
    read("voc", root, "train", cache_dir=cache)
    read("voc", root, "train", cache_dir=cache, write_cache=False)
    assert len(parsed) == 3


def test_options_and_splits_are_kept_apart(root, cache, parsed):
    for _ in range(2):
        present = read("voc", root, "train", cache_dir=cache, difficult="present")
        ignored = read("voc", root, "train", cache_dir=cache, difficult="ignore")
    assert (present.labels(1)[0], ignored.labels(1)[0]) == (1, -1)
    assert len(parsed) == 2


def test_a_changed_source_is_parsed_again(root, cache):
    read("voc", root, "train", cache_dir=cache)
    write_voc(root, cats="000012  1\n000017  1\n")
    assert read("voc", root, "train", cache_dir=cache).counts(1)[1] == 2
    lists = root / "ImageSets" / "Main"
    (lists / "ant_train.txt").write_text("000012  1\n000017  1\n")
    assert read("voc", root, "train", cache_dir=cache).classes == ("ant", "bird", "cat")


def test_a_touched_source_and_a_new_reader_version_are_parsed_again(
    root, cache, parsed, monkeypatch
):
    read("voc", root, "train", cache_dir=cache)
    os.utime(root / "ImageSets" / "Main" / "cat_train.txt", ns=(1, 1))
    read("voc", root, "train", cache_dir=cache)
    assert len(parsed) == 2
    monkeypatch.setitem(READERS, "voc", READERS["voc"]._replace(version=-1))
    read("voc", root, "train", cache_dir=cache)
    assert len(parsed) == 3


def test_a_source_of_another_size_is_parsed_again_whatever_its_time(root, cache):
    path = root / "ImageSets" / "Main" / "cat_train.txt"
    os.utime(path, ns=(1, 1))
    read("voc", root, "train", cache_dir=cache)
    path.write_text("000012 1\n000017 1\n")
    os.utime(path, ns=(1, 1))
    assert read("voc", root, "train", cache_dir=cache).counts(1)[1] == 2


def test_images_are_looked_for_where_this_call_says(root, cache, monkeypatch):
    monkeypatch.chdir(root)
    assert read("voc", ".", "train", cache_dir=cache).root == Path()
    assert read("voc", root, "train", cache_dir=cache).root == root


@pytest.mark.parametrize("place", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999, "cut", "empty", "text"])
def test_a_damaged_cache_is_rebuilt_and_says_so(root, cache, parsed, caplog, place):
    first = read("voc", root, "train", cache_dir=cache)
    (path,) = cache.iterdir()
    good = path.read_bytes()
    bad = {"cut": good[:-100], "empty": b"", "text": b"hello"}.get(place)
    if bad is None:
        flipped = bytearray(good)
        flipped[int(place * len(good))] ^= 0x10
        bad = bytes(flipped)
    path.write_bytes(bad)
    same(read("voc", root, "train", cache_dir=cache), first)
    if len(parsed) == 2:  # a few bytes of a zip file mean nothing
        assert "parsed anew" in caplog.text
        assert path.name in caplog.text
        assert path.read_bytes()[:4] == good[:4]
    same(read("voc", root, "train", cache_dir=cache), first)


def test_every_flipped_byte_gives_the_same_annotations(root, cache):
    first = read("voc", root, "train", cache_dir=cache)
    (path,) = cache.iterdir()
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        flipped = bytearray(good)
        flipped[place] ^= 0xFF
        path.write_bytes(bytes(flipped))
        same(read("voc", root, "train", cache_dir=cache), first)


def test_ranks_may_write_at_the_same_time(root, cache):
    first = read("voc", root, "train")
    results = []
    ranks = [
        threading.Thread(target=lambda: results.append(read("voc", root, "train", cache_dir=cache)))
        for _ in range(8)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(results) == 8
    for result in results:
        same(result, first)
    assert len(list(cache.iterdir())) == 1


def parse_together(rank, init, queue):
    """How often this rank parses, whether it can write to what it gets, and how much that is."""
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    calls, voc = [], READERS["voc"]
    READERS["voc"] = voc._replace(read=lambda *a, **b: calls.append(a) or voc.read(*a, **b))
    folder = Path(init.removeprefix("file://")).parent
    for cache in (folder / "cache", folder / "no folder"):
        data = read("voc", folder / "VOC2007", "train", cache_dir=cache)
        queue.put((cache.name, rank, len(calls), data.files.flags.writeable, len(data)))
    torch.distributed.destroy_process_group()


def test_one_rank_parses_and_the_others_map_what_it_has_written(
    root, tmp_path, answers_of_two_ranks
):
    (tmp_path / "no folder").write_text("so each has to parse")
    assert sorted(answers_of_two_ranks(parse_together, 2)) == [
        ("cache", 0, 1, True, 2),
        ("cache", 1, 0, False, 2),
        ("no folder", 0, 2, True, 2),
        ("no folder", 1, 1, True, 2),
    ]


def test_a_cache_that_is_replaced_keeps_what_is_in_use(root, cache):
    read("voc", root, "train", cache_dir=cache)
    before, expected = (read("voc", root, "train", **where) for where in ({"cache_dir": cache}, {}))
    assert not before.files.flags.owndata
    write_voc(root, cats="000012  1\n000017  1\n")
    after = read("voc", root, "train", cache_dir=cache)
    same(before, expected)
    assert after.counts(1).tolist() != before.counts(1).tolist()


def test_a_cache_that_cannot_be_written_costs_a_warning(root, cache, caplog):
    cache.write_text("not a folder")
    assert len(read("voc", root, "train", cache_dir=cache)) == 2
    assert "cannot be cached" in caplog.text


def test_classes_that_no_image_has_are_named(root, caplog):
    write_voc(root, cats="000012 -1\n000017 -1\n")
    assert len(read("voc", root, "train")) == 2
    assert "1 of 2 classes are in no image of train: cat" in caplog.text


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("years", "expected"),
    [
        (["train2014", "val2014"], ["train2014", "val2014"]),
        (["train2017", "val2017"], ["train2017", "val2017"]),
        (["train2017", "val2017", "train2014", "val2014"], ["train2014", "val2014"]),
        (["val2017"], ["train2014", "val2017"]),
        (["train", "val"], ["train", "val"]),
    ],
)
def test_the_default_splits_of_coco_are_those_that_are_there(tmp_path, years, expected):
    touch(tmp_path, *(f"annotations/instances_{year}.json" for year in years))
    for role, split in zip(("train", "val"), expected, strict=True):
        if split in years:
            assert default_split("coco", tmp_path, role) == split
        else:
            with pytest.raises(UsageError, match="name the train one: val2017"):
                default_split("coco", tmp_path, role)


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (["train", "val", "trainval", "test"], ("trainval", "test")),
        (["train", "val", "trainval"], ("train", "val")),  # VOC 2012: nobody has the test labels
    ],
)
def test_the_default_splits_of_voc_never_overlap(tmp_path, there, expected):
    touch(tmp_path, *(f"ImageSets/Main/{name}_{split}.txt" for name in "ab" for split in there))
    assert (
        default_split("voc", tmp_path, "train"),
        default_split("voc", tmp_path, "val"),
    ) == expected


def test_the_default_split_of_a_folder_without_any_says_what_is_missing_when_it_is_read(tmp_path):
    split = default_split("coco", tmp_path, "train")
    with pytest.raises(DataError, match=r"instances_train2014.json is not there: .*holds nothing"):
        read("coco", tmp_path, split)


def test_unknown_names_are_usage_errors(root):
    with pytest.raises(UsageError, match="no data set 'vok': did you mean 'voc'"):
        read("vok", root, "train")
    with pytest.raises(UsageError, match="choose from coco, voc, nus_wide"):
        read("imagenet", root, "train")
    with pytest.raises(UsageError, match="no option 'all_images', only: difficult"):
        read("voc", root, "train", all_images=True)
    assert len(read("voc", root, "train", all_images=None)) == 2


def test_the_settings_offer_the_data_sets_that_have_a_reader():
    assert get_args(Dataset) == tuple(READERS)


@pytest.mark.parametrize("dataset", READERS)
def test_a_reader_takes_the_options_that_it_names_and_each_is_a_setting(dataset):
    parameters = list(inspect.signature(READERS[dataset].read).parameters.values())
    assert [each.name for each in parameters[:2]] == ["root", "split"]
    assert sorted(each.name for each in parameters[2:]) == sorted(READERS[dataset].options)
    assert all(each.kind is each.KEYWORD_ONLY for each in parameters[2:])
    settings = {*DataSettings.model_fields, *LabelSettings.model_fields, "difficult"}
    assert {*READERS[dataset].options} <= settings


def test_the_splits_that_exist_are_listed(root):
    write_voc(root)
    (root / "ImageSets" / "Main" / "cat_val.txt").touch()
    assert splits("voc", str(root)) == ["train", "val"]


def test_the_losses_and_the_settings_need_no_library_of_the_readers():
    code = (
        "import sys; import asl, asl.data.settings;"
        "print(sorted({'msgspec', 'polars', 'PIL', 'asl.data.readers'} & set(sys.modules)))"
    )
    source = Path(__file__).parents[2] / "src"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_the_key_of_the_cache_is_readable(root, cache):
    read("voc", root, "train", cache_dir=cache)
    (path,) = cache.iterdir()
    with np.load(path) as archive:
        assert json.loads(str(archive["about"]))["classes"] == ["bird", "cat"]


def write_all(root):
    """One small tree of every data set, in its own layout; two images and one class in each."""
    for name, text in {
        "coco/annotations/instances_train2017.json": json.dumps(
            {
                "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)],
                "annotations": [{"image_id": i, "category_id": 1} for i in (1, 2)],
                "categories": [{"id": 1, "name": "cat"}],
            }
        ),
        "voc/ImageSets/Main/cat_trainval.txt": "1 1\n2 1\n",
        "nus_wide/nus_wid_data.csv": "filepath,label,split_name\n"
        "1,['cat'],train\n2,['cat'],train\n",
        "openimages/train-annotations-human-imagelabels.csv": "ImageID,LabelName,Confidence\n"
        "0000000000000001,cat,1\n0000000000000002,cat,1\n",
        "openimages/oidv6-classes-trainable.txt": "cat\n",
        "table/train.csv": "path,labels\n1.jpg,cat\n2.jpg,cat\n",
        "folders/train/cat/1.jpg": "",
        "folders/train/cat/2.jpg": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "webdataset").mkdir()
    with tarfile.open(root / "webdataset/train-000000.tar", "w") as tar:
        (root / "1.cls").write_text("0")
        for name in ("1.jpg", "1.cls", "2.jpg", "2.cls"):
            tar.add(root / "1.cls", name)
    (root / "webdataset/classes.txt").write_text("cat\n")


@pytest.mark.parametrize("dataset", sorted({*READERS} - {"shapes"}))  # which draws what is missing
def test_every_data_set_is_read_the_same_way(tmp_path, cache, dataset):
    write_all(tmp_path)
    root = tmp_path / dataset
    split = default_split(dataset, root, "train")
    first = read(dataset, root, split, cache_dir=cache)
    assert first.classes == ("cat",)
    assert first.dense().tolist() == [[1], [1]]
    same(read(dataset, root, split, cache_dir=cache), first)
    same(read(dataset, str(root), split), first)
    with pytest.raises((UsageError, DataError), match="is not there"):
        read(dataset, root / "none", split, cache_dir=cache)
    with pytest.raises(UsageError, match=r"no split 'x'.*choose from"):
        read(dataset, root, "x", cache_dir=cache)
