"""Training and validation images of a data set that has no splits of its own: drawn from it."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from asl.data.annotations import Annotations
from asl.data.files import no_split
from asl.data.stratify import stratified_parts
from asl.errors import UsageError

DRAWN = ["train", "val"]
VAL_SHARE = 0.2


class Draw(NamedTuple):
    """How it is drawn: the settings of these names, None and False where they say nothing.

    An image is for validation with probability `val_share` (0.2), which depends on `split_seed` and
    its path alone: images that are added later do not move the others. With `folds`, it is one of
    so many folds that is for validation, number `fold` from 0 on.

    With `stratify`, every class is as frequent in the parts as in the whole, rare ones too (as
    `stratified_parts` deals them). That depends on all images and labels.
    """

    val_share: float | None = None
    split_seed: int | None = None
    stratify: bool = False
    folds: int | None = None
    fold: int | None = None

    def part(self, whole: Annotations, split: str, root: Path) -> Annotations:
        """The images of `split`, "train" or "val", of the data set at `root`.

        Raises `UsageError` for another split, and for settings that contradict each other.
        """
        if split not in DRAWN:
            raise no_split(split, DRAWN, root)
        held_out = np.asarray(self._held_out(whole), dtype=bool)
        part = whole.subset(held_out if split == "val" else ~held_out)
        if not len(part):
            raise UsageError(f"{root}: of {len(whole):,} images none is drawn for {split}")
        return part

    def check_unused(self, root: Path) -> None:
        """Check that a data set with splits of its own is not to be drawn from as well."""
        for name, value in self._asdict().items():
            if value is not None and value is not False:
                raise UsageError(f"{root} has splits of its own: drop {name}, or the splits")

    def _held_out(self, whole: Annotations) -> Any:
        seed, fold = self.split_seed or 0, self.fold or 0
        if self.folds is None:
            if self.fold is not None:
                raise UsageError(f"fold {fold} of how many? Give folds too")
            share = VAL_SHARE if self.val_share is None else self.val_share
            if self.stratify:
                return stratified_parts(whole, (1 - share, share), seed) == 1
            return _draws(whole, seed) < share
        if self.val_share is not None:
            raise UsageError("val_share and folds both say how many are validated on: drop one")
        if fold >= self.folds:
            raise UsageError(f"there is no fold {fold}: the {self.folds} folds count from 0")
        if self.stratify:
            return stratified_parts(whole, self.folds, seed) == fold
        return np.floor(_draws(whole, seed) * self.folds) == fold


def _draws(whole: Annotations, seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each image, which depends on its path and the seed alone."""
    names = (f"{seed} ".encode() + bytes(file) for file in whole.files)
    digests = (hashlib.blake2b(name, digest_size=8).digest() for name in names)
    numbers = (int.from_bytes(digest, "big") / 2**64 for digest in digests)
    return np.fromiter(numbers, np.float64, len(whole))
