"""What backbones are worth, by the weights at hand: a table of mAP, speed and size.

python bench/backbones.py VOCDEVKIT tf_efficientnet_lite0=LITE0.safetensors [NAME=FILE ...]

mAP is that of a linear probe, by the recipe configs/voc2007_lite0_160_features.yaml: a linear head
is trained on the features of Pascal VOC 2007's train, and measured on val by its averaged weights
after the last epoch. Images/s are those of the whole model in evaluation, from batches on the
device; the models take turns, and the figure is a median. Both at --image-size.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import torch
from torch import Tensor

from asl.config import read_recipe
from asl.distributed import pick_device, precision
from asl.errors import UsageError, reported
from asl.models.build import create_model, place
from asl.models.inference import for_inference
from asl.training.fit import fit
from asl.training.settings import TrainConfig

RECIPE = Path(__file__).parents[1] / "configs" / "voc2007_lite0_160_features.yaml"
CLASSES = 20


def probed(config: TrainConfig) -> float:
    """The mAP of a linear probe: of the averaged weights, after the last epoch."""
    with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        run = fit(config.with_settings(output=folder))
        last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(last)["mAP_ema"])


def scoring(config: TrainConfig, device: torch.device) -> Callable[[], object]:
    """Scores a batch, as an evaluation does, and waits for it."""
    size = config.images.image_size
    model = for_inference(place(create_model(config.model.model_name, CLASSES), device))
    computed_in = precision("auto", device, training=False)
    images: Tensor = torch.rand(config.images.batch_size, 3, size, size, device=device)
    images = images.to(computed_in or torch.float32, memory_format=torch.channels_last)

    @torch.inference_mode()
    def score() -> object:
        with torch.autocast(device.type, computed_in, enabled=computed_in is not None):
            return model(images).float().sigmoid().cpu()

    return score


def rates(scorers: list[Callable[[], object]], images: int, rounds: int) -> list[float]:
    """Images per second of each, as medians over rounds in which they take turns."""
    seconds: list[list[float]] = [[] for _ in scorers]
    for turn in range(rounds + 1):
        for score, own in zip(scorers, seconds, strict=True):
            started = time.perf_counter()
            score()
            if turn:  # the first warms up
                own.append(time.perf_counter() - started)
    return [images / statistics.median(own) for own in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="the VOCdevkit folder")
    parser.add_argument("weights", nargs="+", metavar="NAME=FILE", help="a timm model, its weights")
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="")
    chosen = parser.parse_args()
    base = TrainConfig.of(**read_recipe(RECIPE, TrainConfig)).with_settings(
        data=chosen.data,
        missing_images="skip",
        image_size=chosen.image_size,
        batch_size=chosen.batch_size,
        device=chosen.device,
    )
    configs = []
    for pair in chosen.weights:
        name, _, path = pair.partition("=")
        if not path:
            raise UsageError(f"{pair!r} is not NAME=FILE")
        configs.append(base.with_settings(model_name=name, model_path=path))
    device = pick_device(chosen.device)
    speeds = rates([scoring(each, device) for each in configs], chosen.batch_size, chosen.rounds)
    print(f"| {chosen.image_size} px, {device.type} | million parameters | images/s | mAP |")
    print("| --- | ---: | ---: | ---: |")
    for config, speed in zip(configs, speeds, strict=True):
        model = create_model(config.model.model_name, CLASSES)
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        figure = probed(config)
        print(f"| {config.model.model_name} | {millions:.1f} | {speed:,.0f} | {figure:.2f} |")


if __name__ == "__main__":
    with reported():
        main()
