"""Parts that keep every class as frequent as it is in the whole."""

import numpy as np
import pytest

from asl.data.annotations import Annotations
from asl.data.stratify import stratified_parts


def labelled(table):
    table = np.asarray(table, dtype=np.int8)
    rows, columns = np.nonzero(table)
    files = np.array([f"{row}.jpg" for row in range(len(table))], dtype="S")
    classes = tuple(map(str, range(table.shape[1])))
    return Annotations.from_cells(".", files, classes, rows, columns, table[rows, columns])


@pytest.fixture
def long_tailed():
    """1,003 images of 12 classes: half have the first, three the last, many several."""
    random = np.random.default_rng(3)
    table = random.random((1003, 12)) < 0.5 ** np.arange(1, 13)
    table[:, -1] = False
    table[[5, 400, 900], -1] = True
    return labelled(table)


def test_every_image_is_in_one_part_and_parts_are_of_one_size(long_tailed):
    sizes = np.bincount(stratified_parts(long_tailed, 5, seed=0))
    assert sizes.sum() == 1003
    assert sizes.max() - sizes.min() <= 5


def test_every_class_is_spread_evenly_the_rare_ones_too(long_tailed):
    parts = stratified_parts(long_tailed, 3, seed=0)
    table = long_tailed.dense() == 1
    counts = np.stack([table[parts == part].sum(0) for part in range(3)])
    assert (counts[:, -1] == 1).all()
    assert (np.ptp(counts, axis=0) <= 2).all()
    by_lot = np.random.default_rng(0).permutation(1003) % 3
    drawn = np.stack([table[by_lot == part].sum(0) for part in range(3)])
    assert np.ptp(drawn, axis=0).max() > 10  # which is what it is there for


def test_the_seed_decides_and_nothing_else(long_tailed):
    first, again, other = (stratified_parts(long_tailed, 5, seed) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_parts_of_given_shares_keep_rare_classes_in_each(long_tailed):
    parts = stratified_parts(long_tailed, (0.8, 0.2), seed=0)
    table = long_tailed.dense() == 1
    assert np.bincount(parts).tolist() == pytest.approx([802.4, 200.6], abs=6)
    assert table[parts == 1, -1].sum() == 1  # of three
    shares = table[parts == 1].sum(0)[:8] / table.sum(0)[:8]
    assert (abs(shares - 0.2) < 0.06).all()


def test_images_without_a_label_are_dealt_too():
    parts = stratified_parts(labelled([[0, 0]] * 7 + [[1, 0], [-1, -1]]), 3, seed=0)
    assert sorted(np.bincount(parts)) == [3, 3, 3]
