"""Settings: recipe < command line, and what is refused on the way."""

import pytest

from asl.config import parse, read_recipe, write_recipe
from asl.data.settings import DataSettings
from asl.errors import DataError, UsageError
from asl.evaluation.settings import DEFAULT_MODEL, InferConfig, ValidateConfig
from asl.training.settings import TrainConfig

CONFIGS = {"train": TrainConfig, "validate": ValidateConfig, "infer": InferConfig}


def train(*argv):
    return parse(TrainConfig, "train", "", argv)


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    path = recipe(tmp_path, "lr: 2e-4\nbatch-size: 64\n")
    config = train("DATA", "--config", str(path), "--lr", "3e-4")
    assert (config.data.data, config.step.lr, config.images.batch_size) == ("DATA", 3e-4, 64)
    assert config.step.epochs == TrainConfig().step.epochs


def test_a_default_that_is_typed_wins_over_the_recipe(tmp_path):
    path = recipe(tmp_path, "lr: 2e-4\noverwrite: true\ndataset: voc\n")
    usual = TrainConfig()
    config = train("--config", str(path), "--lr=1e-4", "--no-overwrite", "--dataset", "coco")
    assert config.replace(run=usual.run) == usual
    assert not config.run.overwrite


def test_what_goes_together_may_stand_in_the_recipe_and_on_the_command_line(tmp_path):
    path = recipe(tmp_path, "unannotated: selective\nprior_path: estimate\npretrained: true\n")
    argv = ["--config", str(path), "--prior-path", "prior.csv", "--no-pretrained"]
    config = train(*argv, "--model-path", "x.pt")
    assert (config.loss.unannotated, config.loss.prior_path) == ("selective", "prior.csv")
    assert (config.model.pretrained, config.model.model_path) == (False, "x.pt")
    with pytest.raises(UsageError, match="prior_path"):
        train(*argv, "--unannotated", "ignore")


def test_infer_takes_the_model_of_the_zoo_and_its_settings_where_none_is_named():
    asked = []

    def trained_with(path):
        asked.append(path)
        return {"image_size": 96, "model_name": "test_resnet", "lr": 1.0}

    usual = parse(InferConfig, "infer", "", [], trained_with=trained_with)
    assert usual.model.model_path == (DEFAULT_MODEL,)
    assert (usual.images.image_size, usual.model.model_name) == (96, "test_resnet")
    mine = parse(InferConfig, "infer", "", ["--model-path", "x.pt"], trained_with=trained_with)
    assert mine.model.model_path == ("x.pt",)
    none = parse(InferConfig, "infer", "", ["--model-path", ""], trained_with=trained_with)
    assert none.model.model_path == ()
    assert asked == [DEFAULT_MODEL, "x.pt"]
    validate = parse(ValidateConfig, "validate", "", [], trained_with=trained_with)
    assert validate.model.model_path == ()


@pytest.mark.parametrize("argv", [["--help"], ["--model-path", "none.pt", "-h"]])
def test_help_is_there_at_once_and_needs_no_checkpoint(argv, capsys):
    with pytest.raises(SystemExit) as end:
        parse(InferConfig, "infer", "", argv, trained_with=pytest.fail)
    assert end.value.code == 0
    assert "--pic-path" in capsys.readouterr().out


