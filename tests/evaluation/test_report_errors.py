"""What costs mAP: a case made by hand for every kind of error, and what its repair changes."""

import numpy as np
import pytest

from asl.evaluation.report.errors import KINDS, kinds_of_error, related_classes, repairs
from asl.metrics import mean_average_precision

MISSING, BESIDE, SIMILAR, OTHER_ALARM, SMALL, OTHER_MISS = KINDS
HALF = np.full(4, 0.5)
TABLE, CHAIR, HORSE, COW = range(4)


@pytest.fixture
def scene():
    """400 images: chairs stand at half of the tables, a few cows look like horses.

    Rows 0-39 tables, 0-19 with a chair; 40-79 horses; 80-119 cows; all scores low, and 0.9 where
    the class is present. The first rows behind 120 have nothing in them.
    """
    rng = np.random.default_rng(0)
    targets = np.zeros((400, 4), dtype=np.int8)
    targets[:40, TABLE] = targets[:20, CHAIR] = targets[40:80, HORSE] = targets[80:120, COW] = 1
    scores = np.where(targets == 1, 0.9, 0.3 * rng.random((400, 4))).astype(np.float32)
    scores[40:80, COW] = 0.0
    scores[80:95, HORSE] = np.linspace(0.4, 0.49, 15)  # as no image without a horse or a cow
    return scores, targets


def kinds_of(scene, cells, small=None):
    kinds = kinds_of_error(*scene, HALF, small)
    assert np.count_nonzero(kinds) == len(cells)
    return [int(kinds[cell]) for cell in cells]


def test_without_an_error_there_is_no_kind_and_nothing_to_gain(scene):
    assert kinds_of(scene, []) == []
    rows = repairs(*scene, kinds_of_error(*scene, HALF), "full", with_sizes=True)
    assert {row["kind"] for row in rows} == {kind.name for kind in KINDS.values()}
    assert all(row["gain"] == 0 and row["errors"] == 0 and row["mAP"] == 100 for row in rows)


def test_a_class_that_often_stands_beside_another(scene):
    beside, similar = related_classes(*scene)
    assert np.argwhere(beside).tolist() == [[TABLE, CHAIR], [CHAIR, TABLE]]
    assert np.argwhere(similar).tolist() == [[HORSE, COW]]
    scores, _ = scene
    scores[30, CHAIR] = 0.6  # at a table
    scores[150, CHAIR] = 0.6  # at nothing
    assert kinds_of(scene, [(30, CHAIR), (150, CHAIR)]) == [BESIDE, OTHER_ALARM]


def test_a_class_that_looks_like_another(scene):
    scores, _ = scene
    scores[100, HORSE] = 0.6  # at a cow
    scores[50, COW] = 0.6  # at a horse, which the model does not take for cows
    assert kinds_of(scene, [(100, HORSE), (50, COW)]) == [SIMILAR, OTHER_ALARM]


def test_a_score_as_high_as_those_of_the_class_is_likely_a_missing_label(scene):
    scores, targets = scene
    scores[:10, CHAIR] = 0.95
    scores[30, CHAIR] = 0.93  # as the mean chair, and 10 of 11 that score as high are chairs
    assert kinds_of(scene, [(30, CHAIR)]) == [MISSING]
    scores[31, CHAIR] = 0.96  # it is the first of all: nothing speaks for it
    assert kinds_of(scene, [(30, CHAIR), (31, CHAIR)]) == [BESIDE, BESIDE]
    targets[31, CHAIR] = -1
    assert kinds_of(scene, [(30, CHAIR)]) == [MISSING]
    scores[30, CHAIR] = 0.92  # less than the mean chair
    assert kinds_of(scene, [(30, CHAIR)]) == [BESIDE]


def test_misses_are_of_small_objects_or_others(scene):
    scores, _ = scene
    scores[[0, 1], TABLE] = 0.5, 0.2  # at the threshold is not above it
    small = np.zeros(scores.shape, dtype=bool)
    small[1] = True
    assert kinds_of(scene, [(0, TABLE), (1, TABLE)]) == [OTHER_MISS, OTHER_MISS]
    assert kinds_of(scene, [(0, TABLE), (1, TABLE)], small) == [OTHER_MISS, SMALL]


