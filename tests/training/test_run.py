"""A run cannot be lost: its folder has one owner and whole files, and it is resumed bit for bit."""

import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_log import figures_of, rows_of

from asl.config import write_recipe
from asl.errors import DataError, Interrupted, TrainingError, UsageError
from asl.evaluation import score as scoring
from asl.models import checkpoint
from asl.training import fit as loop
from asl.training.fit import fit
from asl.training.log import Log
from asl.training.run import Run
from asl.training.settings import TrainConfig
from asl.training.step import Training

REPOSITORY = Path(__file__).parents[2]
STEPS = 5  # of an epoch of `settings`
# A model with dropout, and whatever else has a state of its own.
EVERYTHING = {
    "model_name": "ghostnet_050",
    **{"mixup": 0.5, "cutmix": 1.0, "mixup_prob": 0.8},
    "adaptive_gamma": 0.3,
    "running_prior": True,
    "ema_warmup": True,
}


def send(number):
    return lambda: os.kill(os.getpid(), number)


class Died(BaseException):
    """Nobody catches it: to the run it is what `kill -9` is."""


def die():
    raise Died


def steps_of(folder):
    return checkpoint.load(folder / "last.pt")["training"]["steps"]


def assert_same(one, other):
    """The logs and all weights of two runs are equal, bit for bit."""
    assert figures_of(one) == figures_of(other)
    assert (one / "prior.csv").exists() == (other / "prior.csv").exists()
    if (one / "prior.csv").exists():
        assert (one / "prior.csv").read_text() == (other / "prior.csv").read_text()
    for name in ("last.pt", "best.pt"):
        first, second = checkpoint.load(one / name), checkpoint.load(other / name)
        for which in ("ema", "regular"):
            for key, value in first[which].items():
                assert torch.equal(second[which][key], value), (name, which, key)


@pytest.fixture(scope="module")
def whole_run(settings, tmp_path_factory, small_shapes):
    """A run of three epochs of five steps that nothing disturbed, with state of every kind."""
    return fit(settings(small_shapes, tmp_path_factory.mktemp("whole"), **EVERYTHING))


@pytest.fixture(scope="module")
def plain_run(settings, tmp_path_factory, small_shapes):
    """The same without anything special, which takes half the time."""
    return fit(settings(small_shapes, tmp_path_factory.mktemp("plain")))


@pytest.fixture(autouse=True)
def drawn(request, monkeypatch):
    """Drawing the curves takes as long as a run does: only where they are looked at."""
    if "identical_files" not in request.node.name:
        monkeypatch.setattr(loop, "curves", lambda history, path: None)


@pytest.mark.parametrize(
    ("step", "number"), [(1, signal.SIGINT), (STEPS, signal.SIGTERM), (8, signal.SIGTERM)]
)
def test_a_run_that_goes_on_after_a_signal_equals_one_without(
    settings, before, step, number, whole_run, small_shapes, tmp_path
):
    config = settings(small_shapes, tmp_path, **EVERYTHING)
    with before(step, Training, "step", send(number)), pytest.raises(Interrupted) as stopped:
        fit(config)
    assert stopped.value.exit_code == 128 + number
    assert f"{number.name}: --resume" in str(stopped.value)
    assert steps_of(tmp_path) == step
    # Another number of workers gives the same samples.
    fit(config.with_settings(resume="last", workers=1))
    assert_same(tmp_path, whole_run)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="files that are mapped: Linux")
def test_a_run_that_goes_on_keeps_no_room_for_the_checkpoint_it_came_from(
    settings, before, small_shapes, tmp_path
):
    config, maps = settings(small_shapes, tmp_path, **EVERYTHING), []
    with before(2, Training, "step", send(signal.SIGTERM)), pytest.raises(Interrupted):
        fit(config)
    look = lambda: maps.append(Path("/proc/self/maps").read_text())  # noqa: E731
    with before(1, Training, "load_state_dict", look), before(1, Training, "step", look):
        fit(config.with_settings(resume="last"))
    assert [f"{tmp_path}/last.pt" in each for each in maps] == [True, False]


def test_a_signal_during_validation_costs_no_step(
    settings, before, plain_run, small_shapes, tmp_path
):
    config = settings(small_shapes, tmp_path)
    with before(2, scoring, "score", send(signal.SIGTERM)), pytest.raises(Interrupted):
        fit(config)
    assert steps_of(tmp_path) == 2 * STEPS
    fit(config.with_settings(resume="last"))
    assert_same(tmp_path, plain_run)


