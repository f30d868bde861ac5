"""The public shapes: a raw row -> a Pair, or a `RowError` that says why not. One small pure function a format.

    trl            prompt, chosen, rejected: text or message lists; or chosen and rejected alone that begin alike
    ultrafeedback  prompt (text), chosen and rejected whole dialogues that begin with it
    hh             chosen and rejected whole transcripts: '\\n\\nHuman: ...\\n\\nAssistant: ...'

Nothing is guessed: a row with an answer that is a number, empty, or equal to the other one holds no preference that
can be learned, and one that can be read in two ways is refused rather than read in either.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

from dpo_studio.preferences.pair import Message, Pair

__all__ = ["FORMATS", "Parser", "Row", "RowError", "conversation", "parse_trl_implicit", "shape_of", "text_of"]

Row = dict[str, object]
Parser = Callable[[Row], Pair]
Turns = tuple[Message, ...]

_ROLES = {"system", "developer", "user", "assistant", "tool"}
_ASKS = {"user", "tool"}  # the turns an assistant answers
_OPENS = {"system", "developer", "user"}  # a list that begins so is a dialogue, not an answer
_LIST_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
_TRANSCRIPT_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


class RowError(Exception):
    """This row is not a pair."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def shape_of(row: Row) -> str | None:
    """The format this one row looks like."""
    if not {"chosen", "rejected"} <= row.keys():
        return None
    chosen, prompt = row["chosen"], row.get("prompt")
    if _is_transcript(prompt) or _is_transcript(chosen):
        return "hh"
    if "prompt" in row:
        return "ultrafeedback" if isinstance(prompt, str) and _opens_a_dialogue(chosen) else "trl"
    # Texts without a prompt column are TRL's implicit shape only when there is no other column: in a file of
    # `question, chosen, rejected` the words two answers happen to begin with are not the prompt.
    return "trl" if isinstance(chosen, list) or row.keys() == {"chosen", "rejected"} else None


