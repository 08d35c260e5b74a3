"""Reading annotations: MS-COCO 2014 beside pycocotools, and Open Images V6 at a tenth of its size.

Both data sets are generated, in the formats and sizes of the real ones. Every measurement runs in a
process of its own that parses on one thread; memory is what that process gains, the libraries of
the readers included. Figures for the full Open Images are the measured ones over the scale; pass 1
to measure at full size (4 GB of disk, minutes). Linux only (/proc).
"""

import gc
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

os.environ["POLARS_MAX_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import numpy as np

from asl.data.annotations import Annotations

COCO_IMAGES, COCO_OBJECTS, COCO_CLASSES = 82_081, 604_907, 80
OPEN_IMAGES, OPEN_LABELS, OPEN_CLASSES = 9_000_000, 60_000_000, 9_605
WORKERS = 8
MB = 1e6


def write_coco(root: Path) -> None:
    """An instances JSON with the fields, polygons and size of instances_train2014.json."""
    rng = random.Random(0)
    polygons = [
        json.dumps([[round(rng.uniform(0, 640), 2) for _ in range(2 * rng.randint(8, 40))]])
        for _ in range(500)
    ]
    images = [
        f'{{"license": 5, "file_name": "COCO_train2014_{i:012}.jpg", "coco_url": '
        f'"http://images.cocodataset.org/train2014/COCO_train2014_{i:012}.jpg", "height": 480, '
        f'"width": 640, "date_captured": "2013-11-14 16:28:13", "flickr_url": '
        f'"http://farm4.staticflickr.com/3153/2970773875_164f0c0b83_z.jpg", "id": {i}}}'
        for i in range(COCO_IMAGES)
    ]
    objects = [
        f'{{"segmentation": {rng.choice(polygons)}, "area": 2765.1486500000005, "iscrowd": 0, '
        f'"image_id": {i if i < COCO_IMAGES else rng.randrange(COCO_IMAGES)}, "bbox": '
        f'[199.84, 200.46, 77.71, 70.88], "category_id": {rng.randint(1, COCO_CLASSES)}, '
        f'"id": {i}}}'
        for i in range(COCO_OBJECTS)
    ]
    names = [{"supercategory": "x", "id": i + 1, "name": f"c{i}"} for i in range(COCO_CLASSES)]
    (root / "annotations").mkdir(parents=True)
    with (root / "annotations" / "instances_train2014.json").open("w") as file:
        file.write(f'{{"info": {{}}, "images": [{", ".join(images)}], "licenses": [], ')
        file.write(f'"annotations": [{", ".join(objects)}], "categories": {json.dumps(names)}}}')


def write_open_images(root: Path, scale: float) -> None:
    """The human-verified labels and the class list of a training set; one label in ten unlisted."""
    rng = np.random.default_rng(0)
    images = np.sort(rng.integers(0, 2**63, int(OPEN_IMAGES * scale)))
    classes = [f"/m/{c:06x}" for c in range(OPEN_CLASSES * 10 // 9)]
    root.mkdir(parents=True)
    (root / "oidv6-classes-trainable.txt").write_text("\n".join(classes[:OPEN_CLASSES]))
    with (root / "oidv6-train-annotations-human-imagelabels.csv").open("w") as file:
        file.write("ImageID,Source,LabelName,Confidence\n")
        for part in np.array_split(images, max(1, len(images) // 100_000)):
            labels = int(len(part) * OPEN_LABELS / OPEN_IMAGES)
            rows = np.concatenate([part, rng.choice(part, labels - len(part))])
            columns = rng.integers(0, len(classes), labels)
            values = rng.integers(0, 2, labels)
            file.writelines(
                f"{i:016x},verification,{classes[c]},{v}\n"
                for i, c, v in zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True)
            )


def memory(field: str, process: int | str | None = "self") -> float:
    """MB from /proc: VmRSS (resident now), VmHWM (the most so far), and of what is resident

    Private: no other process's, Anonymous: no file's, Pss: with its share of what others have too.
    """
    files = (f"/proc/{process}/status", f"/proc/{process}/smaps_rollup")
    lines = [line.split() for file in files for line in Path(file).read_text().splitlines()]
    return sum(int(words[1]) * 1024 for words in lines if words[0].startswith(field)) / MB


def measured(pipe: Any, start: Callable[..., Any], *arguments: Any) -> None:
    before = memory("VmRSS:")
    begun = time.perf_counter()
    result = start(*arguments)
    seconds = time.perf_counter() - begun
    gc.collect()
    pipe.send([seconds, memory("VmRSS:") - before, memory("VmHWM:") - before, len(result)])


def in_new_process(start: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Seconds, MB that stay, MB at the peak, and the length of what `start` returns."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measured, args=(theirs, start, *arguments))
    process.start()
    result: list[Any] = ours.recv()
    process.join()
    return result


def with_pycocotools(root: Path) -> list[Any]:
    from pycocotools.coco import COCO

    with redirect_stdout(None):
        coco = COCO(root / "annotations" / "instances_train2014.json")
    column = {number: c for c, number in enumerate(sorted(coco.cats))}
    samples = []
    for number, objects in coco.imgToAnns.items():
        labels = {column[item["category_id"]] for item in objects}
        samples.append({"file": coco.imgs[number]["file_name"], "labels": sorted(labels)})
    return [coco, *samples]


def read_cached(dataset: str, root: Path, split: str, cache: Path) -> Annotations:
    from asl.data.readers import read  # here, because its libraries count

    return read(dataset, root, split, cache_dir=cache)


def epoch(root: Path, cache: Path) -> list[float]:
    """Private MB that each of the workers gains while they read every row once."""
    data = read_cached("openimages", root, "train", cache)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def work(rows: Any) -> None:
        before = memory("Private")
        for row in rows:
            data.labels(row)
            data.path(row)
        theirs.send(memory("Private") - before)

    order = np.random.default_rng(0).permutation(len(data))
    processes = [
        context.Process(target=work, args=(order[worker::WORKERS],)) for worker in range(WORKERS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [ours.recv() for _ in processes]


def main() -> None:
    scale = float(sys.argv[1]) if len(sys.argv) > 1 else 0.1
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder), Path(folder, "cache")
        write_coco(root / "coco")
        print(f"\nMS-COCO 2014: {COCO_IMAGES:,} images, {COCO_OBJECTS:,} objects\n")
        print("| | start | stays in memory | peak |\n| --- | ---: | ---: | ---: |")
        ours = ("coco", root / "coco", "train2014", cache)
        rows = {
            "pycocotools and a list of dicts": in_new_process(with_pycocotools, root / "coco"),
            "asl, first start": in_new_process(read_cached, *ours),
            "asl, second start": in_new_process(read_cached, *ours),
        }
        for name, (seconds, resident, peak, _) in rows.items():
            print(f"| {name} | {seconds:.2f} s | {resident:,.0f} MB | {peak:,.0f} MB |")
        theirs, first, second = rows.values()
        print(
            f"\nSecond start {first[0] / second[0]:.0f} x faster than the first, which takes 1/"
            f"{theirs[1] / first[1]:.0f} of the memory of pycocotools."
        )

        write_open_images(root / "openimages", scale)
        ours = ("openimages", root / "openimages", "train", cache)
        parse, start = in_new_process(read_cached, *ours), in_new_process(read_cached, *ours)
        growth = max(epoch(root / "openimages", cache))
        print(f"\nOpen Images V6 x {scale:g}: {parse[3]:,} images with a label\n")
        print("| | measured | full size | bar |\n| --- | ---: | ---: | ---: |")
        for name, figure, unit, bar in (
            ("parse, one core", parse[0], "s", "300 s"),
            ("resident after parsing", parse[1], "MB", "3,000 MB"),
            ("peak while parsing", parse[2], "MB", ""),
            ("start from the cache", start[0], "s", "10 s"),
            ("resident after that", start[1], "MB", "3,000 MB"),
            (f"growth of each of {WORKERS} workers in an epoch", growth, "MB", "100 MB"),
        ):
            print(f"| {name} | {figure:,.1f} {unit} | {figure / scale:,.1f} {unit} | {bar} |")


if __name__ == "__main__":
    main()
