"""Data sets: `read` turns any of them into `Annotations`; everything behind it is the same code.

A reader is a module of this package with a function of its own name, which parses one split, and
beside it `splits` (those that are there), `sources` (the files it parses and the folder of the
images), `DEFAULT_SPLITS` (pairs for training and validation, in order of preference) and `VERSION`
(raised when it comes to return something else for the same files, as parsed annotations are kept).
"""

import difflib
import hashlib
import importlib
import inspect
import json
import logging
from pathlib import Path
from types import ModuleType

from asl.data.annotations import PRESENT, Annotations
from asl.data.cache import cached, fingerprint
from asl.errors import UsageError

READERS = ("coco", "nus_wide", "openimages", "shapes", "table", "voc")
log = logging.getLogger("asl")


def read(
    dataset: str, root: str | Path, split: str, *, cache_dir: Path | None = None, **options: object
) -> Annotations:
    """Read one split of a data set; with a `cache_dir`, parse it only once.

    `options` go to the reader, except those that are None: they stay at its defaults. Classes that
    no image has are legal; a log message counts and names them.

    Raises `UsageError` for a data set, split or option that does not exist, and `DataError` for
    files that are missing or wrong.
    """
    reader, root = _reader(dataset), Path(root)
    parse = getattr(reader, dataset)
    options = {name: value for name, value in options.items() if value is not None}
    takes = list(inspect.signature(parse).parameters)[2:]
    for name in options.keys() - takes:
        raise UsageError(f"data set {dataset} has no option {name!r}, only: {', '.join(takes)}")
    if cache_dir is None:
        annotations: Annotations = parse(root, split, **options)
    else:
        request = [dataset, str(root), split, options]
        name = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:12]
        annotations = cached(
            lambda: parse(root, split, **options),
            cache_dir / f"{dataset}-{name}.npz",
            [reader.VERSION, request, fingerprint(reader.sources(root, split, **options))],
        )
    never = [annotations.classes[c] for c in (annotations.counts(PRESENT) == 0).nonzero()[0]]
    if never:
        named = ", ".join(never[:3]) + ", ..." * (len(never) > 3)
        total = annotations.num_classes
        log.warning("%d of %d classes are in no image of %s: %s", len(never), total, split, named)
    return annotations


def splits(dataset: str, root: str | Path) -> list[str]:
    """The splits of a data set that are there."""
    there: list[str] = _reader(dataset).splits(Path(root))
    return there


def default_split(dataset: str, root: str | Path, role: str) -> str:
    """The split that a data set is trained on (`role` "train") or validated on ("val").

    That is what the papers use where its files are there (COCO 2014 before 2017; VOC trainval and
    test before train and val). Raises `UsageError` if there are only splits of other names.
    """
    there = splits(dataset, root)
    side = ("train", "val").index(role)
    # The most complete pair first: with val2017 alone downloaded, (train2017, val2017) it is.
    pairs = sorted(_reader(dataset).DEFAULT_SPLITS, key=lambda pair: -len({*pair} & {*there}))
    choice = [str(pair[side]) for pair in pairs if pair[side] in there or not there]
    if not choice:
        raise UsageError(f"{root} has no usual split, name the {role} one: {', '.join(there)}")
    return choice[0]


def _reader(dataset: str) -> ModuleType:
    # Imported when asked for: the readers need libraries (msgspec, polars) that nothing else does.
    if dataset not in READERS:
        near = difflib.get_close_matches(dataset, READERS, n=1)
        hint = f": did you mean {near[0]!r}?" if near else f": choose from {', '.join(READERS)}"
        raise UsageError(f"no data set {dataset!r}{hint}")
    return importlib.import_module(f"asl.data.readers.{dataset}")
