"""The studio in a real browser: the whole loop by keyboard and mouse, hostile text, every page narrow and wide."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.studio_client import served, vote_of
from tests.tiny_models import tiny_folder
from tests.tiny_runs import tiny_rows, write_rows

FRONT = Path(__file__).parent.parent / "src" / "dpo_studio" / "studio" / "front"
LONG = 90_000
"""Milliseconds: a training, or a worker that imports torch, on a busy core."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Debian's; no Chromium is a failure."""
    path = shutil.which("chromium")
    assert path is not None, "apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(chromium: Browser, link: str, wrong: list[str]) -> Page:
    """A page that is logged in; what its console complains of is kept in `wrong`."""
    page = chromium.new_page()
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(link)
    return page


def go(page: Page, to: str) -> None:
    page.goto(f"{page.url.partition('#')[0]}#/{to}")


def test_the_loop_from_pairs_to_votes_to_training_on_the_votes(chromium: Browser, tmp_path: Path) -> None:
    """Data, report, run, curve, blind comparison, ten votes by key, pairs, training on them, export."""
    tiny_folder(tmp_path / "tiny")
    write_rows(tmp_path / "pairs.jsonl", tiny_rows(40))
    wrong: list[str] = []
    with served(tmp_path) as studio:
        page = opened(chromium, studio.link, wrong)
        expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()

        go(page, "data?path=pairs.jsonl")
        expect(page.get_by_text("1 to 20 of 40").first).to_be_visible(timeout=LONG)
        expect(page.get_by_text("Looked for and fine")).to_be_visible(timeout=LONG)
        page.get_by_role("link", name="Train on these pairs").click()

        train(page, "first")
        go(page, "runs")
        page.get_by_role("link", name="runs/first").click(timeout=LONG)
        expect(page.locator(".about .chip")).to_have_text("finished", timeout=LONG)
        expect(page.get_by_role("img", name="Loss over steps")).to_be_visible()

        go(page, "compare?left=tiny&right=runs%2Ffirst")
        page.get_by_text("Sampling").click()
        page.get_by_label("most new tokens").fill("8")
        for number in range(10):
            vote_by_key(page, f"How is it, {number}?", "1234"[number % 4])
        kept = page.evaluate("fetch('/api/votes').then(answer => answer.json())")
        assert [vote["choice"] for vote in kept] == [("left", "right", "tie", "both_bad")[n % 4] for n in range(10)]
        assert {frozenset(vote["models"].values()) for vote in kept} == {frozenset({"tiny", "runs/first"})}

        go(page, "votes")
        expect(page.get_by_text("10 votes")).to_be_visible()
        page.get_by_role("button", name="Export as pairs").click()
        expect(page.get_by_role("status")).to_contain_text("6 pairs are in votes.jsonl; 2 ties and 2")
        page.get_by_role("link", name="Train on these votes").click()
        pairs = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
        for vote, pair in zip([vote for vote in kept if vote["choice"] in ("left", "right")], pairs, strict=True):
            assert pair["chosen"][0]["content"] == vote["answers"][vote["choice"]]

        train(page, "second", fraction="0")
        go(page, "runs")
        page.get_by_role("link", name="runs/second").click(timeout=LONG)
        expect(page.locator(".about .chip")).to_have_text("finished", timeout=LONG)
        page.get_by_role("link", name="Export").last.click()
        page.get_by_label("Into the folder").fill("out")
        page.get_by_role("button", name="Export").click()
        expect(page.locator(".panel .chip")).to_have_text("finished", timeout=LONG)
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not wrong


def train(page: Page, name: str, fraction: str = "0.2") -> None:
    """Fill the form and start."""
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_label("model.path").fill("tiny")
    page.get_by_label("data.held_out.fraction").fill(fraction)
    page.get_by_text("All of training").click()
    page.get_by_label("training.pairs_per_step").fill("2")
    page.get_by_label("training.learning_rate").fill("0.01")  # so that a tiny model answers otherwise than its base
    page.get_by_label("training.learning_rate").press("Tab")
    expect(page.get_by_label("Recipe (YAML)")).to_have_value(re.compile(f"folder: runs/{name}"))
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_text(f"$ dpo train ./{name}.yaml")).to_be_visible(timeout=LONG)


def vote_by_key(page: Page, prompt: str, key: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Ask both").click()
    expect(page.get_by_role("button", name="Left is better")).to_be_enabled(timeout=LONG)
    assert page.get_by_role("heading", name="Left").is_visible()  # and not the model's name
    page.keyboard.press(key)
    expect(page.get_by_text("Your vote is kept")).to_be_visible()
    page.keyboard.press("n")


def test_what_models_and_data_say_is_text(chromium: Browser, tmp_path: Path) -> None:
    """Markup in prompts, answers, names and votes is shown as it is written, and nothing is fetched for it."""
    evil = (
        '<script>document.title="taken"</script><img src=x onerror="document.title=1">![a](https://evil.example/b.png)'
    )
    write_rows(tmp_path / "evil.jsonl", [{"prompt": evil, "chosen": f"{evil} a", "rejected": f"{evil} b"}] * 2)
    wrong: list[str] = []
    with served(tmp_path) as studio:
        page = opened(chromium, studio.link, wrong)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        go(page, "data?path=evil.jsonl")
        expect(page.get_by_text("onerror").first).to_be_visible(timeout=LONG)
        page.evaluate(
            "vote => fetch('/api/votes', {method: 'POST', headers: {'content-type': 'application/json'},"
            " body: JSON.stringify(vote)})",
            vote_of(1, left=evil, right="b"),
        )
        go(page, "votes")
        expect(page.get_by_text("onerror").first).to_be_visible()
        assert page.title() == "Votes · DPO Studio"
        assert all(url.startswith(studio.url) for url in asked)
    assert not wrong


@pytest.mark.parametrize("width", [1440, 390])
def test_every_page_is_readable_for_everybody(chromium: Browser, tmp_path: Path, width: int) -> None:
    """No page is wider than its window; every field, button and figure has a name."""
    wrong: list[str] = []
    with served(tmp_path) as studio:
        page = opened(chromium, studio.link, wrong)
        page.set_viewport_size({"width": width, "height": 900})
        for name in ("runs", "data", "new", "compare", "votes", "chat", "export", "machine"):
            go(page, name)
            page.wait_for_load_state("networkidle")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
            unnamed = page.evaluate(
                "[...document.querySelectorAll('input, select, textarea, button, a')]"
                ".filter(e => !(e.labels?.length || e.ariaLabel || e.innerText?.trim())).map(e => e.outerHTML)"
            )
            assert unnamed == [], name
    assert not wrong


def test_the_built_pages_are_those_of_their_sources() -> None:
    """`make front` writes the sums of what it was built from and of what it built."""
    files = [*(FRONT / "src").iterdir(), FRONT / "build.mjs", FRONT.parents[3] / "package-lock.json"]
    files += [FRONT / "dist" / name for name in ("app.css", "app.js", "index.html")]
    sums = sorted(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files)
    assert sorted((FRONT / "dist" / "SHA256SUMS").read_text().splitlines()) == sums, "run `make front`"
    assert sum(file.stat().st_size for file in (FRONT / "dist").iterdir()) < 300_000
