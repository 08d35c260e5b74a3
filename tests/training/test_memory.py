"""The estimate of memory: its parts by hand, what lowers it, and what it is held to."""

import copy
import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from asl.data.readers import read
from asl.errors import TrainingError, UsageError
from asl.evaluation import score as score_module
from asl.evaluation.score import Scorer
from asl.images.settings import ImageSettings
from asl.models.build import create_model, place
from asl.training import fit as fit_module
from asl.training import memory as memory_module
from asl.training.fit import fit
from asl.training.loss import create_loss
from asl.training.memory import GB, GPU, Growth, Memory, estimate, growth
from asl.training.rehearsal import without_engine
from asl.training.settings import TrainConfig
from asl.training.step import Training

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def config_of(**settings):
    usual = {"model_name": "test_resnet", "image_size": 64, "augment": "none"}
    return TrainConfig.of(**{**usual, **settings})


def estimated(batch_size=16, device=GPU, num_classes=24, **settings):
    config = config_of(**settings)
    name, size = config.model.model_name, config.images.image_size
    model = place(create_model(name, num_classes, config.model.head, image_size=size), CPU)
    return estimate(config, model, create_loss(config.loss), device, batch_size)


def in_blocks(*counts):
    """The bytes of float32 tensors with so many numbers: each has blocks of its own."""
    return sum(-(-4 * count // 512) * 512 for count in counts)


class Wide(nn.Module):
    """Two layers, of which the first does not train, and a buffer."""

    num_classes, pretrained_cfg = 10, {"mean": (0.0,) * 3, "std": (1.0,) * 3}

    def __init__(self):
        super().__init__()
        self.frozen, self.last = nn.Linear(192, 1000), nn.Linear(1000, 10)
        self.frozen.requires_grad_(False)
        self.register_buffer("shift", torch.zeros(300))

    def forward(self, images):
        return self.last(self.frozen(images.flatten(1))) + self.shift[:10]


def test_the_parts_are_those_that_one_counts_by_hand():
    config = config_of(image_size=8, amp="off")
    memory = estimate(config, Wide(), create_loss(config.loss), GPU, 2)
    frozen, trained = (192 * 1000, 1000), (1000 * 10, 10)
    assert memory.weights == memory.averages == in_blocks(*frozen, *trained, 300)
    assert memory.gradients == in_blocks(*trained)
    # Adam has two moments of each parameter, and its step.
    assert memory.optimizer == 2 * in_blocks(*trained) + in_blocks(1, 1)
    assert memory.peak == sum(astuple(memory))
    assert memory.of_gpu == GB + 1.05 * memory.peak


def test_a_validation_that_takes_more_than_a_step_counts():
    # Two copies of the weights are made for it, and hardly anything is trained.
    config = config_of(image_size=8, amp="off")
    memory = estimate(config, Wide(), create_loss(config.loss), GPU, 2)
    assert memory.activations + memory.gradients > 2 * memory.weights


def test_activations_grow_in_step_with_the_batch():
    first, second, third = (estimated(count).activations for count in (32, 64, 96))
    assert third - second == pytest.approx(second - first, rel=0.01)
    assert second > 1.8 * first


def test_the_settings_that_save_memory_save_it():
    usual = estimated(64)
    assert estimated(64, amp="off").activations > 1.5 * usual.activations
    vit = {"model_name": "test_vit2", "image_size": 64}
    kept, less = (estimated(64, **vit, checkpoint_activations=again) for again in (False, True))
    assert less.activations < 0.6 * kept.activations
    assert less.weights == kept.weights


def test_an_ml_decoder_of_9605_classes_is_rehearsed_without_a_gpu():
    of_heads = {}
    for head in ("linear", "ml_decoder"):
        small, large = (estimated(count, head=head, num_classes=9605) for count in (16, 32))
        of_heads[head] = large, (large.activations - small.activations) / 16
    (linear, linear_each), (decoder, each) = of_heads["linear"], of_heads["ml_decoder"]
    pooling = (100 * 768 * 97, 9605)
    embedding, queries, norms = (96 * 768, 768), (100 * 768,), 6 * (768,)
    attention = (3 * 768 * 768, 3 * 768, 768 * 768, 768)
    feed_forward = (768 * 2048, 2048, 2048 * 768, 768)
    trained = (*embedding, *norms, *attention, *feed_forward, *pooling)
    dense = in_blocks(96 * 9605, 9605)
    assert decoder.weights - linear.weights == in_blocks(*trained, *queries) - dense
    assert decoder.gradients - linear.gradients == in_blocks(*trained) - dense
    # Above the logits, which both have: some tensors of 100 x 768 and of 100 x 2048 an image.
    assert 100 * 2048 * 4 < each - linear_each < 30 * 100 * 768 * 4


def test_accumulated_gradients_are_there_in_the_forward_pass():
    alone, summed = estimated(16), estimated(16, accumulate=8)
    assert summed.peak > alone.peak
    assert summed == estimated(16, accumulate=3)


def test_a_cpu_computes_in_float32_unless_told_otherwise():
    assert estimated(device=CPU) == estimated(amp="off")
    assert estimated(device=CPU, amp="bf16") == estimated(amp="bf16")


def test_augmentation_on_the_device_is_part_of_it(monkeypatch):
    drawn = []
    original = memory_module.draw
    monkeypatch.setattr(memory_module, "draw", lambda *a: drawn.append(a[0]) or original(*a))
    usual = estimated(augment="recipe")
    assert drawn == ["recipe"]
    assert usual == estimated(augment="recipe", augment_on="workers")  # it is never the peak
    assert drawn == ["recipe"]


def test_the_model_stays_as_it_is_and_can_be_trained():
    config = config_of()
    model = place(create_model("test_resnet", 24), CPU)
    before = copy.deepcopy(model.state_dict())
    estimate(config, model, create_loss(config.loss), GPU, 8)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert type(model(torch.zeros(2, 3, 64, 64)).sum()) is torch.Tensor


def test_the_largest_batch_is_one_that_fits_and_the_next_does_not():
    config = config_of(model_name="resnet18")
    model, loss = place(create_model("resnet18", 24), CPU), create_loss(config.loss)
    grown = growth(config, model, loss, GPU, 100)
    size = 3 * GB
    largest = grown.largest_batch(size)
    assert 0.99 * size < estimate(config, model, loss, GPU, largest).of_gpu <= 1.01 * size
    assert grown.largest_batch(GB) == 0


def test_largest_batches_by_arithmetic():
    grown = Growth(10, Memory(0, 0, 0, 0, 2 * GB), 0.1 * GB)
    # 1 GB, and 5 % more than 1 GB and 0.1 GB an image.
    assert [grown.largest_batch(size * GB) for size in (6, 3, 2)] == [37, 9, 0]


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def train_and_measure(batch_size):
    """Bytes that two steps of a small network take at their peak, in this process."""
    config = config_of(model_name="resnet18", image_size=96, amp="off")
    torch.nn.functional.conv2d(torch.zeros(1, 3, 8, 8), torch.zeros(3, 3, 3, 3))  # loads oneDNN
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    model = place(create_model("resnet18", 24), CPU)
    loss = create_loss(config.loss)
    training = Training(model, loss, config.step, batches_per_epoch=2, device=CPU)
    for _ in range(2):
        training.step(torch.zeros(batch_size, 3, 96, 96), torch.zeros(batch_size, 24))
    return resident("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_of_a_training_on_the_cpu_is_estimated_within_15_percent():
    # In a process of its own, which gives back at once what it frees.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    folders = [Path(memory_module.__file__).parents[2], Path(__file__).parent]
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    program = "import test_memory; print(test_memory.train_and_measure(64))"
    child = [sys.executable, "-c", program]
    done = subprocess.run(
        child, capture_output=True, text=True, check=True, env=os.environ | environment
    )
    expected = estimated(64, CPU, model_name="resnet18", image_size=96).peak
    assert expected == pytest.approx(int(done.stdout), rel=0.15)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_gradients_without_the_engine_are_those_of_the_engine(name, again):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=8).to(memory_format=torch.channels_last)
    model.set_grad_checkpointing(again)
    size = model.pretrained_cfg["input_size"][-1]
    images = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)

    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        model(images).square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    model.train()
    state = copy.deepcopy(model.state_dict())
    expected = gradients()
    model.load_state_dict(state)
    with without_engine():
        found = gradients()
    assert any(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def only_rehearsed(step):
    """A step that fails on a device that is there."""

    def failing(training, *batch):
        return step(training, *batch) if training.device == GPU else out_of_memory()

    return failing


def test_a_step_that_runs_out_of_memory_says_what_to_lower(
    small_shapes, settings, tmp_path, monkeypatch
):
    config = settings(small_shapes, tmp_path / "run", batch_size=32, model_name="test_vit")
    model = place(create_model("test_vit", 24, image_size=48), CPU)
    grown = growth(config, model, create_loss(config.loss), CPU, 32)
    size = grown.memory.of_gpu - round(8 * grown.per_image)
    fitting = grown.largest_batch(size)
    assert 16 <= fitting < 32
    monkeypatch.setattr(Training, "step", only_rehearsed(Training.step))
    monkeypatch.setattr(memory_module, "_memory_of", lambda device: size)
    with pytest.raises(TrainingError) as error:
        fit(config)
    said = str(error.value)
    assert said.startswith("cpu of 1.0 GB is out of memory with 32 images a step: ")
    assert f"{grown.memory.of_gpu / GB:.1f} GB are needed" in said
    assert f"--batch-size to {fitting}, with --accumulate 2 for" in said
    assert "or take --checkpoint-activations (1.0 GB)" in said
    with pytest.raises(TrainingError, match=f"--batch-size to {fitting}, or take"):
        fit(config.with_settings(loss="twoway", output=str(tmp_path / "undivided")))


def test_a_validation_that_runs_out_of_memory_is_explained_too(
    small_shapes, settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(fit_module, "score_data_set", out_of_memory)
    monkeypatch.setattr(memory_module, "_memory_of", lambda device: 9 * GB)
    with pytest.raises(TrainingError, match="That should fit: does something else use"):
        fit(settings(small_shapes, tmp_path / "run"))


def test_a_model_that_cannot_be_rehearsed_is_explained_without_figures(
    small_shapes, settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(Training, "step", out_of_memory)
    with pytest.raises(TrainingError, match=r"with 8 images a step: lower --batch-size$"):
        fit(settings(small_shapes, tmp_path / "run"))


def test_scores_that_run_out_of_memory_say_what_to_lower(small_shapes, monkeypatch):
    annotations = read("coco", small_shapes, "val2014")
    monkeypatch.setattr(score_module, "score_data_set", out_of_memory)
    images = ImageSettings(image_size=32, batch_size=8, workers=0)
    scorer = Scorer((Wide(),), ("wide",), ("ema",), ("a",), ((), ()), images, CPU, "off", (32,))
    with pytest.raises(UsageError, match="cpu is out of memory with 8 images: lower --batch-size"):
        scorer.scores(annotations, "scores")


@needs_cuda
def test_a_gpu_that_is_too_small_says_what_to_lower(small_shapes, settings, tmp_path):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.2 * GB / total)
    try:
        large = {"model_name": "resnet50", "image_size": 448, "batch_size": 40, "device": "cuda"}
        with pytest.raises(TrainingError, match=r"cuda:0 of 1\.2 GB is out of memory"):
            fit(settings(small_shapes, tmp_path / "run", **large))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
