"""Processes of a real torchrun: N of them train, measure and end as one does."""

import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from chaos import ranks_of
from run_log import figures_of

from asl.data.prior import read_prior
from asl.data.readers.shapes import CLASSES
from asl.distributed import Vote, gather_dealt, process_group, rank, world_size
from asl.errors import Interrupted, UsageError
from asl.models import checkpoint
from asl.training import fit as loop
from asl.training.fit import fit
from asl.training.settings import TrainConfig
from asl.training.step import Training

# Side by side, each worker would start the same processes for its share of the tests.
pytestmark = pytest.mark.xdist_group("torchrun")

REPOSITORY = Path(__file__).parents[2]
SHAPES = [" ".join(words) for words in CLASSES]
# Without batch statistics, so that the number of ranks makes no difference but rounding.
MODEL = ("--model-name", "test_vit", "--image-size", "48", "--amp", "off", "--device", "cpu")
# 40 images: the last batch has six, two for each of three ranks.
TRAIN = ("--batch-size", 17, "--lr", 1e-4, "--ema-decay", 0.9, "--workers", 0, *MODEL)
LONG = ("train.py", "--epochs", 200, "--checkpoint-every", 1, *TRAIN)
HEAD = ("--epochs", 2, "--freeze", "backbone", "--augment", "none", "--cache-features")
STATE = ("--running-prior", "--adaptive-gamma", 0.3, "--accumulate", 2)
# 20 images in 7 batches: neither 2 nor 3 ranks get equally many.
MEASURE = ("--model-path", "one.pt", "--batch-size", 3, "--workers", 0, *MODEL)
PRIOR = ("--estimate-prior",)
PICTURES = ("--pic-path", "pictures", "--output")
CHOOSE = ("--tune-thresholds", "f1", "--calibrate", "platt", *MEASURE[2:])
# Several scripts in the processes of one torchrun, which takes seconds to start them.
IN_TURN = f"""
import json, runpy, sys
sys.path.insert(0, {str(REPOSITORY / "src")!r})
import torch
from asl.distributed import process_group
with process_group(torch.device("cpu")):
    for sys.argv in json.loads(sys.argv[1]):
        torch.distributed.barrier()
        runpy.run_path(sys.argv[0], run_name="__main__")
"""
AGREE = """
import os
from pathlib import Path
from asl.distributed import Vote, from_rank_0, rank, world_size
from asl.errors import UsageError

def fail():
    raise UsageError("as on rank 0")

answers = [rank(), from_rank_0(rank)]
try:
    from_rank_0(fail)
except UsageError as error:
    answers.append(str(error))
vote = Vote()
answers += [vote(rank() == 1 and call == 2) for call in range(5)]
Path(f"agreed{world_size()}-{rank()}").write_text(repr(answers))
"""


def jobs(ranks):
    """What is done once by N ranks, N = 2 and 3, and once by a process without torchrun."""
    return [
        ("train.py", "data", "--output", f"run{ranks}", "--epochs", 2, *STATE, *TRAIN),
        (
            "validate.py",
            "--json",
            f"figures{ranks}.json",
            "--estimate-prior",
            f"prior{ranks}.csv",
            *MEASURE,
        ),
        ("infer.py", "--json", f"labels{ranks}.json", *PICTURES, f"labelled{ranks}", *MEASURE),
        ("validate.py", "--model-path", f"tuned{ranks}.pt", *CHOOSE),
        ("train.py", "data", "--output", f"head{ranks}", *HEAD, *TRAIN),
    ]


class Torchrun:
    """A torchrun of N ranks, whose output goes to files: a pipe that is not read would fill."""

    def __init__(self, ranks, *words, restarts=0, machines=("--standalone",)):
        command = [sys.executable, "-m", "torch.distributed.run", *machines]
        command += [f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        self.out, self.err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, *map(str, words)],
            stdout=self.out,
            stderr=self.err,
        )

    def end(self):
        """Exit code, stdout and stderr."""
        code = self.process.wait(timeout=300)
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read())
            file.close()
        return code, *texts


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None
        time.sleep(0.01)


