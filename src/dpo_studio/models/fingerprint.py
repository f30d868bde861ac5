"""What tells one model's or adapter's files from another's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dpo_studio.errors import ModelError
from dpo_studio.reading import open_regular, sha256_of
from dpo_studio.scan import INDEX, weights_of

__all__ = ["weights_fingerprint"]


def weights_fingerprint(folder: Path) -> str:
    """What tells these weights from others: each loaded file's name, size, safetensors header and 64 sampled blocks.

    And the config, for the same tensors mean something else under another rope base, window or LoRA alpha. Hashing a 7B
    model whole takes a minute; its header and a quarter of a megabyte take milliseconds.
    """
    digest = hashlib.sha256()
    for config in (folder / name for name in ("config.json", "quantize_config.json", "adapter_config.json")):
        if config.is_file():
            digest.update(f"{config.name}:".encode() + sha256_of(config, what="settings", error=ModelError))
    files = weights_of(folder, folder.name)
    if (index := folder / INDEX).is_file() and [file.name for file in files] != ["model.safetensors"]:
        digest.update(f"{index.name}:".encode() + sha256_of(index, what="settings", error=ModelError))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with open_regular(file, what="weights", error=ModelError) as data:
            digest.update(data.read(8 + min(int.from_bytes(data.read(8), "little"), size)))
            for sample in range(64):
                data.seek(sample * max(0, size - 4096) // 63)
                digest.update(data.read(4096))
    return digest.hexdigest()
