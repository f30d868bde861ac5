"""The pages of answers: verdict and figure first, ways to every comparison and back; and what the report gained.

Pages are read with the standard library's HTML parser; counts are made by hand.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_studio.doctor.findings import DataReport
from dpo_studio.doctor.text_checks import TextChecks
from dpo_studio.evaluation.accuracy import log_prob_differences
from dpo_studio.objectives import PairLogps
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.reports.data_page import render_data_page
from dpo_studio.reports.drawing import PALETTE
from dpo_studio.reports.html import write_report
from dpo_studio.reports.side_by_side import render_answers, render_comparisons
from dpo_studio.reports.winrates import save_winrate_figure
from tests.test_reports_html import COMPARED, TRAINED, Page, answers, write_run
from tests.test_reports_winrates import FIGURE


class Cards(HTMLParser):
    """The classes of every article, and the words of every heading of an answer."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.classes: list[list[str]] = []
        self.titles: list[str] = []
        self.links: list[str] = []
        self._in_title = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if tag == "article":
            self.classes.append((known.get("class") or "").split())
        if tag == "a":
            self.links.append(known.get("href") or "")
        self._in_title = tag == "h4"

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.titles.append(data)
        self._in_title = False


def of(temperature: float, n: int) -> dict[str, Any]:
    return {"temperature": temperature, "n": n, "win_rate": 0.7, "win_rate_ci95": [0.6, 0.8],
            "length_controlled": 0.6, "length_controlled_ci95": [0.5, 0.7]}  # fmt: skip


def rates(*temperatures: dict[str, Any], against: str = "reference") -> dict[str, Any]:
    return {"judge": "length", "judge_description": "The longer one.", "against": against, "n_prompts": 6,
            "max_new_tokens": 160, "seed": 0, "temperatures": list(temperatures)}  # fmt: skip


def rows(temperature: float, n: int) -> list[dict[str, Any]]:
    return [{"temperature": temperature, "sample": 0} | row for row in answers(n)]


def test_verdict_and_figure_stand_before_the_answers() -> None:
    html = render_comparisons("run", rates(of(0.0, 5)), rows(0.0, 5), FIGURE)["answers.html"]
    page = Page(html)
    assert page.open == [] and "script" not in page.elements and "form" not in page.elements
    assert "The tuned model’s answers won 70 % of the comparisons with those of the reference" in page.words
    assert html.index('class="verdict better"') < html.index("<svg") < html.index("<article")


def test_every_comparison_can_be_reached_and_every_page_leads_back() -> None:
    """45 of 50 comparisons would not fit: 40 stand on the first page, all 45 on a page of their own."""
    asked = rates(of(0.0, 5), of(1.0, 45))
    pages = render_comparisons("run", asked, [*rows(0.0, 5), *rows(1.0, 45)], FIGURE)
    assert list(pages) == ["answers.html", "answers-1.html"]
    first, other = (Cards(html) for html in pages.values())
    assert (len(first.classes), len(other.classes)) == (45, 45)
    assert "../report.html" in first.links and "answers-1.html" in first.links
    assert {"../report.html", "answers.html"} <= {*other.links}


def test_won_lost_and_tied_are_told_by_classes_that_the_style_sheet_hides() -> None:
    """Winners go tuned, tuned, base, tuned, tie: of 10 comparisons 6 are won, 2 tied, 2 lost."""
    html = render_answers("run", answers(10), 160)
    classes = Cards(html).classes
    assert all("ruled" in one for one in classes)
    assert [sum(kind in one for one in classes) for kind in ("tuned", "tie", "base")] == [6, 2, 2]
    words = Page(html).words
    assert "Show all 10 6 won by the tuned model 2 tied 2 lost" in " ".join(words.split())
    css = html[html.index("<style>") : html.index("</style>")]
    for kind in ("tuned", "tie", "base"):
        assert f"main:has(#show-{kind}:checked) .ruled:not(.{kind})" in css and f'id="show-{kind}"' in html


def test_identical_answers_are_printed_once() -> None:
    same = {"text": "The very same words.", "ended": True, "tokens": 5}
    row = answers(1)[0] | {"base": same, "tuned": dict(same), "winner": "tie"}
    html = render_answers("run", [row], 160)
    assert Page(html).texts.count("The very same words.") == 1
    assert Cards(html).titles == ["Both, A and B: the same answer"]
    cut = row | {"base": same | {"ended": False}}
    assert Page(render_answers("run", [cut], 160)).text.count("The very same words.") == 2


def test_sides_have_the_judge_s_names_and_another_model_its_own() -> None:
    assert Cards(render_answers("run", answers(1), 160)).titles == [
        "Before: base model (A)", "After: tuned model (B)"]  # fmt: skip
    against = render_comparisons("run", rates(of(0.0, 1), against="runs/<b>"), rows(0.0, 1), FIGURE)["answers.html"]
    assert Cards(against).titles == ["runs/<b> (A)", "Tuned model (B)"]


def test_wins_by_prompt_are_counted(tmp_path: Path) -> None:
    """answers() asks six prompts in turn; of 12 the first is asked as 0 and 6, whose winners are tuned and tuned."""
    html = render_comparisons("run", rates(of(0.0, 12)), rows(0.0, 12), FIGURE)["answers.html"]
    texts = [text.strip() for text in Page(html).texts]
    at = texts.index("Every prompt, the most won first")
    assert texts[at + 1 : at + 9] == [
        "prompt",
        "won",
        "tied",
        "lost",
        "What can I do about a squeaky door?",
        "2",
        "0",
        "0",
    ]


