import os
import stat
import threading

import pytest

from asl.atomic import replacing, write_result
from asl.errors import UsageError


@pytest.fixture
def synced(monkeypatch):
    """What is put on the disk, in order: the size of a file, or the names in a folder."""
    synced = []
    fsync = os.fsync

    def noting_fsync(descriptor):
        about = os.fstat(descriptor)
        if stat.S_ISDIR(about.st_mode):
            synced.append(sorted(entry.name for entry in os.scandir(descriptor)))
        else:
            synced.append(about.st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    return synced


def test_a_power_cut_after_the_end_leaves_the_new_file(synced, tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"before")
    with replacing(path) as file:
        file.write(b"the new one")
    # First the bytes, or the name may belong to an empty file. Then the folder with its new name.
    assert synced == [len(b"the new one"), ["last.pt"]]
    assert path.read_bytes() == b"the new one"


def test_the_old_file_is_there_until_the_block_ends(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"before")
    with replacing(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"before")

    def write_half():
        with replacing(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_being_written_is_hidden_and_in_the_same_folder(tmp_path):
    with replacing(tmp_path / "last.pt"):
        [draft] = tmp_path.iterdir()
        assert draft.name.startswith(".last.pt.")
        assert draft.name.endswith(".part")


def test_writers_of_the_same_file_do_not_mix_their_bytes(tmp_path):
    path = tmp_path / "list.bin"
    both_write = threading.Barrier(2)

    def write(letter):
        with replacing(path) as file:
            both_write.wait(30)
            file.write(letter * 100_000)
            both_write.wait(30)

    threads = [threading.Thread(target=write, args=[letter]) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in (b"a" * 100_000, b"b" * 100_000)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_another_folder_that_is_gone_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "gone" / "last.pt"):
        pass


def test_a_result_is_written_whole_into_a_folder_that_is_made(synced, tmp_path):
    path = tmp_path / "new" / "deeper" / "report.html"
    write_result(path, b"figures")
    assert path.read_bytes() == b"figures"
    write_result(path, b"others")
    assert path.read_bytes() == b"others"
    assert len(synced) == 4


@pytest.mark.parametrize(
    ("name", "reason"), [("", "directory"), ("file/report.html", "exists|Not")]
)
def test_a_result_that_cannot_be_written_is_an_error_of_one_line(name, reason, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=rf"cannot write {tmp_path}.*: .*({reason})") as error:
        write_result(tmp_path / name, b"figures")
    assert "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
