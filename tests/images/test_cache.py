import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asl.data.annotations import Annotations
from asl.errors import DataError, UsageError, reported
from asl.images.cache import HEADER, ImageCache
from asl.images.decode import read_image, squish

# On a machine of one core the loader warns that two workers are too many.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

N, SIZE = 40, 32
IMAGE = 3 * SIZE * SIZE


def annotate(root):
    files = np.array(sorted(os.fsencode(file.name) for file in root.iterdir()))
    return Annotations.unlabelled(root, files, ("a",))


@pytest.fixture
def annotations(tmp_path):
    """40 JPEGs of 30 x 24 px."""
    (tmp_path / "set").mkdir()
    random = np.random.default_rng(0)
    for number in range(N):
        picture = Image.fromarray(random.integers(256, size=(24, 30, 3), dtype=np.uint8))
        picture.save(tmp_path / "set" / f"{number:02}.jpg")
    return annotate(tmp_path / "set")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "images"


def files_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def read(cache, index):
    out = torch.empty(3, cache.size, cache.size, dtype=torch.uint8)
    cache.read(index, out)
    return out


def squished(annotations, index, size=SIZE):
    return squish(read_image(annotations.path(index)), size)


def assert_same_images(cache, annotations):
    assert len(cache) == len(annotations)
    for index in range(len(annotations)):
        assert torch.equal(read(cache, index), squished(annotations, index))


def modified(cache):
    return cache.path.stat().st_ino  # a file that is built anew is another one


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_gives_the_same_pixels_as_the_files(annotations, folder, workers):
    assert_same_images(ImageCache.open(folder, annotations, SIZE, workers=workers), annotations)


def test_the_cache_gives_the_same_pixels_as_photographs(voc_root, folder):
    root = voc_root / "VOC2007" / "JPEGImages"
    files = sorted(os.fsencode(file.name) for file in root.glob("*.jpg"))[::250]
    photographs = Annotations.unlabelled(root, np.array(files), ("a",))
    cache = ImageCache.open(folder, photographs, 448, workers=0)
    for index in range(len(photographs)):
        assert torch.equal(read(cache, index), squished(photographs, index, 448))


def test_forked_and_spawned_processes_read_from_a_cache_that_is_open(annotations, folder):
    cache = ImageCache.open(folder, annotations, SIZE, workers=0)
    read(cache, 0)
    assert wait(start(assert_same_images, cache, annotations)) == 0
    assert_same_images(pickle.loads(pickle.dumps(cache)), annotations)  # what spawning comes to


def test_a_cache_is_built_once_and_does_not_touch_the_random_state(annotations, folder, caplog):
    state = torch.get_rng_state()
    first = ImageCache.open(folder, annotations, SIZE, workers=2)
    again = ImageCache.open(folder, annotations, SIZE, workers=2)
    assert modified(first) == modified(again)
    assert files_in(folder) == [first.path.name]
    assert torch.equal(torch.get_rng_state(), state)
    assert not caplog.records


def test_a_data_set_may_move(annotations, folder, tmp_path):
    first = ImageCache.open(folder, annotations, SIZE, workers=0)
    shutil.copytree(tmp_path / "set", tmp_path / "elsewhere" / "set")
    moved = annotate(tmp_path / "elsewhere" / "set")
    assert ImageCache.open(folder, moved, SIZE, workers=0).path == first.path


@pytest.mark.parametrize("change", ["size", "order", "names", "name", "content", "decoder", "exif"])
def test_what_changes_the_pixels_changes_the_file(annotations, folder, monkeypatch, change):
    first, size = ImageCache.open(folder, annotations, SIZE, workers=0), SIZE
    if change == "size":
        size = 2 * SIZE
    elif change == "order":
        annotations = annotations.subset(range(N)[::-1])
    elif change == "names":
        annotations = annotations.subset(range(N - 1))
    elif change == "name":
        Path(annotations.path(17)).rename(annotations.root / "17b.jpg")
        annotations = annotate(annotations.root)
    elif change == "content":
        Image.new("RGB", (8, 8)).save(annotations.path(17))
    elif change == "decoder":
        monkeypatch.setattr("torchvision.__version__", "0.0")
    second = ImageCache.open(folder, annotations, size, workers=0, exif_rotate=change == "exif")
    assert files_in(folder) == sorted([first.path.name, second.path.name])
    assert first.path != second.path
    assert torch.equal(read(second, 17), squished(annotations, 17, size))


