"""The arrays of a report: scores (N, C) are `metrics.Floats`, the others have names here."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]  # figures
Counts = npt.NDArray[np.integer[Any]]
Labels = npt.NDArray[np.int8]  # (N, C) targets in {1, 0, -1}
Mask = npt.NDArray[np.bool_]  # cells or images that are chosen
Rows = npt.NDArray[np.int64]  # numbers of images or classes
