from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from asl.images.augment import OPERATIONS, Transform, apply, apply_batch, draw
from asl.images.settings import Policy

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SHEARS = [code for code, operation in enumerate(OPERATIONS) if "Shear" in operation.name]
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "index.Tensor")
VIEWS = ("view", "expand", "unsqueeze", "select", "slice", "unbind", "split", "transpose", "detach")


def pictures(count, size=48):
    """Smooth shapes and noise, each channel in a range of its own."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    low, high = torch.rand(2, count, 3, 1, 1, generator=generator).sort(0).values
    noise = torch.rand(smooth.shape, generator=generator)
    noise[::2] *= 0.05
    pictures = ((low + (high - low) * (0.9 * smooth + noise)) * 255).clamp(0, 255).byte()
    pictures[::4, :, 0, 0] = 0
    pictures[::4, :, 0, -1] = 255
    return pictures


def every_level(code):
    operation = OPERATIONS[code]
    signs = (-1, 1) if operation.signed else (1,)
    magnitudes = {
        operation.start + operation.span * n / 9 * sign for n in range(1, 10) for sign in signs
    }
    return [Transform(code, each, 0.3, 0.9, 200, 100, 0) for each in sorted(magnitudes)]


def difference(images, numbers, device="cpu"):
    """In grey levels, from what workers make of the images."""
    result = apply_batch(images.to(device), numbers)
    expected = torch.stack([apply(*pair) for pair in zip(images, numbers, strict=True)])
    assert (result.device.type, result.dtype) == (device, torch.uint8)
    return (result.cpu().int() - expected.int()).abs().float()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("code", range(len(OPERATIONS)), ids=lambda code: OPERATIONS[code].name)
def test_pixels_are_those_of_workers_and_sheared_ones_within_one_grey_level(code, device):
    rows = every_level(code)
    numbers = np.zeros((2 * len(rows) + 1, 3, len(Transform._fields)), np.float32)
    numbers[:-1, 1] = rows + rows  # and nothing for the last image
    found = difference(pictures(len(numbers)), numbers, device)
    assert found.max() <= (1 if code in SHEARS else 0)
    assert found.mean() < 0.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 2, 33])
@pytest.mark.parametrize("policy", get_args(Policy))
def test_a_batch_of_a_policy_has_the_pixels_of_workers(policy, size, device):
    numbers = draw(policy, 0, 0, range(200))
    numbers[np.isin(numbers[..., 0], SHEARS)] = 0  # one that follows may widen their differences
    assert difference(pictures(len(numbers), size), numbers, device).max() == 0


def test_the_batch_itself_is_left_alone_and_comes_back_where_nothing_is_to_do():
    images = pictures(8)
    before = images.clone()
    apply_batch(images, draw("recipe", 0, 0, range(8)))
    assert torch.equal(images, before)
    assert apply_batch(images, draw("none", 0, 0, range(8))) is images


class Kernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if not name.startswith(VIEWS):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def test_kernels_grow_with_the_operations_and_not_with_the_batch_and_none_waits():
    numbers = np.zeros((len(OPERATIONS), 3, len(Transform._fields)), np.float32)
    numbers[:, 1:] = [[every_level(code)[0]] * 2 for code in range(len(OPERATIONS))]
    runs = []
    for repeats in (1, 8):
        images = pictures(repeats * len(numbers), size=8)
        with Kernels() as kernels:
            apply_batch(images, np.tile(numbers, (repeats, 1, 1)))
        runs.append(kernels.counts)
    assert runs[0] == runs[1]
    assert runs[0].total() < 300
    assert not [name for name in runs[0] if name.startswith(SYNCS)]


@pytest.mark.cuda
def test_no_step_waits_for_the_device(without_waiting):
    images, numbers = pictures(64).cuda(), draw("recipe", 0, 0, range(64))
    apply_batch(images, numbers)
    with without_waiting():
        apply_batch(images, numbers)
