"""The estimate of memory against what training takes, and the table of all recipes.

python bench/memory.py [--device cuda] [--amp bf16]
python bench/memory.py --recipes

The first trains three models for two steps, each in a process of its own, and compares. On a CPU
the memory is the peak of what is resident, less what was resident before the model was built. On a
GPU it is the peak of what torch allocated, and beside it what the whole GPU had taken.

The second prints the table of MODEL_ZOO.md. Weights are random, and none is fetched.
"""

import argparse
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import torch
from torch import nn

from asl.config import read_recipe
from asl.distributed import pick_device
from asl.images.augment import draw
from asl.images.loader import Batch
from asl.images.prepare import augments_on_device, preparation
from asl.models.build import create_model, normalization, place
from asl.training.loss import create_loss
from asl.training.memory import GB, GPU, Growth, Memory, estimate, growth
from asl.training.settings import TrainConfig
from asl.training.step import Training

MODELS = {"resnet50": 24, "tresnet_m": 24, "vit_tiny_patch16_224": 48}  # images in a batch
CPU = torch.device("cpu")
# Classes of the data sets of the recipes: DATASETS.md.
CLASSES = {"coco": 80, "voc": 20, "openimages": 9605, "shapes": 24}
PROCESSES = 8
# Settings of recipes that change nothing of what is kept: the same model is asked about once.
LEAVE_NO_MARK = {name: TrainConfig().flat()[name] for name in ("lr", "weight_decay", "epochs")}
# Freed memory goes back at once, or the peak would be that of glibc's own stock.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def config_of(name: str, amp: str) -> TrainConfig:
    return TrainConfig.of(model_name=name, image_size=224, batch_size=MODELS[name], amp=amp)


def model_of(config: TrainConfig, num_classes: int, device: torch.device) -> nn.Module:
    name, head = config.model.model_name.partition(".")[0], config.model.head
    return place(create_model(name, num_classes, head, False, config.images.image_size), device)


def resident(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(config: TrainConfig, device: torch.device) -> None:
    """Train for two steps; print the peak, and what the GPU has taken, in bytes."""
    torch.zeros(1, device=device)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of VmHWM starts anew
    before = resident("VmRSS")
    model, count = model_of(config, 80, device), config.images.batch_size
    training = Training(
        model,
        create_loss(config.loss),
        config.step,
        batches_per_epoch=2,
        device=device,
        amp=config.compute.amp,
    )
    prepare = preparation(*normalization(model), device)
    images, targets = torch.zeros(count, 3, 224, 224, dtype=torch.uint8), torch.zeros(count, 80)
    on_device = augments_on_device(config.augment, device.type)
    drawn = draw(config.augment.augment, 0, 0, range(count)) if on_device else None
    for _ in range(2):
        training.step(prepare(Batch(images, targets, drawn)), targets.to(device))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        print(torch.cuda.max_memory_allocated(device), total - free)
    else:
        print(resident("VmHWM") - before, 0)


def compare(device: torch.device, amp: str) -> None:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}, amp {amp}, 224 px\n")
    columns = ["model", "batch", "estimated, GB", "measured, GB", "error"]
    if device.type == "cuda":
        columns += ["GPU, estimated, GB", "GPU, taken, GB"]
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")
    for name, count in MODELS.items():
        config = config_of(name, amp)
        found = estimate(config, model_of(config, 80, CPU), create_loss(config.loss), device, count)
        child = [sys.executable, __file__, "--measure", name, "--device", str(device), "--amp", amp]
        done = subprocess.run(
            child, capture_output=True, text=True, check=True, env=os.environ | GIVEN_BACK
        )
        measured, taken = map(int, done.stdout.split())
        error = f"{found.peak / measured - 1:+.1%}"
        row = [name, str(count), f"{found.peak / GB:.2f}", f"{measured / GB:.2f}", error]
        if device.type == "cuda":
            row += [f"{size / GB:.2f}" for size in (found.of_gpu, taken)]
        print(f"| {' | '.join(row)} |", flush=True)


@cache
def estimates_of(recipe: TrainConfig) -> tuple[Growth, Memory]:
    """In one process, and in one of several."""
    num_classes = CLASSES[recipe.data.dataset]
    partial = recipe.data.dataset == "openimages" or recipe.labels.simulate_partial is not None
    prior = torch.zeros(num_classes) if recipe.loss.unannotated == "selective" else None
    loss = create_loss(recipe.loss, partial, prior)
    asked = recipe, model_of(recipe, num_classes, CPU), loss, GPU
    together = recipe.images.batch_size
    return growth(*asked, together), estimate(*asked, -(-together // PROCESSES))


def tabulate() -> None:
    print(f"| recipe | batch size | memory, 1 process | of each of {PROCESSES} |", end="")
    print(" largest batch, 24 GB | 80 GB |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for path in sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml")):
        recipe = TrainConfig.of(**read_recipe(path, TrainConfig))
        # Recipes with the same step and others' losses take the same: it is found out once.
        alone, each = estimates_of(recipe.with_settings(config="", **LEAVE_NO_MARK))
        sizes = [f"{found.of_gpu / GB:.1f} GB" for found in (alone.memory, each)]
        largest = [f"{alone.largest_batch(size * GB):,}" for size in (24, 80)]
        row = [path.stem, str(recipe.images.batch_size), *sizes, *largest]
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", default="off")
    parser.add_argument("--recipes", action="store_true")
    parser.add_argument("--measure", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = pick_device(options.device)
    if options.measure:
        measure(config_of(options.measure, options.amp), device)
    elif options.recipes:
        tabulate()
    else:
        compare(device, options.amp)


if __name__ == "__main__":
    main()
