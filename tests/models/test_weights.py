import json
import os
import zlib
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from asl.errors import DataError, UsageError
from asl.models import checkpoint
from asl.models.build import create_model
from asl.models.inference import fold_batchnorm
from asl.models.settings import NewModelSettings, TrainedModelSettings
from asl.models.weights import load_weights, new_model, trained_model

TESTS = Path(__file__).parents[1]
GOLDEN = json.loads((TESTS / "golden" / "tresnet.json").read_text())
DECODERS = json.loads((TESTS / "golden" / "mldecoder.json").read_text())
WEIGHTS = Path(os.environ.get("ASL_WEIGHTS_ROOT", TESTS.parents[1] / "shared/data/weights"))
SMALL = "resnet10t"  # 5 M weights: quick to build and to save


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """Weights of a small model with 20 classes, in timm's own format."""
    path = tmp_path_factory.mktemp("small") / "small.pth"
    torch.save(create_model(SMALL, 20).state_dict(), path)
    return path


def created_and_filled(name, num_classes, path, head="linear", image_size=None, **options):
    model = create_model(name, num_classes, head, image_size=image_size)
    return model, load_weights(model, path, **options)


def official_tensor(name, shape, salt=""):
    """Draw one tensor by its name, as the golden ones were."""
    generator = torch.Generator().manual_seed(zlib.crc32((salt + name).encode()))
    if name.endswith("running_var"):
        return 0.5 + torch.rand(shape, generator=generator)
    tensor = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return tensor / tensor[0].numel() ** 0.5
    return tensor if name.endswith(".weight") else 0.1 * tensor


def official_file(folder, case, salt=""):
    """Write a golden model the way the official training code did."""
    weights = {name: official_tensor(name, shape, salt) for name, shape in case["params"].items()}
    path = folder / "official.pth"
    content = {
        "model": weights,
        "num_classes": case["num_classes"],
        "idx_to_class": {"0": "person"},
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize("case", GOLDEN.values(), ids=GOLDEN)
def test_official_tresnet_files_give_the_official_logits(case, tmp_path, same):
    path = official_file(tmp_path, case)
    head = "bottleneck" if case["bottleneck"] else "linear"
    model, loaded = created_and_filled(
        case["model"], case["num_classes"], path, head, fresh_head=False
    )
    path.unlink()  # up to 300 MB, and pytest keeps three runs

    side = case["image_size"]
    images = ((torch.arange(2 * 3 * side * side) % 251) / 250).view(2, 3, side, side)
    with torch.inference_mode():
        logits = model.eval()(images)
        folded = fold_batchnorm(model)(images)

    part = "TResNet M, L, XL, v2-L bottleneck"
    same(part, logits[:, :20], torch.tensor(case["logits"]), atol=1e-4)
    torch.testing.assert_close(folded, logits, rtol=0, atol=1e-4)
    assert loaded.matched == len(case["params"])
    assert not loaded.fresh
    assert not loaded.left_out


@pytest.mark.parametrize("case", DECODERS["models"].values(), ids=DECODERS["models"])
def test_official_files_with_an_ml_decoder_give_the_official_logits(case, tmp_path, same):
    path = official_file(tmp_path, case, DECODERS["salt"])
    name, num_classes = case["model"], int(case["num_classes"])
    model, loaded = created_and_filled(name, num_classes, path, "ml_decoder", fresh_head=False)
    linear, without = created_and_filled(name, num_classes, path)
    path.unlink()

    side = int(case["image_size"])
    images = ((torch.arange(2 * 3 * side * side) % 251) / 250).view(2, 3, side, side)
    with torch.inference_mode():
        logits = model.eval()(images)
        folded = fold_batchnorm(model)(images)

    expected = torch.tensor(case["logits"])
    same("TResNet with ML-Decoder", logits[:, : expected.shape[1]], expected, atol=1e-5)
    torch.testing.assert_close(folded, logits, rtol=0, atol=1e-4)
    assert loaded.matched == len(case["params"])
    assert not loaded.fresh
    assert not loaded.left_out
    queries = min(100, num_classes)
    theirs = f"{num_classes} classes (ml_decoder, {queries} queries)"
    assert f"a head for {theirs}, the model's is for {num_classes} classes (linear)" in str(without)
    assert without.fresh == ("head.fc.weight", "head.fc.bias")
    assert linear.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)


