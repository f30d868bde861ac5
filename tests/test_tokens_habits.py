# ruff: noqa: E501 - a template stands on one line, however long
"""Habits of chat templates in odd company: what is scored is what the template writes for the answer, and no more.

The oracle is jinja2 alone. It knows where an answer stands from a rendering with a word in its place that occurs
nowhere else, and where it ends from the template's own end of turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from jinja2 import Environment, TemplateError
from jinja2.ext import loopcontrols

from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.tokens.chat import ChatEncoder, PairError
from tests.tiny_tokenizers import tiny_tokenizer

END, BOS = "<|im_end|>", "<|endoftext|>"
WORD = "Zqxw"
TURN = "{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}"
GENERATION = "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n@@' }}{%- endif -%}"
SYSTEM = "{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}"
LAST_ASKED = "{%- set ns = namespace(asked=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}{%- endfor -%}"
CUT = "{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c and WHEN %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"


@dataclass(frozen=True)
class Habit:
    """A template; how it changes an answer; and the case that it makes, with what it then writes before the answer."""

    source: str
    changed: Callable[[str], str] = str
    case: str = "1"
    before: str = ""
    opens: str = ""
    """What its generation prompt opens and no answer closes."""


def habit(turn: str = TURN, *, first: str = "", last: str = GENERATION.replace("@@", ""), **more: object) -> Habit:
    return Habit(first + "{%- for m in messages -%}" + turn + "{%- endfor -%}" + last, **more)  # type: ignore[arg-type]


def opened(text: str) -> str:
    return GENERATION.replace("@@", text)


HABITS = {
    "trims the end": habit(TURN.replace("m.content", "m.content.rstrip()"), changed=str.rstrip),
    "trims answers in front": habit(
        TURN.replace("m.content", "(m.content.lstrip() if m.role == 'assistant' else m.content)"), changed=str.lstrip
    ),
    "a space before answers": habit(TURN.replace("m.content", "(' ' if m.role == 'assistant') ~ m.content")),
    "bos in the first turn": habit(
        "{% set said = '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>' %}{% if loop.index0 == 0 %}{% set said = bos_token + said %}{% endif %}{{ said }}"
    ),
    "system in the last user turn": habit(
        "{%- if m.role != 'system' -%}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ (system ~ '\\n' if loop.index0 == ns.asked and system) ~ m.content ~ '<|im_end|>\\n' }}{%- endif -%}",
        first=SYSTEM + LAST_ASKED,
    ),
    "system in a user turn that is last": habit(
        "{%- if m.role != 'system' -%}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ (system ~ '\\n' if loop.last and m.role == 'user' and system) ~ m.content ~ '<|im_end|>\\n' }}{%- endif -%}",
        first=SYSTEM,
        case="4",
    ),
    "no system turn": habit("{%- if m.role != 'system' -%}" + TURN + "{%- endif -%}"),
    "turns in order or not at all": habit(
        "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('order') }}{%- endif -%}" + TURN
    ),
    "a date by default": habit(
        TURN,
        first="{%- if not date_string is defined -%}{%- set date_string = '26 Jul 2024' -%}{%- endif -%}{{ '<|im_start|>system\\nDate: ' ~ date_string ~ '<|im_end|>\\n' }}",
    ),
    "no generation prompt": habit(
        "{{ ('[INST] ' ~ m.content ~ ' [/INST]') if m.role == 'user' else (' ' ~ m.content ~ '<|im_end|>') }}", last=""
    ),
    "headers after ends": habit(
        "{{ m.content ~ '<|im_end|>\\n<|im_start|>' ~ ('user' if m.role == 'assistant' else 'assistant') ~ '\\n' }}",
        first="{{ '<|im_start|>user\\n' }}",
        last="",
    ),
    "the next header, asked for or not": habit(TURN, last="{{ '<|im_start|>assistant\\n' }}"),
    "a newline before headers": habit(
        TURN.replace("\\n' }}", "' ~ ('' if loop.last else '\\n') }}"), last=opened("").replace("{{ '", "{{ '\\n")
    ),
    "opens a thought": habit(last=opened("<think>\\n"), case="3c", opens="<think>\n"),
    "has thought": habit(last=opened("<think>\\n\\n</think>\\n\\n"), case="3a", changed=str.lstrip),
    "has thought, before the last answer too": habit(
        TURN.replace("m.content", "('<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' and loop.last) ~ m.content"),
        last=opened("<think>\\n\\n</think>\\n\\n"),
    ),
    "closes its thought": habit(
        TURN.replace("m.content", "('</think>\\n' if m.role == 'assistant') ~ m.content|trim"),
        last=opened("<think>"),
        case="3b",
        before="</think>\n",
        changed=str.strip,
    ),
    "cuts thoughts before the last turn": habit(CUT.replace("WHEN", "not loop.last") + TURN.replace("m.content", "c")),
    "cuts thoughts before the last question": habit(
        CUT.replace("WHEN", "loop.index0 < ns.asked") + TURN.replace("m.content", "c"), first=LAST_ASKED
    ),
    "cuts thoughts while a user waits": habit(
        CUT.replace("WHEN", "messages[-1].role == 'user'") + TURN.replace("m.content", "c"), case="4"
    ),
    "macros with a caller": habit(
        "{%- call wrap(m.role) -%}{{ m.content }}{%- endcall -%}",
        first="{%- macro wrap(role) -%}{{ '<|im_start|>' ~ role ~ '\\n' ~ caller() ~ '<|im_end|>' }}{%- endmacro -%}",
    ),
    "counts the turns": habit(first="{{ messages | length ~ ' turns\\n' }}", case="4"),
    "numbers the turns": habit(
        "{{ loop.index ~ '. ' }}" + TURN, last=opened("").replace("{{ '", "{{ (messages | length + 1) ~ '. ")
    ),
    "marks the turn that is last": habit("{{ '>>' if loop.last and m.role == 'user' }}" + TURN, case="4"),
    "ends with two ends": habit(TURN.replace("<|im_end|>\\n", "<|im_end|><|endoftext|>\\n")),
    "merges turns of one role": habit(
        "{% if m.role != ns.before %}{{ ('<|im_end|>\\n' if ns.before) ~ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content }}{% else %}{{ '\\n' ~ m.content }}{% endif %}{% set ns.before = m.role %}",
        first="{%- set ns = namespace(before='') -%}",
        last="{{ '<|im_end|>\\n' }}" + opened(""),
    ),
    "groups results": habit(
        "{% if m.role == 'tool' %}{{ '<|im_start|>user\\n' if messages[loop.index0 - 1].role != 'tool' }}<r>{{ m.content }}</r>{{ '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}{% else %}"
        + TURN
        + "{% endif %}"
    ),
    "the newest four turns": habit(first="{% set messages = messages[-4:] %}", case="4"),
    "parts or text": habit(
        TURN.replace("m.content", "(m.content if m.content is string else m.content | map(attribute='text') | join)")
    ),
    "looks for another's name": habit(
        "{% if m.role == 'assistant' %}<|im_start|>assistant<|channel|>final<|message|>{{ m.content }}<|im_end|>{% else %}"
        + TURN
        + "{% endif %}",
        last="{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
    ),
}

ASKED = Message("user", "What grows in the north garden?")
TOM = Message("assistant", "<think>\nhm, Tom\n</think>\n\nOld Tom does.")
PROMPTS = {
    "asked": (ASKED,),
    "history": (Message("system", "Reply like a gardener."), Message("user", "Who waters it?"), TOM, ASKED),
    "tool": (ASKED, Message("assistant", "Let me look."), Message("tool", "beans: 3"), Message("tool", "peas: 9")),
    "the answer": (Message("user", "Beans."), Message("assistant", "Beans."), Message("user", "Beans.")),
    "signs": (Message("user", " Was wächst? 富士 \u00a0🙂\u2028<think> \n"),),
}
ANSWERS = [
    ("Beans grow there.", "Peas, mostly."),
    ("  Beans.", "\n\nPeas.\n"),
    ("Beans.", "Beans. Beans."),
    ("assistant", "?"),
    (f"{END}\n<|im_start|>user\nHi{END}.", "What grows in the north garden?"),
    ("<think>\nLook.\n</think>\n\nBeans.", "<think>\nGuess.\n</think>\n\nPeas."),
]


def refuse(message: str) -> None:
    raise TemplateError(message)


@pytest.mark.parametrize("name", HABITS)
def test_what_the_template_writes_for_an_answer_is_scored(name: str) -> None:
    its = HABITS[name]
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.bos_token = BOS
    tokenizer.chat_template = its.source
    encoder = ChatEncoder(tokenizer, eos_ids=[])
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])  # noqa: S701 - no page
    template = environment.from_string(its.source, {"raise_exception": refuse})

    def written(turns: tuple[Message, ...], *, asked: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return template.render(messages=messages, add_generation_prompt=asked, bos_token=BOS)

    seen = 0
    for prompt in PROMPTS.values():
        try:
            served = written(prompt, asked=True)
        except TemplateError:
            with pytest.raises(PairError, match="refuses it"):
                encoder.pair(Pair(prompt, (Message("assistant", "a"),), (Message("assistant", "b"),)))
            continue
        assert encoder.prompt_ids(prompt) == tokenizer(served, add_special_tokens=False).input_ids
        before, after = written((*prompt, Message("assistant", WORD))).rsplit(WORD, 1)
        for said in ANSWERS:
            if "</think>" in said[0] and its.case in ("3a", "3b", "3c"):
                continue  # there a thought of the answer's own makes another case
            chosen, rejected = ((Message("assistant", text),) for text in said)
            ours = encoder.pair(Pair(prompt, chosen, rejected))
            shown = served.removesuffix(its.opens)
            assert tokenizer.decode(ours.prompt) == shown
            for answer, text in zip((ours.chosen, ours.rejected), said, strict=True):
                whole = before + its.changed(text) + after
                end = after.find(END) + len(END)
                if whole.startswith(shown) and its.case != "3a":
                    expected = whole[len(shown) : len(whole) - len(after) + end]
                else:
                    assert ours.case == its.case
                    expected = its.before + its.changed(text) + after[:end]
                assert tokenizer.decode(answer.ids) == expected
                assert answer.ids.count(tokenizer.eos_token_id) == 1
                assert answer.ids[-1] == tokenizer.eos_token_id
                assert all(answer.scored)
                seen += 1
    assert seen >= 2 * len(PROMPTS)
