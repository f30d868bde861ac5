"""How far FP8 takes margins and accuracy from bf16 on real pairs: two trainings of one recipe, measured each way.

    python benchmarks/fp8_drift.py --recipe recipes/demo.yaml --json drift.json

FP8 products round nothing but activations: the weights of a 4-bit base are exact in e4m3 (`frozen/fp8.py`). So this
rounds the input of every frozen product as the kernel does, e4m3 in blocks with a scale of their own, and multiplies by
the base's bf16 weights; that runs anywhere, on models whose sizes are no multiples of 128 too. LoRA's own products and
the backward pass stay in bf16, as they do in FP8.

Shapes: M = rows of activations, K = inputs.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dpo_studio.config import SourceSection
from dpo_studio.frozen import products
from dpo_studio.frozen.dense import Dense
from dpo_studio.learning import eager_logps, packing_check
from dpo_studio.workflows.scoring import score_pairs
from dpo_studio.workflows.training import train_recipe

_LARGEST = 448.0
"""Of e4m3."""


def main() -> None:
    """Train twice, score each way, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--pairs", default="bundled:everyday:held_out", help="a SOURCE to score")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a recipe key")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        record: dict[str, Any] = {"block_of_576": block(576), "settings": {}}
        margins: dict[str, list[float]] = {}
        for name in ("bf16", "fp8"):
            run = Path(scratch) / name
            with rounded_activations(name == "fp8"):
                overrides = [*given.set, f"run.folder={run}", "reference.mode=live"]
                result = train_recipe(given.recipe, overrides)
            keys = ("accuracy", "accuracy_ci95", "held_out_loss")
            record["settings"][f"trained in {name}"] = {key: result.get(key) for key in keys}
            for scored in ("bf16", "fp8"):
                with rounded_activations(scored == "fp8"):
                    margins[f"{name}, scored in {scored}"] = scored_margins(run, given.pairs)
        for name, values in margins.items():
            record["settings"][name] = {"accuracy": share(values), "mean_margin": statistics.mean(values)}
        pairs = [("bf16, scored in bf16", "bf16, scored in fp8"), ("bf16, scored in bf16", "fp8, scored in fp8")]
        record["drift"] = {f"{a} / {b}": apart(margins[a], margins[b]) for a, b in pairs}
    print(json.dumps(record, indent=1))
    if given.json:
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@contextmanager
def rounded_activations(on: bool) -> Iterator[None]:
    """Inside, and if `on`, the operator takes its FP8 branch for dense weights, with the rounding alone."""
    if not on:
        yield
        return
    with (
        patch.object(products, "InFP8", Dense),
        patch.object(products, "fp8_rows", lambda x_MK: (rounded(x_MK),)),
        patch.object(Dense, "product", lambda weight, x_MK: x_MK @ weight.weight_NK.t(), create=True),
        patch.object(packing_check, "computes_in_fp8", lambda model: True),
        patch.object(eager_logps, "computes_in_fp8", lambda model: True),
    ):
        yield


def rounded(x_MK: Tensor) -> Tensor:
    """Each block of a row to e4m3 with the scale that takes its largest value to e4m3's largest, and back."""
    x_MGB = x_MK.float().view(*x_MK.shape[:-1], -1, block(x_MK.shape[-1]))
    scales_MG1 = (x_MGB.abs().amax(-1, keepdim=True) / _LARGEST).clamp_min(1e-12)
    in_e4m3 = (x_MGB / scales_MG1).to(torch.float8_e4m3fn).float()
    return (in_e4m3 * scales_MG1).view(x_MK.shape).to(x_MK.dtype)


def block(inputs: int) -> int:
    """The kernel's 128, or the largest power of two below that divides the inputs: 64 of SmolLM2's 576."""
    return next(size for size in (128, 64, 32, 16, 1) if inputs % size == 0)


def scored_margins(run: Path, pairs: str) -> list[float]:
    """Reward margins of the pairs, in order."""
    out = io.StringIO()
    score_pairs(str(run), SourceSection(source=pairs), out)
    return [json.loads(line)["margin"] for line in out.getvalue().splitlines()]


def share(margins: list[float]) -> float:
    """Of pairs ordered as labelled."""
    return sum(margin > 0 for margin in margins) / len(margins)


def apart(these: list[float], those: list[float]) -> dict[str, float]:
    """Root mean square of the difference of two lists of margins, and how many keep their sign."""
    pairs = list(zip(these, those, strict=True))
    return {
        "rms": statistics.mean((a - b) ** 2 for a, b in pairs) ** 0.5,
        "same_sign": sum((a > 0) == (b > 0) for a, b in pairs) / len(pairs),
    }


if __name__ == "__main__":
    main()