@pytest.fixture(scope="module")
def official_m(tmp_path_factory):
    return official_file(tmp_path_factory.mktemp("official"), GOLDEN["tresnet_m"])


def test_inplace_abn_weights_are_converted_exactly_once(official_m, tmp_path):
    model, _ = created_and_filled("tresnet_m", 80, official_m)
    scale = model.state_dict()["body.conv1.bn.weight"].clone()
    official = official_tensor("body.conv1.1.weight", scale.shape)
    torch.testing.assert_close(scale, official.abs() + 1e-5, rtol=0, atol=0)
    assert (official < 0).any()

    model.body.conv1.bn.weight.data.neg_()  # training may turn a BatchNorm scale negative
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint.save(tmp_path / "own.pth", {"model": wrapped, "num_classes": 80})
    again, _ = created_and_filled("tresnet_m", 80, tmp_path / "own.pth")
    assert torch.equal(again.state_dict()["body.conv1.bn.weight"], -scale)


@pytest.mark.parametrize("other", ["tresnet_l", "tresnet_v2_l"])
def test_a_file_of_another_tresnet_names_the_right_one(other, official_m):
    with pytest.raises(
        DataError, match=r"tresnet_m, not .*--model-name tresnet_m .*\d+ of"
    ) as error:
        created_and_filled(other, 80, official_m)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", GOLDEN.values(), ids=GOLDEN)
def test_a_tresnet_file_is_recognised_by_its_names(case, tmp_path):
    torch.save({name: torch.zeros(1) for name in case["params"]}, tmp_path / "file.pth")
    with pytest.raises(DataError, match=f"weights of {case['model']}, not resnet10t"):
        created_and_filled(SMALL, 80, tmp_path / "file.pth")


def test_a_damaged_file_of_the_right_tresnet_is_not_said_to_be_of_another(tmp_path):
    names = GOLDEN["tresnet_m"]["params"]
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "file.pth")
    with pytest.raises(DataError, match="another model than tresnet_m: 0 of the model's"):
        created_and_filled("tresnet_m", 80, tmp_path / "file.pth")


def test_a_head_for_other_classes_is_left_out_and_said_so(official_m):
    torch.manual_seed(0)
    model, loaded = created_and_filled("tresnet_m", 20, official_m)
    assert loaded.fresh == ("head.fc.weight", "head.fc.bias")
    assert "80 classes (linear), the model's is for 20 classes (linear)" in str(loaded)
    assert model.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)  # the official draw
    assert model.head.fc.bias.abs().max() <= 2048**-0.5
    with pytest.raises(DataError, match="--num-classes"):
        created_and_filled("tresnet_m", 20, official_m, fresh_head=False)


def test_a_head_of_another_kind_is_left_out(official_m):
    _, loaded = created_and_filled("tresnet_m", 80, official_m, head="bottleneck")
    assert "80 classes (linear), the model's is for 80 classes (bottleneck)" in str(loaded)
    assert len(loaded.fresh) == 4


def test_an_ml_decoder_begins_on_the_body_of_a_file_with_another_head(official_m, tmp_path):
    model, loaded = created_and_filled("tresnet_m", 20, official_m, head="ml_decoder")
    assert "80 classes (linear), the model's is for 20 classes (ml_decoder, 20 queries)" in str(
        loaded
    )
    assert set(loaded.fresh) == {f"head.fc.{name}" for name in model.head.fc.state_dict()}
    checkpoint.save(tmp_path / "own.pth", {"model": model.state_dict(), "num_classes": 20})
    _, again = created_and_filled("tresnet_m", 20, tmp_path / "own.pth", "ml_decoder")
    assert not again.fresh
    assert not again.left_out


