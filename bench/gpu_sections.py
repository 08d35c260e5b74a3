"""What bench/gpu.py measures: each section is a function that yields the rows of its table."""

import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import losses as loss_bench
import numpy as np
import torch
import torchvision
from gpu_turns import Contender, Row, by_turns
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.profiler import ProfilerActivity

from asl.data.annotations import PRESENT, Annotations
from asl.images.augment import apply_batch, draw
from asl.images.decode import find_images
from asl.images.loader import Batch, Batches
from asl.images.prepare import preparation
from asl.images.settings import AugmentSettings, ImageSettings
from asl.losses import PartialSelectiveLoss
from asl.models.build import create_model, normalization, place
from asl.training.loss import create_loss
from asl.training.settings import LossSettings, StepSettings
from asl.training.step import Training

CLASSES = 80


class Way(NamedTuple):
    """How a model is trained; `layout` is that of its weights and of the images."""

    amp: str = "bf16"
    layout: str = "channels last"
    compiled: bool = False


@dataclass(frozen=True)
class Case:
    """A model and its batches, in the ways that are compared."""

    model: str
    image_size: int
    batch_size: int
    ways: tuple[Way, ...] = (Way(),)


@dataclass(frozen=True)
class Plan:
    """What is measured; a turn of a training is `steps` steps, an epoch of the loader `epoch`."""

    cases: tuple[Case, ...]
    compiled: Case
    loader: Case
    steps: int
    epoch: int
    rounds: int
    short_rounds: int  # where a turn takes milliseconds
    shapes: tuple[tuple[int, int], ...]  # of the logits


LAYOUTS = (Way(), Way(layout="contiguous"))
FULL = Plan(
    cases=(
        Case("tresnet_m", 448, 128, (*LAYOUTS, Way("fp16"), Way("off"))),
        Case("tresnet_l", 448, 128, LAYOUTS),
        Case("resnet101", 448, 128, LAYOUTS),
        Case("tresnet_m", 224, 256, LAYOUTS),
        Case("tresnet_l", 224, 256),
    ),
    compiled=Case("tresnet_m", 448, 128, (Way(), Way(compiled=True))),
    loader=Case("tresnet_m", 448, 128),
    **{"steps": 4, "epoch": 32, "rounds": 3, "short_rounds": 30},
    shapes=((128, 80), (64, 9605)),
)
QUICK = Plan(
    cases=(Case("test_resnet", 64, 8, (*LAYOUTS, Way("fp16"), Way("off"))),),
    compiled=Case("test_resnet", 64, 8, (Way(), Way(compiled=True))),
    loader=Case("test_resnet", 64, 8),
    **{"steps": 1, "epoch": 6, "rounds": 1, "short_rounds": 1},
    shapes=((8, 80),),
)


class Bench:
    """One run of a plan on one device, with a folder of JPEGs and what to say of these `files`."""

    def __init__(
        self, device: torch.device, plan: Plan, folder: Path, files: str, workers: int
    ) -> None:
        self.device, self.plan, self.workers = device, plan, workers
        self.folder, self.files = folder, files
        self.on_cuda = device.type == "cuda"
        self.counted = "kernels" if self.on_cuda else "operations"

    def clock(self) -> float:
        """Seconds, when the device has done all it was told to."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def allocated(self) -> int:
        """Bytes of the device that tensors hold; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.on_cuda else 0

    def synthetic(self, case: Case) -> Batch:
        """A batch that is on the device already."""
        shape = (case.batch_size, 3, case.image_size, case.image_size)
        images = torch.randint(256, shape, dtype=torch.uint8, device=self.device)
        targets = torch.rand(case.batch_size, CLASSES, device=self.device) < 3 / CLASSES
        return Batch(images, targets.to(torch.int8))

    def trainer(self, case: Case, way: Way) -> Callable[[Batch], object]:
        """A step of training on a batch, as `training.fit` does it."""
        model: nn.Module = create_model(case.model, CLASSES, image_size=case.image_size)
        contiguous = way.layout == "contiguous"
        model = model.to(self.device) if contiguous else place(model, self.device)
        training = Training(
            model,
            create_loss(LossSettings()),
            StepSettings(compile=way.compiled),
            batches_per_epoch=1000,
            device=self.device,
            amp=way.amp,
        )
        prepare = preparation(*normalization(model), self.device, training.precision)

        def step(batch: Batch) -> None:
            images = prepare(batch)
            images = images.contiguous() if contiguous else images  # one more pass over them
            training.step(images, batch.targets.to(self.device, non_blocking=True))

        return step

    def annotations(self) -> Annotations:
        """The files of an epoch, three labels each."""
        root, names = find_images(self.folder)
        files = np.resize(names, self.plan.epoch * self.plan.loader.batch_size)
        rows = np.repeat(np.arange(len(files)), 3)
        columns = np.random.default_rng(0).integers(CLASSES, size=len(rows))
        classes = tuple(f"class {number}" for number in range(CLASSES))
        return Annotations.from_cells(root, files, classes, rows, columns, PRESENT)

    def loader(self, workers: int, cache_dir: str = "", **options: Any) -> Batches:
        """Of an epoch of the plan's batches: the files of the folder over and over."""
        case = self.plan.loader
        settings = ImageSettings(
            image_size=case.image_size,
            batch_size=case.batch_size,
            workers=workers,
            cache_dir=cache_dir,
        )
        return Batches(self.annotations(), settings, device=self.device, **options)

    def kernels(self, act: Callable[[], object]) -> int:
        """How many kernels `act` starts, without copies; on a CPU, operations without parts."""
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.on_cuda]
        with torch.profiler.profile(activities=activities) as profiler:
            act()
            self.clock()
        return sum(
            event.device_type.name == self.device.type.upper()
            and not event.cpu_children
            and not event.name.startswith(("Memcpy", "Memset"))
            for event in profiler.events()
        )


