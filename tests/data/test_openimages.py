"""The Open Images reader, on small CSVs in the layout and under the names of V6."""

import numpy as np
import pytest

from asl.data.readers.openimages import openimages, splits
from asl.errors import DataError, UsageError

A, B, D = "000026e7ee790996", "ffff6e7ee7909960", "0a00000000000001"
HEADER = "ImageID,Source,LabelName,Confidence\n"
HUMAN = f"""{B},verification,/m/cat,1
{A},verification,/m/dog,0
{A},crowdsource-verification,/g/11ant,1
{A},verification,/m/other,1
{D},verification,/m/other,0
{B},verification,/m/dog,0
{B},crowdsource-verification,/m/dog,1
"""
MACHINE = f"""{A},machine,/m/dog,0.9
{A},machine,/m/cat,0.5
{B},machine,/g/11ant,0.4
{D},machine,/m/cat,1
{D},machine,/m/other,0.8
"""


def write(root, human=HUMAN, split="train", prefix="oidv6-", classes="/g/11ant\n/m/dog\n/m/cat\n"):
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{prefix}{split}-annotations-human-imagelabels.csv"
    path.write_text(HEADER + human)
    (root / "oidv6-classes-trainable.txt").write_text(classes)
    return path


def rows(data):
    return dict(zip([name.decode() for name in data.files], data.dense().tolist(), strict=True))


def test_what_nobody_verified_is_not_annotated(tmp_path):
    write(tmp_path)
    data = openimages(tmp_path, "train")
    assert data.classes == ("/g/11ant", "/m/dog", "/m/cat")
    assert data.implied == -1
    assert rows(data) == {f"{A}.jpg": [1, 0, -1], f"{B}.jpg": [-1, 1, 1]}
    assert data.path(0) == f"{tmp_path}/train/{A}.jpg"


@pytest.mark.parametrize(
    ("at_least", "expected"),
    [
        (0.5, {A: [1, 0, 1], B: [-1, 1, 1], D: [-1, -1, 1]}),
        (0.3, {A: [1, 0, 1], B: [1, 1, 1], D: [-1, -1, 1]}),
        (1.0, {A: [1, 0, -1], B: [-1, 1, 1], D: [-1, -1, 1]}),
    ],
)
def test_machine_labels_count_where_no_person_has_looked(tmp_path, at_least, expected):
    write(tmp_path)
    path = tmp_path / "train-annotations-machine-imagelabels.csv"
    path.write_text(HEADER + MACHINE)
    data = openimages(tmp_path, "train", machine_generated=at_least)
    assert rows(data) == {f"{image}.jpg": labels for image, labels in sorted(expected.items())}


def test_files_lie_in_the_root_or_in_annotations_with_or_without_prefix(tmp_path):
    write(tmp_path / "annotations")
    write(tmp_path / "annotations", split="test", prefix="")
    assert splits(tmp_path) == ["test", "train"]
    data = openimages(tmp_path, "test", image_folder="challenge")
    assert data.path(0) == f"{tmp_path}/challenge/{A}.jpg"
    (tmp_path / "two.txt").write_text("/m/cat\n")
    assert openimages(tmp_path, "train", class_list="two.txt").classes == ("/m/cat",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{A},verification,/m/dog,0.5", "row 9: not a label: .*,/m/dog,0.5"),
        (f"{A},verification,/m/dog,-1", "row 9: not a label: .*,/m/dog,-1"),
        (f"{A},verification,/m/dog,yes", "row 9: not a label: .*,/m/dog,yes"),
        (f"{A},verification,/m/dog,", "row 9: not a label: .*,/m/dog,None"),
        (f"{A},verif", "row 9: not a label: '0.*,verif,None,None"),
        ("../../etc/passwd,verification,/m/dog,1", "row 9: not a label: '../../etc"),
        ("000026E7EE790996,verification,/m/dog,1", "row 9: not a label: '000026E7"),
        (f"{A},verification,/m/d\udce9g,1", "row 9: not a label: .*,/m/d.g,1"),
        (f'{A},"verification,/m/dog,1', "cannot be read: CSV malformed"),
        (f"{A},verification,/m/dog,2\n{A},a,/m/dog,1,1", "cannot be read: found more fields"),
        (f'{A},"a\nb",/m/dog,2', r"not a label: .*,a\\nb,/m/dog,2"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, line, message):
    path = write(tmp_path)
    path.write_bytes((HEADER + HUMAN + line + "\n").encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message) as error:
        openimages(tmp_path, "train")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_another_kind_is_an_error(tmp_path):
    path = write(tmp_path)
    for text, message in [
        ("filepath,label\n", 'unable to find column "ImageID"'),
        ("", "empty CSV"),
        (HEADER, "has no label of the classes of"),
        (HEADER + f"{A},verification,/m/other,1\n", "has no label of the classes of"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            openimages(tmp_path, "train")
    for classes in ("", "/m/dog\n/m/dog\n"):
        write(tmp_path, classes=classes)
        with pytest.raises(DataError, match=r"trainable.txt lists no class, or one of them twice"):
            openimages(tmp_path, "train")


def test_what_is_there_is_said_for_what_is_not(tmp_path):
    path = write(tmp_path)
    with pytest.raises(UsageError, match=r"no split 'test' .* choose from train"):
        openimages(tmp_path, "test")
    with pytest.raises(DataError, match=r"train-.*machine-imagelabels.csv is not there: .* holds"):
        openimages(tmp_path, "train", machine_generated=0.5)
    with pytest.raises(DataError, match=r"mine.txt is not there"):
        openimages(tmp_path, "train", class_list="mine.txt")
    path.unlink()
    with pytest.raises(DataError, match=r"train-annotations-human-imagelabels.csv is not there"):
        openimages(tmp_path, "train")


def test_ids_are_written_as_they_are_read(tmp_path):
    ids = [f"{number:016x}" for number in np.random.default_rng(0).integers(0, 2**63, 200)]
    ids += ["0" * 16, "f" * 16]
    write(tmp_path, "".join(f"{name},verification,/m/cat,1\n" for name in ids))
    assert openimages(tmp_path, "train").files.tolist() == [
        f"{i}.jpg".encode() for i in sorted(ids)
    ]
