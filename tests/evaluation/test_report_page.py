"""The page of a report, in a real browser, from the disk."""

import json
import re
import time
from pathlib import Path

import pytest
from PIL import Image
from sample_report import class_figures, example, gallery, interval, sample_report

from asl.data.readers import read
from asl.errors import UsageError
from asl.evaluation.report.page import MAX_BYTES, check_folder, html, write_report

CLASSES = ["dog", "cat", "<script>alert(1)</script>", 'a "b" & it\'s', "Zebra, striped", "élan"]
FILES = ["a/1.png", "a/<b>&'2.png", "gone.png", "broken.png"]
MAX_SECONDS_TO_OPEN = 15
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    (root / "a").mkdir()
    for file, size in zip(FILES[:2], [(400, 200), (100, 300)], strict=True):
        Image.effect_noise(size, 60).convert("RGB").save(root / file)
    (root / "broken.png").write_bytes(b"no picture")
    return root


def galleries():
    """Of false alarms and misses, on photographs that are there, missing and broken."""
    alarms = [
        example(0, FILES[0], "cat", 0.99, False, ["dog", CLASSES[3]], ["dog", "cat"]),
        example(1, FILES[1], CLASSES[2], 0.98, False, ["dog"]),
        example(2, FILES[2], "dog", 0.97, False, []),
        example(0, FILES[0], "Zebra, striped", 0.96, False, ["dog", CLASSES[3]]),
    ]
    misses = [
        example(3, FILES[3], "dog", 0.01, True, ["dog", "cat"]),
        example(0, FILES[0], "dog", 0.02, True, ["dog", CLASSES[3]]),
    ]
    return [gallery("false_alarms", "False alarms", alarms), gallery("misses", "Misses", misses)]


def full(report):
    """The same as of a data set that is annotated in full."""
    for figures in report["classes"]:
        figures["negatives"] = report["images"] - figures["positives"]
    return report


def partial(report):
    report["classes"][0]["negatives"] -= 1
    return report


@pytest.fixture(scope="module")
def written(tmp_path_factory, photographs):
    """The folder of a report with all parts."""
    twin = {"file": FILES[0], "other": FILES[2], "split": "train", "other_split": "val", "bits": 3}
    difference = {"name": CLASSES[2], "AP": 71.5, "other": 70.0, "difference": interval(1.5, 1)}
    report = sample_report(
        CLASSES,
        galleries=galleries(),
        twins=[{**twin, "labels": ["dog"], "other_labels": ["<b>cat"]}],
        comparison={"other": "<i>other</i>", "mAP": interval(1.25), "classes": [difference]},
        notes=["No <objects> & no sizes."],
    )
    folder = tmp_path_factory.mktemp("report")
    write_report(full(report), folder, photographs)
    return folder


