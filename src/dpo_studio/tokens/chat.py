"""Chats as token ids, in the model's own chat template, and which of the ids are the answer.

The law: the prompt is what a server sends, and the answer what the template writes for it behind that (`tokens.split`);
where the whole chat begins with the served prompt, as it does in most templates, the ids of the two are a prefix of the
tokenizer's own `apply_chat_template`. One thing is done differently on purpose: text that spells a special token stays
text (`tokens.pieces`).
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from dpo_studio.config import TemplateValue
from dpo_studio.errors import ModelError
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.tokens.parting import ASSISTANT, PartedAnswer, PartedPair, Parter
from dpo_studio.tokens.pieces import TextEncoder
from dpo_studio.tokens.rendering import NO_TEMPLATE_HINT, PairError, Shielded, TemplateWriter
from dpo_studio.tokens.split import Case

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["AnswerIds", "ChatEncoder", "PairError", "PairIds"]

P = ParamSpec("P")
T = TypeVar("T")

_QUESTION = Message("user", " Wie  hoch ist der Berg?\n\n- 3.776 m\n")
_ANSWER = Message(ASSISTANT, "Fuji 富士山: 3,776 m. 🙂\n")
"""The chats that every template must render, and every tokenizer must encode in pieces."""


@dataclass(frozen=True, slots=True)
class AnswerIds:
    """What follows the prompt, the end of turn included."""

    ids: list[int]
    scored: list[bool]
    """Which of the ids are the assistant's: all, unless the answer has several turns."""


@dataclass(frozen=True, slots=True)
class PairIds:
    """A pair in token ids, whatever its length."""

    prompt: list[int]
    chosen: AnswerIds
    rejected: AnswerIds
    case: Case
    """How prompt and answers are parted; 1 is the plain one, in 3c the prompt is shorter than what a server sends."""
    end_appended: bool
    """The template writes no end of turn, so EOS was appended."""
    thought_left_out: bool
    """The template does not write a thought of an answer."""
    turn_left_out: bool
    """The template does not write the text of a turn of the prompt, as it is."""


