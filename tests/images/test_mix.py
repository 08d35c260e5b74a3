"""Mixup and CutMix: of images, of labels, and of cells that are not annotated."""

import numpy as np
import pytest
import torch

from asl.images import mix as mix_module
from asl.images.mix import mixing
from asl.images.settings import AugmentSettings

CLASSES = 6


def batch(count=4):
    """Images of one number each, and targets of all three kinds."""
    images = torch.arange(1.0, count + 1).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()
    kinds = torch.tensor([1, 0, -1], dtype=torch.int8)
    drawn = torch.randint(3, (count, CLASSES), generator=torch.Generator().manual_seed(0))
    return images, kinds[drawn]


def mixed(images, targets, epoch=0, number=0, seed=0, **settings):
    images = images.clone()
    return images, mixing(AugmentSettings(**settings), seed)(images, targets, epoch, number)


def share_of_the_other(images, before):
    """How much of each image has come from that on the other end of the batch."""
    first, other = before[:, 0, 0, 0], before.flip(0)[:, 0, 0, 0]
    return (images.mean((1, 2, 3)) - first) / (other - first)


@pytest.mark.parametrize("kind", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_labels_are_mixed_as_images_are(kind):
    before, targets = batch()
    changed = 0
    for number in range(20):
        images, soft = mixed(before, targets, number=number, **kind)
        other = share_of_the_other(images, before)[:, None]
        expected = (1 - other) * targets.clamp(min=0) + other * targets.flip(0).clamp(min=0)
        unknown = (targets == -1) | (targets.flip(0) == -1)
        moved = bool((other > 1e-4).all())
        changed += moved
        if moved:
            assert torch.equal(soft == -1, unknown)
        known = soft != -1
        torch.testing.assert_close(soft[known], expected[known].float(), rtol=0, atol=1e-4)
    assert changed > 10


def test_cutmix_puts_a_rectangle_of_the_other_image_in_and_mixup_blends():
    before, targets = batch()
    blended, _ = mixed(before, targets, mixup=0.8)
    assert len(blended[0].unique()) == 1
    assert 1 < blended[0, 0, 0, 0] < 4
    seen = {
        tuple(mixed(before, targets, number=number, cutmix=1.0)[0][0].unique().tolist())
        for number in range(10)
    }
    assert seen <= {(1.0,), (1.0, 4.0), (4.0,)}
    assert (1.0, 4.0) in seen


def test_what_is_mixed_depends_on_seed_epoch_number_and_rank_alone(monkeypatch):
    before, targets = batch()
    state = np.random.get_state()[1].copy()  # noqa: NPY002

    def key(**changed):
        return mixed(before, targets, mixup=0.8, **changed)[0][0, 0, 0, 0].item()

    keys = [key(), key(epoch=1), key(number=1), key(seed=1)]
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    assert key() == keys[0]
    monkeypatch.setattr(mix_module, "rank", lambda: 1)
    assert len({*keys, key()}) == 5


@pytest.mark.parametrize("count", [1, 5])
def test_an_odd_last_image_stays_as_it_is(count):
    before, targets = batch(count)
    images, soft = mixed(before, targets, mixup=0.8)
    assert torch.equal(images[-1], before[-1])
    assert torch.equal(soft[-1], targets[-1].float())
    assert torch.equal(images, before) == (count == 1)


def test_an_image_without_a_target_is_not_mixed():
    before, targets = batch(5)
    images, soft = mixed(before, targets[:4], mixup=0.8)
    assert len(soft) == 4
    assert torch.equal(images[4], before[4])
    assert not torch.equal(images[:4], before[:4])


def test_some_batches_may_be_left_alone_and_all_where_nothing_is_asked_for():
    assert mixing(AugmentSettings(), 0) is None
    before, targets = batch()
    untouched = 0
    for number in range(40):
        images, soft = mixed(before, targets, number=number, mixup=0.8, mixup_prob=0.5)
        if torch.equal(images, before):
            untouched += 1
            assert torch.equal(soft, targets.float())
    assert 10 < untouched < 30
