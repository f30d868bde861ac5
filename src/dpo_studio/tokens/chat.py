"""Chats as token ids, in the model's own chat template, and which of the ids are the answer.

The law: the ids are a prefix of the tokenizer's own `apply_chat_template`, up to the end of the answer's turn. One
thing is done differently on purpose: text that spells a special token stays text. `apply_chat_template` turns an
`<|im_end|>` inside an answer into the control token, and `split_special_tokens=True` on the rendered chat would break
the template's own. So a chat that spells one is rendered with stand-ins, cut at the special tokens that remain (the
template's), and encoded piece by piece.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from jinja2 import TemplateError

from dpo_studio.errors import DataError, ModelError
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.tokens.template import LONGEST_CHAT, ChatTemplate, TemplateLimit

if TYPE_CHECKING:
    from transformers import AddedToken, PreTrainedTokenizerBase

__all__ = ["AnswerIds", "ChatEncoder", "PairError", "PairIds"]

P = ParamSpec("P")
T = TypeVar("T")

ASSISTANT = "assistant"
_NO_TEMPLATE_HINT = "model.chat_template: FILE names a Jinja file to use"
_TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a template's own code can raise: it is a program, run on somebody's data."""
_PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Characters that no template trims, compares or splits on: stand-ins are those the chat itself does not use."""


class PairError(DataError):
    """A pair that has no token ids to learn from; `kind` names the reason for counting, the message says it in full."""

    def __init__(self, kind: str, message: str | None = None, *, hint: str | None = None) -> None:
        super().__init__(message or kind, hint=hint)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class AnswerIds:
    """What follows the prompt, the end of turn included."""

    ids: list[int]
    scored: list[bool]
    """Which of the ids the assistant says itself: all, unless the answer has several turns."""


@dataclass(frozen=True, slots=True)
class PairIds:
    """A pair in token ids, whatever its length."""

    prompt: list[int]
    chosen: AnswerIds
    rejected: AnswerIds
    re_rendered: bool
    """The prompt's rendering is no prefix of the whole chat's, so the answers start where they part."""
    end_appended: bool
    """The template writes no end of turn, so EOS was appended."""


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A chat as the template writes it, and what its stand-ins stand for."""

    text: str
    spelled: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class _RenderedAnswer:
    """The whole chat and, for each assistant turn of an answer of several: the chat up to it, and through it."""

    whole: _Rendered
    turns: Sequence[tuple[_Rendered, _Rendered]] = ()


@dataclass(frozen=True, slots=True)
class _RenderedPair:
    prompt: _Rendered
    chosen: _RenderedAnswer
    rejected: _RenderedAnswer

    def __iter__(self) -> Iterator[_Rendered]:
        yield self.prompt
        for answer in (self.chosen, self.rejected):
            yield answer.whole
            for turn in answer.turns:
                yield from turn


