"""`dpo judge check`: a judge against human labels; and how a judge is named on the command line.

Nothing here imports torch until a judge needs it: an LLM judge runs where there is none to spare.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_studio.config import SourceLike, as_source, cache_folder
from dpo_studio.console.progress import Progress
from dpo_studio.errors import DataError, JudgeError, UsageError
from dpo_studio.evaluation.agreement import agreement, leave_one_out, majority
from dpo_studio.evaluation.endpoint import Asking, Endpoint
from dpo_studio.evaluation.everyday import everyday_judge
from dpo_studio.evaluation.judges import (
    Comparison,
    Judge,
    PricedJudge,
    Verdict,
    Winner,
    added_judge,
    judges_help,
    longer_wins,
    summary,
    user_rule,
)
from dpo_studio.evaluation.llm_judge import LLMJudge, check_replies
from dpo_studio.evaluation.llm_parameters import check_parameters
from dpo_studio.evaluation.llm_template import TEMPLATE, read_template
from dpo_studio.paths import user_path
from dpo_studio.preferences.labelled import Label, Labelled, LabelledSource, read_labelled
from dpo_studio.preferences.pair import prompt_key
from dpo_studio.sampling.completion import Completion
from dpo_studio.writing import check_outputs, write_output

__all__ = ["LLMOptions", "check_judge", "judge_from"]

_LLM = re.compile(r"llm:(?P<model>.+?)@(?P<url>https?://.*)")


@dataclass(frozen=True)
class LLMOptions:
    """The command line's options of an LLM judge, besides its name."""

    template: Path | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Parameters sent with every request; None removes one."""
    price: tuple[float, float] | None = None
    replies: Path | None = None
    """Default: a file in the cache, by the model's name."""
    asking: Asking = field(default_factory=Asking)


