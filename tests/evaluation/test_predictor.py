"""`Predictor`: the labels of images from Python are those of infer.py."""

import numpy as np
import pytest
import torch
from PIL import Image

from asl import Predictor
from asl.data.annotations import Annotations
from asl.errors import DataError, UsageError
from asl.evaluation.predict import predict
from asl.evaluation.settings import InferConfig
from asl.images.decode import find_images
from asl.models import checkpoint

USUAL = {"device": "cpu", "amp": "off", "threshold": 0.5}


def infer(model, pictures, **settings):
    usual = {**USUAL, "workers": 0, "draw": False}
    return predict(
        InferConfig.of(
            **{**usual, "model_name": "test_resnet", "image_size": 64, **settings},
            model_path=str(model),
            pic_path=str(pictures),
        )
    )


@pytest.fixture(scope="module")
def predictor(untrained):
    return Predictor(untrained, **USUAL)


def test_a_predictor_needs_the_checkpoint_alone_and_says_its_classes(untrained):
    predictor = Predictor(untrained)
    assert predictor.classes == ("cat", "dog", "bird", "boat", "car")
    assert predictor.scorer.sizes == (64,)
    assert predictor.judge.thresholds.tolist() == [0.8] * 5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 4},
        {"tta": "flip+scales:1,1.5"},
        {"exif_rotate": True},
        {"draft_decode": True},
    ],
)
def test_scores_are_those_of_infer_to_the_bit_for_the_same_batches(
    untrained, photographs, settings
):
    predictions = infer(untrained, photographs, **settings)
    files = [prediction["file"] for prediction in predictions]
    assert len(files) == 9
    predictor = Predictor(untrained, **USUAL, **settings)
    scores = predictor.scores(files)
    assert scores.dtype == np.float32
    assert scores.shape == (9, 5)
    assert np.array_equal(scores, predictions.scores.numpy())
    assert predictor(files) == [prediction["labels"] for prediction in predictions]


def test_worker_processes_change_nothing(untrained, photographs):
    alone, helped = infer(untrained, photographs), infer(untrained, photographs, workers=2)
    assert torch.equal(alone.scores, helped.scores)
    assert [*alone] == [*helped]


def test_an_image_gives_its_labels_and_several_a_list_of_those(predictor, photographs):
    path = photographs / "0.jpg"
    labels = predictor(path)
    assert [*labels[0]] == ["name", "score", "predicted", "threshold"]
    assert sorted(label["name"] for label in labels) == sorted(predictor.classes)
    assert [label["score"] for label in labels] == sorted(
        (round(score, 4) for score in predictor.scores(path).tolist()), reverse=True
    )
    assert {label["predicted"] for label in labels} == {True, False}
    for label in labels:
        assert label["predicted"] == (label["score"] > 0.5)
    assert predictor([path]) == [labels]
    assert predictor(iter([path, path]))[1] == predictor([path, path])[0]
    assert predictor([]) == []
    assert predictor.scores([]).shape == (0, 5)
    assert predictor.scores(path).shape == (5,)


def test_labels_are_judged_as_infer_judges_them_and_all_predicted_ones_can_be_had(untrained):
    predictor = Predictor(untrained, threshold=0.3, top_k=2)
    scores = [0.8, 0.2, 0.3, 0.5, 0.31]
    assert predictor.labels(scores) == [
        {"name": "cat", "score": 0.8, "predicted": True, "threshold": 0.3},
        {"name": "boat", "score": 0.5, "predicted": True, "threshold": 0.3},
    ]
    assert [label["name"] for label in predictor.predicted(scores)] == ["cat", "boat", "car"]


def test_every_form_of_an_image_has_the_same_labels(predictor, photographs):
    path = photographs / "1.png"
    with Image.open(path) as picture:
        array = np.asarray(picture)
        forms = [path, str(path), path.read_bytes(), picture, array]
        scores = [predictor.scores(form) for form in forms]
        mixed = predictor.scores(forms)
    for each in scores[1:]:
        assert np.array_equal(each, scores[0])
    for each in mixed[1:]:
        assert each == pytest.approx(scores[0], abs=1e-6)
    assert np.array_equal(predictor.scores(np.stack([array, array])), mixed[:2])