def test_dashes_underscores_and_official_names_mean_the_same():
    official = ["--model_name", "tresnet_l", "-j", "3", "-b", "7", "--thre", "0.6"]
    ours = ["--model-name", "tresnet_l", "--workers", "3", "--batch-size=7", "--threshold", "0.6"]
    assert train(*official) == train(*ours)
    official = ["--pic_path", "x", "--input_size", "64", "--th", "0.5", "--json", "x.json"]
    ours = ["--pic-path", "x", "--image-size", "64", "--threshold", "0.5", "--json-file", "x.json"]
    assert parse(InferConfig, "infer", "", official) == parse(InferConfig, "infer", "", ours)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", "there is no setting 'lrr': did you mean lr?"),
        ("lr: 1\nlr: 2", 'duplicate key "lr"'),
        ("stop-epoch: 1\nstop_epoch: 2", "stop_epoch stands there twice"),
        ("lr: fast", "lr is 'fast', but must be a valid number"),
        ("loss: asll", "loss is 'asll', but must be 'asl', 'focal', 'bce', "),
        ("image_size: 2.5", "image_size is 2.5, but must be a valid integer"),
        ("image_size: 7", "image_size is 7, but must be greater than or equal to 8"),
        ("threshold: 1.01", "must be less than or equal to 1"),
        ("prior_path: x", "prior_path has a meaning for unannotated selective alone"),
        ("workers: [1, 2]", "workers is [1, 2]"),
        ("- lr", "`setting: value`"),
        ("lr: [1", "not YAML"),
        ("lr: !!int x", "not YAML"),
        ("lr: &me [*me]", "lr is [[...]]"),
        (r'"lr\nepochs": 2', "there is no setting 'lr"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_name_and_the_reason(text, message, tmp_path):
    path = recipe(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_recipe(path, TrainConfig)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.yaml"):
        read_recipe(tmp_path / "gone.yaml", TrainConfig)


def test_an_option_with_an_empty_value_does_not_take_the_next_word():
    config = train("--config=", "--lr", "3e-4")
    assert (config.run.config, config.step.lr) == ("", 3e-4)


def test_an_empty_recipe_changes_nothing(tmp_path):
    assert read_recipe(recipe(tmp_path, "# nothing yet\n"), TrainConfig) == {}


def test_numbers_are_written_as_yaml_writes_them_and_words_are_words(tmp_path):
    text = "lr: 1e-4\namp: off\ntrain_split: 2014\npretrained: yes\nworkers: null\n"
    settings = read_recipe(recipe(tmp_path, text), TrainConfig)
    assert settings == {
        "lr": 1e-4,
        "amp": "off",
        "train_split": "2014",
        "pretrained": True,
        "workers": None,
    }


FROZEN = ("--freeze", "backbone")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "-1"], "lr is -1.0, but must be greater than 0"),
        (["--lr", "0"], "lr is 0.0, but must be greater than 0"),
        (["--lr", "nan"], "lr is nan"),
        (["--lr", "inf"], "lr is inf"),
        (["--batch-size", "0"], "batch_size"),
        (["--clip", "1.5"], "clip"),
        (["--clip", "1e-7"], "clip is 1e-07: a margin below 1e-6"),
        (["--seed", "2147483648"], "seed"),
        (["--checkpoint-every", "5 min"], "checkpoint_every is '5 min'.*steps.*minutes"),
        (["--lr", "1", "--lr=2"], "--lr is given twice"),
        (["-b", "1", "--batch_size", "2"], "--batch-size is given twice"),
        (["--overwrite", "--no-overwrite"], "--overwrite is given twice"),
        (["--loss", "bce", "--gamma-neg", "2"], "bce"),
        (["--loss", "focal", "--gamma-neg", "3"], "focal"),
        (["--pretrained", "--model-path", "x"], "model_path and pretrained"),
        (["--output", "a\0b"], "output holds a null byte"),
        (["--head-lr-scale", "0"], "head_lr_scale is 0"),
        (["--layer-decay", "1.1"], "layer_decay is 1.1"),
        (["--drop-path", "1"], "drop_path is 1"),
        ([*FROZEN, "--head-lr-scale", "2"], "no use for head_lr_scale: drop"),
        ([*FROZEN, "--layer-decay", "1", "--sync-bn"], "no use for layer_decay and sync_bn: drop"),
        ([*FROZEN, "--checkpoint-activations"], "no use for checkpoint_activations: drop"),
        ([*FROZEN, "--drop-path", "0.1"], "no use for drop_path: drop"),
        (["--cache-features", "--augment", "none"], "goes with freeze backbone alone"),
        ([*FROZEN, "--cache-features"], "goes with augment none alone"),
        (
            [*FROZEN, "--cache-features", "--augment", "flip", "--bad-images", "skip"],
            "goes with augment none and bad_images error alone",
        ),
    ],
)
def test_settings_out_of_range_or_against_each_other_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        train(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--threshold", value] for value in ("0", "1")),
        *(["--machine-generated", value] for value in ("0", "1")),
        ["--clip", "0.99"],
        ["--adaptive-gamma", "0.99"],
        ["--seed", "2147483647"],
        ["--image-size", "8"],
        ["--image-size", "4096"],
    ],
)
def test_the_ends_of_a_range_belong_to_it(arguments):
    name = arguments[0].strip("-").replace("-", "_")
    assert train(*arguments).flat()[name] == float(arguments[1])


