"""Measure a checkpoint on a data set: see `python validate.py --help`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
# Threads that wait for each other on a CPU give way to the workers that load images.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from asl.config import parse
from asl.errors import reported
from asl.evaluation.settings import ValidateConfig, trained_with
from asl.training.settings import TrainConfig


def main() -> None:
    """Parse, evaluate, print and write the figures."""
    about = "Measure a checkpoint on a data set."
    config = parse(
        ValidateConfig, "validate", about, recipes=TrainConfig, trained_with=trained_with
    )

    from asl.evaluation.evaluate import evaluate
    from asl.evaluation.published import check_published
    from asl.evaluation.text import evaluation_text, write_json

    figures = evaluate(config)
    if not figures:
        return  # rank 0 has them
    print(evaluation_text(figures))
    if config.evaluation.json_file:
        write_json(figures, config.evaluation.json_file)
        print(f"all figures: {config.evaluation.json_file}")
    if config.evaluation.report:
        print(f"report: {Path(config.evaluation.report) / 'index.html'}")
    if config.evaluation.estimate_prior:
        print(f"prior: {config.evaluation.estimate_prior}")
    check_published(figures)


if __name__ == "__main__":
    with reported():
        main()
