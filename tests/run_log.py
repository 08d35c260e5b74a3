"""The log of a run, as its tests read it."""

import json

from asl.training.log import MEASURED


def rows_of(folder, name="metrics.jsonl"):
    """The lines of a log."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def figures_of(folder):
    """The lines of the log of epochs: what a run computed, and not what it took."""
    return [
        {name: value for name, value in row.items() if name not in MEASURED | {"commit"}}
        for row in rows_of(folder)
    ]