@pytest.fixture
def opened(browser):
    """Opens a page from the disk: opened(folder, **how); anything it complains of is an error."""
    contexts, wrong = [], []

    def unless_local(request):
        if not request.url.startswith(("file:", "data:", "blob:")):
            wrong.append(request.url)

    def open_(folder, **how):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **how})
        contexts.append(context)
        context.set_default_timeout(5000)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append("a dialog"), dialog.dismiss()))
        page.on("request", unless_local)
        page.goto((folder / "index.html").as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


def names_in(page):
    return page.locator("#class-table tbody .name").all_inner_texts()


def downloaded(page, button, root):
    """Downloads by the button into `root`; returns the lines."""
    with page.expect_download() as download:
        page.locator(button).click()
    assert download.value.suggested_filename == "corrections.csv"
    download.value.save_as(root / "corrections.csv")
    return (root / "corrections.csv").read_text().splitlines()


def labels_of(annotations):
    """By file: {class: 1, 0 or -1}."""
    rows = annotations.dense().tolist()
    return {
        file.decode(): dict(zip(annotations.classes, row, strict=True))
        for file, row in zip(annotations.files, rows, strict=True)
    }


def test_classes_are_sorted_by_name_and_by_figures(written, opened):
    page = opened(written)
    table = page.locator("#class-table")
    assert names_in(page)[0] == "dog"  # of the lowest AP
    table.get_by_role("button", name="Class").click()
    assert names_in(page) == ["<script>alert(1)</script>", "a \"b\" & it's", "cat", "dog", "élan",
                              "Zebra, striped"]  # fmt: skip
    head = table.locator("th", has=page.get_by_role("button", name="AP, %"))
    assert head.get_attribute("aria-sort") is None
    table.get_by_role("button", name="AP, %").click()
    assert head.get_attribute("aria-sort") == "descending"
    shown = page.locator("#class-table tbody tr td:nth-child(2)").all_inner_texts()
    assert shown == sorted(shown, reverse=True)
    assert len(shown) == len(CLASSES)


def test_classes_are_found_by_parts_of_their_names(written, opened):
    page = opened(written)
    page.locator("#search").fill("STRI")
    assert names_in(page) == ["Zebra, striped"]
    assert page.locator("#found").inner_text() == "1 of 6 classes"
    page.locator("#search").fill("<script>")
    assert names_in(page) == ["<script>alert(1)</script>"]
    page.locator("#search").fill("")
    page.locator("#enough").check()
    assert "dog" not in names_in(page)  # it has few positives
    assert len(names_in(page)) == 5


def test_the_threshold_is_that_of_the_chosen_rule(written, opened):
    page = opened(written)
    first = page.locator("#class-table tbody tr").first
    assert first.locator("td").nth(3).inner_text() == "0.800"
    page.locator("#rule").select_option("f1")
    assert first.locator("td").nth(3).inner_text() == "0.123"


def test_a_class_opens_its_curves_and_leads_to_its_examples(written, opened):
    page = opened(written)
    page.get_by_role("button", name="cat", exact=True).click()
    details = page.locator("tr.opened")
    details.locator("svg.marks").nth(1).wait_for()
    assert "13 positives" in details.inner_text()
    assert page.evaluate("document.activeElement.textContent") == "cat"
    details.get_by_role("button", name="False alarms: 1").click()
    shown = page.locator("#gallery-0 .example")
    assert shown.count() == 1
    assert "cat" in shown.inner_text()
    page.get_by_role("button", name="cat", exact=True).click()
    assert details.count() == 0


def test_a_gallery_shows_photographs_with_their_objects(written, opened):
    page = opened(written)
    cards = page.locator("#gallery-0 .example")
    assert cards.count() == 4  # the first gallery stands open
    image = cards.first.locator("img")
    assert image.evaluate("each => each.decode().then(() => each.naturalWidth)") == 240
    outlines = cards.first.locator("polygon")
    assert [each.get_attribute("class") for each in outlines.all()] == [None, "this"]
    box, outline = image.bounding_box(), outlines.last.bounding_box()
    # The polygon spans 0.1 to 0.6 of the width.
    assert outline["x"] - box["x"] == pytest.approx(0.1 * box["width"], abs=3)
    assert outline["width"] == pytest.approx(0.5 * box["width"], abs=4)
    text = cards.first.inner_text()
    assert 'truth dog, a "b" & it\'s' in text
    assert "predicted cat 0.99" in text
    assert "cannot be read" in cards.nth(2).inner_text()
    misses = page.locator("#gallery-1")
    assert misses.locator(".example").count() == 0
    misses.locator("summary").focus()
    page.keyboard.press("Enter")
    misses.locator(".example").nth(1).wait_for()
    page.locator("#twins summary").click()
    assert "<b>cat" in page.locator("#twins .example").inner_text()


def test_corrections_are_a_table_that_training_reads(written, opened, tmp_path):
    page = opened(written, accept_downloads=True)
    assert page.locator("#corrections").is_hidden()
    alarms, misses = page.locator("#gallery-0"), page.locator("#gallery-1")
    alarms.get_by_label("The label is wrong: cat is there").check()
    alarms.get_by_label("The label is wrong: <script>alert(1)</script> is there").focus()
    page.keyboard.press("Space")
    misses.locator("summary").click()
    misses.get_by_label("The label is wrong: dog is not there").first.check()
    misses.get_by_label("The label is wrong: dog is not there").last.check()
    assert page.locator("#how-many").inner_text() == "4 corrections"
    lines = downloaded(page, "#as-names", tmp_path)
    assert lines[0] == "path,labels"
    read_back = labels_of(read("table", tmp_path / "corrections.csv", "train", val_share=0))
    present = {
        file: {name for name, label in labels.items() if label == 1}
        for file, labels in read_back.items()
    }
    assert present == {
        FILES[0]: {"cat", CLASSES[3]},
        FILES[1]: {"dog", CLASSES[2]},
        FILES[3]: {"cat"},
    }
    assert {label for labels in read_back.values() for label in labels.values()} == {0, 1}
    downloaded(page, "#as-columns", tmp_path)
    columns = read("table", tmp_path / "corrections.csv", "train", val_share=0)
    assert list(columns.classes) == CLASSES
    assert {
        file: {name for name, label in labels.items() if label == 1}
        for file, labels in labels_of(columns).items()
    } == present
    assert not (columns.dense() == -1).any()


@pytest.mark.parametrize(
    ("button", "labels", "corrected"),
    [
        (
            "#as-names",
            ["path,labels", "x.jpg,cat", "a/1.png,dog", "broken.png,dog|cat"],
            ["path,labels", "x.jpg,cat", "a/1.png,cat|dog", "broken.png,cat"],
        ),
        (
            "#as-columns",
            ["path,cat,dog", "x.jpg,1,0", "a/1.png,0,1", "broken.png,1,1"],
            ["path,cat,dog", "x.jpg,1,0", "a/1.png,1,1", "broken.png,1,0"],
        ),
    ],
)
def test_corrections_go_into_a_table_as_the_document_says(
    written, opened, tmp_path, monkeypatch, button, labels, corrected
):
    monkeypatch.chdir(tmp_path)
    page = opened(written, accept_downloads=True)
    page.get_by_label("The label is wrong: cat is there").check()
    page.locator("#gallery-1 summary").click()
    page.get_by_label("The label is wrong: dog is not there").first.check()
    downloaded(page, button, tmp_path)
    (tmp_path / "labels.csv").write_text("\n".join(labels) + "\n")
    section = (REPOSITORY / "DATASETS.md").read_text().partition("### Corrections from")[2]
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], {})

    def read_table(lines):
        (tmp_path / "table.csv").write_text("\n".join(lines))
        names = read("table", tmp_path / "table.csv", "train", val_share=0)
        both = names.with_classes([names.classes.index(c) for c in ("cat", "dog")], ("cat", "dog"))
        return labels_of(both)

    made = (tmp_path / "corrected.csv").read_text().splitlines()
    assert read_table(made) == read_table(corrected)


