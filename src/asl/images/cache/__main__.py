"""What is in a cache of images: `python -m asl.images.cache DIR`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

from asl.errors import DataError, UsageError, reported
from asl.images.cache.build import remove_dead_drafts
from asl.images.cache.shards import FIRST_EDITION, SUFFIX, Damaged, Shard, check


def main(
    folder: Annotated[Path, tyro.conf.Positional], verify: bool = False, prune: bool = False
) -> None:
    """List what a cache of images (--cache-dir) holds, a line for each kind and data set.

    Args:
        folder: the cache
        verify: read every image and compare its checksum, which takes as long as the disk
        prune: remove shards that are damaged, that other decoders have made, and whose pictures
            are all gone or changed; files of earlier versions; and what killed builds have left
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    found, useless = look(folder, verify)
    print("\n".join(listing(found)) or f"{folder} holds no shards")
    if prune:
        outdated = [shard.path for shard in found if shard.outdated()]
        useless |= dict.fromkeys(outdated, "has no picture that is as it was")
    for path, reason in useless.items():
        print(f"{path} {reason}{': removed' if prune else ''}")
        if prune:
            path.unlink(missing_ok=True)
    for kind in {path.parent for path in folder.glob("*/.lock")} if prune else ():
        remove_dead_drafts(kind)
    if useless and not prune:
        raise DataError(f"{len(useless)} files are of no use: --prune removes them")


def look(folder: Path, verify: bool) -> tuple[list[Shard], dict[Path, str]]:
    """The shards that are of use, and what is wrong with the others, by path."""
    found, useless = [], {}
    for path in sorted(folder.glob(f"*{FIRST_EDITION}")):
        useless[path] = "is of an earlier version"
    for path in tqdm(sorted(folder.glob(f"*/*{SUFFIX}")), unit="shard", leave=False):
        try:
            shard = Shard.load(path)
            if not shard.kind.is_current:
                useless[path] = "was made by other decoders"
                continue
            for row in shard.rows if verify else ():
                check(path, row)
            found.append(shard)
        except Damaged as error:
            useless[path] = str(error)
    return found, useless


def listing(found: list[Shard]) -> Iterator[str]:
    """A line for each kind and data set."""
    groups: dict[tuple[str, str], list[Shard]] = {}
    for shard in found:
        groups.setdefault((shard.path.parent.name, shard.root), []).append(shard)
    for (name, root), shards in sorted(groups.items()):
        rows = np.concatenate([shard.rows for shard in shards])
        unreadable = int((rows["length"] == 0).sum())
        said = f", {unreadable:,} of them unreadable" if unreadable else ""
        size = sum(shard.path.stat().st_size for shard in shards)
        yield (
            f"{name}  {len(rows):,} images{said}, {size / 1e9:,.2f} GB in {len(shards):,} shards, "
            f"of {root}"
        )


if __name__ == "__main__":
    with reported():
        tyro.cli(main, prog="python -m asl.images.cache")
