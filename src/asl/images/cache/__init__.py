"""The image cache: the squished images of data sets in shards, so that no epoch decodes them.

`shards` is the format, `find` looks up what is there, `build` makes what is missing, and
`python -m asl.images.cache DIR` lists, verifies and prunes.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from asl.data.annotations import Annotations
from asl.errors import DataError, UsageError
from asl.images.cache.build import build_shards, image_bytes
from asl.images.cache.find import Search
from asl.images.cache.shards import Damaged, Kind
from asl.images.decode import read_squished
from asl.images.settings import BadImages, ImageSettings

OPEN_SHARDS = 256  # files that a process keeps open; systems allow 1,024 and fewer


class ImageCache:
    """The N squished images of a data set, in shards. `open` finds them and builds what is missing.

    May be used in forked and in spawned processes, all of which share the pages of the files that
    are in memory.
    """

    def __init__(self, annotations: Annotations, settings: ImageSettings, found: Search) -> None:
        self.annotations, self.settings, self.kind = annotations, settings, Kind.of(settings)
        self._paths, self._shard = found.paths, found.shard
        self._offset, self._length = found.offset, found.length
        self._descriptors: dict[int, int] = {}

    @classmethod
    def open(
        cls,
        annotations: Annotations,
        settings: ImageSettings,
        *,
        workers: int,
        bad: BadImages = "error",
    ) -> "ImageCache":
        """The cache of these images in `settings.cache_dir`; `workers` processes build what lacks.

        What it returns for an image is `read_squished(path, settings)`, to the bit where images are
        kept raw.

        An image belongs to the path of its file in the folder of the data set, and to the size and
        the time of change of that file. All splits and data sets share the shards, and images that
        are added go into new ones. Images of another size, turned by EXIF, or decoded to other
        pixels (`shards.fingerprint`) go into another folder, and none is deleted.

        Every opening looks at files, all in sets of up to 400,000, at all shards, and at 16 or more
        images: see `Search`. The images of a damaged shard are built anew, with a warning. Several
        runs, ranks and machines build together.

        Raises `DataError` that names an image which cannot be read; with `bad` "skip", `read`
        raises it for that image alone. Raises `UsageError` if the disk has too little space, before
        anything is built, and if the folder cannot be written to. What is complete by then stays.
        """
        folder = Path(settings.cache_dir) / Kind.of(settings).name
        try:
            search = Search(annotations, folder)
            missing = search.missing(mend=True)
            if len(missing):
                build_shards(missing, folder, settings, workers, bad)
                if len(search.missing(mend=True)):
                    raise UsageError(f"{folder} does not keep what is written to it")
        except OSError as error:
            raise UsageError(f"the image cache {folder}: {error.strerror or error}") from error
        cache = cls(annotations, settings, search)
        if bad == "error":  # the cache may have been built with "skip"
            for index in np.flatnonzero(cache._length == 0).tolist():
                read_squished(annotations.path(index), settings)
        return cache

    def __len__(self) -> int:
        return len(self.annotations)

    @property
    def planar(self) -> bool:
        """Whether images come channel by channel, which is how raw ones are kept."""
        return not self.kind.quality

    def read(self, index: int, out: Tensor) -> None:
        """Copy image `index` into `out`, a (3, S, S) uint8 tensor on the CPU.

        It must be contiguous where the cache is `planar`; others come faster channels last.

        An image that could not be read when the cache was built is read from its file: usually that
        raises the same `DataError` as then.
        """
        length = int(self._length[index])
        if not length:
            read_squished(self.annotations.path(index), self.settings, out)
            return
        shard = int(self._shard[index])
        try:
            descriptor = self._descriptor(shard)
            self.kind.unpack(descriptor, int(self._offset[index]), length, out)
        except OSError as error:
            raise DataError(f"{self._paths[shard]}: {error.strerror}") from error
        except Damaged as error:
            raise DataError(
                f"{self._paths[shard]} {error}: to build it anew, remove it and start again"
            ) from None

    def read_ahead(self, indices: npt.NDArray[np.int64]) -> None:
        """Let the system read these images into its memory, while this process goes on."""
        if not hasattr(os, "posix_fadvise"):  # on macOS
            return
        for index in indices.tolist():
            length = int(self._length[index])
            if not length:  # which would mean all of the shard
                continue
            with suppress(OSError):  # reading says what is wrong
                place = self._descriptor(int(self._shard[index])), int(self._offset[index])
                os.posix_fadvise(*place, length, os.POSIX_FADV_WILLNEED)

    @property
    def bytes(self) -> int:
        """What the images take on the disk."""
        return int(self._length.sum(dtype=np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptors": {}}  # a spawned process opens the files itself

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            if len(self._descriptors) >= OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[shard] = os.open(self._paths[shard], os.O_RDONLY)
        return self._descriptors[shard]


def bytes_to_build(annotations: Annotations, settings: ImageSettings) -> int:
    """How much opening a cache of these images would write, about. Writes nothing itself."""
    kind = Kind.of(settings)
    missing = Search(annotations, Path(settings.cache_dir) / kind.name).missing(mend=False)
    return len(missing) * image_bytes(missing, settings)
