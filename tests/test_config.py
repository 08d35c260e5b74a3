"""Config: recipe < command line, and what is refused on the way."""

import pytest

from asl.config import Config, parse, read_recipe
from asl.errors import UsageError


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    path = recipe(tmp_path, "lr: 2e-4\nbatch-size: 64\n")
    config = parse("train", "", ["DATA", "--config", str(path), "--lr", "3e-4"])
    assert (config.data, config.lr, config.batch_size) == ("DATA", 3e-4, 64)
    assert config.epochs == Config().epochs


def test_dashes_underscores_and_official_names_mean_the_same():
    official = ["--model_name", "tresnet_l", "-j", "3", "-b", "7", "--thre", "0.6"]
    ours = ["--model-name", "tresnet_l", "--workers", "3", "--batch-size=7", "--threshold", "0.6"]
    assert parse("train", "", official) == parse("train", "", ours)
    assert parse("infer", "", ["--pic_path", "x", "--input_size", "64", "--th", "0.5"]) == parse(
        "infer", "", ["--pic-path", "x", "--image-size", "64", "--threshold", "0.5"]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", "lr"),
        ("lr: 1\nlr: 2", "duplicate key lr"),
        ("stop-epoch: 1\nstop_epoch: 2", "stop_epoch stands there twice"),
        ("lr: fast", "could not be converted"),
        ("loss: asll", "asl"),
        ("image_size: 2.5", "could not be converted"),
        ("- lr", "`setting: value`"),
        ("lr: [1", "not YAML"),
        ("lr: ${nothing}", "nothing"),
        (r'"lr\nepochs": 2', "lr epochs: Key 'lr"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_name_and_the_reason(text, message, tmp_path):
    path = recipe(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.yaml"):
        read_recipe(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "-1"], "lr is -1.0, but must be above 0"),
        (["--lr", "nan"], "lr is nan"),
        (["--batch-size", "0"], "batch_size"),
        (["--clip", "1.5"], "clip"),
        (["--lr", "1", "--lr=2"], "--lr is given twice"),
        (["-b", "1", "--batch_size", "2"], "--batch-size is given twice"),
        (["--loss", "bce", "--gamma-neg", "2"], "bce"),
        (["--loss", "focal", "--gamma-neg", "3"], "focal"),
        (["--pretrained", "--model-path", "x"], "model_path and pretrained"),
    ],
)
def test_settings_out_of_range_or_against_each_other_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        parse("train", "", arguments)


@pytest.mark.parametrize(
    ("arguments", "near"),
    [(["--lrr", "1"], "--lr"), (["--lr", "fast"], "--lr"), (["--loss", "asll"], "asl")],
)
def test_a_wrong_option_ends_with_2_and_names_what_is_near(arguments, near, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("train", "", arguments)
    assert caught.value.code == 2
    assert near in capsys.readouterr().err


@pytest.mark.parametrize("script", ["train", "validate", "infer"])
def test_help_explains_every_option_with_its_default(script, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(script, "", ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    options = [f for f in Config.__dataclass_fields__.values() if script in f.metadata["scripts"]]
    assert len(options) > 10
    for option in options:
        if not option.metadata["positional"]:
            assert f"--{option.name.replace('_', '-')}" in text
    assert text.count("default") >= len(options) - 1
    assert "model options" in text


def test_what_is_written_reads_back_as_the_same_settings(tmp_path):
    config = Config(loss="focal", lr=3e-4, workers=3)
    path = recipe(tmp_path, config.to_yaml())
    again = Config(**read_recipe(path))
    assert again.asymmetry == config.asymmetry == (2.0, 2.0, 0.0)
    assert (again.lr, again.workers, again.grad_clip) == (3e-4, 3, None)


def test_the_losses_of_the_papers_are_asl_with_other_parameters():
    assert Config().asymmetry == (4.0, 0.0, 0.05)
    assert Config(gamma_neg=2.0).asymmetry == (2.0, 0.0, 0.05)
    assert Config(loss="focal", gamma_neg=3.0, gamma_pos=3.0).asymmetry == (3.0, 3.0, 0.0)
    assert Config(loss="bce").asymmetry == (0.0, 0.0, 0.0)


def test_evaluation_takes_over_how_the_checkpoint_was_trained():
    def read_checkpoint(path):
        assert path == "best.pt"
        return {"config": {"image_size": 96, "model_name": "resnet18", "lr": 1.0, "workers": 7}}

    argv = ["--model-path", "best.pt", "--image-size", "128"]
    config = parse("validate", "", argv, read_checkpoint)
    assert (config.model_name, config.image_size) == ("resnet18", 128)
    assert (config.lr, config.workers) == (Config().lr, None)


def test_the_settings_of_a_run_are_a_recipe(tmp_path):
    recipe = tmp_path / "config.yaml"
    recipe.write_text(Config(data="d", lr=0.5, config="other.yaml", resume="last").to_yaml())
    parsed = parse("train", "", ["--config", str(recipe)])
    assert (parsed.data, parsed.lr, parsed.config) == ("d", 0.5, str(recipe))
