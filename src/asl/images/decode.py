"""From a file to a (3, S, S) uint8 image: decode, then squish.

Squishing (no crop, aspect ratio given up) is what the papers do, and has no randomness: every epoch
sees the same squished image, which makes it the thing to cache. Nothing here looks at labels.
"""

import io
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, TILELENGTH, TILEWIDTH, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor
from torch.nn.functional import interpolate

from asl.data.extents import extent
from asl.data.files import EXTENSIONS
from asl.errors import DataError
from asl.images.settings import MAX_PIXELS, ImageSettings
from asl.images.torch_private import decode_jpeg

# A JPEG may come in scans, each of which visits every pixel: about ten in a progressive one. A
# hostile one asks for thousands, at 11 bytes each: hours from one megabyte.
MAX_SCANS = 100
START_OF_SCAN = re.compile(b"\xff\xda")  # counted in two thirds of the time of bytes.count
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # neither FF 00, a plain FF, nor a restart

# By what a file starts with. Pillow's dozens of other formats are left out: some run a program
# (PostScript), few are ever fuzzed, and none is what a data set comes in.
FORMATS: dict[bytes, type[ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG": PngImageFile,
    b"RIFF": WebPImageFile,
    b"GIF8": GifImageFile,
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
}


# A file by its path or by its content, a picture of Pillow, or an array as Pillow takes it.
Source = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any]


def read_image(
    source: Source, max_pixels: int = MAX_PIXELS, exif_rotate: bool = False, draft: int = 0
) -> Tensor:
    """The picture in a file as a (3, H, W) uint8 RGB tensor, values 0..255.

    JPEG, PNG, WebP, GIF, BMP or TIFF, whatever the name of the file says. Greyscale becomes three
    equal channels, and greyscale of 12 or 16 bits keeps the upper eight. Animations give their
    first frame. Transparency is dropped. EXIF rotation is not applied (as in the official code)
    unless `exif_rotate` asks for it; that of a TIFF is always, by Pillow.

    With `draft`, a JPEG comes at a half, a quarter or an eighth of its size, where both of its
    sides still have `draft` pixels then: libjpeg leaves out what only larger ones show.

    In place of a path there may be the file's content, a picture of Pillow, or an array: (H, W, 3)
    uint8, in RGB and not in OpenCV's order, or another that `PIL.Image.fromarray` takes.

    Raises `DataError`, one line with the path, if it is one, and the reason, for anything that
    cannot be read in full, for what is not a regular file, for floating point and 32-bit integers,
    whose range no file tells, and for a picture of more than `max_pixels`, before it is decoded.
    Where that is above Pillow's limit for the whole process, it raises Pillow's limit.
    """
    place = f"{os.fspath(source)}: " if isinstance(source, str | os.PathLike) else ""
    try:
        if isinstance(source, str | os.PathLike):
            source = _content(source, max_bytes=8 * max(max_pixels, MAX_PIXELS))
        return _read(source, max_pixels, exif_rotate, draft)
    except DataError as error:
        raise DataError(f"{place}{error}") from None
    except Image.DecompressionBombError:  # said while the header is read, or of a part of a picture
        raise DataError(f"{place}more pixels than the limit of {max_pixels:,}") from None
    except Exception as error:  # decoders of damaged files raise SyntaxError, struct.error, ...
        said = " ".join(str(error).split()) or type(error).__name__
        reason = getattr(error, "strerror", None) or f"cannot be decoded ({said})"
        raise DataError(f"{place}{reason}") from error


def _read(
    source: bytes | Image.Image | npt.NDArray[Any], max_pixels: int, upright: bool, draft: int
) -> Tensor:
    image = None
    if isinstance(source, bytes):
        picture: Image.Image = _picture(source, max_pixels)
        if isinstance(picture, JpegImageFile):
            if _has_too_many_scans(source):
                raise DataError(f"a JPEG of more than {MAX_SCANS} scans")
            if draft and min(picture.size) >= 2 * draft:
                picture.draft(picture.mode, (draft, draft))  # which torchvision cannot
            elif picture.mode != "CMYK":  # torchvision's conversion of inks to colours is its own
                # Pillow knows more dialects; what is really broken it refuses as well.
                with suppress(RuntimeError):
                    # The same libjpeg-turbo and pixels as Pillow's, in three quarters of the time.
                    image = decode_jpeg(source)
    else:
        picture = _in_memory(source)
        _check_pixels(picture.size, max_pixels)
    image = _decode(picture) if image is None else image
    return _upright(image, picture) if upright else image


def _in_memory(source: Image.Image | npt.NDArray[Any]) -> Image.Image:
    if isinstance(source, Image.Image):
        picture = source
    else:
        try:
            picture = Image.fromarray(source)
        except (TypeError, ValueError, AttributeError):
            known = getattr(source, "shape", type(source).__name__), getattr(source, "dtype", "")
            wanted = "an image is a path, a file's bytes, a Pillow image or (H, W, 3) uint8 array"
            raise DataError(f"{wanted}, not {known[0]} {known[1]}".rstrip()) from None
    if not picture.width * picture.height:
        raise DataError(f"{picture.width} x {picture.height} pixels are no picture")
    return picture


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise DataError(f"{width} x {height} pixels are more than the limit of {max_pixels:,}")


