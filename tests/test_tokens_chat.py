"""Law 4: token ids are a prefix of the tokenizer's own `apply_chat_template`, for every family of templates."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from dpo_studio.errors import ModelError
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.tokens.chat import ChatEncoder, PairError
from tests.tiny_tokenizers import FAMILIES, end_ids, tiny_tokenizer

CHAT_FAMILIES = [family for family in FAMILIES if FAMILIES[family].template is not None]
BYTE_FAMILIES = [family for family in CHAT_FAMILIES if FAMILIES[family].kind == "bytes"]

Turns = tuple[tuple[str, str], ...]

PROMPTS: list[Turns] = [
    (("user", "How far is the moon?"),),
    (("user", ""),),
    (("user", "  two spaces before, one after "),),
    (("user", "\n\nlines\n\n\nand lines\n"),),
    (("user", "Größe, 高さ, высота, 🙂‍↕️, e\u0301, \u00a0 \u2028 \t\r\n \u200b"),),
    (("user", "if x < 3 and y > 2: s = '<s'; t = '|>' # [INST"),),
    (("system", ""), ("user", "With an empty system turn")),
    (("system", "Be brief. "), ("user", "With a system turn")),
    (("user", "One?"), ("assistant", "Two.\n"), ("user", " Three?")),
    (("user", "One?"), ("assistant", "<think>\nhm\n</think>\n\nTwo."), ("user", "Three?")),
]
ANSWERS = [
    "About 384,400 km.",
    " A space first",
    "A newline last\n",
    "富士山 🙂",
    "<think>\nfar\n</think>\n\nVery far.",
    "",
    "~~",
]


def messages(turns: Turns) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in turns)


def pair(prompt: str | Turns, chosen: str | Turns, rejected: str | Turns = "No.") -> Pair:
    """A plain string is one turn."""
    return Pair(
        messages((("user", prompt),) if isinstance(prompt, str) else prompt),
        messages((("assistant", chosen),) if isinstance(chosen, str) else chosen),
        messages((("assistant", rejected),) if isinstance(rejected, str) else rejected),
    )


def encoder_of(family: str) -> ChatEncoder:
    return ChatEncoder(tiny_tokenizer(family), eos_ids=end_ids(family))


def oracle(tokenizer: Any, turns: tuple[Message, ...], *, open_answer: bool = False) -> list[int]:
    """The tokenizer's own ids of a chat."""
    chat = [{"role": turn.role, "content": turn.content} for turn in turns]
    ids: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=open_answer, return_dict=False)
    return ids


def rendered(tokenizer: Any, turns: tuple[Message, ...], *, open_answer: bool = False) -> str:
    """The tokenizer's own text of a chat."""
    chat = [{"role": turn.role, "content": turn.content} for turn in turns]
    return str(tokenizer.apply_chat_template(chat, add_generation_prompt=open_answer, tokenize=False))


def special_ids(tokenizer: Any) -> set[int]:
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "in pieces"])
@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_ids_are_a_prefix_of_apply_chat_template(family: str, in_pieces: bool) -> None:
    """Prompt ids are its ids of the prompt; prompt and answer are its ids of the chat but for white space at the end.

    `in pieces` sends these chats, which spell nothing, down the way of those that do: it must come to the same. Where
    the template refuses, so do we, in its words. One writes an empty thought into the generation prompt alone: there
    the prompt is the served one all the same.
    """
    encoder, tokenizer = encoder_of(family), tiny_tokenizer(family)
    encoder._texts._always_in_pieces = in_pieces
    ends = end_ids(family)
    seen = 0
    for prompt in map(messages, PROMPTS):
        try:
            prompt_ids = oracle(tokenizer, prompt, open_answer=True)
        except TemplateError as refusal:
            with pytest.raises(PairError, match=str(refusal)):
                encoder.prompt_ids(prompt)
            continue
        assert encoder.prompt_ids(prompt) == prompt_ids
        for answer in ANSWERS:
            if family == "qwen3-no-think" and not answer:
                continue  # nothing says where no text stands in another chat than the served prompt's
            ours = encoder.pair(Pair(prompt, (Message("assistant", answer),), (Message("assistant", "No."),)))
            assert ours.prompt == prompt_ids
            if family == "qwen3-no-think":
                assert ours.case == "3a"
                text = answer.strip() + answer[len(answer.rstrip()) :] + "<|im_end|>"
                assert tokenizer.decode(ours.chosen.ids) == text
                seen += 1
                continue
            chat = oracle(tokenizer, (*prompt, Message("assistant", answer)))
            ids = ours.prompt + ours.chosen.ids
            assert ours.case == "1"
            if ours.end_appended:
                assert family == "bare"
                assert ids == [*chat, tokenizer.eos_token_id]
            else:
                assert ids == chat[: len(ids)]
                assert ids[-1] in ends
                assert tokenizer.decode(chat[len(ids) :]).strip() == ""
            assert ours.chosen.scored == [True] * len(ours.chosen.ids)
            seen += 1
    assert seen >= 7 * (len(ANSWERS) - 1)


