"""The page of a report: one HTML file that opens from the disk and asks no network for anything.

Style, script, figures, thumbnails and Vega-Lite, which draws the charts, are all inside it.
Vega-Lite is 0.9 MB where Plotly is 4. It draws the class that a reader picks from its numbers,
where matplotlib would have to draw all of them beforehand, and takes the colours of the page, light
or dark. A policy inside the page forbids the browser to load anything from elsewhere.
"""

import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any
from uuid import uuid4

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from PIL import Image
from tqdm import tqdm

from asl.atomic import write_result
from asl.errors import DataError, UsageError
from asl.evaluation.report.contents import Report
from asl.images.decode import read_image

HERE = Path(__file__).parent
MAX_BYTES = 15_000_000  # of the page: photographs beyond that are left out, and a note says so
OTHER_BYTES = 400_000  # of it at the most: style, script and what is neither data nor photographs
THUMBNAIL = 240  # pixels on the long side


def check_folder(folder: str | Path) -> None:
    """Make the folder of a report. Raises `UsageError` where nothing can be written into it."""
    draft = Path(folder) / f".{uuid4().hex}.part"
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise UsageError(f"cannot write into {folder}: {error.strerror}") from error


def write_report(report: Report, folder: str | Path, root: str | Path | None = None) -> Path:
    """Write `report.json` and `index.html` into `folder`; returns the path of the page.

    Photographs are read from `root`, to which their names are relative. Without it, and for those
    that cannot be read, the page shows names. Each file replaces that of an earlier report whole.

    Raises `UsageError` where they cannot be written.
    """
    text = json.dumps(_defined(report), ensure_ascii=False, allow_nan=False)
    page = html(report, root)
    write_result(Path(folder) / "report.json", _utf8(text))
    write_result(Path(folder) / "index.html", _utf8(page))
    return Path(folder) / "index.html"


def html(report: Report, root: str | Path | None = None) -> str:
    """The page with the photographs under `root`, if that is given: at most `MAX_BYTES` of UTF-8.

    Of 9,605 classes, the figures take 6 MB of these.
    """
    data = htmlsafe_json_dumps(_for_the_script(report), ensure_ascii=False, allow_nan=False)
    files = [] if root is None else list(dict.fromkeys(_photographs(report)))
    room = MAX_BYTES - OTHER_BYTES - len(_utf8(data)) - len(_vega_lite())
    thumbnails = {} if root is None else _thumbnails(files, root, room)
    notes = list(report["notes"])
    if len(thumbnails) < len(files):
        notes.append(
            f"{len(files) - len(thumbnails):,} of {len(files):,} photographs are not shown: "
            f"the page would be larger than {MAX_BYTES // 10**6} MB."
        )
    return _template().render(
        report=_defined(report),
        notes=notes,
        data=data,
        thumbnails=htmlsafe_json_dumps(thumbnails),
        style=_part("page.css"),
        charts=_part("charts.js"),
        script=_part("page.js"),
        vega_lite=Markup(_vega_lite()),
    )


@cache
def _template() -> Template:
    # Names of classes and files may hold anything that HTML gives a meaning to.
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "signed": _signed}
    return environment.get_template("page.html.j2")


def _part(name: str) -> Markup:
    return Markup((HERE / name).read_text("utf-8"))


@cache
def _vega_lite() -> str:
    import vl_convert  # 80 MB

    # Its stub makes the snippet a must, without which one gets all of Vega-Lite.
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return bundle.replace("</script", "<\\/script")


def _figure(value: float | None, digits: int = 2) -> str:
    """A number as people read it, with a minus sign that is as wide as a plus."""
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def _signed(value: float | None) -> str:
    return _figure(value) if value is None or value <= 0 else f"+{_figure(value)}"


def _utf8(text: str) -> bytes:
    # Names of files that are no text have lone surrogates.
    return text.encode("utf-8", "replace")


def _defined(value: Any, digits: int | None = None) -> Any:
    """The same with None for NaN and infinities, and numbers rounded to so many digits."""
    if isinstance(value, Mapping):
        return {str(key): _defined(each, digits) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_defined(each, digits) for each in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else round(value, digits)
    return value


def _for_the_script(report: Report) -> dict[str, Any]:
    """What page.js needs, as small as it can be: most of it grows with the number of classes."""
    shared = report["scores"]["edges"]
    classes = [
        {
            **figures,
            # The edges are nearly always those of the histogram over all cells.
            "scores": {
                **figures["scores"],
                "edges": None
                if figures["scores"]["edges"] == shared
                else figures["scores"]["edges"],
            },
        }
        for figures in report["classes"]
    ]
    parts = ("images", "scores", "curve", "reliability", "together", "galleries", "twins")
    data = {name: report[name] for name in (*parts, "comparison")}  # type: ignore[literal-required]
    identity = json.dumps([report["title"], report["about"], report["images"]], default=str)
    data["key"] = hashlib.blake2b(_utf8(identity), digest_size=8).hexdigest()
    data["classes"] = classes
    # In a set that is annotated in full, what is not present is absent.
    data["full"] = all(
        each["positives"] + each["negatives"] == report["images"] for each in report["classes"]
    )
    rounded: dict[str, Any] = _defined(data, digits=4)
    return rounded


def _photographs(report: Report) -> Iterator[str]:
    """Their names, the first of each gallery first, so that none is without if not all fit."""
    galleries: list[Iterable[str]] = [
        [example["file"] for example in gallery["examples"]] for gallery in report["galleries"]
    ]
    galleries.append(chain.from_iterable((twin["file"], twin["other"]) for twin in report["twins"]))
    for row in zip_longest(*galleries):
        yield from (file for file in row if file is not None)


def _thumbnails(files: list[str], root: str | Path, room: int) -> dict[str, str | None]:
    """Small WebPs in base64 by name, as many as `room` bytes take; None for what is no picture."""
    thumbnails: dict[str, str | None] = {}
    for file in tqdm(files, "thumbnails", unit="img", leave=False):
        picture = _thumbnail(os.path.join(root, file))  # noqa: PTH118
        room -= len(picture or "") + len(_utf8(json.dumps(file))) + 10
        if room < 0:
            break
        thumbnails[file] = picture
    return thumbnails


def _thumbnail(path: str) -> str | None:
    try:
        pixels = read_image(path)
    except DataError:
        return None
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80, method=2)
    return base64.b64encode(file.getvalue()).decode("ascii")
