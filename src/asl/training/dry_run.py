"""What a training would read, compute and need: `train.py --dry-run`."""

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from asl.data.annotations import Annotations
from asl.data.fetch import is_address
from asl.distributed import pick_device, precision, process_group, world_size
from asl.images.cache import bytes_to_build
from asl.images.loader import Batch, Batches
from asl.images.prepare import preparation
from asl.images.settings import ImageSettings
from asl.images.slots import SHARED_MEMORY, free_shared_memory
from asl.models.build import normalization
from asl.models.heads import without_head
from asl.training.features import features_bytes
from asl.training.fit import new_training, read_splits, training_batches
from asl.training.memory import GB, GPU, estimate, growth, out_of_memory_explained
from asl.training.rehearsal import Rehearsal
from asl.training.run import Run
from asl.training.settings import ESTIMATE, TrainConfig
from asl.training.step import Training

SAMPLES = 8  # images of each split that are read
CARDS = (16, 24, 40, 80)  # GB
# What a step on a CPU is cut to: some seconds of a core.
CPU_FLOPS = 2 * 10**11
CPU = torch.device("cpu")


def dry_run(config: TrainConfig) -> str:
    """Rehearse a training of this config and return what was found out, as text to print.

    Both splits are read, and some of their images; the model is built, and makes one step on the
    device. A CUDA device need not be there, and is rehearsed then. A CPU may make the step with
    fewer images. Nothing is written, but for data that is not here yet: the built-in set is drawn,
    and shards by address are fetched.

    Processes that were started together are counted as such. Raises what `fit` raises before it
    trains, and `TrainingError` where the device is too small for a step.
    """
    there = torch.cuda.is_available() or not re.fullmatch(r"cuda(:\d+)?", config.compute.device)
    device = pick_device(config.compute.device) if there else GPU
    if config.loss.prior_path == ESTIMATE:  # the first of its two trainings
        config = config.with_settings(unannotated="ignore", prior_path="")
    with process_group(device if there else CPU):
        return _dry_run(config, device, there)


def _dry_run(config: TrainConfig, device: torch.device, there: bool) -> str:
    existing = Path(config.data.data).exists()
    train_set, val_set = read_splits(config, device, write_cache=False)
    run = Run(config)
    uncached = config.with_settings(cache_dir="", cache_format="raw")
    batches = training_batches(uncached, train_set, device)
    val_batches = Batches(val_set, uncached.images, device=device)
    few = uncached.with_settings(batch_size=min(SAMPLES * world_size(), len(train_set)), workers=0)
    where = device if there else CPU
    samples = next(training_batches(few, train_set, where).epoch(0))
    next(Batches(val_set, few.images).epoch(0))
    training = new_training(config, train_set, len(batches), where, resumed=run.resumed)
    run.restore(training)

    try:
        flops = _forward_flops(training.model, config.images.image_size)
        memory = _memory_lines(config, training, device, batches.batch_size_per_rank)
    except Exception as error:  # a model may do what tensors without values cannot
        reason = str(error).partition("\n")[0]
        flops, memory = 0, [f"memory         not known, the model cannot be rehearsed: {reason}"]
    lines = [_model_line(config, training.model, flops), _steps_line(config, batches), *memory]
    lines.append(_shared_line(batches, val_batches))
    if config.step.cache_features:
        without_head(training.model, config.images.image_size)  # which says if that cannot be
        size = features_bytes(training.model, train_set, val_set)
        lines.append(f"features       {_shown(size)} in the memory of each process")
    lines.append(_cache_line(config.images, (train_set, val_set)))
    if training.epoch >= config.last_epoch:
        lines.append("step           none: the run is complete")
    elif there:
        lines.append(_real_step(config, training, samples, batches.batch_size_per_rank, flops))
    else:
        done = "rehearsed" if flops else "none"
        lines.append(f"step           {done}: there is no {device.type} here")
    written = "" if existing else " but the built-in data set"
    if is_address(config.data.data):
        written = " but shards that were not here yet"
    return "\n".join([*lines, f"nothing was written{written}"])


