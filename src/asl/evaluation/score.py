"""Scores: what a trained model says of every image of a data set."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from tqdm import tqdm

from asl.data.annotations import Annotations
from asl.distributed import gather_dealt, precision, rank
from asl.errors import UsageError
from asl.evaluation.settings import trained_with
from asl.images.features import AnyBatches
from asl.images.loader import Batch, Batches
from asl.images.prepare import preparation
from asl.images.settings import ImageSettings
from asl.models.build import check_size, normalization, place
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
    activation: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> list[Tensor]:
    """The scores that each of several models gives, in one pass over the batches.

    One (N, C) tensor of type `kept_as` per model, on the host, values in [0, 1], or what else
    `activation` makes of a model's answers. With `computed_in` the forward passes run in that
    precision.
    """
    models = [model.eval() for model in models]
    tables = [_Table() for _ in models]
    for batch in batches:
        images = prepare(batch)
        with torch.autocast(images.device.type, computed_in, enabled=computed_in is not None):
            logits = [model(images)[: len(batch.targets)] for model in models]
        for table, each in zip(tables, logits, strict=True):
            table.add(activation(each.float()).to(kept_as))
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
    device: torch.device,
    amp: str,
    title: str,
    watched: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
    one_label: bool = False,
) -> list[Tensor | None]:
    """What `score` returns for all batches, of all ranks, on rank 0; None on the others.

    A progress bar has the `title`; `watched` may look at the batches as they pass.
    """
    images, classes = len(batches.annotations), batches.annotations.num_classes
    computed_in = precision(amp, device, training=False)
    tables = score(
        models,
        watched(progress(batches, 0, title)),
        preparation(*normalization(models[0]), device, computed_in),
        computed_in,
        torch.float16 if images * classes > HALF_ABOVE else torch.float32,
        partial(torch.softmax, dim=1) if one_label else torch.sigmoid,
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
    """A trained model on its device, for `classes`; which set of `weights` it has.

    With `one_label` it was trained by `--loss asl_single`, and its scores are a softmax.
    """

    model: nn.Module
    classes: tuple[str, ...]
    weights: str
    settings: TrainedModelSettings
    images: ImageSettings
    device: torch.device
    amp: str
    one_label: bool = False

    @classmethod
    def load(
        cls,
        settings: TrainedModelSettings,
        images: ImageSettings,
        compute: DeviceSettings,
        device: torch.device,
    ) -> Self:
        """Build the model of a checkpoint. Raises `UsageError` and `DataError` if that fails."""
        model, classes, loaded = trained_model(settings, images.image_size)
        return cls(
            for_inference(place(model, device)),
            classes,
            loaded.weights,
            settings,
            images,
            device,
            compute.amp,
            one_label=trained_with(settings.model_path).get("loss") == "asl_single",
        )

    def scores(self, annotations: Annotations, title: str) -> Tensor | None:
        """The (N, C) scores in [0, 1] of these images, on rank 0; None on other ranks.

        Raises `UsageError` for images of a size that the model cannot take and for batches that
        the device cannot hold, and `DataError` for an image that cannot be read.
        """
        batches = Batches(annotations, self.images, device=self.device)
        try:
            [scores] = score_data_set(
                [self.model], batches, self.device, self.amp, title, one_label=self.one_label
            )
        except torch.OutOfMemoryError:
            raise UsageError(
                f"{self.device} is out of memory with {batches.batch_size_per_rank} images: "
                "lower --batch-size"
            ) from None
        except (RuntimeError, AssertionError, ArithmeticError, ValueError):
            check_size(self.model, self.settings.model_name, self.images.image_size)
            raise  # the size is right: it was something else
        return scores
