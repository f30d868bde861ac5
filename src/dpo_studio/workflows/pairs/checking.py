"""`dpo data check`: checks of pairs; and their short form before training."""

from __future__ import annotations

from itertools import islice

from dpo_studio.config import ModelSection, Recipe, SourceLike, TooLong, as_source
from dpo_studio.console.progress import Progress
from dpo_studio.console.text import percent
from dpo_studio.doctor.duplicates import FEW_HELD_OUT, REMEMBERED
from dpo_studio.doctor.findings import DataReport, Finding, level_of
from dpo_studio.doctor.text_checks import TextChecks
from dpo_studio.doctor.token_checks import TokenChecks, rule_findings
from dpo_studio.errors import DataError
from dpo_studio.preferences.pair import Pair
from dpo_studio.preferences.refused_rows import Refusal, RefusedRows
from dpo_studio.preferences.rows import sample
from dpo_studio.preferences.sources import nothing_usable, open_pairs
from dpo_studio.preferences.split import Split
from dpo_studio.tokens.encode import Encoded

__all__ = ["check_source", "look_at_lengths", "look_at_pairs"]

_AT_ONCE = 256
"""Rows between two updates of the progress bar, and pairs per call of the tokenizer."""
_BEFORE_TRAINING = 10_000
"""Pairs that the short form checks: three seconds. A larger set is sampled."""


def check_source(
    source: SourceLike,
    *,
    held_out: SourceLike | None = None,
    model: ModelSection | None = None,
    max_length: int = 1024,
    too_long: TooLong = "drop",
    progress: Progress | None = None,
) -> DataReport:
    """Read every row of a source once and report its problems; memory does not grow with its text.

    With a model, its tokenizer and chat template are asked too (no weights are read). With a held-out source, what
    its prompts share with the pairs is reported.

    Raises:
        DataError: a source is missing, unreadable, empty or of no known shape.
        ModelError: the model's tokenizer or chat template cannot be used.
    """
    with progress or Progress() as shown:
        tokens = None if model is None else _token_checks(model, max_length, too_long, shown)
        stream = open_pairs(as_source(source))
        texts = TextChecks()
        with shown.task(f"check {stream.name}", None, "rows") as advance:
            while rows := list(islice(stream.results, _AT_ONCE)):
                pairs = [row for row in rows if isinstance(row, Pair)]
                for row in rows:
                    if isinstance(row, Refusal):
                        texts.refuse(row)
                    else:
                        texts.see(row)
                if tokens is not None and pairs:
                    tokens.see(pairs)
                advance(len(rows))
        if held_out is not None:
            _see_held_out(texts, held_out)
    findings, histograms = texts.findings(), texts.histograms()
    if tokens is not None and tokens.pairs:
        findings += tokens.findings()
        histograms += tokens.histograms()
    return DataReport(
        source=stream.name,
        format=stream.format,
        rows=texts.rows,
        pairs=texts.pairs,
        usable=texts.pairs if tokens is None else tokens.usable,
        prompts=texts.duplicates.prompts,
        refused=dict(texts.refused.counts.most_common()),
        findings=findings,
        histograms=histograms,
        model=None if model is None else model.path,
        looked_at="" if texts.duplicates.saw_all else f"near duplicates among the first {REMEMBERED:,} pairs",
    )


def _token_checks(model: ModelSection, max_length: int, too_long: TooLong, progress: Progress) -> TokenChecks:
    from dpo_studio.models.folder import open_model  # imports torch, which the checks of text do not need

    folder = open_model(model.path, model.revision, progress.say)
    return TokenChecks(folder.encoder(model), max_length=max_length, too_long=too_long)


def _see_held_out(texts: TextChecks, held_out: SourceLike) -> None:
    stream = open_pairs(as_source(held_out))
    refused = RefusedRows()
    pairs = 0
    for row in stream.results:
        if isinstance(row, Refusal):
            refused.add(row)
        else:
            texts.see_held_out(row)
            pairs += 1
    if not pairs:  # otherwise the report would suggest that none of its prompts is trained on
        raise nothing_usable(stream, refused)


def look_at_pairs(recipe: Recipe, split: Split, progress: Progress, *, anyway: bool) -> None:
    """The short form of the checks of text, before training; at most 10,000 pairs are checked.

    Raises:
        DataError: what was found makes the run worthless, and nobody said `anyway`.
    """
    seed = recipe.data.split_seed
    texts = TextChecks()
    for pair in _some(split.train, seed):
        texts.see(pair)
    for pair in _some(split.held_out, seed):
        texts.see_held_out(pair)
    of = f"{texts.pairs:,} of {len(split.train):,}" if texts.pairs < len(split.train) else f"{texts.pairs:,}"
    _report_findings(
        [_shared_prompts(split), _few_held_out(split), *texts.findings()],
        f"{of} training pairs",
        progress,
        anyway=anyway,
    )


def _some(pairs: list[Pair], seed: int) -> list[Pair]:
    if len(pairs) <= _BEFORE_TRAINING:
        return pairs
    return [pair for _, pair in sample(((pair.row, pair) for pair in pairs), _BEFORE_TRAINING, seed=seed)]


def _shared_prompts(split: Split) -> Finding:
    """The training pairs dropped because of an explicit held-out source."""
    dropped, of = split.shared_prompts_dropped, len(split.train) + split.shared_prompts_dropped
    return Finding(
        "shared-prompts",
        "training pairs whose prompt is held out",
        dropped,
        of,
        level_of(dropped, of, warning=0.1, stop=0.5),
        does="They are not trained on: the two sources are nearly the same.",
        todo="Hold out other prompts, or a share of them: data.held_out.fraction.",
    )


def _few_held_out(split: Split) -> Finding:
    """Too few held-out pairs to measure anything."""
    count, of = len(split.held_out), len(split.train) + len(split.held_out)
    few = 0 < count < FEW_HELD_OUT
    return Finding(
        "few-held-out",
        "held-out pairs, too few for a number to trust",
        count if few else 0,
        of,
        "warning" if few else "fine",
        does="The interval around their accuracy is wider than what training gains.",
        todo="A larger data.held_out.fraction, more pairs, or a held-out source of their own.",
    )


def look_at_lengths(recipe: Recipe, encoded: Encoded, progress: Progress, *, anyway: bool) -> None:
    """The short form of the checks of tokens, from the counts of encoding the training pairs.

    Raises:
        DataError: what was found makes the run worthless, and nobody said `anyway`.
    """
    pairs = len(encoded.pairs) + len(encoded.refused)
    found = rule_findings(encoded.counts, pairs, recipe.data.max_length, recipe.data.too_long)
    _report_findings(found, "token ids of the training pairs", progress, anyway=anyway)


def _report_findings(findings: list[Finding], what: str, progress: Progress, *, anyway: bool) -> None:
    """Report each stop and warning in a line; raise if there is a stop, unless `anyway`."""
    grave = [finding for finding in findings if finding.level == "stop"]
    told = [*grave, *(finding for finding in findings if finding.level == "warning")]
    if not told:
        progress.say(f"checked {what}: no problems found")
    for finding in told:
        progress.warn(f"{_line(finding)}. {finding.does}")
    if grave and not anyway:
        raise DataError(
            f"this run would be worthless: {'; '.join(_line(finding) for finding in grave)}",
            hint=f"{grave[0].todo} `dpo data check` shows examples; `dpo train --anyway` trains all the same",
        )


def _line(finding: Finding) -> str:
    return f"{finding.title}: {finding.count:,} of {finding.of:,} ({percent(finding.share)})"
