"""`dpo data make`: prompts -> answers of models and servers -> a judge's scores -> preference pairs, with their origin.

Whatever takes long is kept in OUT.work as it comes, so the same command continues one that was stopped. With models and
judges of this machine it then writes the same bytes; a server's replies are kept and never asked for again.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_studio.config import SourceLike, as_source
from dpo_studio.console.progress import Progress
from dpo_studio.errors import DataError, UsageError
from dpo_studio.evaluation.judges import Judge
from dpo_studio.evaluation.llm_judge import check_replies
from dpo_studio.export.card import public_name
from dpo_studio.preferences.pair import Message, Pair, trl_row
from dpo_studio.preferences.prompts import PromptSource, read_prompts
from dpo_studio.preferences.turns import Turns
from dpo_studio.sampling.completion import Completion
from dpo_studio.tokens.chat import ChatEncoder
from dpo_studio.workflows.judging import LLMOptions, judge_from
from dpo_studio.workflows.loading import find_any
from dpo_studio.workflows.making.answering import local_answers
from dpo_studio.workflows.making.card import card_of
from dpo_studio.workflows.making.choosing import Choice, Rated, choose
from dpo_studio.workflows.making.rating import Question, Ratings, rate
from dpo_studio.workflows.making.servers import Server, ServerOptions
from dpo_studio.workflows.making.work import Work, check_work, held_work
from dpo_studio.workflows.talking import Sampling, check_batched
from dpo_studio.writing import appearing, check_outputs, check_run_place, stream_of

__all__ = ["Making", "make_pairs"]

_SERVER = re.compile(r"server:(?P<model>.+?)@(?P<url>https?://.*)")
_HEAVY = ("reward:", "implicit:")
"""Judges that are loaded when the models that answer are gone."""


@dataclass(frozen=True)
class Making:
    """How answers are drawn, and pairs chosen."""

    samples: int = 4
    """Answers of each model to a prompt."""
    temperature: float = 1.0
    max_new_tokens: int = 512
    """Longest answer; one that reaches it is cut, and loses."""
    seed: int = 0
    choice: Choice = field(default_factory=Choice)
    round: int | None = None
    """Which round of several these pairs are of; written into each row."""

    @property
    def sampling(self) -> Sampling:
        """How one answer is drawn."""
        return Sampling(self.temperature, self.max_new_tokens, 1.0, self.seed)


@dataclass(frozen=True)
class Answer:
    """One answer, and where it comes from."""

    model: str
    """As the rows name it."""
    sample: int
    completion: Completion


@dataclass
class Drawn:
    """The answers to all prompts, and what was counted."""

    answers: dict[str, list[Answer]]
    """By prompt key, in the order of models and samples: different texts, none of them empty."""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What there is to say of each model."""
    identical: int = 0
    """Answers that repeat the text of another one to the same prompt."""
    encoder: ChatEncoder | None = None
    """Of the first model of this machine."""


