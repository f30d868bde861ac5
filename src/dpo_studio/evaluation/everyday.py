"""The demo's judge: a rule about the form of everyday answers, so plain that anyone can check a verdict by eye."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from dpo_studio.evaluation.judges import RuleJudge, Verdict
from dpo_studio.sampling.completion import Completion

__all__ = ["EverydayRule", "content_stems", "everyday_judge"]


@dataclass(frozen=True)
class EverydayRule:
    """Short complete answers win; an empty answer loses.

    Two steps, the second only where the first does not decide:

    1. An answer is of use if it says something (at least `min_own_words` different content words that the prompt does
       not hold) about the subject (it shares the stem of a content word with the prompt, where the prompt has one).
       An answer of use beats one of no use, complete or not. Two answers of no use tie.
    2. Of two answers of use, the one with fewer faults wins; as many faults each is a tie. The faults, one point each:
       it never ended its turn; it gives contacts or blanks that it made up (telephone number, link, e-mail address,
       `[Your Name]`); it repeats itself (a sentence twice, or the same `repeat_words` words in a row three times);
       it ended, but after more than `max_words` words, where two or three sentences would do.

    The rule cannot tell whether advice is right, and it does not care about style or about which answer is longer.
    """

    name: ClassVar[str] = "everyday-rule"

    min_own_words: int = 8
    """Fewer different content words of its own than this, and an answer counts as empty."""
    max_words: int = 100
    """An answer that ended after more words than this rambles: it takes more than half a minute to read aloud."""
    repeat_words: int = 5
    """So many words in a row, met three times, count as repeating itself."""

    @property
    def description(self) -> str:
        """The rule in prose with its numbers, for the report."""
        return (
            f"An answer is of use if it says something about the subject: at least {self.min_own_words} different "
            "content words that the prompt does not contain, and at least one word that it shares with the prompt. An "
            "answer of use beats one of no use; two of no use tie. Between two answers of use the one with fewer "
            "faults wins, and equal counts tie. The faults: it never ended within the token limit; it gives a made-up "
            "telephone number, link, e-mail address or blank such as [Your Name]; it repeats a sentence, or the same "
            f"{self.repeat_words} words three times; it ended only after more than {self.max_words} words. The rule "
            "does not know whether the advice is right."
        )

    def __call__(self, prompt: str, a: Completion, b: Completion) -> Verdict:
        """The verdict on two answers to one prompt."""
        void_a, void_b = self.void(prompt, a.text), self.void(prompt, b.text)
        if void_a or void_b:
            return _verdict(bool(void_a), bool(void_b), void_a or "says something", void_b or "says something")
        faults_a, faults_b = self.faults(a), self.faults(b)
        return _verdict(len(faults_a), len(faults_b), _listed(faults_a), _listed(faults_b))

    def void(self, prompt: str, text: str) -> str | None:
        """Why the answer is of no use, or None where it is of use."""
        asked, said = content_stems(prompt), content_stems(text)
        if not said:
            return "says nothing"
        if len(said - asked) < self.min_own_words:
            return "says next to nothing"
        if asked and not asked & said:
            return "is not about the question"
        return None

    def faults(self, answer: Completion) -> tuple[str, ...]:
        """What is wrong with the form of an answer, as phrases that follow "the answer ...\""""
        found = []
        if not answer.ended:
            found.append("never ended")
        if _CONTACT.search(answer.text):
            found.append("makes up contacts or leaves blanks")
        if self.repeats(answer.text):
            found.append("repeats itself")
        if answer.ended and len(answer.text.split()) > self.max_words:
            found.append(f"rambles past {self.max_words} words")
        return tuple(found)

    def repeats(self, text: str) -> bool:
        """Whether a sentence comes twice or a run of `repeat_words` words three times."""
        sentences = Counter(s for part in re.split(r"[.!?\n]+", text.lower()) if len((s := part.strip()).split()) > 3)
        words = re.findall(r"[\w']+", text.lower())
        runs = Counter(tuple(words[i : i + self.repeat_words]) for i in range(len(words) - self.repeat_words + 1))
        return max(sentences.values(), default=0) > 1 or max(runs.values(), default=0) > 2


