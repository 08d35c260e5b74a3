"""Data sets: `read` turns any of them into `Annotations`; everything behind it is the same code."""

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from asl.data.annotations import PRESENT, Annotations
from asl.data.cache import cached, fingerprint
from asl.data.draw import Draw
from asl.data.fetch import fetched, is_address
from asl.data.readers import coco, folders, nus_wide, openimages, shapes, table, voc, webdataset
from asl.errors import UsageError

log = logging.getLogger("asl")


class Reader(NamedTuple):
    """What is known of a layout. Options have the names of the settings that they come from.

    `read(root, split, **options)` parses a split, `splits(root)` lists the existing ones, and
    `sources(root, split, **options)` are the files that `read` parses and the folder of the images;
    None where there are none, and `read` is as fast as a cache.
    `usual_splits` are pairs for training and validation, the preferred one first. A new `version`
    makes cached annotations out of date: `read` returns something else for the same files.
    """

    read: Callable[..., Annotations]
    splits: Callable[[Path], list[str]]
    sources: Callable[..., Sequence[Path]] | None
    usual_splits: tuple[tuple[str, str], ...]
    options: tuple[str, ...] = ()
    version: int = 1


# The names that people give to splits of their own data.
PAIRS = (("train", "val"), ("train", "valid"), ("train", "validation"), ("train", "test"))

READERS: dict[str, Reader] = {
    "coco": Reader(
        coco.coco,
        coco.splits,
        coco.sources,
        (("train2014", "val2014"), ("train2017", "val2017"), ("train", "val")),
        options=("all_images", "image_folder"),
    ),
    "voc": Reader(
        voc.voc,
        voc.splits,
        voc.sources,
        (("trainval", "test"), ("train", "val")),
        options=("difficult", "image_folder"),
    ),
    "nus_wide": Reader(
        nus_wide.nus_wide,
        nus_wide.splits,
        nus_wide.sources,
        (("train", "val"),),
        options=("image_folder",),
    ),
    "openimages": Reader(
        openimages.openimages,
        openimages.splits,
        openimages.sources,
        (("train", "test"), ("train", "validation")),
        options=("machine_generated", "class_list", "image_folder"),
    ),
    "table": Reader(
        table.table,
        table.splits,
        table.sources,
        PAIRS,
        options=("image_folder", *Draw._fields),
        version=3,
    ),
    "folders": Reader(
        folders.folders,
        folders.splits,
        None,
        PAIRS,
        options=Draw._fields,
    ),
    "webdataset": Reader(
        webdataset.webdataset,
        webdataset.splits,
        webdataset.sources,
        (*webdataset.OF_OTHERS, *PAIRS),
        options=Draw._fields,
        version=2,
    ),
    "shapes": Reader(
        shapes.shapes,
        shapes.splits,
        shapes.sources,
        (("train2014", "val2014"),),
        version=shapes.VERSION,
    ),
}


def read(
    dataset: str,
    root: str | Path,
    split: str,
    *,
    cache_dir: Path | None = None,
    write_cache: bool = True,
    **options: object,
) -> Annotations:
    """Read one split of a data set; with a `cache_dir`, parse it only once.

    `root` is its folder, or the addresses of shards, which are fetched first (`asl.data.fetch`).
    Without `write_cache` what is cached is read, and nothing is added.
    `options` go to the reader, except those that are None: they stay at its defaults. Classes that
    no image has are legal; a log message counts and names them.

    Raises `UsageError` for a data set, split or option that does not exist, and `DataError` for
    files that are missing or wrong.
    """
    reader, root = _reader(dataset), _folder(dataset, root)
    options = {name: value for name, value in options.items() if value is not None}
    for name in options.keys() - {*reader.options}:
        known = ", ".join(reader.options) or "none"
        raise UsageError(f"data set {dataset} has no option {name!r}, only: {known}")
    parse = partial(reader.read, root, split, **options)
    if cache_dir is None or reader.sources is None:
        annotations = parse()
    else:
        request = [dataset, str(root), split, options]
        name = hashlib.sha256(json.dumps(request).encode()).hexdigest()[:12]
        sources = fingerprint(reader.sources(root, split, **options))
        path = cache_dir / f"{dataset}-{name}.npz"
        annotations = cached(parse, path, [reader.version, request, sources], write_cache)
    unseen = [annotations.classes[c] for c in (annotations.counts(PRESENT) == 0).nonzero()[0]]
    if unseen:
        named = ", ".join(unseen[:3]) + ", ..." * (len(unseen) > 3)
        total = annotations.num_classes
        log.warning("%d of %d classes are in no image of %s: %s", len(unseen), total, split, named)
    return annotations


def splits(dataset: str, root: str | Path) -> list[str]:
    """The existing splits of a data set."""
    return _reader(dataset).splits(_folder(dataset, root))


def default_split(dataset: str, root: str | Path, role: Literal["train", "val"]) -> str:
    """The split that a data set is trained on (`role` "train") or validated on ("val").

    It is the one that the papers use, where its files exist (COCO 2014 before 2017; VOC trainval
    and test before train and val). Raises `UsageError` if there are only splits of other names.
    """
    existing = splits(dataset, root)
    side = ("train", "val").index(role)
    # The most complete pair comes first: with only val2017 on the disk, it is that of 2017.
    pairs = sorted(_reader(dataset).usual_splits, key=lambda pair: -len({*pair} & {*existing}))
    choice = [pair[side] for pair in pairs if pair[side] in existing or not existing]
    if not choice:
        raise UsageError(f"{root} has no usual split, name the {role} one: {', '.join(existing)}")
    return choice[0]


def _folder(dataset: str, root: str | Path) -> Path:
    if not is_address(root):
        return Path(root)
    if dataset != "webdataset":
        raise UsageError(
            f"data set {dataset} is read from a folder: download {root} and name that. By address, "
            "shards alone are read: --dataset webdataset"
        )
    return fetched(str(root))


def _reader(dataset: str) -> Reader:
    if dataset not in READERS:
        near = difflib.get_close_matches(dataset, READERS, n=1)
        hint = f": did you mean {near[0]!r}?" if near else f": choose from {', '.join(READERS)}"
        raise UsageError(f"no data set {dataset!r}{hint}")
    return READERS[dataset]
