"""MS-COCO 2014 and 2017, LVIS v1, and any other JSON in COCO's instances format.

annotations/instances_train2014.json        images, annotations, categories
train2014/COCO_train2014_000000000009.jpg
"""

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from asl.data.annotations import ABSENT, PRESENT, UNANNOTATED, Annotations
from asl.data.files import image_names, no_split, unreadable
from asl.errors import DataError

VERSION = 1
DEFAULT_SPLITS = (("train2014", "val2014"), ("train2017", "val2017"), ("train", "val"))

Id = int | str


class Image(msgspec.Struct):
    """What is read of an entry of `images`; LVIS gives a URL in place of the file name."""

    id: Id
    file_name: str = ""
    coco_url: str = ""
    neg_category_ids: list[Id] | None = None


class Object(msgspec.Struct, gc=False):
    """What is read of an entry of `annotations`."""

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
    data = _decode(path)
    columns = _numbers([c.id for c in data.categories], f"{path}: categories", "id")
    _numbers([c.name for c in data.categories], f"{path}: categories", "name")
    listed = _numbers([image.id for image in data.images], f"{path}: images", "id")
    owners = [o.image_id for o in data.annotations]
    place_of = _look_up(owners, listed, lambda i: f"{path}: annotations[{i}].image_id")

    images = data.images if all_images else [data.images[i] for i in dict.fromkeys(place_of)]
    if not images:
        raise DataError(f"{path}: annotations is empty, no image has a label")
    rows = {image.id: row for row, image in enumerate(images)}
    absent = [(image.id, c) for image in images for c in image.neg_category_ids or ()]
    return Annotations.from_cells(
        folder,
        image_names(
            [_file_name(image) for image in images],
            folder,
            lambda row: f"{path}: images[{listed[images[row].id]}].file_name",
        ),
        tuple(category.name for category in data.categories),
        [rows[image] for image in owners] + [rows[image] for image, _ in absent],
        _look_up(
            [o.category_id for o in data.annotations],
            columns,
            lambda i: f"{path}: annotations[{i}].category_id",
        )
        + _look_up(
            [category for _, category in absent],
            columns,
            lambda i: f"{path}: neg_category_ids of image {absent[i][0]!r}",
        ),
        [PRESENT] * len(owners) + [ABSENT] * len(absent),
        implied=ABSENT if all(i.neg_category_ids is None for i in images) else UNANNOTATED,
    )


def splits(root: Path) -> list[str]:
    """The splits that `root/annotations` holds a JSON of."""
    found = (root / "annotations").glob("*.json")
    return sorted(path.stem.removeprefix("instances_") for path in found)


def sources(root: Path, split: str, *, image_folder: str = "", **_: object) -> tuple[Path, Path]:
    """The JSON that `split` means, and the folder of its images."""
    candidates = [f"annotations/instances_{split}.json", f"annotations/{split}.json", split]
    path = next((root / name for name in candidates if (root / name).is_file()), None)
    if path is None:
        raise no_split(split, splits(root), root / candidates[0])
    folders = [root / split, root / "images" / split, root / "images"]
    beside = root if path.parent.name == "annotations" else path.parent
    if image_folder:
        return path, root / image_folder
    return path, next((folder for folder in folders if folder.is_dir()), beside)


def _decode(path: Path) -> Instances:
    # Typed decoding from a map of the file: neither its text nor the fields that are not wanted
    # ever become Python objects.
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise DataError(f"{path} is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                data = msgspec.json.decode(text, type=Instances)
    except OSError as error:
        raise unreadable(path, error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON in COCO's instances format: {error}") from None
    for name in ("categories", "images"):
        if not getattr(data, name):
            raise DataError(f"{path}: {name} is empty")
    return data


def _numbers(ids: Sequence[Id], place: str, field: str) -> dict[Id, int]:
    numbers: dict[Id, int] = {}
    for index, name in enumerate(ids):
        if numbers.setdefault(name, index) != index:
            raise DataError(f"{place}[{index}].{field}: {name!r} is also that of [{numbers[name]}]")
    return numbers


def _look_up(ids: Sequence[Id], numbers: dict[Id, int], place: Callable[[int], str]) -> list[int]:
    try:
        return [numbers[name] for name in ids]
    except KeyError as error:
        index = ids.index(error.args[0])
        raise DataError(f"{place(index)}: there is no {ids[index]!r}") from None


def _file_name(image: Image) -> str:
    # LVIS has no file names, but URLs that end in train2017/000000391895.jpg.
    return image.file_name or "/".join(image.coco_url.rsplit("/", 2)[-2:])
