"""Images/s of exported models, against PyTorch, for a batch of 1 and of 32: a markdown table.

python bench/export.py [--models tf_efficientnet_lite0 resnet18] [--compile]

All take turns on the same images; the figures are medians, and "x" the median of the ratios of
neighbouring runs to PyTorch as infer.py computes in float32 (channels last, BatchNorm folded). Time
is that of the process, with one thread each: what else the machine does is not in it. Weights are
random. --compile adds torch.compile, which takes half a minute for each model and batch.
"""

import argparse
import copy
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import onnxruntime
import torch
from step import ratio, seconds
from torch import Tensor

from asl.evaluation.average import Scores
from asl.evaluation.export import exported, in_onnxruntime
from asl.evaluation.int8 import quantized
from asl.evaluation.score import Scorer
from asl.images.settings import ImageSettings
from asl.models.build import create_model, normalization, place
from asl.models.inference import for_inference

CPU = torch.device("cpu")


def runners(name: str, size: int, compiled: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """What maps images (B, 3, S, S) to scores, by name; the first is the baseline."""
    built = create_model(name, 80, image_size=size).eval()
    model = Scores(for_inference(place(copy.deepcopy(built), CPU)))
    scorer = Scorer(
        (Scores(for_inference(copy.deepcopy(built))),),
        *((name,), ("only",), tuple(map(str, range(80))), normalization(built)),
        *(ImageSettings(image_size=size), CPU, "off", (size,)),
    )
    file = exported(scorer, "none", {}, to_onnx=True)
    small = quantized(file, [torch.randn(8, 3, size, size)])

    def halved(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(images)

    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "PyTorch, float32": model,
        "PyTorch, bfloat16": halved,
        "onnxruntime, float32": in_onnxruntime(file),
        "onnxruntime, int8": in_onnxruntime(small),
    }
    if compiled:
        runs["torch.compile, float32"] = torch.compile(model)
    return runs


@torch.no_grad()
def table(name: str, size: int, rounds: int, compiled: bool) -> str:
    columns: dict[str, list[str]] = {}
    runs = runners(name, size, compiled)
    for length in (1, 32):
        images = torch.randn(length, 3, size, size)
        last = images.to(memory_format=torch.channels_last)
        times = seconds(
            {run: lambda f=f, x=images if "onnx" in run else last: f(x) for run, f in runs.items()},
            rounds * (4 if length == 1 else 1),
        )
        first = next(iter(times.values()))
        for run, own in times.items():
            rate = f"{length / statistics.median(own):.1f}"
            columns.setdefault(run, []).extend((rate, f"{ratio(own, first):.2f}"))
    lines = [f"| {name} | images/s, batch 1 | x | images/s, batch 32 | x |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    lines += [f"| {run} | {' | '.join(cells)} |" for run, cells in columns.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    models = ["tf_efficientnet_lite0", "resnet18"]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    print(f"{platform.machine()}, 1 thread, {versions}, {args.image_size} px")
    for name in args.models:
        print("\n" + table(name, args.image_size, args.rounds, args.compile), flush=True)


if __name__ == "__main__":
    main()
