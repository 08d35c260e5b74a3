"""bench/gpu.py, which needs a GPU for its figures and none to be tried."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
SECTIONS = {"losses", "augmentation", "loader", "jpeg", "step"}  # compiling takes a CPU a minute


def run(*arguments, code=0):
    """What the benchmark printed to stdout and stderr."""
    command = [sys.executable, str(BENCH / "gpu.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def gpu(monkeypatch):
    """The module, which finds those beside it."""
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu

    return gpu


def contender(*figures):
    """Gives these figures of images/s turn by turn, and fails at one that is an error."""
    for figure in figures:
        if isinstance(figure, BaseException):
            raise figure
        yield {"images/s": figure, "GiB": 1.0}


def test_every_section_is_measured_and_becomes_a_table(gpu, tmp_path):
    quick = ("--device", "cpu", "--quick", "--workers", 1, "--output", tmp_path)
    printed, _ = run(*quick)
    [path] = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert report["sections"].keys() == SECTIONS
    for section in report["sections"].values():
        figures = [row[figure] for row in section["rows"] for figure in ("x first", leading(row))]
        assert min(figures) > 0
        assert "failed" not in section
    assert printed.count("| test_resnet | 64 | 8 |") == 4
    assert gpu.table(report) in printed


def leading(row):
    return "ms" if "ms" in row else "images/s"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path):
    printed, said = run("--output", tmp_path / "none", code=2)
    assert re.fullmatch("error: device 'cuda': .*\n", said)
    assert printed == ""
    assert not (tmp_path / "none").exists()


def test_figures_are_medians_after_the_first_turn_and_a_failure_is_a_row_of_its_own(gpu):
    from gpu_turns import by_turns

    runs = {
        "first": contender(1.0, 10.0, 20.0, 40.0),
        "full": contender(1.0, MemoryError("out of memory\nat length")),
        "fast": contender(1.0, 30.0, 40.0, 40.0),
    }
    rows = list(by_turns([({"name": name}, each) for name, each in runs.items()], rounds=3))
    assert rows == [
        {"name": "first", "images/s": 20.0, "x first": 1.0, "GiB": 1.0},
        {"name": "full", "failed": "MemoryError: out of memory"},
        {"name": "fast", "images/s": 40.0, "x first": 2.0, "GiB": 1.0},
    ]


def test_a_section_that_runs_out_of_time_keeps_its_rows_on_disk(gpu, tmp_path, monkeypatch):
    def endless(bench):
        """Never comes to an end."""
        yield {"images/s": 1.0}
        while True:
            pass

    monkeypatch.setitem(gpu.SECTIONS, "step", gpu.SECTIONS["step"]._replace(run=endless))
    path, report = tmp_path / "report.json", {"device": "none", "sections": {}}
    bench = gpu.Bench(torch.device("cpu"), gpu.QUICK, tmp_path, "no files", workers=0)
    gpu.measure("step", bench, 0.3, report, path)
    section = json.loads(path.read_text())["sections"]["step"]
    assert section["rows"] == [{"images/s": 1.0}]
    assert section["failed"].startswith("OutOfTime")


def test_who_was_measured_before_the_time_was_over_has_a_row(gpu):
    from gpu_turns import by_turns

    runs = [({"name": "done"}, contender(1.0, 2.0)), ({"name": "late"}, contender(1.0, 3.0, 4.0))]
    over = gpu.OutOfTime("1 s was not enough")
    runs.append(({"name": "never"}, contender(1.0, over)))
    rows = []
    with pytest.raises(gpu.OutOfTime):
        rows.extend(by_turns(runs, rounds=3))
    assert [row.get("images/s", row.get("failed")) for row in rows] == [
        2.0,
        3.0,
        f"OutOfTime: {over}",
    ]
