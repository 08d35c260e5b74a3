"""What the data side costs one core: this project's pipeline beside the conventional one.

The conventional pipeline is what a training script for PyTorch usually does, the official one too:
Pillow opens and converts, torchvision resizes, Cutout and RandAugment work on Pillow images,
ToTensor makes float32, the default collate stacks. Both read the same photographs in the same
process, on one thread, in turn. Figures are medians of the ratios of neighbouring runs, in CPU
time, so that other work on the machine is not in them.

    python bench/data.py FOLDER_OF_PHOTOGRAPHS [--size 448]

Without a folder it takes the pictures of ASL_VOC_ROOT, else drawn ones, which are small: decoded in
no time, they make ratios too good. `--workers 1 2` measures instead how images/s, of wall clock
then, grow with processes.
"""

import argparse
import ctypes
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from step import ratio, seconds
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms

from asl.data.annotations import Annotations
from asl.data.readers.shapes import draw_shapes
from asl.images.augment import apply, draw
from asl.images.cache import ImageCache
from asl.images.decode import find_images, read_image, squish
from asl.images.loader import Batches
from asl.images.settings import AugmentSettings, ImageSettings

CLASSES, BATCH = 80, 32
GREY = (128, 128, 128)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def affine(*coefficients: float, resample: Any = Image.Resampling.NEAREST) -> Callable[..., Any]:
    """Pillow's warp, of which every coefficient is a function of the amount."""

    def warp(image: Image.Image, amount: float) -> Image.Image:
        numbers = [c(amount, image) if callable(c) else c for c in coefficients]
        return image.transform(
            image.size, Image.Transform.AFFINE, numbers, resample, fillcolor=GREY
        )

    return warp


