"""Dense checkpoints made smaller while they are loaded: `model.quantize`.

One layer at a time is read, quantised on the device and forgotten, so neither the whole model nor a whole file of it is
ever in memory in its own precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dpo_studio.errors import ModelError
from dpo_studio.frozen.nf4 import quantise_nf4
from dpo_studio.frozen.scaled import quantise_fp8
from dpo_studio.frozen.shards import Place

__all__ = ["QuantisingReader"]

_DENSE = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class QuantisingReader:
    """Reads one dense layer at a time and quantises it."""

    place: Place
    form: str
    """nf4 or fp8."""
    names: Sequence[str]
    """The linear layers to quantise."""

    def layers(self) -> dict[str, list[str]]:
        """The layers, and the tensors of each; those that the checkpoint lacks are missed later."""
        shards = self.place.shards
        return shards.of_layers([name for name in self.names if self.place.has(name, "weight")], ["weight", "bias"])

    def linear(self, prefix: str, twin: nn.Linear) -> nn.Linear:
        """The layer on the device, in the place of `twin`, the model's own.

        Raises:
            ModelError: its tensors are not the model's, or no weight that the format can hold.
        """
        place = self.place
        weight_NK = place.tensor(prefix, "weight", _DENSE, (twin.out_features, twin.in_features))
        try:
            weight = quantise_fp8(weight_NK) if self.form == "fp8" else quantise_nf4(weight_NK)
        except ValueError as error:
            raise ModelError(
                f"model.quantize: {self.form} cannot hold {prefix}.weight: {error}", hint="remove model.quantize"
            ) from None
        return place.linear(prefix, weight, place.bias(prefix, twin))
