"""What a training step costs on one CPU core, against the conventional way: markdown tables.

python bench/step.py [--model tresnet_m] [--profile]

The first table is what a step does beside the forward and backward pass of the model, against
loops over the tensors: Adam and the moving average as the official scripts had them on a CPU, the
loss as the paper has it. The second is images/s of whole steps, `training.step.Training.step`,
against float32 in the usual memory format with those loops. --profile prints instead which
operations the time of a step goes to.

The contenders take turns; the figures are medians, ratios those of neighbouring runs. Time is that
of the process, with one thread: what else the machine does is not in it.
"""

import argparse
import copy
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import torch
from losses import transcription
from torch import Tensor, nn

from asl.models.build import create_model
from asl.training.loss import create_loss
from asl.training.settings import LossSettings, StepSettings
from asl.training.step import Training

CLASSES = 80
DECAY = 0.9997
CPU = torch.device("cpu")
# Operations by what they are for; all others go by their own name.
PARTS = {
    "convolution": ("aten::mkldnn_convolution", "aten::convolution_backward"),
    "normalisation": ("aten::native_batch_norm", "aten::native_batch_norm_backward"),
    "activation": (
        *("aten::leaky_relu_", "aten::leaky_relu_backward"),
        *("aten::clamp_min_", "aten::threshold_backward"),
    ),
    "Adam": ("aten::_fused_adam_", "Optimizer.step#Adam.step"),
    "moving average": ("aten::_foreach_lerp_", "aten::lerp_"),
    "pooling": ("aten::avg_pool2d", "aten::avg_pool2d_backward"),
}


class Loops:
    """Optimizer, moving average and loss, a tensor and an operation at a time."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.average = model, copy.deepcopy(model)
        plain = [p for p in model.parameters() if p.ndim <= 1]
        decayed = [p for p in model.parameters() if p.ndim > 1]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed}]
        self.optimizer = torch.optim.Adam(groups, 1e-4, weight_decay=1e-4, foreach=False)

    @torch.no_grad()
    def update_average(self) -> None:
        """As the official ModelEma has it."""
        pairs = zip(
            self.average.state_dict().values(), self.model.state_dict().values(), strict=True
        )
        for average, tensor in pairs:
            average.copy_(DECAY * average + (1 - DECAY) * tensor)

    def step(self, images: Tensor, targets: Tensor) -> None:
        """One update, without a schedule."""
        transcription(self.model(images).float(), targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_average()


def training(model: nn.Module, amp: str = "off") -> Training:
    loss, settings = create_loss(LossSettings()), StepSettings(ema_decay=DECAY)
    return Training(model, loss, settings, batches_per_epoch=1000, device=CPU, amp=amp)


def seconds(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """The seconds of each of the runs, which take turns for so many rounds after one.

    What is done `before` each of them does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            before()
            start = clock()
            run()
            if turn > 0:
                times[name].append(clock() - start)
    return times


def ratio(baseline: list[float], own: list[float]) -> float:
    """What part of the baseline's time `own` took, as the median over the rounds."""
    return statistics.median(own / base for base, own in zip(baseline, own, strict=True))


def update_table(name: str, batch_size: int, rounds: int) -> str:
    model = create_model(name, CLASSES).to(memory_format=torch.channels_last)
    fast, loops = training(model), Loops(model)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    logits = torch.randn(batch_size, CLASSES, requires_grad=True)
    targets = (torch.rand(batch_size, CLASSES) < 3 / CLASSES).float()
    times = seconds(
        {
            "loops: loss": lambda: transcription(logits, targets).backward(),
            "loss": lambda: fast.loss(logits, targets).backward(),
            "loops: optimizer": loops.optimizer.step,
            "optimizer": fast.optimizer.step,
            "loops: moving average": loops.update_average,
            "moving average": fast.average,
        },
        rounds,
    )
    parts = [part for part in times if not part.startswith("loops")]
    for kind in ("loops: ", ""):
        times[f"{kind}all three"] = [
            sum(each) for each in zip(*(times[kind + part] for part in parts), strict=True)
        ]
    lines = [
        f"| {name}, {batch_size} x {CLASSES} | loops, ms | asl, ms | asl / loops |",
        "| --- | ---: | ---: | ---: |",
    ]
    for part in (*parts, "all three"):
        plain, own = times[f"loops: {part}"], times[part]
        lines.append(
            f"| {part} | {1e3 * statistics.median(plain):.1f} | {1e3 * statistics.median(own):.1f} "
            f"| {ratio(plain, own):.2f} |"
        )
    return "\n".join(lines)


