"""Kinds of frozen weight: told apart by their tags alone, and one more is a class and its place among the kinds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dpo_studio.frozen.dense import Dense
from dpo_studio.frozen.fp8 import Block8
from dpo_studio.frozen.gptq import Packed
from dpo_studio.frozen.linear import FrozenLinear, held_dense, weight_count
from dpo_studio.frozen.nf4 import Doubled, Nf4
from dpo_studio.frozen.products import products
from dpo_studio.frozen.row_scaled import RowScaled
from dpo_studio.frozen.scaled import quantise_fp8
from dpo_studio.frozen.weights import KINDS, Frozen, flatten, unflatten


def packed(outputs: int, *, act_order: bool) -> Packed:
    """Random four-bit words of 64 inputs in two groups."""
    words = torch.randint(-(2**31), 2**31 - 1, (outputs, 8), dtype=torch.int32)
    scales, zeros = torch.rand(outputs, 2).half(), torch.randint(0, 16, (outputs, 2)).byte()
    return Packed(words, scales, zeros, torch.randint(0, 2, (64,), dtype=torch.int32) if act_order else None, 4, 32)


def test_mixed_kinds_come_back_as_they_went_in() -> None:
    """Act-order adds a tensor in the middle of the list: the weights behind it must not move."""
    integers = torch.randint(-8, 8, (16, 256)).float().to(torch.float8_e4m3fn)
    weights: list[Frozen] = [packed(8, act_order=True), Dense(torch.rand(4, 64)), Block8(integers, torch.rand(16, 2))]
    weights += [packed(4, act_order=False)]
    kinds, tensors, numbers = flatten(weights)
    assert kinds == "gptq dense fp8 gptq"
    back = list(unflatten(kinds, tensors, numbers))
    assert [type(weight) for weight in back] == [type(weight) for weight in weights]
    for found, wanted in zip(back, weights, strict=True):
        assert found.numbers() == wanted.numbers()
        assert found.tensors().keys() == wanted.tensors().keys()
        assert all(found.tensors()[name] is tensor for name, tensor in wanted.tensors().items())


def nf4(*, doubled: bool) -> Nf4:
    """Random bytes of 8 x 64 weights in blocks of 32."""
    names, scales = torch.randint(0, 256, (256,), dtype=torch.uint8), torch.rand(16)
    if not doubled:
        return Nf4(names, scales, None, (8, 64), 32)
    parts = Doubled(torch.rand(2), torch.rand(256), torch.tensor(0.5), 8)
    return Nf4(names, torch.randint(0, 256, (16,), dtype=torch.uint8), parts, (8, 64), 32)


def test_kinds_with_tensors_of_their_own_are_told_apart_and_compile_whole() -> None:
    """Flattened and back among others, and read from a layer's buffers in compiled code without leaving it."""
    weights: list[Frozen] = [nf4(doubled=True), packed(8, act_order=True), nf4(doubled=False)]
    weights += [quantise_fp8(torch.rand(8, 64))]
    for found, wanted in zip(unflatten(*flatten(weights)), weights, strict=True):
        assert torch.equal(found.exact(torch.float32), wanted.exact(torch.float32))
        layer, x = FrozenLinear(wanted), torch.rand(3, 64)
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
        assert torch.equal(layer(x), x @ wanted.dequantised(torch.float32).t())


def test_some_rows_of_a_weight_are_those_of_the_whole() -> None:
    integers = torch.randint(-8, 8, (16, 256)).float().to(torch.float8_e4m3fn)
    kinds: list[Frozen] = [packed(8, act_order=True), packed(8, act_order=False), Dense(torch.rand(8, 64))]
    kinds += [nf4(doubled=True), nf4(doubled=False), quantise_fp8(torch.rand(130, 64))]
    for weight in (*kinds, Block8(integers, torch.rand(16, 2)), RowScaled.of(torch.randn(16, 32))):
        assert weight.shape == tuple(weight.exact(torch.float32).shape)
        assert torch.equal(weight.rows(3).exact(torch.float32), weight.exact(torch.float32)[:3])


@dataclass(frozen=True)
class Signs:
    """A kind of its own with as many tensors as `Block8`: a sign for each weight, a scale for each row."""

    tag: ClassVar[str] = "signs"
    signs_NK: Tensor
    scales_N1: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.signs_NK.shape[0], self.signs_NK.shape[1]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return self.exact(dtype)

    def exact(self, dtype: torch.dtype) -> Tensor:
        return (self.signs_NK.float() * self.scales_N1).to(dtype)

    def rows(self, count: int) -> Signs:
        return Signs(self.signs_NK[:count], self.scales_N1[:count])

    def tensors(self) -> dict[str, Tensor]:
        return {"signs_NK": self.signs_NK, "scales_N1": self.scales_N1}

    def numbers(self) -> list[int]:
        return []

    @classmethod
    def taken(cls, tensors: Iterator[Tensor], numbers: Iterator[int]) -> Signs:
        return cls(next(tensors), next(tensors))


def test_another_kind_is_a_class_and_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layer and its part in a product beside packed layers are those of the dense weight, to the bit, gradients
    too."""
    kind: Any = Signs
    monkeypatch.setitem(KINDS, Signs.tag, kind)
    signs: Any = Signs(torch.randint(0, 2, (8, 64)).mul(2).sub(1).to(torch.int8), torch.rand(8, 1))
    layer = FrozenLinear(signs, torch.rand(8))
    x = torch.randn(5, 64, requires_grad=True)
    dense = Dense(signs.exact(torch.float32))
    assert torch.equal(layer(x), FrozenLinear(dense, layer.bias)(x))
    assert weight_count(layer) == 8 * 64 + 8
    with held_dense(layer):
        assert isinstance(layer.frozen, Dense)
    gptq, down, ups = packed(4, act_order=True), torch.randn(4, 64), [torch.randn(8, 2), torch.randn(4, 2)]
    found, wanted = (
        (*ys, *torch.autograd.grad(ys[0].sum() + ys[1].square().sum(), x))
        for ys in (products(x, [weight, gptq], down, ups) for weight in (layer.kept, dense))
    )
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
