"""What a training needs before its first step: pairs as token ids, a policy, and something to be its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from dpo_studio.config import Recipe
from dpo_studio.errors import DataError
from dpo_studio.learning.memory import Limit, plan_limit
from dpo_studio.models.adapters import REFERENCE, as_reference, attach, attach_existing, in_eval
from dpo_studio.models.fingerprint import weights_fingerprint
from dpo_studio.models.folder import ModelFolder
from dpo_studio.models.gptq import computes_in_fp8
from dpo_studio.models.load import ChatModel, load_chat_model
from dpo_studio.objectives import PairLogps
from dpo_studio.preferences.pair import prompt_key
from dpo_studio.preferences.sources import PairSource, read_pairs
from dpo_studio.preferences.split import Split, split_pairs
from dpo_studio.reports.progress import Progress
from dpo_studio.tokens.chat import ChatEncoder
from dpo_studio.tokens.encode import Encoded, EncodedPair, encode_pairs
from dpo_studio.tokens.pack import Steps
from dpo_studio.workflows.opening import check_same_vocabulary, reference_section

__all__ = [
    "RunData",
    "attach_policy",
    "encode_both",
    "read_and_split",
    "reference_model",
    "settle_dtype",
    "settle_tokens",
    "steps_of",
]


@dataclass(frozen=True)
class RunData:
    """The run's pairs as token ids."""

    source: PairSource
    train: Encoded
    held_out: Encoded
    held_out_prompts: list[str]
    shared_prompts_dropped: int


def read_and_split(recipe: Recipe, progress: Progress) -> tuple[PairSource, Split]:
    """The pairs of the recipe's sources on their two sides, with every refusal told."""
    source = read_pairs(recipe.data.train, seed=recipe.data.split_seed)
    progress.say(f"{source.name}: {source.rows} rows ({source.format}), {len(source.pairs)} pairs")
    for line in source.refused_lines():
        progress.warn(line)
    split = split_pairs(source.pairs, recipe.data.held_out, seed=recipe.data.split_seed)
    dropped = f", {split.shared_prompts_dropped} dropped for sharing a prompt" if split.shared_prompts_dropped else ""
    near = f", {split.near_copies} of them with the prompt they nearly repeat" if split.near_copies else ""
    progress.say(f"{len(split.train)} pairs to train on, {len(split.held_out)} held out{dropped}{near}")
    return source, split


def encode_both(recipe: Recipe, source: PairSource, split: Split, encoder: ChatEncoder, progress: Progress) -> RunData:
    """Both sides as token ids under the recipe's length rule, with every cut and drop told.

    Raises:
        DataError: nothing is left to train on.
    """
    encoded = []
    for name, pairs in (("training", split.train), ("held-out", split.held_out)):
        part = encode_pairs(pairs, encoder, max_length=recipe.data.max_length, too_long=recipe.data.too_long)
        for what, count in part.counts.items():
            progress.say(f"{name} pairs: {count} {what}")
        encoded.append(part)
    train_side, held_out = encoded
    if not train_side.pairs:
        reason = train_side.refused[0][1] if train_side.refused else "none was there"
        raise DataError(
            f"no training pair is left of {len(split.train)}: {reason}",
            hint=f"data.max_length is {recipe.data.max_length} and data.too_long {recipe.data.too_long}",
        )
    by_row = {pair.row: prompt_key(pair.prompt) for pair in split.held_out}
    return RunData(
        source, train_side, held_out, [by_row[pair.row] for pair in held_out.pairs], split.shared_prompts_dropped
    )


def steps_of(
    recipe: Recipe, pairs: Sequence[EncodedPair], budget: int, reference: Callable[..., PairLogps] | None = None
) -> Steps:
    """The run's steps, in the recipe's words."""
    section = recipe.training
    return Steps(pairs, section.pairs_per_step, budget, section.seed, section.epochs, section.max_steps, reference)


def settle_dtype(recipe: Recipe, base: ChatModel) -> Recipe:
    """The precision the base was loaded in, for good."""
    dtype: Any = str(base.model.dtype).removeprefix("torch.")
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})


def settle_tokens(
    recipe: Recipe, policy: PeftModel, pairs: Sequence[EncodedPair], device: torch.device, progress: Progress
) -> tuple[Recipe, Limit]:
    """How many tokens are in memory at once: the recipe's number, or measured, and then it stays so."""
    tokens = recipe.training.tokens_per_micro_batch
    if tokens != "auto":
        return recipe, Limit(0, tokens)
    limit = plan_limit(policy, pairs, recipe.training.pairs_per_step, device)
    if device.type == "cuda":
        again = f", with the backward pass forming each {limit.recompute} anew" if limit.recompute != "nothing" else ""
        progress.say(f"{limit.tokens} tokens a micro-batch fill this GPU{again}")
    settled = recipe.training.model_copy(update={"tokens_per_micro_batch": limit.tokens})
    return recipe.model_copy(update={"training": settled}), limit


def attach_policy(base: ChatModel, recipe: Recipe, say: Callable[[str], None] = lambda _: None) -> PeftModel:
    """A fresh adapter on the base, or the recipe's own to continue, which then stays beside it as the reference."""
    if recipe.model.adapter is None:
        return attach(base.model, recipe.adapter, seed=recipe.training.seed, say=say)
    folder = Path(recipe.model.adapter)
    policy = attach_existing(base.model, folder, trainable=True)
    if recipe.reference.model is None and recipe.reference.adapter is None:
        policy = attach_existing(policy, folder, trainable=False, name=REFERENCE)
    return policy


def reference_model(
    recipe: Recipe, base: ChatModel, policy: PeftModel, other_folder: ModelFolder | None = None
) -> tuple[Any, dict[str, str], Callable[[], AbstractContextManager[None]]]:
    """(the model that computes the reference, what its numbers depend on, the state to compute them in).

    `other_folder` is that of `reference.model`, if it was opened before.
    """
    section = recipe.reference
    adapter = section.adapter or (recipe.model.adapter if section.model is None else None)
    files, model = base.files, policy
    if section.model is not None:
        other = load_chat_model(reference_section(recipe, section.model), folder=other_folder)
        check_same_vocabulary(recipe, base.encoder, other.encoder)
        files, model = other.files, other.model
        if section.adapter is not None:
            model = attach_existing(other.model, Path(section.adapter), trainable=False)
    elif section.adapter is not None:
        policy = attach_existing(policy, Path(section.adapter), trainable=False, name=REFERENCE)
    context = {
        "weights": files.fingerprint,
        "adapter": weights_fingerprint(Path(adapter)) if adapter is not None else "",
        "dtype": str(base.model.dtype),
        "compute": "fp8" if computes_in_fp8(model) else "",
        "attention": base.model.config._attn_implementation,
        "device": base.device.type,
        "torch": torch.__version__,
    }
    return model, context, (lambda: as_reference(policy)) if model is policy else (lambda: in_eval(model))
