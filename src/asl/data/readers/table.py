"""A data set of the user's own: a CSV or Parquet table of image paths and labels.

path,labels           or    path,cat,dog        1 present, 0 absent, -1 or empty not annotated,
a.jpg,cat|dog               a.jpg,1,0.7         and between 0 and 1 how likely it is present
b.jpg,                      b.jpg,0,
"""

import csv
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from polars.exceptions import PanicException, PolarsError

from asl.data.annotations import ABSENT, PRESENT, UNANNOTATED, Annotations
from asl.data.draw import DRAWN, Draw
from asl.data.files import image_names, no_split, not_found, read_rows, unreadable
from asl.errors import DataError

SPLIT_NAMES = ("train", "val", "valid", "test")  # a single table of such a name is that split
PATH_COLUMNS = ("path", "file", "file_name", "filename", "filepath", "image")
# What people call a column that holds names of classes, in lower case; only "labels" is read so.
LIKE_LABELS = ("label", "labels", "tag", "tags", "class", "classes")
DELIMITERS = ",;\t"


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
    root: Path,
    split: str,
    *,
    image_folder: str = "",
    val_share: float | None = None,
    split_seed: int | None = None,
    stratify: bool = False,
    folds: int | None = None,
    fold: int | None = None,
) -> Annotations:
    """Read one split of a table, or of several in one folder.

    `root` is a table (.csv or .tsv in UTF-8 with commas, semicolons or tabs between its cells, or
    .parquet) or a folder of tables. Each of several is the split of its name, and so is one called
    train, val, valid or test. Any other may have a column `split`; where it has none, the images of
    "train" and "val" are drawn as `Draw` does with the other options.

    Paths stand in the column `path` (or another of `PATH_COLUMNS`), relative to `image_folder`,
    which itself is relative to the folder of the table. Labels are either names with "|" between
    them in the column `labels` (every cell annotated, classes in alphabetical order), or all other
    columns are classes, with 1 present, 0 absent, -1 or nothing for not annotated, and numbers
    between 0 and 1 for soft labels. Classes are those of all splits together; where a table has no
    column for one, it is not annotated.

    Raises `DataError` that names file, row (as spreadsheets count: the header is row 1) and column.
    """
    *paths, folder = sources(root, split, image_folder=image_folder)
    tables = _read_all(paths)
    draw = Draw(val_share, split_seed, stratify, folds, fold)
    if "split" not in tables[0].cells.columns:
        return draw.part(_whole(tables[0], root, folder), split, root)
    draw.check_unused(root)
    return annotations_of(tables, split, root, folder)


def all_rows(path: Path) -> Annotations:
    """Every image of one table, whatever its split, in the order of the rows.

    Raises `DataError` as `table` does.
    """
    if not path.is_file():
        raise not_found(path)
    return _whole(_read(path), path, path.parent)


def _whole(table: Table, root: Path, folder: Path) -> Annotations:
    cells = table.cells.with_columns(split=pl.lit("all"))
    return annotations_of([table._replace(cells=cells)], "all", root, folder)


def splits(root: Path) -> list[str]:
    """The splits of a table or folder of tables; "train" and "val" where they are to be drawn."""
    *paths, _ = sources(root, "")
    if len(paths) > 1:
        return sorted({path.stem for path in paths})
    try:
        return splits_in(paths[0], "split")
    except DataError:  # it has no such column, or whoever reads it will say what is wrong with it
        return [paths[0].stem] if paths[0].stem in SPLIT_NAMES else DRAWN


def splits_in(path: Path, column: str) -> list[str]:
    """The splits that a column of a table names; nothing but that column is read.

    Raises `DataError` where the table has no such column.
    """
    return sorted(read_table(path, only=column).column(column).unique())


def sources(root: Path, split: str, *, image_folder: str = "", **_: object) -> list[Path]:
    """The tables, and the folder of the images."""
    kinds = ("*.csv", "*.tsv", "*.parquet")
    found = sorted(path for kind in kinds for path in root.glob(kind))
    paths = [root] if root.is_file() else found
    if not paths:
        raise not_found(root if root.suffix else root / "labels.csv")
    return [*paths, paths[0].parent / image_folder]


