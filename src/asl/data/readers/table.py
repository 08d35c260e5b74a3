"""A data set of the user's own: a CSV or Parquet table of image paths and labels.

path,labels           or    path,cat,dog        1 present, 0 absent, -1 or empty not annotated
a.jpg,cat|dog               a.jpg,1,1
b.jpg,                      b.jpg,0,
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from polars.exceptions import PanicException, PolarsError

from asl.data.annotations import ABSENT, PRESENT, UNANNOTATED, Annotations
from asl.data.files import image_names, no_split, not_found, read_rows, unreadable
from asl.errors import DataError

SPLIT_NAMES = ("train", "val", "valid", "test")  # a single table of such a name is that split
PATH_COLUMNS = ("path", "file", "file_name", "filename", "filepath", "image")
# What people call a column that holds names of classes, in lower case; only "labels" is read so.
LIKE_LABELS = ("label", "labels", "tag", "tags", "class", "classes")


class Table(NamedTuple):
    """The rows of a file that are not blank: their cells, and the numbers of spreadsheets."""

    path: Path
    cells: pl.DataFrame
    rows: pl.Series

    def place(self, index: int) -> str:
        """Where the row with this index stands in the file."""
        return f"{self.path}: row {self.rows[index]}"

    def column(self, *names: str) -> pl.Series:
        """The first of these columns that the table has, as text.

        Raises `DataError` if it has none of them, or for a cell that is empty.
        """
        name = next((name for name in names if name in self.cells.columns), None)
        if name is None:
            wanted, existing = " or ".join(names), ", ".join(self.cells.columns)
            raise DataError(f"{self.path} has no column {wanted}, only: {existing}")
        column = _text(self.cells[name], self.path)
        _check(column, column.is_not_null(), "a cell is empty", self)
        return column


def table(
    root: Path, split: str, *, image_folder: str = "", val_share: float = 0.2, split_seed: int = 0
) -> Annotations:
    """Read one split of a table, or of several in one folder.

    `root` is a table (.csv in UTF-8, or .parquet) or a folder of tables. Each of several is the
    split of its name, and so is one called train, val, valid or test. Any other may have a column
    `split`; where it has none, every image is drawn for "val" with probability `val_share`, else
    for "train". The draw depends on `split_seed` and the path alone: images that are added later do
    not move the others.

    Paths stand in the column `path` (or another of `PATH_COLUMNS`), relative to `image_folder`,
    which itself is relative to the folder of the table. Labels are either names with "|" between
    them in the column `labels` (every cell annotated, classes in alphabetical order), or all other
    columns are classes, with 1 present, 0 absent, and -1 or nothing for not annotated. Classes are
    those of all splits together; where a table has no column for one, it is not annotated.

    Raises `DataError` that names file, row (as spreadsheets count: the header is row 1) and column.
    """
    *paths, folder = sources(root, split, image_folder=image_folder)
    tables = _read_all(paths)
    if "split" not in tables[0].cells.columns:
        draws = (_draw(name, split_seed) for name in tables[0].cells["path"])
        drawn = pl.Series("split", ["val" if draw < val_share else "train" for draw in draws])
        tables = [tables[0]._replace(cells=tables[0].cells.with_columns(drawn))]
    return annotations_of(tables, split, root, folder)


def all_rows(path: Path) -> Annotations:
    """Every image of one table, whatever its split, in the order of the rows.

    Raises `DataError` as `table` does.
    """
    if not path.is_file():
        raise not_found(path)
    whole = _read(path)
    cells = whole.cells.with_columns(split=pl.lit("all"))
    return annotations_of([whole._replace(cells=cells)], "all", path, path.parent)


def splits(root: Path) -> list[str]:
    """The splits of a table or folder of tables; "train" and "val" where they are to be drawn."""
    *paths, _ = sources(root, "")
    tables = [table.cells for table in _read_all(paths)]
    if "split" not in tables[0].columns:
        return ["train", "val"]
    return sorted({name for cells in tables for name in cells["split"].unique()})


def sources(root: Path, split: str, *, image_folder: str = "", **_: object) -> list[Path]:
    """The tables, and the folder of the images."""
    paths = [root] if root.is_file() else sorted([*root.glob("*.csv"), *root.glob("*.parquet")])
    if not paths:
        raise not_found(root if root.suffix else root / "labels.csv")
    return [*paths, paths[0].parent / image_folder]


def annotations_of(tables: Sequence[Table], split: str, root: Path, folder: Path) -> Annotations:
    """The images of a split of `root`, which are in `folder`, with the classes of all tables.

    The tables have the columns path and split (text) and labels (lists) or classes (Int8).
    """
    every = pl.concat([table.cells for table in tables], how="diagonal")
    chosen = (every["split"] == split).arg_true()
    if chosen.is_empty():
        raise no_split(split, sorted(every["split"].unique()), root)

    def place(row: int) -> str:
        places = (table.place(index) for table in tables for index in range(len(table.rows)))
        return next(islice(places, chosen[row], None))

    frame = every[chosen]
    files = image_names(frame["path"].to_list(), folder, place)
    if "labels" in every.columns:
        classes = sorted(every["labels"].explode().drop_nulls().unique())
        rows = np.repeat(np.arange(len(frame)), frame["labels"].list.len())
        names = frame["labels"].explode().drop_nulls()
        columns = names.cast(pl.Enum(classes)).to_physical().to_numpy()
        values, implied = np.array(PRESENT), ABSENT
    else:
        classes = [name for name in every.columns if name not in ("path", "split")]
        labels = frame.select(classes).fill_null(UNANNOTATED).to_numpy()
        # Either value may be the implied one: it is a matter of memory, not of meaning.
        implied = max(ABSENT, UNANNOTATED, key=lambda label: np.count_nonzero(labels == label))
        rows, columns = np.nonzero(labels != implied)
        values = labels[rows, columns]
    if not classes:
        file = tables[0].path
        raise DataError(f"{file} has no class: give it names in `labels`, or a column for each")
    return Annotations.from_cells(folder, files, tuple(classes), rows, columns, values, implied)


def read_table(path: Path) -> Table:
    """A table; of a CSV, all columns are text, without the spaces around cells.

    Raises `DataError` if the file cannot be read, or is neither a CSV in UTF-8 nor Parquet.
    """
    parquet = path.suffix == ".parquet"
    try:
        cells = _read_parquet(path) if parquet else _read_csv(path)
    except OSError as error:
        raise unreadable(path, error) from error
    for name in cells.columns:
        if len(name.splitlines()) > 1:  # most likely a quotation mark that nothing closes
            raise DataError(f"{path}: the name of a column has several lines: {name[:80]!r}")
    filled = cells.select(~pl.all_horizontal(pl.all().is_null())).to_series().arg_true()
    if filled.is_empty():
        raise DataError(f"{path} has no rows")
    return Table(path, cells[filled], filled + (1 if parquet else 2))


def _read_csv(path: Path) -> pl.DataFrame:
    try:
        cells = pl.read_csv(path, infer_schema=False)
        # Of quoted names of columns, Polars leaves the quotes inside doubled.
        cells = cells.rename(lambda name: name.replace('""', '"').strip())
        return cells.with_columns(pl.all().str.strip_chars().replace("", None))
    except PolarsError as error:
        # Polars does not say where a CSV is wrong. This slow reader does.
        header, *lines = read_rows(path) or [[]]
        for row, line in enumerate(lines, start=2):
            if len(line) > len(header):
                message = f"{path}: row {row} has {len(line)} cells, not {len(header)}"
                raise DataError(message) from None
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _read_parquet(path: Path) -> pl.DataFrame:
    # Arrow reads it. Polars asks for as much memory as a damaged file says, and then the process
    # dies.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as file:
        try:
            arrow = ParquetFile(file).read()
            arrow.validate(full=True)
            return pl.DataFrame(arrow)
        except (ArrowException, OSError, UnicodeError, PolarsError, PanicException) as error:
            raise DataError(f"{path} cannot be read: {error}") from None


def _read_all(paths: list[Path]) -> list[Table]:
    """The tables, with a column `split` if their names or one of their columns say it."""
    tables = [_read(path) for path in paths]
    have_labels = ["labels" in table.cells.columns for table in tables]
    if any(have_labels) and not all(have_labels):
        without, having = (paths[have_labels.index(each)] for each in (False, True))
        raise DataError(f"{without} has no column labels, but {having} has one")
    named = paths[0].stem in SPLIT_NAMES and "split" not in tables[0].cells.columns
    if named or len(paths) > 1:
        return [
            table._replace(cells=table.cells.with_columns(split=pl.lit(table.path.stem)))
            for table in tables
        ]
    return tables


def _read(path: Path) -> Table:
    """A table with the columns path, split if it has one, and labels (names) or classes (Int8)."""
    table = read_table(path)
    images = table.column(*PATH_COLUMNS)
    keys = [images.alias("path")]
    if "split" in table.cells.columns:
        keys.append(table.column("split"))
    if "labels" in table.cells.columns:
        return table._replace(cells=pl.DataFrame([*keys, _names(table.cells["labels"], path)]))
    columns = table.cells.drop(images.name, "split", strict=False).get_columns()
    if len(columns) == 1 and columns[0].name.lower() in LIKE_LABELS:
        raise DataError(
            f"{path}: column {columns[0].name} would be the only class: call it labels if it holds "
            "names of classes, else by the name of its class"
        )
    return table._replace(cells=pl.DataFrame([*keys, *(_marks(each, table) for each in columns)]))


def _marks(column: pl.Series, table: Table) -> pl.Series:
    """The column of a class: 1, 0, -1 or null, as Int8."""
    name = column.name
    if name.endswith("_duplicated_0"):  # Polars has renamed it
        name = name.removesuffix("_duplicated_0")
        raise DataError(f"{table.path}: column {name} is there twice")
    marks = column
    if not column.dtype.is_numeric():
        text = _text(column, table.path).str.to_lowercase()
        marks = text.replace({"true": "1", "false": "0"})
    marks = marks.cast(pl.Float64, strict=False)
    known = column.is_null() | marks.is_in([1.0, 0.0, -1.0]).fill_null(False)
    _check(column, known, f"{{!r}} is not 1, 0, -1 or empty{_hint(name)}", table)
    return marks.cast(pl.Int8)


def _check(column: pl.Series, good: pl.Series, message: str, table: Table) -> None:
    if not good.all():
        row = int((~good).arg_max() or 0)
        value = message.format(column[row])
        raise DataError(f"{table.place(row)}, column {column.name}: {value}")


def _hint(column: str) -> str:
    like_labels = column.lower() in LIKE_LABELS
    return ". Names of classes belong in a column called labels" if like_labels else ""


def _text(column: pl.Series, path: Path) -> pl.Series:
    """The column as text; raises `DataError` for lists, structs and bytes that are not UTF-8."""
    if not column.dtype.is_nested():
        with suppress(PolarsError):
            return column.cast(pl.String)
    message = f"{path}: column {column.name} is of type {column.dtype}: use text or numbers"
    raise DataError(message + _hint(column.name))


def _names(labels: pl.Series, path: Path) -> pl.Series:
    """Lists of the names in each cell, between which text has "|"."""
    if labels.dtype != pl.List(pl.String):
        labels = _text(labels, path).str.split("|")
    name = pl.element().str.strip_chars()
    return labels.fill_null([]).list.eval(name.filter(name != ""))


def _draw(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on the name and the seed alone."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
