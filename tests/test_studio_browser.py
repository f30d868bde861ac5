"""The studio in a real browser: the loop by keyboard, hostile text, every page narrow and wide, light and dark."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.studio_client import served, vote_of
from tests.studio_pages import PAGES, chromium, go, opened, reach, something_to_see, violations, write
from tests.tiny_models import tiny_folder
from tests.tiny_runs import tiny_rows, write_rows

FRONT = Path(__file__).parent.parent / "src" / "dpo_studio" / "studio" / "front"
LONG = 90_000
"""Milliseconds: a training, or a worker that imports torch, on a busy core."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def test_the_loop_from_pairs_to_votes_to_training_on_the_votes(browser: Browser, tmp_path: Path) -> None:
    """Data, report, run, curve, blind comparison, ten votes, pairs, training on them, export: all by keyboard."""
    tiny_folder(tmp_path / "tiny")
    write_rows(tmp_path / "pairs.jsonl", tiny_rows(40))
    wrong: list[str] = []
    with served(tmp_path) as studio:
        page = opened(browser, studio.link, wrong)
        expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()

        follow(page, "Data")
        write(page, page.get_by_label("Pairs", exact=True), "pairs.jsonl")
        page.keyboard.press("Enter")
        expect(page.get_by_text("1 to 20 of 40").first).to_be_visible(timeout=LONG)
        expect(page.get_by_text("Looked for and fine")).to_be_visible(timeout=LONG)
        press(page, page.get_by_role("button", name="mend row 0"))
        write(page, page.get_by_label("chosen of row 0"), "These are better words.")
        assert violations(page) == []
        press(page, page.get_by_role("button", name="Keep these words"))
        write(page, page.get_by_label("Save as a new file"), "mended.jsonl")
        page.keyboard.press("Enter")
        expect(page.get_by_text("40 pairs are in mended.jsonl")).to_be_visible(timeout=LONG)
        assert "better words" in (tmp_path / "mended.jsonl").read_text().splitlines()[0]
        follow(page, "Train on them")

        train(page, "first")
        follow(page, "See its curves")
        expect(page.locator(".about .chip")).to_have_text("finished", timeout=LONG)
        expect(page.get_by_role("img", name="Loss over steps")).to_be_visible()

        follow(page, "Compare with its base")
        expect(page.get_by_label("One model")).to_have_value("tiny")
        press(page, page.get_by_text("Sampling"))
        write(page, page.get_by_label("most new tokens"), "8")
        for number in range(10):
            vote_by_key(page, f"How is it, {number}?", "1234"[number % 4])
        assert violations(page) == []
        kept = page.evaluate("fetch('/api/votes').then(answer => answer.json())")
        assert [vote["choice"] for vote in kept] == [("left", "right", "tie", "both_bad")[n % 4] for n in range(10)]
        assert {frozenset(vote["models"].values()) for vote in kept} == {frozenset({"tiny", "runs/first"})}

        follow(page, "Votes")
        expect(page.get_by_text("10 votes")).to_be_visible()
        press(page, page.get_by_role("button", name="Export as pairs"))
        expect(page.get_by_role("status")).to_contain_text("6 pairs are in votes.jsonl; 2 ties and 2")
        follow(page, "Train on these votes")
        pairs = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
        for vote, pair in zip([vote for vote in kept if vote["choice"] in ("left", "right")], pairs, strict=True):
            assert pair["chosen"][0]["content"] == vote["answers"][vote["choice"]]

        train(page, "second", fraction="0")
        follow(page, "See its curves")
        expect(page.locator(".about .chip")).to_have_text("finished", timeout=LONG)
        press(page, page.locator(".actions").get_by_role("link", name="Export"))
        write(page, page.get_by_label("Into the folder"), "out")
        page.keyboard.press("Enter")
        expect(page.locator(".panel .chip")).to_have_text("finished", timeout=LONG)
        assert violations(page) == []
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not wrong


def press(page: Page, target: Locator) -> None:
    """Tab to a button or a link, and press it."""
    reach(page, target)
    page.keyboard.press("Enter")


def follow(page: Page, name: str) -> None:
    press(page, page.get_by_role("link", name=name, exact=True))


def train(page: Page, name: str, fraction: str = "0.2") -> None:
    """Fill the form and start."""
    write(page, page.get_by_label("Name", exact=True), name)
    write(page, page.get_by_label("model.path"), "tiny")
    write(page, page.get_by_label("data.held_out.fraction"), fraction)
    press(page, page.get_by_text("All of training"))
    write(page, page.get_by_label("training.pairs_per_step"), "2")
    write(page, page.get_by_label("training.learning_rate"), "0.01")  # so that it answers otherwise than its base
    page.keyboard.press("Tab")
    for line in (f"folder: runs/{name}", "learning_rate: 0.01", "pairs_per_step: 2"):
        expect(page.get_by_label("Recipe (YAML)")).to_have_value(re.compile(line))
    press(page, page.get_by_role("button", name="Start training"))
    expect(page.get_by_text(f"$ dpo train ./{name}.yaml")).to_be_visible(timeout=LONG)


def vote_by_key(page: Page, prompt: str, key: str) -> None:
    write(page, page.get_by_label("Prompt", exact=True), prompt)
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("button", name="Left is better")).to_be_enabled(timeout=LONG)
    assert page.get_by_role("heading", name="Left").is_visible()  # and not the model's name
    page.keyboard.press(key)
    expect(page.get_by_text("Your vote is kept")).to_be_visible()
    page.keyboard.press("n")


def test_what_models_and_data_say_is_text(browser: Browser, tmp_path: Path) -> None:
    """Markup in prompts, answers, names and votes is shown as it is written, and nothing is fetched for it."""
    evil = (
        '<script>document.title="taken"</script><img src=x onerror="document.title=1">![a](https://evil.example/b.png)'
    )
    write_rows(tmp_path / "evil.jsonl", [{"prompt": evil, "chosen": f"{evil} a", "rejected": f"{evil} b"}] * 2)
    wrong: list[str] = []
    with served(tmp_path) as studio:
        page = opened(browser, studio.link, wrong)
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


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")])
def test_every_page_is_readable_for_everybody(
    browser: Browser, tmp_path: Path, tiny_run: Path, width: int, theme: str
) -> None:
    """axe-core finds nothing against any page; none is wider than its window."""
    something_to_see(tmp_path, tiny_run)
    wrong: list[str] = []
    with served(tmp_path) as studio:
        page = opened(browser, studio.link, wrong, color_scheme=theme, viewport={"width": width, "height": 900})
        for name, where in PAGES.items():
            go(page, where)
            page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
            assert violations(page) == [], name
        page.close()
    assert not wrong


def test_the_built_pages_are_those_of_their_sources() -> None:
    """`make front` writes the sums of what it was built from and of what it built."""
    files = [*(FRONT / "src").iterdir(), FRONT / "build.mjs", FRONT.parents[3] / "package-lock.json"]
    files += [FRONT / "dist" / name for name in ("app.css", "app.js", "index.html")]
    sums = sorted(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files)
    assert sorted((FRONT / "dist" / "SHA256SUMS").read_text().splitlines()) == sums, "run `make front`"
    assert sum(file.stat().st_size for file in (FRONT / "dist").iterdir()) < 300_000
