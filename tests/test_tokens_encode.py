"""The length rule, by hand counts, and the counts it reports.

`~` is in no word the tiny tokenizers learned, so an answer of n tildes has n tokens, and its end of turn makes n + 1.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dpo_studio.config import TooLong
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.tokens.chat import ChatEncoder
from dpo_studio.tokens.encode import Encoded, EncodedAnswer, encode_pairs
from tests.tiny_tokenizers import end_ids, tiny_tokenizer

CHATML = ChatEncoder(tiny_tokenizer("chatml"), eos_ids=end_ids("chatml"))
END = CHATML.pair(Pair((Message("user", ""),), (Message("assistant", ""),), (Message("assistant", "~"),))).chosen.ids[0]
TILDE = CHATML.pair(Pair((Message("user", ""),), (Message("assistant", "~"),), (Message("assistant", ""),))).chosen.ids[
    0
]
SYSTEM = Message("system", "~")


def user(tildes: int) -> Message:
    return Message("user", "~" * tildes)


def assistant(tildes: int) -> Message:
    return Message("assistant", "~" * tildes)


def pair(chosen: int, rejected: int, prompt: tuple[Message, ...] = (SYSTEM, user(3)), row: int = 0) -> Pair:
    return Pair(prompt, (assistant(chosen),), (assistant(rejected),), row)


PROMPT = len(CHATML.prompt_ids((SYSTEM, user(3))))


def encode(pairs: list[Pair], max_length: int | None, too_long: TooLong = "drop") -> Encoded:
    return encode_pairs(pairs, CHATML, max_length=max_length, too_long=too_long)


def lengths(encoded: Encoded) -> list[tuple[int, int, int]]:
    return [(len(pair.prompt), len(pair.chosen.ids), len(pair.rejected.ids)) for pair in encoded.pairs]


def test_a_tilde_is_a_token() -> None:
    assert lengths(encode([pair(5, 2)], None)) == [(PROMPT, 6, 3)]


def test_what_is_encoded() -> None:
    """int32 ids and bool masks, the end of turn last, and the opposite preference by swapping."""
    (one,) = encode([pair(2, 1, row=7)], None).pairs
    assert one.row == 7
    assert one.prompt.dtype == np.int32
    assert one.prompt.tolist() == CHATML.prompt_ids((SYSTEM, user(3)))
    assert one.chosen.ids.dtype == np.int32
    assert one.chosen.scored.dtype == np.bool_
    assert one.chosen.ids.tolist() == [TILDE, TILDE, END]
    assert one.chosen.scored.tolist() == [True, True, True]
    (opposite,) = encode([pair(2, 1, row=7).swap()], None).pairs
    swapped = one.swap()
    assert same(swapped.chosen, opposite.chosen)
    assert same(swapped.rejected, opposite.rejected)
    assert swapped.row == 7


def same(one: EncodedAnswer, other: EncodedAnswer) -> bool:
    return np.array_equal(one.ids, other.ids) and np.array_equal(one.scored, other.scored)


def test_max_length_counts_prompt_and_one_answer() -> None:
    """Answers of 9 + 1 and 4 + 1 tokens: prompt + 10 is enough and prompt + 9 is not, whichever answer is longer."""
    for one in (pair(9, 4, row=3), pair(4, 9, row=3)):
        assert encode([one], PROMPT + 10).counts == {}
        over = encode([one], PROMPT + 9)
        assert over.pairs == []
        assert over.counts == {"dropped: over max_length": 1}
        assert over.refused == [(3, f"prompt and answer have {PROMPT + 10} tokens, max_length is {PROMPT + 9}")]


def test_no_limit_drops_nothing() -> None:
    assert lengths(encode([pair(3000, 1)], None)) == [(PROMPT, 3001, 2)]


@pytest.mark.parametrize("too_long", ["drop", "cut_answer_end", "cut_prompt_start"])
def test_a_prompt_without_room_for_an_answer(too_long: TooLong) -> None:
    alone = encode([pair(2, 1)], PROMPT, too_long)
    assert alone.counts == {"dropped: prompt alone over max_length": 1}
    assert alone.refused == [(0, f"the prompt alone has {PROMPT} tokens, max_length is {PROMPT}")]


def test_a_cut_answer_has_no_end_of_turn() -> None:
    """Room for 4: the chosen 6 + 1 lose the last 2 and the end, the rejected 3 + 1 fit with theirs."""
    cut = encode([pair(6, 3)], PROMPT + 4, "cut_answer_end")
    (one,) = cut.pairs
    assert one.chosen.ids.tolist() == [TILDE] * 4
    assert one.chosen.scored.tolist() == [True] * 4
    assert one.rejected.ids.tolist() == [TILDE] * 3 + [END]
    assert cut.counts == {"answer end cut": 1, "chosen answer end cut": 1}
    assert cut.refused == []
    other = encode([pair(3, 6)], PROMPT + 4, "cut_answer_end")
    assert other.counts == {"answer end cut": 1}


def test_of_an_answer_that_its_model_did_not_end_no_end_of_turn_is_learned() -> None:
    """`ended=False` on the rejected answer: its 3 tildes without the 4th id; the chosen one keeps its end."""
    whole = pair(5, 3)
    one = replace(whole, rejected=(replace(whole.rejected[0], ended=False),))
    (written,) = encode([one], PROMPT + 6).pairs
    assert written.rejected.ids.tolist() == [TILDE] * 3
    assert written.rejected.scored.tolist() == [True] * 3
    assert written.chosen.ids.tolist() == [TILDE] * 5 + [END]
    assert encode([one], None).counts == {"answer that its model did not end: no end of turn to learn": 1}
    longer = replace(whole, rejected=(replace(assistant(7), ended=False),), chosen=(assistant(2),))
    assert lengths(encode([longer], PROMPT + 7)) == [(PROMPT, 3, 7)]  # with an end of turn it would be one too long


def test_one_token_over_costs_the_end_of_turn_alone() -> None:
    (one,) = encode([pair(6, 3)], PROMPT + 6, "cut_answer_end").pairs
    assert one.chosen.ids.tolist() == [TILDE] * 6


def test_answers_the_same_once_cut_are_dropped() -> None:
    """Both have four tildes in the room for four."""
    cut = encode([pair(6, 5, row=2)], PROMPT + 4, "cut_answer_end")
    assert cut.counts == {"dropped: identical answers": 1}
    assert cut.refused == [(2, "both answers have the same token ids")]


def test_identical_answers_are_dropped() -> None:
    assert encode([pair(4, 4)], None).counts == {"dropped: identical answers": 1}


def test_an_answer_cut_before_the_assistant_speaks_is_dropped() -> None:
    """The answer's first turn is a user's of 50 tokens, and there is room for 20."""
    chosen = (user(50), assistant(3))
    one = Pair((SYSTEM, user(3)), chosen, (assistant(1),))
    assert encode([one], None).pairs[0].chosen.scored.sum() == 4
    assert encode([one], PROMPT + 20, "cut_answer_end").counts == {"dropped: no answer token": 1}


EXCHANGES = (SYSTEM, user(20), assistant(30), user(10), assistant(5), user(3))


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_the_oldest_exchanges_go_and_the_system_turn_stays(gone: int) -> None:
    """With exactly the room that a prompt without `gone` exchanges leaves, those go and no more."""
    left = (SYSTEM, *EXCHANGES[1 + 2 * gone :])
    room = len(CHATML.prompt_ids(left)) + 4
    cut = encode([pair(3, 2, EXCHANGES)], room, "cut_prompt_start")
    (one,) = cut.pairs
    assert one.prompt.tolist() == CHATML.prompt_ids(left)
    assert [one.chosen.ids.tolist(), one.rejected.ids.tolist()] == [[TILDE] * 3 + [END], [TILDE] * 2 + [END]]
    assert cut.counts == ({"prompt start cut": 1} if gone else {})


def test_an_exchange_costs_what_it_weighs() -> None:
    """One token less than the whole needs, and the first exchange goes: its 20 and 30 tildes and two frames."""
    frame = len(CHATML.prompt_ids((SYSTEM, user(1), user(1)))) - len(CHATML.prompt_ids((SYSTEM, user(1)))) - 1
    assistant_frame = len(CHATML.prompt_ids((SYSTEM, assistant(1), user(1)))) - len(
        CHATML.prompt_ids((SYSTEM, user(1)))
    )
    whole = len(CHATML.prompt_ids(EXCHANGES))
    (one,) = encode([pair(3, 2, EXCHANGES)], whole + 3, "cut_prompt_start").pairs
    assert len(one.prompt) == whole - (20 + frame) - (30 + assistant_frame - 1)


def test_a_prompt_that_cannot_be_cut_enough_is_dropped() -> None:
    """Room for the shortest prompt and 3 tokens, and the longer answer has 3 + 1."""
    shortest = len(CHATML.prompt_ids((SYSTEM, user(3))))
    cut = encode([pair(3, 2, EXCHANGES)], shortest + 3, "cut_prompt_start")
    assert cut.counts == {"dropped: over max_length": 1}


def test_a_cut_prompt_begins_with_a_user() -> None:
    """An opening of the assistant's goes first, alone; a tool's turn goes with its exchange."""
    opened = (assistant(40), user(3), assistant(1), user(2))
    tool = (user(5), Message("tool", "~" * 40), assistant(5), user(2))
    for prompt, left in [(opened, opened[1:]), (tool, tool[3:])]:
        room = len(CHATML.prompt_ids(prompt)) + 3
        (one,) = encode([pair(3, 2, prompt)], room, "cut_prompt_start").pairs
        assert one.prompt.tolist() == CHATML.prompt_ids(left)


def test_counts_say_what_templates_did() -> None:
    bare = ChatEncoder(tiny_tokenizer("bare"), eos_ids=[])
    assert encode_pairs([pair(2, 1)] * 2, bare, max_length=None).counts == {"end of turn appended": 2}
    thinking = ChatEncoder(tiny_tokenizer("qwen3-no-think"), eos_ids=[])
    assert encode_pairs([pair(2, 1)], thinking, max_length=None).counts == {"prompt and answers parted by case 3a": 1}


def test_refused_rows_are_counted_by_reason_and_the_rest_keep_their_order() -> None:
    """300 pairs are two calls of the tokenizer; Gemma's template refuses the system turn of every tenth."""
    gemma = ChatEncoder(tiny_tokenizer("gemma"), eos_ids=end_ids("gemma"))
    pairs = [pair(2, 1, (SYSTEM, user(1)) if row % 10 == 0 else (user(1),), row) for row in range(300)]
    encoded = encode_pairs(pairs, gemma, max_length=64)
    assert [one.row for one in encoded.pairs] == [row for row in range(300) if row % 10]
    assert encoded.counts == {"dropped: refused by the chat template": 30}
    assert encoded.refused[0] == (0, "the chat template refuses it: System role not supported")
    assert [row for row, _ in encoded.refused] == list(range(0, 300, 10))


def test_no_pairs() -> None:
    assert encode([], 8) == Encoded([], {}, [])
