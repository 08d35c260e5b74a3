"""What the heads cost, in time and memory, with few and with many classes: a markdown table.

python bench/heads.py [--model tresnet_m] [--device cuda]

Time is of the forward and backward pass, in float32: of the head alone, pooling included, and of
the whole model. Linear head, bottleneck and ML-Decoder take turns; the figures are medians, ratios
those of neighbouring runs. On a CPU it is that of the process, with one thread.

Memory is not measured but estimated as by `train.py --dry-run`, for a GPU that need not be there.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import torch
from step import ratio, seconds
from torch import Tensor

from asl.distributed import pick_device
from asl.models.build import create_model, place
from asl.models.settings import Head
from asl.training.loss import create_loss
from asl.training.memory import GB, GPU, estimate
from asl.training.settings import TrainConfig

CLASSES = (80, 601, 9605)  # MS-COCO, the boxes and the image labels of Open Images


def passes(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Callable[[], None]:
    """Forward and backward pass, until the device is done with them."""
    inputs = inputs.clone().requires_grad_()

    def run() -> None:
        forward(inputs).sum().backward()  # type: ignore[no-untyped-call]
        if inputs.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def rows(name: str, num_classes: int, args: argparse.Namespace) -> list[str]:
    """A row for each head."""
    device = pick_device(args.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    images = torch.rand(args.batch_size, 3, 224, 224, device=device)
    images = images.to(memory_format=torch.channels_last)
    models: dict[str, Any] = {}
    for head in get_args(Head):
        models[head] = place(create_model(name, num_classes, head), device).train()
    with torch.no_grad():
        features = models["linear"].forward_features(images)
    alone, whole = (
        seconds({head: passes(*of(model)) for head, model in models.items()}, rounds, clock)
        for of, rounds in (
            (lambda model: (model.forward_head, features), 4 * args.rounds),
            (lambda model: (model, images), args.rounds),
        )
    )
    lines = []
    for head, model in models.items():
        config = TrainConfig.of(model_name=name, image_size=224, head=head)
        memory = estimate(config, model, create_loss(config.loss), GPU, 64)
        cells = [f"{num_classes:,}", head]
        cells.append(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}")
        for times in (alone, whole):
            each = 1e3 * statistics.median(times[head]) / args.batch_size
            cells += [f"{each:.2f}", f"{ratio(times['linear'], times[head]):.2f}"]
        cells += [f"{memory.of_gpu / GB:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tresnet_m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if args.device != "cpu" else platform.machine()
    print(f"{where}, torch {torch.__version__}, {args.model}, {args.batch_size} x 224 px\n")
    columns = ["classes", "head", "million parameters", "head, ms per image", "x linear"]
    columns += ["model, ms per image", "x linear", "GPU for 64 images, GB"]
    print(f"| {' | '.join(columns)} |\n| ---: | --- |{' ---: |' * (len(columns) - 2)}")
    for num_classes in CLASSES:
        print("\n".join(rows(args.model, num_classes, args)), flush=True)


if __name__ == "__main__":
    main()
