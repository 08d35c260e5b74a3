"""Which images of a data set are in which shards of a cache, and which are in none."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asl.data.annotations import Annotations
from asl.data.extents import size_and_time
from asl.images.cache.shards import ROW, SUFFIX, Damaged, Rows, Shard, path_keys

# At least so many files are looked at when a cache is opened, and all of a set of fewer than twice
# as many. A stat takes 5 to 20 microseconds on a local disk: for 1.7 million files that is 8 to
# 35 s, in every process, and many times that on a network file system.
LOOKED_AT = 200_000
CHECKED = 16  # images whose checksum is computed, at least
log = logging.getLogger("asl")


class Missing:
    """The images of a data set that a cache lacks, each once, in the order of the data set."""

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

    `rows` (N,) of `shards.ROW` and `shard` (N,), a number of `paths` or -1, say where they are.
    """

    def __init__(self, annotations: Annotations, folder: Path) -> None:
        self.annotations, self.folder = annotations, folder
        self.paths: list[Path] = []
        self.rows: Rows = np.zeros(len(annotations), ROW)
        self.rows["path"] = path_keys(annotations.files)
        self.shard = np.full(len(annotations), -1, np.int32)
        self._looked_at = np.zeros(len(annotations), bool)

    def missing(self, mend: bool) -> Missing:
        """Search the folder as it is now; returns the images that are not there.

        Looks at the header, the length and the table of each shard and the checksums of 16 or more
        images. With `mend`, shards that are damaged are removed, with a warning. Their names are
        never used again.
        """
        damaged: list[tuple[Path, Damaged]] = []
        shards = list(_loaded(self.folder, damaged))
        while True:
            rows = np.concatenate([np.empty(0, ROW), *(shard.rows for shard in shards)])
            sizes = [len(shard.rows) for shard in shards]
            number = np.repeat(np.arange(len(shards)), sizes)
            place = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            found = self._match(rows)
            checked = found[_spread(len(found), CHECKED)]
            broken = _first_damaged(
                shards, [(number[row], place[row]) for row in checked if row >= 0]
            )
            if broken is None:
                break
            damaged.append((shards.pop(broken[0]).path, broken[1]))
        for path, error in damaged if mend else ():
            log.warning("%s %s: its images are built anew", path, error)
            with suppress(OSError):
                path.unlink()
        there = found >= 0
        self.paths = [shard.path for shard in shards]
        self.rows[there], self.shard[there] = rows[found[there]], number[found[there]]
        lacking = np.flatnonzero(~there)
        return Missing(self.annotations, lacking, self.rows[lacking])

    def _match(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Which of the rows each image is; -1 where there is none.

        Files of a large set are looked at only where there is a doubt: one that is not looked at
        agrees with the only row of its path.
        """
        order = np.argsort(rows["path"])
        paths, mine = rows["path"][order], np.argsort(self.rows["path"])
        first, last = np.empty((2, len(mine)), np.int64)
        wanted = self.rows["path"][mine]  # sorted, they are found in a fifth of the time
        first[mine] = np.searchsorted(paths, wanted)
        last[mine] = np.searchsorted(paths, wanted, "right")
        doubtful = last - first > 1
        doubtful[_spread(len(mine), LOOKED_AT)] = True
        while True:
            self._look_at(doubtful)
            found = np.full(len(mine), -1)
            for nth in range(int((last - first).max(initial=0))):
                row = order[np.minimum(first + nth, len(rows) - 1)]
                same = first + nth < last
                for name in ("size", "time"):
                    same &= ~self._looked_at | (rows[name][row] == self.rows[name])
                found[same] = row[same]
            if self._looked_at.all() or (found >= 0).all():
                return found
            doubtful[:] = True

    def _look_at(self, which: npt.NDArray[np.bool_]) -> None:
        """Note the sizes and times of these files, but of each once."""
        for index in np.flatnonzero(which & ~self._looked_at).tolist():
            try:
                about = size_and_time(self.annotations.path(index))
            except OSError:  # to be said when it is read
                about = -1, -1
            self.rows["size"][index], self.rows["time"][index] = about
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


def _first_damaged(
    shards: list[Shard], places: list[tuple[int, int]]
) -> tuple[int, Damaged] | None:
    """The first shard of these (shard, row) whose image is not what was written."""
    for number, row in places:
        try:
            shards[number].check(row)
        except Damaged as error:
            return number, error
    return None


def _spread(count: int, least: int) -> slice:
    """Numbers below `count`, evenly spread: at least `least`, and all of fewer than twice that."""
    return slice(0, count, max(1, count // least))
