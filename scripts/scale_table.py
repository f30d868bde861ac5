"""What a training takes on many GPUs, worked out from what was measured on one, two and four: docs/scale.md.

    python scripts/scale_table.py            # the tables, as Markdown
    python scripts/scale_table.py --write    # into docs/scale.md

Everything here is computed but the constants under "Measured" (docs/log.md). A formula stands beside each quantity.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30

# Measured (docs/log.md): H200, 8,192 tokens a micro-batch, UltraFeedback's lengths, the reference cached
RATE = 487e12
"""Floating-point operations a second and GPU by 6 N a token with the reference in the step (15.8 pairs/s of a 7B)."""
TOKENS_A_PAIR = 685
"""Mean of UltraFeedback's pairs, each prompt once."""
NVLINK = 329e9
"""Bytes a second of an all-reduce's bus between two H100s."""
ACTIVATIONS = 30.0 * GIB / (8192 * 32 * 4096)
"""Bytes a token, layer and width: a 7B's peak of 45 GiB at 8,192 tokens less its weights and head."""

# Assumed
NETWORK = 50e9
"""Bytes a second and GPU between machines: one 400 Gb/s port a GPU."""
GPU = 80e9
"""Bytes of an H100."""
FULL = 0.9
"""Share of it that is used."""
PAIRS, TOKENS, RANK, MACHINE = 64, 8192, 16, 8
"""Pairs a GPU and step, tokens of a micro-batch, the adapter's rank, GPUs of a machine."""


