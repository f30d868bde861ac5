"""A weight as it is, in the precision that the model computes in.

Shapes: N = outputs, K = inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense:
    """A weight as it is."""

    tag: ClassVar[str] = "dense"
    weight_NK: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight_NK.shape[0], self.weight_NK.shape[1]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(N, K), itself: its precision is the product's."""
        return self.weight_NK

    def plain(self, dtype: torch.dtype) -> Tensor:
        """(N, K), itself."""
        return self.weight_NK

    def exact(self, dtype: torch.dtype) -> Tensor:
        """(N, K), in `dtype`."""
        return self.weight_NK.to(dtype)

    def rows(self, count: int) -> Dense:
        """The first outputs alone."""
        return Dense(self.weight_NK[:count])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that an operator gets."""
        return {"weight_NK": self.weight_NK}

    def numbers(self) -> list[int]:
        """The numbers that an operator needs besides the tensors."""
        return []

    @classmethod
    def taken(cls, tensors: Iterator[Tensor], numbers: Iterator[int]) -> Dense:
        """The weight read from the next of `tensors`."""
        return cls(next(tensors))
