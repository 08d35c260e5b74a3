"""mAP by class: this project, scikit-learn's function in a loop, and the official code's method.

Prints a Markdown table. Times are medians of interleaved rounds in one process on one thread: read
the ratios, not the milliseconds. Extra memory is the peak of what a call allocates.
"""

import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from asl.metrics import average_precision

Array = npt.NDArray[Any]
SIZES = [  # images, classes, dtype, rounds; 40,137 x 80 is MS-COCO val2014
    (40_137, 80, np.float32, 5),
    (40_137, 80, np.float16, 5),
    (5_000, 9_605, np.float16, 3),
]
POSITIVES = 0.036  # MS-COCO: 2.9 of 80


def scikit_learn(scores: Array, targets: Array) -> Array:
    columns = zip(scores.T, targets.T, strict=True)
    return np.array([average_precision_score(target, score) for score, target in columns])


def official(scores: Array, targets: Array) -> Array:
    """The method of the official ASL code: an argsort and cumulative sums for each class."""
    ap = np.zeros(scores.shape[1])
    for c in range(scores.shape[1]):
        hit = targets[:, c][scores[:, c].argsort()[::-1]] == 1
        precision = np.cumsum(hit) / np.cumsum(np.ones(len(hit)))
        ap[c] = precision[hit].sum() / (hit.sum() + 1e-8)
    return ap


def draw(images: int, classes: int, dtype: type) -> tuple[Array, Array]:
    """Scores that know something, and at least one positive in every class."""
    rng = np.random.default_rng(0)
    targets = rng.random((images, classes), dtype=np.float32) < POSITIVES
    targets[0] = True
    scores = rng.standard_normal((images, classes), dtype=np.float32)
    scores += 2 * targets
    return (1 / (1 + np.exp(-scores))).astype(dtype), targets.astype(np.int8)


def peak(measure: Callable[[Array, Array], Array], scores: Array, targets: Array) -> int:
    tracemalloc.start()
    measure(scores, targets)
    _, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return highest


def main() -> None:
    print(f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}\n")
    print("| scores | asl | scikit-learn | official | scikit-learn / asl | official / asl", end=" ")
    print("| extra memory of asl |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for images, classes, dtype, rounds in SIZES:
        scores, targets = draw(images, classes, dtype)
        measures = (average_precision, scikit_learn, official)
        seconds: list[list[float]] = [[], [], []]
        for _ in range(rounds):
            for measure, taken in zip(measures, seconds, strict=True):
                start = time.perf_counter()
                ap = measure(scores, targets)
                taken.append(time.perf_counter() - start)
                if measure is scikit_learn:  # the official method leaves ties to chance
                    np.testing.assert_allclose(ap, average_precision(scores, targets), 1e-9)
        ours, sklearn, theirs = (1000 * statistics.median(taken) for taken in seconds)
        extra = peak(average_precision, scores, targets)
        share = extra / (scores.nbytes + targets.nbytes)
        print(
            f"| {images:,} x {classes:,} {np.dtype(dtype)} "
            f"| {ours:,.0f} ms | {sklearn:,.0f} ms | {theirs:,.0f} ms "
            f"| {sklearn / ours:.1f} x | {theirs / ours:.1f} x "
            f"| {extra / 2**20:.0f} MiB = {share:.0%} of the input |",
            flush=True,
        )


if __name__ == "__main__":
    main()
