"""`dpo export`: a run's adapter, a merged model or a GPTQ folder, verified before it is finished."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from dpo_studio.config import Recipe
from dpo_studio.console.progress import Progress
from dpo_studio.disk import check_space
from dpo_studio.errors import RunError
from dpo_studio.export.card import public_name, versions
from dpo_studio.export.merge import merge, save_plain
from dpo_studio.export.requantise import (
    Quantising,
    calibration_rows,
    check_gptqmodel,
    file_dtype,
    layer_count,
    quantise,
    resolved,
)
from dpo_studio.export.verify import BARS, ExportCheck
from dpo_studio.export.whole import Making, check_new, making
from dpo_studio.models.adapters import read_adapter_config
from dpo_studio.models.bundled import BUNDLED_MODEL, published_name
from dpo_studio.models.finite import check_finite_adapter
from dpo_studio.models.folder import ModelFolder
from dpo_studio.models.load import load_chat_model
from dpo_studio.paths import user_path
from dpo_studio.preferences.rows import sample
from dpo_studio.runs.data_digests import date_of, recipe_of
from dpo_studio.runs.folder import RunFolder, is_run
from dpo_studio.sampling.completion import Completion
from dpo_studio.scan import read_json, template_text
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.workflows.demo import SHOWCASE
from dpo_studio.workflows.exporting.cards import adapter_card, tuned_card
from dpo_studio.workflows.exporting.comparing import RunModel, ask_the_run, look_again, stop_rate
from dpo_studio.workflows.exporting.gguf import GgufKind, check_gguf, write_gguf_export
from dpo_studio.workflows.exporting.quantizing import free_memory
from dpo_studio.workflows.loading import adapter_of

__all__ = ["Quantising", "export_run"]

Form = Literal["adapter", "merged", "gptq", "gguf"]


def export_run(
    run: str | Path,
    out: str | Path,
    to: Form,
    *,
    settings: Quantising | None = None,
    gguf_type: GgufKind = "f16",
    rows: int = 128,
    force: bool = False,
    overwrite: bool = False,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export the run's adapter into the new folder `out`; return `export.json`'s content.

    merged: base and adapter in bf16. gptq: that, requantised, calibrated on the run's own training pairs. Both are
    loaded back and compared with the run's own model; too far apart is an error unless `force`. gguf: merged, written
    for llama.cpp in `gguf_type`, and compared there where `xllamacpp` is installed.

    Raises:
        DPOStudioError: with a hint; `out` is whole or not there.
    """
    out, folder = Path(out), RunFolder(user_path(run))
    check_new(out, reads=[run], overwrite=overwrite)
    if not is_run(folder.path):
        raise RunError(f"{run} is not a run", hint="a run is the folder that `dpo train` or `dpo demo` made")
    recipe = recipe_of(folder)
    check_new(out, reads=[run, recipe.model.path, recipe.model.adapter], overwrite=overwrite)
    if to == "gptq":
        check_gptqmodel()
    if to == "gguf":
        check_gguf(recipe.model, gguf_type)
    with progress or Progress() as shown:
        adapter = adapter_of(folder, shown.say)
        check_finite_adapter(adapter)
        if given := recipe.model.template:
            shown.warn(f"no export holds model.template: serve it with chat_template_kwargs {json.dumps(given)}")
        if to == "adapter":
            return _export_adapter(folder, recipe, adapter, out, overwrite=overwrite)
        if dtype is not None:
            recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})
        quantising = settings or Quantising()
        return _Export(folder, recipe, adapter, out, to, quantising, gguf_type, rows, force, overwrite, shown).make()


def _typed_base(run: RunFolder, recipe: Recipe) -> str:
    """The base as the user gave it, never its place in a cache."""
    model = run.typed().get("model")
    return str(model["path"]) if isinstance(model, dict) and "path" in model else recipe.model.path


def _template(recipe: Recipe) -> str | None:
    """The chat template that the recipe has put in the place of the tokenizer's own."""
    named = recipe.model.chat_template
    return None if named is None else template_text(named, what="chat template of the run", error=RunError)


