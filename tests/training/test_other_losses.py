"""Losses of others behind --loss, and ASL for images with one label: sums, cells, whole runs."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from run_log import figures_of, rows_of
from timm.loss.distribution_balanced_loss import DistributionBalancedLoss
from timm.loss.poly_loss import PolyBinaryCrossEntropy
from timm.loss.two_way_loss import TwoWayLoss
from timm.loss.zlpr_loss import ZlprLoss
from torch import nn

from asl.data.annotations import PRESENT, UNANNOTATED, Annotations
from asl.data.readers import read
from asl.errors import DataError, UsageError
from asl.evaluation.evaluate import evaluate
from asl.evaluation.predict import predict
from asl.losses import ASLSingleLabel
from asl.models import checkpoint
from asl.robust_losses import SPLC
from asl.training import fit as loop
from asl.training.fit import fit
from asl.training.loss import create_loss
from asl.training.settings import LossSettings, StepSettings, TrainConfig
from asl.training.step import Training

COUNTS, IMAGES = [1, 2, 3, 4, 5, 6, 0], 40  # of the classes in a training set
OF_TIMM = {
    "poly": PolyBinaryCrossEntropy(reduction="batchmean"),
    "zlpr": ZlprLoss(),
    "db": DistributionBalancedLoss(COUNTS, IMAGES, reduction="batchmean"),
    "twoway": TwoWayLoss(),
}
OF_SEVERAL_LABELS = [*OF_TIMM, "hill", "splc"]
ALL = [*OF_SEVERAL_LABELS, "asl_single"]
SUMS = ["poly", "zlpr", "db", "hill", "splc", "asl_single"]


def loss_of(name, **settings):
    """As the step calls it: SPLC in an epoch that corrects labels."""
    loss = create_loss(LossSettings(loss=name, **settings), False, None, COUNTS, IMAGES)
    return (lambda x, y: loss(x, y, 1)) if name == "splc" else loss


def batch(name, lowest=0):
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(9, 7, generator=draw)
    targets = torch.randint(lowest, 2, (9, 7), generator=draw, dtype=torch.int8)
    targets[3], targets[4] = 0, 1  # an image without a positive, and one without a negative
    targets[:, 2] = 0
    if name == "asl_single":
        targets = torch.eye(7, dtype=torch.int8)[torch.randint(0, 7, (9,), generator=draw)]
    return logits, targets


def value_and_grad(loss, logits, targets):
    logits = logits.clone().requires_grad_()
    value = loss(logits, targets)
    (grad,) = torch.autograd.grad(value, logits)
    return value.detach(), grad


@pytest.mark.parametrize("name", OF_TIMM)
def test_it_is_timms_times_the_images(name):
    logits, targets = batch(name)
    value, grad = value_and_grad(loss_of(name), logits, targets)
    expected, expected_grad = value_and_grad(OF_TIMM[name], logits, targets)
    torch.testing.assert_close(value, 9 * expected)
    torch.testing.assert_close(grad, 9 * expected_grad)


def test_asl_of_one_label_is_the_official_class_times_the_images():
    logits, targets = batch("asl_single")
    expected = 9 * ASLSingleLabel()(logits, targets.argmax(dim=1))
    torch.testing.assert_close(loss_of("asl_single")(logits, targets), expected)
    expected = 9 * ASLSingleLabel(gamma_pos=1, gamma_neg=2)(logits, targets.argmax(dim=1))
    changed = loss_of("asl_single", gamma_pos=1.0, gamma_neg=2.0)
    torch.testing.assert_close(changed(logits, targets), expected)


@pytest.mark.parametrize("name", SUMS)
def test_it_is_a_sum_over_images(name):
    logits, targets = batch(name)
    loss = loss_of(name)
    value, grad = value_and_grad(loss, logits, targets)
    parts = [value_and_grad(loss, logits[i : i + 1], targets[i : i + 1]) for i in range(9)]
    torch.testing.assert_close(value, sum(part for part, _ in parts))
    torch.testing.assert_close(grad, torch.cat([part for _, part in parts]))
    value, grad = value_and_grad(loss, logits[:0], targets[:0])  # a rank without an image
    assert (value, grad.shape) == (0, (0, 7))


@pytest.mark.parametrize("name", OF_SEVERAL_LABELS)
def test_cells_that_are_not_annotated_cost_nothing_and_have_no_gradient(name):
    logits, targets = batch(name, lowest=-1)
    targets[5] = UNANNOTATED
    unknown = targets == UNANNOTATED
    loss = loss_of(name)
    value, grad = value_and_grad(loss, logits, targets)
    assert (grad[unknown] == 0).all()
    assert grad.isfinite().all()
    for other in (-50.0, 50.0):
        found, other_grad = value_and_grad(loss, logits.masked_fill(unknown, other), targets)
        assert found == value
        assert torch.equal(other_grad, grad)


@pytest.mark.parametrize("name", OF_SEVERAL_LABELS)
def test_a_class_that_no_image_is_annotated_for_is_as_if_it_were_not_there(name):
    logits, targets = batch(name)
    targets[:, 5] = UNANNOTATED
    there = [0, 1, 2, 3, 4, 6]
    loss = loss_of(name)
    value, grad = value_and_grad(loss, logits, targets)
    if name == "db":
        counts = [COUNTS[c] for c in there]
        loss = create_loss(LossSettings(loss="db"), True, None, counts, IMAGES)
    expected, expected_grad = value_and_grad(loss, logits[:, there], targets[:, there])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad[:, there], expected_grad)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(name, dtype):
    logits, targets = batch(name)
    if name != "asl_single":
        targets[6, 1] = UNANNOTATED
    logits[0, :2] = torch.tensor([-90.0, 90.0])
    logits = logits.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value, grad = value_and_grad(loss_of(name), logits, targets)
    expected, expected_grad = value_and_grad(loss_of(name), logits.float(), targets)
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)
    assert value == expected
    torch.testing.assert_close(grad, expected_grad.to(dtype))


def step_of(name, *parts):
    """Losses and norms of the gradient of a step from these parts of the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
    loss = create_loss(LossSettings(loss=name), False, None, COUNTS, IMAGES)
    settings = StepSettings(grad_clip=1e9, accumulate=len(parts))
    training = Training(
        model, loss, settings, batches_per_epoch=len(parts), device=torch.device("cpu")
    )
    training.epoch = 1
    _, targets = batch(name)
    images = torch.randn(9, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    for part in parts:
        training.step(images[part] if len(targets[part]) else images[:1], targets[part])
    return training.losses[0].item(), training.gradient_norms[0].item()


def two_ranks(rank, init, queue):
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    # In the second of two batches rank 1 has an image without a target.
    parts = [(slice(0, 3), slice(5, 9)), (slice(3, 5), slice(9, 9))][rank]
    queue.put([step_of(name, *parts) for name in SUMS])
    dist.destroy_process_group()


def test_accumulated_batches_and_ranks_add_up_to_the_batch_of_one(answers_of_two_ranks):
    alone = [step_of(name, slice(0, 9)) for name in SUMS]
    accumulated = [step_of(name, slice(0, 4), slice(4, 9)) for name in SUMS]
    expected = [pytest.approx(each, rel=1e-5) for each in alone]
    assert accumulated == expected
    assert answers_of_two_ranks(two_ranks) == [expected] * 2


def test_two_way_takes_the_images_of_a_step_in_one_batch(monkeypatch):
    with pytest.raises(UsageError, match=r"twoway compares the images of a batch: .* accumulate"):
        TrainConfig.of(loss="twoway", accumulate=2)
    monkeypatch.setattr(loop, "world_size", lambda: 2)
    with pytest.raises(UsageError, match=r"twoway compares .* train with one process"):
        fit(TrainConfig.of(loss="twoway"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "zlpr", "gamma_neg": 1.0}, "loss zlpr takes neither gamma_neg, gamma_pos nor"),
        ({"loss": "hill", "clip": 0.05}, "loss hill takes neither"),
        ({"loss": "asl_single", "clip": 0.05}, "loss asl_single takes no clip"),
        ({"loss": "poly", "adaptive_gamma": 0.1}, "adaptive_gamma has a meaning for loss asl and"),
        ({"loss": "db", "unannotated": "negative"}, "unannotated has a meaning for loss asl and f"),
        ({"loss": "splc", "gamma_unann": 1.0}, "gamma_unann has a meaning"),
        ({"poly_epsilon": 1.0}, "poly_epsilon has a meaning for loss poly alone"),
        ({"loss": "splc", "hill_lamb": 1.4}, "hill_lamb has a meaning for loss hill alone"),
        ({"loss": "hill", "splc_tau": 0.5}, "splc_tau has a meaning for loss splc alone"),
        ({"logit_margin": 0.5}, "logit_margin has a meaning for loss hill and splc alone"),
        ({"loss": "poly", "poly_epsilon": -1.1}, "poly_epsilon is -1.1"),
        ({"loss": "asl_single", "running_prior": True}, "running_prior is for losses of several"),
    ],
)
def test_what_a_loss_has_no_use_for_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig.of(**settings)


