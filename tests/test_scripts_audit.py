"""`make check` says what was audited; it neither fails for want of a network nor passes for it in silence."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import scripts.audit as audit

HOLE = {"id": "CVE-2025-1", "fix_versions": ["2.0"]}


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: Any) -> tuple[int, str]:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, 1, answer, "ERROR: Could not connect\nConnectionError: no route")

    monkeypatch.setattr(subprocess, "run", run)
    return audit.main(), capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        ("", 0, "NOT AUDITED: the advisories' index cannot be reached (ConnectionError: no route)"),
        ("<html>", 0, "NOT AUDITED"),
        (subprocess.TimeoutExpired("x", 1), 0, "NOT AUDITED: the advisories' index did not answer"),
        ([{"name": "a", "version": "1", "skip_reason": "not found"}], 0, "NOT AUDITED: the index knows none of 1"),
        ([{"name": "a", "version": "1", "vulns": []}], 0, "1 packages audited, 0 known holes, 0 not known"),
        (
            [{"name": "a", "version": "1", "vulns": [HOLE]}, {"name": "b", "version": "1", "skip_reason": "x"}],
            1,
            "a 1: CVE-2025-1 (fixed in: 2.0)\npip-audit: 1 packages audited, 1 known holes, 1 not known",
        ),
    ],
)
def test_what_was_audited_is_said(
    answer: Any, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps({"dependencies": answer}) if isinstance(answer, list) else answer
    got, out = said(monkeypatch, capsys, text)
    assert got == code
    assert words in out


def test_make_check_runs_it() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert "$(BIN)/python scripts/audit.py" in makefile.partition("check:")[2].partition("\n\n")[0]
