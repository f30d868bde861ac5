"""The tensors of a checkpoint's safetensors files, read one at a time and checked; and where its layers go.

Shapes: N = outputs, K = inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dpo_studio.errors import ModelError
from dpo_studio.frozen.linear import FrozenLinear
from dpo_studio.frozen.weights import Frozen
from dpo_studio.scan import weights_of
from dpo_studio.sizes import Shapes, shapes_in

__all__ = ["Place", "Shards", "look"]

_AGAIN = "is the download complete? fetch the model again"


class Shards:
    """The tensors of a folder's safetensors files, opened once and read one by one."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        self._open: dict[Path, Any] = {}
        self.files: dict[str, Path] = {}
        """Where each tensor is: of the files that are fingerprinted, whatever an index says of any one tensor."""
        for file in weights_of(folder, name):
            self.files |= dict.fromkeys(self._opened(file).keys(), file)

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    @property
    def shapes(self) -> Shapes:
        """Of every tensor, by the headers that are open already."""
        return {key: shape for file in self._open.values() for key, shape in shapes_in(file).items()}

    def read(self, key: str) -> Tensor:
        """A tensor, on the CPU.

        Raises:
            ModelError: its file is missing or damaged, or does not contain it.
        """
        file = self.files[key]
        try:
            tensor: Tensor = self._opened(file).get_tensor(key)
        except SafetensorError as error:
            raise ModelError(f"{self._name}: {file.name} has no readable tensor {key}: {error}", hint=_AGAIN) from None
        return tensor

    def with_ending(self, ending: str) -> list[str]:
        """What stands before `ending` in the names of tensors, sorted: layers, by what a layer of a format has."""
        return sorted(key.removesuffix(ending) for key in self.files if key.endswith(ending))

    def of_layers(self, layers: Sequence[str], parts: Sequence[str]) -> dict[str, list[str]]:
        """The tensors of each layer: those of `parts` that there are."""
        return {name: [key for part in parts if (key := f"{name}.{part}") in self.files] for name in layers}

    def read_shaped(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor, on the CPU, that has the shape of the model's own.

        Raises:
            ModelError: it has another, or cannot be read.
        """
        tensor = self.read(key)
        if tensor.shape != shape:
            raise ModelError(
                f"{self.files[key].name}: tensor {key} is {look(tensor)}, the model's is {shape}", hint=_AGAIN
            )
        return tensor

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            if not file.is_file():
                raise ModelError(f"{self._name}: the weight file {file.name} is missing", hint=_AGAIN)
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{self._name}: {file.name} is damaged: {error}", hint=_AGAIN) from None
        return self._open[file]


@dataclass(frozen=True)
class Place:
    """Where the layers of a checkpoint come from and go to."""

    shards: Shards
    device: torch.device
    dtype: torch.dtype
    """Of what is not quantised, and of weights that are formed once."""
    residency: str
    """packed, or bf16: the weights are formed once, when they are loaded."""
    compute: str
    say: Callable[[str], None]

    def has(self, prefix: str, part: str) -> bool:
        """Whether the layer has this tensor."""
        return f"{prefix}.{part}" in self.shards.files

    def tensor(
        self,
        prefix: str,
        part: str,
        dtypes: Sequence[torch.dtype] | None = None,
        shape: tuple[int, ...] | None = None,
        *,
        numbers: bool = True,
    ) -> Tensor:
        """A layer's tensor, on the device; of one of `dtypes` and this shape, if they are given; finite if `numbers`.

        Raises:
            ModelError: it is missing, something else, or not finite.
        """
        if not self.has(prefix, part):
            raise self.wrong(prefix, part, "is missing")
        tensor = self.shards.read(f"{prefix}.{part}")
        if (dtypes and tensor.dtype not in dtypes) or (shape is not None and tensor.shape != shape):
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes or (tensor.dtype,))
            raise self.wrong(prefix, part, f"is {look(tensor)}, not {kinds} {'' if shape is None else shape}".rstrip())
        tensor = tensor.to(self.device)
        if numbers and tensor.is_floating_point() and not _all_finite(tensor):
            raise self.wrong(prefix, part, "has values that are not finite")
        return tensor

    def wrong(self, prefix: str, part: str, what: str) -> ModelError:
        """The error that names a layer's tensor and the file where it is, or where the layer's others are."""
        key = f"{prefix}.{part}"
        others = (file for name, file in self.shards.files.items() if name.startswith(f"{prefix}."))
        file = self.shards.files.get(key) or next(others, None)
        return ModelError(f"{file.name if file else 'the checkpoint'}: tensor {key} {what}", hint=_AGAIN)

    def bias(self, prefix: str, twin: nn.Linear) -> Tensor | None:
        """The layer's bias on the device, if `twin`, the model's own layer, has one.

        Raises:
            ModelError: one of the two has a bias and the other has none.
        """
        wanted = twin._parameters["bias"] is not None
        if not wanted:
            if self.has(prefix, "bias"):
                raise self.wrong(prefix, "bias", "is there, and the model has no place for it")
            return None
        return self.tensor(prefix, "bias", shape=(twin.out_features,)).to(self.dtype)

    def linear(self, prefix: str, weight: Frozen, bias: Tensor | None) -> nn.Linear:
        """The layer of a weight that is on the device; dense where the recipe says so, and for the head, whose weight
        is read as it is."""
        if self.residency == "packed" and prefix.rpartition(".")[2] != "lm_head":
            return FrozenLinear(weight, bias)
        outputs, inputs = weight.shape
        dense = nn.Linear(inputs, outputs, bias=False, device=torch.device("meta"))
        dense.weight = nn.Parameter(weight.dequantised(self.dtype), requires_grad=False)
        dense.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        return dense


def _all_finite(tensor: Tensor) -> bool:
    """Whether no number in it is infinite or NaN; e4m3 has no infinity and one NaN, with either sign."""
    if tensor.dtype == torch.float8_e4m3fn:
        return not bool((tensor.view(torch.uint8) & 0x7F == 0x7F).any())
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())


def look(tensor: Tensor) -> str:
    """A tensor's precision and shape, in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
