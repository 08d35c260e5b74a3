"""How many label errors are found: of those that are planted, and of a data set's own.

    python studies/label_errors.py VOCDEVKIT MODEL

MODEL is the checkpoint of configs/voc2007_lite0_160_features.yaml. Prints the first twenty suspects
of VOC 2007 val, and how many of 100 planted errors are suspected. The table is in docs/report.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np

from asl.data.splits import read_split
from asl.distributed import pick_device, process_group
from asl.evaluation.report.folds import features_of, out_of_fold
from asl.evaluation.report.suspects import suspected
from asl.evaluation.settings import ValidateConfig

FOLDS = 5
PLANTED = 100


def main(data, model):
    settings = {"data": data, "dataset": "voc", "val_split": "val", "missing_images": "skip"}
    config = ValidateConfig.of(
        **settings, model_name="tf_efficientnet_lite0", image_size=160, model_path=model
    )
    with process_group(pick_device(config.run.device)) as device:
        images = read_split(config.data, "val")
        features = features_of(images, config.model, config.images, config.run, device)
    targets = images.dense()
    rows, columns, quality = suspected(out_of_fold(features, targets, FOLDS), targets)
    print(f"{len(rows)} suspects; the first twenty:")
    for row, column, fit in list(zip(rows, columns, quality, strict=True))[:20]:
        said = "present" if targets[row, column] else "absent"
        print(f"  {images.files[row].decode()}  {images.classes[column]:<12}{said:<9}{fit:.4f}")
    rng = np.random.default_rng(0)
    for label, name in ((1, "present, planted as absent"), (0, "absent, planted as present")):
        cells = np.argwhere(targets == label)
        planted = cells[rng.choice(len(cells), PLANTED, replace=False)]
        changed = targets.copy()
        changed[tuple(planted.T)] = 1 - label
        rows, columns, _ = suspected(out_of_fold(features, changed, FOLDS), changed)
        known = {*map(tuple, planted.tolist())}
        found = [cell in known for cell in zip(rows.tolist(), columns.tolist(), strict=True)]
        of_label = np.array(found)[changed[rows, columns] == 1 - label]
        print(
            f"{name}: {sum(found)} of {PLANTED} among {len(found)} suspects, "
            f"{of_label[:20].sum()} of the first 20 of that label, {of_label[:50].sum()} of 50"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
