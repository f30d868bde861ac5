"""The run's own model and the exported one, compared: log-probs of held-out pairs, and a few answers."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dpo_studio.config import ModelSection, Recipe
from dpo_studio.console.progress import Progress
from dpo_studio.export.merge import AnyDelta, adapter_deltas
from dpo_studio.export.verify import ExportCheck, compare
from dpo_studio.frozen.linear import weight_count
from dpo_studio.learning.batched_logps import batched_logps
from dpo_studio.learning.reference import ReferenceChoice
from dpo_studio.models.adapters import in_eval
from dpo_studio.models.folder import ModelFolder
from dpo_studio.models.load import ChatModel, load_chat_model
from dpo_studio.objectives import PairLogps
from dpo_studio.policy.policy import Policy
from dpo_studio.preferences.pair import Message, Pair, prompt_key
from dpo_studio.sampling.completion import Completion
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.workflows.demo import SHOWCASE
from dpo_studio.workflows.loading import LoadedModel
from dpo_studio.workflows.talking import SHOWN_SAMPLING, answers
from dpo_studio.workflows.training.preparing import RunData, encode_both, make_reference, read_and_split

__all__ = ["RunModel", "ask_the_run", "look_again", "stop_rate"]

_COMPARED = 512
"""Pairs that both models are compared on, at most."""
_ASKED = 16
"""Held-out prompts that both models answer, for the stop rate."""


@dataclass(frozen=True, eq=False)
class RunModel:
    """The results of the run's own model, which is then freed for the exported one."""

    base: ModelFolder
    """The folder of its base."""
    deltas: dict[str, AnyDelta]
    pairs: list[EncodedPair]
    prompts: list[str]
    """The key of each pair's prompt."""
    held_out: bool
    """Whether the pairs are held out; a run without any is compared on its training pairs."""
    policy: PairLogps
    reference: PairLogps
    chats: list[Sequence[Message]]
    answers: list[Completion]
    training: list[EncodedPair]
    weights: int
    """Number of the base's weights; packed ones count by their unpacked shape."""
    linear: int
    """Weights of its linear layers except the head: those that GPTQ quantises."""


def ask_the_run(recipe: Recipe, adapter: Path, progress: Progress, *, today: datetime.date | None = None) -> RunModel:
    """Compute the results of the run's own model, with chats of the run's date."""
    base = load_chat_model(recipe.model, say=progress.say, today=today)
    linear = _linear_weights(base.model)
    source, split = read_and_split(recipe, progress)
    data = encode_both(recipe, source, split, base.encoder, progress)
    side, pairs = _compared(data, split.train, split.held_out, progress)
    keys = {pair.row: prompt_key(pair.prompt) for pair in side}
    chats: list[Sequence[Message]] = list({keys[pair.row]: pair.prompt for pair in side}.values())
    chats = [*chats[:_ASKED], (Message("user", SHOWCASE),)]
    policy = Policy.saved(base.model, adapter, trainable=False)
    ReferenceChoice.of(recipe).load_beside(policy)
    return RunModel(
        base=base.files,
        deltas=adapter_deltas(policy.model),
        pairs=pairs,
        prompts=[keys[pair.row] for pair in pairs],
        held_out=bool(data.held_out.pairs),
        policy=_logps(policy.model, pairs, "the run's own model", progress),
        reference=_reference(recipe, base, policy, pairs, progress),
        chats=chats,
        answers=_answers(base, policy.model, chats, progress),
        training=data.train.pairs,
        weights=weight_count(base.model),
        linear=linear,
    )


def look_again(
    known: RunModel, recipe: Recipe, folder: Path, progress: Progress, *, today: datetime.date | None = None
) -> tuple[ExportCheck, list[Completion]]:
    """Load the exported folder as a user would, and compute the same results."""
    back = load_chat_model(
        ModelSection(path=str(folder), dtype=recipe.model.dtype, attention=recipe.model.attention),
        say=progress.say,
        today=today,
    )
    after = _logps(back.model, known.pairs, "the exported model", progress)
    comparison = compare(known.policy, after, known.reference, known.prompts, beta=recipe.objective.beta)
    return comparison, _answers(back, back.model, known.chats, progress)


def stop_rate(answers: Sequence[Completion]) -> float:
    """Share of the held-out prompts' answers that ended by themselves; the last answer is to the showcase's."""
    *held_out, _ = answers
    return sum(answer.ended for answer in held_out) / max(len(held_out), 1)


def _compared(
    data: RunData, train: list[Pair], held_out: list[Pair], progress: Progress
) -> tuple[list[Pair], list[EncodedPair]]:
    """The side that both models are compared on, as text and as ids."""
    side, pairs = held_out, data.held_out.pairs
    if not pairs:
        progress.warn(
            "the run has no held-out pairs: nothing can be verified on held-out pairs, training pairs are used"
        )
        side, pairs = train, data.train.pairs
    if len(pairs) > _COMPARED:
        progress.say(f"comparing on {_COMPARED} of {len(pairs)} pairs")
    return side, pairs[:_COMPARED]


def _logps(model: nn.Module, pairs: Sequence[EncodedPair], title: str, progress: Progress) -> PairLogps:
    with progress.task(title, len(pairs), "pairs") as advance, in_eval(model):
        return batched_logps(model, pairs, progress=advance)


def _reference(
    recipe: Recipe, base: ChatModel, policy: Policy, pairs: Sequence[EncodedPair], progress: Progress
) -> PairLogps:
    """The reference's log-probs, from the training's cache where that still exists."""
    reference = make_reference(recipe, base, policy)
    with progress.task("its reference", len(pairs), "pairs") as advance:
        return reference.logps(pairs, progress=advance)


def _answers(
    base: ChatModel, model: nn.Module, chats: Sequence[Sequence[Message]], progress: Progress
) -> list[Completion]:
    return answers(LoadedModel(base, model, None, None), chats, SHOWN_SAMPLING, tuned=True, progress=progress)


def _linear_weights(model: nn.Module) -> int:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return sum(layer.in_features * layer.out_features for layer in layers)
