"""Shards in the format of WebDataset: tar files in which an image and its labels have one name.

train-000000.tar      or   train/00000.tar        members 0001.jpg, 0001.json, 0002.jpg, ...
val-000000.tar             val/00000.tar          0001.json: {"labels": ["cat", "dog"]}
classes.txt                                       or 0001.cls: 3
"""

import json
import os
import re
import tarfile
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asl.data.annotations import ABSENT, PRESENT, UNANNOTATED, Annotations
from asl.data.draw import DRAWN, Draw
from asl.data.files import EXTENSIONS, no_split, not_found, read_lines, unreadable
from asl.data.readers.folders import SPLIT_NAMES
from asl.data.shards import CLASS_LIST
from asl.errors import DataError

LABELS = (".json", ".cls")
# Splits of data sets that are written as shards: `python -m asl.data shard` keeps their names.
OF_OTHERS = (("trainval", "test"), ("train2014", "val2014"), ("train2017", "val2017"))
Label = str | int  # the name of a class, or its number


class Sample(NamedTuple):
    """An image as `Annotations.files` has it, and its labels: numbers by class."""

    file: bytes
    labels: dict[Label, float]
    in_full: bool


def webdataset(
    root: Path,
    split: str,
    *,
    val_share: float | None = None,
    split_seed: int | None = None,
    stratify: bool = False,
    folds: int | None = None,
    fold: int | None = None,
) -> Annotations:
    """Read one split of shards: `<split>-<number>.tar` or `<split>/*.tar` in the folder `root`.

    Labels are in a `.json` beside an image, under "labels": a list of the names of what is present,
    all else being absent; or an object of numbers by name (1 present, 0 absent, between them soft),
    all else being not annotated. Or they are in a `.cls`: the number of the one class; a `.json`
    beside it is not read. Classes are the lines of `classes.txt` where it is there, else all names
    in alphabetical order, or numbers in theirs.

    A single set of shards that has not the name of a split (of `SPLIT_NAMES`, or as those of COCO
    and VOC are called) has none: they are drawn as `Draw` does with the options. Shards are read
    once, to index them; images come in their order.

    Raises `DataError` that names shard and member for what is wrong.
    """
    parts = _parts(root)
    draw = Draw(val_share, split_seed, stratify, folds, fold)
    drawn = _undivided(parts)
    if not drawn and split not in parts:
        raise no_split(split, sorted(parts), root / f"{split}-000000.tar")
    samples = {
        name: [sample for path in paths for sample in _read(path, root)]
        for name, paths in parts.items()
    }
    classes = _classes(samples, root / CLASS_LIST)
    if drawn:
        [every] = samples.values()
        return draw.part(_annotations(every, classes, root), split, root)
    draw.check_unused(root)
    return _annotations(samples[split], classes, root)


def splits(root: Path) -> list[str]:
    """The splits that have shards; "train" and "val" where they are to be drawn."""
    parts = _parts(root)
    return DRAWN if _undivided(parts) else sorted(parts)


def sources(root: Path, split: str, **_: object) -> list[Path]:
    """The shards of all splits, which share their classes, the list of these, and the folder."""
    shards = [path for paths in _parts(root).values() for path in paths]
    return [*shards, *[path for path in [root / CLASS_LIST] if path.is_file()], root]


def _parts(root: Path) -> dict[str, list[Path]]:
    """The shards of each split, in order."""
    parts: dict[str, list[Path]] = {}
    for path in sorted(root.glob("*.tar")):
        parts.setdefault(re.sub(r"[-_.]?\d+$", "", path.stem), []).append(path)
    for path in sorted(root.glob("*/*.tar")):
        parts.setdefault(path.parent.name, []).append(path)
    if not parts:
        raise not_found(root / "train-000000.tar")
    return parts


def _undivided(parts: dict[str, list[Path]]) -> bool:
    return len(parts) == 1 and not {*parts} & {*SPLIT_NAMES, *chain(*OF_OTHERS)}