def test_many_pairs_at_once_are_each_pair_alone() -> None:
    encoder = encoder_of("chatml")
    pairs = [pair(prompt, answer, "<|im_end|>") for prompt in PROMPTS for answer in ANSWERS]
    assert encoder.pairs(pairs) == [encoder.pair(one) for one in pairs]
    assert encoder.pairs([]) == []


def test_a_chatml_pair_by_hand() -> None:
    """The template adds its system turn to the prompt and a newline after the answer, which nobody says."""
    tokenizer = tiny_tokenizer("chatml")
    ours = encoder_of("chatml").pair(pair("Far?", "Yes,\nvery.\n", "<|im_end|>"))
    assert tokenizer.decode(ours.prompt) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nFar?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(ours.chosen.ids) == "Yes,\nvery.\n<|im_end|>"
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [token for token in ours.prompt if token in (start, end)] == [start, end, start, end, start]
    assert tokenizer.convert_ids_to_tokens(ours.rejected.ids) == [*"<|im_", "en", *"d|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("family", "written"),
    [
        ("chatml", "Far.\n<|im_end|>"),
        ("llama2", " Far.\n</s>"),
        ("llama3", "Far.<|eot_id|>"),
        ("gemma", "Far.<end_of_turn>"),
        ("qwen3", "<think>\n\n</think>\n\nFar.\n<|im_end|>"),
        ("qwen3-no-think", "Far.\n<|im_end|>"),
        ("bare", "Far.\n\n<|endoftext|>"),
        ("phi3", "Far.\n<|end|>"),
    ],
)
def test_an_answer_ends_with_its_end_of_turn(family: str, written: str) -> None:
    """Its own newline stays unless the template trims it; the template's newline after the end does not."""
    assert tiny_tokenizer(family).decode(encoder_of(family).pair(pair("?", "Far.\n")).chosen.ids) == written


def test_two_ends_in_a_row_end_the_answer_at_the_first() -> None:
    """Generation stops at the first, so the second is never said."""
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = (
        str(tokenizer.chat_template) + "{% if not add_generation_prompt %}<|endoftext|>\n{% endif %}"
    )
    ours = ChatEncoder(tokenizer, eos_ids=tokenizer.convert_tokens_to_ids(["<|endoftext|>"])).pair(pair("?", "Far."))
    assert tokenizer.decode(ours.chosen.ids) == "Far.<|im_end|>"


def test_an_end_of_turn_that_ends_nothing_gets_eos() -> None:
    """Told of `<eos>` alone, nothing would stop at `<end_of_turn>`: EOS is appended, and that is said."""
    tokenizer = tiny_tokenizer("gemma")
    ours = ChatEncoder(tokenizer, eos_ids=[]).pair(pair("?", "Far."))
    assert ours.end_appended
    assert tokenizer.decode(ours.chosen.ids) == "Far.<end_of_turn>\n<eos>"


