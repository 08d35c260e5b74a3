"""Where the objects of an image are: boxes, areas and outlines, in the sets that have them.

They play no part in training. A report shows them on photographs, and its figures by size are those
of objects that are small, medium and large as COCO defines it.
"""

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple
from xml.etree import ElementTree

import msgspec
import numpy as np
import numpy.typing as npt

from asl.data.annotations import Annotations
from asl.data.classes import match_classes
from asl.data.files import image_names, not_found, unreadable
from asl.data.readers import coco
from asl.data.settings import DataSettings
from asl.data.splits import Role, split_name
from asl.errors import DataError

SIZES = ("small", "medium", "large")
LIMITS = (32**2, 96**2)  # px: a medium object is at least the first, a large one the second (COCO)
SIDES = ("width", "height")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
MOST_POINTS = 120  # of an outline that is traced around a mask


@dataclass(frozen=True, eq=False)
class Objects:
    """The K objects of N images, in the order of the images.

    `indptr` are N + 1 offsets into the others: `columns` (K,), the classes; `boxes` (K, 4), left,
    top, width and height in pixels; `areas` (K,) in square pixels; `ignored` (K,), those that an
    evaluation of detectors leaves out (COCO's crowds, VOC's difficult ones); `outlines`, K texts in
    JSON as COCO has them, empty for an object that has a box alone. `extents` (N, 2) are the width
    and height of the images that these pixels are of.
    """

    indptr: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int32]
    boxes: npt.NDArray[np.float32]
    areas: npt.NDArray[np.float32]
    ignored: npt.NDArray[np.bool_]
    extents: npt.NDArray[np.float32]
    outlines: Sequence[Any] = field(repr=False)

    def sizes(self, num_classes: int) -> npt.NDArray[np.int8]:
        """The size of the largest object of each class in each image: (N, C) int8.

        1, 2, 3 as in `SIZES`, 0 for none. An ignored object counts where all of a cell are.
        """
        rows = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        size = 1 + np.searchsorted(LIMITS, self.areas, side="right").astype(np.int8)
        table = np.zeros((len(self.indptr) - 1, num_classes), dtype=np.int8)
        chosen = ~self.ignored
        np.maximum.at(table, (rows[chosen], self.columns[chosen]), size[chosen])
        chosen = table[rows, self.columns] == 0
        np.maximum.at(table, (rows[chosen], self.columns[chosen]), size[chosen])
        return table

    def polygons(self, row: int) -> list[tuple[int, list[list[float]]]]:
        """The class of every object of an image and its outline.

        Outlines are polygons of x, y, x, y, ... in [0, 1], of width and height. None of an image
        whose extent is not known.
        """
        extent = self.extents[row].tolist()
        if not all(side > 0 for side in extent):  # NaN where the file does not say it
            return []
        found = []
        for index in range(self.indptr[row], self.indptr[row + 1]):
            outline = [
                [round(min(max(value / extent[i % 2], 0), 1), 4) for i, value in enumerate(polygon)]
                for polygon in self._outline(index)
            ]
            found.append((int(self.columns[index]), outline))
        return found

    def _outline(self, index: int) -> list[list[float]]:
        outline = json.loads(bytes(self.outlines[index]) or b"null")
        if isinstance(outline, list) and outline:
            return outline
        if isinstance(outline, dict):
            return _traced(outline)
        left, top, width, height = self.boxes[index].tolist()
        right, bottom = left + width, top + height
        return [[left, top, right, top, right, bottom, left, bottom]]


class _Object(NamedTuple):
    """One object while it is read; `row` is that of its image."""

    row: int
    column: int
    box: Sequence[float]
    area: float
    ignored: bool
    outline: Any = b""


def read_objects(
    settings: DataSettings, annotations: Annotations, role: Role = "val"
) -> Objects | None:
    """The objects of these images of a split, or None where the data set has none.

    COCO, LVIS and whatever is written as they are (the shapes too) have boxes, areas and outlines.
    Pascal VOC has boxes: their area is the object's, which is larger than what a mask covers; a
    copy without the folder `Annotations/` has none. Classes are matched by name with those of
    `annotations`; objects of others are left out, and so are those without a box.

    Raises `DataError` for files that are missing or wrong.
    """
    root, split = Path(settings.data), split_name(settings, role)
    if settings.dataset in ("coco", "shapes"):
        path, _ = coco.sources(root, split, image_folder=settings.image_folder or "")
        return _of_coco(path, annotations)
    if settings.dataset == "voc" and (annotations.root / "Annotations").is_dir():
        return _of_voc(annotations.root / "Annotations", annotations)
    return None


def _gathered(
    objects: list[_Object], extents: npt.NDArray[np.float32], annotations: Annotations
) -> Objects:
    objects.sort(key=lambda each: each.row)
    indptr = np.zeros(len(annotations) + 1, dtype=np.int64)
    numbers = np.bincount([each.row for each in objects], minlength=len(annotations))
    np.cumsum(numbers, out=indptr[1:])
    return Objects(
        indptr,
        np.array([each.column for each in objects], dtype=np.int32),
        np.array([each.box for each in objects], dtype=np.float32).reshape(-1, 4),
        np.array([each.area for each in objects], dtype=np.float32),
        np.array([each.ignored for each in objects], dtype=bool),
        extents,
        [each.outline for each in objects],
    )


