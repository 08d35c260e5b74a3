"""The page to try a model, in a real browser and by bare requests."""

import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from contextlib import closing
from pathlib import Path

import pytest

from asl import Predictor
from asl.errors import UsageError
from asl.evaluation import serve
from asl.evaluation.text import percent

pytestmark = pytest.mark.xdist_group("serve")

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 60_000  # milliseconds: a machine may be busy


@pytest.fixture(scope="module")
def predictor(untrained):
    return Predictor(untrained, device="cpu", amp="off", threshold=0.5, image_size=96)


@pytest.fixture(scope="module")
def server(predictor):
    with serve.start(predictor, "127.0.0.1", 0) as started:
        thread = threading.Thread(target=started.serve_forever, daemon=True)
        thread.start()
        yield started
        started.shutdown()
        thread.join()


@pytest.fixture
def page(browser, server):
    """The page, of which at the end nothing but this server was asked, and nothing complained."""
    opened = browser.new_page()
    asked, said = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto(server.url)
    yield opened
    opened.close()
    elsewhere = [url for url in asked if not url.startswith((server.url, "data:"))]
    assert asked
    assert elsewhere == []
    assert [text for text in said if "Failed to load resource" not in text] == []


def drop(page, path):
    page.set_input_files("#file", path)


def shown_labels(page):
    page.wait_for_selector("#result:visible", timeout=PATIENCE)
    return [
        (row.locator("span").first.inner_text(), row.locator(".score").inner_text())
        for row in page.locator(".label").all()
    ]


def shown_error(page):
    page.wait_for_selector("#message.error", timeout=PATIENCE)
    assert page.locator("#result").is_hidden()
    return page.inner_text("#message")


def test_a_picture_is_labelled_as_from_python(page, predictor, photographs):
    for name in ("0.jpg", "1.png", "2.webp"):
        drop(page, photographs / name)
        page.wait_for_selector(f"#caption:has-text('{name}')", timeout=PATIENCE)
        expected = predictor(photographs / name)
        assert shown_labels(page) == [
            (label["name"], percent(label["score"])) for label in expected
        ]
        strong = page.locator(".label.predicted").count()
        assert strong == sum(label["predicted"] for label in expected)
        lengths = page.eval_on_selector_all(".bar i", "bars => bars.map(bar => bar.style.width)")
        assert [float(length.rstrip("%")) for length in lengths] == pytest.approx(
            [100 * label["score"] for label in expected]
        )
        assert page.get_attribute("#picture", "src").startswith("data:image/jpeg;base64,")


def test_a_picture_may_be_dropped_anywhere_on_the_page(page, photographs):
    content = list((photographs / "0.jpg").read_bytes())
    transfer = page.evaluate_handle(
        """content => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(content)], "dropped.jpg"));
            return transfer;
        }""",
        content,
    )
    page.dispatch_event("h1", "drop", {"dataTransfer": transfer})
    assert len(shown_labels(page)) == 5
    assert "dropped.jpg" in page.inner_text("#caption")


def test_a_label_shows_where_it_is_seen_and_hides_it_again(page, photographs):
    drop(page, photographs / "0.jpg")
    shown_labels(page)
    plain = page.get_attribute("#picture", "src")
    seen = [plain]
    for number in (0, 1):
        label = page.locator(".label").nth(number)
        label.click()
        page.wait_for_selector("body:not(.busy)", timeout=PATIENCE)
        assert label.get_attribute("aria-pressed") == "true"
        assert page.locator("[aria-pressed=true]").count() == 1
        seen.append(page.get_attribute("#picture", "src"))
    assert len(set(seen)) == 3
    page.locator(".label").nth(1).click()
    assert page.get_attribute("#picture", "src") == plain


