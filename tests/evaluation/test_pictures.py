"""Pictures of predictions, curves, losses and frequencies, read back by their pixels."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import asl.report
from asl.data.partial import simulate
from asl.data.prior import write_prior
from asl.errors import UsageError
from asl.evaluation import pictures


def prediction(*scores, threshold=0.5):
    names = ("dog", "sofa", "cat")
    return [
        {"name": name, "score": score, "predicted": score > threshold, "threshold": threshold}
        for name, score in zip(names, scores, strict=False)
    ]


def pixels(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def near(picture, color, tolerance=12):
    """How many pixels have that colour ("#rrggbb")."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(picture.astype(int) - rgb).max(axis=2) <= tolerance).sum())


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (40, 2000), (2000, 40)])
def test_prediction_picture_keeps_the_aspect_ratio(tmp_path, height, width):
    photograph = np.full((height, width, 3), (200, 30, 40), np.uint8)
    pictures.prediction_picture(photograph, prediction(0.9, 0.2), tmp_path / "a.png")
    is_photo = (np.abs(pixels(tmp_path / "a.png").astype(int) - (200, 30, 40)) <= 3).all(axis=2)
    seen = np.ptp(np.nonzero(is_photo), axis=1) + 1
    assert max(seen) > 500
    assert seen[0] * width == pytest.approx(seen[1] * height, abs=2 * max(height, width))


def test_bars_are_as_long_as_the_scores_and_strong_above_the_threshold(tmp_path):
    def draw(score, threshold=0.5):
        labels = prediction(score, threshold=threshold)
        photograph = np.full((60, 80, 3), 255, np.uint8)
        pictures.prediction_picture(photograph, labels, tmp_path / "a.png")
        picture = pixels(tmp_path / "a.png")
        return near(picture, pictures.BLUE), near(picture, pictures.PALE_BLUE)

    whole, _ = draw(1.0)
    strong, pale = draw(0.75)
    assert strong == pytest.approx(0.75 * whole, rel=0.02)
    assert pale < 0.02 * whole
    strong, pale = draw(0.25)
    assert strong < 0.02 * whole
    assert pale == pytest.approx(0.25 * whole, rel=0.05)
    assert draw(0.25, threshold=0.2)[0] > 0.2 * whole


def test_prediction_picture_takes_any_name_and_any_number_of_labels(tmp_path):
    names = ["one", "$100 bill and $20 bill", "Café " * 30]
    photograph = np.zeros((30, 40, 3), np.uint8)
    sizes = []
    for count in (1, 2, 3, 30):
        label = {"score": 0.5, "predicted": False, "threshold": 0.99}
        labels = [{"name": names[i % 3], **label} for i in range(count)]
        pictures.prediction_picture(photograph, labels, tmp_path / "a.png")
        sizes.append(pixels(tmp_path / "a.png").shape)
    assert sizes[0] == sizes[2]
    assert sizes[3][0] > 2 * sizes[0][0]


def test_pictures_of_images_of_the_same_name_do_not_meet(tmp_path):
    files = [tmp_path / name for name in ("a/1.jpg", "b/1.jpg", "b/1.png")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30)).save(file)
    predictions = [{"file": str(file), "labels": prediction(0.9)} for file in files]
    before = files[2].read_bytes()
    pictures.draw_predictions(predictions, tmp_path)
    drawn = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*.png"))
    assert drawn == ["a/1.jpg.png", "b/1.jpg.png", "b/1.png.png"]
    assert files[2].read_bytes() == before


def history(epochs, every=1, **more):
    return [
        {"epoch": e, "lr": 1e-4 / e, "loss": 300 / e, **more}
        | ({"mAP_ema": 50.0 + e, "mAP_regular": 60.0} if e % every == 0 else {})
        for e in range(1, epochs + 1)
    ]


def test_curves_show_what_there_is(tmp_path):
    def draw(rows):
        pictures.curves(rows, tmp_path / "curves.png")
        return pixels(tmp_path / "curves.png")

    full = draw(history(10))
    assert near(full, pictures.ORANGE) > 100
    assert not np.array_equal(full, draw(history(10, every=3)))
    no_map = draw(history(10, every=11))
    assert near(no_map, pictures.ORANGE) == 0
    assert (
        no_map.shape[0] < full.shape[0] < draw(history(10, gap=0.1, gamma_neg=3))[..., 0].shape[0]
    )
    assert near(draw(history(1)), pictures.BLUE) > 50