def test_the_report_has_contents_and_leads_to_the_answers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TRAINED | COMPARED)
    assert "evaluation/all-answers.html" not in Cards(write_report(run).read_text()).links
    (run / "evaluation" / "all-answers.html").write_text("there")
    html = write_report(run).read_text()
    links = Cards(html).links
    assert "evaluation/all-answers.html" in links
    inside = [link[1:] for link in links if link.startswith("#")]
    ids = {value for _, name, value in Page(html).attributes if name == "id"}
    assert {"training", "answers", "recipe", "glossary"} <= {*inside} <= ids
    assert len(inside) == len(set(inside))


def logps(chosen: list[float], rejected: list[float]) -> PairLogps:
    ones = torch.ones(len(chosen), dtype=torch.long)
    return PairLogps(torch.tensor(chosen), torch.tensor(rejected), ones, ones)


def test_the_histogram_counts_every_pair_before_and_after(tmp_path: Path) -> None:
    """Differences before: -2, -1, 1; after: -0.5, 2, 3. So one and two are above zero."""
    before, after = logps([-5, -4, -3], [-3, -3, -4]), logps([-5, -2, -1], [-4.5, -4, -4])
    found = log_prob_differences(after, before)
    assert found is not None and sum(found["before"]) == sum(found["after"]) == 3
    assert 0 in found["edges"] and len(found["edges"]) == len(found["before"]) + 1
    run = write_run(tmp_path / "run", TRAINED | {"log_prob_differences": found})
    assert "Of 3 held-out pairs 1 are above zero before training, 2 after." in Page(write_report(run).read_text()).text
    assert log_prob_differences(logps([float("nan")], [0.0]), logps([0.0], [0.0])) is None
    assert log_prob_differences(logps([0.0], [0.0]), logps([0.0], [0.0])) is not None


@pytest.mark.parametrize(
    "found", [5, {}, {"edges": [0, 1], "before": [1], "after": [1, 2]}, {"edges": [1, 0], "before": [1], "after": [1]},
              {"edges": [0, "x"], "before": [1], "after": [1]}, {"edges": 3, "before": [], "after": []},
              {"edges": [], "before": [], "after": []}],
)  # fmt: skip
def test_a_histogram_that_is_none_is_left_out(found: Any, tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", TRAINED | {"log_prob_differences": found})).read_text())
    assert "Held-out pairs before and after" not in page.texts and "Log-probabilities" in page.texts


def light(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_bars_stand_out_and_words_on_them_can_be_read() -> None:
    """3:1 for shapes and 4.5:1 for text, on the page's own surfaces, in the light and in the dark."""
    css = (Path(write_report.__code__.co_filename).parent / "report.css").read_text()
    dark = dict(re.findall(r"--fig-([a-z-]+): (#[0-9a-f]{6})", css))
    for colours, grounds in ((PALETTE, ("#ffffff", PALETTE["surface"])), (dark, ("#161c24",))):
        for ground in grounds:
            assert all(contrast(colours[bar], ground) >= 3 for bar in ("tuned", "base", "tie", "ink"))
            assert all(contrast(colours[ink], ground) >= 4.5 for ink in ("muted", "base-ink", "tuned"))
        assert contrast(colours["base"], colours["base-text"]) >= 4.5
        assert contrast(colours["tie"], colours["tie-text"]) >= 4.5


def test_words_in_charts_are_eleven_pixels_on_a_phone() -> None:
    """360 px less the page's and the figure's margins and borders, for a figure of 440 units."""
    css = (Path(write_report.__code__.co_filename).parent / "report.css").read_text()
    phone = css[css.index("@media (max-width: 760px)") : css.index("@media screen")]
    (size,) = re.findall(r"svg\.chart text \{ font-size: ([\d.]+)px", phone)
    figure = re.findall(r"\.charts figure, .*padding-left: (\d+)px", phone)[-1]
    page = re.findall(r"header\.top, main, footer \{ padding-left: (\d+)px", phone)[-1]
    assert float(size) * (360 - 2 * int(page) - 2 * int(figure) - 2) / 440 >= 11


def test_the_terms_above_the_figure_are_broken_into_lines(tmp_path: Path) -> None:
    """A long judge and a long other side, of which one line would leave the figure."""
    long = rates(of(0.0, 5), of(1.0, 5), against="models/a-model-with-a-long-name") | {
        "judge": "llm:a-judge-with-a-name-as-long"}  # fmt: skip
    save_winrate_figure([("run", long)], tmp_path / "figure")
    texts = re.findall(r">([^<>]+)</(?:text|tspan)>", (tmp_path / "figure.svg").read_text())
    said = [text for text in texts if "judge" in text or "win rate against" in text]
    assert len(said) >= 2 and max(map(len, said)) <= 62


def test_an_evaluation_leaves_pages_that_lead_to_each_other(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TRAINED)
    asked = rates(of(0.0, 5))
    (run / "evaluation" / "winrate.json").write_text(json.dumps(asked))
    (run / "evaluation" / "answers.html").write_text("there")
    assert "evaluation/answers.html" in Cards(write_report(run).read_text()).links


def test_the_axes_of_the_data_page_are_named() -> None:
    """Both histograms: of two answers a pair in characters, and of scores a pair in points."""
    checks = TextChecks()
    for row in range(30):
        turns = [(Message("assistant", "x" * (row + length)),) for length in (5, 9)]
        checks.see(Pair((Message("user", f"q{row}"),), turns[0], turns[1], row=row, scores=(row + 1.0, 1.0)))
    report = DataReport("s", "trl", 30, 30, 30, 30, {}, checks.findings(), checks.histograms())
    texts = [text.strip() for text in Page(render_data_page(report)).texts]
    assert all(name in texts for name in ("answers", "characters", "pairs", "points"))
