"""When a training saves, and the checks of its folder before it does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from dpo_studio.config import MINUTES, Recipe, ReferenceSection
from dpo_studio.disk import check_space, put_folder, remove_leftovers, scratch_folder, sync_folder
from dpo_studio.errors import ModelError, RunError
from dpo_studio.export.merge import save_plain
from dpo_studio.learning.checkpoints import KEPT, checkpoint_bytes, newest_checkpoint, save_checkpoint
from dpo_studio.learning.state import TrainingState
from dpo_studio.models.folder import open_model
from dpo_studio.models.load import load_weights
from dpo_studio.policy.policy import Policy
from dpo_studio.policy.whole import WholePolicy
from dpo_studio.runs.folder import RunFolder
from dpo_studio.runs.lock import Held
from dpo_studio.scan import template_text

__all__ = ["Saver", "find_checkpoint"]


@dataclass
class Saver:
    """Writes a run's checkpoints and its adapter."""

    run: RunFolder
    held: Held
    base: str
    """The base as the user named it, or its public name."""
    recipe: Recipe
    source: Path
    """The base's folder, whose tokenizer a whole model gets."""
    saved_at: float = field(default_factory=lambda: time.monotonic())
    """By a monotonic clock."""

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        every = self.recipe.training.save_every
        if isinstance(every, int):
            return step % every == 0
        minutes = re.match(MINUTES, every)
        assert minutes is not None  # validated by the recipe
        return time.monotonic() - self.saved_at >= 60 * float(minutes[1])

    def check_room(self, policy: Policy, reference: ReferenceSection) -> None:
        """Before the first step: check the space for the checkpoints that stay, one more, and the adapter.

        Raises:
            RunError: the disk has too little.
        """
        if not self.run.writes:
            return
        there = len(list(self.run.checkpoints.glob("step-*")))
        wanted = max(1, KEPT + 2 - there) * checkpoint_bytes(policy, reference)
        check_space(self.run.checkpoints, wanted, "keeping checkpoints")

    def save(self, policy: Policy, state: TrainingState, held_out_loss: float | None = None) -> None:
        """Write a checkpoint of this step, after its metrics lines.

        Raises:
            RunError: it cannot be written; the last one is unchanged.
        """
        if not self.run.writes:
            return
        self.held.check()
        self.run.sync_lines()
        try:
            save_checkpoint(self.run.checkpoints, policy, state, base=self.base, held_out_loss=held_out_loss)
        except (OSError, SafetensorError) as error:
            raise _unwritable(f"the checkpoint of step {state.step}", self.run.checkpoints, error) from None
        self.saved_at = time.monotonic()

    def save_trial(self, policy: Policy) -> None:
        """Before the first step: prove that plain PEFT loads an adapter saved as the last step's will be.

        Raises:
            ModelError: it is not.
            RunError: it cannot be written.
        """
        if not self.run.writes:
            return
        try:
            with scratch_folder(self.run.adapter) as scratch:
                policy.verify_trial_adapter(scratch, base=self.base)
        except (OSError, SafetensorError) as error:
            raise _unwritable("the adapter", self.run.path, error) from None

    def save_result(self, policy: Policy) -> None:
        """Save the adapter, synced and proven, before the run is marked as finished.

        Raises:
            ModelError: plain PEFT would load something else.
            RunError: it cannot be written.
        """
        if not self.run.writes:
            return
        self.held.check()
        if isinstance(policy, WholePolicy):
            self._save_model(policy)
            return
        try:
            policy.save(self.run.adapter, base=self.base)
            sync_folder(self.run.adapter)
            policy.prove(self.run.adapter)
        except (OSError, SafetensorError) as error:
            raise _unwritable("the adapter", self.run.adapter, error) from None

    def _save_model(self, policy: WholePolicy) -> None:
        """The whole model in its own precision, with its tokenizer, as a folder that plain transformers loads."""
        named = self.recipe.model.chat_template
        template = None if named is None else template_text(named, what="chat template", error=RunError)
        try:
            with scratch_folder(self.run.model) as scratch:
                save_plain(policy.model, scratch, source=self.source, template=template)
                sync_folder(scratch)
                self._prove_model(policy, scratch)
                put_folder(scratch, self.run.model)
        except (OSError, SafetensorError) as error:
            raise _unwritable("the model", self.run.model, error) from None

    def _prove_model(self, policy: WholePolicy, folder: Path) -> None:
        dtype = next(policy.model.parameters()).dtype
        loaded = dict(load_weights(AutoModelForCausalLM, open_model(str(folder)), dtype, "eager").named_parameters())
        for name, p in policy.model.named_parameters():
            if name not in loaded or not torch.equal(p.detach().cpu(), loaded[name]):
                raise ModelError(f"plain transformers would load something else than was trained as {name}")


def find_checkpoint(run: RunFolder, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint; warns of inconsistencies, and removes leftovers of killed processes.

    Checkpoints are ordered by step: a clock that was set back changes nothing, and is reported.
    """
    remove_leftovers(run.checkpoints)
    checkpoint = newest_checkpoint(run.checkpoints, warn)
    if checkpoint is None:
        return None
    ahead = (checkpoint / "manifest.json").stat().st_mtime - time.time()
    if ahead > 60:
        warn(f"{checkpoint} was written {ahead:,.0f} s in the future: was the clock set back? Nothing depends on it")
    step = int(checkpoint.name.removeprefix("step-"))
    steps = [line["step"] for line in run.lines(RunFolder.METRICS) if 0 < line["step"] <= step]
    if steps != list(range(1, step + 1)):
        warn(f"metrics.jsonl is missing the lines of {step - len(set(steps))} steps before {checkpoint.name}")
    return checkpoint


def _unwritable(what: str, where: Path, error: Exception) -> RunError:
    """The error for a full or read-only disk; safetensors raises an exception of its own for it."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return RunError(
        f"{what} cannot be written to {where}: {reason}",
        hint="free some space and run the same command: it continues from the last complete checkpoint",
    )
