"""Label an image, or a folder of images: see `python infer.py --help`."""

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
    """Parse, predict, print the labels and draw them beside the images."""
    config = parse("infer", "Label an image, or every image of a folder.", read_checkpoint=load)

    from asl import report
    from asl.engine import predict

    predictions = predict(config)
    if not predictions:
        return  # rank 0 has them
    for prediction in predictions:
        print(report.prediction_text(prediction))
    if config.json:
        report.write_json(predictions, config.json)
        print(f"all labels: {config.json}")
    if config.draw:
        folder = config.output or "predictions"
        report.draw_predictions(predictions, folder, config.threshold)
        print(f"pictures: {folder}")


if __name__ == "__main__":
    with reported():
        main()
