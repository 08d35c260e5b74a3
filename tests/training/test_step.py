"""The training step against the official one, on a small network and on photographs."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from asl.data.annotations import PRESENT
from asl.data.readers import read
from asl.distributed import pick_device, precision
from asl.errors import TrainingError, UsageError
from asl.models.build import create_model
from asl.models.ml_decoder import MLDecoder
from asl.models.weights import load_weights
from asl.training import step as step_module
from asl.training.loss import create_loss
from asl.training.settings import LossSettings, StepSettings
from asl.training.step import Training, create_optimizer

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")


def golden_network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.01),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 20),
    ).to(memory_format=torch.channels_last)


def training_of(model, *, amp="off", loss=None, steps_per_epoch=5, device=CPU, **settings):
    return Training(
        model.to(device),
        create_loss(loss or LossSettings()),
        StepSettings(**settings),
        batches_per_epoch=steps_per_epoch,
        device=device,
        amp=amp,
    )


def states_of(tensors, name):
    state = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def test_losses_learning_rates_and_weights_follow_the_official_trajectory(device, same):
    tensors = load_file(GOLDEN / "reference.safetensors")
    golden = json.loads((GOLDEN / "reference.json").read_text())["training"]
    model = golden_network()
    model.load_state_dict(states_of(tensors, "init"), strict=False)
    loss = LossSettings(**{name: golden[name] for name in ("gamma_neg", "gamma_pos", "clip")})
    taken = ("lr", "weight_decay", "ema_decay", "epochs", "pct_start")
    taken = {name: golden[name] for name in taken}
    training = training_of(model, loss=loss, device=device, **taken)
    targets = tensors["targets"].to(device)

    losses, rates = [], []
    for _ in range(golden["epochs"]):
        for images in tensors["images"].to(device):
            rates.append(training.lr)
            losses.append(training.step(images, targets).item())

    same("training step: losses", losses, golden["losses"], rtol=1e-4)
    same("schedule", rates, golden["lrs"], rtol=1e-9)
    parts = {"final": "weights after them, with decay groups", "ema": "EMA"}
    for name, state in (("final", model), ("ema", training.ema.module)):
        for key, expected in states_of(tensors, name).items():
            same(parts[name], state.state_dict()[key], expected, rtol=1e-4, atol=1e-4)


def drawn_by_name(params, salt):
    """Weights of the official names, each drawn from a generator that its name seeds."""
    state = {}
    for name, shape in params.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{salt}{name}".encode()))
        rand = lambda: torch.rand(shape, generator=generator)  # noqa: B023, E731
        randn = lambda: torch.randn(shape, generator=generator)  # noqa: B023, E731
        if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            state[name] = 0.5 + rand()
        elif len(shape) == 1:
            state[name] = 0.1 * randn()
        else:
            # Times the reciprocal: another rounding of float32 moves the losses by 1e-7.
            state[name] = randn() * (1 / math.sqrt(math.prod(shape[1:])))
    return state


def photographs(annotations, rows, size):
    """(B, 3, S, S) float64 in [0, 1], resized by Pillow as torchvision's Resize does."""
    images = []
    for row in rows:
        with Image.open(annotations.path(row)) as picture:
            small = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        images.append(torch.from_numpy(np.array(small)).permute(2, 0, 1).float().div(255).double())
    return torch.stack(images)


