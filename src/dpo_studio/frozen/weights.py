"""The kinds of frozen weight, and how an operator is given some of them: flat lists, and the tag of each kind.

A further kind is a module with a frozen dataclass that has `Dense`'s members, and its name in `Frozen`: products, the
layer, LoRA, checks and exports then take it. `dequantised` may use a kernel on a GPU; `plain` is its equal by plain
torch. A product of its own with FP8 activations is a method `product`, as `Block8` has, and a place in `InFP8`.
Whatever reads its files makes its layers `FrozenLinear`s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from torch import Tensor

from dpo_studio.frozen.dense import Dense
from dpo_studio.frozen.fp8 import Block8
from dpo_studio.frozen.gptq import Packed
from dpo_studio.frozen.nf4 import Nf4
from dpo_studio.frozen.row_scaled import RowScaled
from dpo_studio.frozen.scaled import Scaled

__all__ = ["KINDS", "Frozen", "InFP8", "flatten", "unflatten"]

Frozen = Dense | Packed | Block8 | RowScaled | Nf4 | Scaled
"""What a frozen weight may be."""
InFP8 = Block8 | RowScaled
"""The kinds that are multiplied in FP8; the others are dequantised to the precision of the input first."""

KINDS: dict[str, type[Frozen]] = {kind.tag: kind for kind in get_args(Frozen)}
"""By tag: what `Frozen` names."""


def flatten(weights: Sequence[Frozen]) -> tuple[str, list[Tensor], list[int]]:
    """Weights as an operator takes them: the tags of their kinds, in a row (it takes no list of strings), all their
    tensors, all their numbers."""
    tensors = [tensor for weight in weights for tensor in weight.tensors().values()]
    return " ".join([weight.tag for weight in weights]), tensors, [n for weight in weights for n in weight.numbers()]


def unflatten(kinds: str, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Iterator[Frozen]:
    """The weights that were flattened, in their order."""
    rest, rest_of_numbers = iter(tensors), iter(numbers)
    yield from (KINDS[tag].taken(rest, rest_of_numbers) for tag in kinds.split())
