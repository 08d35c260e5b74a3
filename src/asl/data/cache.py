"""The cache of parsed annotations: a data set is parsed once, after that its arrays are loaded.

MS-COCO's JSON takes seconds to parse and Open Images' CSVs minutes; their arrays load at the speed
of the disk. Every rank may write: a file appears under its name only when it is complete, and all
ranks write the same.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from asl.atomic import replacing
from asl.data.annotations import Annotations

FORMAT = 1  # the version of the files written here; that of the reader is part of the key
ARRAYS = ("files", "indptr", "indices", "values")
log = logging.getLogger("asl")


def cache_folder() -> Path:
    """The folder where parsed annotations are cached, in that of the user for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asl"


def cached(
    parse: Callable[[], Annotations], path: Path, key: object, write: bool = True
) -> Annotations:
    """What `parse` returned when it was last called with this `key`: from the file `path`, or anew.

    `key` is anything that JSON can hold. A file with another key is out of date and is replaced
    without a message. A damaged file (zip checksums find a single wrong bit) is replaced with a
    warning. If the file cannot be written, that costs a warning too, not the run. Without `write`
    no file is touched.
    """
    key = json.dumps([FORMAT, key])
    try:
        annotations = _load(path, key)
    except Exception as error:  # zipfile answers damage with any of a dozen classes
        log.warning("%s is damaged (%s): the annotations are parsed anew", path, error)
        annotations = None
    if annotations is None:
        annotations = parse()
        try:
            if write:
                _save(annotations, path, key)
        except OSError as error:
            log.warning("the parsed annotations cannot be cached: %s", error)
    return annotations


def fingerprint(sources: Iterable[Path]) -> list[list[str | int]]:
    """What changes with a source: its path, size and modification time; of a folder its path."""
    return [
        [os.path.abspath(path)]  # noqa: PTH100 (it does not follow links)
        + ([path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else [])
        for path in sources
    ]


def _load(path: Path, key: str) -> Annotations | None:
    if not path.exists():
        return None
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        about = json.loads(str(archive["about"]))
        if about["key"] != key:
            return None
        return Annotations(
            root=Path(about["root"]),
            classes=tuple(about["classes"]),
            implied=about["implied"],
            **{name: archive[name] for name in ARRAYS},
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
