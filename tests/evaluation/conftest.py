"""Data that the tests of text and of pictures use."""

from pathlib import Path

import numpy as np
import pytest

from asl.data.annotations import Annotations


@pytest.fixture(scope="session")
def long_tailed():
    """Builds 100 images of so many classes; class c is in the first 100 / (c + 1) of them."""

    def build(num_classes):
        images = [100 // (c + 1) for c in range(num_classes)]
        rows = np.concatenate([np.arange(n) for n in images])
        columns = np.repeat(np.arange(num_classes), images)
        files = np.array([b"%d.jpg" % i for i in range(100)])
        names = tuple(f"name{c}" for c in range(num_classes))
        return Annotations.from_cells(Path("x"), files, names, rows, columns, np.ones(len(rows)))

    return build
