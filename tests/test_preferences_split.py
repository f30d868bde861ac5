"""The split by prompt: its laws, for any pairs; the held-out source of its own, on small files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_studio.config import HeldOutSection
from dpo_studio.errors import DataError
from dpo_studio.preferences.pair import Message, Pair, prompt_key
from dpo_studio.preferences.split import Split, is_held_out, split_pairs


def pair(prompt: str, row: int = 0) -> Pair:
    return Pair((Message("user", prompt),), (Message("assistant", "yes"),), (Message("assistant", "no"),), row)


def numbered(prompts: list[str]) -> list[Pair]:
    return [pair(prompt, row) for row, prompt in enumerate(prompts)]


def split(pairs: list[Pair], *, fraction: float = 0.5, seed: int = 0, rows: int | None = None) -> Split | None:
    """The split, or None where it would leave nothing to train on."""
    try:
        return split_pairs(pairs, HeldOutSection(fraction=fraction, rows=rows), seed=seed)
    except DataError:
        return None


def keys(pairs: list[Pair]) -> set[str]:
    return {prompt_key(pair.prompt) for pair in pairs}


PROMPTS = st.lists(st.text(max_size=3), max_size=30)
SEEDS = st.integers(min_value=0, max_value=2**32)


@settings(deadline=None)
@given(prompts=PROMPTS, seed=SEEDS, fraction=st.floats(min_value=0, max_value=0.99))
def test_no_prompt_is_on_both_sides_and_no_pair_is_lost(prompts: list[str], seed: int, fraction: float) -> None:
    pairs = numbered(prompts)
    parts = split(pairs, seed=seed, fraction=fraction)
    if parts is None:
        assert all(is_held_out(key, seed=seed, fraction=fraction) for key in keys(pairs))
        return
    assert not keys(parts.train) & keys(parts.held_out)
    assert sorted([*parts.train, *parts.held_out], key=lambda pair: pair.row) == pairs
    for side in (parts.train, parts.held_out):
        assert [pair.row for pair in side] == sorted(pair.row for pair in side)


@settings(deadline=None)
@given(prompts=PROMPTS, more=PROMPTS, seed=SEEDS)
def test_added_rows_move_none_that_were_there(prompts: list[str], more: list[str], seed: int) -> None:
    before, after = split(numbered(prompts), seed=seed), split(numbered(prompts + more), seed=seed)
    if before is not None and after is not None:
        assert before.train == [pair for pair in after.train if pair.row < len(prompts)]
        assert before.held_out == [pair for pair in after.held_out if pair.row < len(prompts)]


@settings(deadline=None)
@given(prompts=PROMPTS, seed=SEEDS)
def test_the_same_rows_split_the_same_twice(prompts: list[str], seed: int) -> None:
    assert split(numbered(prompts), seed=seed) == split(numbered(prompts), seed=seed)


@given(key=st.text(), seed=SEEDS, small=st.floats(0, 1), large=st.floats(0, 1))
def test_a_larger_fraction_holds_out_what_a_smaller_one_does(key: str, seed: int, small: float, large: float) -> None:
    small, large = sorted((small, large))
    assert is_held_out(key, seed=seed, fraction=large) or not is_held_out(key, seed=seed, fraction=small)
    assert is_held_out(key, seed=seed, fraction=1.0)
    assert not is_held_out(key, seed=seed, fraction=0.0)


def test_the_side_is_a_hash_of_seed_and_key_alone() -> None:
    """sha256(b'7:abc') begins with this number; as a share of 2**64 it is the threshold between the sides."""
    share = int.from_bytes(hashlib.sha256(b"7:abc").digest()[:8], "big") / 2**64
    assert is_held_out("abc", seed=7, fraction=share + 1e-9)
    assert not is_held_out("abc", seed=7, fraction=share - 1e-9)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_fraction_is_of_prompts(fraction: float) -> None:
    """4,000 prompts, every tenth with ten rows: within four standard deviations (0.019 at 0.1, 0.032 at 0.5)."""
    pairs = numbered([f"prompt {n}" for n in range(4000) for _ in range(10 if n % 10 == 0 else 1)])
    parts = split(pairs, fraction=fraction)
    assert parts is not None
    tolerance = 4 * (fraction * (1 - fraction) / 4000) ** 0.5
    assert abs(len(keys(parts.held_out)) / 4000 - fraction) < tolerance


def test_seeds_choose_different_prompts() -> None:
    """Under two seeds the half held out of 1,000 prompts overlaps by about a half (four deviations: 0.063)."""
    pairs = numbered([str(n) for n in range(1000)])
    one, other = split(pairs, seed=1), split(pairs, seed=2)
    assert one is not None
    assert other is not None
    agree = sum((p in one.held_out) == (p in other.held_out) for p in pairs) / 1000
    assert abs(agree - 0.5) < 0.063


def test_white_space_and_unicode_forms_are_one_prompt() -> None:
    """'é' as one code point or two, and any white space: the key is the same, so is the side."""
    variants = ["caf\u00e9  here", "cafe\u0301 here", " caf\u00e9\nhere "]
    for seed in range(20):
        sides = [is_held_out(prompt_key(pair(text).prompt), seed=seed, fraction=0.5) for text in variants]
        assert len(set(sides)) == 1


def test_fraction_zero_holds_out_nothing() -> None:
    pairs = numbered(["a", "b"])
    assert split(pairs, fraction=0) == Split(pairs, [], 0)


def test_rows_samples_the_held_out_side_and_leaves_the_training_side_alone() -> None:
    pairs = numbered([str(n) for n in range(200)])
    whole, ten, twenty = (split(pairs, rows=rows) for rows in (None, 10, 20))
    assert whole is not None
    assert ten is not None
    assert twenty is not None
    assert ten.train == twenty.train == whole.train
    assert len(ten.held_out) == 10
    assert ten.held_out == [pair for pair in whole.held_out if pair in ten.held_out]
    assert {pair.row for pair in ten.held_out} < {pair.row for pair in twenty.held_out}


def test_nothing_left_to_train_on_is_an_error() -> None:
    """One prompt; sha256 of its key lies below 0.99 under seed 0."""
    with pytest.raises(DataError, match="no pairs are left to train on") as caught:
        split_pairs([pair("alone"), pair("alone", 1)], HeldOutSection(fraction=0.99), seed=0)
    assert "data.held_out.fraction" in str(caught.value.hint)


def held_out_file(path: Path, prompts: list[str]) -> Path:
    rows = [{"prompt": prompt, "chosen": "yes", "rejected": "no" if prompt else "yes"} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_held_out_source_takes_its_prompts_out_of_training(tmp_path: Path) -> None:
    """'b' stands twice in training and once, with other spaces, held out: two training pairs go. Row 1 is refused."""
    file = held_out_file(tmp_path / "held.jsonl", [" b ", "", "x"])
    train = numbered(["a", "b", "c", "b"])
    parts = split_pairs(train, HeldOutSection(source=str(file)), seed=0)
    assert parts == Split([train[0], train[2]], [pair(" b ", 0), pair("x", 2)], shared_prompts_dropped=2)


def test_rows_of_a_held_out_source_counts_usable_pairs(tmp_path: Path) -> None:
    """Of 30 rows 10 are refused; 20 usable ones are asked for and had. What is dropped from training stays the same."""
    prompts = [str(n) if n % 3 else "" for n in range(30)]
    file = held_out_file(tmp_path / "held.jsonl", prompts)
    train = numbered([str(n) for n in range(40)])
    parts = split_pairs(train, HeldOutSection(source=str(file), rows=20), seed=3)
    fewer = split_pairs(train, HeldOutSection(source=str(file), rows=5), seed=3)
    assert [len(parts.held_out), len(fewer.held_out)] == [20, 5]
    assert fewer.train == parts.train
    assert fewer.shared_prompts_dropped == parts.shared_prompts_dropped == 20


def test_a_held_out_source_equal_to_the_training_source_is_an_error(tmp_path: Path) -> None:
    file = held_out_file(tmp_path / "held.jsonl", ["a", "b"])
    with pytest.raises(DataError, match="no pairs are left to train on"):
        split_pairs(numbered(["a", "b"]), HeldOutSection(source=str(file)), seed=0)


def test_near_copies_of_a_prompt_are_on_its_side() -> None:
    """Twelve different questions, each in three spellings: by its hash alone a third of them would be parted."""
    topics = ["bread", "cheese", "wine", "chess", "tides", "moss", "glass", "rain", "salt", "owls", "clay", "tea"]
    prompts = [
        f"What should somebody who has never heard of {topic} read about {topic} first, and why that of all things{end}"
        for end in ("?", "??", " ?")
        for topic in topics
    ]
    for seed in range(5):
        parts = split_pairs(numbered(prompts), HeldOutSection(fraction=0.3), seed=seed)
        sides = [{pair.prompt[0].content.split()[8] for pair in side} for side in (parts.train, parts.held_out)]
        assert not sides[0] & sides[1]
        parted = sum(
            is_held_out(prompt_key(pair.prompt), seed=seed, fraction=0.3)
            != is_held_out(prompt_key(numbered(prompts)[pair.row % 12].prompt), seed=seed, fraction=0.3)
            for pair in (*parts.train, *parts.held_out)
        )
        assert parts.near_copies == parted


def test_questions_in_one_long_instruction_are_no_copies() -> None:
    """All of them on one side would leave nothing to train on, or to measure on: they go by their own hashes."""
    form = "You are given a review of a product. Say whether its author would buy it again, in a word. "
    pairs = numbered([form * 4 + f"Review {number}: fine" for number in range(200)])
    parts = split_pairs(pairs, HeldOutSection(fraction=0.1), seed=0)
    assert [is_held_out(prompt_key(pair.prompt), seed=0, fraction=0.1) for pair in pairs] == [
        pair in parts.held_out for pair in pairs
    ]
    assert parts.near_copies == 0 and parts.held_out
