"""Runs that are killed and starved of disk must end as if nothing had happened.

    python tests/chaos.py --kills 100 --rank-kills 20 --full-disks 20 --seed 0

A short training is killed at random moments and told to `--resume`, again and again; the same with
one of two ranks of torchrun, and with a disk that fills up. After every end each file of the run
folder must be readable, and a run that has come to its last epoch must have the weights, optimizer
state and log of one that nobody disturbed, bit for bit. Prints a table in Markdown; exits with 1
and says what is wrong otherwise.

A run of one process is a fork of this one, which has imported already what takes seconds: the
kills hit the run, not the imports.
"""

import argparse
import fcntl
import json
import math
import mmap
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from PIL import Image
from run_log import figures_of, rows_of
from tqdm import tqdm

from asl.config import read_recipe
from asl.data.readers.shapes import draw_shapes
from asl.evaluation import score
from asl.models import checkpoint
from asl.training.settings import TrainConfig
from asl.training.step import Training

REPOSITORY = Path(__file__).resolve().parents[1]
PHASES = ("start-up", "training", "validation", "writing a checkpoint")
RANKS = 2
# What a later start may change in a checkpoint: that it is told to resume, and where.
ABOUT_THE_START = {"config", "provenance", "commit"}


class Wrong(Exception):
    """A promise that was not kept."""


def arguments(epochs, output, *more):
    return [
        *("train.py", "data", "--model-name", "test_resnet", "--image-size", "48"),
        *("--batch-size", "8", "--lr", "1e-3", "--ema-decay", "0.9", "--running-prior"),
        *("--adaptive-gamma", "0.3", "--checkpoint-every", "3", "--print-freq", "1"),
        *("--epochs", str(epochs), "--amp", "off", "--device", "cpu"),
        *("--output", str(output), *more),
    ]


