"""Lines and tables of text, and JSON."""

import json

import numpy as np
import pytest

from asl.data.partial import simulate
from asl.errors import UsageError
from asl.evaluation.text import (
    epoch_line,
    evaluation_text,
    frequencies_text,
    prediction_text,
    rank_correlation,
    write_json,
)
from asl.metrics import evaluate_scores

ROW = {"epoch": 7, "lr": 2e-4, "loss": 123.456}
MAP = {"mAP_ema": 85.54, "mAP_regular": 81.3}


def figures(num_classes=20, protocol="full", threshold=0.5):
    """Class 0 has no positives, class 1 no negatives, class 2 (if partial) no labels."""
    random = np.random.default_rng(0)
    targets = (random.random((40, num_classes)) < 0.3).astype(np.int8)
    targets[:, 0], targets[:, 1] = 0, 1
    if protocol == "partial":
        targets[random.random(targets.shape) < 0.5] = -1
        targets[:, 2] = -1
    names = [f"name {c}" for c in range(num_classes)]
    scores = random.random(targets.shape)
    return evaluate_scores(scores, targets, names, threshold=threshold, protocol=protocol)


def prediction(*scores, threshold=0.5):
    names = ("dog", "sofa", "cat")
    return [
        {"name": name, "score": score, "predicted": score > threshold}
        for name, score in zip(names, scores, strict=False)
    ]


def test_epoch_lines_say_what_was_measured_and_stay_aligned():
    line = epoch_line(ROW | MAP)
    for part in ("7", "2.0e-04", "123.46", "85.54 (EMA)", "81.30 (regular)"):
        assert part in line
    assert "mAP" not in epoch_line(ROW)
    later = epoch_line({"epoch": 80, "lr": 1e-9, "loss": 9.5} | MAP)
    assert later.index("loss") == line.index("loss")
    assert later.index("mAP") == line.index("mAP")
    undefined = epoch_line(ROW | {"mAP_ema": None, "mAP_regular": None})
    assert len(undefined) == len(line)
    assert "mAP     - (EMA)     - (regular)" in undefined
    assert "gamma_neg  3.50" in epoch_line(ROW | {"gap": 0.1, "gamma_neg": 3.5})


@pytest.mark.parametrize("protocol", ["full", "partial", "official"])
def test_evaluation_text_gives_every_headline_figure(protocol):
    measured = figures(protocol=protocol, threshold=0.75)
    text = evaluation_text(measured)
    lines = text.splitlines()
    assert f"mAP         {measured['mAP']:.2f}" in text
    assert (f"{measured['weighted_mAP']:.2f} (weighted" in text) == (protocol == "partial")
    assert "40 images, 20 classes" in text
    for start, key in (("score > 0.75  ", "at_threshold"), ("score > 0.75, top 3", "at_top_k")):
        row = next(line for line in lines if line.startswith(start))
        names = ("CP", "CR", "CF1", "OP", "OR", "OF1", "macro_F1")
        assert row.split()[-7:] == [f"{measured[key][name]:.1f}" for name in names]


@pytest.mark.parametrize(
    ("protocol", "reasons"),
    [
        ("full", {"positives": "name 0"}),
        ("partial", {"labels": "name 2", "positives": "name 0", "negatives": "name 1"}),
        ("official", {}),
    ],
)
def test_evaluation_text_says_which_classes_were_left_out_and_why(protocol, reasons):
    text = evaluation_text(figures(protocol=protocol))
    for reason, name in reasons.items():
        assert f"left out    1 without {reason}: {name}" in text
    assert text.count("left out") == len(reasons)


def test_evaluation_text_says_what_was_measured_where_it_is_told():
    about = {"checkpoint": "a.pt", "weights": "ema", "dataset": "voc", "split": "val"}
    text = evaluation_text(figures() | about | {"image_size": 160})
    assert "views" not in text
    several = {"checkpoint": ["a.pt", "b.pt"], "weights": ["ema", "only"], "tta": "flip"}
    lines = evaluation_text(figures() | about | {"image_size": 160} | several).splitlines()
    assert lines[0] == "checkpoint  a.pt (ema weights)"
    assert lines[1] == "checkpoint  b.pt (only weights)"
    assert lines[3] == "views       flip"
    assert "a.pt (ema weights)" in text
    assert "voc val at 160 px" in text


