import argparse
import os
import pickle
import resource
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from asl.errors import DataError, UsageError
from asl.models import checkpoint

WEIGHTS = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("was_run",)


def assert_same(weights, expected=WEIGHTS):
    assert list(weights) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = tmp_path / "run.pth"
    optimizer = {"state": {0: {"step": 2.0}}, "param_groups": [{"betas": (0.9, 0.999)}]}
    rest = {"epoch": 3, "optimizer": optimizer, "config": {"lr": 1e-4, "note": None}}
    names = {0: "cat", 1: "dog"}
    content = {"model": WEIGHTS, "num_classes": 2, "idx_to_class": names, **rest}
    checkpoint.save(path, content)
    loaded = checkpoint.load(path)
    assert_same(loaded.pop("model"))
    assert loaded == {"num_classes": 2, "idx_to_class": names, **rest}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("best", ["ema", "regular"])
def test_model_is_the_best_set_and_takes_no_room_of_its_own(best, tmp_path):
    sets = {name: {"w": torch.randn(100_000)} for name in ("ema", "regular")}
    checkpoint.save(tmp_path / "both.pth", {**sets, "best": best})
    checkpoint.save(tmp_path / "one.pth", {"model": sets["ema"]})
    loaded = checkpoint.load(tmp_path / "both.pth")
    assert_same(loaded["model"], sets[best])
    assert loaded["best"] == best
    # official code takes "model" from the file itself
    assert_same(torch.load(tmp_path / "both.pth")["model"], sets[best])
    assert_same(loaded["ema"], sets["ema"])
    assert_same(loaded["regular"], sets["regular"])
    assert (tmp_path / "both.pth").stat().st_size < 2.01 * (tmp_path / "one.pth").stat().st_size


def test_a_checkpoint_can_be_loaded_changed_and_saved_over_itself(tmp_path):
    path = tmp_path / "run.pth"
    checkpoint.save(path, {"model": WEIGHTS})
    loaded = checkpoint.load(path)
    loaded["model"]["fc.bias"].zero_()
    assert_same(checkpoint.load(path)["model"])  # the file is mapped, not written through
    checkpoint.save(path, loaded)
    assert_same(checkpoint.load(path)["model"], {**WEIGHTS, "fc.bias": torch.zeros(2)})


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_files_of_others_are_read_as_ours(key, prefix, old_format, tmp_path):
    weights = {prefix + name: tensor for name, tensor in WEIGHTS.items()}
    path = tmp_path / "theirs.pth"
    content = {key: weights} if key else weights
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    loaded = checkpoint.load(path)
    assert_same(loaded["model"])
    assert loaded["num_classes"] is loaded["idx_to_class"] is None


@pytest.mark.parametrize("name", ["model", "state_dict", "body.module.weight"])
def test_any_name_that_a_tensor_has_in_a_bare_state_dict_stays(name, tmp_path):
    weights = {**WEIGHTS, name: torch.zeros(3)}
    torch.save(weights, tmp_path / "bare.pth")
    tensors = checkpoint.load(tmp_path / "bare.pth")["model"]
    assert_same(tensors, weights)


def test_weights_that_were_saved_on_a_gpu_are_read_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save({"model": WEIGHTS}, tmp_path / "gpu.pth")
    tensors = checkpoint.load(tmp_path / "gpu.pth")["model"]
    assert_same(tensors)
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}