# float64 has no fast convolutions: a step takes eight seconds of a core.
@pytest.mark.parametrize("steps", [7, pytest.param(30, marks=pytest.mark.long)])
def test_official_steps_on_photographs_are_followed(steps, voc_root, tmp_path, same):
    golden = json.loads((GOLDEN / "photos_training.json").read_text())
    train_set, val_set = (read("voc", voc_root, split) for split in ("train", "val"))
    size, batch = golden["image_size"], golden["batch"]
    assert [Path(val_set.path(row)).stem for row in range(6)] == golden["val"]
    torch.save({"model": drawn_by_name(golden["params"], golden["salt"])}, tmp_path / "start.pt")
    model = create_model(golden["model"], golden["num_classes"])
    load_weights(model, tmp_path / "start.pt")
    training = training_of(
        model.double(),
        lr=golden["max_lr"],
        pct_start=golden["pct_start"],
        weight_decay=golden["weight_decay"],
        ema_decay=golden["ema_decay"],
        epochs=1,
        steps_per_epoch=golden["steps"],
    )
    rates = []
    for first in range(0, batch * steps, batch):
        rows = range(first, first + batch)
        targets = torch.tensor(np.stack([train_set.labels(row) for row in rows]) == PRESENT)
        rates.append(training.lr)
        training.step(photographs(train_set, rows, size), targets)

    same("their schedule", rates, golden["lrs"][:steps], rtol=1e-12)
    losses = torch.stack(training.losses).tolist()
    same("training step on photographs, float64", losses, golden["losses"][:steps], rtol=1e-8)
    if steps < golden["steps"]:
        return
    seen = photographs(val_set, range(6), size)
    for name, trained in (("logits", training.model), ("ema_logits", training.ema.module)):
        with torch.no_grad():
            logits = trained.eval()(seen)
        same("logits after them, regular and EMA", logits, torch.tensor(golden[name]), atol=1e-6)


def decoder_network():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), MLDecoder(8, 20))
    return model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("network", [golden_network, decoder_network])
