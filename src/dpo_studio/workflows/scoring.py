"""`dpo score`: log-probs, margins and accuracy of any pairs under any model or run."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from dpo_studio.config import SourceLike, TooLong, as_source
from dpo_studio.console.progress import Progress, Silent
from dpo_studio.errors import DataError, NonFiniteError, UsageError
from dpo_studio.evaluation.accuracy import finite_pairs, finite_summary
from dpo_studio.learning.batched_logps import logps_over_ranks
from dpo_studio.learning.memory import CPU_TOKEN_BUDGET, tokens_without_gradient
from dpo_studio.learning.packing_check import check_packing
from dpo_studio.objectives import PairLogps, margin
from dpo_studio.preferences.pair import Pair, prompt_key
from dpo_studio.preferences.sources import read_pairs
from dpo_studio.ranks import ALONE, Ranks
from dpo_studio.tokens.encode import EncodedPair, encode_pairs
from dpo_studio.workflows.loading import LoadedModel, load_any
from dpo_studio.writing import check_outputs, write_output

__all__ = ["score_pairs", "score_to_file", "side_logps"]


def score_pairs(
    name: str,
    source: SourceLike,
    out: TextIO,
    *,
    beta: float | None = None,
    dtype: str | None = None,
    compute: str | None = None,
    max_length: int | None = None,
    too_long: TooLong = "drop",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write one JSON line a source row to `out`, in order; return the summary.

    Raises:
        NonFiniteError: no pair has finite log-probs; its lines are written, with null.
        DPOStudioError: the model or the source cannot be used.
    """
    if beta is not None and not 0 < beta < float("inf"):
        raise UsageError(f"--beta {beta} is not a positive number")
    ranks = Ranks.of_launcher()
    shown = (progress or Progress()) if ranks.leads else Progress(Silent())
    with shown, ranks.together():
        pairs = read_pairs(as_source(source))
        loaded = load_any(name, dtype=dtype, compute=compute, with_reference=True, say=shown.say)
        used_beta = beta if beta is not None else loaded.beta if loaded.beta is not None else 0.1
        encoded = encode_pairs(pairs.pairs, loaded.base.encoder, max_length=max_length, too_long=too_long)
        if not encoded.pairs:
            raise DataError(f"{pairs.name}: no pair can be scored", hint=f"the first: {encoded.refused[0][1]}")
        policy = side_logps(loaded, encoded.pairs, "policy", shown, tuned=True, texts=pairs.pairs, ranks=ranks)
        reference = policy
        if loaded.adapter is not None:
            reference = side_logps(loaded, encoded.pairs, "reference", shown, tuned=False, ranks=ranks)
    lines = [*_scored(encoded.pairs, policy, reference, used_beta)]
    lines += [{"index": r.row, "refused": r.reason} for r in pairs.refused]
    lines += [{"index": row, "refused": reason} for row, reason in encoded.refused]
    for line in sorted(lines, key=lambda line: line["index"]) if ranks.leads else ():
        out.write(json.dumps(line) + "\n")
    keys = {pair.row: prompt_key(pair.prompt) for pair in pairs.pairs}
    if not finite_pairs(range(len(encoded.pairs)), policy, reference)[0]:
        raise NonFiniteError(
            f"no log-prob of the {len(encoded.pairs)} pairs is finite under {name}",
            hint="a diverged adapter, or a dtype too small for it: --dtype float32",
        )
    summary: dict[str, Any] = {
        "pairs": len(encoded.pairs),
        "refused": len(lines) - len(encoded.pairs),
        "beta": used_beta,
        "dtype": str(loaded.base.model.dtype).removeprefix("torch."),
    }
    return summary | finite_summary(policy, reference, [keys[pair.row] for pair in encoded.pairs], beta=used_beta)


def side_logps(
    loaded: LoadedModel,
    pairs: Sequence[EncodedPair],
    title: str,
    progress: Progress,
    *,
    tuned: bool,
    texts: Sequence[Pair] = (),
    ranks: Ranks = ALONE,
) -> PairLogps:
    """Log-probs of the pairs under the policy (tuned) or its reference, in order; both models are checked first.

    `texts`: what the pairs were encoded from, where they were. Each of several `ranks` computes a share.

    Raises:
        ModelError: they are not the plain model's.
    """
    budget = tokens_without_gradient(CPU_TOKEN_BUDGET, loaded.policy)
    if tuned:
        encoder, adapters = loaded.base.encoder, loaded.adapters
        check_packing(loaded.policy, pairs, texts=texts, encoder=encoder, adapters=adapters, token_budget=budget)
    with progress.task(title, len(pairs), "pairs") as advance, loaded.tuned(tuned):
        return logps_over_ranks(ranks, loaded.policy, pairs, token_budget=budget, progress=advance)


def _scored(pairs: Sequence[EncodedPair], policy: PairLogps, reference: PairLogps, beta: float) -> list[dict[str, Any]]:
    columns = {
        "chosen_logp": policy.chosen_P,
        "rejected_logp": policy.rejected_P,
        "reference_chosen_logp": reference.chosen_P,
        "reference_rejected_logp": reference.rejected_P,
        "margin": beta * margin(policy, reference),
    }
    counts = {"chosen_tokens": policy.chosen_tokens_P, "rejected_tokens": policy.rejected_tokens_P}
    lines = []
    for place, pair in enumerate(pairs):
        numbers = {name: _finite_or_null(column[place]) for name, column in columns.items()}
        lines.append({"index": pair.row} | numbers | {name: int(column[place]) for name, column in counts.items()})
    return lines


def _finite_or_null(value: torch.Tensor) -> float | None:
    number = value.item()
    return number if abs(number) < float("inf") else None


def score_to_file(
    name: str, source: SourceLike, file: Path, *, overwrite: bool = False, **settings: Any
) -> dict[str, Any]:
    """`score_pairs` into a file that appears whole or not at all.

    Raises:
        DPOStudioError: as `score_pairs`; or the file exists without `overwrite`, or cannot be written there.
    """
    source = as_source(source)
    check_outputs({"--out": file}, reads=[source.source, name], overwrite=overwrite)
    lines = io.StringIO()
    summary = score_pairs(name, source, lines, **settings)
    if Ranks.of_launcher().leads:
        write_output(file, lines.getvalue(), overwrite=overwrite, spill=True)
    return summary
