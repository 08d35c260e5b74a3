"""Studies: what is trained is what train.py trains, once, and the table says what it may."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_log import figures_of
from scipy import stats

from asl.data.splits import read_split
from asl.data.stratify import stratified_parts
from asl.errors import DataError, UsageError
from asl.evaluation.evaluate import evaluate
from asl.models import create_model
from asl.studies.on_features import OnFeatures, pulls, scores_of
from asl.studies.plan import StudyConfig, Trial, config_of, read_study
from asl.studies.results import END, START, publish
from asl.studies.tables import cells_table, interval, rows, table
from asl.studies.trials import RUNS, _command, run_study
from asl.training.fit import fit

ROOT = Path(__file__).parents[2]
END_TO_END = """
dataset: coco
model_name: test_resnet
image_size: 48
batch_size: 8
lr: 1.0e-2
epochs: 2
ema_decay: 0.9
"""
FEATURES = f"{END_TO_END}freeze: backbone\naugment: none\ncache_features: true\n"
LOSSES = "arms: {bce: {loss: bce}, asl: {}}\nseeds: 2\n"


@pytest.fixture
def study_of(tmp_path, monkeypatch):
    """Writes a plan beside a recipe and reads it; runs go to the folder of the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()

    def written(plan, recipe=END_TO_END):
        (tmp_path / "recipe.yaml").write_text(recipe)
        path = tmp_path / "studies" / "losses.yaml"
        path.write_text(f"question: which loss\nrecipe: recipe.yaml\n{plan}")
        return read_study(path)

    return written


@pytest.fixture
def on_cpu(small_shapes, tmp_path):
    """The config of a study on the small data set, from a backbone in a file."""
    torch.manual_seed(5)
    weights = tmp_path / "backbone.pth"
    torch.save(create_model("test_resnet", num_classes=7).state_dict(), weights)

    def config(**more):
        where = {"data": str(small_shapes), "model_path": str(weights)}
        return StudyConfig.of(**{**where, "device": "cpu", "amp": "off", **more})

    return config


def config_like(study, config, trial, output):
    return config_of(study, config, trial, output=str(output))


def test_trainings_end_to_end_are_those_of_train_py(study_of, on_cpu, measuring, tmp_path):
    study = study_of(f"{LOSSES}views: {{one: '', both: flip}}")
    trials = run_study(study, on_cpu())
    done = [(each["arm"], each["seed"]) for each in trials]
    assert done == [("bce", 0), ("asl", 0), ("bce", 1), ("asl", 1)]
    same = fit(config_like(study, on_cpu(), Trial("bce", "", 1), tmp_path / "same"))
    assert trials[2]["mAP"]["one"] == figures_of(same)[-1]["mAP_ema"]
    config = measuring(on_cpu().study.data, same / "last.pt", weights="ema", tta="flip")
    assert trials[2]["mAP"]["both"] == evaluate(config)["mAP"]
    assert len({each["mAP"]["one"] for each in trials}) == 4


def test_a_network_is_measured_on_the_images_that_it_was_validated_on(study_of, on_cpu, tmp_path):
    decoded = "settings: {cache_format: 'jpeg:10', draft_decode: true}\n"
    study = study_of(f"arms: {{asl: {{}}}}\nseeds: 1\n{decoded}")
    [trial] = run_study(study, on_cpu(cache_dir="squished"))
    [last] = figures_of(RUNS / study.name / "asl_0")[-1:]
    assert trial["mAP"][""] == last["mAP_ema"]
    assert len([*(tmp_path / "squished").iterdir()]) == 1


def test_a_command_names_weights_without_their_folder_but_in_full_and_the_precision(on_cpu):
    for path, named in (("/a/b.pth", "b.pth"), *[(x, x) for x in ("zoo:b", "hf-hub:a/b")]):
        here = on_cpu(model_path=path)
        assert _command(here).endswith(f"--model-path {named} --amp off")
        assert _command(here.with_settings(amp="auto")).endswith(f"--model-path {named}")


def test_heads_on_features_are_those_of_train_py(study_of, on_cpu, tmp_path):
    study = study_of(
        f"{LOSSES}settings: {{unannotated: negative, simulate_partial: 'rps:0.3'}}", FEATURES
    )
    trials = run_study(study, on_cpu())
    trial = Trial("asl", "", 1)
    config = config_like(study, on_cpu(), trial, tmp_path / "same")
    assert config.labels.partial_seed == 1  # other labels are hidden for every seed
    assert trials[3]["mAP"][""] == pytest.approx(figures_of(fit(config))[-1]["mAP_ema"], abs=1e-4)


