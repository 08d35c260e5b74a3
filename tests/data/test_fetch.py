"""Shards by address: fetched once, from a real server, and then read as those of a folder."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from asl.data.__main__ import main
from asl.data.fetch import fetched
from asl.data.readers import default_split, read, splits
from asl.data.readers.coco import coco
from asl.data.shards import write_shards
from asl.errors import DataError, UsageError, reported
from asl.evaluation.settings import ValidateConfig, trained_with
from asl.images.decode import read_image
from asl.models import checkpoint

SOURCE = Path(__file__).parents[2] / "src"
PATTERN = "{train-{000000..000001}.tar,val-000000.tar,classes.txt}"
FILES = ["classes.txt", "train-000000.tar", "train-000001.tar", "val-000000.tar"]


@pytest.fixture(scope="module")
def site(small_shapes, tmp_path_factory):
    """A folder with a set of shards of drawn shapes: two to train on, one to validate on."""
    root = tmp_path_factory.mktemp("site")
    for split in ("train", "val"):
        write_shards(coco(small_shapes, f"{split}2014"), split, root / "set", 20)
    return root


@pytest.fixture
def server(served, site):
    return served(site)


def names(server):
    return sorted(path.rpartition("/")[2] for path in server.asked)


def store(server):
    """The folder that files of the set are fetched into."""
    host = server.address.removeprefix("http://")
    return Path(os.environ["XDG_CACHE_HOME"]) / "asl/shards/http" / host / "set"


def fetching(pattern, **options):
    """A process that fetches these shards."""
    code = "import sys; from asl.data.fetch import fetched; print(fetched(sys.argv[1]))"
    command = [sys.executable, "-W", "error", "-c", code, pattern]
    return subprocess.Popen(command, cwd=SOURCE, text=True, **options)


def test_shards_by_address_are_those_of_a_folder(server, site):
    address = f"{server.address}/set/{PATTERN}"
    assert splits("webdataset", address) == splits("webdataset", site / "set") == ["train", "val"]
    for role in ("train", "val"):
        split = default_split("webdataset", address, role)
        data, expected = (read("webdataset", at, split) for at in (address, site / "set"))
        assert (data.classes, data.files.tolist()) == (expected.classes, expected.files.tolist())
        assert (data.dense() == expected.dense()).all()
        assert (read_image(data.path(3)) == read_image(expected.path(3))).all()
    assert names(server) == FILES  # each once


def test_they_can_be_looked_at_and_it_is_said_where_they_are(server, tmp_path, capsys):
    main("webdataset", f"{server.address}/set/{PATTERN}", output=tmp_path / "samples")
    out, err = capsys.readouterr()
    assert err.startswith(f"fetching 4 of 4 files into {store(server)}\n")
    assert "images              40 in " in out
    assert "images              20 in " in out
    pictures = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert pictures == ["webdataset_train.png", "webdataset_val.png"]


def test_what_is_there_is_not_fetched_again_but_what_was_not_asked_for_is_not_read(server, capsys):
    few = f"{server.address}/set/{{train-000001,val-000000}}.tar"
    assert len(read("webdataset", few, "train")) == 20
    assert capsys.readouterr().err.startswith(f"fetching 2 of 2 files into {store(server)}\n")
    assert len(read("webdataset", f"{server.address}/set/{PATTERN}", "train")) == 40
    assert capsys.readouterr().err.startswith(f"fetching 2 of 4 files into {store(server)}\n")
    server.shutdown()
    server.server_close()
    assert len(read("webdataset", few, "train")) == 20
    assert len(read("webdataset", few + "?signature=another", "train")) == 20
    assert names(server) == FILES


@pytest.mark.parametrize("between", ["::", ","])
def test_folders_of_shards_are_splits(server, site, between):
    for folder in ("train", "val"):
        (site / "folders" / folder).mkdir(parents=True, exist_ok=True)
        shard = site / "folders" / folder / "00.tar"
        shard.write_bytes((site / f"set/{folder}-000000.tar").read_bytes())
    parts = [f"{server.address}/folders/{folder}/00.tar" for folder in ("train", "val")]
    pattern = "::".join(parts) if between == "::" else f"{{{','.join(parts)}}}"
    assert splits("webdataset", pattern) == ["train", "val"]
    assert len(read("webdataset", pattern, "val")) == 20
    # One of them alone is drawn from, as its folder would be.
    drawn = [read("webdataset", parts[0], split) for split in ("train", "val")]
    assert sum(map(len, drawn)) == 20
    with pytest.raises(UsageError, match=r"set/val-0.tar would both be called set/val-0.tar"):
        fetched(f"{server.address}/{{a/set/val-0,b/set/val-0,set/val-1}}.tar")


def test_one_process_fetches_and_the_others_wait(server):
    store(server).mkdir(parents=True)
    with (store(server) / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = [
            fetching(
                f"{server.address}/set/{PATTERN}", stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for _ in range(2)
        ]
        for process in started:
            assert "another process fetches into" in process.stderr.readline()
        assert server.asked == []
    said = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sorted(err for _, err in said) == ["", f"fetching 4 of 4 files into {store(server)}\n"]
    [folder] = {out.splitlines()[-1] for out, _ in said}
    assert sorted(path.name for path in Path(folder).iterdir()) == FILES
    assert names(server) == FILES


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_fetch_that_is_stopped_goes_on_with_the_shard_where_it_was(server, number):
    may_end = threading.Event()

    def stall(handler, file):
        half(True)(handler, file)
        handler.wfile.flush()
        may_end.wait(60)

    server.instead["train-000001.tar"] = stall
    process = fetching(
        f"{server.address}/set/{PATTERN}", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not any(part.stat().st_size for part in store(server).glob(".train-000001.*.part")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == -number  # though the server says nothing
    may_end.set()
    there = {path.name for path in store(server).iterdir()}
    assert {name for name in there if name.endswith(".tar")} == {"train-000000.tar"}
    assert any(name.endswith(".part") for name in there) == (number == signal.SIGKILL)

    server.instead.clear()
    assert len(read("webdataset", f"{server.address}/set/{PATTERN}", "train")) == 40
    assert {path.name for path in store(server).iterdir()} == {*FILES, ".lock"}
    assert names(server) == sorted([*FILES, "train-000001.tar"])


def half(length):
    """An answer that ends early, though the server said how long the file is; None: it did not."""

    def answer(handler, file):
        content = file.read_bytes()
        handler.start(length and len(content))
        handler.wfile.write(content[: len(content) // 2])
        handler.close_connection = True

    return answer


def text(handler, file):
    handler.start(len(b"log in first"))
    handler.wfile.write(b"log in first")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (half(True), "curl ended with status 18: the transfer ended early"),
        (half(None), "what came is no tar file, or only the start of one"),
        (text, "what came is no tar file, or only the start of one"),
        (
            lambda handler, _: handler.send_error(404),
            "curl ended with status 22: the server has no",
        ),
        (
            lambda handler, _: handler.send_error(403),
            "curl ended with status 22: the server has no",
        ),
    ],
    ids=["half", "half of an unknown length", "text", "404", "403"],
)
def test_what_does_not_come_whole_is_an_error_and_no_file(server, answer, message):
    server.instead["train-000001.tar"] = answer
    with pytest.raises(DataError, match=rf"set/train-000001.tar cannot be fetched: {message}"):
        fetched(f"{server.address}/set/{PATTERN}")
    assert {path.name for path in store(server).iterdir()} == {".lock", "train-000000.tar"}
    server.instead.clear()
    assert len(read("webdataset", f"{server.address}/set/{PATTERN}", "train")) == 40


def test_an_error_is_one_line_of_the_script(server, capsys):
    with pytest.raises(SystemExit) as end, reported():
        main("webdataset", f"{server.address}/set/none-0.tar")
    assert end.value.code == 1
    _, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {server.address}/set/none-0.tar cannot be fetched: curl ended")


def test_a_host_that_is_gone_a_program_that_is_missing_and_a_full_disk_are_said(
    server, monkeypatch, tmp_path
):
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r"curl ended with status 7: the host takes no connections"):
        fetched(f"{server.address}/set/train-0.tar")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"gs://set/train-0.tar .*: gsutil is not installed\."):
        fetched("gs://set/train-0.tar")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot write into .*file/asl/shards: Not a directory"):
        fetched(f"{server.address}/set/train-0.tar")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("pipe:touch ran", "pipe:touch ran cannot be fetched, only what begins with ais, ftps, gs"),
        ("https://h/0.tar::pipe:touch ran", "pipe:touch ran cannot be fetched, only"),
        ("file:///data/0.tar", "file:///data/0.tar cannot be fetched, only what begins"),
        (
            "s3://set/0.tar",
            "s3://set/0.tar cannot be fetched, only .*download it, and name the fol",
        ),
        ("https://h/0.tar::/data/1.tar", "/data/1.tar cannot be fetched, only"),
        ("https://h/{0..1.tar", "is no pattern of addresses: Unbalanced braces"),
        ("https://h/${WDS_NONE}.tar", "is no pattern of addresses: missing environment variable"),
        ("https://h/{0}.tar", "braces without a comma or dots in them"),
        ("https://h/[0-9].tar", "brackets and blanks mean something else to curl"),
        ("https://h/0.tar.gz", r"0.tar.gz is no shard: name NAME.tar, or classes.txt"),
        ("https://h/../0.tar", "is no shard: .* and no .."),
    ],
)
def test_what_is_no_pattern_of_shards_is_refused(pattern, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        read("webdataset", pattern, "train")
    assert list(tmp_path.iterdir()) == []


def test_other_layouts_are_read_from_folders(server):
    message = r"coco is read from a folder: download http.* and name that\. .*--dataset webdataset"
    with pytest.raises(UsageError, match=message):
        read("coco", server.address, "train2014")
    with pytest.raises(UsageError, match=message):
        main("coco", server.address)
    assert server.asked == []


@pytest.mark.parametrize("data", ["https://h/0.tar", "pipe:touch ran", "/data/shards"])
def test_a_checkpoint_does_not_say_what_is_fetched(data, tmp_path):
    config = {"data": data, "dataset": "webdataset", "val_share": 0.5}
    checkpoint.save(tmp_path / "best.pt", {"model": {"w": torch.zeros(1)}, "config": config})
    known = trained_with(str(tmp_path / "best.pt"))
    assert known.get("data") == (data if data == "/data/shards" else None)
    assert ValidateConfig.of(**known).data.val_share == 0.5
