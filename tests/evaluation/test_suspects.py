"""Suspected label errors against cleanlab, out-of-fold scores against scikit-learn."""

import numpy as np
import pytest
import torch
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.linear_model import LogisticRegression

from asl.errors import UsageError
from asl.evaluation.report import folds
from asl.evaluation.report.examples import Scored
from asl.evaluation.report.suspects import gallery, suspected


@pytest.fixture(scope="module")
def noisy():
    """500 images of 5 classes, whose scores are those of a fair model and of which labels lie."""
    rng = np.random.default_rng(0)
    truth = rng.random((500, 5)) < [0.5, 0.3, 0.1, 0.05, 0.3]
    scores = np.clip(0.25 + 0.5 * truth + rng.normal(0, 0.2, truth.shape), 0.01, 0.99)
    targets = (truth ^ (rng.random(truth.shape) < 0.05)).astype(np.int8)
    targets[rng.random(truth.shape) < 0.1] = -1
    targets[:, 4] = np.where(targets[:, 4] == 1, 0, targets[:, 4])
    return scores, targets


def test_suspects_are_those_of_cleanlab_among_the_annotated_cells(noisy):
    scores, targets = noisy
    rows, columns, quality = suspected(scores, targets)
    said = targets[rows, columns]
    for label in (0, 1):  # by turns, of each the worst first
        assert np.all(np.diff(quality[said == label]) >= 0)
    shorter = min(np.bincount(said))
    assert said[: 2 * shorter].reshape(-1, 2).sum(axis=1).tolist() == [1] * shorter
    for column in range(4):
        known = np.flatnonzero(targets[:, column] != -1)
        score = scores[known, column]
        wrong = find_label_issues(
            targets[known, column].astype(int),
            np.stack([1 - score, score], axis=1),
            filter_by="confident_learning",
            n_jobs=1,
        )
        assert wrong.any()
        of_class = columns == column
        assert sorted(rows[of_class]) == known[wrong].tolist()
        judged = np.full(len(targets), np.nan)
        judged[known] = get_label_quality_scores(
            targets[known, column].astype(int),
            np.stack([1 - score, score], axis=1),
        )
        np.testing.assert_allclose(quality[of_class], judged[rows[of_class]], rtol=1e-9)
    assert 4 not in columns, "a class without positives"


def test_the_gallery_shows_the_models_own_scores_and_says_whose_doubt_it_is(noisy):
    scores, targets = noisy
    scored = Scored(scores, targets, list("abcde"), np.full(5, 0.5))
    own, other = gallery(scored, None), gallery(scored, 1 - scores)
    assert "--report-folds" in own["explanation"]
    assert "has seen" in other["explanation"]
    rows, columns, quality = suspected(1 - scores, targets)
    first = other["examples"][0]
    assert (first["row"], first["name"]) == (rows[0], "abcde"[columns[0]])
    assert first["quality"] == quality[0]
    assert first["score"] == scores[rows[0], columns[0]]
    assert len(own["examples"]) == min(100, len(suspected(scores, targets)[0]))


@pytest.fixture(scope="module")
def featured():
    rng = np.random.default_rng(1)
    features = rng.normal(3, 2, (60, 6)).astype(np.float32)
    targets = (features[:, :3] + rng.normal(0, 1, (60, 3)) > 3).astype(np.int8)
    targets[rng.random(targets.shape) < 0.15] = -1
    return torch.from_numpy(features), targets


def test_out_of_fold_scores_are_those_of_scikit_learns_regressions(featured, monkeypatch):
    features, targets = featured
    scores = folds.out_of_fold(features, targets, 4, seed=2)
    fold = np.random.default_rng(2).permutation(60) % 4
    for number in range(4):
        out = fold == number
        mean, deviation = features[~out].mean(0), features[~out].std(0)
        scaled = ((features - mean) / deviation).double().numpy()
        for column in range(3):
            known = ~out & (targets[:, column] != -1)
            inverse = 1 / (2 * folds.DECAY * np.count_nonzero(~out))
            judge = LogisticRegression(C=inverse, tol=1e-8, max_iter=1000)
            judge.fit(scaled[known], targets[known, column])
            expected = judge.predict_proba(scaled[out])[:, 1]
            np.testing.assert_allclose(scores[out, column], expected, atol=2e-3)


def test_the_score_of_an_image_does_not_depend_on_its_own_labels(featured):
    features, targets = featured
    scores = folds.out_of_fold(features, targets, 5)
    assert np.array_equal(scores, folds.out_of_fold(features, targets, 5))
    changed = targets.copy()
    changed[7] = 1 - np.abs(changed[7])
    again = folds.out_of_fold(features, changed, 5)
    assert np.array_equal(again[7], scores[7])
    assert not np.array_equal(again, scores)


@pytest.mark.parametrize("number", [1, 61])
def test_folds_that_cannot_be_are_refused(featured, number):
    with pytest.raises(UsageError, match=f"folds is {number}; of 60 images"):
        folds.out_of_fold(*featured, number)
