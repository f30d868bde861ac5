"""In which layout a model reads its pairs, and why: the fastest one that is exactly right.

`packed`: many pairs in a row, each prompt once for both its answers. `rows`: each answer behind its own prompt, for
layers with a state, which would flow from one answer into the next. `apart`: the same, for whatever else a pack's mask
does not reach. Both are read by the model's own forward, in tables filled up at their ends (`tokens.padded`), and the
start of every run proves that neighbours and padding change nothing (`learning.neighbours_check`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from torch import nn
from transformers import PreTrainedConfig

from dpo_studio.config import Layout
from dpo_studio.errors import ModelError
from dpo_studio.models.families import family_of
from dpo_studio.models.layers import causal_lm
from dpo_studio.models.unsupported import long_rope_limit
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import packed_tokens
from dpo_studio.tokens.padded import padded_tokens

__all__ = ["LayoutChoice", "choose_layout", "layout_of", "set_layout"]

MASKED = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers that see what a mask says, and nothing else."""
STATES = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent"})
"""Kinds of layers that hand a state on from token to token."""
NO_MEMORY = frozenset({"moe", "mlp"})
"""Kinds of layers that see one token at a time."""
_STATE_SIZES = ("ssm_state_size", "mamba_d_state", "rwkv_hidden_size", "state_size")
"""Sizes of states, in configs that do not list their layers."""
_MODULES = {"flash-linear-attention": "fla", "causal-conv1d": "causal_conv1d", "mamba-ssm": "mamba_ssm"}
"""What the packages that compute states on a GPU are imported as."""


@dataclass(frozen=True)
class LayoutChoice:
    """A model's layout."""

    layout: Layout
    why: str
    """Why no faster one is right, after the model's name (`has layers with a state (...)`); empty for `packed`."""
    kernels: tuple[str, ...] = ()
    """Packages that compute its states on a GPU, where transformers finds them."""

    def told(self, pairs: Sequence[EncodedPair]) -> str:
        """What a run says at its start: the layout, why, how many tokens more it reads, and what else is slow."""
        if self.layout == "packed":
            return "layout packed: many pairs a row, each prompt once for both its answers"
        times = sum(map(padded_tokens, pairs)) / max(1, sum(map(packed_tokens, pairs)))
        said = f"layout {self.layout}, because this model {self.why}: up to {times:.2g} times the tokens of a pack"
        if self.layout != "rows":
            return said
        missing = [package for package in self.kernels if find_spec(_MODULES[package]) is None]
        return f"{said}; {' and '.join(missing)} not installed: its states run as plain torch" if missing else said


def choose_layout(config: PreTrainedConfig, wanted: str = "auto", name: str = "the model") -> LayoutChoice:
    """The layout for `model.layout: wanted` of a model with this text config.

    Raises:
        ModelError: the model cannot be read in the wanted layout.
    """
    fastest = _fastest(config)
    layout = fastest.layout if wanted == "auto" else wanted
    if layout != "packed" and long_rope_limit(config) is not None:
        raise _impossible(name, config, layout, "chooses its rope by the longest sequence of a pass (long rope)")
    if layout == fastest.layout:
        return fastest
    if wanted == "apart":
        return LayoutChoice("apart", fastest.why or "has it in its recipe (model.layout)")
    if wanted == "rows":
        raise _impossible(name, config, wanted, "has no layer with a state")
    raise _impossible(name, config, wanted, fastest.why)


def _fastest(config: PreTrainedConfig) -> LayoutChoice:
    family = family_of(config)
    kinds = set(getattr(config, "layer_types", None) or [])
    sizes = [key for key in _STATE_SIZES if getattr(config, key, None) and not kinds]  # else its layers are named
    if states := sorted(kinds & STATES) or sizes:
        mamba = any(getattr(config, key, None) for key in _STATE_SIZES)
        rule = () if states == ["conv"] else ("mamba-ssm",) if mamba else ("flash-linear-attention",)
        return LayoutChoice("rows", f"has layers with a state ({', '.join(states)})", (*rule, "causal-conv1d"))
    if strange := sorted(kinds - MASKED - NO_MEMORY):
        return LayoutChoice("apart", f"has layers that a pack's mask does not reach ({', '.join(strange)})")
    if getattr(config, "attention_chunk_size", None) and not kinds:
        return LayoutChoice("apart", "cuts its attention into chunks (attention_chunk_size)")
    if getattr(config, "alibi", False):
        return LayoutChoice("apart", "counts distances in places of the row (ALiBi)")
    if family.unpacked is not None and family.unpacked.applies(config):
        return LayoutChoice(family.layout, family.unpacked.words)
    return LayoutChoice("packed", "")


def _impossible(name: str, config: PreTrainedConfig, wanted: str, why: str) -> ModelError:
    best = _fastest(config).layout
    hint = f"model.layout: auto takes {best}, the fastest that is exactly right" if best != wanted else None
    return ModelError(f"model.layout: {wanted} is not possible: {name} ({config.model_type}) {why}", hint=hint)


def set_layout(model: nn.Module, layout: Layout) -> None:
    """Let `layout_of` of this model, or of an adapter's on it, be `layout`."""
    causal_lm(model).dpo_studio_layout = layout


def layout_of(model: nn.Module) -> Layout:
    """The layout in which a loaded model reads pairs."""
    found: Layout = getattr(causal_lm(model), "dpo_studio_layout", "packed")
    return found
