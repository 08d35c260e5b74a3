"""A whole training: what its options change, what it records, and what ends it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_log import figures_of, rows_of

from asl.config import parse
from asl.data.readers import read
from asl.errors import DataError, TrainingError, UsageError
from asl.evaluation import score as scoring
from asl.evaluation.evaluate import evaluate
from asl.models import checkpoint
from asl.training import fit as loop
from asl.training.fit import fit
from asl.training.run import Run
from asl.training.settings import LossSettings, TrainConfig
from asl.training.step import Training


@pytest.fixture(scope="module")
def whole_run(settings, tmp_path_factory, small_shapes):
    """A run of three epochs of five steps that nothing disturbed."""
    return fit(settings(small_shapes, tmp_path_factory.mktemp("whole")))


def test_a_loss_that_is_not_finite_ends_the_run_with_epoch_and_step(
    settings, small_shapes, tmp_path
):
    diverging = settings(small_shapes, tmp_path, optimizer="adamw", weight_decay=1e30)
    with pytest.raises(TrainingError, match=r"epoch 1, step \d+: lower --lr"):
        fit(diverging)
    assert not (tmp_path / "last.pt").exists()


def test_a_loss_is_looked_at_before_any_checkpoint_is_written(
    settings, small_shapes, tmp_path, monkeypatch
):
    step = Training.step

    def one_bad_loss(self, images, targets):
        loss = step(self, images, targets)
        if self.steps == 2:  # the weights stay as they are: only the loss tells
            self.losses[-1] = torch.tensor(torch.nan)
        return loss

    monkeypatch.setattr(Training, "step", one_bad_loss)
    with pytest.raises(TrainingError, match="the loss is nan at epoch 1, step 2"):
        fit(settings(small_shapes, tmp_path, checkpoint_every="3"))
    assert not (tmp_path / "last.pt").exists()


def test_the_number_of_classes_is_checked_when_it_is_given(settings, small_shapes, tmp_path):
    fit(settings(small_shapes, tmp_path, stop_epoch=1, num_classes=24))
    with pytest.raises(UsageError, match="num_classes is 80, but there are 24"):
        fit(settings(small_shapes, tmp_path, overwrite=True, num_classes=80))


@pytest.mark.parametrize("option", [{"optimizer": "adamw"}, {"grad_clip": 1e-9}, {"seed": 1}])
def test_every_option_of_the_step_changes_the_result(
    settings, option, whole_run, small_shapes, tmp_path
):
    changed = fit(settings(small_shapes, tmp_path, stop_epoch=1, **option))
    assert rows_of(whole_run)[0]["loss"] != rows_of(changed)[0]["loss"]


@pytest.mark.parametrize("option", [{"ema_warmup": True}, {"ema_decay": 0.5}])
def test_every_option_of_the_average_changes_it(settings, option, small_shapes, tmp_path):
    folders = [
        fit(settings(small_shapes, tmp_path / name, stop_epoch=1, **changed))
        for name, changed in (("usual", {}), ("other", option))
    ]
    usual, other = (checkpoint.load(folder / "last.pt") for folder in folders)
    name = next(iter(usual["ema"]))
    assert torch.equal(usual["regular"][name], other["regular"][name])
    assert not torch.equal(usual["ema"][name], other["ema"][name])


@pytest.mark.parametrize("data_side", [{"cache_dir": "cache"}, {"augment_on": "device"}], ids=str)
def test_where_images_come_from_and_are_augmented_changes_no_result(
    settings, data_side, small_shapes, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    plain = settings(small_shapes, "plain", augment="flip", epochs=1)
    other = settings(small_shapes, "other", augment="flip", epochs=1, **data_side)
    one, two = (figures_of(fit(config)) for config in (plain, other))
    assert one == two
    if "cache_dir" in data_side:
        assert len(list(Path("cache").glob("*/*.shard"))) == 2  # training and validation


@pytest.mark.parametrize(("slow", "said"), [(-1, True), (2, False)])
def test_waiting_for_data_is_said(
    settings, slow, said, small_shapes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(loop, "SLOW_DATA", slow)
    fit(settings(small_shapes, tmp_path, epochs=1))
    assert ("of the time: raise --workers or use --cache-dir" in capsys.readouterr().out) is said


def test_as_many_epochs_are_trained_as_asked_for_and_to_the_end_of_the_schedule(
    settings, small_shapes, tmp_path
):
    tiny = {"image_size": 16, "batch_size": 40, "val_every": 50, "print_freq": 1000}
    rows = rows_of(fit(settings(small_shapes, tmp_path, epochs=43, **tiny)))
    assert [row["epoch"] for row in rows] == list(range(1, 44))
    assert rows[-2]["lr"] < 1e-7  # of the last step


@pytest.mark.parametrize("stop", [{}, {"stop_epoch": 3, "epochs": 4}])
def test_validation_can_be_rarer_than_epochs_and_the_last_is_validated(
    settings, stop, small_shapes, tmp_path
):
    run = fit(settings(small_shapes, tmp_path, val_every=2, **stop))
    assert ["mAP_ema" in row for row in rows_of(run)] == [False, True, True]


def test_the_log_says_what_an_epoch_took(settings, small_shapes, tmp_path):
    run = fit(settings(small_shapes, tmp_path, stop_epoch=2, val_every=2, grad_clip=1.0))
    commit = ["git", "-C", str(Path(loop.__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(commit, capture_output=True, text=True)
    first, second = rows_of(run)
    for row in (first, second):
        assert row["commit"] == (done.stdout.strip() or "unknown")
        assert row["images_per_second"] == pytest.approx(40 / row["seconds_training"], rel=0.1)
        assert 0 <= row["waited_for_data"] < 1
        assert 0.1 < row["peak_memory_gb"] < 100
        assert row["gradient_norm"] > 1  # before it is clipped
    assert "seconds_validation" not in first
    assert second["seconds_validation"] > 0


def test_a_step_that_overflowed_leaves_the_mean_norm_finite(
    settings, small_shapes, tmp_path, monkeypatch
):
    step = Training.step

    def overflowing(self, images, targets):
        loss = step(self, images, targets)
        if self.steps == 2:
            self.gradient_norms[-1] = torch.tensor(torch.inf)
        return loss

    monkeypatch.setattr(Training, "step", overflowing)
    run = fit(settings(small_shapes, tmp_path, stop_epoch=1, grad_clip=1.0))
    [line] = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["gradient_norm"] > 0


def test_a_line_of_the_log_every_few_steps(settings, small_shapes, tmp_path):
    run = fit(settings(small_shapes, tmp_path, stop_epoch=2, print_freq=2))
    rows = rows_of(run, "steps.jsonl")
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 2), (1, 4), (2, 7), (2, 9)]
    assert all(row["loss"] > 0 and row["images_per_second"] > 0 for row in rows)
    assert len({row["lr"] for row in rows}) == 4
    assert "gradient_norm" not in rows_of(run)[0]


def test_accumulated_batches_are_a_run_of_larger_ones(settings, small_shapes, tmp_path):
    vit = {"model_name": "test_vit", "epochs": 2, "augment": "flip"}
    one = fit(settings(small_shapes, tmp_path / "one", batch_size=16, **vit))
    several = fit(settings(small_shapes, tmp_path / "several", accumulate=2, **vit))
    for larger, smaller in zip(figures_of(one), figures_of(several), strict=True):
        assert smaller == pytest.approx(larger, rel=1e-3)


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 4), (None, 6)])
def test_a_run_ends_when_it_no_longer_improves(
    patience, epochs, settings, small_shapes, tmp_path, monkeypatch
):
    figures = [(1.0, 2.0), (3.0, 2.0), (3.0, 3.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)]
    as_if_measured(monkeypatch, figures)
    config = settings(small_shapes, tmp_path, epochs=6, patience=patience)
    assert len(rows_of(fit(config))) == epochs
    # It has ended: to go on changes nothing.
    assert len(rows_of(fit(config.with_settings(resume="last")))) == epochs


def test_a_run_whose_map_is_not_defined_does_not_end_for_that(
    settings, small_shapes, tmp_path, monkeypatch
):
    as_if_measured(monkeypatch, [(float("nan"), float("nan"))] * 3)
    assert len(rows_of(fit(settings(small_shapes, tmp_path, patience=1)))) == 3


def test_tensorboard_gets_the_figures_of_all_epochs_in_one_file(settings, small_shapes, tmp_path):
    run = fit(settings(small_shapes, tmp_path / "with", tensorboard=True, print_freq=2))
    [events] = run.glob("events.out.tfevents.*")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    values = [v for event in EventFileLoader(str(events)).Load() for v in event.summary.value]
    for tag, name in (("loss", "metrics.jsonl"), ("step/loss", "steps.jsonl")):
        logged = [value.tensor.float_val[0] for value in values if value.tag == tag]
        assert logged == pytest.approx([row["loss"] for row in rows_of(run, name)])
    run = fit(settings(small_shapes, tmp_path / "without", stop_epoch=1))
    assert not list(run.glob("events.*"))


def test_weights_and_biases_gets_the_figures_offline(small_shapes, tmp_path):
    train = [sys.executable, str(Path(__file__).parents[2] / "train.py"), str(small_shapes)]
    small = "--model-name test_resnet --image-size 48 --batch-size 8 --workers 0 --amp off"
    options = [*small.split(), "--epochs", "2", "--output", "run", "--wandb", "shapes"]
    done = subprocess.run(
        [*train, *options, "--device", "cpu", "--print-freq", "2"],
        cwd=tmp_path,
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [log] = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for name in (b"epoch/mAP_ema", b"step/images_per_second", b"test_resnet", b"shapes"):
        assert name in content


def test_weights_and_biases_is_an_extra(settings, small_shapes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"pip install -r requirements-wandb\.txt"):
        fit(settings(small_shapes, tmp_path, wandb="shapes"))


def test_missing_images_end_a_run_before_it_starts_or_are_left_out(
    settings, small_shapes, tmp_path, capsys
):
    root = tmp_path / "data"
    shutil.copytree(small_shapes, root)
    gone = sorted((root / "train2014").iterdir())[7]
    gone.unlink()
    with pytest.raises(DataError, match=f"1 of 40 images are missing: {gone}"):
        fit(settings(root, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    fit(settings(root, tmp_path / "run", stop_epoch=1, missing_images="skip"))
    assert "39 images (1 missing, skipped)" in capsys.readouterr().out


def test_an_image_that_cannot_be_read_is_named_also_by_a_worker(settings, small_shapes, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(small_shapes, root)
    broken = sorted((root / "train2014").iterdir())[7]
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(DataError, match=rf"^{broken}: [^\n]+$"):
        fit(settings(root, tmp_path / "run", workers=1))


def write_table(root, labels):
    """A table with a picture for each of `labels`: {split: [label text, ...]}."""
    lines = ["path,labels,split"]
    for split, texts in labels.items():
        for number, text in enumerate(texts):
            name = f"{split}{number}.png"
            Image.new("RGB", (40, 30), (90 * number % 256, 60, 30)).save(root / name)
            lines.append(f"{name},{text},{split}")
    (root / "labels.csv").write_text("\n".join(lines))
    return {"dataset": "table", "model_name": "test_vit"}


def test_without_a_positive_in_validation_the_last_epoch_is_the_best(
    settings, measuring, tmp_path, capsys
):
    table = write_table(tmp_path, {"train": ["a|b", "a", "b", ""], "val": ["", ""]})
    run = fit(settings(tmp_path, tmp_path / "run", batch_size=2, **table))
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line, parse_constant=pytest.fail)  # no bare NaN
        assert row["mAP_ema"] is row["mAP_regular"] is None
    assert "mAP     - (EMA)" in capsys.readouterr().out
    assert checkpoint.load(run / "best.pt")["history"][-1]["epoch"] == 3
    config = measuring(tmp_path, run / "best.pt", batch_size=2, **table)
    assert evaluate(config)["mAP"] is None


def test_csl_estimates_its_prior_where_validation_has_no_positive(settings, tmp_path):
    labels = {"train": ["a|b", "a", "b", "a"], "val": ["", ""]}
    csl = {"simulate_partial": "rps:0.3", "unannotated": "selective", "prior_path": "estimate"}
    table = write_table(tmp_path, labels)
    run = fit(settings(tmp_path, tmp_path / "run", batch_size=2, epochs=1, **csl, **table))
    assert (run / "prior/prior.csv").read_text().startswith("Classes,avg_pred\na,")


def test_the_prior_of_csl_is_estimated_on_the_training_images(
    settings, small_shapes, tmp_path, monkeypatch
):
    csl = {"simulate_partial": "rps:0.5", "unannotated": "selective", "prior_path": "estimate"}
    seen, scores = [], scoring.Scorer.scores

    def noted(self, annotations, title):
        seen.append((title, [annotations.path(row) for row in range(len(annotations))]))
        return scores(self, annotations, title)

    monkeypatch.setattr(scoring.Scorer, "scores", noted)
    fit(settings(small_shapes, tmp_path / "run", epochs=1, **csl))
    train = read("coco", small_shapes, "train2014")
    assert seen == [("prior", [train.path(row) for row in range(len(train))])]


def test_an_image_in_training_and_validation_is_named(settings, tmp_path):
    table = write_table(tmp_path, {"train": ["a", "b"], "val": ["b", "a"]})
    lines = (tmp_path / "labels.csv").read_text().replace("val1.png", "./train1.png")
    folder = tmp_path / "tables"
    folder.mkdir()
    header, *rows = lines.splitlines()
    for split in ("train", "val"):
        chosen = [row for row in rows if row.endswith(split)]
        (folder / f"{split}.csv").write_text("\n".join([header, *chosen]))
    config = settings(folder, tmp_path / "run", image_folder="..", batch_size=2, **table)
    with pytest.raises(DataError, match=r"train1\.png"):
        fit(config)
    assert not (tmp_path / "run").exists()


def as_if_measured(monkeypatch, figures):
    """Let epoch after epoch have these pairs of mAP, of averaged and of regular weights."""
    pairs = iter(figures)

    def measured(*arguments):
        ema, regular = next(pairs)
        return {"mAP_ema": ema, "mAP_regular": regular}

    monkeypatch.setattr(loop, "validate", measured)


@pytest.mark.parametrize(
    ("figures", "epoch", "weights"),
    [
        ([(5.0, 7.0), (6.0, 6.0), (4.0, 4.0)], 1, "regular"),
        ([(5.0, 4.0), (4.0, 6.0), (6.0, 5.0)], 2, "regular"),
        ([(5.0, 4.0), (5.0, 4.0), (5.0, 4.0)], 1, "ema"),  # of equal ones the first
        ([(5.0, 5.0), (1.0, 1.0), (7.0, 6.0)], 3, "ema"),
        ([(float("nan"), float("nan")), (1.0, 0.5), (0.0, 0.0)], 2, "ema"),
    ],
)
def test_the_best_epoch_and_set_of_weights_are_what_is_read_by_default(
    figures, epoch, weights, settings, measuring, small_shapes, tmp_path, monkeypatch
):
    as_if_measured(monkeypatch, figures)
    run = fit(settings(small_shapes, tmp_path / "run"))
    best = checkpoint.load(run / "best.pt")
    assert (best["history"][-1]["epoch"], best["best"]) == (epoch, weights)
    for name, tensor in best["model"].items():
        assert torch.equal(tensor, best[weights][name])
    read_by_default = evaluate(measuring(small_shapes, run / "best.pt"))
    named = evaluate(measuring(small_shapes, run / "best.pt", weights=weights))
    other = {"ema": "regular", "regular": "ema"}[weights]
    assert read_by_default["mAP"] == named["mAP"]
    assert named["mAP"] != evaluate(measuring(small_shapes, run / "best.pt", weights=other))["mAP"]


def test_what_differs_from_the_defaults_is_printed_and_where_the_rest_is(
    settings, small_shapes, tmp_path, capsys
):
    fit(settings(small_shapes, tmp_path / "run", stop_epoch=1))
    out = capsys.readouterr().out
    assert f"(all of them: {tmp_path / 'run/config.yaml'})" in out
    assert "  model_name: test_resnet\n" in out
    assert "weight_decay" not in out
    with pytest.raises(UsageError):
        fit(settings(small_shapes, tmp_path / "run", stop_epoch=1))
    assert "model_name" not in capsys.readouterr().out


def test_the_settings_of_a_run_are_a_recipe_that_leaves_the_run_alone(
    settings, small_shapes, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = settings(small_shapes, tmp_path / "runs/first", stop_epoch=1, overwrite=True)
    run = fit(config)
    before = (run / "last.pt").read_bytes()
    argv = ["--config", str(run / "config.yaml")]
    again = parse(TrainConfig, "train", "", argv)
    assert not again.run.overwrite
    assert fit(again) == Path("runs/first-2")
    assert (run / "last.pt").read_bytes() == before
    assert (again.run.output, again.run.resume) == ("", "")
    same = {"config": "", "output": config.run.output, "overwrite": True}
    assert again.with_settings(**same) == config.explicit()


def harmless(folder):
    return {"stop_epoch": 3, "val_every": 2, "threshold": 0.3, "output": str(folder)}


def test_a_run_may_go_on_longer_and_be_measured_otherwise(settings, small_shapes, tmp_path):
    first = settings(small_shapes, tmp_path, stop_epoch=1)
    fit(first)
    run = fit(first.with_settings(**harmless(tmp_path), resume="last"))
    assert [row["epoch"] for row in rows_of(run)] == [1, 2, 3]


def test_a_setting_that_is_newer_than_a_checkpoint_had_its_default(
    settings, small_shapes, tmp_path
):
    fit(settings(small_shapes, tmp_path, stop_epoch=1))
    kept = checkpoint.load(tmp_path / "last.pt")
    del kept["config"]["grad_clip"]
    kept["config"]["gone"] = "a setting of an older version"
    checkpoint.save(tmp_path / "last.pt", kept)
    with pytest.raises(UsageError, match=r"grad_clip: None then, 1\.0 now"):
        fit(settings(small_shapes, tmp_path, resume="last", grad_clip=1.0))
    fit(settings(small_shapes, tmp_path, resume="last"))


def test_a_checkpoint_of_another_model_is_no_state_to_go_on_from(settings, small_shapes, tmp_path):
    fit(settings(small_shapes, tmp_path, stop_epoch=1))
    kept = checkpoint.load(tmp_path / "last.pt")
    kept["training"]["optimizer"] = {}
    checkpoint.save(tmp_path / "last.pt", kept)
    with pytest.raises(DataError, match=r"last\.pt: this run cannot go on from it"):
        fit(settings(small_shapes, tmp_path, resume="last"))


def test_the_loss_gets_what_the_settings_say(settings, small_shapes, tmp_path, monkeypatch):
    (tmp_path / "prior.csv").write_text(
        "Classes,avg_pred\n"
        + "".join(f"{name},0.1\n" for name in read("coco", small_shapes, "train2014").classes)
    )
    made, create = [], loop.create_loss
    monkeypatch.setattr(
        loop, "create_loss", lambda *a, **k: made.append(create(*a, **k)) or made[-1]
    )
    csl = {"unannotated": "selective", "prior_path": str(tmp_path / "prior.csv")}
    values = {"gamma_neg": 3.0, "clip": 0.1, "prior_threshold": 0.25, "likelihood_topk": 2}
    usual = settings(small_shapes, tmp_path / "a", epochs=1, simulate_partial="rps:0.5", **csl)
    fit(usual.with_settings(**values))
    [loss] = made
    assert (loss.gamma_neg, loss.gamma_unann, loss.clip) == (3.0, 3.0, 0.1)
    assert (loss.prior_threshold, loss.likelihood_topk, loss.mode) == (0.25, 2, "selective")
    assert loss.prior.tolist() == pytest.approx([0.1] * 24)
    fit(usual.with_settings(output=str(tmp_path / "b"), prior_path=""))
    assert (made[1].likelihood_topk, made[1].prior) == (1 / 16, None)  # of 24 classes


@pytest.mark.parametrize(("classes", "spared"), [(None, 5), (9605, 5), (80, 5), (79, 1 / 16)])
def test_csl_spares_the_official_count_of_many_classes_and_its_share_of_few(classes, spared):
    csl = LossSettings(unannotated="selective")
    loss = loop.create_loss(csl, partial=True, num_classes=classes)
    assert loss.likelihood_topk == spared
    told = csl.replace(likelihood_topk=3)
    assert loop.create_loss(told, partial=True, num_classes=classes).likelihood_topk == 3


def test_the_order_of_an_epoch_changes_from_epoch_to_epoch(
    settings, small_shapes, tmp_path, monkeypatch
):
    seen, step = [], Training.step

    def noted(self, images, targets):
        seen.append((self.epoch, images.sum(dim=(1, 2, 3))))
        return step(self, images, targets)

    monkeypatch.setattr(Training, "step", noted)
    fit(settings(small_shapes, tmp_path, stop_epoch=2, augment="none"))
    first, second = (torch.cat([x for epoch, x in seen if epoch == e]) for e in (0, 1))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sort().values, second.sort().values)


def test_validation_does_not_disturb_training(settings, small_shapes, tmp_path):
    often = fit(settings(small_shapes, tmp_path / "often"))
    rarely = fit(settings(small_shapes, tmp_path / "rarely", val_every=3))
    losses = [[row["loss"] for row in rows_of(run)] for run in (often, rarely)]
    assert losses[0] == losses[1]


def test_the_last_checkpoint_is_at_the_end_of_the_last_epoch(whole_run):
    last = checkpoint.load(whole_run / "last.pt")
    assert (last["epoch"], len(last["losses"]), len(last["history"])) == (3, 0, 3)


def test_a_run_that_is_overwritten_leaves_nothing_of_the_old_one(
    settings, before, small_shapes, tmp_path
):
    fit(settings(small_shapes, tmp_path, stop_epoch=1))

    def stop():
        raise TrainingError("stopped")

    again = settings(small_shapes, tmp_path, overwrite=True)
    with before(2, Training, "step", stop), pytest.raises(TrainingError):
        fit(again)
    assert not any((tmp_path / name).exists() for name in ("last.pt", "best.pt", "metrics.jsonl"))


def test_curves_are_drawn_of_all_epochs(whole_run):
    with Image.open(whole_run / "curves.png") as picture:
        assert picture.width > 300


def test_images_are_normalised_as_the_model_was_trained(
    settings, small_shapes, tmp_path, monkeypatch
):
    seen, step = [], Training.step

    def noted(self, images, targets):
        seen.append(images.clone())
        return step(self, images, targets)

    monkeypatch.setattr(Training, "step", noted)
    fit(settings(small_shapes, tmp_path, stop_epoch=1, augment="none", model_name="test_vit"))
    images = torch.cat(seen)
    assert images.dtype == torch.float32
    assert images.min() == pytest.approx(-1, abs=0.05)  # mean and deviation of 0.5
    assert images.max() == pytest.approx(1, abs=0.05)


def test_a_run_is_due_and_validated_by_its_settings(tmp_path):
    run = Run(TrainConfig.of(output=str(tmp_path), epochs=7, stop_epoch=5, val_every=2))
    assert [run.validates(epoch) for epoch in range(5)] == [False, True, False, True, True]
