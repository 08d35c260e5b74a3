"""The mean of the scores of several views and of several checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from asl.data.annotations import Annotations
from asl.errors import DataError, UsageError
from asl.evaluation import score as scoring
from asl.evaluation.average import MeanScores, Renormalized, Scores
from asl.evaluation.evaluate import evaluate
from asl.evaluation.predict import predict
from asl.evaluation.score import Scorer
from asl.evaluation.settings import ResultSettings
from asl.models import checkpoint, create_model
from asl.models.build import normalization

CPU = torch.device("cpu")
NAMES = {0: "cat", 1: "dog", 2: "cow"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five pictures of noise, none of them its own mirror."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(256, size=(5, 9, 11, 3), dtype=np.uint8)
    for number, each in enumerate(pixels):
        Image.fromarray(each).resize((110, 90)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def written(tmp_path):
    """Writes a checkpoint of a model with scores all over [0, 1]: (name, model, seed, ...)."""

    def write(name, model="test_resnet", seed=0, head="linear", **parts):
        torch.manual_seed(seed)
        made = create_model(model, 3, head, image_size=64)
        for parameter in made.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        about = {"model_name": model, "head": head, "loss": parts.pop("loss", "asl")}
        content = {"model": made.state_dict(), "idx_to_class": NAMES, "config": about, **parts}
        checkpoint.save(tmp_path / name, content)
        return str(tmp_path / name)

    return write


@pytest.fixture
def scorer_of(images, labelling):
    """The scorer of one or several checkpoints: (paths, tta, image_size)."""

    def load(*paths, tta="", image_size=64, **changed):
        config = labelling(images, paths[0], tta=tta, image_size=image_size, **changed)
        model = config.model.replace(model_path=paths)
        wanted = config.evaluation
        return Scorer.load(model, config.images, config.run, CPU, wanted.flip, wanted.scales)

    return load


@pytest.fixture
def scores_of(images, scorer_of):
    """The scores that they give the images, or those of the same names in another folder."""
    files = np.array([path.name.encode() for path in sorted(images.iterdir())])

    def scores(*paths, folder=images, **changed):
        scorer = scorer_of(*paths, **changed)
        return scorer.scores(Annotations.unlabelled(folder, files, tuple(NAMES.values())), "")

    return scores


@pytest.fixture
def mirrored(images, tmp_path):
    for path in images.iterdir():
        with Image.open(path) as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / path.name)
    return tmp_path


def test_flip_is_the_mean_of_a_pass_over_images_and_one_over_their_mirrors(
    scores_of, written, images, mirrored
):
    path = written("a.pt")
    plain, turned = scores_of(path), scores_of(path, folder=mirrored)
    assert (plain - turned).abs().max() > 1e-3
    torch.testing.assert_close(scores_of(path, tta="flip"), (plain + turned) / 2, atol=2e-3, rtol=0)
    assert not torch.equal(scores_of(path, tta="flip"), plain)


def test_views_of_prepared_images_are_averaged_exactly():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
    images = torch.rand(4, 3, 2, 2)
    member = Scores(model)
    expected = (member(images) + member(images.flip(-1))) / 2
    torch.testing.assert_close(MeanScores([member], flip=True)(images), expected)


def test_scales_are_the_mean_of_a_pass_for_each_size(scores_of, written):
    path = written("a.pt")
    by_size = [scores_of(path, image_size=size) for size in (32, 64, 96)]
    assert (by_size[0] - by_size[1]).abs().max() > 1e-3
    found = scores_of(path, tta="scales:0.5,1,1.4")  # 1.4 * 64 is 90, the multiple is 96
    torch.testing.assert_close(found, torch.stack(by_size).mean(0))


def test_flip_and_scales_go_together(scores_of, written):
    path = written("a.pt")
    both = scores_of(path, tta="flip+scales:1,1.5")
    by_size = [scores_of(path, tta="flip", image_size=size) for size in (64, 96)]
    torch.testing.assert_close(both, torch.stack(by_size).mean(0))


def test_the_size_itself_is_not_rounded_and_no_size_is_seen_twice(scorer_of, written):
    path = written("a.pt")
    assert scorer_of(path, image_size=50).sizes == (50,)
    assert scorer_of(path, tta="scales:0.1,1,2", image_size=50).sizes == (32, 50, 96)
    assert scorer_of(path, tta="scales:1.5,1.51").sizes == (96,)


def test_scores_of_one_label_are_a_softmax_and_those_of_several_a_sigmoid():
    logits = torch.tensor([[2.0, -1.0, 0.0]], dtype=torch.bfloat16)
    several, one = Scores(nn.Identity())(logits), Scores(nn.Identity(), one_label=True)(logits)
    assert several.dtype == one.dtype == torch.float32
    torch.testing.assert_close(several, 1 / (1 + (-logits.float()).exp()))
    torch.testing.assert_close(one, logits.float().exp() / logits.float().exp().sum())


def test_a_large_table_stays_in_half_precision(scores_of, written, monkeypatch):
    path = written("a.pt")
    exact = scores_of(path, tta="scales:0.5,1,1.5")
    monkeypatch.setattr(scoring, "HALF_ABOVE", 1)
    halves = scores_of(path, tta="scales:0.5,1,1.5")
    assert halves.dtype == torch.float16
    torch.testing.assert_close(halves.float(), exact, atol=1e-3, rtol=0)


def test_a_size_that_the_model_cannot_take_is_said_before_the_first_pass(
    scores_of, written, monkeypatch
):
    monkeypatch.setattr(scoring, "score_data_set", None)
    path = written("a.pt", "vit_tiny_patch16_224")
    with pytest.raises(UsageError, match="vit_tiny_patch16_224 cannot take images of 96 x 96"):
        scores_of(path, model_name="vit_tiny_patch16_224", tta="scales:1,1.5")


@pytest.mark.parametrize(
    "tta",
    ["flop", "flip+", "+flip", "scales", "scales:", "scales:0,1", "scales:1,,2", "scales:1+flip"],
)
def test_views_that_are_none_are_refused(tta):
    with pytest.raises(UsageError, match=r"tta is .*, but must be flip, scales:0\.8,1,1\.25 or"):
        ResultSettings(tta=tta)


def test_views_are_read_from_the_setting():
    asked = [ResultSettings(tta=tta) for tta in ("", "flip", "scales:0.8,1", "flip+scales:2")]
    assert [each.flip for each in asked] == [False, True, False, True]
    assert [each.scales for each in asked] == [(1.0,), (1.0,), (0.8, 1.0), (2.0,)]


def test_several_checkpoints_give_the_mean_of_their_scores(scores_of, written):
    paths = [written(f"{seed}.pt", seed=seed) for seed in range(3)]
    tables = [scores_of(path) for path in paths]
    assert (tables[0] - tables[1]).abs().max() > 1e-3
    torch.testing.assert_close(scores_of(*paths), torch.stack(tables).mean(0))


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_each_checkpoint_has_its_own_model_head_loss_and_normalisation(scores_of, written, amp):
    first = written("a.pt")
    others = {
        "head": written("b.pt", head="bottleneck", seed=1),
        "model": written("c.pt", "test_efficientnet", seed=2),
        "loss": written("d.pt", seed=3, loss="asl_single"),
    }
    about = {
        "head": {"head": "bottleneck"},
        "model": {"model_name": "test_efficientnet"},
        "loss": {},
    }
    assert (
        len({normalization(create_model(name, 1)) for name in ("test_resnet", "test_efficientnet")})
        == 2
    )
    for name, path in others.items():
        alone = scores_of(path, amp=amp, **about[name])
        expected = (scores_of(first, amp=amp) + alone) / 2
        tolerance = {"off": 1e-5, "bf16": 2e-2}[amp]
        torch.testing.assert_close(
            scores_of(first, path, amp=amp), expected, atol=tolerance, rtol=0
        )


def test_renormalized_images_are_those_that_the_model_was_made_for():
    pixels = torch.rand(2, 3, 4, 4)
    of, given = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.0, 0.1, 0.2), (1.0, 0.5, 0.7))

    def normalized(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    model = Renormalized(nn.Identity(), of, given, CPU)
    torch.testing.assert_close(model(normalized(*given)), normalized(*of))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({0: "cat", 1: "fox", 2: "cow"}, r"b\.pt: class 1 is 'fox', of .*a\.pt 'dog'"),
        ({0: "dog", 1: "cat", 2: "cow"}, r"b\.pt: class 0 is 'dog', of .*a\.pt 'cat'"),
    ],
)
def test_checkpoints_of_other_classes_are_refused(names, message, scores_of, written):
    paths = written("a.pt"), written("b.pt", idx_to_class=names)
    with pytest.raises(DataError, match=message):
        scores_of(*paths)


def test_checkpoints_of_more_classes_are_refused(scores_of, written, tmp_path):
    state = create_model("test_resnet", 2).state_dict()
    checkpoint.save(tmp_path / "b.pt", {"model": state, "idx_to_class": {0: "cat", 1: "dog"}})
    with pytest.raises(DataError, match=r"b\.pt has 2 classes, .*a\.pt 3"):
        scores_of(written("a.pt"), str(tmp_path / "b.pt"))


def test_a_data_set_behind_the_checkpoints_is_told_from_them(scores_of, written, images):
    with pytest.raises(UsageError, match=r"is a folder.*name the data set first"):
        scores_of(written("a.pt"), str(images))


@pytest.mark.parametrize(("config", "why"), [({"head": 3}, "head is '?3"), (3, "")])
def test_the_settings_of_another_checkpoint_can_be_wrong(config, why, scores_of, written):
    other = written("b.pt", config=config)
    with pytest.raises(DataError, match=rf"b\.pt: its config cannot be used: {why}"):
        scores_of(written("a.pt"), other)


def test_the_report_names_all_checkpoints_and_views(small_shapes, measuring, tmp_path):
    about = json.loads((small_shapes / "annotations/instances_val2014.json").read_text())
    names = dict(enumerate(each["name"] for each in about["categories"]))
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        state = create_model("test_resnet", 24).state_dict()
        paths.append(str(tmp_path / f"{seed}.pt"))
        checkpoint.save(paths[-1], {"model": state, "idx_to_class": names})
    config = measuring(small_shapes, paths[0], tta="flip").with_settings(model_path=tuple(paths))
    figures = evaluate(config)
    assert figures["checkpoint"] == paths
    assert figures["weights"] == ["only", "only"]
    assert figures["tta"] == "flip"
    alone = evaluate(config.with_settings(model_path=paths[0], tta=""))
    assert (alone["checkpoint"], alone["weights"], alone["tta"]) == (paths[0], "only", "")
    flipped = evaluate(config.with_settings(model_path=paths[0]))
    assert len({each["mAP"] for each in (figures, alone, flipped)}) == 3


def test_labels_are_those_of_the_mean(labelling, scores_of, written, images):
    paths = written("a.pt"), written("b.pt", seed=1)
    config = labelling(images, paths[0], image_size=64, tta="flip")
    predictions = predict(config.with_settings(model_path=paths))
    highest = scores_of(*paths, tta="flip").amax(dim=1)
    assert [each["labels"][0]["score"] for each in predictions] == [
        round(value, 4) for value in highest.tolist()
    ]


def test_the_commands_make_a_soup_and_measure_it_by_its_path_alone(
    written, images, tmp_path, scores_of
):
    repository = Path(__file__).parents[2]

    def run(*command):
        done = subprocess.run(
            [sys.executable, "-W", "error", *map(str, command)],
            cwd=tmp_path,
            env={"PYTHONPATH": str(repository / "src"), "OMP_NUM_THREADS": "1", "PATH": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    paths = written("a.pt"), written("b.pt", seed=1)
    run("-m", "asl.models", "soup", *paths, "--output", "soup.pt")
    made = checkpoint.load(tmp_path / "soup.pt")
    assert made["parents"] == list(paths)
    assert made["provenance"]["command"].startswith("python ")
    torch.testing.assert_close(
        made["model"]["fc.bias"],
        sum(checkpoint.load(path)["model"]["fc.bias"] for path in paths) / 2,
    )
    run(
        *(repository / "infer.py", "--model_path", "soup.pt", paths[0], "--pic-path", images),
        *("--image-size", 64, "--workers", 0, "--no-draw", "--tta", "flip", "--json", "x.json"),
    )
    assert (tmp_path / "x.json").exists()
