"""Objectives: pure functions from the log-probs of a step's pairs to the loss of each pair.

Each is a small frozen dataclass, and that dataclass is also the recipe's `objective` section: the setting and the
formula are the same thing. Importing them imports no torch. `dpo_studio.config.add_objective` adds one at run time.
"""

from typing import Annotated

from dpo_studio.objectives.across_pairs import AOT, AOTUnpaired
from dpo_studio.objectives.formula import Formula, Positive
from dpo_studio.objectives.logps import PairLogps, log_ratios, margin, wins
from dpo_studio.objectives.margins import DPO, EXO, FDPO, IPO, LDDPO, WPO, DiscoPOP, DPONorm, Hinge, Robust
from dpo_studio.objectives.mixture import Mixture
from dpo_studio.objectives.per_answer import BCO, NCA, SPPO, APODown, APOZero
from dpo_studio.objectives.reference_free import ORPO, SFT, SimPO
from dpo_studio.objectives.selection import (
    ByKind,
    check_objective,
    known_objectives,
    objectives_help,
    register,
    to_objective,
)

__all__ = [
    "AOT",
    "BCO",
    "DPO",
    "EXO",
    "FDPO",
    "IPO",
    "LDDPO",
    "NCA",
    "OBJECTIVES",
    "ORPO",
    "SFT",
    "SPPO",
    "TRL_NAMES",
    "WPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "DPONorm",
    "DiscoPOP",
    "Formula",
    "Hinge",
    "Mixture",
    "Objective",
    "PairLogps",
    "Positive",
    "Robust",
    "SimPO",
    "check_objective",
    "known_objectives",
    "log_ratios",
    "margin",
    "objectives_help",
    "register",
    "to_objective",
    "wins",
]

OBJECTIVES: tuple[type[Formula], ...] = (
    *(DPO, IPO, Hinge, EXO, NCA, Robust, BCO, SPPO, AOT, AOTUnpaired, APOZero, APODown, DiscoPOP, SFT),
    *(DPONorm, LDDPO, WPO, FDPO, SimPO, ORPO, Mixture),
)
"""The package's own, from which the recipe's section, a mixture's terms and help texts are made."""
for _formula in OBJECTIVES:
    register(_formula)
Objective = Annotated[Formula, ByKind()]
"""A recipe's `objective` section."""
TRL_NAMES = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo_norm",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "bco_pair": "bco",
    "sppo_hard": "sppo",
    "aot_pair": "aot",
}
"""What TRL calls otherwise."""
