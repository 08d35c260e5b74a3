"""Thresholds and calibrations in a checkpoint: chosen by validate.py, taken by it and infer.py."""

import json
import shutil

import numpy as np
import pytest
import torch

from asl.data.readers import read
from asl.errors import UsageError
from asl.evaluation import calibration, thresholds
from asl.evaluation.evaluate import evaluate
from asl.evaluation.predict import predict
from asl.evaluation.score import Scorer
from asl.evaluation.text import evaluation_text, prediction_text
from asl.metrics import f1_scores
from asl.models import checkpoint
from asl.models.soup import soup
from asl.training.fit import fit

CPU = torch.device("cpu")
CHOSEN = {"tune_thresholds": "f1", "calibrate": "isotonic"}


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory, small_shapes):
    """The folder of a run of one epoch."""
    return fit(settings(small_shapes, tmp_path_factory.mktemp("run"), epochs=1, lr=1e-2))


@pytest.fixture(scope="module")
def tuned(run, measuring, small_shapes, tmp_path_factory):
    """A checkpoint with thresholds and a calibration, and the figures of when they were chosen."""
    path = tmp_path_factory.mktemp("tuned") / "best.pt"
    shutil.copy(run / "best.pt", path)
    return path, evaluate(measuring(small_shapes, path, **CHOSEN))


@pytest.fixture(scope="module")
def val_set(small_shapes):
    return read("coco", small_shapes, "val2014")


@pytest.fixture(scope="module")
def scores(measuring, small_shapes, run, val_set):
    config = measuring(small_shapes, run / "best.pt")
    scorer = Scorer.load(config.model, config.images, config.run, CPU)
    return scorer.scores(val_set, "").numpy()


def shown(prediction):
    return {label["name"]: label for label in prediction["labels"]}


def test_what_is_stored_is_what_all_images_choose_and_where_that_was(tuned, scores, val_set, run):
    path, _ = tuned
    content = torch.load(path, weights_only=True)
    origin = {
        **{"weights": content["best"], "image_size": 48, "tta": ""},
        **{"dataset": "coco", "split": "val2014", "images": 20},
    }
    values = content["thresholds"].pop("values")
    targets = val_set.dense()
    np.testing.assert_array_equal(values, thresholds.tuned(scores, targets, "f1"))
    common = thresholds.common_threshold(scores, targets, "f1")
    assert content["thresholds"] == {"rule": "f1", "common": common, **origin}
    made = calibration.from_state(content["calibration"], 24)
    expected = calibration.fitted(scores, targets, "isotonic")
    np.testing.assert_array_equal(made(scores), expected(scores))
    assert {name: content["calibration"][name] for name in origin} == origin
    before = torch.load(run / "best.pt", weights_only=True)
    assert [*content] == [*before, "thresholds", "calibration"]
    assert {name: content[name] for name in ("config", "history", "best", "idx_to_class")} == {
        name: before[name] for name in ("config", "history", "best", "idx_to_class")
    }
    for which in ("model", "ema", "regular"):
        assert all(torch.equal(x, before[which][name]) for name, x in content[which].items())


def test_the_figures_are_those_of_cross_fitting_beside_the_usual_ones(tuned, scores, val_set):
    _, figures = tuned
    targets = val_set.dense()
    expected = thresholds.cross_fitted(scores, targets, "f1", 0.8)
    assert {**figures["tuning"], "unreached": []} == expected
    found = figures["calibration"]
    assert found["chosen"] == "isotonic"
    assert found["ECE"] == calibration.cross_fitted(scores, targets)["ECE"]
    assert figures["threshold"] == 0.8
    assert figures["at_threshold"] == f1_scores(scores, targets, 0.8)
    json.dumps(figures, allow_nan=False)
    text = evaluation_text(figures)
    gain = expected["gain"]["over_threshold"]
    low, high = gain["interval"]
    line = f"over 0.8: {gain['macro_F1']:+.2f} (95 % interval {low:+.2f} to {high:+.2f})"
    assert line in text
    for name, key in (
        ("one for each class ", "per_class"),
        ("one for each class, same images ", "per_class_same_images"),
    ):
        [row] = [line for line in text.splitlines() if line.startswith(name) and "." in line]
        assert row.split()[-1] == f"{expected['at'][key]['macro_F1']:.1f}"
    [row] = [line for line in text.splitlines() if line.startswith("isotonic ")]
    assert row.split()[1:] == [f"{found[which]['isotonic']:.4f}" for which in ("ECE", "Brier")]


