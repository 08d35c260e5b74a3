"""Time and memory of a training step's loss, forward and backward, as a markdown table.

python bench/losses.py [--device cuda] [--shapes 64x9605 128x80]

Every loss gets the same float32 logits and hard targets, and is called by turns with
BCEWithLogitsLoss; "x BCE" is the median of the ratios of neighbouring calls, "x transcription" the
quotient of two of them.
Peak extra memory is the most that one call held at once beyond what was there before, its gradient
included: on the CPU from the allocations that torch.profiler records, on CUDA from
torch.cuda.max_memory_allocated. "operations" are those that PyTorch dispatches, views and
allocations included, on any device but the CPU; there small batches take as long as it takes to
start them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from asl.losses import AsymmetricLoss, AsymmetricLossOptimized

Loss = Callable[[Tensor, Tensor], Tensor]


def transcription(logits: Tensor, targets: Tensor) -> Tensor:
    """The formula as the paper has it, an operation a term; gammas 4 and 1, margin 0.05."""
    p = torch.sigmoid(logits)
    q = (1 - p + 0.05).clamp(max=1)
    positive = targets * torch.log(p.clamp(min=1e-8))
    negative = (1 - targets) * torch.log(q.clamp(min=1e-8))
    pt = p * targets + q * (1 - targets)
    gamma = 1 * targets + 4 * (1 - targets)
    return -((positive + negative) * torch.pow(1 - pt, gamma)).sum()


def losses() -> dict[str, Loss]:
    from timm.loss import AsymmetricLossMultiLabel

    timm_loss = AsymmetricLossMultiLabel()
    timm_loss.reduction = "sum"  # older releases take no such argument: they always sum
    return {
        "transcription": transcription,
        "AsymmetricLoss": AsymmetricLoss(disable_torch_grad_focal_loss=False),
        "AsymmetricLossOptimized": AsymmetricLossOptimized(),
        "timm AsymmetricLossMultiLabel": timm_loss,
        "BCEWithLogitsLoss": torch.nn.BCEWithLogitsLoss(reduction="sum"),
    }


def step(loss: Loss, logits: Tensor, targets: Tensor) -> None:
    logits.grad = None
    loss(logits, targets).backward()


def milliseconds(loss: Loss, logits: Tensor, targets: Tensor) -> float:
    if logits.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(loss, logits, targets)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    step(loss, logits, targets)
    return 1e3 * (time.perf_counter() - begin)


def peak_mebibytes(loss: Loss, logits: Tensor, targets: Tensor) -> float:
    logits.grad = None
    if logits.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss, logits, targets)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
        step(loss, logits, targets)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    held = peak = 0
    for event in events:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


class Operations(TorchDispatchMode):
    """Counts what PyTorch dispatches."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def dispatched(loss: Loss) -> int:
    """Operations of a step on device "meta", which takes the way of an accelerator."""
    logits = torch.empty(8, 5, device="meta", requires_grad=True)
    targets = torch.empty(8, 5, device="meta")
    with Operations() as operations:
        step(loss, logits, targets)
    return operations.count


def table(batch: int, classes: int, labels_per_image: float, rounds: int, device: str) -> str:
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(batch, classes, generator=draw) - 2
    targets = (torch.rand(batch, classes, generator=draw) < labels_per_image / classes).float()
    logits, targets = logits.to(device).requires_grad_(), targets.to(device)
    contenders = losses()
    # Each loss by turns with cross-entropy and with nothing else: as in training, a call finds the
    # caches and the allocator as the call of a step before left them.
    median, to_bce = {}, {}
    baseline = contenders["BCEWithLogitsLoss"]
    for name, loss in contenders.items():
        pairs = [
            (milliseconds(loss, logits, targets), milliseconds(baseline, logits, targets))
            for _ in range(5 + rounds)
        ][5:]  # the first warm up
        median[name] = statistics.median(ms for ms, _ in pairs)
        to_bce[name] = statistics.median(ms / bce for ms, bce in pairs)
    peak = {name: peak_mebibytes(loss, logits, targets) for name, loss in contenders.items()}
    lines = [
        f"{batch} x {classes}, {labels_per_image:g} labels per image, {rounds} rounds:",
        "",
        "| loss | ms | x BCE | x transcription | peak extra MiB | x transcription | operations |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, ms in median.items():
        to_transcription = to_bce[name] / to_bce["transcription"]
        memory = peak[name] / peak["transcription"]
        lines.append(
            f"| {name} | {ms:.3f} | {to_bce[name]:.2f} | {to_transcription:.2f} "
            f"| {peak[name]:.2f} | {memory:.2f} | {dispatched(contenders[name])} |"
        )
    return "\n".join(lines)


def processor(device: torch.device) -> str:
    """What a GPU or the CPU is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str) -> str:
    threads = "" if device.startswith("cuda") else f", {torch.get_num_threads()} threads"
    return f"{processor(torch.device(device))}{threads}, PyTorch {torch.__version__}"


def shape(text: str) -> tuple[int, int]:
    batch, classes = text.split("x")
    return int(batch), int(classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(64, 9605), (128, 80)])
    parser.add_argument("--labels-per-image", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    print(f"Forward and backward, float32, hard targets. {machine(args.device)}.")
    for batch, classes in args.shapes:
        print()
        print(table(batch, classes, args.labels_per_image, args.rounds, args.device))


if __name__ == "__main__":
    main()