def test_ticks_outlive_a_reload_and_are_taken_back(written, opened):
    page = opened(written)
    tick = page.get_by_label("The label is wrong: cat is there")
    tick.check()
    page.reload()
    assert tick.is_checked()
    assert page.locator("#how-many").inner_text() == "1 correction"
    tick.uncheck()
    assert page.locator("#corrections").is_hidden()


def test_what_is_not_annotated_stays_so_in_corrections(tmp_path, opened):
    report = partial(full(sample_report(CLASSES, galleries=galleries())))
    write_report(report, tmp_path)
    page = opened(tmp_path, accept_downloads=True)
    page.get_by_label("The label is wrong: cat is there").check()
    assert page.locator("#as-names").is_disabled()
    downloaded(page, "#as-columns", tmp_path)
    [labels] = labels_of(read("table", tmp_path / "corrections.csv", "train", val_share=0)).values()
    assert labels == dict(zip(CLASSES, [1, 1, -1, 1, -1, -1], strict=True))


def test_a_name_with_a_bar_needs_a_column(tmp_path, opened):
    truth = example(0, "1.jpg", "a|b", 0.9, False, ["c"])
    report = full(sample_report(["a|b", "c"], galleries=[gallery("false_alarms", "F", [truth])]))
    write_report(report, tmp_path)
    page = opened(tmp_path, accept_downloads=True)
    page.get_by_label("The label is wrong").check()
    assert page.locator("#as-names").is_disabled()
    assert downloaded(page, "#as-columns", tmp_path) == ["path,a|b,c", "1.jpg,1,1"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_choice(written, opened, scheme):
    page = opened(written, color_scheme=scheme)

    def ground():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    def axis():
        return page.locator("#curve .role-axis-label text").first.get_attribute("fill")

    page.locator("#curve").scroll_into_view_if_needed()
    page.locator("#curve svg.marks").wait_for()
    grounds = {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}
    assert ground() == grounds[scheme]
    before, other = axis(), "light" if scheme == "dark" else "dark"
    page.locator("#theme").select_option(other)
    assert ground() == grounds[other]
    page.wait_for_function(
        "before => document.querySelector('#curve .role-axis-label text')?.getAttribute('fill')"
        " !== before",
        arg=before,
    )
    page.reload()
    assert ground() == grounds[other]


# By WCAG 2.1, of all text on the page but that of charts and of what is switched off.
TOO_FAINT = """() => {
  const linear = (each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
  const light = (colour) => colour.match(/[0-9.]+/g).slice(0, 3)
    .reduce((sum, each, i) => sum + linear(each / 255) * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? behind(element.parentElement) : colour;
  };
  const contrast = (element) => {
    const inks = [getComputedStyle(element).color, behind(element)].map(light).sort();
    return (inks[1] + 0.05) / (inks[0] + 0.05);
  };
  return [...document.querySelectorAll("body *:not(svg *, :disabled)")]
    .filter((each) => each.checkVisibility())
    .filter((each) => [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .filter((each) => contrast(each) < 4.5)
    .map((each) => `${contrast(each)} ${each.outerHTML.slice(0, 80)}`);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(written, opened, scheme):
    page = opened(written, color_scheme=scheme)
    page.get_by_role("button", name="cat", exact=True).click()
    assert page.evaluate(TOO_FAINT) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(written, opened, width):
    page = opened(written, viewport={"width": width, "height": 800})
    page.get_by_role("button", name="cat", exact=True).click()
    page.get_by_label("The label is wrong: cat is there").check()
    for details in page.locator("details").all():
        details.evaluate("each => { each.open = true; }")
    for number in range(20):
        page.evaluate("number => scrollTo(0, 700 * number)", number)
    assert page.evaluate("document.documentElement.scrollWidth") == width


CONTROLS = """() => [...document.querySelectorAll("button, select, input, summary, a")]
  .filter((each) => each.checkVisibility()).map((each) => {
    each.focus();
    const reached = document.activeElement === each && each.tabIndex >= 0;
    return [reached, each.labels?.[0]?.textContent || each.textContent];
  })"""


def test_every_control_takes_the_focus_and_has_a_name(written, opened):
    controls = opened(written).evaluate(CONTROLS)
    assert len(controls) > 30
    assert [name for reached, name in controls if not reached] == []
    assert all(name.strip() for _, name in controls)


def test_names_are_text_and_never_html(written):
    text = (written / "index.html").read_text()
    assert "<script>alert" not in text
    assert "<i>other" not in text
    assert "No &lt;objects&gt; &amp; no sizes." in text
    assert "<b>cat" not in text
    elements = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "<b>" not in elements


def test_the_page_may_not_ask_any_network(written, browser):
    page = browser.new_page()
    page.goto((written / "index.html").as_uri())
    answer = page.evaluate("fetch('https://example.com').then(() => 'came', String)")
    page.close()
    assert "Content Security Policy" in answer or "Failed to fetch" in answer
    assert "default-src 'none'" in (written / "index.html").read_text()


def test_what_is_not_defined_is_a_dash(tmp_path, opened):
    nothing = {"value": None, "low": None, "high": None}
    point = dict.fromkeys(("threshold", "precision", "recall", "f1"))
    empty = {
        **class_figures(0, "empty"),
        "AP": {**nothing, "value": float("nan")},
        "points": [{"rule": "common", **point}],
        "curve": None,
    }
    report = sample_report(
        ["dog"],
        headline=[{"name": "mAP", "figure": nothing, "explanation": ""}],
        protocols=[{"name": "official", "mAP": None, "explanation": ""}],
        classes=[empty, class_figures(1, "dog")],
        repairs=[{"kind": "k", "mAP": None, "gain": None, "errors": 0, "explanation": ""}],
        sizes=[{"name": "small", "count": 0, "AP": None, "recall": float("nan")}],
        together=[{"title": "t", "explanation": "", "classes": ["dog"], "table": [[None]]}],
        curve=None,
        reliability=None,
        comparison={
            "other": "o",
            "mAP": nothing,
            "classes": [{"name": "dog", "AP": None, "other": None, "difference": nothing}],
        },
    )
    write_report(report, tmp_path)
    page = opened(tmp_path)
    assert page.locator(".card .value").inner_text() == "–"
    assert page.locator("#sizes, #parts td.bar").all_inner_texts() == ["–", "–", "91.5", "80.2"]
    assert names_in(page) == ["dog", "empty"]
    page.locator("#class-table").get_by_role("button", name="AP, %").click()
    assert names_in(page) == ["dog", "empty"]  # last in either direction
    page.get_by_role("button", name="empty").click()
    page.locator("tr.opened svg.marks").wait_for()
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["classes"][0]["AP"]["value"] is None
    assert saved["sizes"][0]["recall"] is None


def test_a_report_of_scores_alone_has_no_empty_sections(tmp_path, opened):
    report = sample_report(["dog"], repairs=[], sizes=[], numbers_of_labels=[], together=[])
    write_report(report, tmp_path)
    page = opened(tmp_path)
    sections = page.locator("main section").evaluate_all("all => all.map((each) => each.id)")
    assert sections == ["overview", "classes", "curves", "settings"]
    links = page.locator("nav a").evaluate_all("all => all.map((each) => each.hash.slice(1))")
    assert links == sections


def test_names_of_files_stand_in_for_photographs(tmp_path, opened):
    write_report(sample_report(CLASSES, galleries=galleries()), tmp_path)
    cards = opened(tmp_path).locator("#gallery-0 .example")
    assert "no photograph" in cards.first.inner_text()
    assert FILES[0] in cards.first.inner_text()


def test_many_classes_open_in_reasonable_time_and_space(tmp_path, opened):
    report = sample_report([f"/m/{number:05}" for number in range(9605)])
    write_report(report, tmp_path)
    assert (tmp_path / "index.html").stat().st_size < MAX_BYTES
    start = time.monotonic()
    page = opened(tmp_path)
    page.set_default_timeout(1000 * MAX_SECONDS_TO_OPEN)
    assert page.locator("#class-table .name").count() == 300
    page.locator("#search").fill("09604")
    assert names_in(page) == ["/m/09604"]
    page.locator("#search").fill("")
    page.get_by_role("button", name="Show more of 9,605").click()
    assert page.locator("#class-table .name").count() == 600
    assert time.monotonic() - start < MAX_SECONDS_TO_OPEN


def test_photographs_that_do_not_fit_are_left_out_with_a_note(tmp_path, monkeypatch):
    files = [f"{number}.png" for number in range(12)]
    for file in files:
        Image.effect_noise((240, 240), 80).save(tmp_path / file)
    shown = [example(0, file, "dog", 0.5, False, []) for file in files]
    report = sample_report(["dog"], galleries=[gallery("a", "A", shown), gallery("b", "B", shown)])
    whole = html(report, tmp_path)
    assert "photographs are not shown" not in whole
    limit = len(html(report).encode()) + 500_000
    monkeypatch.setattr("asl.evaluation.report.page.MAX_BYTES", limit)
    page = html(report, tmp_path)
    left_out = int(re.search(r"(\d+) of 12 photographs are not shown", page)[1])
    assert 0 < left_out < 12
    assert len(page.encode()) < limit


def test_a_report_takes_the_place_of_another_and_spares_what_lies_beside(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write_report(sample_report(["dog"], title="first"), tmp_path)
    write_report(sample_report(["dog"], title="second"), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"index.html", "report.json", "notes.txt"}
    assert json.loads((tmp_path / "report.json").read_text())["title"] == "second"
    assert "<h1>second</h1>" in (tmp_path / "index.html").read_text()


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write into .*file"):
        check_folder(tmp_path / "file")
    with pytest.raises(UsageError, match=r"cannot write into .*file/below"):
        check_folder(tmp_path / "file" / "below")
    check_folder(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
