import copy

import pytest
import torch
from timm.layers.std_conv import StdConv2d
from torch import nn

from asl.models.build import create_model
from asl.models.heads import head_names
from asl.models.inference import fold_batchnorm, for_inference


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
        ("tresnet_m", "ml_decoder", 0),
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
        if self.use == "loop over the batch":
            return torch.cat([self.norm(self.conv(x[i : i + 1])) for i in range(len(x))])
        return self.norm(self.conv(x))


@pytest.mark.parametrize(
    ("use", "options"),
    [
        ("output read twice", {}),
        ("called twice", {}),
        ("held twice", {}),
        ("branch on values", {}),
        ("loop over the batch", {}),
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


def test_a_convolution_with_a_hook_stays_as_it_is():
    images = torch.randn(4, 4, 8, 8)
    reparametrised, doubled, plain = Block("as usual"), Block("as usual"), Block("as usual")
    nn.utils.spectral_norm(reparametrised.conv)  # computes the weights in a hook
    doubled.conv.register_forward_hook(lambda layer, inputs, output: 2 * output)
    for model, left in ((reparametrised, 1), (doubled, 1), (plain, 0)):
        logits = seasoned(model, images).eval()(images)
        torch.testing.assert_close(fold_batchnorm(model)(images), logits, rtol=0, atol=1e-4)
        assert len(norms(model)) == left


@pytest.mark.parametrize(
    ("name", "head"),
    [("test_resnet", "linear"), ("test_vit", "linear"), ("test_vit", "bottleneck")],
)
def test_heads_compute_in_float32_whatever_the_backbone_does(name, head):
    model = create_model(name, 7, head)
    [where] = head_names(model)
    received = []
    with torch.no_grad():
        for tensor in model.get_submodule(where).parameters():
            tensor.normal_()
    plain = copy.deepcopy(model.get_submodule(where))
    ready = for_inference(model)
    ready.get_submodule(where).register_forward_pre_hook(
        lambda module, inputs: received.append(inputs[0])
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits = ready(torch.rand(3, 3, 160, 160))
    [features] = received
    assert logits.dtype == torch.float32
    assert torch.equal(logits, plain(features.float()))


def test_an_ml_decoder_makes_its_logits_in_float32_and_all_before_as_the_backbone_does():
    model = for_inference(create_model("test_resnet", 150, "ml_decoder"))
    decoder, seen = model.fc.decoder, {}
    for name in ("embed_standart", "layers.0.linear2", "layers.0"):
        layer = decoder.get_submodule(name)
        layer.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.rand(3, 3, 64, 64))
    assert seen["embed_standart"].dtype == seen["layers.0.linear2"].dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    each = torch.einsum("bqw,qwn->bqn", seen["layers.0"].float(), decoder.duplicate_pooling)
    expected = each.flatten(1)[:, :150] + decoder.duplicate_pooling_bias
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_a_model_that_computed_activations_again_no_longer_does():
    model = create_model("test_resnet", 7)
    model.set_grad_checkpointing(True)
    assert not any(
        isinstance(layer, torch.nn.BatchNorm2d) for layer in for_inference(model).modules()
    )
    assert not model.grad_checkpointing
