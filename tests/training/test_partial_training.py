"""Training on partial labels: simulation, the two-step CSL run, adaptive asymmetry."""

import csv

import pytest
import torch
from PIL import Image
from run_log import figures_of, rows_of

from asl.data.annotations import PRESENT, UNANNOTATED
from asl.data.partial import simulate
from asl.data.readers import read
from asl.errors import DataError, Interrupted, UsageError
from asl.evaluation.evaluate import evaluate
from asl.models import checkpoint
from asl.training.fit import fit
from asl.training.step import Training


@pytest.fixture(scope="module")
def partial(settings):
    """Builds the config of a run of one epoch."""

    def build(root, output, **changed):
        small = {"image_size": 32, "ema_decay": 0.5, "epochs": 1}
        return settings(root, output, **{**small, **changed})

    return build


def steps_of(config, monkeypatch):
    """Train, and return the targets of every step, one table."""
    seen, step = [], Training.step
    with monkeypatch.context() as patch:
        patch.setattr(
            Training, "step", lambda self, x, y: (seen.append(y.clone()), step(self, x, y))[1]
        )
        fit(config)
    return torch.cat(seen)


@pytest.mark.parametrize("scheme", ["fpc:3", "rps:0.5"])
def test_the_model_sees_the_labels_that_the_simulation_left_and_no_others(
    partial, measuring, scheme, small_shapes, tmp_path, monkeypatch
):
    config = partial(small_shapes, tmp_path / "run", simulate_partial=scheme)
    targets = steps_of(config, monkeypatch)
    left = simulate(read("coco", small_shapes, "train2014"), scheme, seed=0).dense()
    # The order of an epoch is random: rows are compared as a multiset.
    assert sorted(targets.tolist()) == sorted(left.tolist())
    assert (left == UNANNOTATED).mean() > 0.4
    assert evaluate(measuring(small_shapes, tmp_path / "run/best.pt", image_size=32))["mAP"] > 0


def test_every_treatment_of_what_is_not_annotated_trains_differently(
    partial, small_shapes, tmp_path
):
    losses = set()
    for number, treatment in enumerate(
        [
            {"unannotated": "ignore"},
            {"unannotated": "negative"},
            {"unannotated": "negative", "gamma_unann": 1.0},
            {"unannotated": "selective"},
            {"unannotated": "selective", "likelihood_topk": 1},
        ]
    ):
        config = partial(
            small_shapes, tmp_path / str(number), simulate_partial="rps:0.5", **treatment
        )
        losses.add(rows_of(fit(config))[0]["loss"])
    assert len(losses) == 5


