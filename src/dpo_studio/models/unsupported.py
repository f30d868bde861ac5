"""Models that would be computed wrongly and not noticed, each with its cause, known from config.json alone.

The obstacles of attention and the head are in `models.attention` and `models.head`.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from dpo_studio.errors import ModelError

__all__ = ["auto_class", "long_rope_limit", "refuse_unfit", "row_limit"]

_LONG = "longrope"
_BY_POSITION = {"default", "linear", "llama3", "yarn", "proportional", _LONG}
"""Rope types whose angles follow from a token's own position (long rope: and from which side of one length)."""


def refuse_unfit(config: PreTrainedConfig, name: str) -> None:
    """Look at a whole config, the wrapper's where there is one.

    Raises:
        ModelError: with the cause, by name.
    """
    for cause in (_wrapper(config), _rope(config.get_text_config())):
        if cause is not None:
            raise ModelError(
                f"{name} ({config.model_type}) {cause[0]}: DPO Studio cannot train or score it yet", hint=cause[1]
            )


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that loads a model which writes text, or None: a wrapper's text side is trained inside it, its
    other parts are frozen and saved with it."""
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    return None


def long_rope_limit(config: PreTrainedConfig) -> int | None:
    """The length up to which a model with long rope uses its short factors, or None where rope has no such limit.

    transformers chooses the factors of a whole forward pass by the longest position in it.
    """
    limits = {rope["original_max_position_embeddings"] for rope in _ropes(config) if rope.get("rope_type") == _LONG}
    return int(max(limits)) if limits else None


def row_limit(config: PreTrainedConfig) -> int | None:
    """The tokens of a row up to which a model that scales its queries by places in it (Llama 4) scales by 1."""
    scaled = not all(getattr(config, "no_rope_layers", None) or [1]) and hasattr(config, "floor_scale")
    return int(config.floor_scale) - 1 if scaled and getattr(config, "attn_temperature_tuning", False) else None


def _wrapper(config: PreTrainedConfig) -> tuple[str, str] | None:
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder", "use a model that writes text, one token after the other"
    if auto_class(config) is not None:
        return None
    if config.get_text_config() is not config:
        return (
            "is a multimodal wrapper that writes no text, or not from text alone",
            "wrappers that transformers loads as AutoModelForImageTextToText work, their text side alone",
        )
    return "is not a causal language model", "use a model that writes text, one token after the other"


def _rope(config: PreTrainedConfig) -> tuple[str, str] | None:
    ropes = _ropes(config)
    kinds = {str(rope.get("rope_type") or rope.get("type") or "default") for rope in ropes}
    if any("dynamic" in kind for kind in kinds):
        return (
            "stretches its rope by the longest position seen so far (rope_type: dynamic), so an answer's log-prob "
            "would depend on what else was computed before it",
            "set rope_type to yarn, linear or default in its config.json if you know that the model was trained so",
        )
    if strange := sorted(kinds - _BY_POSITION):
        return f"has a rope whose angles may depend on lengths (rope_type: {', '.join(strange)})", (
            f"these are known: {', '.join(sorted(_BY_POSITION))}"
        )
    long = [rope for rope in ropes if rope.get("rope_type") == _LONG]
    if len({rope.get("original_max_position_embeddings") for rope in long}) > 1 or any(
        not isinstance(rope.get("original_max_position_embeddings"), int) for rope in long
    ):
        return "has long rope without one length at which all its layers change factors", (
            "config.json names it as original_max_position_embeddings"
        )
    return None


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """A model's rope settings: one for all layers, or one for each kind of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return nested or [settings]