def test_a_cache_holds_images_turned_by_exif_where_that_is_wanted(annotations, folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(annotations.path(3)) as picture:
        picture.save(annotations.path(3), exif=exif)
    upright = squish(read_image(annotations.path(3), exif_rotate=True), SIZE)
    assert not torch.equal(upright, squished(annotations, 3))
    for exif_rotate, expected in ((True, upright), (False, squished(annotations, 3))):
        cache = ImageCache.open(folder, annotations, SIZE, workers=0, exif_rotate=exif_rotate)
        assert torch.equal(read(cache, 3), expected)


def test_any_picture_of_a_large_set_that_changes_its_size_changes_the_file(annotations, folder):
    for index in (1, 12_345, 24_999):
        rows = np.zeros(25_000, int)
        rows[index] = 17
        before = ImageCache(folder, annotations.subset(rows), SIZE).path
        content = Path(annotations.path(17)).read_bytes()
        Path(annotations.path(17)).write_bytes(content + b"\0")
        assert ImageCache(folder, annotations.subset(rows), SIZE).path != before
        Path(annotations.path(17)).write_bytes(content)
        assert ImageCache(folder, annotations.subset(rows), SIZE).path == before


def start(function, *arguments):
    """A process in a group of its own, as a shell's jobs are, that ends as the scripts do."""

    def run():
        os.setsid()
        with reported():
            function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait(process):
    process.join(60)
    return process.exitcode


def overwrite(path, place, content):
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        file.write(content)


DAMAGES = {
    "foreign": (lambda path: path.write_bytes(b"foreign" * 2000), "not the cache that its name"),
    "empty": (lambda path: path.write_bytes(b""), "not the cache that its name"),
    "cut short": (lambda path: os.truncate(path, HEADER + 5 * IMAGE), "bytes, not"),
    "wrong pixel": (lambda path: overwrite(path, HEADER + 4 * IMAGE + 9, b"?!"), "number 4"),
    "lost pixels": (lambda path: overwrite(path, HEADER, bytes(5 * IMAGE)), "number 0"),
    "wrong table": (lambda path: overwrite(path, -8, b"?!"), "damaged table"),
    "other cache": (lambda path: shutil.copy(*other_cache(path)), "not the cache that its name"),
}


def other_cache(path):
    other = annotate(path.parents[1] / "set").subset(range(N)[::-1])
    return ImageCache.open(path.parent, other, SIZE, workers=0).path, path


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_or_foreign_file_is_built_anew_with_a_warning(annotations, folder, caplog, kind):
    damage, reason = DAMAGES[kind]
    path = ImageCache.open(folder, annotations, SIZE, workers=0).path
    damage(path)
    caplog.clear()
    assert_same_images(ImageCache.open(folder, annotations, SIZE, workers=0), annotations)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(path) in caplog.text
    assert reason in caplog.text


def test_a_cache_that_is_cut_short_while_in_use_is_an_error(annotations, folder):
    cache = ImageCache.open(folder, annotations, SIZE, workers=0)
    os.truncate(cache.path, HEADER + 5 * IMAGE + 1)
    with pytest.raises(DataError, match="cut short"):
        read(cache, 5)


def test_too_little_disk_space_is_said_before_anything_is_built(annotations, folder, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    needed = HEADER + N * (IMAGE + 8) + 4
    with pytest.raises(UsageError, match=f"needs {needed:,} bytes, and 100,000 are free"):
        ImageCache.open(folder, annotations, SIZE, workers=0)
    assert not files_in(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_fills_up_is_an_error_and_leaves_nothing(annotations, folder, workers, capfd):
    def build():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        ImageCache.open(folder, annotations, SIZE, workers=workers)

    assert wait(start(build)) == UsageError.exit_code
    said = capfd.readouterr().err
    assert said.strip().endswith(": File too large")
    assert "Traceback" not in said
    assert not files_in(folder)


def test_a_folder_that_cannot_be_made_is_an_error(annotations, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Not a directory"):
        ImageCache.open(tmp_path / "file" / "folder", annotations, SIZE, workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_and_leaves_nothing(annotations, folder, workers, capfd):
    Path(annotations.path(33)).write_bytes(b"text")
    with pytest.raises(DataError, match=r"33\.jpg: not an image"):
        ImageCache.open(folder, annotations, SIZE, workers=workers)
    assert not files_in(folder)
    assert "Traceback" not in capfd.readouterr().err


def test_with_bad_skip_an_unreadable_image_is_an_error_when_it_is_read(annotations, folder):
    path, content = Path(annotations.path(33)), Path(annotations.path(33)).read_bytes()
    path.write_bytes(b"text" + bytes(len(content) - 4))
    for _ in ("built", "opened"):
        cache = ImageCache.open(folder, annotations, SIZE, workers=2, bad="skip")
        with pytest.raises(DataError, match=r"33\.jpg: not an image"):
            read(cache, 33)
        assert torch.equal(read(cache, 34), squished(annotations, 34))
    with pytest.raises(DataError, match=r"33\.jpg: not an image"):
        ImageCache.open(folder, annotations, SIZE, workers=2)
    path.write_bytes(content)
    assert_same_images(ImageCache.open(folder, annotations, SIZE, workers=2), annotations)


def test_the_pixel_limit_holds_for_the_cache(annotations, folder):
    with pytest.raises(DataError, match=r"00\.jpg: 30 x 24 pixels are more than"):
        ImageCache.open(folder, annotations, SIZE, workers=0, max_pixels=30 * 24 - 1)


@pytest.fixture
def start_slow_build(annotations, folder, tmp_path, monkeypatch):
    """Starts a build that takes so long for each image, in its own process; the file it logs to."""
    log = tmp_path / "log"
    seconds = []

    def read_slowly(*arguments):
        with log.open("a") as file:
            file.write("read\n")
        time.sleep(seconds[-1])
        return read_image(*arguments)

    monkeypatch.setattr("asl.images.cache.read_image", read_slowly)

    def build():
        # A background job of a shell, as the tests may be, starts with the signal ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert_same_images(ImageCache.open(folder, annotations, SIZE, workers=2), annotations)

    def start_build(seconds_per_image):
        seconds.append(seconds_per_image)
        return start(build)

    return start_build, log


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


def test_of_several_runs_one_builds_and_the_others_wait(start_slow_build, folder):
    start_build, log = start_slow_build
    assert [wait(run) for run in [start_build(0.02) for _ in range(4)]] == [0, 0, 0, 0]
    assert log.read_text().count("read") == N
    assert len(files_in(folder)) == 1


def test_an_interrupted_build_ends_quietly_and_leaves_nothing(start_slow_build, folder, capfd):
    start_build, log = start_slow_build
    run = start_build(1)
    wait_for(log.exists)
    os.killpg(run.pid, signal.SIGINT)
    assert wait(run) == 128 + signal.SIGINT
    assert "Traceback" not in capfd.readouterr().err
    assert not files_in(folder)


def test_a_killed_build_is_not_taken_for_a_cache_and_is_cleared_away(
    start_slow_build, annotations, folder, monkeypatch
):
    start_build, log = start_slow_build
    run = start_build(1)
    wait_for(log.exists)
    run.kill()
    run.join()
    monkeypatch.undo()
    assert [Path(name).suffix for name in files_in(folder)] == [".part"]
    cache = ImageCache.open(folder, annotations, SIZE, workers=0)
    assert files_in(folder) == [cache.path.name]
    assert_same_images(cache, annotations)
