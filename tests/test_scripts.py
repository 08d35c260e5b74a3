"""The scripts as a user runs them: real processes on real files."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from asl.config import parse
from asl.data.readers.coco import coco
from asl.data.shards import write_shards
from asl.evaluation.settings import ValidateConfig, trained_with
from asl.evaluation.text import sparks_text
from asl.models import checkpoint

# Side by side, each worker would train a model of its own for its share of the tests.
pytestmark = pytest.mark.xdist_group("scripts")

REPOSITORY = Path(__file__).parent.parent
SMALL = (
    *("--model-name", "test_resnet", "--image-size", "64", "--batch-size", "8", "--workers", "1"),
    *("--lr", "1e-3", "--ema-decay", "0.9", "--amp", "off", "--device", "cpu"),
)


def run(script, *arguments, cwd, code=0):
    """Run a script to its end; returns what it printed (stdout, stderr)."""
    done = subprocess.run(command(script, *arguments), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def command(script, *arguments):
    return [sys.executable, "-W", "error", str(REPOSITORY / script), *map(str, arguments)]


def width_of(picture):
    with Image.open(picture) as opened:
        return opened.width


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_shapes):
    """The folder of a run of two epochs, and what train.py printed."""
    cwd = tmp_path_factory.mktemp("trained")
    out, _ = run(*("train.py", small_shapes, "--epochs", 2, "--output", "run", *SMALL), cwd=cwd)
    return cwd, out


def test_a_run_leaves_settings_log_curves_and_checkpoints(trained):
    cwd, out = trained
    rows = [json.loads(line) for line in (cwd / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(0 <= row[key] <= 100 for row in rows for key in ("mAP_ema", "mAP_regular"))
    assert "model_name: test_resnet" in (cwd / "run/config.yaml").read_text()
    assert width_of(cwd / "run/curves.png") > 300
    assert f"mAP {rows[1]['mAP_ema']:5.2f}" in out
    assert out.rstrip().endswith("python validate.py --model-path run/best.pt")


def test_validation_of_the_checkpoint_alone_repeats_the_logged_map(trained):
    cwd, _ = trained
    rows = [json.loads(line) for line in (cwd / "run/metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: max(row["mAP_ema"], row["mAP_regular"]))
    for weights in ("ema", "regular"):
        out, _ = run(
            *("validate.py", "--model-path", "run/best.pt", "--weights", weights),
            *("--json", "result.json", "--amp", "off"),
            cwd=cwd,
        )
        result = json.loads((cwd / "result.json").read_text())
        assert result["mAP"] == best[f"mAP_{weights}"]
        assert result["weights"] == weights
        assert f"{result['mAP']:.2f}" in out
        assert len(result["per_class"]) == 24
        assert result["command"].startswith("python")


def test_a_run_on_shards_by_address_is_validated_on_those_that_are_named_again(
    small_shapes, served, tmp_path
):
    for split in ("train", "val"):
        write_shards(coco(small_shapes, f"{split}2014"), split, tmp_path / "set", 40)
    address = f"{served(tmp_path).address}/set/{{train,val}}-000000.tar"
    data = (address, "--dataset", "webdataset")
    out, _ = run("train.py", *data, *SMALL, "--epochs", 1, "--output", "run", cwd=tmp_path)
    assert "train: 40 images" in out
    assert "val: 20 images" in out
    _, script, *argv = shlex.split(out.splitlines()[-1].partition("validate it: ")[2])
    assert script == "validate.py"
    argv = [word.replace("run/best.pt", str(tmp_path / "run/best.pt")) for word in argv]
    named = parse(ValidateConfig, "validate", "", argv, trained_with=trained_with)
    assert (named.data.data, named.data.dataset) == (address, "webdataset")
    alone = parse(ValidateConfig, "validate", "", argv[1:], trained_with=trained_with)
    assert (alone.data.data, alone.data.dataset) == ("", "webdataset")


def test_inference_on_an_image_and_on_a_folder_give_the_same_labels(trained, small_shapes):
    cwd, _ = trained
    folder = small_shapes / "val2014"
    images = sorted(folder.iterdir())
    run(
        *("infer.py", "--model_path", "run/best.pt", "--pic_path", folder, "--top-k", 5),
        *("--th", 0.3, "--json", "all.json", "--output", "all"),
        cwd=cwd,
    )
    out, _ = run(
        *("infer.py", "--model-path", "run/best.pt", "--pic-path", images[3], "--top-k", 5),
        *("--th", 0.3, "--json", "one.json", "--output", "one"),
        cwd=cwd,
    )
    run(
        *("infer.py", "--model-path", "run/best.pt", "--pic-path", images[3], "--no-draw"),
        *("--output", "none"),
        cwd=cwd,
    )
    assert not (cwd / "none").exists()
    everything = json.loads((cwd / "all.json").read_text())
    [one] = json.loads((cwd / "one.json").read_text())
    assert [Path(each["file"]).name for each in everything] == [image.name for image in images]
    assert one == everything[3]
    assert len(one["labels"]) == 5
    assert one["labels"][0]["name"] in out
    for label in one["labels"]:
        assert label["predicted"] == (label["score"] > 0.3)
    assert len(list((cwd / "all").iterdir())) == len(images)
    assert width_of(cwd / "one" / f"{images[3].name}.png") > 300


def test_everyday_things_are_labelled_without_a_checkpoint_of_ones_own(tmp_path):
    photographs = REPOSITORY / "pics/photographs"
    out, _ = run(
        *("infer.py", "--pic-path", photographs, "--json", "labels.json", "--workers", 0),
        *("--output", "drawn", "--amp", "off"),
        cwd=tmp_path,
    )
    assert out.startswith("model: zoo:voc2007_lite0")
    labels = json.loads((tmp_path / "labels.json").read_text())
    predicted = {
        Path(each["file"]).stem: [x["name"] for x in each["labels"] if x["predicted"]]
        for each in labels
    }
    assert predicted["cat"] == ["cat"]
    assert predicted["astronaut"] == ["person"]
    assert width_of(tmp_path / "drawn/cat.jpg.png") > 300


def test_an_exported_checkpoint_labels_as_infer_does_and_in_int8_keeps_its_map(
    trained, small_shapes
):
    cwd, _ = trained
    out, _ = run(
        *("export.py", small_shapes, "--model-path", "run/best.pt", "--output", "out/net.onnx"),
        *("--preprocessing", "resize", "--int8", "--calibration-images", 16, "--workers", 0),
        cwd=cwd,
    )
    assert sorted(each.name for each in (cwd / "out").iterdir()) == ["net.int8.onnx", "net.onnx"]
    image = min((small_shapes / "val2014").iterdir())
    run(
        *("infer.py", "--model-path", "run/best.pt", "--pic-path", image, "--no-draw"),
        *("--top-k", 24, "--json", "one.json", "--amp", "off"),
        cwd=cwd,
    )
    [one] = json.loads((cwd / "one.json").read_text())
    expected = {label["name"]: label["score"] for label in one["labels"]}
    with Image.open(image) as opened:
        pixels = np.asarray(opened.convert("RGB"))[None]
    for name, tolerance in (("net", 1e-2), ("net.int8", 0.1)):
        session = onnxruntime.InferenceSession(str(cwd / f"out/{name}.onnx"))
        classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
        [[*scores]] = session.run(None, {"images": pixels})[0]
        assert dict(zip(classes, scores, strict=True)) == pytest.approx(expected, abs=tolerance)
    run(
        *("validate.py", "--model-path", "run/best.pt", "--json", "result.json", "--amp", "off"),
        cwd=cwd,
    )
    maps = [float(line.split()[-1]) for line in out.splitlines() if " mAP " in line]
    measured = json.loads((cwd / "result.json").read_text())["mAP"]
    assert maps[0] == pytest.approx(measured, abs=0.01)
    assert maps[1] == pytest.approx(measured, abs=5)
    assert maps[1] != maps[0]


def test_ctrl_c_leaves_a_run_that_resume_completes(small_shapes, tmp_path):
    arguments = ("train.py", small_shapes, "--epochs", 50, "--output", "run", *SMALL)
    process = subprocess.Popen(command(*arguments), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "--resume" in err
    assert "Traceback" not in err

    stopped = checkpoint.load(tmp_path / "run/last.pt")["epoch"]
    _, err = run(*arguments, cwd=tmp_path, code=2)
    assert "--resume" in err
    _, err = run(*arguments, "--resume", "--seed", 1, cwd=tmp_path, code=2)
    assert "seed: 0 then, 1 now" in err
    last = max(3, stopped + 1)
    out, _ = run(*arguments, "--resume", "--stop-epoch", last, cwd=tmp_path)
    history = checkpoint.load(tmp_path / "run/last.pt")["history"]
    assert [row["epoch"] for row in history] == [*range(1, last + 1)]
    assert f"mAP:         {sparks_text(history)}" in out.splitlines()
