"""A data set of the user's own: a CSV or Parquet table of image paths and labels.

path,labels           or    path,cat,dog        1 present, 0 absent, -1 or empty not annotated
a.jpg,cat|dog               a.jpg,1,1
b.jpg,                      b.jpg,0,
"""

import hashlib
from pathlib import Path

import numpy as np
import polars as pl
from polars.exceptions import PanicException, PolarsError
from polars.selectors import by_dtype

from asl.data.annotations import ABSENT, PRESENT, UNANNOTATED, Annotations
from asl.data.files import image_names, no_split, not_found, read_rows, unreadable
from asl.errors import DataError

VERSION = 1
DEFAULT_SPLITS = (("train", "val"), ("train", "valid"), ("train", "test"))
PATH_COLUMNS = ("path", "file", "file_name", "filename", "filepath", "image")
PLACE = "file: row"  # the column that says where a row of the joined tables comes from


def table(
    root: Path, split: str, *, image_folder: str = "", val_share: float = 0.2, split_seed: int = 0
) -> Annotations:
    """Read one split of a table, or of several in one folder.

    `root` is a table (.csv in UTF-8, or .parquet) or a folder of tables. Each of several is the
    split of its name, and so is one called train, val, valid or test. Any other may have a column
    `split`; where it has none, every image is drawn for "val" with probability `val_share`, else
    for "train". The draw hangs on `split_seed` and the path alone, so that images which are added
    later do not move the others.

    Paths stand in the column `path` (or another of `PATH_COLUMNS`), relative to `image_folder`,
    which itself is relative to the folder of the table. Labels are either names with "|" between
    them in the column `labels` (every cell annotated, classes in alphabetical order), or all other
    columns are classes, with 1 present, 0 absent, and -1 or nothing for not annotated. Classes are
    those of all splits together; where a table has no column for one, it is not annotated.

    Raises `DataError` that names file, row (as spreadsheets count: the header is row 1) and column.
    """
    *paths, folder = sources(root, split, image_folder=image_folder)
    every = _read_all(paths)
    if "split" not in every.columns:
        drawn = [
            "val" if _draw(name, split_seed) < val_share else "train" for name in every["path"]
        ]
        every = every.with_columns(split=pl.Series(drawn, dtype=pl.String))
    frame = every.filter(pl.col("split") == split)
    if frame.is_empty():
        raise no_split(split, sorted(every["split"].unique()), root)
    files = image_names(frame["path"].to_list(), folder, lambda row: str(frame[PLACE][row]))
    if "labels" in every.columns:
        classes = sorted(every["labels"].explode().drop_nulls().unique())
        rows = np.repeat(np.arange(len(frame)), frame["labels"].list.len())
        names = frame["labels"].explode().drop_nulls()
        columns = names.cast(pl.Enum(classes)).to_physical().to_numpy()
        values, implied = np.full(len(rows), PRESENT), ABSENT
    else:
        classes = [name for name in every.columns if name not in (PLACE, "path", "split")]
        cells = frame.select(classes).fill_null(UNANNOTATED).to_numpy()
        # Either value may be the implied one: it is a matter of memory, not of meaning.
        implied = max(ABSENT, UNANNOTATED, key=lambda label: np.count_nonzero(cells == label))
        rows, columns = np.nonzero(cells != implied)
        values = cells[rows, columns]
    if not classes:
        raise DataError(f"{paths[0]} has no class: give it names in `labels`, or a column for each")
    return Annotations.from_cells(folder, files, tuple(classes), rows, columns, values, implied)


def splits(root: Path) -> list[str]:
    """The splits of a table or folder of tables; "train" and "val" where they are to be drawn."""
    *paths, _ = sources(root, "")
    frame = _read_all(paths)
    return sorted(frame["split"].unique()) if "split" in frame.columns else ["train", "val"]


def sources(root: Path, split: str, *, image_folder: str = "", **_: object) -> list[Path]:
    """The tables, and the folder of the images."""
    paths = [root] if root.is_file() else sorted([*root.glob("*.csv"), *root.glob("*.parquet")])
    if not paths:
        raise not_found(root if root.suffix else root / "labels.csv")
    return [*paths, paths[0].parent / image_folder]


