"""Batches: order, ranks, images that cannot be read, memory that is shared and not copied."""

import logging
import shutil
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from asl.data.annotations import Annotations
from asl.errors import DataError, UsageError
from asl.images import loader
from asl.images.augment import apply
from asl.images.cache import open_image_cache
from asl.images.loader import Batches

SIZE = 16


@pytest.fixture
def pictures(tmp_path):
    """A function that writes N pictures, some of them unreadable, and returns their annotations."""

    def write(count, bad=()):
        names = np.array([f"{i}.png".encode() for i in range(count)])
        for i, name in enumerate(names):
            # The first pixel tells which picture it is.
            pixels = np.random.default_rng(i).integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)
            pixels[0, 0] = i
            path = tmp_path / name.decode()
            Image.fromarray(pixels).save(path)
            if i in bad:
                path.write_bytes(path.read_bytes()[:100])
        return Annotations.unlabelled(tmp_path, names, ["a", "b"])

    return write


def as_rank(monkeypatch, rank, ranks):
    monkeypatch.setattr(loader, "rank", lambda: rank)
    monkeypatch.setattr(loader, "world_size", lambda: ranks)


def seen(batches, epoch=0):
    """The numbers of the pictures of every batch that count."""
    return [batch.images[: len(batch.targets), 0, 0, 0].tolist() for batch in batches.epoch(epoch)]


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("count", [16, 17, 19])
def test_ranks_split_every_training_batch_of_one_process(count, ranks, pictures, monkeypatch):
    annotations = pictures(count)
    alone = seen(Batches(annotations, SIZE, 8, shuffle=True, workers=0))
    shares = []
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        shares.append(seen(Batches(annotations, SIZE, 8, shuffle=True, workers=0)))
    together = [sorted(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert together == [sorted(batch) for batch in alone]


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("count", [16, 17, 35])
def test_ranks_are_dealt_the_very_batches_of_one_process_for_scoring(
    count, ranks, pictures, monkeypatch
):
    annotations = pictures(count)
    alone = seen(Batches(annotations, SIZE, 8, workers=0))
    dealt = {}
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        for turn, batch in enumerate(seen(Batches(annotations, SIZE, 8, workers=0))):
            dealt[turn * ranks + rank] = batch
    assert [dealt[i] for i in range(len(alone))] == alone
    assert not any(dealt[i] for i in range(len(alone), len(dealt)))


def test_a_rank_without_a_share_gets_an_image_that_does_not_count(pictures, monkeypatch):
    as_rank(monkeypatch, 1, 2)
    *_, last = Batches(pictures(9), SIZE, 8, shuffle=True, workers=0).epoch(0)
    assert len(last.images) == 1
    assert last.targets.shape == (0, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_on_the_device_gets_the_numbers_that_workers_would_use(workers, pictures):
    annotations = pictures(12)
    options = {"augment": "recipe", "shuffle": True, "seed": 3, "workers": workers}
    now = list(Batches(annotations, SIZE, 5, **options).epoch(2, start=1))
    later = list(Batches(annotations, SIZE, 5, augment_later=True, **options).epoch(2, start=1))
    assert len(now) == 2
    for batch, raw in zip(now, later, strict=True):
        assert batch.numbers is None
        augmented = [apply(*each) for each in zip(raw.images, raw.numbers, strict=True)]
        assert torch.equal(torch.stack(augmented), batch.images)


def test_the_image_cache_changes_no_pixel(pictures, tmp_path):
    annotations = pictures(10)
    cache = open_image_cache(tmp_path / "cache", annotations, SIZE // 2, workers=1)
    options = {"augment": "recipe", "shuffle": True, "workers": 0}
    read = Batches(annotations, SIZE // 2, 4, **options).epoch(0)
    cached = Batches(annotations, SIZE // 2, 4, cache=cache, **options).epoch(0)
    for one, other in zip(read, cached, strict=True):
        assert torch.equal(one.images, other.images)


# On one core too, where PyTorch advises against it.
two_workers = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")


@two_workers
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_kept_outlive_those_that_come_after(workers, pictures):
    annotations = pictures(40)
    options = {"augment": "recipe", "shuffle": True}
    alone = list(Batches(annotations, SIZE, 2, **options, workers=0).epoch(0))
    kept = list(Batches(annotations, SIZE, 2, **options, workers=workers).epoch(0))
    for one, other in zip(alone, kept, strict=True):
        assert torch.equal(one.images, other.images)
        assert not other.images.is_shared()


@two_workers
def test_an_epoch_that_was_left_does_not_reach_into_the_next(pictures):
    annotations = pictures(40)
    batches = Batches(annotations, SIZE, 2, shuffle=True, workers=2)
    for left in (1, 4, 7):
        for _ in zip(range(left), batches.epoch(0), strict=False):
            pass
        assert seen(batches, 1) == seen(Batches(annotations, SIZE, 2, shuffle=True, workers=0), 1)


def test_too_little_shared_memory_is_an_error_before_the_first_batch(pictures, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100))
    annotations = pictures(4)
    Batches(annotations, SIZE, 4, workers=0)
    with pytest.raises(UsageError, match=r"needs 0 MB of shared memory and /dev/shm has 0: .*shm"):
        Batches(annotations, SIZE, 4, workers=1)


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"])
def test_a_process_with_workers_ends(end, pictures, tmp_path):
    """Python waits for its processes at exit, and workers ignore that it wants them to end."""
    pictures(4)
    script = tmp_path / "script.py"
    script.write_text(
        "from asl.data.annotations import Annotations\n"
        "from asl.images.decode import find_images\n"
        "from asl.images.loader import Batches\n"
        f"annotations = Annotations.unlabelled(*find_images({str(tmp_path)!r}), ['a', 'b'])\n"
        f"batches = Batches(annotations, {SIZE}, 2, workers=1)\n"
        "epoch = batches.epoch(0)\n"
        f"next(epoch)\n{end}\n"
    )
    ended = subprocess.run([sys.executable, script], timeout=60, capture_output=True, text=True)
    assert ended.returncode == {"": 0, "raise SystemExit(3)": 3}.get(end, 1), ended.stderr
    assert ("ZeroDivisionError" in ended.stderr) == (end == "1 / 0")


def test_an_unreadable_image_is_an_error_that_names_it(pictures):
    with pytest.raises(DataError, match=r"3\.png"):
        seen(Batches(pictures(8, bad=[3]), SIZE, 4, workers=0))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_skipped_image_is_replaced_by_the_same_other_one_each_time(
    cached, workers, pictures, tmp_path, caplog
):
    annotations = pictures(120, bad=[7])
    cache = None
    if cached:
        cache = open_image_cache(tmp_path / "cache", annotations, SIZE, workers=1, bad="skip")
    options = {"shuffle": True, "bad_images": "skip", "cache": cache}
    good = Batches(annotations, SIZE, 16, **options, workers=0)
    again = Batches(annotations, SIZE, 16, **options, workers=workers)
    with caplog.at_level(logging.WARNING):
        first, second = seen(good, epoch=1), seen(again, epoch=1)
    assert first == second
    pictures_seen = sorted(chain(*first))
    assert len(pictures_seen) == 120
    assert 7 not in pictures_seen
    assert len(set(pictures_seen)) == 119
    assert "7.png" in caplog.text
    assert seen(good, epoch=2) != first


def test_more_than_one_percent_of_unreadable_images_is_an_error(pictures):
    batches = Batches(pictures(120, bad=[5, 50]), SIZE, 8, bad_images="skip", workers=0)
    with pytest.raises(DataError, match="2 of 120 images cannot be read, more than 1 %"):
        seen(batches)
