"""The values of a row -> turns of a chat -> a checked Pair, or a `RowError` that says why not.

Nothing is guessed: a row with an answer that is a number, empty, or equal to the other one holds no preference that
can be learned, and one that can be read in two ways is refused rather than read in either.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace

from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.preferences.row_contents import chat_written_as_text, strange_in_message, weight_of

__all__ = [
    "Row",
    "RowError",
    "Turns",
    "answers_to",
    "conversation",
    "dialogues",
    "implicit",
    "instruction_of",
    "is_missing",
    "is_transcript",
    "messages",
    "number",
    "opens_a_dialogue",
    "text_of",
    "transcript",
    "turns_of",
    "under_system",
    "value_of",
    "with_system",
]

Row = dict[str, object]
Turns = tuple[Message, ...]

_ROLES = {"system", "developer", "user", "assistant", "tool"}
_SPEAKERS = {  # how ShareGPT's files, and those that follow them, call the same roles
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant"), "assistant"),
    **dict.fromkeys(("observation", "tool"), "tool"),
    "system": "system",
}
_ASKS = {"user", "tool"}  # the turns an assistant answers
_OPENS = {"system", "developer", "user"}  # a list that begins so is a dialogue, not an answer
_SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
_TRANSCRIPT_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SEEN = 40
"""Characters of a value that a refusal shows."""
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


class RowError(Exception):
    """This row is not a pair."""

    def __init__(self, reason: str, seen: object = None) -> None:
        super().__init__(reason)
        self.reason = reason
        """The same text for the same kind of problem, so that it can be counted."""
        self.seen = "" if seen is None else _shortened(seen)
        """The value found there; never a part of the reason."""


def _shortened(value: object) -> str:
    """As Python writes it, in ASCII, so that it is safe in a message; of what may be long its beginning alone."""
    if isinstance(value, dict | list):
        return f"a {'list' if isinstance(value, list) else 'JSON object'} of {len(value)}"
    text = ascii(value[:_SEEN] if isinstance(value, str) else value)
    return f"{text[:_SEEN]}…" if len(text) > _SEEN or (isinstance(value, str) and len(value) > _SEEN) else text


# Pairs


def conversation(prompt: object, chosen: object, rejected: object) -> Pair:
    """A pair whose prompt is given: text, messages or turns. Answers that are whole dialogues must begin with it."""
    if isinstance(prompt, tuple):
        return answers_to(prompt, chosen, rejected)
    if isinstance(prompt, str):
        answers = turns_of(chosen, "chosen", "assistant"), turns_of(rejected, "rejected", "assistant")
        if all(_is_dialogue(turns) for turns in answers):
            return dialogues(text_of(prompt, "prompt"), *answers)
    return answers_to(turns_of(prompt, "prompt", "user"), chosen, rejected)


def answers_to(prompt: Turns, chosen: object, rejected: object) -> Pair:
    """A pair of two answers, text or messages, to these turns, which either answer may repeat."""
    answers = turns_of(chosen, "chosen", "assistant"), turns_of(rejected, "rejected", "assistant")
    for side, turns in zip(("chosen", "rejected"), answers, strict=True):
        if turns and _bare(turns) != _bare(prompt) and not any(turn.role == "assistant" for turn in turns):
            raise RowError(f"{side} has no assistant turn: its role is {turns[-1].role}")
    return _checked(prompt, *(_after(prompt, turns) for turns in answers))


def implicit(chosen: object, rejected: object) -> Pair:
    """A pair whose answers begin alike; what they share is the prompt."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _texts_that_begin_alike(text_of(chosen, "chosen"), text_of(rejected, "rejected"))
    return dialogues(None, messages(chosen, "chosen"), messages(rejected, "rejected"))


def dialogues(prompt: str | None, chosen: Turns, rejected: Turns) -> Pair:
    """Two whole dialogues: the turns they share, up to the last one an assistant answers, are the prompt.

    A text prompt beside them must be their first or last user turn (sets of several turns do either).
    """
    shared = _in_common(_bare(chosen), _bare(rejected))
    while shared and chosen[shared - 1].role not in _ASKS:
        shared -= 1
    asked = [turn.content.strip() for turn in chosen[:shared] if turn.role == "user"]
    if prompt is not None and prompt.strip() not in {*asked[:1], *asked[-1:]}:
        raise RowError("prompt differs from the dialogue")
    if not asked:
        raise RowError("no prompt: chosen and rejected share no user turn")
    return _checked(chosen[:shared], chosen[shared:], rejected[shared:])


