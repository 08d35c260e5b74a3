"""What export.py writes, read back by onnxruntime and torch.export, and held against PyTorch."""

import dataclasses
import hashlib
import io
import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch

from asl.errors import DataError, UsageError
from asl.evaluation import export as exporting
from asl.evaluation.settings import ExportConfig, trained_with
from asl.images.decode import find_images, read_image, squish
from asl.models import checkpoint, create_model

CLASSES = ("cat", "dog", "Café", "sofa")
SIZE = 48
# timm's for test_resnet
MEAN, STD = (torch.tensor([each]).view(3, 1, 1) for each in ([0.5] * 3, [0.5] * 3))


@pytest.fixture(scope="module")
def photographs(request):
    """Five pictures (3, H, W): photographs of Pascal VOC where there are some, else drawn ones."""
    try:
        folder = request.getfixturevalue("voc_root") / "VOC2007" / "JPEGImages"
    except pytest.skip.Exception:
        folder = request.getfixturevalue("small_shapes")
    root, names = find_images(folder)
    return [read_image(root / name.decode()) for name in names[:5]]


def save(path, head="linear", seed=0, **more):
    """Write a checkpoint of random weights whose scores lie apart; returns its model."""
    torch.manual_seed(seed)
    model = create_model("test_resnet", len(CLASSES), head, image_size=SIZE)
    for name, tensor in model.named_parameters():
        if name.startswith(("fc", "head")) and tensor.ndim > 1:
            tensor.data *= 4 if head == "ml_decoder" else 30
    for name, tensor in model.named_buffers():  # or folding BatchNorm would change nothing
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    settings = {"model_name": "test_resnet", "head": head, "image_size": SIZE}
    checkpoint.save(
        path,
        {
            "model": model.state_dict(),
            "num_classes": len(CLASSES),
            "idx_to_class": dict(enumerate(CLASSES)),
            "config": settings | more.pop("config", {}),
            **more,
        },
    )
    return model.eval()


def tuned(values):
    """What validate.py --tune-thresholds stores in such a checkpoint."""
    facts = {"weights": "only", "image_size": SIZE, "tta": "", "dataset": "coco"}
    values = torch.tensor(values, dtype=torch.float64)
    return {"rule": "f1", "values": values, "common": 0.5, **facts, "split": "val", "images": 9}


def config(path, output, **changed):
    trained = trained_with(str(path))
    known = {name: trained[name] for name in ExportConfig.from_checkpoint if name in trained}
    return ExportConfig.of(**known, model_path=str(path), output=str(output), **changed)


def scores_of(model, pictures):
    """By hand: squished, normalised, the model as it was trained, sigmoid."""
    images = torch.stack([squish(picture, SIZE) for picture in pictures])
    with torch.no_grad():
        return model((images / 255 - MEAN) / STD).sigmoid().numpy()


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def ran(path, images):
    [scores] = session(path).run(None, {"images": images.contiguous().numpy()})
    return scores


def apart(scores, expected):
    assert scores.shape == expected.shape
    return np.abs(scores - expected).max()


def test_onnx_gives_the_scores_of_pytorch_for_any_batch(tmp_path, photographs):
    model = save(tmp_path / "a.pt", "ml_decoder")
    [file] = exporting.export(config(tmp_path / "a.pt", tmp_path / "new" / "a.onnx"))
    images = torch.stack([squish(picture, SIZE) for picture in photographs])
    expected = scores_of(model, photographs)
    assert np.ptp(expected, axis=0).max() > 0.05  # they depend on the photograph
    for length in (1, 2, 5):
        prepared = (images[:length] / 255 - MEAN) / STD
        assert apart(ran(file["file"], prepared), expected[:length]) < 1e-4
    assert file["difference"] < 1e-4
    assert file["bytes"] == (tmp_path / "new" / "a.onnx").stat().st_size
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.onnx"]


