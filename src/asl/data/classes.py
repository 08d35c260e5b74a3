"""Class names: matching those of a model and a data set, by name and never by position."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asl.data.files import read_rows
from asl.errors import DataError

# The names of one class in VOC, COCO and Open Images. Case, spaces, "-" and "_" never count, so
# "dining table" (COCO) and "diningtable" (VOC) need no entry.
SYNONYMS = (
    ("aeroplane", "airplane"),
    ("couch", "sofa"),
    ("donut", "doughnut"),
    ("hair drier", "hair dryer"),
    ("motorbike", "motorcycle"),
    ("television", "tv", "tvmonitor"),
)


def match_classes(have: Sequence[str], want: Sequence[str]) -> npt.NDArray[np.int64]:
    """Find every class of `want` in `have`: (len(want),) positions.

    A class is matched with the one of equal name; where there is none, with the only one whose name
    is equal but for case, spaces, "-" and "_"; then with the only one that is its synonym. `have`
    may hold more classes than `want`.

    Raises `DataError` that lists what has no match, on both sides.
    """
    rules = [(spell, _unique(have, spell)) for spell in (str, _loose, _canonical)]
    found = [
        next((unique[spell(name)] for spell, unique in rules if spell(name) in unique), None)
        for name in want
    ]
    uses = Counter(found)
    unmatched = [name for name, at in zip(want, found, strict=True) if at is None or uses[at] > 1]
    if unmatched:
        others = [name for at, name in enumerate(have) if uses[at] != 1]
        raise DataError(
            f"{len(unmatched)} of {len(want)} classes have no match: {_some(unmatched)} "
            f"(unmatched among the {len(have)} there: {_some(others)})"
        )
    return np.array(found, dtype=np.int64)


def read_descriptions(path: Path) -> dict[str, str]:
    """The display name of each class, by machine id: Open Images' CSV.

    Several classes may have one display name (12 of Open Images' do): show it, but match by id.

    Raises `DataError` for a missing file or a row that has not two cells.
    """
    names = {}
    for row, cells in enumerate(read_rows(path), start=1):
        if len(cells) != 2:
            raise DataError(f"{path}: row {row}: {','.join(cells)!r} is not a class and its name")
        names[cells[0]] = cells[1]
    names.pop("LabelName", None)  # the header, which the lists of boxable classes do not have
    return names


def _unique(names: Sequence[str], spell: Callable[[str], str]) -> dict[str, int]:
    """Where each spelling stands that only one of the names has."""
    spelled = [spell(name) for name in names]
    count = Counter(spelled)
    return {name: position for position, name in enumerate(spelled) if count[name] == 1}


def _loose(name: str) -> str:
    return name.casefold().translate({ord(mark): None for mark in " -_"})


def _canonical(name: str) -> str:
    return _CANONICAL.get(_loose(name), _loose(name))


_CANONICAL = {_loose(name): _loose(names[0]) for names in SYNONYMS for name in names}


def _some(names: Sequence[str]) -> str:
    return (", ".join(names[:10]) + ", ..." * (len(names) > 10)) or "none"