@pytest.mark.parametrize("family", [family for family in CHAT_FAMILIES if FAMILIES[family].bos is not None])
def test_one_bos(family: str) -> None:
    """The template writes it and the tokenizer would add it to plain text."""
    tokenizer = tiny_tokenizer(family)
    assert tokenizer("moon")["input_ids"][0] == tokenizer.bos_token_id
    for prompt in ("moon", f"moon {tokenizer.eos_token}"):
        ids = encoder_of(family).prompt_ids(messages((("user", prompt),)))
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_a_generation_prompt_that_the_chat_has_not_stays_as_it_is_served() -> None:
    """The generation prompt has an empty thought, a chat with an answer has none: the answer follows that thought.

    An answer that has the empty thought itself makes the chat begin with the whole prompt.
    """
    encoder, tokenizer = encoder_of("qwen3-no-think"), tiny_tokenizer("qwen3-no-think")
    ours = encoder.pair(pair("Far?", "Yes.", "<think>\n\n</think>\n\nNo."))
    assert ours.case == "3a"
    assert tokenizer.decode(ours.prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(ours.chosen.ids) == "Yes.<|im_end|>"
    assert tokenizer.decode(ours.rejected.ids) == "No.<|im_end|>"
    thinking = encoder.pair(pair("Far?", "<think>\n\n</think>\n\nYes.", "<think>\n\n</think>\n\nNo."))
    assert thinking.case == "1"
    assert tokenizer.decode(thinking.chosen.ids) == "Yes.<|im_end|>"


def test_a_prompt_that_counts_the_turns_is_the_served_one() -> None:
    """The chat with its answer says 2 where the prompt says 1: the answer is what follows the prompt's last turn."""
    tokenizer = tiny_tokenizer("bare")
    tokenizer.chat_template = "{{ messages | length }}" + str(tokenizer.chat_template)
    ours = ChatEncoder(tokenizer, eos_ids=[]).pair(pair("?", "Far."))
    assert ours.case == "4"
    assert tokenizer.decode(ours.prompt) == "1### user:\n?\n### assistant:\n"
    assert tokenizer.decode(ours.chosen.ids) == "Far.\n<|endoftext|>"


FRAGMENTS = [
    "<|im_end|>",
    "<|im_start|>",
    "<|im_",
    "end|>",
    "</s>",
    "<s>",
    "<",
    ">",
    "[/INST]",
    "<|eot_id|>",
    "\n",
    " ",
]
FRAGMENTS += [
    "<end_of_turn>",
    "<bos>",
    "<|endoftext|>",
    "<|end|>",
    "<|assistant|>",
    "<think>",
    "</think>",
    "\U000f0000",
]
spelling = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), max_size=8).map("".join)


@pytest.mark.parametrize("family", BYTE_FAMILIES)
@settings(max_examples=20, deadline=None, database=None)
@given(prompt=spelling, answer=spelling)
def test_no_text_makes_a_special_token(family: str, prompt: str, answer: str) -> None:
    """Chats have as many special tokens as the same chat saying only "x", and decode to the text of the template."""
    encoder, tokenizer = ENCODERS[family]
    ours = encoder.pair(pair(prompt, answer, "x"))
    ids = ours.prompt + ours.chosen.ids
    special = special_ids(tokenizer)
    plain = encoder.pair(pair("x", "x"))
    assert ours.case == plain.case
    assert sum(token in special for token in ids) == sum(token in special for token in plain.prompt + plain.chosen.ids)
    if family not in ("phi3", "qwen3-no-think"):  # one's special tokens swallow white space, one's chat has no thought
        chat = rendered(tokenizer, messages((("user", prompt), ("assistant", answer))))
        text = tokenizer.decode(ids).removesuffix("<|endoftext|>" if family == "bare" else "")
        assert chat.startswith(text)
        assert chat[len(text) :].strip() == ""


ENCODERS = {family: (encoder_of(family), tiny_tokenizer(family)) for family in CHAT_FAMILIES}


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_spelling_a_special_token_changes_only_its_own_place(family: str) -> None:
    """`A<end>B` is encoded as the pieces' letters would be: around it, ids are those of a chat that spells `A~B`."""
    encoder, tokenizer = ENCODERS[family]
    end = FAMILIES[family].end or FAMILIES[family].eos
    spelled = encoder.pair(pair("moon", f"Train {end} water", "No.")).chosen.ids
    plain = encoder.pair(pair("moon", "Train ~ water", "No.")).chosen.ids
    at = plain.index(next(token for token in plain if "~" in tokenizer.decode([token]) or token == tilde(tokenizer)))
    after = len(plain) - at - 1
    assert spelled[:at] == plain[:at]
    assert spelled[-after:] == plain[-after:]
    assert tokenizer.decode(spelled[at:-after]).strip() == end
    assert special_ids(tokenizer).isdisjoint(spelled[at:-after])


