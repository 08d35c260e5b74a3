"""The cache of parsed annotations: a data set is parsed once, after that its arrays are mapped.

MS-COCO's JSON takes seconds to parse and Open Images' CSVs minutes. Of several processes, rank 0
parses and the others take what it has written: a file appears under its name only when it is
complete. Its arrays are mapped, so that all processes of a machine have them in memory once.
"""

import json
import logging
import mmap
import os
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asl.atomic import replacing
from asl.data.annotations import Annotations
from asl.distributed import from_rank_0

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
    no file is touched. Processes of a group call this together.

    The arrays of what was in the file may not be written to.
    """
    key = json.dumps([FORMAT, key])
    found = list[Annotations]()
    # The others wait: each would need the time and the memory to parse, which is gigabytes.
    from_rank_0(lambda: found.append(_loaded_or_parsed(parse, path, key, write)))
    return found[0] if found else _loaded_or_parsed(parse, path, key, write)


def _loaded_or_parsed(
    parse: Callable[[], Annotations], path: Path, key: str, write: bool
) -> Annotations:
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
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        with archive.open("about.npy") as member:
            about = json.loads(str(np.load(member, allow_pickle=False)))
        if about["key"] != key:
            return None
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} has another checksum")
        # Who has mapped a file keeps what was in it when it is replaced. Only where the folder is
        # on NFS, and another machine replaces it, such a process is killed (SIGBUS).
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return Annotations(
            root=Path(about["root"]),
            classes=tuple(about["classes"]),
            implied=about["implied"],
            **{name: _array(mapped, archive.getinfo(f"{name}.npy")) for name in ARRAYS},
        )


def _array(mapped: mmap.mmap, member: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """The array of a member that is not compressed: a view of the file."""
    # `np.load` maps no members of archives, and would copy. 30 bytes stand before the name.
    mapped.seek(member.header_offset + 26)
    mapped.seek(sum(struct.unpack("<HH", mapped.read(4))), os.SEEK_CUR)
    assert np.lib.format.read_magic(mapped) == (1, 0), "as `np.savez` writes short headers"
    shape, _, dtype = np.lib.format.read_array_header_1_0(mapped)
    return np.ndarray(shape, dtype, mapped, mapped.tell())


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
