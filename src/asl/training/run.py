"""The folder of a training run: one owner, its settings, its log, its checkpoints.

config.yaml holds the settings, metrics.jsonl a line per epoch, last.pt what a resumed run goes on
from, best.pt the epoch with the highest mAP, .lock the process that the folder belongs to. Every
file is replaced as a whole: at no moment is one half-written.
"""

import fcntl
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from torch import Tensor

from asl import __version__, report
from asl.atomic import replacing
from asl.config import RESUME_LAST, Config
from asl.data.prior import RunningPrior, write_prior
from asl.distributed import rank, restarts, torchrun_name
from asl.errors import DataError, TrainingError, UsageError
from asl.models import checkpoint

# Settings in which a resumed run may differ from what it was: what is computed stays the same, but
# for rounding where the device differs.
MAY_CHANGE = (
    *("config", "data", "missing_images", "cache_dir", "max_pixels", "workers"),
    *("model_path", "pretrained", "device", "compile"),
    *("output", "overwrite", "resume", "checkpoint_every", "print_freq", "tensorboard", "profile"),
)


class State(Protocol):
    """What is saved of a training: `engine.Training`."""

    running_prior: RunningPrior | None

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The averaged and the regular state dict, as "ema" and "regular"."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on beside the weights."""


class Run:
    """The folder of a training run. Rank 0 writes; on other ranks saving and logging do nothing."""

    def __init__(self, config: Config) -> None:
        """Find the folder, and what to go on from. Nothing is written outside `owned`.

        Raises `UsageError` where there is a run that may not be overwritten, none to resume, or one
        with other settings, and `DataError` where its checkpoint cannot be read.
        """
        self.config, self.folder = config, run_folder(config)
        self.last, self.best = self.folder / "last.pt", self.folder / "best.pt"
        self.kept = self._kept()
        self.resumed = self.kept is not None
        self.history: list[dict[str, float]] = self.kept["history"] if self.kept else []
        self._classes: Sequence[str] = ()
        self._saved_at = time.monotonic()

    def _kept(self) -> dict[str, Any] | None:
        """The checkpoint to go on from: the folder's own, else the one that `--resume` names."""
        named = self.config.resume not in ("", RESUME_LAST)
        if _goes_on(self.config, self.folder) and self.last.exists():
            path = self.last
        elif named:
            path = Path(self.config.resume)
        else:
            return None
        kept = checkpoint.load(path)
        if not kept.keys() >= {"training", "config", "history", "epoch", "losses"}:
            raise UsageError(f"{path} holds weights and no run: start from it with --model-path")
        differing = [
            f"{name}: {kept['config'].get(name)} then, {value} now"
            for name, value in asdict(self.config).items()
            if name not in MAY_CHANGE and kept["config"].get(name) != value
        ]
        if differing:
            raise UsageError(
                f"{path} is of a run with other settings ({'; '.join(differing)}). "
                f"What may change: {', '.join(MAY_CHANGE)}"
            )
        return kept

    @contextmanager
    def owned(self, classes: Sequence[str]) -> Iterator[None]:
        """The folder belongs to this process inside the block; its settings are written.

        Raises `UsageError` where another process has it, and `DataError` where it cannot be
        written.
        """
        self._classes = classes
        if rank() != 0:
            yield
            return
        with ExitStack() as stack:
            with self._writing():
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(self.folder / ".lock"))
                stale = list(self.folder.glob(".*.part"))  # what a killed run was writing
                if not self.resumed:
                    stale += [self.last, self.best, self.folder / "metrics.jsonl"]
                for path in stale:
                    path.unlink(missing_ok=True)
                with replacing(self.folder / "config.yaml") as file:
                    file.write(self.config.to_yaml().encode())
            yield

    def is_due(self, steps: int) -> bool:
        """Whether `--checkpoint-every` asks for a checkpoint after that many steps of training."""
        every = self.config.checkpoint_every
        if every.endswith("min"):
            return time.monotonic() - self._saved_at >= 60 * int(every.removesuffix("min"))
        return bool(every) and steps % int(every) == 0

    def save(self, training: State, epoch: int, losses: Sequence[Tensor] = ()) -> None:
        """Write last.pt: `training` in `epoch` (from 0), after the steps that gave `losses`.

        Raises `TrainingError` where weights are not finite, and `DataError` where the file cannot
        be written. What was there before then stays.
        """
        self._saved_at = time.monotonic()
        if rank() != 0:
            return
        state = self._checkpoint(training)
        state |= {"training": training.state_dict(), "epoch": epoch}
        state["losses"] = torch.stack(list(losses)).cpu() if losses else torch.empty(0)
        checkpoint.save(self.last, state)

    def end_epoch(self, training: State, row: dict[str, float]) -> None:
        """Log the figures of an epoch and write the checkpoints that it earned."""
        if rank() != 0:
            return
        earlier = [best_map(old) for old in self.history]
        self.history.append(row)
        # The log comes after the checkpoint that has its rows: a run that is killed in between is
        # resumed with this epoch done, and writes the row with the next.
        if "mAP_ema" in row and best_map(row) > max(earlier, default=-1.0):
            checkpoint.save(self.best, self._checkpoint(training))
        self.save(training, int(row["epoch"]))
        self.write_log(training)
        if self.config.tensorboard:
            self._to_tensorboard(row)
        print(report.epoch_line(row))

    def write_log(self, training: State) -> None:
        """Write metrics.jsonl, and prior.csv if there is a running prior."""
        if rank() != 0:
            return
        with self._writing(), replacing(self.folder / "metrics.jsonl") as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in self.history)
        if training.running_prior is not None:
            write_prior(self.folder / "prior.csv", self._classes, training.running_prior.prior)

    def _checkpoint(self, training: State) -> dict[str, Any]:
        weights = training.weights()
        for name, tensors in weights.items():
            floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
            if not torch.nn.utils.get_total_norm(floating).isfinite():
                raise TrainingError(
                    f"the {name} weights are no longer finite: lower --lr or try --amp off. "
                    f"{self.folder} keeps the checkpoints from before"
                )
        row = next((row for row in reversed(self.history) if "mAP_ema" in row), None)
        regular_leads = row is not None and row["mAP_regular"] > row["mAP_ema"]
        return {
            **weights,
            "best": "regular" if regular_leads else "ema",
            "num_classes": len(self._classes),
            "idx_to_class": dict(enumerate(self._classes)),
            "config": asdict(self.config),
            "history": self.history,
            "provenance": provenance(),
        }

    def _to_tensorboard(self, row: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder)) as writer:
            for name in row.keys() - {"epoch"}:
                writer.add_scalar(name, row[name], int(row["epoch"]))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"cannot write into {self.folder}: {error.strerror}") from error


