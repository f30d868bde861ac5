"""The page's sections from `dpo eval` and on run health: numbers as they were measured, figures without a way out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dpo_studio.reports.drawing import styled
from dpo_studio.reports.figures import CHARTS
from dpo_studio.reports.findings import health_section
from dpo_studio.reports.html import write_report
from dpo_studio.reports.svg import embedded_svg, inline_svg
from dpo_studio.reports.winrates import save_winrate_figure
from dpo_studio.reports.winrates_section import win_rates_section
from dpo_studio.runs.facts import read_run
from tests.test_reports_html import HOSTILE, TRAINED, Page, write_run

RATES: dict[str, Any] = {
    "judge": "everyday-rule",
    "against": "reference",
    "seed": 0,
    "max_new_tokens": 128,
    "temperatures": [
        {"temperature": 0.0, "win_rate": 0.7333, "win_rate_ci95": [0.62, 0.83], "wins": 40, "ties": 8, "losses": 12}
        | {"length_controlled": 0.66, "length_controlled_ci95": [0.5, 0.8], "stop_rate": 0.98, "kl": None, "n": 60}
        | {"reference_stop_rate": 0.34, "mean_tokens": 61.2, "reference_mean_tokens": 131.0},
        {"temperature": 1.0, "win_rate": 0.8, "win_rate_ci95": [0.7, 0.88], "kl": 11.234, "mean_tokens": 70.0},
    ],
}
FIGURE = (
    '<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/svg11.dtd">'
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 460.8 345.6">'
    '<g id="a"><path d="M 1 2" style="fill: #1f5fbf"/>'
    "<text style=\"font-family: 'DejaVu Sans'; font-size: 9px\">temperature</text></g></svg>"
)
EVIL = (
    '<svg viewBox="0 0 10 10" onload="alert(1)"><script>alert(2)</script><style>*{fill:url(http://evil.example)}</style>'
    '<g onclick="alert(3)" style="fill: url(http://evil.example/a)"><use href="http://evil.example/b"/>'
    '<use xlink:href="#ok"/><a href="javascript:alert(4)"><path id="ok" d="M 0 0"/></a>'
    '<foreignObject><img src="x" onerror="alert(5)"><p>inside</p></foreignObject><image href="http://evil.example/c"/>'
    "<text>1 &lt; 2 &lt;script&gt;</text></g><!-- --!><script>alert(6)</script> --></svg><script>alert(7)</script>"
)


def evaluated(folder: Path, rates: dict[str, Any] | str = "", svg: str = FIGURE) -> Path:
    run = write_run(folder, TRAINED, compared=False)
    text = rates if isinstance(rates, str) and rates else json.dumps(rates or RATES)
    (run / "evaluation" / "winrate.json").write_text(text)
    (run / "evaluation" / "winrate.svg").write_text(svg)
    return run


def test_every_temperature_is_a_row_of_what_was_measured(tmp_path: Path) -> None:
    page = Page(write_report(evaluated(tmp_path / "run")).read_text())
    assert page.open == []
    cells = [text.strip() for text in page.texts]
    first = cells.index("73 % (62–83 %)") - 1
    assert cells[first : first + 6] == [
        *("0", "73 % (62–83 %)", "66 % (50–80 %)", "40 · 8 · 12", "98 % / 34 %", "61 / 131"),
    ]  # no KL at temperature 0: its cell is empty
    assert cells[first + 6 : first + 8] == ["1", "80 % (70–88 %)"]
    assert "11.2" in cells
    assert "temperature" in cells and "everyday-rule" in cells
    assert ("svg", "viewbox", "0 0 460.8 345.6") in page.attributes


def test_columns_without_numbers_are_left_out(tmp_path: Path) -> None:
    rates = RATES | {"temperatures": [{"temperature": 1.0, "win_rate": 0.8}]}
    section = win_rates_section(read_run(evaluated(tmp_path / "run", rates)))
    assert "80 %" in section
    assert "KL" not in section and "tokens, tuned" not in section


@pytest.mark.parametrize("svg", ["", "no figure", "<svg>", '<svg viewBox="a b">', EVIL])
@pytest.mark.parametrize("rates", ['{"temperatures": 5}', '{"temperatures": [7]}', "[]", "half a fi"])
def test_files_may_hold_anything(svg: str, rates: str, tmp_path: Path) -> None:
    page = Page(write_report(evaluated(tmp_path / "run", rates, svg)).read_text())
    assert page.open == []
    assert "Win rate by temperature" not in page.texts


def test_a_hostile_figure_loses_all_but_its_shapes_and_texts(tmp_path: Path) -> None:
    html = write_report(evaluated(tmp_path / "run", svg=EVIL)).read_text()
    page = Page(html)
    assert not {"script", "img", "image", "foreignobject"} & set(page.elements)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "evil.example" not in html and "alert" not in html and "inside" not in page.texts
    assert "1 < 2 <script>" in page.text
    links = [value for _, name, value in page.attributes if name == "href"]
    assert "#winrate-ok" in links and all(link.startswith("#") for link in links)


def test_hostile_text_of_an_evaluation_stays_text(tmp_path: Path) -> None:
    plain = HOSTILE.replace("\ud800", "")
    rates = RATES | {"judge": plain, "against": plain, "seed": plain}
    page = Page(write_report(evaluated(tmp_path / "run", rates)).read_text())
    assert not {"script", "img"} & set(page.elements)
    assert page.text.count("<script>alert(1)</script>") == 3


def test_our_own_figure_from_a_file_is_the_figure_itself(tmp_path: Path) -> None:
    """Read back from what matplotlib wrote, it draws the same shapes, texts and colours as drawn into the page."""
    facts = read_run(write_run(tmp_path / "run", TRAINED))
    with styled():
        figure = CHARTS[0].draw(facts)
        direct = inline_svg(figure, "x", "t", "s")
        figure.savefig(tmp_path / "file.svg", metadata={"Date": None, "Creator": None})
    embedded = embedded_svg((tmp_path / "file.svg").read_text(), "x", "t", "s")
    for element in ("path", "text", "use", "clippath"):
        assert len(re.findall(f"<{element}\\b", embedded)) == len(re.findall(f"(?i)<{element}\\b", direct)) > 0
    assert re.findall(r' d="[^"]*"', embedded) == re.findall(r' d="[^"]*"', direct)
    assert sorted(re.findall(r"var\(--fig-[a-z]+", embedded)) == sorted(re.findall(r"var\(--fig-[a-z]+", direct))
    assert re.findall(">([^<>]+)</text>", embedded) == re.findall(">([^<>]+)</text>", direct)


def test_run_health_says_when_and_what_to_do(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TRAINED)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bad = [row | ({"rewards/margins": 20.0} if row["step"] >= 10 else {}) for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    page = Page(write_report(run).read_text())
    at = page.texts.index("Margins explode ")
    assert (
        page.texts[at + 1] == "from step 16 to the end"
    )  # 64 pairs are 8 steps: 7 x 20 of 8 are 17.5, 6 x 20 are 15.1
    assert "What to do:" in page.texts[at:]
    assert "Run health, below: Margins explode." in page.words


def test_a_healthy_run_says_what_was_looked_for(tmp_path: Path) -> None:
    section = health_section(read_run(write_run(tmp_path / "run", TRAINED)))
    assert "Nothing of what is looked for was seen: both rewards fall; chosen answers become unlikely;" in section
    assert health_section(read_run(tmp_path)) == ""


@pytest.mark.parametrize(
    ("asked", "stem"),
    [("beta-0.1", "beta-0.1"), ("beta-0.3", "beta-0.3"), ("both", "both"), ("both.png", "both"), ("a.b.svg", "a.b")],
)
def test_a_figure_keeps_the_whole_of_its_name(asked: str, stem: str, tmp_path: Path) -> None:
    """`beta-0.1` and `beta-0.3` are two figures, not one `beta-0.png`."""
    rates = RATES | {"n_prompts": 60}
    written = save_winrate_figure([("one", rates), ("other", rates)], tmp_path / asked)
    assert {path.name for path in tmp_path.iterdir()} == {f"{stem}.png", f"{stem}.svg"} == {p.name for p in written}
