"""Measure a checkpoint on a data set: see `python validate.py --help`."""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
# Threads that wait for each other on a CPU give way to the workers that load images.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from asl.config import parse
from asl.errors import reported


def load(path: str) -> dict[str, Any]:
    """Read a checkpoint; torch is imported here and not for `--help`."""
    from asl.models import checkpoint

    return checkpoint.load(path)


def main() -> None:
    """Parse, evaluate, print and write the figures."""
    config = parse("validate", "Measure a checkpoint on a data set.", read_checkpoint=load)

    from asl import report
    from asl.engine import evaluate

    figures = evaluate(config)
    if not figures:
        return  # rank 0 has them
    print(report.evaluation_text(figures))
    if config.json:
        report.write_json(figures, config.json)
        print(f"all figures: {config.json}")
    if config.estimate_prior:
        print(f"prior: {config.estimate_prior}")


if __name__ == "__main__":
    with reported():
        main()
