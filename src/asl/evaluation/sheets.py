"""Pictures in rows, with words under each: contact sheets, and where a model sees its labels."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from asl.atomic import write_result
from asl.errors import UsageError
from asl.evaluation.text import percent

COLUMNS, ROWS = 6, 8  # of a page
BOX, GAP = (240, 180), 16  # what a picture fills on it, and the space around that, in pixels
SIZE, LINE, LINES = 14, 18, 4  # of the words: font and pitch in pixels, and how many lines
SUFFIXES = (".png", ".jpg", ".jpeg")
INK, FAINT, PAPER = "#000000", "#5F6670", "#FFFFFF"

Words = tuple[str, str]  # a text and its colour
Tile = tuple[npt.NDArray[np.uint8], Sequence[Words]]  # (H, W, 3) pixels, and the words under them


def check_sheet(path: str | Path) -> None:
    """Raise `UsageError` for a file that is neither PNG nor JPEG by its name."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UsageError(f"contact_sheet is {str(path)!r}, but must end in {', '.join(SUFFIXES)}")


def contact_sheet(
    predictions: Sequence[Any], path: str | Path, read: Callable[[str], Tensor]
) -> list[Path]:
    """Draw the pictures small, each over its name and its predicted labels; returns the pages.

    `predictions` are those of `predict`, and `read` gives the pixels of a file. 48 fit on a page
    of 1,552 x 2,304 pixels: the first is `path`, the next have -2, -3, ... behind the name. Where
    nothing is predicted, the highest label stands in grey. Labels that four lines do not hold are
    left out, with dots in their place. About 10 ms per image.
    """
    path, pages = Path(path), list[Path]()
    with tqdm(total=len(predictions), desc="contact sheet", unit="img", leave=False) as bar:
        for first in range(0, len(predictions), COLUMNS * ROWS):
            tiles = list[Tile]()
            for prediction in predictions[first : first + COLUMNS * ROWS]:
                file, labels = prediction["file"], prediction["labels"]
                picture = Image.fromarray(read(file).permute(1, 2, 0).numpy())
                picture.thumbnail(BOX)
                tiles.append((np.asarray(picture), [(Path(file).name, FAINT), _found(labels)]))
                bar.update()
            name = path if not pages else path.with_stem(f"{path.stem}-{len(pages) + 1}")
            _write(_in_rows(tiles, BOX, COLUMNS, [1, LINES]), name)
            pages.append(name)
    return pages


def explanation_sheet(
    overlays: Sequence[npt.NDArray[np.uint8]], labels: Sequence[Any], path: str | Path
) -> None:
    """Draw pictures (h, w, 3) of one size, one for every label, over its name and score."""
    words = [
        [(f"{label['name']}  {percent(label['score'])}", INK if label["predicted"] else FAINT)]
        for label in labels
    ]
    height, width = overlays[0].shape[:2]
    tiles = list(zip(overlays, words, strict=True))
    _write(_in_rows(tiles, (max(width, BOX[0]), height), 4, [2]), path)


def _found(labels: Sequence[Any]) -> Words:
    found = ", ".join(label["name"] for label in labels if label["predicted"])
    return (found, INK) if found else (f"{labels[0]['name']} {percent(labels[0]['score'])}?", FAINT)


def _in_rows(
    tiles: Sequence[Tile], box: tuple[int, int], columns: int, lines: Sequence[int]
) -> Image.Image:
    """The tiles side by side, each in a box of (width, height) over so many `lines` of words."""
    (width, height), columns = box, min(columns, len(tiles))
    pitch = height + sum(lines) * LINE + GAP
    rows = -(-len(tiles) // columns)
    page = Image.new("RGB", (columns * (width + GAP) + GAP, rows * pitch + GAP), PAPER)
    draw, font = ImageDraw.Draw(page), _font()
    for number, (pixels, words) in enumerate(tiles):
        row, column = divmod(number, columns)
        left, bottom = GAP + column * (width + GAP), GAP + row * pitch + height
        # On the ground of the box, so that the words under a row of pictures are in one line.
        page.paste(Image.fromarray(pixels), (left, bottom - pixels.shape[0]))
        top = bottom + 3
        for (text, colour), most in zip(words, lines, strict=True):
            for each in _wrapped(text, font, width, most):
                draw.text((left, top), each, colour, font)
                top += LINE
    return page


def _wrapped(text: str, font: Any, width: int, most: int) -> list[str]:
    """The text in lines of so many pixels: with dots where it is cut, as `most` lines are there."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} …"]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: Any, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while font.getlength(f"{line}…") > width:
        line = line[:-1].rstrip(" …")
    return f"{line}…"


def _write(page: Image.Image, path: str | Path) -> None:
    content = io.BytesIO()
    kind = "PNG" if Path(path).suffix.lower() == ".png" else "JPEG"
    page.save(content, kind, quality=90)
    write_result(path, content.getvalue())


def _font() -> Any:
    import matplotlib

    # Pillow's own font has Latin letters alone; matplotlib brings one with many more.
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), SIZE)
