"""All that runs on a CUDA device runs here without one, and where there is one also on it.

Rehearsed tensors have shapes, types and a place, but no values. A path fails where it mixes
devices, where it learns a value, which makes the host wait, where it copies to or from the host and
waits for that, and where a convolution is given images in another layout than channels last.

A rehearsal cannot reach the values: the kernels, what cuDNN and cuBLAS choose, what atomics round.
Nor anything that only a driver knows: pinned memory, streams and their order, what fits into the
memory and how it is fragmented. Nor what is not PyTorch's eager mode in one process: torch.compile,
NCCL, synchronised batch statistics. docs/gpus.md says how to see these.
"""

import re
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from asl.data.annotations import Annotations
from asl.evaluation.average import MeanScores, Renormalized, Scores
from asl.evaluation.score import score
from asl.images.augment import OPERATIONS, Transform, apply_batch, draw
from asl.images.features import FeatureBatches
from asl.images.loader import Batch
from asl.images.mix import mixing
from asl.images.prepare import preparation
from asl.images.settings import AugmentSettings
from asl.losses import ASLSingleLabel, AsymmetricLoss, AsymmetricLossOptimized, PartialSelectiveLoss
from asl.models.build import create_model, normalization, place
from asl.models.heads import feature_width, take_features
from asl.models.inference import for_inference
from asl.robust_losses import SPLC, Hill
from asl.training.loss import create_loss
from asl.training.rehearsal import Rehearsal
from asl.training.settings import LossSettings, StepSettings
from asl.training.step import Training

CUDA = torch.device("cuda:0")
CLASSES, SIZE, BATCH = 20, 64, 8
CONVOLUTION = torch.ops.aten.convolution.default
BACKWARDS = torch.ops.aten.convolution_backward.default
COPIES = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default
PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Watch(TorchDispatchMode):
    """Fails at what a device would do without a word, but slowly.

    Gradients pass on maps as small as the network's last: global pooling spreads its gradient in
    the usual layout, and up to the next BatchNorm nothing turns it round.
    """

    def __init__(self):
        super().__init__()
        self.smallest_map = SIZE**2

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and function.namespace == "aten":
            # Operations that are made of others arrive here as a whole, conv2d and to among them.
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = function(*args, **kwargs)
        if function is CONVOLUTION:
            must_be_channels_last(args[0])
            if pixels(result) > 1:
                self.smallest_map = min(self.smallest_map, pixels(result))
        if function is BACKWARDS:
            must_be_channels_last(args[1])
            if pixels(args[0]) > self.smallest_map:
                must_be_channels_last(args[0])
        if function in COPIES:
            source = args[1] if function is COPIES[1] else args[0]
            blocking = not (kwargs.get("non_blocking") or args[2:] == (True,))
            crosses = source.device.type != result.device.type
            assert not (crosses and blocking), f"{tuple(result.shape)} copied, and waited for"
        return result


def pixels(images):
    return images.shape[2:].numel()


def must_be_channels_last(images):
    """The numbers of a pixel must lie together. A part of such images passes: it is copied, but not
    turned round. So does one channel or one pixel, in which layouts do not differ."""
    turned = images.ndim == 4 and images.stride(1) != 1
    message = f"{tuple(images.shape)} not in channels last"
    assert not turned or images.shape[1] == 1 or pixels(images) == 1, message


class Rehearsed:
    """Where a path runs without a device."""

    def __init__(self):
        self._rehearsal = Rehearsal()

    def model(self, name, head="linear", drop_path=None):
        with torch.device("meta"):  # no time for random weights
            model = create_model(name, CLASSES, head, image_size=SIZE, drop_path=drop_path)
        return self.module(place(model, torch.device("meta")))

    def module(self, module):
        return self._rehearsal.copy_of(module, CUDA)

    def on(self):
        return self._rehearsal.on(CUDA)

    def watched(self):
        return Watch()


class OnDevice:
    """Where it runs on one."""

    def __init__(self, without_waiting):
        self._without_waiting = without_waiting

    def model(self, name, head="linear", drop_path=None):
        model = create_model(name, CLASSES, head, image_size=SIZE, drop_path=drop_path)
        return place(model, CUDA)

    def module(self, module):
        return module.to(CUDA)

    def on(self):
        return nullcontext()

    @contextmanager
    def watched(self):
        with Watch(), self._without_waiting():
            yield


