"""Whether an adapter's tensors are finite: the adapter of a failed training is not a result."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dpo_studio.errors import ModelError, NonFiniteError, reason_of

__all__ = ["check_finite_adapter"]


def check_finite_adapter(folder: Path) -> None:
    """Look at every tensor of an adapter's folder, one at a time.

    Raises:
        NonFiniteError: one contains NaN or infinity.
        ModelError: its weights cannot be read.
    """
    file = folder / "adapter_model.safetensors"
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                tensor = tensors.get_tensor(name)
                if not torch.isfinite(tensor.float()).all():
                    what = "NaN" if tensor.float().isnan().any() else "infinity"
                    raise NonFiniteError(
                        f"{folder} is not a result: tensor {name} has {what}",
                        hint="the training that made it had failed: train again with a lower training.learning_rate",
                    )
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read: {reason_of(error)}") from None