def _is_transcript(text: object) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _opens_a_dialogue(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and value[0].get("role") in _OPENS


def _trl(row: Row) -> Pair:
    """`prompt`, `chosen`, `rejected`, each text or a message list; the answers may repeat the prompt."""
    return conversation(_value(row, "prompt"), _value(row, "chosen"), _value(row, "rejected"))


def parse_trl_implicit(row: Row) -> Pair:
    """`chosen` and `rejected` that begin alike; what they share is the prompt."""
    chosen, rejected = _value(row, "chosen"), _value(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _texts_that_begin_alike(chosen, rejected)
    return _dialogues(None, _messages(chosen, "chosen"), _messages(rejected, "rejected"))


def _ultrafeedback(row: Row) -> Pair:
    """A text prompt, and two whole dialogues that hold it."""
    prompt = text_of(_value(row, "prompt"), "prompt")
    chosen, rejected = (_messages(_value(row, side), side) for side in ("chosen", "rejected"))
    return _dialogues(prompt, chosen, rejected)


def _hh(row: Row) -> Pair:
    """Two transcripts that part at the last Assistant turn; the turns before may stand in a `prompt` of their own."""
    prompt = row.get("prompt")
    before = "" if prompt is None else text_of(prompt, "prompt")
    chosen, rejected = (_transcript(before, text_of(_value(row, side), side), side) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise RowError("the transcripts differ before the last answer")
    return _checked(chosen[:-1], chosen[-1:], rejected[-1:])


FORMATS: dict[str, Parser] = {"hh": _hh, "trl": _trl, "ultrafeedback": _ultrafeedback}


def conversation(prompt: object, chosen: object, rejected: object) -> Pair:
    """A pair whose prompt is given. Answers that are whole dialogues must begin with it, and are cut there."""
    answers = _turns(chosen, "chosen", "assistant"), _turns(rejected, "rejected", "assistant")
    prompt_turns = _turns(prompt, "prompt", "user")
    if isinstance(prompt, str) and all(_is_dialogue(turns) for turns in answers):
        return _dialogues(prompt, *answers)
    chosen_turns, rejected_turns = (_after(prompt_turns, turns) for turns in answers)
    return _checked(prompt_turns, chosen_turns, rejected_turns)


def _after(prompt: Turns, turns: Turns) -> Turns:
    """An answer without the prompt it may repeat."""
    if not _is_dialogue(turns):
        return turns
    if turns[: len(prompt)] != prompt:
        raise RowError("prompt differs from the dialogue")
    return turns[len(prompt) :]


def _dialogues(prompt: str | None, chosen: Turns, rejected: Turns) -> Pair:
    """Two whole dialogues: the turns they share, up to the last one an assistant answers, are the prompt.

    A text prompt beside them must be their first or last user turn (sets of several turns do either).
    """
    shared = _in_common(chosen, rejected)
    while shared and chosen[shared - 1].role not in _ASKS:
        shared -= 1
    asked = [turn.content.strip() for turn in chosen[:shared] if turn.role == "user"]
    if prompt is not None and prompt.strip() not in {*asked[:1], *asked[-1:]}:
        raise RowError("prompt differs from the dialogue")
    if not asked:
        raise RowError("no prompt: chosen and rejected share no user turn")
    return _checked(chosen[:shared], chosen[shared:], rejected[shared:])


def _texts_that_begin_alike(chosen: str, rejected: str) -> Pair:
    """TRL's implicit prompt for plain texts: their common beginning, here up to a whole word."""
    common = re.match(r".*\s", chosen[: _in_common(chosen, rejected)], re.DOTALL)
    if common is None or not common[0].strip():
        raise RowError("no prompt: chosen and rejected do not begin alike")
    prompt, start = common[0].rstrip(), common.end()
    return conversation(prompt, chosen[start:], rejected[start:])


def _in_common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many elements the two begin with alike."""
    return sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False)))


def _transcript(before: str, text: str, side: str) -> Turns:
    """`\\n\\nHuman: ...\\n\\nAssistant: ...` as turns, the white space between them dropped."""
    repeats = text.lstrip().startswith(before.strip())
    if not repeats and _is_transcript(text):
        raise RowError("prompt differs from the dialogue")
    whole = text if repeats else before + text
    start, *parts = _TRANSCRIPT_TURN.split(whole.lstrip())
    if start or not parts:
        raise RowError(f"{side} is not a Human/Assistant transcript")
    if parts[-2] != "Assistant":
        raise RowError(f"{side} does not end with an assistant turn")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message(_TRANSCRIPT_ROLES[speaker], content.strip()) for speaker, content in turns)


def _checked(prompt: Turns, chosen: Turns, rejected: Turns) -> Pair:
    """The pair, if there is one thing to answer and there are two different answers to it."""
    if not prompt:
        raise RowError("prompt is empty")
    if prompt[-1].role not in _ASKS:
        raise RowError("prompt does not end with a user turn")
    if not prompt[-1].content.strip():
        raise RowError("prompt is empty")
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns:
            raise RowError(f"{side} is empty")
        if turns[0].role != "assistant":
            raise RowError(f"{side} does not start with an assistant turn")
        if turns[-1].role != "assistant":
            raise RowError(f"{side} does not end with an assistant turn")
        if not turns[-1].content.strip():
            raise RowError(f"{side} is empty")
    if _bare(chosen) == _bare(rejected):
        raise RowError("chosen and rejected are identical")
    return Pair(prompt, chosen, rejected)


def _bare(turns: Turns) -> list[tuple[str, str]]:
    return [(turn.role, turn.content.strip()) for turn in turns]


def _is_dialogue(turns: Turns) -> bool:
    return bool(turns) and turns[0].role in _OPENS


def _value(row: Row, name: str) -> object:
    value = row.get(name)
    if value is None:
        raise RowError(f"{name} is missing")
    return value


def _turns(value: object, side: str, role: str) -> Turns:
    """Text is one turn of `role`; a message list is itself."""
    if isinstance(value, str):
        return (Message(role, text_of(value, side)),)
    if not isinstance(value, list):
        raise RowError(f"{side} is neither text nor messages")
    return _messages(value, side)


def _messages(value: object, side: str) -> Turns:
    if not isinstance(value, list):
        raise RowError(f"{side} is not a list of messages")
    return tuple(_message(item, side) for item in value)


def _message(item: object, side: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{side} holds something that is not a message")
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str):
        raise RowError(f"{side} has a message without a role")
    if role not in _ROLES:
        raise RowError(f"{side} has a message of unknown role {ascii(role)[:24]}")
    if item.get("tool_calls"):  # dropping them would change what the answer is
        raise RowError(f"{side} has a message with tool calls, which are not supported")
    if content is None:
        raise RowError(f"{side} has a message without content")
    return Message(role, _content(content, side))


def _content(content: object, side: str) -> str:
    """Text, or a list of text parts joined; images and the rest are refused."""
    if isinstance(content, str):
        return _unicode(content)
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise RowError(f"{side} has a message whose content is not text")
    return _unicode("".join(map(str, texts)))


def text_of(value: object, side: str) -> str:
    """The value, if it is text that a tokenizer can take."""
    if not isinstance(value, str):
        raise RowError(f"{side} is not text")
    if _LIST_AS_TEXT.match(value):  # what a data frame of message lists becomes in a CSV file
        raise RowError(f"{side} is a message list written out as text")
    return _unicode(value)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: no tokenizer takes it
        raise RowError("text is not valid Unicode") from None
    return text
