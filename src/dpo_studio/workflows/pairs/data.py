"""`dpo data convert` and `dpo data split`: pairs of any shape into TRL's conversational JSON Lines, row by row.

Memory does not grow with the source, and what is written appears whole or not at all.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dpo_studio.config import SourceLike, as_source
from dpo_studio.console.progress import Progress
from dpo_studio.errors import DataError, UsageError
from dpo_studio.preferences.pair import Pair, prompt_key, trl_row
from dpo_studio.preferences.refused_rows import Refusal, RefusedRows
from dpo_studio.preferences.sources import PairStream, nothing_usable, open_pairs
from dpo_studio.preferences.split import stratified
from dpo_studio.writing import appearing, check_outputs, stream_of

__all__ = ["convert_pairs", "refused_beside", "split_source"]

_ROWS_AT_ONCE = 1000
_MOST_ORIGINS = 50  # a column `source` may be different in every row; counting it must not grow with the file


def convert_pairs(
    source: SourceLike, out: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Write every pair to `out`, and row number and reason of every refused row to `OUT.refused.jsonl`.

    Returns what was counted: source, format, rows, pairs, refused (by reason), out, refused_out.

    Raises:
        DataError: the source cannot be used or has not one pair, or a file exists and `overwrite` is not given.
        UsageError: `out` cannot be a file.
    """
    source, apart = as_source(source), refused_beside(out)
    check_outputs([("OUT", out), ("OUT's refused rows", apart)], reads=[source.source], overwrite=overwrite)
    with progress or Progress() as shown, appearing([out, apart], overwrite=overwrite) as (kept, refused):
        stream = open_pairs(source)
        tally = _Tally()
        for result in _counted(stream, tally, shown, "converting"):
            if isinstance(result, Refusal):
                _write_line(refused, _refused_line(result))
            else:
                _write_line(kept, trl_row(result))
        if not tally.pairs:
            raise nothing_usable(stream, tally.refused)
    return tally.summary(stream) | {"out": str(out), "refused_out": str(apart)}


def split_source(
    source: SourceLike,
    train: Path,
    held_out: Path,
    *,
    fraction: float,
    seed: int,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the pairs whose prompt is held out to one file and the others to another, refused rows beside the latter.

    The source is read twice: to see which prompts each `Pair.origin` has, and to give up the same share of each. Where
    there is one origin, the prompts held out are those that a recipe's `data.held_out.fraction` takes.

    Returns what `convert_pairs` counts, and train, held_out (pairs) and by_source ({origin: {train, held_out}}).

    Raises:
        DataError: as `convert_pairs`, or one side has no pair.
        UsageError: the fraction is not between 0 and 1, or a file cannot be one.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"--fraction {fraction} is not between 0 and 1")
    source, files = as_source(source), [train, held_out, refused_beside(train)]
    named = zip(("--train", "--held-out", "--train's refused rows"), files, strict=True)
    check_outputs([*named], reads=[source.source], overwrite=overwrite)
    with progress or Progress() as shown, appearing(files, overwrite=overwrite) as (learned, measured, refused):
        origins = _Origins()
        results = _counted(open_pairs(source), _Tally(), shown, "looking through")
        pairs = (result for result in results if isinstance(result, Pair))
        is_apart = stratified(
            ((origins.name(pair.origin), prompt_key(pair.prompt)) for pair in pairs), seed=seed, fraction=fraction
        )
        stream, tally = open_pairs(source), _Tally()
        counts: dict[str, Counter[str]] = {}
        for result in _counted(stream, tally, shown, "splitting"):
            if isinstance(result, Refusal):
                _write_line(refused, _refused_line(result))
                continue
            apart = is_apart(prompt_key(result.prompt))
            _write_line(measured if apart else learned, trl_row(result))
            counts.setdefault(origins.name(result.origin), Counter(train=0, held_out=0))[_SIDES[apart]] += 1
        if not tally.pairs:
            raise nothing_usable(stream, tally.refused)
        sides = {side: sum(count[side] for count in counts.values()) for side in _SIDES}
        if not all(sides.values()):
            raise DataError(
                f"{stream.name}: all {tally.pairs} pairs fall on one side",
                hint="another --fraction or --seed, or more prompts: rows about one prompt stay together",
            )
    by_source = {name: dict(count) for name, count in counts.items()} if len(counts) > 1 else {}
    paths = {"out": [str(train), str(held_out)], "refused_out": str(files[2])}
    return tally.summary(stream) | sides | {"by_source": by_source} | paths


_SIDES = ("train", "held_out")


class _Origins:
    """Names to count by. A column `source` may be different in every row, and memory must not grow with the file."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def name(self, origin: str | None) -> str:
        """The origin's own name, for the first few origins."""
        if origin is None:
            return "(no source)"
        if len(self._known) < _MOST_ORIGINS:
            self._known.add(origin)
        return origin if origin in self._known else "(other sources)"


def refused_beside(out: Path) -> Path:
    """The file of refused rows: `pairs.jsonl` -> `pairs.refused.jsonl`; of a stream they are counted only."""
    if stream_of(out) is not None:
        return Path(os.devnull)
    return out.parent / f"{out.name.removesuffix('.jsonl')}.refused.jsonl"


@dataclass
class _Tally:
    """The counts so far."""

    rows: int = 0
    pairs: int = 0
    refused: RefusedRows = field(default_factory=RefusedRows)

    def summary(self, stream: PairStream) -> dict[str, Any]:
        return {
            "source": stream.name,
            "format": stream.format,
            "rows": self.rows,
            "pairs": self.pairs,
            "refused": dict(self.refused.counts.most_common()),
            "refused_first": {
                reason: {"row": first.row, "seen": first.seen} for reason, first in self.refused.first.items()
            },
        }


def _counted(stream: PairStream, tally: _Tally, progress: Progress, doing: str) -> Iterator[Pair | Refusal]:
    """The results of a stream, while the tally and the screen keep up."""
    with progress.task(f"{doing} {stream.name}", None, "rows") as advance:
        for rows, (_, results) in enumerate(itertools.groupby(stream.results, key=lambda result: result.row), 1):
            tally.rows += 1
            for result in results:
                if isinstance(result, Refusal):
                    tally.refused.add(result)
                else:
                    tally.pairs += 1
                yield result
            if rows % _ROWS_AT_ONCE == 0:
                advance(_ROWS_AT_ONCE)
        advance(tally.rows % _ROWS_AT_ONCE)


def _refused_line(refusal: Refusal) -> dict[str, Any]:
    """`seen` is added where a value explains the reason."""
    return {"row": refusal.row, "reason": refusal.reason} | ({"seen": refusal.seen} if refusal.seen else {})


def _write_line(stream: TextIO, row: dict[str, Any]) -> None:
    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
