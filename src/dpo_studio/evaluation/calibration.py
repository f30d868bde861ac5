"""Calibration of the margins: is the answer with P(preferred) = 0.8 preferred in 80 of 100 pairs?

Under the Bradley-Terry model that DPO is derived from, the answer with the higher reward is preferred with probability
1 / (1 + e^-|margin|) (arXiv 2305.18290, equation 1). No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["calibration"]

_BINS = 10
_LEAST_IN_A_BIN = 10
"""Fewer pairs than this do not determine a share: then there are fewer bins."""


def calibration(margins: Sequence[float]) -> dict[str, Any]:
    """Predicted and observed shares in bins of equal size, and the expected calibration error.

    `margins` are chosen minus rejected rewards. `claimed` (predicted) and `found` (observed) are shares of pairs in
    which the answer with the higher reward is the chosen one; their distance, averaged over pairs, is `error` (ECE:
    Naeini et al. 2015). A positive `overconfidence` means that the predicted shares are too high: divide beta by
    something.
    """
    margins_P = np.asarray(margins, np.float64)
    if not len(margins_P):
        return {"error": None, "overconfidence": None, "bins": []}
    claimed_P = 1 / (1 + np.exp(-np.abs(margins_P)))
    found_P = np.where(margins_P == 0, 0.5, margins_P > 0).astype(np.float64)
    order = np.argsort(claimed_P, kind="stable")
    bins = []
    for places in np.array_split(order, max(1, min(_BINS, len(order) // _LEAST_IN_A_BIN))):
        claimed, found = float(claimed_P[places].mean()), float(found_P[places].mean())
        bins.append({"claimed": claimed, "found": found, "n": len(places)})
    return {
        "error": sum(one["n"] * abs(one["claimed"] - one["found"]) for one in bins) / len(margins_P),
        "overconfidence": float((claimed_P - found_P).mean()),
        "bins": bins,
    }
