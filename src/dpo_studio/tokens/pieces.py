"""Text as token ids, special tokens only where the template wrote them.

`apply_chat_template` turns an `<|im_end|>` inside an answer into the control token, and `split_special_tokens=True` on
the rendered chat would break the template's own. So a chat that spells one is cut at the special tokens that remain
behind its stand-ins, the template's, and encoded piece by piece.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpo_studio.errors import ModelError
from dpo_studio.tokens.rendering import PairError, Shielded

if TYPE_CHECKING:
    from transformers import AddedToken, PreTrainedTokenizerBase

__all__ = ["TextEncoder"]


class TextEncoder:
    """A tokenizer without its template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        added: dict[int, AddedToken] = tokenizer.added_tokens_decoder
        self.special = _special_tokens(added)
        """Special tokens by their text, the longest first."""
        self._written_pattern = _any_of(_written(added[number]) for number in self.special.values())
        self._end_pattern = _any_of(_written(added[number]) for number in sorted(eos_ids) if number in added)
        self._never_from_text = frozenset(self.special.values()) - {tokenizer.unk_token_id}
        self._always_in_pieces = _normalizes_special_tokens(tokenizer)
        self._anchor = ""

    def end_of_turn(self, text: str, start: int, limit: int) -> int | None:
        """Where the first end of turn from `start` on is over, if it is before `limit`."""
        found = self._end_pattern.search(text, start, limit)
        return None if found is None else found.end()

    def plain(self, texts: Sequence[str], *, split_special_tokens: bool) -> list[list[int]]:
        """As `apply_chat_template` encodes: nothing added, so a template that writes BOS gets one BOS."""
        if not texts:
            return []
        encoded: Any = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # or it warns about lengths, which are checked elsewhere
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def whole(self, chats: Iterable[Shielded]) -> dict[str, list[int]]:
        """Ids of the chats that need no cutting, in one call."""
        texts = list(dict.fromkeys(chat.text for chat in chats if not self._needs_pieces(chat)))
        return dict(zip(texts, self.plain(texts, split_special_tokens=False), strict=True))

    def _needs_pieces(self, chat: Shielded) -> bool:
        return bool(chat.spelled) or self._always_in_pieces

    def ids(self, chat: Shielded, whole: Mapping[str, list[int]]) -> list[int]:
        """Ids of a chat, `whole` being those that `whole` made of it and others.

        Raises:
            PairError: it spells what this tokenizer cannot write as text.
        """
        return self._in_pieces(chat, self._anchor) if self._needs_pieces(chat) else whole[chat.text]

    def continued(self, chat: Shielded) -> list[int]:
        """Ids of what follows another text, encoded by itself."""
        return self._in_pieces(chat, self._anchor, at_beginning=False)

    def _in_pieces(self, chat: Shielded, anchor: str, *, at_beginning: bool = True) -> list[int]:
        """The template's special tokens by id; the text between them as text, whatever it spells."""
        specials: list[int] = []
        texts: list[str] = []
        position = 0
        for match in self._written_pattern.finditer(chat.text):
            texts.append(chat.text[position : match.start()])
            specials.append(self.special[match[match.lastindex or 0]])
            position = match.end()
        texts.append(chat.text[position:])
        anchors = ["" if at_beginning else anchor, *[anchor] * len(specials)]
        pieces = self._encode_pieces([text.translate(chat.spelled) for text in texts], anchors)
        ids = pieces[0]
        for special, piece in zip(specials, pieces[1:], strict=True):
            ids += [special, *piece]
        return ids

    def _encode_pieces(self, texts: Sequence[str], anchors: Sequence[str]) -> list[list[int]]:
        """Each text encoded as it would be in its place: after its anchor, if it has one."""
        anchor = anchors[-1]
        (anchor_ids,) = self.plain([anchor], split_special_tokens=True) if anchor else ([],)
        filled = [before + text if text else "" for before, text in zip(anchors, texts, strict=True)]
        pieces = self.plain(filled, split_special_tokens=True)
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

    def find_anchor(self, chats: Sequence[str]) -> None:
        """Find what a piece must follow so that pieces add up to the whole: nothing or, in SentencePiece, a newline.

        Some of those put a space before the first word of a string, and a piece from the middle has none.

        Raises:
            ModelError: neither works on these chats, which spell no special token.
        """
        whole = self.plain(chats, split_special_tokens=False)
        for anchor in ("", "\n"):
            try:
                pieces = [self._in_pieces(Shielded(chat, {}), anchor) for chat in chats]
            except PairError:
                continue
            if pieces == whole:
                self._anchor = anchor
                return
        raise ModelError(
            "the tokenizer encodes a chat and its parts differently: text that spells a special token would be one",
            hint="special tokens that are `normalized` in tokenizer.json are a usual cause",
        )


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


def _after(anchor: list[int], ids: list[int]) -> list[int]:
    if ids[: len(anchor)] != anchor:
        raise PairError(
            "text that joins what precedes it",
            "text after a special token cannot be encoded apart from what precedes it",
        )
    return ids[len(anchor) :]
