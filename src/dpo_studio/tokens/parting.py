"""Pairs split into the prompt that a server sends and the learned part of each answer, as text.

`tokens.split` has the rule; here a pair is rendered for it, and the answer's own text is found in the rendering. Texts
alone do not tell where a turn stands: an answer may quote the question, or say "end" as `<|im_end|>` does. So turns are
marked, and the marks' places count. Marking costs a rendering more, and templates write the same around every answer:
once the words around one are known to be the template's, an answer between those very words needs no marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.tokens.pieces import TextEncoder
from dpo_studio.tokens.rendering import PairError, Places, Shielded, TemplateWriter, Writer
from dpo_studio.tokens.split import CASES, Case, Split, common_prefix, not_written, own_texts, split_chat

__all__ = ["ASSISTANT", "PartedAnswer", "PartedPair", "Parter"]

ASSISTANT = "assistant"
_MOST_KNOWN = 1000
"""Surroundings of answers to remember; a template has one or two."""


@dataclass(frozen=True, slots=True)
class PartedAnswer:
    """What follows the prompt."""

    case: Case
    prompt: int
    """Characters of the prompt, which is shorter than the served one in case 3c alone."""
    text: str
    """Up to and including the end of the last turn that is learned."""
    spans: tuple[tuple[int, int], ...]
    """The learned parts of `text`: those of the assistant."""
    ended: bool
    """Whether the template writes an end of turn."""
    thought_left_out: bool
    """Whether a thought of the answer is not in the rendering."""


@dataclass(frozen=True, slots=True)
class PartedPair:
    """A pair as text."""

    prompt: Shielded
    chosen: PartedAnswer
    rejected: PartedAnswer
    turn_left_out: bool
    """Whether text of a prompt turn is not in the prompt: a server's model does not see it either."""

    @property
    def case(self) -> Case:
        """The later of the two answers' cases."""
        return max(self.chosen.case, self.rejected.case, key=CASES.index)

    def through(self, answer: PartedAnswer, length: int | None = None) -> Shielded:
        """The prompt and so many characters of an answer, or all of them."""
        return Shielded(self.prompt.text + answer.text[:length], self.prompt.spelled)


@dataclass(frozen=True, slots=True)
class _Found:
    """A turn of the assistant's in the whole chat."""

    start: int
    """Where the thought that the template leaves out is not, its text begins."""
    end: int
    thought: str
    """The source's text before it."""


