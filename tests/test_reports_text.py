"""Text and numbers as the terminal and the page show them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_studio.console.text import clock, duration, one_line, percent, printable, significant


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, naïve 文字 👩‍👧 می‌خواهم", "plain text, naïve 文字 👩‍👧 می‌خواهم"),
        ("lines\nand\ttabs\r\nstay", "lines\nand\ttabs\nstay"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("abc\u202ecba\u2066\u200f", r"abc\u202ecba\u2066\u200f"),
        ("over\rwritten\x08\x85", r"over\rwritten\x08\x85".replace(r"\r", r"\x0d")),
        ("\ufeffzero\u200bwidth\u2028", r"\ufeffzero\u200bwidth\u2028"),
        ("tag\U000e0041 and \udcff", r"tag\U000e0041 and \udcff"),
    ],
)
def test_what_cannot_be_seen_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_printable_text_is_stable_and_can_be_written(text: str) -> None:
    shown = printable(text)
    assert printable(shown) == shown
    shown.encode("utf-8")


def test_one_line_has_no_line_breaks() -> None:
    assert one_line(" two\n lines\tand \x1b  spaces ") == r"two lines and \x1b  spaces"


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.741, "74 %"),
        (0.5, "50 %"),
        (0.5004, "50.0 %"),
        (0.496, "49.6 %"),
        (0.999, "99.9 %"),
        (1.0, "100 %"),
        (0.0, "0 %"),
    ],
)
def test_percent_does_not_round_across_one_half(share: float, shown: str) -> None:
    assert percent(share) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.6931, "0.693"), (-0.0421, "-0.0421"), (12.345, "12.3"), (1234.5, "1,234"), (5e-05, "5.00e-05"), (0, "0")],
)
def test_three_significant_digits(value: float, shown: str) -> None:
    assert significant(value) == shown


def test_times() -> None:
    assert [clock(83), clock(4000), clock(-1)] == ["01:23", "1:06:40", "00:00"]
    assert [duration(3.14159), duration(45.2), duration(221.7), duration(7260)] == [
        "3.1 s",
        "45 s",
        "3 min 42 s",
        "2 h 01 min",
    ]


def test_the_room_loads_no_torch_and_progress_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'matplotlib', 'rich', 'numpy', 'yaml'} & set(sys.modules)"
    code = f"import sys, dpo_studio.console.progress; assert not {heavy}, {heavy}\n"
    code += (
        "import dpo_studio.reports.html; assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
