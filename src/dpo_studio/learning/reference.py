"""The reference: what the policy is held close to, and its log-probs of the same answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dpo_studio.config import Recipe
from dpo_studio.learning.batched_logps import COLUMNS, from_columns, logps_over_ranks
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.reference_cache import ReferenceCache
from dpo_studio.objectives import PairLogps
from dpo_studio.policy.policy import Policy
from dpo_studio.ranks import ALONE, Ranks
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import MicroBatch

__all__ = ["Reference", "ReferenceChoice", "reference_logps"]

_PAIRS_BETWEEN_SAVES = 128


@dataclass(frozen=True)
class ReferenceChoice:
    """Which model and adapter a recipe holds its policy close to. This is decided here and nowhere else."""

    model: str | None
    """Another model than the base; None is the base."""
    adapter: Path | None
    """A frozen adapter on that model; None is the model itself."""
    is_start: bool
    """Whether the policy, before its first step, is this very reference."""

    @classmethod
    def of(cls, recipe: Recipe) -> ReferenceChoice:
        """The recipe's: an adapter whose training is continued is its own reference, unless another one is named.

        `reference.model` that is the base itself is the base with the policy's adapter off: no second model is loaded.
        """
        section = recipe.reference
        adapter = section.adapter or (recipe.model.adapter if section.model is None else None)
        is_start = section.model is None and section.adapter is None
        own_base = section.model == recipe.model.path and recipe.model.revision is None
        return cls(None if own_base else section.model, None if adapter is None else Path(adapter), is_start)

    @property
    def beside(self) -> Path | None:
        """The reference adapter on the policy's own base, if there is one."""
        return self.adapter if self.model is None else None

    def load_beside(self, policy: Policy) -> None:
        """Load the reference adapter into the policy's own model, if there is one.

        Raises:
            ModelError: its folder contains no LoRA adapter in safetensors, or one made for other layers.
        """
        if self.beside is not None:
            policy.load_reference(self.beside)


@dataclass(frozen=True, eq=False)
class Reference:
    """Log-probs under the reference: looked up where a cache has them, else computed."""

    model: nn.Module
    """Computes them; the policy's own model, unless the recipe names another."""
    computing: Callable[[], AbstractContextManager[None]]
    """Inside, `model` computes as the reference does."""
    cache: ReferenceCache | None
    """None: `reference.mode: live`."""
    ranks: Ranks = ALONE
    """The processes that each compute a share of the pairs."""

    def logps(
        self,
        pairs: Sequence[EncodedPair],
        *,
        token_budget: int | None = None,
        progress: Callable[[int], None] = lambda pairs: None,
    ) -> PairLogps:
        """Of all `pairs`, in order, on the CPU; `token_budget` is `batched_logps`'s.

        Raises:
            OSError, sqlite3.Error: the cache cannot be used.
        """
        with self.computing():
            return reference_logps(
                self.model, pairs, token_budget=token_budget, cache=self.cache, ranks=self.ranks, progress=progress
            )

    def of_step(self, micro_batches: Sequence[MicroBatch]) -> list[PairLogps]:
        """Of a step's micro-batches, computed now (`reference.mode: live`)."""
        with self.computing():
            return [pair_logps(self.model, batch) for batch in micro_batches]


def reference_logps(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    *,
    token_budget: int | None = None,
    cache: ReferenceCache | None,
    ranks: Ranks = ALONE,
    progress: Callable[[int], None] = lambda pairs: None,
) -> PairLogps:
    """The reference's log-probs of all `pairs`, in order, on the CPU; only those missing in the cache are computed.

    `model` computes as the reference does when called (see `models.adapters.as_reference`). Of several processes each
    computes a share, and the first alone reads and writes the cache.
    """
    known: list[tuple[float, ...] | None] = [None] * len(pairs)
    ours = cache if ranks.leads else None
    with nullcontext() if ours is None else ours.held():
        if ours is not None:
            known = ours.load(pairs)
        if ranks.size > 1:
            known = _as_first(ranks, known)
        missing = [position for position, value in enumerate(known) if value is None]
        progress(len(pairs) - len(missing))
        at_once = _PAIRS_BETWEEN_SAVES * ranks.size
        for start in range(0, len(missing), at_once):
            positions = missing[start : start + at_once]
            some = [pairs[position] for position in positions]
            part = logps_over_ranks(ranks, model, some, token_budget=token_budget, progress=progress)
            if ours is not None:
                ours.save(some, part)
            rows = zip(*(getattr(part, name).tolist() for name in COLUMNS), strict=True)
            for position, row in zip(positions, rows, strict=True):
                known[position] = row
        if ours is not None and missing:
            ours.trim()
    values = [value for value in known if value is not None]
    return from_columns(COLUMNS, torch.tensor(values, dtype=torch.float32).reshape(-1, len(COLUMNS)).T, pairs)


def _as_first(ranks: Ranks, known: list[tuple[float, ...] | None]) -> list[tuple[float, ...] | None]:
    """What the first rank has found in the cache; NaN, which the cache never keeps, stands for what it has not."""
    nothing = (math.nan,) * len(COLUMNS)
    found_PC = torch.tensor([row or nothing for row in known], dtype=torch.float64).reshape(-1, len(COLUMNS))
    ranks.as_first([found_PC])
    return [None if math.isnan(row[0]) else tuple(row) for row in found_PC.tolist()]
