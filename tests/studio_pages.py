"""The pages in Debian's Chromium: opened, filled with something to see, looked over by axe, walked by keyboard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page, sync_playwright

from dpo_studio.studio.store import Store
from tests.studio_client import vote_of
from tests.tiny_runs import tiny_rows, write_rows

__all__ = ["PAGES", "chromium", "go", "opened", "reach", "something_to_see", "violations", "write"]

PAGES = {
    "runs": "runs",
    "run": "run/runs%2Fdone",
    "data": "data?path=pairs.jsonl",
    "new": "new",
    "compare": "compare",
    "votes": "votes",
    "chat": "chat",
    "export": "export?run=runs%2Fdone",
    "machine": "machine",
}
"""Every page, with something on it where `something_to_see` was made."""
_TABS = 200
"""More than any page has fields and buttons."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's; no Chromium is a failure."""
    path = shutil.which("chromium")
    assert path is not None, "apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, link: str, wrong: list[str], **how: Any) -> Page:
    """A page that is logged in; what its console complains of is kept in `wrong`."""
    page = browser.new_page(**how)
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(link)
    return page


def go(page: Page, to: str) -> None:
    """Another page of the studio, and what it asks for at first."""
    page.goto(f"{page.url.partition('#')[0]}#/{to}")
    page.wait_for_load_state("networkidle")


def something_to_see(folder: Path, run: Path) -> None:
    """A finished run, pairs with a row that is none, and votes on three models from two sets of prompts."""
    shutil.copytree(run, folder / "runs" / "done")
    write_rows(folder / "pairs.jsonl", [*tiny_rows(30), {"prompt": "same?", "chosen": "a", "rejected": "a"}])
    models = [("base", "runs/done"), ("runs/done", "other"), ("base", "other")]
    choices = ["left", "right", "right", "tie", "both_bad", "left", "right"]
    with Store.of_folder(folder).writing() as db:
        for number in range(42):
            left, right = models[number % 3]
            vote = vote_of(number, choices[number % 7], left, right, prompt_set="prompts.txt" if number % 2 else "")
            db.execute("INSERT INTO votes (id, time, content) VALUES (?, ?, ?)", (vote["id"], "", json.dumps(vote)))


def violations(page: Page) -> list[str]:
    """What axe-core finds against WCAG 2.2 A and AA and its own best practices: rule and element."""
    axe = (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    page.evaluate(f"window.axe || (() => {{ {axe} }})()")  # over the debugger, where the policy against scripts ends
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']}).then(result => result.violations)")
    return [f"{each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"]]


def reach(page: Page, target: Locator) -> None:
    """Tab until the target has the focus, and see that it shows."""
    target.wait_for()
    for _ in range(_TABS):
        if target.evaluate("element => element === document.activeElement"):
            assert target.evaluate("element => getComputedStyle(element).outlineStyle !== 'none'"), "no focus is seen"
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not lead to {target}")


def write(page: Page, target: Locator, text: str) -> None:
    """Tab to a field and type into it."""
    reach(page, target)
    page.keyboard.press("Control+a")
    page.keyboard.type(text)
