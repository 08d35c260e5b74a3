"""Data that several test files use: a small drawn set, and real photographs where they are."""

import os
from pathlib import Path

import pytest
import torch

from asl.data.readers.shapes import draw_shapes

SHARED = Path(__file__).parents[2] / "shared" / "data"

# Tests run side by side: more threads would only get into each other's way. And the processes that
# a test starts round as it does.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def small_shapes(tmp_path_factory):
    """A folder in COCO's layout: 40 training and 20 validation images of 24 classes."""
    root = tmp_path_factory.mktemp("shapes")
    draw_shapes(root, train=40, val=20, processes=1)
    return root


@pytest.fixture(scope="session")
def voc_root():
    """The folder VOCdevkit of a user's own copy of Pascal VOC 2007."""
    root = Path(os.environ.get("ASL_VOC_ROOT", SHARED / "VOCdevkit"))
    if not root.is_dir():
        pytest.skip("no photographs: set ASL_VOC_ROOT to a VOCdevkit folder")
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Parsed annotations of a test stay in its own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
