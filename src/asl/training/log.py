"""What a person watches a run by: lines of figures, on disk and wherever else they are wanted.

metrics.jsonl has a line per epoch and is replaced as a whole. steps.jsonl has one every
`print_freq` steps and grows. Both are also sent to TensorBoard and Weights & Biases, if asked for.
"""

import json
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from asl.atomic import replacing
from asl.errors import UsageError
from asl.training.settings import TrainConfig

Row = dict[str, float | str | None]  # a line of the log
Sink = Callable[[str, Mapping[str, Any], int], None]  # kind of line, figures, step

EPOCHS, STEPS = "metrics.jsonl", "steps.jsonl"
# What an epoch took, which is not the same again. Only the log has it: two runs that compute the
# same leave the same checkpoints.
MEASURED = frozenset(
    {
        *("images_per_second", "seconds_training", "seconds_validation"),
        *("waited_for_data", "peak_memory_gb"),
    }
)


class Log:
    """The log of a run in `folder`. Only the process that owns the folder may open it."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self.epochs, self.steps = folder / EPOCHS, folder / STEPS
        self._folder, self._config = folder, config
        self._sinks: list[Sink] = []
        self._took: dict[Any, Row] = {}  # by epoch

    @contextmanager
    def opened(self, steps_done: int) -> Iterator[None]:
        """Inside the block lines can be added. Those of later steps than `steps_done` are dropped.

        They are of a run that was lost since: the same steps are taken, and written, again.
        What epochs took is read from the lines that are there.
        Raises `UsageError` where Weights & Biases cannot be had.
        """
        for row in _lines(self.epochs):
            self._took[row["epoch"]] = {name: row[name] for name in MEASURED & row.keys()}
        kept = [line for line in _lines(self.steps) if line["step"] <= steps_done]
        _write(self.steps, kept)
        with ExitStack() as stack, self.steps.open("a") as file:
            self._sinks = [_to_file(file)]
            if self._config.run.tensorboard:
                self._sinks.append(stack.enter_context(_to_tensorboard(self._folder)))
            if self._config.run.wandb:
                self._sinks.append(stack.enter_context(_to_wandb(self._folder, self._config)))
            yield
        self._sinks = []

    def add_step(self, **figures: float) -> None:
        """Add a line for a step, which "step" counts."""
        for sink in self._sinks:
            sink("step", figures, int(figures["step"]))

    def add_epoch(self, history: Sequence[Row], took: Row, steps: int) -> None:
        """Write the lines of all epochs. The last is new: so many steps are done, it took that."""
        self._took[history[-1]["epoch"]] = took
        self.write_epochs(history)
        numbers = {
            name: value
            for name, value in {**history[-1], **took}.items()
            if isinstance(value, (int, float))
        }
        for sink in self._sinks[1:]:  # the first is the file of steps
            sink("epoch", numbers, steps)

    def write_epochs(self, history: Sequence[Row]) -> None:
        """Write the lines of all epochs."""
        _write(self.epochs, [row | self._took.get(row["epoch"], {}) for row in history])


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that may not be there, or whose last line may be half-written."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"}\n")]


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(path) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def _to_file(file: Any) -> Sink:
    def write(kind: str, figures: Mapping[str, Any], step: int) -> None:
        file.write(json.dumps(figures) + "\n")
        file.flush()

    return write


@contextmanager
def _to_tensorboard(folder: Path) -> Iterator[Sink]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def write(kind: str, figures: Mapping[str, Any], step: int) -> None:
            at = int(figures["epoch"]) if kind == "epoch" else step
            for name, value in figures.items():
                if name != kind:
                    writer.add_scalar(name if kind == "epoch" else f"{kind}/{name}", value, at)
            writer.flush()

        yield write


@contextmanager
def _to_wandb(folder: Path, config: TrainConfig) -> Iterator[Sink]:
    try:
        import wandb
    except ImportError:
        raise UsageError("wandb needs a package: pip install -r requirements-wandb.txt") from None
    try:
        run = wandb.init(
            project=config.run.wandb,
            name=folder.name,
            dir=str(folder),
            config=config.flat(),
            resume="auto",  # of a run that was killed
        )
    except wandb.Error as error:
        raise UsageError(f"wandb: {error}; WANDB_MODE=offline needs no account") from None
    with run:

        def write(kind: str, figures: Mapping[str, Any], step: int) -> None:
            run.log({f"{kind}/{name}": value for name, value in figures.items()}, step=step)

        yield write


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that was in use, in 1e9 bytes: the device's since this was last asked.

    On a CPU it is that of this process since it started, without its loader workers.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
