"""What `dpo train` ends with, for the person who waited."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

from tests.test_docs import problems
from tests.tiny_runs import dpo, write_recipe


def test_a_training_ends_with_its_pairs_the_reports_verdict_and_commands_that_exist(
    tiny_base: Path, tmp_path: Path
) -> None:
    said = dpo("train", write_recipe(tmp_path / "recipe.yaml", tiny_base))
    assert said.code == 0, said.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"{result['pairs']} pairs learned from, {result['held_out_pairs']} held out" in said.err
    page = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", (tmp_path / "run" / "report.html").read_text())).split())
    words = " ".join(said.err.split())
    sentence = re.search(r"On \d+ held-out pairs the tuned model prefers the chosen answer in [^.]*\.", words)
    assert sentence is not None and sentence[0] in page
    commands = re.findall(r"(dpo (?:chat|eval|export) [^\n]*)", said.err)
    assert [command.split()[1] for command in commands] == ["chat", "eval", "export"]
    assert [wrong for command in commands for wrong in problems(command)] == []
    assert all(str(tmp_path / "run") in command for command in commands)
