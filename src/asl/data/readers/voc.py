"""Pascal VOC 2007 and 2012.

VOCdevkit/VOC2007/ImageSets/Main/cat_train.txt    "000012 -1": 1 present, 0 difficult, -1 absent
VOCdevkit/VOC2007/JPEGImages/000012.jpg
"""

from pathlib import Path

import numpy as np

from asl.data.annotations import ABSENT, PRESENT, UNANNOTATED, Annotations
from asl.data.files import image_names, no_split, not_found, read_lines
from asl.errors import DataError, UsageError

DIFFICULT = {"present": PRESENT, "absent": ABSENT, "ignore": UNANNOTATED}


def voc(
    root: Path, split: str, *, difficult: str = "present", image_folder: str = ""
) -> Annotations:
    """Read the label files of one year, `ImageSets/Main/<class>_<split>.txt`.

    `root` is the folder of the year, or `VOCdevkit`, or the folder that holds it. Classes are those
    that have such files, in alphabetical order (20). A class of which all objects in an image are
    marked difficult counts there as `difficult` says: "present", "absent", or "ignore" (not
    annotated: left out of AP, as in the evaluation of the VOC challenge). `image_folder`, from
    `root`, has the photographs if they are not in JPEGImages beside the lists.

    Raises `DataError` for a file that is missing, is not such a list, or lists other images than
    the rest.
    """
    if difficult not in DIFFICULT:
        raise UsageError(f"difficult {difficult!r}: choose from {', '.join(DIFFICULT)}")
    label_of = {"1": PRESENT, "0": DIFFICULT[difficult], "-1": ABSENT}
    paths = sources(root, split)
    images = list(_read(paths[0]))
    if not images:
        raise DataError(f"{paths[0]} is empty")
    table = np.empty((len(images), len(paths)), dtype=np.int8)
    for column, path in enumerate(paths):
        marks = _read(path)
        if marks.keys() != set(images):
            alone = min(marks.keys() ^ set(images))
            raise DataError(f"{path} and {paths[0].name} list different images: one has no {alone}")
        table[:, column] = [label_of[marks[image]] for image in images]
    rows, columns = np.nonzero(table != ABSENT)
    base = root / image_folder if image_folder else paths[0].parents[2]
    names = [f"{image}.jpg" if image_folder else f"JPEGImages/{image}.jpg" for image in images]
    files = image_names(names, base, lambda row: f"{paths[0]}: image {row + 1}")
    classes = tuple(path.stem.removesuffix(f"_{split}") for path in paths)
    return Annotations.from_cells(base, files, classes, rows, columns, table[rows, columns])


def splits(root: Path) -> list[str]:
    """The splits that have label files."""
    return sorted({path.stem.rpartition("_")[2] for path in _lists(root).glob("*_*.txt")})


def sources(root: Path, split: str, **_: object) -> list[Path]:
    """The label files of a split, in the order of the classes."""
    lists = _lists(root)
    classes = sorted({path.stem.rpartition("_")[0] for path in lists.glob("*_*.txt")})
    paths = [lists / f"{name}_{split}.txt" for name in classes]
    missing = [path for path in paths if not path.is_file()]
    if len(missing) == len(paths):
        raise no_split(split, splits(root), lists / f"<class>_{split}.txt")
    if missing:
        raise not_found(missing[0])
    return paths


def _lists(root: Path) -> Path:
    """The folder of the label files."""
    folders = [root, *sorted(root.glob("VOC2*")), *sorted(root.glob("VOCdevkit/VOC2*"))]
    years = [folder for folder in folders if (folder / "ImageSets" / "Main").is_dir()]
    if not years:
        raise not_found(root / "VOC2007" / "ImageSets" / "Main")
    if len(years) > 1:
        raise UsageError(f"{root} holds several years, name one: {', '.join(map(str, years))}")
    return years[0] / "ImageSets" / "Main"


def _read(path: Path) -> dict[str, str]:
    marks: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), start=1):
        match line.split():
            case []:  # a blank line, most likely at the end
                continue
            case [image, "1" | "0" | "-1" as mark] if image not in marks:
                marks[image] = mark
            case [image, "1" | "0" | "-1"]:
                raise DataError(f"{path}: line {number}: image {image} is listed twice")
            case _:
                raise DataError(f"{path}: line {number}: {line!r} is not an image and 1, 0 or -1")
    return marks
