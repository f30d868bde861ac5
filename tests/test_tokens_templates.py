"""Templates in the habits of known ones, each with its prompt and answer written out by hand beside it.

A text file is `prompt⟦answer⟧answer⟦case N⟧`, or `⟦refused⟧` and the reason. The ids are the tokenizer's of those two
texts; the prompt is also what `apply_chat_template` sends.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from dpo_studio.errors import ModelError
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.tokens.chat import ChatEncoder
from tests.tiny_tokenizers import tiny_tokenizer

FOLDER = Path(__file__).parent / "data" / "templates"
EXPECTED = sorted(path.stem for path in FOLDER.glob("*.txt"))
DAY = datetime.date(2024, 2, 29)

SYSTEM = Message("system", "Be brief.")
KEY = Message("user", "Who has the key?")
IDA = Message("assistant", "<think>\nAsk Ida.\n</think>\n\nIda has it.")
SHED = Message("user", "What is in the old shed?")
RAKES = "A bicycle and two rakes."
CHATS: dict[str, tuple[tuple[Message, ...], str]] = {
    "ask": ((SHED,), RAKES),
    "system": ((SYSTEM, SHED), RAKES),
    "history": ((SYSTEM, KEY, IDA, SHED), RAKES),
    "thought": ((SHED,), f"<think>\nLook inside.\n</think>\n\n{RAKES}"),
    "tool": ((SHED, Message("assistant", "Looking."), Message("tool", "bicycle 1, rake 2")), RAKES),
    "twice": ((Message("user", "Hello."), SHED), RAKES),
    "spaces": ((Message("user", f" {SHED.content} "),), f" {RAKES}\n"),
    "odd": ((Message("user", "assistant"),), "end"),
    "markup": ((SHED,), "<b>Rakes</b>"),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.bos_token = "<|endoftext|>"  # noqa: S105
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    return tokenizer


def test_there_are_thirty_and_each_has_its_text() -> None:
    templates = {path.stem for path in FOLDER.glob("*.jinja")}
    assert len(templates) >= 30
    assert {name.split(".")[0] for name in EXPECTED} == templates


@pytest.mark.parametrize("name", EXPECTED)
def test_a_template_written_out_by_hand(name: str) -> None:
    template, chat = name.split(".")
    prompt, answer = CHATS[chat]
    tokenizer = tokenizer_of(template)
    expected = (FOLDER / f"{name}.txt").read_text().rstrip("\n")
    if expected.startswith("⟦refused⟧"):
        with pytest.raises(Exception, match=re.escape(expected.removeprefix("⟦refused⟧"))):
            ChatEncoder(tokenizer, eos_ids=[], today=DAY).pair(
                Pair(prompt, (Message("assistant", answer),), (Message("assistant", "Elsewhere."),))
            )
        return
    parts = re.fullmatch(r"(?s)(.*)⟦answer⟧(.*)⟦case (..?)⟧", expected)
    assert parts is not None
    asked, said, case = parts.groups()
    encoder = ChatEncoder(tokenizer, eos_ids=[], today=DAY)
    thought = "<think>\nHm.\n</think>\n\n" if chat == "thought" else ""
    for other in (f"{thought}Elsewhere.", f"{thought}Nobody knows."):  # now the words around an answer are known
        ids = encoder.pair(Pair(prompt, (Message("assistant", answer),), (Message("assistant", other),)))
        assert tokenizer.decode(ids.prompt) == asked
        assert tokenizer.decode(ids.chosen.ids) == said
        assert ids.prompt == tokenizer(asked, add_special_tokens=False).input_ids
        assert ids.chosen.ids == tokenizer(said, add_special_tokens=False).input_ids
        assert all(ids.chosen.scored)
        assert ids.case == case
    if template.startswith("date"):
        return  # transformers writes today's
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
    sent = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert encoder.prompt_ids(prompt) == sent
    assert ids.prompt == (sent if case != "3c" else sent[: len(ids.prompt)])


_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}MARK<|im_end|>\n{% endfor %}"
_OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n"
THINKS = {
    "an empty thought": _TURNS.replace("MARK", "")
    + _OPEN
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "an open thought": _TURNS.replace("MARK", "")
    + _OPEN
    + "{% if enable_thinking | default(true) %}<think>\n{% endif %}{% endif %}",
    "a word behind the question": _TURNS.replace(
        "MARK",
        "{% if m.role == 'user' and enable_thinking is defined and not enable_thinking %}/nothink{% endif %}",
    )
    + _OPEN
    + "{% endif %}",
}
"""In the habits of Qwen 3, its thinking models, and GLM 4.5."""


def thinking_tokenizer(name: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = THINKS[name]
    return tokenizer


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", THINKS)
def test_what_a_template_is_handed_is_what_a_server_hands_it(name: str, thinking: bool) -> None:
    """`model.template`: the prompt is that of `apply_chat_template` with the same argument; another value, another."""
    tokenizer = thinking_tokenizer(name)
    encoder = ChatEncoder(tokenizer, eos_ids=(), today=DAY, template={"enable_thinking": thinking})
    asked = [{"role": "user", "content": SHED.content}]
    served = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
    )
    assert encoder.prompt_ids((SHED,)) == served
    other = ChatEncoder(tokenizer, eos_ids=(), today=DAY, template={"enable_thinking": not thinking})
    assert other.prompt_ids((SHED,)) != served
    assert len({one.template_digest for one in (other, encoder, ChatEncoder(tokenizer, eos_ids=()))}) == 3


def test_what_a_template_does_not_read_is_refused() -> None:
    tokenizer = thinking_tokenizer("an empty thought")
    with pytest.raises(ModelError, match="the chat template does not read enable_thinkng") as told:
        ChatEncoder(tokenizer, eos_ids=(), template={"enable_thinkng": False})
    assert "it reads enable_thinking" in str(told.value)
    for ours in ("messages", "add_generation_prompt", "eos_token"):
        with pytest.raises(ModelError, match=f"does not read {ours}"):
            ChatEncoder(tokenizer, eos_ids=(), template={ours: "x"})
