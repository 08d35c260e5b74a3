import copy

import pytest
import torch
from timm.layers import BlurPool2d, SpaceToDepth
from torch import nn

from asl.errors import UsageError
from asl.models.build import check_size, create_model, place
from asl.models.inference import fold_batchnorm
from asl.models.layout import ChannelsLastBlurPool2d, ChannelsLastSpaceToDepth, keep_channels_last

LAYOUTS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
LAYERS = {
    "space to depth": (SpaceToDepth, (2, 3, 32, 48)),
    "blur of even sides": (lambda: BlurPool2d(16), (2, 16, 14, 8)),
    "blur of odd sides": (lambda: BlurPool2d(16), (2, 16, 13, 15)),
    "blur of any channels": (lambda: BlurPool2d(None), (2, 16, 8, 8)),
    "blur of 5 x 5": (lambda: BlurPool2d(16, filt_size=5), (2, 16, 12, 12)),
    "blur without a stride": (lambda: BlurPool2d(16, stride=1), (2, 16, 8, 8)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_what_timms_gives_to_the_bit_and_keeps_the_layout(name, dtype, layout):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    timms = make().to(dtype)
    own = keep_channels_last(copy.deepcopy(timms))
    assert type(own) in (ChannelsLastBlurPool2d, ChannelsLastSpaceToDepth)
    images = torch.randn(shape, dtype=dtype).to(memory_format=LAYOUTS[layout])
    results, gradients = [], []
    for layer in (timms, own):
        images.grad = None
        results.append(layer(images.requires_grad_()))
        # Whole numbers: their sums have no rounding, in whatever order they are added.
        (results[-1] * torch.arange(results[-1].numel()).view_as(results[-1]) * 16).sum().backward()
        gradients.append(images.grad)
    for timms_own, ours in (results, gradients):
        assert torch.equal(timms_own, ours)
        assert ours.is_contiguous(memory_format=LAYOUTS[layout])


def test_a_blur_has_no_operation_that_cuda_has_no_deterministic_algorithm_for():
    images = torch.rand(1, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        keep_channels_last(BlurPool2d(4))(images).sum().backward()
    called = {event.key for event in profiler.key_averages()}
    assert "aten::convolution_backward" in called
    assert not [name for name in called if "reflection_pad" in name]


def test_gradients_differ_in_the_rounding_at_the_corners_alone():
    torch.manual_seed(0)
    gradients = []
    images, weights = torch.randn(4, 16, 14, 14), torch.randn(4, 16, 7, 7)
    for layer in (BlurPool2d(16), keep_channels_last(BlurPool2d(16))):
        leaf = images.to(memory_format=torch.channels_last).clone().requires_grad_()
        (layer(leaf) * weights).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)
    rows, columns = (gradients[0] != gradients[1]).nonzero()[:, 2:].unique(dim=0).T.tolist()
    assert {*rows, *columns} <= {1, 12}


def test_a_map_without_a_pixel_to_mirror_is_an_error_as_in_timm():
    small = torch.zeros(1, 4, 1, 4).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="Padding size should be less"):
        keep_channels_last(BlurPool2d(4))(small)
    with pytest.raises(UsageError, match="tresnet_m cannot take images of 16 x 16 pixels"):
        check_size(place(create_model("tresnet_m", 2), torch.device("cpu")), "tresnet_m", 16)


def test_only_these_layers_are_replaced():
    class Own(BlurPool2d):
        pass

    zeros, own = BlurPool2d(4, pad_mode="constant"), Own(4)
    keep_channels_last(nn.Sequential(zeros, own))
    assert (type(zeros), type(own)) == (BlurPool2d, Own)


@pytest.mark.parametrize("name", ["tresnet_m", "tresnet_v2_l"])
def test_models_are_built_so_and_their_checkpoints_stay_as_they_were(name, monkeypatch):
    model = create_model(name, 2)
    kinds = [type(layer) for layer in model.modules()]
    assert kinds.count(ChannelsLastSpaceToDepth) == 1
    assert kinds.count(ChannelsLastBlurPool2d) == 3
    assert not {BlurPool2d, SpaceToDepth} & {*kinds}
    monkeypatch.setattr("asl.models.build.keep_channels_last", lambda model: model)
    plain = create_model(name, 2)
    assert SpaceToDepth in map(type, plain.modules())
    assert [*plain.state_dict()] == [*model.state_dict()]


def small_tresnet():
    torch.manual_seed(0)
    model = create_model("tresnet_m", 4).to(memory_format=torch.channels_last)
    return model, torch.rand(2, 3, 64, 64).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("how", ["whole", "folded", "with checkpointed activations"])
def test_no_convolution_of_a_tresnet_is_given_another_layout(how):
    model, images = small_tresnet()
    if how == "folded":
        model = fold_batchnorm(model)
    if how == "with checkpointed activations":
        model.set_grad_checkpointing()
    seen = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    assert len(seen) > 60
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_activations_that_are_computed_again_give_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model, images = small_tresnet()
        model.set_grad_checkpointing(checkpointed)
        model(images).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_compiled_layers_give_the_same():
    torch.manual_seed(0)
    own = keep_channels_last(nn.Sequential(SpaceToDepth(), BlurPool2d(48)))
    images = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    results = []
    for model in (own, torch.compile(own, fullgraph=True)):
        leaf = images.clone().requires_grad_()
        result = model(leaf)
        (result**2).sum().backward()
        results.append((result, leaf.grad))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-5, atol=1e-5)
