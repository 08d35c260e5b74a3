"""Thresholds of each class, against scikit-learn and against plain loops."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_recall_curve

from asl.evaluation import thresholds
from asl.evaluation.crossfit import out_of_fold
from asl.evaluation.thresholds import (
    common_threshold,
    cross_fitted,
    gain_in_macro_f1,
    operating_points,
    tuned,
    unreached,
)
from asl.metrics import f1_scores, precision_thresholds

CLASSES = 6
RULES = ("f1", "precision:0.8")


@pytest.fixture(scope="module")
def table():
    """300 images; class c is in fewer and scores higher than the one before. A tenth is -1."""
    random = np.random.default_rng(0)
    frequent = np.linspace(0.4, 0.05, CLASSES)
    targets = (random.random((300, CLASSES)) < frequent).astype(np.int8)
    logits = random.normal(2.5 * targets + np.linspace(-2, 1, CLASSES), 1)
    targets[random.random(targets.shape) < 0.1] = -1
    return (1 / (1 + np.exp(-logits))).astype(np.float32), targets


def annotated(table, c):
    scores, targets = table
    there = targets[:, c] != -1
    return scores[there, c], targets[there, c]


def test_the_threshold_of_a_class_reaches_the_best_f1_that_scikit_learn_finds(table):
    own = tuned(*table, "f1", shrinkage=0)
    for c in range(CLASSES):
        scores, targets = annotated(table, c)
        precision, recall, _ = precision_recall_curve(targets, scores)
        best = (2 * precision * recall / np.maximum(precision + recall, 1e-9)).max()
        assert f1_score(targets, scores > own[c]) == pytest.approx(best)


@pytest.mark.parametrize("wanted", [0.3, 0.5, 0.8, 1.0])
def test_the_threshold_of_a_precision_has_the_highest_recall_that_scikit_learn_finds(table, wanted):
    own = precision_thresholds(*table, wanted)
    for c in range(CLASSES):
        scores, targets = annotated(table, c)
        precision, recall, _ = precision_recall_curve(targets, scores)
        best = recall[:-1][precision[:-1] >= wanted].max(initial=0)  # the last is of no threshold
        assert (targets[scores > own[c]] == 1).sum() == pytest.approx(best * (targets == 1).sum())
        assert np.isinf(own[c]) == (best == 0)
        if best:
            assert targets[scores > own[c]].mean() >= wanted


def test_a_precision_that_is_met_exactly_is_reached():
    scores, targets = np.array([[0.9], [0.8], [0.7], [0.6], [0.5]]), np.ones((5, 1))
    targets[1] = 0
    assert precision_thresholds(scores, targets, 0.8) < 0.5
    assert precision_thresholds(scores, targets, 0.81) == pytest.approx([0.85])


@pytest.mark.parametrize("rule", RULES)
def test_cells_that_are_not_annotated_do_not_matter(table, rule):
    scores, targets = table
    other = np.where(targets == -1, np.random.default_rng(1).random(scores.shape), scores)
    assert not np.array_equal(other, scores)
    np.testing.assert_array_equal(tuned(other, targets, rule), tuned(scores, targets, rule))
    figures = [cross_fitted(each, targets, rule, 0.5) for each in (scores, other)]
    assert figures[0] == figures[1]


def test_the_common_threshold_is_the_best_of_all(table):
    scores, targets = table
    found = f1_scores(scores, targets, common_threshold(scores, targets, "f1"))["macro_F1"]
    every = [f1_scores(scores, targets, float(t))["macro_F1"] for t in np.unique(scores)]
    assert found == max(every)
    lowest = common_threshold(scores, targets, "precision:0.8")
    assert f1_scores(scores, targets, lowest)["OP"] >= 80
    lower = [t for t in np.unique(scores[targets == 1]) if t < lowest]
    assert all(f1_scores(scores, targets, np.nextafter(t, -1.0))["OP"] < 80 for t in lower)


def test_among_many_positives_the_common_threshold_is_all_but_the_best(table, monkeypatch):
    best = f1_scores(*table, common_threshold(*table, "f1"))["macro_F1"]
    monkeypatch.setattr(thresholds, "CANDIDATES", 50)
    assert f1_scores(*table, common_threshold(*table, "f1"))["macro_F1"] > best - 1


def test_the_more_positives_the_less_a_threshold_is_shrunk(table):
    scores, targets = table
    common, own = common_threshold(scores, targets, "f1"), tuned(scores, targets, "f1", 0)
    # Every image several times: the same thresholds, of more positives.
    repeated = [
        tuned(np.tile(scores, (n, 1)), np.tile(targets, (n, 1)), "f1") for n in (1, 2, 10, 1000)
    ]
    away = [np.abs(each - common) for each in (np.full(CLASSES, common), *repeated, own)]
    assert (np.diff(away, axis=0) > 0).all()
    assert (np.sign(repeated[0] - common) == np.sign(own - common)).all()
    np.testing.assert_allclose(tuned(scores, targets, "f1", 1e12), common)


def test_a_class_with_as_many_positives_as_the_shrinkage_is_half_way_in_logits():
    scores = np.linspace(0.01, 0.99, 99)[:, None].repeat(2, axis=1)
    targets = np.stack([scores[:, 0] > 0.795, scores[:, 0] > 0.295], axis=1)  # of 20 and 70
    common = common_threshold(scores, targets, "f1")
    half = (np.log(0.795 / 0.205) + np.log(common / (1 - common))) / 2
    assert tuned(scores, targets, "f1", 20)[0] == pytest.approx(1 / (1 + np.exp(-half)))


def test_a_class_without_positives_has_the_common_threshold(table):
    scores, targets = table[0], table[1].copy()
    targets[:, 2] = np.where(targets[:, 2] == 1, 0, targets[:, 2])
    targets[:, 3] = -1
    for rule in RULES:
        found = tuned(scores, targets, rule)
        np.testing.assert_allclose(found[2:4], common_threshold(scores, targets, rule))
        assert not unreached(scores, targets, rule)[2:4].any()


def test_a_class_that_never_has_the_precision_says_so_and_is_hardly_predicted(table):
    scores, targets = table[0].copy(), table[1]
    c = 1
    scores[:, c] = np.where(targets[:, c] == 1, scores[:, c] * 0.9, scores[:, c])
    scores[targets[:, c] == 0, c] += 0.9 - scores[targets[:, c] == 0, c].max()
    scores[:, c] = scores[:, c].clip(0, 1)
    scores[targets[:, c] == 1, c] = scores[targets[:, c] == 1, c].clip(max=0.5)
    assert unreached(scores, targets, "precision:0.8").tolist() == [n == c for n in range(CLASSES)]
    highest = scores[targets[:, c] != -1, c].max()
    assert tuned(scores, targets, "precision:0.8", 0)[c] == pytest.approx(highest)
    figures = cross_fitted(scores, targets, "precision:0.8", 0.5)
    assert figures["unreached"] == [c]


def test_nothing_to_choose_by_gives_thresholds_all_the_same():
    nothing = tuned(np.random.default_rng(0).random((5, 2)), np.zeros((5, 2)), "f1")
    assert (nothing > 0.99).all()


def test_operating_points_are_the_common_threshold_and_those_of_two_rules(table):
    points = operating_points(*table)
    assert [*points] == ["common", "f1", "precision:0.8"]
    np.testing.assert_array_equal(points["common"], [common_threshold(*table, "f1")] * CLASSES)
    for rule in RULES:
        np.testing.assert_array_equal(points[rule], tuned(*table, rule))


def test_an_image_is_never_judged_by_what_it_chose():
    scores = np.arange(23.0)[:, None]  # a score names its image
    sizes = []

    def fit(seen, _):
        def judge(others):
            assert not np.isin(others, seen).any()
            assert len(seen) + len(others) == 23
            sizes.append(len(others))
            return others

        return judge

    np.testing.assert_array_equal(out_of_fold(fit, scores, scores, folds=5), scores)
    assert sorted(sizes) == [4, 4, 5, 5, 5]
    with pytest.raises(ValueError, match="4 images for 5 folds"):
        out_of_fold(fit, scores[:4], scores[:4])


def by_hand(table, rule):
    """Predictions with thresholds of the other folds, in a plain loop."""
    scores, targets = table
    fold = np.random.default_rng(0).permutation(len(scores)) % 5
    predicted = np.zeros(scores.shape, bool)
    for row in range(len(scores)):
        if row == 0 or fold[row] not in fold[:row]:
            others = fold != fold[row]
            limits = tuned(scores[others], targets[others], rule)
            predicted[~others] = scores[~others] > limits
    return predicted


@pytest.mark.parametrize("rule", RULES)
def test_cross_fitted_f1_is_scikit_learns(table, rule):
    scores, targets = table
    figures = cross_fitted(scores, targets, rule, 0.6)
    limits = np.array(figures["thresholds"])
    np.testing.assert_array_equal(limits, tuned(scores, targets, rule))
    for name, predicted in {
        "threshold": scores > np.float64(0.6),
        "common_same_images": scores > np.float64(figures["common"]),
        "per_class": by_hand(table, rule),
        "per_class_same_images": scores > limits,
    }.items():
        each = []
        for c in range(CLASSES):
            there = targets[:, c] != -1
            each.append(f1_score(targets[there, c], predicted[there, c], zero_division=0))
        assert figures["at"][name]["macro_F1"] == pytest.approx(100 * np.mean(each)), name


def test_what_chance_seems_to_gain_is_gone_on_images_that_did_not_choose():
    random = np.random.default_rng(0)
    scores, targets = random.random((200, 40)), (random.random((200, 40)) < 0.1).astype(np.int8)
    found = cross_fitted(scores, targets, "f1", 0.5)["at"]
    f1 = {name: figures["macro_F1"] for name, figures in found.items()}
    assert f1["per_class_same_images"] > f1["threshold"] + 1
    assert f1["per_class"] < f1["threshold"]


def test_a_threshold_just_below_a_score_is_below_it_in_every_type():
    scores, targets = np.full((10, 2), 0.7, np.float32), np.ones((10, 2), np.int8)
    for dtype in (np.float16, np.float32, np.float64):
        figures = cross_fitted(scores.astype(dtype), targets, "f1", 0.9)["at"]
        assert figures["common"]["macro_F1"] == figures["common_same_images"]["macro_F1"] == 100


@pytest.mark.parametrize("protocol", ["full", "partial"])
def test_the_interval_is_that_of_a_direct_resampling(table, protocol):
    scores, targets = table[0], table[1].copy()
    targets[:, 5] = np.where(targets[:, 5] == 0, -1, targets[:, 5])  # no negatives
    targets[6:, 4] = np.where(targets[6:, 4] == 1, 0, targets[6:, 4])  # hardly a positive
    before, after = scores > 0.8, scores > np.linspace(0.2, 0.9, CLASSES)
    found = gain_in_macro_f1(before, after, targets, protocol=protocol, resamples=250, seed=3)

    def macro(predicted, images):
        return f1_scores(predicted[images], targets[images], 0.5, protocol=protocol)["macro_F1"]

    random = np.random.default_rng(3)
    drawn = [random.integers(300, size=300) for _ in range(250)]
    gains = [macro(after, images) - macro(before, images) for images in drawn]
    assert found["interval"] == pytest.approx(np.percentile(gains, [2.5, 97.5]), abs=1e-4)
    every = np.arange(300)
    assert found["macro_F1"] == pytest.approx(macro(after, every) - macro(before, every), abs=1e-4)


def test_many_classes_are_resampled_in_blocks(table, monkeypatch):
    before, after = table[0] > 0.8, table[0] > 0.5
    whole = gain_in_macro_f1(before, after, table[1], resamples=30)
    monkeypatch.setattr(thresholds, "_BLOCK", 4)
    in_blocks = gain_in_macro_f1(before, after, table[1], resamples=30)
    assert in_blocks["interval"] == pytest.approx(whole["interval"])
