r"""NUS-WIDE, in either of the two forms in which it is passed on.

nus_wid_data.csv                            the ASL model zoo's: filepath,label,split_name
images/0001_2124494179.jpg                  e.g. images/0001_2124494179.jpg,"['sky', 'water']",train

ImageList/TrainImagelist.txt                the original: lines "actor\0001_2124494179.jpg"
TrainTestLabels/Labels_airport_Train.txt    one file per concept, lines 1 or 0 in the same order
Flickr/actor/0001_2124494179.jpg
"""

import ast
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from asl.data.annotations import PRESENT, Annotations
from asl.data.files import image_names, no_split, not_found, read_lines
from asl.data.readers.table import Table, annotations_of, read_table, splits_in
from asl.errors import DataError, UsageError

ORIGINAL = {"train": "Train", "val": "Test"}  # what the zoo calls val is the original's test set


def nus_wide(root: Path, split: str, *, image_folder: str = "") -> Annotations:
    """Read the zoo's CSV where `root` is one or holds one, else the original lists.

    Classes are the concepts in alphabetical order (81), the same for both forms. Images without any
    label are kept. File names are relative to `image_folder`, which itself is relative to the
    data set's folder; by default that folder for the CSV and `Flickr/` for the original.

    Raises `DataError` for a file that is missing or wrong; it names the row or line.
    """
    *paths, folder = sources(root, split, image_folder=image_folder)
    parse = _zoo if paths[0].suffix == ".csv" else _original
    return parse(paths, split, folder)


def splits(root: Path) -> list[str]:
    """The splits of the CSV, or those that have an image list."""
    path = _csv(root)
    if path:
        return splits_in(path, "split_name")
    lists = root / "ImageList"
    return [split for split, name in ORIGINAL.items() if (lists / f"{name}Imagelist.txt").is_file()]


def sources(root: Path, split: str, *, image_folder: str = "", **_: object) -> list[Path]:
    """The CSV, or the image list and the files of the classes in order; then the images' folder."""
    path = _csv(root)
    if path:
        return [path, path.parent / image_folder]
    name = ORIGINAL.get(split, split)
    image_list = root / "ImageList" / f"{name}Imagelist.txt"
    if not image_list.parent.is_dir():
        raise not_found(root / "nus_wid_data.csv")
    if not image_list.is_file():
        raise no_split(split, splits(root), image_list)
    labels = root / "TrainTestLabels"
    concepts = sorted({path.stem.split("_")[1] for path in labels.glob("Labels_*_*.txt")})
    files = [labels / f"Labels_{concept}_{name}.txt" for concept in concepts]
    if not files:
        raise not_found(labels / f"Labels_airport_{name}.txt")
    return [image_list, *files, root / (image_folder or "Flickr")]


def _csv(root: Path) -> Path | None:
    paths = [root] if root.is_file() else sorted(root.glob("*.csv"))
    if len(paths) > 1:
        raise UsageError(f"{root} holds several CSVs, name one: {', '.join(map(str, paths))}")
    return paths[0] if paths else None


def _zoo(paths: list[Path], split: str, folder: Path) -> Annotations:
    table = read_table(paths[0])
    files, texts, split_names = map(table.column, ("filepath", "label", "split_name"))
    names: dict[str, list[str]] = {}
    for row, text in enumerate(texts):
        if text not in names:
            names[text] = _names(text, table, row)
    labels = pl.Series([names[text] for text in texts], dtype=pl.List(pl.String))
    cells = pl.DataFrame({"path": files, "split": split_names, "labels": labels})
    return annotations_of([table._replace(cells=cells)], split, paths[0], folder)


def _names(text: str, table: Table, row: int) -> list[str]:
    try:
        names = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{table.place(row)}, column label: {text!r} is not a list of names")
    return names


def _original(paths: list[Path], split: str, folder: Path) -> Annotations:
    image_list, *concepts = paths
    names = [line.strip().replace("\\", "/") for line in read_lines(image_list)]
    if not names:
        raise DataError(f"{image_list} is empty")
    columns, rows = np.nonzero([_marks(path, len(names)) for path in concepts])
    files = image_names(names, folder, lambda row: f"{image_list}: line {row + 1}")
    classes = tuple(path.stem.split("_")[1] for path in concepts)
    return Annotations.from_cells(folder, files, classes, rows, columns, PRESENT)


def _marks(path: Path, images: int) -> npt.NDArray[np.bool_]:
    """Which of the images have the concept of a file: (N,) bool."""
    marks = [line.strip() for line in read_lines(path)]
    if len(marks) != images:
        raise DataError(f"{path} has {len(marks)} lines for {images} images")
    if not {*marks} <= {"0", "1"}:
        line = next(line for line, mark in enumerate(marks, 1) if mark not in ("0", "1"))
        raise DataError(f"{path}: line {line}: {marks[line - 1]!r} is not 1 or 0")
    return np.array([mark == "1" for mark in marks])
