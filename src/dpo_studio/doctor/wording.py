"""Checks of the wording of one pair: each reads a pair and returns an excerpt of what it found, or None."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from dpo_studio.preferences.pair import Message, Pair

__all__ = [
    "WORDING",
]

_AROUND = 48
"""Characters of text shown on either side of a match."""

_MARKUP = re.compile(
    r"<\|(?:im_start|im_end|im_sep|endoftext|end_of_text|begin_of_text|start_header_id|end_header_id|eot_id|eom_id|"
    r"system|user|assistant|end|endofturn|startoftext|START_OF_TURN_TOKEN|END_OF_TURN_TOKEN)\|>"
    r"|<(?:start_of_turn|end_of_turn|s|/s|bos|eos|unk|pad)>|\[/?INST\]|<</?SYS>>|\[(?:BOS|EOS|PAD|UNK|SEP|CLS)\]"
    r"|^### ?(?:Instruction|Response|Human|Assistant|User):|^(?:Human|Assistant|USER|ASSISTANT): ",
    re.MULTILINE,
)
_COULD_BE_MARKUP = (
    "<|",
    "<s",
    "</s",
    "<b",
    "<e",
    "<u",
    "<p",
    "[",
    "<<",
    "###",
    "uman:",
    "ssistant:",
    "USER:",
    "ASSIST",
)
"""One of these is in every text the pattern finds: looking for them first takes a tenth of the time."""

_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # control characters, C1 too
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks and overrides of direction
    "\u200b\u2060-\u2064\ufeff\ufff9-\uffff"  # no width, annotations, U+FFFD where decoding failed
    "\U000e0000-\U000e007f]"  # tags: text that no screen shows
)

_REFUSALS = (
    "as an ai language model",
    "as a language model",
    "as an artificial intelligence",
    "i'm just an ai",
    "i'm sorry, but i can",
    "i am sorry, but i can",
    "i apologize, but i can",
    "i cannot assist with",
    "i can't assist with",
    "i can't help with that",
    "i cannot fulfill",
    "i'm unable to",
    "i am unable to",
    "i don't have personal opinions",
    "my knowledge cutoff",
    "trained by openai",
    "developed by openai",
    "i am chatgpt",
    "i'm chatgpt",
)
_OPENERS = ("system", "developer")
_LONG_ANSWER = 300
_SENTENCE_WORDS = 8


@dataclass(frozen=True)
class RowCheck:
    """A check of single pairs, and the text of its finding."""

    name: str
    title: str
    look: Callable[[Pair], str | None]
    """What was found in a pair, with some text around it; None if nothing was."""
    warning: float
    """Over which share of the pairs it is a warning."""
    does: str
    todo: str


def _markup(pair: Pair) -> str | None:
    for text in _texts(pair):
        if any(sign in text for sign in _COULD_BE_MARKUP) and (found := _MARKUP.search(text)):
            return _excerpt(text, *found.span())
    return None


def _unseen(pair: Pair) -> str | None:
    for text in _texts(pair):
        if found := _UNSEEN.search(text):
            return f"U+{ord(found[0]):04X} in: {_excerpt(text, *found.span())}"
    return None


def _refusal(pair: Pair) -> str | None:
    if (seen := _refuses(pair.chosen)) is None or _refuses(pair.rejected) is not None:
        return None
    return seen


def _refuses(turns: tuple[Message, ...]) -> str | None:
    text = turns[-1].content
    plain = text.lower().replace("’", "'")
    for phrase in _REFUSALS:
        if (at := plain.find(phrase)) >= 0:
            return _excerpt(text, at, at + len(phrase))
    return None


def _unfinished(pair: Pair) -> str | None:
    """A long chosen answer whose last line is the beginning of a sentence: eight words or more, then no full stop."""
    text = pair.chosen[-1].content.rstrip()
    if len(text) < _LONG_ANSWER or not (text[-1].isalnum() or text[-1] in ",;-–("):
        return None
    words = text.rpartition("\n")[2].split()
    if len(words) < _SENTENCE_WORDS or "://" in words[-1]:
        return None
    return f"… {text[-2 * _AROUND :]}"


def _empty_turn(pair: Pair) -> str | None:
    for turn in (*pair.prompt, *pair.chosen, *pair.rejected):
        if not turn.content.strip():
            return f"an empty {turn.role} turn"
    return None


def _order(pair: Pair) -> str | None:
    for answer in (pair.chosen, pair.rejected):
        roles = [turn.role for turn in (*pair.prompt, *answer)]
        if any(role in _OPENERS for role in roles[1:]):
            return f"a system turn that is not the first: {', '.join(roles)}"
        spoken = roles[1:] if roles[0] in _OPENERS else roles
        if spoken[0] != "user":
            return f"it does not begin with a user turn: {', '.join(roles)}"
        twice = next((one for one, other in pairwise(spoken) if one == other != "tool"), None)
        if twice is not None:
            return f"two {twice} turns in a row: {', '.join(roles)}"
    return None


def _texts(pair: Pair) -> Iterator[str]:
    for turns in (pair.prompt, pair.chosen, pair.rejected):
        for turn in turns:
            yield turn.content


def _excerpt(text: str, start: int, end: int) -> str:
    """The text around a match."""
    before, after = text[max(0, start - _AROUND) : start], text[end : end + _AROUND]
    cut = "… " if start > _AROUND else "", " …" if end + _AROUND < len(text) else ""
    return f"{cut[0]}{before}{text[start:end]}{after}{cut[1]}"


WORDING = (
    RowCheck(
        "empty-turns",
        "empty turns",
        _empty_turn,
        warning=0.01,
        does="The template writes a turn with nothing in it, which the model never saw in its own training.",
        todo="Leave the turn out of the row.",
    ),
    RowCheck(
        "role-order",
        "turns in an unusual order",
        _order,
        warning=0.01,
        does="Many chat templates refuse such a chat, and the pair is dropped; others write what the model never saw.",
        todo="Join turns of one speaker; put the system turn first; begin with the user.",
    ),
    RowCheck(
        "chat-markup",
        "chat markup written as text",
        _markup,
        warning=0.01,
        does="It is encoded as the words it is, never as a control token; the model learns to write it.",
        todo="Take it out: the chat template puts the real one in.",
    ),
    RowCheck(
        "unseen-characters",
        "characters that no screen shows",
        _unseen,
        warning=0.01,
        does="Control, direction and replacement characters (U+FFFD: a decoding that failed) are learned like letters.",
        todo="Read the file again in its own encoding; take out what should not be there.",
    ),
    RowCheck(
        "unfinished-answers",
        "chosen answers that stop in mid-sentence",
        _unfinished,
        warning=0.1,
        does="The end of turn is learned after half a sentence: answers of the tuned model break off.",
        todo="They were cut when they were made: make them again with more tokens, or drop these pairs.",
    ),
    RowCheck(
        "refusing-chosen",
        "refusals and boilerplate preferred to an answer",
        _refusal,
        warning=0.05,
        does="The chosen answer refuses or speaks of itself, the rejected one does not: the run learns to refuse.",
        todo="Wanted in a set about safety; else drop these pairs.",
    ),
)
"""In the order of the report."""
