import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asl.data.annotations import Annotations
from asl.errors import DataError, UsageError, reported
from asl.images.cache import ImageCache, build, bytes_to_build, find, shards
from asl.images.decode import read_squished
from asl.images.settings import ImageSettings

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


def wanted(folder, **changed):
    return ImageSettings(**{"cache_dir": str(folder), "image_size": SIZE, **changed})


def opened(folder, annotations, *, workers=0, bad="error", **changed):
    return ImageCache.open(annotations, wanted(folder, **changed), workers=workers, bad=bad)


def files_in(folder):
    """All files but the locks, by the time they were made."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return sorted(files, key=lambda path: path.stat().st_ctime_ns)


def read(cache, index):
    out = torch.empty(3, cache.kind.size, cache.kind.size, dtype=torch.uint8)
    cache.read(index, out)
    return out


def assert_same_images(cache, annotations):
    assert len(cache) == len(annotations)
    for index in range(len(annotations)):
        expected = read_squished(annotations.path(index), cache.settings)
        assert torch.equal(read(cache, index), expected)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the pictures that builds in this process have decoded."""
    names = []

    def note(path, *arguments):
        names.append(Path(path).name)
        return read_squished(path, *arguments)

    monkeypatch.setattr(build, "read_squished", note)
    return names


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 8 images."""
    monkeypatch.setattr(build, "SHARD_BYTES", 8 * IMAGE)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_gives_the_same_pixels_as_the_files(annotations, folder, workers):
    assert_same_images(opened(folder, annotations, workers=workers), annotations)


@pytest.fixture
def photographs(voc_root):
    """Some twenty of VOC."""
    root = voc_root / "VOC2007" / "JPEGImages"
    files = sorted(os.fsencode(file.name) for file in root.glob("*.jpg"))[::250]
    return Annotations.unlabelled(root, np.array(files), ("a",))


def test_the_cache_gives_the_same_pixels_as_photographs(photographs, folder):
    assert_same_images(opened(folder, photographs, image_size=448), photographs)


def test_forked_and_spawned_processes_read_from_a_cache_that_is_open(
    annotations, folder, small_shards
):
    cache = opened(folder, annotations)
    read(cache, 0)
    assert wait(start(assert_same_images, cache, annotations)) == 0
    assert_same_images(pickle.loads(pickle.dumps(cache)), annotations)  # what spawning comes to


def test_reading_ahead_asks_for_the_bytes_of_each_image(annotations, folder, monkeypatch):
    cache, asked = opened(folder, annotations), []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: asked.append(arguments[1:]), False)
    cache.read_ahead(np.array([3, 7]))
    rows = shards.Shard.load(files_in(folder)[0]).rows
    assert [place[:2] for place in asked] == [(rows["offset"][i], IMAGE) for i in (3, 7)]


def test_a_process_keeps_few_of_many_shards_open(annotations, folder, monkeypatch, small_shards):
    monkeypatch.setattr("asl.images.cache.OPEN_SHARDS", 2)
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    cache = opened(folder, annotations)
    for _ in range(2):
        assert_same_images(cache, annotations)
    assert len(os.listdir("/dev/fd")) == before + 2  # noqa: PTH208
    assert len(files_in(folder)) == 5


def test_a_cache_is_built_once_and_does_not_touch_the_random_state(annotations, folder, caplog):
    state = torch.get_rng_state()
    opened(folder, annotations, workers=2)
    built = files_in(folder)
    opened(folder, annotations, workers=2)
    assert files_in(folder) == built
    assert len(built) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert not caplog.records


def test_the_size_is_told_before_it_is_built(annotations, folder, capsys):
    needed = bytes_to_build(annotations, wanted(folder))
    assert needed == N * IMAGE
    assert not folder.exists()
    opened(folder, annotations.subset(range(30)))
    assert (
        f"30 images of {SIZE} px as raw, 0.00 GB, are added to {folder}" in capsys.readouterr().out
    )
    assert bytes_to_build(annotations, wanted(folder)) == 10 * IMAGE


def test_files_of_the_first_edition_are_named_when_something_is_built(annotations, folder, caplog):
    folder.mkdir()
    (folder / "train2014-448px-0123456789abcdef.images").write_bytes(bytes(100))
    opened(folder, annotations)
    assert f"{folder} holds 1 files of an earlier version" in caplog.text
    caplog.clear()
    opened(folder, annotations)
    assert not caplog.records


def test_a_data_set_may_move_with_the_times_of_its_files(annotations, folder, tmp_path, decoded):
    opened(folder, annotations)
    shutil.copytree(tmp_path / "set", tmp_path / "elsewhere")  # which keeps them, as cp -a does
    assert_same_images(opened(folder, annotate(tmp_path / "elsewhere")), annotations)
    assert len(decoded) == N


def test_splits_and_simulations_share_images_and_new_ones_are_appended(
    annotations, folder, decoded
):
    opened(folder, annotations.subset(range(0, 30)))
    assert len(decoded) == 30
    for rows in (range(30)[::-1], range(10, 20), [5, 5, 7]):
        assert_same_images(opened(folder, annotations.subset(rows)), annotations.subset(rows))
    assert len(decoded) == 30
    first = files_in(folder)
    assert_same_images(opened(folder, annotations), annotations)
    assert decoded[30:] == [f"{number}.jpg" for number in range(30, N)]
    assert files_in(folder)[:1] == first


@pytest.mark.parametrize("change", ["content", "time", "name"])
def test_a_file_that_changes_is_decoded_anew_and_no_other(annotations, folder, decoded, change):
    opened(folder, annotations)
    path, before = Path(annotations.path(17)), Path(annotations.path(17)).stat()
    if change == "content":
        Image.new("RGB", (8, 8)).save(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "time":
        path.write_bytes(path.read_bytes())
    else:
        path.rename(path.with_name("17b.jpg"))
    annotations = annotate(annotations.root)
    del decoded[:]
    for _ in range(2):
        assert_same_images(opened(folder, annotations), annotations)
    assert decoded == ["17b.jpg" if change == "name" else "17.jpg"]


def test_two_data_sets_may_call_different_pictures_by_one_name(annotations, folder, tmp_path):
    (tmp_path / "other").mkdir()
    for index in (3, 4):
        picture = Image.new("RGB", (30, 24), (index, 0, 0))
        picture.save(tmp_path / "other" / Path(annotations.path(index)).name)
    other = annotate(tmp_path / "other")
    for _ in range(2):
        for each in (annotations, other):
            assert_same_images(opened(folder, each), each)


@pytest.mark.parametrize("change", ["size", "exif", "draft", "decoder"])
def test_what_changes_the_pixels_goes_into_another_folder(annotations, folder, monkeypatch, change):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(annotations.path(3)) as picture:
        picture.save(annotations.path(3), exif=exif)
    first = read(opened(folder, annotations), 3)
    changed = {
        "size": {"image_size": 2 * SIZE},
        "exif": {"exif_rotate": True},
        "draft": {"draft_decode": True},
    }.get(change, {})
    if change == "decoder":
        shards.fingerprint.cache_clear()
        monkeypatch.setattr(
            shards, "read_squished", lambda *arguments: read_squished(*arguments) ^ 1
        )
    for settings in ({}, changed):
        cache = opened(folder, annotations, **settings)
        assert_same_images(cache, annotations)
    assert len({path.parent for path in files_in(folder)}) == 2
    shards.fingerprint.cache_clear()
    assert change in ("draft", "decoder") or not torch.equal(first, read(cache, 3)[:, :SIZE, :SIZE])


def test_the_fingerprint_is_that_of_pixels_and_not_of_versions(monkeypatch):
    usual = shards.fingerprint(False, False)
    shards.fingerprint.cache_clear()
    for module in ("torch", "torchvision", "PIL"):
        monkeypatch.setattr(f"{module}.__version__", "0.0")
    assert shards.fingerprint(False, False) == usual


def test_keys_of_paths_differ_and_do_not_depend_on_the_longest_path():
    files = [
        b"a",
        b"b",
        b"a/b",
        b"1234567",
        b"12345678",
        b"123456789",
        b"12345678/12345678",
        b"x" * 99,
    ]
    files += [b"train_%d/%08x.jpg" % (number % 7, number) for number in range(100_000)]
    keys = shards.path_keys(np.array(files))
    assert len(set(keys.tolist())) == len(files)
    assert [shards.path_keys(np.array([file]))[0] for file in files[:10]] == keys[:10].tolist()


def test_of_a_large_set_files_are_looked_at_where_one_of_a_sample_differs(
    annotations, folder, monkeypatch
):
    monkeypatch.setattr(find, "LOOKED_AT", 10)  # every fourth
    opened(folder, annotations)
    looks = []
    stat = os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, **more: looks.append(str(path)) or stat(path, **more)
    )

    def looked_at():
        del looks[:]
        cache = opened(folder, annotations)
        found = sum(str(annotations.root) in look for look in looks)
        assert_same_images(cache, annotations)
        return found

    assert looked_at() == 10
    for index in (17, 20):
        Image.new("RGB", (8, 8)).save(annotations.path(index))
    assert looked_at() == N
    assert looked_at() == 11  # those of which there are two are looked at always


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


def damaged_image(path):
    """The second image of the shard, which is one that is looked at."""
    overwrite(path, shards.Shard.load(path).rows["offset"][2] + 9, b"?!")


DAMAGES = {
    "foreign": (lambda path: path.write_bytes(b"foreign" * 2000), "no header of a shard"),
    "empty": (lambda path: path.write_bytes(b""), "no header of a shard"),
    "cut short": (lambda path: os.truncate(path, 8192 + 5 * IMAGE), "was cut short"),
    "cut in the table": (lambda path: os.truncate(path, 4200), "damaged table"),
    "wrong pixel": (damaged_image, "damaged image (at byte "),
    "wrong table": (lambda path: overwrite(path, 4100, b"?!"), "damaged table"),
    "other cache": (lambda path: shutil.copy(other_cache(path), path), "belongs into a folder 8px"),
}


def other_cache(path):
    before = {*files_in(path.parents[1])}
    opened(path.parents[1], annotate(path.parents[2] / "set"), image_size=8)
    [made] = {*files_in(path.parents[1])} - before
    return made


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_or_foreign_shard_alone_is_built_anew_with_a_warning(
    annotations, folder, caplog, decoded, kind, small_shards
):
    damage, reason = DAMAGES[kind]
    opened(folder, annotations)
    path = next(
        path for path in files_in(folder) if shards.Shard.load(path).names.find(b"\x0013.jpg") > 0
    )
    damage(path)
    caplog.clear()
    del decoded[:]
    assert_same_images(opened(folder, annotations), annotations)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(path) in caplog.text
    assert reason in caplog.text
    assert decoded == [f"{number:02}.jpg" for number in range(8, 16)]
    assert not path.exists()


def test_a_cache_that_is_cut_short_while_in_use_is_an_error(annotations, folder):
    cache = opened(folder, annotations)
    os.truncate(files_in(folder)[0], 8192 + 5 * IMAGE + 1)
    with pytest.raises(DataError, match="cut short"):
        read(cache, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_jpegs_are_nearly_the_same_pixels_in_a_fraction_of_the_space(photographs, folder, workers):
    raw, better, worse = (
        opened(folder, photographs, image_size=224, cache_format=each, workers=workers)
        for each in ("raw", "jpeg:95", "jpeg:50")
    )
    off = []
    for cache in (raw, better, worse):
        pairs = [(read(cache, index), read(raw, index)) for index in range(len(photographs))]
        off.append(np.mean([(a.int() - b.int()).abs().float().mean() for a, b in pairs]))
    assert off[0] == 0 < off[1] < 2 < off[2] < 8
    sizes = [path.stat().st_size for path in files_in(folder)]
    assert sizes[0] > 5 * sizes[1] > 10 * sizes[2]
    image = torch.empty(224, 224, 3, dtype=torch.uint8).permute(2, 0, 1)
    better.read(0, image)
    assert torch.equal(image, read(better, 0))


def test_the_space_for_jpegs_is_estimated_from_some(photographs, folder):
    settings = wanted(folder, image_size=224, cache_format="jpeg:95")
    needed = bytes_to_build(photographs, settings)
    ImageCache.open(photographs, settings, workers=0)
    [shard] = files_in(folder)
    assert needed == pytest.approx(shard.stat().st_size, rel=0.2)


def test_a_jpeg_that_is_damaged_is_an_error_where_it_is_read(annotations, folder):
    cache = opened(folder, annotations, cache_format="jpeg:95")
    [path] = files_in(folder)
    overwrite(path, int(shards.Shard.load(path).rows["offset"][1]), bytes(300))
    with pytest.raises(DataError, match="has a damaged image: to build it anew, remove it"):
        read(cache, 1)


@pytest.mark.parametrize("wrong", ["png", "jpeg:0", "jpeg:101", "jpeg", "rawer"])
def test_a_format_that_is_none_is_refused(folder, wrong):
    with pytest.raises(UsageError, match="cache_format"):
        wanted(folder, cache_format=wrong)
    with pytest.raises(UsageError, match="there is no cache_dir"):
        ImageSettings(cache_format="jpeg:90")


def command(*arguments):
    """What the command says, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "asl.images.cache", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(build.__file__).parents[3])},
    )
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr, done.returncode


