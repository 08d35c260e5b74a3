"""What is in a data set: `python -m asl.data DATASET DIR`."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from asl import report
from asl.data.annotations import ABSENT, PRESENT, UNANNOTATED, Annotations, files_exist
from asl.data.readers import read, splits
from asl.errors import reported

EXTREMES = 5


def main(
    dataset: Annotated[
        Literal["coco", "voc", "nus_wide", "openimages", "table", "shapes"], tyro.conf.Positional
    ],
    folder: Annotated[Path, tyro.conf.Positional],
    split: str = "",
    image_folder: str | None = None,
    output: Path = Path("samples"),
    seed: int = 0,
) -> None:
    """Count what a data set holds, look for its images, and draw twelve of them with their labels.

    Args:
        dataset: its layout (DATASETS.md)
        folder: where it lies
        split: the one to look at; default: all of them
        image_folder: where the images are, from the data set's folder; default: as the layout says
        output: folder of the pictures
        seed: which twelve images
    """
    for name in [split] if split else splits(dataset, folder):
        annotations = read(dataset, folder, name, image_folder=image_folder)
        print(describe(name, annotations))
        there = np.flatnonzero(files_exist(annotations))
        if len(there):
            chosen = np.random.default_rng(seed).permutation(there)[:12]
            picture = output / f"{dataset}_{name}.png"
            report.samples_picture(annotations.subset(chosen), picture)
            print(f"  samples             {picture}\n")


def describe(split: str, annotations: Annotations) -> str:
    """The figures of a split, a line each."""
    positives = annotations.counts(PRESENT)
    cells = len(annotations) * annotations.num_classes
    labels = int(positives.sum())
    order = np.argsort(-positives, kind="stable")
    missing = np.flatnonzero(~files_exist(annotations))
    named = f": {annotations.path(missing[0])}, ..." if len(missing) else ""
    lines = [
        split,
        f"  images              {len(annotations):,} in {annotations.root}",
        f"  missing files       {len(missing):,}{named}",
        f"  classes             {annotations.num_classes:,}",
        f"  labels              {labels:,}, {labels / len(annotations):.2f} an image",
    ]
    unannotated = int(annotations.counts(UNANNOTATED).sum())
    if unannotated:
        absent = int(annotations.counts(ABSENT).sum())
        lines += [
            f"  verified absent     {absent:,}",
            f"  not annotated       {unannotated:,} ({unannotated / cells:.1%} of the cells)",
        ]
    extremes = {"most frequent": order[:EXTREMES], "least frequent": order[::-1][:EXTREMES]}
    for title, which in extremes.items():
        named = ", ".join(f"{annotations.classes[c]} {positives[c]:,}" for c in which)
        lines.append(f"  {title:<20}{named}")
    return "\n".join(lines)


if __name__ == "__main__":
    with reported():
        tyro.cli(main, prog="python -m asl.data")
