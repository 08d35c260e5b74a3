"""What is in a data set: `python -m asl.data DATASET DIR`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import tyro

from asl.data.annotations import ABSENT, PRESENT, UNANNOTATED, Annotations, files_exist
from asl.data.duplicates import identical_files
from asl.data.readers import read, splits
from asl.data.settings import Dataset
from asl.errors import reported
from asl.evaluation.pictures import pairs_picture, samples_picture
from asl.images.near_duplicates import near_duplicates as find_near_duplicates

EXTREMES = 5  # classes named as the most frequent ones, and as the least frequent ones
PAIRS = 3  # of identical or nearly equal images, named
DRAWN = 12  # of them, drawn


def main(
    dataset: Annotated[Dataset, tyro.conf.Positional],
    folder: Annotated[Path, tyro.conf.Positional],
    split: str = "",
    image_folder: str | None = None,
    output: Path = Path("samples"),
    seed: int = 0,
    near_duplicates: bool = False,
) -> None:
    """Count what a data set holds, look for its images, and draw twelve of them with their labels.

    Then compare the images of different splits: those with the same content are counted and named.

    Args:
        dataset: its layout (DATASETS.md)
        folder: where it lies
        split: the one to look at; default: all of them
        image_folder: where the images are, from the data set's folder; default: as the layout says
        output: folder of the pictures
        seed: which twelve images
        near_duplicates: also look for nearly equal images of different splits; decodes all
    """
    names = [split] if split else splits(dataset, folder)
    existing = []
    for name in names:
        annotations = read(dataset, folder, name, image_folder=image_folder)
        exists = files_exist(annotations)
        print(describe(name, annotations, exists))
        existing.append(annotations.subset(exists))
        if exists.any():
            chosen = np.random.default_rng(seed).permutation(len(existing[-1]))[:12]
            picture = output / f"{dataset}_{name}.png"
            samples_picture(existing[-1].subset(chosen), picture)
            print(f"  samples             {picture}\n")
    if len(names) > 1:
        pairs = identical_files(existing)
        print(f"identical images in different splits: {len(pairs):,}")
        for original, copy in pairs[:PAIRS]:
            print(f"  {original} = {copy}")
        if near_duplicates:
            compare(existing, output / f"{dataset}_near_duplicates.png")


def compare(existing: Sequence[Annotations], picture: Path) -> None:
    """Count the nearly equal images of different splits, name some, and draw the nearest."""
    pairs = [
        (existing[pair.other_split].path(pair.other_row), existing[pair.split].path(pair.row))
        for pair in find_near_duplicates(existing)
    ]
    print(f"nearly equal images in different splits: {len(pairs):,}")
    for original, copy in pairs[:PAIRS]:
        print(f"  {original} ~ {copy}")
    if pairs:
        pairs_picture(pairs[:DRAWN], picture)
        print(f"  the nearest         {picture}")


def describe(split: str, annotations: Annotations, exists: npt.NDArray[np.bool_]) -> str:
    """The figures of a split, a line each."""
    positives = annotations.counts(PRESENT)
    cells = len(annotations) * annotations.num_classes
    labels = int(positives.sum())
    order = np.argsort(-positives, kind="stable")
    missing = np.flatnonzero(~exists)
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