@pytest.mark.parametrize("num_classes", [20, 80])
def test_every_class_has_a_row(num_classes):
    measured = figures(num_classes)
    table = evaluation_text(measured).splitlines()[-num_classes:]
    for line, each in zip(table, measured["per_class"], strict=True):
        ap = "-" if each["AP"] is None else f"{each['AP']:.2f}"
        expected = [*each["name"].split(), ap, str(each["positives"]), str(each["negatives"])]
        assert line.split() == expected
    assert len({len(line) for line in table}) == 1


def test_of_thousands_of_classes_the_extremes_are_listed():
    measured = figures(9605, "partial")
    text = evaluation_text(measured)
    assert len(text.splitlines()) < 60
    best, worst = text.split("the 10 best classes")[1].split("the 10 worst classes")
    counted = [c for c in measured["per_class"] if c["positives"] and c["negatives"]]
    ranked = sorted(c["AP"] for c in counted)

    def listed(table):
        return [float(line.split()[2]) for line in table.splitlines() if line.startswith("name ")]

    assert listed(best) == [round(ap, 2) for ap in ranked[:-11:-1]]
    assert listed(worst) == [round(ap, 2) for ap in ranked[9::-1]]
    assert "all 9,605 classes are in the JSON" in text
    assert " more" in next(line for line in text.splitlines() if "without positives" in line)


def test_evaluation_text_of_nothing_to_average():
    nothing = evaluate_scores(np.zeros((2, 2)), np.full((2, 2), -1), protocol="partial")
    text = evaluation_text(nothing)
    assert "mAP         - (mean over 0 classes)" in text
    many = evaluate_scores(np.zeros((2, 101)), np.full((2, 101), -1), protocol="partial")
    assert "the 0 best classes" in evaluation_text(many)


def test_prediction_text_lists_what_was_predicted():
    text = prediction_text({"file": "a/1.jpg", "labels": prediction(0.981, 0.6, 0.02)})
    assert text.splitlines() == [
        "a/1.jpg",
        "  dog   98.1 %",
        "  sofa  60.0 %",
        "  below the threshold: cat 2.0 %",
    ]


def test_prediction_text_says_that_nothing_was_found_and_what_came_closest():
    text = prediction_text({"file": "1.jpg", "labels": prediction(0.4, 0.1)})
    assert "nothing is above the threshold; the highest: dog 40.0 %" in text


def test_json_is_read_back_and_its_folder_made(tmp_path):
    value = {"name": "Café", "AP": None, "mAP": 86.6}
    write_json(value, tmp_path / "new" / "a.json")
    text = (tmp_path / "new" / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "Café" in text
    with pytest.raises(UsageError, match="cannot write"):
        write_json(value, tmp_path / "new" / "a.json" / "b.json")


def test_frequencies_text_counts_what_is_there_what_is_left_and_how_well_a_prior_ranks(long_tailed):
    data = long_tailed(12)
    prior = np.linspace(0.5, 0.01, 12)
    prior[0] = 0
    text = frequencies_text(data, {"fpc:20": simulate(data, "fpc:20", 0)}, {"mine": prior})
    lines = text.splitlines()
    assert lines[3].split() == ["name0", "100", "1.0000", "20", "0", "0.0000"]
    assert lines[4].split() == ["name1", "50", "0.5000", "20", "20", "0.4555"]
    assert lines[14].split() == ["name11", "8", "0.0800", "8", "8", "0.0100"]
    # Eleven of twelve ranks in order, and the first at the end.
    assert "prior mine: rank correlation 0.538" in text
    assert "top 10 (9 rightly): name1, name2, " in text


def test_ranks_of_equal_values_are_shared():
    assert rank_correlation([1, 2, 2, 3], [10, 20, 20, 30]) == pytest.approx(1)
    assert rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)


def test_evaluation_text_names_the_protocol_of_the_data_set():
    measured = {**figures(), "evaluated_as": "voc: difficult objects ignored"}
    assert "protocol    voc: difficult objects ignored" in evaluation_text(measured)


def test_a_class_is_not_among_the_best_and_the_worst():
    targets = np.zeros((4, 120), np.int8)
    targets[0, :12] = 1  # twelve classes have an AP
    names = [f"name {c}" for c in range(120)]
    report = evaluation_text(
        evaluate_scores(np.random.default_rng(0).random((4, 120)), targets, names)
    )
    best, worst = report.split("the 10 best classes")[1].split("the 2 worst classes")
    listed = [line for line in (best + worst).splitlines() if line.startswith("name ")]
    assert len(listed) == len({line[:8] for line in listed}) == 12
