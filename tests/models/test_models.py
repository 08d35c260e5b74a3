import json
import os
import zlib
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.std_conv import StdConv2d
from torch import nn
from torch.overrides import TorchFunctionMode

from asl.errors import DataError, UsageError
from asl.models import checkpoint
from asl.models.build import (
    BottleneckHead,
    create_model,
    fold_batchnorm,
    load_model,
    load_weights,
    normalization,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tresnet.json").read_text())
WEIGHTS = Path(
    os.environ.get("ASL_WEIGHTS_ROOT", Path(__file__).parents[2] / "shared" / "data" / "weights")
)
SMALL = "resnet10t"  # 5 M weights: quick to build and to save


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """Weights of a small model with 20 classes, in timm's own format."""
    path = tmp_path_factory.mktemp("small") / "small.pth"
    torch.save(create_model(SMALL, 20).state_dict(), path)
    return path


def official_tensor(name, shape):
    """Draw one tensor by its name, as tests/golden/README.md says the golden ones were."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return 0.5 + torch.rand(shape, generator=generator)
    tensor = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return tensor / tensor[0].numel() ** 0.5
    return tensor if name.endswith(".weight") else 0.1 * tensor


def official_file(folder, case, **changes):
    """Write a golden model the way the official training code did."""
    weights = {name: official_tensor(name, shape) for name, shape in case["params"].items()}
    path = folder / "official.pth"
    content = {
        "model": weights,
        "num_classes": case["num_classes"],
        "idx_to_class": {"0": "person"},
    }
    torch.save(content | changes, path)
    return path


@pytest.mark.parametrize("case", GOLDEN.values(), ids=GOLDEN)
def test_official_tresnet_files_give_the_official_logits(case, tmp_path):
    path = official_file(tmp_path, case)
    head = "bottleneck" if case["bottleneck"] else "linear"
    model, loaded = load_model(case["model"], case["num_classes"], path, head, fresh_head=False)
    path.unlink()  # up to 300 MB, and pytest keeps three runs

    side = case["image_size"]
    images = ((torch.arange(2 * 3 * side * side) % 251) / 250).view(2, 3, side, side)
    with torch.inference_mode():
        logits = model.eval()(images)
        folded = fold_batchnorm(model)(images)

    torch.testing.assert_close(logits[:, :20], torch.tensor(case["logits"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(folded, logits, rtol=0, atol=1e-4)
    assert loaded.matched == len(case["params"])
    assert not loaded.fresh
    assert not loaded.left_out


@pytest.fixture(scope="module")
def official_m(tmp_path_factory):
    return official_file(tmp_path_factory.mktemp("official"), GOLDEN["tresnet_m"])


def test_inplace_abn_weights_are_converted_exactly_once(official_m, tmp_path):
    model, _ = load_model("tresnet_m", 80, official_m)
    scale = model.state_dict()["body.conv1.bn.weight"].clone()
    official = official_tensor("body.conv1.1.weight", scale.shape)
    torch.testing.assert_close(scale, official.abs() + 1e-5, rtol=0, atol=0)
    assert (official < 0).any()

    model.body.conv1.bn.weight.data.neg_()  # training may turn a BatchNorm scale negative
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint.save(tmp_path / "own.pth", {"model": wrapped, "num_classes": 80})
    again, _ = load_model("tresnet_m", 80, tmp_path / "own.pth")
    assert torch.equal(again.state_dict()["body.conv1.bn.weight"], -scale)


@pytest.mark.parametrize("other", ["tresnet_l", "tresnet_v2_l"])
def test_a_file_of_another_tresnet_names_the_right_one(other, official_m):
    with pytest.raises(
        DataError, match=r"tresnet_m, not .*--model-name tresnet_m .*\d+ of"
    ) as error:
        load_model(other, 80, official_m)
    assert "\n" not in str(error.value)


def test_a_tresnet_file_is_recognised_from_a_model_that_is_none(official_m):
    with pytest.raises(DataError, match="weights of tresnet_m, not resnet10t"):
        load_model(SMALL, 80, official_m)


def test_a_head_for_other_classes_is_left_out_and_said_so(official_m):
    torch.manual_seed(0)
    model, loaded = load_model("tresnet_m", 20, official_m)
    assert loaded.fresh == ("head.fc.weight", "head.fc.bias")
    assert "80 classes (linear), the model's is for 20 classes (linear)" in str(loaded)
    assert model.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)  # the official draw
    assert model.head.fc.bias.abs().max() <= 2048**-0.5
    with pytest.raises(DataError, match="--num-classes"):
        load_model("tresnet_m", 20, official_m, fresh_head=False)


def test_a_head_of_another_kind_is_left_out(official_m):
    _, loaded = load_model("tresnet_m", 80, official_m, head="bottleneck")
    assert "80 classes (linear), the model's is for 80 classes (bottleneck)" in str(loaded)
    assert len(loaded.fresh) == 4


def test_a_new_head_is_drawn_even_if_the_file_has_a_tensor_of_its_shape(tmp_path):
    weights = create_model(SMALL, 20).state_dict() | {"auxiliary.weight": torch.zeros(7, 512)}
    checkpoint.save(tmp_path / "file.pth", {"model": weights})
    torch.manual_seed(0)
    model, loaded = load_model(SMALL, 7, tmp_path / "file.pth")
    assert loaded.left_out["auxiliary.weight"] == "not in the model"
    assert 0.005 < model.fc.weight.std() < 0.1


@pytest.mark.parametrize("head", ["linear", "bottleneck"])
def test_loading_while_building_equals_building_then_loading(head, tmp_path):
    original = create_model(SMALL, 20, head)
    save_file(original.state_dict(), tmp_path / "w.safetensors")
    built = create_model(SMALL, 20, head)
    assert load_weights(built, tmp_path / "w.safetensors").fresh == ()
    at_once, _ = load_model(SMALL, 20, tmp_path / "w.safetensors", head)
    for name, tensor in original.state_dict().items():
        assert torch.equal(built.state_dict()[name], tensor)
        assert torch.equal(at_once.state_dict()[name], tensor)


def test_buffers_that_no_file_holds_are_there(official_m):
    model, _ = load_model("tresnet_m", 80, official_m)
    plain = dict(timm.create_model("tresnet_m", num_classes=80).named_buffers())
    blur = [name for name in plain if name.endswith("filt")]
    assert blur
    for name in blur:
        assert torch.equal(model.get_buffer(name), plain[name])


class Drawn(TorchFunctionMode):
    """Notes how many random numbers of a normal distribution are drawn."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.normal_:
            self.counts.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_weights_that_the_file_gives_are_not_drawn_first(official_m):
    with Drawn() as drawn:
        load_model("tresnet_m", 20, official_m)
    assert drawn.counts == [20 * 2048]  # the new head


@pytest.mark.parametrize("weights", ["ema", "regular", "best"])
def test_the_set_of_weights_that_was_asked_for_is_taken(weights, tmp_path):
    sets = {
        "ema": create_model(SMALL, 3).state_dict(),
        "regular": create_model(SMALL, 3).state_dict(),
    }
    checkpoint.save(tmp_path / "run.pth", {**sets, "best": "regular", "num_classes": 3})
    model, loaded = load_model(SMALL, 3, tmp_path / "run.pth", weights=weights)
    expected = sets["ema" if weights == "ema" else "regular"]
    assert torch.equal(model.state_dict()["fc.weight"], expected["fc.weight"])
    assert f"{weights} weights" in str(loaded)


def test_a_file_that_fits_in_part_is_an_error_with_counts(small_file, tmp_path):
    weights = torch.load(small_file)
    del weights["layer4.0.conv1.weight"]
    torch.save(weights, tmp_path / "part.pth")
    with pytest.raises(DataError, match=r"another model than resnet10t: 69 of .* 70 tensors"):
        load_weights(create_model(SMALL, 20), tmp_path / "part.pth")


def test_a_larger_sibling_that_holds_every_name_is_an_error(tmp_path):
    torch.save(create_model("resnet34", 20).state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(DataError, match=r"another model than resnet18.*of the file's"):
        load_model("resnet18", 20, tmp_path / "resnet34.pth")


def test_wrong_shapes_are_an_error_that_shows_one(small_file, tmp_path):
    weights = torch.load(small_file)
    weights["layer4.0.conv1.weight"] = torch.zeros(512, 256, 1, 1)
    torch.save(weights, tmp_path / "shapes.pth")
    with pytest.raises(
        DataError, match=r"layer4.0.conv1.weight: \(512, 256, 1, 1\) for \(512, 256"
    ):
        load_weights(create_model(SMALL, 20), tmp_path / "shapes.pth")


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


def test_half_precision_files_load(small_file, tmp_path):
    halves = {name: tensor.half() for name, tensor in torch.load(small_file).items()}
    save_file(halves, tmp_path / "half.safetensors")
    model, _ = load_model(SMALL, 20, tmp_path / "half.safetensors")
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(model.fc.weight, halves["fc.weight"].float())


def test_vision_transformers_take_the_image_size_and_resize_their_positions(tmp_path):
    torch.save(create_model("test_vit", 5).state_dict(), tmp_path / "vit.pth")
    model, loaded = load_model("test_vit", 5, tmp_path / "vit.pth", image_size=96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 5)
    assert not loaded.fresh


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_vit", SMALL])
def test_the_bottleneck_head_fits_any_model_with_a_linear_end(name):
    model = create_model(name, 40, head="bottleneck").eval()
    assert sum(isinstance(module, BottleneckHead) for module in model.modules()) == 1
    assert model(torch.zeros(1, 3, *model.pretrained_cfg["input_size"][1:])).shape == (1, 40)


def test_no_bottleneck_head_for_a_model_with_two_classifiers():
    with pytest.raises(UsageError, match="no bottleneck head"):
        create_model("deit_tiny_distilled_patch16_224", 5, head="bottleneck")


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [("tresnet_m", (0, 0, 0), (1, 1, 1)), ("tf_efficientnet_lite0", (0.5,) * 3, (0.5,) * 3)],
)
def test_normalization_is_what_the_weights_were_trained_with(name, mean, std):
    assert normalization(create_model(name, 2)) == (mean, std)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("tresnet-l", "tresnet_l"),
        ("TResNet_M", "tresnet_m"),
        ("tresnet_l_v2", "tresnet_v2_l"),
        ("a/b", "list_models"),
        ("tresnet_l.imagenet", "tresnet_l.miil_in1k"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(name, near):
    with pytest.raises(UsageError, match=near):
        create_model(name, 80)


def test_pretrained_weights_that_cannot_be_fetched_are_a_one_line_error(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="--model-path") as error:
        create_model(SMALL, 2, pretrained=True)
    assert "\n" not in str(error.value)


def test_real_pretrained_weights_load_with_a_new_head():
    path = WEIGHTS / "tf_efficientnet_lite0.imagenet1k.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not there; ASL_WEIGHTS_ROOT names its folder")
    model, loaded = load_model("tf_efficientnet_lite0", 20, path)
    assert loaded.fresh == ("classifier.weight", "classifier.bias")
    assert "1,000 classes (linear), the model's is for 20" in str(loaded)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 20)


