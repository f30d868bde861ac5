"""The public shapes: a raw row -> a Pair, or a `RowError` that says why not. One small pure function a format.

    trl               prompt, chosen, rejected, system: texts or messages; or chosen and rejected alone that begin alike
    ultrafeedback     prompt (text), chosen and rejected whole dialogues that begin with it
    hh                chosen and rejected whole transcripts: '\\n\\nHuman: ...\\n\\nAssistant: ...'
    alpaca-ranking    instruction, input, chosen, rejected; system, history (LLaMA-Factory)
    sharegpt-ranking  conversations [{from, value}], chosen {from, value}, rejected {from, value} (LLaMA-Factory)
    openai            input {messages} or messages; preferred_output, non_preferred_output
    orca              system, question, chosen, rejected (Intel's; Argilla's copy says input for question)
    argilla           instruction, chosen_response, rejected_response
    alpaca-eval       instruction, input, output_1, output_2, preference: from 1 (first) to 2 (second), 1.5 and 0 a tie
    pandalm           instruction, input, response1, response2, annotator1, ...: 1, 2 or 0 (tie); the majority holds
    helpsteer2        prompt, response_1, response_2, preference_strength: from -3 (first) to 3 (second), 0 a tie
    helpsteer3        context (messages), response1, response2, overall_preference: the same
    shp               history, human_ref_A, human_ref_B, labels: 1 (A) or 0 (B)
    webgpt            question {full_text}, answer_0, answer_1, score_0, score_1: the higher wins
    arena             conversation_a, conversation_b, winner: model_a, model_b, tie, tie (bothbad); MT-Bench's too
    arena-55k         prompt, response_a, response_b, each a list of texts as JSON; winner_model_a, ...: 0 or 1
    nectar            prompt (a transcript), answers [{answer, rank}]: the best against the worst
    nectar-all        the same: the best against each other one, several pairs a row
    ultrafeedback-raw instruction, completions [{response, fine-grained_score}]: the best against the worst
    label-studio      data, annotations; argilla-2: fields, responses (exports.py): the majority holds
    open-webui        data, meta, snapshot; langfuse: input, output, scores; studio-votes: answers, choice (votes.py)

A label that says tie is read before the answers: a tie is not a broken row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from dpo_studio.errors import UsageError
from dpo_studio.preferences.arena import arena, arena_55k
from dpo_studio.preferences.exports import argilla_2, is_flat_argilla, label_studio, majority
from dpo_studio.preferences.pair import Message, Pair
from dpo_studio.preferences.ranked import PairsRule, Ranked, nectar, nectar_all, pairs_of_ranked, raw_ultrafeedback
from dpo_studio.preferences.row_contents import is_empty, strange_in_row
from dpo_studio.preferences.turns import (
    Row,
    RowError,
    Turns,
    answers_to,
    conversation,
    dialogues,
    implicit,
    instruction_of,
    is_transcript,
    messages,
    number,
    opens_a_dialogue,
    text_of,
    transcript,
    turns_of,
    under_system,
    value_of,
    with_system,
)
from dpo_studio.preferences.votes import langfuse, open_webui, studio_vote

__all__ = ["FORMATS", "Parser", "add_format", "formats_help", "scores_of", "shape_of", "trl_implicit"]

Parser = Callable[[Row], Pair | list[Pair]]

_SCORES = (  # as UltraFeedback, distilabel and Argilla's sets name them
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("rating_chosen", "rating_rejected"),
)
_STRENGTH = 3  # HelpSteer's labels go from -3 to 3
_ANNOTATOR = re.compile(r"annotator\d+")
_EXTRA_ID_TURN = re.compile(r"(?:^|\n)<extra_id_1>(User|Assistant)\n")


def scores_of(row: Row, names: Iterable[tuple[str, str]] = _SCORES) -> tuple[float, float] | None:
    """The two answers' scores, from the first pair of these columns that holds two numbers."""
    for pair in names:
        if all(name in row for name in pair):
            try:
                return number(row, pair[0]), number(row, pair[1])
            except RowError:
                continue
    return None


def _preferred(prompt: str | Turns, row: Row, answers: tuple[str, str], leaning: float) -> Pair:
    """The pair of two columns: the first is preferred when `leaning` is negative, the second when it is positive."""
    if leaning == 0:
        raise RowError("tie")
    first, second = (value_of(row, name) for name in answers)
    return conversation(prompt, first, second) if leaning < 0 else conversation(prompt, second, first)