def read_text(path: Path) -> pl.DataFrame:
    """A table and `PLACE`; of a CSV, all columns are text, without the spaces around cells.

    Raises `DataError` if the file cannot be read, or is neither a CSV in UTF-8 nor Parquet.
    """
    parquet = path.suffix == ".parquet"
    try:
        if parquet:
            frame = _read_parquet(path)
        else:
            frame = pl.read_csv(path, infer_schema=False)
            frame = frame.rename(str.strip).with_columns(
                pl.all().str.strip_chars().replace("", None)
            )
    except OSError as error:
        raise unreadable(path, error) from error
    except PolarsError as error:
        _check_rows(path)
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    for name in frame.columns:
        if len(name.splitlines()) > 1:  # most likely a quotation mark that nothing closes
            raise DataError(f"{path}: the name of a column has several lines: {name[:80]!r}")
    place = pl.format("{}: row {}", pl.lit(str(path)), pl.row_index() + (1 if parquet else 2))
    blank = pl.all_horizontal(pl.all().is_null())
    frame = frame.with_columns(place.alias(PLACE)).filter(~frame.select(blank).to_series())
    if frame.is_empty():
        raise DataError(f"{path} has no rows")
    return frame


def _read_parquet(path: Path) -> pl.DataFrame:
    # By Arrow. Polars asks for as much memory as a damaged file says, and dies with the process.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as file:
        try:
            arrow = ParquetFile(file).read()
            arrow.validate(full=True)
            frame = pl.DataFrame(arrow)
        except (ArrowException, OSError, UnicodeError, PolarsError, PanicException) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
    return frame.with_columns(by_dtype(pl.Categorical, pl.Enum).cast(pl.String))


def _check_rows(path: Path) -> None:
    # Polars does not say where a CSV is wrong. This does, slowly.
    header, *rows = read_rows(path) or [[]]
    for row, cells in enumerate(rows, start=2):
        if len(cells) > len(header):
            raise DataError(f"{path}: row {row} has {len(cells)} cells, not {len(header)}")


def _read_all(paths: list[Path]) -> pl.DataFrame:
    frames = [_read(path) for path in paths]
    forms = ["labels" in frame.columns for frame in frames]
    if any(forms) and not all(forms):
        other = paths[forms.index(False)]
        raise DataError(f"{other} has no column labels, but {paths[forms.index(True)]} has one")
    usual = any(paths[0].stem in pair for pair in DEFAULT_SPLITS)
    if len(paths) > 1 or (usual and "split" not in frames[0].columns):
        frames = [
            frame.with_columns(split=pl.lit(path.stem))
            for path, frame in zip(paths, frames, strict=True)
        ]
    return pl.concat(frames, how="diagonal")


def _read(path: Path) -> pl.DataFrame:
    # The columns PLACE, path, split if it has one, and labels (lists of names) or classes (Int8).
    frame = read_text(path)
    name = next((name for name in PATH_COLUMNS if name in frame.columns), None)
    if name is None:
        usual, there = " or ".join(PATH_COLUMNS), ", ".join(frame.columns[:-1])
        raise DataError(f"{path} has no column {usual}, only: {there}")
    frame = frame.rename({name: "path"})
    about = [column for column in (PLACE, "path", "split") if column in frame.columns]
    for column in about[1:]:
        frame = frame.with_columns(_text(frame[column], path))
        _check(frame, column, frame[column].is_not_null(), "a cell is empty")
    if "labels" in frame.columns:
        return frame.select(*about, _names(frame["labels"], path))
    for column in frame.drop(about).columns:
        if column.endswith("_duplicated_0"):  # so Polars renames it
            raise DataError(f"{path}: column {column.removesuffix('_duplicated_0')} is there twice")
        if not (frame[column].dtype.is_numeric() or frame[column].dtype in _MARKS):
            raise _of_type(frame[column], path)
        label = frame[column].cast(pl.Float64, strict=False)
        known = frame[column].is_null() | label.is_in([1.0, 0.0, -1.0]).fill_null(False)
        _check(frame, column, known, "{!r} is not 1, 0, -1 or empty")
    return frame.with_columns(pl.exclude(about).cast(pl.Float64).cast(pl.Int8))


def _check(frame: pl.DataFrame, column: str, good: pl.Series, message: str) -> None:
    if not good.all():
        row = int((~good).arg_max() or 0)
        value = message.format(frame[column][row])
        raise DataError(f"{frame[PLACE][row]}, column {column}: {value}")


_MARKS = (pl.String, pl.Boolean, pl.Null)  # beside numbers, what the cells of a class may be


def _of_type(column: pl.Series, path: Path) -> DataError:
    return DataError(f"{path}: column {column.name} is of type {column.dtype}: use text or numbers")


def _text(column: pl.Series, path: Path) -> pl.Series:
    try:
        if not column.dtype.is_nested():
            return column.cast(pl.String)
    except PolarsError:  # bytes that are not UTF-8
        pass
    raise _of_type(column, path)


def _names(labels: pl.Series, path: Path) -> pl.Series:
    if labels.dtype != pl.List(pl.String):
        labels = _text(labels, path).str.split("|")
    name = pl.element().str.strip_chars()
    return labels.fill_null([]).list.eval(name.filter(name != ""))


def _draw(name: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
