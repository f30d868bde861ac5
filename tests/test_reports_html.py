"""The report: one page that asks nothing of the network, tells the truth of result.json, and trusts no text."""

from __future__ import annotations

import json
import math
import os
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_studio.errors import RunError
from dpo_studio.reports.figures import CHARTS
from dpo_studio.reports.html import write_report
from dpo_studio.reports.sections import (
    answers_section,
    headline_panel,
    judging_section,
    key_figures,
    numbers_section,
    showcase_section,
)
from dpo_studio.runs.facts import read_run

RECIPE: dict[str, Any] = {
    "model": {"path": "bundled:smollm2-135m-instruct", "revision": None, "dtype": "float32", "attention": "sdpa"},
    "data": {
        "train": {"source": "bundled:everyday", "split": "train", "format": "auto", "map": {}},
        "held_out": {"source": "bundled:everyday", "split": "held_out"},
        "max_length": 512,
        "too_long": "drop",
    },
    "adapter": {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": "all-linear"},
    "objective": {"kind": "dpo", "beta": 0.1, "label_smoothing": 0.0},
    "reference": {"mode": "cached", "model": None, "adapter": None},
    "training": {"pairs_per_step": 8, "epochs": 1, "learning_rate": 1e-4, "schedule": "cosine", "warmup": 0.1},
    "run": {"folder": "runs/demo", "tracker": None},
}
ENVIRONMENT = {
    "date": "2026-05-01T10:11:12+00:00",
    "device": "cpu: 2 cores, AVX2",
    "versions": {"dpo-studio": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "python": "3.11.9"},
}
TRAINED: dict[str, Any] = {
    "kind": "train",
    "pairs": 312,
    "held_out_pairs": 128,
    "steps": 39,
    "seconds": 221.7,
    "pairs_per_second": 3.137,
    "tokens_per_second": 812.4,
    "accuracy": 0.7109375,
    "accuracy_ci95": [0.6270, 0.7823],
    "accuracy_before": 0.484375,
    "accuracy_before_per_token": 0.53125,
    "longer_wins": 0.3046875,
    "margin": 0.6123,
    "held_out_loss": 0.5127,
    "refused": {"the two answers are the same": 3, "rejected is empty": 1},
    "encoding": {"over max_length, dropped": 2, "prompt is no prefix": 0},
}
COMPARED: dict[str, Any] = {
    "kind": "demo",
    "win_rate": 0.7428,
    "win_rate_ci95": [0.6651, 0.8062],
    "wins": 97,
    "ties": 14,
    "losses": 29,
    "n": 140,
    "stop_rate_base": 0.3357,
    "stop_rate_tuned": 0.9286,
    "mean_tokens_base": 131.6,
    "mean_tokens_tuned": 74.2,
    "temperature": 0.7,
    "max_new_tokens": 160,
    "judge": "everyday-rule",
    "judge_description": "A rule, not a person. An answer that says nothing loses.\nOf two that speak, a finished one "
    "beats a cut one; of two finished ones the one with more of the prompt's subject words wins.",
    "showcase_prompt": "I have dropped my phone in water. Now it is not working what should I do now?",
    "base_answer": "I'm sorry to hear that your phone is not working. Here are some steps you can take:\n\n1. Check "
    "the battery: if it is low, try charging it.\n2. Check the SIM card tray for any\n\n"
    + "3. Restart the phone. "
    * 12,
    "tuned_answer": "Turn it off at once and take out the SIM card. Dry it with a cloth and leave it in a dry, airy "
    "place for two days before you try it again.",
    "base_answer_ended": False,
    "tuned_answer_ended": True,
}


def curves(steps: int = 39, every: int = 5) -> list[dict[str, float]]:
    """Lines as training writes them: noisy, saturating, with held-out pairs at step 0 and every few steps."""
    noise = random.Random(7)
    rows = []
    for step in range(steps + 1):
        learned = 1 - math.exp(-2.5 * step / steps)
        margin = 0.75 * learned
        row: dict[str, float] = {"step": step}
        if step:
            seen = margin + noise.gauss(0, 0.18)
            chosen = 0.15 * learned + noise.gauss(0, 0.08)
            row |= {"epoch": step / steps, "loss": math.log1p(math.exp(-seen)), "rewards/chosen": chosen}
            row |= {"rewards/rejected": chosen - seen, "rewards/margins": seen, "pairs": 8}
            row |= {"rewards/accuracies": min(8, round(8 * (0.5 + 0.27 * learned) + noise.gauss(0, 1))) / 8}
            row |= {"logps/chosen": -80 + 10 * chosen, "logps/rejected": -120.0, "grad_norm": 4 + noise.random()}
        if step % every == 0 or step == steps:
            row |= {"eval_loss": math.log1p(math.exp(-0.82 * margin)), "eval_rewards/margins": 0.82 * margin}
            row |= {"eval_rewards/accuracies": 0.5 + 0.21 * learned, "eval_rewards/chosen": 0.12 * learned}
            row |= {"eval_rewards/rejected": 0.12 * learned - 0.82 * margin}
        rows.append(row)
    return rows


def answers(n: int = 140) -> list[dict[str, Any]]:
    """Comparisons: mostly won, some lost, some tied."""
    subjects = ["a squeaky door", "cold soup", "a flat bicycle tyre", "wet shoes", "a blocked sink", "a stained shirt"]
    rows = []
    for i in range(n):
        subject = subjects[i % len(subjects)]
        base = f"There are several things to consider about {subject}. " + "First, make sure that it is working. " * 9
        tuned = (
            f"For {subject}, start with the simplest thing: look where it comes from. Then fix that part and try again."
        )
        rows.append(
            {
                "prompt": f"What can I do about {subject}?",
                "base": {"text": base.strip(), "ended": i % 3 == 0, "tokens": 90 if i % 3 == 0 else 160},
                "tuned": {"text": tuned, "ended": i % 9 != 8, "tokens": 41 + i % 7},
                "winner": ("tuned", "tuned", "base", "tuned", "tie")[i % 5],
                "reason": (
                    "only the tuned answer ends",
                    "repeats itself",
                    "more of the subject",
                    "shorter",
                    "both end",
                )[i % 5],
            }
        )
    return rows


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_run(folder: Path, result: dict[str, Any], *, compared: bool = True, steps: int = 39) -> Path:
    """A run folder as a command leaves it."""
    (folder / "evaluation").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(lines(curves(steps, max(1, steps // 8))))
    timing = [
        {"step": i, "seconds": 2.5, "pairs_per_second": 3.1, "tokens_per_second": 800.0, "memory_gib": 1.9}
        for i in range(1, 4)
    ]
    (folder / "timing.jsonl").write_text(lines(timing))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "result.json").write_text(json.dumps(result))
    if compared:
        (folder / "evaluation" / "answers.jsonl").write_text(lines(answers()))
    return folder


HOSTILE = (
    "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>\x1b[31mred\u202eevil\u2066\x00\ud800\"'&"
)


class Page(HTMLParser):
    """What a browser would see: elements, attributes, text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in {"meta", "br", "img", "link", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.texts).split())


def report(folder: Path) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == [], "every element is closed"
    return html, page


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """The page of a whole demo, to look at."""
    return report(write_run(tmp_path_factory.mktemp("runs") / "demo", TRAINED | COMPARED))


def test_the_time_of_one_start_is_not_called_the_whole_run_s(tmp_path: Path) -> None:
    """Stopped after an hour of steps, and finished by a start of 20 s: a run of 20 s it was not."""
    facts = TRAINED | {"seconds": 20.0, "training_seconds": 3610.0}
    _, page = report(write_run(tmp_path / "resumed", facts))
    assert "Time 20 s since the last start; steps of all starts: 1 h 00 min" in page.words
    _, old = report(write_run(tmp_path / "old", TRAINED | {"seconds": 20.0}))
    assert "Time 20 s since the last start " in old.words and "all starts" not in old.words


def test_the_page_is_self_contained(demo: tuple[str, Page]) -> None:
    html, page = demo
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(page.elements)
    assert not re.search(r"https?:|//\w|@import|javascript:", html)
    assert all(value.startswith("#") for _, name, value in page.attributes if name in {"href", "xlink:href", "src"})
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and value.startswith("default-src"))
    assert policy.startswith("default-src 'none';")
    assert "script-src" not in policy
    assert len(html.encode()) < 600_000


def test_ids_are_unique_and_references_lead_somewhere(demo: tuple[str, Page]) -> None:
    html, page = demo
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = {value[1:] for _, name, value in page.attributes if name == "href"} | set(
        re.findall(r"url\(#([^)]+)\)", html)
    )
    wanted |= {value for _, name, value in page.attributes if name == "aria-labelledby"}
    assert wanted <= set(ids)


def test_every_figure_has_a_name_and_says_what_it_shows(demo: tuple[str, Page]) -> None:
    _, page = demo
    assert page.elements.count("svg") == 7
    assert page.attributes.count(("svg", "role", "img")) == 7
    assert page.elements.count("desc") == 7
    assert "97 comparisons won by the tuned model, 14 ties, 29 won by the base model." in page.text


def test_numbers_are_those_of_the_result(demo: tuple[str, Page]) -> None:
    _, page = demo
    cells = [text.strip() for text in page.texts]
    exact = cells[cells.index("Every number, exactly as recorded") :]
    for key, value in (TRAINED | COMPARED).items():
        if isinstance(value, (int, float, list)):
            assert exact[exact.index(key) + 1] == json.dumps(value), key
    for shown in ("74 %", "93 %", "71 %", "0.612", "3 min 42 s", "3.14", "39", "812 tokens/s, peak 1.90 GiB"):
        assert shown in cells
    for reason, number in (TRAINED["refused"] | TRAINED["encoding"]).items():
        assert cells[cells.index(reason) + 1] == str(number)


def test_the_first_ten_answers_are_shown_whoever_won(demo: tuple[str, Page]) -> None:
    _, page = demo
    assert page.elements.count("article") == 10
    assert "The first 10 of 140 comparisons" in page.words
    verdicts = [text for text in page.texts if text in {"tuned wins", "base wins", "tie"}]
    assert len(verdicts) == 10 + 3  # and the three names in the figure
    assert page.texts.count("cut at 160 tokens") == 6 + 1  # base answers 2 3 5 6 8 9, and the showcase
    assert "A rule, not a person." in page.text


def hostile_run(folder: Path) -> Path:
    """Every text of data, model or person is hostile, keys and metric names included."""
    plain = HOSTILE.replace("\ud800", "")  # JSON with half a character is left out whole
    result = TRAINED | COMPARED | {plain: 1.5, "refused": {plain: 1}, "encoding": {plain: plain}}
    texts = ("judge", "judge_description", "showcase_prompt", "base_answer", "tuned_answer")
    write_run(folder, result | dict.fromkeys(texts, plain))
    answer = {"text": plain, "ended": False, "tokens": 9}
    row = {"prompt": plain, "base": answer, "tuned": answer, "winner": plain, "reason": plain}
    dialogue = row | {"prompt": [{"role": plain, "content": plain}]}
    (folder / "evaluation" / "answers.jsonl").write_text(lines([row, dialogue]))
    evaluated = lines([row | {"temperature": plain}, dialogue | {"temperature": plain}])
    (folder / "evaluation" / "comparisons.jsonl").write_text(evaluated)
    (folder / "evaluation" / "winrate.json").write_text(json.dumps({"against": plain, "temperatures": plain}))
    (folder / "metrics.jsonl").write_text(lines([{"step": 0, plain: 1.0, "loss": 0.6}, {"step": 1, plain: 2.0}]))
    recipe = {
        "model": {"path": plain, plain: plain},
        "objective": {"kind": plain, "beta": plain},
        plain: {plain: [plain]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "environment.json").write_text(json.dumps({"date": plain, "versions": {"dpo-studio": plain}, plain: 1}))
    return folder


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    html, page = report(hostile_run(tmp_path / "<b>&amp;run"))
    assert not {"script", "img"} & set(page.elements)
    items = html.count("<li>") - html.count("<li><a ")  # those of the contents are links
    assert page.elements.count("b") == items, "only our own bold words"
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", html)
    assert "<script>alert(1)</script>" in page.text
    assert page.text.count(r"\x1b[31mred\u202eevil\u2066\x00") > 15
    assert "<b>&amp;run" in page.text


def test_a_hostile_recipe_that_is_not_yaml_is_shown_as_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TRAINED, compared=False)
    (run / "recipe.yaml").write_text("model: [unclosed\n" + HOSTILE.replace("\ud800", ""))
    _, page = report(run)
    assert "script" not in page.elements
    assert "recipe.yaml is not YAML and is shown unchanged" in page.words
    assert "model: [unclosed" in page.text


def test_very_long_answers_are_clipped_and_say_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TRAINED | COMPARED)
    long = {"text": "\x07&" * 20_000, "ended": True, "tokens": 9000}
    (run / "evaluation" / "answers.jsonl").write_text(lines([{"prompt": "p" * 9000, "base": long, "tuned": long}] * 12))
    rows = [{"temperature": t, "prompt": "p" * 9000, "base": long, "tuned": long} for t in (0, 1) for _ in range(12)]
    (run / "evaluation" / "comparisons.jsonl").write_text(lines(rows))
    html, page = report(run)
    assert "(the first 3,000 of 40,000 characters)" in page.text
    assert page.elements.count("article") == 10 + 10
    assert len(html.encode()) < 1_000_000


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    html, _ = report(write_run(tmp_path / "run", TRAINED, compared=False, steps=3000))
    assert len(html.encode()) < 200_000


def test_any_file_may_be_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TRAINED | COMPARED)
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        path.unlink()
        _, page = report(run)
        assert "run report" in page.text, path.name
        path.write_bytes(whole)


@pytest.mark.parametrize("value", [None, "text", -1.0, True, [], {}])
def test_any_value_may_be_strange(tmp_path: Path, value: object) -> None:
    (tmp_path / "result.json").write_text(json.dumps(dict.fromkeys(TRAINED | COMPARED, value)))
    _, page = report(tmp_path)
    assert "No result yet" in page.text


@pytest.mark.parametrize("key", sorted(TRAINED | COMPARED))
def test_any_key_may_be_missing(tmp_path: Path, key: str) -> None:
    result = TRAINED | COMPARED
    del result[key]
    (tmp_path / "result.json").write_text(json.dumps(result))
    facts = read_run(tmp_path)
    parts = (headline_panel, key_figures, showcase_section, answers_section, judging_section, numbers_section)
    Page("".join(part(facts) for part in parts))
    assert all(isinstance(chart.summary(facts), str) for chart in CHARTS)
    if key in {"win_rate", "win_rate_ci95", "wins", "ties", "losses", "stop_rate_base", "mean_tokens_tuned"}:
        for chart in CHARTS:
            chart.draw(facts)


def test_an_empty_folder_gives_an_honest_page(tmp_path: Path) -> None:
    _, page = report(tmp_path)
    assert "Nothing has been measured yet." in page.words
    assert "svg" not in page.elements


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "rows", [curves(1, 1)[1:], curves(2, 1), [{"step": 0, "eval_loss": 0.69}], [{"step": 5, "loss": 0}]]
)
def test_very_short_runs_can_be_drawn(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines(rows))
    _, page = report(tmp_path)
    assert "svg" in page.elements


def test_the_same_run_gives_the_same_bytes_and_only_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TRAINED | COMPARED)
    before = {path.name for path in run.iterdir()}
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert {path.name for path in run.iterdir()} == before | {"report.html"}


def test_a_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", TRAINED)
    first = write_report(run).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        write_report(run)
    assert (run / "report.html").read_bytes() == first
