"""The built-in data set: scenes of coloured and patterned shapes, drawn once, in COCO's own format.

It is drawn and not downloaded, so that the demo needs no network. It is written as COCO 2014 is, so
that COCO's own reader reads it. It has what makes multi-label data hard: nine in ten labels of an
image are absent, classes are long-tailed, objects overlap and differ widely in size, and every
shape comes in every fill, so that no colour or texture gives a class away by itself.
"""

import json
import os
import threading
from colorsys import hsv_to_rgb
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from asl.atomic import replacing
from asl.data.annotations import Annotations
from asl.data.readers import coco
from asl.errors import DataError

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Sizes = npt.NDArray[np.int64]
Fields = dict[str, Any]

VERSION = 1  # raise it with every change to what is drawn: then older copies are drawn anew


def _star_shaped(*radii: float) -> Floats:
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    points = np.array(radii) * [np.cos(angles), np.sin(angles)]
    return points.astype(np.float32)


# Outlines as polygons in the unit circle, (2, n): to turn or squeeze one is a matrix product.
OUTLINES = {
    "circle": _star_shaped(*[0.9] * 64),
    "triangle": _star_shaped(1, 1, 1),
    "cross": _star_shaped(*[1, 0.4, 1] * 4),
}
# Their hues, a sixth of the circle apart.
COLOURS = {"red": 0.0, "yellow": 1 / 6, "green": 2 / 6, "cyan": 3 / 6, "blue": 4 / 6, "pink": 5 / 6}
FILLS = (*COLOURS, "striped", "dotted")
# From frequent to rare. Both lists are repeated, so that head and tail have all shapes and fills.
CLASSES = tuple((FILLS[i % 8], list(OUTLINES)[i % 3]) for i in range(24))
# How often a class is drawn: the first for one half of the images, the last for 1.4 %. Images
# without an object are drawn again, which gives 2.5 labels per image. Classes are drawn
# independently of each other.
FREQUENCIES = np.array([0.46, *np.linspace(0.12, 0.06, 20), 0.045, 0.016, 0.014])
MOST_OBJECTS = 8
RADII = (0.15, 0.48)  # of an object, as shares of the image's short side
LEAST_VISIBLE = 0.7  # of an object's pixels, behind those in front of it


def shapes(root: Path, split: str) -> Annotations:
    """Read a split ("train2014", "val2014"); a missing one is drawn first (`draw_shapes`)."""
    return coco.coco(sources(root, split)[0].parents[1], split)


def splits(root: Path) -> list[str]:
    """The splits that are drawn when asked for."""
    return ["train2014", "val2014"]


def sources(root: Path, split: str, **_: object) -> tuple[Path, Path]:
    """The JSON of a split and the folder of its images, drawn first if they are missing.

    Raises `DataError` if `root` holds another data set or cannot be written.
    """
    try:
        draw_shapes(root)
    except OSError as error:
        raise DataError(f"the shapes cannot be drawn into {root}: {error.strerror}") from error
    return coco.sources(root, split)


def draw_shapes(
    root: Path, train: int = 2000, val: int = 500, processes: int | None = None
) -> None:
    """Draw the data set into `root`, unless `root` holds it already: JPEGs of 128 to 208 px.

    `root` gets `train2014/`, `val2014/` and `annotations/instances_{train,val}2014.json`: 24
    categories, from frequent to rare; `bbox` and `area` are those of an object's visible pixels.
    The bytes depend on the versions of this module and of the libraries, not on `processes` (None:
    one per core). A split's JSON is written last and at once: if the drawing is cut short, the next
    call draws the split again.

    Raises `DataError` if `root` holds another data set: it is not overwritten.
    """
    for split, length in {"train2014": train, "val2014": val}.items():
        info = {"description": "asl shapes", "version": VERSION, "images": length}
        target = root / "annotations" / f"instances_{split}.json"
        if _is_complete(target, info):
            continue
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (root / split).mkdir(exist_ok=True)
        images, annotations = [], []
        with ProcessPoolExecutor(processes, initializer=_end_with_parent) as pool:
            drawn = pool.map(partial(_draw_image, root, split), range(1, length + 1), chunksize=8)
            for image, objects in tqdm(drawn, f"drawing {split}", length, unit="img"):
                images.append(image)
                annotations += objects
        content = {
            "info": info,
            "images": images,
            "annotations": [{"id": i, **fields} for i, fields in enumerate(annotations, 1)],
            "categories": [
                {"id": i, "name": f"{fill} {shape}", "supercategory": shape}
                for i, (fill, shape) in enumerate(CLASSES, 1)
            ],
        }
        with replacing(target) as file:
            file.write(json.dumps(content).encode())


