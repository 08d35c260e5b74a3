"""A page to try a model: pictures are dropped on it, and labelled by this process.

It is the standard library's server and one file of HTML. Gradio would be thirty packages, of which
one (6.31) wants an older Pillow than the one whose pixels this project's numbers come from.
"""

import base64
import io
import json
import re
import socket
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import numpy.typing as npt
from PIL import Image

from asl.errors import DataError, UsageError
from asl.evaluation.explain import check_explanation, heat_maps, overlay, usual_explanation
from asl.evaluation.predictor import Predictor
from asl.evaluation.settings import Explanation
from asl.evaluation.text import percent

MAX_UPLOAD = 32 * 2**20  # bytes: a photograph of 50 megapixels has 25 MB
MAX_DRAINED = 2**30  # of a larger one, so much is thrown away before the connection is
LARGEST = 720  # pixels: the longer side of a picture on the page
PATIENCE = 60  # seconds that a connection may be silent
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# The page may load nothing from elsewhere, and nobody may show it in a frame.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; connect-src 'self'; form-action 'none'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def serve(predictor: Predictor, host: str, port: int, how: Explanation | None = None) -> None:
    """Serve the page until Ctrl-C. Raises `UsageError` for an address that cannot be had."""
    if how:
        check_explanation(predictor.scorer, how)
    with start(predictor, host, port, how) as server:
        print(f"drop pictures on {server.url}   (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def start(
    predictor: Predictor, host: str, port: int, how: Explanation | None = None
) -> "PageServer":
    """The server of the page, at its address, which still has to `serve_forever`.

    `how` labels are explained; without it by the attention of an ML-Decoder, else by Grad-CAM.
    """
    try:
        return PageServer(predictor, host, port, how)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot serve at {host}, port {port}: {reason}") from None


class PageServer(ThreadingHTTPServer):
    """Answers `GET /` with the page, and `POST /labels` and `POST /map` of a picture's bytes."""

    daemon_threads = True

    def __init__(self, predictor: Predictor, host: str, port: int, how: Explanation | None) -> None:
        self.predictor = predictor
        self.named = f"[{host}]" if ":" in host else host
        self.how = how or usual_explanation(predictor.scorer)
        # One thread computes, whoever asks: the model is one, and so is the memory.
        self.model = ThreadPoolExecutor(1)
        self.address_family = socket.getaddrinfo(host, port)[0][0]
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{self.named}:{self.server_port}"

    def server_close(self) -> None:
        """End, without the pictures that still wait."""
        super().server_close()
        self.model.shutdown(cancel_futures=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong, unless whoever asked has gone."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def labels(self, content: bytes) -> dict[str, Any]:
        """What the page shows of a picture: it, its labels, and what their numbers are."""
        predictor = self.predictor
        pixels = predictor.read(content)
        scores = predictor.scorer.scores_of([pixels])[0]
        labels = [
            {**label, "percent": percent(label.get("probability", label["score"]))}
            for label in predictor.labels(scores)
        ]
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        size = f"{picture.width:,} x {picture.height:,} pixels"
        picture.thumbnail((LARGEST, LARGEST))
        return {
            "labels": labels,
            "about": predictor.judge.lines(),
            "size": size,
            "picture": _data_url(np.asarray(picture)),
        }

    def map(self, content: bytes, name: str) -> dict[str, Any]:
        """The picture under the map of the class of that name."""
        if name not in self.predictor.classes:
            raise UsageError(f"there is no class {name!r}")
        pixels = self.predictor.read(content)
        place = self.predictor.classes.index(name)
        [heat] = heat_maps(self.predictor.scorer, pixels, [place], self.how)
        return {"picture": _data_url(overlay(pixels, heat, LARGEST))}


def _data_url(pixels: npt.NDArray[np.uint8]) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = PATIENCE
    protocol_version = "HTTP/1.1"
    server_version = "asl"

    def do_GET(self) -> None:
        """Answer with the page."""
        self._answer(self._page)

    def do_POST(self) -> None:
        """Answer with the labels of the picture that was sent, or with a map of it."""
        self._answer(self._result)

    def _page(self) -> tuple[str, bytes]:
        if self.path != "/":
            raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        page = files("asl.evaluation").joinpath("page.html").read_text(encoding="utf-8")
        about = {"classes": len(self.server.predictor.classes), "max_upload": MAX_UPLOAD}
        named = " + ".join(dict.fromkeys(self.server.predictor.scorer.names))
        about |= {"model": named, "how": self.server.how}  # type: ignore[dict-item]
        # In a script, a class called </script> would end it.
        text = json.dumps(about).replace("<", "\\u003c")
        return "text/html; charset=utf-8", page.replace('"ABOUT"', text, 1).encode()

    def _result(self) -> tuple[str, bytes]:
        server, (path, _, query) = self.server, self.path.partition("?")
        if path not in ("/labels", "/map"):
            raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        content = self._content()
        try:
            if path == "/labels":
                result = server.model.submit(server.labels, content).result()
            else:
                name = parse_qs(query).get("name", [""])[0]
                result = server.model.submit(server.map, content, name).result()
        except (DataError, UsageError) as error:
            raise _Refused(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from None
        return "application/json", json.dumps(result).encode()

    def _answer(self, make: Any) -> None:
        status = HTTPStatus.OK
        try:
            self._check_sender()
            kind, content = make()
        except _Refused as refused:
            status, self.close_connection = refused.status, True
            kind, content = "application/json", json.dumps({"error": str(refused)}).encode()
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # whoever asked has gone
            return
        except Exception:  # the next picture is to be labelled all the same
            traceback.print_exc()
            status, self.close_connection = HTTPStatus.INTERNAL_SERVER_ERROR, True
            message = "something went wrong: see where infer.py runs"
            kind, content = "application/json", json.dumps({"error": message}).encode()
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        if self.close_connection:
            self._wait_for_the_end()

    def _wait_for_the_end(self) -> None:
        """Throw away what still comes: to close on it would take the answer back (a reset)."""
        self.wfile.flush()
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            left = MAX_UPLOAD
            while left > 0 and (thrown := self.rfile.read1(2**16)):
                left -= len(thrown)

    def _check_sender(self) -> None:
        """Refuse what other pages that are open in the browser send, or have a name for."""
        host = self.headers.get("Host", "").lower()
        # Any port, as a tunnel (ssh -L) may begin at another.
        name = re.sub(r":[0-9]*$", "", host)
        if self.server.named in LOOPBACK and name not in LOOPBACK:
            raise _Refused(HTTPStatus.FORBIDDEN, f"this page is not called {name!r}")
        if self.headers.get("Origin", host).lower().rpartition("/")[2] != host:
            raise _Refused(HTTPStatus.FORBIDDEN, "this page answers itself alone")

    def _content(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "the size of the picture is not given")
        if int(length) > MAX_UPLOAD:
            # A browser reads no answer before it has sent all.
            left = min(int(length), MAX_DRAINED)
            while left > 0 and (thrown := self.rfile.read(min(left, 2**16))):
                left -= len(thrown)
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the file has {int(length):,} bytes, and {MAX_UPLOAD:,} are the most",
            )
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            raise ConnectionAbortedError
        return content

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: errors are on the page."""
