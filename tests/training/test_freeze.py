"""Training part of a model: what moves, how fast, and what is left out."""

import pytest
import torch
from torch import Tensor, nn

from asl.errors import UsageError
from asl.models.build import create_model
from asl.models.heads import freeze_backbone, head_names
from asl.training.loss import create_loss
from asl.training.settings import LossSettings, StepSettings
from asl.training.step import Training, create_optimizer

MODELS = ["test_resnet", "test_efficientnet", "test_vit"]
SIZE = {"test_vit": 160}
CLASSES, LR = 5, 1e-2
FIRST = LR / 25  # the learning rate that the cycle starts with


def training_of(name="test_resnet", steps_per_epoch=5, device="cpu", drop_path=None, **settings):
    torch.manual_seed(0)
    return Training(
        create_model(name, CLASSES, drop_path=drop_path).to(device),
        create_loss(LossSettings()),
        StepSettings(**{"lr": LR, "epochs": 1, "weight_decay": 0, **settings}),
        batches_per_epoch=steps_per_epoch,
        device=torch.device(device),
    )


def some_images(training, count=4) -> tuple[Tensor, Tensor]:
    size = training.model.pretrained_cfg["input_size"][-1]
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, size, size, generator=generator)
    targets = torch.randint(0, 2, (count, CLASSES), generator=generator)
    return images.to(training.device), targets.to(training.device)


