"""Signals as a long computation wants them: heeded between two steps, alike on all ranks."""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Self, TypeVar

from asl.distributed import Vote
from asl.errors import Interrupted

T = TypeVar("T")
STOP = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Inside its `with` block SIGINT, SIGTERM and SIGUSR1 are noted and left to the loop.

    SIGINT and SIGTERM end the loop that runs over `until_stopped`, on all ranks after the same
    step; a second SIGINT ends the process at once. SIGUSR1 asks for a checkpoint (`save_asked`).
    Outside the main thread, which alone may handle signals, nothing changes.
    """

    def __init__(self) -> None:
        self._stop = 0
        self._save = False
        self._vote = Vote()

    def __enter__(self) -> Self:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (*STOP, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save = True
            return
        # torchrun answers Ctrl-C, which reaches all processes, with a SIGTERM to each of its own.
        if number == self._stop == signal.SIGINT:
            os._exit(128 + signal.SIGINT)  # whatever it is that hangs
        self._stop = self._stop or number

    def until_stopped(
        self, items: Iterable[T], may_stop: Callable[[], bool] = lambda: True
    ) -> Iterator[T]:
        """The items; raises `Interrupted` after the one during which a rank was told to stop.

        Of several ranks after the next one: they tell each other without waiting. The iteration
        must go on equally far on all of them. After an item where `may_stop` is false, it goes on.
        """
        for item in items:
            yield item
            if may_stop() and self._vote(bool(self._stop)):
                name = signal.Signals(self._stop).name if self._stop else "a signal to another rank"
                raise Interrupted(
                    self._stop or signal.SIGTERM, f"stopped by {name}: --resume goes on from here"
                )

    def save_asked(self) -> bool:
        """Whether SIGUSR1 came since this was last asked."""
        asked, self._save = self._save, False
        return asked
