"""Open Images V6: image-level labels that people verified, and by option those of a classifier.

oidv6-train-annotations-human-imagelabels.csv    ImageID,Source,LabelName,Confidence
validation-annotations-human-imagelabels.csv     000026e7ee790996,verification,/m/07j7r,1
test-annotations-human-imagelabels.csv
oidv6-classes-trainable.txt                      9,605 machine ids (MIDs), one a line
train/000026e7ee790996.jpg
"""

from pathlib import Path

import numpy as np
import polars as pl

from asl.data.annotations import UNANNOTATED, Annotations
from asl.data.files import no_split, not_found, read_lines
from asl.errors import DataError

CLASS_LIST = "oidv6-classes-trainable.txt"
HUMAN, MACHINE = "-annotations-human-imagelabels.csv", "-annotations-machine-imagelabels.csv"


def openimages(
    root: Path,
    split: str,
    *,
    machine_generated: float | None = None,
    class_list: str = CLASS_LIST,
    image_folder: str = "",
) -> Annotations:
    """Read `<split>-annotations-human-imagelabels.csv`: what it does not say is not annotated.

    Classes are the MIDs of `class_list`, in its order; labels of other classes are left out, and so
    are images that have no others. Images come in the order of their ids. With `machine_generated`,
    a confidence in (0, 1], the classifier's labels (`...-machine-imagelabels.csv`) that are at
    least so confident count as present, in cells that no person has verified.

    The CSVs lie in `root` or `root/annotations/`, with or without "oidv6-" before their names, the
    images in `image_folder` (relative to `root`, by default `<split>/`).

    Raises `DataError` that names the file, and row and column of a cell that is wrong.
    """
    human, listed, *machine, folder = sources(
        root,
        split,
        machine_generated=machine_generated,
        class_list=class_list,
        image_folder=image_folder,
    )
    classes = [line.strip() for line in read_lines(listed) if line.strip()]
    if len({*classes}) < max(len(classes), 1):
        raise DataError(f"{listed} lists no class, or one of them twice")
    cells = _read(human, classes)
    for path in machine:
        guesses = _read(path, classes, machine_generated)
        cells = pl.concat([cells, guesses.join(cells, on=["image", "column"], how="anti")])
    if cells.is_empty():
        raise DataError(f"{human} has no label of the classes of {listed}")
    images = cells["image"].unique().sort().to_numpy()
    ids = np.frombuffer(images.astype(">u8").tobytes().hex().encode(), dtype="S16")
    files = np.char.add(ids, b".jpg")
    rows = np.searchsorted(images, cells["image"].to_numpy())
    columns, values = cells["column"].to_numpy(), cells["value"].to_numpy()
    return Annotations.from_cells(folder, files, tuple(classes), rows, columns, values, UNANNOTATED)


def splits(root: Path) -> list[str]:
    """The splits that have a file of human-verified labels."""
    paths = [*root.glob(f"*{HUMAN}"), *root.glob(f"annotations/*{HUMAN}")]
    return sorted({path.name.removeprefix("oidv6-").removesuffix(HUMAN) for path in paths})


def sources(
    root: Path,
    split: str,
    *,
    machine_generated: float | None = None,
    class_list: str = CLASS_LIST,
    image_folder: str = "",
) -> list[Path]:
    """The label CSV, the class list, perhaps the classifier's CSV; then the images' folder."""
    if split not in splits(root):
        raise no_split(split, splits(root), root / f"{split}{HUMAN}")
    paths = [_find(root, split + HUMAN), _find(root, class_list)]
    if machine_generated is not None:
        paths.append(_find(root, split + MACHINE))
    return [*paths, root / (image_folder or split)]


def _find(root: Path, name: str) -> Path:
    for folder in (root, root / "annotations"):
        for path in (folder / name, folder / f"oidv6-{name}"):
            if path.is_file():
                return path
    raise not_found(root / name)


def _read(path: Path, classes: list[str], at_least: float | None = None) -> pl.DataFrame:
    """The labels of the listed classes: image (its id as a number), column (class), value (1 or 0).

    With `at_least`, confidences are fractions: those that reach it are labels of 1, the rest none.
    """
    confidence = pl.col("Confidence").cast(pl.Float64, strict=False)
    if at_least is None:
        value, right = confidence, confidence.is_in([0.0, 1.0])
    else:
        value, right = pl.when(confidence >= at_least).then(1), confidence.is_between(0, 1)
    good = pl.all_horizontal(
        pl.col("ImageID").str.contains("^[0-9a-f]{16}$"),
        ~pl.col("LabelName").str.contains("\N{REPLACEMENT CHARACTER}", literal=True),
        right,
    ).fill_null(False)
    # Bytes that are not UTF-8 become the replacement character, so that their row can be named.
    labels = pl.scan_csv(path, infer_schema=False, encoding="utf8-lossy")
    cells = labels.select(
        image=pl.col("ImageID").str.to_integer(base=16, dtype=pl.UInt64, strict=False),
        column=pl.col("LabelName").cast(pl.Enum(classes), strict=False).to_physical(),
        value=value.cast(pl.Int8),
        good=good,
    ).filter(~pl.col("good") | (pl.col("column").is_not_null() & pl.col("value").is_not_null()))
    try:
        known = cells.collect(engine="streaming")
        if known["good"].all():
            return known.drop("good")
        row, *texts = labels.with_row_index(offset=2).filter(~good).head(1).collect().row(0)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    raise DataError(f"{path}: row {row}: not a label: {','.join(map(str, texts))!r}")
