import random
import zlib
from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from asl.images import augment
from asl.images.augment import (
    CUTOUT,
    FLIP,
    NOTHING,
    OPERATIONS,
    RANDAUGMENT,
    Transform,
    apply,
    apply_batch,
    draw,
)
from asl.images.settings import Policy

CODES = {operation.name: code for code, operation in enumerate(OPERATIONS)}
GREY = (128, 128, 128)


def affine(picture, coefficients, resample=Image.Resampling.NEAREST):
    return picture.transform(
        picture.size, Image.Transform.AFFINE, coefficients, resample, fillcolor=GREY
    )


def rotate(picture, angle):
    turned = picture.convert("RGBA").rotate(angle)
    corners = Image.new("RGBA", turned.size, (128,) * 4)
    return Image.composite(turned, corners, turned).convert("RGB")


BICUBIC = Image.Resampling.BICUBIC
PILLOW = {  # the official training script's RandAugment
    "ShearX": lambda p, a: affine(p, (1, a, 0, 0, 1, 0), BICUBIC),
    "ShearY": lambda p, a: affine(p, (1, 0, 0, a, 1, 0), BICUBIC),
    "TranslateX": lambda p, a: affine(p, (1, 0, a * p.width, 0, 1, 0)),
    "TranslateY": lambda p, a: affine(p, (1, 0, 0, 0, 1, a * p.height)),
    "Rotate": rotate,
    "Color": lambda p, a: ImageEnhance.Color(p).enhance(a),
    "Contrast": lambda p, a: ImageEnhance.Contrast(p).enhance(a),
    "Sharpness": lambda p, a: ImageEnhance.Sharpness(p).enhance(a),
    "Brightness": lambda p, a: ImageEnhance.Brightness(p).enhance(a),
    "Posterize": lambda p, a: ImageOps.posterize(p, round(a)),
    "Solarize": lambda p, a: ImageOps.solarize(p, a),
    "AutoContrast": lambda p, a: ImageOps.autocontrast(p),
    "Equalize": lambda p, a: ImageOps.equalize(p),
    "Invert": lambda p, a: ImageOps.invert(p),
}
AT_LEVEL_9 = {
    "ShearX": {-0.3, 0.3},
    "ShearY": {-0.3, 0.3},
    "TranslateX": {-150 / 331, 150 / 331},
    "TranslateY": {-150 / 331, 150 / 331},
    "Rotate": {30},
    "Color": {0.1, 1.9},
    "Contrast": {0.1, 1.9},
    "Sharpness": {0.1, 1.9},
    "Brightness": {0.1, 1.9},
    "Posterize": {4},
    "Solarize": {0},
    "Patch": {20},
    "AutoContrast": {0},
    "Equalize": {0},
    "Invert": {0},
}


def smooth(rng):
    return np.array(
        Image.fromarray(rng.integers(256, size=(7, 9, 3), dtype=np.uint8)).resize((65, 65), BICUBIC)
    )


IMAGES = {
    "smooth": smooth,
    "noise": lambda rng: rng.integers(256, size=(64, 64, 3), dtype=np.uint8),
    "dim": lambda rng: smooth(rng) // 3 + np.uint8(40),
    "white": lambda rng: np.full((33, 33, 3), 255, np.uint8),
    "two values": lambda rng: np.uint8([10, 200])[rng.integers(2, size=(32, 32, 3))],
    "one dot": lambda rng: np.pad(np.full((1, 1, 3), 99, np.uint8), ((0, 15), (0, 15), (0, 0))),
    "one pixel": lambda rng: np.full((1, 1, 3), 77, np.uint8),
}


