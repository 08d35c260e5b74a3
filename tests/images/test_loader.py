"""Batches: order, ranks, images that cannot be read, memory that is shared and not copied."""

import gc
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from asl.data.annotations import Annotations
from asl.errors import DataError, UsageError
from asl.images import loader
from asl.images.augment import apply
from asl.images.loader import Batches
from asl.images.settings import AugmentSettings, ImageSettings

SIZE = 16


@pytest.fixture
def pictures(tmp_path):
    """A function that writes N pictures, some of them unreadable, and returns their annotations.

    The first pixel tells which picture it is, and so do its labels.
    """

    def write(count, bad=()):
        names = np.array([f"{i}.png".encode() for i in range(count)])
        for i, name in enumerate(names):
            pixels = np.random.default_rng(i).integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)
            pixels[0, 0] = i
            path = tmp_path / name.decode()
            Image.fromarray(pixels).save(path)
            if i in bad:
                path.write_bytes(path.read_bytes()[:100])
        bits = [[i >> bit & 1 for bit in range(8)] for i in range(count)]
        rows, columns = np.nonzero(bits)
        classes = tuple(f"bit {bit}" for bit in range(8))
        return Annotations.from_cells(tmp_path, names, classes, rows, columns, np.ones(len(rows)))

    return write


def batches_of(
    annotations, batch_size, *, workers=0, augment=None, bad_images="error", cache_dir="", **more
):
    """Batches of SIZE x SIZE px; a training set with `augment`."""
    settings = ImageSettings(
        image_size=SIZE, batch_size=batch_size, workers=workers, cache_dir=str(cache_dir)
    )
    training = augment and AugmentSettings(augment=augment, bad_images=bad_images)
    return Batches(annotations, settings, augment=training, **more)


def as_rank(monkeypatch, rank, ranks):
    monkeypatch.setattr(loader, "rank", lambda: rank)
    monkeypatch.setattr(loader, "world_size", lambda: ranks)


def pictures_in(batch):
    """The numbers of the pictures that count."""
    return batch.images[: len(batch.targets), 0, 0, 0].tolist()


def seen(batches, epoch=0):
    return [pictures_in(batch) for batch in batches.epoch(epoch)]


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("count", [16, 21, 31])
def test_ranks_split_every_training_batch_of_one_process(count, ranks, pictures, monkeypatch):
    annotations = pictures(count)
    alone = seen(batches_of(annotations, 8, shuffle=True))
    shares = []
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        batches = batches_of(annotations, 8, shuffle=True)
        shares.append(seen(batches))
        assert len(batches) == len(shares[-1])
        assert batches.batch_size == 8
        assert max(map(len, shares[-1])) <= batches.batch_size_per_rank
    for parts in zip(*shares, strict=True):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    together = [sorted(chain(*parts)) for parts in zip(*shares, strict=True)]
    assert together == [sorted(batch) for batch in alone][: len(together)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [3, 16, 17, 35])
