"""Data, a model and pictures that several tests of this wing use."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asl.data.annotations import Annotations
from asl.models import checkpoint
from asl.models.build import create_model


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


CLASSES = ("cat", "dog", "bird", "boat", "car")


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """The checkpoint of a small model of five classes, whose scores are spread around 1/2."""
    torch.manual_seed(0)
    model = create_model("test_resnet", len(CLASSES))
    model.get_classifier().weight.data.mul_(30)
    path = tmp_path_factory.mktemp("untrained") / "model.pt"
    about = {"model": model.state_dict(), "idx_to_class": dict(enumerate(CLASSES))}
    config = {"model_name": "test_resnet", "image_size": 64}
    checkpoint.save(path, {**about, "num_classes": len(CLASSES), "config": config})
    return path


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of nine pictures of several kinds and sizes, two of them in a folder below."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    (root / "below").mkdir()
    for number in range(9):
        size = (int(rng.integers(40, 200)), int(rng.integers(40, 200)))
        noise = rng.integers(256, size=(3, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        folder = root / "below" if number > 6 else root
        picture.save(folder / f"{number}.{('jpg', 'png', 'webp')[number % 3]}")
    return root
