import subprocess
import sys
from pathlib import Path

import pytest
import torch

import asl.models
from asl.errors import DataError, UsageError
from asl.models import build, weights
from asl.models.build import check_size, create_model, normalization, place
from asl.models.heads import BottleneckHead

SMALL = "resnet10t"


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_vit", SMALL])
def test_the_bottleneck_head_fits_any_model_with_a_linear_end(name):
    model = create_model(name, 40, head="bottleneck").eval()
    assert sum(isinstance(module, BottleneckHead) for module in model.modules()) == 1
    assert model(torch.zeros(1, 3, *model.pretrained_cfg["input_size"][1:])).shape == (1, 40)


def test_no_bottleneck_head_for_a_model_with_two_classifiers():
    with pytest.raises(UsageError, match="no bottleneck head"):
        create_model("deit_tiny_distilled_patch16_224", 5, head="bottleneck")


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


def test_a_size_that_the_model_cannot_take_is_an_error_with_its_reason():
    model = create_model("test_vit", 2, image_size=50)
    with pytest.raises(
        UsageError, match=r"vit cannot take images of 50 x 50 pixels: .*50"
    ) as error:
        check_size(model, "vit", 50)
    assert "\n" not in str(error.value)
    check_size(create_model("test_vit", 2, image_size=96), "vit", 96)


def test_a_model_that_checks_its_size_when_it_is_built_gives_the_same_error():
    with pytest.raises(UsageError, match="xcit_nano_12_p8_224 cannot take images of 100 x 100"):
        create_model("xcit_nano_12_p8_224", 2, image_size=100)


def test_other_failures_of_timm_are_not_taken_for_missing_weights(monkeypatch):
    def fail(*args, **options):
        raise MemoryError

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(MemoryError):
        create_model(SMALL, 2)


def test_a_look_at_the_size_changes_nothing_in_the_model():
    model = create_model(SMALL, 2).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_size(model, SMALL, 64)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_is_placed_on_its_device_in_channels_last():
    model = place(create_model(SMALL, 2), torch.device("meta"))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    kernel = model.get_parameter("layer1.0.conv1.weight")
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_settings_are_read_without_torch_and_timm():
    check = "import sys, asl.models.settings; print({'torch', 'timm', 'numpy'} & {*sys.modules})"
    source = Path(asl.models.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=source)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_what_users_need_is_in_the_package_itself():
    from asl.models import create_model, load_weights

    assert create_model is build.create_model
    assert load_weights is weights.load_weights
    with pytest.raises(AttributeError, match="no attribute 'load_wheights'"):
        _ = asl.models.load_wheights


@pytest.mark.parametrize("deterministic", [False, True])
def test_algorithms_are_searched_for_where_a_model_is_placed(deterministic, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    torch.use_deterministic_algorithms(deterministic)
    try:
        place(torch.nn.Conv2d(3, 4, 1), torch.device("cpu"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.backends.cudnn.benchmark is not deterministic