def everyday_judge() -> RuleJudge:
    """The rule as a judge: what was asked is the prompt's last turn."""
    rule = EverydayRule()
    return RuleJudge(rule.name, rule.description, lambda pair: rule(pair.prompt[-1].content, pair.a, pair.b))


def _verdict(badness_a: int, badness_b: int, about_a: str, about_b: str) -> Verdict:
    """The less bad one wins; the reason names both."""
    if badness_a == badness_b:
        shared = f"both {_plural(about_a)}" if about_a == about_b else f"A {about_a} and B {about_b}"
        return Verdict("tie", shared[0].upper() + shared[1:] + ".")
    if badness_a < badness_b:
        return Verdict("a", f"B {about_b}; A {about_a}.")
    return Verdict("b", f"A {about_a}; B {about_b}.")


def _listed(faults: tuple[str, ...]) -> str:
    return " and ".join(faults) if faults else "is complete"


_PLURALS = {
    "is ": "are ",
    "says ": "say ",
    "repeats itself": "repeat themselves",
    "rambles": "ramble",
    "makes up": "make up",
    "leaves": "leave",
}


def _plural(phrase: str) -> str:
    for one, many in _PLURALS.items():
        phrase = phrase.replace(one, many)
    return phrase


# A telephone number here has three groups of digits, so that "1-2 weeks", "100-200 g" and years stay innocent.
_CONTACT = re.compile(
    r"""https?://|\bwww\.|\b[\w.-]+\.(?:com|org|net|co\.uk)\b          # links
      | [\w.+-]+@[\w-]+\.\w+                                            # e-mail
      | (?<![\d.,$])\+?\(?\d{1,4}\)?[-\s.]\d{3}[-\s.]\d{3,4}\b          # 555-123-4567, +1 555 123 4567
      | \b\d-\d{3}-[\dA-Z]{3,}                                          # 1-800-SOMETHING
      | \[[^\]\d][^\]]{0,40}\]                                          # [Your Name]
    """,
    re.VERBOSE,
)

_LITTLE_WORDS = """
a about above after again against all almost already also although always am among an and another any anybody anyone
anything are around as ask at away back be became because become been before behind being below best better between
both but by came can cannot come could did didn do does doesn doing don done down during each easily easy either
else enough especially etc even ever every everyone everything few find first for from further gave general get gets
getting give given gives giving go goes going gone good got great had happen has have haven having he help helpful
helps her here hers him himself his how however i idea ideas if important in include including instead into is isn
it its itself just keep keeps kind know last least less let like likely little ll long look lot made main make makes
making many matter may maybe me might mine more most much must my myself need needs never new next no nor not
nothing now of off often ok okay old on once one only onto or other others our ours out over own part people perhaps
person place please possible probably problem put quick quickly quite rather re really right same say second see
seem several shall she should simple simply since situation so some somebody someone something sometimes soon start
still stop such sure take taken tell than that the their them themselves then there these they thing things think
this those though three through thus time tip to together too toward towards trick try trying two under until up
upon us use used useful using usually various ve very want was way ways we well were what whatever when where
whether which while who whole whom whose why will with within without won word wrong would yes yet you your yours
yourself hello hi sorry thank thanks question questions answer answers assistant ai understand provide sentence
sentences suggest suggestion
"""
_LITTLE = frozenset(_LITTLE_WORDS.split())


def content_stems(text: str) -> frozenset[str]:
    """The stems of the words that carry meaning: no little words, no endings, at most six letters.

    Cut so short, "photo", "photos" and "photograph" still differ from "phone", while "flower", "flowers" and
    "flowering" meet. A dictionary would do better; this needs none and can be checked by eye.
    """
    words = (word.split("'")[0] for word in re.findall(r"[a-z][a-z']*", text.lower()))
    return frozenset(_stem(word) for word in words if len(word) > 2 and word not in _LITTLE)


@lru_cache(maxsize=8192)
def _stem(word: str) -> str:
    for ending in ("ingly", "edly", "ing", "ies", "ied", "es", "ed", "ly", "s", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    if len(word) > 3 and word[-1] == word[-2]:  # "stopp" of "stopping"
        word = word[:-1]
    return word[:6]