class ChatEncoder:
    """A tokenizer and its chat template, as a function from chats to ids."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_ids: Collection[int],
        today: datetime.date | None = None,
        template: Mapping[str, TemplateValue] | None = None,
    ) -> None:
        """`eos_ids`: any of `generation_config.eos_token_id`; the tokenizer's own EOS always counts.

        `today`: the date that templates write which write one; None is today's. `template`: handed to the template.

        Raises:
            ModelError: no chat template, one that cannot render a question and an answer, nothing that ends a turn,
                or a tokenizer whose pieces do not add up to the whole.
        """
        own_eos = tokenizer.eos_token_id
        self.eos_ids = frozenset(eos_ids) | ({own_eos} if own_eos is not None else set())
        self._texts = TextEncoder(tokenizer, self.eos_ids)
        self._writer = TemplateWriter(tokenizer, self._texts.special, today, template or {})
        if not self.eos_ids:
            raise ModelError("the tokenizer has no EOS token, so nothing could end an answer")
        self._eos: int = own_eos if own_eos is not None else min(self.eos_ids)
        self._tokenizer = tokenizer
        self._parter = Parter(self._writer, self._texts)
        self._try_out()

    def _try_out(self) -> None:
        writer = self._writer.of([_QUESTION, _ANSWER])
        try:
            asked = writer.write([_QUESTION], open_answer=True)
            answered = writer.write([_QUESTION, _ANSWER], open_answer=False)
        except PairError as error:
            raise ModelError(f"on a question and an answer: {error.message}", hint=NO_TEMPLATE_HINT) from None
        self._trial = [asked, answered]
        self._texts.find_anchor(self._trial)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Without the template."""
        return self._tokenizer

    @property
    def template(self) -> str:
        """The chat template, as Jinja."""
        return self._writer.template.source

    @property
    def pad_id(self) -> int:
        """The padding id; masked out."""
        return int(self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._eos)

    def spelled(self, text: str) -> str | None:
        """The first special token that the text spells, if it spells one."""
        found = self._writer.spelled_pattern.search(text)
        return None if found is None else found.group()

    def begins_twice(self, ids: Sequence[int]) -> bool:
        """Whether a chat begins with two tokens that begin a chat (BOS): one from the template, one from elsewhere."""
        return len(ids) > 1 and ids[0] == ids[1] == self._tokenizer.bos_token_id

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, control tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return dict(self._tokenizer.get_vocab())

    @cached_property
    def largest_id(self) -> int:
        """The largest id that tokenizer and template can produce: the model's embedding needs a row more.

        Special tokens that nothing writes are left out, for no text becomes one: Gemma 3's text models have one, for
        images, that their embedding lacks.
        """
        written = {self._eos, self.pad_id}.union(*self._texts.plain(self._trial, split_special_tokens=False))
        source = self._writer.template.source
        never = {number for text, number in self._texts.special.items() if text not in source} - written
        return max(number for number in self.vocabulary().values() if number not in never)

    @cached_property
    def vocabulary_digest(self) -> str:
        """The same for two tokenizers if and only if every id is the same token to both."""
        return hashlib.sha256(json.dumps(sorted(self.vocabulary().items())).encode()).hexdigest()

    @cached_property
    def template_digest(self) -> str:
        """The same for two chat templates only if their texts are the same, and what they are handed."""
        template = self._writer.template
        given = json.dumps(template.given, sort_keys=True) if template.given else ""
        return hashlib.sha256(f"{template.source}{given}".encode()).hexdigest()

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text is by itself, without a template; a special token it spells counts as text."""
        return [len(ids) for ids in self._texts.plain(texts, split_special_tokens=True)]

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """The prompt as a server sends it: its turns and the generation prompt.

        Raises:
            PairError: the template refuses it, or it cannot be encoded.
        """
        chat = self._chat(prompt, open_answer=True)
        return self._texts.ids(chat, self._texts.whole([chat]))

    def prompt_text(self, prompt: Sequence[Message]) -> str:
        """The prompt as a server sends it, as text; special tokens that its turns spell are stand-ins.

        Raises:
            PairError: the template refuses it.
        """
        return self._chat(prompt, open_answer=True).text

    def chat_ids(self, chats: Sequence[Sequence[Message]]) -> list[list[int] | PairError]:
        """Whole chats to their last token, whatever the template writes after the last turn; or why not."""
        rendered = [_caught(self._chat, turns, open_answer=False) for turns in chats]
        whole = self._texts.whole(chat for chat in rendered if not isinstance(chat, PairError))
        return [chat if isinstance(chat, PairError) else _caught(self._texts.ids, chat, whole) for chat in rendered]

    def pair(self, pair: Pair) -> PairIds:
        """One pair; raises PairError where `pairs` returns it."""
        (outcome,) = self.pairs([pair])
        if isinstance(outcome, PairError):
            raise outcome
        return outcome

    def pairs(self, pairs: Sequence[Pair]) -> list[PairIds | PairError]:
        """Each pair in ids or why not. Many at once are faster: one call encodes them all, a shared prompt once."""
        parted = [_caught(self._parter.part, pair) for pair in pairs]
        whole = self._texts.whole(
            text for pair in parted if not isinstance(pair, PairError) for text in _texts_of(pair)
        )
        return [pair if isinstance(pair, PairError) else _caught(self._assemble, pair, whole) for pair in parted]

    def _chat(self, turns: Sequence[Message], *, open_answer: bool) -> Shielded:
        writer = self._writer.of(turns)
        return Shielded(writer.write(turns, open_answer=open_answer), writer.spelled)

    def _assemble(self, pair: PartedPair, whole: Mapping[str, list[int]]) -> PairIds:
        prompt = self._texts.ids(pair.prompt, whole)
        return PairIds(
            prompt,
            self._answer_ids(pair, pair.chosen, prompt, whole),
            self._answer_ids(pair, pair.rejected, prompt, whole),
            pair.case,
            end_appended=not (pair.chosen.ended and pair.rejected.ended),
            thought_left_out=pair.chosen.thought_left_out or pair.rejected.thought_left_out,
            turn_left_out=pair.turn_left_out,
        )

    def _answer_ids(
        self, pair: PartedPair, answer: PartedAnswer, prompt: list[int], whole: Mapping[str, list[int]]
    ) -> AnswerIds:
        """The chat's ids after the prompt's; encoded by itself where they do not begin with the prompt's.

        So it is at the borders within an answer of several turns: no token is half the assistant's.
        """
        borders = _borders(answer)
        ids = self._texts.ids(pair.through(answer), whole)
        starts = [self._texts.ids(pair.through(answer, border), whole) for border in borders[:-1]]
        if all(ids[: len(start)] == start for start in starts):
            cuts = [len(start) for start in starts]
            parts = [ids[start:end] for start, end in zip(cuts, [*cuts[1:], len(ids)], strict=True)]
        else:
            texts = [answer.text[start:end] for start, end in pairwise(borders)]
            parts = [self._texts.continued(Shielded(text, pair.prompt.spelled)) for text in texts]
        scored = [(start, end) in answer.spans for start, end in pairwise(borders)]
        if not answer.ended:
            parts.append([self._eos])
            scored.append(True)
        return AnswerIds(
            [token for part in parts for token in part],
            [own for part, own in zip(parts, scored, strict=True) for _ in part],
        )


def _borders(answer: PartedAnswer) -> list[int]:
    """Where in the answer's text what is learned begins and ends, with both ends of the text."""
    return sorted({0, len(answer.text), *(border for span in answer.spans for border in span)})


def _texts_of(pair: PartedPair) -> Iterator[Shielded]:
    """The texts of a pair to encode."""
    yield pair.prompt
    for answer in (pair.chosen, pair.rejected):
        for border in _borders(answer)[1:]:
            yield pair.through(answer, border)


def _caught(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | PairError:
    """A refusal as a value: one bad pair must not cost the others."""
    try:
        return function(*args, **kwargs)
    except PairError as refused:
        return refused
