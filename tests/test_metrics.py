import json
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

from asl import metrics
from asl.metrics import (
    average_precision,
    best_thresholds,
    evaluate_scores,
    f1_scores,
    mean_average_precision,
)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    values = json.loads((GOLDEN / "reference.json").read_text())["metrics"]
    return values, load_file(GOLDEN / "reference.safetensors")


@pytest.fixture
def tied():
    """Many ties and -1 cells; class 3 lacks positives, class 5 negatives, class 7 both."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 20, (300, 12)).astype(np.float32) / 20
    targets = rng.choice([1, 0, -1], p=[0.2, 0.5, 0.3], size=(300, 12)).astype(np.int8)
    targets[targets[:, 3] == 1, 3] = 0
    targets[targets[:, 5] == 0, 5] = -1
    targets[:, 7] = -1
    return scores, targets


def sklearn_ap(scores, targets):
    def one_class(score, target):
        known = target != -1
        if not (target == 1).any():
            return np.nan
        return average_precision_score(target[known], score[known].astype(np.float64))

    return np.array([one_class(s, t) for s, t in zip(scores.T, targets.T, strict=True)])


def test_golden_map_on_full_labels_but_for_how_the_official_code_breaks_a_tie(golden, same):
    values, tensors = golden
    scores, labels = tensors["scores"].copy(), tensors["labels"]
    assert mean_average_precision(scores, labels) == pytest.approx(values["mAP"], abs=1e-4)
    # Class 13 has two equal scores, a negative and a positive: one threshold here. The official
    # sort happens to put the positive first, as if it scored a little higher.
    values_of_class, counts = np.unique(scores[:, 13], return_counts=True)
    tie = scores[:, 13] == values_of_class[counts == 2]
    assert labels[tie, 13].tolist() == [0, 1]
    scores[tie & (labels[:, 13] == 1), 13] += np.float32(1e-7)
    # What is left is the 1e-8 that the official AP adds to the number of positives.
    same("mAP", mean_average_precision(scores, labels), values["mAP"], atol=5e-9)


def test_golden_map_on_partial_labels(golden, same):
    values, tensors = golden
    scores, labels = tensors["scores"], tensors["partial_labels"]
    ap = average_precision(scores, labels)
    counted = tensors["partial_ap"] != -1
    summary = evaluate_scores(scores, labels, protocol="partial")
    np.testing.assert_allclose(ap[counted], tensors["partial_ap"][counted], rtol=1e-6)
    for ours, official in {"mAP": "mAP_partial", "weighted_mAP": "mAP_partial_weighted"}.items():
        same("mAP of partial labels", summary[ours], values[official], rtol=1e-7)
    assert summary["averaged_classes"] == counted.sum()
    for reason in ("labels", "positives", "negatives"):
        key = f"classes_without_{reason}"
        assert len(summary[key]) == values[key]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_golden_precision_recall_f1(golden, threshold, same):
    values, tensors = golden
    expected = values[f"at_{threshold}"]
    found = f1_scores(tensors["scores"], tensors["labels"], threshold)
    official = {"P_C": "CP", "R_C": "CR", "F_C": "macro_F1", "P_O": "OP", "R_O": "OR", "F_O": "OF1"}
    for name, ours in official.items():
        same("validate.py's figures", found[ours], expected[name], rtol=1e-6)
    cf1 = 2 * found["CP"] * found["CR"] / (found["CP"] + found["CR"])
    assert found["CF1"] == pytest.approx(cf1)
    assert found["CF1"] != pytest.approx(found["macro_F1"], rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_ap_equals_scikit_learn_under_ties_and_unannotated_cells(tied, dtype):
    scores, targets = tied[0].astype(dtype), tied[1]
    np.testing.assert_allclose(
        average_precision(scores, targets), sklearn_ap(scores, targets), rtol=1e-12
    )


@pytest.mark.parametrize("scale", [0.0, 1.0, -1.0])
def test_ap_of_signed_scores_infinities_and_both_zeros_equals_scikit_learn(scale):
    scores = scale * np.array([[3.0], [-2.0], [0.0], [-0.0], [5e4], [-5e4]])
    targets = np.array([[1], [0], [1], [0], [0], [1]])
    np.testing.assert_allclose(average_precision(scores, targets), sklearn_ap(scores, targets))
    scores[4:] *= np.inf if scale else 0
    infinite = np.nan_to_num(scores, posinf=1e9, neginf=-1e9)
    np.testing.assert_array_equal(
        average_precision(scores, targets), average_precision(infinite, targets)
    )


def test_ap_does_not_depend_on_the_order_of_the_images(tied):
    scores, targets = tied
    order = np.random.default_rng(1).permutation(len(scores))
    np.testing.assert_array_equal(
        average_precision(scores, targets), average_precision(scores[order], targets[order])
    )


@pytest.mark.parametrize(
    "convert",
    [
        lambda s, t: (torch.from_numpy(s), torch.from_numpy(t)),
        lambda s, t: (torch.from_numpy(s).requires_grad_(), torch.from_numpy(t).long()),
        lambda s, t: (torch.from_numpy(s).bfloat16(), torch.from_numpy(t).float()),
        lambda s, t: (torch.from_numpy(s).half(), t.astype(np.float64)),
        lambda s, t: (np.asfortranarray(s), t[:, :].astype(np.int64)),
        lambda s, t: (s.tolist(), t.tolist()),
    ],
    ids=["torch", "torch-grad-int64", "torch-bf16-float", "mixed-fp16", "fortran", "lists"],
)
def test_every_kind_of_table_gives_the_same_figures(tied, convert):
    scores, targets = tied
    scores = np.round(scores * 20) / 32  # exact in bfloat16
    assert evaluate_scores(*convert(scores, targets)) == evaluate_scores(scores, targets)


def test_bool_targets_are_absent_and_present(tied):
    present = tied[1] == 1
    np.testing.assert_array_equal(
        average_precision(tied[0], present), average_precision(tied[0], present.astype(np.int8))
    )


@pytest.mark.parametrize("cells", [1, 700, 2000])
def test_block_size_changes_nothing(tied, monkeypatch, cells):
    whole = evaluate_scores(*tied)
    monkeypatch.setattr(metrics, "BLOCK_CELLS", cells)
    assert evaluate_scores(*tied) == whole


@pytest.mark.parametrize("as_table", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    "measure", [average_precision, best_thresholds, f1_scores, partial(f1_scores, top_k=3)]
)
def test_memory_is_that_of_a_few_blocks(measure, as_table, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_CELLS", 1 << 15)
    rng = np.random.default_rng(0)
    scores = rng.random((5000, 400), dtype=np.float32).astype(np.float16)
    targets = rng.integers(-1, 2, scores.shape, dtype=np.int8)
    tracemalloc.start()
    measure(as_table(scores), as_table(targets))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < scores.nbytes / 2


def test_classes_without_positives_are_left_out_or_count_as_zero(tied):
    ap = average_precision(*tied)
    assert np.flatnonzero(np.isnan(ap)).tolist() == [3, 7]
    known = ap[~np.isnan(ap)]
    assert mean_average_precision(*tied) == pytest.approx(100 * known.mean())
    official = mean_average_precision(*tied, protocol="official")
    assert official == pytest.approx(100 * known.sum() / 12)
    partial = mean_average_precision(*tied, protocol="partial")
    assert ap[5] == 1  # no annotated negative: nothing to confuse it with
    assert partial == pytest.approx(100 * (known.sum() - 1) / 9)


@pytest.mark.parametrize("threshold", [0.0, 0.35, 2.0])
def test_f1_equals_scikit_learn_on_annotated_cells(tied, threshold):
    scores, targets = tied[0], np.abs(tied[1])  # every class with positives, none unannotated
    targets[:, 7] = np.arange(300) % 2
    found = f1_scores(scores, targets, threshold)
    predicted = scores > threshold
    for average, p, r, f in (("macro", "CP", "CR", "macro_F1"), ("micro", "OP", "OR", "OF1")):
        for score, name in ((precision_score, p), (recall_score, r), (f1_score, f)):
            expected = 100 * score(targets, predicted, average=average, zero_division=0)
            assert found[name] == pytest.approx(expected), name


def test_unannotated_cells_touch_no_f1_figure(tied):
    scores, targets = tied
    other = np.where(targets == -1, 1 - scores, scores)
    for top_k in (None, 2):
        assert f1_scores(scores, targets, top_k=top_k) == f1_scores(other, targets, top_k=top_k)


def test_top_k_takes_the_highest_annotated_scores_above_the_threshold():
    scores = [[0.9, 0.8, 0.7, 0.6], [0.9, 0.1, 0.2, 0.3], [0.8, 0.8, 0.8, 0.8]]
    targets = [[1, -1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]]
    both = f1_scores(scores, targets, top_k=2)  # predicts 0 2 | 0 | 0 1
    assert (both["OP"], both["OR"]) == pytest.approx((100 * 3 / 5, 100 * 3 / 6))
    forced = f1_scores(scores, targets, -np.inf, top_k=2)  # predicts 0 2 | 0 3 | 0 1
    assert (forced["OP"], forced["OR"]) == pytest.approx((100 * 3 / 6, 100 * 3 / 6))
    three = f1_scores(scores, targets, -np.inf, top_k=3)  # predicts 0 2 3 | 0 2 3 | 0 1 2
    assert (three["OP"], three["OR"]) == pytest.approx((100 * 5 / 9, 100 * 5 / 6))
    assert f1_scores(scores, targets, top_k=9) == f1_scores(scores, targets)


def test_top_k_counts_more_equal_scores_than_fit_into_a_byte():
    scores = np.full((2, 600), 0.9, dtype=np.float16)
    targets = np.zeros((2, 600), dtype=np.int8)
    targets[:, :200] = 1  # the first of equal scores are taken: these
    found = f1_scores(scores, targets, top_k=200)
    assert (found["OP"], found["OR"]) == (100, 100)
    assert f1_scores(scores, targets, top_k=300)["OP"] == pytest.approx(100 * 2 / 3)


def test_best_thresholds_reach_the_best_f1_of_every_class(tied):
    scores, targets = tied
    thresholds = best_thresholds(scores, targets)
    assert np.flatnonzero(np.isnan(thresholds)).tolist() == [3, 7]
    for c in np.flatnonzero(~np.isnan(thresholds)):
        column = scores[:, [c]], targets[:, [c]]
        best = max(f1_scores(*column, t)["OF1"] for t in np.arange(-0.025, 1, 0.05))
        assert f1_scores(*column, thresholds[[c]])["OF1"] == pytest.approx(best)
    reached = f1_scores(scores, targets, thresholds)["macro_F1"]
    assert reached >= max(f1_scores(scores, targets, t)["macro_F1"] for t in (0.0, 0.2, 0.5))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_best_threshold_separates_neighbouring_floats(dtype):
    high = dtype(0.7)
    scores = np.array([[high], [np.nextafter(high, dtype(0))]])
    for targets in ([[1], [0]], [[1], [1]]):
        threshold = best_thresholds(scores, targets)
        assert f1_scores(scores, targets, threshold)["OF1"] == 100


def test_best_threshold_lies_between_what_it_accepts_and_what_it_rejects():
    assert best_thresholds([[0.9], [0.5], [0.1]], [[1], [0], [0]]) == pytest.approx([0.7])


def test_best_threshold_is_the_lowest_of_equally_good_ones():
    scores, targets = [[0.9], [0.7], [0.6], [0.5], [0.1]], [[1], [0], [0], [1], [0]]
    assert f1_scores(scores, targets, 0.8)["OF1"] == f1_scores(scores, targets, 0.3)["OF1"]
    assert best_thresholds(scores, targets) == pytest.approx([0.3])


def test_summary_is_json_with_null_for_what_is_not_defined(tied):
    names = [f"class {c}" for c in range(12)]
    summary = evaluate_scores(*tied, names, threshold=0.3, top_k=2)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["classes_without_labels"] == ["class 7"]
    assert summary["classes_without_positives"] == ["class 3"]
    assert summary["classes_without_negatives"] == ["class 5"]
    assert (summary["images"], summary["averaged_classes"]) == (300, 10)
    assert summary["at_threshold"] == f1_scores(*tied, 0.3)
    assert summary["at_top_k"] == f1_scores(*tied, 0.3, top_k=2)
    row = summary["per_class"][3]
    assert row == {"name": "class 3", "AP": None, "positives": 0, "negatives": row["negatives"]}
    assert summary["per_class"][5]["AP"] == 100


@pytest.mark.parametrize("shape", [(0, 3), (4, 3), (4, 0)])
def test_without_any_positive_everything_is_null_and_nothing_warns(shape):
    summary = evaluate_scores(np.zeros(shape), np.zeros(shape))
    assert summary["mAP"] is None
    assert summary["at_threshold"]["CR"] is None
    assert summary["at_threshold"]["OR"] is None


def table(value, row=1, column=2):
    cells = np.zeros((3, 4))
    cells[row, column] = value
    return cells


@pytest.mark.parametrize("measure", [average_precision, f1_scores])
@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (table(np.nan), table(1), r"scores\[1, 2\] is NaN"),
        (table(0), table(2), r"targets\[1, 2\] is 2"),
        (table(0), table(0.5), r"targets\[1, 2\] is 0.5"),
        (table(0), table(-2).astype(np.int8), r"targets\[1, 2\] is -2"),
        (table(0), table(255).astype(np.uint8), r"targets\[1, 2\] is 255"),
        (table(0), table(0).T, r"\(3, 4\) and \(4, 3\)"),
        (np.zeros(3), np.zeros(3), r"must both be \(N, C\)"),
    ],
)
@pytest.mark.parametrize("cells", [1, 1 << 21])
def test_bad_input_is_refused_with_its_place(measure, scores, targets, message, cells, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_CELLS", cells)
    with pytest.raises(ValueError, match=message):
        measure(scores, targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"threshold": np.zeros(3)}, r"threshold has shape \(3,\)"),
        ({"protocol": "fully"}, "protocol is 'fully'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        f1_scores(table(0), table(1), **options)
    with pytest.raises(ValueError, match="1 class names for scores of 4"):
        evaluate_scores(table(0), table(1), ["cat"])
