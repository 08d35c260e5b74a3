"""What runs like this one have reached: one that is wrong is seen after epochs, not days."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from asl.errors import UsageError
from asl.training.log import Row

FOLDER = Path(__file__).parents[3] / "results" / "reference"
LEVEL = 0.999  # of the interval that another run is expected in
ONE_RUN = 3.0  # mAP that a run may stay below the only one that is known


class Reference:
    """The mAP of averaged weights after each epoch of runs that were right.

    `name` is a file of results/reference without its ending, or a path. The file has
    {"trials": [{"history": [mAP in percent or null, ...]}, ...]}, an entry for each epoch: what
    study.py writes of a plan with `history`. Raises `UsageError` where there is no such file.
    """

    def __init__(self, name: str) -> None:
        self.path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
        try:
            trials = json.loads(self.path.read_bytes())["trials"]
            self._runs: list[list[float | None]] = [trial["history"] for trial in trials]
        except (OSError, ValueError, KeyError, TypeError) as error:
            known = sorted(path.stem for path in FOLDER.glob("*.json"))
            raise UsageError(
                f"reference {name!r}: {self.path} is no file of reference runs ({error!r}); "
                f"there are {', '.join(known) or 'none'}"
            ) from None

    def expected(self, epoch: int) -> tuple[float, float] | None:
        """The lowest and the highest mAP after this epoch, from 1; None where nothing is known.

        They are the ends of the interval in which one more run lies in 999 of 1,000 cases, if the
        runs are normally distributed. Beside a single run nothing tells the spread: up to `ONE_RUN`
        below it and anything above is as expected.
        """
        runs = [run[epoch - 1] for run in self._runs if len(run) >= epoch]
        return _another([value for value in runs if value is not None])

    def said(self, row: Row) -> str:
        """What is to be printed beside the line of an epoch; empty where nothing is known."""
        found = self._judged(row)
        if found is None:
            return ""
        low, high, reached = found
        between = f"{low:.1f} to {high:.1f}" if high < 100 else f"{low:.1f} or more"
        return f"   {'as expected' if reached else 'NOT AS EXPECTED'} ({between})"

    def verdict(self, history: Sequence[Row]) -> str:
        """How many epochs of a run reached what they should."""
        judged = [found[2] for found in map(self._judged, history) if found]
        return f"{sum(judged)} of {len(judged)} epochs as expected ({self.path.name})"

    def _judged(self, row: Row) -> tuple[float, float, bool] | None:
        """What was expected of an epoch that was measured, and whether it was reached."""
        value, epoch = row.get("mAP_ema"), row["epoch"]
        assert isinstance(epoch, int)
        if not isinstance(value, float) or (expected := self.expected(epoch)) is None:
            return None
        low, high = expected
        return low, high, low <= value <= high


def _another(values: Sequence[float]) -> tuple[float, float] | None:
    from scipy import stats

    n = len(values)
    if n < 2:
        return (max(0.0, values[0] - ONE_RUN), 100.0) if values else None
    reach = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * stdev(values) * (1 + 1 / n) ** 0.5
    return mean(values) - reach, min(100.0, mean(values) + reach)
