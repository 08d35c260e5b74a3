"""Scores: what a trained model says of every image of a data set."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from tqdm import tqdm

from asl.data.annotations import Annotations
from asl.distributed import gather_dealt, precision, rank
from asl.errors import DataError, UsageError
from asl.evaluation.average import MeanScores, Renormalized, Scores
from asl.evaluation.settings import trained_with
from asl.images.decode import squish
from asl.images.features import AnyBatches
from asl.images.loader import Batch, Batches
from asl.images.prepare import preparation
from asl.images.settings import ImageSettings
from asl.models.build import Statistics, check_size, normalization, place
from asl.models.inference import for_inference
from asl.models.settings import DeviceSettings, TrainedModelSettings
from asl.models.weights import trained_model

HALF_ABOVE = 2**27  # cells: larger tables of scores are kept in half precision, 256 MB and up


@torch.inference_mode()
def score(
    models: Sequence[nn.Module],
    batches: Iterable[Batch],
    prepare: Callable[[Batch], Tensor],
    computed_in: torch.dtype | None = None,
    kept_as: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The scores that each of several models gives, in one pass over the batches.

    The models map prepared images to scores in [0, 1] (`average.Scores`), or to whatever else is
    wanted of each image. Returns one (N, C) tensor of type `kept_as` per model, on the host. With
    `computed_in` the forward passes run in that precision.
    """
    models = [model.eval() for model in models]
    tables = [_Table() for _ in models]
    for batch in batches:
        images = prepare(batch)
        with torch.autocast(images.device.type, computed_in, enabled=computed_in is not None):
            scores = [model(images)[: len(batch.targets)] for model in models]
        for table, each in zip(tables, scores, strict=True):
            table.add(each.to(kept_as))
    return [table.rows() for table in tables]


class _Table:
    """Rows that go to the host. Those of a GPU arrive while it works on the next batch."""

    def __init__(self) -> None:
        self._there: list[Tensor] = []
        self._on_the_way: tuple[Tensor, torch.cuda.Event] | None = None

    def add(self, rows: Tensor) -> None:
        """Add rows below the others. Does not wait for the device to make them."""
        if not rows.is_cuda:
            self._there.append(rows.cpu())
            return
        sent = rows.to("cpu", non_blocking=True)
        arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrival.record()
        self._arrive()
        self._on_the_way = sent, arrival

    def rows(self) -> Tensor:
        """All rows, on the host."""
        self._arrive()
        return torch.cat(self._there)

    def _arrive(self) -> None:
        if self._on_the_way is not None:
            sent, arrival = self._on_the_way
            arrival.synchronize()
            self._there.append(sent.clone())  # what the device writes to is pinned, and scarce
            self._on_the_way = None