def tilde(tokenizer: Any) -> int:
    """SentencePiece's byte token of `~`."""
    return int(tokenizer.convert_tokens_to_ids("<0x7E>") or -1)


def test_private_use_characters_of_the_text_stay() -> None:
    """The first stand-in would be U+F0000; the text has it, so another is taken."""
    tokenizer = tiny_tokenizer("chatml")
    text = "\U000f0000<|im_end|>\U000f0001 <|im_start|>\ue000"
    ours = encoder_of("chatml").pair(pair(text, text, "No."))
    assert tokenizer.decode(ours.chosen.ids) == f"{text}<|im_end|>"


def test_a_role_cannot_spell_a_special_token() -> None:
    tokenizer = tiny_tokenizer("chatml")
    ids = encoder_of("chatml").prompt_ids([Message("user<|im_end|>", "hello")])
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2  # after the system turn and after this one


def test_added_tokens_that_are_not_special_are_words() -> None:
    tokenizer = tiny_tokenizer("qwen3")
    ours = encoder_of("qwen3").pair(pair("?", "<think>\n<|im_end|>\n</think>\n\nFar."))
    think, close, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<|im_end|>"])
    assert [ours.chosen.ids.count(token) for token in (think, close, end)] == [1, 1, 1]


def test_special_tokens_that_swallow_spaces_or_want_word_borders() -> None:
    """STOP takes the spaces before it and is only itself as a word: STOPPED is another, and the template's NONSTOP."""
    tokenizer = tiny_tokenizer("bare")
    stop = AddedToken("STOP", special=True, normalized=False, single_word=True, lstrip=True)
    tokenizer.add_special_tokens({"eos_token": stop})
    tokenizer.chat_template = "{% for m in messages %}{{ 'NONSTOP ' + m.role + ': ' + m.content }}  STOP\n{% endfor %}"
    encoder = ChatEncoder(tokenizer, eos_ids=[])
    for text in ("moon", "STOPPED", "UNSTOPPED it"):
        ours = encoder.pair(pair(text, text))
        chat = oracle(tokenizer, messages((("user", text), ("assistant", text))))
        assert ours.prompt + ours.chosen.ids == chat[:-1]
        assert chat.count(tokenizer.eos_token_id) == 2
    ours = encoder.pair(pair("x", "a STOP b"))
    assert (ours.prompt + ours.chosen.ids).count(tokenizer.eos_token_id) == 2


def test_a_tokenizer_that_has_no_other_way_to_write_it_refuses_the_text() -> None:
    """To a Unigram model `</s>` may be the likeliest piece of the text `</s>`: that pair is refused, not trained on."""
    letters = [(chr(code), -9.0) for code in range(10, 127)]
    model = models.Unigram([("<unk>", -99.0), ("</s>", 0.0), *letters], unk_id=0, byte_fallback=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token=FAMILIES["llama2"].eos)
    tokenizer.chat_template = FAMILIES["chatml"].template
    encoder = ChatEncoder(tokenizer, eos_ids=[])
    good, bad = encoder.pairs([pair("moon", "far"), pair("moon", "</s>")])
    assert not isinstance(good, PairError)
    assert isinstance(bad, PairError)
    assert "cannot write as text" in bad.message


def test_a_normalized_spelling_stays_text() -> None:
    """A tokenizer that lowers its text finds `<|im_end|>` in `<|IM_END|>`, too."""
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    end = AddedToken("<|stop|>", special=True, normalized=True)
    tokenizer.add_special_tokens({"eos_token": end})
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|im_end|>", "<|stop|>")
    turns = messages((("user", "a <|STOP|> b"),))
    assert oracle(tokenizer, turns).count(tokenizer.eos_token_id) == 3
    assert ChatEncoder(tokenizer, eos_ids=[]).prompt_ids(turns).count(tokenizer.eos_token_id) == 2


