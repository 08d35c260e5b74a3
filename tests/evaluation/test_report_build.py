"""Reports as a user asks for them: of a checkpoint, and of scores from anywhere."""

import json
import os
import shutil

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import average_precision_score

from asl.errors import DataError, UsageError
from asl.evaluation.evaluate import evaluate
from asl.evaluation.report.compare import Resampled
from asl.evaluation.report.tables import read_scores
from asl.report import main

CLASSES = ["cat", "dog", 'a "b", c']
FILES = [f"photos/{number}.jpg" for number in range(200)]


@pytest.fixture(scope="module")
def cells():
    """Scores and targets of 200 images, a few cells not annotated."""
    random = np.random.default_rng(0)
    targets = (random.random((200, 3)) < 0.3).astype(np.int8)
    scores = np.clip(0.3 * targets + 0.7 * random.random((200, 3)), 0, 1).astype(np.float32)
    targets[:5, 1] = -1
    return scores, targets


def ap_of(scores, targets):
    """By scikit-learn, in percent."""
    known = [targets[:, c] != -1 for c in range(targets.shape[1])]
    return [
        100 * average_precision_score(targets[rows, c], scores[rows, c])
        for c, rows in enumerate(known)
    ]


def written(folder):
    return json.loads((folder / "report.json").read_text())


def table(values, files=None, classes=CLASSES):
    columns = {} if files is None else {"path": files}
    return pl.DataFrame(columns | {name: values[:, c] for c, name in enumerate(classes)})


def test_arrays_of_another_trainer(cells, tmp_path, capsys):
    for name, values in zip(("s.npy", "t.npy"), cells, strict=True):
        np.save(tmp_path / name, values)
    arguments = [str(tmp_path / "s.npy"), str(tmp_path / "t.npy")]
    main([*arguments, "--output", str(tmp_path / "out"), "--threshold", "0.6"])
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'index.html'}\n"
    report = written(tmp_path / "out")
    assert [each["name"] for each in report["classes"]] == ["class 0", "class 1", "class 2"]
    shown = [each["AP"]["value"] for each in report["classes"]]
    np.testing.assert_allclose(shown, ap_of(*cells), atol=1e-6)
    assert report["headline"][0]["figure"]["value"] == pytest.approx(np.mean(ap_of(*cells)))
    [*_, first] = [each["points"][0] for each in report["classes"]]
    assert (first["rule"], first["threshold"]) == ("0.6 for all", 0.6)
    assert report["classes"][1]["negatives"] + report["classes"][1]["positives"] == 195


@pytest.mark.parametrize("write", ["write_csv", "write_parquet"])
def test_tables_are_matched_by_path_and_by_name(cells, tmp_path, write):
    scores, targets = cells
    suffix = write.removeprefix("write_")
    getattr(table(scores, FILES), write)(tmp_path / f"s.{suffix}")
    # Rows and columns in another order, and an image that has no scores.
    more = np.vstack([targets[::-1, ::-1], [[1, 1, 1]]])
    labels = table(more, [*FILES[::-1], "other.jpg"], CLASSES[::-1])
    getattr(labels, write)(tmp_path / f"t.{suffix}")
    read = read_scores(tmp_path / f"s.{suffix}", tmp_path / f"t.{suffix}")
    assert (list(read.classes), list(read.files)) == (CLASSES, FILES)
    np.testing.assert_allclose(read.scores, scores)
    np.testing.assert_array_equal(read.targets, targets)


def test_labels_may_be_names_and_scores_an_array(cells, tmp_path):
    scores, targets = cells
    targets = np.maximum(targets, 0)
    rows = ["|".join(CLASSES[c] for c in np.flatnonzero(row)) for row in targets]
    pl.DataFrame({"path": FILES, "labels": rows}).write_csv(tmp_path / "t.csv")
    order = np.argsort(CLASSES)  # of names in one column, classes are in alphabetical order
    np.save(tmp_path / "s.npy", scores[:, order])
    read = read_scores(tmp_path / "s.npy", tmp_path / "t.csv")
    assert (list(read.classes), list(read.files)) == (sorted(CLASSES), FILES)
    np.testing.assert_array_equal(read.targets, targets[:, order])


def test_a_table_with_splits_is_read_whole(cells, tmp_path):
    scores, targets = cells
    splits = pl.Series("split", ["train", "val"] * 100)
    table(targets, FILES).with_columns(splits).write_csv(tmp_path / "t.csv")
    table(scores[1::2], FILES[1::2]).write_csv(tmp_path / "s.csv")
    read = read_scores(tmp_path / "s.csv", tmp_path / "t.csv")
    np.testing.assert_array_equal(read.targets, targets[1::2])


