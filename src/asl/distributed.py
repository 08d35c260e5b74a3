"""Many processes as one, and the device of each: joining, exact gathering, agreement.

A process belongs to a group where its environment says its RANK and the WORLD_SIZE: torchrun sets
both, as do submitit, Kubeflow and scripts for srun. Any other process is alone: it is rank 0 of 1,
and everything here is free.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from asl.errors import UsageError

T = TypeVar("T")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
GROUP = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a process with a RANK must know


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """The processes that were started together work together inside the block.

    Gives `device` back, that of `pick_device`. Tensors on GPUs travel by NCCL, those on the host by
    gloo. Nested blocks are one.

    Raises `UsageError` where the environment has a RANK, but not what else a group needs.
    """
    if not launched():
        yield device
        return
    outermost = not _joined()
    try:
        if outermost:
            _join(device)
        yield device
    except RuntimeError:
        # A collective ends like this when another rank is gone. torchrun reports the rank that it
        # sees fail first, and ends this one while it sleeps.
        time.sleep(10)
        raise
    # Not after an exception: the others may wait in a collective that this process will not join,
    # and would never answer. torchrun ends them.
    if outermost:
        dist.destroy_process_group()


def _join(device: torch.device) -> None:
    missing = [name for name in GROUP if name not in os.environ]
    if missing:
        raise UsageError(
            f"the environment has a RANK, but not {' and '.join(missing)}: set it, or unset RANK "
            "for a process on its own"
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, number, count = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    store = _store_of_this_start(store, number, count)
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    # Of several machines each counts the restarts that were its own fault.
    most = torch.tensor(restarts())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    os.environ[RESTARTS] = str(int(most))


def _store_of_this_start(store: Any, number: int, count: int) -> Any:
    """A part of the `store` of addresses for the processes that live now, all `count` of them.

    torchrun keeps one store over its restarts, in which a process would find addresses of the dead.
    Rank 0 names the part. Each other rank calls it with a word of its own, is told the name, and
    confirms: that no dead process does.
    """
    name, own = uuid.uuid4().hex, uuid.uuid4().hex
    if number > 0:
        store.set(f"call {number}", own)
        name = store.get(f"answer {own}").decode()
        store.set(f"{own} in {name}", "")
    else:
        for other in range(1, count):
            confirmed = False
            while not confirmed:
                word = store.get(f"call {other}").decode()
                store.set(f"answer {word}", name)
                time.sleep(0.01)
                confirmed = store.check([f"{word} in {name}"])
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def rank() -> int:
    """The number of this process: 0 is the one that writes."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _joined() else 1


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def launched() -> bool:
    """Whether something started this process as one of a group."""
    return "RANK" in os.environ


def local_rank() -> int:
    """The number of this process on its machine: LOCAL_RANK, else SLURM's, else by its GPUs."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if name in os.environ:
            return int(os.environ[name])
    return int(os.environ["RANK"]) % max(1, torch.cuda.device_count())


def torchrun_name() -> str:
    """What all processes of one torchrun call it, restarted ones too; "" without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def restarts() -> int:
    """How often torchrun has started these processes anew after a failure (`--max-restarts`)."""
    return int(os.environ.get(RESTARTS, "0"))


def summed(tensor: Tensor) -> Tensor:
    """The sum of a detached tensor over all ranks, in place. Does not wait for the device."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_rank_0(decide: Callable[[], T]) -> T:
    """What `decide` returns on rank 0, on all ranks; what it raises there is raised on all."""
    if world_size() == 1:
        return decide()
    answer: list[T | Exception | None] = [None]
    if rank() == 0:
        try:
            answer = [decide()]
        except Exception as error:
            answer = [error]
    dist.broadcast_object_list(answer, device=torch.device("cpu"))
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]  # type: ignore[return-value]  # what decide returned


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Give `module` the buffers of rank 0: running statistics differ by what each rank has seen."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather_dealt(rows: Tensor, batch_size: int, total: int, on_all: bool = False) -> Tensor | None:
    """The rows of a data set of which batch number i went to rank i modulo the number of ranks.

    `rows` (n, ...) are this rank's, on the host. Returns all (`total`, ...) on rank 0, in the order
    of the data set and without padding, and None on the others; with `on_all` on every rank.
    """
    ranks = world_size()
    if ranks == 1:
        return rows
    rounds = -(-total // (batch_size * ranks))
    padded = rows.new_zeros(rounds * batch_size, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(ranks)] if on_all or rank() == 0 else []
    if on_all:
        dist.all_gather(parts, padded)
    else:
        dist.gather(padded, parts or None)
    if not parts:
        return None
    dealt = torch.stack([part.view(rounds, batch_size, *rows.shape[1:]) for part in parts], 1)
    return dealt.flatten(0, 2)[:total]


class Vote:
    """Whether any rank wants something, answered alike on all ranks at the same call.

    Several ranks learn the answer one call late: each call starts a reduction on the host and reads
    that of the call before, so no rank waits for the others.
    """

    def __init__(self) -> None:
        self._open: tuple[dist.Work, Tensor] | None = None

    def __call__(self, wish: bool) -> bool:
        """Cast a vote and return the outcome of the last round (alone: of this one)."""
        if world_size() == 1:
            return wish
        before, votes = self._open, torch.tensor(int(wish))
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._open = work, votes
        if before is None:
            return False
        before[0].wait()
        return bool(before[1])


def pick_device(name: str = "") -> torch.device:
    """The device of that name; without one, the first that is there of CUDA, MPS and the CPU.

    "cuda" is that of this process: of several GPUs in a machine each process has its own. It is
    made the current device before anything is done on it. Every process would otherwise set up
    CUDA on the first GPU too, which takes half a gigabyte there, and fails where a GPU is reserved
    for one process.

    Raises `UsageError` for a device that is not there.
    """
    if not name:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if torch.backends.mps.is_available() else name
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available():
            device = _own_gpu(device)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def _own_gpu(device: torch.device) -> torch.device:
    index = device.index
    if index is None:
        index = local_rank() if launched() else 0
    count = torch.cuda.device_count()  # does not set up CUDA on any of them
    if index >= count:
        number = f"process {index} of this machine has none: start at most {count} there"
        raise UsageError(
            f"this machine has {count} GPU{'s' * (count != 1)}, and "
            + (number if device.index is None else f"there is no {device}")
        )
    return torch.device("cuda", index)


def precision(amp: str, device: torch.device, training: bool) -> torch.dtype | None:
    """The type that the forward pass computes in; None for float32 throughout.

    "auto" on a GPU is bfloat16, or on older ones float16 with a loss scale. On a CPU that has
    bfloat16 instructions it is bfloat16 for scores, which is faster for all models measured, and
    float32 for training: bfloat16 is faster there for some models, and takes twice as long for
    others (bench/precision.py).
    """
    if amp == "auto" and device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if amp == "auto":
        known = torch.cpu.get_capabilities() if device.type == "cpu" and not training else {}
        native = known.get("avx512_bf16", False) or known.get("amx_bf16", False)
        return torch.bfloat16 if native else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