def test_sigusr1_writes_a_checkpoint_and_the_run_goes_on(
    settings, before, plain_run, small_shapes, tmp_path
):
    config, seen = settings(small_shapes, tmp_path), []
    with (
        before(2, Training, "step", send(signal.SIGUSR1)),
        before(1, scoring, "score", lambda: seen.append(steps_of(tmp_path))),
        before(2, Run, "save", lambda: seen.append(steps_of(tmp_path))),
    ):
        fit(config)
    assert seen == [2, STEPS]  # the second save is the one before validation
    assert_same(tmp_path, plain_run)


@pytest.mark.parametrize(
    ("number", "owner", "name"),
    [
        (9, Training, "step"),
        (2, scoring, "score"),
        (1, Log, "add_epoch"),
        (2, Run, "record"),
        *((number, os, "fsync") for number in (1, 3, 4, 8)),
    ],
)
def test_a_run_may_die_anywhere(
    settings, before, number, owner, name, plain_run, small_shapes, tmp_path
):
    config = settings(small_shapes, tmp_path, checkpoint_every="3")
    with before(number, owner, name, die), pytest.raises(Died):
        fit(config)
    begun = (tmp_path / "last.pt").exists()
    done = steps_of(tmp_path) if begun else 0
    assert done in (0, 3, STEPS, 6, 9, 2 * STEPS)
    with before(0, Training, "step", die) as steps:
        fit(config.with_settings(resume="last" * begun))
    assert next(steps) - 1 == 3 * STEPS - done
    assert_same(tmp_path, plain_run)