@pytest.mark.parametrize("head", ["linear", "bottleneck"])
def test_a_new_head_begins_small_so_that_it_does_not_undo_the_backbone(head):
    model = create_model("tf_efficientnet_lite0", 20, head)
    layers = [
        m for m in model.get_submodule("classifier").modules() if isinstance(m, torch.nn.Linear)
    ]
    assert len(layers) == (1 if head == "linear" else 2)
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert not layer.bias.any()


def norms(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


@torch.no_grad()
def seasoned(model, images):
    """Give a model's BatchNorms weights and running statistics as after training."""
    for norm in norms(model):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = 1.0
    model.train()(images)
    return model


@pytest.mark.parametrize(
    ("name", "head", "left"),
    [
        ("tresnet_m", "bottleneck", 0),
        ("resnet18", "linear", 0),
        ("efficientnet_lite0", "linear", 0),
        ("tf_efficientnet_lite0", "linear", 0),  # convolutions that pad as TensorFlow does
        ("mobilenetv3_small_050", "linear", 0),
        ("densenet121", "linear", 62),  # where concatenation or pooling comes before
        ("convnext_atto", "linear", 0),
        ("test_vit", "linear", 0),
    ],
)
def test_folded_models_give_the_same_logits(name, head, left):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 128, 128)
    model = seasoned(create_model(name, 20, head, image_size=128), images)
    with torch.inference_mode():
        logits = model.eval()(images)
    folded = fold_batchnorm(model.train())
    with torch.inference_mode():
        torch.testing.assert_close(folded(images), logits, rtol=0, atol=1e-4)
    assert len(norms(folded)) == left
    assert not any(p.requires_grad for p in folded.parameters())


