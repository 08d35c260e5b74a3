"""Maps from scores to probabilities, against scikit-learn and against what was planted."""

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from asl.evaluation import calibration
from asl.evaluation.calibration import (
    METHODS,
    brier,
    calibration_errors,
    cross_fitted,
    ece,
    fitted,
    from_state,
    logit,
    sigmoid,
)

CLASSES = 4
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def table():
    """1,000 images whose probabilities are sigmoid(1.5 * logit(score) - 2). A tenth is -1."""
    random = np.random.default_rng(0)
    logits = random.normal(np.linspace(-2, 1, CLASSES), 1.5, (1000, CLASSES))
    targets = (random.random(logits.shape) < sigmoid(1.5 * logits - 2)).astype(np.int8)
    targets[random.random(targets.shape) < 0.1] = -1
    return sigmoid(logits).astype(np.float32), targets


def annotated(table, c):
    scores, targets = table
    there = targets[:, c] != -1
    return scores[there, c].astype(np.float64), targets[there, c]


def with_platts_targets(targets):
    """Labels and weights that stand for (n + 1) / (n + 2) and 1 / (m + 2)."""
    n, m = (targets == 1).sum(), (targets == 0).sum()
    wanted = np.where(targets == 1, (n + 1) / (n + 2), 1 / (m + 2))
    return np.repeat([1, 0], len(targets)), np.concatenate([wanted, 1 - wanted])


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_lines_are_those_of_scikit_learn(table, method):
    made = fitted(*table, method, shrinkage=0)
    for c in range(CLASSES):
        scores, targets = annotated(table, c)
        labels, weights = with_platts_targets(targets)
        line = LogisticRegression(C=np.inf, fit_intercept=method == "platt", tol=1e-10)
        line.fit(np.tile(logit(scores), 2)[:, None], labels, weights)
        expected = line.predict_proba(logit(scores)[:, None])[:, 1]
        np.testing.assert_allclose(made.of_class(c, scores), expected, atol=1e-5)


def test_isotonic_maps_are_those_of_scikit_learn_with_a_cell_at_each_end(table):
    made = fitted(*table, "isotonic", shrinkage=0)
    for c in range(CLASSES):
        x, y = annotated(table, c)
        judge = IsotonicRegression(out_of_bounds="clip")
        judge.fit([*x, x.min(), x.max()], [*y, 1, 0])
        others = np.linspace(0, 1, 999)
        np.testing.assert_allclose(made.of_class(c, others), judge.predict(others), atol=1e-12)


def test_the_planted_line_is_found(table):
    made = fitted(*table, "platt", shrinkage=0)
    assert made.slope == pytest.approx(1.5, abs=0.3)
    assert made.bias == pytest.approx(-2, abs=0.5)


def test_a_temperature_leaves_a_half_where_it_is_and_so_cannot_mend_scores_that_are_too_high(table):
    made = fitted(*table, "temperature")
    np.testing.assert_allclose(made(np.full((1, CLASSES), 0.5)), 0.5)
    errors = cross_fitted(*table)["ECE"]
    assert errors["temperature"] > 0.5 * errors["scores"]
    assert max(errors["platt"], errors["isotonic"]) < 0.2 * errors["scores"]


@every_method
def test_maps_rise_and_are_never_sure(table, method):
    grid = np.linspace(0, 1, 500)[:, None].repeat(CLASSES, axis=1)
    for cells in (slice(None), slice(12)):
        found = fitted(table[0][cells], table[1][cells], method)(grid)
        assert (np.diff(found, axis=0) >= -1e-12).all()
        assert 0 < found.min() < found.max() < 1


@every_method
def test_cells_that_are_not_annotated_do_not_matter(table, method):
    scores, targets = table
    other = np.where(targets == -1, np.random.default_rng(1).random(scores.shape), scores)
    grid = np.linspace(0, 1, 50)[:, None].repeat(CLASSES, axis=1)
    found = [fitted(each, targets, method)(grid) for each in (scores, other)]
    np.testing.assert_array_equal(*found)
    figures = [calibration_errors({"x": each}, targets) for each in (scores, other)]
    assert figures[0] == figures[1]


@every_method
def test_the_more_positives_the_less_a_map_is_shrunk(table, method):
    grid = np.linspace(0.05, 0.95, 50)[:, None].repeat(CLASSES, axis=1)
    common, *others, own = (
        fitted(*table, method, shrinkage)(grid) for shrinkage in (1e12, 1000, 100, 10, 0)
    )
    away = [np.abs(each - common).mean(axis=0) for each in (common, *others, own)]
    assert (np.diff(away, axis=0) > 0).all()


@every_method
def test_few_positives_give_no_silly_map(table, method):
    scores, targets = table[0].copy(), table[1].copy()
    rare = np.flatnonzero(targets[:, 1] == 1)
    targets[rare[2:], 1] = 0  # two positives, the highest scores of all
    scores[rare[:2], 1] = 0.999
    none, nothing = 2, 3
    targets[:, none] = np.minimum(targets[:, none], 0)
    targets[:, nothing] = -1
    grid = np.linspace(0, 1, 50)[:, None].repeat(CLASSES, axis=1)
    found, common = (
        fitted(scores, targets, method, k)(grid) for k in (calibration.SHRINKAGE, 1e12)
    )
    np.testing.assert_allclose(found[:, [none, nothing]], common[:, [none, nothing]], atol=1e-9)
    np.testing.assert_allclose(found[:, 1], common[:, 1], atol=0.1)


