"""Training and validation images drawn from a data set without splits, by its settings."""

import pytest

from asl.data.settings import DataSettings
from asl.data.splits import read_split
from asl.errors import UsageError

IMAGES = 300


@pytest.fixture(params=["table", "folders"])
def settings(request, tmp_path):
    """Images of the classes a and b, and three of a class that is rare."""
    rows = [f"{'ab'[number % 2]}/{number}.jpg" for number in range(IMAGES)]
    rows[7::100] = [f"rare/{number}.jpg" for number in range(3)]
    for row in rows:
        (tmp_path / row).parent.mkdir(exist_ok=True)
        (tmp_path / row).touch()
    if request.param == "table":
        table = "".join(f"{row},{row.split('/')[0]}\n" for row in rows)
        (tmp_path / "labels.csv").write_text(f"path,labels\n{table}")
    return DataSettings(data=str(tmp_path), dataset=request.param)


def drawn(settings, **changes):
    """The files of both splits, which together are all of them, and how often the rare class is."""
    parts = [read_split(settings.replace(**changes), role) for role in ("train", "val")]
    files = [{*part.files.tolist()} for part in parts]
    assert not files[0] & files[1]
    assert len(files[0] | files[1]) == IMAGES
    return files, [part.counts(1)[-1] for part in parts]


def test_a_share_is_validated_on_and_the_seed_says_which(settings):
    (_, val), _ = drawn(settings)
    (_, other), _ = drawn(settings, split_seed=1)
    (_, half), _ = drawn(settings, val_share=0.5)
    assert len(val) == pytest.approx(60, abs=25)
    assert len(half) == pytest.approx(150, abs=35)
    assert val != other
    assert val < half


def test_stratified_parts_have_rare_classes_in_both(settings):
    (_, val), rare = drawn(settings, stratify=True)
    (_, other), again = drawn(settings, stratify=True, split_seed=1)
    assert len(val) == len(other) == 60
    assert val != other
    assert rare == again == [2, 1]


@pytest.mark.parametrize("stratify", [False, True])
def test_every_image_is_validated_on_in_one_fold(settings, stratify):
    found = [drawn(settings, folds=3, fold=fold, stratify=stratify) for fold in range(3)]
    vals = [files[1] for files, _ in found]
    assert sum(map(len, vals)) == len(set.union(*vals)) == IMAGES
    if stratify:
        assert [rare for _, rare in found] == [[2, 1]] * 3
        assert {len(val) for val in vals} == {100}
    assert drawn(settings, folds=3, stratify=stratify)[0][1] == vals[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folds": 3, "fold": 3}, "there is no fold 3: the 3 folds count from 0"),
        ({"fold": 1}, "fold 1 of how many"),
        ({"folds": 3, "val_share": 0.5}, "val_share and folds both say"),
        ({"val_split": "test"}, "no split 'test' .* choose from train, val"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, changes, message):
    with pytest.raises(UsageError, match=message):
        read_split(settings.replace(**changes), "val")


@pytest.mark.parametrize(("name", "value"), [("folds", 3), ("fold", 0), ("stratify", True)])
def test_a_data_set_that_has_splits_is_not_drawn_from_as_well(tmp_path, name, value):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "1.jpg").touch()
        (tmp_path / f"{split}.csv").write_text("path,labels\ntrain/cat/1.jpg,cat\n")
    for dataset in ("table", "folders"):
        settings = DataSettings(data=str(tmp_path), dataset=dataset, **{name: value})
        with pytest.raises(UsageError, match=f"has splits of its own: drop {name}"):
            read_split(settings, "train")