def test_folding_keeps_channels_last():
    model = create_model("resnet18", 2).to(memory_format=torch.channels_last)
    weight = fold_batchnorm(model).get_parameter("layer1.0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


class Block(nn.Module):
    """A convolution and a BatchNorm, used in ways in which they cannot become one."""

    def __init__(self, use, conv=nn.Conv2d, **options):
        super().__init__()
        self.use = use
        self.conv, self.norm = conv(4, 4, 3, padding=1), nn.BatchNorm2d(4, **options)
        self.again = self.conv if use == "held twice" else None

    def forward(self, x):
        if self.use == "output read twice":
            y = self.conv(x)
            return self.norm(y) + y
        if self.use == "called twice":
            return self.norm(self.conv(self.conv(x)))
        if self.use == "held twice":
            return self.norm(self.again(x))
        if self.use == "branch on values" and x.sum() > 1e9:
            return x
        return self.norm(self.conv(x))


@pytest.mark.parametrize(
    ("use", "options"),
    [
        ("output read twice", {}),
        ("called twice", {}),
        ("held twice", {}),
        ("branch on values", {}),
        ("weights standardised", {"conv": StdConv2d}),
        ("statistics of the batch", {"track_running_stats": False}),
    ],
)
def test_what_cannot_be_folded_stays_as_it_is(use, options):
    torch.manual_seed(0)
    images = torch.randn(4, 4, 8, 8)
    model = seasoned(Block(use, **options), images).eval()
    logits = model(images)
    assert torch.equal(fold_batchnorm(model)(images), logits)
    assert len(norms(model)) == 1


def test_a_convolution_that_is_reparametrised_by_a_hook_stays_as_it_is():
    model = Block("as usual")
    nn.utils.spectral_norm(model.conv)
    model = seasoned(model, torch.randn(4, 4, 8, 8)).eval()
    assert len(norms(fold_batchnorm(model))) == 1
    assert not norms(fold_batchnorm(Block("as usual")))