def annotations_of(tables: Sequence[Table], split: str, root: Path, folder: Path) -> Annotations:
    """The images of a split of `root`, which are in `folder`, with the classes of all tables.

    The tables have the columns path and split (text) and labels (lists) or classes (numbers).
    """
    every = pl.concat([table.cells for table in tables], how="diagonal_relaxed")
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


def read_table(path: Path, only: str | None = None) -> Table:
    """A table, or `only` one column of it; of a CSV, all are text, without spaces around cells.

    Raises `DataError` if the file cannot be read, or is neither a CSV in UTF-8 nor Parquet.
    """
    parquet = path.suffix == ".parquet"
    try:
        cells = _read_parquet(path, only) if parquet else _read_csv(path, only)
    except OSError as error:
        raise unreadable(path, error) from error
    for name in cells.columns:
        if len(name.splitlines()) > 1:  # most likely a quotation mark that nothing closes
            raise DataError(f"{path}: the name of a column has several lines: {name[:80]!r}")
    filled = cells.select(~pl.all_horizontal(pl.all().is_null())).to_series().arg_true()
    if filled.is_empty():
        raise DataError(f"{path} has no rows")
    return Table(path, cells[filled], filled + (1 if parquet else 2))


def _read_csv(path: Path, only: str | None) -> pl.DataFrame:
    delimiter, names = _header(path)
    columns = [number for number, name in enumerate(names) if name == only] if only else None
    if columns == []:
        raise DataError(f"{path} has no column {only}, only: {', '.join(names)}")
    try:
        cells = pl.read_csv(path, infer_schema=False, separator=delimiter, columns=columns)
        # Of quoted names of columns, Polars leaves the quotes inside doubled.
        cells = cells.rename(lambda name: name.replace('""', '"').strip())
        return cells.with_columns(pl.all().str.strip_chars().replace("", None))
    except PolarsError as error:
        # Polars does not say where a CSV is wrong. This slow reader does.
        header, *lines = read_rows(path, delimiter) or [[]]
        for row, line in enumerate(lines, start=2):
            if len(line) > len(header):
                message = f"{path}: row {row} has {len(line)} cells, not {len(header)}"
                raise DataError(message) from None
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _header(path: Path) -> tuple[str, list[str]]:
    """What stands between the cells of a CSV, and the names of its columns.

    It is what makes a column of paths of the first line, else what makes the most columns of it.
    """
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        line = file.readline().rstrip("\r\n")
    headers = [
        (mark, [name.strip() for name in next(csv.reader([line], delimiter=mark), [])])
        for mark in DELIMITERS
    ]
    return max(headers, key=lambda each: (not {*PATH_COLUMNS}.isdisjoint(each[1]), len(each[1])))


def _read_parquet(path: Path, only: str | None) -> pl.DataFrame:
    # Arrow reads it. Polars asks for as much memory as a damaged file says, and then the process
    # dies.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as file:
        try:
            whole = ParquetFile(file)
            names = whole.schema_arrow.names
            if only is not None and only not in names:
                raise DataError(f"{path} has no column {only}, only: {', '.join(names)}")
            arrow = whole.read(None if only is None else [only])
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
    """A table with the columns path, split if it has one, and labels or classes (numbers)."""
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
    """The column of a class: 1, 0, -1 or null, as Int8; as Float32 where labels are soft."""
    name = column.name
    if name.endswith("_duplicated_0"):  # Polars has renamed it
        name = name.removesuffix("_duplicated_0")
        raise DataError(f"{table.path}: column {name} is there twice")
    marks = column
    if not column.dtype.is_numeric():
        text = _text(column, table.path).str.to_lowercase()
        # Spreadsheets that write semicolons between cells write commas in numbers.
        marks = text.replace({"true": "1", "false": "0"}).str.replace(",", ".", literal=True)
    marks = marks.cast(pl.Float64, strict=False)
    hard = marks.is_in([1.0, 0.0, -1.0]).fill_null(False)
    known = column.is_null() | hard | marks.is_between(0, 1).fill_null(False)
    _check(column, known, f"{{!r}} is not from 0 to 1, -1 or empty{_hint(name)}", table)
    return marks.cast(pl.Int8 if (hard | column.is_null()).all() else pl.Float32)


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