def test_the_command_lists_verifies_and_prunes(annotations, folder, small_shards, tmp_path):
    opened(folder, annotations)
    opened(folder, annotations, image_size=8)
    said, code = command(folder)
    assert code == 0
    assert f"40 images, 0.00 GB in 5 shards, of {annotations.root}" in said
    assert "8px-raw" in said

    first = next(path for path in files_in(folder) if path.parent.name.startswith("32"))
    rows = shards.Shard.load(first).rows
    overwrite(first, int(rows["offset"][5]) + 3, b"?!")  # not one that every opening looks at
    assert command(folder)[1] == 0
    said, code = command(folder, "--verify")
    assert code == DataError.exit_code
    assert f"{first} has a damaged image (at byte {rows['offset'][5]:,})\n" in said

    (folder / "train-448px-0.images").touch()
    (first.parent / f".{'0' * 32}.shard.1.part").touch()
    for index in range(8, 16):  # a data set that is not there is no reason: it may be mounted again
        Path(annotations.path(index)).unlink()
    shutil.move(annotations.root, tmp_path / "away")
    assert "removed" in command(folder, "--verify", "--prune")[0]
    assert len(files_in(folder)) == 5
    shutil.move(tmp_path / "away", annotations.root)
    assert "no picture that is as it was: removed" in command(folder, "--prune")[0]
    assert len(files_in(folder)) == 4
    assert command(folder) == (command(folder, "--prune")[0], 0)
    assert command(tmp_path / "none")[1] == UsageError.exit_code