def _content(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    name, start, size = extent(path)
    buffering = 0 if size is None else io.DEFAULT_BUFFER_SIZE  # which reads until it has `size`
    with open(name, "rb", buffering, opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise DataError("not a regular file")
        length = status.st_size if size is None else size
        if length > max_bytes:  # it would be read whole, and may be a hole of terabytes
            raise DataError(f"{length:,} bytes are more than any picture should have")
        if start:
            file.seek(start)
        content: bytes = file.read(-1 if size is None else size)
        return content


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would be waited for, perhaps for ever


def _picture(content: bytes, max_pixels: int) -> ImageFile:
    # Only the header is read here: 0.02 ms, where decoding takes 0.25 ms. `Image.open` would apply
    # the limit of the process, and try every format that Pillow has.
    if not content:
        raise DataError("the file is empty")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    for start, image_file in FORMATS.items():
        if content.startswith(start):
            picture = image_file(io.BytesIO(content))
            width, height = picture.size
            if isinstance(picture, TiffImageFile):  # a tile is decoded whole, however large
                width = max(width, picture.tag_v2.get(TILEWIDTH, 0))
                height = max(height, picture.tag_v2.get(TILELENGTH, 0))
            _check_pixels((width, height), max_pixels)
            return picture
    raise DataError("not an image, or of an unknown format")


def _has_too_many_scans(content: bytes) -> bool:
    """Whether a decoder, which stops at the end of the image, would meet more than `MAX_SCANS`.

    Behind that end a telephone may put a film, and into a segment before it a smaller picture.
    """
    if len(START_OF_SCAN.findall(content)) <= MAX_SCANS:  # nearly always, and quickly found out
        return False
    scans, place = 0, 2
    while marker := MARKER.search(content, place):
        place = marker.end()
        code = marker[0][1:]
        if code == b"\xd9":  # end of image
            return False
        scans += code == b"\xda"
        if scans > MAX_SCANS:
            return True
        if code >= b"\xc0":  # a segment, which says how long it is
            place += max(2, int.from_bytes(content[place : place + 2], "big"))
    return False


def _decode(picture: Image.Image) -> Tensor:
    if picture.mode in ("I", "F"):  # Pillow's conversion would cut them off at 255
        kind = "32-bit integers" if picture.mode == "I" else "floating point"
        raise DataError(f"mode {picture.mode} ({kind}) has no range: convert it to 8 or 16 bits")
    if picture.mode.startswith("I;16"):
        bits = picture.tag_v2[BITSPERSAMPLE][0] if isinstance(picture, TiffImageFile) else 16
        grey = (np.asarray(picture) >> (bits - 8)).astype(np.uint8)
        return torch.from_numpy(grey).repeat(3, 1, 1)
    if "transparency" in picture.info:  # a palette with alpha, of which "RGB" alone would warn
        picture = picture.convert("RGBA")
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


# By EXIF's orientation: whether rows become columns, and the sides that are mirrored after that.
_TURNS: dict[int, tuple[bool, list[int]]] = {
    2: (False, [2]),
    3: (False, [1, 2]),
    4: (False, [1]),
    5: (True, []),
    6: (True, [2]),
    7: (True, [1, 2]),
    8: (True, [1]),
}


def _upright(image: Tensor, picture: Image.Image) -> Tensor:
    """The image as its EXIF says that it is to be seen; as it is where that says nothing."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF fails in many ways; viewers then show the picture as it is
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return image
    swapped, mirrored = turn
    image = image.mT if swapped else image
    # Rows of pixels in memory, as all other images have: `squish` is quickest so.
    return image.flip(mirrored).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def squish(image: Tensor, size: int, out: Tensor | None = None) -> Tensor:
    """A (3, H, W) uint8 image resized to (3, size, size): bilinear, antialiased, no crop.

    Written to `out` where given, such as one slot of a batch. At 448 px most of the time goes into
    bringing the channels apart: a slot of a `channels_last` batch is filled in half the time.

    Differs from Pillow's `resize((size, size), BILINEAR)` by about 0.02 grey levels on average over
    photographs. An image of that size already comes back with the same pixels.
    """
    if out is None:
        out = torch.empty(3, size, size, dtype=torch.uint8)
    if image.shape[1:] != (size, size):
        # Decoded images lie in memory as H x W x 3, torch's fastest case. It must be said in all
        # four strides, or the result is brought into planes before it is brought to `out`.
        batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        image = interpolate(batch, size=(size, size), mode="bilinear", antialias=True)[0]
    return out.copy_(image)


def read_squished(path: str | Path, settings: ImageSettings, out: Tensor | None = None) -> Tensor:
    """The picture in a file, squished: (3, S, S) uint8, read and sized as the settings say.

    All images of a data set are read by this. Raises what `read_image` does.
    """
    size = settings.image_size
    draft = size if settings.draft_decode else 0
    image = read_image(path, settings.max_pixels, settings.exif_rotate, draft)
    return squish(image, size, out)


def find_images(path: str | os.PathLike[str]) -> tuple[Path, npt.NDArray[np.bytes_]]:
    """The image at `path`, or those in that folder and below, sorted: a folder and names in it.

    Raises `DataError` if there is nothing at `path`, or no image in it.
    """
    root = Path(path)
    try:
        if root.is_dir():
            found = sorted(file for file in root.rglob("*") if file.suffix.lower() in EXTENSIONS)
        elif root.exists():
            root, found = root.parent, [root]
        else:
            raise DataError(f"{root} is not there")
    except OSError as error:
        raise DataError(f"{root}: {error.strerror}") from error
    names = [os.fsencode(file.relative_to(root)) for file in found if not file.is_dir()]
    if not names:
        raise DataError(f"{root} holds no image ({', '.join(sorted(EXTENSIONS))})")
    return root, np.array(names, dtype=np.bytes_)
