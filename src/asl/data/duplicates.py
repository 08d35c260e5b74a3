"""Images that stand in several splits under different names: found by what is in their files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from tqdm import tqdm

from asl.data.annotations import Annotations
from asl.data.files import unreadable

END = 4096  # bytes at the end of a file


def identical_files(splits: Sequence[Annotations]) -> list[tuple[str, str]]:
    """Images of different splits that have the same content, but are not the same file.

    A pair of paths for each image of a later split that is identical to one of an earlier split. An
    image that stands in several splits (VOC's trainval holds train) counts in the first of them.

    Memory: about 50 bytes an image. Raises `DataError` for a file that cannot be read.
    """
    images = pl.concat(
        pl.select(split=pl.lit(number), row=pl.int_range(len(each)))
        for number, each in enumerate(splits)
    )
    # Each comparison reads more of a file than the one before, but only of the files that are left.
    for compared in ("sizes", "ends", "content"):
        paths = (splits[s].path(r) for s, r, *_ in images.iter_rows())
        title = f"comparing {compared}"
        bar = tqdm(paths, title, len(images), unit="img", leave=False, disable=None)
        keys = pl.Series((_key(path, compared) for path in bar), dtype=pl.Int64)
        images = images.with_columns(key=keys).filter(
            pl.col("split").min().over("key") != pl.col("split").max().over("key")
        )

    pairs = []
    split_of: dict[str, int] = {}
    first_of: dict[int, str] = {}
    for s, r, key in images.iter_rows():
        path = splits[s].path(r)
        if path not in split_of:
            split_of[path] = s
            original = first_of.setdefault(key, path)
            if split_of[original] != s:
                pairs.append((original, path))
    return pairs


def _key(path: str, compared: str) -> int:
    """A number that files have in common if they are equal in what is `compared`."""
    try:
        size = Path(path).stat().st_size
        if compared == "sizes":
            return size
        with Path(path).open("rb") as file:
            file.seek(max(0, size - END) if compared == "ends" else 0)
            digest = hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise unreadable(Path(path), error) from error
    return int.from_bytes(digest[:8], signed=True)