def test_a_study_that_was_killed_goes_on(study_of, on_cpu, small_shapes, tmp_path):
    study_of(LOSSES)
    command = [sys.executable, ROOT / "study.py", "studies/losses.yaml", small_shapes]
    command += ["--device", "cpu", "--amp", "off", "--model-path", on_cpu().study.model_path]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    first = tmp_path / "runs" / "studies" / "losses" / "bce_0.json"
    while started.poll() is None and not first.exists():
        time.sleep(0.05)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate()
    before = first.read_text()
    again = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert first.read_text() == before
    assert "bce_0" not in again.stdout
    assert "asl_1: " in again.stdout
    killed = json.loads((tmp_path / "results" / "studies" / "losses.json").read_text())["trials"]
    for folder in ("runs", "results"):
        (tmp_path / folder).rename(tmp_path / f"killed_{folder}")
    assert [t["mAP"] for t in killed] == [
        t["mAP"] for t in run_study(read_study("studies/losses.yaml"), on_cpu())
    ]


def test_what_is_published_is_not_done_again_unless_its_settings_changed(
    study_of, on_cpu, capsys, tmp_path
):
    plan = "arms: {bce: {loss: bce}, asl: {}}\nseeds: 1\n"
    study = study_of(plan, FEATURES)
    publish(study, run_study(study, on_cpu()), "results/studies")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    run_study(study, on_cpu())
    assert capsys.readouterr().out == ""
    changed = plan.replace("asl: {}", "asl: {gamma_neg: 2}")
    run_study(study_of(changed, FEATURES), on_cpu())
    said = capsys.readouterr().out
    assert "asl_0: " in said
    assert "bce_0" not in said


def test_the_page_of_a_study_gets_its_table(study_of, on_cpu, tmp_path):
    study = study_of("arms: {asl: {}}\nseeds: 1\n", FEATURES)
    page = tmp_path / "docs" / "studies" / "losses.md"
    page.parent.mkdir(parents=True)
    page.write_text(f"# Losses\n\n{START}\nof old\n{END}\n\nWhat it says.\n")
    text = publish(study, run_study(study, on_cpu()), "results/studies")
    assert page.read_text() == f"# Losses\n\n{START}\n{text}{END}\n\nWhat it says.\n"


def test_the_pages_of_this_project_show_what_was_measured():
    pages = sorted((ROOT / "docs" / "studies").glob("[a-z]*.md"))  # README.md lists them
    assert pages
    for page in pages:
        table_ = (ROOT / "results" / "studies" / page.name).read_text()
        assert f"{START}\n{table_}{END}" in page.read_text(), page
        assert f"configs/studies/{page.stem}.yaml" in page.read_text(), page


def test_a_learning_rate_is_chosen_where_val_is_not_seen(study_of, on_cpu):
    plan = "arms: {asl: {}, frozen_in: {lr: 1.0e-9}}\nseeds: 2\nrates: [1.0e-7, 1.0e-2]\n"
    study = study_of(plan, FEATURES)
    trainer = OnFeatures(study, on_cpu())
    config = config_of(study, on_cpu(), Trial("asl", "", 1))
    learned, _ = trainer._features(config.images)
    trainer._val_set = None  # whoever looks at it fails
    trainer._features = lambda images: (learned, None)
    train_set = read_split(config.data, "train")
    chosen = trainer._with_rate(config, Trial("asl", "", 1), train_set, np.arange(len(train_set)))
    assert chosen.step.lr == 1e-2
    assert chosen.step.seed == 1


def test_a_rate_is_chosen_once_also_by_a_study_that_goes_on(study_of, on_cpu, monkeypatch):
    one = "arms: {asl: {}}\nseeds: 1\nrates: [1.0e-3, 1.0e-2]\n"
    [first] = run_study(study_of(one, FEATURES), on_cpu())
    trained = []
    on = OnFeatures._on

    def counted(self, config, *more):
        trained.append(config.step.lr)
        return on(self, config, *more)

    monkeypatch.setattr(OnFeatures, "_on", counted)
    run_study(study_of(one.replace("1\nrates", "2\nrates"), FEATURES), on_cpu())
    assert trained == [first["lr"]]


def test_folds_train_on_the_other_parts_of_the_training_split(study_of, on_cpu, monkeypatch):
    study = study_of(f"{LOSSES}folds: 4\n", FEATURES)
    trainer = OnFeatures(study, on_cpu())
    train_set = read_split(config_of(study, on_cpu(), Trial("asl", "", 0)).data, "train")
    parts = stratified_parts(train_set, 4, seed=0)
    learned, measured = [], []

    def trained(config, annotations, rows, after_epoch):
        learned.append(rows)
        return OnFeatures._trained(trainer, config, annotations, rows, after_epoch)

    def scores(training, features):
        measured.append(features)
        return scores_of(training, features)

    monkeypatch.setattr(trainer, "_trained", trained)
    monkeypatch.setattr("asl.studies.on_features.scores_of", scores)
    for fold in range(4):
        trainer(Trial("asl", "", 0, fold))
        assert (learned[-1] == np.flatnonzero(parts != fold)).all()
        features = trainer._features(config_of(study, on_cpu(), Trial("asl", "", 0)).images)[1]
        assert measured[-1].equal(features[parts == fold])
    assert len(trainer._val_set) == len(train_set)