def test_a_file_without_a_head_fills_the_body(small_file, tmp_path):
    weights = torch.load(small_file)
    backbone = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
    torch.save(backbone, tmp_path / "backbone.pth")
    _, loaded = created_and_filled(SMALL, 20, tmp_path / "backbone.pth")
    assert loaded.fresh == ("fc.weight", "fc.bias")
    assert loaded.matched == len(backbone)
    assert not loaded.left_out
    with pytest.raises(DataError, match="a head for no classes, the model's is for 20 classes"):
        created_and_filled(SMALL, 20, tmp_path / "backbone.pth", fresh_head=False)


def test_tensors_that_the_model_does_not_have_are_left_out_and_said_so(small_file, tmp_path):
    weights = torch.load(small_file) | {"fc_auxiliary.weight": torch.zeros(7, 512)}
    checkpoint.save(tmp_path / "file.pth", {"model": weights})
    model, loaded = created_and_filled(SMALL, 20, tmp_path / "file.pth")
    assert loaded.left_out == {"fc_auxiliary.weight": "not in the model"}
    assert "left out: fc_auxiliary.weight: not in the model" in str(loaded)
    assert loaded.matched == len(model.state_dict())
    assert not loaded.fresh


@pytest.mark.parametrize("head", ["linear", "bottleneck", "ml_decoder"])
def test_every_value_of_a_file_is_in_the_model(head, tmp_path):
    original = create_model(SMALL, 20, head)
    for tensor in original.buffers():
        tensor += 1
    save_file(original.state_dict(), tmp_path / "w.safetensors")
    built = create_model(SMALL, 20, head)
    loaded = load_weights(built, tmp_path / "w.safetensors")
    assert loaded.matched == len(original.state_dict())
    for name, tensor in original.state_dict().items():
        assert torch.equal(built.state_dict()[name], tensor)


def test_buffers_that_no_file_holds_are_there(official_m):
    model, _ = created_and_filled("tresnet_m", 80, official_m)
    plain = dict(timm.create_model("tresnet_m", num_classes=80).named_buffers())
    blur = [name for name in plain if name.endswith("filt")]
    assert blur
    for name in blur:
        assert torch.equal(model.get_buffer(name), plain[name])


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """What a training writes whose regular weights were better: two sets, three classes."""
    path = tmp_path_factory.mktemp("run") / "best.pt"
    sets = {name: create_model(SMALL, 3).state_dict() for name in ("ema", "regular")}
    names = {0: "cat", 1: "dog", 2: "emu"}
    checkpoint.save(path, {**sets, "best": "regular", "num_classes": 3, "idx_to_class": names})
    return path


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, "regular"),
        ({"weights": "best"}, "regular"),
        ({"weights": "regular"}, "regular"),
        ({"weights": "ema"}, "ema"),
    ],
)
def test_of_several_sets_the_best_is_taken_or_the_one_asked_for(options, taken, run_file):
    expected = checkpoint.load(run_file)[taken]["fc.weight"]
    model = create_model(SMALL, 3)
    loaded = load_weights(model, run_file, **options)
    assert torch.equal(model.fc.weight, expected)
    assert loaded.weights == taken
    assert f" tensors loaded ({taken} weights)" in str(loaded)


@pytest.mark.parametrize("weights", ["best", "ema", "regular"])
def test_a_file_with_one_set_gives_that_one(weights, small_file):
    model, loaded = created_and_filled(SMALL, 20, small_file, weights=weights)
    assert torch.equal(model.fc.weight, torch.load(small_file)["fc.weight"])
    assert loaded.weights == "only"
    assert str(loaded) == f"{small_file}: {len(model.state_dict())} tensors loaded"


