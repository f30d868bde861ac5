"""The digests of a run's data, so that it never continues with other pairs or on another date: RUN/data.json.

One line of JSON:
date        the day the run was begun, which chat templates may write into every prompt
template    sha256 of the chat template, tokenizer that of the vocabulary: where a change came from
train       {"rows": [...], "digests": "..."}: of each pair as it is trained on, in order, its source row and 16 hex
            digits; held_out likewise
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_studio.disk import write_atomically
from dpo_studio.errors import RunError
from dpo_studio.reading import read_json
from dpo_studio.runs.folder import RunFolder
from dpo_studio.scan import template_text

if TYPE_CHECKING:
    from dpo_studio.config import Recipe
    from dpo_studio.tokens.chat import ChatEncoder
    from dpo_studio.tokens.encode import EncodedPair

__all__ = ["check_same_data", "date_of", "digest_data", "recipe_of", "run_date", "write_data"]

_DIGITS = 16
"""Hex digits of a pair's digest: 8 bytes, for which a million pairs have a chance of 3e-8 to contain two equal ones."""
_SHOWN = 5
"""The most rows that a message names."""
_SIDES = ("train", "held_out")
_LARGEST = 1_000_000_000
"""Bytes. A million pairs have 25 million."""


@dataclass(frozen=True)
class Side:
    """The pairs of one side of the split, in order."""

    rows: list[int]
    digests: str

    def each(self) -> list[tuple[str, int]]:
        """(digest, row) of every pair."""
        starts = range(0, len(self.digests), _DIGITS)
        return [(self.digests[at : at + _DIGITS], row) for at, row in zip(starts, self.rows, strict=True)]


@dataclass(frozen=True)
class KeptData:
    """The content of RUN/data.json."""

    date: datetime.date
    template: str
    tokenizer: str
    train: Side
    held_out: Side


def digest_data(
    train: Sequence[EncodedPair], held_out: Sequence[EncodedPair], encoder: ChatEncoder, date: datetime.date
) -> KeptData:
    """The digests of these pairs, which `encoder` made on `date`."""
    return KeptData(date, encoder.template_digest, encoder.vocabulary_digest, _side(train), _side(held_out))


def _side(pairs: Sequence[EncodedPair]) -> Side:
    return Side([pair.row for pair in pairs], "".join(map(_digest, pairs)))