def batch(batch_size: int, image_size: int) -> tuple[Tensor, Tensor]:
    images = torch.rand(batch_size, 3, image_size, image_size)
    return images, (torch.rand(batch_size, CLASSES) < 3 / CLASSES).float()


def training_table(name: str, images: Tensor, targets: Tensor, rounds: int) -> str:
    def contender(layout: torch.memory_format, amp: str) -> Callable[[], object]:
        step = training(create_model(name, CLASSES).to(memory_format=layout), amp).step
        ready = images.to(memory_format=layout)
        return lambda: step(ready, targets)

    def deterministic(step: Callable[[], object]) -> None:
        torch.use_deterministic_algorithms(True)
        step()
        torch.use_deterministic_algorithms(False)

    usual = Loops(create_model(name, CLASSES).train())
    own = contender(torch.channels_last, "off")
    times = seconds(
        {
            "float32, contiguous, loops": lambda: usual.step(images, targets),
            "float32, channels last": own,
            "float32, channels last, deterministic": lambda: deterministic(own),
            "bfloat16, contiguous": contender(torch.contiguous_format, "bf16"),
            "bfloat16, channels last": contender(torch.channels_last, "bf16"),
        },
        rounds,
    )
    lines = [f"| {name}, {list(images.shape)} | images/s | x first |", "| --- | ---: | ---: |"]
    for run, own in times.items():
        rate = len(images) / statistics.median(own)
        gain = 1 / ratio(times["float32, contiguous, loops"], own)
        lines.append(f"| {run} | {rate:.2f} | {gain:.2f} |")
    return "\n".join(lines)


def shares(name: str, images: Tensor, targets: Tensor, amp: str, steps: int) -> dict[str, float]:
    """The share of each operation, or part of `PARTS`, in the time of a training step."""
    step = training(create_model(name, CLASSES).to(memory_format=torch.channels_last), amp).step
    images = images.to(memory_format=torch.channels_last)
    step(images, targets)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step(images, targets)
    part_of = {operation: part for part, names in PARTS.items() for operation in names}
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        times[part_of.get(event.key, event.key)] += event.self_cpu_time_total
    return {part: spent / sum(times.values()) for part, spent in times.items()}


def profile_table(name: str, images: Tensor, targets: Tensor, steps: int) -> str:
    kinds = ("off", "bf16")
    full, half = (shares(name, images, targets, amp, steps) for amp in kinds)
    listed = sorted(full, key=full.__getitem__, reverse=True)[:18]
    lines = [f"| {name}, share of a step | float32 | bfloat16 |", "| --- | ---: | ---: |"]
    lines += [f"| {part} | {full[part]:.2%} | {half.get(part, 0):.2%} |" for part in listed]
    rest = [1 - sum(each.get(part, 0) for part in listed) for each in (full, half)]
    return "\n".join([*lines, f"| all else | {rest[0]:.2%} | {rest[1]:.2%} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tresnet_m")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}\n")
    images, targets = batch(args.batch_size, args.image_size)
    if args.profile:
        print(profile_table(args.model, images, targets, steps=3))
        return
    print(update_table(args.model, 64, 4 * args.rounds) + "\n")
    print(training_table(args.model, images, targets, args.rounds))


if __name__ == "__main__":
    main()
