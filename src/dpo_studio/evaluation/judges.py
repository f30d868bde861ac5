"""Judges: who decides which of two answers to the same prompt is better.

A judge sees the prompt and two completions and gives a verdict with a reason that a person can check. It never sees
which model wrote which answer. Judges are asked many comparisons at once, because an LLM answers several requests at a
time and a reward model reads a batch. This module holds the protocol and the judges that are rules; it loads no torch,
so a report can be judged again anywhere.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

from dpo_studio.errors import JudgeError, NonFiniteError, UsageError, reason_of
from dpo_studio.paths import user_path
from dpo_studio.preferences.pair import Message
from dpo_studio.sampling.completion import Completion

__all__ = [
    "Comparison",
    "Judge",
    "Opinion",
    "PricedJudge",
    "Progress",
    "RuleJudge",
    "ScoringJudge",
    "Verdict",
    "Winner",
    "add_judge",
    "added_judge",
    "as_text",
    "check_some_finite",
    "higher_wins",
    "in_both_orders",
    "judges_help",
    "longer_wins",
    "not_judged",
    "summary",
    "user_rule",
]

Winner = Literal["a", "b", "tie"]
Opinion = Literal["a", "b", "tie", "unparsable", "refused", "too long"]
"""A judge's opinion in one order: a winner, or why there is none."""
Progress = Callable[[int], None]
"""Receives how many more comparisons are judged."""


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt."""

    prompt: tuple[Message, ...]
    a: Completion
    b: Completion

    def swap(self) -> Comparison:
        """The same answers in the other order."""
        return Comparison(self.prompt, self.b, self.a)


@dataclass(frozen=True)
class Verdict:
    """Which answer is better, and why."""

    winner: Winner
    reason: str
    """One short plain sentence for the report."""
    by_order: tuple[Opinion, Opinion] | None = None
    """The opinions with A shown first and with B shown first, where the judge saw both orders."""
    judged: bool = True
    """False where the judge had no opinion: that is a tie, too, and counted."""


class Judge(Protocol):
    """Anything that compares completions. Swapping `a` and `b` must swap the verdict."""

    @property
    def name(self) -> str:
        """Short, for tables and file names."""

    @property
    def description(self) -> str:
        """What it goes by, in a sentence or a few, for the report."""

    def judge_all(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """A verdict on each comparison, in order.

        Raises:
            JudgeError: the judge cannot be asked. Whatever it can keep of what it has judged, it keeps.
        """


@runtime_checkable
class PricedJudge(Judge, Protocol):
    """A judge that costs money."""

    def cost(self, comparisons: Sequence[Comparison]) -> Mapping[str, float]:
        """What judging them would take, by name: `{"requests": 40, "dollars": 0.12}`."""


@runtime_checkable
class ScoringJudge(Judge, Protocol):
    """A judge that gives each answer a number by itself."""

    @property
    def fingerprint(self) -> str:
        """What tells its weights from others."""

    def score_all(
        self, answers: Sequence[tuple[Sequence[Message], Completion]], progress: Progress | None = None
    ) -> list[float | None]:
        """The number of each (prompt, answer); None where there is none."""


@dataclass(frozen=True)
class RuleJudge:
    """A judge from a rule that looks at one comparison at a time. It judges both orders, because a rule can have a
    position bias, too."""

    name: str
    description: str
    rule: Callable[[Comparison], Verdict]

    def judge_all(self, comparisons: Sequence[Comparison], progress: Progress | None = None) -> list[Verdict]:
        """A verdict on each comparison, in order."""
        verdicts = []
        for comparison in comparisons:
            shown_first, shown_second = self.rule(comparison), self.rule(comparison.swap())
            verdicts.append(in_both_orders(shown_first.winner, _SWAPPED[shown_second.winner], shown_first.reason))
            if progress is not None:
                progress(1)
        return verdicts


_SWAPPED: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}
_WINNERS = get_args(Winner)
_NO_VERDICT = {
    "unparsable": "no verdict could be read in the reply",
    "refused": "the judge refused",
    "too long": "the answers are too long for the judge",
}


def in_both_orders(a_first: Opinion, b_first: Opinion, reason: str) -> Verdict:
    """One verdict from the opinions in both orders; opinions that disagree are a tie."""
    failed = next((opinion for opinion in (a_first, b_first) if opinion not in _WINNERS), None)
    if failed is not None:
        return not_judged(_NO_VERDICT[failed], (a_first, b_first))
    if a_first != b_first:
        said = f"{_opinion_text(a_first)} when A came first, {_opinion_text(b_first)} when B did"
        return Verdict("tie", f"The judge disagrees with itself: {said}.", (a_first, b_first))
    return Verdict(cast("Winner", a_first), reason, (a_first, b_first))


def not_judged(why: str, by_order: tuple[Opinion, Opinion] | None = None) -> Verdict:
    """The tie of a comparison without an opinion."""
    return Verdict("tie", f"Not judged: {why}.", by_order, judged=False)


def higher_wins(a: float, b: float, reason: str) -> Verdict:
    """The verdict by a number of each answer; one that is not finite is not a result, but a tie with that reason."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return not_judged("there is no number to compare")
    return Verdict("tie" if a == b else "a" if a > b else "b", reason)