def test_validation_takes_what_is_stored_and_says_when_its_images_chose_it(
    tuned, measuring, small_shapes, scores, val_set
):
    path, _ = tuned
    stored = checkpoint.load(path)
    figures = evaluate(measuring(small_shapes, path))
    limits = stored["thresholds"]["values"].numpy()
    assert figures["threshold"] == limits.tolist()
    targets = val_set.dense()
    assert figures["at_threshold"] == f1_scores(scores, targets, limits)
    probabilities = calibration.from_state(stored["calibration"], 24)(scores)
    assert (
        figures["calibration"]["ECE"]["isotonic"] == calibration.ece(probabilities, targets).mean()
    )
    json.dumps(figures, allow_nan=False)
    text = evaluation_text(figures)
    assert "of each class, for f1, from 20 images of coco val2014: these very images" in text
    assert "score > its threshold, top 3" in text
    other = evaluate(measuring(small_shapes, path, val_split="train2014"))
    assert "these very images" not in evaluation_text(other)
    assert "from 20 images of coco val2014" in evaluation_text(other)


def test_the_threshold_that_is_given_wins(tuned, measuring, labelling, small_shapes):
    path, _ = tuned
    figures = evaluate(measuring(small_shapes, path, threshold=0.8))
    assert figures["threshold"] == 0.8
    assert figures["notes"] == [f"not used: the thresholds in {path}, as --threshold 0.8 is given"]
    assert f"note        {figures['notes'][0]}" in evaluation_text(figures)
    assert figures["calibration"]["stored"]["method"] == "isotonic"
    image = next((small_shapes / "val2014").iterdir())
    predictions = predict(labelling(image, path, threshold=0.3, top_k=24))
    [found] = predictions
    assert {label["threshold"] for label in found["labels"]} == {0.3}
    assert all(label["predicted"] == (label["score"] > 0.3) for label in found["labels"])
    assert "as --threshold 0.3 is given" in predictions.predictor.judge.lines()[0]


def test_inference_takes_what_is_stored_and_says_what_it_shows(
    tuned, run, labelling, small_shapes, scores, val_set
):
    path, _ = tuned
    stored = checkpoint.load(path)
    limits = dict(zip(val_set.classes, stored["thresholds"]["values"].tolist(), strict=True))
    image = val_set.path(3)
    predictions = predict(labelling(image, path, top_k=24))
    assert predictions.predictor.judge.lines() == [
        "probabilities (isotonic, coco val2014)",
        "thresholds of each class (f1, coco val2014)",
    ]
    [found] = predictions
    of_scores = predict(labelling(image, run / "best.pt", top_k=24))
    assert of_scores.predictor.judge.lines() == ["scores: they rank, they are no probabilities"]
    [plain] = of_scores
    of_image = dict(zip(val_set.classes, scores[3].tolist(), strict=True))
    probabilities = calibration.from_state(stored["calibration"], 24)(scores)[3]
    expected = dict(zip(val_set.classes, probabilities, strict=True))
    for name, label in shown(found).items():
        assert label["score"] == pytest.approx(of_image[name], abs=1e-4)
        assert label["score"] == shown(plain)[name]["score"]
        assert label["predicted"] == (of_image[name] > limits[name])
        assert label["probability"] == pytest.approx(expected[name], abs=1e-4)
        assert "probability" not in shown(plain)[name]
        assert shown(plain)[name]["threshold"] == 0.8
    assert any(
        label["predicted"] != shown(plain)[label["name"]]["predicted"] for label in found["labels"]
    )
    first = found["labels"][0]
    assert f"{100 * first['probability']:.1f} %" in prediction_text(found)
    assert f"{100 * first['score']:.1f} %" not in prediction_text(found)


