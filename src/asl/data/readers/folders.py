"""A folder for each class, as torchvision's `ImageFolder` and timm read them: one label an image.

train/cat/1.jpg       or    cat/1.jpg           the splits are drawn
train/dog/2.jpg             dog/2.jpg
val/cat/3.jpg
"""

import os
from pathlib import Path

import numpy as np

from asl.data.annotations import PRESENT, Annotations
from asl.data.draw import DRAWN, Draw
from asl.data.files import EXTENSIONS, no_split, not_found, unreadable
from asl.errors import DataError

SPLIT_NAMES = ("train", "val", "valid", "validation", "test")


def folders(
    root: Path,
    split: str,
    *,
    val_share: float | None = None,
    split_seed: int | None = None,
    stratify: bool = False,
    folds: int | None = None,
    fold: int | None = None,
) -> Annotations:
    """Read one split of a folder that holds a folder for each class, or such a one for each split.

    `root` has splits if it holds folders of `SPLIT_NAMES` that hold folders. Else the images of
    "train" and "val" are drawn as `Draw` does with the options.

    An image has the class of the folder that it lies in, at whatever depth, and no other; images
    outside of such folders are not read. Classes are the folders of all splits in alphabetical
    order, images come class by class. Which files are images their names say (`EXTENSIONS`). Hidden
    files and folders are left out, and links to folders are followed in the place of a class alone.

    Raises `DataError` for a folder that cannot be read, has no image or is of a name not in UTF-8.
    """
    parts = _parts(root)
    draw = Draw(val_share, split_seed, stratify, folds, fold)
    if not parts:
        return draw.part(_read(root, _inner(root)), split, root)
    draw.check_unused(root)
    if split not in parts:
        raise no_split(split, parts, root / split)
    return _read(root / split, sorted({name for part in parts for name in _inner(root / part)}))


def splits(root: Path) -> list[str]:
    """The splits that have a folder; "train" and "val" where they are to be drawn."""
    return _parts(root) or DRAWN


def _parts(root: Path) -> list[str]:
    return [name for name in _inner(root) if name in SPLIT_NAMES and _inner(root / name)]


def _inner(folder: Path) -> list[str]:
    """The names of the folders in a folder, in alphabetical order."""
    if not folder.is_dir():
        raise not_found(folder)
    try:
        found = [each.name for each in folder.iterdir() if each.is_dir()]
    except OSError as error:
        raise unreadable(folder, error) from error
    for name in found:
        if os.fsencode(name).decode(errors="replace") != name:
            raise DataError(f"the name of folder {str(folder / name)!a} is not UTF-8: rename it")
    return sorted(name for name in found if not name.startswith("."))


def _read(root: Path, classes: list[str]) -> Annotations:
    files, columns = [], []
    for column, name in enumerate(classes):
        found = _images(root, name)
        files += found
        columns += [column] * len(found)
    if not files:
        raise DataError(
            f"{root} holds no folder of a class with images in it ({', '.join(sorted(EXTENSIONS))})"
        )
    names = np.array(files, dtype=np.bytes_)
    return Annotations.from_cells(root, names, tuple(classes), range(len(files)), columns, PRESENT)


def _images(root: Path, name: str) -> list[bytes]:
    """The images of a class, as paths from `root`."""

    def stop(error: OSError) -> None:
        if error.filename != str(root / name) or not isinstance(error, FileNotFoundError):
            raise unreadable(Path(error.filename), error) from error

    found = []
    for folder, inner, files in os.walk(root / name, onerror=stop):
        inner[:] = [each for each in inner if not each.startswith(".")]
        place = os.path.relpath(folder, root)
        found += [
            os.fsencode(os.path.join(place, file))  # noqa: PTH118 (hot)
            for file in files
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in EXTENSIONS  # noqa: PTH122 (hot)
        ]
    return sorted(found)