@pytest.mark.parametrize("name", LossSettings.model_fields["loss"].annotation.__args__)
def test_settings_with_all_numbers_written_down_are_settings_again(name):
    explicit = TrainConfig.of(loss=name).explicit()
    assert TrainConfig.of(**explicit.flat()) == explicit
    assert explicit.flat()["clip"] == (0.05 if name == "asl" else 0)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("poly", {"poly_epsilon": -1.0}),
        ("hill", {"hill_lamb": 1.2}),
        ("hill", {"logit_margin": 0.5}),
        ("splc", {"splc_tau": 0.4}),
        ("splc", {"logit_margin": 0.0}),
    ],
)
def test_every_option_changes_the_loss(name, option):
    logits, targets = batch(name)
    assert loss_of(name, **option)(logits, targets) != loss_of(name)(logits, targets)


def test_classes_are_counted_as_if_cells_not_annotated_were_like_the_others():
    labels = np.array([[1, 1, -1], [0, 1, -1], [-1, 1, -1], [-1, 0, -1]])
    rows, columns = np.indices(labels.shape).reshape(2, -1)
    names = np.array([b"a", b"b", b"c", b"d"])
    partial = Annotations.from_cells(
        ".", names, ("x", "y", "z"), rows, columns, labels.ravel(), UNANNOTATED
    )
    assert partial.estimated_counts().tolist() == [2, 3, 0]


