"""Features once: a run with `cache_features` is the run without it, in seconds."""

import os
import signal

import numpy as np
import pytest
import torch
from run_log import figures_of

from asl.data.readers import read
from asl.errors import Interrupted, UsageError
from asl.evaluation.evaluate import evaluate
from asl.images import loader
from asl.images.features import FeatureBatches
from asl.images.loader import Batches
from asl.images.settings import AugmentSettings, ImageSettings
from asl.models import checkpoint
from asl.models.build import create_model
from asl.models.heads import take_features, without_head
from asl.training import features as features_module
from asl.training.dry_run import dry_run
from asl.training.fit import fit
from asl.training.step import Training

FROZEN = {"freeze": "backbone", "augment": "none", "lr": 1e-2}
CACHED = {**FROZEN, "cache_features": True}


def assert_same(one, other):
    """The logs of two runs are equal to 1e-4 of a percent of mAP, and their weights to rounding."""
    for row, cached in zip(figures_of(one), figures_of(other), strict=True):
        assert cached == pytest.approx(row, abs=1e-4)
    first, second = checkpoint.load(one / "last.pt"), checkpoint.load(other / "last.pt")
    for which in ("ema", "regular"):
        assert first[which].keys() == second[which].keys()
        for key, value in first[which].items():
            torch.testing.assert_close(second[which][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        {"model_name": "test_resnet"},
        {"model_name": "test_efficientnet", "head": "bottleneck"},
        {"model_name": "test_vit", "accumulate": 2, "running_prior": True},
        {"model_name": "test_resnet", "amp": "bf16", "adaptive_gamma": 0.3},
    ],
    ids=str,
)
def test_it_learns_from_features_what_it_learns_from_images(
    settings, model, small_shapes, tmp_path
):
    plain, cached = (
        fit(settings(small_shapes, tmp_path / name, **options, **model))
        for name, options in (("plain", FROZEN), ("cached", CACHED))
    )
    assert_same(plain, cached)
    assert len({row["mAP_ema"] for row in figures_of(cached)}) == 3  # it does learn


def test_every_image_is_read_once(settings, small_shapes, tmp_path, monkeypatch, capsys):
    read_squished, seen = loader.read_squished, []
    monkeypatch.setattr(
        loader, "read_squished", lambda *a, **n: seen.append(a[0]) or read_squished(*a, **n)
    )
    fit(settings(small_shapes, tmp_path, **CACHED))
    assert len(seen) == len({*seen}) == 40 + 20
    assert "features of 40 and 20 images, 96 each: 0.0 MB" in capsys.readouterr().out


def test_its_checkpoint_is_measured_on_images_with_no_option_but_the_path(
    settings, measuring, small_shapes, tmp_path
):
    run = fit(settings(small_shapes, tmp_path, **CACHED))
    best = max(max(row["mAP_ema"], row["mAP_regular"]) for row in figures_of(run))
    assert evaluate(measuring(small_shapes, run / "best.pt"))["mAP"] == pytest.approx(
        best, abs=1e-4
    )


@pytest.mark.parametrize("step", [3, 5, 12])
@pytest.mark.parametrize("then", [True, False])
def test_it_goes_on_where_it_was_stopped_with_or_without_images(
    settings, before, then, step, small_shapes, tmp_path
):
    whole = fit(settings(small_shapes, tmp_path / "whole", **CACHED))
    config = settings(small_shapes, tmp_path / "run", **CACHED)
    kill = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with before(step, Training, "step", kill), pytest.raises(Interrupted):
        fit(config)
    fit(config.with_settings(resume="last", cache_features=then))
    assert_same(whole, tmp_path / "run")


def test_it_can_be_stopped_while_features_are_computed(settings, before, small_shapes, tmp_path):
    config = settings(small_shapes, tmp_path / "run", **CACHED)
    kill = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with before(2, features_module, "score", kill), pytest.raises(Interrupted):
        fit(config)
    assert checkpoint.load(tmp_path / "run/last.pt")["training"]["steps"] == 0
    fit(config.with_settings(resume="last"))
    assert_same(fit(settings(small_shapes, tmp_path / "whole", **CACHED)), tmp_path / "run")


def test_a_run_that_is_complete_computes_none(settings, small_shapes, tmp_path, monkeypatch):
    config = settings(small_shapes, tmp_path, **CACHED, epochs=1)
    fit(config)
    monkeypatch.setattr(loader, "read_squished", None)
    fit(config.with_settings(resume="last"))


@pytest.mark.parametrize(("shuffle", "window"), [(True, 0), (False, 0), (True, 20)])
def test_features_come_in_the_order_of_the_images(shuffle, window, small_shapes, monkeypatch):
    monkeypatch.setattr(loader, "BLOCK", 4)
    annotations = read("coco", small_shapes, "train2014")
    numbers = torch.arange(40.0)[:, None]
    cached = FeatureBatches(annotations, numbers, 12, shuffle=shuffle, seed=3, window=window)
    settings = ImageSettings(image_size=16, batch_size=12, workers=0)
    augment = AugmentSettings(augment="none", shuffle=f"blocks:{window}" if window else "full")
    images = Batches(annotations, settings, augment=augment, shuffle=shuffle, seed=3)
    assert len(cached) == len(images) == 4
    for epoch, start in ((0, 0), (1, 2)):
        pairs = list(zip(cached.epoch(epoch, start), images.epoch(epoch, start), strict=True))
        assert len(pairs) == 4 - start
        for features, batch in pairs:
            assert torch.equal(features.targets, batch.targets)
            labels = annotations.dense()[features.images[:, 0].int()]
            assert np.array_equal(labels, features.targets)


def test_a_model_that_takes_features_gives_its_logits():
    model = create_model("test_efficientnet", 5).eval()
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        expected, features = model(images), without_head(model, 64)(images)
        names = list(model.state_dict())
        take_features(model)
        torch.testing.assert_close(model(features), expected)
    assert list(model.state_dict()) == names
    assert (model.num_classes, model.pretrained_cfg["architecture"]) == (5, "test_efficientnet")


def twice_its_logits(model):
    kind = type(model)
    forward = lambda self, images: 2 * kind.forward(self, images)  # noqa: E731
    model.__class__ = type("Twice", (kind,), {"forward": forward})
    return model


def test_a_model_that_is_more_than_a_backbone_and_a_head_is_an_error_of_usage():
    with pytest.raises(UsageError, match="Twice is more than a backbone and a head"):
        without_head(twice_its_logits(create_model("test_resnet", 5)), 48)
    with pytest.raises(UsageError, match="is more than a backbone and a head"):
        without_head(create_model("deit_tiny_distilled_patch16_224", 5), 224)


def test_features_that_the_memory_cannot_hold_are_an_error_before_they_are_computed(
    settings, small_shapes, tmp_path, monkeypatch
):
    size = 4 * 96 * 60
    monkeypatch.setattr(
        features_module.os, "sysconf", {"SC_PHYS_PAGES": 2 * size - 1, "SC_PAGE_SIZE": 1}.get
    )
    monkeypatch.setattr(loader, "read_squished", None)
    with pytest.raises(UsageError, match=r"take 0.0 GB, too much .*: drop cache_features"):
        fit(settings(small_shapes, tmp_path, **CACHED))


def test_a_dry_run_says_what_they_take(settings, small_shapes, tmp_path):
    text = dry_run(settings(small_shapes, tmp_path / "run", **CACHED))
    assert f"features       {4 * 96 * 60 / 1e6:.1f} MB in the memory of each process" in text
    assert "features" not in dry_run(settings(small_shapes, tmp_path / "run", **FROZEN))