def _classes(samples: dict[str, list[Sample]], listed: Path) -> dict[Label, int]:
    """The column of each name and, where the classes are listed, of each number of a class."""
    if not listed.is_file():
        labels = {label for each in samples.values() for sample in each for label in sample.labels}
        numbers = sorted(label for label in labels if isinstance(label, int))
        names = sorted(label for label in labels if isinstance(label, str))
        ordered: list[Label] = [*numbers, *names]
        return {label: column for column, label in enumerate(ordered)}
    names = [line.strip() for line in read_lines(listed) if line.strip()]
    if len({*names}) < max(len(names), 1):
        raise DataError(f"{listed} lists no class, or one of them twice")
    columns = range(len(names))
    return {**dict(zip(names, columns, strict=True)), **dict(zip(columns, columns, strict=True))}


def _annotations(samples: list[Sample], classes: dict[Label, int], root: Path) -> Annotations:
    rows, columns, values = [], [], []
    for row, (file, labels, _) in enumerate(samples):
        for label, value in labels.items():
            if label not in classes:
                place = root / os.fsdecode(file)
                raise DataError(f"{place}: label {label!r} is not in {root / CLASS_LIST}")
            rows.append(row)
            columns.append(classes[label])
            values.append(value)
    in_full = {sample.in_full for sample in samples}
    if len(in_full) > 1:
        raise DataError(f"{root}: labels are lists in some samples and objects in others")
    files = np.array([sample.file for sample in samples], dtype=np.bytes_)
    implied = ABSENT if in_full == {True} else UNANNOTATED
    names = {column: str(label) for label, column in reversed(classes.items())}
    ordered = tuple(names[column] for column in range(len(names)))
    return Annotations.from_cells(root, files, ordered, rows, columns, values, implied)


def _read(path: Path, root: Path) -> list[Sample]:
    """The samples of a shard. Members of one name up to the first dot are one sample."""
    images: dict[str, bytes] = {}
    labels: dict[str, tuple[bytes, str, str]] = {}
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, _ = name.partition(".")
                key, ending = f"{folder}/{key}", os.path.splitext(name)[1].lower()  # noqa: PTH122
                if not member.isfile() or ending not in EXTENSIONS | {*LABELS}:
                    continue
                if member.offset_data + member.size > size:
                    raise DataError(f"{path} is cut off: it ends in {member.name}")
                place = f"{path}: {member.name}"
                if ending in EXTENSIONS:
                    inside = f"{path.relative_to(root)}/{member.offset_data}+{member.size}/{name}"
                    if key in images:
                        raise DataError(f"{place}: there is another image of that name before it")
                    images[key] = os.fsencode(inside)
                elif ending == ".cls" or key not in labels:
                    file = tar.extractfile(member)
                    assert file is not None, "it is a file"
                    labels[key] = file.read(), ending, place
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:  # wrong numbers too
        raise DataError(f"{path} is not a tar file, or cut off: {error}") from None
    except OSError as error:
        raise unreadable(path, error) from error
    for key in images:
        if key not in labels:
            raise DataError(f"{path}: {key.lstrip('/')} has an image, but no .json or .cls")
    if not images:
        raise DataError(f"{path} holds no image ({', '.join(sorted(EXTENSIONS))})")
    return [Sample(file, *_labels(*labels[key])) for key, file in images.items()]


def _labels(content: bytes, ending: str, place: str) -> tuple[dict[Label, float], bool]:
    """The labels of a sample, and whether it is annotated in full."""
    text = content.decode("utf-8", errors="replace").strip()
    if ending == ".cls":
        if not (text.isdecimal() and len(text) < 10):
            raise DataError(f"{place}: {text[:80]!r} is not the number of a class")
        return {int(text): PRESENT}, True
    try:
        given: Any = json.loads(text)["labels"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(f'{place} is not a JSON with "labels" in it') from None
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        return dict.fromkeys(given, PRESENT), True
    if isinstance(given, dict) and all(
        isinstance(value, int | float) and (0 <= value <= 1 or value == UNANNOTATED)
        for value in given.values()
    ):
        return given, False
    raise DataError(f"{place}: labels are not names, nor numbers from 0 to 1 by name")
