"""What a cache of images takes, how fast it is read, and how far its pixels are from the files'.

    python bench/cache.py FOLDER_OF_PHOTOGRAPHS [--size 448]
    python bench/cache.py FOLDER_OF_PHOTOGRAPHS --order {forgotten,limited} [--windows N ...]

The first also decodes the photographs at a part of their size (`--draft-decode`), and one that is
enlarged to 12 megapixels. Times are CPU time of one thread, medians. The second reads a whole raw
cache in the orders of `--shuffle`; its times are those of the wall clock. "forgotten": the system
is told to forget the cache before each epoch, as where it is many times the memory. "limited": it
remembers what it can, to be run where memory is limited:

    cgroup=/sys/fs/cgroup/memory/limited   # as root, of cgroups v1
    mkdir $cgroup; echo 1G > $cgroup/memory.limit_in_bytes; echo $$ > $cgroup/cgroup.procs
"""

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import torch
from PIL import Image
from torch import Tensor

from asl.data.annotations import Annotations
from asl.images.cache import ImageCache
from asl.images.decode import find_images, read_image, read_squished, squish
from asl.images.loader import RankSampler
from asl.images.settings import ImageSettings

ROUNDS, BATCH = 5, 32
FORMATS = ("raw", "jpeg:95", "jpeg:90", "jpeg:75")


def milliseconds(action: Callable[[], object], each: int = 1) -> float:
    """Of CPU time, the median of some rounds."""
    taken = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        action()
        taken.append(1000 * (time.process_time() - begun) / each)
    return statistics.median(taken)


def grey_levels(one: list[Tensor], other: list[Tensor]) -> str:
    """How far images are apart: on average, and the value that 99 % of all stay below."""
    off = torch.cat([(a.int() - b.int()).abs().flatten() for a, b in zip(one, other, strict=True)])
    counts = off.bincount().cumsum(0) / len(off)
    return f"{off.float().mean():.2f} | {int((counts < 0.99).sum())}"


def storages(annotations: Annotations, size: int, scratch: str) -> None:
    """Print a row for each format of the cache."""
    plain = ImageSettings(image_size=size)
    exact = [read_squished(annotations.path(i), plain) for i in range(len(annotations))]
    print("\n| format | KB per image | ms to read | grey levels off | 99 % below |")
    print("| --- | ---: | ---: | ---: | ---: |")
    paths = [annotations.path(i) for i in range(len(annotations))]
    ms = milliseconds(lambda: [read_squished(path, plain) for path in paths], len(paths))
    kilobytes = sum(os.stat(path).st_size for path in paths) / len(paths) / 1000  # noqa: PTH116
    print(f"| the files | {kilobytes:.0f} | {ms:.3f} | | |")
    for name in FORMATS:
        settings = ImageSettings(image_size=size, cache_dir=scratch, cache_format=name)
        cache = ImageCache.open(annotations, settings, workers=0)
        slots = torch.empty(len(annotations), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        slots = slots.contiguous() if cache.planar else slots

        def read(cache: ImageCache = cache, slots: Tensor = slots) -> None:
            for index, slot in enumerate(slots):
                cache.read(index, slot)

        ms = milliseconds(read, len(annotations))
        kilobytes = cache.bytes / len(annotations) / 1000
        print(f"| {name} | {kilobytes:.0f} | {ms:.3f} | {grey_levels(exact, list(slots))} |")


def drafts(annotations: Annotations) -> None:
    """Print what decoding at a part of the size changes and saves."""
    paths = [annotations.path(i) for i in range(len(annotations))]
    print("\n| photographs | size | ms, whole | ms, draft | grey levels off | 99 % below |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for size in (112, 160):
        whole, draft = (
            [ImageSettings(image_size=size, draft_decode=each)] * len(paths)
            for each in (False, True)
        )
        images = [list(map(read_squished, paths, each)) for each in (whole, draft)]
        times = [
            milliseconds(lambda each=each: list(map(read_squished, paths, each)), len(paths))
            for each in (whole, draft)
        ]
        print(f"| these | {size} | {times[0]:.2f} | {times[1]:.2f} | {grey_levels(*images)} |")
    file = io.BytesIO()
    with Image.open(paths[0]) as picture:
        picture.resize((4000, 3000), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    content = file.getvalue()

    def decoded(size: int, draft: int) -> Tensor:
        return squish(read_image(content, draft=draft), size)

    for size in (224, 448):
        both = [partial(decoded, size, draft) for draft in (0, size)]
        ms = [milliseconds(each) for each in both]
        off = grey_levels(*([each()] for each in both))
        print(f"| 12 megapixels | {size} | {ms[0]:.1f} | {ms[1]:.1f} | {off} |")


def forget(files: Iterable[Path]) -> None:
    """Tell the system that these files are not needed in memory."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def orders(
    annotations: Annotations, settings: ImageSettings, windows: list[int], forgotten: bool
) -> None:
    """Print images/s of reading a whole cache, by order."""
    cache = ImageCache.open(annotations, settings, workers=2)
    slot = torch.empty(3, settings.image_size, settings.image_size, dtype=torch.uint8)
    rates: dict[int, list[float]] = {window: [] for window in windows}
    for epoch in range(4):
        for window, measured in rates.items():
            if forgotten:
                forget(Path(settings.cache_dir).glob("*/*.shard"))
            sampler = RankSampler(len(cache), BATCH, True, 0, window)
            sampler.set_epoch(epoch)
            begun = time.perf_counter()
            for share in sampler:
                cache.read_ahead(share.ahead)
                for index in share.indices.tolist():
                    cache.read(index, slot)
            if epoch > 0:
                measured.append(len(cache) / (time.perf_counter() - begun))
    print(f"\n{len(cache):,} images, {cache.bytes / 1e9:.2f} GB")
    print("\n| order | images/s | times full |\n| --- | ---: | ---: |")
    for window, measured in rates.items():
        gain = statistics.median(a / b for a, b in zip(measured, rates[0], strict=True))
        name = f"blocks:{window}" if window else "full"
        print(f"| {name} | {statistics.median(measured):,.0f} | {gain:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="photographs")
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--order", choices=("forgotten", "limited"))
    parser.add_argument("--windows", type=int, nargs="+", default=[512, 2048], help="of --order")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    root, names = find_images(chosen.folder)
    annotations = Annotations.unlabelled(root, names, ("a",))
    with tempfile.TemporaryDirectory() as scratch:
        if chosen.order:
            settings = ImageSettings(image_size=chosen.size, cache_dir=scratch)
            orders(annotations, settings, [0, *chosen.windows], chosen.order == "forgotten")
        else:
            storages(annotations, chosen.size, scratch)
            drafts(annotations)


if __name__ == "__main__":
    main()
