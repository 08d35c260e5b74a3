"""Scores, and the figures and labels that are made of them, for a checkpoint of a short run."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from asl.data.annotations import Annotations
from asl.data.readers import read
from asl.data.settings import DataSettings
from asl.evaluation import score as scoring
from asl.evaluation.average import Scores
from asl.evaluation.evaluate import epoch_figures, evaluate, evaluated_as
from asl.evaluation.predict import predict
from asl.evaluation.score import Scorer, score
from asl.images.loader import Batch
from asl.metrics import evaluate_scores
from asl.models import checkpoint, create_model
from asl.training.fit import fit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def best(settings, tmp_path_factory, small_shapes):
    """The checkpoint of one epoch, whose two sets of weights differ."""
    return fit(settings(small_shapes, tmp_path_factory.mktemp("run"), epochs=1)) / "best.pt"


@pytest.fixture
def scorer(measuring, small_shapes, best):
    config = measuring(small_shapes, best)
    return Scorer.load(config.model, config.images, config.run, CPU)


@pytest.fixture(scope="module")
def val_set(small_shapes):
    return read("coco", small_shapes, "val2014")


def test_scores_of_several_models_come_from_one_pass_in_eval_mode():
    taken = []

    def batches():
        for size in (3, 2):
            taken.append(size)
            yield Batch(torch.rand(size, 4), torch.empty(size, 5))

    models = [Scores(nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 5))) for _ in range(2)]
    first, second = score(models, batches(), prepare=lambda batch: batch.images)
    assert taken == [3, 2]
    assert first.shape == second.shape == (5, 5)
    assert not torch.equal(first, second)
    assert ((first > 0) & (first < 1)).all()
    assert not any(model.training for model in models)


def test_images_without_a_target_have_no_score():
    company = Batch(torch.rand(1, 4), torch.empty(0, 5))
    [scores] = score([Scores(nn.Linear(4, 5))], [company], prepare=lambda batch: batch.images)
    assert scores.shape == (0, 5)


def test_scores_keep_the_order_of_images_and_classes(scorer, val_set):
    scores = scorer.scores(val_set, "")
    backwards = scorer.scores(val_set.subset(np.arange(20)[::-1]), "")
    torch.testing.assert_close(backwards.flip(0), scores)
    assert scorer.classes == val_set.classes
    assert scores.shape == (20, 24)


def test_half_precision_is_for_large_tables_of_scores_alone(scorer, val_set, monkeypatch):
    assert scorer.scores(val_set, "").dtype == torch.float32
    monkeypatch.setattr(scoring, "HALF_ABOVE", 20 * 24)
    assert scorer.scores(val_set, "").dtype == torch.float32
    monkeypatch.setattr(scoring, "HALF_ABOVE", 20 * 24 - 1)
    assert scorer.scores(val_set, "").dtype == torch.float16


def test_figures_are_those_of_the_scores_at_the_threshold_and_top_k_asked_for(
    measuring, scorer, small_shapes, best, val_set
):
    scores, targets = scorer.scores(val_set, ""), val_set.dense()
    for asked in ({}, {"threshold": 0.3, "top_k": 5}):
        figures = evaluate(measuring(small_shapes, best, **asked))
        expected = evaluate_scores(
            scores,
            targets,
            val_set.classes,
            threshold=asked.get("threshold", 0.8),
            top_k=asked.get("top_k", 3),
        )
        assert {name: figures[name] for name in expected} == expected
    assert figures["split"] == "val2014"
    assert figures["image_size"] == 48


def test_the_figures_of_an_epoch_are_those_of_the_report(scorer, val_set):
    scores = scorer.scores(val_set, "")
    figures = epoch_figures({"ema": scores, "regular": scores.flip(0)}, val_set, 0.3)
    expected = evaluate_scores(scores, val_set.dense(), threshold=0.3)
    assert figures["mAP_ema"] == expected["mAP"]
    assert figures["CF1_ema"] == expected["at_threshold"]["CF1"]
    assert figures["OF1_ema"] == expected["at_threshold"]["OF1"]
    assert epoch_figures({"ema": None}, val_set, 0.3) == {}
    flipped = evaluate_scores(scores.flip(0), val_set.dense(), threshold=0.3)
    assert figures["mAP_regular"] == flipped["mAP"]


def test_each_set_of_weights_can_be_measured_and_is_named(measuring, small_shapes, best):
    figures = {
        weights: evaluate(measuring(small_shapes, best, weights=weights))
        for weights in ("ema", "regular", "best")
    }
    assert figures["ema"]["mAP"] != figures["regular"]["mAP"]
    leading = checkpoint.load(best)["best"]
    assert figures["best"]["mAP"] == figures[leading]["mAP"]
    assert [figures[name]["weights"] for name in ("ema", "regular", "best")] == [
        "ema",
        "regular",
        leading,
    ]


@pytest.mark.parametrize(
    ("settings_of_the_data", "name"),
    [
        ({"dataset": "coco"}, "coco: annotated images only (official)"),
        ({"dataset": "coco", "all_images": True}, "coco: all images"),
        ({"dataset": "voc"}, "voc: difficult objects ignored (official)"),
        ({"dataset": "voc", "val_difficult": "absent"}, "voc: difficult objects taken as absent"),
        ({"dataset": "openimages"}, "openimages: verified labels only (official)"),
        ({"dataset": "nus_wide"}, "nus_wide: all listed images (official)"),
        ({"dataset": "table"}, "table: all listed images"),
    ],
)
def test_the_protocol_has_a_name(settings_of_the_data, name):
    assert evaluated_as(DataSettings(**settings_of_the_data)) == name


def test_the_labels_of_an_image_are_its_highest_scores(
    labelling, scorer, small_shapes, best, val_set
):
    folder = small_shapes / "val2014"
    predictions = predict(labelling(folder, best))
    assert [prediction["file"] for prediction in predictions] == [
        str(path) for path in sorted(folder.iterdir())
    ]
    images = Annotations.unlabelled(
        folder, np.array([path.name.encode() for path in sorted(folder.iterdir())]), ("x",) * 24
    )
    for row, prediction in zip(scorer.scores(images, ""), predictions, strict=True):
        assert len(prediction["labels"]) == 10
        scores = [label["score"] for label in prediction["labels"]]
        assert scores == [round(value, 4) for value in row.topk(10).values.tolist()]
        for label in prediction["labels"]:
            assert round(row[scorer.classes.index(label["name"])].item(), 4) == label["score"]
    assert len(predict(labelling(folder, best, top_k=3))[0]["labels"]) == 3
    json.dumps([*predictions])


def test_a_score_at_the_threshold_is_not_predicted(labelling, scorer, small_shapes, best):
    image = next((small_shapes / "val2014").iterdir())
    alone = Annotations.unlabelled(image.parent, np.array([image.name.encode()]), scorer.classes)
    value = scorer.scores(alone, "")[0, 3].item()
    below = np.nextafter(np.float32(value), np.float32(0)).item()
    for threshold, predicted in ((value, False), (below, True)):
        [found] = predict(labelling(image, best, top_k=24, threshold=threshold))
        [label] = [label for label in found["labels"] if label["name"] == scorer.classes[3]]
        assert label["predicted"] is predicted


def test_a_run_with_an_ml_decoder_is_measured_as_it_was_validated(
    settings, measuring, small_shapes, tmp_path
):
    run = fit(settings(small_shapes, tmp_path / "run", head="ml_decoder", epochs=1))
    measured = evaluate(measuring(small_shapes, run / "best.pt", head="ml_decoder"))
    row = json.loads((run / "metrics.jsonl").read_text())
    best = max(row["mAP_ema"], row["mAP_regular"])
    assert measured["mAP"] == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("head", ["bottleneck", "ml_decoder"])
def test_an_official_open_images_checkpoint_has_the_bottleneck_head_if_none_is_named(
    head, labelling, tmp_path
):
    model = create_model("test_resnet", 5, head)
    names = {number: f"/m/{number}" for number in range(5)}
    about = {"model": model.state_dict(), "num_classes": 5, "idx_to_class": names}
    checkpoint.save(tmp_path / "official.pth", about)
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    named = {} if head == "bottleneck" else {"head": head}
    config = labelling(
        tmp_path / "a.png", tmp_path / "official.pth", dataset_type="OpenImages", **named
    )
    [prediction] = predict(config)
    assert {label["name"] for label in prediction["labels"]} == {*names.values()}