def steps_of(folder):
    path = folder / "last.pt"
    return checkpoint.load(path)["training"]["steps"] if path.exists() else 0


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_shapes):
    """A folder with data, and with what one process, without torchrun, makes of it."""
    root = tmp_path_factory.mktemp("world")
    shutil.copytree(small_shapes, root / "data")
    (root / "pictures").mkdir()
    for picture in sorted((root / "data/val2014").iterdir())[:5]:
        shutil.copy(picture, root / "pictures")
    with chdir(root), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        for words in jobs(1):
            patch.setattr(sys, "argv", [str(word) for word in words])
            runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")
            if words[0] == "train.py" and not Path("one.pt").exists():
                for name in ("one", "tuned1", "tuned2", "tuned3"):
                    shutil.copy("run1/best.pt", f"{name}.pt")
    (root / "in_turn.py").write_text(IN_TURN)
    (root / "agree.py").write_text(AGREE)
    return root


def in_turn(ranks, *scripts):
    lines = [[str(word) for word in script] for script in scripts]
    for line in lines:
        line[0] = line[0] if Path(line[0]).exists() else str(REPOSITORY / line[0])
    return Torchrun(ranks, "in_turn.py", json.dumps(lines))


@pytest.fixture(scope="module")
def two(world):
    """Exit code, stdout and stderr of two ranks that in the end are told to stop a long run."""
    with chdir(world):
        started = in_turn(2, *jobs(2), ("agree.py",), (*LONG, "data", "--output", "stopped"))
        wait_until(lambda: steps_of(world / "stopped") >= 3, started.process)
        started.process.terminate()
        return started.end()


@pytest.fixture(scope="module")
def three(world):
    """The same of three ranks, of which rank 1 in the end meets an image that it cannot read."""
    order = np.arange(40)
    np.random.default_rng([0, 0]).shuffle(order)
    shutil.copytree(world / "data", world / "spoiled")
    sorted((world / "spoiled/train2014").iterdir())[order[1]].write_text("no picture")
    with chdir(world):
        last = (*LONG, "spoiled", "--output", "failed")
        return in_turn(3, *jobs(3), ("agree.py",), last).end()


@pytest.fixture(scope="module")
def killed(world):
    """Exit code and stderr of two ranks, of which one is killed before and one after the restart.

    And the seconds from the second kill to the end, and the steps saved, looked at again and again.
    """
    folder, seen = world / "killed", [0]

    def has_saved(steps):
        seen.append(steps_of(folder))
        return seen[-1] >= steps

    def is_back():
        now = ranks_of(process)  # once: they come and go
        return len(now) == 2 and now[1] != first[1]

    with chdir(world):
        words = (REPOSITORY / "train.py", *LONG[1:], "data", "--output", "killed")
        started = Torchrun(2, *words, restarts=1)
        process = started.process
        wait_until(lambda: has_saved(3), process)
        first = ranks_of(process)
        os.kill(first[1], signal.SIGKILL)
        wait_until(is_back, process)
        goal = steps_of(folder) + 3
        wait_until(lambda: has_saved(goal), process)
        os.kill(ranks_of(process)[0], signal.SIGKILL)
        since = time.monotonic()
        code, _, err = started.end()
        return code, err, time.monotonic() - since, seen