def test_db_gets_the_frequencies_of_the_training_set(settings, small_shapes, tmp_path):
    run = fit(settings(small_shapes, tmp_path, loss="db", epochs=1))
    state = checkpoint.load(run / "last.pt")["training"]["loss"]
    train_set = read("coco", small_shapes, "train2014")
    expected = DistributionBalancedLoss(train_set.counts(PRESENT), len(train_set))
    assert len(train_set) == 40
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(state[f"loss.{name}"], value)


@pytest.fixture(scope="module")
def one_label(small_shapes, tmp_path_factory):
    """The images of both splits in a table, with one label each: settings of such data."""
    root = tmp_path_factory.mktemp("one_label")
    with (root / "labels.csv").open("w") as file:
        write = csv.writer(file)
        write.writerow(["path", "split", "labels"])
        for split in ("train", "val"):
            images = read("coco", small_shapes, f"{split}2014")
            for row in range(len(images)):
                present = np.flatnonzero(images.labels(row) == PRESENT)[0]
                write.writerow([images.path(row), split, images.classes[present]])
    return {"data": str(root / "labels.csv"), "dataset": "table", "image_folder": str(small_shapes)}


def test_db_takes_a_training_set_of_one_image(settings, one_label, tmp_path):
    header, first, *others = Path(one_label["data"]).read_text().splitlines()
    validated = [line for line in others if ",val," in line]
    (tmp_path / "labels.csv").write_text("\n".join([header, first, *validated]))
    data = {**one_label, "data": str(tmp_path / "labels.csv")}
    [row] = rows_of(fit(settings("", tmp_path / "run", loss="db", epochs=1, **data)))
    assert row["loss"] > 0


