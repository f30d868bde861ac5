"""What a model gets here, and why: its layout, what an adapter is on, what is fast; and which families were tested.

`tested.json` is written by the matrix (`python -m tests.families --write docs/models.md`), never by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dpo_studio.config import Layout, ModelSection
from dpo_studio.errors import ModelError, reason_of
from dpo_studio.models.attention import FLEX, PAIRS, choose_attention
from dpo_studio.models.conv1d import as_linear
from dpo_studio.models.folder import ModelFolder
from dpo_studio.models.head import head_law
from dpo_studio.models.layouts import choose_layout
from dpo_studio.models.targets import all_linear
from dpo_studio.models.unsupported import auto_class
from dpo_studio.scan import read_json

__all__ = ["describe", "fast_path", "tested_families"]

_TESTED = Path(__file__).parent / "tested.json"
_GPU = torch.device("cuda")


@dataclass(frozen=True)
class TestedFamily:
    """A row of the matrix."""

    family: str
    layout: str
    """Empty where it is refused."""
    adapted: str
    """Last parts of the names of the adapted layers."""
    fast: str
    """What computes its attention, or its states, on a GPU."""
    right: str
    """The verbs whose every number was right."""
    refused: str
    """Why, where something was."""


def tested_families() -> list[TestedFamily]:
    """The matrix as it was last written."""
    return [TestedFamily(**row) for row in read_json(_TESTED)["families"]]


def fast_path(config: PreTrainedConfig, layout: Layout) -> str:
    """What computes a model with this text config on a GPU that compiles kernels, if its heads have 16 or more."""
    if layout == "rows":
        return f"{', '.join(choose_layout(config).kernels)} where installed"
    # whether this machine compiles kernels is no property of the model
    attention = choose_attention("auto", config, _GPU, layout, compiles=True)
    flex = "FlexAttention, compiled layers"
    named = {FLEX: flex, PAIRS: flex, "sdpa": "SDPA", "eager": "eager attention"}
    return named.get(attention, "one dense mask, SDPA")


def describe(folder: ModelFolder, section: ModelSection) -> list[tuple[str, str]]:
    """What a model gets and why, as (what, which) in the order to read them; no weights are loaded.

    Raises:
        ModelError: it cannot be trained, with the reason.
    """
    text = folder.check_base(section)
    choice = choose_layout(text, section.layout, folder.name)
    law = head_law(folder.config)
    wrapper = [] if text is folder.config else [("text model", f"{text.model_type}; the other parts stay frozen")]
    logits = "hidden @ head"
    logits = logits if law.scale == 1 else f"{law.scale:g} * {logits}"
    logits = logits if law.cap is None else f"{law.cap:g} * tanh({logits} / {law.cap:g})"
    targets = all_linear(_skeleton(folder))
    ends = sorted({name.rpartition(".")[2] for name in targets.names})
    kinds = {text.model_type, folder.config.model_type}
    tested = [row for row in tested_families() if row.family.split(",")[0].split(" (")[0] in kinds]
    return [
        ("family", folder.config.model_type),
        *wrapper,
        ("layout", choice.layout + (f", because it {choice.why}" if choice.why else "")),
        ("adapted (all-linear)", f"{len(targets.names)} layers: {', '.join(ends)}"),
        *([("not adapted", words)] if (words := targets.words()) else []),
        ("fast path", fast_path(text, choice.layout)),
        ("logits", logits),
        ("tested", ", ".join(f"{row.family} ({row.right})" for row in tested) or "no model of this type yet"),
    ]


def _skeleton(folder: ModelFolder) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(folder.config).from_config(folder.config)
    except (ValueError, TypeError, AttributeError, RuntimeError, LookupError) as error:
        raise ModelError(f"{folder.name}: transformers makes no model of its config: {reason_of(error)}") from None
    as_linear(model)
    return model