@pytest.mark.parametrize(("weights", "entry"), [("best", "_ema"), ("regular", "")])
def test_the_best_set_of_timms_training_is_the_averaged_one(weights, entry, tmp_path):
    sets = {f"state_dict{which}": create_model(SMALL, 3).state_dict() for which in ("", "_ema")}
    torch.save(sets, tmp_path / "timm.pth.tar")
    model, _ = created_and_filled(SMALL, 3, tmp_path / "timm.pth.tar", weights=weights)
    assert torch.equal(model.fc.weight, sets[f"state_dict{entry}"]["fc.weight"])


def test_a_model_in_use_is_the_best_set_with_its_classes_in_order(run_file):
    settings = TrainedModelSettings(model_name=SMALL, model_path=str(run_file), num_classes=3)
    model, classes, loaded = trained_model(settings, image_size=64)
    assert torch.equal(model.fc.weight, checkpoint.load(run_file)["regular"]["fc.weight"])
    assert classes == ("cat", "dog", "emu")
    assert loaded.weights == "regular"
    model, _, _ = trained_model(settings.replace(weights="ema"), image_size=64)
    assert torch.equal(model.fc.weight, checkpoint.load(run_file)["ema"]["fc.weight"])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model_path": ""}, UsageError, "name the checkpoint: --model-path"),
        ({"num_classes": 4}, UsageError, "num_classes is 4, the checkpoint's 3"),
        ({"head": "bottleneck"}, DataError, r"3 classes \(linear\), .* check --head"),
    ],
)
def test_a_checkpoint_that_is_not_what_was_said_is_an_error(changed, error, message, run_file):
    settings = TrainedModelSettings(model_name=SMALL, model_path=str(run_file))
    with pytest.raises(error, match=message):
        trained_model(settings.replace(**changed), image_size=64)


def test_a_model_in_use_needs_the_names_of_its_classes(small_file):
    settings = TrainedModelSettings(model_name=SMALL, model_path=str(small_file))
    with pytest.raises(DataError, match=r"small.pth does not name its classes \(idx_to_class\)"):
        trained_model(settings, image_size=64)


def test_training_from_a_file_takes_its_best_body_and_says_what_it_left_out(run_file, capsys):
    settings = NewModelSettings(model_name=SMALL, model_path=str(run_file), head="bottleneck")
    model = new_model(settings, num_classes=7, image_size=64)
    said = capsys.readouterr().out
    assert "(regular weights)" in said
    assert "3 classes (linear), the model's is for 7 classes (bottleneck)" in said
    expected = checkpoint.load(run_file)["regular"]
    assert torch.equal(model.conv1[0].weight, expected["conv1.0.weight"])
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("from_file", [False, True])
def test_a_new_model_and_one_in_use_are_built_for_the_size_of_the_images(from_file, tmp_path):
    name = "vit_tiny_patch16_224"  # takes images of the size that it is built for, and no other
    original = create_model(name, 2)
    content = {"model": original.state_dict(), "idx_to_class": ["cat", "dog"]}
    torch.save(content, tmp_path / "vit.pth")
    path = str(tmp_path / "vit.pth")
    new = NewModelSettings(model_name=name, model_path=path if from_file else "")
    used = TrainedModelSettings(model_name=name, model_path=path)
    images = torch.zeros(1, 3, 96, 96)
    assert new_model(new, num_classes=5, image_size=96)(images).shape == (1, 5)
    assert trained_model(used, image_size=96)[0](images).shape == (1, 2)


def test_pretrained_settings_ask_for_timms_weights(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="no pretrained weights for resnet10t"):
        new_model(NewModelSettings(model_name=SMALL, pretrained=True), 2, image_size=64)
    new_model(NewModelSettings(model_name=SMALL), 2, image_size=64)
    assert capsys.readouterr().out == ""