def test_a_threshold_that_is_nan_predicts_nothing(scene):
    limits = np.where(np.arange(4) == HORSE, np.nan, HALF)
    kinds = kinds_of_error(*scene, limits)
    assert (kinds[40:80, HORSE] == OTHER_MISS).all()
    assert np.count_nonzero(kinds) == 40


def test_cells_that_are_not_annotated_are_no_errors_and_relate_nothing(scene):
    scores, targets = scene
    targets[120:140] = -1
    scores[120:140] = 0.9
    assert kinds_of(scene, []) == []
    related = related_classes(*scene)
    scores[120:140] = np.random.default_rng(1).random((20, 4))
    for one, other in zip(related, related_classes(*scene), strict=True):
        assert np.array_equal(one, other)


def test_shares_are_of_the_images_in_which_the_class_is_annotated(scene):
    scores, targets = scene
    targets[3:20, CHAIR] = 0  # 3 chairs at 12 tables
    targets[12:40, CHAIR] = -1  # of which nothing is known at 28 more
    targets[92:120, HORSE] = -1  # 12 cows that are known to be no horses
    scores[83:95, HORSE] = 0.0  # of which 3 look like one
    beside, similar = related_classes(*scene)
    assert beside[CHAIR, TABLE]
    assert similar[HORSE, COW]


@pytest.fixture
def all_kinds(scene):
    """A table with errors of every kind, their number, and which cells are of small objects."""
    scores, _ = scene
    scores[:10, CHAIR] = 0.95
    scores[30, CHAIR] = 0.93
    scores[31, CHAIR] = 0.91
    scores[100:104, HORSE] = 0.91
    scores[150:155, TABLE] = 0.95
    scores[0:6, TABLE] = 0.1
    small = np.zeros(scores.shape, dtype=bool)
    small[:2, TABLE] = True
    kinds = kinds_of_error(*scene, HALF, small)
    return scene, kinds


def test_a_repair_repairs_its_cells_and_no_others(all_kinds):
    (scores, targets), kinds = all_kinds
    for number, kind in KINDS.items():
        cells = kinds == number
        before = scores.copy(), targets.copy()
        score, target = kind.repair(scores, targets, cells)
        assert np.array_equal(scores, before[0]), "the table itself is left alone"
        assert np.array_equal(targets, before[1]), "the table itself is left alone"
        changed = (score != scores) | (target != targets)
        assert np.array_equal(changed, cells)


def test_the_mAP_after_a_repair_is_that_of_the_repaired_table(all_kinds):
    (scores, targets), kinds = all_kinds
    before = mean_average_precision(scores, targets)
    rows = repairs(scores, targets, kinds, "full", with_sizes=True)
    assert [row["errors"] for row in rows] == [np.count_nonzero(kinds == k) for k in KINDS]
    by_hand = {kind: (scores.copy(), targets.copy()) for kind in KINDS}
    for row, column in np.argwhere(kinds > 0):
        kind = kinds[row, column]
        score, target = by_hand[kind]
        if kind == MISSING:
            target[row, column] = 1
        elif kind in (SMALL, OTHER_MISS):
            score[row, column] = 2
        else:  # a score below all others: as if it were not there
            score[row, column] = -1
    for row, kind in zip(rows, KINDS, strict=True):
        after = mean_average_precision(*by_hand[kind])
        assert row["mAP"] == pytest.approx(after, abs=1e-9)
        assert row["gain"] == pytest.approx(after - before, abs=1e-9)
        assert row["errors"] > 0
        assert row["gain"] > 0


def test_without_sizes_there_is_no_row_for_small_objects(all_kinds):
    (scores, targets), kinds = all_kinds
    rows = repairs(scores, targets, kinds, "full", with_sizes=False)
    assert KINDS[SMALL].name not in [row["kind"] for row in rows]
    assert len(rows) == 5
