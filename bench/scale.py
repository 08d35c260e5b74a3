"""Start, memory, first batch and resumption of a training on as many images as Open Images has.

    python bench/scale.py FOLDER [--images 9000000] [--classes 9605] [--ranks 2] [--workers 1]

Real are the lists (the CSV of Open Images, a little over eight labels an image), a file for each
image in one folder, the shards of the image cache with a row for each image, and all code that
train.py runs up to the first step: ranks are started by torchrun, read both splits, look for
missing files, open the image cache and shuffle.

Simulated are the pictures: 150 small JPEGs have as many names as there are images (hard links),
and a shard keeps the pixels of each of them once, at 32 px. There are as many shards as at 224 px,
where a gigabyte is 6,644 images. Building the cache is not measured, nor is a disk: all that is
read is in the memory of the system.

Every start is that of new processes. Times are CPU time of a rank without its workers, in its own
code and in that of the system (where virtual machines are slow to give memory), and of the wall
clock. Memory is what a rank gained since its libraries were imported: its own (of no file), at the
peak all that was resident, and "all" with its workers and its share of what it has in common with
other ranks. Figures are those of the rank that has the largest. The files stay in FOLDER for the
next measurement: 5 GB for 9 million images. Linux only (/proc, hard links).
"""

import argparse
import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
import uuid
import zlib
from itertools import islice
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["POLARS_MAX_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import numpy as np
import torch
from annotations import memory as memory_of
from PIL import Image

from asl.data.annotations import Annotations, without_missing
from asl.data.cache import cache_folder
from asl.data.readers import read
from asl.data.splits import check_apart, read_split
from asl.distributed import process_group, rank
from asl.images.augment import apply, draw
from asl.images.cache.shards import ROW, SUFFIX, Kind, Shard, path_keys
from asl.images.decode import read_squished
from asl.images.loader import Batches, RankSampler
from asl.training.fit import training_batches
from asl.training.settings import TrainConfig

VALIDATED = 1_000  # images of the validation split
FEWEST, LINKS = 64, 60_000  # pictures, and names of each: ext4 allows 65,000
PER_SHARD = 6_644  # a gigabyte of 224 px
LINE = np.dtype([("id", "S16"), ("source", "S14"), ("name", "S9"), ("value", "S2")])
COLUMNS = (
    "",
    "own CPU, s",
    "system, s",
    "wall, s",
    "own, MB",
    "peak, MB",
    "a worker's own, MB",
    "all, MB",
)
MEMORY = ("VmRSS:", "VmHWM:", "Anonymous:", "Pss:", "Private")
CPU = torch.device("cpu")


def config_of(root: Path, workers: int) -> TrainConfig:
    return TrainConfig.of(
        data=str(root),
        dataset="openimages",
        train_split="train",
        val_split="validation",
        image_size=32,
        cache_dir=str(root / "images"),
        workers=workers,
    )


def write_list(root: Path, split: str, count: int, classes: int) -> bytes:
    """The CSV of a split; returns the ids of its images, 16 bytes each, in their order."""
    rng = np.random.default_rng(count)
    # One number in a range each: none comes twice, and they are in order.
    step = 2**64 // count
    numbers = np.arange(count, dtype=np.uint64) * step + rng.integers(0, step, count, np.uint64)
    ids = np.frombuffer(numbers.astype(">u8").tobytes().hex().encode(), "S16")
    names = np.array([f"/m/{number:05x}," for number in range(classes)], "S9")
    with (root / f"{split}-annotations-human-imagelabels.csv").open("wb") as file:
        file.write(b"ImageID,Source,LabelName,Confidence\n")
        for first in range(0, count, 500_000):
            part = ids[first : first + 500_000]
            each = 1 + rng.poisson(7.2, len(part))
            lines = np.empty(each.sum(), LINE)
            lines["id"], lines["source"] = np.repeat(part, each), b",verification,"
            # Few classes are common and most are rare.
            lines["name"] = names[(classes * rng.random(len(lines)) ** 3).astype(int)]
            lines["value"] = np.array([b"0\n", b"1\n"])[rng.integers(0, 2, len(lines))]
            file.write(lines.tobytes())
    return ids.tobytes()


def write_images(root: Path, split: str, ids: bytes) -> None:
    """A file for each image; they are hard links to some pictures, by turns."""
    pictures = pictures_of(root, len(ids) // 16)
    (root / split).mkdir()
    for row in range(len(ids) // 16):
        name = ids[16 * row : 16 * row + 16].decode()
        os.link(pictures[row % len(pictures)], f"{root}/{split}/{name}.jpg")


def pictures_of(root: Path, count: int) -> list[Path]:
    """The pictures of so many images, drawn where they are not there."""
    rng = np.random.default_rng(0)
    paths = [root / f"{number:03}.jpg" for number in range(max(FEWEST, -(-count // LINKS)))]
    for path in paths:
        colours = rng.integers(0, 256, (4, 6, 3), np.uint8)
        if not path.exists():
            content = io.BytesIO()
            Image.fromarray(colours).resize((72, 48)).save(content, "JPEG")
            path.write_bytes(content.getvalue())
    return paths


def write_shards(root: Path) -> None:
    """The shards of all training images, as a build would have left them."""
    images = config_of(root, 0).images
    annotations = read("openimages", root, "train", write_cache=False)
    kind, pictures = Kind.of(images), pictures_of(root, len(annotations))
    pixels = [bytes(kind.pack(read_squished(path, images))) for path in pictures]
    folder = Path(images.cache_dir) / kind.name
    folder.mkdir(parents=True)
    picture = np.arange(len(annotations)) % len(pictures)
    rows = np.zeros(len(annotations), ROW)
    rows["path"], rows["length"] = path_keys(annotations.files), kind.raw_bytes
    for name, values in (
        ("size", [path.stat().st_size for path in pictures]),
        ("time", [path.stat().st_mtime_ns for path in pictures]),
        ("checksum", [zlib.crc32(each) for each in pixels]),
    ):
        rows[name] = np.array(values)[picture]
    for first in range(0, len(rows), PER_SHARD):
        part = slice(first, first + PER_SHARD)
        names = b"\0".join([os.fsencode(annotations.root), *annotations.files[part].tolist(), b""])
        shard = Shard(folder / f"{uuid.uuid4().hex}{SUFFIX}", kind, rows[part], names)
        with shard.path.open("wb") as file:
            shard.write_head(file)
            rows["offset"][part] = file.tell() + picture[part] * kind.raw_bytes
            shard.write_head(file)
            file.write(b"".join(pixels))


class Report:
    """What each stage of a rank took."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, list[float]]] = []
        self.before = memory()
        self._start()

    def _start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of VmHWM starts anew
        self.begun = [*os.times()[:2], time.perf_counter()]

    def add(self, stage: str) -> None:
        """End a stage."""
        took = np.subtract([*os.times()[:2], time.perf_counter()], self.begun).tolist()
        now, before = memory(), self.before
        workers = [memory(worker.pid) for worker in multiprocessing.active_children()]
        own = max((each["Private"] for each in workers), default=0.0)
        together = sum(each["Pss:"] for each in (now, *workers)) - before["Pss:"]
        gained = [now["Anonymous:"] - before["Anonymous:"], now["VmHWM:"] - before["VmRSS:"]]
        self.rows.append((stage, [*took, *gained, own, together]))
        self._start()


def memory(process: int | str | None = "self") -> dict[str, float]:
    """MB of a process, by the fields of MEMORY."""
    return {field: memory_of(field, process) for field in MEMORY}


def start(root: Path, workers: int, middle: bool) -> None:
    """What a rank of train.py does up to its first step; writes down what that took."""
    with process_group(CPU):
        config, report = config_of(root, workers), Report()
        train = read_split_in_parts(config, report)
        batches = training_batches(config, train, CPU)
        report.add("image cache searched")
        val = read_split(config.data, "val", classes=train.classes)
        check_apart(config.data, train, val)
        Batches(val, config.images)
        report.add("the same for 1,000 validation images")
        first = len(batches) // 2 if middle else 0
        epoch = batches.epoch(0, first)
        batch = next(epoch)
        report.add("first batch")
        for _ in islice(epoch, 20):
            pass
        report.add("20 more batches")
        same = all(map(torch.equal, batch[:2], uninterrupted(train, config, first)))
        (root / f"report-{rank()}.json").write_text(json.dumps([report.rows, first, same]))


def read_split_in_parts(config: TrainConfig, report: Report) -> Annotations:
    """What `splits.read_split` does for training, with a look at the clock in between."""
    train = read("openimages", config.data.data, "train", cache_dir=cache_folder())
    report.add("list read")
    train, _ = without_missing(train, "error")
    report.add("files looked for")
    return train


def uninterrupted(train: Annotations, config: TrainConfig, step: int) -> list[torch.Tensor]:
    """Images and targets that this rank has at a step of an epoch that goes there from its start.

    They are read and augmented one by one, without cache and loader.
    """
    images, seed = config.images, config.step.seed
    steps = iter(RankSampler(len(train), images.batch_size, True, seed))
    share = next(islice(steps, step, None))
    made = []
    for index, numbers in zip(
        share.indices.tolist(), draw(config.augment.augment, seed, 0, share.indices), strict=True
    ):
        image = read_squished(train.path(index), images).contiguous()
        made.append(torch.empty_like(image))
        apply(image, numbers, out=made[-1])
    targets = np.stack([train.labels(index) for index in share.indices.tolist()])
    return [torch.stack(made), torch.from_numpy(targets)]


def measure(root: Path, options: argparse.Namespace, title: str, *more: str) -> None:
    """Start the ranks; print a table of what they took, the largest figure of all ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={options.ranks}", __file__, str(root), "--rank"]
    begun = time.perf_counter()
    where = os.environ | {"XDG_CACHE_HOME": str(root / "cache")}
    subprocess.run(
        [*torchrun, f"--workers={options.workers}", *more],
        check=True,
        env=where,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - begun
    reports = [json.loads((root / f"report-{r}.json").read_text()) for r in range(options.ranks)]
    print(f"\n{title}\n\n| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}")
    for stages in zip(*(rows for rows, _, _ in reports), strict=True):
        figures = np.max([figures for _, figures in stages], axis=0)
        cells = [f"{x:.1f}" for x in figures[:3]] + [f"{x:,.0f}" for x in figures[3:]]
        print(f"| {' | '.join([stages[0][0], *cells])} |")
    same = "the same" if all(same for *_, same in reports) else "NOT THE SAME"
    print(f"\nThe batch of step {reports[0][1]:,} is {same} as in an uninterrupted epoch. ", end="")
    print(f"With torchrun, the libraries and this check: {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the data set is written, and kept")
    parser.add_argument("--images", type=int, default=9_000_000)
    parser.add_argument("--classes", type=int, default=9_605)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="of each rank")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--middle", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    root = options.folder / f"{options.images}-{options.classes}"
    if options.rank:
        start(options.folder, options.workers, options.middle)
        return
    if not (root / "images").is_dir():
        write(root, options.images, options.classes)
    for path in root.glob("cache/asl/*"):
        path.unlink()
    print(f"{options.images:,} images, {options.classes:,} classes, {options.ranks} ranks")
    measure(root, options, "First start, which parses")
    measure(root, options, "Second start, from what was parsed")
    measure(root, options, "In the middle of the epoch", "--middle")


def write(root: Path, images: int, classes: int) -> None:
    root.mkdir(parents=True)
    lines = "".join(f"/m/{number:05x}\n" for number in range(classes))
    (root / "oidv6-classes-trainable.txt").write_text(lines)
    for split, count in (("train", images), ("validation", VALIDATED)):
        write_images(root, split, write_list(root, split, count, classes))
    write_shards(root)


if __name__ == "__main__":
    main()
