"""This project's loader beside those of others: the same photographs, at equal work, in turn.

    python bench/loading.py FOLDER_OF_PHOTOGRAPHS [--size 448] [--images 1005] [--only NAME ...]

Everybody makes batches of 32 squished images with targets of 80 classes, without augmentation and
with that of the recipe (Cutout, then RandAugment). First in one process on one core, in CPU time;
then with two workers, in images/s of wall clock; then again, the system told before each epoch to
forget the files. Medians over rounds that take turns. Few photographs are copied to more files.

`pip install -r bench/requirements.txt` for the peers; those that are not there are left out. FFCV
has no squish and no RandAugment: it gets images that are squished already, as our caches do.
"""

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import numpy as np
import torch
from annotations import memory
from cache import forget
from data import BATCH, CLASSES, RECIPE, Conventional, cutout, exhaust
from step import ratio, seconds
from timm.data.auto_augment import rand_augment_transform
from timm.data.loader import fast_collate
from timm.data.transforms import ToNumpy
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from asl.data.annotations import Annotations
from asl.data.readers import read
from asl.data.shards import write_shards
from asl.images.decode import find_images, read_squished
from asl.images.loader import Batches
from asl.images.settings import ImageSettings

PER_SHARD = 64
TIMM = rand_augment_transform("rand-m9-n2", {})
Epoch = Callable[[], object]


class Data(NamedTuple):
    """What all are given: the same photographs as files and as shards, in memory or forgotten."""

    files: Annotations
    shards: Annotations
    scratch: Path
    size: int
    names: list[str]
    forgotten: bool = False


def through(batches: Iterable[Any]) -> None:
    """One epoch."""
    for _ in batches:
        pass


def loader(images: Any, workers: int, **options: Any) -> Epoch:
    """An epoch of a data set of PyTorch."""
    made = DataLoader(images, BATCH, num_workers=workers, persistent_workers=workers > 0, **options)
    return lambda: through(made)


def official(data: Data, workers: int, training: bool) -> Epoch:
    return loader(Conventional(data.files, data.size, training), workers)


def timm(data: Data, workers: int, training: bool) -> Epoch:
    """Its RandAugment, after the same Cutout, and its collate of uint8."""
    images = Conventional(data.files, data.size, training)
    augmented = [transforms.Lambda(cutout), TIMM] if training else []
    resize = transforms.Resize((data.size, data.size))
    images.transform = transforms.Compose([resize, *augmented, ToNumpy()])
    images.targets = np.zeros((len(data.files), CLASSES))  # of the kind that its collate knows
    return loader(images, workers, collate_fn=collated)


def collated(samples: list[Any]) -> tuple[Tensor, Tensor]:
    images, _ = fast_collate([(image, 0) for image, _ in samples])
    return images, torch.from_numpy(np.stack([targets for _, targets in samples]))


def webdataset(data: Data, workers: int, training: bool) -> Epoch:
    """Its shards and its loader, with the transforms of the official pipeline."""
    import webdataset as wds

    shards = sorted(map(str, (data.scratch / "shards").glob("*.tar")))
    transform = Conventional(data.files, data.size, training).transform
    samples = wds.WebDataset(shards, shardshuffle=len(shards) if training else False)
    samples = samples.shuffle(1000 if training else 0).decode("pil").to_tuple("jpg", "json")
    samples = samples.map_tuple(transform, lambda _: torch.zeros(CLASSES)).batched(BATCH)
    made = wds.WebLoader(samples, None, num_workers=workers, persistent_workers=workers > 0)
    return lambda: through(made)


class Squished:
    """Images as FFCV is given them: squished, and a row of targets."""

    def __init__(self, data: Data) -> None:
        self.files, self.settings = data.files, ImageSettings(image_size=data.size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = read_squished(self.files.path(index), self.settings)
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        return pixels, np.zeros(CLASSES, np.uint8)


def ffcv(data: Data, workers: int, training: bool, mode: str) -> Epoch:
    """Its files and its loader; its workers are threads."""
    from ffcv.fields import NDArrayField, RGBImageField
    from ffcv.fields.decoders import NDArrayDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    assert not training, "it has no RandAugment"
    file = data.scratch / f"ffcv_{mode}" / "images.beton"
    if not file.exists():
        file.parent.mkdir()
        fields = {
            "images": RGBImageField(write_mode=mode, jpeg_quality=95),
            "targets": NDArrayField(np.dtype(np.uint8), (CLASSES,)),
        }
        DatasetWriter(str(file), fields, num_workers=1).from_indexed_dataset(Squished(data))
    made = Loader(
        str(file),
        BATCH,
        num_workers=max(1, workers),
        order=OrderOption.RANDOM,
        os_cache=not data.forgotten,  # mapped, as its guide says for what fits into memory
        drop_last=False,
        pipelines={
            "images": [SimpleRGBImageDecoder(), ToTensor(), ToTorchImage(channels_last=True)],
            "targets": [NDArrayDecoder(), ToTensor()],
        },
    )
    return lambda: through(made)


def ours(data: Data, workers: int, training: bool, cache: str = "", shards: bool = False) -> Epoch:
    folder = data.scratch / f"cache_{cache.replace(':', '')}"
    cached = {"cache_dir": str(folder), "cache_format": cache} if cache else {}
    settings = ImageSettings(image_size=data.size, batch_size=BATCH, workers=workers, **cached)
    options = RECIPE if training else {}
    batches = Batches(data.shards if shards else data.files, settings, **options)
    return partial(exhaust, batches, count())


def with_simplejpeg(data: Data, workers: int, training: bool) -> Epoch:
    """This project, but for the decoder of JPEGs."""
    import simplejpeg

    def decode(content: bytes) -> Tensor:
        return torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)

    epoch = ours(data, workers, training)

    def patched() -> None:  # workers are forked in the first epoch
        with mock.patch("asl.images.decode.decode_jpeg", decode):
            epoch()

    return patched