def test_the_graph_normalises(tmp_path, photographs):
    model = save(tmp_path / "a.pt", "bottleneck")
    exporting.export(config(tmp_path / "a.pt", tmp_path / "a.onnx", preprocessing="normalize"))
    images = torch.stack([squish(picture, SIZE) for picture in photographs]).permute(0, 2, 3, 1)
    assert images.dtype == torch.uint8
    expected = scores_of(model, photographs)
    for length in (1, 5):
        assert apart(ran(tmp_path / "a.onnx", images[:length]), expected[:length]) < 1e-4


def test_the_graph_resizes(tmp_path, photographs):
    model = save(tmp_path / "a.pt")
    path = tmp_path / "a.onnx"
    [file] = exporting.export(config(tmp_path / "a.pt", path, preprocessing="resize"))
    expected = scores_of(model, photographs)
    for picture, each in zip(photographs, expected, strict=True):
        pixels = picture.permute(1, 2, 0)[None]
        assert apart(ran(path, pixels), each[None]) < 1e-2  # onnxruntime's resizing is its own
        assert apart(ran(path, pixels.flip(0).repeat(3, 1, 1, 1))[2], each) < 1e-2
    squished = torch.stack([squish(picture, SIZE) for picture in photographs])
    assert apart(ran(path, squished.permute(0, 2, 3, 1)), expected) < 1e-4
    assert 0 < file["difference_resized"] < 1e-2


def test_a_program_of_torch_gives_the_same_and_knows_its_classes(tmp_path, photographs):
    model = save(tmp_path / "a.pt")
    wanted = config(tmp_path / "a.pt", tmp_path / "a.pt2", preprocessing="resize")
    exporting.export(wanted)
    extra = {"metadata.json": ""}
    with (tmp_path / "a.pt2").open("rb") as file:
        program = torch.export.load(io.BytesIO(file.read()), extra_files=extra).module()
    for picture, each in zip(photographs, scores_of(model, photographs), strict=True):
        with torch.no_grad():
            scores = program(picture.permute(1, 2, 0)[None].contiguous())
        assert apart(scores.numpy(), each[None]) < 1e-4
    assert json.loads(extra["metadata.json"])["classes"] == [*CLASSES]


def test_onnx_says_what_it_takes_and_gives(tmp_path):
    save(tmp_path / "a.pt", thresholds=tuned([0.25, 0.5, 0.8, 1]))
    exporting.export(config(tmp_path / "a.pt", tmp_path / "a.onnx"))
    opened = session(tmp_path / "a.onnx")
    [taken], [given] = opened.get_inputs(), opened.get_outputs()
    assert (taken.name, taken.shape) == ("images", ["batch", 3, SIZE, SIZE])
    assert (given.name, given.shape) == ("scores", ["batch", len(CLASSES)])
    known = opened.get_modelmeta().custom_metadata_map
    assert json.loads(known["classes"]) == [*CLASSES]
    assert json.loads(known["thresholds"]) == [0.25, 0.5, 0.8, 1]
    assert json.loads(known["mean"]) == json.loads(known["std"]) == [0.5, 0.5, 0.5]
    assert known["image_size"] == str(SIZE)
    sha = hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()
    assert json.loads(known["checkpoint_sha256"]) == [sha]
    assert known["commit"]
    assert "torch" in known["versions"]


def test_thresholds_are_the_checkpoints_or_one_that_is_named(tmp_path, capsys):
    def noted(**options):
        exporting.export(config(tmp_path / "a.pt", tmp_path / "a.pt2", **options))
        extra = {"metadata.json": ""}
        torch.export.load(str(tmp_path / "a.pt2"), extra_files=extra)
        return json.loads(extra["metadata.json"])["thresholds"]

    save(tmp_path / "a.pt")
    assert noted() == [0.8] * 4
    save(tmp_path / "a.pt", thresholds=tuned([0.1, 0.2, 0.35, 0.4]))
    assert noted() == [0.1, 0.2, 0.35, 0.4]
    assert noted(threshold=0.6) == [0.6] * 4
    assert "as --threshold 0.6 is given" in capsys.readouterr().out
    save(tmp_path / "a.pt", thresholds=tuned([0.1, 0.2, 0.35]))
    with pytest.raises(DataError, match="thresholds cannot be used: not 4 values"):
        noted()