def with_system(prompt: Turns, system: object) -> Turns:
    """The prompt under the system turn of a column of its own, which may be empty, or there already."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return prompt
    if prompt and prompt[0].role in {"system", "developer"}:
        if prompt[0].content == system:
            return prompt
        raise RowError("prompt has a system turn besides the system column")
    return (Message("system", text_of(system, "system")), *prompt)


def under_system(row: Row, pair: Pair) -> Pair:
    """The pair under the system text of a row that has it in a column of its own, whatever its format reads."""
    for name in _SYSTEM_COLUMNS:
        pair = replace(pair, prompt=with_system(pair.prompt, row.get(name)))
    return pair


def _after(prompt: Turns, turns: Turns) -> Turns:
    """An answer without the prompt it may repeat."""
    if not _is_dialogue(turns):
        return turns
    if _bare(turns[: len(prompt)]) != _bare(prompt):
        raise RowError("prompt differs from the dialogue")
    return turns[len(prompt) :]


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
        if not all(turn.ended for turn in turns[:-1]):
            raise RowError(f"{side} has a cut turn before its last one")
        if not any(turn.learned for turn in turns if turn.role == "assistant"):
            raise RowError(f"{side} has no assistant turn of weight 1")
    if _stripped(chosen) == _stripped(rejected):
        raise RowError("chosen and rejected are identical")
    # nothing of a prompt is learned, neither its assistant's turns nor where they end
    prompt = tuple(replace(turn, learned=True, ended=True) for turn in prompt)
    return Pair(prompt, chosen, rejected)


def _bare(turns: Turns) -> list[tuple[str, str]]:
    """The text, whatever its weight."""
    return [(turn.role, turn.content) for turn in turns]


def _stripped(turns: Turns) -> list[tuple[str, str]]:
    return [(turn.role, turn.content.strip()) for turn in turns]


def _is_dialogue(turns: Turns) -> bool:
    return bool(turns) and turns[0].role in _OPENS


# Transcripts


def is_transcript(text: object) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def transcript(text: str, side: str) -> Turns:
    """`\\n\\nHuman: ...\\n\\nAssistant: ...` as turns, the white space between them dropped."""
    start, *parts = _TRANSCRIPT_TURN.split(text.lstrip())
    if start or not parts:
        raise RowError(f"{side} is not a Human/Assistant transcript")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message(_TRANSCRIPT_ROLES[speaker], content.strip()) for speaker, content in turns)


# Values


def is_missing(value: object) -> bool:
    """Nothing, null and NaN, which is a data frame's null."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def value_of(row: Row, name: str) -> object:
    """A column's value, if it is not empty."""
    value = row.get(name)
    if is_missing(value):
        raise RowError(f"{name} is missing")
    return value


def number(row: Row, name: str) -> float:
    """A finite number, written as one or as text."""
    value = value_of(row, name)
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            if math.isfinite(found := float(value)):
                return found
        except (ValueError, OverflowError):
            pass
    raise RowError(f"{name} is not a number", value)


def turns_of(value: object, side: str, role: str) -> Turns:
    """Text is one turn of `role`; a message list is itself."""
    if isinstance(value, str):
        return (Message(role, text_of(value, side)),)
    if not isinstance(value, list):
        raise RowError(f"{side} is neither text nor messages", value)
    return messages(value, side)


def opens_a_dialogue(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    role = first.get("role") if isinstance(first, dict) else None
    return isinstance(role, str) and role in _OPENS


def messages(value: object, side: str) -> Turns:
    """A list of `{role, content}`, or of ShareGPT's `{from, value}`."""
    if not isinstance(value, list):
        raise RowError(f"{side} is not a list of messages", value)
    return tuple(_message(item, side) for item in value)


def _message(item: object, side: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{side} holds something that is not a message")
    if item.get("from") == "function_call":  # dropping it would change what the answer is
        raise RowError(f"{side} has a message with tool calls, which are not supported")
    if "from" in item and "role" not in item:
        role, content = item["from"], item.get("value")
        role = _SPEAKERS.get(role, role) if isinstance(role, str) else role
    else:
        role, content = item.get("role"), item.get("content")
    if not isinstance(role, str):
        raise RowError(f"{side} has a message without a role")
    if role not in _ROLES:
        raise RowError(f"{side} has a message of unknown role {ascii(role)[:24]}")
    if (strange := strange_in_message(item, role)) is not None:
        raise RowError(f"{side} {strange}")
    if content is None:
        raise RowError(f"{side} has a message without content")
    weight = weight_of(item.get("weight"))
    if weight is None:
        raise RowError(f"{side} has a message of {role} whose weight is neither 0 nor 1")
    cut = item.get("cut")
    if not is_missing(cut) and not isinstance(cut, bool):
        raise RowError(f"{side} has a message whose cut is neither true nor false", cut)
    learned, ended = weight == 1 or role != "assistant", cut is not True or role != "assistant"
    return Message(role, _content(content, side), learned=learned, ended=ended)


def _content(content: object, side: str) -> str:
    """Text, or a list of text parts joined; images and the rest are refused."""
    if isinstance(content, str):
        return _unicode(content)
    parts = content if isinstance(content, list) else [content]
    of_text = [part for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if strange := next(filter(None, (strange_in_message(part, "part") for part in of_text)), None):
        raise RowError(f"{side} {strange}")
    texts = [part.get("text") for part in of_text]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        kinds = [part.get("type") for part in parts if isinstance(part, dict)]
        kind = next((kind for kind in kinds if isinstance(kind, str) and kind != "text"), None)
        also = f" ({ascii(kind)[1:-1][:24]})" if kind is not None else ""
        raise RowError(f"{side} has a message whose content is not text{also}")
    return _unicode("".join(map(str, texts)))


def text_of(value: object, side: str) -> str:
    """The value, if it is text that a tokenizer can take."""
    if not isinstance(value, str):
        raise RowError(f"{side} is not text", value)
    if chat_written_as_text(value):
        raise RowError(f"{side} is a message list written out as text")
    return _unicode(value)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: no tokenizer takes it
        raise RowError("text is not valid Unicode") from None
    return text


def instruction_of(row: Row) -> str:
    """Alpaca's prompt: the instruction, and its input on the next line where there is one."""
    parts = [text_of(value_of(row, "instruction"), "instruction")]
    if row.get("input") is not None:
        parts.append(text_of(row["input"], "input"))
    return "\n".join(part for part in parts if part.strip())
