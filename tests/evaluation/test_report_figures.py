"""The figures of a report, against scikit-learn, timm, direct resampling and cases made by hand."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    f1_score,
    precision_recall_curve,
    precision_score,
    recall_score,
)
from timm.task.evaluator import MultiLabelClassificationEvaluator

from asl.evaluation.report.bootstrap import (
    interval,
    resample,
    resampled_ap,
    resampled_f1,
    resampled_map,
)
from asl.evaluation.report.classes import BINS, all_cells
from asl.evaluation.report.figures import report_contents
from asl.evaluation.report.protocols import interpolated, protocols
from asl.evaluation.report.sizes import by_size
from asl.evaluation.report.together import together
from asl.metrics import average_precision, f1_scores, mean_average_precision

CLASSES = [f"class {number}" for number in range(8)]


@pytest.fixture(scope="module")
def table():
    """300 images of 8 classes with many ties and -1 cells; class 3 has no positive, 5 has one.

    Class 6 has one negative, which a third of the resamples do not draw.
    """
    rng = np.random.default_rng(0)
    targets = rng.choice([1, 0, -1], p=[0.2, 0.6, 0.2], size=(300, 8)).astype(np.int8)
    targets[targets[:, 3] == 1, 3] = 0
    targets[targets[:, 5] == 1, 5] = 0
    targets[7, 5] = 1
    targets[targets[:, 6] == 0, 6] = -1
    targets[9, 6] = 0
    scores = (0.35 * (targets == 1) + 0.6 * rng.random((300, 8))).astype(np.float32).round(2)
    return scores, targets


@pytest.fixture(scope="module")
def limits():
    return {"common": np.full(8, 0.5), "f1": np.array([0.3, 0.4, 0.5, np.nan, 0.3, 0.4, 0.5, 0.6])}


@pytest.fixture(scope="module")
def report(table, limits):
    files = [f"{row}.jpg" for row in range(300)]
    more = {"title": "x", "protocol": "partial", "thresholds": limits, "files": files}
    return report_contents(*table, CLASSES, resamples=50, **more)


def of_class(table, column):
    """Labels and scores of a class's annotated cells, as scikit-learn takes them."""
    scores, targets = (each[:, column] for each in table)
    return targets[targets != -1], scores[targets != -1].astype(np.float64)


def test_the_report_is_ready_for_json_and_says_what_was_not_shown(report):
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert any("no figures by size" in note for note in report["notes"])
    assert report["sizes"] == []


def test_figures_of_classes_are_those_of_scikit_learn(table, limits, report):
    for column, row in enumerate(report["classes"]):
        label, score = of_class(table, column)
        assert (row["positives"], row["negatives"]) == (label.sum(), (label == 0).sum())
        assert row["few"] == (label.sum() < 10)
        if column == 3:
            assert row["AP"] == {"value": None, "low": None, "high": None}
            assert row["curve"] is None
            continue
        expected = average_precision_score(label, score)
        assert row["AP"]["value"] == pytest.approx(100 * expected, rel=1e-9)
        for point in row["points"]:
            limit = limits[point["rule"]][column]
            judged = {"y_true": label, "y_pred": score > np.float32(limit), "zero_division": 0}
            assert point["threshold"] == limit
            for name, judge in (
                ("precision", precision_score),
                ("recall", recall_score),
                ("f1", f1_score),
            ):
                assert (point[name] or 0) == pytest.approx(100 * judge(**judged), rel=1e-9)


def test_a_curve_has_the_points_of_scikit_learns_at_every_positive(table, report):
    label, score = of_class(table, 0)
    precision, recall, _ = precision_recall_curve(label, score)
    points = {(round(r, 9), round(p, 9)) for r, p in zip(recall, precision, strict=True)}
    curve = report["classes"][0]["curve"]
    found = list(zip(curve["recall"], curve["precision"], strict=True))
    assert {(round(r, 9), round(p, 9)) for r, p in found} <= points
    assert [r for r, _ in found] == sorted({r for r in recall if r > 0})


def test_no_threshold_predicts_nothing(report):
    common, none = report["classes"][3]["points"]
    assert none == {"rule": "f1", **dict.fromkeys(("threshold", "precision", "recall", "f1"))}
    assert (common["threshold"], common["recall"]) == (0.5, None)


@pytest.mark.parametrize("protocol", ["full", "partial", "official"])
def test_resamples_are_exactly_those_of_a_table_with_the_drawn_rows(table, protocol):
    scores, targets = table
    counts = resample(300, 20, seed=3)
    assert counts.sum(0).tolist() == [300] * 20
    ap = resampled_ap(scores, targets, counts)
    means = resampled_map(ap, targets, counts, protocol)
    limits = np.full(8, 0.5)
    f1 = resampled_f1(scores, targets, limits, counts, protocol)
    for number in range(20):
        drawn = np.repeat(np.arange(300), counts[:, number].int().numpy())
        rows = scores[drawn], targets[drawn]
        np.testing.assert_allclose(ap[:, number], average_precision(*rows), rtol=1e-12)
        expected = mean_average_precision(*rows, protocol=protocol)
        assert means[number] == pytest.approx(expected, rel=1e-12)
        judged = f1_scores(*rows, limits, protocol=protocol)
        for name in ("CF1", "OF1"):
            assert f1[name][number] == pytest.approx(judged[name], rel=1e-9)