@pytest.fixture(params=["rehearsed", pytest.param("on CUDA", marks=pytest.mark.cuda)])
def stage(request, without_waiting):
    return Rehearsed() if request.param == "rehearsed" else OnDevice(without_waiting)


def batch(numbers=None):
    images = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    return Batch(images, torch.randint(0, 2, (BATCH, CLASSES), dtype=torch.int8), numbers)


@pytest.mark.parametrize("operation", [each.name for each in OPERATIONS[1:]])
def test_augmentation(operation, stage):
    [code] = [code for code, each in enumerate(OPERATIONS) if each.name == operation]
    magnitude = OPERATIONS[code].start + OPERATIONS[code].span / 2
    numbers = np.zeros((BATCH, 3, len(Transform._fields)), np.float32)
    numbers[::2, 1] = Transform(code, magnitude, 0.3, 0.9, 200, 100, 0)
    with stage.on():
        images = batch().images.to(CUDA)
        with stage.watched():
            augmented = apply_batch(images, numbers)
        assert (augmented.device, augmented.dtype) == (CUDA, torch.uint8)
        assert augmented is not images


@pytest.mark.parametrize("amp", PRECISIONS)
@pytest.mark.parametrize("policy", ["recipe", "flip", "none"])
def test_preparation(policy, amp, stage):
    with stage.on():
        prepare = preparation((0.5,) * 3, (0.5,) * 3, CUDA, PRECISIONS[amp])
        with stage.watched():
            images = prepare(batch(draw(policy, 0, 0, range(BATCH))))
        assert images.device == CUDA
        assert images.dtype == (PRECISIONS[amp] or torch.float32)
        must_be_channels_last(images)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("amp", PRECISIONS)
def test_mixing(kind, amp, stage):
    mix = mixing(AugmentSettings(**{kind: 1.0}), seed=0)
    with stage.on():
        prepare = preparation((0.5,) * 3, (0.5,) * 3, CUDA, PRECISIONS[amp])
        with stage.watched():
            images, targets, _ = batch()
            images = prepare(Batch(images, targets))
            soft = mix(images, targets.to(CUDA, non_blocking=True), 0, 0)
        assert (soft.device, soft.dtype, soft.shape) == (CUDA, torch.float32, targets.shape)
        must_be_channels_last(images)


SELECTIVE = {"mode": "selective", "prior": torch.linspace(0, 1, CLASSES), "prior_threshold": 0.5}


class LateSPLC(SPLC):
    """It takes negatives for positives."""

    def forward(self, logits, targets):
        return super().forward(logits, targets, epoch=1)


LOSSES = {
    "AsymmetricLoss": AsymmetricLoss(),
    "AsymmetricLoss with a gradient of the weights": AsymmetricLoss(
        disable_torch_grad_focal_loss=False
    ),
    "AsymmetricLossOptimized": AsymmetricLossOptimized(),
    "AsymmetricLossOptimized with detached weights": AsymmetricLossOptimized(
        disable_torch_grad_focal_loss=True
    ),
    "PartialSelectiveLoss, selective": PartialSelectiveLoss(**SELECTIVE),
    "PartialSelectiveLoss, negative": PartialSelectiveLoss("negative"),
    "PartialSelectiveLoss, ignore": PartialSelectiveLoss("ignore"),
    "PartialSelectiveLoss, normalised": PartialSelectiveLoss("ignore_normalize_classes"),
    "Hill": Hill(),
    "SPLC": LateSPLC(),
}


def gradients_of(loss, targets, stage, dtype=torch.float32):
    logits = torch.zeros(BATCH, CLASSES, dtype=dtype, device=CUDA, requires_grad=True)
    with stage.watched():
        loss(logits, targets).backward()
    return logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_loss(name, dtype, stage):
    loss = stage.module(deepcopy(LOSSES[name]))
    with stage.on():
        targets = batch().targets.to(CUDA)
        assert gradients_of(loss, targets, stage, dtype).dtype == dtype


def test_loss_of_one_label(stage):
    with stage.on():
        targets = torch.zeros(BATCH, dtype=torch.long, device=CUDA)
        assert gradients_of(ASLSingleLabel(), targets, stage).device == CUDA


