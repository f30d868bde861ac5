# ruff: noqa: E501 - a template stands on one line, however long
"""Faults that strangers met in how chats become tokens, each with its right value."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dpo_studio.config import ModelSection
from dpo_studio.doctor.findings import Finding
from dpo_studio.doctor.token_checks import TokenChecks
from dpo_studio.models.tokenizer_settings import load_encoder
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.tokens.chat import ChatEncoder, PairError
from dpo_studio.tokens.encode import encode_pairs
from dpo_studio.tokens.scored_text import check_scored
from tests.tiny_tokenizers import HEADERS, tiny_tokenizer

QUESTION = Message("user", "When do the trains leave?")
CHATML_HEADER = "<|im_start|>assistant\n"


def tokenizer_with(template: str, family: str = "chatml") -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(family)
    tokenizer.chat_template = template
    return tokenizer


def answers(chosen: str, rejected: str, *prompt: Message) -> Pair:
    return Pair(prompt or (QUESTION,), (Message("assistant", chosen),), (Message("assistant", rejected),))


def findings(encoder: ChatEncoder, pairs: list[Pair]) -> dict[str, Finding]:
    seen = TokenChecks(encoder, max_length=512, too_long="drop")
    seen.see(pairs)
    return {finding.name: finding for finding in seen.findings()}


TURN = "<|im_start|>' + m.role + '\\n' + {} + '<|im_end|>\\n"
MOVING = (
    "{%- set ns = namespace(system='') -%}{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{%- set ns.system = m.content + '\\n\\n' -%}"
    "{%- elif m.role == 'user' -%}{{- '<|im_start|>user\\n' + (ns.system if loop.last else '') + m.content + '<|im_end|>\\n' -}}"
    "{%- else -%}{{- '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def test_system_text_that_goes_into_the_last_user_turn_is_in_the_prompt() -> None:
    """Not: lost, with the user's question scored as the beginning of the answer."""
    tokenizer = tokenizer_with(MOVING)
    encoder = ChatEncoder(tokenizer, eos_ids=[])
    pair = answers("At six.", "Never.", Message("system", "You sell tickets."), QUESTION)
    ours = encoder.pair(pair)
    assert tokenizer.decode(ours.prompt) == (
        f"<|im_start|>user\nYou sell tickets.\n\n{QUESTION.content}<|im_end|>\n{CHATML_HEADER}"
    )
    assert tokenizer.decode(ours.chosen.ids) == "At six.<|im_end|>"
    assert tokenizer.decode(ours.rejected.ids) == "Never.<|im_end|>"
    cases = findings(encoder, [pair, answers("At six.", "Never.")])["prompt-cases"]
    assert cases.numbers == {"1": 1, "3a": 0, "3b": 0, "3c": 0, "4": 1}


DROPPING = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1].lstrip() + '<|im_end|>\\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"
)


def test_thoughts_that_the_template_does_not_write_are_told_of() -> None:
    """And a pair that differs in them alone is refused for that, not as identical."""
    encoder = ChatEncoder(tokenizer_with(DROPPING), eos_ids=[])
    kept = answers("<think>\nThe clock.\n</think>\n\nAt six.", "<think>\nHm.\n</think>\n\nNever.")
    alone = answers("<think>\nThe clock.\n</think>\n\nAt six.", "<think>\nHm.\n</think>\n\nAt six.")
    plain = answers("At six.", "At six.")
    found = findings(encoder, [kept, alone])
    assert (found["unwritten-thoughts"].count, found["unwritten-thoughts"].level) == (2, "warning")
    shorter = found["shorter-prompts"]
    assert (shorter.count, shorter.of) == (1, 2)
    assert "model.chat_template" in shorter.todo
    encoded = encode_pairs([kept, alone, plain], encoder, max_length=None)
    assert encoded.counts == {
        "prompt and answers parted by case 3c": 1,
        "thought not written by the template": 1,
        "dropped: answers differ in their thoughts alone": 1,
        "dropped: identical answers": 1,
    }


OPENING = "{%- for m in messages -%}{{ '" + TURN.format("m.content") + "' }}{%- endfor -%}"
OPENING += "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n@@' }}{%- endif -%}"


