"""What a training needs before its first step: pairs as token ids, a policy, and its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpo_studio.config import AdapterSection, Layout, Recipe, cache_folder
from dpo_studio.console.progress import Progress
from dpo_studio.errors import DataError, ModelError
from dpo_studio.frozen.linear import computes_in_fp8
from dpo_studio.learning.memory import MemoryLimit, plan_limit
from dpo_studio.learning.reference import Reference, ReferenceChoice
from dpo_studio.learning.reference_cache import ReferenceCache
from dpo_studio.learning.state import TrainingState
from dpo_studio.models.adapters import attach_existing, in_eval
from dpo_studio.models.experts import adapts_experts
from dpo_studio.models.fingerprint import weights_fingerprint
from dpo_studio.models.folder import ModelFolder
from dpo_studio.models.layers import RUNGS
from dpo_studio.models.layouts import layout_of
from dpo_studio.models.load import ChatModel, choose_dtype, load_chat_model
from dpo_studio.models.sharding import is_sharded
from dpo_studio.models.targets import all_linear
from dpo_studio.policy.policy import Policy
from dpo_studio.policy.whole import WholePolicy
from dpo_studio.preferences.mixing import Part, read_training, shares
from dpo_studio.preferences.pair import prompt_key
from dpo_studio.preferences.sources import PairSource
from dpo_studio.preferences.split import Split, split_pairs
from dpo_studio.ranks import ALONE, Ranks
from dpo_studio.tokens.chat import ChatEncoder
from dpo_studio.tokens.encode import Encoded, EncodedPair, encode_pairs
from dpo_studio.tokens.pack import Steps
from dpo_studio.workflows.opening import check_same_vocabulary, reference_section

__all__ = [
    "RunData",
    "attach_policy",
    "encode_both",
    "fresh_state",
    "make_reference",
    "read_and_split",
    "resolve_model",
    "resolve_targets",
    "resolve_token_budget",
    "steps_of",
    "with_dtype_of_first",
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
    """The pairs of the recipe's sources on their two sides; every refusal is reported."""
    source, parts = read_training(recipe.data)
    progress.say(f"{source.name}: {source.rows} rows ({source.format}), {len(source.pairs)} pairs")
    for line in source.refused_lines():
        progress.warn(line)
    split = split_pairs(source.pairs, recipe.data.held_out, seed=recipe.data.split_seed)
    if len(parts) > 1:
        split = _mixed(split, parts, recipe.data.split_seed, progress)
    dropped = f", {split.shared_prompts_dropped} dropped for sharing a prompt" if split.shared_prompts_dropped else ""
    near = f", {split.near_copies} of them with the prompt they nearly repeat" if split.near_copies else ""
    progress.say(f"{len(split.train)} pairs to train on, {len(split.held_out)} held out{dropped}{near}")
    return source, split


def _mixed(split: Split, parts: Sequence[Part], seed: int, progress: Progress) -> Split:
    """The split with each source's share of the training pairs.

    Raises:
        DataError: a source with a weight has no pair to learn from.
    """
    train, counts = shares(split.train, parts, seed=seed)
    for part in parts:
        share = "" if part.weight is None else f", weight {part.weight:.3g} of 1"
        progress.say(f"{part.name}: {counts[part.name]} pairs to train on{share}")
    if empty := [name for name, count in counts.items() if not count]:
        raise DataError(f"{empty[0]} has no pair to train on", hint="remove it from data.train, or hold less out")
    return replace(split, train=train)


def encode_both(recipe: Recipe, source: PairSource, split: Split, encoder: ChatEncoder, progress: Progress) -> RunData:
    """Both sides as token ids under the recipe's length rule; every cut and drop is reported.

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


def steps_of(recipe: Recipe, pairs: Sequence[EncodedPair], token_budget: int, layout: Layout) -> Steps:
    """The steps that the recipe asks for."""
    section = recipe.training
    steps = Steps(pairs, section.pairs_per_step, token_budget, section.seed, section.epochs, section.max_steps)
    return replace(steps, layout=layout)


def with_dtype(recipe: Recipe, dtype: Any) -> Recipe:
    """The recipe with the precision in which the base is loaded, in place of `auto`."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})


def resolve_model(recipe: Recipe, base: ChatModel) -> Recipe:
    """The recipe with the precision and the layout in which the base was loaded, in place of `auto`."""
    dtype: Any = str(base.model.dtype).removeprefix("torch.")
    section = recipe.model.model_copy(update={"dtype": dtype, "layout": base.layout.layout})
    return recipe.model_copy(update={"model": section})


def resolve_targets(recipe: Recipe, policy: Policy) -> Recipe:
    """The recipe with the names that `all-linear` meant in a mixture of experts: later versions may mean more."""
    targets = policy.resolved_targets()
    if recipe.adapter is None or targets is None:
        return recipe
    if recipe.model.adapter is not None or recipe.adapter.targets != "all-linear":
        return recipe
    return recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"targets": targets})})


