"""`Annotations` against the same thing done with a dense table."""

import tracemalloc
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from asl.data.annotations import Annotations, files_exist, without_missing
from asl.errors import DataError

N, C = 40, 7


@pytest.fixture(params=[0, -1], ids=["complete", "partial"])
def case(request):
    """Random cells, many of them given several times, and the dense table that they make."""
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, N - 1, 300), rng.integers(0, C, 300)
    values = rng.integers(-1, 2, 300)
    table = np.full((N, C), -9)
    np.maximum.at(table, (rows, columns), values)
    table[table == -9] = request.param
    files = np.array([f"{i % 3}/{i}.jpg".encode() for i in range(N)])
    classes = tuple("abcdefg")
    data = Annotations.from_cells(Path("x"), files, classes, rows, columns, values, request.param)
    return data, table


def test_the_largest_value_of_a_repeated_cell_stays(case):
    data, table = case
    np.testing.assert_array_equal(data.dense(), table)
    np.testing.assert_array_equal([data.labels(i) for i in range(N)], table)
    assert not (data.values == data.implied).any()
    assert (data.indptr.dtype, data.indices.dtype, data.values.dtype) == (
        np.int64,
        np.int32,
        np.int8,
    )


def test_counts_are_those_of_the_table(case):
    data, table = case
    for value in (1, 0, -1):
        np.testing.assert_array_equal(data.counts(value), (table == value).sum(axis=0))


def test_a_subset_has_the_rows_in_the_order_asked_for(case):
    data, table = case
    for rows in ([5, 39, 0, 5], table[:, 0] == 1, []):
        rows = np.asarray(rows, dtype=None if len(rows) else int)
        part = data.subset(rows)
        np.testing.assert_array_equal(part.dense(), table[rows])
        np.testing.assert_array_equal(part.files, data.files[rows])


def test_a_subset_of_no_rows_is_empty(case):
    data, _ = case
    for rows in ([], (), np.zeros(N, dtype=bool)):
        part = data.subset(rows)
        assert (len(part), part.dense().shape) == (0, (0, C))
    assert len(part.subset([])) == 0


def test_classes_are_picked_by_number(case):
    data, table = case
    part = data.with_classes([4, 0], ["E", "A"])
    assert part.classes == ("E", "A")
    np.testing.assert_array_equal(part.dense(), table[:, [4, 0]])


def test_no_cells_at_all_are_a_table_too():
    files = np.array([b"a", b"b"])
    assert Annotations.unlabelled(Path(), files, ("c",)).dense().tolist() == [[-1], [-1]]


@pytest.fixture
def on_disk(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.jpg", "sub/b.JPG", "sub/c.jpg"):
        (tmp_path / name).touch()
    return tmp_path


def listed(root, *names):
    files = np.array([name.encode() for name in names])
    return Annotations.from_cells(root, files, ("x",), range(len(names)), [0] * len(names), 1)


def test_missing_files_are_an_error_or_left_out(on_disk):
    data = listed(on_disk, "a.jpg", "no/z.jpg", "sub/c.jpg", "q.jpg")
    with pytest.raises(DataError, match=r"2 of 4 images are missing: .*/no/z.jpg, .*/q.jpg\. Use"):
        without_missing(data, "error")
    there, skipped = without_missing(data, "skip")
    assert (there.files.tolist(), skipped) == ([b"a.jpg", b"sub/c.jpg"], 2)
    assert without_missing(there, "error") == (there, 0)
    with pytest.raises(DataError, match=r"1 of 1 images are missing: .* the right folder"):
        without_missing(listed(on_disk, "q.jpg"), "skip")


def test_every_listed_file_is_found_in_folders_that_are_listed_in_parts(tmp_path, monkeypatch):
    """Repeated rows, names that are the beginning of others, and more names than are held."""
    monkeypatch.setattr("asl.data.annotations.AT_ONCE", 7)
    names = [f"{folder}/{'x' * (i % 5)}{i}.jpg" for i in range(60) for folder in ("a", "a/b", "c")]
    names += ["top.jpg", "none/1.jpg", "a/b", "c/a-name-longer-than-any-that-is-listed.jpg"]
    listed_names = names[:-1]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if number % 3 and name not in ("a/b", "none/1.jpg"):
            (tmp_path / name).touch()
    (tmp_path / "none").rmdir()
    rows = np.random.default_rng(0).permutation(2 * len(listed_names)) % len(listed_names)
    data = listed(tmp_path, *listed_names).subset(rows)
    expected = [(tmp_path / name.decode()).exists() for name in data.files.tolist()]
    assert 50 < sum(expected) < len(expected) - 50
    assert files_exist(data).tolist() == expected


def test_looking_for_files_takes_little_memory(tmp_path):
    """Python's names of a folder would take 95 bytes each, and a set of them more at its peak."""
    count = 30_000
    for number in range(count):
        (tmp_path / f"{number:016x}.jpg").touch()
    data = listed(tmp_path, *(f"{number:016x}.jpg" for number in range(count)))
    files_exist(data)
    tracemalloc.start()
    with patch("asl.data.annotations.AT_ONCE", 1000):
        assert files_exist(data).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * count


def look(rank, init, queue):
    """What a rank says of two files, of which its own folder may have one."""
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    data = listed(Path(init.removeprefix("file://")).parent / str(rank), "a.jpg", "b.jpg")
    left = without_missing(data, "skip")[0].files.tolist()
    try:
        without_missing(data, "error")
    except DataError as error:
        queue.put((rank, left, str(error)))
    torch.distributed.destroy_process_group()


def test_one_rank_looks_for_the_files_and_tells_the_others(tmp_path, answers_of_two_ranks):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "a.jpg").touch()
    answers = sorted(answers_of_two_ranks(look))
    assert [left for _, left, _ in answers] == [[b"a.jpg"], [b"a.jpg"]]
    assert ["1 of 2 images are missing" in said for _, _, said in answers] == [True, True]


def test_an_extension_in_the_other_case_is_pointed_out(on_disk):
    with pytest.raises(DataError, match=r"b.jpg \(there is b.JPG: upper and lower case count\)"):
        without_missing(listed(on_disk, "a.jpg", "sub/b.jpg"), "error")