def tensor(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def row(code, magnitude=0.0, x=0.0, y=0.0, red=0, green=0, blue=0):
    return Transform(code, magnitude, x, y, red, green, blue)


def drawn_as(*rows):
    """The numbers of one sample."""
    augmentation = np.zeros((3, len(Transform._fields)), np.float32)
    augmentation[: len(rows)] = rows
    return augmentation


def magnitudes(name, levels=(1, 4, 6, 9)):
    operation = OPERATIONS[CODES[name]]
    signs = (-1, 1) if operation.signed else (1,)
    values = {operation.start + operation.span * n / 9 * sign for n in levels for sign in signs}
    return sorted(float(np.float32(value)) for value in values)


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", PILLOW)
def test_pixels_are_pillows_to_the_bit_and_sheared_ones_within_one_grey_level(name, kind, same):
    pixels = IMAGES[kind](np.random.default_rng(0))
    for magnitude in magnitudes(name):
        expected = tensor(np.array(PILLOW[name](Image.fromarray(pixels), magnitude)))
        result = apply(tensor(pixels), drawn_as(row(CODES[name], magnitude)))
        if name.startswith("Shear"):
            same("RandAugment, sheared, in grey levels", result, expected, atol=1)
            difference = (result.int() - expected.int()).abs()
            assert difference.float().mean() < 0.1  # rows that shift by whole pixels: 127.9999
        else:
            same("RandAugment, in grey levels", result, expected)


# Both implementations of one image.
IMPLEMENTATIONS = {
    "host": apply,
    "device": lambda image, augmentation: apply_batch(image[None], augmentation[None])[0],
}
CENTRES = [(0.5, 0.5), (0.0, 0.0), (0.999, 0.999), (0.1, 0.7)]


def with_rectangle(size, x, y, before, after, colour):
    """White, with Pillow's rectangle, whose corners belong to it."""
    picture = Image.new("RGB", (size, size), "white")
    x, y = int(x * size), int(y * size)
    ImageDraw.Draw(picture).rectangle((x - before, y - before, x + after, y + after), fill=colour)
    return tensor(np.array(picture))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("centre", CENTRES)
@pytest.mark.parametrize(("size", "side"), [(224, 113), (448, 225), (225, 113), (65, 33), (1, 1)])
def test_cutout_is_pillows_rectangle_of_half_the_side(size, side, centre, implementation, same):
    image = torch.full((3, size, size), 255, dtype=torch.uint8)
    numbers = drawn_as(row(CUTOUT, 0.5, *centre, 10, 20, 30))
    result = IMPLEMENTATIONS[implementation](image, numbers)
    expected = with_rectangle(size, *centre, side // 2, side // 2, (10, 20, 30))
    same("Cutout, in grey levels", result, expected)


# The official package fills pixel by pixel, from the centre - n // 2 to before the centre + n // 2.
PATCH_SIDES = {1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 12, 7: 16, 8: 18, 9: 20}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("centre", CENTRES)
@pytest.mark.parametrize("level", PATCH_SIDES)
def test_the_patch_of_randaugment_is_as_large_as_in_the_official_package(
    level, centre, implementation
):
    image = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    [magnitude] = magnitudes("Patch", [level])
    numbers = drawn_as(row(CODES["Patch"], magnitude, *centre, 10, 20, 30))
    result = IMPLEMENTATIONS[implementation](image, numbers)
    reach = PATCH_SIDES[level] // 2
    assert torch.equal(result, with_rectangle(64, *centre, reach, reach - 1, (10, 20, 30)))


def test_flip_mirrors_left_and_right():
    image = tensor(IMAGES["noise"](np.random.default_rng(0)))
    np.testing.assert_array_equal(apply(image, drawn_as(row(FLIP))), image.numpy()[:, :, ::-1])


@pytest.mark.parametrize("name", CODES)
def test_apply_leaves_its_input_alone_and_fills_the_slot_of_a_batch(name):
    image = tensor(IMAGES["noise"](np.random.default_rng(0)))
    before, batch = image.clone(), torch.full((3, *image.shape), 77, dtype=torch.uint8)
    magnitude = 4.0 if name == "Posterize" else 0.3
    numbers = drawn_as(row(NOTHING), row(CODES[name], magnitude, 0.5, 0.5))
    result = apply(image, numbers)
    assert torch.equal(image, before)
    assert (result.dtype, result.shape) == (torch.uint8, image.shape)
    assert result.is_contiguous()

    assert apply(image, numbers, out=batch[1]).data_ptr() == batch[1].data_ptr()
    assert torch.equal(batch[1], result)
    assert (batch[[0, 2]] == 77).all()


def test_transforms_are_done_in_order():
    image = tensor(np.full((8, 8, 3), 200, np.uint8))
    invert, darken = row(CODES["Invert"]), row(CODES["Brightness"], 0.5)
    assert apply(image, drawn_as(invert, darken)).unique().tolist() == [27]
    assert apply(image, drawn_as(darken, invert)).unique().tolist() == [155]


def test_nothing_to_do_costs_no_copy():
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    assert apply(image, draw("none", seed=0, epoch=0, indices=[0])[0]) is image


def test_numbers_depend_on_seed_epoch_and_index_and_on_nothing_else():
    keys = [(s, e, i) for s in (0, 1, 2**40) for e in range(5) for i in (0, 1, 9_000_000)]
    once = [draw("recipe", seed, epoch, [index]) for seed, epoch, index in keys]
    np.random.seed(1)  # noqa: NPY002 (the global generators are what must not matter)
    random.seed(1)
    for key, numbers in reversed(list(zip(keys, once, strict=True))):
        seed, epoch, index = key
        beside = draw("recipe", seed, epoch, np.array([5, index, 3]))
        np.testing.assert_array_equal(beside[1:2], numbers)
    assert len({numbers.tobytes() for numbers in once}) == len(keys)


def test_the_recipe_is_cutout_and_then_randaugment():
    both, cuts, others = (draw(p, 3, 1, range(50)) for p in ("recipe", "cutout", "randaugment"))
    assert (both[:, :1] == cuts[:, :1]).all()
    assert (both[:, 1:] == others[:, 1:]).all()
    assert not cuts[:, 1:].any()
    assert not others[:, 0].any()
    assert others[:, 1:].any()


@pytest.mark.parametrize(("policy", "checksum"), [("recipe", 0x629F22C5), ("flip", 0xAAD12B44)])
def test_numbers_are_those_of_all_versions_which_a_resumed_run_goes_on_with(policy, checksum):
    assert zlib.crc32(draw(policy, 7, 3, range(1000)).tobytes()) == checksum


@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("size", [0, 1, 5])
def test_the_numbers_of_a_batch_are_one_float32_array(policy, size):
    numbers = draw(policy, 0, 0, range(size))
    assert (numbers.shape, numbers.dtype) == ((size, 3, 7), np.float32)


def test_flip_policy_mirrors_half_of_the_images_and_does_nothing_else():
    numbers = draw("flip", 0, 0, range(2000))
    assert abs((numbers[:, 0, 0] == FLIP).mean() - 0.5) < 0.04
    numbers[:, 0, 0] = 0
    assert not numbers.any()


# The recipe's distribution. Chi-square bounds are those of one in a thousand.


@pytest.fixture(scope="module")
def drawn():
    return np.concatenate([draw("recipe", 0, epoch, range(20_000)) for epoch in (0, 1)])


def test_numbers_of_neighbours_are_independent_whatever_is_a_step_apart():
    """Seeds, epochs, indices and columns that differ by one: a weak hash shows here first."""
    keys = [(seed, epoch) for seed in range(8) for epoch in range(8)]
    uniform = np.stack([augment._uniform(*key, range(64), 16) for key in keys])
    uniform = uniform.reshape(8, 8, 64, 16)
    values = 16 * uniform
    for axis in range(4):
        here, there = (np.take(values, range(*span), axis) for span in ((0, 7), (1, 8)))
        pairs = (here.astype(int) * 16 + there.astype(int)).ravel().tolist()
        assert chi_square(pairs, range(256)) < 330.5  # 255 degrees of freedom
    assert chi_square(values.astype(int).ravel().tolist(), range(16)) < 37.7  # 15
    assert 0 <= uniform.min() < uniform.max() < 1


def chi_square(values, expected):
    counts = Counter(values)
    assert set(counts) <= set(expected)
    mean = len(values) / len(expected)
    return sum((counts[value] - mean) ** 2 / mean for value in expected)


def test_amounts_at_level_9_are_the_recipes():
    names = [operation.name for operation in OPERATIONS[RANDAUGMENT:]]
    assert sorted(names) == sorted(AT_LEVEL_9)
    for name, expected in AT_LEVEL_9.items():
        assert magnitudes(name, levels=(9,)) == pytest.approx(sorted(expected), abs=1e-6)


def test_cutout_comes_first_always_with_a_uniform_centre_and_colour(drawn):
    cut = drawn[:, 0]
    assert (cut[:, 0] == CUTOUT).all()
    assert (cut[:, 1] == 0.5).all()
    for column, size in zip(cut[:, 2:].T, (1, 1, 256, 256, 256), strict=True):
        assert column.min() >= 0
        assert column.max() < size
        assert chi_square((column * 16 // size).tolist(), range(16)) < 37.7  # 15 degrees of freedom


def test_each_of_two_operations_is_applied_with_probability_half_independently(drawn):
    applied = drawn[:, 1:, 0] != NOTHING
    np.testing.assert_allclose(applied.mean(0), 0.5, atol=0.02)
    np.testing.assert_allclose(applied.all(1).mean(), 0.25, atol=0.02)


@pytest.mark.parametrize("step", [1, 2])
def test_operations_are_uniform_over_the_fifteen(drawn, step):
    codes = drawn[:, step, 0]
    applied = codes[codes != NOTHING].astype(int).tolist()
    assert chi_square(applied, range(RANDAUGMENT, RANDAUGMENT + 15)) < 36.2  # 14


def test_operations_repeat_as_often_as_independent_draws_do(drawn):
    first, second = drawn[:, 1, 0], drawn[:, 2, 0]
    both = (first != NOTHING) & (second != NOTHING)
    assert abs((first == second)[both].mean() - 1 / 15) < 0.02


def test_levels_are_uniform_integers_and_signs_fair_where_the_recipe_has_one(drawn):
    rows = drawn[:, 1:].reshape(-1, len(Transform._fields))
    levels, signs = [], []
    for code, amount in rows[rows[:, 0] != NOTHING][:, :2].tolist():
        operation = OPERATIONS[int(code)]
        if operation.span:
            level = (amount - operation.start) / operation.span * 9
            assert abs(level - round(level)) < 1e-4
            assert level > 0 or operation.signed
            levels.append(abs(round(level)))
            if operation.signed:
                signs.append(level > 0)
    assert chi_square(levels, range(1, 10)) < 26.2  # 8
    assert abs(np.mean(signs) - 0.5) < 0.03


def test_patches_are_grey_and_anywhere(drawn):
    rows = drawn[:, 1:].reshape(-1, len(Transform._fields))
    patches = rows[rows[:, 0] == CODES["Patch"]]
    assert (patches[:, 4:] == (125, 122, 113)).all()
    assert np.ptp(patches[:, 2:4], axis=0).min() > 0.9
    assert abs(np.corrcoef(patches[:, 2], patches[:, 3])[0, 1]) < 0.1