def test_a_file_is_mapped_and_not_read_until_its_tensors_are_used(tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists what a process has mapped")
    checkpoint.save(tmp_path / "large.pth", {"model": WEIGHTS})
    loaded = checkpoint.load(tmp_path / "large.pth")
    assert str(tmp_path / "large.pth") in maps.read_text()
    assert_same(loaded["model"])


@pytest.mark.parametrize("averaged_entry", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("extra", [{}, {"best": 86.6}, {"best": torch.ones(2)}, {"regular": None}])
def test_averaged_weights_of_timm_training_are_the_ema_set_and_the_best(
    extra, averaged_entry, tmp_path
):
    averaged = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    wrapped = {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}
    content = {"state_dict": wrapped, averaged_entry: averaged, **extra}
    torch.save(content, tmp_path / "timm.pth")
    loaded = checkpoint.load(tmp_path / "timm.pth")
    assert_same(loaded["regular"])
    assert_same(loaded["ema"], averaged)
    assert_same(loaded["model"], averaged)
    assert loaded["best"] == "ema"


def test_a_file_without_averaged_weights_has_one_set(tmp_path):
    torch.save({"state_dict": WEIGHTS, "state_dict_ema": None}, tmp_path / "timm.pth")
    loaded = checkpoint.load(tmp_path / "timm.pth")
    assert_same(loaded["model"])
    assert loaded.get("ema") is None
    assert "regular" not in loaded


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_safetensors_are_known_by_what_is_in_them(name, tmp_path):
    save_file(WEIGHTS, tmp_path / name)
    assert checkpoint.load(tmp_path / name)["model"].keys() == WEIGHTS.keys()


def in_order(weights):
    """As in `WEIGHTS`: the format sorts tensors in a way of its own."""
    return {name: weights[name] for name in sorted(weights, reverse=True)}


def test_a_safetensors_file_keeps_the_best_weights_and_all_that_is_said_of_them(tmp_path):
    path = tmp_path / "run.safetensors"
    sets = {"ema": WEIGHTS, "regular": {name: -x for name, x in WEIGHTS.items()}, "best": "regular"}
    values = torch.tensor([0.1, 1 / 3], dtype=torch.float64)
    rest = {"config": {"lr": 1e-4, "note": None}, "thresholds": {"rule": "f1", "values": values}}
    names = {0: "cat", 1: "dög"}
    checkpoint.save(path, {**sets, "num_classes": 2, "idx_to_class": names, **rest})
    loaded = checkpoint.load(path)
    assert_same(in_order(loaded["model"]), sets["regular"])
    assert torch.equal(loaded["thresholds"].pop("values"), values)
    assert loaded["thresholds"] == {"rule": "f1"}
    assert loaded["config"] == rest["config"]
    assert loaded["idx_to_class"] == names
    assert "ema" not in loaded
    assert_same(in_order(load_file(path)), sets["regular"])  # as any other program reads it


def test_a_safetensors_file_of_this_project_can_be_amended(tmp_path):
    path = tmp_path / "run.safetensors"
    checkpoint.save(path, {"model": WEIGHTS, "num_classes": 2})
    checkpoint.amend(path, {"thresholds": torch.ones(2)}, checkpoint.version(path))
    loaded = checkpoint.load(path)
    assert_same(in_order(loaded["model"]))
    assert torch.equal(loaded["thresholds"], torch.ones(2))
    assert loaded["num_classes"] == 2
    with pytest.raises(TypeError, match="tensors and plain values only"):
        checkpoint.save(path, {"model": WEIGHTS, "extra": {RunsCode()}})
    assert checkpoint.load(path)["num_classes"] == 2


def test_tensors_that_share_memory_or_are_in_channels_last_go_into_a_safetensors_file(tmp_path):
    image = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    checkpoint.save(tmp_path / "a.safetensors", {"model": {"a": image, "b": image, "c": image[0]}})
    loaded = checkpoint.load(tmp_path / "a.safetensors")
    assert_same(loaded["model"], {"a": image, "b": image, "c": image[0]})


@pytest.mark.parametrize("header", ["[1]", "{", '{"x": {"dtype": "torch.qint8", "values": [1]}}'])
def test_a_header_that_is_none_of_ours_is_a_damaged_file(header, tmp_path):
    save_file(WEIGHTS, tmp_path / "a.safetensors", {"asl": header})
    with pytest.raises(DataError, match=r"a\.safetensors: damaged or not a checkpoint"):
        checkpoint.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "names",
    [
        {0: "cat", 1: "dog"},
        {"1": "dog", "0": "cat"},
        {np.int64(0): "cat", np.int64(1): np.str_("dog")},
        ["cat", "dog"],
    ],
    ids=["int", "str", "numpy", "list"],
)
def test_class_names_come_by_number_and_in_order(names, tmp_path):
    torch.save({"model": WEIGHTS, "idx_to_class": names}, tmp_path / "official.pth")
    loaded = checkpoint.load(tmp_path / "official.pth")
    assert list(loaded["idx_to_class"].items()) == [(0, "cat"), (1, "dog")]
    assert {type(key) for key in loaded["idx_to_class"]} == {int}
    assert loaded["num_classes"] == 2


def test_the_command_line_of_official_training_is_harmless(tmp_path):
    extra = {
        "args": argparse.Namespace(lr=0.1),
        "mAP": np.float64(86.6),
        "num_classes": np.int64(2),
    }
    torch.save({"state_dict": WEIGHTS, **extra}, tmp_path / "official.pth")
    loaded = checkpoint.load(tmp_path / "official.pth")
    assert loaded["args"].lr == 0.1
    assert loaded["mAP"] == 86.6
    assert loaded["num_classes"] == 2


def test_numpy_numbers_are_read_without_trusting_the_sizes_that_they_give(tmp_path):
    numbers = [np.float32(0.5), np.int64(-7), np.bool_(True), np.str_("ä"), np.float16(2)]
    good = bytes_of({"model": WEIGHTS, "numbers": numbers}, tmp_path, old_format=True)
    path = tmp_path / "numbers.pth"
    path.write_bytes(good)
    assert checkpoint.load(path)["numbers"] == [0.5, -7, True, "ä", 2]
    size = good.index(b"U1") + 1
    for digit in b"0239":
        path.write_bytes(good[:size] + bytes([digit]) + good[size + 1 :])
        with pytest.raises(DataError, match="damaged"):
            checkpoint.load(path)


def test_numpy_numbers_of_a_machine_with_the_other_byte_order_keep_their_value(tmp_path):
    content = bytes_of({"model": WEIGHTS, "mAP": np.float64(86.6)}, tmp_path, old_format=True)
    order = content.index(b"<", content.index(b"f8"))
    swapped = content[:order] + b">" + content[order + 1 :]
    (tmp_path / "swapped.pth").write_bytes(swapped)
    value = checkpoint.load(tmp_path / "swapped.pth")["mAP"]
    assert value == np.float64(86.6).byteswap()


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "legacy"])
def test_a_file_that_would_run_code_is_refused_and_not_run(old_format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"model": WEIGHTS, "extra": RunsCode()}
    torch.save(content, "evil.pth", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(DataError, match=r"evil.pth: refused: would run code \(posix.mkdir\)"):
        checkpoint.load("evil.pth")
    assert not Path("was_run").exists()


def test_a_plain_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.pth").write_bytes(pickle.dumps(RunsCode()))
    with pytest.raises(DataError, match=r"evil.pth: refused: .*would run code"):
        checkpoint.load("evil.pth")
    assert not Path("was_run").exists()


def test_a_whole_model_is_refused_with_advice(tmp_path):
    torch.save(nn.Linear(3, 2), tmp_path / "model.pth")
    with pytest.raises(DataError, match=r"refused: .*Linear.*save a state_dict"):
        checkpoint.load(tmp_path / "model.pth")


def test_an_archive_made_to_fill_the_memory_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1_000_000)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(DataError, match=r"bomb.pth: refused: .* bytes would unpack to 4,00"):
        checkpoint.load(tmp_path / "bomb.pth")


