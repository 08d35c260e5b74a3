"""A real browser without a window, for the pages that this project makes."""

import shutil

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


# Not of the session: its driver ends when its pipe is closed, and loader workers that a later test
# forks hold that open. A browser that outlived its module would wait for them for ever.
@pytest.fixture(scope="module")
def browser():
    """A Playwright `Browser` on the Chromium of this machine; where there is none, tests skip."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip(f"no browser: install one of {', '.join(CHROMIUM)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox does not start for root, as whom containers run. The pages are our own.
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()
