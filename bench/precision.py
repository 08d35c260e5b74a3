"""What bfloat16 gains on this machine: images/s against float32, training and inference.

Both run in turn on the same batch, channels last; the figures are medians of the ratios of
neighbouring runs. `asl.distributed.precision` decides from them what `--amp auto` means on a CPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn


def train(model: nn.Module, images: Tensor, bfloat16: bool) -> None:
    model.train()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        logits = model(images)
    logits.float().square().sum().backward()
    model.zero_grad()


@torch.inference_mode()
def infer(model: nn.Module, images: Tensor, bfloat16: bool) -> None:
    model.eval()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        model(images)


def gain(run: Callable[..., None], model: nn.Module, images: Tensor, rounds: int) -> float:
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for bfloat16 in (False, True):
            start = time.perf_counter()
            run(model, images, bfloat16)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=160)
    options = parser.parse_args()
    size, batch = options.image_size, options.batch_size
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {batch} x {size} px\n")
    print("| model | training, bf16 / fp32 images/s | inference, bf16 / fp32 images/s |")
    print("| --- | ---: | ---: |")
    images = torch.rand(batch, 3, size, size).to(memory_format=torch.channels_last)
    for name in ("tresnet_m", "resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_100"):
        model = timm.create_model(name, num_classes=20).to(memory_format=torch.channels_last)
        gains = [gain(run, model, images, options.rounds) for run in (train, infer)]
        print(f"| {name} | {gains[0]:.2f} | {gains[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
