"""What the tests in a real browser share: where it is, what a page complains about, and what axe says of it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


class Troubles:
    """What a page complains about, and what it asks of others than ``origin``."""

    def __init__(self, page: Page, origin: str) -> None:
        self.found: list[str] = []
        page.on("console", lambda message: self._note(message.text, message.type in ("error", "warning")))
        page.on("pageerror", lambda error: self._note(str(error), True))
        page.on("request", lambda request: self._note(request.url, not request.url.startswith((origin, "data:"))))

    def _note(self, text: str, bad: bool) -> None:
        if bad:
            self.found.append(text)


def violations(page: Page) -> list[tuple[str, str]]:
    """Accessibility violations that axe calls moderate or worse."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [(entry["id"], entry["impact"]) for entry in found if entry["impact"] != "minor"]
