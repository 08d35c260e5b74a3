"""Cross-fitting: every image is judged by what was fitted to others."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[Any]
FOLDS = 5


def out_of_fold(
    fit: Callable[[Table, Table], Callable[[Table], Table]],
    scores: Table,
    targets: Table,
    folds: int = FOLDS,
    seed: int = 0,
) -> npt.NDArray[np.float32]:
    """Apply to every image what `fit` makes of the images of all other folds: (N, C).

    `fit` takes (n, C) scores and targets, and returns what maps (m, C) scores to (m, C) values.
    Folds are drawn from the seed and differ by one image at most. Near duplicates may lie in
    different folds: the figures are for images like these, as every split at random gives them.

    Raises `ValueError` for fewer images than folds.
    """
    if len(scores) < folds:
        raise ValueError(f"{len(scores)} images for {folds} folds")
    fold = np.random.default_rng(seed).permutation(len(scores)) % folds
    made = np.empty(scores.shape, np.float32)
    for number in range(folds):
        held = fold == number
        made[held] = fit(scores[~held], targets[~held])(scores[held])
    return made