class ChatEncoder:
    """A tokenizer and its chat template, as a function from chats to ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, eos_ids: Collection[int]) -> None:
        """`eos_ids`: any of `generation_config.eos_token_id`; the tokenizer's own EOS always counts.

        Raises:
            ModelError: no chat template, one that cannot render a question and an answer, nothing that ends a turn,
                or a tokenizer whose pieces do not add up to the whole.
        """
        if not tokenizer.chat_template:
            raise ModelError("the tokenizer has no chat template", hint=_NO_TEMPLATE_HINT)
        try:
            source = tokenizer.get_chat_template()
        except ValueError:  # several, by name, and none of them `default`
            raise ModelError(
                "the tokenizer has several chat templates, none the default", hint=_NO_TEMPLATE_HINT
            ) from None
        self._template = ChatTemplate(source, tokenizer.special_tokens_map)
        own_eos = tokenizer.eos_token_id
        self.eos_ids = frozenset(eos_ids) | ({own_eos} if own_eos is not None else set())
        if not self.eos_ids:
            raise ModelError("the tokenizer has no EOS token, so nothing could end an answer")
        self._eos: int = own_eos if own_eos is not None else min(self.eos_ids)
        self._tokenizer = tokenizer
        added: dict[int, AddedToken] = tokenizer.added_tokens_decoder
        self._special = _special_tokens(added)
        self._spelled_pattern = _any_of(re.escape(text) for text in self._special)
        self._written_pattern = _any_of(_written(added[number]) for number in self._special.values())
        self._never_from_text = frozenset(self._special.values()) - {tokenizer.unk_token_id}
        self._is_blank: dict[int, bool] = {}
        self._always_in_pieces = _normalizes_special_tokens(tokenizer)
        self._anchor = self._find_anchor()

    @property
    def pad_id(self) -> int:
        """What fills up rows of unequal length; never looked at."""
        return int(self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._eos)

    def spelled(self, text: str) -> str | None:
        """The first special token that the text spells, if it spells one."""
        found = self._spelled_pattern.search(text)
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
    def vocabulary_digest(self) -> str:
        """The same for two tokenizers if and only if every id is the same token to both."""
        return hashlib.sha256(json.dumps(sorted(self.vocabulary().items())).encode()).hexdigest()

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text is by itself, without a template; a special token it spells counts as text."""
        return [len(ids) for ids in self._encode(texts, split_special_tokens=True)]

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """The prompt's turns and the header of the answer to come.

        Raises:
            PairError: the template refuses it, or it cannot be encoded.
        """
        rendered = self._render(prompt, open_answer=True)
        return self._ids(rendered, self._encode_whole([rendered]))

    def chat_ids(self, chats: Sequence[Sequence[Message]]) -> list[list[int] | PairError]:
        """Whole chats to their last token, whatever the template writes after the last turn; or why not."""
        rendered = [_caught(self._render, turns, open_answer=False) for turns in chats]
        whole = self._encode_whole([chat for chat in rendered if not isinstance(chat, PairError)])
        return [chat if isinstance(chat, PairError) else _caught(self._ids, chat, whole) for chat in rendered]

    def pair(self, pair: Pair) -> PairIds:
        """One pair; raises PairError where `pairs` returns it."""
        (outcome,) = self.pairs([pair])
        if isinstance(outcome, PairError):
            raise outcome
        return outcome

    def pairs(self, pairs: Sequence[Pair]) -> list[PairIds | PairError]:
        """Each pair in ids or why not. Many at once are faster: one call encodes them all, a shared prompt once."""
        rendered = [_caught(self._render_pair, pair) for pair in pairs]
        texts = [chat for pair in rendered if not isinstance(pair, PairError) for chat in pair]
        whole = self._encode_whole(texts)
        return [pair if isinstance(pair, PairError) else _caught(self._assemble, pair, whole) for pair in rendered]

    # Messages to text

    def _render(self, turns: Sequence[Message], *, open_answer: bool) -> _Rendered:
        if not turns:
            raise PairError("prompt without turns", "the prompt has no turns")
        if (length := sum(len(turn.content) for turn in turns)) > LONGEST_CHAT:
            raise PairError("longer than any model reads", f"it has {length:,} characters, over {LONGEST_CHAT:,}")
        stand_ins = self._stand_ins(turns)
        messages = [
            {"role": self._shield(turn.role, stand_ins), "content": self._shield(turn.content, stand_ins)}
            for turn in turns
        ]
        try:
            text = self._template.render(messages, add_generation_prompt=open_answer)
        except TemplateLimit as error:  # what an honest one needs for so long a chat is far below: no pair will do
            raise ModelError(f"the chat template is stopped: {error}", hint=_NO_TEMPLATE_HINT) from None
        except _TEMPLATE_ERRORS as error:
            raise PairError("refused by the chat template", f"the chat template refuses it: {error}") from None
        if not _is_unicode(text):
            raise PairError("text is not Unicode", "the text holds half of a surrogate pair, which is no character")
        return _Rendered(text, {ord(stand_in): special for special, stand_in in stand_ins.items()})

    def _stand_ins(self, turns: Sequence[Message]) -> dict[str, str]:
        """For each special token that the text spells, a character that occurs nowhere in the text."""
        texts = [text for turn in turns for text in (turn.role, turn.content)]
        spelled = dict.fromkeys(match.group() for text in texts for match in self._spelled_pattern.finditer(text))
        if not spelled:
            return {}
        taken = set().union(*texts)
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        return dict(zip(spelled, free, strict=False))

    def _shield(self, text: str, stand_ins: Mapping[str, str]) -> str:
        if not stand_ins:
            return text
        return self._spelled_pattern.sub(lambda match: stand_ins[match.group()], text)

    def _render_pair(self, pair: Pair) -> _RenderedPair:
        return _RenderedPair(
            self._render(pair.prompt, open_answer=True),
            self._render_answer(pair.prompt, pair.chosen),
            self._render_answer(pair.prompt, pair.rejected),
        )

    def _render_answer(self, prompt: Sequence[Message], answer: Sequence[Message]) -> _RenderedAnswer:
        """Turns after the assistant's last one are left out: nothing in them is learned, nor changes what is."""
        own = [index for index, turn in enumerate(answer) if turn.role == ASSISTANT]
        if not own:
            raise PairError("answer without an assistant turn", "an answer has no assistant turn")
        turns = (*prompt, *answer[: own[-1] + 1])
        whole = self._render(turns, open_answer=False)
        if len(turns) == len(prompt) + 1:
            return _RenderedAnswer(whole)
        starts = [len(prompt) + index for index in own]
        return _RenderedAnswer(whole, [self._around(turns, start) for start in starts])

    def _around(self, turns: Sequence[Message], index: int) -> tuple[_Rendered, _Rendered]:
        """The chat up to the assistant turn at `index`, its header written, and the chat through it."""
        return self._render(turns[:index], open_answer=True), self._render(turns[: index + 1], open_answer=False)

    # Text to ids

    def _encode(self, texts: Sequence[str], *, split_special_tokens: bool) -> list[list[int]]:
        """As `apply_chat_template` encodes: nothing added, so a template that writes BOS gets one BOS."""
        if not texts:
            return []
        encoded: Any = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # or it warns about lengths, which are ours to judge
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _encode_whole(self, chats: Iterable[_Rendered]) -> dict[str, list[int]]:
        """Ids of the chats that need no cutting, in one call."""
        texts = list(dict.fromkeys(chat.text for chat in chats if not self._needs_pieces(chat)))
        return dict(zip(texts, self._encode(texts, split_special_tokens=False), strict=True))

    def _needs_pieces(self, chat: _Rendered) -> bool:
        return bool(chat.spelled) or self._always_in_pieces

    def _ids(self, chat: _Rendered, whole: Mapping[str, list[int]]) -> list[int]:
        return self._in_pieces(chat, self._anchor) if self._needs_pieces(chat) else whole[chat.text]

    def _in_pieces(self, chat: _Rendered, anchor: str) -> list[int]:
        """The template's special tokens by id; the text between them as text, whatever it spells."""
        specials: list[int] = []
        texts: list[str] = []
        position = 0
        for match in self._written_pattern.finditer(chat.text):
            texts.append(chat.text[position : match.start()])
            specials.append(self._special[match[match.lastindex or 0]])
            position = match.end()
        texts.append(chat.text[position:])
        pieces = self._encode_pieces([text.translate(chat.spelled) for text in texts], anchor)
        ids = pieces[0]
        for special, piece in zip(specials, pieces[1:], strict=True):
            ids += [special, *piece]
        return ids

    def _encode_pieces(self, texts: Sequence[str], anchor: str) -> list[list[int]]:
        """Each text as it would be encoded where it stands; only the first stands at the beginning."""
        anchors = ["", *[anchor] * (len(texts) - 1)]
        (anchor_ids,) = self._encode([anchor], split_special_tokens=True) if anchor else ([],)
        filled = [before + text if text else "" for before, text in zip(anchors, texts, strict=True)]
        pieces = self._encode(filled, split_special_tokens=True)
        for index, (before, text) in enumerate(zip(anchors, texts, strict=True)):
            if before and text:
                pieces[index] = _after(anchor_ids, pieces[index])
            elif not text:
                pieces[index] = []
            if not self._never_from_text.isdisjoint(pieces[index]):
                raise PairError(
                    "special token that cannot be text",
                    "it spells a special token, which this tokenizer cannot write as text",
                )
        return pieces

    def _find_anchor(self) -> str:
        """What a piece must follow so that pieces add up to the whole: nothing or, in some SentencePiece, a newline.

        Those put a space before the first word of a string, and a piece from the middle has none.
        """
        question = Message("user", " Wie  hoch ist der Berg?\n\n- 3.776 m\n")
        answer = Message(ASSISTANT, "Fuji 富士山: 3,776 m. 🙂\n")
        try:
            rendered = [
                self._render([question], open_answer=True),
                self._render([question, answer], open_answer=False),
            ]
        except PairError as error:
            raise ModelError(f"on a question and an answer: {error.message}", hint=_NO_TEMPLATE_HINT) from None
        whole = self._encode([chat.text for chat in rendered], split_special_tokens=False)
        for anchor in ("", "\n"):
            pieces = [_caught(self._in_pieces, chat, anchor) for chat in rendered]
            if pieces == whole:
                return anchor
        raise ModelError(
            "the tokenizer encodes a chat and its parts differently: text that spells a special token would be one",
            hint="special tokens that are `normalized` in tokenizer.json are a usual cause",
        )

    # Ids to answers

    def _assemble(self, pair: _RenderedPair, whole: Mapping[str, list[int]]) -> PairIds:
        prompt = self._ids(pair.prompt, whole)
        chats = [self._ids(answer.whole, whole) for answer in (pair.chosen, pair.rejected)]
        shared = min(_shared(prompt, chat) for chat in chats)
        if not shared:
            raise PairError(
                "prompt and answers share no beginning", "prompt and answers are rendered without a common beginning"
            )
        closed = [self._close(chat, shared) for chat in chats]
        chosen, rejected = (
            AnswerIds(ids[shared:], self._scored(answer, ids, whole)[shared:])
            for answer, (ids, _) in zip((pair.chosen, pair.rejected), closed, strict=True)
        )
        return PairIds(
            prompt[:shared],
            chosen,
            rejected,
            re_rendered=shared < len(prompt),
            end_appended=any(appended for _, appended in closed),
        )

    def _close(self, ids: list[int], start: int) -> tuple[list[int], bool]:
        """`ids` up to and including the end of turn, and whether it had to be appended.

        The end of turn is the first of the ends that stand at the end with nothing but white space between them.
        """
        end = None
        for position in range(len(ids) - 1, start - 1, -1):
            if ids[position] in self.eos_ids:
                end = position + 1
            elif not self._blank(ids[position]):
                break
        return ([*ids, self._eos], True) if end is None else (ids[:end], False)

    def _blank(self, token: int) -> bool:
        if token not in self._is_blank:
            self._is_blank[token] = not str(self._tokenizer.decode([token])).strip()
        return self._is_blank[token]

    def _scored(self, answer: _RenderedAnswer, ids: list[int], whole: Mapping[str, list[int]]) -> list[bool]:
        """Which of the chat's ids are the assistant's: from each of its headers to the end of that turn."""
        if not answer.turns:
            return [True] * len(ids)
        scored = [False] * len(ids)
        starts = [_shared(self._ids(opened, whole), ids) for opened, _ in answer.turns]
        for (start, limit), (_, through) in zip(pairwise([*starts, len(ids)]), answer.turns, strict=True):
            end = next((at + 1 for at in range(start, limit) if ids[at] in self.eos_ids), None)
            if end is None:  # a template that ends no turn but the last: the turn ends where the next header begins
                end = min(limit, _shared(self._ids(through, whole), ids))
            scored[start:end] = [True] * (end - start)
        return scored