@dataclass(frozen=True)
class Shape:
    """A dense decoder."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_size: int = 128

    @property
    def products(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's seven products."""
        keys, queries = self.kv_heads * self.head_size, self.heads * self.head_size
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        return [*attention, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]

    @property
    def in_layers(self) -> int:
        """Weights of the layers."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.products)

    @property
    def outside(self) -> int:
        """Weights of embedding and head."""
        return 2 * self.vocabulary * self.hidden

    @property
    def adapter(self) -> int:
        """Weights of a LoRA of the rank above on every layer."""
        return self.layers * sum(RANK * (inputs + outputs) for inputs, outputs in self.products)


SHAPES = (
    Shape("7B", 32, 4096, 14336, 32, 8, 32000),
    Shape("70B", 80, 8192, 28672, 64, 8, 128256),
    Shape("405B", 126, 16384, 53248, 128, 8, 128256),
)


@dataclass(frozen=True)
class Way:
    """How the frozen weights lie."""

    name: str
    bytes_a_weight: float
    sharded: bool


WAYS = (Way("4-bit, whole", 0.53, False), Way("bf16, whole", 2.0, False), Way("bf16, sharded", 2.0, True))


def memory(shape: Shape, way: Way, shards: int, *, recomputed: bool, tokens: int = TOKENS) -> float:
    """Bytes a GPU: w N / shards + 2 x embedding and head + 16 A (fp32 weight, gradient, two averages) + activations.

    Activations: a T L H; with layers recomputed 2 T L H (their inputs) and one layer's own. Sharded: two layers more,
    which are collected.
    """
    weights = way.bytes_a_weight * shape.in_layers / shards + 2 * shape.outside
    kept = ACTIVATIONS * tokens * shape.layers * shape.hidden
    if recomputed:
        kept = kept / shape.layers + 2 * tokens * shape.layers * shape.hidden
    if shards > 1:
        weights += 2 * way.bytes_a_weight * shape.in_layers / shape.layers
    return weights + 16 * shape.adapter + kept


def choice(shape: Shape, way: Way, gpus: int) -> tuple[int, bool] | None:
    """(over how many GPUs a layer is sharded, whether layers are recomputed): those of a machine where that is enough.

    None: it does not fit.
    """
    for shards in (1,) if not way.sharded else (min(gpus, MACHINE), gpus):
        for recomputed in (False, True):
            if memory(shape, way, shards, recomputed=recomputed) < FULL * GPU:
                return shards, recomputed
    return None


def seconds(shape: Shape, way: Way, gpus: int, shards: int, recomputed: bool) -> tuple[float, float, float]:
    """(products, collected weights, the adapter's sum) of a step, each by itself.

    Products: 4 N tokens / rate (forward, and the gradient of activations), 6 N where layers are recomputed. Weights: 2
    collections of (s-1)/s w N a micro-batch, over the slowest link. Sum: 2 (n-1)/n 4 A, likewise.
    """
    tokens = PAIRS * TOKENS_A_PAIR
    products = (6 if recomputed else 4) * shape.in_layers * tokens / RATE
    collected = 2 * (shards - 1) / shards * way.bytes_a_weight * shape.in_layers * tokens / TOKENS
    total = 2 * (gpus - 1) / gpus * 4 * shape.adapter
    return products, collected / _link(shards), total / _link(gpus)


def _link(processes: int) -> float:
    return NVLINK if processes <= MACHINE else NETWORK


def rows(gpus: int) -> list[str]:
    """A line of the table for each model and way that fits on so many GPUs."""
    lines = []
    for shape in SHAPES:
        fitting = [(way, found) for way in WAYS if (found := choice(shape, way, gpus)) is not None]
        if not fitting:
            lines.append(f"| {gpus:,} | {shape.name} | does not fit | | | | | |")
        for way, (shards, recomputed) in fitting:
            if way.sharded and shards == 1:
                continue
            needed = memory(shape, way, shards, recomputed=recomputed)
            products, collected, total = seconds(shape, way, gpus, shards, recomputed)
            spent = max(products, collected) + total  # weights are collected while a layer is computed
            name = (
                f"{way.name}{f' over {shards:,}' if way.sharded else ''}{', layers recomputed' if recomputed else ''}"
            )
            lines.append(
                f"| {gpus:,} | {shape.name} | {name} | {needed / GIB:.0f} | {products:.1f} | {collected:.1f} "
                f"| {total:.3f} | {gpus * PAIRS / spent:,.0f} |"
            )
    return lines


def checks() -> list[str]:
    """The same formulas beside what was measured on H200s (docs/log.md)."""
    small, large = SHAPES[:2]
    rate = {shape.name: RATE / (6 * shape.in_layers * TOKENS_A_PAIR) for shape in SHAPES}
    packed, whole, sharded = WAYS
    return [
        "| what | computed | measured |",
        "|---|---|---|",
        f"| 7B bf16, reference cached, one GPU: pairs/s | {rate['7B'] * 6 / 4:.1f} | 22.7 |",
        f"| the same: GiB | {memory(small, whole, 1, recomputed=False) / GIB:.0f} | 45 |",
        f"| 70B 4-bit, reference in the step, one GPU: pairs/s | {rate['70B']:.2f} | 1.66 |",
        f"| the same, 4,096 tokens: GiB | {memory(large, packed, 1, recomputed=False, tokens=4096) / GIB:.0f} | 113 |",
        f"| 70B bf16 sharded over 4, reference in the step: pairs/s | {4 * rate['70B']:.1f} | 5.66 (prototype) |",
        f"| the same, 4,096 tokens: GiB a GPU "
        f"| {memory(large, sharded, 4, recomputed=False, tokens=4096) / GIB:.0f} | 115 (prototype) |",
    ]


def table() -> str:
    """All of it."""
    head = [
        "| GPUs | model | frozen weights | GiB a GPU | products s | weights s | sum s | pairs/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*checks(), "", *head, *(line for gpus in (1, 8, 64, 1024) for line in rows(gpus))])


def main() -> None:
    """Print the table, or put it between the two marks in docs/scale.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(table())
        return
    file = Path(__file__).parent.parent / "docs" / "scale.md"
    before, mark, rest = file.read_text(encoding="utf-8").partition("<!-- scale_table.py -->\n")
    _, end, after = rest.partition("<!-- end -->")
    file.write_text(f"{before}{mark}{table()}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