# Chosen and rejected


def _trl(row: Row) -> Pair:
    """`prompt`, `chosen`, `rejected`, each text or a message list; the answers may repeat the prompt.

    An empty prompt beside two whole dialogues hides none: what they share is it.
    """
    if _blank_beside_dialogues(row):
        return trl_implicit(row)
    pair = conversation(value_of(row, "prompt"), value_of(row, "chosen"), value_of(row, "rejected"))
    return replace(pair, prompt=with_system(pair.prompt, row.get("system")))


def trl_implicit(row: Row) -> Pair:
    """TRL's rows without a prompt, in a file that has no such column: what the answers share is the prompt."""
    pair = implicit(value_of(row, "chosen"), value_of(row, "rejected"))
    return replace(pair, prompt=with_system(pair.prompt, row.get("system")))


def _blank_beside_dialogues(row: Row) -> bool:
    return is_empty(row.get("prompt")) and all(opens_a_dialogue(row.get(side)) for side in ("chosen", "rejected"))


def _ultrafeedback(row: Row) -> Pair:
    if _blank_beside_dialogues(row):
        return trl_implicit(row)
    prompt = text_of(value_of(row, "prompt"), "prompt")
    chosen, rejected = (messages(value_of(row, side), side) for side in ("chosen", "rejected"))
    pair = dialogues(prompt, chosen, rejected)
    return replace(pair, prompt=with_system(pair.prompt, row.get("system")))


