"""How far the thresholds and the calibration of a class with few positives should be its own.

python studies/threshold_shrinkage.py VOCDEVKIT --model-path runs/voc2007_lite0_160_features/best.pt

Some images of the validation split choose, all others judge, twenty times drawn at random. Prints
a table for thresholds (macro F1, in percent) and one for each method of calibration (Brier score,
the mean over classes), with a row for each number of images and a column for each shrinkage.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from asl.data.splits import read_split
from asl.distributed import pick_device
from asl.evaluation import calibration, thresholds
from asl.evaluation.score import Scorer
from asl.evaluation.settings import ValidateConfig, trained_with
from asl.metrics import f1_scores

IMAGES = (50, 100, 200, 400, 800, 1600)
SHRINKAGES = (0, 5, 10, 20, 50, 100, 300)
DRAWS = 20

Table = npt.NDArray[np.generic]


def compared(
    title: str,
    scores: Table,
    targets: Table,
    judged: Callable[[Table, Table, Table, Table, int], float],
    digits: int,
) -> None:
    """Print the table of what `judged` says of images that choose, and others, and a shrinkage."""
    print(f"\n{title}\n\n| images | positives of a class | {' | '.join(map(str, SHRINKAGES))} |")
    print("| ---: |" + " ---: |" * (1 + len(SHRINKAGES)))
    random = np.random.default_rng(0)
    for images in IMAGES:
        found = []
        for _ in tqdm(range(DRAWS), f"{title}, {images}", leave=False):
            order = random.permutation(len(scores))
            one, other = order[:images], order[images:]
            sets = (scores[one], targets[one], scores[other], targets[other])
            found.append([judged(*sets, shrinkage) for shrinkage in SHRINKAGES])
        positives = (targets == 1).sum() / targets.shape[1] * images / len(targets)
        means = [f"{mean:.{digits}f}" for mean in np.mean(found, axis=0)]
        print(f"| {images:,} | {positives:.0f} | {' | '.join(means)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="the folder of the data set")
    parser.add_argument("--model-path", required=True, help="a checkpoint of train.py")
    parser.add_argument("--device", default="")
    chosen = parser.parse_args()

    trained = trained_with(chosen.model_path)
    config = ValidateConfig.of(
        **{name: trained[name] for name in ValidateConfig.from_checkpoint},
        **{"batch_size": 64, "model_path": chosen.model_path},
    ).with_settings(data=chosen.data, missing_images="skip")
    scorer = Scorer.load(config.model, config.images, config.run, pick_device(chosen.device))
    dataset = read_split(config.data, "val", classes=scorer.classes)
    scores, targets = scorer.scores(dataset, "validation").numpy(), dataset.dense()

    def macro_f1(scores, targets, others, truth, shrinkage):
        limits = thresholds.tuned(scores, targets, "f1", shrinkage)
        return f1_scores(others, truth, limits)["macro_F1"]

    compared("macro F1 of thresholds for f1", scores, targets, macro_f1, 2)
    for method in calibration.METHODS:

        def brier(scores, targets, others, truth, shrinkage, method=method):
            made = calibration.fitted(scores, targets, method, shrinkage)
            return np.nanmean(calibration.brier(made(others), truth))

        compared(f"Brier score, {method}", scores, targets, brier, 4)


if __name__ == "__main__":
    main()
