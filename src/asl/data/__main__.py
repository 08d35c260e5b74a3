"""What is in a data set: `python -m asl.data DATASET DATA`; and writing it as shards."""

import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import tyro

from asl.data.annotations import ABSENT, PRESENT, UNANNOTATED, Annotations, files_exist
from asl.data.duplicates import Pair, identical_files, in_both
from asl.data.readers import read, splits
from asl.data.settings import Dataset
from asl.data.shards import write_shards
from asl.errors import UsageError, reported
from asl.evaluation.pictures import pairs_picture, samples_picture
from asl.images.near_duplicates import near_duplicates as find_near_duplicates

EXTREMES = 5  # classes named as the most frequent ones, and as the least frequent ones
PAIRS = 3  # of identical or nearly equal images, named
DRAWN = 12  # of them, drawn; and samples of a split


def main(
    dataset: Annotated[Dataset, tyro.conf.Positional],
    data: Annotated[str, tyro.conf.Positional],
    split: str = "",
    image_folder: str | None = None,
    output: Path = Path("samples"),
    seed: int = 0,
    near_duplicates: bool = False,
) -> None:
    """Count what a data set holds, look for its images, and draw twelve of them with their labels.

    Then find the images that stand in several splits: by their names, by the content of their
    files, and if wanted by what they look like. They are counted, and some are named and drawn.

    Args:
        dataset: its layout (DATASETS.md)
        data: where it lies, or the addresses of shards
        split: the one to look at; default: all of them
        image_folder: where the images are, from DATA; default: as the layout says
        output: folder of the pictures
        seed: which twelve images
        near_duplicates: also look for nearly equal images of different splits; decodes all
    """
    names = [split] if split else splits(dataset, data)
    existing = []
    for name in names:
        annotations = read(dataset, data, name, image_folder=image_folder)
        exists = files_exist(annotations)
        print(describe(name, annotations, exists))
        existing.append(annotations.subset(exists))
        if exists.any():
            chosen = np.random.default_rng(seed).permutation(len(existing[-1]))[:DRAWN]
            picture = output / f"{dataset}_{name}.png"
            samples_picture(existing[-1].subset(chosen), picture)
            print(f"  samples             {picture}\n")
    if len(names) > 1:
        for one, other in combinations(range(len(names)), 2):
            shared = np.count_nonzero(in_both(existing[one], existing[other]))
            if shared:
                print(f"files in both {names[one]} and {names[other]}: {shared:,}")
        print(f"identical images in different splits: {len(pairs := identical_files(existing)):,}")
        show_pairs(pairs, "=", names, existing, output / f"{dataset}_identical.png")
        if near_duplicates:
            pairs = find_near_duplicates(existing)
            print(f"nearly equal images in different splits: {len(pairs):,}")
            show_pairs(pairs, "~", names, existing, output / f"{dataset}_near_duplicates.png")


def shard(
    dataset: Annotated[Dataset, tyro.conf.Positional],
    data: Annotated[str, tyro.conf.Positional],
    output: Path,
    split: str = "",
    image_folder: str | None = None,
    images: int = 10_000,
) -> None:
    """Write a data set as shards, tar files that `--dataset webdataset` and others read.

    Args:
        dataset: its layout (DATASETS.md)
        data: where it lies, or the addresses of shards
        output: folder of the shards
        split: the one to write; default: all of them
        image_folder: where the images are, from DATA; default: as the layout says
        images: how many go into a shard
    """
    names = [split] if split else splits(dataset, data)
    found = {name: read(dataset, data, name, image_folder=image_folder) for name in names}
    if len({annotations.classes for annotations in found.values()}) > 1:
        raise UsageError("splits have classes of their own: write each into a folder of its own")
    if any(output.glob("*.tar")):
        raise UsageError(f"{output} holds shards already: name another folder")
    for name, annotations in found.items():
        exists = files_exist(annotations)
        if exists.any():
            shards = write_shards(annotations.subset(exists), name, output, images)
            lost = np.count_nonzero(~exists)
            missing = f" ({lost:,} missing, left out)" if lost else ""
            print(f"{name}: {exists.sum():,} images{missing} in {len(shards):,} shards")


def show_pairs(
    pairs: Sequence[Pair],
    sign: str,
    names: Sequence[str],
    splits: Sequence[Annotations],
    picture: Path,
) -> None:
    """Name the first pairs of images of different splits, and draw some more."""
    for pair in pairs[:PAIRS]:
        original = splits[pair.other_split].path(pair.other_row)
        print(f"  {original} {sign} {splits[pair.split].path(pair.row)}")
    if pairs:
        pairs_picture(pairs[:DRAWN], names, splits, picture)
        print(f"  picture             {picture}")


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
        if sys.argv[1:2] == ["shard"]:
            tyro.cli(shard, prog="python -m asl.data shard", args=sys.argv[2:])
        else:
            tyro.cli(main, prog="python -m asl.data")