def test_several_checkpoints_become_one_file_of_their_mean_scores(tmp_path, photographs):
    models = [save(tmp_path / name, seed=seed) for seed, name in enumerate(("a.pt", "b.pt"))]
    save(tmp_path / "c.pt", config={"loss": "asl_single"})
    both = config(tmp_path / "a.pt", tmp_path / "a.pt2")
    paths = (str(tmp_path / "a.pt"), str(tmp_path / "b.pt"))
    exporting.export(both.with_settings(model_path=paths, preprocessing="normalize"))
    images = torch.stack([squish(picture, SIZE) for picture in photographs]).permute(0, 2, 3, 1)

    def run(path):
        with torch.no_grad():
            return torch.export.load(str(path)).module()(images.contiguous()).numpy()

    expected = sum(scores_of(model, photographs) for model in models) / 2
    assert apart(run(tmp_path / "a.pt2"), expected) < 1e-4
    exporting.export(config(tmp_path / "c.pt", tmp_path / "c.pt2", preprocessing="normalize"))
    softmax = run(tmp_path / "c.pt2")
    assert softmax.sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_a_file_of_other_scores_is_not_written(tmp_path, monkeypatch):
    save(tmp_path / "a.pt")
    right = exporting._program

    def of_other_statistics(scorer, preprocessing):
        other = ((0.49,) * 3, (0.5,) * 3)
        return right(dataclasses.replace(scorer, normalized=other), preprocessing)

    monkeypatch.setattr(exporting, "_program", of_other_statistics)
    (tmp_path / "a.pt2").write_bytes(b"precious")
    wanted = config(tmp_path / "a.pt", tmp_path / "a.pt2", preprocessing="normalize")
    with pytest.raises(DataError, match=r"other scores: .* nothing was written"):
        exporting.export(wanted)
    assert (tmp_path / "a.pt2").read_bytes() == b"precious"
    monkeypatch.setattr(exporting, "_program", right)
    exporting.export(wanted)
    assert sorted(path.name for path in tmp_path.glob("a*")) == ["a.pt", "a.pt2"]


def test_wrong_options_are_told_in_a_line(tmp_path, monkeypatch):
    save(tmp_path / "a.pt")
    with pytest.raises(UsageError, match=r"must end in .onnx or .pt2"):
        config(tmp_path / "a.pt", tmp_path / "a.tflite")
    with pytest.raises(UsageError, match=r"int8 is quantised by onnxruntime"):
        config(tmp_path / "a.pt", tmp_path / "a.pt2", int8=True)
    with pytest.raises(UsageError, match="--output"):
        exporting.export(config(tmp_path / "a.pt", ""))
    with pytest.raises(UsageError, match="name the folder of the data set"):
        exporting.export(config(tmp_path / "a.pt", tmp_path / "a.onnx", int8=True))
    with pytest.raises(DataError, match="is not there"):
        exporting.export(config(tmp_path / "a.pt", tmp_path / "a.pt2", pic_path="nowhere"))
    with pytest.raises(UsageError, match="cannot write"):
        exporting.export(config(tmp_path / "a.pt", tmp_path / "a.pt" / "a.pt2"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"onnxscript: pip install -r requirements-export.txt"):
        exporting.export(config(tmp_path / "a.pt", tmp_path / "a.onnx"))
    assert [path.name for path in tmp_path.glob("a*")] == ["a.pt"]


def test_a_model_that_cannot_be_exported_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a.pt")

    class Branching(torch.nn.Module):
        def forward(self, images):
            return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))

    of_values = Branching()
    monkeypatch.setattr(exporting, "MeanScores", lambda members: of_values)
    path = str(tmp_path / "a.pt")
    several = config(path, tmp_path / "a.pt2").with_settings(model_path=(path, path))
    with pytest.raises(UsageError, match=r"test_resnet cannot be exported: \w+"):
        exporting.export(several)
    assert not (tmp_path / "a.pt2").exists()
