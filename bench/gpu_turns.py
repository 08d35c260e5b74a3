"""How bench/gpu.py compares: contenders take turns, fail each alone, and stop when time is over."""

import signal
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Row = dict[str, Any]
Contender = Iterator[dict[str, float]]  # each `next` is a turn: its figures, the leading one first


class OutOfTime(BaseException):
    """Not an Exception: nothing that answers for failures on the way may take it for one."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` inside the block when the seconds are over."""

    def raise_out_of_time(*_: object) -> None:
        raise OutOfTime(f"{seconds:.0f} s were not enough")

    before = signal.signal(signal.SIGALRM, raise_out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def by_turns(contenders: Sequence[tuple[Row, Contender]], rounds: int) -> Iterator[Row]:
    """A row for each: what it is called and its median figures, or why there are none.

    Raises `OutOfTime` after the rows of what was measured until then.
    """
    turns: list[list[dict[str, float]]] = [[] for _ in contenders]
    failed: dict[int, str] = {}
    cut_off: OutOfTime | None = None
    try:
        for number in [*range(len(contenders))] * (rounds + 1):  # the first turn warms up
            try:
                if number not in failed:
                    turns[number].append(next(contenders[number][1]))
            except Exception as error:
                failed[number] = said(error)
    except OutOfTime as error:
        cut_off = error
        failed = {n: said(error) for n, own in enumerate(turns) if len(own) < 2} | failed
    for number, (labels, _) in enumerate(contenders):
        yield labels | ({"failed": failed[number]} if number in failed else medians(turns, number))
    if cut_off:
        raise cut_off


def medians(turns: Sequence[Sequence[dict[str, float]]], number: int) -> Row:
    """The figures of one contender, the leading one also against that of the first contender."""
    first, own = turns[0][1:], turns[number][1:]
    leading, *others = ((key, statistics.median(turn[key] for turn in own)) for key in own[0])
    # Who failed, or was cut off, has taken fewer turns.
    ratios = [b[leading[0]] / a[leading[0]] for a, b in zip(first, own, strict=False)]
    against = {"x first": statistics.median(ratios)} if ratios else {}
    return dict([leading]) | against | dict(others)


def said(error: BaseException) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
