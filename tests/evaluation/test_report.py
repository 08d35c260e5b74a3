import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asl import report
from asl.data.annotations import Annotations
from asl.data.partial import simulate
from asl.data.prior import write_prior
from asl.errors import UsageError
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


def pixels(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def near(picture, color, tolerance=12):
    """How many pixels have that colour ("#rrggbb")."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(picture.astype(int) - rgb).max(axis=2) <= tolerance).sum())


def test_epoch_lines_say_what_was_measured_and_stay_aligned():
    line = report.epoch_line(ROW | MAP)
    for part in ("7", "2.0e-04", "123.46", "85.54 (EMA)", "81.30 (regular)"):
        assert part in line
    assert "mAP" not in report.epoch_line(ROW)
    later = report.epoch_line({"epoch": 80, "lr": 1e-9, "loss": 9.5} | MAP)
    assert later.index("loss") == line.index("loss")
    assert later.index("mAP") == line.index("mAP")
    assert "gamma_neg  3.50" in report.epoch_line(ROW | {"gap": 0.1, "gamma_neg": 3.5})


@pytest.mark.parametrize("protocol", ["full", "partial", "official"])
def test_evaluation_text_gives_every_headline_figure(protocol):
    measured = figures(protocol=protocol, threshold=0.75)
    text = report.evaluation_text(measured)
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
    text = report.evaluation_text(figures(protocol=protocol))
    for reason, name in reasons.items():
        assert f"left out    1 without {reason}: {name}" in text
    assert text.count("left out") == len(reasons)


def test_evaluation_text_says_what_was_measured_where_it_is_told():
    about = {"checkpoint": "a.pt", "weights": "ema", "dataset": "voc", "split": "val"}
    text = report.evaluation_text(figures() | about | {"image_size": 160})
    assert "a.pt (ema weights)" in text
    assert "voc val at 160 px" in text


@pytest.mark.parametrize("num_classes", [20, 80])
def test_every_class_has_a_row(num_classes):
    measured = figures(num_classes)
    table = report.evaluation_text(measured).splitlines()[-num_classes:]
    for line, each in zip(table, measured["per_class"], strict=True):
        ap = "-" if each["AP"] is None else f"{each['AP']:.2f}"
        expected = [*each["name"].split(), ap, str(each["positives"]), str(each["negatives"])]
        assert line.split() == expected
    assert len({len(line) for line in table}) == 1


def test_of_thousands_of_classes_the_extremes_are_listed():
    measured = figures(9605, "partial")
    text = report.evaluation_text(measured)
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
    text = report.evaluation_text(nothing)
    assert "mAP         - (mean over 0 classes)" in text
    many = evaluate_scores(np.zeros((2, 101)), np.full((2, 101), -1), protocol="partial")
    assert "the 0 best classes" in report.evaluation_text(many)


def test_prediction_text_lists_what_was_predicted():
    text = report.prediction_text({"file": "a/1.jpg", "labels": prediction(0.981, 0.6, 0.02)})
    assert text.splitlines() == [
        "a/1.jpg",
        "  dog   98.1 %",
        "  sofa  60.0 %",
        "  below the threshold: cat 2.0 %",
    ]


def test_prediction_text_says_that_nothing_was_found_and_what_came_closest():
    text = report.prediction_text({"file": "1.jpg", "labels": prediction(0.4, 0.1)})
    assert "nothing is above the threshold; the highest: dog 40.0 %" in text


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (40, 2000), (2000, 40)])
def test_prediction_picture_keeps_the_aspect_ratio(tmp_path, height, width):
    photograph = np.full((height, width, 3), (200, 30, 40), np.uint8)
    report.prediction_picture(photograph, prediction(0.9, 0.2), tmp_path / "a.png", 0.5)
    is_photo = (np.abs(pixels(tmp_path / "a.png").astype(int) - (200, 30, 40)) <= 3).all(axis=2)
    seen = np.ptp(np.nonzero(is_photo), axis=1) + 1
    assert max(seen) > 500
    assert seen[0] * width == pytest.approx(seen[1] * height, abs=2 * max(height, width))


def test_bars_are_as_long_as_the_scores_and_strong_above_the_threshold(tmp_path):
    def draw(score, threshold=0.5):
        labels = prediction(score, threshold=threshold)
        photograph = np.full((60, 80, 3), 255, np.uint8)
        report.prediction_picture(photograph, labels, tmp_path / "a.png", threshold)
        picture = pixels(tmp_path / "a.png")
        return near(picture, report.BLUE), near(picture, report.PALE_BLUE)

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
        labels = [{"name": names[i % 3], "score": 0.5, "predicted": False} for i in range(count)]
        report.prediction_picture(photograph, labels, tmp_path / "a.png", 0.99)
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
    report.draw_predictions(predictions, tmp_path, 0.5)
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
        report.curves(rows, tmp_path / "curves.png")
        return pixels(tmp_path / "curves.png")

    full = draw(history(10))
    assert near(full, report.ORANGE) > 100
    assert not np.array_equal(full, draw(history(10, every=3)))
    no_map = draw(history(10, every=11))
    assert near(no_map, report.ORANGE) == 0
    assert (
        no_map.shape[0] < full.shape[0] < draw(history(10, gap=0.1, gamma_neg=3))[..., 0].shape[0]
    )
    assert near(draw(history(1)), report.BLUE) > 50


def test_an_existing_file_survives_a_drawing_that_fails(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"precious")
    with pytest.raises(KeyError):
        report.curves([{"loss": 1.0}], path)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_read_back_and_its_folder_made(tmp_path):
    value = {"name": "Café", "AP": None, "mAP": 86.6}
    report.write_json(value, tmp_path / "new" / "a.json")
    text = (tmp_path / "new" / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "Café" in text
    with pytest.raises(UsageError, match="cannot write"):
        report.write_json(value, tmp_path / "new" / "a.json" / "b.json")


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
        env=environment | {"PYTHONPATH": str(Path(report.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert path.is_file()


def test_loss_curves_show_where_each_loss_applies(tmp_path):
    report.loss_curves(tmp_path / "losses.png")
    picture = pixels(tmp_path / "losses.png")
    assert picture.shape[1] >= 800
    for color in (report.BLUE, report.ORANGE, report.GREEN):
        assert near(picture, color) > 300
    # Positives are learned by the ASL in full: its curves are in the right-hand panels as well,
    # where CSL's cells that are not annotated have none.
    right = picture[100:, picture.shape[1] // 2 + 30 :]
    assert near(right, report.BLUE) > 300
    assert near(right, report.GREEN) == 0


def long_tailed(num_classes):
    """100 images; class c is in the first 100 / (c + 1) of them."""
    images = [100 // (c + 1) for c in range(num_classes)]
    rows = np.concatenate([np.arange(n) for n in images])
    columns = np.repeat(np.arange(num_classes), images)
    files = np.array([b"%d.jpg" % i for i in range(100)])
    names = tuple(f"name{c}" for c in range(num_classes))
    return Annotations.from_cells(Path("x"), files, names, rows, columns, np.ones(len(rows)))


def test_frequencies_text_counts_what_is_there_what_is_left_and_how_well_a_prior_ranks():
    data = long_tailed(12)
    prior = np.linspace(0.5, 0.01, 12)
    prior[0] = 0
    text = report.frequencies_text(data, {"fpc:20": simulate(data, "fpc:20", 0)}, {"mine": prior})
    lines = text.splitlines()
    assert lines[3].split() == ["name0", "100", "1.0000", "20", "0", "0.0000"]
    assert lines[4].split() == ["name1", "50", "0.5000", "20", "20", "0.4555"]
    assert lines[14].split() == ["name11", "8", "0.0800", "8", "8", "0.0100"]
    # Eleven of twelve ranks in order, and the first at the end.
    assert "prior mine: rank correlation 0.538" in text
    assert "top 10 (9 rightly): name1, name2, " in text


def test_ranks_of_equal_values_are_shared():
    assert report._rank_correlation([1, 2, 2, 3], [10, 20, 20, 30]) == pytest.approx(1)
    assert report._rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)


@pytest.mark.parametrize("num_classes", [3, 120])
def test_frequency_picture_draws_a_panel_for_each_simulation(tmp_path, num_classes):
    data = long_tailed(num_classes)

    def draw(schemes, **priors):
        partial = {scheme: simulate(data, scheme, 0) for scheme in schemes}
        report.frequency_picture(data, partial, priors, tmp_path / "a.png")
        return pixels(tmp_path / "a.png")

    one, two = draw(["fpc:9"]), draw(["fpc:9", "rps:0.5"])
    assert len(one) < len(two)
    for color in (report.BLUE, report.PALE_BLUE):
        assert 500 < near(one, color) < near(two, color)
    assert near(one, report.ORANGE) == 0
    prior = np.linspace(1, 0.01, num_classes)
    assert near(draw(["fpc:9"], **{"fpc:9": prior}), report.ORANGE) > 50


def test_the_command_frequencies_reads_any_data_set_and_priors_by_name(tmp_path, capsys):
    table = tmp_path / "train.csv"
    table.write_text(
        "path,labels\n" + "".join(f"{i}.jpg,{'dog|' * (i < 3)}cat\n" for i in range(9))
    )
    write_prior(tmp_path / "prior.csv", ["dog", "cat"], torch.tensor([0.25, 0.75]))
    options = ["frequencies", str(tmp_path / "train.csv"), "--dataset", "table", "--output"]
    options += [str(tmp_path / "a.png"), "--simulate-partial", "fpc:2", "--prior-path"]
    report.main([*options, str(tmp_path / "prior.csv")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cat", "9", "1.0000", "2", "0", "0.7500"] in lines
    assert ["dog", "3", "0.3333", "2", "2", "0.2500"] in lines
    assert pixels(tmp_path / "a.png").size
    with pytest.raises(UsageError, match="2 priors for 1 schemes"):
        report.main([*options, "a.csv", "b.csv"])


def test_evaluation_text_names_the_protocol_of_the_data_set():
    measured = {**figures(), "evaluated_as": "voc: difficult objects ignored"}
    assert "protocol    voc: difficult objects ignored" in report.evaluation_text(measured)