class Process:
    """train.py in a fork of this process, and what it does at the moment."""

    def __init__(self, words):
        self._phase = mmap.mmap(-1, 1)
        self._out, out = os.pipe()
        fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, 2**20)  # it is not read before the end
        self.pid = os.fork()
        if self.pid == 0:
            self._run(words, out)
        os.close(out)

    def _run(self, words, out):
        code = 1
        try:
            # Forks share the lock of progress bars: one that is killed would keep it for ever.
            tqdm.set_lock(threading.RLock())
            os.dup2(out, 1)
            os.dup2(out, 2)
            self._note(Training, "step", 1)
            self._note(score, "score", 2)
            self._note(checkpoint, "save", 3)
            sys.argv = words
            runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _note(self, owner, name, phase):
        call = getattr(owner, name)

        def noted(*given, **named):
            self._phase[0] = phase
            try:
                return call(*given, **named)
            finally:
                self._phase[0] = 1

        setattr(owner, name, noted)

    @property
    def phase(self):
        return PHASES[self._phase[0]]

    def wait(self, seconds=math.inf, phase=None):
        """Exit code and output; None where it still runs after that time, or is past `phase`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and phase in (None, self.phase):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.set_blocking(self._out, False)  # loader workers may have it open for a while
                text = os.read(self._out, 2**20).decode(errors="replace")
                os.close(self._out)
                return os.waitstatus_to_exitcode(status), text
            time.sleep(0.002)
        return None


def wait_at_random(process, chance, undisturbed, times):
    """Wait until a random moment of a run that is to have `times` of them.

    One in four is in the start-up. The others are counted from its end, so that the run gets on
    however slow the machine is at the time.
    """
    if chance.random() < 0.25:
        return process.wait(chance.uniform(0, undisturbed.start))
    ended = process.wait(phase=PHASES[0])
    return ended or process.wait(chance.uniform(0, 3 * undisturbed.rest / times))


def check_readable(folder):
    """Every file of a run is whole, or not there."""
    try:
        for path in folder.glob("*.pt"):
            for tensor in checkpoint.load(path)["model"].values():
                tensor.sum()  # a mapped file is read when it is used
        for line in lines_of(folder):
            json.loads(line)
        for path in folder.glob("*.yaml"):
            read_recipe(path, TrainConfig)
        for path in folder.glob("*.png"):
            with Image.open(path) as picture:
                picture.load()
    except Exception as error:
        raise Wrong(f"{folder} has a file that cannot be read: {error!r}") from error


def lines_of(folder):
    log = folder / "metrics.jsonl"
    return log.read_bytes().splitlines() if log.exists() else []


def difference(one, other, where=""):
    """The place of the first difference between two checkpoints, or None."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{where}: {one.keys() ^ other.keys()}"
        pairs = ((key, one[key], other[key]) for key in one if key not in ABOUT_THE_START)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)} entries"
        pairs = ((i, *pair) for i, pair in enumerate(zip(one, other, strict=True)))
    elif isinstance(one, torch.Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        same = same and one.numpy().tobytes() == other.numpy().tobytes()
        return None if same else where
    else:
        return None if one == other or (one != one and other != other) else where
    found = (difference(a, b, f"{where}/{key}") for key, a, b in pairs)
    return next((place for place in found if place), None)


def check_same(folder, reference):
    """A finished run is what it would have been."""
    if figures_of(folder) != figures_of(reference):
        raise Wrong(f"{folder}/metrics.jsonl has other figures than that of {reference}")
    if (folder / "prior.csv").read_bytes() != (reference / "prior.csv").read_bytes():
        raise Wrong(f"{folder}/prior.csv is not that of {reference}")
    steps, expected = (
        [row["step"] for row in rows_of(each, "steps.jsonl")] for each in (folder, reference)
    )
    if steps != expected:
        raise Wrong(f"{folder}/steps.jsonl has steps {steps}, not {expected}")
    for name in ("last.pt", "best.pt"):
        place = difference(checkpoint.load(folder / name), checkpoint.load(reference / name))
        if place:
            raise Wrong(f"{folder}/{name} differs from that of {reference} in {place}")
    left = [path.name for path in folder.glob(".*.part")]
    if left:
        raise Wrong(f"{folder} is left with {left}")


def steps_of(folder):
    path = folder / "last.pt"
    return checkpoint.load(path)["training"]["steps"] if path.exists() else 0


def resuming(folder):
    return ["--resume"] if (folder / "last.pt").exists() else []


class Undisturbed(NamedTuple):
    """A run to compare with: its folder, the seconds to the first step, and those after it."""

    folder: Path
    start: float
    rest: float


@cache
def undisturbed(epochs):
    """Train to the end."""
    folder, begun = Path("undisturbed").absolute(), time.monotonic()
    process = Process(arguments(epochs, folder, "--workers", "1"))
    ended = process.wait(phase=PHASES[0])
    first = time.monotonic()
    code, text = ended or process.wait()
    if code != 0:
        raise Wrong(f"the undisturbed run failed:\n{text}")
    check_readable(folder)
    return Undisturbed(folder, first - begun, time.monotonic() - first)


def kill_processes(times, epochs, chance):
    """`kill -9` at random moments, each followed by `--resume`; returns a row of the table."""
    reference = undisturbed(epochs)
    hit, runs, folder = Counter(), 0, Path("killed-0")
    while sum(hit.values()) < times or runs == 0:
        workers = ["--workers", str(chance.choice((0, 1, 2)))]
        process = Process(arguments(epochs, folder, *workers, *resuming(folder)))
        if sum(hit.values()) < times:
            ended = wait_at_random(process, chance, reference, times)
        else:
            ended = process.wait()
        if ended is None:
            os.kill(process.pid, signal.SIGKILL)
            ended = process.wait()
        check_readable(folder)
        if ended[0] == -signal.SIGKILL:
            hit[process.phase] += 1
            say(f"kill {sum(hit.values())}: {process.phase}, {steps_of(folder)} steps saved")
            continue
        if ended[0] != 0:
            raise Wrong(f"a resumed run failed:\n{ended[1]}")
        check_same(folder, reference.folder)
        runs, folder = runs + 1, Path(f"killed-{runs + 1}")
    return "`kill -9` of the process", times, in_words(hit), runs


def kill_ranks(times, epochs, chance):
    """`kill -9` of one rank of torchrun's, each followed by a new start with `--resume`."""
    reference, folder = Path("undisturbed-ranks"), Path("killed-ranks-0")
    begun = time.monotonic()
    code, text, _ = torchrun(arguments(epochs, reference, "--workers", "0"))
    if code != 0:
        raise Wrong(f"the undisturbed run failed:\n{text}")
    longest, hit, slowest, runs = (time.monotonic() - begun), Counter(), 0.0, 0
    while sum(hit.values()) < times or runs == 0:
        victim, patience = chance.randrange(RANKS), chance.uniform(0, longest)
        if sum(hit.values()) == times:
            victim = None
        words = arguments(epochs, folder, "--workers", "0", *resuming(folder))
        code, text, seconds = torchrun(words, victim, patience)
        check_readable(folder)
        if seconds is not None:
            hit[f"rank {victim}"] += 1
            slowest = max(slowest, seconds)
            if seconds > 60 or "Signal 9 (SIGKILL)" not in text:
                raise Wrong(f"a rank was killed; after {seconds:.0f} s exit {code}:\n{text}")
            say(f"rank {victim} killed: ended in {seconds:.1f} s, {steps_of(folder)} steps saved")
            continue
        if code != 0:
            raise Wrong(f"a resumed run failed:\n{text}")
        check_same(folder, reference)
        runs, folder = runs + 1, Path(f"killed-ranks-{runs + 1}")
    ended = f"{in_words(hit)}; all ended within {slowest:.0f} s"
    return f"`kill -9` of one of torchrun's {RANKS} ranks", times, ended, runs


def torchrun(words, victim=None, patience=0.0):
    """Exit code, output, and the seconds to the end after rank `victim` was killed, if it was."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={RANKS}", str(REPOSITORY / words[0]), *words[1:]]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        killed = None
        if victim is not None:
            while len(ranks := ranks_of(process)) < RANKS and process.poll() is None:
                time.sleep(0.02)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.kill(ranks[victim], signal.SIGKILL)
                    killed = time.monotonic()
        code = process.wait()
        seconds = time.monotonic() - killed if killed and code != 0 else None
        out.seek(0)
        return code, out.read(), seconds


def ranks_of(process):
    """The processes that a torchrun has started, in the order of their ranks."""
    found = {}
    with suppress(OSError):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        for pid in map(int, children.split()):
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found[int(entry.removeprefix(b"RANK="))] = pid
    return [found[rank] for rank in sorted(found)]


def fill_disks(times, epochs, chance):
    """A disk that is full at a random moment, by turns a small tmpfs and a limit of file sizes."""
    reference = undisturbed(epochs)
    size = (reference.folder / "last.pt").stat().st_size
    with small_disk(4 * size) as disk:
        hit, runs, folder = Counter(), 0, disk / "run-0"
        while sum(hit.values()) < times or runs == 0:
            process = Process(arguments(epochs, folder, "--workers", "0", *resuming(folder)))
            if sum(hit.values()) < times:
                ended = wait_at_random(process, chance, reference, times)
            else:
                ended = process.wait()
            if ended is None:
                room, phase = chance.randrange(size), process.phase
                way = fill(process, disk, room, by_limit=sum(hit.values()) % 2)
                ended = process.wait()
                (disk / "ballast").unlink(missing_ok=True)
                check_readable(folder)
                if ended[0] != 0:
                    check_message(*ended)
                    hit[f"{phase} ({way})"] += 1
                    say(f"full disk ({way}, {phase}): {ended[1].splitlines()[-1]}")
                    continue
            if ended[0] != 0:
                raise Wrong(f"a resumed run failed:\n{ended[1]}")
            check_readable(folder)
            check_same(folder, reference.folder)
            shutil.rmtree(folder)
            runs, folder = runs + 1, disk / f"run-{runs + 1}"
    return "The disk is full", times, in_words(hit), runs


def fill(process, disk, room, by_limit):
    """Leave `room` bytes to a process; returns by what."""
    if by_limit or not disk.is_mount():
        with suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
        return "limit"
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - room
            if free <= 0:
                break
            ballast.write(bytes(min(free, 2**20)))
    return "tmpfs"


@contextmanager
def small_disk(size):
    """A folder on a disk of `size` bytes where that may be mounted, else one like any other."""
    disk = Path("disk").absolute()
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    with suppress(OSError):
        subprocess.run(mount, capture_output=True, check=False)
    try:
        yield disk
    finally:
        if disk.is_mount():
            subprocess.run(["umount", "--lazy", str(disk)], check=False)


def check_message(code, text):
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if code not in (1, 2) or len(errors) != 1 or "Traceback" in text:
        raise Wrong(f"a full disk gave exit {code} and no message of one line:\n{text}")


def in_words(hit):
    return ", ".join(f"{name} {number}" for name, number in sorted(hit.items()))


def say(text):
    print(text, file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rank-kills", type=int, default=20)
    parser.add_argument("--full-disks", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=60, help="of 10 steps and a validation")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chance, rows = random.Random(chosen.seed), []
    here = tempfile.mkdtemp(prefix="chaos-")
    os.chdir(here)
    os.environ["XDG_CACHE_HOME"] = f"{here}/cache"
    draw_shapes(Path("data"), train=80, val=20, processes=1)
    trials = {
        kill_processes: chosen.kills,
        kill_ranks: chosen.rank_kills,
        fill_disks: chosen.full_disks,
    }
    try:
        for trial, times in trials.items():
            if times:
                rows.append(trial(times, chosen.epochs, chance))
    except Wrong as error:
        sys.exit(f"{error}\nThe runs are in {here}")
    os.chdir("/")
    shutil.rmtree(here, ignore_errors=True)
    print("| What happened | Times | When it hit | Whole runs, each equal to the undisturbed |")
    print("|---|---:|---|---:|")
    for row in rows:
        print("| {} | {} | {} | {} |".format(*row))


if __name__ == "__main__":
    main()
