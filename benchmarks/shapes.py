"""What the benchmarks run on: true model shapes with random weights, and length mixes with random token ids.

Speed depends on neither the weights nor the words, so nothing is downloaded. Light to import: torch only on use.

Shapes: N = outputs, K = inputs, W = words of a row (eight 4-bit inputs in each), G = groups of inputs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dpo_studio.tokens.encode import EncodedPair

__all__ = [
    "MIXES",
    "SHAPES",
    "TARGETS",
    "Mix",
    "Shape",
    "gptq_group",
    "random_gptq",
    "random_model",
    "random_pairs",
    "unique_tokens",
]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What both sides adapt: all seven projections of a layer."""
RANK, ALPHA = 16, 32
GPTQ_BITS, GPTQ_ZERO = 4, 8
"""Of the GPTQ base: symmetric, as most checkpoints are."""
_GPTQ_GROUP = 128
_STANDARD_DEVIATION = 0.02
"""Of weights: what transformers itself begins with."""
_FIRST_ID = 10
"""Ids below it are left to the special tokens."""


@dataclass(frozen=True)
class Shape:
    """A Mistral-like decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = 49152
    head_size: int = 128
    window: int | None = None
    """The sliding window; None for full attention."""

    @property
    def products(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's products, those that read the same input as one."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return [
            (self.hidden, queries + 2 * keys),
            (queries, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        ]

    @property
    def layer_parameters(self) -> int:
        """Weights that every token is multiplied with, head and norms apart."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.products)


SHAPES = {
    "mistral-7b": Shape(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8),
    "llama-70b": Shape(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8),
    "smollm2-135m": Shape(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_size=64),
    "small": Shape(layers=4, hidden=256, intermediate=704, heads=4, kv_heads=2, vocabulary=8192, head_size=64),
    "tiny": Shape(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, vocabulary=512, head_size=16),
}
"""`mistral-7b` has SmolLM2's vocabulary, as all figures in docs/log.md; `small` and `tiny` are for CPUs and tests."""


@dataclass(frozen=True)
class Spread:
    """Lengths that are log-normal, as those of real chats are, within limits."""

    median: int
    sigma: float
    least: int
    most: int

    def draw(self, source: random.Random) -> int:
        """One length."""
        return int(min(max(source.lognormvariate(math.log(self.median), self.sigma), self.least), self.most))


@dataclass(frozen=True)
class Mix:
    """How long the prompts and answers of a data set are."""

    prompt: Spread
    chosen: Spread
    rejected: Spread
    cap: int
    """No prompt with its answer is longer; answers are cut."""
    scale: int = 1
    """Everything times this: how time and memory grow with length."""

    def lengths(self, count: int, *, seed: int = 0) -> list[tuple[int, int, int]]:
        """(prompt, chosen, rejected) tokens of `count` pairs; the same for the same seed on every machine."""
        source = random.Random(seed)
        rows = []
        for _ in range(count):
            prompt, chosen, rejected = (spread.draw(source) for spread in (self.prompt, self.chosen, self.rejected))
            room = self.cap - prompt
            rows.append((self.scale * prompt, self.scale * min(chosen, room), self.scale * min(rejected, room)))
        return rows

    @property
    def max_length(self) -> int:
        """The cap in tokens."""
        return self.scale * self.cap


MIXES = {
    # UltraFeedback's own medians and spread; sharing saves 17 % of the tokens
    "ultrafeedback": Mix(Spread(110, 0.95, 12, 512), Spread(270, 0.65, 8, 2000), Spread(240, 0.7, 8, 2000), cap=1024),
    # TL;DR-like: an article and two summaries of it; sharing saves 47 %
    "summarisation": Mix(Spread(900, 0.2, 400, 1600), Spread(60, 0.3, 16, 160), Spread(60, 0.3, 16, 160), cap=2048),
    # several turns before the last one; sharing saves 38 %, and attention over 2,000 places begins to weigh
    "long-chats": Mix(Spread(1500, 0.4, 200, 2500), Spread(500, 0.4, 64, 1500), Spread(450, 0.4, 64, 1500), cap=4096),
}


