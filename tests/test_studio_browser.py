"""The studio in a real browser: the loop by keyboard, hostile text, every page narrow and wide, light and dark."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import get_args

import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from pydantic import BaseModel

from dpo_studio.config import Recipe
from dpo_studio.objectives import OBJECTIVES
from dpo_studio.objectives.formula import Formula
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
        write(page, page.get_by_label("Into the folder").first, "out")
        expect(page.get_by_text("$ dpo export ./runs/second ./out --to adapter")).to_be_visible()
        page.keyboard.press("Enter")
        expect(page.get_by_role("region", name="check of the export")).to_be_visible(timeout=LONG)
        expect(page.locator(".panel .panel .chip")).to_have_text("finished", timeout=LONG)
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


def test_a_page_of_another_port_of_this_machine_can_do_nothing(browser: Browser, tmp_path: Path) -> None:
    """Its requests carry our cookie, for ports are one site; still none is answered, and none changes anything."""
    page_of_others = b"<!doctype html><title>others</title><form method=post enctype=text/plain target=_self></form>"

    class Others(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(page_of_others)

        def log_message(self, *_: object) -> None:
            pass

    tries = """async ([url, vote]) => {
        const ask = (how) => fetch(url + '/api/votes', {credentials: 'include', ...how}).then(answer => answer.text());
        const ways = {
            read: () => ask({}),
            blind: () => ask({mode: 'no-cors'}),
            json: () => ask({method: 'POST', body: vote, headers: {'content-type': 'application/json'}}),
            plain: () => ask({method: 'POST', mode: 'no-cors', body: vote}),
            events: () => new Promise((yes, no) => {
                const events = new EventSource(url + '/api/runs/x/events', {withCredentials: true});
                events.onopen = yes; events.onerror = () => { events.close(); no(new Error('no')); };
            }),
            frame: () => new Promise((yes, no) => {
                const frame = document.body.appendChild(document.createElement('iframe'));
                frame.onload = () => { try { yes(frame.contentDocument.body.innerText); } catch { no(); } };
                frame.src = url + '/';
            }),
        };
        const told = {};
        for (const [name, way] of Object.entries(ways))
            told[name] = await way().then(said => String(said ?? ''), () => 'refused');
        document.forms[0].action = url + '/api/votes';
        document.forms[0].submit();
        return told;
    }"""
    with served(tmp_path) as studio, ThreadingHTTPServer(("127.0.0.1", 0), Others) as others:
        Thread(target=others.serve_forever, daemon=True).start()
        context = browser.new_context()
        page = context.new_page()
        page.goto(studio.link)
        expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
        other = context.new_page()
        other.goto(f"http://127.0.0.1:{others.server_port}/")
        told = other.evaluate(tries, [studio.url, json.dumps(vote_of(1))])
        other.wait_for_load_state()
        assert {name: text for name, text in told.items() if text not in ("refused", "")} == {}, told
        assert page.evaluate("fetch('/api/votes').then(answer => answer.json())") == []
        others.shutdown()
        context.close()


def test_a_run_page_catches_up_when_its_studio_comes_back(browser: Browser, tmp_path: Path, tiny_run: Path) -> None:
    """SIGKILL while the page watches; two steps later the studio is started again on the same port."""
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    metrics = tmp_path / "run" / "metrics.jsonl"
    with served(tmp_path) as first:
        page = opened(browser, first.link, [])
        page.goto(f"{first.url}/#/run/run")
        expect(page.get_by_role("img", name="Loss over steps")).to_be_visible(timeout=LONG)
        port = int(first.url.rpartition(":")[2])
    expect(page.get_by_text("The connection was lost")).to_be_visible(timeout=LONG)
    last = json.loads(metrics.read_text().splitlines()[-1])
    with metrics.open("a") as file:
        for step in (5, 6):
            file.write(json.dumps(last | {"step": step, "loss": 0.125 * step}) + "\n")
    with served(tmp_path, port=port):
        expect(page.get_by_role("img", name="Loss over steps. Last values: loss: 0.75")).to_be_visible(timeout=LONG)
        expect(page.get_by_text("The connection was lost")).not_to_be_visible(timeout=LONG)
        expect(page.locator(".about")).to_contain_text("step 6", timeout=LONG)
        steps = page.evaluate(
            "fetch('/api/runs/run/metrics').then(answer => answer.json()).then(all => all.columns.step)"
        )
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_form_of_a_run_has_every_key_and_each_message_beside_its_field(browser: Browser, tmp_path: Path) -> None:
    """The keys are those of the recipe's own sections, walked here; each loss brings its own."""
    wrong: list[str] = []
    with served(tmp_path) as studio:
        page = opened(browser, studio.link, wrong)
        go(page, "new")
        named = "[...document.querySelectorAll('main [name]')].map(each => each.name)"
        shown = set(page.evaluate(named))
        assert shown == keys_of(Recipe) - {"objective"} | fields_of(OBJECTIVES[0])
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        for formula in OBJECTIVES:
            page.get_by_label("objective.kind").select_option(formula.kind)
            assert {name for name in page.evaluate(named) if name.startswith("objective")} == fields_of(formula)
        page.get_by_label("objective.kind").select_option("ipo")
        for key, text in {
            "training.epochs": "-1",
            "training.betas": "[0.9, 2]",
            "adapter.targets": "[]",
            "data.train.map": "{}}",
            "training.save_every": "often",
            "model.path": "../elsewhere",
        }.items():
            page.get_by_label(key, exact=True).fill(text)
            expect(page.get_by_label(key, exact=True)).to_have_attribute("aria-invalid", "true")
            expect(
                page.locator(f"[name='{key}']").locator("xpath=ancestor::div[1]").get_by_role("alert")
            ).to_be_visible()
        page.get_by_label("Recipe (YAML)").fill("model: {pth: x}")
        expect(page.get_by_text("model.pth").first).to_be_visible()
    assert not wrong


def keys_of(section: type[BaseModel], before: str = "") -> set[str]:
    """The keys of a recipe's section, from its Python class; those of a section inside are its own."""
    found: set[str] = set()
    for name, field in section.model_fields.items():
        choices = (field.annotation, *get_args(field.annotation))
        choices = (*choices, *(each for choice in choices for each in get_args(choice)))  # in an Annotated, too
        inside = [each for each in choices if isinstance(each, type) and issubclass(each, BaseModel)]
        found |= keys_of(inside[0], f"{before}{name}.") if inside else {f"{before}{name}"}
    return found


def fields_of(formula: type[Formula]) -> set[str]:
    return {f"objective.{field.name}" for field in dataclasses.fields(formula)}


def test_the_built_pages_are_those_of_their_sources() -> None:
    """`make front` writes the sums of what it was built from and of what it built."""
    files = [*(FRONT / "src").iterdir(), FRONT / "build.mjs", FRONT.parents[3] / "package-lock.json"]
    files += [FRONT / "dist" / name for name in ("app.css", "app.js", "index.html")]
    sums = sorted(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files)
    assert sorted((FRONT / "dist" / "SHA256SUMS").read_text().splitlines()) == sums, "run `make front`"
    assert sum(file.stat().st_size for file in (FRONT / "dist").iterdir()) < 300_000
