"""Simulated partial labels against the dense tables that they come from."""

from pathlib import Path

import numpy as np
import pytest

from asl.data.annotations import Annotations
from asl.data.partial import fixed_per_class, random_per_sample, simulate
from asl.errors import UsageError

N, C = 3000, 6
SCHEMES = ("fpc:200", "rps:0.5")


def annotations(table, implied):
    rows, columns = np.nonzero(table != implied)
    files = np.array([f"{i}.jpg".encode() for i in range(len(table))])
    classes = tuple(f"class {c}" for c in range(table.shape[1]))
    return Annotations.from_cells(
        Path("x"), files, classes, rows, columns, table[rows, columns], implied
    )


@pytest.fixture(params=[0, -1], ids=["absent implied", "unannotated implied"])
def case(request):
    """Frequent and rare classes, one without images; a fifth of the cells is not annotated."""
    rng = np.random.default_rng(0)
    table = (rng.random((N, C)) < [0.9, 0.5, 0.2, 0.05, 0.01, 0]).astype(np.int8)
    table[rng.random((N, C)) < 0.2] = -1
    return annotations(table, request.param), table


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_kept_is_true_and_the_rest_is_not_annotated(case, scheme):
    data, table = case
    partial = simulate(data, scheme, seed=0)
    kept = partial.dense() != -1
    np.testing.assert_array_equal(partial.dense()[kept], table[kept])
    assert (partial.implied, len(partial.values)) == (-1, kept.sum())
    assert not kept[table == -1].any()
    np.testing.assert_array_equal(partial.files, data.files)


def test_fpc_keeps_as_many_absent_cells_as_present_ones(case):
    data, _ = case
    partial = fixed_per_class(data, 200, seed=0)
    present, absent = data.counts(1), data.counts(0)
    np.testing.assert_array_equal(partial.counts(1), np.minimum(200, present))
    np.testing.assert_array_equal(partial.counts(0), np.minimum(partial.counts(1), absent))
    assert 0 < present[4] < 200
    assert present[5] == 0


def test_fpc_of_a_smaller_number_is_a_part_of_that_of_a_larger(case):
    small, large = (fixed_per_class(case[0], n, seed=0).dense() for n in (50, 200))
    assert (large[small != -1] != -1).all()


@pytest.mark.parametrize("p", [0, 0.1, 0.5, 0.9])
def test_rps_hides_each_label_with_probability_p(case, p):
    data, _ = case
    partial = random_per_sample(data, p, seed=0)
    for value in (1, 0):
        before, after = data.counts(value), partial.counts(value)
        deviation = np.sqrt(before * p * (1 - p))
        assert (np.abs(after - before * (1 - p)) <= 4 * deviation).all()
    # Present and absent, and neighbouring classes, are hidden independently of each other.
    hidden = (partial.dense() == -1)[data.dense() != -1]
    assert abs(np.corrcoef(hidden[1:], hidden[:-1])[0, 1]) < 0.03 if p else not hidden.any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_draw_hangs_on_the_seed_and_the_labels_alone(case, scheme):
    data, table = case
    first = simulate(data, scheme, seed=3).dense()
    np.testing.assert_array_equal(first, simulate(data, scheme, seed=3).dense())
    stored_otherwise = annotations(table, -1 - data.implied)
    np.testing.assert_array_equal(first, simulate(stored_otherwise, scheme, seed=3).dense())
    other = simulate(data, scheme, seed=4).dense()
    assert ((first != -1) != (other != -1)).mean() > 0.1


def test_classes_draw_from_streams_of_their_own():
    table = np.tile(np.arange(N)[:, None] % 2, (1, 2)).astype(np.int8)
    kept = random_per_sample(annotations(table, 0), 0.5, seed=0).dense() != -1
    assert 0.45 < (kept[:, 0] == kept[:, 1]).mean() < 0.55


