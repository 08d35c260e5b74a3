"""The files that infer.py writes of its predictions, read back by others' readers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from asl.data.readers.table import table
from asl.errors import DataError, UsageError
from asl.evaluation import results, sheets
from asl.evaluation.predict import predict
from asl.evaluation.results import check_results, write_results
from asl.evaluation.settings import InferConfig, PictureSettings
from asl.evaluation.text import prediction_text


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def infer(untrained):
    """Labels pictures and writes what is wanted: infer(pictures, **settings)."""

    def labelled(pictures, **settings):
        usual = {"device": "cpu", "amp": "off", "workers": 0, "draw": False, "threshold": 0.5}
        model = {"model_name": "test_resnet", "image_size": 64, "model_path": str(untrained)}
        config = InferConfig.of(pic_path=str(pictures), **{**model, **usual, **settings})
        predictions = predict(config)
        return predictions, [*write_results(predictions, config.evaluation)]

    return labelled


def test_json_lines_are_the_json_a_line_each(infer, photographs, tmp_path):
    found, said = infer(
        photographs,
        json_file=str(tmp_path / "a.json"),
        jsonl=str(tmp_path / "new/a.jsonl"),
        top_k=3,
    )
    lines = (tmp_path / "new/a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads((tmp_path / "a.json").read_text())
    assert [json.loads(line) for line in lines] == [*found]
    assert {len(json.loads(line)["labels"]) for line in lines} == {3}
    assert any("a.jsonl" in line for line in said)


def test_the_csv_is_a_table_that_can_be_trained_on(infer, photographs, tmp_path):
    found, said = infer(photographs, csv=str(photographs / "labels.csv"))
    (photographs / "labels.csv").rename(tmp_path / "labels.csv")
    assert said[-1] == (
        f"train on it, corrected: python train.py {photographs / 'labels.csv'} --dataset table ..."
    )
    assert pl.read_csv(tmp_path / "labels.csv")["path"][-2:].to_list() == [
        "below/7.png",
        "below/8.webp",
    ]
    read = table(tmp_path / "labels.csv", "train", image_folder=str(photographs), val_share=0)
    assert [read.path(row) for row in range(9)] == [each["file"] for each in found]
    for row, each in enumerate(found):
        present = {read.classes[c] for c in np.flatnonzero(read.labels(row) == 1)}
        assert present == {label["name"] for label in each["labels"] if label["predicted"]}
    scores = pl.read_csv(tmp_path / "labels.csv", infer_schema=False)["scores"].fill_null("")
    assert [len(cell.split("|")) if cell else 0 for cell in scores] == [
        sum(label["predicted"] for label in each["labels"]) for each in found
    ]


def test_a_csv_elsewhere_names_images_in_full_and_says_how_it_is_read(infer, photographs, tmp_path):
    found, said = infer(photographs, csv=str(tmp_path / "labels.csv"))
    assert said[-1].endswith("labels.csv --dataset table --image-folder / ...")
    read = table(tmp_path / "labels.csv", "train", image_folder="/", val_share=0)
    assert [read.path(row) for row in range(9)] == [each["file"] for each in found]


def test_parquet_has_all_scores(infer, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "CELLS", 11)  # row groups of two images
    names = tmp_path / "names.csv"
    names.write_text("cat,House cat\n")
    found, _ = infer(
        photographs, parquet=str(tmp_path / "a.parquet"), class_descriptions=str(names), top_k=1
    )
    frame = pl.read_parquet(tmp_path / "a.parquet")
    assert frame.columns == ["file", "House cat", "dog", "bird", "boat", "car"]
    assert frame["file"].to_list() == [each["file"] for each in found]
    assert np.array_equal(frame.drop("file").to_numpy(), found.scores.numpy())


def test_a_contact_sheet_has_every_picture_on_pages_of_48(infer, tmp_path):
    (tmp_path / "in").mkdir()
    colours = [(5 * number, 255 - 5 * number, 128) for number in range(50)]
    for number, colour in enumerate(colours):
        shape = (60, 45) if number % 2 else (45, 60)
        Image.new("RGB", shape, colour).save(tmp_path / "in" / f"{number:02}.png")
    _, said = infer(tmp_path / "in", contact_sheet=str(tmp_path / "sheet.png"))
    assert said == [f"contact sheet: {tmp_path / 'sheet.png'} to sheet-2.png"]
    seen = []
    for name, on_it in (("sheet.png", 48), ("sheet-2.png", 2)):
        with Image.open(tmp_path / name) as page:
            pixels = np.asarray(page.convert("RGB"))
            if on_it == 48:
                assert page.size == (1552, 2304)
        found = [np.all(pixels == colour, axis=2).sum() for colour in colours]
        seen += [number for number, count in enumerate(found) if count == 60 * 45]
        assert len([count for count in found if count]) == on_it
    assert seen == [*range(50)]


def test_a_contact_sheet_takes_any_name_and_shrinks_photographs(tmp_path):
    labels = [{"name": "Ωμέγα " * 60, "score": 0.9, "predicted": True}]
    none = [{"name": "cat", "score": 0.2, "predicted": False}]
    tiles = [
        {"file": "x" * 200, "labels": labels},
        {"file": "a.jpg", "labels": none},
    ]
    photograph = np.full((3, 900, 1600), 77, np.uint8)
    [page] = sheets.contact_sheet(tiles, tmp_path / "a.png", lambda _: torch.from_numpy(photograph))
    with Image.open(page) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    assert pixels.shape == (16 + 286, 2 * 256 + 16, 3)
    rows, columns = np.nonzero((pixels == 77).all(axis=2))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (135, 240 + 256)
    ink = (pixels == 0).all(axis=2)
    assert ink[:, :272].any()
    assert not ink[:, 272:].any()  # what is not predicted is grey


def test_exif_rotation_is_seen_in_all_pictures(infer, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.new("RGB", (200, 50), (200, 30, 40)).save(
        tmp_path / "in/a.jpg", exif=exif, quality=100, subsampling=0
    )
    wanted = {"contact_sheet": str(tmp_path / "sheet.png"), "explain": "gradcam", "draw": True}
    for turned in (True, False):
        out = str(tmp_path / f"out-{turned}")
        infer(tmp_path / "in", **wanted, output=out, exif_rotate=turned)
        for name in ("sheet.png", f"{out}/a.jpg.png"):
            with Image.open(tmp_path / name) as opened:
                pixels = np.asarray(opened.convert("RGB")).astype(int)
            rows, columns = np.nonzero(np.abs(pixels - (200, 30, 40)).max(axis=2) < 8)
            assert bool(np.ptp(rows) > np.ptp(columns)) is turned


REFUSED = {
    "two results in one file": ({"csv": "a", "jsonl": "./a"}, "jsonl and csv are one file"),
    "a sheet that is no picture": ({"contact_sheet": "a.gif"}, "must end in .png, .jpg, .jpeg"),
    **{
        f"{name} below a file": ({name: "file/a.png"}, "cannot write file/a.png: Not a directory")
        for name in ("json_file", "jsonl", "csv", "parquet", "contact_sheet")
    },
    "a folder": ({"csv": "folder"}, "cannot write folder: Is a directory"),
    "pictures below a file": ({"output": "file/x"}, "cannot write file/x/picture.png"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_results_that_cannot_be_written_are_known_before(case, tmp_path, monkeypatch):
    settings, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folder").mkdir()
    with pytest.raises(UsageError, match=message):
        check_results(PictureSettings(**settings))
    assert names_in(".") == ["file", "folder"]
    check_results(PictureSettings(csv="new/a.csv", output="new/pictures"))
    assert names_in(".") == ["file", "folder"]


def test_no_image_is_read_for_results_that_cannot_be_written(infer, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(UsageError, match="cannot write"):
        infer(tmp_path, csv=str(tmp_path))
    with pytest.raises(DataError, match="not an image"):
        infer(tmp_path, csv=str(tmp_path / "a.csv"))
    assert names_in(tmp_path) == ["a.jpg"]


def test_names_that_a_table_cannot_hold_are_refused(infer, photographs, tmp_path):
    names = tmp_path / "names.csv"
    names.write_text("cat,cat|kitten\ndog,file\n")
    described = {"class_descriptions": str(names)}
    with pytest.raises(UsageError, match=r"'cat\|kitten'"):
        infer(photographs, csv=str(tmp_path / "a.csv"), **described)
    with pytest.raises(UsageError, match="called 'file'"):
        infer(photographs, parquet=str(tmp_path / "a.parquet"), **described)
    (tmp_path / "in").mkdir()
    name = os.fsencode(tmp_path / "in") + b"/\xff.png"
    Image.new("RGB", (40, 30)).save(os.fsdecode(name))
    with pytest.raises(DataError, match="not UTF-8"):
        infer(tmp_path / "in", csv=str(tmp_path / "a.csv"))
    wanted = {"jsonl": str(tmp_path / "a.jsonl"), "json_file": str(tmp_path / "a.json")}
    [found], _ = infer(tmp_path / "in", **wanted)
    assert (
        prediction_text(found)
        .encode()
        .decode()
        .splitlines()[0]
        .endswith("/in/\N{REPLACEMENT CHARACTER}.png")
    )
    [line] = (tmp_path / "a.jsonl").read_text().splitlines()
    assert os.fsencode(json.loads(line)["file"]) == name
    assert json.loads((tmp_path / "a.json").read_text()) == [json.loads(line)]


def test_infer_writes_all_of_it(untrained, photographs, tmp_path):
    command = [sys.executable, "-W", "error", REPOSITORY / "infer.py", "--model-path", untrained]
    command += ["--pic-path", photographs, "--no-draw", "--device", "cpu", "--workers", "0"]
    wanted = ["--csv", "a.csv", "--parquet", "a.parquet", "--contact-sheet", "a.jpg"]
    done = subprocess.run([*command, *wanted], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{photographs}/") == 9
    assert names_in(tmp_path) == ["a.csv", "a.jpg", "a.parquet"]
    with Image.open(tmp_path / "a.jpg") as page:
        assert page.format == "JPEG"