class Parter:
    """Renders pairs and splits them."""

    def __init__(self, writer: TemplateWriter, encoder: TextEncoder) -> None:
        self._writer, self._encoder = writer, encoder
        self._known: set[tuple[Case, str, str]] = set()

    def part(self, pair: Pair) -> PartedPair:
        """The pair as prompt and answers.

        Raises:
            PairError: the template refuses it, does not write an answer, or writes no prompt that both share.
        """
        answers = [_learned_turns(answer) for answer in (pair.chosen, pair.rejected)]
        writer = self._writer.of(pair.prompt, *answers)
        opened = all(answer[0].role == ASSISTANT for answer in answers)
        prompt = _Prompt(writer, pair.prompt, opened)
        chosen, rejected = (self._part_answer(prompt, answer) for answer in answers)
        if chosen.case == rejected.case == "3c":
            chosen, rejected = (
                _from(answer, min(chosen.prompt, rejected.prompt), prompt.served) for answer in (chosen, rejected)
            )
        if chosen.prompt != rejected.prompt:
            raise PairError(
                "answers with different prompts",
                "the chat template closes the thought that its generation prompt opens for one of the answers only",
                hint="give both answers a thought or none, or another template with model.chat_template",
            )
        shown = Shielded(prompt.served[: chosen.prompt], writer.spelled)
        return PartedPair(shown, chosen, rejected, prompt.leaves_a_turn_out())

    def _part_answer(self, prompt: _Prompt, answer: Sequence[Message]) -> PartedAnswer:
        turns = (*prompt.turns, *answer)
        whole = prompt.writer.write(turns, open_answer=False)
        if len(answer) == 1 and prompt.opened:
            return self._between_known_words(prompt, whole, answer[0]) or self._marked(prompt, turns, whole)
        return self._marked(prompt, turns, whole)

    def _between_known_words(self, prompt: _Prompt, whole: str, turn: Message) -> PartedAnswer | None:
        """The answer, if it is between texts that are known to be the template's."""
        text = prompt.writer.shield(turn.content).strip()
        if not self._known or not text:
            return None
        first = whole.find(text, common_prefix(whole, prompt.served))
        for at in dict.fromkeys((first, whole.rfind(text))):
            if at < 0:
                continue
            try:
                split = split_chat(prompt.served, prompt.closed, whole, at, at + len(text), lambda: None)
            except PairError:
                continue
            answer = self._answer(split, whole, _Found(at, at + len(text), ""))
            if _around(split, whole, at, at + len(text), answer) in self._known:
                return answer
        return None

    def _marked(self, prompt: _Prompt, turns: Sequence[Message], whole: str) -> PartedAnswer:
        """The answer, found by marks."""
        writer, before = prompt.writer, len(prompt.turns)
        own = [at for at in range(before, len(turns)) if turns[at].role == ASSISTANT and turns[at].learned]
        places = writer.places(turns, whole, own=[before, *own] if prompt.opened else own)
        found = [_find(writer, turns, at, whole, places, prompt) for at in own]
        prompts = [prompt if at == before and prompt.opened else _Prompt(writer, turns[:at], True) for at in own]
        splits = [_split(asked, whole, turn) for asked, turn in zip(prompts, found, strict=True)]
        if not prompt.opened:
            opening = _opening(prompt, whole)
        elif own[0] == before:
            opening = splits[0]
        else:  # a first turn of weight 0: context, but where the served prompt ends
            opening = _split(prompt, whole, _find(writer, turns, before, whole, places, prompt))
        spans = []
        for at, split, turn, after in zip(own, splits, found, [*found[1:], None], strict=True):
            limit = len(whole) if after is None else after.start
            end = self._encoder.end_of_turn(whole, turn.end, _next_turn(places, at, limit))
            if end is None and after is not None:  # a template that ends no turn but the last
                end = min(limit, common_prefix(whole, writer.write(turns[: at + 1], open_answer=False)))
            spans.append((split.start, len(whole) if end is None else end))
            ended = end is not None
        _check_own(writer, turns, own, whole, places, spans, found)
        stop = spans[-1][1]
        answer = PartedAnswer(
            opening.case,
            opening.prompt,
            whole[opening.start : stop],
            tuple((start - opening.start, end - opening.start) for start, end in spans),
            ended,
            any(_left_out(turn, whole, prompt.served) for turn in found),
        )
        if len(turns) == before + 1 and opening.case != "4" and not found[0].thought:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known.add(_around(opening, whole, found[0].start, found[0].end, answer))
        return answer

    def _answer(self, split: Split, whole: str, found: _Found) -> PartedAnswer:
        end = self._encoder.end_of_turn(whole, found.end, len(whole))
        stop = len(whole) if end is None else end
        text = whole[split.start : stop]
        return PartedAnswer(split.case, split.prompt, text, ((0, len(text)),), end is not None, False)


class _Prompt:
    """Turns before an answer, rendered on demand."""

    def __init__(self, writer: Writer, turns: Sequence[Message], opened: bool) -> None:
        """`opened`: the assistant comes next, as it does unless an answer begins with somebody else's turn."""
        self.writer, self.turns, self.opened = writer, turns, opened
        self.served = writer.write(turns, open_answer=opened)

    @cached_property
    def _closed(self) -> str | None:
        try:
            return self.writer.write(self.turns, open_answer=False)
        except PairError:  # a template that requires an answer
            return None

    def closed(self) -> str | None:
        """Without the generation prompt."""
        return self._closed

    def leaves_a_turn_out(self) -> bool:
        """Whether a turn's text is nowhere in it, neither all of it nor what follows its thought."""
        return not all(
            any(text in self.served for text, _ in own_texts(self.writer.shield(turn.content))) for turn in self.turns
        )

    def last_turn(self) -> int | None:
        """Where the last turn's own text begins."""
        last = len(self.turns) - 1
        text = self.writer.shield(self.turns[last].content).strip()
        places = self.writer.places(self.turns, self.served, own=[last], open_answer=self.opened)
        if not text or places is None or not places.ends[last]:
            found = self.served.rfind(text) if text else -1
            return None if found < 0 else found
        end = places.ends[last][-1]
        return end - len(text) if self.served.startswith(text, end - len(text)) else end


