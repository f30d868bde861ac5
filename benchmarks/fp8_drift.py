"""How far FP8 takes margins and accuracy from bf16 on real pairs: two trainings of one recipe, each scored both ways.

    python benchmarks/fp8_drift.py --recipe recipes/demo.yaml --json drift.json

`model.compute: fp8` runs on a CPU too, in a GPU's arithmetic (e4m3, a scale a row, forward and backward), so this needs
no GPU. `gradients` has the cosine of each layer's LoRA gradient with fp32's, in FP8 and in bf16, on one row of pairs.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_studio.config import AdapterSection, ModelSection, SourceSection
from dpo_studio.learning.row_gradients import gradients
from dpo_studio.models.adapters import attach
from dpo_studio.models.load import load_chat_model
from dpo_studio.policy.policy import Policy
from dpo_studio.preferences.sources import read_pairs
from dpo_studio.tokens.encode import encode_pairs
from dpo_studio.tokens.pack import pack
from dpo_studio.workflows.scoring import score_pairs
from dpo_studio.workflows.training import train_recipe

_B_SIZE = 0.02
"""Standard deviation of B, so that it is not zero as in a fresh adapter, whose A has no gradient."""


def main() -> None:
    """Train twice, score each way, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--pairs", default="bundled:everyday:held_out", help="a SOURCE to score")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a recipe key")
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct", help="of the gradients")
    parser.add_argument("--only-gradients", action="store_true", help="train nothing")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    record: dict[str, Any] = {"gradients": gradient_cosines(given.model, given.pairs)}
    if not given.only_gradients:
        record |= trained(given.recipe, given.pairs, given.set)
    print(json.dumps(record, indent=1))
    if given.json:
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def trained(recipe: Path, pairs: str, overrides: list[str]) -> dict[str, Any]:
    """Accuracy and margins of a run in bf16 and one in FP8, each scored in both."""
    found: dict[str, Any] = {"settings": {}}
    margins: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("bf16", "fp8"):
            run = Path(scratch) / name
            mine = [*overrides, f"run.folder={run}", "reference.mode=live", f"model.compute={name}"]
            result = train_recipe(recipe, mine)
            keys = ("accuracy", "accuracy_ci95", "held_out_loss")
            found["settings"][f"trained in {name}"] = {key: result.get(key) for key in keys}
            for scored in ("bf16", "fp8"):
                margins[f"{name}, scored in {scored}"] = scored_margins(run, pairs, scored)
    for name, values in margins.items():
        found["settings"][name] = {"accuracy": share(values), "mean_margin": statistics.mean(values)}
    compared = [("bf16, scored in bf16", "bf16, scored in fp8"), ("bf16, scored in bf16", "fp8, scored in fp8")]
    found["drift"] = {f"{a} / {b}": apart(margins[a], margins[b]) for a, b in compared}
    return found


def gradient_cosines(model: str, source: str) -> dict[str, Any]:
    """By kind of layer: the mean cosine with fp32's gradient, and the smallest, in FP8 and in bf16."""
    ways = {"fp32": ("float32", "auto"), "bf16": ("bfloat16", "auto"), "fp8": ("bfloat16", "fp8")}
    found: dict[str, dict[str, Tensor]] = {}
    for name, (dtype, compute) in ways.items():
        section = ModelSection.model_validate({"path": model, "dtype": dtype, "compute": compute})
        loaded = load_chat_model(section)
        policy = attach(loaded.model, AdapterSection(), seed=0)
        for tensor_name, tensor in policy.named_parameters():
            if "lora_B" in tensor_name:
                draw = torch.Generator().manual_seed(len(tensor_name))
                tensor.data = _B_SIZE * torch.randn(tensor.shape, generator=draw).to(tensor)
        pairs = read_pairs(SourceSection(source=source)).pairs[:8]
        row = pack(encode_pairs(pairs, loaded.encoder, max_length=512, too_long="drop").pairs)
        found[name] = gradients(Policy(policy), row.to(loaded.device))
    cosines: dict[str, dict[str, list[float]]] = {"bf16": defaultdict(list), "fp8": defaultdict(list)}
    for way, by_kind in cosines.items():
        for name, exact in found["fp32"].items():
            kind = ".".join(name.split(".")[-4:-2])
            cosine = torch.nn.functional.cosine_similarity(found[way][name].flatten(), exact.flatten(), 0)
            by_kind[kind].append(cosine.item())
    return {
        way: {kind: {"mean": statistics.mean(values), "least": min(values)} for kind, values in by_kind.items()}
        for way, by_kind in cosines.items()
    }


def scored_margins(run: Path, pairs: str, compute: str) -> list[float]:
    """Reward margins of the pairs, in order."""
    out = io.StringIO()
    score_pairs(str(run), SourceSection(source=pairs), out, compute=compute)
    return [json.loads(line)["margin"] for line in out.getvalue().splitlines()]


def share(margins: list[float]) -> float:
    """Of pairs ordered as labelled."""
    return sum(margin > 0 for margin in margins) / len(margins)


def apart(these: list[float], those: list[float]) -> dict[str, float]:
    """Root mean square of the difference of two lists of margins, their correlation, and how many keep their sign."""
    pairs = list(zip(these, those, strict=True))
    return {
        "rms": statistics.mean((a - b) ** 2 for a, b in pairs) ** 0.5,
        "correlation": statistics.correlation(these, those),
        "same_sign": sum((a > 0) == (b > 0) for a, b in pairs) / len(pairs),
    }


if __name__ == "__main__":
    main()