def test_an_existing_file_survives_a_drawing_that_fails(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"precious")
    with pytest.raises(KeyError):
        pictures.curves([{"loss": 1.0}], path)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


def test_loss_curves_show_where_each_loss_applies(tmp_path):
    pictures.loss_curves(tmp_path / "losses.png")
    picture = pixels(tmp_path / "losses.png")
    assert picture.shape[1] >= 800
    for color in (pictures.BLUE, pictures.ORANGE, pictures.GREEN):
        assert near(picture, color) > 300
    # Positives are learned by the ASL in full: its curves are in the right-hand panels as well,
    # where CSL's cells that are not annotated have none.
    right = picture[100:, picture.shape[1] // 2 + 30 :]
    assert near(right, pictures.BLUE) > 300
    assert near(right, pictures.GREEN) == 0


@pytest.mark.parametrize("num_classes", [3, 120])
def test_frequency_picture_draws_a_panel_for_each_simulation(long_tailed, tmp_path, num_classes):
    data = long_tailed(num_classes)

    def draw(schemes, **priors):
        partial = {scheme: simulate(data, scheme, 0) for scheme in schemes}
        pictures.frequency_picture(data, partial, priors, tmp_path / "a.png")
        return pixels(tmp_path / "a.png")

    one, two = draw(["fpc:9"]), draw(["fpc:9", "rps:0.5"])
    assert len(one) < len(two)
    for color in (pictures.BLUE, pictures.PALE_BLUE):
        assert 500 < near(one, color) < near(two, color)
    assert near(one, pictures.ORANGE) == 0
    prior = np.linspace(1, 0.01, num_classes)
    assert near(draw(["fpc:9"], **{"fpc:9": prior}), pictures.ORANGE) > 50


def test_matplotlib_is_loaded_to_draw_only_and_needs_no_display(tmp_path):
    path = tmp_path / "new" / "losses.png"
    code = """import sys
from asl import report
assert "matplotlib" not in sys.modules
report.main(sys.argv[1:])
assert "matplotlib.pyplot" not in sys.modules"""
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, "losses", "--output", str(path)],
        env=environment | {"PYTHONPATH": str(Path(asl.report.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert path.is_file()


def test_the_command_frequencies_reads_any_data_set_and_priors_by_name(tmp_path, capsys):
    table = tmp_path / "train.csv"
    table.write_text(
        "path,labels\n" + "".join(f"{i}.jpg,{'dog|' * (i < 3)}cat\n" for i in range(9))
    )
    write_prior(tmp_path / "prior.csv", ["dog", "cat"], torch.tensor([0.25, 0.75]))
    options = ["frequencies", str(tmp_path / "train.csv"), "--dataset", "table", "--output"]
    options += [str(tmp_path / "a.png"), "--simulate-partial", "fpc:2", "--prior-path"]
    asl.report.main([*options, str(tmp_path / "prior.csv")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cat", "9", "1.0000", "2", "0", "0.7500"] in lines
    assert ["dog", "3", "0.3333", "2", "2", "0.2500"] in lines
    assert pixels(tmp_path / "a.png").size
    with pytest.raises(UsageError, match="2 priors for 1 schemes"):
        asl.report.main([*options, "a.csv", "b.csv"])


def test_a_figure_stands_at_its_epoch(tmp_path):
    def columns(epoch):
        rows = history(9, every=100)
        rows[epoch - 1] |= {"mAP_ema": 50.0, "mAP_regular": 60.0}
        pictures.curves(rows, tmp_path / "a.png")
        orange = np.abs(pixels(tmp_path / "a.png").astype(int) - [0xD5, 0x5E, 0]).max(axis=2) < 12
        return np.flatnonzero(orange[: len(orange) // 3].any(axis=0))

    assert columns(1).min() < columns(8).min() - 300