def training(bench: Bench, case: Case, way: Way, batch: Batch) -> Contender:
    """Steps on one batch, and the most memory that this training held, its weights included."""
    start, before = bench.clock(), bench.allocated()
    step = bench.trainer(case, way)
    step(batch)
    first, own = bench.clock() - start, bench.allocated() - before
    yield {}
    while True:
        step(batch)  # not timed: it may have to wait for memory that another contender has cached
        others = bench.allocated() - own
        if bench.on_cuda:
            torch.cuda.reset_peak_memory_stats(bench.device)
        start = bench.clock()
        for _ in range(bench.plan.steps):
            step(batch)
        rate = bench.plan.steps * case.batch_size / (bench.clock() - start)
        figures = {"images/s": rate, "s until the first step": first}
        if bench.on_cuda:
            peak = torch.cuda.max_memory_allocated(bench.device) - others
            figures["peak GiB"] = peak / 2**30
        yield figures


def trainings(bench: Bench, cases: Iterable[Case]) -> Iterator[Row]:
    for case in cases:
        batch = bench.synthetic(case)
        labels = {"model": case.model, "px": case.image_size, "batch": case.batch_size}
        yield from by_turns(
            [(labels | way._asdict(), training(bench, case, way, batch)) for way in case.ways],
            bench.plan.rounds,
        )
        gc.collect()
        torch.cuda.empty_cache()


def steps(bench: Bench) -> Iterator[Row]:
    """Training steps on synthetic batches, with AMP and without (off: convolutions in TF32)."""
    return trainings(bench, bench.plan.cases)


def compiled(bench: Bench) -> Iterator[Row]:
    """The same with torch.compile, whose work is in the time until the first step."""
    return trainings(bench, [bench.plan.compiled])


def fed(
    bench: Bench,
    source: Callable[[], Iterable[Batch]],
    act: Callable[[Batch], object],
    left_out: int = 0,
    waited: Callable[[], float] | None = None,
) -> Contender:
    """Takes all batches of a `source`, an epoch a turn; the first `left_out` are not timed."""
    while True:
        batches, images = iter(source()), 0
        for batch in islice(batches, left_out):
            act(batch)
        before, start = waited() if waited else 0.0, bench.clock()
        for batch in batches:
            act(batch)
            images += len(batch.images)
        spent = bench.clock() - start
        share = {"waited": (waited() - before) / spent} if waited else {}
        yield {"images/s": images / spent, **share}


def load(bench: Bench) -> Iterator[Row]:
    """One training, fed by a batch that is on the device, by files and by the cache; loaders alone.

    The device augments. "waited" is the share of the time that the training waited for data. Beside
    a training the first batch of an epoch is not timed, as these epochs are short.
    """
    case, epoch = bench.plan.loader, bench.plan.epoch
    step, batch, epochs = bench.trainer(case, case.ways[0]), bench.synthetic(case), count()
    start = epoch - epoch // 3  # a training takes longer: it gets the end of an epoch alone
    drawn = draw("recipe", 0, 0, range(case.batch_size))

    @cache  # not before its first turn: what it raises is in its rows alone
    def loader(cache_dir: str) -> Batches:
        recipe = {"augment": AugmentSettings(), "on_device": True, "shuffle": True}
        return bench.loader(bench.workers, cache_dir, **recipe)

    def same(batch: Batch) -> Contender:
        return fed(bench, lambda: repeat(batch, epoch - start), step, left_out=1)

    def training(folder: str) -> Contender:
        source = lambda: loader(folder).epoch(next(epochs), start)  # noqa: E731
        return fed(bench, source, step, left_out=1, waited=lambda: loader(folder).waited)

    def alone(folder: str) -> Contender:
        return fed(bench, lambda: loader(folder).epoch(next(epochs)), lambda batch: None)

    with TemporaryDirectory() as folder:
        runs = {
            ("device", "training"): same(batch._replace(augmentation=drawn)),
            ("device, not augmented", "training"): same(batch),
            ("files", "training"): training(""),
            ("files", "nothing"): alone(""),
            ("cache", "training"): training(folder),
            ("cache", "nothing"): alone(folder),
        }
        names = ("batches from", "for")
        labelled = [(dict(zip(names, labels, strict=True)), run) for labels, run in runs.items()]
        yield from by_turns(labelled, bench.plan.rounds)


