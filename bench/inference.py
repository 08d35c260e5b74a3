"""Images/s of inference on one CPU core, against the model as timm builds it: a markdown table.

python bench/inference.py [--models tresnet_m] [--compile]

All variants take turns on the same batch; the figures are medians, and "x eager" the median of the
ratios of neighbouring runs. Time is that of the process, with one thread: what else the machine
does is not in it. "folded" is `fold_batchnorm`; with channels last and autocast it is what
`asl.evaluation.score` computes. "pure bfloat16" also keeps the weights so, and the steps that
autocast leaves in float32; --compile adds torch.compile, which takes half a minute for each model.
"""

import argparse
import copy
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import torch
from step import ratio, seconds
from torch import Tensor, nn

from asl.models.build import create_model
from asl.models.inference import fold_batchnorm


def variants(model: nn.Module, images: Tensor, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    last = images.to(memory_format=torch.channels_last)
    in_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    folded = fold_batchnorm(copy.deepcopy(in_last))
    halved = copy.deepcopy(folded).bfloat16()

    def autocast(model: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(images)

    runs = {
        "eager, float32, contiguous": lambda: model(images),
        "channels last": lambda: in_last(last),
        "channels last, folded": lambda: folded(last),
        "bfloat16, contiguous": lambda: autocast(model, images),
        "bfloat16, channels last": lambda: autocast(in_last, last),
        "bfloat16, channels last, folded": lambda: autocast(folded, last),
        "pure bfloat16, channels last, folded": lambda: halved(last.bfloat16()),
    }
    if compiled:
        fast = torch.compile(folded)
        runs["folded, compiled"] = lambda: fast(last)
        runs["bfloat16, folded, compiled"] = lambda: autocast(fast, last)
    return runs


@torch.no_grad()
def table(name: str, batch_size: int, image_size: int, rounds: int, compiled: bool) -> str:
    model = create_model(name, 80).eval()
    images = torch.rand(batch_size, 3, image_size, image_size)
    times = seconds(variants(model, images, compiled), rounds)
    eager = next(iter(times.values()))
    lines = [f"| {name} | images/s | x eager |", "| --- | ---: | ---: |"]
    for run, own in times.items():
        rate = batch_size / statistics.median(own)
        lines.append(f"| {run} | {rate:.1f} | {ratio(own, eager):.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    models = ["tresnet_m", "resnet18", "tf_efficientnet_lite0"]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = f"{args.batch_size} x {args.image_size} px"
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}, {size}")
    for name in args.models:
        print("\n" + table(name, args.batch_size, args.image_size, args.rounds, args.compile))


if __name__ == "__main__":
    main()
