"""Label an image, or a folder of images: see `python infer.py --help`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
# Threads that wait for each other on a CPU give way to the workers that load images.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from asl.config import parse
from asl.errors import reported
from asl.evaluation.settings import InferConfig, trained_with


def main() -> None:
    """Parse, predict, print the labels and draw them beside the images."""
    about = "Label an image, or every image of a folder."
    config = parse(InferConfig, "infer", about, trained_with=trained_with)

    from asl.evaluation.pictures import draw_predictions
    from asl.evaluation.predict import predict
    from asl.evaluation.text import prediction_text, write_json

    predictions = predict(config)
    if not predictions:
        return  # rank 0 has them
    for prediction in predictions:
        print(prediction_text(prediction))
    wanted = config.evaluation
    if wanted.json_file:
        write_json(predictions, wanted.json_file)
        print(f"all labels: {wanted.json_file}")
    if wanted.draw:
        folder = wanted.output or "predictions"
        draw_predictions(predictions, folder)
        print(f"pictures: {folder}")


if __name__ == "__main__":
    with reported():
        main()