def resolve_token_budget(
    recipe: Recipe,
    policy: Policy,
    pairs: Sequence[EncodedPair],
    device: torch.device,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> tuple[Recipe, MemoryLimit]:
    """The recipe with its token budget, measured where it is `auto`; the run keeps it from then on."""
    tokens = recipe.training.tokens_per_micro_batch
    if tokens != "auto":
        return recipe, MemoryLimit(0, tokens)
    # the averages of the optimizer are not there yet, and an adapter's are small
    averages = (
        [torch.empty_like(p) for p in policy.trained.values() for _ in range(2)] if recipe.adapter is None else []
    )
    limit = plan_limit(policy.model, pairs, ranks.share_of(recipe.training.pairs_per_step), device)
    del averages
    for p in policy.trained.values():
        p.grad = None
    rung = ranks.most(RUNGS.index(limit.recompute))  # what the fullest of the GPUs needs is what all do
    limit = MemoryLimit(0, ranks.least(limit.tokens), RUNGS[rung])
    if device.type == "cuda":
        progress.say(f"{limit.tokens} tokens a micro-batch fill this GPU{limit.recomputing}")
    resolved = recipe.training.model_copy(update={"tokens_per_micro_batch": limit.tokens})
    return recipe.model_copy(update={"training": resolved}), limit


def with_dtype_of_first(recipe: Recipe, ranks: Ranks) -> Recipe:
    """The recipe with one precision for all of several processes: on a CPU a timed product decides."""
    if ranks.size == 1:
        return recipe
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = str(choose_dtype(recipe.model.dtype, device)[0]).removeprefix("torch.")
    return with_dtype(recipe, ranks.text_of_first(dtype))


def attach_policy(base: ChatModel, recipe: Recipe, say: Callable[[str], None] = lambda _: None) -> Policy:
    """A fresh adapter on the base, or the recipe's adapter to continue; with the reference adapter, if any. Or the
    whole base."""
    if is_sharded(base.model):
        _check_sharded(recipe.adapter, base)
    if recipe.adapter is None:
        return WholePolicy.of(base.model)
    if recipe.model.adapter is None:
        policy = Policy.fresh(base.model, recipe.adapter, seed=recipe.training.seed, say=say)
    else:
        policy = Policy.saved(base.model, Path(recipe.model.adapter), trainable=True)
    ReferenceChoice.of(recipe).load_beside(policy)
    if recipe.reference.update_every is not None:
        policy.check_movable()
    return policy


def _check_sharded(adapter: AdapterSection | None, base: ChatModel) -> None:
    """Raises ModelError if what is trained needs more of a layer's weights than its own pass collects."""
    targets = all_linear(base.model)
    refused = {
        "adapter: null": adapter is None,
        "adapter.kind: dora": adapter is not None and adapter.kind == "dora",
        "adapter.modules_to_save": adapter is not None and bool(adapter.modules_to_save),
        "a mixture of experts": bool(targets.parameters or targets.experts or targets.routers),
    }
    for what, is_there in refused.items():
        if is_there:
            raise ModelError(f"model.sharding: full is not built for {what}", hint="model.sharding: none")


def fresh_state(recipe: Recipe, policy: Policy, total_steps: int, ranks: Ranks) -> TrainingState:
    """The state before the first step."""
    ratio = None if recipe.adapter is None else recipe.adapter.learning_rate_ratio
    return TrainingState.fresh(policy, recipe.training, total_steps, recipe.reference, ranks, ratio)


def make_reference(
    recipe: Recipe,
    base: ChatModel,
    policy: Policy,
    other_folder: ModelFolder | None = None,
    *,
    ranks: Ranks = ALONE,
) -> Reference:
    """The recipe's reference, ready to compute: in the policy's own model, or in another model that is loaded here.

    `other_folder` is the folder of `reference.model`, if it was opened before.

    Raises:
        ModelError: another model cannot be used, or has another vocabulary.
    """
    choice = ReferenceChoice.of(recipe)
    files, model, computing = base.files, policy.model, policy.as_reference
    if choice.model is not None:
        other = load_chat_model(reference_section(recipe, choice.model), folder=other_folder)
        check_same_vocabulary(recipe, base.encoder, other.encoder)
        files, model = other.files, other.model
        if choice.adapter is not None:
            model = attach_existing(other.model, choice.adapter, trainable=False)
        computing = partial(in_eval, model)
    if recipe.reference.mode != "cached":
        return Reference(model, computing, None, ranks)
    key = {
        "weights": files.fingerprint,
        "adapter": weights_fingerprint(choice.adapter) if choice.adapter is not None else "",
        "dtype": str(base.model.dtype),
        "quantize": recipe.model.quantize or "" if choice.model is None else "",
        "compute": "fp8" if computes_in_fp8(model) else "",
        "attention": base.model.config._attn_implementation,
        "layout": layout_of(model),
        "device": base.device.type,
        "torch": torch.__version__,
    }
    if adapts_experts(model):  # computed by our own product, which rounds otherwise than transformers'
        key["experts"] = "adapted"
    return Reference(model, computing, ReferenceCache(cache_folder() / "reference", key), ranks)
