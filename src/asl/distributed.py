"""Many processes as one: what `torchrun` started, exact gathering, agreement between ranks.

A process that torchrun did not start is alone: it is rank 0 of 1, and everything here is free.
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

T = TypeVar("T")
RESTARTS = "TORCHELASTIC_RESTART_COUNT"


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """The processes of torchrun work together inside the block; gives this one's device.

    That is `device`, or on a machine with several GPUs the one of this process. Tensors on GPUs
    travel by NCCL, those on the host by gloo. Nested blocks are one.
    """
    if not torchrun_name():
        yield device
        return
    outermost = not _joined()
    try:
        yield _join(device) if outermost else device
    except RuntimeError:
        # So ends a collective when another rank is gone. torchrun gives the reason of the rank that
        # it sees fail first, and ends the others: here, without a word.
        time.sleep(10)
        raise
    # Not after an exception: the others may wait in a collective that this process will not join,
    # and would never answer. torchrun ends them.
    if outermost:
        dist.destroy_process_group()


def _join(device: torch.device) -> torch.device:
    backend = "gloo"
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    store, number, count = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    store = _store_of_this_start(store, number, count)
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    # Of several machines each counts the restarts that were its own fault.
    most = torch.tensor(restarts())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    os.environ[RESTARTS] = str(int(most))
    return device


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


def gather_dealt(rows: Tensor, batch_size: int, total: int) -> Tensor | None:
    """The rows of a data set of which batch number i went to rank i modulo the number of ranks.

    `rows` (n, ...) are this rank's, on the host. Returns all (`total`, ...) on rank 0, in the order
    of the data set and without padding, and None on the others.
    """
    ranks = world_size()
    if ranks == 1:
        return rows
    rounds = -(-total // (batch_size * ranks))
    padded = rows.new_zeros(rounds * batch_size, *rows.shape[1:])
    padded[: len(rows)] = rows
    everywhere = [torch.empty_like(padded) for _ in range(ranks)] if rank() == 0 else None
    dist.gather(padded, everywhere)
    if everywhere is None:
        return None
    dealt = torch.stack([part.view(rounds, batch_size, *rows.shape[1:]) for part in everywhere], 1)
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