def test_a_file_that_fits_in_part_is_an_error_with_counts(small_file, tmp_path):
    weights = torch.load(small_file)
    del weights["layer4.0.conv1.weight"]
    torch.save(weights, tmp_path / "part.pth")
    with pytest.raises(DataError, match=r"another model than resnet10t: 69 of .* 70 tensors"):
        load_weights(create_model(SMALL, 20), tmp_path / "part.pth")


def test_a_larger_sibling_that_holds_every_name_is_an_error(tmp_path):
    torch.save(create_model("resnet34", 20).state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(DataError, match=r"another model than resnet18.*of the file's"):
        created_and_filled("resnet18", 20, tmp_path / "resnet34.pth")


def test_wrong_shapes_are_an_error_that_shows_one(small_file, tmp_path):
    weights = torch.load(small_file)
    weights["layer4.0.conv1.weight"] = torch.zeros(512, 256, 1, 1)
    torch.save(weights, tmp_path / "shapes.pth")
    with pytest.raises(
        DataError, match=r"layer4.0.conv1.weight: \(512, 256, 1, 1\) for \(512, 256"
    ):
        load_weights(create_model(SMALL, 20), tmp_path / "shapes.pth")


def test_what_timms_converter_fails_on_is_an_error_with_counts(tmp_path):
    weights = create_model("test_vit", 5).state_dict() | {"pos_embed": torch.zeros(3)}
    torch.save(weights, tmp_path / "vit.pth")
    with pytest.raises(DataError, match=r"than test_vit: \d+ of .*; pos_embed: \(3,\) for"):
        created_and_filled("test_vit", 5, tmp_path / "vit.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named_and_change_nothing(value, small_file, tmp_path):
    weights = torch.load(small_file)
    weights["layer4.0.conv1.weight"][3, 2, 1, 0] = value
    torch.save(weights, tmp_path / "bad.pth")
    model = create_model(SMALL, 20)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DataError, match=r"layer4.0.conv1.weight .* not finite"):
        load_weights(model, tmp_path / "bad.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn])
def test_files_of_another_precision_load(dtype, small_file, tmp_path):
    weights = {name: tensor.to(dtype) for name, tensor in torch.load(small_file).items()}
    save_file(weights, tmp_path / "other.safetensors")
    model, _ = created_and_filled(SMALL, 20, tmp_path / "other.safetensors")
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(model.fc.weight, weights["fc.weight"].float())


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.full((20,), 1e300, dtype=torch.float64), r"fc.bias .* not finite"),
        (
            torch.zeros(20, dtype=torch.int64),
            "fc.bias is torch.int64, the model's is torch.float32",
        ),
        (torch.zeros(20, dtype=torch.complex64), "fc.bias is torch.complex64"),
    ],
)
def test_values_that_the_models_type_cannot_hold_are_an_error(bias, message, small_file, tmp_path):
    torch.save(torch.load(small_file) | {"fc.bias": bias}, tmp_path / "odd.pth")
    with pytest.raises(DataError, match=message):
        created_and_filled(SMALL, 20, tmp_path / "odd.pth")


def test_vision_transformers_take_the_image_size_and_resize_their_positions(tmp_path):
    torch.save(create_model("test_vit", 5).state_dict(), tmp_path / "vit.pth")
    model, loaded = created_and_filled("test_vit", 5, tmp_path / "vit.pth", image_size=96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 5)
    assert not loaded.fresh


def test_real_pretrained_weights_load_with_a_new_head():
    path = WEIGHTS / "tf_efficientnet_lite0.imagenet1k.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not there; ASL_WEIGHTS_ROOT names its folder")
    model, loaded = created_and_filled("tf_efficientnet_lite0", 20, path)
    assert loaded.fresh == ("classifier.weight", "classifier.bias")
    assert "1,000 classes (linear), the model's is for 20" in str(loaded)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 20)