def _caught(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | PairError:
    """A refusal as a value: one bad pair must not cost the others."""
    try:
        return function(*args, **kwargs)
    except PairError as refused:
        return refused


def _special_tokens(added: Mapping[int, AddedToken]) -> dict[str, int]:
    """Special tokens by their text, the longest first, as the tokenizer itself prefers them.

    Added tokens that are not special (Qwen3's `<think>`) are words like others: models say them, answers spell them.
    """
    special = {str(token.content): number for number, token in added.items() if token.special}
    return {text: special[text] for text in sorted(special, key=len, reverse=True)}


def _written(token: AddedToken) -> str:
    """The pattern by which the tokenizer finds a special token: some take the white space around them along."""
    before, after = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    start, end = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    return f"{before}{start}({re.escape(token.content)}){end}{after}"


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(patterns) or r"(?!)")


def _normalizes_special_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `<S>` could be found as `<s>`: then no search tells which text spells a special token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is None:
        return False
    return any(token.special and token.normalized for token in tokenizer.added_tokens_decoder.values())


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _after(anchor: list[int], ids: list[int]) -> list[int]:
    if ids[: len(anchor)] != anchor:
        raise PairError(
            "text that joins what precedes it",
            "text after a special token cannot be encoded apart from what precedes it",
        )
    return ids[len(anchor) :]


def _shared(ids: list[int], others: list[int]) -> int:
    """How many ids the two begin with in common."""
    if others[: len(ids)] == ids:
        return len(ids)
    parted = (at for at, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other)
    return next(parted, min(len(ids), len(others)))
