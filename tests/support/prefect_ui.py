"""Prefect's web interface as a person uses it: by what is written on links, fields and buttons."""

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Error, Locator, Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Nothing but the loopback is there, and root has no sandbox.
_ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage")
_VISIBLE_S = 90
_BEFORE_RELOAD_S = 15
_SIZE = {"width": 1280, "height": 860}


@contextmanager
def open_page() -> Iterator[Page]:
    """A page of the Chromium of this machine, without a window."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found is not None, f"no browser: install one of {', '.join(BROWSERS)}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(_ARGUMENTS))
        try:
            page = browser.new_page(viewport=_SIZE)
            page.set_default_timeout(1000 * _VISIBLE_S)
            yield page
        finally:
            browser.close()


class PrefectUi:
    """A person in front of the interface.

    Args:
        page: Of a browser.
        address: Of the server, without ``/api``.
        folder: Where pictures go.
    """

    def __init__(self, page: Page, address: str, folder: Path) -> None:
        self._page, self._address, self._folder = page, address, folder

    def open_form(self, deployment: str) -> None:
        """From the entrance to the form of a deployment."""
        self._page.goto(self._address)
        self._page.get_by_role("link", name="Deployments").click()
        links = self._page.locator("a[href*='/deployments/deployment/']")
        links.filter(has_text=re.compile(f"^{re.escape(deployment)}$")).click()
        self._page.get_by_role("button", name="Run", exact=True).click()
        self._page.get_by_role("menuitem", name="Custom run").click()
        self.field("Source").wait_for()

    def field(self, title: str) -> Locator:
        """The field with that title, its help and input in it."""
        label = self._page.locator("label", has_text=re.compile(rf"^{re.escape(title)}( \(Optional\))?$"))
        return self._page.locator("div.group").filter(has=label).last

    def fill(self, values: Mapping[str, Any]) -> None:
        """Type values into fields, by their titles."""
        for title, value in values.items():
            field = self.field(title)
            # What may be left out has a tab for a value beside the one for none.
            if (tabs := field.get_by_role("tab")).count():
                tabs.first.click()
            field.locator("textarea, input").first.fill(str(value))

    def submit(self) -> None:
        self._page.get_by_role("button", name="Submit").click()

    def refusal(self, title: str) -> str:
        """What the browser says to the person about the field that it put the cursor into."""
        entry = self.field(title).locator("input:focus:invalid")
        entry.wait_for()
        return entry.evaluate("found => found.validationMessage")

    def view_run(self) -> str:
        """Follow the message that a run was created; returns its id."""
        self._page.get_by_role("button", name="View run").click()
        self._page.wait_for_url("**/runs/flow-run/*")
        return self._page.url.partition("/flow-run/")[2].partition("?")[0]

    def text(self) -> str:
        return self._page.locator("main").inner_text()

    def wait_for(self, words: str, timeout_s: float) -> None:
        """Wait for words on the page, which is loaded anew where it has stopped to follow a run."""
        deadline = time.monotonic() + timeout_s
        wanted = self._page.locator("main").get_by_text(re.compile(words)).first
        while True:
            try:
                return wanted.wait_for(timeout=1000 * _BEFORE_RELOAD_S)
            except Error:
                assert time.monotonic() < deadline, f"no {words!r} after {timeout_s} s in:\n{self.text()}"
                self._page.reload()

    def open_tab(self, name: str) -> None:
        self._page.get_by_role("tab", name=name).click()

    def open_artifact(self, key: str) -> None:
        """From the artifacts of a run to the newest one with that key."""
        self._page.locator(f"main a[href$='/artifacts/key/{key}']").click()
        self._page.locator("main a[href*='/artifacts/artifact/']").first.click()
        self._page.wait_for_url("**/artifacts/artifact/*")

    def choose(self, entry: str, confirmation: str) -> None:
        """Choose from the menu of a run, and confirm."""
        self._page.get_by_role("button", name="Open menu").last.click()
        self._page.get_by_role("menuitem", name=entry).click()
        dialog = self._page.get_by_role("alertdialog").or_(self._page.get_by_role("dialog"))
        dialog.get_by_role("button", name=confirmation, exact=True).click()

    def back(self, run_id: str) -> None:
        """To the artifacts of a run."""
        self._page.goto(f"{self._address}/v2/runs/flow-run/{run_id}?tab=Artifacts")

    def show(self, title: str) -> None:
        """Scroll until that field is the first one seen."""
        self.field(title).evaluate("found => found.scrollIntoView({block: 'start'})")

    def picture(self, name: str, height: int = _SIZE["height"]) -> Path:
        """What is seen now, down to a height, as a PNG."""
        path = self._folder / f"{name}.png"
        self._page.screenshot(path=path, clip={"x": 0, "y": 0, "width": _SIZE["width"], "height": height})
        return path
