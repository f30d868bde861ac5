"""Checkpoints: whole or not there. Safetensors and JSON, a manifest last, one rename.

checkpoints/step-50/
  adapter/                 as PEFT saves it
  optimizer.safetensors    AdamW's averages, by parameter
  reference.safetensors    where a moving reference has got to
  state.json               the step and what else must be equal on a resume
  manifest.json            size and sha256 of each file, written last
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_studio.learning.train import TrainingState
from dpo_studio.models.adapters import adapter_state, save_adapter
from dpo_studio.models.moving import put_reference, reference_state

__all__ = ["KEPT", "newest_checkpoint", "restore", "save_checkpoint", "sync_folder"]

KEPT = 2
"""Checkpoints that stay; a 7B run's takes half a gigabyte."""
_NAME = re.compile(r"step-(\d+)")
_MANIFEST = "manifest.json"
_REFERENCE = "reference.safetensors"


def save_checkpoint(folder: Path, policy: PeftModel, state: TrainingState, *, base: str) -> Path:
    """Write step-N beside its final name, sync, rename; then drop all but the newest few.

    Folders of later steps are damaged ones that the run was continued from before: they go too, and count for nothing.
    """
    final = folder / f"step-{state.step}"
    if _whole(final):
        return final
    scratch = folder / f".writing-step-{state.step}"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    try:
        _write(scratch, policy, state, base)
    except BaseException:  # a full disk needs the room that half a checkpoint takes
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    scratch.replace(final)
    _sync(folder)
    so_far = [path for step, path in _by_step(folder) if step <= state.step]
    later = [path for step, path in _by_step(folder) if step > state.step]
    for old in [*so_far[:-KEPT], *later]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(scratch: Path, policy: PeftModel, state: TrainingState, base: str) -> None:
    save_adapter(policy, scratch / "adapter", base=base)
    save_file(_optimizer_tensors(policy, state.optimizer), scratch / "optimizer.safetensors")
    if state.reference.update_every is not None and (reference := reference_state(policy)):
        save_file(reference, scratch / _REFERENCE)
    numbers = {"step": state.step, "mean_log_ratio": state.mean_log_ratio}
    (scratch / "state.json").write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    (scratch / _MANIFEST).write_text(json.dumps(_manifest(scratch), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sync_folder(scratch)


def newest_checkpoint(folder: Path, warn: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest checkpoint whose every file is as its manifest says."""
    for _, path in reversed(_by_step(folder)):
        if _whole(path):
            return path
        warn(f"{path} is damaged or incomplete and is passed over")
    return None


def restore(checkpoint: Path, policy: PeftModel, state: TrainingState) -> None:
    """Put weights, optimizer, step and a moving reference back as they were."""
    saved = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    for name, p in adapter_state(policy).items():
        p.data.copy_(saved[name.replace(".default.weight", ".weight")])
    averages = load_file(checkpoint / "optimizer.safetensors")
    for name, p in adapter_state(policy).items():
        if f"{name}.exp_avg" in averages:
            state.optimizer.state[p] = {key: averages[f"{name}.{key}"].to(p.device) for key in _AVERAGES}
    if (checkpoint / _REFERENCE).exists():
        put_reference(policy, load_file(checkpoint / _REFERENCE))
    numbers = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    state.step = int(numbers["step"])
    state.mean_log_ratio = float(numbers.get("mean_log_ratio", 0.0))  # older ones have none, nor an objective that asks


_AVERAGES = ("exp_avg", "exp_avg_sq", "step")


def _optimizer_tensors(policy: PeftModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": optimizer.state[p][key].detach().cpu().contiguous()
        for name, p in adapter_state(policy).items()
        if optimizer.state.get(p)
        for key in _AVERAGES
    }


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    return sorted((int(match[1]), path) for match, path in found if match)


def _manifest(folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}


def _whole(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / _MANIFEST).read_text(encoding="utf-8")) == _manifest(folder))
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring every file and folder below to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