def test_two_reports_are_compared_class_by_class(cells, tmp_path):
    scores, targets = cells
    better = np.clip(scores + 0.2 * targets, 0, 1).astype(np.float32)
    better[:, 1] = scores[:, 1]
    np.save(tmp_path / "t.npy", targets)
    for name, values in (("first", scores), ("second", better)):
        np.save(tmp_path / f"{name}.npy", values)
    first, second = ([str(tmp_path / f"{each}.npy")] for each in ("first", "second"))
    labels = str(tmp_path / "t.npy")
    main([*first, labels, "--output", str(tmp_path / "a")])
    json_file = str(tmp_path / "a" / "report.json")
    main([*second, labels, "--output", str(tmp_path / "b"), "--compare", json_file])
    comparison = written(tmp_path / "b")["comparison"]
    gained = np.subtract(ap_of(better, targets), ap_of(scores, targets))
    shown = [each["difference"] for each in comparison["classes"]]
    np.testing.assert_allclose([each["value"] for each in shown], gained, atol=1e-6)
    assert comparison["mAP"]["value"] == pytest.approx(gained.mean())
    assert 0 < comparison["mAP"]["low"] < comparison["mAP"]["value"] < comparison["mAP"]["high"]
    # Paired: a class of the same scores has no difference in any resample.
    assert shown[1] == {"value": 0, "low": 0, "high": 0}
    # The same draws by hand, of one class.
    random, samples = np.random.default_rng(0), []
    for _ in range(1000):
        rows = random.integers(0, 200, 200)
        one, two = (ap_of(each[rows][:, :1], targets[rows][:, :1])[0] for each in (better, scores))
        samples.append(one - two)
    np.testing.assert_allclose(
        [shown[0]["low"], shown[0]["high"]], np.percentile(samples, [2.5, 97.5]), atol=1e-3
    )


def test_a_report_on_other_labels_does_not_compare(cells, tmp_path):
    scores, targets = cells
    for name, values in (("s", scores), ("t", targets), ("u", targets[::-1])):
        np.save(tmp_path / f"{name}.npy", values)
    arguments = [str(tmp_path / "s.npy"), str(tmp_path / "t.npy"), "--output", str(tmp_path / "a")]
    main(arguments)
    arguments[1:] = [str(tmp_path / "u.npy"), "--output", str(tmp_path / "b")]
    with pytest.raises(DataError, match=r"other images or labels \(class 0 differs\)"):
        main([*arguments, "--compare", str(tmp_path / "a")])
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"resamples.npz is not there"),
        (lambda path: path.write_bytes(b"PK wrong"), r"resamples.npz cannot be read"),
        (lambda path: np.savez(path, classes=["a"]), r"resamples.npz cannot be read"),
    ],
)
def test_a_report_without_its_resamples_is_named(tmp_path, make, message):
    make(tmp_path / "resamples.npz")
    with pytest.raises(DataError, match=message):
        Resampled.read(tmp_path / "report.json")


def spoilt(scores, row, column, value):
    scores = scores.copy()
    scores[row, column] = value
    return scores


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: spoilt(s, 7, 1, 3.5), r"3.5 in row 8, column 2 of the scores is not from 0 to"),
        (lambda s: spoilt(s, 0, 0, np.nan), r"nan in row 1, column 1"),
        (lambda s: (s > 0.5).astype(int), r"holds int64, not scores"),
        (lambda s: s[:-1], r"has 199 rows, .*t.npy 200"),
        (lambda s: s[:, :2], r"s.npy has 2 columns, .*t.npy has 3 classes"),
        (lambda s: s[0], r"has shape \(3,\), not \(images, classes\)"),
        (lambda s: np.array([{}, None]), r"s.npy cannot be read"),
    ],
)
def test_a_wrong_array_is_named(cells, tmp_path, make, message):
    np.save(tmp_path / "s.npy", make(cells[0]))
    np.save(tmp_path / "t.npy", cells[1])
    with pytest.raises(DataError, match=message):
        read_scores(tmp_path / "s.npy", tmp_path / "t.npy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,cat\nx.jpg,0.5\n", r"x.jpg has scores, but no row in .*t.csv"),
        ("path,cat\n1.jpg,high\n", r"row 2, column cat: 'high' is no number"),
        ("path,cat\n1.jpg,\n", r"row 2, column cat: None is no number"),
        ("path\n1.jpg\n", r"has no column with scores"),
        ("path,wolf\n1.jpg,0.5\n", r"1 of 1 classes have no match: wolf"),
    ],
)
def test_a_wrong_table_is_named(tmp_path, text, message):
    (tmp_path / "t.csv").write_text("path,cat,dog\n1.jpg,1,0\n")
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_scores(tmp_path / "s.csv", tmp_path / "t.csv")


