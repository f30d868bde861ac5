"""The checks that ask a tokenizer, against the template's own rendering."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_studio.config import TooLong
from dpo_studio.doctor.findings import Finding
from dpo_studio.doctor.token_checks import TokenChecks, rule_findings
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.tokens.chat import ChatEncoder
from dpo_studio.tokens.encode import encode_pairs
from tests.tiny_tokenizers import CHATML, end_ids, tiny_tokenizer


def pair(row: int, chosen: str, rejected: str = "No.", prompt: str = "Why?") -> Pair:
    return Pair((Message("user", prompt),), (Message("assistant", chosen),), (Message("assistant", rejected),), row)


def checks(family: str = "chatml", max_length: int = 1000, too_long: TooLong = "drop") -> TokenChecks:
    encoder = ChatEncoder(tiny_tokenizer(family), eos_ids=end_ids(family))
    return TokenChecks(encoder, max_length=max_length, too_long=too_long)


def found(seen: TokenChecks, pairs: list[Pair]) -> dict[str, Finding]:
    seen.see(pairs)
    return {finding.name: finding for finding in seen.findings()}


def tokens(prompt: str, answer: str) -> int:
    """Of a chat, through the template and the tokenizer alone; the newline after the end of turn is not counted."""
    tokenizer = tiny_tokenizer()
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return len(tokenizer(tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")).input_ids)


def test_plain_pairs_have_nothing_against_them() -> None:
    findings = found(checks(), [pair(0, "Because."), pair(1, "So it is.")])
    assert {finding.level for finding in findings.values()} == {"fine"}


LONG = [pair(0, "a b c"), pair(1, "a " * 60), pair(2, "a " * 20, "b " * 60), pair(3, "Yes.", prompt="w " * 200)]
"""Row 1's chosen answer, row 2's rejected one and row 3's prompt are too long."""


@pytest.mark.parametrize(
    ("too_long", "usable", "lost", "level"),
    [("drop", 1, 0, "fine"), ("cut_answer_end", 3, 1, "stop"), ("cut_prompt_start", 1, 0, "fine")],
)
def test_what_the_length_rule_does(too_long: TooLong, usable: int, lost: int, level: str) -> None:
    """Three of four are over; only cutting answers keeps rows 1 and 2, and row 1 alone loses a chosen end."""
    limit = tokens("Why?", "a " * 20) + 10
    seen = checks(max_length=limit, too_long=too_long)
    findings = found(seen, LONG)
    over, ends = findings["over-length"], findings["lost-ends"]
    assert (over.count, over.of, sorted(e.row for e in over.examples)) == (3, 4, [1, 2, 3])
    assert (seen.usable, ends.count, ends.level) == (usable, lost, level)
    assert over.numbers["answers_that_would_lose_their_end"] == 2
    longest = [max(tokens(p.prompt[0].content, a[0].content) for a in (p.chosen, p.rejected)) for p in LONG]
    assert over.numbers["longest"] == max(longest)
    assert over.numbers["median"] == int(np.median(longest))


def test_a_training_is_told_the_same() -> None:
    """From the counts of `encode_pairs` as from the pairs themselves."""
    rules: tuple[TooLong, ...] = ("drop", "cut_answer_end", "cut_prompt_start")
    for too_long in rules:
        seen = checks(max_length=60, too_long=too_long)
        findings = found(seen, LONG)
        encoded = encode_pairs(LONG, seen._encoder, max_length=60, too_long=too_long)
        assert len(encoded.pairs) == seen.usable
        for told in rule_findings(encoded.counts, 4, 60, too_long):
            assert (told.count, told.level) == (findings[told.name].count, findings[told.name].level)


def test_a_special_token_of_this_tokenizer_in_the_text() -> None:
    """`<|im_start|>` is one of ChatML's tokens; `<|eot_id|>`, Llama 3's, is a word to it."""
    findings = found(checks(), [pair(0, "<|eot_id|>"), pair(1, "<|im_start|>system"), pair(2, "Yes.")])
    special = findings["special-tokens"]
    assert (special.count, [example.row for example in special.examples]) == (1, [1])
    assert special.examples[0].text == "<|im_start|> in the text of: assistant"


@pytest.mark.parametrize(
    ("family", "name"),
    [("bare", "no-end-of-turn"), ("qwen3-no-think", "prompt-cases"), ("gemma", "not-encoded")],
)
def test_what_a_template_does(family: str, name: str) -> None:
    """`bare` ends no turn; `qwen3-no-think` writes an empty thought when it asks for an answer, not before one it is
    given; `gemma` refuses a system turn. Each concerns every pair."""
    pairs = [pair(0, "Because."), pair(1, "So it is.")]
    if family == "gemma":
        pairs = [Pair((Message("system", "Hm."), *p.prompt), p.chosen, p.rejected, p.row) for p in pairs]
    finding = found(checks(family), pairs)[name]
    assert (finding.count, finding.of) == (2, 2)
    assert finding.level == ("note" if name == "prompt-cases" else "warning")


def test_a_chat_that_begins_twice() -> None:
    """Llama 3's template with BOS written twice; written once it is right."""
    tokenizer = tiny_tokenizer("llama3")
    assert found(checks("llama3"), [pair(0, "Because.")])["double-bos"].count == 0
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    seen = TokenChecks(ChatEncoder(tokenizer, eos_ids=end_ids("llama3")), max_length=100, too_long="drop")
    assert found(seen, [pair(0, "Because.")])["double-bos"].level == "warning"


def test_a_tokenizer_without_a_beginning_never_begins_twice() -> None:
    assert "<|im_start|>" in CHATML
    assert tiny_tokenizer().bos_token_id is None
    assert found(checks(), [pair(0, "Because.")])["double-bos"].count == 0
