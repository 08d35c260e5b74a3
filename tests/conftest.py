"""Data and builders that several test files use."""

import os
import sys
import threading
import warnings
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import pytest
import torch

from asl.data.readers.shapes import draw_shapes
from asl.evaluation.settings import InferConfig, ValidateConfig
from asl.training.settings import TrainConfig

# For what several wings share, and for the programs chaos and fuzz.
sys.path.append(str(Path(__file__).parent))
pytest_plugins = ["bad_input", "browser", "parity"]

SHARED = Path(__file__).parents[2] / "shared" / "data"

# Tests run side by side: more threads would only get into each other's way. And the processes that
# a test starts round as it does.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: python -m pytest --long"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def small_shapes(tmp_path_factory):
    """A folder in COCO's layout: 40 training and 20 validation images of 24 classes."""
    root = tmp_path_factory.mktemp("shapes")
    draw_shapes(root, train=40, val=20, processes=1)
    return root


class _Served(ThreadingHTTPServer):
    """The files of a folder, by address. `asked` has the path of each request.

    `instead` has what a name is answered with in place of its file: instead[name](handler, file).
    """

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.asked, self.instead = folder, [], {}
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # of a client that was killed


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        file = self.server.folder / self.path.partition("?")[0].removeprefix("/")
        if file.name in self.server.instead:
            self.server.instead[file.name](self, file)
        elif not file.is_file():
            self.send_error(404)
        else:
            self.start(file.stat().st_size)
            self.wfile.write(file.read_bytes())

    def start(self, length):
        """Begin an answer of so many bytes; None: until the connection ends."""
        self.send_response(200)
        self.send_header(*(("Content-Length", str(length)) if length else ("Connection", "close")))
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def served():
    """Serves a folder until the test ends: served(folder) is a `_Served`."""
    with ExitStack() as stack:

        def serve(folder):
            server = stack.enter_context(_Served(folder))
            threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
            stack.callback(server.shutdown)
            return server

        yield serve


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


SMALL_RUN = {
    **{"model_name": "test_resnet", "image_size": 48, "batch_size": 8, "workers": 0},
    **{"lr": 1e-3, "epochs": 3, "ema_decay": 0.9, "amp": "off"},
}


@pytest.fixture(scope="session")
def settings():
    """Builds the config of a small run: settings(root, output, **changed)."""

    def build(root, output, **changed):
        return TrainConfig.of(**{**SMALL_RUN, "data": str(root), "output": str(output), **changed})

    return build


@pytest.fixture(scope="session")
def measuring():
    """Builds the config that measures a checkpoint of such a run: (root, model_path, **changed)."""

    def build(root, model_path, **changed):
        usual = {name: SMALL_RUN[name] for name in SMALL_RUN.keys() & {*ValidateConfig.names()}}
        return ValidateConfig.of(
            **{**usual, "data": str(root), "model_path": str(model_path), **changed}
        )

    return build


@pytest.fixture(scope="session")
def labelling():
    """Builds the config that labels images with such a checkpoint: (pic_path, model_path, ...)."""

    def build(pic_path, model_path, **changed):
        usual = {name: SMALL_RUN[name] for name in SMALL_RUN.keys() & {*InferConfig.names()}}
        return InferConfig.of(
            **{**usual, "pic_path": str(pic_path), "model_path": str(model_path), **changed}
        )

    return build


@pytest.fixture(scope="session")
def without_waiting():
    """Inside the block `without_waiting()` it is an error if the host waits for a CUDA device."""

    def say(mode):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that it does not see every wait
            torch.cuda.set_sync_debug_mode(mode)

    @contextmanager
    def watching():
        say("error")
        try:
            yield
        finally:
            say("default")

    return watching


@pytest.fixture(scope="session")
def before():
    """Inside the block `before(number, owner, name, act)`, act() precedes that call of owner.name.

    The block is given the counter of the calls.
    """

    @contextmanager
    def acting(number, owner, name, act):
        calls, original = count(1), getattr(owner, name)

        def counted(*arguments, **named):
            if next(calls) == number:
                act()
            return original(*arguments, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, counted)
            yield calls

    return acting


@pytest.fixture
def answers_of_two_ranks(tmp_path):
    """Runs work(rank, address of the group, queue) in two processes; what they put in the queue."""

    def answers(work, each=1):
        context = torch.multiprocessing.get_context("spawn")
        queue = context.Queue()
        init = f"file://{tmp_path}/rendezvous"
        ranks = [context.Process(target=work, args=(rank, init, queue)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        found = [queue.get(timeout=60) for _ in range(each * len(ranks))]
        for rank in ranks:
            rank.join()
        return found

    return answers