def test_intervals_are_those_of_drawing_images_a_thousand_times(table, report):
    scores, targets = table
    rng = np.random.default_rng(1)
    draws = (rng.choice(300, 300) for _ in range(1000))
    direct = [mean_average_precision(scores[d], targets[d], protocol="partial") for d in draws]
    low, high = np.percentile(direct, [2.5, 97.5])
    counts = resample(300, 1000)
    samples = resampled_map(resampled_ap(scores, targets, counts), targets, counts, "partial")
    found = interval(report["headline"][0]["figure"]["value"], samples)
    assert found["low"] == pytest.approx(low, abs=0.1 * (high - low))
    assert found["high"] == pytest.approx(high, abs=0.1 * (high - low))
    assert found["low"] < found["value"] < found["high"]


def test_a_figure_without_a_sample_has_no_interval():
    assert interval(np.nan, np.array([1.0]))["value"] is None
    assert interval(3.0, np.full(4, np.nan)) == {"value": 3.0, "low": None, "high": None}


def test_the_headline_has_its_protocol_and_its_rule(table, report):
    expected = mean_average_precision(*table, protocol="partial")
    f1 = f1_scores(*table, 0.5, protocol="partial")
    values = {each["name"]: each["figure"]["value"] for each in report["headline"]}
    assert values == pytest.approx({"mAP": expected, "CF1": f1["CF1"], "OF1": f1["OF1"]})
    assert "partial" in report["headline"][0]["explanation"]
    assert "rule common" in report["headline"][1]["explanation"]


def test_the_box_of_protocols_has_what_other_code_computes(table):
    scores, targets = table
    found = {each["name"]: each["mAP"] for each in protocols(scores, targets)}
    judge = MultiLabelClassificationEvaluator()
    judge.update(torch.from_numpy(scores).logit(1e-6), torch.from_numpy((targets == 1) * 1.0))
    assert found["timm"] == pytest.approx(judge.compute()["map"], rel=1e-6)
    assert found["official"] == pytest.approx(found["full"] * 7 / 8)
    envelopes, elevens = [], []
    for column in (0, 1, 2, 4, 5, 6, 7):
        precision, recall, _ = precision_recall_curve(*of_class(table, column))
        highest = np.maximum.accumulate(precision[:-1])[::-1]
        rising = recall[:-1][::-1]
        envelopes.append(np.diff(rising, prepend=0) @ highest)
        at = [[p for r, p in zip(rising, highest, strict=True) if r >= x - 1e-9] for x in ELEVEN]
        elevens.append(np.mean([max(each) for each in at]))
    assert found["interpolated"] == pytest.approx(100 * np.mean(envelopes))
    assert found["11 points"] == pytest.approx(100 * np.mean(elevens))
    assert found["interpolated"] > found["full"]


ELEVEN = np.arange(11) / 10


def test_interpolation_by_hand():
    # Precision at the positives: 1, 2/4, 3/5; the envelope at the second is that of the third.
    targets = np.array([[1], [0], [0], [1], [1]])
    scores = np.array([[0.9], [0.8], [0.7], [0.6], [0.5]])
    envelope, eleven = interpolated(scores, targets)
    assert envelope[0] == pytest.approx((1 + 0.6 + 0.6) / 3)
    assert eleven[0] == pytest.approx((4 * 1 + 7 * 0.6) / 11)


def test_all_cells_together(table):
    scores, targets = table
    known = targets != -1
    label, score = targets[known], scores[known].astype(np.float64)
    curve, histogram, reliability = all_cells(scores, targets)
    assert reliability["brier"] == pytest.approx(brier_score_loss(label, score))
    bins = np.minimum((score * BINS).astype(int), BINS - 1)
    frequency = [label[bins == b].mean() for b in range(BINS) if (bins == b).any()]
    mean = [score[bins == b].mean() for b in range(BINS) if (bins == b).any()]
    assert reliability["frequency"] == pytest.approx(frequency)
    assert reliability["score"] == pytest.approx(mean)
    gaps = np.abs(np.subtract(mean, frequency)) * reliability["cells"]
    assert reliability["ece"] == pytest.approx(gaps.sum() / known.sum())
    for name, value in (("positives", 1), ("negatives", 0)):
        assert histogram[name] == np.bincount(bins[label == value], minlength=BINS).tolist()
    precision, recall, _ = precision_recall_curve(label, score)
    points = {(round(r, 9), round(p, 9)) for r, p in zip(recall, precision, strict=True)}
    found = list(zip(curve["recall"], curve["precision"], strict=True))
    assert {(round(r, 9), round(p, 9)) for r, p in found} <= points
    assert found[-1][0] == 1