def test_the_defaults_are_the_official_recipe():
    official = {
        **{"lr": 1e-4, "weight_decay": 1e-4, "batch_size": 128, "image_size": 224, "epochs": 80},
        **{"pct_start": 0.2, "ema_decay": 0.9997, "threshold": 0.8, "optimizer": "adam"},
        **{"augment": "recipe", "loss": "asl", "prior_threshold": 0.5},
    }
    usual = TrainConfig().flat()
    assert {name: usual[name] for name in official} == official
    assert TrainConfig().loss.asymmetry == (4.0, 0.0, 0.05)


def test_as_many_epochs_are_trained_as_asked_for():
    assert TrainConfig.of(epochs=100).last_epoch == 100
    assert TrainConfig.of(epochs=100, stop_epoch=41).last_epoch == 41
    assert TrainConfig.of(epochs=10, stop_epoch=41).last_epoch == 10


@pytest.mark.parametrize(
    ("arguments", "near"),
    [(["--lrr", "1"], "lr"), (["--lr", "fast"], "--lr"), (["--loss", "asll"], "asl")],
)
def test_a_wrong_option_ends_with_2_and_names_what_is_near(arguments, near, capsys):
    with pytest.raises(SystemExit) as caught:
        train(*arguments)
    assert caught.value.code == 2
    assert near in capsys.readouterr().err