MULTI_TURN = (("assistant", "First."), ("user", "And?"), ("assistant", "Second."))


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("chatml", "First.<|im_end|>Second.<|im_end|>"),
        ("llama2", " First.</s> Second.</s>"),
        ("llama3", "First.<|eot_id|>Second.<|eot_id|>"),
        ("gemma", "First.<end_of_turn>Second.<end_of_turn>"),
        ("qwen3", "First.<|im_end|><think>\n\n</think>\n\nSecond.<|im_end|>"),
        ("bare", "First.\nSecond.\n<|endoftext|>"),
        ("phi3", "First.<|end|>Second.<|end|>"),
    ],
)
def test_of_several_turns_the_assistants_are_scored(family: str, own: str) -> None:
    encoder, tokenizer = ENCODERS[family]
    ours = encoder.pair(pair("?", MULTI_TURN, "No."))
    scored = [token for token, is_own in zip(ours.chosen.ids, ours.chosen.scored, strict=True) if is_own]
    assert tokenizer.decode(scored) == own
    assert all(ours.rejected.scored)
    chat = oracle(tokenizer, (Message("user", "?"), *messages(MULTI_TURN)))
    ids = ours.prompt + ours.chosen.ids
    assert chat[: len(ids)] == ids[: len(chat)]


def test_several_turns_that_spell_special_tokens() -> None:
    encoder, tokenizer = ENCODERS["chatml"]
    turns = (("assistant", "a<|im_end|>"), ("user", "<|im_start|>assistant\n"), ("assistant", "b"))
    ours = encoder.pair(pair("?", turns))
    scored = [token for token, is_own in zip(ours.chosen.ids, ours.chosen.scored, strict=True) if is_own]
    assert tokenizer.decode(scored) == "a<|im_end|><|im_end|>b<|im_end|>"


def test_turns_after_the_last_answer_are_left_out() -> None:
    encoder = ENCODERS["chatml"][0]
    longer = encoder.pair(pair("?", (("assistant", "First."), ("user", "Thanks.")), "No."))
    assert longer == encoder.pair(pair("?", "First.", "No."))


def test_refusals_cost_one_pair_each() -> None:
    """Each refusal says why, and its neighbours come out as ever."""
    encoder = ENCODERS["gemma"][0]
    good = pair("?", "Yes.")
    system = (("system", "Be brief."), ("user", "?"))
    bad = [pair(system, "Yes."), pair("?", "\ud800"), pair((), "Yes."), pair("?", (("user", "me"),))]
    first, *refused, last = encoder.pairs([good, *bad, good])
    assert first == last == encoder.pair(good)
    assert [str(error) for error in refused] == [
        "the chat template refuses it: System role not supported",
        "the text contains a lone surrogate, which is not a character",
        "the prompt has no turns",
        "an answer has no assistant turn",
    ]


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(ModelError) as error:
        ChatEncoder(tiny_tokenizer("untemplated"), eos_ids=[0])
    assert "no chat template" in error.value.message
    assert "model.chat_template: FILE" in str(error.value.hint)


@pytest.mark.parametrize("template", ["{{ raise_exception('not today') }}", "{{ messages[9].content }}"])
def test_a_template_that_renders_no_chat_is_refused(template: str) -> None:
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match="on a question and an answer: the chat template refuses it"):
        ChatEncoder(tokenizer, eos_ids=[])


def test_a_tokenizer_without_any_end_is_refused() -> None:
    tokenizer = tiny_tokenizer("bare")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        ChatEncoder(tokenizer, eos_ids=[])


def test_a_tokenizer_whose_pieces_are_not_the_whole_is_refused() -> None:
    """A normalized `</s>` is looked for as `▁</s>` and so never found where the template writes it after a letter."""
    tokenizer = tiny_tokenizer("llama2-legacy")
    tokenizer.add_special_tokens({"eos_token": AddedToken("</S>", special=True, normalized=True)})
    with pytest.raises(ModelError, match="differently"):
        ChatEncoder(tokenizer, eos_ids=[])
