"""Templates composed of habits: the prompt is what a server sends, and nothing but the answer is scored.

The oracle renders with jinja2 alone and knows where the answer begins from how it composed the template.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jinja2 import Environment

from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.tokens.chat import ChatEncoder, PairError
from tests.tiny_tokenizers import tiny_tokenizer

END = "<|im_end|>"
CLOSED = "<think>\n\n</think>\n\n"
OPEN = "<think>\n"
SYSTEMS = {
    "own turn": "",
    "first user": "{%- set before = system if loop.index0 == first else '' -%}",
    "last user": "{%- set before = system if loop.last else '' -%}",
}


@dataclass(frozen=True)
class Habits:
    """What a template does; `source` is it."""

    opening: str = "<|im_start|>{role}\n"
    after_end: str = "\n"
    trims: bool = False
    strips_history: bool = False
    system: str = "own turn"
    counts: bool = False
    generation: str = ""
    before_answer: str = ""
    header_after_end: bool = False
    source: str = field(init=False)

    def __post_init__(self) -> None:
        opening = "'" + self.opening.replace("\n", "\\n").replace("{role}", "' ~ m.role ~ '") + "'"
        header = self.opening.replace("{role}", "assistant").replace("\n", "\\n")
        generation = self.generation.replace("\n", "\\n")
        text = "said | trim" if self.trims else "said"
        after = self.after_end.replace("\n", "\\n")
        stripped = (
            "{%- if m.role == 'assistant' and not loop.last -%}"
            "{%- set said = said.split('</think>')[-1] | trim -%}{%- endif -%}"
        )
        source = (
            "{%- set system = messages[0].content ~ '\\n\\n' if messages[0].role == 'system' else '' -%}"
            "{%- set first = 1 if system else 0 -%}"
            + ("{{ messages | length ~ ' turns\\n' }}" if self.counts else "")
            + "{%- for m in messages -%}{%- set said = m.content -%}{%- set before = '' -%}"
            + (stripped if self.strips_history else "")
            + SYSTEMS[self.system]
            + "{%- if m.role == 'system' -%}"
            + (f"{{{{ {opening} ~ said ~ '{END}{after}' }}}}" if self.system == "own turn" else "")
            + "{%- elif m.role == 'assistant' -%}"
            + f"{{{{ {opening} ~ '{self.before_answer}' ~ {text} ~ '{END}{after}' }}}}"
            + "{%- else -%}"
            + f"{{{{ {opening} ~ before ~ ({text}) ~ '{END}{after}' }}}}"
            + "{%- endif -%}{%- endfor -%}"
            + (
                f"{{{{- '{header}' -}}}}"
                if self.header_after_end
                else f"{{%- if add_generation_prompt -%}}{{{{ '{header}{generation}' }}}}{{%- endif -%}}"
            )
        )
        object.__setattr__(self, "source", source)

    def moves(self, prompt: tuple[Message, ...]) -> bool:
        """Whether a turn of the prompt reads otherwise once there is an answer."""
        return self.counts or (self.system == "last user" and prompt[0].role == "system")

    def said(self, text: str) -> str:
        return (text.strip() if self.trims else text) + END


habits = st.builds(
    Habits,
    opening=st.sampled_from(["<|im_start|>{role}\n", "[{role}] ", "<|im_start|>{role}\n\n"]),
    after_end=st.sampled_from(["", "\n"]),
    trims=st.booleans(),
    strips_history=st.booleans(),
    system=st.sampled_from(sorted(SYSTEMS)),
    counts=st.booleans(),
    generation=st.sampled_from(["", "", CLOSED, OPEN]),
    before_answer=st.sampled_from(["", "", "</think>"]),
    header_after_end=st.booleans(),
)
WORDS = ["end", "im", "assistant", "user", "turns", "a", "?", "<", "[", "|>", " ", "\n", "think", END, "<|im_start|>"]
text = st.lists(st.sampled_from(WORDS) | st.text("aé b\n", max_size=3), min_size=1, max_size=5).map("".join)
text = text.filter(lambda text: bool(text.strip()))


@st.composite
def prompts(draw: st.DrawFn) -> tuple[Message, ...]:
    turns = [Message("user", draw(text))]
    if draw(st.booleans()):
        thought = draw(st.sampled_from(["", "<think>\nhm\n</think>\n\n"]))
        turns = [Message("user", draw(text)), Message("assistant", thought + draw(text)), *turns]
    if draw(st.booleans()):
        turns = [Message("system", draw(text)), *turns]
    return tuple(turns)


@lru_cache(maxsize=64)
def encoder_of(source: str) -> tuple[ChatEncoder, Any]:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = source
    return ChatEncoder(tokenizer, eos_ids=[]), tokenizer


def rendered(source: str, turns: tuple[Message, ...], *, open_answer: bool) -> str:
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)  # noqa: S701 - no page
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    return template.render(messages=messages, add_generation_prompt=open_answer)


@settings(max_examples=60, deadline=None, database=None)
@given(its=habits, prompt=prompts(), chosen=text, rejected=text)
def test_the_prompt_is_the_served_one_and_the_answer_alone_is_scored(
    its: Habits, prompt: tuple[Message, ...], chosen: str, rejected: str
) -> None:
    assume(not (its.header_after_end and (its.generation or its.before_answer)))
    assume(not (its.before_answer and its.generation != OPEN))
    encoder, tokenizer = encoder_of(its.source)
    one = Pair(prompt, (Message("assistant", chosen),), (Message("assistant", rejected),))
    served = rendered(its.source, prompt, open_answer=True)
    assert tokenizer.decode(encoder.prompt_ids(prompt)) == served
    if its.moves(prompt) and its.generation:
        with pytest.raises(PairError, match="differently once an answer follows"):
            encoder.pair(one)
        return
    ours = encoder.pair(one)
    if its.generation == OPEN and not its.before_answer:
        assert ours.case == "3c"
        served = served.removesuffix(OPEN)
    else:
        expected = {"": "1", CLOSED: "3a", OPEN: "3b"}[its.generation]
        assert ours.case == ("4" if its.moves(prompt) else expected)
    assert tokenizer.decode(ours.prompt) == served
    end = tokenizer.eos_token_id
    for answer, said in ((ours.chosen, chosen), (ours.rejected, rejected)):
        if its.generation == CLOSED:
            said = said.lstrip()  # there the answer begins with its own text, not with the space before it
        assert tokenizer.decode(answer.ids) == its.before_answer + its.said(said)
        assert answer.ids.count(end) == 1 and answer.ids[-1] == end
        assert all(answer.scored)


@settings(  # some seeds draw many chats that a template refuses
    max_examples=30, deadline=None, database=None, suppress_health_check=[HealthCheck.filter_too_much]
)
@given(
    its=habits, prompt=prompts(), first=text, between=text, second=text, weights=st.tuples(st.booleans(), st.booleans())
)
def test_of_several_turns_what_the_assistant_says_is_scored(
    its: Habits, prompt: tuple[Message, ...], first: str, between: str, second: str, weights: tuple[bool, bool]
) -> None:
    """The same of two turns with a user's between them; a turn of weight 0 is context."""
    assume(not its.header_after_end and not its.generation and not its.before_answer)
    encoder, tokenizer = encoder_of(its.source)
    turns = (
        Message("assistant", first, weights[0]),
        Message("user", between),
        Message("assistant", second, weights[1]),
    )
    one = Pair(prompt, turns, (Message("assistant", "No."),))
    if weights == (False, False):
        with pytest.raises(PairError, match="weight 0"):
            encoder.pair(one)
        return
    ours = encoder.pair(one)
    assert tokenizer.decode(ours.prompt) == rendered(its.source, prompt, open_answer=True)
    scored = [token for token, own in zip(ours.chosen.ids, ours.chosen.scored, strict=True) if own]
    its_first = its.said(first.strip()) if its.strips_history and weights[1] else its.said(first)
    expected = (its_first if weights[0] else "") + (its.said(second) if weights[1] else "")
    assert tokenizer.decode(scored) == expected