def judge_from(
    spec: str,
    *,
    loaded: Any = None,
    dtype: str | None = None,
    llm: LLMOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Judge:
    """The judge that `spec` names. `implicit` without a model means `loaded` (a `workflows.loading.LoadedModel`).

    A `FILE.py:function` is the user's own code, loaded because the user names it here; nothing else loads any.

    Raises:
        UsageError: `spec` names no judge.
        ModelError, RunError, JudgeError: it cannot be had.
    """
    kind, colon, rest = spec.partition(":")
    if spec == "everyday":
        return everyday_judge()
    if spec == "length":
        return longer_wins()
    if spec.rpartition(":")[0].endswith(".py"):
        return user_rule(spec)
    if (added := added_judge(spec)) is not None:
        return added
    if kind == "implicit" and (rest or (loaded is not None and not colon)):
        return _implicit(rest, loaded, dtype, say)
    if kind == "reward" and rest:
        from dpo_studio.evaluation.reward_model import load_reward_model

        return load_reward_model(rest, dtype=dtype or "auto", say=say)
    if found := _LLM.fullmatch(spec):
        return _llm(found["model"], found["url"], llm or LLMOptions(), say)
    raise UsageError(f"--judge {spec!r} names no judge", hint=f"one of {judges_help()}")


def _implicit(name: str, loaded: Any, dtype: str | None, say: Callable[[str], None]) -> Judge:
    from dpo_studio.evaluation.implicit import ImplicitReward
    from dpo_studio.models.fingerprint import weights_fingerprint
    from dpo_studio.workflows.loading import load_any

    if name:
        loaded = load_any(name, dtype=dtype, with_reference=True, say=say)
    loaded.check_reference()
    if loaded.adapter is None:
        raise JudgeError(
            f"{name or loaded.base.typed} has no adapter: policy and reference are the same, every reward is 0",
            hint="implicit:RUN needs a run or an adapter folder",
        )
    beta = loaded.beta if loaded.beta is not None else 0.1
    fingerprint = f"{loaded.base.files.fingerprint} {weights_fingerprint(loaded.adapter)}"
    return ImplicitReward(name or str(loaded.adapter), loaded.policy, loaded.base.encoder, beta, fingerprint)


def _llm(model: str, url: str, options: LLMOptions, say: Callable[[str], None]) -> LLMJudge:
    wanted = {"temperature": 0, "max_tokens": 512} | dict(options.parameters)
    parameters = {name: value for name, value in wanted.items() if value is not None}
    check_parameters(parameters)
    if options.price is not None and not all(0 <= price < float("inf") for price in options.price):
        raise UsageError(f"--judge-price {options.price} is not a pair of prices")
    slug = re.sub(r"[^\w.-]+", "-", model)
    replies = options.replies or cache_folder() / "judge-replies" / f"{slug}.jsonl"
    check_replies(replies, [options.template])
    return LLMJudge(
        model=model,
        endpoint=Endpoint(url, options.asking, say),
        replies=replies,
        template=TEMPLATE if options.template is None else read_template(user_path(options.template)),
        parameters=parameters,
        price=options.price,
        say=say,
    )


def check_judge(
    source: SourceLike,
    spec: str,
    *,
    annotators: Sequence[str] = (),
    dtype: str | None = None,
    llm: LLMOptions | None = None,
    estimate_only: bool = False,
    out: Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a judge against the labels of a source; `out` gets one JSON line a comparison.

    With `estimate_only` nothing is judged, and what an LLM judge would cost is returned.

    Raises:
        DPOStudioError: the source or the judge cannot be used.
    """
    source = as_source(source)
    options = llm or LLMOptions()
    reads = [source.source, options.template, *_files_of(spec)]
    if options.replies is not None:
        check_replies(options.replies, reads)
    if out is not None:
        kept = {"--judge-replies": options.replies}
        check_outputs({"--out": out}, reads=reads, continued=kept, overwrite=overwrite)
    with progress or Progress() as shown:
        read = read_labelled(source, annotators, seed=seed)
        rows = [row for row in read.comparisons if len(row.pair.chosen) == len(row.pair.rejected) == 1]
        if not rows:
            raise DataError(f"{read.name}: every answer has several turns, and judges compare single ones")
        flips = [_flip(seed, row.pair.row) for row in rows]
        comparisons = [_comparison(row, flip) for row, flip in zip(rows, flips, strict=True)]
        judge = judge_from(spec, dtype=dtype, llm=llm, say=shown.say)
        if estimate_only:
            return _estimate(judge, comparisons, shown)
        with shown.task(judge.name, len(comparisons), "comparisons") as advance:
            verdicts = judge.judge_all(comparisons, advance)
    labels = [[_side(label, flip) for label in row.labels] for row, flip in zip(rows, flips, strict=True)]
    if out is not None:
        _write_verdicts(out, rows, flips, labels, verdicts, overwrite=overwrite)
    return _source_facts(read, len(rows)) | _measured(judge, comparisons, labels, verdicts)


def _files_of(spec: str) -> list[str]:
    """The file or folder that a judge is read from, if it is local: `FILE.py:function`, `reward:MODEL`,
    `implicit:RUN`."""
    return [spec.rpartition(":")[0], spec.partition(":")[2]]


def _flip(seed: int, row: int) -> bool:
    """Whether the second answer is A: a coin flip per row, so that a judge that always says A is right half the
    time."""
    return hashlib.sha256(f"{seed}:{row}".encode()).digest()[0] % 2 == 1


def _comparison(row: Labelled, flip: bool) -> Comparison:
    first, second = (_completion(turns[0].content) for turns in (row.pair.chosen, row.pair.rejected))
    plain = Comparison(row.pair.prompt, first, second)
    return plain.swap() if flip else plain


def _completion(text: str) -> Completion:
    """A written answer: it is complete, and without its model's tokenizer words replace tokens."""
    return Completion(text, ended=True, tokens=len(text.split()) + 1)


def _side(label: Label, flip: bool) -> Winner:
    if label == "tie":
        return "tie"
    return "a" if (label == "first") != flip else "b"


def _source_facts(read: LabelledSource, judged: int) -> dict[str, Any]:
    refused = read.refused_by_reason()
    if several := len(read.comparisons) - judged:
        refused["an answer of several turns"] = several
    return {"source": read.name, "annotators": list(read.annotators), "refused": refused}


def _measured(
    judge: Judge,
    comparisons: Sequence[Comparison],
    labels: Sequence[Sequence[Winner]],
    verdicts: Sequence[Verdict],
) -> dict[str, Any]:
    """The judge, the longer answer and the annotators on the same comparisons."""
    prompts = [prompt_key(comparison.prompt) for comparison in comparisons]
    voted = [majority(row) for row in labels]
    kept = [place for place, label in enumerate(voted) if label is not None]
    meant = [label for label in voted if label is not None]
    longer = [verdict.winner for verdict in longer_wins().judge_all(comparisons)]
    said = [verdict.winner for verdict in verdicts]
    prompts_kept = [prompts[at] for at in kept]
    return {
        "judge": judge.name,
        "judge_description": judge.description,
        "prompts": len(set(prompts)),
        "split_labels": len(voted) - len(kept),
        **agreement([said[at] for at in kept], meant, prompts_kept),
        "longer_wins": agreement([longer[at] for at in kept], meant, prompts_kept),
        "leave_one_out": leave_one_out(labels, said, prompts),
        "verdicts": summary(verdicts),
    }


def _estimate(judge: Judge, comparisons: Sequence[Comparison], progress: Progress) -> dict[str, Any]:
    if isinstance(judge, PricedJudge):
        return {"judge": judge.name, **judge.cost(comparisons)}
    if not isinstance(judge, LLMJudge):
        raise UsageError(f"{judge.name} costs nothing but time", hint="--estimate is for llm:MODEL@BASE_URL")
    cost = judge.estimate(comparisons)
    progress.say(cost.line(judge.model))
    return {"judge": judge.name} | vars(cost)


def _write_verdicts(
    file: Path,
    rows: Sequence[Labelled],
    flips: Sequence[bool],
    labels: Sequence[Sequence[Winner]],
    verdicts: Sequence[Verdict],
    *,
    overwrite: bool,
) -> None:
    lines = (
        {
            "index": row.pair.row,
            "a": "second" if flip else "first",
            "labels": list(said),
            "winner": verdict.winner,
            "by_order": verdict.by_order,
            "reason": verdict.reason,
        }
        for row, flip, said, verdict in zip(rows, flips, labels, verdicts, strict=True)
    )
    write_output(file, "".join(json.dumps(line) + "\n" for line in lines), overwrite=overwrite, spill=True)
