"""Predictions, and the files that infer.py writes of them: each whole or not at all."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, overload

from torch import Tensor
from tqdm import tqdm

from asl.atomic import check_result, result_file
from asl.data.annotations import Annotations
from asl.errors import DataError, UsageError
from asl.evaluation.explain import draw_explanations
from asl.evaluation.pictures import draw_predictions
from asl.evaluation.predictor import Label, Predictor
from asl.evaluation.settings import PictureSettings
from asl.evaluation.sheets import check_sheet, contact_sheet
from asl.evaluation.text import write_json

CELLS = 2**22  # scores in one row group of a Parquet file: 16 MB
FILE = "file"  # the column of the images there


class Prediction(TypedDict):
    """The labels of the image in a file."""

    file: str
    labels: list[Label]


@dataclass(frozen=True, eq=False)
class Predictions(Sequence[Prediction]):
    """The predictions for N images: made when they are asked for, from a table of scores (N, C)."""

    images: Annotations
    scores: Tensor
    predictor: Predictor

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prediction]: ...

    def __getitem__(self, index: int | slice) -> Prediction | list[Prediction]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]  # counts from the end too, and raises IndexError
        labels = self.predictor.labels(self.scores[row])
        return {"file": self.images.path(row), "labels": labels}


def check_results(wanted: PictureSettings) -> None:
    """Raise `UsageError` for results that could not be written: before images are looked at."""
    named = {name: getattr(wanted, name) for name in ("json_file", "jsonl", "csv", "parquet")}
    named["contact_sheet"] = wanted.contact_sheet
    if wanted.contact_sheet:
        check_sheet(wanted.contact_sheet)
    if wanted.draw or wanted.explain:
        check_result(Path(_folder(wanted), "picture.png"))
    places: dict[str, str] = {}
    for name, path in named.items():
        if path:
            check_result(path)
            other = places.setdefault(os.path.abspath(path), name)  # noqa: PTH100 (no links)
            if other != name:
                raise UsageError(f"{other} and {name} are one file: {path}")


def check_names(images: Annotations, names: Sequence[str], wanted: PictureSettings) -> None:
    """Raise an error for names of classes or files that the wanted tables could not hold."""
    if wanted.csv or wanted.parquet:
        for row, name in enumerate(images.files.tolist()):
            try:
                name.decode()
            except UnicodeDecodeError:
                raise DataError(
                    f"the name of {images.path(row)!r} is not UTF-8, which tables are: rename it"
                ) from None
    if wanted.csv:
        for name in names:
            if "|" in name or name != name.strip() or not name:
                raise UsageError(
                    f"a CSV cannot hold the class {name!r}: it has | between names, without spaces"
                )
    if wanted.parquet:
        name, count = Counter([FILE, *names]).most_common(1)[0]
        if count > 1:
            raise UsageError(f"two columns of the Parquet file would be called {name!r}")


def write_results(predictions: Predictions, wanted: PictureSettings) -> Iterator[str]:
    """Write what is wanted, and say in a line each where it is. Raises `UsageError`."""
    if wanted.json_file:
        write_json([*predictions], wanted.json_file)
        yield f"all labels: {wanted.json_file}"
    if wanted.jsonl:
        write_jsonl(predictions, wanted.jsonl)
        yield f"a line per image: {wanted.jsonl}"
    if wanted.csv:
        folder = write_csv(predictions, wanted.csv)
        yield f"table: {wanted.csv}"
        yield f"train on it, corrected: python train.py {wanted.csv} --dataset table{folder} ..."
    if wanted.parquet:
        write_parquet(predictions, wanted.parquet)
        yield f"all scores: {wanted.parquet}"
    read = predictions.predictor.read
    if wanted.contact_sheet:
        pages = contact_sheet(predictions, wanted.contact_sheet, read)
        yield f"contact sheet: {pages[0]}" + f" to {pages[-1].name}" * (len(pages) > 1)
    if wanted.draw:
        draw_predictions(predictions, _folder(wanted), read)
    if wanted.explain:
        draw_explanations(predictions, _folder(wanted), predictions.predictor, wanted.explain)
    if wanted.draw or wanted.explain:
        yield f"pictures: {_folder(wanted)}"


def _folder(wanted: PictureSettings) -> str:
    return wanted.output or "predictions"


def write_jsonl(predictions: Sequence[Prediction], path: str | Path) -> None:
    """Write a line of JSON per image. Raises `UsageError` if that fails."""
    with result_file(path) as file:
        for prediction in tqdm(predictions, "JSON lines", leave=False):
            line = json.dumps(prediction, ensure_ascii=False) + "\n"
            # A name that is no UTF-8 becomes JSON's escapes, from which Python makes it again.
            file.write(line.encode(errors="backslashreplace"))


def write_csv(predictions: Predictions, path: str | Path) -> str:
    """Write all predicted labels as a table that `--dataset table` reads: path,labels,scores.

    Paths are relative to the folder of the table where the images lie below it, else absolute. The
    reader leaves the column of scores alone. Returns what it must be told besides: an option, or
    nothing. Raises `UsageError` if the table cannot be written.
    """
    folder, root = Path(path).parent.resolve(), predictions.images.root.resolve()
    below = root.is_relative_to(folder)
    start = root.relative_to(folder) if below else root
    with result_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["path", "labels", "scores"])
        for row in tqdm(range(len(predictions)), "table", leave=False):
            found = predictions.predictor.predicted(predictions.scores[row])
            name = os.fsdecode(bytes(predictions.images.files[row]))
            scores = "|".join(f"{label['score']:.4f}" for label in found)
            table.writerow([start / name, "|".join(label["name"] for label in found), scores])
        text.flush()
        text.detach()
    return "" if below else " --image-folder /"


def write_parquet(predictions: Predictions, path: str | Path) -> None:
    """Write all scores to a Parquet file: a column `file`, and one of float32 for every class.

    Raises `UsageError` if that fails.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    images, scores, names = predictions.images, predictions.scores, predictions.predictor.classes
    types: list[Any] = [(FILE, pa.string()), *((name, pa.float32()) for name in names)]
    schema, rows = pa.schema(types), max(1, CELLS // len(names))
    with result_file(path) as file, ParquetWriter(file, schema) as writer:
        for first in tqdm(range(0, len(images), rows), "Parquet", leave=False):
            chunk = scores[first : first + rows].float()
            files = [images.path(row) for row in range(first, first + len(chunk))]
            columns = [pa.array(files), *(pa.array(column.numpy()) for column in chunk.T)]
            writer.write_table(pa.table(columns, schema))
