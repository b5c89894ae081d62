"""Chromium for tests of pages: found or skipped, and a page with everything that it asked for or complained about."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

SECONDS = 30  # to wait for a page, which is far more than it takes
# Text that is too faint on what lies behind it (WCAG 2.2 AA: 4.5, large text 3); what cannot be used is exempt.
FAINT = """() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { const own = e ? parse(getComputedStyle(e).backgroundColor) : [255, 255, 255, 1];
    return own[3] === 1 ? own : over(own, behind(e.parentElement)); };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const text = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join('').trim();
    if (!text || !e.getClientRects().length || e.closest('.off, .unseen, :disabled, noscript, svg, option')) continue;
    const style = getComputedStyle(e), ground = behind(e), ink = over(parse(style.color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    const px = parseFloat(style.fontSize), large = px >= 24 || (px >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${e.className || e.tagName}: ${text.slice(0, 40)}`);
  }
  return found;
}"""
# Controls that a screen reader could not name.
NAMELESS = """() => [...document.querySelectorAll('input:not([type=hidden]), select, button, progress, dialog, a')]
  .filter((e) => !(e.labels?.length || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')
    || e.textContent.trim() || e.closest('[data-part=done]'))).map((e) => e.outerHTML.slice(0, 120))"""
WIDE = "document.documentElement.scrollWidth - window.innerWidth"


def absent(why: str) -> None:
    """Skip; fail where MECHINT_REQUIRE_BROWSER says that a browser must be there."""
    if os.environ.get("MECHINT_REQUIRE_BROWSER"):
        pytest.fail(f"MECHINT_REQUIRE_BROWSER is set, but {why}")
    pytest.skip(why)


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser."""
    try:
        from playwright.sync_api import expect as wait_for
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("the playwright package is not installed")
    wait_for.set_options(timeout=SECONDS * 1000)
    if CHROMIUM is None:
        absent("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def expect(locator: Any) -> Any:
    """Playwright's, which waits until what is asserted is so."""
    from playwright.sync_api import expect as wait_for

    return wait_for(locator)


class Visitor:
    """A person's page of a site, in a context of its own. `check` at the end: nothing was asked of anyone else, nothing
    was said on the console (refusals that a test provokes aside), and no text of the data ran."""

    def __init__(self, browser: Any, site: str, *, width: int = 1280, scheme: str = "light", script: bool = True):
        self.site = site
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=script
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(SECONDS * 1000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, place: str) -> Any:
        self.page.goto(self.site + place)
        return self.page

    def check(self, *, refusals: bool = False) -> None:
        refused = r"Failed to load resource: the server responded with a status of 4\d\d"
        assert [text for text in self.said if not (refusals and re.match(refused, text))] == [], self.said
        assert [url for url in self.asked if not url.startswith((self.site + "/", "about:", "data:"))] == []
        self.context.close()