def test_the_draw_is_the_same_everywhere():
    table = (np.arange(60).reshape(12, 5) % 3 == 0).astype(np.int8)
    fpc = fixed_per_class(annotations(table, 0), 2, seed=7).dense()
    rps = random_per_sample(annotations(table, 0), 0.5, seed=7).dense()
    assert "".join("01."[v] for v in fpc[:, 0]) == "1.010......."
    assert "".join("01."[v] for v in rps[:, 0]) == "..0..0..0.00"


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("fpc", "whole number from 1 on"),
        ("fpc:0", "whole number from 1 on"),
        ("fpc:-5", "whole number from 1 on"),
        (f"fpc:{'9' * 5000}", "whole number from 1 on"),
        ("fpc:0.5", "'fpc:0.5': fpc takes a whole number from 1 on, as in fpc:1000"),
        ("rps:", "from 0 to below 1"),
        ("rps:1", "from 0 to below 1"),
        ("rps:-0.1", "from 0 to below 1"),
        ("rps:nan", "from 0 to below 1"),
        ("rps:half", "'rps:half': rps takes a number from 0 to below 1, as in rps:0.5"),
        ("rsp:0.5", "no simulation 'rsp:0.5': choose fpc:N, rps:P, thin"),
        ("", "choose fpc:N, rps:P, thin"),
    ],
)
def test_a_wrong_scheme_is_named(case, scheme, message):
    with pytest.raises(UsageError, match=message):
        simulate(case[0], scheme, seed=0)


@pytest.fixture(scope="module")
def coco():
    """The real labels of MS-COCO train2014."""
    path = Path(__file__).parents[3] / "shared" / "data" / "labels" / "coco_train2014.txt"
    if not path.is_file():
        pytest.skip(f"no labels of MS-COCO: {path}")
    images = [line.replace(",", " ").split()[1:] for line in path.read_text().splitlines()]
    rows = np.repeat(np.arange(len(images)), [len(labels) for labels in images])
    columns = np.array([label for labels in images for label in labels], dtype=int)
    files = np.array([f"{i}.jpg".encode() for i in range(len(images))])
    classes = tuple(map(str, range(80)))
    return Annotations.from_cells(Path("x"), files, classes, rows, columns, np.ones(len(rows)))


def test_fpc_1000_of_coco_keeps_exactly_what_the_paper_says(coco):
    partial = fixed_per_class(coco, 1000, seed=0)
    kept = np.minimum(1000, coco.counts(1))
    np.testing.assert_array_equal(partial.counts(1), kept)
    np.testing.assert_array_equal(partial.counts(0), kept)
    assert (kept < 1000).sum() == 7


def test_rps_half_of_coco_keeps_half(coco):
    partial = random_per_sample(coco, 0.5, seed=0)
    assert len(partial.values) == pytest.approx(len(coco) * 80 / 2, rel=0.002)
    assert partial.counts(1).sum() == pytest.approx(coco.counts(1).sum() / 2, rel=0.01)


def test_thinning_hides_positives_of_every_class_and_nothing_else(case):
    data, table = case
    thin = simulate(data, "thin:0.25", seed=0)
    before, after = table, thin.dense()
    assert (before[after != before] == 1).all()
    assert (after[after != before] == -1).all()
    kept, were = (after == 1).sum(0), (before == 1).sum(0)
    np.testing.assert_array_equal(kept, np.where(were, np.maximum(1, np.round(were / 4)), 0))
    fewer = simulate(data, "thin:0.0625", seed=0).dense()
    assert (after[fewer == 1] == 1).all()
    assert thin.implied == data.implied


def test_missing_positives_become_negatives_at_the_given_rate(case):
    data, table = case
    after = simulate(data, "missing:0.25", seed=0).dense()
    changed = after != table
    assert (table[changed] == 1).all()
    assert (after[changed] == 0).all()
    assert changed.sum() / (table == 1).sum() == pytest.approx(0.25, abs=0.02)
    more = simulate(data, "missing:0.5", seed=0).dense() != table
    assert more[changed].all()
    np.testing.assert_array_equal(simulate(data, "missing:0", seed=0).dense(), table)


def test_a_single_positive_stays_in_every_image(case):
    data, table = case
    after = simulate(data, "single", seed=0).dense()
    changed = after != table
    assert (table[changed] == 1).all()
    assert (after[changed] == 0).all()
    np.testing.assert_array_equal((after == 1).sum(1), np.minimum(1, (table == 1).sum(1)))
    # By lot: of images with both of the first classes, half keep the first.
    both = (table[:, :3] == [1, 1, 0]).all(1)
    assert (after[both, 0] == 1).mean() == pytest.approx(0.5, abs=0.07)
    assert (simulate(data, "single", seed=1).dense() != after).any()


@pytest.mark.parametrize(
    "scheme", ["thin:0", "thin", "missing:1", "single:1", "single:nan", "thin:x"]
)
def test_amounts_that_make_no_sense_are_refused(case, scheme):
    with pytest.raises(UsageError, match=f"'{scheme}': {scheme.partition(':')[0]} takes "):
        simulate(case[0], scheme, seed=0)