PIPELINES: dict[str, Callable[..., Epoch]] = {
    "official": official,
    "timm": timm,
    "WebDataset": webdataset,
    "FFCV, raw": partial(ffcv, mode="raw"),
    "FFCV, JPEG 95": partial(ffcv, mode="jpg"),
    "here, files, simplejpeg": with_simplejpeg,
    "here, files": ours,
    "here, shards": partial(ours, shards=True),
    "here, raw cache": partial(ours, cache="raw"),
    "here, cache in JPEG 95": partial(ours, cache="jpeg:95"),
}
BUILT = {
    "WebDataset": "shards",
    "FFCV, raw": "ffcv_raw",
    "FFCV, JPEG 95": "ffcv_jpg",
    "here, shards": "shards",
    "here, raw cache": "cache_raw",
    "here, cache in JPEG 95": "cache_jpeg95",
}


def pipelines(data: Data, workers: int) -> Iterator[tuple[str, bool, Epoch]]:
    """All that can be made here: name, whether it augments, an epoch."""
    for name, make in PIPELINES.items():
        if name not in data.names:
            continue
        for training in (False, True):
            if training and name.startswith("FFCV"):
                continue
            try:
                yield name, training, make(data, workers, training)
            except ImportError as error:
                print(f"{name} is left out: {error}")
                break


def photographs(folder: str, images: int, scratch: Path) -> Annotations:
    """So many files, copies where the folder has fewer, and nothing labelled."""
    root, names = find_images(folder)
    copies = scratch / "files"
    copies.mkdir()
    for number in range(images):
        source = Path(os.fsdecode(bytes(names[number % len(names)])))
        shutil.copy(root / source, copies / f"{number:06}{source.suffix}")
    found = sorted(copies.iterdir())
    return Annotations.unlabelled(
        copies,
        np.array([os.fsencode(path.name) for path in found]),
        tuple(f"class {number}" for number in range(CLASSES)),
    )


def children() -> set[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    found = {int(process) for path in tasks for process in path.read_text().split()}
    return {p for p in found if b"resource_tracker" not in Path(f"/proc/{p}/cmdline").read_bytes()}


def table(title: str, images: int, times: dict[tuple[str, bool], list[float]], unit: str) -> None:
    """Print what an epoch took, with the ratio to the official pipeline's."""
    print(f"\n{title}\n\n| | {unit} | times official | augmented, {unit} | times official |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in PIPELINES:
        cells = []
        for training in (False, True):
            if (name, training) not in times:
                cells += ["", ""]
                continue
            taken, base = times[name, training], times["official", training]
            middle = statistics.median(taken)
            cells.append(
                f"{1000 * middle / images:.2f}" if "ms" in unit else f"{images / middle:,.0f}"
            )
            cells.append(f"{ratio(taken, base):.1f}")
        if any(cells):
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def build(data: Data) -> None:
    """Make what is made once, in one process, and print what it took."""
    print("\n| | KB per image | seconds to build |\n| --- | ---: | ---: |")
    sizes = sum(path.stat().st_size for path in (data.scratch / "files").iterdir())
    print(f"| files | {sizes / len(data.files) / 1000:.0f} | |")
    for name, folder in BUILT.items():
        if name not in data.names:
            continue
        begun = time.perf_counter()
        try:
            PIPELINES[name](data, 0, False)
        except ImportError:
            continue
        taken = time.perf_counter() - begun
        parts = [path for path in (data.scratch / folder).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in parts) / len(data.files) / 1000
        print(f"| {name} | {size:.0f} | {'' if folder == 'shards' else f'{taken:.1f}'} |")


def measure(data: Data, workers: int, rounds: int) -> None:
    """Print the table of so many workers, and what memory they take; of none, that of one core."""
    runs, processes, first = {}, {}, {}
    for name, training, epoch in pipelines(data, workers):
        before = children()
        epoch()
        runs[name, training] = epoch
        processes[name, training] = children() - before
        first[name, training] = [memory("Private", each) for each in processes[name, training]]
    if not workers:
        taken = seconds(runs, rounds)
        table("One process on one core, CPU time", len(data.files), taken, "ms an image")
        return
    forgotten = [path for path in data.scratch.rglob("*") if path.is_file() and data.forgotten]
    taken = seconds(runs, rounds, time.perf_counter, partial(forget, forgotten))
    where = "forgotten" if data.forgotten else "in memory"
    table(f"{workers} workers, files {where}", len(data.files), taken, "images/s")
    print("\n| memory of a worker, MB | after one epoch | after all | augmented, one | all |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in PIPELINES:
        if processes.get((name, False)):
            cells = []
            for training in (False, True):
                now = [memory("Private", each) for each in processes[name, training]]
                cells += [f"{statistics.mean(each):.0f}" for each in (first[name, training], now)]
            print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="photographs")
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--images", type=int, default=1005)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PIPELINES, default=PIPELINES, metavar="NAME")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        files = photographs(chosen.folder, chosen.images, scratch)
        write_shards(files, "val", scratch / "shards", PER_SHARD)
        shards = read("webdataset", scratch / "shards", "val")
        data = Data(files, shards, scratch, chosen.size, ["official", *chosen.only])
        print(
            f"{len(files):,} images of {chosen.folder}, {chosen.size} px, torch {torch.__version__}"
        )
        build(data)
        measure(data, chosen.workers, chosen.rounds)
        measure(data._replace(forgotten=True), chosen.workers, chosen.rounds)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        measure(data, 0, chosen.rounds)


if __name__ == "__main__":
    main()
