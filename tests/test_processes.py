"""What makes a process one of a group, and where it then computes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asl.distributed import launched, local_rank, pick_device, process_group
from asl.errors import UsageError

SOURCE = Path(__file__).parent.parent / "src"
CPU = torch.device("cpu")
# As srun with exported variables, submitit and Kubeflow start them: no word of torchrun.
WORKER = """
import torch
from asl.distributed import process_group, rank, summed, world_size
with process_group(torch.device("cpu")):
    print(rank(), world_size(), int(summed(torch.tensor(rank() + 1))))
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)


def test_processes_that_any_launcher_started_work_together():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env={"PYTHONPATH": str(SOURCE), "RANK": str(rank), "OMP_NUM_THREADS": "1", **group},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=200)[0].split() for process in started]
    assert said == [["0", "2", "3"], ["1", "2", "3"]]


def test_a_process_without_a_rank_is_alone():
    assert not launched()
    with process_group(CPU) as device:
        assert device == CPU
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_rank_that_is_told_too_little_says_what_it_lacks(name, monkeypatch):
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for variable, value in given.items():
        if variable != name:
            monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=rf"RANK, but not {name}: "), process_group(CPU):
        pass


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ({"LOCAL_RANK": "3", "SLURM_LOCALID": "2"}, 3),
        ({"SLURM_LOCALID": "2"}, 2),
        ({}, 5 % max(1, torch.cuda.device_count())),
    ],
)
def test_the_number_of_a_process_on_its_machine(given, number, monkeypatch):
    for variable, value in {"RANK": "5", **given}.items():
        monkeypatch.setenv(variable, value)
    assert local_rank() == number


@pytest.fixture
def two_gpus(monkeypatch):
    """As if there were two: the list of what is done with CUDA, in order."""
    done = []

    def zeros(*shape, device):
        done.append(("used", str(device)))
        return torch.ones(1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(("own", str(device))))
    monkeypatch.setattr(torch, "zeros", zeros)
    return done


@pytest.mark.parametrize(
    ("name", "environment", "expected"),
    [
        ("", {}, "cuda:0"),
        ("cuda", {}, "cuda:0"),
        ("cuda:1", {}, "cuda:1"),
        ("cuda", {"RANK": "7", "LOCAL_RANK": "1"}, "cuda:1"),
        ("", {"RANK": "7", "SLURM_LOCALID": "1"}, "cuda:1"),
    ],
)
def test_a_process_is_on_its_own_gpu_before_it_does_anything_there(
    name, environment, expected, two_gpus, monkeypatch
):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert pick_device(name) == torch.device(expected)
    assert two_gpus == [("own", expected), ("used", expected)]


def test_a_gpu_that_is_not_there_is_said_before_cuda_is_touched(two_gpus, monkeypatch):
    with pytest.raises(UsageError, match=r"this machine has 2 GPUs, and there is no cuda:2"):
        pick_device("cuda:2")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match=r"process 2 of this machine has none: start at most 2"):
        pick_device("cuda")
    assert not two_gpus