def test_shards_of_other_decoders_are_pruned(annotations, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shards, "fingerprint", lambda *_: "0123456789abcdef")
        opened(folder, annotations)
    opened(folder, annotations)
    said, code = command(folder)
    assert code == DataError.exit_code
    assert "was made by other decoders\n" in said
    command(folder, "--prune")
    assert_same_images(opened(folder, annotations), annotations)
    assert len(files_in(folder)) == 1


def test_too_little_disk_space_is_said_before_anything_is_built(annotations, folder, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    needed = N * IMAGE
    with pytest.raises(UsageError, match=f"needs {needed:,} bytes more, and 100,000 are free"):
        opened(folder, annotations)
    assert not files_in(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_fills_up_is_an_error_and_leaves_no_draft(annotations, folder, workers, capfd):
    def build():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        opened(folder, annotations, workers=workers)

    assert wait(start(build)) == UsageError.exit_code
    said = capfd.readouterr().err
    assert said.strip().endswith(": File too large")
    assert "Traceback" not in said
    assert not files_in(folder)


def test_a_folder_that_cannot_be_made_is_an_error(annotations, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Not a directory"):
        opened(tmp_path / "file" / "folder", annotations)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_and_what_is_complete_stays(
    annotations, folder, workers, capfd, small_shards, decoded
):
    content = Path(annotations.path(33)).read_bytes()
    Path(annotations.path(33)).write_bytes(b"text")
    with pytest.raises(DataError, match=r"33\.jpg: not an image"):
        opened(folder, annotations, workers=workers)
    assert [path.suffix for path in files_in(folder)] == [".shard"] * 4
    assert "Traceback" not in capfd.readouterr().err
    Path(annotations.path(33)).write_bytes(content)
    del decoded[:]
    assert_same_images(opened(folder, annotations), annotations)
    assert decoded == [f"{number}.jpg" for number in range(32, 40)]


def test_with_bad_skip_an_unreadable_image_is_an_error_when_it_is_read(annotations, folder):
    path, content = Path(annotations.path(33)), Path(annotations.path(33)).read_bytes()
    path.write_bytes(b"text" + bytes(len(content) - 4))
    for _ in ("built", "opened"):
        cache = opened(folder, annotations, workers=2, bad="skip")
        with pytest.raises(DataError, match=r"33\.jpg: not an image"):
            read(cache, 33)
        assert torch.equal(read(cache, 34), read_squished(annotations.path(34), cache.settings))
    assert len(files_in(folder)) == 1
    with pytest.raises(DataError, match=r"33\.jpg: not an image"):
        opened(folder, annotations, workers=2)
    path.write_bytes(content)
    assert_same_images(opened(folder, annotations, workers=2), annotations)


def test_the_pixel_limit_holds_for_the_cache(annotations, folder):
    with pytest.raises(DataError, match=r"00\.jpg: 30 x 24 pixels are more than"):
        opened(folder, annotations, max_pixels=30 * 24 - 1)


@pytest.fixture
def start_slow_build(annotations, folder, tmp_path, monkeypatch):
    """Starts a build that takes so long for each image, in its own process; the file it logs to."""
    log = tmp_path / "log"
    seconds = []

    def read_slowly(*arguments):
        with log.open("a") as file:
            file.write("read\n")
        time.sleep(seconds[-1])
        return read_squished(*arguments)

    monkeypatch.setattr(build, "read_squished", read_slowly)

    def build_slowly():
        # A background job of a shell, as the tests may be, starts with the signal ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert_same_images(opened(folder, annotations, workers=2), annotations)

    def start_build(seconds_per_image):
        seconds.append(seconds_per_image)
        return start(build_slowly)

    return start_build, log


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


def test_several_runs_build_disjoint_shards_together(start_slow_build, folder, small_shards):
    start_build, log = start_slow_build
    assert [wait(run) for run in [start_build(0.02) for _ in range(3)]] == [0, 0, 0]
    assert log.read_text().count("read") == N
    assert len(files_in(folder)) == 5


def test_a_run_waits_for_what_others_build_and_takes_only_the_rest(
    start_slow_build, annotations, folder, capfd
):
    start_build, log = start_slow_build
    run = start_build(0.05)
    wait_for(log.exists)
    assert_same_images(opened(folder, annotations.subset(range(10))), annotations.subset(range(10)))
    assert log.read_text().count("read") == N
    assert "waiting for another run" in capfd.readouterr().out
    assert wait(run) == 0


def test_an_interrupted_build_ends_quietly_and_leaves_nothing(start_slow_build, folder, capfd):
    start_build, log = start_slow_build
    run = start_build(0.1)
    wait_for(log.exists)
    os.killpg(run.pid, signal.SIGINT)
    assert wait(run) == 128 + signal.SIGINT
    assert "Traceback" not in capfd.readouterr().err
    assert not files_in(folder)


def test_a_killed_build_goes_on_where_it_stopped_and_its_draft_is_cleared_away(
    start_slow_build, annotations, folder, monkeypatch, small_shards
):
    start_build, log = start_slow_build
    run = start_build(0.05)
    wait_for(lambda: len(files_in(folder)) >= 3)
    run.kill()
    run.join()
    killed = files_in(folder)
    assert {path.suffix for path in killed} == {".shard", ".part"}
    before = log.read_text().count("read")
    assert_same_images(opened(folder, annotations), annotations)
    assert log.read_text().count("read") - before == N - 8 * (len(killed) - 1)
    assert [path.suffix for path in files_in(folder)] == [".shard"] * 5