def _columns(names: Iterable[str], annotations: Annotations) -> dict[str, int]:
    """The class of `annotations` that each name is, for those that are one."""
    columns = {name: column for column, name in enumerate(annotations.classes)}
    found = {name: columns[name] for name in names if name in columns}
    for name in set(names) - found.keys():
        with suppress(DataError):
            found[name] = int(match_classes(annotations.classes, [name])[0])
    return found


class _Image(coco.Image):
    width: float | None = None
    height: float | None = None


class _Instance(coco.Object, gc=False):
    bbox: list[float | None] | None = None
    area: float | None = None
    iscrowd: int = 0
    segmentation: msgspec.Raw = msgspec.Raw(b"")


class _Instances(coco.Instances):
    images: list[_Image]  # type: ignore[assignment]
    annotations: list[_Instance]  # type: ignore[assignment]


def _of_coco(path: Path, annotations: Annotations) -> Objects:
    data = coco.decode(path, _Instances)
    owners = {each.image_id for each in data.annotations}
    images = [image for image in data.images if image.id in owners]
    names = [coco.file_name(image) for image in images]
    files = image_names(names, annotations.root, lambda i: f"{path}: image {images[i].id!r}")
    rows = {bytes(file): row for row, file in enumerate(annotations.files)}
    row_of = {
        image.id: rows[bytes(file)]
        for image, file in zip(images, files, strict=True)
        if bytes(file) in rows
    }
    extents = np.full((len(annotations), 2), np.nan, dtype=np.float32)
    for image in images:
        if image.id in row_of:
            extents[row_of[image.id]] = image.width or np.nan, image.height or np.nan
    columns = _columns([category.name for category in data.categories], annotations)
    column_of = {each.id: columns[each.name] for each in data.categories if each.name in columns}
    objects = [
        _Object(
            row_of[each.image_id],
            column_of[each.category_id],
            box,
            each.area if each.area else box[2] * box[3],
            bool(each.iscrowd),
            each.segmentation,
        )
        for each in data.annotations
        if each.image_id in row_of and each.category_id in column_of
        for box in [[side for side in each.bbox or () if side is not None]]
        if len(box) == 4
    ]
    return _gathered(objects, extents, annotations)


def _traced(mask: dict[str, Any]) -> list[list[float]]:
    """The outlines of a mask in COCO's run-length encoding, in its own pixels."""
    from contourpy import contour_generator  # with matplotlib
    from pycocotools import mask as coco_mask

    height, width = mask["size"]
    if isinstance(mask["counts"], list):
        mask = coco_mask.frPyObjects(mask, height, width)
    with warnings.catch_warnings():  # pycocotools 2.0.11 is not quite ready for NumPy 2
        warnings.simplefilter("ignore", DeprecationWarning)
        cells = np.pad(coco_mask.decode(mask), 1)  # so that an outline along the border closes
    lines: Any = contour_generator(z=cells.astype(np.float32)).lines(0.5)
    polygons = []
    for line in lines:
        points = line[:: max(1, len(line) // MOST_POINTS)] - 0.5  # the middles of pixels, padded
        if len(points) > 2:
            polygons.append(points.ravel().tolist())
    return polygons


def _of_voc(folder: Path, annotations: Annotations) -> Objects:
    extents = np.full((len(annotations), 2), np.nan, dtype=np.float32)
    found: list[tuple[str, _Object]] = []
    for row, file in enumerate(annotations.files):
        path = folder / f"{PurePath(os.fsdecode(bytes(file))).stem}.xml"
        tree = _parsed(path)
        try:
            extents[row] = [float(tree.findtext(f"size/{side}", "nan")) for side in SIDES]
            found += [_voc_object(row, element) for element in tree.iter("object")]
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None
    columns = _columns({name for name, _ in found}, annotations)
    objects = [each._replace(column=columns[name]) for name, each in found if name in columns]
    return _gathered(objects, extents, annotations)


def _parsed(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(path.read_bytes())
    except FileNotFoundError:
        raise not_found(path) from None
    except OSError as error:
        raise unreadable(path, error) from error
    except ElementTree.ParseError as error:
        raise DataError(f"{path} is not XML: {error}") from None


def _voc_object(row: int, element: ElementTree.Element) -> tuple[str, _Object]:
    """The name of an object, and the object without its class. Pixels count from 1, ends included.

    Raises `ValueError` for a corner that is not there or no number.
    """
    name = (element.findtext("name") or "").strip()
    corners = [element.findtext(f"bndbox/{corner}", "") for corner in CORNERS]
    try:
        left, top, right, bottom = map(float, corners)
    except ValueError:
        raise ValueError(
            f"the box of {name!r} is {', '.join(corners)!r}, not four numbers"
        ) from None
    width, height = right - left + 1, bottom - top + 1
    difficult = element.findtext("difficult", "0").strip() == "1"
    return name, _Object(row, -1, (left - 1, top - 1, width, height), width * height, difficult)