def test_an_option_of_another_script_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(ValidateConfig, "validate", "", ["--epochs", "3"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit):
        parse(InferConfig, "infer", "", ["--cache-dir", "x"])
    assert "cache-dir" in capsys.readouterr().err


@pytest.mark.parametrize("script", CONFIGS)
def test_help_explains_every_option_with_its_default(script, capsys):
    config = CONFIGS[script]
    with pytest.raises(SystemExit) as caught:
        parse(config, script, "", ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in config.options():
        if name != "data":
            assert f"--{name.replace('_', '-')}" in text
    for name in {*config.names()} - {*config.options()}:
        assert f"--{name.replace('_', '-')}" not in text
    assert text.count("default") >= len(config.options()) - 1
    assert "model options" in text


def test_every_setting_is_explained():
    for config in CONFIGS.values():
        for part in config.parts().values():
            for name, field in part.model_fields.items():
                assert field.description or name.startswith("cache_"), name


def test_what_is_written_reads_back_as_the_same_settings(tmp_path):
    config = TrainConfig.of(loss="focal", lr=3e-4, workers=3, train_split="2014", amp="off")
    path = recipe(tmp_path, write_recipe(config))
    assert TrainConfig.of(**read_recipe(path, TrainConfig)) == config
    assert TrainConfig.of(**read_recipe(path, TrainConfig)).changed() == {
        **{"train_split": "2014", "workers": 3, "loss": "focal", "lr": 3e-4, "amp": "off"}
    }


def test_the_losses_of_the_papers_are_asl_with_other_parameters():
    def asymmetry(**settings):
        return TrainConfig.of(**settings).loss.asymmetry

    assert asymmetry(gamma_neg=2.0) == (2.0, 0.0, 0.05)
    assert asymmetry(loss="focal", gamma_neg=3.0, gamma_pos=3.0) == (3.0, 3.0, 0.0)
    assert asymmetry(loss="focal") == (2.0, 2.0, 0.0)
    assert asymmetry(loss="bce") == (0.0, 0.0, 0.0)
    explicit = TrainConfig.of(loss="focal").explicit().flat()
    assert (explicit["gamma_neg"], explicit["gamma_pos"], explicit["clip"]) == (2.0, 2.0, 0.0)


def test_evaluation_takes_over_how_the_checkpoint_was_trained():
    def trained_with(path):
        assert path == "best.pt"
        about = {"val_difficult": "absent", "missing_images": "skip", "val_share": 0.3}
        return {"image_size": 96, "model_name": "resnet18", "lr": 1.0, "workers": 7, **about}

    argv = ["--model-path", "best.pt", "--image-size", "128"]
    config = parse(ValidateConfig, "validate", "", argv, trained_with=trained_with)
    assert (config.model.model_name, config.images.image_size) == ("resnet18", 128)
    assert (config.data.val_difficult, config.data.missing_images) == ("absent", "skip")
    assert config.data.val_share == 0.3
    assert config.images.workers is None
    config = parse(InferConfig, "infer", "", argv, trained_with=trained_with)
    assert (config.model.model_name, config.images.image_size) == ("resnet18", 128)


def test_how_a_data_set_was_split_is_forgotten_where_another_is_evaluated(tmp_path):
    def trained_with(path):
        split = {"dataset": "table", "data": "own.csv", "stratify": True, "folds": 5, "fold": 2}
        return {"image_size": 96, **split}

    def data(*argv):
        given = ["--model-path", "best.pt", *argv]
        config = parse(ValidateConfig, "validate", "", given, trained_with=trained_with)
        assert config.images.image_size == 96
        return config.data

    recipe = tmp_path / "coco.yaml"
    recipe.write_text("dataset: coco\n")
    for other in (["--dataset", "coco"], ["--dataset=coco"], ["--config", str(recipe)]):
        assert data(*other) == DataSettings()
    same = DataSettings(dataset="table", data="own.csv", stratify=True, folds=5, fold=2)
    assert data() == data("--dataset", "table") == same


@pytest.mark.parametrize(
    "words",
    [
        ["--model-path", "a.pt", "b.pt", "--thre", "0.5"],
        ["--model_path", "a.pt", "b.pt"],
        ["DATA", "--model-path", "a.pt", "b.pt"],
    ],
)
def test_evaluation_takes_several_checkpoints_and_the_settings_of_the_first(words):
    trained = {"a.pt": {"image_size": 96}}
    config = parse(ValidateConfig, "validate", "", words, trained_with=trained.__getitem__)
    assert config.model.model_path == ("a.pt", "b.pt")
    assert config.images.image_size == 96
    config = parse(InferConfig, "infer", "", ["--model-path=a.pt"], trained_with=trained.get)
    assert (config.model.model_path, config.images.image_size) == (("a.pt",), 96)
    assert ValidateConfig.of(model_path="a.pt").model.model_path == ("a.pt",)
    assert ValidateConfig.of(model_path="").model.model_path == ()
    with pytest.raises(UsageError, match="model_path holds a null byte"):
        ValidateConfig.of(model_path=["a\0b"])


def test_settings_of_a_checkpoint_that_make_no_sense_are_the_fault_of_the_file():
    argv = ["--model-path", "best.pt"]
    for config in ({"image_size": "large"}, {"model_name": ["x"]}):
        with pytest.raises(DataError, match=r"best\.pt: its config cannot be used: "):
            parse(ValidateConfig, "validate", "", argv, trained_with=lambda path: config)  # noqa: B023


def test_a_recipe_of_training_serves_validation_which_takes_its_own_part(tmp_path):
    path = recipe(tmp_path, "lr: 1.0\nimage_size: 96\nmachine_generated: 0.5\n")
    argv = ["--config", str(path), "--thre", "0.5"]
    config = parse(ValidateConfig, "validate", "", argv, recipes=TrainConfig)
    assert (config.images.image_size, config.evaluation.threshold) == (96, 0.5)
    assert config.labels.machine_generated == 0.5
    path.write_text("lr: -1.0\n")
    with pytest.raises(UsageError, match=r"recipe\.yaml: lr is -1\.0"):
        parse(ValidateConfig, "validate", "", argv, recipes=TrainConfig)


@pytest.mark.parametrize(
    ("argv", "resume"),
    [
        (["--resume"], "last"),
        (["--resume", "--lr", "1"], "last"),
        (["--resume", "x.pt"], "x.pt"),
        (["--resume=x.pt"], "x.pt"),
        ([], ""),
    ],
)
def test_resume_may_stand_alone(argv, resume):
    assert train(*argv).run.resume == resume
