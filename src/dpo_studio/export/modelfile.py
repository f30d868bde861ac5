"""An Ollama Modelfile beside a GGUF: the same chat, in Ollama's own template language, or none where that is not sure.

Ollama does not run the GGUF's Jinja template. A template whose chats are its turns one after another, each between two
fixed texts, can be said in Go's language: it is taken apart by rendering some chats, and trusted only if other chats,
put together from the parts, are what Jinja renders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["modelfile"]

Chat = Sequence[tuple[str, str]]
"""Turns: (role, text)."""
Render = Callable[[Chat], str]
"""A chat with its generation prompt, as the chat template writes it; raises ValueError where it refuses."""
_MARKS = ("Qmark7one", "Qmark7two", "Qmark7six", "Qmark7ten")


@dataclass(frozen=True)
class _Parts:
    start: str
    """What a chat begins with, whatever its turns."""
    no_system: str
    """What stands before the first turn where that is not a system's."""
    around: dict[str, tuple[str, str]]
    """Before and after the text of a turn, by role."""
    opening: str
    """The generation prompt."""

    def put_together(self, chat: Chat) -> str:
        """As Ollama will write it."""
        turns = "".join(f"{self.around[role][0]}{text}{self.around[role][1]}" for role, text in chat)
        return f"{self.start}{'' if chat[0][0] == 'system' else self.no_system}{turns}{self.opening}"


def modelfile(file: str, render: Render, stops: Sequence[str], bos: str | None) -> tuple[str, bool]:
    """(the Modelfile of `file`, whether it has a template).

    `stops` are the texts that end a turn; `bos` is what the tokenizer puts in front by itself, which a template of
    Ollama must not repeat.
    """
    parts = _taken_apart(render)
    lines = [f"FROM ./{file}"]
    if parts is not None:
        lines.append(f'TEMPLATE """{_in_go(parts, bos)}"""')
    else:
        lines.append(
            "# This model's chat template has no equal in Ollama's language; `llama-server --jinja` runs its own."
        )
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n", parts is not None


def _taken_apart(render: Render) -> _Parts | None:
    """The parts of a template, or None where its chats are not its turns one after another."""
    one, two, six, ten = _MARKS
    try:
        asked = render([("user", one)])
        dialogue = render([("user", one), ("assistant", two), ("user", six)])
        after_one, between = dialogue.split(one, 1)[1].split(two)[0], dialogue.split(two, 1)[1].split(six)[0]
        tail = dialogue.split(six, 1)[1]
        head = asked.split(one, 1)[0]
        opening = _ending(tail, after_one)
        if opening is None:
            return None
        after_user = tail.removesuffix(opening)
        before_assistant = after_one.removeprefix(after_user)
        before_user = _ending_of_both(head, between)
        after_assistant = between.removesuffix(before_user)
        around = {"user": (before_user, after_user), "assistant": (before_assistant, after_assistant)}
        start, no_system = head.removesuffix(before_user), ""
        try:
            with_system = render([("system", ten), ("user", one)])
        except ValueError:
            with_system = ""
        if with_system:
            before, after = with_system.split(ten, 1)
            after_system = after.split(one, 1)[0].removesuffix(before_user)
            common = _beginning_of_both(start, before)
            start, no_system = common, start.removeprefix(common)
            around["system"] = (before.removeprefix(common), after_system)
        parts = _Parts(start, no_system, around, opening)
        return parts if _is_right(parts, render) else None
    except (ValueError, IndexError):
        return None


def _is_right(parts: _Parts, render: Render) -> bool:
    """Whether other chats come out as Jinja renders them: long, empty-ended, with quotes, with and without a system."""
    texts = ['What\'s "this"?\n\nA list:\n- one', "Yes.", "And {that}?", "No: <b>", "Why"]
    chats: list[list[tuple[str, str]]] = []
    for turns in (1, 3, 5):
        chat = [("user" if at % 2 == 0 else "assistant", texts[at]) for at in range(turns)]
        chats.append(chat)
        if "system" in parts.around:
            chats.append([("system", "Be brief."), *chat])
    return all(parts.put_together(chat) == render(chat) for chat in chats)


def _ending(tail: str, after_one: str) -> str | None:
    """The generation prompt: what follows the end of the last user turn, whose end is also what `after_one` begins
    with."""
    for cut in range(min(len(tail), len(after_one)), -1, -1):
        if tail[:cut] == after_one[:cut]:
            return tail[cut:] or tail[len(tail) :]
    return None


def _ending_of_both(left: str, right: str) -> str:
    cut = 0
    while cut < min(len(left), len(right)) and left[-1 - cut] == right[-1 - cut]:
        cut += 1
    return left[len(left) - cut :]


def _beginning_of_both(left: str, right: str) -> str:
    cut = 0
    while cut < min(len(left), len(right)) and left[cut] == right[cut]:
        cut += 1
    return left[:cut]


def _in_go(parts: _Parts, bos: str | None) -> str:
    start = parts.start.removeprefix(bos) if bos else parts.start
    turns = ""
    for role, (before, after) in parts.around.items():
        word = "else if" if turns else "if"
        turns += f'{{{{- {word} eq .Role "{role}" }}}}{_text(before)}{{{{ .Content }}}}{_text(after)}'
    no_system = (
        f'{{{{- if ne (index .Messages 0).Role "system" }}}}{_text(parts.no_system)}{{{{- end }}}}'
        if parts.no_system
        else ""
    )
    return (
        f"{_text(start)}{no_system}{{{{- range .Messages }}}}{turns}{{{{- end }}}}{{{{- end }}}}{_text(parts.opening)}"
    )


def _text(text: str) -> str:
    """Text as a Go expression: nothing around it may swallow its newlines."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