def test_one_command_trains_a_prior_and_then_with_it(partial, small_shapes, tmp_path):
    run = fit(
        partial(
            small_shapes,
            tmp_path / "run",
            simulate_partial="rps:0.5",
            unannotated="selective",
            prior_path="estimate",
        )
    )
    first = checkpoint.load(run / "prior/best.pt")["config"]
    assert (first["unannotated"], first["simulate_partial"]) == ("ignore", "rps:0.5")
    with (run / "prior/prior.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["Classes", "avg_pred"]
    assert len(rows) == 24
    state = checkpoint.load(run / "last.pt")["training"]["loss"]
    assert state["prior"].tolist() == pytest.approx([float(value) for _, value in rows])


def test_the_prior_is_the_mean_score_over_the_training_split(
    partial, measuring, small_shapes, tmp_path
):
    run = fit(partial(small_shapes, tmp_path / "run"))
    path = str(tmp_path / "prior.csv")
    evaluate(measuring(small_shapes, run / "best.pt", image_size=32, estimate_prior=path))
    with (tmp_path / "prior.csv").open() as file:
        values = [float(row["avg_pred"]) for row in csv.DictReader(file)]
    assert len(values) == 24
    assert all(0 < value < 1 for value in values)


def test_a_prior_of_other_classes_is_refused_before_training(partial, small_shapes, tmp_path):
    (tmp_path / "prior.csv").write_text("Classes,avg_pred\ncat,0.5\n")
    config = partial(
        small_shapes,
        tmp_path / "run",
        simulate_partial="rps:0.5",
        unannotated="selective",
        prior_path=str(tmp_path / "prior.csv"),
    )
    with pytest.raises(DataError, match=r"prior\.csv: 24 of 24 classes"):
        fit(config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="prior_path"):
        partial(small_shapes, "", prior_path="prior.csv")


def test_a_running_prior_is_kept_and_resumed(partial, small_shapes, tmp_path):
    whole = fit(partial(small_shapes, tmp_path / "whole", running_prior=True, epochs=2))
    part = partial(small_shapes, tmp_path / "part", running_prior=True, epochs=2, stop_epoch=1)
    first = (fit(part) / "prior.csv").read_text()
    state = checkpoint.load(tmp_path / "part/last.pt")["training"]["running_prior"]
    assert state["totals"][-1] == 40
    assert first != (whole / "prior.csv").read_text()


def test_adaptive_asymmetry_moves_gamma_is_logged_and_resumed(
    partial, small_shapes, tmp_path, monkeypatch
):
    adaptive = {"adaptive_gamma": 0.5, "adaptive_step": 0.1, "epochs": 2}
    whole = figures_of(fit(partial(small_shapes, tmp_path / "whole", **adaptive)))
    assert whole[1]["gamma_neg"] > whole[0]["gamma_neg"] > 4.0
    assert all(-1 <= row["gap"] <= 1 for row in whole)

    step, taken = Training.step, []

    def stop_at_the_seventh(self, images, targets):
        taken.append(None)
        if len(taken) == 7:
            raise Interrupted(15, "")
        return step(self, images, targets)

    monkeypatch.setattr(Training, "step", stop_at_the_seventh)
    with pytest.raises(Interrupted):
        fit(partial(small_shapes, tmp_path / "part", **adaptive))
    fit(partial(small_shapes, tmp_path / "part", resume="last", **adaptive))
    assert figures_of(tmp_path / "part") == whole


def test_simulation_keeps_the_positives_that_it_says(small_shapes):
    full = read("coco", small_shapes, "train2014")
    left = simulate(full, "fpc:3", seed=0)
    assert left.counts(PRESENT).tolist() == [min(3, n) for n in full.counts(PRESENT)]


def test_difficult_objects_that_are_ignored_are_cells_that_are_not_annotated(partial, tmp_path):
    lists, images = tmp_path / "VOC2007/ImageSets/Main", tmp_path / "VOC2007/JPEGImages"
    lists.mkdir(parents=True)
    images.mkdir()
    for split, marks in {"train": ("1", "0", "-1"), "val": ("-1", "1", "1")}.items():
        for name, order in {"cat": marks, "dog": marks[::-1]}.items():
            lines = "".join(f"{split}{i} {mark}\n" for i, mark in enumerate(order))
            (lists / f"{name}_{split}.txt").write_text(lines)
        for i in range(3):
            Image.new("RGB", (40, 30), (80 * i, 60, 30)).save(images / f"{split}{i}.jpg")
    voc = {"dataset": "voc", "train_difficult": "ignore", "model_name": "test_vit"}
    [row] = rows_of(fit(partial(tmp_path, tmp_path / "run", batch_size=3, **voc)))
    assert row["loss"] > 0


def test_mixed_images_of_a_partial_set_have_soft_targets_and_unannotated_cells(
    partial, small_shapes, tmp_path, monkeypatch
):
    half = {"simulate_partial": "rps:0.5", "unannotated": "selective"}
    plain = steps_of(partial(small_shapes, tmp_path / "plain", **half), monkeypatch)
    config = partial(small_shapes, tmp_path / "mixed", mixup=1.0, **half)
    mixed = steps_of(config, monkeypatch)
    [row] = rows_of(tmp_path / "mixed")
    assert row["loss"] > 0
    assert ((mixed > 0) & (mixed < 1)).float().mean() > 0.01
    known = [(targets != -1).float().mean().item() for targets in (plain, mixed)]
    assert known[1] == pytest.approx(known[0] ** 2, abs=0.03)  # annotated in both of a pair
