"""Do a study, and show what it says: see `python study.py --help`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
# Threads that wait for each other on a CPU give way to the workers that load images.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from asl.config import parse
from asl.errors import UsageError, reported
from asl.studies.plan import StudyConfig, read_study


def main() -> None:
    """Parse, train what is missing, write the table, the picture and every figure."""
    config = parse(StudyConfig, "study", "Compare settings over seeds, as a plan says.")
    if not config.study.study:
        raise UsageError("name a study: a file of configs/studies")
    study = read_study(config.study.study)

    from asl.studies.results import publish
    from asl.studies.trials import run_study

    print(publish(study, run_study(study, config), config.study.output))


if __name__ == "__main__":
    with reported():
        main()
