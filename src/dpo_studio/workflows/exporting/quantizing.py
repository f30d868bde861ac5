"""`dpo quantize`: a dense model is quantised to GPTQ, calibrated on the user's pairs, and its loss measured on
others."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_studio.config import BUNDLED, ModelSection, SourceLike, as_source
from dpo_studio.console.progress import Progress
from dpo_studio.disk import check_space
from dpo_studio.errors import DataError, ModelError, RunError, UsageError
from dpo_studio.export.card import public_name, versions
from dpo_studio.export.requantise import (
    Quantising,
    calibration_rows,
    check_gptqmodel,
    layer_count,
    quantise,
    resolved,
)
from dpo_studio.export.whole import check_new, making
from dpo_studio.learning.batched_logps import batched_logps
from dpo_studio.models.folder import ModelFolder, open_model
from dpo_studio.models.load import ChatModel, load_chat_model
from dpo_studio.paths import user_path
from dpo_studio.preferences.pair import prompt_key
from dpo_studio.preferences.rows import sample
from dpo_studio.preferences.sources import read_pairs
from dpo_studio.preferences.split import is_held_out
from dpo_studio.runs.folder import is_run
from dpo_studio.tokens.encode import EncodedPair, encode_pairs
from dpo_studio.workflows.exporting.cards import quantised_card

__all__ = ["Calibration", "Quantising", "quantize_model"]

_BUNDLED_PAIRS = BUNDLED + "everyday:train"
"""The side of the bundled pairs that recipes train on: the held-out side stays unseen."""
_MEASURED = 64
"""Held-out pairs, at most: 6,000 answer tokens give a perplexity good to 2 %."""
_FRACTION = 0.1
_ON_THE_WAY = 2.5
"""Times the dense files: gptqmodel keeps finished layers on disk until it writes them again."""


@dataclass(frozen=True)
class Calibration:
    """The calibration data."""

    source: SourceLike | None = None
    """Pairs; None: the bundled ones, for the bundled model."""
    rows: int = 128
    """Prompts with their chosen answers."""
    max_length: int = 1024
    """Tokens of a prompt and its answer; longer ones are cut at the answer's end."""


def quantize_model(
    model: str,
    out: str | Path,
    *,
    calibration: Calibration | None = None,
    settings: Quantising | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """GPTQ `model` into the new folder `out`; return `quantization.json`'s content.

    A tenth of the calibration source's prompts are held out (those that a recipe with the default split holds out,
    too); the perplexity of their chosen answers is measured before and after.

    Raises:
        DPOStudioError: with a hint; `out` is whole or not there.
    """
    started = time.perf_counter()
    wanted, settings, out = calibration or Calibration(), settings or Quantising(), Path(out)
    source = as_source(wanted.source).source if wanted.source else None
    check_new(out, reads=[model, source], overwrite=overwrite)
    check_gptqmodel()
    with progress or Progress() as shown:
        opened = _dense_folder(model, shown)
        folder = opened.path
        settings = resolved(folder, settings)
        pairs, measured = _pairs(wanted, model, opened, shown)
        check_space(out, int(_ON_THE_WAY * _weight_bytes(folder)), "quantising")
        base = load_chat_model(ModelSection(path=model), folder=opened, say=shown.say)
        dtype: Any = str(base.model.dtype).removeprefix("torch.")
        before = _perplexity(base, measured, shown, "before")
        del base
        free_memory()
        with making(out, overwrite=overwrite) as place:
            shown.say(f"{settings.bits} bits in groups of {settings.group_size}, calibrated on {len(pairs)} answers")
            with shown.task("quantise", layer_count(folder), "layers") as advance:
                rows = calibration_rows(pairs)
                quantise(folder, place.result, rows, settings, place.work, name=model, progress=advance)
            back = load_chat_model(ModelSection(path=str(place.result), dtype=dtype), say=shown.say)
            after = _perplexity(back, measured, shown, "after")
            result: dict[str, Any] = {
                "model": public_name(model),
                "bits": settings.bits,
                "group_size": settings.group_size,
                "desc_act": settings.desc_act,
                "sym": settings.sym,
                "calibration": public_name(as_source(wanted.source or _BUNDLED_PAIRS).source),
                "calibration_rows": len(pairs),
                "held_out_answers": len(measured),
                "perplexity_before": before,
                "perplexity": after,
                "dtype": dtype,
                "bytes": _weight_bytes(place.result),
                "seconds": round(time.perf_counter() - started, 1),
                "versions": versions("torch", "transformers", "gptqmodel"),
            }
            (place.result / "quantization.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            (place.result / "README.md").write_text(quantised_card(out, model, folder, result).text(), encoding="utf-8")
    return result


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def free_memory() -> None:
    """Free unreferenced memory, on the GPU too: gptqmodel's process needs it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _dense_folder(model: str, progress: Progress) -> ModelFolder:
    """The checked folder of the model.

    Raises:
        RunError, ModelError: a run, an adapter, or quantised already.
    """
    if is_run(user_path(model)):
        raise RunError(f"{model} is a run", hint="`dpo export RUN OUT --to gptq` merges its adapter and quantises that")
    folder = open_model(model, None, progress.say)
    folder.check_base(ModelSection(path=model))
    if folder.quantization is not None:
        raise ModelError(f"{model} is quantised already", hint="train it as it is: model.path in a recipe")
    return folder


def _pairs(
    wanted: Calibration, model: str, folder: ModelFolder, progress: Progress
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """(calibration rows, measured rows), without a common prompt.

    Raises:
        UsageError, DataError: no source, or no pair in it can be used.
    """
    given = wanted.source or (_BUNDLED_PAIRS if model.startswith(BUNDLED) else None)
    if given is None:
        raise UsageError(
            "no calibration pairs are given",
            hint="--calibration SOURCE: the pairs you will train on are right, their chosen answers are used",
        )
    section = as_source(given)
    name, source = section.source, read_pairs(section)
    encoder = folder.encoder(ModelSection(path=model))
    encoded = encode_pairs(source.pairs, encoder, max_length=wanted.max_length, too_long="cut_answer_end")
    if not encoded.pairs:
        raise DataError(f"{name}: no pair can be calibrated on", hint=f"the first: {encoded.refused[0][1]}")
    keys = {pair.row: prompt_key(pair.prompt) for pair in source.pairs}
    apart = [pair for pair in encoded.pairs if is_held_out(keys[pair.row], seed=0, fraction=_FRACTION)]
    rest = [pair for pair in encoded.pairs if not is_held_out(keys[pair.row], seed=0, fraction=_FRACTION)]
    if not rest or not apart:
        progress.warn(f"{name} has too few prompts to hold some out: nothing is measured")
        rest, apart = encoded.pairs, []
    chosen = sample(((pair.row, pair) for pair in rest), wanted.rows, seed=0)
    if len(chosen) < wanted.rows:
        progress.say(f"{name} has {len(chosen)} pairs to calibrate on, {wanted.rows} were asked for")
    return [pair for _, pair in chosen], apart[:_MEASURED]


def _perplexity(base: ChatModel, pairs: Sequence[EncodedPair], progress: Progress, when: str) -> float | None:
    """Of the chosen answers' tokens; None without any."""
    if not pairs:
        return None
    with progress.task(f"perplexity {when}", len(pairs), "pairs") as advance:
        logps = batched_logps(base.model, pairs, progress=advance)
    nats = -(logps.chosen_P.double().sum() / logps.chosen_tokens_P.sum()).item()
    return math.exp(nats) if nats < 700 else math.inf
