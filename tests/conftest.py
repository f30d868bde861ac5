"""What several test files share: pairs of random ids, and a policy whose adapter is no longer the zero it starts as."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from dpo_studio.config import AdapterSection, TrainingSection
from dpo_studio.learning.reference import reference_logps
from dpo_studio.learning.state import TrainingState
from dpo_studio.learning.train import StepReport, train
from dpo_studio.models.adapters import as_reference, attach, train_mode
from dpo_studio.objectives import PairLogps
from dpo_studio.policy.policy import Policy
from dpo_studio.tokens.encode import EncodedAnswer, EncodedPair
from dpo_studio.tokens.pack import Steps
from tests.tiny_models import tiny_folder, tiny_model
from tests.tiny_runs import dpo, write_recipe
from tests.tiny_tokenizers import VOCABULARY

SECTION = AdapterSection(rank=4, alpha=8)
"""The adapter of the tests: scale 2, on every linear layer but the head."""


def encoded(
    prompt: Sequence[int],
    chosen: Sequence[int],
    rejected: Sequence[int],
    *,
    unscored: Sequence[int] = (),
    row: int = 0,
) -> EncodedPair:
    """A pair from plain ids; the places in `unscored` are not scored in either answer."""

    def answer(ids: Sequence[int]) -> EncodedAnswer:
        scored = np.array([place not in unscored for place in range(len(ids))])
        return EncodedAnswer(np.array(ids, np.int32), scored)

    return EncodedPair(row, np.array(prompt, np.int32), answer(chosen), answer(rejected))


def random_pairs(
    count: int, *, seed: int = 0, prompt: tuple[int, int] = (2, 20), answer: tuple[int, int] = (1, 24)
) -> list[EncodedPair]:
    """Pairs of random ids, lengths drawn from the two ranges, both ends included."""
    draw = np.random.default_rng(seed)

    def ids(lengths: tuple[int, int]) -> list[int]:
        return [int(i) for i in draw.integers(3, VOCABULARY, draw.integers(lengths[0], lengths[1] + 1))]

    return [encoded(ids(prompt), ids(answer), ids(answer), row=row) for row in range(count)]


def plain_logps(model: Any, pairs: Sequence[EncodedPair]) -> Tensor:
    """The textbook: every answer behind its prompt, one sequence at a time, through the model's own logits, (P, 2)."""
    sums = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.tensor([*pair.prompt.tolist(), *answer.ids.tolist()], device=model.device)
            logps = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
            places = [len(pair.prompt) + place for place in range(len(answer.ids)) if answer.scored[place]]
            sums.append(sum((logps[place - 1, ids[place]] for place in places), torch.zeros((), device=ids.device)))
    return torch.stack(sums).view(-1, 2)


def columns(logps: PairLogps) -> Tensor:
    """Both answers' log-probs, (P, 2)."""
    return torch.stack([logps.chosen_P, logps.rejected_P], 1)


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    """Of `value` in every trainable tensor; the model is left without any."""
    torch.autograd.backward(value)
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def moved(policy: Any, *, seed: int = 0, size: float = 0.1) -> Any:
    """The same policy after its adapter has gone somewhere: every lora_B drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            p.data = size * torch.randn(p.shape, generator=draw)
    return policy


def policy_on(architecture: str = "llama", *, size: float = 0.1, dropout: float = 0.0, **changes: Any) -> Any:
    """Our LoRA on a tiny model, in eval, its adapter moved by `size`."""
    model = tiny_model(architecture, **changes)
    model.requires_grad_(False)
    section = SECTION.model_copy(update={"dropout": dropout})
    return moved(attach(model, section, seed=0), size=size).eval()


def plain_peft_on(architecture: str = "llama", *, size: float = 0.1, **changes: Any) -> Any:
    """The oracle of `policy_on`: the same weights, PEFT's own LoRA layers, transformers' eager attention."""
    model = tiny_model(architecture, attn_implementation="eager", **changes)
    config = LoraConfig(r=SECTION.rank, lora_alpha=SECTION.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(model, config)
    ours = dict(policy_on(architecture, size=size, **changes).named_parameters())
    for name, p in policy.named_parameters():
        p.data = ours[name].data.clone()
    return policy.eval()


def take_steps(
    policy: Any,
    pairs: Sequence[EncodedPair],
    section: TrainingSection,
    objective: Any,
    *,
    steps: int,
    budget: int = 100,
) -> Iterator[StepReport]:
    """Our loop as `dpo train` runs it, the reference known beforehand."""
    with as_reference(policy):
        known = reference_logps(policy, pairs, token_budget=budget, cache=None)
    plan = Steps(
        pairs,
        section.pairs_per_step,
        budget,
        section.seed,
        section.epochs,
        steps,
        lambda places: known.map(lambda x_P: x_P[list(places)]),
    )
    train_mode(policy)
    state = TrainingState.fresh(Policy(policy), section, steps)
    return train(Policy(policy), plan, objective, state)


def write_pairs(file: Path, count: int, *, seed: int = 0) -> Path:
    """`count` pairs of text, prompt, chosen and rejected: every prompt another, answers of one to nine words."""
    words = ["dry", "it", "keep", "off", "and", "wait", "a", "day", "before", "the", "bread", "does", "rise", "warmer"]
    draw = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(draw.choice(words, draw.integers(1, 10)))

    rows = [
        {"prompt": f"{text()} {seed}.{row}?", "chosen": f"{text()} {row}.", "rejected": text()} for row in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def pytest_collection_finish() -> None:
    """What the imports of torch and transformers made stays for good: the collector, which went through a million of
    their objects again and again, leaves them out. A tenth of the time of a file that trains, more where objects come and
    go by the thousand."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Here and in the processes that tests start: the models are tiny, and on busy cores OpenMP's threads wait for each
    other (a step took 40 times as long). Bits hang on the number of threads, too."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the caches of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_STUDIO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 50,000 random parameters with a ChatML tokenizer, as a model folder."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps on `tiny_base`, with beta 0.5 and 18 pairs. Not to be written to."""
    recipe = write_recipe(tmp_path_factory.mktemp("run") / "r.yaml", tiny_base, objective={"beta": 0.5})
    said = dpo("train", recipe)
    assert said.code == 0, said.err
    return recipe.parent / "run"
