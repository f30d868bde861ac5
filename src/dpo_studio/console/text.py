"""Text and numbers made safe and readable, for the terminal and for the page alike."""

from __future__ import annotations

import math
import unicodedata

__all__ = ["clock", "count", "duration", "one_line", "percent", "printable", "significant"]

# Zero-width (non-)joiners carry meaning in Persian, Indic scripts and emoji; the Arabic signs of class Cf have ink.
_KEPT = frozenset("\n\t\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2")
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: str) -> str:
    r"""The text with what cannot be seen made visible: ESC becomes `\x1b`, a bidi override `\u202e`.

    Newlines and tabs stay, CR LF is a newline. What comes back can be encoded as UTF-8.
    """
    text = text.replace("\r\n", "\n")
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _HIDDEN_CATEGORIES:
        return character
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def one_line(text: str) -> str:
    """The printable text on one line."""
    return " ".join(line.strip() for line in printable(text).expandtabs(1).split("\n")).strip()


def percent(share: float) -> str:
    """0.741 -> `74 %`; one decimal near one half, where rounding would hide which side a number is on."""
    hundredths = 100 * share
    near_half = 49 < hundredths < 51 and hundredths != 50
    near_end = 0 < hundredths < 0.5 or 99.5 <= hundredths < 100
    return f"{hundredths:.1f} %" if near_half or near_end else f"{hundredths:.0f} %"


def significant(value: float) -> str:
    """A number at three significant digits, never in powers of ten between 0.001 and a million."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -3 or magnitude >= 6:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - magnitude)}f}"


def count(value: float) -> str:
    """1234 -> `1,234`."""
    return f"{value:,.0f}"


def clock(seconds: float) -> str:
    """83 -> `01:23`, 4000 -> `1:06:40`."""
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"


def duration(seconds: float) -> str:
    """222 -> `3 min 42 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute:02d} min" if hours else f"{minute} min {second:02d} s"