def test_what_is_no_picture_is_said_on_the_page_which_goes_on(page, photographs, tmp_path):
    files = {
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"no picture", "not an image"),
        "half.jpg": ((photographs / "0.jpg").read_bytes()[:300], "cannot be decoded"),
        "bomb.png": (bomb(), "60000 x 60000 pixels are more than the limit"),
        "<b>huge.jpg": (bytes(serve.MAX_UPLOAD + 1), "33,554,432 are the most"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        drop(page, tmp_path / name)
        page.locator("#message.error", has_text=name).wait_for(timeout=PATIENCE)
        assert message in shown_error(page)
        drop(page, photographs / "0.jpg")
        assert len(shown_labels(page)) == 5
        assert page.inner_text("#message").strip() == ""


def bomb():
    """A PNG of a few bytes that says it has 3,600 million pixels."""

    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100)))


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(page, width, photographs):
    page.set_viewport_size({"width": width, "height": 800})
    drop(page, photographs / "0.jpg")
    shown_labels(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    picture, labels = (page.locator(f"#{each}").bounding_box() for each in ("picture", "labels"))
    below = labels["y"] >= picture["y"] + picture["height"]
    assert below == (width == 360)


def ask(server, method, path, body=None, **headers):
    address = "127.0.0.1", server.server_port
    with closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer, answer.read()


def test_scores_thresholds_and_the_policy_are_in_the_answers(server, predictor, photographs):
    answer, content = ask(server, "POST", "/labels", (photographs / "0.jpg").read_bytes())
    assert answer.status == 200
    labels = json.loads(content)["labels"]
    assert labels == [
        {**each, "threshold": 0.5, "percent": percent(each["score"])}
        for each in predictor(photographs / "0.jpg")
    ]
    answer, content = ask(server, "GET", "/")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert not re.findall(rb"(?:src|href)=[\"'](?!data:)|https?://|@import|url\(", content)


@pytest.mark.parametrize("again", range(3))  # a race of answer and sender would be lost at times
@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "message"),
    [
        ("GET", "/none", None, {}, 404, "nothing here"),
        ("POST", "/", b"x", {}, 404, "nothing here"),
        ("POST", "/labels", b"text", {}, 422, "not an image"),
        ("POST", "/map?name=unicorn", b"text", {}, 422, "no class 'unicorn'"),
        ("POST", "/labels", [b"x" * 10**5] * 9, {}, 411, "size"),
        ("POST", "/none", bytes(10**6), {}, 404, "nothing here"),
        ("POST", "/labels", bytes(serve.MAX_UPLOAD + 1), {}, 413, "33,554,433 bytes"),
        ("GET", "/", None, {"Host": "evil.example"}, 403, "evil.example"),
        ("POST", "/labels", b"x", {"Origin": "http://evil.example"}, 403, "itself alone"),
        ("POST", "/labels", b"x", {"Origin": "null"}, 403, "itself alone"),
    ],
)
def test_other_requests_are_refused(server, method, path, body, headers, status, message, again):
    answer, content = ask(server, method, path, body, **headers)
    assert answer.status == status
    assert message in json.loads(content)["error"]


@pytest.mark.parametrize("name", ["127.0.0.1:9000", "LOCALHOST:1", "localhost", "[::1]:80"])
def test_the_page_is_there_under_the_names_of_this_machine(server, name):
    # Through a tunnel (ssh -L 9000:localhost:7860) the port is another.
    answer, _ = ask(server, "GET", "/", Host=name, Origin=f"http://{name}")
    assert answer.status == 200


def test_a_sender_that_goes_away_leaves_the_server_alive(server, photographs, capfd):
    for content in (
        b"POST /labels HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx",
        b"\0",
    ):
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            connection.sendall(content)
    answer, _ = ask(server, "POST", "/labels", (photographs / "0.jpg").read_bytes())
    assert answer.status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_mistake_of_the_program_is_told_and_not_the_end(server, photographs, monkeypatch, capfd):
    def fail(content):
        raise ZeroDivisionError

    content = (photographs / "0.jpg").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(server, "labels", fail)
        answer, told = ask(server, "POST", "/labels", content)
    assert answer.status == 500
    assert "see where infer.py runs" in json.loads(told)["error"]
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert ask(server, "POST", "/labels", content)[0].status == 200


def test_a_port_that_is_taken_and_a_host_that_is_not_there_are_errors(server, predictor):
    with pytest.raises(UsageError, match=r"port \d+: Address already in use"):
        serve.start(predictor, "127.0.0.1", server.server_port)
    with pytest.raises(UsageError, match=r"cannot serve at 192\.0\.2\.1, port 0"):
        serve.start(predictor, "192.0.2.1", 0)


def test_infer_serves_until_ctrl_c(untrained, photographs, tmp_path):
    command = [sys.executable, "-W", "error", REPOSITORY / "infer.py", "--model-path", untrained]
    process = subprocess.Popen(
        [*command, "--serve", "--port", "0", "--device", "cpu", "--image-size", "96"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    port = int(re.search(r"http://127\.0\.0\.1:(\d+) ", line)[1])
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/map?name=dog", (photographs / "0.jpg").read_bytes())
        assert "picture" in json.loads(connection.getresponse().read())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err == ""
    assert not [*tmp_path.iterdir()]
