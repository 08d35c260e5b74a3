"""The errors that are the user's to mend: printed as one line, without a traceback."""

import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


class _OfOneLine(Exception):
    """Names that stand in files may have line breaks: in a message they are spaces."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


class UsageError(_OfOneLine):
    """A wrong option, recipe or combination of them: the scripts exit with 2."""

    exit_code = 2


class DataError(_OfOneLine):
    """Something wrong with what was read (data set, image, checkpoint): the scripts exit with 1."""

    exit_code = 1


class TrainingError(_OfOneLine):
    """A run that cannot go on, such as one whose loss is not finite: the scripts exit with 1."""

    exit_code = 1


class Interrupted(_OfOneLine):
    """A run that a signal ended after its state was saved: 128 + the signal's number, as shells."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def reported() -> Iterator[None]:
    """Around a script's main: prints the errors of this module and exits with their codes.

    Of several processes only rank 0 prints. Under torchrun the error of another becomes the reason
    that torchrun gives at the end; elsewhere the process prints it itself.
    """
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 (until the process ends)
        logging.disable(logging.WARNING)
    try:
        yield
        sys.stdout.flush()
    except (UsageError, DataError, TrainingError, Interrupted) as error:
        _print(error)
        _exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # The reader of our output, such as `head`, has seen enough. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:
        traceback.print_exc()
        _exit(1)


def _exit(code: int) -> NoReturn:
    if "RANK" in os.environ:
        # At once: what started the group must see this process fail before those that miss it do.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _print(error: Exception) -> None:
    for_torchrun = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if for_torchrun:
        when = {"timestamp": str(int(time.time()))}
        about = {"message": {"message": str(error), "extraInfo": when}}
        Path(for_torchrun).write_text(json.dumps(about))
    if os.environ.get("RANK", "0") == "0" or not for_torchrun:
        print(f"error: {error}", file=sys.stderr)