def test_scores_that_say_the_contrary_keep_their_order():
    random = np.random.default_rng(0)
    scores = random.random((400, 1))
    targets = (random.random((400, 1)) > scores).astype(int)
    for method in ("temperature", "platt"):
        found = fitted(scores, targets, method, 0).of_class(0, np.array([0.1, 0.5, 0.9]))
        assert (np.diff(found) > 0).all()
        assert found == pytest.approx(0.5, abs=0.05)


@every_method
@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
def test_scores_at_the_ends_and_labels_that_separate_give_finite_maps(method, labels):
    scores = np.array([[0, 0, 0.1, 0.9, 1, 1]], np.float32).T
    found = fitted(scores, np.array(labels)[:, None], method, 0)(scores)
    assert np.isfinite(found).all()
    same = fitted(np.full((6, 1), 0.7), np.array(labels)[:, None], method, 0)(scores)
    assert np.isfinite(same).all()


def test_a_common_map_needs_no_more_than_some_of_the_cells(table, monkeypatch):
    grid = np.linspace(0, 1, 50)[:, None].repeat(CLASSES, axis=1)
    whole = fitted(*table, "platt", 1e12)(grid)
    monkeypatch.setattr(calibration, "_COMMON_CELLS", 2000)
    part = fitted(*table, "platt", 1e12)(grid)
    assert 0 < np.abs(part - whole).max() < 0.05


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_brier_score_and_ece_are_what_their_definitions_say(table, dtype):
    scores, targets = table[0].astype(dtype), table[1]
    found = brier(scores, targets), ece(scores, targets)
    for c in range(CLASSES):
        p, y = annotated((scores, targets), c)
        assert found[0][c] == pytest.approx(brier_score_loss(y, p))
        expected = 0.0
        for low in range(15):
            inside = (p >= low / 15) & ((p < (low + 1) / 15) | (low == 14))
            if inside.any():
                expected += inside.mean() * abs(p[inside].mean() - y[inside].mean())
        assert found[1][c] == pytest.approx(expected)


def test_classes_without_annotated_cells_are_left_out_of_means(table):
    targets = table[1].copy()
    targets[:, 0] = -1
    assert np.isnan(ece(table[0], targets)).tolist() == [True, False, False, False]
    found = calibration_errors({"scores": table[0]}, targets)
    assert found["Brier"]["scores"] == pytest.approx(brier(table[0], targets)[1:].mean())
    nothing = calibration_errors({"scores": table[0]}, np.full_like(targets, -1))
    assert nothing == {"ECE": {"scores": None}, "Brier": {"scores": None}}


def test_cross_fitted_errors_are_those_of_maps_of_other_folds(table):
    scores, targets = table
    fold = np.random.default_rng(0).permutation(len(scores)) % 5
    found = cross_fitted(scores, targets)
    assert [*found["ECE"]] == [*found["Brier"]] == ["scores", *METHODS]
    assert found["ECE"]["scores"] == pytest.approx(ece(scores, targets).mean())
    for method in METHODS:
        made = np.empty(scores.shape)
        for number in range(5):
            held = fold == number
            made[held] = fitted(scores[~held], targets[~held], method)(scores[held])
        assert found["ECE"][method] == pytest.approx(ece(made, targets).mean(), abs=1e-6)
        assert found["Brier"][method] == pytest.approx(brier(made, targets).mean(), abs=1e-6)


@every_method
def test_what_is_stored_gives_the_same_probabilities(table, method, tmp_path):
    made = fitted(*table, method)
    torch.save(made.state(), tmp_path / "x.pt")
    again = from_state(torch.load(tmp_path / "x.pt", weights_only=True), CLASSES)
    np.testing.assert_array_equal(again(table[0]), made(table[0]))
    assert again.method == method


@pytest.mark.parametrize(
    ("method", "changed", "why"),
    [
        ("platt", {"slope": torch.ones(3)}, "3 numbers for 4 classes"),
        ("platt", {"bias": torch.full((4,), torch.nan)}, "bias is no list of finite numbers"),
        ("platt", {"bias": 1.0}, "bias is no list"),
        ("platt", {"method": "magic"}, "its method is 'magic'"),
        ("isotonic", {"ends": torch.tensor([0, 1, 1, 2, 3, 4])}, "its knots"),
        ("isotonic", {"scores": torch.ones(1)}, "its knots"),
        ("isotonic", {"probabilities": torch.ones(1)}, "for 1 probabilities"),
    ],
)
def test_what_is_no_calibration_of_these_classes_is_refused(table, method, changed, why):
    with pytest.raises(ValueError, match=why):
        from_state(fitted(*table, method).state() | changed, CLASSES)