def test_csl_on_features_estimates_its_prior_first(study_of, on_cpu, tmp_path):
    csl = "unannotated: selective, prior_path: estimate, likelihood_topk: 0"
    arms = [f"above_{t}: {{{csl}, prior_threshold: {t}}}" for t in (0, 0.3, 0.45, 0.47, 0.5, 1)]
    study = study_of(
        f"arms: {{ignore: {{unannotated: ignore}}, negative: {{unannotated: negative}}, "
        f"{', '.join(arms)}}}\nseeds: 1\nsettings: {{simulate_partial: 'rps:0.5'}}\n",
        FEATURES,
    )
    found = {trial["arm"]: trial["mAP"][""] for trial in run_study(study, on_cpu())}
    # A prior is a mean of scores: all classes are above 0, and none is above 1.
    assert found["above_0"] == found["ignore"]
    assert found["above_1"] == found["negative"]
    assert len({*found.values()}) >= 3, found


@pytest.mark.parametrize("order", ["full", "blocks:10"])
def test_the_map_after_each_epoch_is_that_of_train_py(study_of, on_cpu, tmp_path, order):
    plan = f"arms: {{asl: {{shuffle: '{order}'}}}}\nseeds: 1\nhistory: true\n"
    study = study_of(plan, FEATURES)
    [trial] = run_study(study, on_cpu())
    config = config_like(study, on_cpu(), Trial("asl", "", 0), tmp_path / "same")
    epochs = [row["mAP_ema"] for row in figures_of(fit(config))]
    assert trial["history"] == pytest.approx(epochs, abs=1e-4)
    assert trial["mAP"][""] == trial["history"][-1]


def test_a_grid_compares_all_combinations_and_is_drawn(study_of, on_cpu, tmp_path):
    study = study_of(
        "grid: {gamma_neg: [0, 4], clip: [0, 0.05, 0.2]}\nseeds: 1\n"
        "conditions: {plain: {}, focused: {gamma_pos: 1}}\n",
        FEATURES,
    )
    assert study.settings("focused", "gamma_neg 4, clip 0.2").items() >= {
        ("gamma_neg", 4),
        ("gamma_pos", 1),
        ("clip", 0.2),
    }
    trials = run_study(study, on_cpu())
    assert len(trials) == 12
    publish(study, trials, tmp_path)
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.width > 300


def test_images_with_one_label_are_all_that_is_seen(study_of, on_cpu):
    study = study_of("arms: {one: {loss: asl_single}}\nseeds: 1\none_label: true\n", FEATURES)
    trainer = OnFeatures(study, on_cpu())
    figures = trainer(Trial("one", "", 0))
    config = config_of(study, on_cpu(), Trial("one", "", 0))
    for images in (trainer._labelled(config.labels), trainer._val_set):
        assert ((images.dense() == 1).sum(axis=1) == 1).all()
    training = trainer._trained(config, trainer._labelled(config.labels), np.arange(4))
    scores = scores_of(training, trainer._features(config.images)[1])
    assert scores.sum(1).numpy() == pytest.approx(1)
    truth = trainer._val_set.dense().argmax(axis=1)
    assert round(figures["accuracy"] * len(truth) / 100, 6).is_integer()
    text = table(study.plan, rows(study.plan, [{**trial_of("one"), **figures}]))
    assert f"| ranked first | one | {figures['accuracy']:.2f} |" in text


