"""VOC 2007 as a table whose rows lie class by class, for the study of the order of an epoch.

    python studies/by_class.py VOCDEVKIT

Writes the tables train.csv and val.csv into VOCDEVKIT/by_class: for each photograph that is there,
1 or 0 for each class, or nothing where its objects are difficult. The rows of train are sorted by
the first class that is present.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np

from asl.atomic import write_result
from asl.data.annotations import ABSENT, PRESENT
from asl.data.settings import DataSettings
from asl.data.splits import read_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="the VOCdevkit folder")
    folder = parser.parse_args().data
    settings = DataSettings(
        data=folder, dataset="voc", train_split="train", val_split="val", missing_images="skip"
    )
    for role in ("train", "val"):
        images = read_split(settings, role)
        labels = images.dense()
        rows = np.arange(len(images))
        if role == "train":
            rows = np.argsort((labels == PRESENT).argmax(axis=1), kind="stable")
        lines = [",".join(["path", *images.classes])]
        for row in rows:
            name = os.path.relpath(images.path(row), folder)
            cells = [f"{x}" if x in (PRESENT, ABSENT) else "" for x in labels[row]]
            lines.append(",".join([name, *cells]))
        text = "".join(f"{line}\n" for line in lines)
        write_result(Path(folder, "by_class", f"{role}.csv"), text.encode())


if __name__ == "__main__":
    main()