def test_cells_that_are_not_annotated_count_nowhere(table, limits, report):
    scores, targets = table
    others = np.where(targets == -1, np.random.default_rng(5).random(scores.shape), scores)
    more = {"title": "x", "protocol": "partial", "thresholds": limits}
    again = report_contents(others.astype(np.float32), targets, CLASSES, resamples=50, **more)
    apart = {"galleries", "protocols"}  # the rows show what is predicted; timm takes them as absent
    assert {k: v for k, v in again.items() if k not in apart} == {
        k: v for k, v in report.items() if k not in apart
    }
    for one, other in zip(report["protocols"], again["protocols"], strict=True):
        assert (one == other) == (one["name"] != "timm")
    for one, other in zip(report["galleries"], again["galleries"], strict=True):
        cells = [[(e["row"], e["name"]) for e in each["examples"]] for each in (one, other)]
        assert cells[0] == cells[1]


def test_galleries_have_the_worst_errors_first_and_few_of_a_class(table, limits, report):
    scores, targets = table
    alarms, misses, _ = report["galleries"]
    for gallery, label, sign in ((alarms, 0, 1), (misses, 1, -1)):
        found = [(each["row"], CLASSES.index(each["name"])) for each in gallery["examples"]]
        values = [sign * scores[cell] for cell in found]
        assert values == sorted(values, reverse=True)
        assert all(targets[cell] == label for cell in found)
        assert max(np.bincount([column for _, column in found])) == 4
        wrong = (targets == label) & ((scores > limits["f1"]) != label)
        assert values[0] == np.where(wrong, sign * scores, -9).max()
    example = alarms["examples"][0]
    row = example["row"]
    assert example["file"] == f"{row}.jpg"
    assert example["annotated"] is False
    assert example["truth"] == [CLASSES[c] for c in np.flatnonzero(targets[row] == 1)]
    predicted = [c for c in np.argsort(-scores[row]) if scores[row, c] > limits["f1"][c]]
    assert [label["name"] for label in example["predicted"]] == [CLASSES[c] for c in predicted]


def test_figures_by_the_number_of_labels_are_those_of_these_images(table, limits, report):
    scores, targets = table
    numbers = (targets == 1).sum(1)
    assert sum(each["count"] for each in report["numbers_of_labels"]) == 300
    [two] = [each for each in report["numbers_of_labels"] if each["name"] == "2 labels"]
    rows = numbers == 2
    assert two["count"] == rows.sum()
    assert two["AP"] == mean_average_precision(scores[rows], targets[rows], protocol="partial")
    hits = (scores > limits["f1"])[rows] & (targets == 1)[rows]
    assert two["recall"] == pytest.approx(100 * hits.sum() / (2 * rows.sum()))


def test_figures_by_size_keep_the_positives_of_that_size_and_all_negatives():
    targets = np.array([[1], [1], [1], [1], [0], [0]], dtype=np.int8)
    scores = np.array([[0.9], [0.6], [0.5], [0.1], [0.7], [0.2]], dtype=np.float32)
    sizes = np.array([[3], [2], [3], [1], [0], [0]], dtype=np.int8)
    small, medium, large = by_size(scores, targets, np.array([0.55]), "full", sizes)
    assert small == {"name": "small", "count": 1, "AP": pytest.approx(100 / 3), "recall": 0}
    assert medium == {"name": "medium", "count": 1, "AP": 50, "recall": 100}
    assert large["AP"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert (large["count"], large["recall"]) == (2, 50)


def test_what_comes_together_is_counted_by_hand():
    targets = np.array([[1, 1], [1, 0], [1, 0], [0, 1], [1, -1]], dtype=np.int8)
    scores = np.array([[0.9, 0.9], [0.1, 0.8], [0.9, 0.2], [0.9, 0.9], [0.9, 0.9]])
    labels, alarms, misses = together(scores, targets, ["a", "b"], np.array([0.5, 0.5]))
    assert labels["table"] == [[None, 0.5], [pytest.approx(1 / 3), None]]
    assert alarms["table"] == [[None, 1.0], [0.5, None]]
    assert misses["classes"] == ["a", "b"]
    assert misses["table"] == [[None, None], [1.0, None]]


def test_wrong_thresholds_are_refused(table):
    for wrong, message in (({}, "none"), ({"common": [0.5]}, r"'common'\] has shape \(1,\)")):
        with pytest.raises(ValueError, match=message):
            report_contents(*table, CLASSES, title="x", protocol="full", thresholds=wrong)


@pytest.mark.parametrize("kind", ["one image", "nothing annotated", "no positive"])
def test_a_report_of_almost_nothing_is_a_report(kind):
    targets = np.zeros((1 if kind == "one image" else 4, 2), dtype=np.int8)
    targets[0, 0] = kind == "one image"
    targets[:] = -1 if kind == "nothing annotated" else targets
    scores = np.linspace(0, 1, targets.size, dtype=np.float16).reshape(targets.shape)
    more = {"title": "x", "protocol": "full", "thresholds": {"common": [0.5, np.nan]}}
    found = report_contents(scores, targets, ["a", "b"], resamples=3, **more)
    json.dumps(found, allow_nan=False)
    assert found["images"] == len(targets)