@pytest.mark.parametrize(
    ("opened", "said", "learned"),
    [
        ("<think>\n", "<think>The clock.</think>At six.", "The clock.</think>At six."),
        ("<think>\nOkay, ", "<think>\nThe clock.\n</think>\n\nAt six.", "The clock.\n</think>\n\nAt six."),
        ("<thinking> ", "<thinking>\nSix.</thinking>Six.", "\nSix.</thinking>Six."),
    ],
)
def test_a_thought_that_goes_on_otherwise_than_the_prompt_opens_it_is_closed(
    opened: str, said: str, learned: str
) -> None:
    """The prompt stays the served one: the answer has the thought, if not to the white space that the prompt writes."""
    tokenizer = tokenizer_with(OPENING.replace("@@", opened.replace("\n", "\\n")))
    ours = ChatEncoder(tokenizer, eos_ids=[]).pair(answers(said, said.replace("ix", "even")))
    assert ours.case == "3b"
    assert tokenizer.decode(ours.prompt).endswith(CHATML_HEADER + opened)
    assert tokenizer.decode(ours.chosen.ids) == f"{learned}<|im_end|>"


@pytest.mark.parametrize("mark", ["<Thought>", "<scratchpad>", "<think_fast>", "Here are my reasoning steps:"])
def test_no_answer_is_learned_inside_a_thought_however_it_is_marked(mark: str) -> None:
    tokenizer = tokenizer_with(OPENING.replace("@@", f"{mark}\\n"))
    ours = ChatEncoder(tokenizer, eos_ids=[]).pair(answers("At six.", "Never."))
    assert ours.case == "3c"
    assert tokenizer.decode(ours.prompt).endswith(CHATML_HEADER)


WITHOUT_SYSTEM = OPENING.replace("{{ '", "{%- if m.role != 'system' -%}{{ '", 1).replace("' }}", "' }}{%- endif -%}", 1)


def test_a_turn_that_the_template_does_not_write_is_told_of() -> None:
    """The prompt is the served one all the same; a thought that is left out of a history is no such turn."""
    tokenizer = tokenizer_with(WITHOUT_SYSTEM.replace("@@", ""))
    encoder = ChatEncoder(tokenizer, eos_ids=[])
    dropped = answers("At six.", "Never.", Message("system", "You sell tickets."), QUESTION)
    history = (QUESTION, Message("assistant", "<think>\nHm.\n</think>\n\nAt five."), Message("user", "And then?"))
    found = findings(encoder, [dropped, answers("At six.", "Never.", *history)])["unwritten-turns"]
    assert (found.count, found.of, found.level) == (1, 2, "warning")
    assert encoder.pair(dropped).prompt == encoder.prompt_ids([QUESTION])
    encoder = ChatEncoder(tokenizer_with(DROPPING), eos_ids=[])
    assert findings(encoder, [answers("At six.", "Never.", *history)])["unwritten-turns"].count == 0


DATED = "{{- 'Today: ' + strftime_now('%d %b %Y') + '\\n' -}}" + DROPPING.replace("<think>\\n'", "'")


def test_a_template_writes_the_date_it_is_given(tmp_path: Path) -> None:
    """Prompt and both answers of a run have its date, and the same the next day."""
    tokenizer = tokenizer_with(DATED)
    tokenizer.save_pretrained(tmp_path)
    day = datetime.date(2026, 3, 9)
    encoder = load_encoder(tmp_path, ModelSection(path=str(tmp_path)), today=day)
    ours = encoder.pair(answers("At six.", "Never."))
    assert tokenizer.decode(ours.prompt).startswith("Today: 09 Mar 2026\n")
    assert ours.prompt == encoder.prompt_ids([QUESTION])
    today = ChatEncoder(tokenizer, eos_ids=[]).prompt_ids([QUESTION])
    assert tokenizer.decode(today).startswith(datetime.date.today().strftime("Today: %d %b %Y\n"))


NEXT_HEADER = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' -}}{%- endfor -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
)


@pytest.mark.parametrize("text", ["At six.", "assistant", "end", "im_start", "Six.\n"])
def test_the_answer_ends_at_the_first_end_after_its_text(text: str) -> None:
    """The template writes the next header whatever it is asked for: it is not learned, and nothing is appended.

    Texts that the template's own words hold, too, are found at their own place.
    """
    tokenizer = tokenizer_with(NEXT_HEADER)
    ours = ChatEncoder(tokenizer, eos_ids=[]).pair(answers(text, "Never."))
    assert tokenizer.decode(ours.chosen.ids) == f"{text}<|im_end|>"
    assert not ours.end_appended
    assert tokenizer.decode(ours.prompt) == f"<|im_start|>user\n{QUESTION.content}<|im_end|>{CHATML_HEADER}"