def patch(image: Image.Image, amount: float) -> Image.Image:
    """RandAugment's Cutout."""
    return cut(image, 2 * (round(amount) // 2), (125, 122, 113))


def cut(image: Image.Image, side: int, colour: tuple[int, int, int]) -> Image.Image:
    """A square of one colour around a random point, in a copy."""
    image = image.copy()
    x, y = random.randrange(image.width) - side // 2, random.randrange(image.height) - side // 2
    ImageDraw.Draw(image).rectangle((x, y, x + side - 1, y + side - 1), colour)
    return image


BICUBIC = Image.Resampling.BICUBIC
# RandAugment of the recipe: what it does, and the amount at level 9 (signed ones are mirrored).
RANDAUGMENT: list[tuple[Callable[[Image.Image, float], Image.Image], Callable[[float], float]]] = [
    (affine(1, lambda a, _: a, 0, 0, 1, 0, resample=BICUBIC), lambda m: signed(0.3 * m)),
    (affine(1, 0, 0, lambda a, _: a, 1, 0, resample=BICUBIC), lambda m: signed(0.3 * m)),
    (affine(1, 0, lambda a, i: a * i.width, 0, 1, 0), lambda m: signed(150 / 331 * m)),
    (affine(1, 0, 0, 0, 1, lambda a, i: a * i.height), lambda m: signed(150 / 331 * m)),
    (lambda image, a: image.rotate(a, fillcolor=GREY), lambda m: 30 * m),
    (lambda image, a: ImageEnhance.Color(image).enhance(a), lambda m: 1 + signed(0.9 * m)),
    (lambda image, a: ImageEnhance.Contrast(image).enhance(a), lambda m: 1 + signed(0.9 * m)),
    (lambda image, a: ImageEnhance.Sharpness(image).enhance(a), lambda m: 1 + signed(0.9 * m)),
    (lambda image, a: ImageEnhance.Brightness(image).enhance(a), lambda m: 1 + signed(0.9 * m)),
    (lambda image, a: ImageOps.posterize(image, round(a)), lambda m: 8 - 4 * m),
    (lambda image, a: ImageOps.solarize(image, round(a)), lambda m: 256 - 256 * m),
    (patch, lambda m: 20 * m),
    (lambda image, _: ImageOps.autocontrast(image), lambda m: m),
    (lambda image, _: ImageOps.equalize(image), lambda m: m),
    (lambda image, _: ImageOps.invert(image), lambda m: m),
]


def signed(amount: float) -> float:
    """With a random sign."""
    return random.choice((-amount, amount))


def cutout(image: Image.Image) -> Image.Image:
    """Cutout of half the side in a random colour."""
    red, green, blue = (random.randrange(256) for _ in range(3))
    return cut(image, 2 * (round(0.5 * image.width) // 2) + 1, (red, green, blue))


def augment(image: Image.Image) -> Image.Image:
    """Cutout, then the recipe's RandAugment."""
    image = cutout(image)
    for operation, amount in random.choices(RANDAUGMENT, k=2):
        level = random.randint(1, 9) / 9
        if random.random() < 0.5:
            image = operation(image, amount(level))
    return image


class Conventional(Dataset[Any]):
    """Images and targets as a map-style data set makes them."""

    def __init__(self, annotations: Annotations, size: int, training: bool) -> None:
        self.files = [str(annotations.path(i)) for i in range(len(annotations))]
        self.targets = torch.zeros(len(self.files), CLASSES)
        steps = [transforms.Resize((size, size)), *[transforms.Lambda(augment)] * training]
        self.transform = transforms.Compose([*steps, transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.open(self.files[index]).convert("RGB")), self.targets[index]


def exhaust(batches: Batches, epochs: Iterator[int]) -> None:
    """The next of the `epochs` of `batches`."""
    for _ in batches.epoch(next(epochs)):
        pass


RECIPE = {"augment": AugmentSettings(), "shuffle": True}


def pipelines(annotations: Annotations, size: int, cache_dir: str) -> dict[str, Any]:
    """What is compared: everything from files to batches, in this process."""
    epochs = count()

    def ours(cache_dir: str = "", **options: Any) -> Callable[[], None]:
        settings = ImageSettings(image_size=size, batch_size=BATCH, workers=0, cache_dir=cache_dir)
        batches = Batches(annotations, settings, **options)
        return lambda: exhaust(batches, epochs)

    def conventional(training: bool) -> Callable[[], None]:
        loader = DataLoader(Conventional(annotations, size, training), BATCH)
        return lambda: [None for _ in loader] and None

    return {
        "conventional, training": conventional(training=True),
        "training, from files": ours(**RECIPE),
        "training, from the cache": ours(cache_dir, **RECIPE),
        "training, from the cache, augmented on the device": ours(
            cache_dir, **RECIPE, on_device=True
        ),
        "conventional, validation": conventional(training=False),
        "validation, from files": ours(),
        "validation, from the cache": ours(cache_dir),
    }


def stages(
    annotations: Annotations, size: int, cache: ImageCache, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds per image of each stage, conventional, if there is such a one, and here."""
    paths = [annotations.path(i) for i in range(len(annotations))]
    opened = [Image.open(path).convert("RGB") for path in paths]
    resized = [image.resize((size, size), Image.Resampling.BILINEAR) for image in opened]
    decoded = [read_image(path) for path in paths]
    squished = [squish(image, size) for image in decoded]
    slot = torch.empty(3, size, size, dtype=torch.uint8)
    numbers = draw("recipe", 0, 0, range(len(paths)))
    resize = transforms.Resize((size, size))

    batch = torch.empty(BATCH, 3, size, size, dtype=torch.uint8)

    def each(action: Callable[..., object], *lists: Iterable[Any]) -> Callable[[], None]:
        return lambda: [action(*items) for items in zip(*lists, strict=True)] and None

    pairs: dict[str, tuple[Callable[[], object], ...]] = {
        "read and decode": (
            each(lambda path: Image.open(path).convert("RGB"), paths),
            each(read_image, paths),
        ),
        "resize": (each(resize, opened), each(lambda image: squish(image, size), decoded)),
        "Cutout and RandAugment": (each(augment, resized), each(apply, squished, numbers)),
        "to tensor, into the batch": (
            lambda: default_collate([transforms.functional.to_tensor(i) for i in resized]),
            each(slot.copy_, squished),
        ),
        "read from the cache": (each(lambda row: cache.read(row, slot), range(len(paths))),),
        "out of the loader's memory": (each(lambda _: batch.clone(), range(len(paths) // BATCH)),),
    }
    rows = {}
    for name, both in pairs.items():
        taken = seconds({str(i): run for i, run in enumerate(both)}, rounds)
        rows[name] = [1000 * statistics.median(times) / len(paths) for times in taken.values()]
    return rows


def scaling(
    annotations: Annotations, size: int, cache_dir: str, workers: Sequence[int], rounds: int
) -> None:
    """Print images/s, of wall clock, of training batches by number of worker processes."""
    sources = {
        "from files": ("", False),
        "from the cache": (cache_dir, False),
        "from the cache, augmented on the device": (cache_dir, True),
    }
    epochs = count()

    def run(processes: int, source: tuple[str, bool]) -> Callable[[], None]:
        folder, on_device = source
        settings = ImageSettings(
            image_size=size, batch_size=BATCH, workers=processes, cache_dir=folder
        )
        batches = Batches(annotations, settings, **RECIPE, on_device=on_device)
        return lambda: exhaust(batches, epochs)

    runs = {f"{name} {n}": run(n, source) for name, source in sources.items() for n in workers}
    taken = seconds(runs, rounds, clock=time.perf_counter)
    print(f"\n| workers | {' | '.join(sources)} |\n| ---: |{' ---: |' * len(sources)}")
    for n in workers:
        cells = []
        for name in sources:
            times, first = taken[f"{name} {n}"], taken[f"{name} {workers[0]}"]
            rate = len(annotations) / statistics.median(times)
            cells.append(f"{rate:,.0f} ({ratio(times, first):.2f} x)")
        print(f"| {n} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", help="photographs")
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="*", help="measure these numbers of workers")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    # Batches come in new memory. For a GPU that is pinned, of which PyTorch keeps what was freed;
    # glibc is to do so too, or it would be chance how often memory is mapped anew.
    if sys.platform == "linux":
        for parameter, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**30)):
            ctypes.CDLL(None).mallopt(parameter, value)
    random.seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.folder or os.environ.get("ASL_VOC_ROOT")
        if not folder:
            folder = scratch
            draw_shapes(Path(scratch), train=chosen.images, val=1, processes=1)
        root, names = find_images(folder)
        annotations = Annotations.unlabelled(
            root, names[: chosen.images], tuple(f"class {i}" for i in range(CLASSES))
        )
        print(f"{len(annotations)} images of {folder}, {chosen.size} px, torch {torch.__version__}")
        settings = ImageSettings(image_size=chosen.size, cache_dir=scratch)
        cache = ImageCache.open(annotations, settings, workers=1)
        if chosen.workers:
            scaling(annotations, chosen.size, scratch, chosen.workers, chosen.rounds)
            return
        runs = pipelines(annotations, chosen.size, scratch)
        taken = seconds(runs, chosen.rounds)
        print(
            "\n| one core | images/s | ms per image | times conventional |"
            "\n| --- | ---: | ---: | ---: |"
        )
        for name, times in taken.items():
            base = "conventional, " + ("validation" if "validation" in name else "training")
            ms = 1000 * statistics.median(times) / len(annotations)
            gain = ratio(times, taken[base])
            print(f"| {name} | {1000 / ms:.0f} | {ms:.2f} | {gain:.1f} |")
        print("\n| stage, ms per image | conventional | here |\n| --- | ---: | ---: |")
        for name, both in stages(annotations, chosen.size, cache, chosen.rounds).items():
            print(f"| {name} |{' |' * (2 - len(both))} {' | '.join(f'{ms:.2f}' for ms in both)} |")
        pixels = 3 * chosen.size**2
        here = pixels + CLASSES + 4 * np.prod(draw("recipe", 0, 0, [0]).shape)
        print(
            f"\nbytes per image to the device: {here:,.0f} here, {4 * pixels + 4 * CLASSES:,} as "
            f"float32: 1/{(4 * pixels + 4 * CLASSES) / here:.2f}"
        )


if __name__ == "__main__":
    main()
