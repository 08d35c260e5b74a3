"""The parsed-annotations cache: a data set is parsed once, after that its arrays are loaded.

MS-COCO's JSON takes seconds to parse and Open Images' CSVs minutes; their arrays load at the speed
of the disk. Every rank may write: a file appears under its name only when it is complete, and which
of several equal ones stays does not matter.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from asl.atomic import replacing
from asl.data.annotations import Annotations

FORMAT = 1  # of the files written here; a reader's own version is part of its key
ARRAYS = ("files", "indptr", "indices", "values")
log = logging.getLogger("asl")


def cached(parse: Callable[[], Annotations], path: Path, key: object) -> Annotations:
    """What `parse` returned when last called with this `key`: from the file `path`, else anew.

    `key` is anything that JSON can hold; a file with another key is outdated and replaced in
    silence. A damaged file (zip checksums find a single wrong bit) is replaced with a warning; one
    that cannot be written costs a warning too, not the run.
    """
    key = json.dumps([FORMAT, key])
    try:
        kept = _load(path, key)
    except Exception as error:  # zipfile answers damage with any of a dozen classes
        log.warning("%s is damaged (%s): the annotations are parsed anew", path, error)
        kept = None
    if kept is not None:
        return kept
    annotations = parse()
    try:
        _save(annotations, path, key)
    except OSError as error:
        log.warning("the parsed annotations cannot be kept: %s", error)
    return annotations


def fingerprint(sources: Iterable[Path]) -> list[list[str | int]]:
    """What tells a changed source: its path, size and modification time; of a folder its path."""
    return [
        [os.path.abspath(path)]  # noqa: PTH100 (links stay as written)
        + ([path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else [])
        for path in sources
    ]


def _load(path: Path, key: str) -> Annotations | None:
    if not path.exists():
        return None
    with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
        about = json.loads(str(kept["about"]))
        if about["key"] != key:
            return None
        return Annotations(
            root=Path(about["root"]),
            classes=tuple(about["classes"]),
            implied=about["implied"],
            **{name: kept[name] for name in ARRAYS},
        )


def _save(annotations: Annotations, path: Path, key: str) -> None:
    about = {
        "key": key,
        "root": str(annotations.root),
        "classes": annotations.classes,
        "implied": annotations.implied,
    }
    arrays = {name: getattr(annotations, name) for name in ARRAYS}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)