def unique_tokens(pair: EncodedPair) -> int:
    """Tokens of a pair, its prompt counted once."""
    return len(pair.prompt) + len(pair.chosen.ids) + len(pair.rejected.ids)


def random_pairs(mix: Mix, count: int, vocabulary: int, *, seed: int = 0) -> list[EncodedPair]:
    """Pairs with the mix's lengths and random ids, every answer token scored."""
    import numpy as np

    from dpo_studio.tokens.encode import EncodedAnswer, EncodedPair

    draw = np.random.default_rng(seed)

    def answer(length: int) -> EncodedAnswer:
        return EncodedAnswer(ids(length), np.ones(length, np.bool_))

    def ids(length: int) -> Any:
        return draw.integers(_FIRST_ID, vocabulary, length, dtype=np.int32)

    return [
        EncodedPair(row, ids(prompt), answer(chosen), answer(rejected))
        for row, (prompt, chosen, rejected) in enumerate(mix.lengths(count, seed=seed))
    ]


def mean_unique_tokens(pairs: Sequence[EncodedPair]) -> float:
    """Of a set of pairs: what turns tokens a second into pairs a second."""
    return sum(map(unique_tokens, pairs)) / len(pairs)


def random_model(
    shape: Shape,
    device: torch.device,
    attention: str,
    linear: Callable[[nn.Linear], nn.Module] | None = None,
) -> Any:
    """The shape with random bf16 weights, made on the device: 7B parameters there are seconds, on a CPU minutes.

    `linear` makes what is to stand in a linear layer's place. Layers are made one by one: the dense weights of two at
    most are ever in memory.
    """
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers if linear is None else 1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=32768,
        sliding_window=shape.window,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
    if linear is not None:
        _stack(model, shape.layers, linear)
    return model


def _stack(model: Any, count: int, linear: Callable[[nn.Linear], nn.Module]) -> None:
    """`count` copies of the model's only layer, with other linear layers in each."""
    from torch import nn

    layers = model.model.layers
    pattern = layers.pop(0)
    for index in range(count):
        layer = deepcopy(pattern)
        layer.self_attn.layer_idx = index
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, linear(child))
        layers.append(layer)
    model.config.num_hidden_layers = count


def random_gptq(dense: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Words (N, W) int32 and scales (N, G) float16 of a layer of this one's size, on its device.

    Normal weights rounded to the nearest step: products of fewer different or of lopsided values would draw less power.
    """
    import torch

    outputs, inputs, device = dense.out_features, dense.in_features, dense.weight.device
    groups = (outputs, inputs // gptq_group(inputs), gptq_group(inputs))
    weights_NGK = torch.normal(0.0, _STANDARD_DEVIATION, groups, device=device)
    scales_NG = (weights_NGK.abs().amax(-1) / (GPTQ_ZERO - 1)).half()
    integers = (weights_NGK / scales_NG[..., None]).round_().int().add_(GPTQ_ZERO).clamp_(0, 2**GPTQ_BITS - 1)
    fields = integers.view(outputs, -1, 32 // GPTQ_BITS)
    words_NW = torch.zeros(fields.shape[:2], dtype=torch.int32, device=device)
    for place in range(fields.shape[-1]):
        words_NW |= fields[..., place] << GPTQ_BITS * place
    return words_NW, scales_NG


def gptq_group(inputs: int) -> int:
    """Inputs that share a scale: 128, or what of it divides those of a small shape."""
    return math.gcd(_GPTQ_GROUP, inputs)


def shaped(name: str, *, window: int | None = None, vocabulary: int | None = None) -> Shape:
    """A shape by name, with another window or vocabulary."""
    shape = SHAPES[name]
    return replace(shape, window=window, vocabulary=vocabulary or shape.vocabulary)