def jpeg(bench: Bench) -> Iterator[Row]:
    """From JPEG files to squished images: on the device, and by the loader's workers, a core each.

    On a GPU the decoder is nvJPEG, given a batch at once; it starts from what was read already.
    """
    case, epochs = bench.plan.loader, count()
    files = bench.annotations()
    encoded = [
        torch.from_numpy(np.fromfile(files.path(row), np.uint8)) for row in range(case.batch_size)
    ]

    def decode() -> list[Tensor]:
        with warnings.catch_warnings():  # since 0.29 torchvision says that it will be removed
            warnings.simplefilter("ignore")
            mode = torchvision.io.ImageReadMode.RGB
            return torchvision.io.decode_jpeg(encoded, mode, device=bench.device)

    def squished(image: Tensor) -> Tensor:
        size = (case.image_size, case.image_size)
        pixels = interpolate(image[None].float(), size, mode="bilinear", antialias=True)
        return pixels.round_().to(torch.uint8)

    def on_device(act: Callable[[], object]) -> Contender:
        while True:
            start = bench.clock()
            act()
            yield {"images/s": len(encoded) / (bench.clock() - start)}

    def by_workers(workers: int, batches: int) -> Contender:
        loader, start = bench.loader(workers), bench.plan.epoch - batches
        yield from fed(bench, lambda: loader.epoch(next(epochs), start), lambda batch: None)

    cores, where = bench.workers, "nvJPEG" if bench.on_cuda else "torchvision on the CPU"
    runs = [
        ({"decoded by": "1 worker"}, by_workers(1, bench.plan.epoch // 4)),
        ({"decoded by": f"{cores} workers"}, by_workers(cores, bench.plan.epoch)),
        ({"decoded by": f"{where}, not resized"}, on_device(decode)),
        ({"decoded by": where}, on_device(lambda: [squished(image) for image in decode()])),
    ]
    yield from by_turns(runs, bench.plan.rounds)


def losses(bench: Bench) -> Iterator[Row]:
    """Forward and backward pass of the losses on float32 logits, three labels per image."""

    def turns(loss: loss_bench.Loss, logits: Tensor, targets: Tensor) -> Contender:
        loss_bench.step(loss, logits, targets)
        fixed = {
            bench.counted: bench.kernels(lambda: loss_bench.step(loss, logits, targets)),
            "peak extra MiB": loss_bench.peak_mebibytes(loss, logits, targets),
        }
        while True:
            yield {"ms": loss_bench.milliseconds(loss, logits, targets), **fixed}

    for batch, classes in bench.plan.shapes:
        logits = torch.randn(batch, classes, device=bench.device).sub_(2).requires_grad_()
        drawn = torch.rand(batch, classes, device=bench.device)
        targets = (drawn < 3 / classes).float()
        partial = torch.where(drawn > 0.5, -1.0, targets)  # half of the cells not annotated
        # The baseline comes last in that table, and first here.
        runs = [(name, loss, targets) for name, loss in reversed(loss_bench.losses().items())]
        runs += [("PartialSelectiveLoss", PartialSelectiveLoss("selective"), partial)]
        yield from by_turns(
            [
                ({"loss": name, "logits": f"{batch} x {classes}"}, turns(loss, logits, own))
                for name, loss, own in runs
            ],
            bench.plan.short_rounds,
        )


def augmentation(bench: Bench) -> Iterator[Row]:
    """The recipe's augmentation on the device; the host's time is over before the device's is."""
    case = bench.plan.loader

    def turns(images: Tensor) -> Contender:
        numbers = draw("recipe", 0, 0, range(len(images)))
        started = bench.kernels(lambda: apply_batch(images, numbers))
        while True:
            start = bench.clock()
            apply_batch(images, numbers)
            host = time.perf_counter() - start
            spent = bench.clock() - start
            yield {"ms": 1e3 * spent, "host ms": 1e3 * host, bench.counted: started}

    images = bench.synthetic(case).images
    runs = [
        ({"batch": len(part), "px": case.image_size}, turns(part))
        for part in (images, images[: len(images) // 4])
    ]
    yield from by_turns(runs, bench.plan.short_rounds)


class Section(NamedTuple):
    """A part of the benchmark, and its share of the time."""

    run: Callable[[Bench], Iterator[Row]]
    share: int


SECTIONS = {  # the quick ones first: a run that is cut off has them
    "losses": Section(losses, 15),
    "augmentation": Section(augmentation, 5),
    "loader": Section(load, 50),
    "jpeg": Section(jpeg, 20),
    "step": Section(steps, 100),
    "compile": Section(compiled, 50),
}
