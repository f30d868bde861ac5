"""Removes a key from a server's reply: from parsed values, however it is encoded there.

Servers quote keys in their errors, some of them escaped (`\\u0073\\u006b`), percent-encoded or in base64, and tokens of
a reply stand one by one in its log-probs. So text is looked at after it was parsed, and texts that belong together (all
`choices[*].message.content[*].text`) are looked at as one.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["Secret"]

_SHORTEST = 8
"""Shorter keys are not secrets but words such as `EMPTY`, which a reply may contain."""
_HALVES = 16
"""From here on each half is as secret as the whole: a key cut short by a server is one that can be guessed."""
_BETWEEN = "[\\s\\u00ad\\u200b-\\u200f\\u2060\\ufeff]{0,64}"
"""What may be between two characters of a key: ends of lines, and invisible characters. Bounded, as all that repeats
here is: what matches must never take longer for being longer."""
_LEFT_OUT = re.compile("[\\\\\\s\\u00ad\\u200b-\\u200f\\u2060\\ufeff]+")
_ESCAPED = re.compile(r"\\[uxUX0-7]|%[0-9a-fA-F]{2}|&#|&amp;")
_BASE64 = str.maketrans("+/", "-_")
_BASE64_SIGNS = {"-": "[+-]", "_": "[/_]"}
_CUT = "[key]"


class Secret:
    """A key that must not be shown."""

    def __init__(self, key: str) -> None:
        self._pieces = _pieces(key)
        self._pattern = _pattern(self._pieces) if self._pieces else None
        self._plain = [plain for piece in self._pieces for plain in (piece.lower(), *_encoded(piece))]

    def cut_everywhere(self, value: Any) -> Any:
        """A JSON value with the key cut out of every text and name in it, also where it is spread over several."""
        if self._pattern is None:
            return value
        texts: dict[tuple[str, ...], list[str]] = {}
        for path, text in _texts(value):
            texts.setdefault(path, []).append(text)
        clean = {path: iter(self._cut_across(parts)) for path, parts in texts.items()}
        return _rebuilt(value, lambda path: next(clean[path]))

    def _cut_across(self, parts: Sequence[str]) -> list[str]:
        """The parts, with the key cut out of what they are together: the part in which it begins says so."""
        assert self._pattern is not None
        whole = "".join(parts)
        found = [match.span() for match in self._pattern.finditer(whole)] if self._may_hold(whole) else []
        if not found:
            return list(parts)
        clean, start = [], 0
        for part in parts:
            clean.append(_without(part, start, found))
            start += len(part)
        return clean

    def _may_hold(self, text: str) -> bool:
        """False where the expression finds nothing: it takes a second a megabyte, this a twentieth of that."""
        if _ESCAPED.search(text):
            return True
        squeezed = _LEFT_OUT.sub("", text).lower().translate(_BASE64)
        return any(plain in squeezed for plain in self._plain)


def _without(part: str, start: int, spans: Sequence[tuple[int, int]]) -> str:
    """A part that begins at `start` of the whole, without the spans."""
    kept, at, end = [], start, start + len(part)
    for low, high in spans:
        if high <= at or low >= end:
            continue
        kept += [part[at - start : max(low, at) - start], _CUT if low >= start else ""]
        at = min(high, end)
    return "".join((*kept, part[at - start :]))


def _texts(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text with its path; the items of a list have one path, and so do the names of an object."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, (*path, "*"))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield (*path, "names"), name
            yield from _texts(item, (*path, f".{name}"))


def _rebuilt(value: Any, clean: Callable[[tuple[str, ...]], str], path: tuple[str, ...] = ()) -> Any:
    """The value again, its texts asked of `clean` in the order in which `_texts` gave them."""
    if isinstance(value, str):
        return clean(path)
    if isinstance(value, list):
        return [_rebuilt(item, clean, (*path, "*")) for item in value]
    if isinstance(value, dict):
        return {clean((*path, "names")): _rebuilt(item, clean, (*path, f".{name}")) for name, item in value.items()}
    return value


def _pieces(key: str) -> list[str]:
    """What is looked for: the key, or either half of a long one."""
    if len(key) < _SHORTEST:
        return []
    half = len(key) // 2
    return [key[:half], key[half:]] if len(key) >= _HALVES else [key]


def _pattern(pieces: Sequence[str]) -> re.Pattern[str]:
    """Any of the pieces: plain, escaped, percent-encoded, in hex, in base64. Made of nothing but our own key."""
    encoded = (_BETWEEN.join(_BASE64_SIGNS.get(c, c) for c in text) for piece in pieces for text in _encoded(piece))
    ways = [*(_BETWEEN.join(map(_written, piece)) for piece in pieces), *encoded]
    return re.compile(f"(?:(?:{'|'.join(ways)}){_BETWEEN})*(?:{'|'.join(ways)})", re.IGNORECASE)


def _written(character: str) -> str:
    """A character as it is and as JSON, Python, URLs and HTML write it, of which some are written twice over."""
    code = ord(character)
    escapes = rf"\\{{1,4}}(?:u00{code:02x}|u\{{0{{0,6}}{code:x}\}}|x{code:02x}|0?{code:o})"
    entities = rf"&(?:amp;){{0,3}}#(?:0{{0,6}}{code}|x0{{0,6}}{code:x});?"
    return rf"(?:\\{{0,4}}{re.escape(character)}|%(?:25){{0,3}}{code:02x}|{escapes}|{entities})"


def _encoded(piece: str) -> list[str]:
    """Its hex, and what its base64 is wherever it is in a text, because what comes before shifts it by 0, 1 or 2 bytes.

    All in small letters, `-` and `_` for `+` and `/`.
    """
    found = [piece.encode().hex()]
    for shift in range(3):
        whole = base64.b64encode(b"\0" * shift + piece.encode()).decode().rstrip("=")
        known = whole[(0, 2, 3)[shift] : len(whole) - ((shift + len(piece)) % 3 > 0)]  # bits of what is beside it
        found.append(known)
    return [text.lower().translate(_BASE64) for text in found]
