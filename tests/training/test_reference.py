"""A run is judged by what others reached: by all of them, or with a margin by the only one."""

import json
import math

import pytest
from run_log import figures_of
from scipy import stats

from asl.errors import UsageError
from asl.training.fit import fit
from asl.training.reference import FOLDER, Reference


@pytest.fixture
def written(tmp_path):
    """Writes histories of reference runs: the name of the file."""

    def write(*histories):
        path = tmp_path / "reference.json"
        path.write_text(json.dumps({"trials": [{"history": history} for history in histories]}))
        return str(path)

    return write


def test_another_run_is_expected_where_student_s_interval_says(written):
    values = [70.0, 71.5, 70.4, 72.2]
    low, high = Reference(written(*([x] for x in values))).expected(1)
    n, mean = len(values), sum(values) / len(values)
    spread = stats.tstd(values) * math.sqrt(1 + 1 / n)
    assert (low, high) == pytest.approx(stats.t.interval(0.999, n - 1, mean, spread))


def test_of_a_run_alone_the_margin_is_one_sided_and_epochs_may_be_unknown(written):
    reference = Reference(written([2.0, None, 85.5]))
    assert reference.expected(1) == (0.0, 100.0)
    assert reference.expected(2) is None
    assert reference.expected(3) == (82.5, 100.0)
    assert reference.expected(4) is None


def test_what_is_said_beside_an_epoch(written):
    reference = Reference(written([60.0], [62.0], [61.0]))
    low, high = reference.expected(1)
    inside, below = ({"epoch": 1, "mAP_ema": value} for value in (61.0, low - 0.1))
    assert reference.said(inside) == f"   as expected ({low:.1f} to {high:.1f})"
    assert reference.said(below).strip().startswith("NOT AS EXPECTED")
    assert reference.said({"epoch": 2, "mAP_ema": 61.0}) == ""
    assert reference.said({"epoch": 1}) == ""
    assert reference.verdict([inside, {"epoch": 2}]).startswith("1 of 1 epochs as expected")
    assert reference.verdict([below]).startswith("0 of 1 epochs")


def test_train_py_prints_it(small_shapes, settings, tmp_path, written, capsys):
    first = fit(settings(small_shapes, tmp_path / "first"))
    history = [row["mAP_ema"] for row in figures_of(first)]
    capsys.readouterr()
    own, wrong = written(history), [value + 50 for value in history]
    fit(settings(small_shapes, tmp_path / "second", reference=own))
    said = capsys.readouterr().out
    assert said.count("   as expected (") == len(history)
    assert f"{len(history)} of {len(history)} epochs as expected (reference.json)" in said
    fit(settings(small_shapes, tmp_path / "third", reference=written(wrong)))
    assert capsys.readouterr().out.count("NOT AS EXPECTED") == len(history)


def test_the_model_that_estimates_a_prior_is_not_compared(
    small_shapes, settings, tmp_path, written, capsys
):
    csl = {"simulate_partial": "rps:0.5", "unannotated": "selective", "prior_path": "estimate"}
    reference = written([50.0])
    fit(settings(small_shapes, tmp_path / "run", epochs=1, reference=reference, **csl))
    assert capsys.readouterr().out.count("EXPECTED (47.0 or more)") == 1


@pytest.mark.parametrize("content", [None, "{}", '{"trials": [{"mAP": 3}]}', "no json"])
def test_a_reference_that_is_none_is_refused(content, tmp_path):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"mine\.json is no file of reference runs"):
        Reference(str(path))
    with pytest.raises(UsageError, match="there are coco_tresnet_l_448"):
        Reference("coco_tresnet_m")


def test_the_files_of_this_project_can_be_read():
    for path in FOLDER.glob("*.json"):
        low, high = Reference(path.stem).expected(1)
        assert 0 <= low < high <= 100
