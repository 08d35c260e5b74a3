"""The folder of a training run: one owner, its settings, its log, its checkpoints.

config.yaml holds the settings, metrics.jsonl and steps.jsonl are the log, last.pt is what a resumed
run goes on from, best.pt the epoch with the highest mAP, .lock the process that the folder belongs
to. All but steps.jsonl, which grows, are replaced as a whole: at no moment is one half-written.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from asl.atomic import replacing
from asl.config import RESUME_LAST, write_recipe
from asl.data.prior import write_prior
from asl.distributed import rank, restarts, torchrun_name
from asl.errors import DataError, Interrupted, TrainingError, UsageError
from asl.evaluation.provenance import commit, provenance
from asl.evaluation.text import epoch_line
from asl.models import checkpoint
from asl.training.log import MEASURED, Log, Row
from asl.training.reference import Reference
from asl.training.settings import TrainConfig
from asl.training.step import Training

# Settings in which a resumed run may differ from what it was: what is computed stays the same, but
# for rounding where the device differs.
MAY_CHANGE = (
    *("config", "data", "missing_images", "cache_dir", "max_pixels", "workers"),
    *("model_path", "pretrained", "device", "compile", "cache_features"),
    *("stop_epoch", "patience", "val_every", "threshold"),
    *("output", "overwrite", "resume", "dry_run", "checkpoint_every"),
    *("print_freq", "tensorboard", "wandb", "profile", "reference"),
)
UNDEFINED = -1.0  # the mAP of an epoch that has none
SETTINGS = "config.yaml"
# What that file does not repeat: as a recipe it would write into this very folder, or delete it.
OF_THIS_START = ("config", "output", "overwrite", "resume", "dry_run")


class Run:
    """The folder of a training run. Rank 0 writes; on other ranks saving and logging do nothing."""

    def __init__(self, config: TrainConfig) -> None:
        """Find the folder, and what to go on from. Nothing is written outside `owned`.

        Raises `UsageError` where there is a run that may not be overwritten, none to resume, or one
        with other settings, and `DataError` where its checkpoint cannot be read.
        """
        self.config, self.folder = config, run_folder(config)
        self.last, self.best = self.folder / "last.pt", self.folder / "best.pt"
        self._checkpoint = self._find_checkpoint()
        self.resumed = self._checkpoint is not None
        self.history: list[Row] = self._checkpoint["history"] if self._checkpoint else []
        self._first_epoch: int = self._checkpoint["epoch"] if self._checkpoint else 0
        self._classes: Sequence[str] = ()
        self._saved_at = time.monotonic()
        self.log = Log(self.folder, config)
        named = config.run.reference
        self.reference = Reference(named) if named else None

    def _find_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint to go on from: the folder's own, else the one that `--resume` names."""
        resume = self.config.run.resume
        if _goes_on(self.config, self.folder) and self.last.exists():
            path = self.last
        elif resume not in ("", RESUME_LAST):
            path = Path(resume)
        else:
            return None
        found = checkpoint.load(path)
        if not found.keys() >= {"training", "config", "history", "epoch", "losses"}:
            raise UsageError(f"{path} holds weights and no run: start from it with --model-path")
        # A setting that is newer than the checkpoint had its default.
        then = TrainConfig().flat() | found["config"]
        differing = [
            f"{name}: {then[name]} then, {value} now"
            for name, value in self.config.flat().items()
            if name not in MAY_CHANGE and then[name] != value
        ]
        if differing:
            raise UsageError(
                f"{path} is of a run with other settings ({'; '.join(differing)}). "
                f"What may change: {', '.join(MAY_CHANGE)}"
            )
        return found

    def restore(self, training: Training) -> None:
        """Bring `training` to where the checkpoint was written, if there is one to go on from.

        Raises `DataError` for a checkpoint whose state is not that of such a training.
        """
        if self._checkpoint is None:
            return
        try:
            training.load_state_dict(self._checkpoint["training"], self._checkpoint)
            training.epoch = self._checkpoint["epoch"]
            losses = self._checkpoint["losses"].to(training.device, copy=True)
            training.losses = list(losses)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{self.last}: this run cannot go on from it: {reason}") from error
        # The file is mapped. A disk has no room for others as long as that is so.
        self._checkpoint = None

    @contextmanager
    def owned(self, training: Training, classes: Sequence[str]) -> Iterator[None]:
        """The folder belongs to this process inside the block; its settings are written.

        Of a run that goes on, the log is written anew: it may lack the last epoch. A block that is
        `Interrupted` leaves its state in last.pt.

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
                    stale += [self.last, self.best, self.log.epochs, self.log.steps]
                for path in stale:
                    path.unlink(missing_ok=True)
                settings = self.folder / SETTINGS
                with replacing(settings) as file:
                    file.write(write_recipe(self.config.explicit(), OF_THIS_START).encode())
                stack.enter_context(self.log.opened(training.steps))
            print(f"settings that differ from the defaults (all of them: {settings})")
            for name, value in self.config.changed().items():
                print(f"  {name}: {value}")
            if self.resumed:
                with self._writing():
                    self.log.write_epochs(self.history)
                self._write_prior(training)
            try:
                yield
            except Interrupted:
                self.save(training)
                raise

    def validates(self, epoch: int) -> bool:
        """Whether that epoch (from 0) ends with a validation: every N-th does, and the last."""
        return (epoch + 1) % self.config.run.val_every == 0 or epoch + 1 == self.config.last_epoch

    def traces(self, epoch: int) -> bool:
        """Whether `--profile` asks for a trace of that epoch: of the first after a start."""
        return self.config.run.profile and epoch == self._first_epoch

    def is_due(self, steps: int) -> bool:
        """Whether `--checkpoint-every` asks for a checkpoint after that many steps of training."""
        every = self.config.run.checkpoint_every
        if every.endswith("min"):
            return time.monotonic() - self._saved_at >= 60 * int(every.removesuffix("min"))
        return bool(every) and steps % int(every) == 0

    def save(self, training: Training) -> None:
        """Write last.pt.

        Raises `TrainingError` where a loss or weights are not finite, and `DataError` where the
        file cannot be written. What was there before then stays.
        """
        training.finite_losses()
        self._saved_at = time.monotonic()
        if rank() != 0:
            return
        state = self._weights(training)
        state |= {"training": training.state_dict(), "epoch": training.epoch}
        state["losses"] = torch.stack(training.losses).cpu() if training.losses else torch.empty(0)
        checkpoint.save(self.last, state)

    def record(self, training: Training, row: Row) -> None:
        """End an epoch: log its figures and write the checkpoints that it earned."""
        training.end_epoch()
        if rank() != 0:
            return
        took = {name: row[name] for name in MEASURED & row.keys()}
        row = {name: value for name, value in row.items() if name not in took}
        row["commit"] = commit()
        row = {name: None if value != value else value for name, value in row.items()}  # no NaN
        earlier = [best_map(old) for old in self.history]
        self.history.append(row)
        # The log is written after the checkpoint that has its rows. A run that is killed in between
        # is resumed with this epoch done, and writes the row then.
        highest = max(earlier, default=UNDEFINED)
        if "mAP_ema" in row and (best_map(row) > highest or highest == UNDEFINED):
            checkpoint.save(self.best, self._weights(training))
        self.save(training)
        with self._writing():
            self.log.add_epoch(self.history, took, training.steps)
        self._write_prior(training)
        reached = self.reference.said(row) if self.reference else ""
        print(epoch_line({**row, **took}) + reached)

    def record_step(self, training: Training, images_per_second: float) -> None:
        """Add a line on the last step to the log. It waits for the device."""
        losses = training.finite_losses()
        if rank() != 0:
            return
        with self._writing():
            self.log.add_step(
                step=training.steps,
                epoch=training.epoch + 1,
                loss=losses[-1],
                lr=training.lr,
                images_per_second=round(images_per_second, 1),
            )

    def has_stalled(self) -> bool:
        """Whether the best mAP is `patience` epochs old. Known on rank 0."""
        rows = [row for row in self.history if best_map(row) > UNDEFINED]
        if self.config.run.patience is None or not rows:
            return False
        best = max(rows, key=best_map)  # the first of equal ones
        return len(self.history) - _number(best["epoch"]) >= self.config.run.patience

    def _write_prior(self, training: Training) -> None:
        if training.running_prior is not None:
            write_prior(self.folder / "prior.csv", self._classes, training.running_prior.prior)

    def _weights(self, training: Training) -> dict[str, Any]:
        """A checkpoint to start from or to evaluate."""
        weights = training.weights()
        for name, tensors in weights.items():
            floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
            if not torch.nn.utils.get_total_norm(floating).isfinite():
                raise TrainingError(
                    f"the {name} weights are no longer finite: lower --lr or try --amp off. "
                    f"{self.folder} keeps the checkpoints from before"
                )
        row = next((row for row in reversed(self.history) if "mAP_ema" in row), {})
        regular_leads = _number(row.get("mAP_regular")) > _number(row.get("mAP_ema"))
        return {
            **weights,
            "best": "regular" if regular_leads else "ema",
            "num_classes": len(self._classes),
            "idx_to_class": dict(enumerate(self._classes)),
            "config": self.config.flat(),
            "history": self.history,
            "provenance": provenance(),
        }

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"cannot write into {self.folder}: {error.strerror}") from error


def run_folder(config: TrainConfig) -> Path:
    """Where the run is to live, or lived that is resumed; refuses to overwrite one unasked."""
    folder = Path(config.run.output) if config.run.output else _free_folder(config)
    goes_on = _goes_on(config, folder)
    # A run that was stopped while it estimated its prior has no checkpoint of its own yet.
    try:
        taken = (folder / "last.pt").exists() or (goes_on and (folder / "prior").exists())
    except OSError as error:  # a name that is too long, or a folder that is closed to us
        raise DataError(f"cannot write into {folder}: {error.strerror}") from error
    if config.run.resume == RESUME_LAST and not taken:
        raise UsageError(f"there is no run to resume in {folder}")
    if taken and not (goes_on or config.run.overwrite):
        raise UsageError(f"{folder} holds a run: pass --resume, --overwrite or another --output")
    return folder


def _free_folder(config: TrainConfig) -> Path:
    """`runs/<recipe>` with the first number that is free, or the one before it to go on there."""
    recipe = Path(config.run.config)
    # A run's own settings may be the recipe of the next.
    name = recipe.absolute().parent.name if recipe.name == SETTINGS else recipe.stem
    name = name or f"{config.data.dataset}_{config.model.model_name}"
    folders = [Path("runs", name), *(Path("runs", f"{name}-{n}") for n in range(2, 1000))]
    free = next(i for i, folder in enumerate(folders) if not folder.exists())
    return folders[free - (free > 0 and _goes_on(config, folders[free - 1]))]


def _goes_on(config: TrainConfig, folder: Path) -> bool:
    """Whether to go on with the run in `folder`: as asked, or as torchrun restarts it."""
    if config.run.resume or not restarts():
        return bool(config.run.resume)
    # torchrun restarts the very command that failed, which may have been refused the folder.
    locks = [lock for lock in (folder / ".lock", folder / "prior" / ".lock") if lock.exists()]
    return any(lock.read_text().endswith(_by_torchrun()) for lock in locks)


def _by_torchrun() -> str:
    return f", torchrun {torchrun_name()}\n" if torchrun_name() else "\n"


def best_map(row: Row) -> float:
    """The higher mAP of an epoch's two sets of weights; -1 where it was not measured or defined."""
    return max(_number(row.get("mAP_ema")), _number(row.get("mAP_regular")))


def _number(figure: float | str | None) -> float:
    return figure if isinstance(figure, (int, float)) else UNDEFINED


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