def test_settings_are_those_of_infer(untrained, photographs, tmp_path):
    path = photographs / "0.jpg"
    assert len(Predictor(untrained, top_k=2)(path)) == 2
    names = tmp_path / "names.csv"
    names.write_text("cat,House cat\ndog,Pet\nbird,Pet\n")
    predictor = Predictor(untrained, class_descriptions=str(names))
    assert predictor.classes == ("House cat", "Pet (dog)", "Pet (bird)", "boat", "car")
    twice = Predictor([untrained, untrained], **USUAL)
    once = Predictor(untrained, **USUAL)
    assert twice.scores(path) == pytest.approx(once.scores(path), abs=1e-6)


def test_exif_turns_a_photograph_on_request(untrained, tmp_path):
    noise = np.random.default_rng(1).integers(256, size=(3, 5, 3), dtype=np.uint8)
    picture, exif = Image.fromarray(noise).resize((90, 60)), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    as_stored = Predictor(untrained, **USUAL)
    turned = Predictor(untrained, exif_rotate=True, **USUAL)
    with Image.open(tmp_path / "a.jpg") as stored:
        upright = stored.transpose(Image.Transpose.ROTATE_270)
        assert np.array_equal(turned.scores(tmp_path / "a.jpg"), as_stored.scores(upright))
        assert np.array_equal(turned.scores(stored), as_stored.scores(upright))
        assert not np.array_equal(turned.scores(stored), as_stored.scores(stored))
    found = infer(untrained, tmp_path, exif_rotate=True)
    assert np.array_equal(found.scores[0].numpy(), turned.scores(tmp_path / "a.jpg"))


@pytest.mark.parametrize("name", ["exif_rotate", "draft_decode"])
def test_a_checkpoint_knows_how_its_images_were_decoded(untrained, tmp_path, name):
    content = checkpoint.load(untrained)
    checkpoint.save(tmp_path / "a.pt", content | {"config": content["config"] | {name: True}})
    assert getattr(Predictor(tmp_path / "a.pt").scorer.images, name)
    assert not getattr(Predictor(tmp_path / "a.pt", **{name: False}).scorer.images, name)


def test_what_is_wrong_is_said_in_one_line(predictor, untrained, photographs, tmp_path):
    good, none = photographs / "0.jpg", tmp_path / "none.jpg"
    with pytest.raises(DataError, match=r"^image 2: the file is empty$"):
        predictor([good, b""])
    with pytest.raises(DataError, match=r"none\.jpg: No such file"):
        predictor([good, none])
    with pytest.raises(DataError, match=r"^an image is a path, .*, not int$"):
        predictor.read(17)
    with pytest.raises(UsageError, match=r"treshold.*did you mean threshold"):
        Predictor(untrained, treshold=0.5)
    with pytest.raises(UsageError, match="no setting 'draw'"):
        Predictor(untrained, draw=False)
    with pytest.raises(UsageError, match="threshold is 2"):
        Predictor(untrained, threshold=2)
    with pytest.raises(UsageError, match="name the checkpoint"):
        Predictor([])
    with pytest.raises(DataError, match=r"none\.jpg"):
        Predictor(none)
    with pytest.raises(DataError, match="more than the limit of 100"):
        Predictor(untrained, max_pixels=100)(good)


def test_the_folder_is_walked_as_it_was(untrained, photographs):
    predictions = infer(untrained, photographs)
    images = Annotations.unlabelled(*find_images(photographs), ("x",) * 5)
    assert [each["file"] for each in predictions] == [images.path(row) for row in range(9)]
    assert predictions[-1] == predictions[8]
    assert predictions[2:4] == [predictions[2], predictions[3]]
    with pytest.raises(IndexError):
        predictions[9]
