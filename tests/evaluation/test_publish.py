"""A published folder: its weights, what is measured with them, its card, and timm's way to it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard

from asl.errors import DataError, UsageError
from asl.evaluation.evaluate import evaluate
from asl.evaluation.publish import publish
from asl.evaluation.published import check_published
from asl.evaluation.text import evaluation_text
from asl.models import checkpoint, create_model, load_weights
from asl.models.zoo import sha256
from asl.training.fit import fit

REPOSITORY = Path(__file__).parents[2]
TERMS = "Drawn scenes. Whoever wants to may do with them and with these weights what they like."


@pytest.fixture(scope="module")
def best(settings, tmp_path_factory, small_shapes):
    """The checkpoint of one epoch."""
    return fit(settings(small_shapes, tmp_path_factory.mktemp("run"), epochs=1)) / "best.pt"


@pytest.fixture(scope="module")
def folder(best, tmp_path_factory):
    """What is published of it."""
    path = tmp_path_factory.mktemp("published") / "shapes"
    publish(best, path, tune_thresholds="f1", calibrate="platt", license="cc0-1.0", terms=TERMS)
    return path


def test_the_file_has_the_best_weights_halved_and_what_is_said_of_them(best, folder):
    made, source = checkpoint.load(folder / "model.safetensors"), checkpoint.load(best)
    assert made["model"].keys() == source["model"].keys()
    for name, tensor in source["model"].items():
        half = tensor.ndim > 1
        assert made["model"][name].dtype == (torch.float16 if half else tensor.dtype)
        assert torch.equal(made["model"][name], tensor.half() if half else tensor)
    assert made["idx_to_class"] == source["idx_to_class"]
    assert made["config"]["model_name"] == "test_resnet"
    assert made["config"]["lr"] == source["config"]["lr"]
    assert not {"data", "output", "config"} & made["config"].keys()
    assert (made["license"], made["terms"]) == ("cc0-1.0", TERMS)
    assert made["thresholds"]["rule"] == "f1"
    assert made["calibration"]["method"] == "platt"


def test_the_map_in_the_file_is_that_of_the_halved_weights(folder, measuring, small_shapes):
    file = folder / "model.safetensors"
    figures = evaluate(measuring(small_shapes, file))
    stored = checkpoint.load(file)["measured"]
    assert stored["mAP"] == json.loads((folder / "figures.json").read_text())["mAP"]
    assert figures["mAP"] == pytest.approx(stored["mAP"], abs=1e-6)
    assert figures["published"] == {"mAP": stored["mAP"], "differing": [], "agrees": True}
    assert f"published   {stored['mAP']:.2f}: as measured here" in evaluation_text(figures)
    check_published(figures)


def test_another_map_under_the_same_conditions_is_an_error(
    folder, measuring, small_shapes, tmp_path
):
    file = tmp_path / "other.safetensors"
    shutil.copy(folder / "model.safetensors", file)
    stored = checkpoint.load(file)["measured"]
    for wrong, agrees in ((0.09, True), (0.11, False), (-0.11, False)):
        entry = {"measured": {**stored, "mAP": stored["mAP"] + wrong}}
        checkpoint.amend(file, entry, checkpoint.version(file))
        figures = evaluate(measuring(small_shapes, file))
        assert figures["published"]["agrees"] is agrees
    assert ": NOT what was measured here" in evaluation_text(figures)
    with pytest.raises(DataError, match=r"other\.safetensors was published with .* mAP, and has"):
        check_published(figures)
    checkpoint.amend(file, {"measured": {"mAP": "high"}}, checkpoint.version(file))
    with pytest.raises(DataError, match="its measured cannot be used: it has no mAP"):
        evaluate(measuring(small_shapes, file))


def test_a_map_under_other_conditions_is_no_error_and_says_which(folder, measuring, small_shapes):
    figures = evaluate(measuring(small_shapes, folder / "model.safetensors", tta="flip"))
    assert figures["published"]["agrees"] is None
    check_published(figures)
    assert "but measured otherwise: tta none (now flip)" in evaluation_text(figures)


def test_the_card_is_one_that_a_hub_can_read(folder):
    card = ModelCard.load(folder / "README.md")
    figures = json.loads((folder / "figures.json").read_text())
    assert (card.data.license, card.data.library_name) == ("cc0-1.0", "timm")
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("mAP", round(figures["mAP"], 2))
    assert sha256(folder / "model.safetensors") in card.text
    for each in figures["per_class"]:
        assert f"| {each['name']} | " in card.text
    assert f"| mAP | {figures['mAP']:.2f} |" in card.text
    assert TERMS in card.text
    cross_fitted = figures["tuning"]["at"]["per_class"]["macro_F1"]
    assert f"on images that did not choose them | {cross_fitted:.2f}," in card.text


def test_timm_builds_the_model_from_the_folder_alone(folder):
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = create_model("test_resnet", 24).eval()
    load_weights(ours, folder / "model.safetensors")
    images = torch.rand(2, 3, 48, 48)
    torch.testing.assert_close(theirs(images), ours(images))
    shown = theirs.pretrained_cfg
    assert shown["input_size"] == (3, 48, 48)
    assert (shown["crop_pct"], shown["crop_mode"]) == (1.0, "squash")
    assert shown["interpolation"] == "bilinear"


def test_a_head_that_timm_lacks_has_no_settings_for_it(settings, small_shapes, tmp_path):
    run = fit(settings(small_shapes, tmp_path / "run", epochs=1, head="bottleneck"))
    publish(run / "best.pt", tmp_path / "made")
    assert {each.name for each in (tmp_path / "made").iterdir()} == {
        *("README.md", "figures.json", "model.safetensors")
    }
    assert "local-dir" not in (tmp_path / "made/README.md").read_text()


def test_a_model_is_measured_where_its_images_are_and_no_folder_is_named(
    settings, small_shapes, tmp_path, monkeypatch
):
    images = tmp_path / "images"
    images.mkdir()
    for file in small_shapes.glob("*2014/*.jpg"):
        shutil.copy(file, images)
    rows = "".join(f"{file.name},{n % 2},1\n" for n, file in enumerate(sorted(images.iterdir())))
    (tmp_path / "labels.csv").write_text(f"path,odd,all\n{rows}")
    (tmp_path / "reference.json").write_text('{"trials": [{"history": [50.0]}]}')
    monkeypatch.setattr(sys, "argv", ["train.py", f"--image-folder={images}", "-b", "8"])
    about = {"dataset": "table", "image_folder": str(images), "stratify": True, "epochs": 1}
    about["reference"] = str(tmp_path / "reference.json")
    run = fit(settings(tmp_path / "labels.csv", tmp_path / "run", **about))
    publish(run / "best.pt", tmp_path / "made")
    everything = b"".join(each.read_bytes() for each in (tmp_path / "made").iterdir())
    assert b"--image-folder=images -b 8" in everything
    assert str(tmp_path).encode() not in everything
    with pytest.raises(UsageError, match="does not know where its data is: name it with --data"):
        publish(tmp_path / "made/model.safetensors", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_thresholds_of_the_checkpoint_go_along_where_they_are_of_these_weights(
    folder, small_shapes, tmp_path
):
    file = tmp_path / "source.safetensors"
    shutil.copy(folder / "model.safetensors", file)
    stored = checkpoint.load(file)["thresholds"]
    assert stored["weights"] == "only"
    for weights, goes_along in (("only", True), ("ema", False)):
        entries = {"thresholds": {**stored, "weights": weights}, "calibration": None}
        checkpoint.amend(file, entries, checkpoint.version(file))
        made = tmp_path / weights
        publish(file, made, data=str(small_shapes))
        content = checkpoint.load(made / "model.safetensors")
        assert ("thresholds" in content) is goes_along
        assert "calibration" not in content


def test_what_cannot_be_published_leaves_nothing(best, folder, tmp_path):
    large = checkpoint.load(best)
    name = next(name for name, x in large["model"].items() if x.ndim > 1)
    weights = {**large["model"], name: torch.full_like(large["model"][name], 1e5)}
    about = {key: large[key] for key in ("num_classes", "idx_to_class", "config")}
    checkpoint.save(tmp_path / "large.pt", {"model": weights, **about})
    checkpoint.save(tmp_path / "bare.pt", {"model": weights})
    for source, message in (
        ("large.pt", f"{name} holds values that half precision cannot"),
        ("bare.pt", "train.py did not write it"),
    ):
        with pytest.raises(DataError, match=message):
            publish(tmp_path / source, tmp_path / "made")
    with pytest.raises(DataError):
        publish(best, tmp_path / "made", data=str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="tune_thresholds"):
        publish(best, tmp_path / "made", tune_thresholds="best")
    assert {each.name for each in tmp_path.iterdir()} - {"cache"} == {"large.pt", "bare.pt"}
    before = (folder / "README.md").read_bytes()
    with pytest.raises(UsageError, match="is there already: name a folder that is new or empty"):
        publish(best, folder)
    assert (folder / "README.md").read_bytes() == before


def test_the_command_says_what_it_measured_and_wrote(best, tmp_path):
    (tmp_path / "terms.txt").write_text(TERMS.replace(". ", ".\n"))
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-m", "asl.models", "publish"),
            *("--model-path", best, "--output", "made", "--terms", "terms.txt"),
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint  model.safetensors (only weights)" in done.stdout
    files = "README.md, config.json, figures.json, model.safetensors"
    assert checkpoint.load(tmp_path / "made/model.safetensors")["terms"] == TERMS
    assert done.stdout.endswith(f"published in made: {files}\n")
    figures = json.loads((tmp_path / "made/figures.json").read_text())
    command = figures["command"]
    assert command.startswith("python -m asl.models publish --model-path best.pt --output made")
    everything = b"".join(each.read_bytes() for each in (tmp_path / "made").iterdir())
    assert str(best.parent.parent).encode() not in everything  # the names of folders are private