@pytest.mark.parametrize(
    ("generation", "config"),
    [
        (None, {"eos_token_id": "both"}),
        (None, {"text_config": {"eos_token_id": "both"}}),
        ({"temperature": 0.5}, {"eos_token_id": "both"}),
        ({"eos_token_id": "both"}, {"eos_token_id": None}),
    ],
    ids=["no file", "a wrapper's text model", "a file without it", "a file with it"],
)
def test_config_json_s_end_tokens_count(tmp_path: Path, generation: dict[str, Any] | None, config: Any) -> None:
    """The tokenizer's EOS is another token than the end of turn: as in transformers, the configs name both."""
    tokenizer = tokenizer_with(HEADERS, "llama3")
    tokenizer.save_pretrained(tmp_path)
    both = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content).replace('"both"', json.dumps(both)))
    encoder = load_encoder(tmp_path, ModelSection(path=str(tmp_path)))
    ours = encoder.pair(answers("At six.", "Never."))
    assert encoder.eos_ids == set(both)
    assert tokenizer.decode(ours.chosen.ids) == "At six.<|eot_id|>"
    assert not ours.end_appended


def test_the_largest_id_is_that_of_an_added_token() -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.add_tokens(["<more>"])
    assert (
        ChatEncoder(tokenizer, eos_ids=[]).largest_id == tokenizer.convert_tokens_to_ids("<more>") == len(tokenizer) - 1
    )


def test_a_turn_of_weight_0_is_context() -> None:
    tokenizer = tiny_tokenizer("chatml")
    encoder = ChatEncoder(tokenizer, eos_ids=[])
    turns = (Message("assistant", "Soon.", learned=False), Message("user", "When?"), Message("assistant", "At six."))
    ours = encoder.pair(Pair((QUESTION,), turns, (Message("assistant", "Never."),)))
    scored = [token for token, own in zip(ours.chosen.ids, ours.chosen.scored, strict=True) if own]
    assert tokenizer.decode(scored) == "At six.<|im_end|>"
    assert tokenizer.decode(ours.prompt).endswith(CHATML_HEADER)
    with pytest.raises(PairError, match="weight 0"):
        encoder.pair(Pair((QUESTION,), turns[:1], (Message("assistant", "Never."),)))


def test_answers_that_leave_the_prompt_s_thought_open_or_not_are_no_pair() -> None:
    """One thinks as the prompt begins it, the other does not: no prompt would be right for both."""
    template = DROPPING.replace(".split('</think>')[-1].lstrip()", "")
    encoder = ChatEncoder(tokenizer_with(template), eos_ids=[])
    with pytest.raises(PairError, match="one of the answers only"):
        encoder.pair(answers("<think>\nHm.\n</think>\n\nAt six.", "Never."))


def test_a_cut_prompt_is_the_served_one_of_the_turns_that_are_left() -> None:
    """The system text moves on to the new last user turn, and is in the shorter prompt as a server would send it."""
    tokenizer = tokenizer_with(MOVING)
    encoder = ChatEncoder(tokenizer, eos_ids=[])
    system, old = Message("system", "You sell tickets."), Message("user", "a " * 50)
    pair = answers("At six.", "Never.", system, old, Message("assistant", "Yes."), QUESTION)
    room = len(encoder.prompt_ids([system, QUESTION])) + 8
    (one,) = encode_pairs([pair], encoder, max_length=room, too_long="cut_prompt_start").pairs
    assert one.prompt.tolist() == encoder.prompt_ids([system, QUESTION])
    assert tokenizer.decode(one.chosen.ids) == "At six.<|im_end|>"


def test_an_answer_that_repeats_its_question_is_no_question_that_is_scored() -> None:
    """Even where the template refuses the other words that the check would compare with."""
    picky = "{%- if messages[0].content.startswith('Zebra') -%}{{ raise_exception('a zebra') }}{%- endif -%}"
    pair = answers("Beans. They grow.", "Beans.", Message("user", "Beans."))
    for first in ("", picky):
        encoder = ChatEncoder(tokenizer_with(first + OPENING.replace("@@", "")), eos_ids=[])
        check_scored(encode_pairs([pair], encoder, max_length=None).pairs, [pair], encoder)
