"""Writing shards: tar files of images, each followed by a JSON with its labels (WebDataset)."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from asl.atomic import replacing, write_result
from asl.data.annotations import ABSENT, UNANNOTATED, Annotations
from asl.data.extents import content_of, extent
from asl.data.files import unreadable

CLASS_LIST = "classes.txt"


def write_shards(annotations: Annotations, split: str, folder: Path, images: int) -> list[Path]:
    """Write `<split>-000000.tar` and so on into `folder`, of so many images each, and CLASS_LIST.

    The files are copied as they are, in the order of `annotations`. The labels of an image are the
    names of what is present, or numbers by name where some cells are not annotated or soft. Returns
    the shards. Raises `DataError` for an image that cannot be read.
    """
    write_result(folder / CLASS_LIST, "".join(f"{c}\n" for c in annotations.classes).encode())
    in_part = annotations.soft or bool(annotations.counts(UNANNOTATED).any())
    shards = []
    bar = tqdm(total=len(annotations), desc=split, unit="img", leave=False, disable=None)
    for number, first in enumerate(range(0, len(annotations), images)):
        shards.append(folder / f"{split}-{number:06}.tar")
        with replacing(shards[-1]) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for row in range(first, min(first + images, len(annotations))):
                name = os.fsdecode(bytes(annotations.files[row]))
                labels = json.dumps({"file": name, "labels": _labels(annotations, row, in_part)})
                _add(tar, f"{row:09}{Path(name).suffix.lower()}", _content(annotations.path(row)))
                _add(tar, f"{row:09}.json", labels.encode())
                bar.update()
    bar.close()
    return shards


def _labels(annotations: Annotations, row: int, in_part: bool) -> Any:
    labels, names = annotations.labels(row), annotations.classes
    if not in_part:
        return [names[column] for column in annotations.present(row)]
    known = np.flatnonzero(labels >= ABSENT)
    return {names[column]: round(labels[column].item(), 6) for column in known}


def _content(path: str) -> bytes:
    try:
        return content_of(path)
    except OSError as error:
        raise unreadable(Path(extent(path).file), error) from error


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(content)
    tar.addfile(about, io.BytesIO(content))