@pytest.mark.parametrize("name", ALL)
def test_a_run_learns(name, settings, small_shapes, one_label, tmp_path):
    data = one_label if name == "asl_single" else {}
    run = fit(settings(small_shapes, tmp_path, loss=name, lr=3e-3, epochs=4, **data))
    losses = [row["loss"] for row in rows_of(run)]
    # SPLC makes other labels of the same ones after the first epoch.
    assert losses[-1] < 0.95 * losses[name == "splc"]


@pytest.mark.parametrize("name", OF_SEVERAL_LABELS)
def test_a_run_on_partial_labels_is_finite(name, settings, small_shapes, tmp_path):
    run = fit(settings(small_shapes, tmp_path, loss=name, epochs=2, simulate_partial="fpc:3"))
    assert all(row["loss"] > 0 for row in rows_of(run))


def test_splc_is_told_the_epoch_also_in_a_run_that_goes_on(
    settings, small_shapes, tmp_path, monkeypatch
):
    seen, forward = [], SPLC.forward
    monkeypatch.setattr(
        SPLC,
        "forward",
        lambda self, x, y, epoch: (seen.append(epoch), forward(self, x, y, epoch))[1],
    )
    whole = fit(settings(small_shapes, tmp_path / "whole", loss="splc", splc_tau=0.3))
    assert seen == [0] * 5 + [1] * 5 + [2] * 5
    part = settings(small_shapes, tmp_path / "part", loss="splc", splc_tau=0.3, stop_epoch=1)
    fit(part)
    resumed = fit(part.with_settings(stop_epoch=None, resume="last"))
    assert seen[15:] == seen[:15]
    assert figures_of(resumed) == figures_of(whole)


def test_images_with_another_number_of_labels_are_refused_for_asl_of_one_label(
    settings, one_label, tmp_path
):
    lines = Path(one_label["data"]).read_text().splitlines()
    for cell, count in (("", 0), ("a|b", 2)):
        path, split, _ = lines[3].split(",")
        changed = [*lines[:3], f"{path},{split},{cell}", *lines[4:]]
        (tmp_path / "labels.csv").write_text("\n".join(changed) + "\n")
        data = {**one_label, "data": str(tmp_path / "labels.csv")}
        config = settings("", "", loss="asl_single", **data)
        with pytest.raises(DataError, match=rf"1 of 40 .* the first is {path} with {count}$"):
            fit(config)


def test_cells_that_are_not_annotated_are_refused_for_asl_of_one_label(
    settings, one_label, tmp_path
):
    config = settings("", tmp_path / "run", loss="asl_single", **one_label)
    with pytest.raises(DataError, match=r"loss asl_single .* cannot leave out cells that are not"):
        fit(config.with_settings(simulate_partial="rps:0.5"))
    assert not (tmp_path / "run").exists()


def test_scores_of_a_model_of_one_label_are_a_softmax(
    settings, measuring, labelling, small_shapes, one_label, tmp_path
):
    run = fit(settings("", tmp_path, loss="asl_single", lr=3e-3, **one_label))
    measured = evaluate(measuring("", run / "best.pt", threshold=0, top_k=1, **one_label))
    best = max(row[f"mAP_{kind}"] for row in rows_of(run) for kind in ("ema", "regular"))
    assert measured["mAP"] == pytest.approx(best, abs=1e-3)

    found = predict(labelling(small_shapes / "val2014", run / "best.pt", top_k=24))
    for image in found:
        assert sum(label["score"] for label in image["labels"]) == pytest.approx(1, abs=2e-3)
    with Path(one_label["data"]).open() as file:
        truth = {row["path"]: row["labels"] for row in csv.DictReader(file)}
    right = [image["labels"][0]["name"] == truth[str(image["file"])] for image in found]
    assert measured["at_top_k"]["OP"] == pytest.approx(100 * np.mean(right))
