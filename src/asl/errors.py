"""The errors that are the user's to mend: printed as one line, without a traceback."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """A wrong option, recipe or combination of them: the scripts exit with 2."""

    exit_code = 2


class DataError(Exception):
    """Something wrong with what was read (data set, image, checkpoint): the scripts exit with 1."""

    exit_code = 1


class TrainingError(Exception):
    """A run that cannot go on, such as one whose loss is not finite: the scripts exit with 1."""

    exit_code = 1


class Interrupted(Exception):
    """A run that a signal ended after its state was saved: 128 + the signal's number, as shells."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def reported() -> Iterator[None]:
    """Around a script's main: prints the errors of this module and exits with their codes."""
    try:
        yield
        sys.stdout.flush()
    except (UsageError, DataError, TrainingError, Interrupted) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader of our output, such as `head`, has seen enough. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