def test_ranks_are_dealt_whole_batches_of_the_data_set_in_order_for_scoring(
    count, ranks, pictures, monkeypatch
):
    annotations = pictures(count)
    dealt = {}
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        batches = batches_of(annotations, 8)
        assert batches.batch_size_per_rank == -(-8 // ranks)
        for turn, batch in enumerate(seen(batches)):
            dealt[turn * ranks + rank] = batch
        assert turn + 1 == len(batches)
    size = batches.batch_size_per_rank
    whole = [list(range(i, min(i + size, count))) for i in range(0, count, size)]
    assert [dealt[i] for i in range(len(dealt))] == whole + [[]] * (len(dealt) - len(whole))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_rank_without_a_share_gets_an_image_that_does_not_count(pictures, monkeypatch, shuffle):
    as_rank(monkeypatch, 1, 2)
    *_, last = batches_of(pictures(5), 2, shuffle=shuffle).epoch(0)
    assert len(last.images) == 1
    assert last.targets.shape == (0, 8)


# Images, batch size, ranks; the sizes of the batches of all ranks together.
LAST_BATCHES = [
    (17, 8, 1, [8, 8]),
    (18, 8, 1, [8, 8, 2]),
    (19, 8, 2, [8, 8]),
    (20, 8, 2, [8, 8, 4]),
    (16, 8, 2, [8, 8]),
    (1, 8, 1, [1]),  # the only one
    (3, 8, 2, [3]),
    (9, 3, 2, [3, 3, 3]),  # the others are no larger
    (10, 3, 2, [3, 3, 3, 1]),
    (4, 1, 1, [1, 1, 1, 1]),
]


@pytest.mark.parametrize(("count", "batch_size", "ranks", "sizes"), LAST_BATCHES)
def test_a_last_training_batch_of_less_than_two_images_a_rank_is_left_out_and_said(
    count, batch_size, ranks, sizes, pictures, monkeypatch, caplog
):
    annotations, found = pictures(count), []
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        batches = batches_of(annotations, batch_size, augment="none", shuffle=True)
        assert len(batches) == len(sizes)
        found.append([len(batch.targets) for batch in batches.epoch(0)])
    assert np.sum(found, axis=0).tolist() == sizes
    left_out = count - sum(sizes)
    assert (f"leaves out {left_out} of {count} images" in caplog.text) == (left_out > 0)
    assert len(batches_of(annotations, batch_size)) == -(
        -count // (batch_size + batch_size % ranks)
    )


def test_every_epoch_has_an_order_of_its_own_that_depends_on_the_seed(pictures):
    annotations = pictures(40)
    batches = batches_of(annotations, 8, shuffle=True, seed=1)
    orders = [seen(batches, epoch) for epoch in (0, 1, 2)]
    orders.append(seen(batches_of(annotations, 8, shuffle=True, seed=2), 0))
    assert [sorted(chain(*order)) for order in orders] == [list(range(40))] * 4
    assert len({str(order) for order in orders}) == 4
    assert seen(batches, 1) == orders[1]
    # Those of versions before this one, which a run that is resumed goes on with.
    expected = np.arange(40)
    np.random.default_rng([1, 2]).shuffle(expected)
    assert list(chain(*orders[2])) == expected.tolist()


def test_an_epoch_is_entered_at_any_batch_and_augmented_alike(pictures):
    batches = batches_of(pictures(20), 4, augment="recipe", shuffle=True)
    whole = list(batches.epoch(3))
    for start in (0, 1, 4, 5):
        rest = list(batches.epoch(3, start))
        assert len(rest) == 5 - start
        for one, other in zip(whole[start:], rest, strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_leaves_the_global_random_state_alone(workers, pictures):
    state = torch.get_rng_state()
    seen(batches_of(pictures(4), 2, augment="recipe", shuffle=True, workers=workers))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_augment_settings_pixels_are_those_of_the_files(pictures):
    annotations = pictures(6)
    [batch] = batches_of(annotations, 8).epoch(0)
    for index, image in enumerate(batch.images):
        picture = np.array(Image.open(annotations.path(index)))
        assert torch.equal(image, torch.from_numpy(picture).permute(2, 0, 1))
    assert batch.augmentation is None
    assert batch.targets.tolist() == [annotations.labels(i).tolist() for i in range(6)]


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_on_the_device_gets_the_numbers_that_workers_would_use(workers, pictures):
    annotations = pictures(12)
    options = {"augment": "recipe", "shuffle": True, "seed": 3, "workers": workers}
    augmented = list(batches_of(annotations, 5, **options).epoch(2, start=1))
    raw = list(batches_of(annotations, 5, on_device=True, **options).epoch(2, start=1))
    assert len(augmented) == 2
    for batch, plain in zip(augmented, raw, strict=True):
        assert batch.augmentation is None
        again = [apply(*each) for each in zip(plain.images, plain.augmentation, strict=True)]
        assert torch.equal(torch.stack(again), batch.images)


WINDOW = 4 * loader.BLOCK


@pytest.mark.parametrize("size", [1, 50, WINDOW, 1000])
def test_blocks_are_shuffled_and_what_is_in_a_window(size):
    order = loader.shuffled(size, 3, 1, WINDOW)
    assert sorted(order) == list(range(size))
    assert np.array_equal(order, loader.shuffled(size, 3, 1, WINDOW))
    if size > loader.BLOCK:
        for other in ((4, 1, WINDOW), (3, 2, WINDOW), (3, 1, 0)):
            assert not np.array_equal(order, loader.shuffled(size, *other))
    for start in range(0, size, WINDOW):
        window = order[start : start + WINDOW]
        blocks = np.unique(window // loader.BLOCK)
        assert len(blocks) <= WINDOW // loader.BLOCK + 2  # the last is shorter
        assert len(window) < 50 or (np.abs(np.diff(window)) > 1).mean() > 0.9


def test_the_order_of_blocks_is_that_of_one_rank_and_can_be_resumed(pictures, monkeypatch):
    monkeypatch.setattr(loader, "BLOCK", 4)
    annotations, augment = pictures(60), AugmentSettings(augment="none", shuffle="blocks:16")

    def batches(workers=0):
        settings = ImageSettings(image_size=SIZE, batch_size=8, workers=workers)
        return Batches(annotations, settings, augment=augment, shuffle=True, seed=5)

    alone = seen(batches())
    assert [*chain(*alone)] == loader.shuffled(60, 5, 0, 16).tolist()
    assert seen(batches(workers=1)) == alone
    assert [pictures_in(batch) for batch in batches().epoch(0, start=3)] == alone[3:]
    shares = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        shares.append(seen(batches()))
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(b) for b in alone]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("start", [0, 3])
def test_a_rank_reads_ahead_what_it_will_need_in_the_order_of_the_disk(ranks, start, monkeypatch):
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        sampler = loader.RankSampler(1000, 32, shuffle=True, seed=0, window=256)  # 8 steps
        sampler.set_epoch(0, start)
        shares = list(sampler)
        windows = [
            shares[: 8 - start],
            *(shares[i : i + 8] for i in range(8 - start, len(shares), 8)),
        ]
        for now, later in pairwise(windows):
            ahead = np.concatenate([share.ahead for share in now])
            needed = np.sort(np.concatenate([share.indices for share in later]))
            assert np.array_equal(ahead, needed[len(needed) - len(ahead) :])
            assert len(ahead) >= len(needed) * (8 - start) // 8
        assert not any(len(share.ahead) for share in windows[-1])


def test_of_a_cache_that_is_larger_than_the_memory_a_message_tells(
    pictures, tmp_path, monkeypatch, capsys
):
    annotations, sizes = pictures(8), {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 8 * 3 * SIZE**2 - 1}
    monkeypatch.setattr(os, "sysconf", lambda name: sizes[name])
    options = {"cache_dir": tmp_path / "cache", "augment": "none"}
    batches_of(annotations, 4, shuffle=True, **options)
    assert "--shuffle blocks:64 reads them in an order that disks like" in capsys.readouterr().out
    sizes["SC_PAGE_SIZE"] += 1
    batches_of(annotations, 4, shuffle=True, **options)
    assert "--shuffle" not in capsys.readouterr().out


@pytest.mark.parametrize("augment", [None, "recipe"])
def test_the_image_cache_changes_no_pixel(augment, pictures, tmp_path):
    annotations = pictures(10)
    cached, read = (
        list(batches_of(annotations, 4, augment=augment, cache_dir=folder).epoch(0))
        for folder in (tmp_path / "cache", "")
    )
    assert list((tmp_path / "cache").glob("*/*.shard"))
    for one, other in zip(read, cached, strict=True):
        assert torch.equal(one.images, other.images)


def test_settings_reach_the_readers_of_files_and_of_the_cache(pictures, tmp_path):
    for folder in ("", str(tmp_path / "cache")):
        settings = ImageSettings(image_size=8, workers=0, cache_dir=folder, max_pixels=SIZE**2 - 1)
        with pytest.raises(DataError, match="more than the limit of 255"):
            list(Batches(pictures(2), settings).epoch(0))
    [batch] = Batches(pictures(2), ImageSettings(image_size=8, workers=0)).epoch(0)
    assert batch.images.shape == (2, 3, 8, 8)


# On one core too, where PyTorch advises against it.
two_workers = pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")


@two_workers
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_outlive_those_that_come_after(workers, pictures):
    annotations = pictures(40)
    options = {"augment": "recipe", "shuffle": True}
    alone = list(batches_of(annotations, 2, **options).epoch(0))
    held = list(batches_of(annotations, 2, **options, workers=workers).epoch(0))
    for one, other in zip(alone, held, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
        assert not other.images.is_shared()


@two_workers
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_write_into_a_batch_that_is_being_copied(workers, pictures, monkeypatch):
    annotations = pictures(20)
    copy = Batches._copy

    def copy_late(batches, tensor):
        time.sleep(0.02)  # workers finish all that they were asked for
        return copy(batches, tensor)

    monkeypatch.setattr(Batches, "_copy", copy_late)
    assert seen(batches_of(annotations, 2, workers=workers)) == [
        [i, i + 1] for i in range(0, 20, 2)
    ]


@two_workers
def test_an_epoch_that_was_left_does_not_reach_into_the_next(pictures):
    annotations = pictures(40)
    batches = batches_of(annotations, 2, shuffle=True, workers=2)
    for left in (1, 4, 7):
        for _ in zip(range(left), batches.epoch(0), strict=False):
            pass
        assert seen(batches, 1) == seen(batches_of(annotations, 2, shuffle=True), 1)


def test_time_spent_waiting_is_counted_but_for_the_first_batch(pictures, monkeypatch):
    now, read = [100.0], loader.read_squished

    def read_in_a_second(*arguments, **named):
        now[0] += 1
        return read(*arguments, **named)

    monkeypatch.setattr(loader, "read_squished", read_in_a_second)
    monkeypatch.setattr(loader, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    batches = batches_of(pictures(6), 2)
    for _ in batches.epoch(0):
        now[0] += 10  # a step, which is no waiting
    assert batches.waited == 4
    for _ in batches.epoch(1):
        pass
    assert batches.waited == 8


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_ranks_of_a_machine_share_the_memory_that_a_batch_needs(
    shuffle, ranks, pictures, monkeypatch
):
    nothing_free = shutil._ntuple_diskusage(100, 100, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nothing_free)
    as_rank(monkeypatch, 0, ranks)
    annotations = pictures(2).subset([0] * 1000)
    settings = ImageSettings(image_size=448, batch_size=128, workers=2)
    megabytes = round(5 * (128 // ranks) * (3 * 448**2 + 8) / 1e6)
    reason = rf"needs {megabytes} MB of shared memory and /dev/shm has 0: .*shm-size"
    with pytest.raises(UsageError, match=reason):
        Batches(annotations, settings, shuffle=shuffle)
    Batches(annotations, settings.replace(workers=0, image_size=8), shuffle=shuffle)


def test_the_memory_for_targets_counts(pictures, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10**6))
    annotations = pictures(2)
    settings = ImageSettings(image_size=8, workers=1, batch_size=1)
    Batches(annotations, settings)
    classes = tuple(f"class {i}" for i in range(600_000))
    many = Annotations.unlabelled(annotations.root, annotations.files, classes)
    with pytest.raises(UsageError, match="needs 1 MB"):
        Batches(many, settings)


def test_workers_end_with_their_batches_that_a_cycle_holds_together(pictures, capfd):
    batches = batches_of(pictures(6), 2, workers=1)
    before = set(multiprocessing.active_children())
    batches.cycle = [batches, batches.epoch(0)]  # as an exception and its traceback may
    next(batches.cycle[1])
    [worker] = set(multiprocessing.active_children()) - before
    del batches
    other = batches_of(pictures(6), 2, workers=1)  # its worker inherits what nothing refers to
    assert len(seen(other)) == 3
    gc.collect()
    assert not worker.is_alive()
    assert len(seen(other)) == 3
    assert "Exception ignored" not in capfd.readouterr().err


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"])
def test_a_process_with_workers_ends(end, pictures, tmp_path):
    """Python waits for its processes at exit, and workers ignore that it wants them to end."""
    pictures(4)
    script = tmp_path / "script.py"
    script.write_text(
        "from asl.data.annotations import Annotations\n"
        "from asl.images.decode import find_images\n"
        "from asl.images.loader import Batches\n"
        "from asl.images.settings import ImageSettings\n"
        f"annotations = Annotations.unlabelled(*find_images({str(tmp_path)!r}), ('a', 'b'))\n"
        f"batches = Batches(annotations, ImageSettings(batch_size=2, workers=1))\n"
        "epoch = batches.epoch(0)\n"
        f"next(epoch)\n{end}\n"
    )
    ended = subprocess.run([sys.executable, script], timeout=60, capture_output=True, text=True)
    assert ended.returncode == {"": 0, "raise SystemExit(3)": 3}.get(end, 1), ended.stderr
    assert ("ZeroDivisionError" in ended.stderr) == (end == "1 / 0")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_an_error_of_one_line_that_names_it(workers, pictures, capfd):
    annotations = pictures(8, bad=[3])
    for bad_images in ("error", "skip"):
        options = {"augment": "none", "bad_images": bad_images}
        with pytest.raises(DataError) as error:
            seen(batches_of(annotations, 2, workers=workers, **options))
        assert str(error.value).count("3.png: cannot be decoded") == 1
        assert "Traceback" not in str(error.value) + capfd.readouterr().err


def test_an_unreadable_image_of_a_validation_set_is_an_error(pictures):
    with pytest.raises(DataError, match=r"3\.png"):
        seen(batches_of(pictures(200, bad=[3]), 8))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_skipped_image_is_replaced_by_the_same_other_one_each_time(
    cached, workers, pictures, tmp_path, caplog
):
    annotations = pictures(120, bad=[7])
    options = {"shuffle": True, "augment": "none", "bad_images": "skip"}
    if cached:
        options["cache_dir"] = tmp_path / "cache"
    good = batches_of(annotations, 16, **options)
    again = batches_of(annotations, 16, **options, workers=workers)
    with caplog.at_level(logging.WARNING):
        first, second = seen(good, epoch=1), seen(again, epoch=1)
        seen(good, epoch=2)  # which says nothing new
    assert first == second
    pictures_seen = sorted(chain(*first))
    assert len(pictures_seen) == 120
    assert 7 not in pictures_seen
    assert len(set(pictures_seen)) == 119
    assert caplog.text.count("1 images cannot be read and were replaced: ") == 2
    assert "7.png" in caplog.text


def test_a_replacement_brings_its_own_labels_and_is_drawn_by_seed_epoch_and_index(pictures):
    annotations = pictures(200, bad=[7, 8])
    for seed, epoch in ((0, 0), (0, 1), (1, 1)):
        options = {"augment": "none", "bad_images": "skip", "seed": seed}
        [batch] = batches_of(annotations, 200, **options).epoch(epoch)
        found = pictures_in(batch)
        assert batch.targets.tolist() == [[i >> bit & 1 for bit in range(8)] for i in found]
        # As in versions before this one, which a run that is resumed goes on with.
        for bad in (7, 8):
            drawn = np.random.default_rng([seed, epoch, bad]).integers(200, size=100)
            assert found[bad] == drawn[0]


def test_a_replacement_that_cannot_be_read_either_is_replaced_by_the_next(pictures):
    drawn = np.random.default_rng([0, 0, 7]).integers(200, size=100).tolist()
    options = {"augment": "none", "bad_images": "skip"}
    [batch] = batches_of(pictures(200, bad=[7, drawn[0]]), 200, **options).epoch(0)
    assert pictures_in(batch)[7] == drawn[1]


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"), [(8, 1, 8), (64, 1, 16), (64, 8, 8), (4, 8, 1), (10, 3, 3)]
)
def test_the_ranks_of_a_machine_share_its_cores(cores, ranks, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert loader.default_workers() == workers


@pytest.mark.parametrize(("count", "raises"), [(200, False), (199, True)])
def test_one_percent_of_the_images_may_be_unreadable_and_no_more(count, raises, pictures):
    batches = batches_of(pictures(count, bad=[5, 50]), 8, augment="none", bad_images="skip")
    if raises:
        with pytest.raises(
            DataError, match=r"2 of 199 images cannot be read, more than 1 %; .*png"
        ):
            seen(batches)
    else:
        assert len(list(chain(*seen(batches)))) == count


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_workers_give_way_only_to_a_model_on_the_same_cores(device, pictures):
    batches = batches_of(pictures(4), 2, workers=1, device=torch.device(device))
    next(iter(batches._loader))
    own = os.getpriority(os.PRIO_PROCESS, 0)
    workers = [worker.pid for worker in batches._loader._iterator._workers]
    nice = [os.getpriority(os.PRIO_PROCESS, pid) for pid in workers]
    assert nice == [19 if device == "cpu" else own]