def trained(stage, name="test_resnet", loss=None, amp="off", steps=4, **settings):
    """The `Training` after some steps, from pixels on the host; the last has fewer targets."""
    of_model = {key: settings.pop(key) for key in ("head", "drop_path") if key in settings}
    model, loss = stage.model(name, **of_model), stage.module(loss or create_loss(LossSettings()))
    with stage.on():
        prepare = preparation(*normalization(model), CUDA, PRECISIONS[amp])
        training = Training(
            model, loss, StepSettings(**settings), batches_per_epoch=steps, device=CUDA, amp=amp
        )
        for step in range(1, steps + 1):
            images, targets, numbers = batch(draw("recipe", 0, 0, range(BATCH)))
            targets = targets[: BATCH - (step == steps)]
            with stage.watched():
                prepared = prepare(Batch(images, targets, numbers))
                training.step(prepared, targets.to(CUDA, non_blocking=True))
        assert {tensor.device for tensor in training.weights()["ema"].values()} == {CUDA}
    return training


def partial_loss(prior=None, **settings):
    return create_loss(LossSettings(**settings), partial=True, prior=prior)


OF_OTHERS = ("poly", "zlpr", "db", "twoway", "hill", "splc", "asl_single")


def other_loss(name):
    return create_loss(LossSettings(loss=name), False, None, range(CLASSES), 100)


STEPS = {
    "ASL": {},
    "focal loss": {"loss": create_loss(LossSettings(loss="focal"))},
    "cross-entropy": {"loss": create_loss(LossSettings(loss="bce"))},
    "CSL, ignore": {"loss": partial_loss(unannotated="ignore")},
    "CSL, negative": {"loss": partial_loss(unannotated="negative")},
    "CSL, selective": {
        "loss": partial_loss(unannotated="selective", prior=torch.linspace(0, 1, CLASSES))
    },
    **{name: {"loss": other_loss(name)} for name in OF_OTHERS},
    **{
        f"{name} behind a loss scale": {"loss": other_loss(name), "amp": "fp16"}
        for name in OF_OTHERS
    },
    "adaptive asymmetry": {"loss": create_loss(LossSettings(adaptive_gamma=0.2))},
    "adaptive CSL": {"loss": partial_loss(unannotated="selective", adaptive_gamma=0.2)},
    "float16 with a loss scale": {"amp": "fp16"},
    "bfloat16": {"amp": "bf16"},
    "clipped gradients": {"grad_clip": 1.0},
    "clipped gradients behind a loss scale": {"grad_clip": 1.0, "amp": "fp16"},
    "several batches a step": {"accumulate": 3},
    "several batches a step behind a loss scale": {"accumulate": 3, "amp": "fp16"},
    "AdamW": {"optimizer": "adamw"},
    "an average that warms up": {"ema_warmup": True},
    "a running prior": {"running_prior": True},
    "activations computed again": {"checkpoint_activations": True},
    "a head that learns faster, layers that learn slower": {"head_lr_scale": 2, "layer_decay": 0.7},
    "a frozen backbone": {"freeze": "backbone"},
    "a frozen backbone in bfloat16 and clipped gradients": {
        **{"freeze": "backbone", "amp": "bf16", "grad_clip": 1.0, "running_prior": True}
    },
    "activations computed again in bfloat16": {"checkpoint_activations": True, "amp": "bf16"},
    "ML-Decoder": {"head": "ml_decoder"},
    "ML-Decoder and activations computed again": {
        **{"head": "ml_decoder", "name": "test_vit"},
        **{"checkpoint_activations": True, "amp": "bf16"},
    },
}


