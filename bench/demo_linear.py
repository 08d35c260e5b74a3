"""The mAP of a linear model on raw pixels of the built-in data set: the demo is no trivial task.

One logistic regression per class on 32 x 32 x 3 pixels, with four strengths of regularisation. The
best one is chosen by validation mAP, which is in its favour.

    python bench/demo_linear.py [DATA_DIR]
"""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from asl.data.readers import read
from asl.images.decode import read_image, squish

SIDE = 32


def load(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, (N, 3 x 32 x 32) in [-0.5, 0.5], and labels, (N, C)."""
    annotations = read("shapes", root, split)
    images = [squish(read_image(annotations.path(i)), SIDE) for i in range(len(annotations))]
    return torch.stack(images).flatten(1).numpy() / 255 - 0.5, annotations.dense()


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "data/shapes")
    (pixels, labels), (val_pixels, val_labels) = load(root, "train2014"), load(root, "val2014")
    print(f"chance (mean share of positives): {100 * val_labels.mean():.1f} mAP")
    warnings.simplefilter("ignore", ConvergenceWarning)
    for strength in (1e-5, 1e-4, 1e-3, 1e-2):
        precisions = []
        for target, val_target in zip(labels.T, val_labels.T, strict=True):
            linear = LogisticRegression(C=strength, max_iter=100).fit(pixels, target)
            scores = linear.decision_function(val_pixels)
            precisions.append(average_precision_score(val_target, scores))
        print(f"linear model on raw pixels, C={strength:g}: {100 * np.mean(precisions):.1f} mAP")


if __name__ == "__main__":
    main()
