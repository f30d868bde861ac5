"""Checkpoints: complete or absent. Safetensors and JSON files, a manifest last, one rename.

checkpoints/step-50/
  adapter/                 as PEFT saves it; weights.safetensors, in fp32, where the whole model is trained
  optimizer.safetensors    AdamW's averages, by parameter
  reference.safetensors    the current weights of a moving reference
  state.json               the step and what else must be equal on a resume
  manifest.json            size and sha256 of each file, written last
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_studio.config import ReferenceSection
from dpo_studio.disk import check_space, delete_folder, put_folder, remove_leftovers, scratch_folder, sync, sync_folder
from dpo_studio.errors import RunError, reason_of
from dpo_studio.learning.state import TrainingState
from dpo_studio.policy.policy import Policy
from dpo_studio.reading import read_json, sha256_of

__all__ = ["KEPT", "checkpoint_bytes", "newest_checkpoint", "ranks_of", "restore", "save_checkpoint"]

KEPT = 2
"""Newest checkpoints that stay, and with them the one of the lowest held-out loss; a 7B run's takes half a gigabyte."""
_NAME = re.compile(r"step-(\d+)")
_MANIFEST = "manifest.json"
_REFERENCE = "reference.safetensors"
_STATE = "state.json"
_ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
_FILES = {*_ADAPTER, "weights.safetensors", "optimizer.safetensors", _REFERENCE, _STATE, _MANIFEST}
"""All files of a checkpoint: any other file in its folder belongs to the user, and stays."""
_LARGEST_JSON = 1_000_000
"""Bytes; a manifest has a thousand."""


def save_checkpoint(
    folder: Path, policy: Policy, state: TrainingState, *, base: str, held_out_loss: float | None = None
) -> Path:
    """Write step-N under a scratch name, sync, rename; then remove all but the newest few and the best.

    Folders of later steps are damaged: the run was continued from an earlier one. They are removed too.
    `held_out_loss` is this step's, where it was measured.

    Raises:
        RunError: the disk has too little space, or a folder with other files is in the way.
        OSError, SafetensorError: the disk is full or read-only; earlier checkpoints are unchanged.
    """
    final = folder / f"step-{state.step}"
    if final.is_dir() and not final.is_symlink() and _damage(final) is None:
        return final
    remove_leftovers(folder)
    check_space(folder, checkpoint_bytes(policy, state.reference), f"the checkpoint of step {state.step}")
    with scratch_folder(final) as scratch:
        _write_files(scratch, policy, state, base, held_out_loss)
        if not _remove(final):
            raise RunError(
                f"{final} contains files that do not belong to a checkpoint", hint="move them to another place"
            )
        put_folder(scratch, final)
    sync(folder.parent)  # which may not know of `folder` yet
    so_far = [path for step, path in _by_step(folder) if step <= state.step]
    later = [path for step, path in _by_step(folder) if step > state.step]
    losses = [(loss, path) for path in so_far if (loss := _held_out_loss(path)) is not None]
    best = min(losses)[1] if losses else None
    for old in [*(path for path in so_far[:-KEPT] if path != best), *later]:
        _remove(old)
    return final


def checkpoint_bytes(policy: Policy, reference: ReferenceSection) -> int:
    """Bytes of a checkpoint on the disk: three times the adapter (AdamW keeps two averages), and a moved reference."""
    trained = sum(p.numel() * p.element_size() for p in policy.trained.values())
    moved = policy.reference_state() if reference.update_every is not None else {}
    small_files = 4096 * (len(_FILES) + 2)
    return 3 * trained + sum(x.numel() * x.element_size() for x in moved.values()) + small_files


