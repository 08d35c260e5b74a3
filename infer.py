"""Label an image or a folder of images, or serve a page that does: see `python infer.py --help`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
# Threads that wait for each other on a CPU give way to the workers that load images.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from asl.config import parse
from asl.errors import reported
from asl.evaluation.settings import DEFAULT_MODEL, InferConfig, trained_with


def main() -> None:
    """Parse, predict, print the labels, write and draw what is wanted; or serve the page."""
    about = "Label an image, every image of a folder, or pictures that are dropped on a page."
    config = parse(InferConfig, "infer", about, trained_with=trained_with)

    from asl.evaluation.predict import load_predictor, predict
    from asl.evaluation.results import write_results
    from asl.evaluation.text import prediction_text

    if config.model.model_path == (DEFAULT_MODEL,):
        print(f"model: {DEFAULT_MODEL}, of the 20 classes of Pascal VOC; yours: --model-path FILE")
    wanted = config.evaluation
    if wanted.serve:
        from asl.evaluation.serve import serve

        serve(load_predictor(config), wanted.host, wanted.port, wanted.explain)
        return
    predictions = predict(config)
    if predictions is None:
        return  # rank 0 has them
    print(*predictions.predictor.judge.lines(), sep="\n")
    for prediction in predictions:
        print(prediction_text(prediction))
    for line in write_results(predictions, wanted):
        print(line)


if __name__ == "__main__":
    with reported():
        main()