def check_some_finite(numbers: Sequence[float], judge: str) -> None:
    """Check that a judge has given any finite number: ties everywhere would look like equal answers.

    Raises:
        NonFiniteError: there are numbers, and none is finite.
    """
    if numbers and not any(map(math.isfinite, numbers)):
        raise NonFiniteError(
            f"none of the {len(numbers)} numbers of {judge} is finite", hint="its weights are damaged, or too large"
        )


def _opinion_text(opinion: Opinion) -> str:
    return "a tie" if opinion == "tie" else opinion.upper()


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What the verdicts were, and how far the judge can be trusted with the order it is shown the answers in.

    `first_shown_preferred` is the share of opinions that prefer an answer and prefer the one shown first: one half
    without position bias, None where there are no such opinions. `unparsable`, `refused` and `too_long` count opinions,
    of which a comparison has two; the other numbers count comparisons.
    """
    asked_twice = [verdict.by_order for verdict in verdicts if verdict.by_order is not None]
    opinions = Counter(opinion for orders in asked_twice for opinion in orders)
    first = sum((a_first == "a") + (b_first == "b") for a_first, b_first in asked_twice)
    preferring = opinions["a"] + opinions["b"]
    winners = Counter(verdict.winner for verdict in verdicts)
    return {
        "comparisons": len(verdicts),
        "a": winners["a"],
        "b": winners["b"],
        "ties": winners["tie"],
        "asked_in_both_orders": len(asked_twice),
        "orders_disagree": sum(x != y and x in _WINNERS and y in _WINNERS for x, y in asked_twice),
        "first_shown_preferred": first / preferring if preferring else None,
        "not_judged": sum(not verdict.judged for verdict in verdicts),
        "unparsable": opinions["unparsable"],
        "refused": opinions["refused"],
        "too_long": opinions["too long"],
    }


_OWN = {
    "everyday": "everyday",
    "length": "length",
    "implicit": "implicit:MODEL_OR_RUN",
    "reward": "reward:MODEL",
    "llm": "llm:MODEL@BASE_URL",
}
"""The package's judges, and how each is written. `FILE.py:function` is the other way to bring one's own."""
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


@dataclass(frozen=True)
class _Added:
    usage: str
    make: Callable[[str], Judge]


_added: dict[str, _Added] = {}


def add_judge(name: str, make: Callable[[str], Judge], *, usage: str | None = None) -> None:
    """Let `--judge NAME` or `--judge NAME:MORE` mean a judge that is not of this package.

    `make` gets MORE ("" where there is none) and returns the judge; it raises `UsageError` where MORE names none.
    `usage` is how help texts write it, such as `panel:MODEL,MODEL`. A judge that costs money is a
    `PricedJudge`: `dpo judge check --estimate` prints what it would cost and judges nothing.

    Raises:
        UsageError: the name is taken or none, or `usage` is of another judge.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r:.80} is not a judge's name", hint="small letters, digits, - and _")
    if name in _OWN or name in _added:
        raise UsageError(f"the judge {name!r} is there already", hint=f"taken are {judges_help()}")
    if usage is not None and usage.partition(":")[0] != name:
        raise UsageError(f"{usage!r:.80} is not how the judge {name!r} is written", hint=f"{name} or {name}:MORE")
    _added[name] = _Added(usage or name, make)