def make_pairs(
    prompts: SourceLike,
    out: Path,
    models: Sequence[str],
    judge: str,
    *,
    settings: Making | None = None,
    held_out: SourceLike | None = None,
    llm: LLMOptions | None = None,
    server: ServerOptions | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write preference pairs to `out` and their card beside it; return what was counted.

    `models`: models, runs, or `server:NAME@URL`. Prompts of `held_out` make no pair, and are counted.

    Raises:
        DataError: the prompts cannot be used, no pair was made, or `out` exists and nobody said `overwrite`.
        DPOStudioError: a model, a server or the judge cannot be used. What was got so far is kept.
    """
    making, options = settings or Making(), llm or LLMOptions()
    source, apart = as_source(prompts), None if held_out is None else as_source(held_out)
    work = out.parent / f"{out.name}.work"
    reads = [source.source, None if apart is None else apart.source, options.template, *models, judge.partition(":")[2]]
    check_arguments(models, judge, making)
    check_out(out, reads, overwrite=overwrite)
    with progress or Progress() as shown:
        for name in models:
            if _SERVER.fullmatch(name) is None:
                find_any(name, say=shown.say)
        if judge.startswith(_HEAVY):
            find_any(judge.partition(":")[2], with_reference=judge.startswith("implicit:"), say=shown.say)
        asked = read_prompts(source, seed=making.seed)
        left = asked.prompts
        if apart is not None:
            measured = read_prompts(apart).prompts
            left = {key: turns for key, turns in left.items() if key not in measured}
        leaked = len(asked.prompts) - len(left)
        shown.say(f"{asked.name}: {len(asked.prompts):,} prompts, {leaked:,} of them held out and left out")
        if not left:
            raise DataError(f"{asked.name}: every prompt is held out", hint="name other prompts")
        with held_work(work, shown.warn) as held:
            asked_judge = None if judge.startswith(_HEAVY) else _judge(judge, options, held, shown)
            drawn = _draw(left, models, making, server or ServerOptions(), held, shown)
            found = asked_judge or _judge(judge, options, held, shown)
            rows, counted = _choose(left, drawn, found, making, held, shown)
        about = _about(asked, leaked, drawn, found, making) | counted
        if not rows:
            why = ", ".join(f"{count} x {reason}" for reason, count in about["without_a_pair"].items())
            raise DataError(f"no pair was made of {len(left)} prompts: {why}", hint=f"the answers are kept in {work}")
        card = card_beside(out)
        with appearing([out, card], overwrite=overwrite) as (lines, page):
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            page.write(card_of(out.name, about))
        return about | {"out": str(out), "card": str(card)}


def check_arguments(models: Sequence[str], judge: str, making: Making) -> None:
    """Before anything is read.

    Raises:
        UsageError: they make no pair, whatever the answers are.
    """
    if not models:
        raise UsageError("no model answers the prompts", hint="--model MODEL, once or more")
    if len(set(models)) < len(models):
        raise UsageError("a model is named twice", hint="--samples draws more answers of each")
    if making.samples < 1:
        raise UsageError(f"--samples {making.samples} is less than 1")
    check_batched(making.sampling, making.samples)
    if making.samples * len(models) < 2:
        raise UsageError("one answer to a prompt makes no pair", hint="--samples 4, or another --model")
    if judge == "implicit":
        raise UsageError("implicit needs the model whose reward judges", hint="--judge implicit:RUN")
    for name in models:
        if name.startswith("server:") and _SERVER.fullmatch(name) is None:
            raise UsageError(f"--model {name!r} names no server", hint="server:NAME@http://localhost:8000/v1")


def check_out(out: Path, reads: Sequence[str | Path | None], *, overwrite: bool) -> None:
    """Whether OUT, its card and OUT.work can be written.

    Raises:
        UsageError, DataError, RunError: as `writing.check_outputs`; or OUT.work is something else's.
    """
    if stream_of(out) is not None:
        raise UsageError("OUT is a file: what is kept on the way stands beside it", hint="name one that ends in .jsonl")
    check_outputs([("OUT", out), ("OUT's card", card_beside(out))], reads=reads, overwrite=overwrite)
    work = out.parent / f"{out.name}.work"
    check_run_place(work, reads, option="OUT.work")
    check_work(work)


def card_beside(out: Path) -> Path:
    """The data card of a file of pairs: `pairs.jsonl` -> `pairs.card.md`."""
    return out.parent / f"{out.name.removesuffix('.jsonl')}.card.md"


def _judge(spec: str, options: LLMOptions, work: Work, progress: Progress) -> Judge:
    """An LLM judge's replies are kept in OUT.work unless the options name a file."""
    if spec.startswith("llm:") and options.replies is None:
        options = LLMOptions(
            options.template, options.parameters, options.price, work.folder / "judge replies.jsonl", options.asking
        )
    elif options.replies is not None:
        check_replies(options.replies, [options.template])
    return judge_from(spec, llm=options, say=progress.say)


# Answers


def _draw(
    prompts: Mapping[str, Turns],
    models: Sequence[str],
    making: Making,
    options: ServerOptions,
    work: Work,
    progress: Progress,
) -> Drawn:
    """Every model's answers to every prompt: different ones, none empty."""
    drawn = Drawn({key: [] for key in prompts})
    for name, label in zip(models, _labels(models), strict=True):
        about: dict[str, Any] = {}
        if (found := _SERVER.fullmatch(name)) is not None:
            of_server = Server(
                found["model"],
                found["url"],
                work.folder,
                options=options,
                temperature=making.temperature,
                max_new_tokens=making.max_new_tokens,
                seed=making.seed,
                say=progress.say,
            )
            answers, bill = of_server.answers(prompts, making.samples, progress)
            about |= {"server": of_server.url, "bill": asdict(bill)}
        else:
            written = local_answers(name, prompts, making.samples, making.sampling, work, progress)
            answers, drawn.encoder = written.answers, drawn.encoder or written.encoder
            about["fingerprint"] = written.fingerprint
        drawn.models[label] = about | _counts(answers)
        for key, samples in answers.items():
            for sample, answer in enumerate(samples):
                if not isinstance(answer, str) and answer.text.strip():
                    drawn.identical += not _add(drawn.answers[key], Answer(label, sample, answer))
    return drawn


def _labels(models: Sequence[str]) -> list[str]:
    """How rows name the models: never by a path of this machine, a second one of a name with a number."""
    names = [f"server:{found['model']}" if (found := _SERVER.fullmatch(name)) else public_name(name) for name in models]
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return labels


def _counts(answers: Mapping[str, Sequence[Completion | str]]) -> dict[str, Any]:
    every = [answer for samples in answers.values() for answer in samples]
    given = [answer for answer in every if not isinstance(answer, str)]
    return {
        "asked": len(every),
        "answers": len(given),
        "cut": sum(not answer.ended for answer in given),
        "empty": sum(not answer.text.strip() for answer in given),
        "no_answer": dict(Counter(answer for answer in every if isinstance(answer, str)).most_common()),
    }


def _add(answers: list[Answer], answer: Answer) -> bool:
    """Whether its text is a new one. Of one text, an answer that ended stands for one that was cut there."""
    text = answer.completion.text.strip()
    for at, other in enumerate(answers):
        if other.completion.text.strip() == text:
            if answer.completion.ended and not other.completion.ended:
                answers[at] = answer
            return False
    answers.append(answer)
    return True


# Pairs


def _choose(
    prompts: Mapping[str, Turns], drawn: Drawn, judge: Judge, making: Making, work: Work, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(the rows, what was counted on the way)."""
    keys = list(prompts)
    tokens, unit = _tokens(keys, drawn)
    questions = [Question(prompts[key], [answer.completion for answer in drawn.answers[key]]) for key in keys]
    ratings, verdicts = rate(questions, judge, work.folder, progress)
    rows: list[dict[str, Any]] = []
    without: Counter[str] = Counter()
    lengths: list[tuple[int, int]] = []
    for key, rating in zip(keys, ratings, strict=True):
        answers = drawn.answers[key]
        rated = [
            Rated(score, not answer.completion.ended, count)
            for score, answer, count in zip(rating.scores, answers, tokens[key], strict=True)
        ]
        chosen, why = choose(rated, making.choice, rating.unjudged)
        if why:
            without[why] += 1
        for both in chosen:
            one, other = both
            lengths.append((tokens[key][one], tokens[key][other]))
            rows.append(_row(key, prompts[key], (answers[one], answers[other]), rating, both, judge.name, making))
    counted = {
        "verdicts": verdicts,
        "pairs": len(rows),
        "prompts_with_pairs": len(prompts) - sum(without.values()),
        "without_a_pair": dict(without.most_common()),
        "lengths": _length_facts(lengths, unit),
    }
    return rows, counted


def _row(
    key: str,
    prompt: Turns,
    answers: tuple[Answer, Answer],
    rating: Ratings,
    both: tuple[int, int],
    judge: str,
    making: Making,
) -> dict[str, Any]:
    """A pair as OUT has it: TRL's conversational shape, and where it comes from."""
    chosen, rejected = ((Message("assistant", one.completion.text, ended=one.completion.ended),) for one in answers)
    pair = Pair(prompt, chosen, rejected)
    made = {
        "prompt_key": key,
        "models": [answer.model for answer in answers],
        "sampling": {
            "temperature": making.temperature,
            "max_new_tokens": making.max_new_tokens,
            "seed": making.seed,
            "samples": [answer.sample for answer in answers],
        },
        "judge": judge,
        "scores": [rating.scores[at] for at in both],
        "round": making.round,
    }
    return trl_row(pair) | {"made": made}


def _tokens(keys: Sequence[str], drawn: Drawn) -> tuple[dict[str, list[int]], str]:
    """({key: the length of each answer}, its unit): counts of different tokenizers are not compared.

    As drawn where one vocabulary wrote all answers; else by the first model of this machine; else by words.
    """
    every = [answer.completion for key in keys for answer in drawn.answers[key]]
    if len({answer.vocabulary for answer in every}) == 1 and every[0].vocabulary:
        return {key: [one.completion.tokens for one in drawn.answers[key]] for key in keys}, "tokens"
    if drawn.encoder is None:
        return {key: [len(one.completion.text.split()) for one in drawn.answers[key]] for key in keys}, "words"
    counts = iter(drawn.encoder.token_counts([answer.text for answer in every]))
    return {
        key: [next(counts) + one.completion.ended for one in drawn.answers[key]] for key in keys
    }, "tokens of the first model"


def _length_facts(lengths: Sequence[tuple[int, int]], unit: str) -> dict[str, Any]:
    count = len(lengths)
    if not count:
        return {"unit": unit}
    chosen, rejected = (sum(both[side] for both in lengths) / count for side in (0, 1))
    longer = sum((one > other) + (one == other) / 2 for one, other in lengths) / count
    return {"unit": unit, "chosen": round(chosen, 2), "rejected": round(rejected, 2), "chosen_longer": round(longer, 4)}


def _about(asked: PromptSource, leaked: int, drawn: Drawn, judge: Judge, making: Making) -> dict[str, Any]:
    return {
        "source": public_name(asked.name),
        "rows": asked.rows,
        "refused": dict(asked.refused.counts.most_common()),
        "prompts": len(asked.prompts),
        "held_out": leaked,
        "models": drawn.models,
        "identical": drawn.identical,
        "judge": judge.name,
        "judge_description": judge.description,
        "settings": {name: value for name, value in asdict(making).items() if name != "choice"} | asdict(making.choice),
    }
