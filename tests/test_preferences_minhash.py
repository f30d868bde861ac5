"""Near duplicates against the exact Jaccard similarity of the same pieces, counted with Python's sets."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_studio.preferences.minhash import SIMILAR, K, filled, nearest, signature, similarity
from tests.tiny_tokenizers import TEXT

WORDS = TEXT.split()


def pieces(text: str) -> set[bytes]:
    content = " ".join(text.lower().split()).encode().ljust(8)
    return {content[at : at + 8] for at in range(len(content) - 7)}


def jaccard(one: str, other: str) -> float:
    return len(pieces(one) & pieces(other)) / len(pieces(one) | pieces(other))


def estimate(one: str, other: str) -> float:
    both = filled(np.array([signature(one), signature(other)]))
    return float(similarity(both[0], both[1]))


def random_text(draw: random.Random, words: int) -> str:
    return " ".join("".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(words))


def changed(text: str, draw: random.Random, share: float) -> str:
    return " ".join(random_text(draw, 1) if draw.random() < share else word for word in text.split())


@pytest.mark.parametrize("words", [4, 12, 60, 400])
def test_the_estimate_is_the_jaccard_similarity(words: int) -> None:
    """Over 200 pairs of texts, long and so short that most places are borrowed: no bias over 0.02, and an error of
    the size that K places give, sqrt(J (1 - J) / K), here at most 0.044 at J = 1/2; borrowed places add to it."""
    draw = random.Random(words)
    errors = []
    for _ in range(200):
        text = random_text(draw, words)
        other = changed(text, draw, draw.random() / 3)
        errors.append(estimate(text, other) - jaccard(text, other))
    assert abs(np.mean(errors)) < 0.02
    assert np.sqrt(np.mean(np.square(errors))) < (0.05 if words >= 60 else 0.09)


def test_case_white_space_and_nothing_else_is_overlooked() -> None:
    assert estimate("How far is  the\nMoon from here?", "how far is the moon from here?") == 1
    assert estimate("2+2?", "2+3?") < SIMILAR
    assert estimate("月亮离地球有多远？大约三十八万公里。", "月亮离地球有多远？大约三十八万公里") > 0.5
    assert estimate("", "") == 1


def test_two_texts_together_have_the_least_of_their_signatures() -> None:
    one, other = random_text(random.Random(1), 50), random_text(random.Random(2), 50)
    together = np.minimum(signature(one), signature(other))
    union = pieces(one) | pieces(other)
    exact = len(union & pieces(one)) / len(union)
    both = filled(np.array([together, signature(one)]))
    assert float(similarity(both[0], both[1])) == pytest.approx(exact, abs=0.13)  # three standard errors


def test_near_copies_are_found_and_others_are_not() -> None:
    """500 texts and for every fifth a copy with one word in fifty changed (J near 0.9), among them at random: of the
    copies at least 98 % are found and each is traced to its own text; of the other texts not one is."""
    draw = random.Random(5)
    texts = [(random_text(draw, 100), -1) for _ in range(500)]
    copies = [(changed(texts[at][0], draw, 0.02), at) for at in range(0, 500, 5)]
    twins = nearest(filled(np.array([signature(text) for text, _ in [*texts, *copies]])))
    assert (twins[:500] == -1).all()
    near = [at for at, (text, of) in enumerate(copies) if jaccard(text, texts[of][0]) > 0.87]
    assert len(near) > 60
    assert sum(twins[500 + at] == copies[at][1] for at in near) >= 0.98 * len(near)


def test_copies_are_looked_for_within_a_group_and_among_the_known_alone() -> None:
    text = random_text(random.Random(3), 30)
    three = filled(np.array([signature(text)] * 3))
    assert nearest(three).tolist() == [-1, 0, 0]
    assert nearest(three, groups_N=np.array([0, 1, 0])).tolist() == [-1, -1, 0]
    assert nearest(three, known=1).tolist() == [-1, 0, 0]
    other = np.concatenate([filled(np.array([signature("something else altogether")])), three[:2]])
    assert nearest(other, known=1).tolist() == [-1, -1, -1]
    assert nearest(np.zeros((0, K), np.uint32)).tolist() == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=12))
def test_whatever_the_texts_a_repeat_is_found(texts: list[str]) -> None:
    signatures = filled(np.array([signature(text) for text in [*texts, *texts]]))
    assert (nearest(signatures)[len(texts) :] >= 0).all()