def _export_adapter(run: RunFolder, recipe: Recipe, adapter: Path, out: Path, *, overwrite: bool) -> dict[str, Any]:
    """A folder that plain PEFT loads; the numbers on its card are the run's own.

    Tensors and settings are read and written again: anything that is not a tensor or a LoRA setting is left out.
    """
    config = read_adapter_config(adapter)
    known = config.to_dict()
    base = _typed_base(run, recipe)
    result: dict[str, Any] = {
        "to": "adapter",
        "base": public_name(base),
        "rank": config.r,
        "versions": versions("peft", "transformers"),
    }
    if base == BUNDLED_MODEL:  # its name on the Hub belongs to other weights
        result["trained_on"] = base
    with making(out, overwrite=overwrite) as place:
        save_file(
            load_file(adapter / "adapter_model.safetensors"),
            place.result / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        raw = {key: value for key, value in read_json(adapter / "adapter_config.json").items() if key in known}
        raw |= {
            "base_model_name_or_path": published_name(base),
            "revision": recipe.model.revision,
            "auto_mapping": None,
        }
        _write_json(place.result / "adapter_config.json", raw)
        if (template := _template(recipe)) is not None:
            (place.result / "chat_template.jinja").write_text(template, encoding="utf-8")
        card = adapter_card(out, base, recipe, config.r, run.result() or {})
        (place.result / "README.md").write_text(card.text(), encoding="utf-8")
        _write_json(place.result / "export.json", result)
    return result


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass
class _Export:
    """One export of a whole model."""

    run: RunFolder
    recipe: Recipe
    adapter: Path
    out: Path
    to: Literal["merged", "gptq", "gguf"]
    settings: Quantising
    gguf_type: GgufKind
    rows: int
    force: bool
    overwrite: bool
    progress: Progress

    def make(self) -> dict[str, Any]:
        """Merge, quantise if asked, load back, compare, and put the result at `out`."""
        today = date_of(self.run)
        known = ask_the_run(self.recipe, self.adapter, self.progress, today=today)
        free_memory()
        check_space(self.out, _bytes_needed(known, self.to, self.settings.bits), f"exporting to {self.to}")
        with making(self.out, overwrite=self.overwrite) as place:
            base_folder = self._merge(known, place)
            if self.to == "gptq":
                self._requantise(known.training, place)
            whole = place.work / "merged" if self.to == "gguf" else place.result
            comparison, answers = look_again(known, self.recipe, whole, self.progress, today=today)
            for line in comparison.lines():
                self.progress.say(line)
            misses, more = comparison.misses(BARS[self.to]), {}
            if self.to == "gguf":
                gguf = write_gguf_export(known, self.recipe, whole, place.result, self.gguf_type, self.progress, today)
                misses, more = misses + gguf.misses, gguf.content
            if misses and not self.force:
                raise RunError(
                    f"{self.out} is not made: the {self.to} model is too far from the run's own: {'; '.join(misses)}",
                    hint=_what_keeps_it(self.to, self.settings),
                )
            for miss in misses:
                self.progress.warn(f"made all the same: {miss}")
            result = self._result(known, comparison, answers, misses) | more
            _write_json(place.result / "export.json", result)
            quantised = self.settings if self.to == "gptq" else None
            base = _typed_base(self.run, self.recipe)
            card = tuned_card(self.out, base, base_folder, self.recipe, quantised, comparison, result)
            (place.result / "README.md").write_text(card.text(), encoding="utf-8")
        return result

    def _merge(self, known: RunModel, place: Making) -> Path:
        """The merged model, in the result or on the way to it; returns where the base's files are."""
        target = place.result if self.to == "merged" else place.work / "merged"
        target.mkdir(exist_ok=True)
        section = self.recipe.model.model_copy(update={"residency": "packed", "compute": "auto", "attention": "sdpa"})
        section = section.model_copy(update={"dtype": _exact_dtype(known.base)})
        base = load_chat_model(section, folder=known.base, today=date_of(self.run))
        formed = known.base.quantization is not None or section.quantize is not None
        self.progress.say("merging: the adapter is added to the weights as they are formed" if formed else "merging")
        merge(base.model, known.deltas)
        save_plain(base.model, target, source=base.folder, template=_template(self.recipe))
        folder = base.folder
        del base
        free_memory()
        return folder

    def _requantise(self, training: Sequence[EncodedPair], place: Making) -> None:
        merged = place.work / "merged"
        self.settings = settings = resolved(merged, self.settings)
        chosen = [pair for _, pair in sample(((pair.row, pair) for pair in training), self.rows, seed=0)]
        self.progress.say(
            f"{settings.bits} bits in groups of {settings.group_size}, "
            f"calibrated on {len(chosen)} of the run's chosen answers"
        )
        with self.progress.task("quantise", layer_count(merged), "layers") as advance:
            rows = calibration_rows(chosen)
            quantise(merged, place.result, rows, settings, place.work, name=str(self.run.path), progress=advance)

    def _result(
        self, known: RunModel, comparison: ExportCheck, answers: Sequence[Completion], misses: Sequence[str]
    ) -> dict[str, Any]:
        quantised = vars(self.settings) if self.to == "gptq" else {}
        packages = ("torch", "transformers", *(("gptqmodel",) if self.to == "gptq" else ()))
        return {
            "to": self.to,
            "base": public_name(_typed_base(self.run, self.recipe)),
            **quantised,
            "compared_on": "held-out pairs" if known.held_out else "training pairs",
            "dtype": self.recipe.model.dtype,
            "beta": self.recipe.objective.beta,
            **vars(comparison),
            "bars": vars(BARS[self.to]),
            "misses": list(misses),
            "stop_rate_before": stop_rate(known.answers),
            "stop_rate": stop_rate(answers),
            "showcase_prompt": SHOWCASE,
            "showcase_answer_before": known.answers[-1].text,
            "showcase_answer": answers[-1].text,
            "versions": versions(*packages),
        }


def _exact_dtype(folder: ModelFolder) -> Any:
    """The precision of the base's weights: nothing is rounded before the adapter is added."""
    kept = torch.bfloat16 if folder.quantization is not None else file_dtype(folder.path)
    return str(kept).removeprefix("torch.")


def _bytes_needed(known: RunModel, to: str, bits: int) -> int:
    """The merged model in bf16; quantised, gptqmodel's finished layers and then the result beside it."""
    merged = 2 * known.weights
    if to == "merged":
        return merged
    if to == "gguf":
        return 2 * merged
    scales = known.linear * 2 / 32
    return int(merged + 2 * (known.linear * bits / 8 + scales + 4 * (known.weights - known.linear)))


def _what_keeps_it(to: str, settings: Quantising) -> str:
    if to in ("merged", "gguf"):
        return "--to adapter keeps it exactly; --force makes it all the same"
    finer = [] if settings.group_size == 32 else ["--group-size 32"]
    more = [] if settings.bits == 8 else ["--bits 8"]
    return f"what keeps more: {', '.join([*finer, *more, '--to adapter (exact)'])}; --force makes it all the same"
