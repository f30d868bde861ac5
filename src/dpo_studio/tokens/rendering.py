"""Chats as text, as the model's chat template writes them.

Two kinds of stand-ins are put into what people wrote, characters of Unicode's private use that no template trims,
compares or splits on. One stands for a special token that the text spells, so that no text becomes a control token; it
is the same in all renderings of a pair, so that they can be compared. The other marks a turn, and is taken out again:
where a mark comes out is where the template put that turn, whatever else reads the same.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import TemplateError

from dpo_studio.config import TemplateValue
from dpo_studio.errors import DataError, ModelError
from dpo_studio.preferences.pair import Message
from dpo_studio.tokens.template import LONGEST_CHAT, ChatTemplate, TemplateLimit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["NO_TEMPLATE_HINT", "PairError", "Places", "Shielded", "TemplateWriter", "Writer"]

NO_TEMPLATE_HINT = "model.chat_template: FILE names a Jinja file to use"
_TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""The exceptions that a template's code can raise."""
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class PairError(DataError):
    """A pair that has no token ids to learn from; `kind` names the reason for counting, the message says it in full."""

    def __init__(self, kind: str, message: str | None = None, *, hint: str | None = None) -> None:
        super().__init__(message or kind, hint=hint)
        self.kind = kind


class Shielded(NamedTuple):
    """A text with stand-ins for the special tokens that it spells, by code point."""

    text: str
    spelled: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Places:
    """The positions of the turns' marks in a rendering."""

    ends: Sequence[Sequence[int]]
    """By turn: wherever its text ends."""
    middles: Sequence[Sequence[int]]
    """By turn: wherever the middle of its text is."""
    whole: bool
    """Whether all turns were marked; otherwise only the requested ones, and the others are unknown."""


class TemplateWriter:
    """A tokenizer's chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        special: Collection[str],
        today: datetime.date | None,
        given: Mapping[str, TemplateValue],
    ) -> None:
        """`special`: the texts of the special tokens, the longest first; `given`: what the template is handed.

        Raises:
            ModelError: no chat template, or none that can be used safely.
        """
        if not tokenizer.chat_template:
            raise ModelError("the tokenizer has no chat template", hint=NO_TEMPLATE_HINT)
        try:
            source = tokenizer.get_chat_template()
        except ValueError:  # several, by name, and none of them `default`
            raise ModelError(
                "the tokenizer has several chat templates, none the default", hint=NO_TEMPLATE_HINT
            ) from None
        self.template = ChatTemplate(source, tokenizer.special_tokens_map, today=today, given=given)
        self.spelled_pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def of(self, *chats: Sequence[Message]) -> Writer:
        """A renderer for these turns, in any selection and order."""
        return Writer(self, [turn for chat in chats for turn in chat])


class Writer:
    """Writes chats of some turns, with the same stand-ins in all of them."""

    def __init__(self, its: TemplateWriter, turns: Sequence[Message]) -> None:
        self._template, self._pattern = its.template, its.spelled_pattern
        texts = [text for turn in turns for text in (turn.role, turn.content)]
        spelled = dict.fromkeys(match.group() for text in texts for match in self._pattern.finditer(text))
        self._texts = texts
        self.spelled: dict[int, str] = {}
        """Special tokens by the code point of their stand-in."""
        self._stand_ins = dict(zip(spelled, self._free(), strict=False)) if spelled else {}
        self.spelled |= {ord(stand_in): special for special, stand_in in self._stand_ins.items()}

    def _free(self) -> Iterator[str]:
        """Characters that occur nowhere in the turns."""
        taken = set().union(*self._texts, map(chr, self.spelled))
        return (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)

    def shield(self, text: str) -> str:
        """The text with stand-ins for the special tokens that it spells."""
        if not self._stand_ins:
            return text
        return self._pattern.sub(lambda match: self._stand_ins[match.group()], text)

    def write(self, turns: Sequence[Message], *, open_answer: bool) -> str:
        """The chat; with `open_answer` as a server sends it, the generation prompt at its end.

        Raises:
            PairError: the template refuses it, or it is not a chat.
            ModelError: the template has to be stopped.
        """
        return self._render_contents(turns, [self.shield(turn.content) for turn in turns], open_answer)

    def _render_contents(self, turns: Sequence[Message], contents: Sequence[str], open_answer: bool) -> str:
        if not turns:
            raise PairError("prompt without turns", "the prompt has no turns")
        if (length := sum(map(len, contents))) > LONGEST_CHAT:
            raise PairError("longer than any model reads", f"it has {length:,} characters, over {LONGEST_CHAT:,}")
        messages = [
            {"role": self.shield(turn.role), "content": text} for turn, text in zip(turns, contents, strict=True)
        ]
        try:
            text = self._template.render(messages, add_generation_prompt=open_answer)
        except (
            TemplateLimit
        ) as error:  # a legitimate template needs far less for a chat this long: not this pair's fault
            raise ModelError(f"the chat template is stopped: {error}", hint=NO_TEMPLATE_HINT) from None
        except _TEMPLATE_ERRORS as error:
            raise PairError("refused by the chat template", f"the chat template refuses it: {error}") from None
        if not _is_unicode(text):
            raise PairError("text is not Unicode", "the text contains a lone surrogate, which is not a character")
        return text

    def places(
        self, turns: Sequence[Message], text: str, *, own: Collection[int], open_answer: bool = False
    ) -> Places | None:
        """The positions of the turns in `text`, which `write` made of them; `own` are those that must be found.

        None where marks change what the template writes: it compares or rewrites what it is given.
        """
        contents = [self.shield(turn.content) for turn in turns]
        free = self._free()
        marks = [(next(free), next(free)) for _ in turns]
        others = set(range(len(turns))) - set(own)
        for ended, halved in ((others, others), (others, set()), (set(), others), (set(), set())):
            marked = [
                _marked(content, end if turn in ended or turn in own else "", middle if turn in halved else "")
                for turn, (content, (end, middle)) in enumerate(zip(contents, marks, strict=True))
            ]
            try:
                written = self._render_contents(turns, marked, open_answer)
            except PairError:
                continue
            clean, found = _read(written, {mark for pair in marks for mark in pair})
            if clean == text:
                ends = [found.get(end, []) for end, _ in marks]
                middles = [found.get(middle, []) for _, middle in marks]
                return Places(ends, middles, bool(ended or halved or not others))
        return None


def _marked(content: str, end: str, middle: str) -> str:
    """The text with one mark behind its last character and another between two letters of its second half."""
    last = len(content.rstrip())
    at = next((at for at in range(last // 2, last - 1) if at and content[at - 1 : at + 1].isalnum()), last)
    if at == last:
        middle = ""
    return content[:at] + middle + content[at:last] + end + content[last:]


def _read(written: str, marks: Collection[str]) -> tuple[str, dict[str, list[int]]]:
    """The text without its marks, and the position of each of them."""
    found: dict[str, list[int]] = {}
    clean: list[str] = []
    at = 0
    for part in re.split(f"([{min(marks)}-{max(marks)}])", written):
        if part in marks:
            found.setdefault(part, []).append(at)
        else:
            clean.append(part)
            at += len(part)
    return "".join(clean), found


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
