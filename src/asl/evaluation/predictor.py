"""Labels of images from Python: `from asl import Predictor`."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, cast, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from asl.config import of_checkpoint
from asl.distributed import pick_device
from asl.errors import DataError
from asl.evaluation.evaluate import display_names
from asl.evaluation.judge import Judge, Judged
from asl.evaluation.score import Scorer
from asl.evaluation.settings import PredictorConfig, trained_with
from asl.images.decode import Source, read_image

Path = str | os.PathLike[str]


class Label(Judged):
    """What a model says of one class in one image."""

    name: str


class Predictor:
    """A trained model that labels images: `Predictor("best.pt")(["cat.jpg", picture, array])`.

    `settings` are options of infer.py by their names, such as `threshold=0.5`, `top_k=3`,
    `device="cuda"`, `batch_size=32`, `tta="flip"` or `exif_rotate=True`; what a checkpoint knows of
    itself needs no setting. Of several checkpoints the scores are averaged.

    An image is a path, the content of a file as bytes, a Pillow image, or a (H, W, 3) uint8 array
    in RGB. Scores are those of infer.py for the same file, in batches of the same images to the
    bit. Images are decoded one after the other: for many thousands of files infer.py is quicker,
    which has processes for that.

    Raises `UsageError` and `DataError` as infer.py does.
    """

    def __init__(self, model_path: Path | Sequence[Path], **settings: Any) -> None:
        several = [model_path] if isinstance(model_path, str | os.PathLike) else model_path
        paths = tuple(os.fspath(path) for path in several)
        known = of_checkpoint(PredictorConfig, paths[0], trained_with) if paths else {}
        config = PredictorConfig.of(**{**known, **settings, "model_path": paths})
        wanted = config.evaluation
        device = pick_device(config.run.device)
        self.scorer = Scorer.load(
            config.model, config.images, config.run, device, wanted.flip, wanted.scales
        )
        names = display_names(wanted.class_descriptions, self.scorer.classes)
        self.classes = tuple(names)
        self.judge = Judge.load(paths, self.scorer, wanted.threshold, wanted.tta)
        self.top_k = wanted.top_k or 10

    @overload
    def __call__(self, images: Source) -> list[Label]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, images: Iterable[Source]) -> list[list[Label]]: ...

    def __call__(self, images: Source | Iterable[Source]) -> list[Label] | list[list[Label]]:
        """The labels of an image: a list of `Label`; of several images a list of such lists.

        Raises `DataError` for what is no picture: where there are several, it says which.
        """
        if _is_one(images):
            return self.labels(self.scores(images))
        return [self.labels(scores) for scores in self.scores(images)]

    def scores(self, images: Source | Iterable[Source]) -> npt.NDArray[np.float32]:
        """All scores in [0, 1], in the order of `classes`: (C,) of an image, (N, C) of several."""
        if _is_one(images):
            scores: npt.NDArray[np.float32] = self.scorer.scores_of([self.read(images)])[0].numpy()
            return scores
        tables = [np.empty((0, len(self.classes)), np.float32)]
        decoded = self._decoded(cast(Iterable[Source], images))
        for first in decoded:
            batch = chain([first], islice(decoded, self.scorer.images.batch_size - 1))
            tables.append(self.scorer.scores_of(batch).numpy())
        return np.concatenate(tables)

    def labels(self, scores: npt.ArrayLike) -> list[Label]:
        """The `top_k` labels of one image, from its scores (C,): the highest first."""
        highest, classes = torch.as_tensor(scores).topk(min(self.top_k, len(self.classes)))
        return list(map(self._label, classes.tolist(), highest.tolist()))

    def predicted(self, scores: npt.ArrayLike) -> list[Label]:
        """All labels of one image that are predicted, from its scores (C,): the highest first."""
        found = np.asarray(scores, dtype=np.float64)
        above = np.flatnonzero(found > self.judge.thresholds)
        order = above[np.argsort(-found[above], kind="stable")]
        return [
            {"name": self.classes[c], **self.judge.label(c, float(found[c]))}
            for c in order.tolist()
        ]

    def _label(self, number: int, score: float) -> Label:
        return {"name": self.classes[number], **self.judge.label(number, float(score))}

    def read(self, image: Any) -> Tensor:
        """The pixels (3, H, W) uint8 of an image, before they are squished to the model's size."""
        settings = self.scorer.images
        draft = max(self.scorer.sizes) if settings.draft_decode else 0
        return read_image(image, settings.max_pixels, settings.exif_rotate, draft)

    def _decoded(self, images: Iterable[Any]) -> Iterator[Tensor]:
        for number, image in enumerate(images, start=1):
            try:
                yield self.read(image)
            except DataError as error:
                if isinstance(image, str | os.PathLike):
                    raise  # it names the file
                raise DataError(f"image {number}: {error}") from None


def _is_one(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim < 4  # (N, H, W, 3) are several
    return isinstance(images, str | os.PathLike | bytes | Image.Image)