def test_a_file_that_is_not_there_is_named(tmp_path):
    for name in ("s.npy", "s.csv"):
        with pytest.raises(DataError, match=f"{name} is not there"):
            read_scores(tmp_path / name, tmp_path / "t.npy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "2"], "threshold is 2.0, but must be from 0 to 1"),
        (["--images", "nowhere"], "nowhere is not a folder"),
        (["--output", os.devnull], "cannot write into"),
    ],
)
def test_a_wrong_option_is_an_error_before_anything_is_read(options, message):
    with pytest.raises(UsageError, match=message):
        main(["s.npy", "t.npy", *options])


@pytest.fixture(scope="module")
def checkpoint(small_shapes, settings, tmp_path_factory):
    from asl.training.fit import fit

    return fit(settings(small_shapes, tmp_path_factory.mktemp("run"), epochs=1)) / "best.pt"


def test_a_report_of_a_checkpoint(small_shapes, checkpoint, measuring, tmp_path):
    folder = tmp_path / "out"
    figures = evaluate(measuring(small_shapes, checkpoint, report=str(folder)))
    report = written(folder)
    assert report["headline"][0]["figure"]["value"] == pytest.approx(figures["mAP"])
    cf1 = report["headline"][1]["figure"]["value"]
    assert cf1 == pytest.approx(figures["at_threshold"]["CF1"])
    assert report["images"] == 20
    assert report["protocol"].startswith("coco: annotated images only (official)")
    assert report["about"]["checkpoint"] == str(checkpoint)
    assert report["settings"]["image_size"] == "48"
    assert [each["name"].split()[0] for each in report["sizes"]] == ["small", "medium", "large"]
    [misses] = [each for each in report["galleries"] if each["key"] == "misses"]
    assert all(each["objects"] for each in misses["examples"])
    assert any("Near-duplicates of train2014 and val2014" in note for note in report["notes"])
    page = (folder / "index.html").read_text()
    shown = {each["file"] for gallery in report["galleries"] for each in gallery["examples"]}
    shown |= {twin[key] for twin in report["twins"] for key in ("file", "other")}
    thumbnails = json.loads(page.partition('id="thumbnails">')[2].partition("</script>")[0])
    assert thumbnails.keys() == shown
    assert all(thumbnails.values())


def test_a_report_with_folds_twins_and_a_comparison(small_shapes, checkpoint, measuring, tmp_path):
    root = shutil.copytree(small_shapes, tmp_path / "shapes")
    original = min((root / "val2014").iterdir())
    copy = min((root / "train2014").iterdir())
    shutil.copy(original, copy)
    evaluate(measuring(root, checkpoint, report=str(tmp_path / "a")))
    config = measuring(
        root, checkpoint, report=str(tmp_path / "b"), compare=str(tmp_path / "a"), report_folds=4
    )
    evaluate(config)
    first, second = (written(tmp_path / each) for each in "ab")
    pairs = [(twin["file"], twin["other"], twin["bits"]) for twin in second["twins"]]
    assert (original.name, f"../train2014/{copy.name}", 0) in pairs
    compared = second["comparison"]
    assert compared["mAP"] == {"value": 0, "low": 0, "high": 0}
    assert (compared["other"], len(compared["classes"])) == (str(tmp_path / "a"), 24)

    def qualities(report):
        [suspects] = [each for each in report["galleries"] if each["key"] == "suspects"]
        return [(each["row"], each["name"], each["quality"]) for each in suspects["examples"]]

    assert qualities(first) != qualities(second)
    shutil.rmtree(root / "train2014")
    evaluate(measuring(root, checkpoint, report=str(tmp_path / "c")))
    assert any("were not looked for" in note for note in written(tmp_path / "c")["notes"])


@pytest.mark.parametrize("option", [{"compare": "other"}, {"report_folds": 5}])
def test_a_comparison_and_folds_need_a_report(measuring, option):
    with pytest.raises(UsageError, match=r"is for a report: give --report DIR too"):
        measuring("x", "no.pt", **option)


def test_a_folder_that_cannot_be_written_is_an_error_before_scoring(measuring, small_shapes):
    # There is no such checkpoint: nobody looked for it.
    config = measuring(small_shapes, "no.pt", report=os.devnull)
    with pytest.raises(UsageError, match="cannot write into /dev/null"):
        evaluate(config)