def bytes_of(content, folder, old_format=False):
    torch.save(content, folder / "whole", _use_new_zipfile_serialization=not old_format)
    return (folder / "whole").read_bytes()


NO_CHECKPOINTS = {
    "empty": (lambda folder: b"", "it is empty"),
    "text": (lambda folder: b"hello, these are no weights", "begins with 'hello, these"),
    "html": (lambda folder: b"<!DOCTYPE html><title>403", "<!DOCTYPE html>.*download"),
    "cut": (lambda folder: bytes_of(WEIGHTS, folder)[:-300], "damaged"),
    "cut to a stub": (lambda folder: bytes_of(WEIGHTS, folder)[:40], "damaged"),
    "cut legacy": (lambda folder: bytes_of(WEIGHTS, folder, old_format=True)[:-9], "damaged"),
    "cut safetensors": (lambda folder: bytes([200] + [0] * 7) + b'{"w": {"dtype"', "damaged"),
    "nothing": (lambda folder: bytes_of({}, folder), "no weights"),
    "no tensors": (lambda folder: bytes_of({"model": {"epoch": 3}}, folder), "no weights"),
    "odd set": (lambda folder: bytes_of({"model": WEIGHTS, "ema": 3}, folder), "holds a int where"),
    "tensor": (lambda folder: bytes_of(torch.zeros(3), folder), "holds a Tensor"),
    "list": (lambda folder: bytes_of([WEIGHTS], folder), "holds a list"),
    "sparse": (
        lambda folder: bytes_of({**WEIGHTS, "eye": torch.eye(2).to_sparse()}, folder),
        "eye is sparse, nested or without values",
    ),
    "no values": (
        lambda folder: bytes_of({**WEIGHTS, "eye": torch.eye(2, device="meta")}, folder),
        "eye is sparse, nested or without values",
    ),
    "names of no kind": (
        lambda folder: bytes_of({"model": WEIGHTS, "idx_to_class": "cat"}, folder),
        "not usable: str in place of names",
    ),
    "names that are no text": (
        lambda folder: bytes_of({"model": WEIGHTS, "idx_to_class": ["cat", ["dog"]]}, folder),
        "not usable: name 1 is a list",
    ),
    "a number beyond all": (
        lambda folder: bytes_of({"model": WEIGHTS, "num_classes": float("inf")}, folder),
        "num_classes or idx_to_class is not usable",
    ),
    "odd names": (
        lambda folder: bytes_of({"model": WEIGHTS, "idx_to_class": {"a": 0}}, folder),
        "idx_to_class is not usable",
    ),
}