def copies_of(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def of_head(training, name):
    return name.startswith(tuple(f"{head}." for head in head_names(training.model)))


@pytest.mark.parametrize("name", MODELS)
def test_of_a_frozen_model_the_head_alone_moves(name, device):
    training = training_of(name, device=device, freeze="backbone", ema_decay=0.5, weight_decay=0.1)
    before = copies_of(training.model.state_dict())
    for _ in range(3):
        training.step(*some_images(training))
    for state in training.weights().values():
        moved = {key for key in state if not torch.equal(state[key], before[key])}
        assert moved == {key for key in state if of_head(training, key)}


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_model_sees_images_as_it_does_after_the_training(name):
    training = training_of(name, freeze="backbone")
    images, targets = some_images(training)
    with torch.no_grad():
        expected = training.loss(training.model.eval()(images), targets)
    loss = training.step(images, targets)  # eval mode ends there, for the head
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_gradients_of_a_frozen_backbone_are_not_computed():
    training = training_of(freeze="backbone")
    loss = training.loss(training.forward(some_images(training)[0]), some_images(training)[1])
    loss.backward()
    for key, parameter in training.model.named_parameters():
        assert (parameter.grad is not None) == of_head(training, key)
    kept = [len(group["params"]) for group in training.optimizer.param_groups]
    assert kept == [1, 1]  # the bias and the weight of the head


def first_step(training):
    """How far each parameter moved, at most, in the first step: with Adam its learning rate."""
    before = copies_of(training.model.state_dict())
    training.step(*some_images(training, 16))
    return {
        key: (parameter - before[key]).abs().max().item()
        for key, parameter in training.model.named_parameters()
    }


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_the_head_learns_as_much_faster_as_asked_for(optimizer):
    training = training_of("test_vit", head_lr_scale=8, optimizer=optimizer)
    for key, distance in first_step(training).items():
        scale = 8 if of_head(training, key) else 1
        assert distance == pytest.approx(scale * FIRST, rel=0.01), key


def test_each_layer_learns_slower_than_the_one_behind_it():
    training = training_of("test_vit", layer_decay=0.5)
    moved = first_step(training)
    # The head and its norm, then the blocks from the last, then what makes patches of an image.
    layers = ["head.", *(f"blocks.{number}." for number in reversed(range(6))), "patch_embed."]
    assert {layer for layer in layers for key in moved if key.startswith(layer)} == {*layers}
    for depth, layer in enumerate(layers):
        inside = {key: far for key, far in moved.items() if key.startswith(layer)}
        assert max(inside.values()) == pytest.approx(FIRST * 0.5**depth, rel=0.02), layer


def test_both_together_multiply():
    training = training_of("test_vit", layer_decay=0.5, head_lr_scale=3)
    rates = {group["lr"] for group in training.optimizer.param_groups if group["params"]}
    layers = [FIRST * 0.5**depth for depth in range(1, 8)]  # six blocks, and what is before them
    assert sorted(rates, reverse=True) == pytest.approx([3 * FIRST, *layers])


def groups_by_decay(settings):
    model = create_model("test_vit", CLASSES)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = create_optimizer(model, settings).param_groups
    found = {0.0: set(), 0.1: set()}
    for group in groups:
        found[group["weight_decay"]] |= {names[parameter] for parameter in group["params"]}
    return found, len(groups)


def test_which_weights_decay_does_not_depend_on_it():
    usual, two = groups_by_decay(StepSettings(weight_decay=0.1))
    scaled, more = groups_by_decay(StepSettings(weight_decay=0.1, layer_decay=0.5, head_lr_scale=2))
    assert usual == scaled
    assert {"head.bias", "norm.weight"} <= usual[0.0]
    assert "head.weight" in usual[0.1]
    assert (two, more > 4) == (2, True)


def test_the_learning_rate_that_is_shown_is_the_one_asked_for():
    rates = []
    for settings in ({}, {"layer_decay": 0.5}, {"head_lr_scale": 7}):
        training = training_of("test_vit", **settings)
        training.step(*some_images(training))
        rates.append(training.lr)
    assert rates == pytest.approx([rates[0]] * 3, rel=1e-9)
    assert rates[0] > FIRST


@pytest.mark.parametrize(
    "settings", [{"freeze": "backbone"}, {"layer_decay": 0.7, "head_lr_scale": 4}], ids=str
)
def test_it_goes_on_from_its_state_as_if_it_had_never_stopped(settings):
    one, other = (training_of(**settings) for _ in range(2))
    for _ in range(2):
        one.step(*some_images(one))
    weights = {name: copies_of(state) for name, state in one.weights().items()}
    other.load_state_dict(one.state_dict(), weights)
    for training in (one, other):
        training.step(*some_images(training))
    for which, state in one.weights().items():
        for key, tensor in state.items():
            assert torch.equal(other.weights()[which][key], tensor), key
    assert other.state_dict()["schedule"] == one.state_dict()["schedule"]


def test_layers_that_timm_does_not_know_are_an_error_of_usage():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    model.pretrained_cfg = {}
    with pytest.raises(UsageError, match="Sequential has no layer_decay"):
        create_optimizer(model, StepSettings(layer_decay=0.5))
    with pytest.raises(UsageError, match="Sequential has no head"):
        create_optimizer(model, StepSettings(head_lr_scale=2))


@pytest.mark.parametrize("name", ["test_vit", "tf_efficientnet_lite0"])
def test_skipped_branches_change_the_training_alone(name):
    plain, skipping = (create_model(name, CLASSES, drop_path=rate) for rate in (None, 0.5))
    skipping.load_state_dict(plain.state_dict())
    size = plain.pretrained_cfg["input_size"][-1]
    images = torch.rand(4, 3, size, size)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), skipping.eval()(images))
        assert not torch.equal(plain.train()(images), skipping.train()(images))


def test_what_is_skipped_is_the_same_when_a_step_is_repeated():
    losses = [
        [training.step(*some_images(training)).item() for _ in range(2)]
        for training in (training_of("test_vit", drop_path=rate) for rate in (0.5, 0.5, None))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_model_without_branches_to_skip_is_an_error_of_usage():
    with pytest.raises(UsageError, match="ghostnet_050 has no branches that training could skip"):
        create_model("ghostnet_050", CLASSES, drop_path=0.1)


def test_the_fixed_queries_of_an_ml_decoder_stay_fixed():
    model = create_model("test_resnet", 5, "ml_decoder")
    freeze_backbone(model)
    [name] = head_names(model)
    moving = {key for key, tensor in model.named_parameters() if tensor.requires_grad}
    fixed = {f"{name}.{key}" for key, _ in model.get_submodule(name).named_parameters()} - moving
    assert all(key.startswith(f"{name}.") for key in moving)
    assert [key.rpartition("decoder.")[2] for key in fixed] == ["query_embed.weight"]