@pytest.mark.parametrize("path", STEPS)
def test_step(path, stage):
    training = trained(stage, **deepcopy(STEPS[path]))
    assert len(training.losses) == training.steps == -(-4 // training.settings.accumulate)
    assert training.scaler.is_enabled() == (STEPS[path].get("amp") == "fp16")
    assert all(loss.device == CUDA for loss in training.losses)


def test_skipped_branches(stage):
    assert trained(stage, "test_vit", drop_path=0.5).steps == 4


@pytest.mark.parametrize("amp", PRECISIONS)
def test_features_in_the_place_of_images(amp, stage):
    training = trained(stage, "test_resnet", amp=amp, steps=1, freeze="backbone")
    models = [training.model, training.ema.module]
    with stage.on():
        for model in models:
            take_features(model)
        labels = np.zeros((BATCH, CLASSES), np.int8)
        annotations = Annotations.from_cells(
            Path(), np.full(BATCH, b"-"), tuple("abcdefghijklmnopqrst"), *np.nonzero(labels), []
        )
        features = torch.rand(BATCH, feature_width(training.model))
        batches = FeatureBatches(annotations, features, BATCH // 2, shuffle=True, device=CUDA)
        prepare = preparation(*normalization(training.model), CUDA, PRECISIONS[amp])
        with stage.watched():
            for each in batches.epoch(0):
                training.step(prepare(each), each.targets.to(CUDA, non_blocking=True))
            folded = [Scores(for_inference(deepcopy(model))) for model in models]
            tables = score(folded, batches.epoch(0), prepare, PRECISIONS[amp])
    assert training.steps == 1 + 2
    assert [table.shape for table in tables] == 2 * [(BATCH, CLASSES)]


RECIPES = Path(__file__).parents[2].glob("configs/*.yaml")
NAMES = {*re.findall(r"^model_name: (\w+)", "".join(map(Path.read_text, RECIPES)), re.M)}
# They are built of the same blocks as tresnet_m and models for tests. DINOv2's patches of 14 pixels
# do not fill SIZE; it has the blocks of test_vit.
LARGE = {"tresnet_l", "tresnet_xl", "convnextv2_base", "swin_large_patch4_window12_384"}
NAMES -= {"vit_base_patch14_dinov2"}


@pytest.mark.parametrize(
    ("name", "amp"),
    [
        *[pytest.param(name, "bf16", marks=pytest.mark.long) for name in sorted(LARGE)],
        *[(name, "bf16") for name in sorted(NAMES - LARGE)],
        *[("test_efficientnet", "bf16"), ("test_convnext", "bf16"), ("test_vit", "bf16")],
        *[("tresnet_m", "off"), ("tf_efficientnet_lite0", "fp16")],
    ],
)
def test_model(name, amp, stage):
    training = trained(stage, name, amp=amp, steps=1)
    assert len(validated(training, stage, amp)) == 2


@pytest.mark.parametrize(
    ("name", "amp"), [("tresnet_m", "bf16"), *[("test_vit", amp) for amp in PRECISIONS]]
)
def test_ml_decoder(name, amp, stage):
    training = trained(stage, name, amp=amp, steps=2, head="ml_decoder")
    assert len(validated(training, stage, amp)) == 2


def validated(training, stage, amp, one_label=False):
    """The scores that the averaged and the regular weights give, as at the end of an epoch."""
    with stage.on():
        models = [training.ema.module, training.model]
        folded = [Scores(for_inference(deepcopy(model)), one_label) for model in models]
        prepare = preparation(*normalization(models[0]), CUDA, PRECISIONS[amp])
        batches = [batch() for _ in range(3)]
        with stage.watched():
            return score(folded, batches, prepare, PRECISIONS[amp])


@pytest.mark.parametrize("amp", PRECISIONS)
def test_validation(amp, stage):
    for scores in validated(trained(stage, steps=1), stage, amp):
        assert (scores.shape, scores.dtype) == ((3 * BATCH, CLASSES), torch.float32)
        assert scores.device.type == "cpu"


def test_validation_of_a_model_of_one_label(stage):
    for scores in validated(trained(stage, steps=1), stage, "off", one_label=True):
        assert scores.shape == (3 * BATCH, CLASSES)


@pytest.mark.parametrize("amp", PRECISIONS)
def test_scores_of_several_models_and_views(amp, stage):
    models = [stage.model(name) for name in ("test_resnet", "test_efficientnet")]
    given, own = map(normalization, models)
    assert given != own
    with stage.on():
        first, second = map(for_inference, models)
        renormalized = Renormalized(second, own, given, CUDA)
        mean = MeanScores([Scores(first), Scores(renormalized, one_label=True)], flip=True)
        prepare = preparation(*given, CUDA, PRECISIONS[amp])
        with stage.watched():
            [scores] = score([mean], [batch(), batch()], prepare, PRECISIONS[amp])
        assert (scores.shape, scores.dtype) == ((2 * BATCH, CLASSES), torch.float32)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["tresnet_m", "resnet10t"])
def test_deterministic_steps(name, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    losses = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(0)
            losses.append(trained(OnDevice(nullcontext), name, steps=3).losses)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*map(torch.stack, losses))


# What the paths above would not notice, the rehearsal would be worth nothing for.


class Contiguous(nn.Module):
    def forward(self, x):
        return x.contiguous()


class ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous()


class ContiguousBackwards(nn.Module):
    def forward(self, x):
        return ContiguousGradient.apply(x)


class Waiting(AsymmetricLoss):
    """Learns a value."""

    def forward(self, logits, targets):
        return super().forward(logits, targets) / max(1.0, targets.sum().item())


class WaitingFilter(AsymmetricLoss):
    """Learns how many there are."""

    def forward(self, logits, targets):
        return super().forward(logits[targets >= 0], targets[targets >= 0])


class WaitingGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / gradient.abs().max().item()


class WaitingBackwards(AsymmetricLoss):
    """Learns a value of the gradient."""

    def forward(self, logits, targets):
        return super().forward(WaitingGradient.apply(logits), targets)


class Forgetful(AsymmetricLoss):
    """Makes a tensor where the others are not."""

    def forward(self, logits, targets):
        return super().forward(logits, targets) * torch.ones(CLASSES).sum(0, keepdim=True)


@pytest.mark.parametrize(
    ("loss", "error"),
    [
        (Waiting, DataDependentOutputException),
        (WaitingFilter, DynamicOutputShapeException),
        (WaitingBackwards, DataDependentOutputException),
        (Forgetful, RuntimeError),
    ],
)
def test_a_loss_that_waits_or_mixes_devices_is_noticed(loss, error):
    with pytest.raises(error, match="device" if error is RuntimeError else "aten"):
        trained(Rehearsed(), loss=loss())


@pytest.mark.parametrize("layer", [Contiguous, ContiguousBackwards])
def test_a_layer_that_undoes_channels_last_is_noticed(layer):
    stage = Rehearsed()
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), layer(), nn.Conv2d(4, 4, 3)).to(
        memory_format=torch.channels_last
    )
    model = stage.module(layers)
    with stage.on(), stage.watched():
        images = torch.zeros(2, 3, 8, 8, device=CUDA).to(memory_format=torch.channels_last)
        with pytest.raises(AssertionError, match=r"\(2, 4, \d, \d\) not in channels last"):
            model(images).sum().backward()