@pytest.mark.parametrize(("make", "message"), NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_an_error_of_one_line_with_the_file(make, message, tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(make(tmp_path))
    with pytest.raises(DataError, match=rf"file.pth: .*{message}") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_any_damage_to_a_file_is_a_data_error_or_does_no_harm(tmp_path):
    good = bytes_of({"model": WEIGHTS, "num_classes": 2}, tmp_path)
    random = np.random.default_rng(0)
    path = tmp_path / "damaged.pth"
    messages = []
    for _ in range(150):
        damaged = bytearray(good)
        for place in random.integers(0, len(good), 8):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            checkpoint.load(path)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 15
    assert all("damaged.pth: " in message and "\n" not in message for message in messages)


@pytest.mark.parametrize(("name", "reason"), [("", "directory"), ("nothing.pth", "No such file")])
def test_a_missing_file_or_a_folder_is_an_error_that_says_so(name, reason, tmp_path):
    with pytest.raises(DataError, match=rf"cannot be read: .*{reason}"):
        checkpoint.load(tmp_path / name)


@pytest.fixture
def disk_of_a_megabyte():
    """Let no file of this process grow beyond a megabyte: how a full disk looks from here."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("disk_of_a_megabyte")
def test_a_full_disk_is_one_line_and_leaves_the_previous_file_alone(tmp_path):
    path = tmp_path / "run.pth"
    checkpoint.save(path, {"model": WEIGHTS})
    large = {f"layer{i}": torch.randn(100_000) for i in range(10)}
    with pytest.raises(DataError, match=r"run.pth: .* cannot be written: File too large"):
        checkpoint.save(path, {"model": large})
    assert_same(checkpoint.load(path)["model"])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", ["gone", "file.txt", "/proc"])
def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(folder, tmp_path):
    (tmp_path / "file.txt").touch()
    with pytest.raises(DataError, match=r"run.pth: the checkpoint cannot be written: \w") as error:
        checkpoint.save(tmp_path / folder / "run.pth", {"model": WEIGHTS})
    assert "\n" not in str(error.value)


def test_what_the_reader_would_refuse_is_not_written(tmp_path):
    path = tmp_path / "run.pth"
    checkpoint.save(path, {"model": WEIGHTS})
    with pytest.raises(TypeError, match=r"pathlib.PosixPath|pathlib._local.PosixPath"):
        checkpoint.save(path, {"model": WEIGHTS, "config": {"output": Path("runs")}})
    assert_same(checkpoint.load(path)["model"])
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_save_leaves_the_previous_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "run.pth"
    checkpoint.save(path, {"model": WEIGHTS})

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"model": {"fc.weight": torch.zeros(1)}})
    assert_same(checkpoint.load(path)["model"])
    assert list(tmp_path.iterdir()) == [path]


def assert_equal(one, other, path=""):
    """Two contents of files are the same, tensors and types included."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert list(one) == list(other), path
        for name in one:
            assert_equal(one[name], other[name], f"{path}.{name}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    else:
        assert one == other, path


@pytest.fixture
def of_a_run(tmp_path):
    path = tmp_path / "run.pt"
    sets = {name: {"module.w": torch.randn(100_000)} for name in ("ema", "regular")}
    rest = {"training": {"step": torch.tensor(3)}, "history": [{"mAP": 1.0, "x": None}]}
    checkpoint.save(path, {**sets, "best": "regular", "num_classes": 2, **rest})
    return path


@pytest.mark.parametrize("official", [False, True])
def test_an_amended_file_has_the_new_entries_and_everything_else_as_before(of_a_run, official):
    if official:
        torch.save({"state_dict": WEIGHTS, "args": argparse.Namespace(lr=1)}, of_a_run)
    before, size = torch.load(of_a_run, weights_only=not official), of_a_run.stat().st_size
    for value in (1.0, 2.0):
        entries = {"thresholds": {"values": torch.tensor([value])}}
        checkpoint.amend(of_a_run, entries, checkpoint.version(of_a_run))
    after = torch.load(of_a_run, weights_only=not official)
    assert_equal(after.pop("thresholds"), entries["thresholds"])
    assert_equal(after, before)
    assert of_a_run.stat().st_size < size + 3000  # "model" is one of the sets still
    assert_equal(checkpoint.load(of_a_run)["thresholds"], entries["thresholds"])
    assert list(of_a_run.parent.iterdir()) == [of_a_run]


def test_a_file_that_a_link_leads_to_is_amended(of_a_run):
    link = of_a_run.with_name("link.pt")
    link.symlink_to(of_a_run)
    checkpoint.amend(link, {"thresholds": 1}, checkpoint.version(link))
    assert link.is_symlink()
    assert checkpoint.load(of_a_run)["thresholds"] == 1


def test_a_file_that_was_replaced_meanwhile_is_not_amended(of_a_run):
    version = checkpoint.version(of_a_run)
    checkpoint.save(of_a_run, checkpoint.load(of_a_run))
    before = of_a_run.read_bytes()
    with pytest.raises(DataError, match=r"run\.pt was replaced while it was measured"):
        checkpoint.amend(of_a_run, {"thresholds": 1}, version)
    assert of_a_run.read_bytes() == before


def test_a_kill_or_a_full_disk_leaves_the_file_that_was_to_be_amended(of_a_run, request):
    before = of_a_run.read_bytes()
    version = checkpoint.version(of_a_run)
    child = os.fork()
    if not child:  # killed when half of it is written
        limit = len(before) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        checkpoint.amend(of_a_run, {"thresholds": 1}, version)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert of_a_run.read_bytes() == before
    request.getfixturevalue("disk_of_a_megabyte")
    large = torch.randn(300_000)
    with pytest.raises(DataError, match=r"cannot be written: File too large"):
        checkpoint.amend(of_a_run, {"thresholds": large}, version)
    assert of_a_run.read_bytes() == before


def test_files_without_room_for_entries_are_named(tmp_path):
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    torch.save(WEIGHTS, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        with pytest.raises(UsageError, match=rf"{name} holds weights alone"):
            checkpoint.version(tmp_path / name)
