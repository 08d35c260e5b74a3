"""From a batch on the host to the model's input, and where augmentation is done."""

import numpy as np
import pytest
import torch

from asl.errors import UsageError
from asl.images.augment import apply_batch, draw
from asl.images.loader import Batch
from asl.images.prepare import augments_on_device, preparation
from asl.images.settings import AugmentSettings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=generator)


def test_pixels_are_scaled_and_normalised_by_channel(images):
    prepared = preparation(MEAN, STD, CPU)(Batch(images, torch.zeros(4, 2)))
    mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (MEAN, STD))
    torch.testing.assert_close(prepared.double(), (images / 255 - mean) / std, rtol=0, atol=1e-6)
    assert prepared.dtype == torch.float32
    assert prepared.is_contiguous(memory_format=torch.channels_last)


def test_mean_0_and_std_1_give_the_values_of_to_tensor(images):
    prepared = preparation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), CPU)(Batch(images, images))
    torch.testing.assert_close(prepared, images / 255, rtol=0, atol=1e-7)
    assert (prepared.min() >= 0) & (prepared.max() <= 1)


def test_augmentation_that_is_still_to_be_done_is_done_before_that(images):
    augmentation = draw("recipe", 0, 0, range(4))
    prepare = preparation(MEAN, STD, CPU)
    before = images.clone()
    prepared = prepare(Batch(images, images, augmentation))
    assert torch.equal(prepared, prepare(Batch(apply_batch(images, augmentation), images)))
    assert not torch.equal(prepared, prepare(Batch(images, images)))
    assert torch.equal(images, before)
    nothing = np.zeros_like(augmentation)
    assert torch.equal(prepare(Batch(images, images, nothing)), prepare(Batch(images, images)))


@pytest.mark.parametrize(
    ("augment_on", "device_types"),
    [("auto", {"cuda"}), ("workers", set()), ("device", {"cuda", "cpu", "xpu"})],
)
def test_augmentation_is_done_on_cuda_unless_asked_otherwise(augment_on, device_types):
    settings = AugmentSettings(augment_on=augment_on)
    devices = ("cuda", "cpu", "xpu") if augment_on == "device" else ("cuda", "cpu", "xpu", "mps")
    assert {each for each in devices if augments_on_device(settings, each)} == device_types


def test_the_recipe_cannot_be_done_on_apples_gpus_and_a_flip_can():
    with pytest.raises(UsageError, match="float64, which Apple GPUs do not have: use --augment-on"):
        augments_on_device(AugmentSettings(augment_on="device"), "mps")
    assert augments_on_device(AugmentSettings(augment_on="device", augment="flip"), "mps")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_are_rounded_to_the_type_they_are_computed_in_once(images, dtype):
    full = preparation(MEAN, STD, CPU)(Batch(images, images))
    half = preparation(MEAN, STD, CPU, dtype)(Batch(images, images))
    assert torch.equal(half, full.to(dtype))
    assert half.is_contiguous(memory_format=torch.channels_last)
