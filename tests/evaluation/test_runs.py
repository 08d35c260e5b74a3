"""The curves of several runs: what is read of their folders, drawn, and printed."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import asl.report
from asl.errors import DataError
from asl.evaluation.pictures import BLUE, GREEN, OF_RUNS, ORANGE
from asl.evaluation.text import sparks_text


def run(folder, maps, **more):
    """A folder with the log of a run; None is an epoch that was not validated."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("epochs: 9\n")
    rows = [
        {"epoch": epoch, "lr": 1e-3 / epoch, "loss": 50 / epoch, **more}
        | ({} if value is None else {"mAP_ema": value, "mAP_regular": value - 1})
        for epoch, value in enumerate(maps, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def draw(tmp_path, capsys):
    """draw(folders...) -> the lines printed and the picture (H, W, 3)."""

    def drawn(*folders):
        asl.report.main(["curves", *folders, "--output", str(tmp_path / "new" / "a.png")])
        with Image.open(tmp_path / "new" / "a.png") as picture:
            return capsys.readouterr().out.splitlines(), np.asarray(picture.convert("RGB"))

    return drawn


def near(picture, color):
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(picture.astype(int) - rgb).max(axis=2) <= 12).sum())


def test_each_run_has_a_colour_and_a_line_of_bars(tmp_path, draw):
    first = run(tmp_path / "short", [10, 30, 20])
    second = run(tmp_path / "a_longer_name", [*range(40, 47), None, 48])
    lines, alone = draw(first)
    assert lines[0] == "short  3 epochs  ▁█▅  first 10.00, best 30.00 (epoch 2), last 20.00"
    assert near(alone, BLUE) > 300
    assert near(alone, ORANGE) == 0
    lines, both = draw(first, second)
    assert lines[:2] == [
        "short          3 epochs  ▁█▅       first 10.00, best 30.00 (epoch 2), last 20.00",
        "a_longer_name  9 epochs  ▁▂▃▄▅▅▆█  first 40.00, best 48.00 (epoch 9), last 48.00",
    ]
    assert near(both, ORANGE) > 300
    assert near(both, GREEN) == 0


def test_the_picture_has_map_loss_and_learning_rate(tmp_path, draw):
    def blue(**changed):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return near(draw(run(folder, [20.0, 60.0, 70.0], **changed))[1], BLUE)

    everything = blue()
    for lacking in ({"loss": None}, {"lr": None}, {"loss": None, "lr": None}):
        assert 100 < blue(**lacking) < everything - 300 * len(lacking)


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, draw):
    folders = [run(tmp_path / each / "run", [50.0, 60.0]) for each in "ab"]
    lines, _ = draw(*folders)
    assert [line.split()[0] for line in lines[:2]] == folders


def test_runs_that_are_going_on_or_were_never_validated(tmp_path, draw):
    ready = run(tmp_path / "ready", [50.0])
    unmeasured = run(tmp_path / "unmeasured", [None, None])
    started = tmp_path / "started"
    started.mkdir()
    (started / "config.yaml").write_text("epochs: 9\n")
    lines, picture = draw(str(started), unmeasured, ready)
    assert [line.split() for line in lines[:2]] == [
        ["started", "0", "epochs", "no", "mAP", "yet"],
        ["unmeasured", "2", "epochs", "no", "mAP", "yet"],
    ]
    assert "█  first 50.00" in lines[2]
    assert near(picture, BLUE) > 100
    assert near(picture, ORANGE) > 20
    with pytest.raises(DataError, match="no epoch is over yet in started"):
        draw(str(started))


def test_more_runs_than_colours_are_dashed(tmp_path, draw):
    assert len(set(OF_RUNS)) == 7
    folders = [run(tmp_path / f"{n}", [20.0 + n, 60.0 + n]) for n in range(8)]
    _, seven = draw(*folders[:7])
    _, eight = draw(*folders)
    assert near(eight, BLUE) > near(seven, BLUE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[1]\n", "line 1: not the figures of an epoch"),
        ('{"epoch": 1, "loss": 2}\n{"epoch": 2, "loss": "low"}\n', "line 2: not the figures"),
        ('{"epoch": null}\n', "line 1: not the figures"),
    ],
)
def test_a_damaged_log_is_told_with_its_line(tmp_path, draw, content, message):
    folder = run(tmp_path / "a", [1.0])
    (tmp_path / "a" / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        draw(folder)
    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_run_is_refused(tmp_path, draw):
    with pytest.raises(DataError, match="is no folder of a run"):
        draw(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"has no metrics.jsonl: it holds no run"):
        draw(str(Path(run(tmp_path / "runs" / "a", [1.0])).parent))


def test_bars_go_from_the_lowest_to_the_highest_and_no_further_than_a_line():
    def bars(values):
        rows = [{"epoch": e, "mAP_ema": v, "mAP_regular": v} for e, v in enumerate(values, 1)]
        return sparks_text(rows).partition("  ")[0]

    assert bars(range(8)) == "▁▂▃▄▅▆▇█"
    assert bars([70.0, 70.0]) == "██"
    many = bars(range(1000))
    assert len(many) == 60
    assert [*many] == sorted(many)
    assert many[0] + many[-1] == "▁█"
    assert sparks_text([{"epoch": 1, "mAP_ema": None}]) == "no mAP yet"
    better = sparks_text([{"epoch": 4, "mAP_ema": 1.0, "mAP_regular": 2.5}])
    assert better.endswith("first 2.50, best 2.50 (epoch 4), last 2.50")
