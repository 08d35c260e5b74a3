"""Which images of a data set are in which shards of a cache, and which are in none."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asl.data.annotations import Annotations
from asl.data.extents import size_and_time
from asl.images.cache.shards import ROW, SUFFIX, Damaged, Rows, Shard, check, path_keys

# At least so many files are looked at when a cache is opened, and all of a set of fewer than twice
# as many. A stat takes 5 to 20 microseconds on a local disk: for 1.7 million files that is 8 to
# 35 s, in every process, and many times that on a network file system.
LOOKED_AT = 200_000
BITS = 24  # of a key: a table of 16 MB
CHECKED = 16  # images whose checksum is computed, at least
log = logging.getLogger("asl")


class Missing:
    """The images of a data set that a cache lacks, each once, in the order of the data set.

    `indices` and `rows` (of `shards.ROW`, with paths, sizes and times) may have some repeatedly.
    """

    def __init__(
        self, annotations: Annotations, indices: npt.NDArray[np.int64], rows: Rows
    ) -> None:
        _, first = np.unique(rows["path"], return_index=True)
        first.sort()
        self.annotations, self.indices, self.rows = annotations, indices[first], rows[first]
        self._order = np.argsort(self.rows["path"])
        self._paths = self.rows["path"][self._order]

    def __len__(self) -> int:
        return len(self.rows)

    def within(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Which of the images are among the rows of a shard: their numbers here."""
        at = np.searchsorted(self._paths, rows["path"]).clip(max=len(self) - 1)
        here = self._order[at]
        same = [self.rows[here][name] == rows[name] for name in ("path", "size", "time")]
        found: npt.NDArray[np.int64] = here[np.logical_and.reduce(same)]
        return found


class Search:
    """A search of the N images of a data set in the shards of a folder.

    `shard` (N,), a number of `paths` or -1, `offset` and `length` (N,) say where they are.
    """

    def __init__(self, annotations: Annotations, folder: Path) -> None:
        self.annotations, self.folder = annotations, folder
        count = len(annotations)
        self.paths: list[Path] = []
        self.shard = np.full(count, -1, np.int32)
        self.offset, self.length = np.zeros(count, np.int64), np.zeros(count, np.uint32)
        self._key = path_keys(annotations.files)
        self._size, self._time = np.zeros((2, count), np.int64)
        self._looked_at = np.zeros(count, bool)

    def missing(self, mend: bool) -> Missing:
        """Search the folder as it is now; returns the images that are not there.

        Looks at the header, the length and the table of each shard and the checksums of 16 or more
        images. With `mend`, shards that are damaged are removed, with a warning. Their names are
        never used again.
        """
        damaged: list[tuple[Path, Damaged]] = []
        number, rows = self._rows(damaged)
        while True:
            found = self._match(rows)
            broken = self._first_damaged(number, rows, found[_spread(len(found), CHECKED)])
            if broken is None:
                break
            shard, error = broken
            damaged.append((self.paths[shard], error))
            number, rows = number[number != shard], rows[number != shard]
        for path, error in damaged if mend else ():
            log.warning("%s %s: its images are built anew", path, error)
            with suppress(OSError):
                path.unlink()
        there, lacking = np.flatnonzero(found >= 0), np.flatnonzero(found < 0)
        found = found[there]
        self.shard[there] = number[found]
        self.offset[there], self.length[there] = rows["offset"][found], rows["length"][found]
        wanted = np.zeros(len(lacking), ROW)
        for name, values in (("path", self._key), ("size", self._size), ("time", self._time)):
            wanted[name] = values[lacking]
        return Missing(self.annotations, lacking, wanted)

    def _rows(self, damaged: list[tuple[Path, Damaged]]) -> tuple[npt.NDArray[np.int32], Rows]:
        """The rows of all shards that may be of these images, and the number of each one's shard.

        Shards that are not whole are appended to `damaged`.
        """
        # Nearly all rows of other images are left out by the first bits of their keys, or a
        # small split would have to sort the rows of all the others, 9 million of Open Images.
        begins = np.zeros(1 << BITS, bool)
        shift = np.uint64(64 - BITS)
        begins[self._key >> shift] = True
        tables = {
            shard.path: shard.rows[begins[shard.rows["path"] >> shift]]
            for shard in _loaded(self.folder, damaged)
        }
        self.paths = list(tables)
        number = np.repeat(np.arange(len(tables), dtype=np.int32), [*map(len, tables.values())])
        return number, np.concatenate([np.empty(0, ROW), *tables.values()])

    def _match(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Which of the rows each image is; -1 where there is none.

        Files of a large set are looked at only where there is a doubt: one that is not looked at
        agrees with the only row of its path.
        """
        # Images go by in the order of their keys, so that what is looked up lies side by side.
        order, images = np.argsort(rows["path"]), np.argsort(self._key)
        keys, wanted = rows["path"][order], self._key[images]
        first, last = np.searchsorted(keys, wanted), np.searchsorted(keys, wanted, "right")
        del keys, wanted
        doubtful = np.zeros(len(images), bool)
        doubtful[images[last - first > 1]] = True
        doubtful[_spread(len(images), LOOKED_AT)] = True
        while True:
            self._look_at(doubtful)
            known = np.flatnonzero(self._looked_at[images])
            size, time = self._size[images[known]], self._time[images[known]]
            found = np.full(len(images), -1)
            for nth in range(int((last - first).max(initial=0))):
                row = order[np.minimum(first + nth, len(rows) - 1)]
                same = first + nth < last
                same[known] &= rows["size"][row[known]] == size
                same[known] &= rows["time"][row[known]] == time
                found[images[same]] = row[same]
            if self._looked_at.all() or (found >= 0).all():
                return found
            doubtful[:] = True

    def _first_damaged(
        self, number: npt.NDArray[np.int32], rows: Rows, checked: npt.NDArray[np.int64]
    ) -> tuple[int, Damaged] | None:
        """The first shard, by number, of these rows whose image is not what was written."""
        for row in checked[checked >= 0]:
            shard = int(number[row])
            try:
                check(self.paths[shard], rows[row])
            except Damaged as error:
                return shard, error
        return None

    def _look_at(self, which: npt.NDArray[np.bool_]) -> None:
        """Note the sizes and times of these files, but of each once."""
        for index in np.flatnonzero(which & ~self._looked_at).tolist():
            try:
                about = size_and_time(self.annotations.path(index))
            except OSError:  # to be said when it is read
                about = -1, -1
            self._size[index], self._time[index] = about
        self._looked_at |= which


def _loaded(folder: Path, damaged: list[tuple[Path, Damaged]]) -> Iterator[Shard]:
    """The shards in a folder; those that are not whole are appended to `damaged`."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            yield Shard.load(path)
        except FileNotFoundError:  # another process has removed it, as it was damaged
            pass
        except Damaged as error:
            damaged.append((path, error))


def _spread(count: int, least: int) -> slice:
    """Numbers below `count`, evenly spread: at least `least`, and all of fewer than twice that."""
    return slice(0, count, max(1, count // least))