def test_for_other_scores_a_line_says_that_they_are_not_used(tuned, run, measuring, small_shapes):
    path, _ = tuned
    best = checkpoint.load(path)["best"]
    other = {"ema": "regular", "regular": "ema"}[best]
    for changed, reason in (
        ({"weights": other}, f"weights {best} (now {other})"),
        ({"image_size": 64}, "image_size 48 (now 64)"),
        ({"tta": "flip"}, "tta none (now flip)"),
        ({"image_size": 64, "tta": "flip"}, "image_size 48 (now 64), tta none (now flip)"),
    ):
        figures = evaluate(measuring(small_shapes, path, **changed))
        assert figures["notes"] == [
            f"not used: the {name} in {path}, made for {reason}"
            for name in ("thresholds", "calibration")
        ]
        assert figures["threshold"] == 0.8
        assert "calibration" not in figures
    assert evaluate(measuring(small_shapes, path, weights=best))["threshold"] != 0.8
    both = measuring(small_shapes, path).with_settings(model_path=(str(path), str(run / "best.pt")))
    figures = evaluate(both)
    assert len(figures["notes"]) == 2
    assert "alone" in figures["notes"][0]


def test_what_was_stored_plays_no_part_when_it_is_chosen_anew(
    tuned, measuring, small_shapes, tmp_path
):
    path = shutil.copy(tuned[0], tmp_path)
    again = evaluate(measuring(small_shapes, path, **CHOSEN))
    assert again["tuning"] == tuned[1]["tuning"]
    assert again["calibration"] == tuned[1]["calibration"]
    assert again["threshold"] == 0.8
    precise = evaluate(
        measuring(small_shapes, path, tune_thresholds="precision:0.9", threshold=0.6)
    )
    assert precise["tuning"]["at"]["threshold"] == precise["at_threshold"]
    content = checkpoint.load(path)
    assert content["thresholds"]["rule"] == "precision:0.9"
    assert content["calibration"]["method"] == "isotonic"
    assert precise["calibration"]["stored"]["method"] == "isotonic"
    names = precise["tuning"]["unreached"]
    assert names
    assert set(names) <= {each["name"] for each in precise["per_class"]}
    assert f"never that precise: {names[0]}" in evaluation_text(precise)


def test_thresholds_of_a_chosen_set_of_weights_and_view_are_taken_with_these(
    run, measuring, small_shapes, tmp_path
):
    path = shutil.copy(run / "best.pt", tmp_path)
    asked = {"weights": "regular", "tta": "flip", "image_size": 64}
    evaluate(measuring(small_shapes, path, tune_thresholds="f1", **asked))
    assert isinstance(evaluate(measuring(small_shapes, path, **asked))["threshold"], list)
    assert evaluate(measuring(small_shapes, path))["threshold"] == 0.8


def test_a_run_goes_on_from_an_amended_checkpoint_to_the_same_weights(
    settings, measuring, small_shapes, tmp_path
):
    folder = fit(settings(small_shapes, tmp_path / "a", epochs=2, stop_epoch=1))
    shutil.copytree(folder, tmp_path / "b")
    evaluate(measuring(small_shapes, folder / "last.pt", **CHOSEN))
    assert "thresholds" in checkpoint.load(folder / "last.pt")
    two = [fit(settings(small_shapes, tmp_path / x, epochs=2, resume="last")) for x in "ab"]
    last = [checkpoint.load(folder / "last.pt") for folder in two]
    for which in ("ema", "regular"):
        assert all(torch.equal(x, last[1][which][name]) for name, x in last[0][which].items())
    assert "thresholds" not in last[0]  # they were of other weights


def test_a_soup_has_no_thresholds_of_its_parents(tuned):
    assert soup([tuned[0], tuned[0]]).keys().isdisjoint({"thresholds", "calibration"})


def test_files_that_cannot_take_them_are_refused_before_anything_is_scored(
    run, measuring, small_shapes, before
):
    several = measuring(small_shapes, run / "best.pt", calibrate="platt").with_settings(
        model_path=(str(run / "best.pt"), str(run / "last.pt"))
    )
    with before(1, Scorer, "scores", lambda: pytest.fail("scored")), pytest.raises(UsageError):
        evaluate(several)