def test_what_a_loss_does_to_hidden_cells_is_its_own_derivative(study_of, on_cpu):
    study = study_of(
        "arms: {bce: {loss: bce, unannotated: negative}, ignore: {loss: bce}}\n"
        "seeds: 1\ncells: true\nconditions: {hidden: {simulate_partial: 'rps:0.4'}}\n",
        FEATURES,
    )
    trainer = OnFeatures(study, on_cpu())
    for arm, free in (("bce", 0), ("ignore", 100)):
        cells = trainer(Trial(arm, "hidden", 0))["cells"]
        assert cells["hidden_free"] == free
    config = config_of(study, on_cpu(), Trial("bce", "hidden", 0))
    train_set = trainer._labelled(config.labels)
    training = trainer._trained(config, train_set, np.arange(len(train_set)))
    known, features = trainer._known(config, train_set, np.arange(len(train_set)))
    cells = pulls(training, features, known.dense(), train_set.dense())
    scores = scores_of(training, features).numpy()  # of a negative, the derivative is the score
    hidden = (train_set.dense() == 1) & (known.dense() == -1)
    assert cells["hidden"] == hidden.sum() / len(train_set)
    assert cells["hidden_pull"] == pytest.approx(scores[hidden].mean(), rel=1e-4)
    assert cells_table(study.plan, [{**trial_of("bce", "hidden"), "cells": cells}]).count("\n") == 2


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        ("arms: {asl: {gama_neg: 2}}", "arm 'asl': there is no setting 'gama_neg': did you mean"),
        ("arms: {asl: {seed: 2}}", "arm 'asl': seed is for the study itself to set"),
        ("arms: {asl: {}}\nfolds: 3", "folds is for studies on features"),
        ("arms: {}", "a study compares arms or a grid"),
        ("arms: {asl: {}}\ngrid: {clip: [0, 0.1]}", "a study compares arms or a grid"),
        ("grid: {clip: []}", "grid.clip is [], but"),
        ("grid: {clip: [0], lr: [1], gamma_neg: [1]}", "one or two settings"),
        ("grid: {clip: [0, 2]}", "arm 'clip 2': clip is 2"),
        ("arms: {asl: {}}\nconditions: {few: {clip: 2}}", "condition 'few': clip is 2"),
        ("seeds: 2", "a study compares arms or a grid"),
        ("arm: {asl: {}}", "there is no setting 'arm': did you mean arms?"),
    ],
)
def test_a_plan_that_is_wrong_is_told_where(study_of, plan, complaint):
    with pytest.raises(UsageError) as error:
        study_of(plan)
    assert "losses.yaml: " in str(error.value)
    assert complaint in str(error.value)


def test_the_numbers_of_the_recipe_s_loss_are_not_those_of_another(study_of):
    study = study_of(LOSSES, f"{END_TO_END}gamma_neg: 3\nclip: 0.1\n")
    assert study.settings("", "asl")["gamma_neg"] == 3
    assert "gamma_neg" not in study.settings("", "bce")


def trial_of(arm, condition=""):
    return {"arm": arm, "condition": condition, "seed": 0, "fold": None, "seconds": 1.0}


def trials_of(table_):
    return [
        {"arm": arm, "condition": "", "seed": s, "fold": f, "mAP": {"": x}, "seconds": 60.0}
        for (arm, s, f), x in table_.items()
    ]


def test_differences_are_of_pairs_and_their_interval_is_student_s(study_of):
    plan = study_of("arms: {bce: {loss: bce}, asl: {}}\nseeds: 6\n").plan
    random = np.random.default_rng(0)
    base, gains = random.normal(70, 2, 6), random.normal(1, 0.5, 6)
    figures = {("bce", s, None): base[s] for s in range(6)}
    figures |= {("asl", s, None): base[s] + gains[s] for s in range(6)}
    [bce, asl] = rows(plan, trials_of(figures))
    assert bce.difference is None
    own = stats.ttest_rel(base + gains, base).confidence_interval()
    assert asl.difference == pytest.approx((gains.mean(), own.low, own.high))
    text = table(plan, [bce, asl])
    assert f"| asl | {(base + gains).mean():.2f} |" in text
    assert f"{gains.mean():+.2f} ({own.low:+.2f} to {own.high:+.2f})" in text


def test_folds_share_images_and_their_interval_is_wider_for_it(study_of):
    plan = study_of("arms: {bce: {loss: bce}, asl: {}}\nseeds: 2\nfolds: 5\n", FEATURES).plan
    random = np.random.default_rng(1)
    base, gains = random.normal(70, 2, (2, 5)), random.normal(1, 0.5, (2, 5))
    figures = {("bce", s, f): base[s, f] for s in range(2) for f in range(5)}
    figures |= {("asl", s, f): (base + gains)[s, f] for s in range(2) for f in range(5)}
    asl = rows(plan, trials_of(figures))[1]
    per_fold = gains.mean(0)
    reach = stats.t.ppf(0.975, 4) * per_fold.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    assert asl.difference == pytest.approx(
        (per_fold.mean(), per_fold.mean() - reach, per_fold.mean() + reach)
    )
    assert asl.trials == 10
    assert interval([1.0]) is None


def test_features_need_a_trained_backbone(study_of, on_cpu):
    with pytest.raises(UsageError, match="name its file, --model-path"):
        run_study(study_of(LOSSES, FEATURES), on_cpu(model_path=""))


def test_a_study_without_figures_says_so(study_of, on_cpu):
    study = study_of(LOSSES)
    with pytest.raises(DataError, match="no figures yet"):
        publish(study, run_study(study, on_cpu(tables=True)), "results/studies")


def test_the_studies_of_this_project_can_be_read():
    studies = [read_study(path) for path in sorted((ROOT / "configs" / "studies").glob("*.yaml"))]
    assert studies
    for study in studies:
        assert len({trial.name for trial in study.plan.trials()}) == len([*study.plan.trials()])
