"""The file of the prior."""

import numpy as np
import pytest
import torch

from asl.data.prior import read_prior, write_prior
from asl.errors import DataError, UsageError

CLASSES = ("person", "sofa", "dining table", "dog, puppy")
PRIOR = torch.tensor([0.55, 1 / 3, 0.0, 1e-7])


def file(path, *rows, header="Classes,avg_pred"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_what_is_written_is_read_back_to_the_bit(tmp_path):
    path = tmp_path / "new" / "prior.csv"
    write_prior(path, CLASSES, PRIOR.double())
    assert path.read_text().splitlines()[:2] == ["Classes,avg_pred", "person,0.55"]
    prior = read_prior(path, CLASSES)
    assert prior.dtype == torch.float32
    assert torch.equal(prior, PRIOR)


def test_any_name_of_a_class_is_read_back(tmp_path):
    names = ("a\nb", "c\r\nd", "e\rf", "g\u2028h", "\x0bi", '"j"', " k ", "l,m", "'n", "é", "7")
    prior = torch.linspace(0, 1, len(names))
    write_prior(tmp_path / "prior.csv", names, prior)
    for order in (names, names[::-1]):
        expected = prior[[names.index(name) for name in order]]
        assert torch.equal(read_prior(tmp_path / "prior.csv", order), expected)
    broken = "a\nb"
    with pytest.raises(DataError, match=r"row 2: 'a\\nb' is not a class"):
        read_prior(tmp_path / "prior.csv", [name for name in names if name != broken])


def test_every_value_is_read_back_to_the_bit(tmp_path):
    random = np.random.default_rng(0)
    values = 10.0 ** -random.uniform(0, 44, 3000)
    prior = torch.tensor([*values, 0.0, 1.0]).float()
    names = [f"class {number}" for number in range(len(prior))]
    write_prior(tmp_path / "prior.csv", names, prior)
    assert torch.equal(read_prior(tmp_path / "prior.csv", names), prior)


def test_rows_are_matched_by_name_in_any_order(tmp_path):
    rows = ["3,diningtable,0.3", "", "0,couch,0.2", "1,Person,1"]
    path = file(tmp_path / "a.csv", *rows, header=",Classes,avg_pred")
    np.testing.assert_allclose(read_prior(path, CLASSES[:3]), [1, 0.2, 0.3])


@pytest.mark.parametrize("stray", [",0.1", "80,0.1", "80", ",", " ,x"])
def test_a_last_row_without_a_class_is_ignored_and_said_so(tmp_path, stray, caplog):
    path = file(tmp_path / "a.csv", "dog,0.5", "cat,0.25", stray)
    assert read_prior(path, ["cat", "dog"]).tolist() == [0.25, 0.5]
    assert f"{path}: row 4 has no class and is ignored: {stray}" in caplog.text


def test_a_class_may_be_called_by_a_number(tmp_path):
    path = file(tmp_path / "a.csv", "1,0.5", "2,0.25")
    assert read_prior(path, ["1", "2"]).tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["cat,0.5"], "1 of 2 classes have no match: dog"),
        (["cat,0.5", "fog,0.5"], "no match: dog .*fog"),
        (["cat,0.5", "dog,0.5", "cow,0.1"], "row 4: 'cow' is not a class"),
        (["cat,0.5", "dog,0.5", "cat,0.1"], "row 4: 'cat' is already in row 2"),
        ([",0.5", "cat,0.5", "dog,0.5"], "row 2: '' is not a class"),
        (["cat,half", "dog,0.5"], "row 2, cat: 'half' is not a number from 0 to 1"),
        (["cat,0.5", "dog,"], "row 3, dog: '' is not a number"),
        (["cat,0.5", "dog,nan"], "row 3, dog: 'nan' is not a number"),
        (["cat,0.5", "dog,1.5"], "row 3, dog: '1.5' is not a number"),
        (["cat,0.5", "dog,-0.1"], "row 3, dog: '-0.1' is not a number"),
        (["cat,0.5", "dog"], "row 3 has 1 cells, not 2"),
        (["cat,0.5", f"{'dog' * 50_000},1"], "line 3: field larger than field limit"),
        (["cat,0.5", '"dog,1'], "line 3: unexpected end of data"),
        ([], "2 of 2 classes have no match"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, rows, message):
    path = file(tmp_path / "a.csv", *rows)
    with pytest.raises(DataError, match=message) as raised:
        read_prior(path, ["cat", "dog"])
    assert str(raised.value).startswith(str(path))


def test_a_file_of_another_kind_is_told(tmp_path):
    with pytest.raises(DataError, match=r"'cat,0\.5', not 'Classes,avg_pred'"):
        read_prior(file(tmp_path / "a.csv", header="cat,0.5"), ["cat"])
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match="the header is ''"):
        read_prior(tmp_path / "a.csv", ["cat"])
    with pytest.raises(DataError, match="is not there"):
        read_prior(tmp_path / "b.csv", ["cat"])
    with pytest.raises(UsageError, match="cannot write"):
        write_prior(tmp_path / "a.csv" / "b.csv", CLASSES, PRIOR)
