"""Which cells CSL takes out of the loss, and whether they are present in truth.

The likeliest of the cells that are hidden, by the scores of a model on its training images.

    python studies/csl_selection.py VOCDEVKIT --simulate-partial fpc:150 \
        --model-path runs/voc2007_partial/fpc_ignore_ce_0/best.pt
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch

from asl.data.annotations import PRESENT, UNANNOTATED
from asl.data.partial import simulate
from asl.data.splits import read_split
from asl.evaluation.score import Scorer
from asl.evaluation.settings import OF_THE_MODEL, ValidateConfig, trained_with

PER_IMAGE = (0.25, 0.5, 1, 2, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="the VOCdevkit folder")
    parser.add_argument("--model-path", required=True, help="a checkpoint of train.py")
    parser.add_argument("--simulate-partial", required=True, help="what hid the labels from it")
    parser.add_argument("--partial-seed", type=int, default=0)
    chosen = parser.parse_args()

    trained = trained_with(chosen.model_path)
    config = ValidateConfig.of(
        **{name: trained[name] for name in OF_THE_MODEL},
        **{"data": chosen.data, "dataset": "voc", "train_split": "train", "missing_images": "skip"},
        **{"model_path": chosen.model_path, "weights": "ema", "amp": "off", "batch_size": 32},
    )
    scorer = Scorer.load(config.model, config.images, config.run, torch.device("cpu"))
    everything = read_split(config.data, "train", classes=scorer.classes)
    truth = everything.dense()
    left = simulate(everything, chosen.simulate_partial, chosen.partial_seed).dense()
    scores = scorer.scores(everything, "scores")
    hidden = left == UNANNOTATED
    present = truth[hidden][np.argsort(-scores.numpy()[hidden], kind="stable")] == PRESENT
    images = len(everything)
    print(f"per image {len(present) / images:.1f} hidden, {present.sum() / images:.2f} present")
    for count in PER_IMAGE:
        print(f"of the likeliest {count} per image {present[: int(count * images)].mean():.1%}")


if __name__ == "__main__":
    main()