@pytest.mark.parametrize(
    ("every", "seconds", "due"),
    [
        ("", 3600, []),
        ("1", 0, [1, 2, 3, 4, 5, 6]),
        ("3", 0, [3, 6]),
        ("2min", 119, []),
        ("2min", 120, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_checkpoints_are_due_by_steps_or_minutes(every, seconds, due, tmp_path, monkeypatch):
    run = Run(TrainConfig.of(output=str(tmp_path), checkpoint_every=every))
    now = time.monotonic() + seconds
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert [steps for steps in range(1, 7) if run.is_due(steps)] == due


def test_minutes_are_counted_from_the_last_checkpoint(
    settings, small_shapes, tmp_path, monkeypatch
):
    now, saved = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    step, save = Training.step, Run.save

    def slow_step(training, *batch):
        now[0] += 40
        return step(training, *batch)

    def noted_save(run, training, *rest):
        saved.append(training.steps)
        return save(run, training, *rest)

    monkeypatch.setattr(Training, "step", slow_step)
    monkeypatch.setattr(Run, "save", noted_save)
    fit(settings(small_shapes, tmp_path, stop_epoch=1, checkpoint_every="1min"))
    assert saved == [2, 4, 5, 5]  # and before and after validation


def test_a_run_goes_on_from_its_own_checkpoint_before_the_one_that_is_named(
    settings, before, plain_run, small_shapes, tmp_path
):
    config = settings(small_shapes, tmp_path)
    with before(7, Training, "step", send(signal.SIGTERM)), pytest.raises(Interrupted):
        fit(config)
    fit(config.with_settings(resume="nothing.pt", model_path="neither.pt"))
    assert_same(tmp_path, plain_run)


def test_a_run_goes_on_in_another_folder_from_a_file_and_may_differ_in_what_may_change(
    settings, before, plain_run, small_shapes, tmp_path
):
    first, second = tmp_path / "first", tmp_path / "second"
    config = settings(small_shapes, first)
    with before(7, Training, "step", send(signal.SIGTERM)), pytest.raises(Interrupted):
        fit(config)
    changed = {"data": shutil.copytree(small_shapes, tmp_path / "moved"), "cache_dir": "cache"}
    changed = {name: str(tmp_path / path) for name, path in changed.items()}
    fit(
        config.with_settings(
            **changed,
            **{"output": str(second), "resume": str(first / "last.pt"), "model_path": "gone.pt"},
            **{"workers": 1, "print_freq": 2, "checkpoint_every": "4", "profile": True},
            **{"missing_images": "skip", "max_pixels": 10**6, "device": "cpu", "overwrite": True},
        )
    )
    assert_same(second, plain_run)
    assert steps_of(first) == 7
    assert json.loads((second / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("restarts", [0, 1])
def test_without_a_checkpoint_a_run_starts_from_weights(
    settings, restarts, plain_run, small_shapes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    weights = plain_run / "best.pt"
    fit(settings(small_shapes, tmp_path, stop_epoch=1, model_path=str(weights)))
    assert f"{weights}: " in capsys.readouterr().out
    assert rows_of(tmp_path)[0]["loss"] < rows_of(plain_run)[0]["loss"]


@pytest.fixture
def torchrun(monkeypatch):
    """Makes this process one that a torchrun of that name has restarted so many times."""

    def start(name, restarts):
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            port = listening.getsockname()[1]
        names = {"TORCHELASTIC_RUN_ID": name, "TORCHELASTIC_RESTART_COUNT": restarts}
        group = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for variable, value in {**names, **group}.items():
            monkeypatch.setenv(variable, str(value))

    yield start
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("named", [True, False])
def test_a_run_that_torchrun_restarts_goes_on_unasked(
    settings, before, named, plain_run, small_shapes, tmp_path, torchrun, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/coco_test_resnet"
    config = settings(small_shapes, folder if named else "", checkpoint_every="1")
    torchrun("one", restarts=0)
    with before(7, Training, "step", die), pytest.raises(Died):
        fit(config)
    torchrun("one", restarts=1)
    with before(0, Training, "step", die) as steps:
        fit(config)
    assert next(steps) - 1 == 3 * STEPS - 6
    assert_same(folder, plain_run)


@pytest.mark.parametrize("owner", ["", ", torchrun 21"])
def test_torchrun_does_not_go_on_with_the_run_of_another(
    settings, owner, plain_run, small_shapes, torchrun
):
    (plain_run / ".lock").write_text(f"pid 1 on this{owner}\n")
    kept = (plain_run / "last.pt").read_bytes()
    torchrun("1", restarts=1)
    with pytest.raises(UsageError, match="holds a run: pass --resume, --overwrite"):
        fit(settings(small_shapes, plain_run))
    assert (plain_run / "last.pt").read_bytes() == kept


def test_weights_are_no_run_to_go_on_from(settings, plain_run, small_shapes, tmp_path):
    named = settings(small_shapes, tmp_path / "run", resume=str(plain_run / "best.pt"))
    with pytest.raises(UsageError, match=r"best.pt holds weights and no run: .* --model-path"):
        fit(named)
    with pytest.raises(DataError, match=r"nothing.pt: cannot be read: No such file"):
        fit(named.with_settings(resume="nothing.pt"))
    assert not (tmp_path / "run").exists()


def test_a_run_resumed_with_other_settings_is_refused_and_the_settings_are_named(
    settings, before, plain_run, small_shapes
):
    other = settings(
        small_shapes, plain_run, resume="last", weight_decay=0.5, batch_size=4, print_freq=7
    )
    before = {path: path.read_bytes() for path in plain_run.iterdir()}
    with pytest.raises(UsageError) as refused:
        fit(other)
    assert "batch_size: 8 then, 4 now; weight_decay: 0.0001 then, 0.5 now)" in str(refused.value)
    assert re.search(r"What may change: config, .*workers.*output", str(refused.value))
    assert {path: path.read_bytes() for path in plain_run.iterdir()} == before


def test_a_folder_that_holds_a_run_is_overwritten_only_when_asked(settings, small_shapes, tmp_path):
    once = settings(small_shapes, tmp_path / "run", stop_epoch=1)
    fit(once)
    with pytest.raises(UsageError, match="--overwrite"):
        fit(once)
    fit(settings(small_shapes, tmp_path / "run", stop_epoch=1, overwrite=True))
    with pytest.raises(UsageError, match="no run to resume"):
        fit(settings(small_shapes, tmp_path / "nothing", resume="last"))


def test_runs_without_a_folder_are_numbered(settings, small_shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [fit(settings(small_shapes, "", stop_epoch=1)) for _ in range(2)]
    assert [str(folder) for folder in folders] == [
        "runs/coco_test_resnet",
        "runs/coco_test_resnet-2",
    ]


def children_of(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


# train.py, but that it stops in the middle of its second epoch, to be killed there.
STOPPING = """
import os, runpy, signal, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.join(os.path.dirname(sys.argv[0]), "src"))
from asl.training.step import Training
step = Training.step
def stepped(self, *batch):
    if self.steps == 8:
        os.kill(os.getpid(), signal.SIGSTOP)
    return step(self, *batch)
Training.step = stepped
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_folder_has_one_owner_until_that_is_killed(settings, plain_run, small_shapes, tmp_path):
    config = settings(small_shapes, tmp_path / "run", workers=1)
    (tmp_path / "recipe.yaml").write_text(write_recipe(config, without=["config"]))
    train = (REPOSITORY / "train.py", "--config", tmp_path / "recipe.yaml")
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", STOPPING, *train], stdout=subprocess.DEVNULL
    )
    stat = Path(f"/proc/{process.pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", process)

    again = config.with_settings(resume="last", workers=0)
    owner = re.escape(f"(pid {process.pid} on {socket.gethostname()})")
    with pytest.raises(UsageError, match=owner):
        fit(again)
    workers = children_of(process)
    process.kill()
    process.wait()
    assert workers
    assert all(Path(f"/proc/{worker}").exists() for worker in workers)
    # What the kill left of a file that was being written.
    draft = tmp_path / "run/.last.pt.0123456789abcdef0123456789abcdef.part"
    draft.touch()
    fit(again)
    assert_same(tmp_path / "run", plain_run)
    assert not draft.exists()


class WithWeights:
    """The state of a run that has these weights and no other state."""

    running_prior = None

    def __init__(self, value):
        self.value = value

    epoch, steps, losses = 0, 0, ()

    def finite_losses(self):
        return []

    def weights(self):
        return {which: {"w": torch.tensor([1.0, self.value])} for which in ("ema", "regular")}

    def state_dict(self):
        return {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_not_saved(value, tmp_path):
    run = Run(TrainConfig.of(output=str(tmp_path)))
    with run.owned(WithWeights(2.0), ["cat"]):
        run.save(WithWeights(2.0))
        with pytest.raises(TrainingError, match=r"the ema weights are no longer finite: lower"):
            run.save(WithWeights(value))
    assert checkpoint.load(tmp_path / "last.pt")["ema"]["w"].tolist() == [1.0, 2.0]


@contextmanager
def disk_that_fills_up():
    """Gives what lets no file of this process grow beyond a megabyte until the block ends."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(
    settings, before, plain_run, small_shapes, tmp_path
):
    config = settings(small_shapes, tmp_path, checkpoint_every="2")
    with (
        disk_that_fills_up() as fill,
        before(8, Training, "step", fill),
        pytest.raises(DataError, match=r"last.pt: .* cannot be written: File too large$"),
    ):
        fit(config)
    assert steps_of(tmp_path) == 6
    assert not list(tmp_path.glob(".*.part"))
    fit(config.with_settings(resume="last"))
    assert_same(tmp_path, plain_run)


def test_a_folder_that_vanishes_is_one_line(settings, before, small_shapes, tmp_path):
    folder = tmp_path / "run"
    config = settings(small_shapes, folder, checkpoint_every="2")
    with (
        before(8, Training, "step", lambda: shutil.rmtree(folder)),
        pytest.raises(DataError, match=r"run/last.pt: .* cannot be written: No such file[^\n]*$"),
    ):
        fit(config)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["file/run", "/proc/run"])
def test_a_folder_that_cannot_be_made_ends_a_run_before_it_starts(
    settings, before, name, small_shapes, tmp_path
):
    (tmp_path / "file").touch()
    with (
        before(1, Training, "step", die),
        pytest.raises(DataError, match=rf"^cannot write into .*{name}: [^\n]+$"),
    ):
        fit(settings(small_shapes, tmp_path / name))


def test_two_deterministic_runs_leave_identical_files(
    settings, small_shapes, tmp_path, monkeypatch
):
    contents = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        fit(settings(small_shapes, "run", stop_epoch=1, deterministic=True, running_prior=True))
        contents.append({path.name: path.read_bytes() for path in Path("run").iterdir()})
        contents[-1]["metrics.jsonl"] = figures_of(Path("run"))
    here, there = contents
    named = {"last.pt", "best.pt", "metrics.jsonl", "prior.csv", "curves.png", "config.yaml"}
    assert here.keys() >= named
    assert [name for name in here if here[name] != there.get(name)] == []
    torch.use_deterministic_algorithms(False)


def test_a_trace_is_written_of_an_epoch_that_is_short(settings, small_shapes, tmp_path):
    fit(settings(small_shapes, tmp_path, stop_epoch=1, profile=True, batch_size=10))
    names = {
        event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    }
    assert "aten::conv2d" in names


def table(root, train, val):
    """A data set of the table layout: an image per label text, of which | parts the classes."""
    lines = ["path,labels,split"]
    for split, texts in (("train", train), ("val", val)):
        for number, text in enumerate(texts):
            Image.new("RGB", (40, 30), (90 * number % 256, 60, 30)).save(
                root / f"{split}{number}.png"
            )
            lines.append(f"{split}{number}.png,{text},{split}")
    (root / "labels.csv").write_text("\n".join(lines))
    return {"data": str(root), "dataset": "table"}


@pytest.mark.parametrize(
    ("train", "val", "more"),
    [
        (["a|b", "a", "b"], ["a", "b"], {}),
        (["a|b", "a", "b"], ["a", "b"], {"epochs": 1}),
        (["a|b", "a", "b"], ["a", "b"], {"batch_size": 2}),
        (["a", "a", ""], ["a", ""], {}),
        (["a", "a"], ["a"], {}),
        (["a|b", "a"], ["a", "a"], {}),
        (["a", "a"], ["a|b", "b"], {"adaptive_gamma": 0.1}),
        (["a|b", "", "a"], ["a", "a|b"], {"adaptive_gamma": 0.1, "batch_size": 1}),
    ],
    ids=[
        "a batch larger than the data set",
        "a single step",
        "a last batch of one image",
        "one class",
        "one class that is always present",
        "a class without positives in validation",
        "a class without positives in training",
        "batches without positives",
    ],
)
def test_small_and_one_sided_data_sets_train(settings, train, val, more, small_shapes, tmp_path):
    config = settings(small_shapes, tmp_path / "run", model_name="test_vit").with_settings(
        **table(tmp_path, train, val)
    )
    fit(config.with_settings(**more))
    rows = rows_of(tmp_path / "run")
    assert [row["epoch"] for row in rows] == list(range(1, more.get("epochs", 3) + 1))
    for row in rows:
        assert math.isfinite(row["loss"])
        assert 0 <= row["mAP_ema"] <= 100


def test_a_validation_set_without_images_is_an_error(settings, small_shapes, tmp_path):
    config = settings("", tmp_path / "run").with_settings(**table(tmp_path, ["a", "b"], []))
    with pytest.raises((DataError, UsageError), match="val"):
        fit(config.with_settings(train_split="train"))
    assert not (tmp_path / "run").exists()


def test_a_signal_within_a_step_of_several_batches_ends_it_after_the_step(
    settings, before, small_shapes, tmp_path
):
    several = {**EVERYTHING, "accumulate": 3}  # of five batches: two steps an epoch
    whole = fit(settings(small_shapes, tmp_path / "whole", **several))
    config = settings(small_shapes, tmp_path / "part", **several)
    with before(7, Training, "step", send(signal.SIGTERM)), pytest.raises(Interrupted):
        fit(config)
    assert steps_of(tmp_path / "part") == 3  # batches 6, 7 and 8
    assert_same(fit(config.with_settings(resume="last")), whole)


def test_a_run_that_died_within_a_step_of_several_batches_takes_it_again(
    settings, before, small_shapes, tmp_path
):
    several = {"accumulate": 2, "print_freq": 1}
    whole = fit(settings(small_shapes, tmp_path / "whole", **several))
    config = settings(small_shapes, tmp_path / "part", checkpoint_every="1", **several)
    with before(10, Training, "step", die), pytest.raises(Died):
        fit(config)
    assert steps_of(tmp_path / "part") == 5
    assert_same(fit(config.with_settings(resume="last")), whole)


def test_lines_of_steps_that_were_lost_are_written_again_once(
    settings, before, small_shapes, tmp_path
):
    config = settings(small_shapes, tmp_path, print_freq=2, checkpoint_every="3")
    with before(10, Training, "step", die), pytest.raises(Died):
        fit(config)
    log = tmp_path / "steps.jsonl"
    assert [row["step"] for row in rows_of(tmp_path, "steps.jsonl")] == [2, 4, 7, 9]
    with log.open("a") as file:
        file.write('{"step": 9, "ep')  # as a full disk leaves it
    fit(config.with_settings(resume="last"))  # from step 9
    rows = rows_of(tmp_path, "steps.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 7, 9, 12, 14]
    assert [row["epoch"] for row in rows] == [1, 1, 2, 2, 3, 3]
    # What the first epoch took was measured before the run died.
    assert all("seconds_training" in row for row in rows_of(tmp_path))