def _is_complete(target: Path, info: Fields) -> bool:
    if not target.exists():
        return False
    with suppress(ValueError, KeyError, TypeError, RecursionError):  # of any other JSON, or of none
        found = json.loads(target.read_bytes())["info"]
        if found["description"] == info["description"]:
            return bool(found == info)
    raise DataError(f"{target} is of another data set: draw the shapes in a folder of their own")


def _end_with_parent() -> None:
    # When the parent of a pool is killed, its workers wait for ever. So each watches the parent.
    def wait() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _draw_image(root: Path, split: str, number: int) -> tuple[Fields, list[Fields]]:
    """Write one JPEG; return its entry in COCO's `images` and those in `annotations`."""
    canvas, objects = _draw_scene(np.random.default_rng([len(split), number]))
    name = f"COCO_{split}_{number:012d}.jpg"
    # The draft has a name of its own: several ranks or runs may draw the same set at the same time.
    draft = root / split / f".{name}.{os.getpid()}"
    Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8)).save(draft, "JPEG", quality=90)
    draft.replace(root / split / name)
    annotations = []
    for category, visible in objects:
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        x, y = int(columns[0]), int(rows[0])
        box = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
        fields = {"image_id": number, "category_id": category, "iscrowd": 0}
        annotations.append({**fields, "bbox": box, "area": int(visible.sum())})
    height, width, _ = canvas.shape
    return {"id": number, "file_name": name, "height": height, "width": width}, annotations


def _draw_scene(rng: Generator) -> tuple[Floats, list[tuple[int, Mask]]]:
    """An image, (H, W, 3) in about [0, 1]; by object its category and visible pixels, (H, W)."""
    size = rng.permuted(rng.integers([128, 168], [160, 208]))  # width, height
    grid = np.indices((size[1], size[0])).astype(np.float32)[::-1]  # x and y of pixels, (2, H, W)
    light = _rotation(rng)[0]
    canvas = _background(rng, grid)
    categories: list[int] = []
    masks: list[Mask] = []
    for category, radius in _cast(rng, size.min()):
        fill, shape = CLASSES[category - 1]
        for _ in range(20):
            middle = rng.uniform(0.7 * radius, size - 0.7 * radius)
            squeeze = np.diag([1, rng.uniform(0.8, 1)])
            frame = radius * _rotation(rng, 0.3) @ squeeze
            outline = frame @ OUTLINES[shape] + middle[:, None]
            cover = _cover(outline, size)
            if _recognisable([*masks, cover > 0.5]):
                break
        else:
            continue  # a crowded image has no room for it
        categories.append(category)
        masks.append(cover > 0.5)
        shadow = _cover(outline - 0.15 * radius * light[:, None], size, blur=0.1 * radius)
        canvas *= 1 - 0.5 * shadow[..., None]
        offset = grid - middle[:, None, None].astype(np.float32)
        shade = 1 + 0.25 / radius * _along(light, offset)
        u, v = np.tensordot(np.linalg.inv(frame).astype(np.float32), offset, 1)
        paint = _paint(rng, fill, u, v) * shade[..., None]
        canvas += cover[..., None] * (paint - canvas)
    exposure = rng.uniform(0.7, 1.15) * (
        1 + _along(light, grid - grid.mean((1, 2), keepdims=True)) / 400
    )
    grain = rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(0.01, 0.04)
    return canvas * exposure[..., None] + grain, list(zip(categories, _visible(masks), strict=True))


