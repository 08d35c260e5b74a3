"""Pictures that cannot be read: one line that names the file, nothing left behind."""

import io
import struct
import zlib

import pytest
from bad_input import PICTURE, cut, empty_folder, gone, put
from PIL import Image


def png_of(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff_of(mode):
    file = io.BytesIO()
    Image.new(mode, (40, 30)).save(file, "TIFF")
    return file.getvalue()


OPTIONS = {
    "negative": ("train coco --batch-size -4", 2, "batch_size is -4, but must be greater"),
    "huge image size": ("train coco --image-size 100000", 2, "must be less than or equal to 4096"),
    "no pixels": ("infer --max-pixels 0", 2, "max_pixels is 0"),
    "cache below a file": ("train coco --cache-dir prior.csv/cache", 2, "prior.csv"),
    "negative workers": ("validate coco --workers -1", 2, "workers is -1"),
}

IMAGES = {
    "missing image": ("train coco", 1, "1 of 2 images are missing", gone(PICTURE)),
    "no image at all": ("train coco --image-folder empty --missing-images skip", 1, "right folder"),
    "missing image of validation": ("validate coco", 1, "missing", gone("coco/val2014/2.png")),
    "empty image": ("train coco", 1, "the file is empty", put(PICTURE)),
    "image that is text": ("train coco", 1, "not an image", put(PICTURE, "no picture")),
    "image that is cut off": ("train coco", 1, "1.png", cut(PICTURE, 60)),
    "image that is a folder": (
        "train coco",
        1,
        "1.png",
        lambda root: (gone(PICTURE)(root), (root / PICTURE).mkdir()),
    ),
    "image that is a bomb": ("train coco", 1, "pixels", put(PICTURE, png_of(30_000, 30_000))),
    "picture in floating point": ("train coco", 1, "mode F", put(PICTURE, tiff_of("F"))),
    "picture of 32-bit integers": ("infer", 1, "mode I", put(PICTURE, tiff_of("I"))),
    "more bad images than may be skipped": (
        "train coco --bad-images skip",
        1,
        "more than 1 %",
        put(PICTURE),
    ),
    "text to label": ("infer", 1, "not an image", put(PICTURE, "no picture")),
    "bomb to label": ("infer", 1, "pixels", put(PICTURE, png_of(30_000, 30_000))),
    "cut image to validate": ("validate coco", 1, "2.png", cut("coco/val2014/2.png", 60)),
    "nothing to label": ("infer --pic-path none.png", 1, "none.png is not there"),
    "empty folder to label": ("infer --pic-path empty", 1, "no image", empty_folder),
    "folder without images to label": ("infer --pic-path voc/ImageSets", 1, "holds no image"),
}
CASES = {**OPTIONS, **IMAGES}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message_and_leaves_nothing(name, refused):
    # Training opens an image when its turn comes: by then the run has a folder.
    refused(*CASES[name], begun="new" if name in IMAGES else None)


@pytest.mark.parametrize("name", ["missing image of validation", "image that is cut off"])
def test_a_process_of_its_own_ends_the_same_way(name, refused):
    command, *expected = CASES[name]
    refused(f"{command} --workers 1", *expected, begun="new", alone=True)
