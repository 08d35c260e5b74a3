"""A short round of the chaos script, and that it would notice what is wrong."""

import subprocess
import sys

import chaos
import pytest
import torch

from asl.models import checkpoint


def test_runs_survive_kills_and_a_full_disk(tmp_path):
    trials = ("--kills", "3", "--rank-kills", "0", "--full-disks", "1", "--epochs", "2")
    command = [sys.executable, chaos.__file__, *trials]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| `kill -9` of the process | 3 |" in done.stdout
    assert "| The disk is full | 1 |" in done.stdout


def finished(folder, weight=1.0):
    weights = {"w": torch.tensor([weight, torch.nan])}
    content = {"ema": weights, "regular": weights, "best": "ema", "config": {"output": str(folder)}}
    folder.mkdir()
    for name in ("last.pt", "best.pt"):
        checkpoint.save(folder / name, {**content, "training": {"steps": 3, "gap": torch.nan}})
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (folder / "steps.jsonl").write_text('{"step": 1}\n')
    (folder / "prior.csv").touch()
    return folder


def test_whole_and_equal_runs_are_found_so(tmp_path):
    one, other = finished(tmp_path / "one"), finished(tmp_path / "other")
    chaos.check_readable(one)
    chaos.check_same(one, other)


@pytest.mark.parametrize("name", ["last.pt", "metrics.jsonl", "config.yaml", "curves.png"])
def test_a_file_that_is_half_written_is_found(name, tmp_path):
    run = finished(tmp_path / "run")
    whole = (run / name).read_bytes() if (run / name).exists() else b"model_name: [\n"
    (run / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(chaos.Wrong, match="cannot be read"):
        chaos.check_readable(run)


def test_a_difference_in_one_weight_or_a_file_left_behind_is_found(tmp_path):
    one, other = finished(tmp_path / "one"), finished(tmp_path / "other", weight=1.0000001)
    with pytest.raises(chaos.Wrong, match=r"last.pt differs .* in /ema/w"):
        chaos.check_same(one, other)
    (one / ".last.pt.0.part").touch()
    with pytest.raises(chaos.Wrong, match=r"is left with"):
        chaos.check_same(one, one)