def norm_of_difference(one, other):
    """Between two lists of tensors, as a share of the norm of the second."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    return torch.nn.utils.get_total_norm(differences) / torch.nn.utils.get_total_norm(other)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.usefixtures("two", "three")
class TestAnyNumberOfRanks:
    """Makes what one process does."""

    def test_takes_the_same_steps(self, ranks, world):
        one, many = (checkpoint.load(world / f"run{n}/last.pt") for n in (1, ranks))
        for which in ("ema", "regular"):
            weights = [list(each[which].values()) for each in (many, one)]
            assert norm_of_difference(*weights) < 1e-5
        # Adam's steps do not depend on the scale of the gradients, but its state does.
        states = [each["training"]["optimizer"]["state"].values() for each in (many, one)]
        for moment, tolerance in (("exp_avg", 1e-4), ("exp_avg_sq", 1e-4)):
            gradients = [[state[moment] for state in each] for each in states]
            assert norm_of_difference(*gradients) < tolerance

    def test_computes_the_same_features_once(self, ranks, world, request):
        one, many = (checkpoint.load(world / f"head{n}/last.pt") for n in (1, ranks))
        start = norm_of_difference(one["ema"].values(), one["regular"].values())
        for which in ("ema", "regular"):
            weights = [list(each[which].values()) for each in (many, one)]
            assert norm_of_difference(*weights) < 1e-4 * start
        _, out, _ = request.getfixturevalue({2: "two", 3: "three"}[ranks])
        assert out.count("features of 40 and 20 images, 64 each") == 1

    @pytest.mark.parametrize("run", ["run", "head"])
    def test_logs_the_same(self, run, ranks, world):
        logs = [figures_of(world / f"{run}{n}") for n in (1, ranks)]
        for one, many in zip(*logs, strict=True):
            assert many == pytest.approx(one, rel=1e-5)

    def test_keeps_the_same_running_prior(self, ranks, world):
        states = [checkpoint.load(world / f"run{n}/last.pt")["training"] for n in (1, ranks)]
        one, many = (state["running_prior"]["totals"] for state in states)
        torch.testing.assert_close(many, one, rtol=1e-5, atol=0)
        assert many[-1] == 2 * 40  # every image once an epoch

    def test_measures_the_same(self, ranks, world):
        one, many = (json.loads((world / f"figures{n}.json").read_text()) for n in (1, ranks))
        assert one.pop("command") != many.pop("command")
        # Ranks score smaller batches, which are rounded otherwise.
        for group in ("at_threshold", "at_top_k"):
            assert many.pop(group) == pytest.approx(one.pop(group), abs=1e-3)
        for here, there in zip(one.pop("per_class"), many.pop("per_class"), strict=True):
            assert there.pop("AP") == pytest.approx(here.pop("AP"), abs=1e-3)
            assert there == here
        for name in ("mAP", "weighted_mAP"):
            assert many.pop(name) == pytest.approx(one.pop(name), abs=1e-3)
        assert many == one
        priors = [read_prior(world / f"prior{n}.csv", SHAPES) for n in (1, ranks)]
        torch.testing.assert_close(*priors, rtol=1e-5, atol=1e-6)

    def test_labels_the_same(self, ranks, world):
        one, many = (json.loads((world / f"labels{n}.json").read_text()) for n in (1, ranks))
        assert [x["file"] for x in many] == [x["file"] for x in one]
        for mine, other in zip(many, one, strict=True):
            scores = [{x["name"]: x["score"] for x in each["labels"]} for each in (mine, other)]
            assert scores[0] == pytest.approx(scores[1], abs=2e-4)
        assert len(list((world / f"labelled{ranks}").iterdir())) == 5

    def test_stores_the_same_thresholds(self, ranks, world):
        one, many = (checkpoint.load(world / f"tuned{n}.pt") for n in (1, ranks))
        for name, which in (("thresholds", "values"), ("calibration", "slope")):
            pair = [each[name].pop(which) for each in (many, one)]
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-3)
        assert many["thresholds"].pop("common") == pytest.approx(one["thresholds"].pop("common"))
        assert many["thresholds"] == one["thresholds"]

    def test_agrees(self, ranks, world):
        stop = [False, False, False, True, False]  # one call after the wish
        for number in range(ranks):
            answers = (world / f"agreed{ranks}-{number}").read_text()
            assert answers == repr([number, 0, "as on rank 0", *stop])

    def test_prints_once(self, ranks, request):
        _, out, err = request.getfixturevalue({2: "two", 3: "three"}[ranks])
        assert out.count("train2014: 40 images") == 4  # three trainings and the prior
        assert out.count("all labels: ") == 1
        assert err.count("3 of 24 classes are in no image") == 4


def test_the_two_steps_of_csl_follow_each_other_on_all_ranks(world):
    words = ("data", "--simulate-partial", "rps:0.5", "--unannotated", "selective")
    words += ("--prior-path", "estimate", "--epochs", 1, "--output", "selective", *TRAIN)
    with chdir(world):
        code, _, err = Torchrun(2, REPOSITORY / "train.py", *words).end()
        assert code == 0, err
        prior = Path("selective/prior/prior.csv").read_text()
        assert prior.count("\n") == 1 + 24
        assert checkpoint.load("selective/best.pt")["config"]["prior_path"]


def test_a_signal_stops_all_ranks_after_the_same_step(two, world):
    code, _, err = two
    assert code != 0
    assert err.count("error: stopped by SIGTERM: --resume goes on from here") == 1
    assert "asl/training/fit.py" not in err  # no traceback
    state = checkpoint.load(world / "stopped/last.pt")
    assert state["training"]["steps"] == 3 * state["epoch"] + len(state["losses"])


def test_the_reason_of_the_rank_that_failed_is_torchruns(three):
    code, _, err = three
    assert code != 0
    reason = err.partition("Root Cause")[2]
    assert re.search(r"rank +: 1 ", reason)
    assert re.search(r"spoiled/train2014/\S+\.jpg: ", reason), err


def test_a_rank_that_is_killed_is_restarted_and_the_run_goes_on(killed):
    *_, seen = killed
    assert seen == sorted(seen)
    assert seen[-1] >= 6


def test_a_rank_that_is_killed_ends_all_when_restarts_are_used_up(killed):
    code, err, seconds, _ = killed
    assert code != 0
    assert seconds < 60
    reason = err.rpartition("Root Cause")[2]
    assert re.search(r"rank +: 0 ", reason)
    assert "Signal 9 (SIGKILL)" in reason


def test_a_run_of_two_ranks_is_what_one_process_would_have_made_of_it(before, killed, world):
    state = checkpoint.load(world / "killed/last.pt")
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    config = TrainConfig.of(**{**state["config"], "output": "alone", "resume": ""})
    with (
        chdir(world),
        before(state["training"]["steps"], Training, "step", stop),
        pytest.raises(Interrupted),
    ):
        fit(config)
    alone = checkpoint.load(world / "alone/last.pt")
    weights = [list(each["regular"].values()) for each in (state, alone)]
    assert norm_of_difference(*weights) < 1e-4


def test_a_rank_that_is_killed_on_one_machine_is_restarted_with_those_of_the_other(world):
    folder = world / "machines"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    machines = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}")
    with chdir(world):
        words = (REPOSITORY / "train.py", *LONG[1:], "data", "--output", "machines")
        both = [Torchrun(1, *words, restarts=1, machines=machines) for _ in range(2)]
        wait_until(lambda: steps_of(folder) >= 3, both[0].process)
        owner = int(re.search(r"pid (\d+)", (folder / ".lock").read_text())[1])
        [other] = [one for one in both if ranks_of(one.process) != [owner]]
        os.kill(*ranks_of(other.process), signal.SIGKILL)
        wait_until(lambda: f"pid {owner} " not in (folder / ".lock").read_text(), both[0].process)
        goal = steps_of(folder) + 3
        wait_until(lambda: steps_of(folder) >= goal, both[0].process)
        for one in both:
            one.process.terminate()
        errors = [one.end()[2] for one in both]
    assert sum(text.count("error: stopped by SIGTERM") for text in errors) == 1


def test_one_rank_of_torchrun_is_a_process_like_any_other(monkeypatch):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    given = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**given, "TORCHELASTIC_RUN_ID": "one"}.items():
        monkeypatch.setenv(name, str(value))
    rows = torch.rand(5, 2)
    with process_group(torch.device("cpu")):
        assert torch.distributed.is_initialized()
        assert (rank(), world_size()) == (0, 1)
        assert gather_dealt(rows, batch_size=2, total=5) is rows
        assert [Vote()(wish) for wish in (True, False)] == [True, False]
    assert not torch.distributed.is_initialized()


def test_a_batch_smaller_than_the_ranks_is_an_error_of_usage(monkeypatch):
    monkeypatch.setattr(loop, "world_size", lambda: 3)
    with pytest.raises(UsageError, match="batch_size is 2, but there are 3 ranks"):
        fit(TrainConfig.of(batch_size=2))