def score_data_set(
    models: Sequence[nn.Module],
    batches: AnyBatches,
    normalized: Statistics,
    device: torch.device,
    amp: str,
    title: str,
    watched: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> list[Tensor | None]:
    """What `score` returns for all batches, of all ranks, on rank 0; None on the others.

    The images are `normalized` by that mean and deviation, for all models. A progress bar has the
    `title`; `watched` may look at the batches as they pass.
    """
    images, classes = len(batches.annotations), batches.annotations.num_classes
    computed_in = precision(amp, device, training=False)
    tables = score(
        models,
        watched(progress(batches, 0, title)),
        preparation(*normalized, device, computed_in),
        computed_in,
        torch.float16 if images * classes > HALF_ABOVE else torch.float32,
    )
    return [gather_dealt(table, batches.batch_size_per_rank, images) for table in tables]


def progress(batches: AnyBatches, epoch: int, title: str, start: int = 0) -> "tqdm[Batch]":
    """The batches of an epoch, from number `start` on, behind a bar that counts images."""
    return tqdm(
        batches.epoch(epoch, start),
        title,
        len(batches),
        initial=start,
        unit="img",
        unit_scale=batches.batch_size,
        leave=False,
        disable=rank() != 0,
    )


@dataclass(frozen=True)
class Scorer:
    """Trained models on their device, whose mean scores are those of `classes`.

    `members` map images that are `normalized` so to scores; `names` are those of their models, and
    `weights` the sets of their checkpoints that they have. Images are squished to each of `sizes`
    and seen as they are, with `flip` also mirrored.
    """

    members: tuple[nn.Module, ...]
    names: tuple[str, ...]
    weights: tuple[str, ...]
    classes: tuple[str, ...]
    normalized: Statistics
    images: ImageSettings
    device: torch.device
    amp: str
    sizes: tuple[int, ...]
    flip: bool = False

    @classmethod
    def load(
        cls,
        settings: TrainedModelSettings,
        images: ImageSettings,
        compute: DeviceSettings,
        device: torch.device,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
    ) -> Self:
        """Build the models of checkpoints. Raises `UsageError` and `DataError` if that fails.

        The sizes are `scales` times that of `images`, but for 1 rounded to multiples of 32.
        """
        each = _of_each(settings)
        models, names, loaded = zip(
            *(trained_model(one, images.image_size) for one in each), strict=True
        )
        _check_classes(settings.model_path, names)
        normalized = normalization(models[0])
        scorer = cls(
            tuple(
                _member(model, normalized, one.model_path[0], device)
                for model, one in zip(models, each, strict=True)
            ),
            tuple(one.model_name for one in each),
            tuple(one.weights for one in loaded),
            names[0],
            normalized,
            images,
            device,
            compute.amp,
            tuple(dict.fromkeys(_scaled(images.image_size, scale) for scale in scales)),
            flip,
        )
        if len(scorer.sizes) > 1:  # one that does not fit is to be known before a pass over others
            for size in scorer.sizes:
                scorer.check_size(images.replace(image_size=size).image_size)
        return scorer

    def scores(self, annotations: Annotations, title: str) -> Tensor | None:
        """The (N, C) scores in [0, 1] of these images, on rank 0; None on other ranks.

        Every size is a pass over the images, and the mean of all is made in one table.

        Raises `UsageError` for images of a size that a model cannot take and for batches that the
        device cannot hold, and `DataError` for an image that cannot be read.
        """

        def scored(size: int) -> Tensor | None:
            shown = title if size == self.sizes[0] else f"{title}, {size} px"
            return self._scores(annotations, size, shown)

        return self._mean(scored)

    def scores_of(self, images: Iterable[Tensor]) -> Tensor:
        """The (B, C) scores in [0, 1] of decoded images, each (3, H, W) uint8, as one batch.

        They are those that `scores` gives for a batch of the same images, to the bit. Of the
        images, one is needed at a time. Raises `UsageError` as `scores` does.
        """
        # By image, then by size: a photograph is large, and can go when it is squished.
        squished = [[squish(image, size) for size in self.sizes] for image in images]
        batches = {
            size: Batch(torch.stack(each), torch.empty(len(each), 0))
            for size, each in zip(self.sizes, zip(*squished, strict=True), strict=True)
        }
        model = MeanScores(self.members, self.flip)
        computed_in = precision(self.amp, self.device, training=False)
        prepare = preparation(*self.normalized, self.device, computed_in)

        def scored(size: int) -> Tensor:
            with self._errors_of(size, len(squished)):
                [scores] = score([model], [batches[size]], prepare, computed_in)
            return scores

        mean = self._mean(scored)
        assert mean is not None
        return mean

    def _mean(self, scored: Callable[[int], Tensor | None]) -> Tensor | None:
        mean = scored(self.sizes[0])
        for number, size in enumerate(self.sizes[1:], start=2):
            scores = scored(size)
            if mean is not None and scores is not None:
                with torch.inference_mode():  # which they were made in
                    mean.lerp_(scores, 1 / number)
        return mean

    def check_size(self, size: int) -> None:
        """Raise `UsageError` if one of the models cannot take images of `size` pixels."""
        for member, name in zip(self.members, self.names, strict=True):
            check_size(member, name, size)

    def _scores(self, annotations: Annotations, size: int, title: str) -> Tensor | None:
        images = self.images.replace(image_size=size)
        batches = Batches(annotations, images, device=self.device)
        model = MeanScores(self.members, self.flip)
        with self._errors_of(size, batches.batch_size_per_rank):
            [scores] = score_data_set(
                [model], batches, self.normalized, self.device, self.amp, title
            )
        return scores

    @contextmanager
    def _errors_of(self, size: int, batch_size: int) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise UsageError(
                f"{self.device} is out of memory with {batch_size} images: lower --batch-size"
            ) from None
        except (RuntimeError, AssertionError, ArithmeticError, ValueError):
            self.check_size(size)
            raise  # the size is right: it was something else


def _of_each(settings: TrainedModelSettings) -> list[TrainedModelSettings]:
    """The settings of each checkpoint; the others name their model themselves, where they do."""
    paths = settings.model_path
    for path in paths[1:]:
        if Path(path).is_dir():
            raise UsageError(
                f"{path} is a folder, and --model-path takes every word behind it for a "
                "checkpoint: name the data set first"
            )
    each = [settings.replace(model_path=paths[:1])]
    for path in paths[1:]:
        trained = trained_with(path)
        try:
            own = {name: trained[name] for name in ("model_name", "head") if name in trained}
            each.append(settings.replace(model_path=(path,), **own))
        except (UsageError, TypeError) as error:
            raise DataError(f"{path}: its config cannot be used: {error}") from None
    return each


def _member(model: nn.Module, normalized: Statistics, path: str, device: torch.device) -> nn.Module:
    own, model = normalization(model), for_inference(place(model, device))
    if own != normalized:
        model = Renormalized(model, own, normalized, device)
    return Scores(model, one_label=trained_with(path).get("loss") == "asl_single")


def _check_classes(paths: Sequence[str], names: Sequence[Sequence[str]]) -> None:
    """Raise `DataError` where the checkpoints do not have the same classes in the same order."""
    for path, classes in zip(paths, names, strict=True):
        if len(classes) != len(names[0]):
            raise DataError(f"{path} has {len(classes)} classes, {paths[0]} {len(names[0])}")
        for number, (own, first) in enumerate(zip(classes, names[0], strict=True)):
            if own != first:
                raise DataError(f"{path}: class {number} is {own!r}, of {paths[0]} {first!r}")


def _scaled(size: int, scale: float) -> int:
    return size if scale == 1 else max(32, 32 * round(size * scale / 32))