def _forward_flops(model: nn.Module, image_size: int) -> int:
    """Of one image, as torch counts them: a multiply-add is two."""
    rehearsal = Rehearsal()
    copy = rehearsal.copy_of(model, GPU).eval()
    counter = FlopCounterMode(display=False)
    with rehearsal.on(GPU), torch.no_grad(), counter:
        copy(torch.empty(1, 3, image_size, image_size, device=GPU))
    return counter.get_total_flops()


def _model_line(config: TrainConfig, model: nn.Module, flops: int) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"model          {config.model.model_name} at {config.images.image_size} px: "
        f"{parameters / 1e6:.1f} million parameters, {flops / 1e9:.3g} GFLOP forward per image"
    )


def _steps_line(config: TrainConfig, batches: Batches) -> str:
    epochs, ranks, accumulate = config.last_epoch, world_size(), config.step.accumulate
    processes = "1 process" if ranks == 1 else f"{ranks} processes"
    steps = -(-len(batches) // accumulate)
    return (
        f"steps          {steps:,} an epoch, of {accumulate * batches.batch_size} images in "
        f"{processes}; {epochs * steps:,} in {epochs} epochs"
    )


def _memory_lines(
    config: TrainConfig, training: Training, device: torch.device, batch_size: int
) -> list[str]:
    model, loss = training.model, training.loss
    grown = growth(config, model, loss, GPU, batch_size)
    memory = grown.memory
    if device.type != "cuda":
        memory = estimate(config, model, loss, device, batch_size)
    parts = asdict(memory)
    total = memory.peak
    if device.type == "cuda":
        parts["CUDA itself"], total = memory.of_gpu - memory.peak, memory.of_gpu
    with Rehearsal().on(device):
        computed_in = precision(config.compute.amp, device, training=True) or torch.float32
    lines = [
        f"memory         {_shown(total)} on {device.type} with {batch_size} images a process "
        f"in {str(computed_in).removeprefix('torch.')}, estimated"
    ]
    lines += [f"  {name:12} {_shown(size):>8}" for name, size in parts.items()]
    fitting = ", ".join(f"{size} GB: {grown.largest_batch(size * GB):,}" for size in CARDS)
    return [*lines, f"largest batch  of a GPU with {fitting}"]


def _shown(size: int) -> str:
    return f"{size / GB:,.2f} GB" if size >= GB else f"{size / 10**6:,.1f} MB"


def _shared_line(*loaders: Batches) -> str:
    needed, free = sum(each.shared_bytes for each in loaders), free_shared_memory()
    there = "" if free is None else f", {SHARED_MEMORY} has {_shown(free)} free"
    return f"shared memory  {_shown(needed)} for the loaders of a process{there}"


def _cache_line(settings: ImageSettings, sets: Sequence[Annotations]) -> str:
    missing = sum(bytes_to_build(each, settings) for each in sets)
    if not settings.cache_dir:
        return f"image cache    none; --cache-dir would take {_shown(missing)} of disk"
    folder = Path(settings.cache_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return (
        f"image cache    {_shown(missing)} to be written, "
        f"{settings.cache_dir} has {_shown(free)} free"
    )


def _real_step(
    config: TrainConfig, training: Training, samples: Batch, batch_size: int, flops: int
) -> str:
    """One step on the device, of batches of `batch_size`; of fewer on a CPU, which takes longer."""
    device, count = training.device, batch_size
    if device.type == "cpu":
        in_step = 3 * flops * config.step.accumulate  # the backward pass is two of the forward
        count = min(batch_size, max(2, CPU_FLOPS // in_step if flops else 2))
    rows = list(islice(cycle(range(len(samples.targets))), count))
    augmentation = None if samples.augmentation is None else samples.augmentation[rows]
    batch = Batch(samples.images[rows], samples.targets[rows], augmentation)
    prepare = preparation(*normalization(training.model), device, training.precision)
    started = time.perf_counter()
    with out_of_memory_explained(config, training, batch_size):
        training.step(prepare(batch), batch.targets.to(device))
        while not training.between_steps:
            training.step(prepare(batch), batch.targets.to(device))
        loss = training.finite_losses()[-1]
    seconds = time.perf_counter() - started
    text = f"step           one on {device} with {count} of {batch_size} images, {seconds:.1f} s"
    if device.type == "cuda":
        text += f", {_shown(torch.cuda.max_memory_allocated(device))} of tensors"
    return f"{text}, loss {loss:.1f}"
