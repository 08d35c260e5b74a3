"""What a GPU does with this project: training steps, the loader that feeds it, losses. Tables.

python bench/gpu.py [--only step loader] [--budget 240] [--photographs FOLDER] [--output FOLDER]
python bench/gpu.py --table results/gpu/NAME.json
python bench/gpu.py --device cpu --quick --output FOLDER    (tiny, to try it without a GPU)

Every section adds rows to OUTPUT/<name of the device>.json as they come, so that a run which is cut
off keeps what it has; --only measures sections anew and leaves the others there. A section may use
its share of what is left of the --budget, in seconds. What fails (too little memory, no decoder) is
in its row as such, and the rest goes on.

The contenders of one comparison take turns; figures are medians over the turns after a first one,
"x first" the median of the ratios to the first contender in the same turn. The clock is read when
the device has nothing left to do. Models start from random weights.
"""

import argparse
import gc
import inspect
import json
import re
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import numpy as np
import torch
import torchvision
from gpu_sections import FULL, QUICK, SECTIONS, Bench
from gpu_turns import OutOfTime, said, time_limit
from losses import processor
from PIL import Image, ImageDraw

from asl.atomic import write_result
from asl.distributed import pick_device
from asl.errors import DataError, UsageError, reported
from asl.evaluation.provenance import provenance
from asl.images.decode import find_images
from asl.images.loader import default_workers

SOURCE = "`{command}`, {date}, commit {commit}, {versions}; {workers} workers, {files}"
WIDTH, HEIGHT = 500, 375  # of a drawn photograph: as in Pascal VOC


def read(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return report


def table(report: dict[str, Any]) -> str:
    """The report as markdown, a table for each section, and where it comes from."""
    parts = [report["device"]]
    sources: dict[str, list[str]] = defaultdict(list)
    for name, section in report["sections"].items():
        keys = [*dict.fromkeys(key for row in section["rows"] for key in row)]
        lines = [keys, ["---"] * len(keys)] if keys else []
        lines += [[cell(row.get(key, "")) for key in keys] for row in section["rows"]]
        parts.append(f"### {name}\n\n{section['about']}")
        parts += ["\n".join(f"| {' | '.join(line)} |" for line in lines)] if lines else []
        parts += [f"Not all was measured: {section['failed']}"] if "failed" in section else []
        sources[SOURCE.format(**section)].append(name)
    parts += [f"{', '.join(names)}: {source}" for source, names in sources.items()]
    return "\n\n".join(parts)


def cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def draw_photographs(folder: Path, count: int) -> None:
    """JPEGs that decode like photographs: soft shades, shapes and grain, at quality 90."""
    random = np.random.default_rng(0)
    for number in range(count):
        shades = Image.fromarray(random.integers(256, size=(6, 8, 3), dtype=np.uint8))
        picture = shades.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        pencil = ImageDraw.Draw(picture)
        for x, y, side, *colour in random.integers(256, size=(12, 6)).tolist():
            pencil.ellipse((2 * x, y, 2 * x + side, y + side // 2), fill=tuple(colour))
        grain = random.integers(-20, 20, size=(HEIGHT, WIDTH, 1), endpoint=True)
        pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04}.jpg", quality=90)


def measure(name: str, bench: Bench, seconds: float, report: dict[str, Any], path: Path) -> None:
    """Measure a section and keep it in the report and its file: after every row, and at the end."""
    run, start = SECTIONS[name].run, time.perf_counter()
    rows: list[dict[str, Any]] = []
    section: dict[str, Any] = {
        "about": inspect.getdoc(run),
        "date": datetime.now(UTC).date().isoformat(),
        **provenance(),
        "workers": bench.workers,
        "files": bench.files,
        "rows": rows,
    }
    section["versions"] += f", torchvision {torchvision.__version__}"
    report["sections"][name] = section
    try:
        with time_limit(seconds):
            for row in run(bench):
                rows.append(row)
                write_result(path, json.dumps(report, indent=1).encode())
    except (Exception, OutOfTime) as error:
        section["failed"] = said(error)
    section["seconds"] = round(time.perf_counter() - start, 1)
    write_result(path, json.dumps(report, indent=1).encode())


def measure_all(args: argparse.Namespace) -> Path:
    """Measure the sections that were asked for; returns the file of the report."""
    device = pick_device(args.device)
    if device.type != "cuda" and not args.quick:
        raise UsageError(f"full size is for GPUs: --device {device} takes --quick")
    report: dict[str, Any] = {"device": processor(device), "sections": {}}
    name = re.sub(r"[^A-Za-z0-9]+", "_", report["device"]).strip("_")
    path = Path(args.output) / f"{name}.json"
    if args.only and path.exists():
        report = read(path)
    torch.backends.cudnn.benchmark = True  # as in training
    torch.manual_seed(0)
    with TemporaryDirectory() as scratch:
        folder, kind = Path(args.photographs or scratch), "JPEGs"
        if not args.photographs:
            draw_photographs(folder, count=8 if args.quick else 192)
            kind = f"drawn JPEGs of {WIDTH} x {HEIGHT} px"
        files = f"{len(find_images(folder)[1])} {kind}"
        bench = Bench(device, QUICK if args.quick else FULL, folder, files, args.workers)
        names = args.only or [name for name in SECTIONS if name != "compile" or not args.quick]
        end = time.perf_counter() + args.budget
        for number, name in enumerate(names):
            shares = [SECTIONS[each].share for each in names[number:]]
            left = max(end - time.perf_counter(), 1)
            measure(name, bench, left * shares[0] / sum(shares), report, path)
            print(f"{name}: {report['sections'][name]['seconds']} s", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model; without compile")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="default: all sections")
    parser.add_argument("--budget", type=float, default=240, help="seconds; default: 240")
    parser.add_argument("--workers", type=int, default=default_workers(), help="of the loader")
    parser.add_argument("--photographs", metavar="FOLDER", help="JPEGs; default: drawn ones")
    parser.add_argument("--output", metavar="FOLDER", default="results/gpu")
    parser.add_argument("--table", metavar="JSON", help="print the table of a report, no more")
    args = parser.parse_args()
    path = Path(args.table) if args.table else measure_all(args)
    print(f"\n{table(read(path))}\n\n{path}")


if __name__ == "__main__":
    with reported():
        main()
