"""MS-COCO 2014 and 2017, LVIS v1, and any other JSON in COCO's instances format.

annotations/instances_train2014.json        images, annotations, categories
train2014/COCO_train2014_000000000009.jpg
"""

import codecs
import json
import mmap
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from asl.data.annotations import ABSENT, PRESENT, UNANNOTATED, Annotations
from asl.data.files import image_names, no_split, unreadable
from asl.errors import DataError

Id = int | float | str  # some converters write 1.0, which Python finds under the key 1


class Image(msgspec.Struct):
    """What is read of an entry of `images`; LVIS gives a URL in place of the file name."""

    id: Id
    file_name: str | None = None
    coco_url: str | None = None
    neg_category_ids: list[Id] | None = None


class Object(msgspec.Struct, gc=False):
    """What is read of an entry of `annotations`; without `gc`, as COCO has 600,000."""

    image_id: Id
    category_id: Id


class Category(msgspec.Struct):
    """What is read of an entry of `categories`."""

    id: Id
    name: str


class Instances(msgspec.Struct):
    """The JSON, without the boxes and outlines that make up nine tenths of it."""

    images: list[Image]
    annotations: list[Object]
    categories: list[Category]


Content = TypeVar("Content", bound=msgspec.Struct)


def coco(
    root: Path, split: str, *, all_images: bool = False, image_folder: str = ""
) -> Annotations:
    """Read the labels of `annotations/instances_<split>.json`; `split` may also be a JSON file.

    An image has the label of every category that one of its objects has, crowds (`iscrowd`)
    included, as in the official training script. Classes are the categories in file order. Images
    come in the order in which the annotations first name them, those without an annotation left out
    (82,081 and 40,137 of COCO 2014, as in the official script); with `all_images` in file order
    (82,783 and 40,504).

    File names are relative to `image_folder` (itself relative to `root`); by default to the first
    of `<split>/`, `images/<split>/` and `images/` that is there, else to the folder of the JSON, or
    to `root` if that is `annotations/`.

    LVIS is annotated in part (Gupta et al. 2019, section 3): the categories of an image's objects
    are present, its `neg_category_ids` absent, and all others not annotated, among them those of
    `not_exhaustive_category_ids` of which it has no object.

    Raises `DataError` for a file that is not there or not such a JSON, an id or name that is given
    twice, an annotation of an image or category that the file does not list, and an empty split.
    """
    path, folder = sources(root, split, image_folder=image_folder)
    data = decode(path, Instances)
    column_of = _positions([c.id for c in data.categories], f"{path}: categories", "id")
    classes = [c.name for c in data.categories]
    _positions(classes, f"{path}: categories", "name")
    position_of = _positions([image.id for image in data.images], f"{path}: images", "id")
    owners = [o.image_id for o in data.annotations]
    positions = _look_up(owners, position_of, lambda i: f"{path}: annotations[{i}].image_id")

    images = data.images if all_images else [data.images[i] for i in dict.fromkeys(positions)]
    if not images:
        raise DataError(f"{path}: annotations is empty, no image has a label")
    row_of = {image.id: row for row, image in enumerate(images)}
    absent = [(image.id, c) for image in images for c in image.neg_category_ids or ()]
    seen = [o.category_id for o in data.annotations]
    columns = _look_up(seen, column_of, lambda i: f"{path}: annotations[{i}].category_id")
    unseen = [category for _, category in absent]
    place = f"{path}: neg_category_ids of image"
    columns += _look_up(unseen, column_of, lambda i: f"{place} {absent[i][0]!r}")
    rows = [row_of[image] for image in owners] + [row_of[image] for image, _ in absent]
    values = [PRESENT] * len(owners) + [ABSENT] * len(absent)
    implied = ABSENT if all(i.neg_category_ids is None for i in images) else UNANNOTATED
    files = image_names(
        [file_name(image) for image in images],
        folder,
        lambda row: f"{path}: images[{position_of[images[row].id]}].file_name",
    )
    return Annotations.from_cells(folder, files, tuple(classes), rows, columns, values, implied)


def splits(root: Path) -> list[str]:
    """The splits that `root/annotations` holds a JSON of, those of captions and the like aside."""
    names = sorted(path.stem for path in (root / "annotations").glob("*.json"))
    # The official archives hold captions_train2014.json and others beside the instances.
    instances = [name for name in names if name.startswith("instances_")]
    return [name.removeprefix("instances_") for name in instances or names]


def sources(root: Path, split: str, *, image_folder: str = "", **_: object) -> tuple[Path, Path]:
    """The JSON that `split` means, and the folder of its images."""
    candidates = [f"annotations/instances_{split}.json", f"annotations/{split}.json", split]
    path = next((root / name for name in candidates if (root / name).is_file()), None)
    if path is None:
        raise no_split(split, splits(root), root / candidates[0])
    if image_folder:
        return path, root / image_folder
    folders = [root / split, root / "images" / split, root / "images"]
    beside = root if path.parent.name == "annotations" else path.parent
    return path, next((folder for folder in folders if folder.is_dir()), beside)


def decode(path: Path, kind: type[Content]) -> Content:
    """The JSON as `Instances`, or as a kind of them with more fields.

    Raises `DataError` for a file that cannot be read, is not such a JSON, or has no image or
    category.
    """
    # The decoder works on a map of the file. Neither its text nor the fields that are not needed
    # become Python objects. A field of type Raw keeps the map open, so nothing closes it here.
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise DataError(f"{path} is empty")
            data = _parsed(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), kind)
    except OSError as error:
        raise unreadable(path, error) from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON in COCO's instances format: {error}") from None
    for name in ("categories", "images"):
        if not getattr(data, name):
            raise DataError(f"{path}: {name} is empty")
    return data


def _parsed(text: mmap.mmap, kind: type[Content]) -> Content:
    decoder = msgspec.json.Decoder(kind).decode
    content = text[3:] if text[:3] == codecs.BOM_UTF8 else text
    try:
        return decoder(content)
    except msgspec.DecodeError as error:
        # NaN is not JSON, but converters write it for boxes and areas. Python's parser reads it and
        # needs several times the time and memory. Encoded again, NaN is null.
        if isinstance(error, msgspec.ValidationError) or not re.search(rb"NaN|Infinity", content):
            raise
        return decoder(msgspec.json.encode(json.loads(content[:])))


def _positions(ids: Sequence[Id], place: str, field: str) -> dict[Id, int]:
    """Where each id stands; raises `DataError` for one that stands there twice."""
    positions: dict[Id, int] = {}
    for index, name in enumerate(ids):
        if (first := positions.setdefault(name, index)) != index:
            raise DataError(f"{place}[{index}].{field}: {name!r} is also that of [{first}]")
    return positions


def _look_up(ids: Sequence[Id], positions: dict[Id, int], place: Callable[[int], str]) -> list[int]:
    try:
        return [positions[name] for name in ids]
    except KeyError as error:
        index = ids.index(error.args[0])
        raise DataError(f"{place(index)}: there is no {ids[index]!r}") from None


def file_name(image: Image) -> str:
    """The path of an image as the JSON has it."""
    # LVIS has no file names, but URLs that end in train2017/000000391895.jpg.
    return image.file_name or "/".join((image.coco_url or "").rsplit("/", 2)[-2:])