def run_folder(config: Config) -> Path:
    """Where the run is to live, or lived that is resumed; refuses to overwrite one unasked."""
    if config.output:
        folder = Path(config.output)
    else:
        name = Path(config.config).stem or f"{config.dataset}_{config.model_name}"
        folders = [Path("runs", name), *(Path("runs", f"{name}-{n}") for n in range(2, 1000))]
        free = next(i for i, folder in enumerate(folders) if not folder.exists())
        folder = folders[free - (free > 0 and _goes_on(config, folders[free - 1]))]
    goes_on = _goes_on(config, folder)
    # A run that was stopped while it estimated its prior has no checkpoint of its own yet.
    try:
        taken = (folder / "last.pt").exists() or (goes_on and (folder / "prior").exists())
    except OSError as error:  # a name that is too long, or a folder that is closed to us
        raise DataError(f"cannot write into {folder}: {error.strerror}") from error
    if config.resume == RESUME_LAST and not taken:
        raise UsageError(f"there is no run to resume in {folder}")
    if taken and not (goes_on or config.overwrite):
        raise UsageError(f"{folder} holds a run: pass --resume, --overwrite or another --output")
    return folder


def _goes_on(config: Config, folder: Path) -> bool:
    """Whether to go on with the run in `folder`: as asked, or as it is torchrun's that restarts."""
    if config.resume or not restarts():
        return bool(config.resume)
    # torchrun restarts the very command that failed, which may have been refused the folder.
    locks = [lock for lock in (folder / ".lock", folder / "prior" / ".lock") if lock.exists()]
    return any(lock.read_text().endswith(_by_torchrun()) for lock in locks)


def _by_torchrun() -> str:
    return f", torchrun {torchrun_name()}\n" if torchrun_name() else "\n"


def best_map(row: Mapping[str, float]) -> float:
    """The higher mAP of an epoch's two sets of weights; -1 if it was not validated."""
    return max(row.get("mAP_ema", -1.0), row.get("mAP_regular", -1.0))


def provenance() -> dict[str, str]:
    """What a published number should say of itself: the command, the commit, the versions."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "versions": f"asl {__version__}, torch {torch.__version__}, timm {timm.__version__}",
    }


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Own the file `path`, until this process ends at the latest: the kernel sees to that.

    The lock of a process, unlike that of a file descriptor, is not kept by loader workers that
    outlive it for a moment. The file says who has it.
    """
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UsageError(
                f"{path.parent} belongs to a run that is going on ({file.read().strip()}): "
                "wait for it, or choose another --output"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}{_by_torchrun()}")
        file.flush()
        yield