def added_judge(spec: str) -> Judge | None:
    """The judge that `spec` names, if it is one that was added."""
    name, _, more = spec.partition(":")
    return _added[name].make(more) if name in _added else None


def judges_help() -> str:
    """How judges are named, in one line, for help texts and hints."""
    own = [_OWN["everyday"], _OWN["length"], "FILE.py:function", _OWN["implicit"], _OWN["reward"]]
    names = [*own, *(added.usage for added in _added.values()), _OWN["llm"]]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def as_text(prompt: Sequence[Message]) -> str:
    """A prompt for a reader: a lone user turn as it is, a conversation with its roles named."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


def longer_wins() -> RuleJudge:
    """The baseline every judge must beat: more characters win."""

    def rule(comparison: Comparison) -> Verdict:
        a, b = len(comparison.a.text), len(comparison.b.text)
        return higher_wins(a, b, f"A has {a} characters, B has {b}.")

    return RuleJudge("length", "The answer with more characters wins; as many each is a tie.", rule)


def user_rule(spec: str) -> RuleJudge:
    """The judge in `FILE.py:function`. The file is the user's own code and is run as such.

    The function is called as `function(prompt, a, b)`, the prompt as text and the answers as `Completion`, once in
    each order. It returns "a", "b" or "tie", or a pair of that and a reason.

    Raises:
        UsageError: no such file or function.
        JudgeError: the file fails when it is run.
    """
    file, _, name = spec.rpartition(":")
    path = user_path(file)
    if not path.is_file():
        raise UsageError(f"--judge {spec}: no such file: {path}", hint="the form is FILE.py:function")
    found = importlib.util.spec_from_file_location(f"judge {path.stem}", path)  # a name that hides no other module
    if found is None or found.loader is None:
        raise UsageError(f"--judge {spec}: {path} is not a Python file", hint="the form is FILE.py:function")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look their own module up
    try:
        with redirect_stdout(sys.stderr):
            found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise JudgeError(f"{path} cannot be run: {_error_location(error, path)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise UsageError(f"--judge {spec}: {path} has no function {name!r}", hint=f"there is {there or 'none'}")
    about = (getattr(function, "__doc__", None) or f"The function {name} of {path.name}.").strip()
    return RuleJudge(f"{path.stem}:{name}", about, lambda comparison: _call(function, comparison, path, name))


def _call(function: Callable[..., Any], comparison: Comparison, path: Path, name: str) -> Verdict:
    try:
        with redirect_stdout(sys.stderr):  # what it prints is not among the data of the command
            said = function(as_text(comparison.prompt), comparison.a, comparison.b)
    except (Exception, SystemExit) as error:
        raise JudgeError(f"{path}, {name}: {_error_location(error, path)}", hint=_pair_hint(comparison)) from None
    winner, reason = said if isinstance(said, tuple) and len(said) == 2 else (said, f"{name} says so.")
    if isinstance(said, Verdict):
        winner, reason = said.winner, said.reason
    if not isinstance(winner, str) or winner not in _WINNERS or not isinstance(reason, str):
        raise JudgeError(
            f'{path}, {name} returned {said!r:.80}: expected "a", "b" or "tie", or a pair of that and a reason',
            hint=_pair_hint(comparison),
        )
    return Verdict(cast("Winner", winner), reason)


def _error_location(error: BaseException, path: Path) -> str:
    """The error and the line of the user's file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    at = f"line {lines[-1]}: " if lines else ""
    return f"{at}{type(error).__name__}: {reason_of(error)}"


def _pair_hint(comparison: Comparison) -> str:
    return f"the prompt was {comparison.prompt[-1].content[:80]!r}"