def test_a_compiled_model_takes_the_same_steps(network, monkeypatch):
    monkeypatch.setattr("asl.models.ml_decoder.DROPOUT", 0.0)  # compiled, it draws other numbers
    torch.manual_seed(0)
    images, targets = torch.rand(4, 3, 16, 16), torch.randint(0, 2, (4, 20))
    losses = []
    for compiled in (False, True):
        torch.manual_seed(1)
        training = training_of(network(), compile=compiled, lr=1e-3, epochs=1)
        losses.append([training.step(images, targets).item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def some_images(device):
    return torch.rand(4, 3, 16, 16).to(device), torch.randint(0, 2, (4, 20)).to(device)


def test_bfloat16_steps_stay_near_those_in_float32(device):
    images, targets = some_images(device)
    losses = []
    for amp in ("off", "bf16"):
        torch.manual_seed(1)
        training = training_of(golden_network(), amp=amp, device=device, lr=1e-2, epochs=1)
        losses.append([training.step(images, targets).item() for _ in range(3)])
        assert all(p.dtype == torch.float32 for p in training.model.parameters())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def linear_training(device=CPU, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    images, targets = torch.rand(2, 3, 2, 2), torch.randint(0, 2, (2, 4))
    return training_of(model, device=device, **settings), images.to(device), targets.to(device)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_gradients_are_clipped_at_their_true_size_whatever_the_loss_scale(amp, device):
    training, images, targets = linear_training(device, amp=amp, grad_clip=1e-3, weight_decay=0)
    share = 1 - training.optimizer.param_groups[0]["betas"][0]
    training.step(images, targets)
    # After one step Adam's first moment is this share of the gradient.
    moments = [state["exp_avg"] for state in training.optimizer.state.values()]
    norm = torch.nn.utils.get_total_norm(moments).item() / share
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_gradients_below_the_limit_are_left_alone(device):
    steps = []
    for grad_clip in (None, 1e6):
        training, images, targets = linear_training(device, grad_clip=grad_clip)
        training.step(images, targets)
        steps.append(training.model[1].weight.clone())
    assert torch.equal(*steps)


def test_biases_and_vectors_are_not_decayed():
    model = golden_network()
    model.register_parameter("scale", nn.Parameter(torch.ones(3)))
    model[0].weight.requires_grad_(False)
    plain, decayed = create_optimizer(model, StepSettings(weight_decay=0.3)).param_groups
    assert [plain["weight_decay"], decayed["weight_decay"]] == [0, 0.3]
    assert {id(p) for p in decayed["params"]} == {id(model[5].weight)}
    names = [model.scale, model[1].weight, model[1].bias, model[5].bias]
    assert {id(p) for p in plain["params"]} == {id(p) for p in names}


def test_all_of_an_ml_decoder_is_trained_and_averaged_but_its_queries():
    torch.manual_seed(0)
    model = create_model("test_resnet", 30, "ml_decoder")
    before = {name: tensor.clone() for name, tensor in model.fc.state_dict().items()}
    training = training_of(model, lr=1e-2, epochs=1, weight_decay=0.3)
    images, targets = torch.rand(4, 3, 64, 64), torch.randint(0, 2, (4, 30))
    for _ in range(2):
        training.step(images, targets)
    for head in (model.fc, training.ema.module.fc):
        state = head.state_dict()
        same = {name for name, tensor in before.items() if torch.equal(tensor, state[name])}
        assert same == {"decoder.query_embed.weight"}
    plain, decayed = ({id(p) for p in g["params"]} for g in training.optimizer.param_groups)
    assert id(model.fc.decoder.duplicate_pooling) in decayed
    assert id(model.fc.decoder.layers[0].multihead_attn.in_proj_weight) in decayed
    assert id(model.fc.decoder.duplicate_pooling_bias) in plain


def test_adamw_decouples_the_decay_and_adam_does_not():
    moved = {}
    for optimizer in ("adam", "adamw"):
        training, images, targets = linear_training(optimizer=optimizer, weight_decay=1, epochs=1)
        training.model[1].weight.register_hook(lambda gradient: 0 * gradient)
        before = training.model[1].weight.clone()
        training.step(images, targets)
        moved[optimizer] = (before - training.model[1].weight).detach() / before.abs()
    lr = 4e-6  # where the schedule begins
    torch.testing.assert_close(
        moved["adamw"] * before.sign(), torch.full((4, 12), lr), rtol=0.1, atol=0
    )
    # A full step of lr towards zero, as Adam makes it whatever the size of the gradient.
    torch.testing.assert_close(moved["adam"] * before, torch.full((4, 12), lr), rtol=0.1, atol=0)


def test_the_schedule_runs_over_all_epochs():
    training, images, targets = linear_training(epochs=4, lr=1e-2)
    rates = []
    for _ in range(5 * 4):
        rates.append(training.lr)
        training.step(images, targets)
    assert np.argmax(rates) == 0.2 * 20 - 1
    assert max(rates) == pytest.approx(1e-2)
    assert rates[0] == pytest.approx(1e-2 / 25)
    assert rates[-1] < 1e-6


def test_a_rise_of_exactly_one_step_is_a_rise():
    training, images, targets = linear_training(epochs=1, pct_start=0.2, lr=1e-2)
    rates = [training.lr]
    training.step(images, targets)
    assert rates[0] == pytest.approx(1e-2 / 25)
    assert training.lr == pytest.approx(1e-2, rel=0.2)


class Noise(nn.Module):
    """Adds what dropout would draw, and remembers it."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, x):
        self.drawn.append(torch.rand(3).tolist())
        return x


def noise_of(steps, rank, seed, monkeypatch):
    monkeypatch.setattr(step_module, "rank", lambda: rank)
    noise = Noise()
    model = nn.Sequential(noise, nn.Flatten(), nn.Linear(12, 4))
    training = training_of(model, seed=seed)
    images, targets = torch.rand(2, 3, 2, 2), torch.randint(0, 2, (2, 4))
    for _ in range(steps):
        training.step(images, targets)
    return noise.drawn


def test_dropout_draws_anew_by_seed_step_and_rank_and_repeats_itself(monkeypatch):
    first = noise_of(3, rank=0, seed=0, monkeypatch=monkeypatch)
    assert first == noise_of(3, rank=0, seed=0, monkeypatch=monkeypatch)
    other_rank = noise_of(3, rank=1, seed=0, monkeypatch=monkeypatch)
    other_seed = noise_of(3, rank=0, seed=1, monkeypatch=monkeypatch)
    everything = [tuple(drawn) for drawn in first + other_rank + other_seed]
    assert len({*everything}) == 9


def test_the_average_moves_towards_weights_and_statistics_by_the_decay(device):
    training = training_of(golden_network(), device=device, ema_decay=0.75)
    before = {name: t.clone() for name, t in training.ema.module.state_dict().items()}
    training.step(*some_images(device))
    after, weights = training.ema.module.state_dict(), training.model.state_dict()
    for name in ("0.weight", "1.running_mean", "5.bias"):
        expected = 0.75 * before[name] + 0.25 * weights[name]
        torch.testing.assert_close(after[name], expected)
        assert not torch.equal(after[name], before[name])


def test_with_a_warm_up_the_first_averages_are_nearly_the_weights():
    training = training_of(golden_network(), ema_decay=0.9997, ema_warmup=True)
    training.step(torch.rand(4, 3, 16, 16), torch.randint(0, 2, (4, 20)))
    assert training.ema.get_decay(1) < 0.5
    distance = (training.ema.module[0].weight - training.model[0].weight).abs().max()
    assert distance < 1e-3 * training.settings.lr or distance < 1e-5


def test_precision_is_float32_for_training_on_a_cpu_unless_asked_for():
    assert precision("auto", CPU, training=True) is None
    assert precision("off", CPU, training=False) is None
    assert precision("bf16", CPU, training=True) == torch.bfloat16


def test_a_device_that_is_not_there_is_an_error_of_usage():
    assert pick_device("cpu") == CPU
    with pytest.raises(UsageError, match="nonsense"):
        pick_device("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="cuda"):
            pick_device("cuda")


def test_gradients_that_overflow_again_and_again_are_an_error(device):
    training, images, targets = linear_training(device, amp="fp16")
    training.epoch = 2
    start = training.model[1].weight.clone()
    training.model[1].weight.register_hook(lambda gradient: gradient * math.inf)
    for _ in range(16):
        training.step(images, targets)
    assert len(training.finite_losses()) == 16  # a few are in the nature of float16
    training.step(images, targets)
    assert torch.equal(training.model[1].weight, start)
    with pytest.raises(TrainingError, match=r"epoch 3: .*16 steps.* lower --lr, .*--amp bf16"):
        training.finite_losses()


def test_a_loss_that_is_not_finite_in_float16_names_the_loss_scale():
    training, images, targets = linear_training(amp="fp16")
    training.epoch = 1
    training.step(images, targets)
    training.losses.append(torch.tensor(math.nan))
    scale = r"with the loss scale at 65536: lower --lr, or train with --amp off"
    with pytest.raises(TrainingError, match=rf"the loss is nan at epoch 2, step 2, {scale}"):
        training.finite_losses()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_loss_that_is_not_finite_is_named(bad):
    training, *_ = linear_training()
    training.losses = [torch.tensor(value) for value in (1.0, bad, 2.0)]
    with pytest.raises(TrainingError, match=rf"the loss is {bad} at epoch 1, step 2: lower --lr"):
        training.finite_losses()


def test_it_goes_on_from_its_state_as_if_it_had_never_stopped(device):
    settings = {"epochs": 2, "lr": 1e-2, "ema_warmup": True}
    one, images, targets = linear_training(device, **settings)
    for _ in range(3):
        one.step(images, targets)
    weights = {name: {k: v.clone() for k, v in w.items()} for name, w in one.weights().items()}
    other, *_ = linear_training(device, **settings)
    other.load_state_dict(one.state_dict(), weights)
    for training in (one, other):
        training.step(images, targets)
    for name, tensors in one.weights().items():
        for key, tensor in tensors.items():
            assert torch.equal(other.weights()[name][key], tensor)
    assert (other.steps, other.lr) == (4, one.lr)


@pytest.mark.parametrize(("then", "now"), [(4, 5), (5, 4)])
def test_a_run_on_another_number_of_processes_may_have_another_number_of_steps(then, now):
    one, images, targets = linear_training(epochs=2, steps_per_epoch=then)
    for _ in range(then):
        one.step(images, targets)
    other, *_ = linear_training(epochs=2, steps_per_epoch=now)
    other.load_state_dict(one.state_dict(), one.weights())
    for _ in range(now):
        other.step(images, targets)
    assert (other.steps, other.lr) == (9, pytest.approx(1e-4 / 25 / 1e4))  # the last of 10


def test_a_step_uses_the_statistics_of_its_batch_also_after_a_validation(device):
    training = training_of(golden_network(), device=device)
    training.model.eval()
    before = training.model[1].running_mean.clone()
    training.step(*some_images(device))
    assert not torch.equal(training.model[1].running_mean, before)


def test_adaptive_asymmetry_gets_its_target_and_step():
    loss = create_loss(LossSettings(adaptive_gamma=0.25, adaptive_step=0.125))
    assert (loss.target, loss.step, loss.gamma_neg.item()) == (0.25, 0.125, 4.0)


def with_fixed_statistics():
    """A network whose BatchNorm keeps to its statistics, in float64."""
    torch.manual_seed(0)
    network = golden_network().double()
    network[1].running_var.uniform_(0.5, 2)
    network[1].train = lambda mode=True: network[1]
    network[1].training = False
    return network


@pytest.mark.parametrize("grad_clip", [None, 0.1])
def test_a_step_of_several_batches_is_that_of_one_as_large(grad_clip, device):
    torch.manual_seed(0)
    images = torch.rand(12, 3, 16, 16).double().to(device)
    targets = torch.randint(0, 2, (12, 20)).to(device)
    results = []
    for accumulate in (1, 3):
        training = training_of(
            with_fixed_statistics(),
            device=device,
            **{"accumulate": accumulate, "grad_clip": grad_clip, "lr": 1e-2, "epochs": 2},
            steps_per_epoch=2 * accumulate,
        )
        for _ in range(2):
            for part in zip(images.chunk(accumulate), targets.chunk(accumulate), strict=True):
                training.step(*part)
        results.append((training.losses, training.lr, *training.weights()["ema"].values()))
        assert training.steps == 2
        assert len(training.gradient_norms) == (2 if grad_clip else 0)
    for one, several in zip(*results, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(one), torch.as_tensor(several), rtol=0, atol=1e-6
        )


def test_the_last_batches_of_an_epoch_make_a_step_of_their_own():
    training, images, targets = linear_training(accumulate=3, epochs=2)  # five batches an epoch
    seen, rates = [], []
    for _ in range(2):
        for _ in range(5):
            rates.append(training.lr)
            training.step(images, targets)
            seen.append((training.steps, training.between_steps, training.batches))
        training.end_epoch()
    assert seen[:5] == [(0, False, 0), (0, False, 0), (1, True, 3), (1, False, 3), (2, True, 5)]
    assert [steps for steps, *_ in seen[5:]] == [2, 2, 3, 3, 4]
    assert rates[-1] == pytest.approx(1e-4 / 25 / 1e4)  # the schedule has four steps


def test_the_loss_of_a_step_is_that_of_all_its_batches():
    training, images, targets = linear_training(accumulate=2)
    parts = [training.step(images, targets) for _ in range(4)]
    assert training.finite_losses() == pytest.approx([sum(parts[:2]).item(), sum(parts[2:]).item()])


def test_dropout_draws_anew_for_each_batch_of_a_step():
    noise = Noise()
    model = nn.Sequential(noise, nn.Flatten(), nn.Linear(12, 4))
    training = training_of(model, accumulate=2)
    for _ in range(4):
        training.step(torch.rand(2, 3, 2, 2), torch.randint(0, 2, (2, 4)))
    assert len({tuple(drawn) for drawn in noise.drawn}) == 4


@pytest.mark.parametrize(
    ("name", "head", "share"),
    [
        *[(name, "linear", 0.8) for name in ("test_resnet", "test_vit", "test_efficientnet")],
        ("test_efficientnet", "ml_decoder", 0.95),  # whose own are kept
    ],
)
def test_activations_that_are_computed_again_change_no_step(name, head, share):
    torch.manual_seed(0)
    images, targets = torch.rand(4, 3, 64, 64), torch.randint(0, 2, (4, 5))
    states, kept = [], []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = create_model(name, 5, head)
        training = training_of(model, lr=1e-2, epochs=1, checkpoint_activations=checkpointed)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor.numel()) or tensor,
            lambda tensor: tensor,
        ):
            losses = [training.step(images, targets) for _ in range(2)]
        kept.append(sum(saved))
        state = training.weights()["regular"]
        states.append((*losses, *(state[key] for key in state if "num_batches" not in key)))
    for plain, checkpointed in zip(*states, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-6)
    assert kept[1] < share * kept[0]


def test_a_model_that_cannot_compute_activations_again_is_an_error_of_usage():
    with pytest.raises(UsageError, match="dla34 cannot checkpoint its activations"):
        training_of(create_model("dla34", 5), checkpoint_activations=True)
    with pytest.raises(UsageError, match="drop checkpoint_activations"):
        StepSettings(compile=True, checkpoint_activations=True)
