"""The model cards of exports: fixed text, figures, and names without local paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_studio.config import BUNDLED, Recipe
from dpo_studio.console.text import percent, printable
from dpo_studio.export.card import (
    Card,
    adapter_code,
    gptq_code,
    hub_id,
    license_of,
    plain_code,
    public_name,
    quoted,
)
from dpo_studio.export.requantise import Quantising
from dpo_studio.export.verify import ExportCheck
from dpo_studio.models.bundled import BUNDLED_MODEL
from dpo_studio.runs.facts import interval, share

__all__ = ["adapter_card", "perplexity_line", "quantised_card", "tuned_card"]


def adapter_card(out: Path, base: str, recipe: Recipe, rank: int, finished: Mapping[str, Any]) -> Card:
    """Of an adapter; `finished` is the run's `result.json`."""
    figures = []
    accuracy, ends = share(finished, "accuracy"), interval(finished, "accuracy_ci95")
    if accuracy is not None and ends is not None:
        figures = [f"held-out accuracy {percent(accuracy)} (95 % interval {percent(ends[0])} to {percent(ends[1])})"]
    return Card(
        title=printable(out.name),
        base_id=hub_id(base),
        datasets=_datasets(recipe),
        library="peft",
        tags=["dpo", "lora"],
        license=_license(base, None),
        facts=[f"a LoRA adapter of rank {rank} for {_name(base)}", *_rounded(base), _tuned(recipe)],
        figures=figures,
        code=adapter_code(out.name, hub_id(base) or public_name(base)),
    )


def tuned_card(
    out: Path,
    base: str,
    base_folder: Path,
    recipe: Recipe,
    settings: Quantising | None,
    comparison: ExportCheck,
    result: Mapping[str, Any],
) -> Card:
    """Of a merged model, quantised by `settings` if there are any; `result` is its `export.json`."""
    tags, what = ["dpo", "lora"], "merged into one bf16 model"
    if settings is not None:
        what = f"merged and quantised by GPTQ to {_grid(settings)}"
        tags += ["gptq", f"{settings.bits}-bit"]
    before, after = result["stop_rate_before"], result["stop_rate"]
    return Card(
        title=printable(out.name),
        base_id=hub_id(base),
        datasets=_datasets(recipe),
        library="transformers",
        tags=tags,
        license=_license(base, base_folder),
        facts=[f"{_name(base)} with a LoRA adapter, {what}", *_rounded(base), _tuned(recipe)],
        measured=f"Against the base with the adapter on top, on {result['compared_on']}:",
        figures=[
            *comparison.lines(),
            f"answers that end by themselves: {percent(before)} before, {percent(after)} after",
            *(f"made although {miss}" for miss in result["misses"]),
        ],
        example=(result["showcase_prompt"], printable(result["showcase_answer"])),
        code=plain_code(out.name) if settings is None else gptq_code(out.name),
    )


def quantised_card(out: Path, model: str, folder: Path, result: Mapping[str, Any]) -> Card:
    """Of a quantised base; `result` is its `quantization.json`."""
    settings = Quantising(result["bits"], result["group_size"], result["desc_act"])
    calibration = quoted(printable(result["calibration"]))
    return Card(
        title=printable(out.name),
        base_id=hub_id(model),
        datasets=[],
        library="transformers",
        tags=["gptq", f"{settings.bits}-bit"],
        license=_license(model, folder),
        facts=[
            f"{_name(model)}, quantised by GPTQ to {_grid(settings)}",
            *_rounded(model),
            f"calibrated on {result['calibration_rows']} prompts with their chosen answers from {calibration}",
            f"made by DPO Studio with gptqmodel {result['versions']['gptqmodel']}",
        ],
        figures=[perplexity_line(result)] if result["perplexity"] is not None else [],
        code=gptq_code(out.name),
    )


def perplexity_line(result: Mapping[str, Any]) -> str:
    """The loss by quantising, in one line."""
    return (
        f"perplexity of {result['held_out_answers']} held-out chosen answers: "
        f"{result['perplexity_before']:.3f} before, {result['perplexity']:.3f} after"
    )


def _name(model: str) -> str:
    return quoted(printable(public_name(model)))


def _rounded(model: str) -> Sequence[str]:
    """A note on the bundled model, which differs from the Hub's."""
    return (
        ["the base's weights had been rounded to 4 bits (its Q4_1 GGUF, dequantised)"] if model == BUNDLED_MODEL else []
    )


def _grid(settings: Quantising) -> str:
    return f"{settings.bits} bits in groups of {settings.group_size}" + (", act-order" if settings.desc_act else "")


def _tuned(recipe: Recipe) -> str:
    objective, on = recipe.objective, " and ".join(_name(one.source) for one in recipe.data.sources)
    return f"tuned with {objective.kind} (beta {objective.beta:g}) on {on} by DPO Studio"


def _datasets(recipe: Recipe) -> Sequence[str]:
    names = [None if one.source.startswith(BUNDLED) else hub_id(one.source) for one in recipe.data.sources]
    return [name for name in names if name is not None]


def _license(base: str, folder: Path | None) -> str | None:
    if base.startswith(BUNDLED):
        return "apache-2.0"
    return None if folder is None else license_of(folder)
