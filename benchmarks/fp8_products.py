"""Rate and error of FP8 products by their scaling, beside bf16's: which scaling `model.compute: fp8` should have.

    python benchmarks/fp8_products.py --json fp8-products.json

Each layer's products of a shape with its rows of activations, forward (x W^T) and backward (g W), on random data of
three kinds: normal; `outliers`, where one input in 64 is 30 times as large, as in the residual stream of trained
models; and `heavy`, Student's t with three degrees of freedom. The error is relative to the product in fp64 on some
rows. What a step needs besides the products (rounding the inputs, adding LoRA's part) is timed by itself.

Shapes: M = rows, K = inputs, N = outputs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from dpo_studio.frozen.fp8 import FP8_BLOCK, fp8_rows
from dpo_studio.frozen.row_scaled import row_scaled
from shapes import SHAPES

_LARGEST = 448.0
_ROWS_COMPARED = 512


def main() -> None:
    """Measure each, print a line each, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mistral-7b")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    record: dict[str, Any] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "products": []}
    for inputs, outputs in SHAPES[given.shape].products:
        for kind in ("normal", "outliers", "heavy"):
            record["products"].append(one(given.rows, inputs, outputs, kind))
            print(json.dumps(record["products"][-1]), flush=True)
    record["passes_ms"] = passes(given.rows, SHAPES[given.shape].products)
    print(json.dumps(record["passes_ms"]))
    if given.json:
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def one(rows: int, inputs: int, outputs: int, kind: str) -> dict[str, Any]:
    """TFLOP/s and relative error of each way to the product of one layer, on one kind of data."""
    x_MK = drawn(rows, inputs, kind)
    weight_NK = torch.randn(outputs, inputs, device="cuda").mul_(inputs**-0.5).bfloat16()
    exact = x_MK[:_ROWS_COMPARED].double() @ weight_NK.double().t()
    ways = {"bf16": lambda: x_MK @ weight_NK.t(), **row_ways(x_MK, weight_NK), **block_ways(x_MK, weight_NK)}
    found: dict[str, Any] = {"K": inputs, "N": outputs, "data": kind}
    for name, way in ways.items():
        try:
            y_MN = way()
        except (RuntimeError, ValueError) as failure:
            found[name] = str(failure).splitlines()[0][:200]
            continue
        error = ((y_MN[:_ROWS_COMPARED].double() - exact).norm() / exact.norm()).item()
        bias = ((y_MN[:_ROWS_COMPARED].double() * exact).sum() / exact.square().sum()).item() - 1
        found[name] = {
            "tflops": round(2e-9 * rows * inputs * outputs / milliseconds(way), 1),
            "error": round(error, 5),
            "shrinks_by": round(-bias, 6),
        }
    return found


def drawn(rows: int, inputs: int, kind: str) -> Tensor:
    """Activations of a kind, bf16."""
    x_MK = torch.randn(rows, inputs, device="cuda")
    if kind == "outliers":
        x_MK[:, ::64] *= 30
    if kind == "heavy":
        x_MK /= torch.distributions.Chi2(3.0).sample((rows, inputs)).to("cuda").div_(3).sqrt_()
    return x_MK.bfloat16()


def row_ways(x_MK: Tensor, weight_NK: Tensor) -> dict[str, Callable[[], Tensor]]:
    """A scale a row on both sides, accumulated fast or exactly."""
    x8_MK, x_scales_M = row_scaled(x_MK)
    w8_NK, scales_N = row_scaled(weight_NK)

    def product(fast: bool) -> Tensor:
        return scaled_mm(
            x8_MK,
            w8_NK.t(),
            x_scales_M[:, None],
            ScalingType.RowWise,
            scales_N[None],
            ScalingType.RowWise,
            output_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )

    return {"rows, fast": lambda: product(True), "rows, exact": lambda: product(False)}


def block_ways(x_MK: Tensor, weight_NK: Tensor) -> dict[str, Callable[[], Tensor]]:
    """1x128 blocks of activations with 128x128 blocks of weights."""
    outputs, inputs = weight_NK.shape
    x8_MK, x_scales_MG = fp8_rows(x_MK)
    blocks = weight_NK.float().view(outputs // FP8_BLOCK, FP8_BLOCK, inputs // FP8_BLOCK, FP8_BLOCK)
    scales = blocks.abs().amax((1, 3)).clamp_min(1e-12) / _LARGEST
    w8_NK = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(outputs, inputs)

    def product() -> Tensor:
        return scaled_mm(
            x8_MK,
            w8_NK.t(),
            x_scales_MG,
            ScalingType.BlockWise1x128,
            scales.contiguous().t(),  # (K / 128, N / 128), with the blocks of an output next to each other
            ScalingType.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )

    return {"1x128 by 128x128": product}


def passes(rows: int, products: list[tuple[int, int]]) -> dict[str, float]:
    """Milliseconds a layer for what FP8 adds: rounding each input once, each gradient; LoRA's part of each output."""
    widths = sorted({inputs for _, inputs in products} | {outputs for outputs, _ in products})
    found = {}
    for width in widths:
        x_MK, other_MK = drawn(rows, width, "normal"), drawn(rows, width, "normal")
        low_MR, up_NR = drawn(rows, 16, "normal"), drawn(width, 16, "normal")
        found[f"round {width}"] = milliseconds(partial(row_scaled, x_MK))
        found[f"add LoRA to {width}"] = milliseconds(partial(x_MK.addmm_, low_MR, up_NR.t()))
        found[f"add {width}"] = milliseconds(partial(x_MK.add_, other_MK))
    return {name: round(value, 4) for name, value in found.items()}


def milliseconds(work: Callable[[], object]) -> float:
    """The median of repeated runs."""
    from triton.testing import do_bench

    return float(do_bench(work, warmup=20, rep=60, return_mode="median"))


if __name__ == "__main__":
    main()
