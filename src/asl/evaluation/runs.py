"""What training runs left in their folders, read back."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asl.errors import DataError

History = list[dict[str, Any]]  # the rows of metrics.jsonl
EPOCHS, SETTINGS = "metrics.jsonl", "config.yaml"


def read_histories(folders: Sequence[str]) -> dict[str, History]:
    """The epochs of each run, by the name of its folder, or its path where two have one name.

    A run that is going on, or was interrupted, has those that are done, or none yet. Raises
    `DataError` for a folder that holds no run, for a log that is damaged, and where no run has an
    epoch.
    """
    names = [Path(folder).resolve().name for folder in folders]
    histories = {
        folder if names.count(name) > 1 else name: _read_history(Path(folder))
        for folder, name in zip(folders, names, strict=True)
    }
    if not any(histories.values()):
        raise DataError(f"no epoch is over yet in {', '.join(histories)}")
    return histories


def _read_history(folder: Path) -> History:
    log = folder / EPOCHS
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of a run")
    try:
        lines = log.read_bytes().splitlines()
    except FileNotFoundError:
        if (folder / SETTINGS).exists():  # the first epoch is going on
            return []
        raise DataError(f"{folder} has no {EPOCHS}: it holds no run") from None
    except OSError as error:
        raise DataError(f"{log}: {error.strerror}") from error
    return [_row(line, f"{log}, line {number}") for number, line in enumerate(lines, start=1)]


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        row = {}
    numbers = ("epoch", "mAP_ema", "mAP_regular", "loss", "lr")
    given = {name: row.get(name) for name in numbers}
    if type(given.get("epoch")) is not int or not all(
        value is None or isinstance(value, int | float) for value in given.values()
    ):
        raise DataError(f"{where}: not the figures of an epoch")
    return row