def _cast(rng: Generator, side: float) -> list[tuple[int, float]]:
    """Categories and radii in pixels of the objects of an image, the largest (hindmost) first."""
    present = np.zeros(len(CLASSES), dtype=bool)
    while not 1 <= present.sum() <= MOST_OBJECTS:
        present = rng.random(len(CLASSES)) < FREQUENCIES
    categories = np.flatnonzero(present) + 1
    repeated = min(rng.poisson(1), MOST_OBJECTS - len(categories))
    categories = np.append(categories, rng.choice(categories, repeated))
    smallest, largest = RADII
    radii = side * smallest * (largest / smallest) ** rng.random(len(categories))
    return [(int(categories[i]), float(radii[i])) for i in np.argsort(-radii)]


def _visible(masks: list[Mask]) -> list[Mask]:
    """What remains of each mask behind all later ones."""
    return [mask & ~np.any(masks[i:], 0) if masks[i:] else mask for i, mask in enumerate(masks, 1)]


def _recognisable(masks: list[Mask]) -> bool:
    remains = zip(_visible(masks), masks, strict=True)
    return all(visible.sum() >= LEAST_VISIBLE * mask.sum() for visible, mask in remains)


def _rotation(rng: Generator, largest: float = np.pi) -> Floats:
    angle = rng.uniform(-largest, largest)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, sin], [-sin, cos]], dtype=np.float32)


def _along(direction: Floats, grid: Floats) -> Floats:
    x, y = grid
    along: Floats = direction[0] * x + direction[1] * y
    return along


def _cover(outline: npt.NDArray[np.floating], size: Sizes, blur: float = 0) -> Floats:
    """How much of each pixel a polygon covers, (H, W) in [0, 1]: drawn at four times the size."""
    image = Image.new("L", (4 * int(size[0]), 4 * int(size[1])))
    ImageDraw.Draw(image).polygon([(x, y) for x, y in 4 * outline.T], fill=255)
    image = image.reduce(4)
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def _colour(hue: float, saturation: float, value: float) -> Floats:
    return np.array(hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32)


def _mix(weight: Floats, first: Floats, second: Floats) -> Floats:
    mixed: Floats = first + weight.clip(0, 1)[..., None] * (second - first)
    return mixed


def _paint(rng: Generator, fill: str, u: Floats, v: Floats) -> Floats:
    """The surface of an object, (H, W, 3), at its own coordinates (the unit circle encloses it)."""
    if fill in COLOURS:
        hue = COLOURS[fill] + rng.uniform(-0.03, 0.03)
        colour = _colour(hue, rng.uniform(0.75, 1), rng.uniform(0.7, 1))
        return np.broadcast_to(colour, (*u.shape, 3))
    dark, light = _colour(rng.random(), 0.4, 0.15), _colour(rng.random(), 0.1, 1)
    frequency, start = 2 * np.pi / rng.uniform(0.4, 0.6), rng.uniform(0, 2 * np.pi)
    waves = np.sin(frequency * u + start)
    if fill == "dotted":
        waves = waves + np.sin(frequency * v) - 0.6
    return _mix(0.5 + 2 * waves, dark, light)


def _background(rng: Generator, grid: Floats) -> Floats:
    """A texture in two muted colours: noise, a gradient, stripes, checks or blobs, (H, W, 3)."""
    noise = np.sum([_noise(rng, grid, cells) / cells for cells in (3, 6, 12, 24, 48)], axis=0)
    kind = rng.choice(["noise", "gradient", "stripes", "checks", "blobs"])
    turned = np.tensordot(_rotation(rng), grid, 1) / rng.uniform(3, 12)
    if kind == "noise":
        pattern = noise
    elif kind == "gradient":
        pattern = turned[0] / 20
    elif kind == "stripes":
        pattern = 2 * np.sin(turned[0])
    elif kind == "checks":
        pattern = 4 * np.sin(turned[0]) * np.sin(turned[1])
    else:
        pattern = 4 * _noise(rng, grid, 10)
    colours = [_colour(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.2, 0.9)) for _ in "ab"]
    canvas: Floats = _mix(0.5 + pattern + 0.2 * noise, *colours) + 0.1 * noise[..., None]
    return canvas


def _noise(rng: Generator, grid: Floats, cells: int) -> Floats:
    """Smooth noise of about unit variance with so many cells on a side, (H, W)."""
    _, height, width = grid.shape
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
