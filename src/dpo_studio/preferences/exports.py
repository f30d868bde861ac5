"""What annotation tools export: the users' own columns, and what each annotator said. More than half must agree.

    label-studio   data {prompt, answer1, answer2}, annotations [{result: [{value: {selected: left}}]}]
    argilla-2      fields {prompt, response_a, response_b}, responses {preference: [{value, user_id, status}]};
                   or one column each, preference.responses being a list (what `to_datasets` writes)

Columns are found by their names where these are unambiguous (`guesses.py`), else `--map` names them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dpo_studio.preferences.guesses import answer_columns, meaning_of, prompt_column
from dpo_studio.preferences.pair import Pair
from dpo_studio.preferences.turns import Row, RowError, conversation, value_of

__all__ = ["argilla_2", "is_flat_argilla", "label_studio", "majority"]

_NO_MAJORITY = "tie: no majority of annotators"
_COLUMNS = "its columns do not say which is the prompt and which two are the answers; --map names them"


def majority(meanings: Sequence[str]) -> str:
    """The value of more than half of the annotators; the first of them alone does not decide.

    Raises:
        RowError: no meaning has more than half of the votes, which is a tie, or there is no vote.
    """
    if not meanings:
        raise RowError("no annotator has labelled it")
    meaning, votes = Counter(meanings).most_common(1)[0]
    if 2 * votes <= len(meanings):
        raise RowError(_NO_MAJORITY)
    return meaning


def label_studio(row: Row) -> Pair:
    """A task with its annotations, of which cancelled ones and empty ones do not count."""
    data = value_of(row, "data")
    annotations = value_of(row, "annotations")
    if not isinstance(data, dict) or not isinstance(annotations, list):
        raise RowError("data is not an object, or annotations is not a list")
    votes: list[object] = []
    for one in annotations:
        if isinstance(one, dict) and not one.get("was_cancelled"):
            votes += _selected(one.get("result"))
    return _voted(data, votes)


def _selected(results: object) -> list[object]:
    """What one annotator selected: of a Pairwise tag left or right, of Choices the one choice."""
    found: list[object] = []
    for result in results if isinstance(results, list) else []:
        value = result.get("value") if isinstance(result, dict) else None
        if isinstance(value, dict) and "selected" in value:
            found.append(value["selected"])
        elif isinstance(value, dict) and isinstance(value.get("choices"), list) and len(value["choices"]) == 1:
            found.append(value["choices"][0])
    if len(found) > 1:
        raise RowError("an annotator answered several questions; --map names the one that counts")
    return found


def argilla_2(row: Row) -> Pair:
    """A record with the submitted responses to its one question; suggestions are a model's and do not count."""
    fields, responses = row.get("fields"), row.get("responses")
    if not isinstance(fields, dict) or not isinstance(responses, dict):
        fields, responses = _from_flat(row)
    answered = {name: said for name, said in responses.items() if isinstance(said, list) and said}
    if len(answered) > 1:
        raise RowError("its annotators answered several questions; --map names the one that counts")
    said = [one for each in answered.values() for one in each if isinstance(one, dict)]
    return _voted(fields, [one.get("value") for one in said if one.get("status", "submitted") == "submitted"])


def is_flat_argilla(row: Row) -> bool:
    """Whether a row has a question's columns as `to_datasets` names them."""
    return any(f"{name.removesuffix('.responses')}.responses.users" in row for name in _questions(row))


def _questions(row: Row) -> list[str]:
    return [name for name in row if isinstance(name, str) and name.endswith(".responses")]


def _from_flat(row: Row) -> tuple[Row, Row]:
    """The same columns as a record has them."""
    responses: Row = {}
    for name in _questions(row):
        values, states = row[name], row.get(f"{name}.status")
        if isinstance(values, list):
            known = states if isinstance(states, list) and len(states) == len(values) else ["submitted"] * len(values)
            responses[name] = [{"value": value, "status": state} for value, state in zip(values, known, strict=True)]
    return {name: value for name, value in row.items() if "." not in str(name)}, responses


def _voted(columns: Row, votes: Sequence[object]) -> Pair:
    texts = [name for name, value in columns.items() if isinstance(value, str | list)]
    prompt = prompt_column(texts)
    answers = answer_columns(name for name in texts if name != prompt)
    if prompt is None or answers is None:
        raise RowError(_COLUMNS)
    meanings = []
    for vote in votes:
        meaning = meaning_of(vote, *answers)
        if meaning is None:
            raise RowError("an annotator's value names neither of the answers nor a tie", vote)
        meanings.append(meaning)
    winner = majority(meanings)
    if winner == "tie":
        raise RowError("tie")
    first, second = (value_of(columns, name) for name in (answers if winner == "first" else answers[::-1]))
    return conversation(value_of(columns, prompt), first, second)