def _learned_turns(answer: Sequence[Message]) -> Sequence[Message]:
    """The answer up to the last turn that is learned: later turns do not change it."""
    own = [at for at, turn in enumerate(answer) if turn.role == ASSISTANT]
    if not own:
        raise PairError("answer without an assistant turn", "an answer has no assistant turn")
    learned = [at for at in own if answer[at].learned]
    if not learned:
        raise PairError("answer of weight 0", "every assistant turn of an answer has weight 0, so nothing is learned")
    return answer[: learned[-1] + 1]


def _from(answer: PartedAnswer, prompt: int, served: str) -> PartedAnswer:
    """The answer behind a prompt of so many characters, which is no longer than its own."""
    more = answer.prompt - prompt
    if not more:
        return answer
    (_, first), *others = answer.spans
    spans = ((0, first + more), *((start + more, end + more) for start, end in others))
    return replace(answer, prompt=prompt, text=served[prompt : answer.prompt] + answer.text, spans=spans)


def _around(split: Split, whole: str, start: int, end: int, answer: PartedAnswer) -> tuple[Case, str, str]:
    """What the template writes around an answer's text, of what is learned."""
    stop = split.start + len(answer.text)
    return split.case, whole[split.start : start].strip(), whole[end:stop].strip()


def _split(prompt: _Prompt, whole: str, found: _Found) -> Split:
    return split_chat(prompt.served, prompt.closed, whole, found.start, found.end, prompt.last_turn)


def _opening(prompt: _Prompt, whole: str) -> Split:
    """Where an answer begins that another than the assistant opens."""
    if not whole.startswith(prompt.served):
        raise PairError(
            "prompt rewritten once there is an answer",
            "the chat template writes the prompt's turns differently once another turn of a user follows",
        )
    return Split("1", len(prompt.served), len(prompt.served))


def _find(
    writer: Writer, turns: Sequence[Message], at: int, whole: str, places: Places | None, prompt: _Prompt
) -> _Found:
    """An assistant's turn in the whole chat: its last place, all of its text or what follows its thought."""
    content = writer.shield(turns[at].content)
    if places is None:
        ends: Callable[[str], Iterator[int]] = lambda text: _last(whole, text, prompt)  # noqa: E731
    else:
        ends = lambda _: iter(places.ends[at][-1:])  # noqa: E731
    for text, thought in own_texts(content):
        for end in ends(text):
            if whole.startswith(text, end - len(text)):
                return _Found(end - len(text), end, thought)
    raise not_written()


def _last(whole: str, text: str, prompt: _Prompt) -> Iterator[int]:
    """The last position of the text; that of an empty text is where the answer begins."""
    if text:
        found = whole.rfind(text)
        if found >= 0:
            yield found + len(text)
    elif whole.startswith(prompt.served):
        yield len(prompt.served)


def _next_turn(places: Places | None, at: int, limit: int) -> int:
    """Where the text of the next turn is, if it is known: the end of this one stands before it."""
    if places is None or at + 1 >= len(places.ends):
        return limit
    return min([limit, *(end for end in places.ends[at + 1] if end > max(places.ends[at], default=0))])


def _left_out(found: _Found, whole: str, served: str) -> bool:
    return bool(found.thought) and found.thought not in whole[common_prefix(whole, served) : found.start]


def _check_own(
    writer: Writer,
    turns: Sequence[Message],
    own: Sequence[int],
    whole: str,
    places: Places | None,
    spans: Sequence[tuple[int, int]],
    found: Sequence[_Found],
) -> None:
    """Nothing that is learned is the text of another turn.

    Raises:
        PairError: it is; where turns cannot be marked, the template's words around an answer are another turn's text.
    """
    others = [turn for turn in range(len(turns)) if turn not in own]
    for (start, end), its in zip(spans, found, strict=True):
        if places is not None and places.whole:
            foreign = any(
                any(start < place <= end for place in places.ends[turn])
                or any(start <= place <= end for place in places.middles[turn])
                for turn in others
            )
        else:
            texts = [writer.shield(turns[turn].content).strip() for turn in others]
            foreign = any(text and (text in whole[start : its.start] or text in whole[its.end : end]) for text in texts)
        if foreign:
            raise PairError(
                "text of the prompt in the answer",
                "the chat template writes text of another turn where the answer is learned",
                hint="model.chat_template: FILE with a template that writes every turn in its own place",
            )
