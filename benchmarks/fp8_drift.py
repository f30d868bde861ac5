"""What FP8's rounding of activations does to log-probs, margins and accuracy of real pairs; runs on any machine.

    python benchmarks/fp8_drift.py runs/demo-gptq pairs.jsonl --pairs 120

The forward products of `model.compute: fp8` are imitated: every input of a base layer is rounded to e4m3 in blocks of
128 that share a scale, the weights are exact, sums are fp32's. Policy and reference both compute so, or neither does.

Shapes: T = tokens, K = inputs, B = blocks of 128 of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import pad

from dpo_studio.config import SourceSection
from dpo_studio.learning.memory import CPU_TOKENS
from dpo_studio.learning.reference import batched_logps
from dpo_studio.models.fp8 import FP8_BLOCK
from dpo_studio.models.packed import Frozen
from dpo_studio.objectives import PairLogps, margin, wins
from dpo_studio.preferences.sources import read_pairs
from dpo_studio.tokens.encode import EncodedPair, encode_pairs
from dpo_studio.workflows.loading import Loaded, load_any

_LARGEST = 448.0
"""Of e4m3."""


def main() -> None:
    """Score the pairs three ways, print what moved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run with a GPTQ base")
    parser.add_argument("source", help="pairs")
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--max-length", type=int, default=512)
    options = parser.parse_args()
    loaded = load_any(options.run, dtype="bfloat16")
    read = read_pairs(SourceSection(source=options.source)).pairs[: options.pairs]
    pairs = encode_pairs(read, loaded.base.encoder, max_length=options.max_length, too_long="drop").pairs
    plain = scored(loaded, pairs)
    with fp8_inputs():
        rounded = scored(loaded, pairs)
    beta = loaded.beta or 0.1
    tokens = float(plain[0].chosen_tokens_P.sum() + plain[0].rejected_tokens_P.sum())
    moved = sum(
        (getattr(plain[0], name) - getattr(rounded[0], name)).abs().sum() for name in ("chosen_P", "rejected_P")
    )
    before, after = (beta * margin(*sides) for sides in (plain, rounded))
    print(f"{len(pairs)} pairs, beta {beta:g}; bf16, and with FP8's inputs")
    print(f"the policy's log-probs of answers moved by {float(moved) / tokens:.4f} nats a token")
    print(f"reward margins: {before.mean():.3f} and {after.mean():.3f} on average, spread {before.std():.3f}")
    shift = after - before
    print(f"moved by {shift.pow(2).mean().sqrt():.3f} (root mean square), {shift.mean():+.4f} on average")
    print(f"sign kept in {((before > 0) == (after > 0)).float().mean():.3f} of the pairs")
    print(f"accuracy {wins(before).mean():.3f} and {wins(after).mean():.3f}")


def scored(loaded: Loaded, pairs: Sequence[EncodedPair]) -> tuple[PairLogps, PairLogps]:
    """(policy, reference) of all pairs."""
    found = []
    for tuned in (True, False):
        with loaded.tuned(tuned):
            found.append(batched_logps(loaded.policy, pairs, range(len(pairs)), budget=CPU_TOKENS))
    return found[0], found[1]


@contextmanager
def fp8_inputs() -> Iterator[None]:
    """Inside, base layers read inputs that were rounded; their adapters do not, as in `models/products.py`."""
    with patch("dpo_studio.models.lora.products", _products), patch("dpo_studio.models.gptq.products", _products):
        yield


def _products(x: Tensor, weights: Sequence[Frozen], down_RK: Tensor, ups_Nr: list[Tensor]) -> list[Tensor]:
    rounded, low = rounded_to_fp8(x), x @ down_RK.t()
    lows = torch.split(low, [up.shape[1] for up in ups_Nr], dim=-1)
    return [
        (rounded @ weight.formed(x.dtype).t()) + part @ up.t()
        for weight, up, part in zip(weights, ups_Nr, lows, strict=True)
    ]


def rounded_to_fp8(x: Tensor) -> Tensor:
    """Each block of 128 inputs (and a short last one) divided by its scale, rounded to e4m3, and multiplied again."""
    missing = -x.shape[-1] % FP8_BLOCK
    blocks = pad(x.float(), (0, missing)).view(*x.shape[:-1], -1, FP8_BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / _LARGEST
    back: Tensor = (blocks / scales).to(torch.float8_e4m3fn).float() * scales
    return back.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


if __name__ == "__main__":
    main()
