"""What the check at a run's start costs: random weights in the true shape, the check as training calls it.

    python benchmarks/start_check.py --device cuda --shape mistral-7b --base bf16
    python benchmarks/start_check.py --shape smollm2-135m

The pairs are 1,000 of the ultrafeedback mix; the check chooses among them. The first time compiles and warms up what a
run's first row would; the second is what remains. The last line is the second's seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from dpo_studio.learning.packing_check import check_packing
from meter import synchronise
from ours import our_policy
from shapes import MIXES, SHAPES, random_pairs, shaped

__all__ = ["main"]

_BASES = {"bf16": "ours", "gptq": "packed", "gptq-fp8": "fp8"}
"""As `our_policy` calls them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Check twice, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--base", choices=_BASES, default="bf16")
    parser.add_argument("--mix", choices=MIXES, default="ultrafeedback")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    shape = shaped(options.shape)
    policy = our_policy(shape, device, _BASES[options.base])
    if options.dtype == "float32":
        policy = policy.float()
    pairs = random_pairs(MIXES[options.mix], 1000, shape.vocabulary)
    for which in ("first", "second"):
        synchronise(device)
        start = time.perf_counter()
        difference = check_packing(policy, pairs)
        synchronise(device)
        seconds = time.perf_counter() - start
        print(f"{which}: {seconds:.2f} s, {difference:.3g} nats a token apart", flush=True)
    print(f"seconds={seconds:.2f}")


if __name__ == "__main__":
    main()