def _hh(row: Row) -> Pair:
    """Two transcripts that part at the last Assistant turn; the turns before may stand in a `prompt` of their own."""
    prompt = row.get("prompt")
    before = "" if prompt is None else text_of(prompt, "prompt")
    chosen, rejected = (_hh_side(before, text_of(value_of(row, side), side), side) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise RowError("the transcripts differ before the last answer")
    return answers_to(chosen[:-1], chosen[-1].content, rejected[-1].content)


def _hh_side(before: str, text: str, side: str) -> Turns:
    repeats = text.lstrip().startswith(before.strip())
    if not repeats and is_transcript(text):
        raise RowError("prompt differs from the dialogue")
    turns = transcript(text if repeats else before + text, side)
    if turns[-1].role != "assistant":
        raise RowError(f"{side} does not end with an assistant turn")
    return turns


def _alpaca_ranking(row: Row) -> Pair:
    prompt = (*_history(row.get("history")), Message("user", instruction_of(row)))
    chosen, rejected = value_of(row, "chosen"), value_of(row, "rejected")
    return answers_to(with_system(prompt, row.get("system")), chosen, rejected)


def _history(value: object) -> Iterable[Message]:
    """LLaMA-Factory's earlier turns: a list of [question, answer]."""
    for turn in value if isinstance(value, list) else () if value is None else (value,):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError("history is not a list of [question, answer]")
        yield Message("user", text_of(turn[0], "history"))
        yield Message("assistant", text_of(turn[1], "history"))


def _sharegpt_ranking(row: Row) -> Pair:
    prompt = with_system(messages(value_of(row, "conversations"), "prompt"), row.get("system"))
    chosen, rejected = (value_of(row, side) for side in ("chosen", "rejected"))
    return answers_to(prompt, *([side] if isinstance(side, dict) else side for side in (chosen, rejected)))


def _openai(row: Row) -> Pair:
    asked = row.get("input", row)
    if not isinstance(asked, dict):
        raise RowError("input is not an object")
    if (strange := strange_in_row(asked)) is not None:
        raise RowError(strange)
    prompt = messages(value_of(asked, "messages"), "prompt")
    return answers_to(prompt, value_of(row, "preferred_output"), value_of(row, "non_preferred_output"))


def _orca(row: Row) -> Pair:
    if row.get("status") == "tie":
        raise RowError("tie")
    name = "input" if "question" not in row and "input" in row else "question"
    prompt = with_system(turns_of(value_of(row, name), name, "user"), row.get("system"))
    return answers_to(prompt, value_of(row, "chosen"), value_of(row, "rejected"))


def _argilla(row: Row) -> Pair:
    return conversation(instruction_of(row), value_of(row, "chosen_response"), value_of(row, "rejected_response"))


# Two answers and a label


def _alpaca_eval(row: Row) -> Pair:
    label = number(row, "preference")
    if label != 0 and not 1 <= label <= 2:
        raise RowError("preference is neither 0 nor from 1 to 2", label)
    leaning = 0 if label == 0 else label - 1.5
    return _preferred(instruction_of(row), row, ("output_1", "output_2"), leaning)


def _pandalm(row: Row) -> Pair:
    names = [name for name in row if _ANNOTATOR.fullmatch(name)]
    votes = [number(row, name) for name in names or ["annotator1"]]
    strange = next((vote for vote in votes if vote not in (0, 1, 2)), None)
    if strange is not None:
        raise RowError("an annotator's label is not 0, 1 or 2", strange)
    leaning = {"0": 0, "1": -1, "2": 1}[majority([f"{vote:g}" for vote in votes])]
    return _preferred(instruction_of(row), row, ("response1", "response2"), leaning)


def _helpsteer2(row: Row) -> Pair:
    prompt = text_of(value_of(row, "prompt"), "prompt")
    opening, *parts = _EXTRA_ID_TURN.split(prompt)
    spoken = zip(parts[::2], parts[1::2], strict=True)
    first = [Message("user", opening)] if opening.strip() or not parts else []
    turns = (*first, *(Message(speaker.lower(), text) for speaker, text in spoken))
    return _by_strength(row, turns, ("response_1", "response_2"), "preference_strength")


def _helpsteer3(row: Row) -> Pair:
    context = turns_of(value_of(row, "context"), "context", "user")
    return _by_strength(row, context, ("response1", "response2"), "overall_preference")


def _by_strength(row: Row, prompt: Turns, answers: tuple[str, str], label: str) -> Pair:
    strength = number(row, label)
    if abs(strength) > _STRENGTH:
        raise RowError(f"{label} is not from -{_STRENGTH} to {_STRENGTH}", strength)
    return _preferred(prompt, row, answers, strength)


def _shp(row: Row) -> Pair:
    label = number(row, "labels")
    if label not in (0, 1):
        raise RowError("labels is neither 0 nor 1", label)
    prompt = text_of(value_of(row, "history"), "history")
    pair = _preferred(prompt, row, ("human_ref_A", "human_ref_B"), 1 - 2 * label)
    scores = scores_of(row, [("score_A", "score_B")])
    return replace(pair, scores=scores if scores is None or label == 1 else scores[::-1])


def _webgpt(row: Row) -> Pair:
    question = value_of(row, "question")
    asked = text_of(question.get("full_text") if isinstance(question, dict) else question, "question")
    scores = number(row, "score_0"), number(row, "score_1")
    pair = _preferred(asked, row, ("answer_0", "answer_1"), scores[1] - scores[0])
    return replace(pair, scores=(max(scores), min(scores)))


# Which is which


@dataclass(frozen=True)
class Format:
    """A public shape."""

    columns: frozenset[str]
    """What every row of it has."""
    parse: Parser
    """A row -> its pair, or its pairs; raises RowError."""
    ranked: Callable[[Row], Ranked] | None = None
    """A row -> its answers in order, where it has several; `parse` takes the best and the worst."""

    def parser(self, rule: PairsRule) -> Parser | None:
        """How rows become pairs by another rule; None where they hold no more than two answers."""
        ranked = self.ranked
        if ranked is None:
            return None
        return lambda row: [under_system(row, pair) for pair in pairs_of_ranked(ranked(row), rule)]


def _format(columns: Iterable[str], parse: Parser) -> Format:
    def parsed(row: Row) -> Pair | list[Pair]:
        pairs = parse(row)
        return [under_system(row, pair) for pair in pairs] if isinstance(pairs, list) else under_system(row, pairs)

    return Format(frozenset(columns), parsed)


def _of_ranked(columns: Iterable[str], ranked: Callable[[Row], Ranked]) -> Format:
    return replace(_format(columns, lambda row: pairs_of_ranked(ranked(row), "best-worst")), ranked=ranked)


FORMATS: dict[str, Format] = {
    "trl": _format(["chosen", "rejected"], _trl),
    "ultrafeedback": _format(["prompt", "chosen", "rejected"], _ultrafeedback),
    "hh": _format(["chosen", "rejected"], _hh),
    "sharegpt-ranking": _format(["conversations", "chosen", "rejected"], _sharegpt_ranking),
    "alpaca-ranking": _format(["instruction", "chosen", "rejected"], _alpaca_ranking),
    "openai": _format(["preferred_output", "non_preferred_output"], _openai),
    "orca": _format(["chosen", "rejected"], _orca),
    "argilla": _format(["instruction", "chosen_response", "rejected_response"], _argilla),
    "alpaca-eval": _format(["instruction", "output_1", "output_2", "preference"], _alpaca_eval),
    "pandalm": _format(["instruction", "response1", "response2", "annotator1"], _pandalm),
    "helpsteer2": _format(["prompt", "response_1", "response_2", "preference_strength"], _helpsteer2),
    "helpsteer3": _format(["context", "response1", "response2", "overall_preference"], _helpsteer3),
    "shp": _format(["history", "human_ref_A", "human_ref_B", "labels"], _shp),
    "webgpt": _format(["question", "answer_0", "answer_1", "score_0", "score_1"], _webgpt),
    "arena": _format(["conversation_a", "conversation_b", "winner"], arena),
    "arena-55k": _format(
        ["prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"], arena_55k
    ),
    "studio-votes": _format(["prompt", "answers", "models", "choice", "shown_order_seed"], studio_vote),
    "nectar": _of_ranked(["prompt", "answers"], nectar),
    "nectar-all": _format(["prompt", "answers"], nectar_all),
    "ultrafeedback-raw": _of_ranked(["instruction", "models", "completions"], raw_ultrafeedback),
    "label-studio": _format(["data", "annotations"], label_studio),
    "argilla-2": _format(["fields", "responses"], argilla_2),
    "open-webui": _format(["data", "meta", "snapshot"], open_webui),
    "langfuse": _format(["id", "input", "output", "scores"], langfuse),
}


_OWN = frozenset(FORMATS)
_OTHER_NAMES = frozenset({"auto", "mapped"})
"""What `format` may say besides the name of a format."""
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


def add_format(name: str, columns: Iterable[str], parse: Parser) -> None:
    """Read a shape of rows that is not of this package: `format: NAME` in a recipe, `--format NAME`.

    `parse` makes a pair, or several, of a row that has all the `columns`, and raises `RowError` where it cannot. A file
    whose columns fit is also found by `format: auto`, unless one of the package's own formats fits it.

    Raises:
        UsageError: the name is taken or none, or no column is named.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r:.80} is not a format's name", hint="small letters, digits, - and _")
    if name in FORMATS or name in _OTHER_NAMES:
        raise UsageError(f"the format {name!r} is there already", hint=f"taken are {formats_help()}")
    named = [columns] if isinstance(columns, str) else list(columns)
    if not named or not all(named):
        raise UsageError(f"the format {name!r} names no columns", hint="the columns that every row of it has")
    FORMATS[name] = _format(named, parse)


def formats_help() -> str:
    """What `format` may be, in one line, for help texts and hints."""
    return ", ".join([*sorted(_OTHER_NAMES), *FORMATS])


def shape_of(row: Row) -> str | None:
    """The format this one row looks like: one of ours, else one that was added."""
    known = _own_shape(row)
    if known is not None:
        return known
    added = (name for name in FORMATS if name not in _OWN)
    return next((name for name in added if FORMATS[name].columns <= row.keys()), None)


def _own_shape(row: Row) -> str | None:
    if {"chosen", "rejected"} <= row.keys():
        return _chosen_shape(row)
    if is_flat_argilla(row):
        return "argilla-2"
    return next((name for name in FORMATS if name in _OWN and FORMATS[name].columns <= row.keys()), None)


def _chosen_shape(row: Row) -> str | None:
    chosen, prompt = row["chosen"], row.get("prompt")
    if is_transcript(prompt) or is_transcript(chosen):
        return "hh"
    if "prompt" in row:
        return "ultrafeedback" if isinstance(prompt, str) and opens_a_dialogue(chosen) else "trl"
    for name in ("sharegpt-ranking", "alpaca-ranking"):
        if FORMATS[name].columns <= row.keys():
            return name
    if "question" in row or {"system", "input"} <= row.keys():
        return "orca"
    # Texts without a prompt column are TRL's implicit shape only when there is no other column: in a file of
    # `topic, chosen, rejected` the words two answers happen to begin with are not the prompt.
    return "trl" if isinstance(chosen, list) or row.keys() == {"chosen", "rejected"} else None