def _write_files(scratch: Path, policy: Policy, state: TrainingState, base: str, held_out_loss: float | None) -> None:
    entries: dict[str, Future[dict[str, int | str]]] = {}
    with ThreadPoolExecutor(max_workers=1) as hasher:  # while the next file is written and synced: a third faster

        def hash_new_files() -> None:
            for name in _inside(scratch):
                if name not in entries:
                    entries[name] = hasher.submit(_entry, scratch / name)

        policy.save_weights(scratch, base=base)
        hash_new_files()
        save_file(_optimizer_tensors(policy, state.optimizer), scratch / "optimizer.safetensors")
        hash_new_files()
        if state.reference.update_every is not None and (reference := policy.reference_state()):
            save_file(reference, scratch / _REFERENCE)
        numbers = state.numbers() | {"ranks": state.ranks.size, "held_out_loss": held_out_loss}
        (scratch / _STATE).write_text(json.dumps(numbers) + "\n", encoding="utf-8")
        hash_new_files()
        sync_folder(scratch)
        manifest = {name: entry.result() for name, entry in entries.items()}
    (scratch / _MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sync(scratch / _MANIFEST)
    sync(scratch)


def newest_checkpoint(folder: Path, warn: Callable[[str], None] = lambda _: None) -> Path | None:
    """The newest checkpoint whose every file matches its manifest; `warn` receives a line for each that is skipped."""
    for _, path in reversed(_by_step(folder)):
        if (damage := _damage(path)) is None:
            return path
        warn(f"{path} is damaged or incomplete and is skipped: {damage}")
    return None


def ranks_of(checkpoint: Path) -> int:
    """How many processes trained together when it was written."""
    ranks = _numbers(checkpoint).get("ranks", 1)
    return ranks if isinstance(ranks, int) else 1


def restore(checkpoint: Path, policy: Policy, state: TrainingState) -> None:
    """Restore weights, optimizer, step and a moving reference.

    Raises:
        RunError: the checkpoint is complete, but belongs to another adapter, or its state is invalid.
    """
    try:
        policy.restore(load_file(checkpoint / policy.weights_file))
        averages = load_file(checkpoint / "optimizer.safetensors")
        for name, p in policy.trained.items():
            if f"{name}.exp_avg" in averages:
                state.optimizer.state[p] = {key: averages[f"{name}.{key}"].to(p.device) for key in _AVERAGES}
        if (checkpoint / _REFERENCE).exists():
            policy.restore_reference(load_file(checkpoint / _REFERENCE))
        state.restore(_numbers(checkpoint))
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"{checkpoint} is not of this run's adapter: {type(error).__name__}: {reason_of(error)}",
            hint="remove it: the run continues from the checkpoint before it",
        ) from None


_AVERAGES = ("exp_avg", "exp_avg_sq", "step")


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": optimizer.state[p][key].detach().cpu().contiguous()
        for name, p in policy.trained.items()
        if optimizer.state.get(p)
        for key in _AVERAGES
    }


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    """The folders named step-N; links are not counted, whatever they point to."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    return sorted((int(match[1]), path) for match, path in found if match)


def _held_out_loss(checkpoint: Path) -> float | None:
    """None where it was not measured or cannot be read."""
    try:
        loss = _numbers(checkpoint).get("held_out_loss")
    except (RunError, OSError):
        return None
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


def _numbers(checkpoint: Path) -> dict[str, object]:
    numbers = read_json(checkpoint / _STATE, what="state of a checkpoint", limit=_LARGEST_JSON, error=RunError)
    if not isinstance(numbers, dict):
        raise RunError(f"{checkpoint / _STATE} is not a JSON object")
    return numbers


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is."""
    try:
        if not (folder / _MANIFEST).exists():
            return f"{_MANIFEST} is missing"
        written = read_json(folder / _MANIFEST, what="manifest", limit=_LARGEST_JSON, error=RunError)
        there = set(_inside(folder))
        for name in sorted(there ^ set(written)):
            return f"{name} is missing" if name in written else f"{name} was not written with it"
        for name in (_MANIFEST, *written):
            if (folder / name).is_symlink():
                return f"{name} is a link"
        for name, entry in written.items():
            if (size := (folder / name).stat().st_size) != entry["bytes"]:
                return f"{name} has {size} bytes of {entry['bytes']}"
            if _sha256(folder / name) != entry["sha256"]:
                return f"{name} was changed (its sha256 is another)"
        if (step := _numbers(folder)["step"]) != int(folder.name.rpartition("-")[2]):
            return f"it is of step {step}"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (RunError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _inside(folder: Path) -> Iterator[str]:
    """Names of all files below, links included, the manifest excluded."""
    files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    yield from sorted(name for name in files if name != _MANIFEST)


def _remove(checkpoint: Path) -> bool:
    """Remove a checkpoint. A folder that contains any other file is left unchanged, and False is returned."""
    if checkpoint.is_symlink():
        return False
    if not checkpoint.exists():
        return True
    if not checkpoint.is_dir() or not _FILES.issuperset(_inside(checkpoint)):
        return False
    delete_folder(checkpoint)
    return True


def _entry(file: Path) -> dict[str, int | str]:
    """A file's entry in the manifest."""
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(path: Path) -> str:
    return sha256_of(path, what="file of a checkpoint", error=RunError).hex()