def _digest(pair: EncodedPair) -> str:
    """The digest of all ids and of which are scored; without the row."""
    digest = blake2b(digest_size=_DIGITS // 2)
    for array in (pair.prompt, *(part for one in (pair.chosen, pair.rejected) for part in (one.ids, one.scored))):
        digest.update(f"{array.dtype.str}{len(array)}:".encode() + array.tobytes())
    return digest.hexdigest()


def date_of(run: RunFolder) -> datetime.date | None:
    """The date on which a run renders its chats; None if it has none: a new run, or one of an older version.

    Raises:
        RunError: its data.json is damaged.
    """
    kept = _read(run)
    return None if kept is None else kept.date


def run_date(run: RunFolder, today: datetime.date | None = None) -> datetime.date:
    """The date of a run's next start: its own once it has trained a step; before that `today`, by default today's."""
    own = date_of(run) if run.has_checkpoint() else None
    return own or today or datetime.date.today()


def write_data(run: RunFolder, kept: KeptData) -> None:
    """Write data.json, before the first step."""
    plain = asdict(kept) | {"date": kept.date.isoformat()}
    write_atomically(_file(run), json.dumps(plain, separators=(",", ":")) + "\n")


def check_same_data(run: RunFolder, now: KeptData, warn: Callable[[str], None]) -> None:
    """Check that a run continues with the same pairs, id for id and in the same order.

    Where they stand in their source may change, and so may a template or a tokenizer that still makes the same ids.
    One that has learned nothing yet may begin with any pairs.

    Raises:
        RunError: they are others; it says what changed.
    """
    if not run.has_checkpoint():
        return
    before = _read(run)
    if before is None:
        warn(
            f"{run.path} was begun by a version that stored no digest of its pairs, so it is unknown whether these are "
            "still the same; it continues, and stores one from here on"
        )
        return
    sides = {"training pairs": (before.train, now.train), "held-out pairs": (before.held_out, now.held_out)}
    changes = {name: _changes(*both) for name, both in sides.items() if both[0].digests != both[1].digests}
    causes = [
        name
        for name, old, new in (
            ("chat template", before.template, now.template),
            ("tokenizer's vocabulary", before.tokenizer, now.tokenizer),
            ("date", before.date.isoformat(), now.date.isoformat()),
        )
        if old != new
    ]
    if changes:
        lines = [f"the {name} is another" for name in causes] + [f"{name}: {what}" for name, what in changes.items()]
        raise RunError(
            f"{run.path} is a run on other data:" + "".join(f"\n    {line}" for line in lines),
            hint="choose another folder (--set run.folder=NAME), or the data and model files the run was begun with",
        )
    for name in causes:
        warn(f"the {name} is another than when {run.path} was begun; every pair still has the same ids")


def recipe_of(run: RunFolder) -> Recipe:
    """The recipe of an untrusted run: a template that it names must be the one the run was made with.

    Any file of this machine could stand there; what it holds would go into prompts and exports. The run keeps its
    template's sha256, and whoever does not know the file does not know that.

    Raises:
        RunError: no recipe; or a template that differs from the run's, or cannot be compared with it.
    """
    recipe = run.recipe()
    if recipe is None:
        raise RunError(f"{run.path} is not a run", hint="a run is the folder that `dpo train` or `dpo demo` made")
    if (named := recipe.model.chat_template) is not None:
        if not Path(named).is_absolute():  # a run's own recipe has no other paths: whose folder would it be in?
            raise RunError(f"{run.path}: its recipe names {named} as chat template, which is not an absolute path")
        text = template_text(named, what="chat template of the run", error=RunError)
        kept = _read(run)
        if kept is None or kept.template != sha256(text.encode()).hexdigest():
            why = (
                "which is not the one it was made with" if kept else "and no digest of the one it was made with is kept"
            )
            raise RunError(
                f"{run.path}: its recipe names {named} as chat template, {why}",
                hint="put that template there again; or name base, adapter and template in a recipe of your own",
            )
    return recipe


def _changes(before: Side, now: Side) -> str:
    """In words; a row is changed if its old pair is gone and it has a new one."""
    old, new = before.each(), now.each()
    gone, came = (Counter(digest for digest, _ in side) for side in (old, new))
    gone, came = gone - came, came - gone
    if not gone and not came:
        return f"the same {len(new)} in another order"
    lost = [row for digest, row in old if digest in gone]
    found = [row for digest, row in new if digest in came]
    changed = sorted(set(lost) & set(found))
    added = sorted(set(found) - set(lost))
    removed = sorted(set(lost) - set(found))
    named = {"changed": changed, "added": added, "removed": removed}
    parts = [f"{len(rows)} {what} ({_listed(rows)})" for what, rows in named.items() if rows]
    return f"{', '.join(parts)}; there were {len(old)} pairs, now {len(new)}"


def _listed(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
    return f"row{'s' if len(rows) > 1 else ''} {shown}"


def _file(run: RunFolder) -> Path:
    return run.path / run.DATA


def _read(run: RunFolder) -> KeptData | None:
    file = _file(run)
    if not file.exists():
        return None
    try:
        raw: dict[str, Any] = read_json(file, what="what the run keeps of its data", limit=_LARGEST, error=RunError)
        train, held_out = (Side(list(map(int, raw[name]["rows"])), str(raw[name]["digests"])) for name in _SIDES)
        if any(len(side.digests) != _DIGITS * len(side.rows) for side in (train, held_out)):
            raise ValueError("rows and digests differ in number")
        date = datetime.date.fromisoformat(raw["date"])
        return KeptData(date, str(raw["template"]), str(raw["tokenizer"]), train, held_out)
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise RunError(
            f"{file} cannot be read: {type(error).__name__}: {error}",
            hint="remove it if the data are still the same: the run then continues without comparing them",
        ) from None
