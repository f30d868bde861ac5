"""Objectives: pure functions from the log-probs of a step's pairs to the loss of each pair.

Each is a small frozen dataclass, and that dataclass is also the recipe's `objective` section: the setting and the
formula are the same thing. Importing them imports no torch.
"""

from dpo_studio.objectives.alone import ORPO, SFT, SimPO
from dpo_studio.objectives.answers import BCO, NCA, SPPO, APODown, APOZero
from dpo_studio.objectives.logps import PairLogps, log_ratios, margin, wins
from dpo_studio.objectives.margins import DPO, EXO, FDPO, IPO, LDDPO, WPO, DiscoPOP, DPONorm, Hinge, Robust
from dpo_studio.objectives.mixture import Mixture, Objective
from dpo_studio.objectives.ranks import AOT, AOTUnpaired

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
    "Hinge",
    "Mixture",
    "Objective",
    "PairLogps",
    "Robust",
    "SimPO",
    "log_ratios",
    "margin",
    "wins",
]

OBJECTIVES = (
    *(DPO, IPO, Hinge, EXO, NCA, Robust, BCO, SPPO, AOT, AOTUnpaired, APOZero, APODown, DiscoPOP, SFT),
    *(DPONorm, LDDPO, WPO, FDPO, SimPO, ORPO, Mixture),
)
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
