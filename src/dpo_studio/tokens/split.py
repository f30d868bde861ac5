"""Where a rendered chat is split into prompt and answer: the rule of token ids, on text alone.

P = the prompt's turns as a server sends them, with the generation prompt; P0 = the same without it; F = the whole chat
with one answer; `at` = where the answer's own text begins in F. The prompt is P, and the answer is what of F follows:

1. F begins with P: the rest of F.
3. F begins with P0, so only the generation prompt differs:
   a. P leaves no thought open: F from `at`.
   b. P leaves one open and F closes it before the answer's text, or in it where the text begins with the thought that
      P opens: F from where the two part.
   c. P leaves one open and F never closes it: F from where the two part, and there the prompt ends, too.
4. A turn of the prompt is moved, dropped or rewritten: F behind the last T before `at`, T being P from the text of the
   prompt's last turn on.

(2 is an answer whose text is not in F at all: it is refused before there is anything to split.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from dpo_studio.tokens.rendering import PairError

__all__ = ["CASES", "Case", "Split", "common_prefix", "own_texts", "split_chat"]

Case = Literal["1", "3a", "3b", "3c", "4"]

CASES: Final[tuple[Case, ...]] = ("1", "3a", "3b", "3c", "4")
"""From the simplest to the most special: a pair has the later case of its two answers."""

THOUGHT_MARKS: Final = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<Thought>", "</Thought>"),
    ("<thoughts>", "</thoughts>"),
    ("<think_fast>", "</think_fast>"),
    ("<think_faster>", "</think_faster>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<reflection>", "</reflection>"),
    ("<analysis>", "</analysis>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<mm:think>", "</mm:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|think_start|>", "<|think_end|>"),
    ("<|think|>", "<|/think|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("<|channel>thought", "<channel|>"),
    ("<unused94>thought", "<unused95>"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
"""The marks that open and close a thought in known chat formats."""

_CLOSING = dict(THOUGHT_MARKS)
_MARK = re.compile("|".join(re.escape(mark) for pair in THOUGHT_MARKS for mark in pair))
_SPECIAL = re.compile(r"<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>|\[/?[A-Z_]{2,20}\]")
"""Control tokens by their looks; which of them the tokenizer has does not matter where text is only cut before one."""


@dataclass(frozen=True, slots=True)
class Split:
    """Where the answer begins."""

    case: Case
    prompt: int
    """How many characters of P the prompt has: all of them, but in case 3c."""
    start: int
    """Where in F the answer begins."""


def split_chat(
    served: str,
    closed: Callable[[], str | None],
    whole: str,
    at: int,
    end: int,
    last_turn: Callable[[], int | None],
) -> Split:
    """The rule. `served` is P, `closed` gives P0, `whole` is F, `last_turn` where P has its last turn's own text.

    The answer's own text is `whole[at:end]`.

    Raises:
        PairError: the answer's text does not follow the prompt, or the two cannot be separated.
    """
    if whole.startswith(served):
        if end < len(served) or (end == len(served) and at < end):
            raise not_written()
        return Split("1", len(served), len(served))
    base = (closed() or "").rstrip()
    if base and whole.startswith(base) and at >= len(base):
        return _other_header(served, base, whole, at, end)
    begins = last_turn()
    if begins is not None and (tail := served[begins:]) and (found := whole.rfind(tail, 0, at)) >= 0:
        return Split("4", len(served), found + len(tail))
    raise PairError(
        "prompt rewritten once there is an answer",
        "the chat template writes the prompt's turns differently once an answer follows, "
        "and the end of the prompt is not found again",
        hint="model.chat_template: FILE with a template that leaves the prompt as a server sends it",
    )


def _other_header(served: str, base: str, whole: str, at: int, end: int) -> Split:
    """Case 3: only what follows the prompt's turns differs."""
    parted = _edge(served, whole, common_prefix(served, whole), len(base))
    if leaves_open(served[len(base) :]):
        before_text = at if at >= parted else end  # an answer may begin with the very mark that P ends with
        if any(closing in whole[parted:before_text] for closing in _CLOSING.values()):
            return Split("3b", len(served), parted)
        return Split("3c", parted, parted)
    if not _has_thought(whole[len(base) : at]):
        return Split("3a", len(served), at)
    if any(closing in served[len(base) :] for closing in _CLOSING.values()):
        raise PairError(
            "thought after a closed one",
            "the generation prompt has closed the thought, and the chat template writes one before this answer",
            hint="take the thoughts out of the answers, or give a template that thinks with model.chat_template",
        )
    return Split("3a", len(served), max(whole.rfind(opening, len(base), at) for opening in _CLOSING))


def leaves_open(text: str) -> bool:
    """Whether there is an opening mark after the last closing one."""
    opened = max(text.rfind(opening) for opening in _CLOSING)
    return opened > max(text.rfind(closing) for closing in _CLOSING.values())


def own_texts(answer: str) -> Iterator[tuple[str, str]]:
    """The texts that may represent an answer, and the thought that each omits: the complete text first.

    A thought ends at a closing mark; templates cut at the first one or at the last.
    """
    text = answer.strip()
    yield text, ""
    cuts = {
        cut for closing in _CLOSING.values() if closing in text for cut in (text.find(closing), text.rfind(closing))
    }
    for cut in sorted(cuts):
        closing = next(mark for mark in _CLOSING.values() if text.startswith(mark, cut))
        thought = text[:cut]
        for opening in _CLOSING:
            thought = thought.removeprefix(opening)
        yield text[cut + len(closing) :].strip(), thought.strip()


def not_written() -> PairError:
    """The refusal of case 2."""
    return PairError(
        "answer's text is not in the rendering",
        "the chat template does not write the answer's text as it is: it drops or rewrites it",
        hint="model.chat_template: FILE with a template that writes answers as they are",
    )


def common_prefix(one: str, other: str) -> int:
    """How many characters the two begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # comparing slices is a hundred times faster than a loop over characters
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _edge(served: str, whole: str, parted: int, least: int) -> int:
    """`parted`, moved back to the beginning of a mark or control token that it is inside of."""
    for text in (served, whole):
        for pattern in (_MARK, _SPECIAL):
            for match in pattern.finditer(text, least):
                if match.start() < parted < match.end():
                    parted = match.start()
    return parted


def _has_thought(text: str) -> bool:
    """Whether the thought has text: an empty one is the template's own."""
    return any(
        text[begin + len(opening) : end].strip()
        for opening, closing in THOUGHT_MARKS
        if (begin := text.find(opening)) >= 0 and (end := text.find(closing, begin + len(opening))) >= 0
    )
