"""A real browser for tests and measurements: the system's Chromium through Playwright."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, Locator, Page, sync_playwright

ARGUMENTS = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync")


def chromium_path() -> str:
    """Where the system's Chromium is. Raises RuntimeError if there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    raise RuntimeError("no Chromium on this machine: install the package chromium")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


def unfold(header: Locator) -> None:
    """Unfold a group that is still folded, until its fields keep what is typed: Gradio 6.31 draws them, and gives them
    their old values once more a frame later."""
    header.click()
    header.evaluate("async () => { for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame); }")


@contextlib.contextmanager
def chromium_page(url: str, *, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """A page that has been opened at ``url``."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(url)
        page.wait_for_selector("#model")
        yield page