def test_such_a_layer_is_noticed_in_validation_too():
    stage = Rehearsed()
    model = stage.module(nn.Sequential(Contiguous(), nn.Conv2d(3, 4, 3)))
    with stage.on(), stage.watched(), torch.inference_mode():
        images = torch.zeros(2, 3, 8, 8, device=CUDA).to(memory_format=torch.channels_last)
        with pytest.raises(AssertionError, match=r"\(2, 3, 8, 8\) not in channels last"):
            model(images)


@pytest.mark.parametrize("layer", ["SpaceToDepth", "BlurPool2d"])
def test_timms_own_layers_are_noticed(layer, monkeypatch):
    monkeypatch.setattr(f"asl.models.layout.{layer}", type(layer, (), {}))
    with pytest.raises(AssertionError, match="not in channels last"):
        trained(Rehearsed(), "tresnet_m", steps=1)


COPYING = {
    "to the device": lambda on_host, on_device: on_host.to(CUDA),
    "to the host": lambda on_host, on_device: on_device.cpu(),
    "into a tensor of the device": lambda on_host, on_device: on_device.copy_(on_host),
    "into a tensor of the host": lambda on_host, on_device: on_host.copy_(on_device),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("copying", COPYING)
def test_a_copy_that_is_waited_for_is_noticed(copying, inference):
    stage = Rehearsed()
    with stage.on(), torch.inference_mode(inference):
        on_host, on_device = torch.zeros(3), torch.zeros(3, device=CUDA)
        with stage.watched():
            on_host.to(CUDA, non_blocking=True)
            on_device.copy_(on_host, non_blocking=True)
            with pytest.raises(AssertionError, match="copied, and waited for"):
                COPYING[copying](on_host, on_device)
