"""Running out of memory, without a GPU to run out of: a limit on tokens that raises what torch raises."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dpo_studio.config import TrainingSection
from dpo_studio.errors import RunError
from dpo_studio.learning import batched_logps as batched
from dpo_studio.learning import memory, train
from dpo_studio.learning.batched_logps import batched_logps
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.memory import (
    CPU_TOKEN_BUDGET,
    MemoryLimit,
    MemoryLimits,
    plan_limit,
    tokens_without_gradient,
    unless_out_of_memory,
)
from dpo_studio.learning.state import TrainingState
from dpo_studio.learning.train import StepReport
from dpo_studio.models.adapters import as_reference, train_mode
from dpo_studio.models.attention import PAIRS
from dpo_studio.models.lora import LoraLinear
from dpo_studio.objectives import AOT, DPO, PairLogps
from dpo_studio.policy.policy import Policy
from dpo_studio.tokens.pack import MicroBatch, Steps, pack, packed_tokens
from tests.pairs_of_ids import random_pairs
from tests.policies import policy_on
from tests.tiny_runs import dpo, write_recipe

THIRTY = random_pairs(30)
LONGEST = max(map(packed_tokens, THIRTY))
SECTION = TrainingSection(pairs_per_step=8, learning_rate=3e-3, warmup=0, schedule="constant")


def limited(most: int, met: list[int] | None = None) -> Callable[..., PairLogps]:
    """`pair_logps` on a device where rows of more than `most` tokens are too much."""

    def compute(model: Any, batch: MicroBatch, **kwargs: Any) -> PairLogps:
        if batch.tokens > most:
            if met is not None:
                met.append(batch.tokens)
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return pair_logps(model, batch, **kwargs)

    return compute


def run(
    budget: int, known: list[MemoryLimit] | None = None, objective: Any = None
) -> tuple[list[StepReport], list[MemoryLimit]]:
    """Five steps with a live reference, and the limits they met."""
    policy = policy_on(size=0, attn_implementation=PAIRS)

    def live(batches: Any) -> list[PairLogps]:
        with as_reference(policy):
            return [vars(train)["pair_logps"](policy, batch) for batch in batches]

    met: list[MemoryLimit] = []
    steps = Steps(THIRTY, 8, budget, 0, 1, 5)
    state = TrainingState.fresh(Policy(policy), SECTION, 5)
    train_mode(policy)
    reports = list(
        train.train(
            Policy(policy), steps, objective or DPO(), state, live, MemoryLimits(policy, steps, known or [], met.append)
        )
    )
    return reports, met


def losses(reports: list[StepReport]) -> list[float]:
    return [report.metrics["loss"] for report in reports]


@pytest.mark.parametrize("objective", [DPO(), AOT()], ids=str)
def test_a_run_that_runs_out_of_memory_ends_with_the_same_losses(
    monkeypatch: pytest.MonkeyPatch, objective: Any
) -> None:
    """Rows of up to 400 tokens, of which 150 fit: half the largest row is the new limit, every step has its pairs."""
    free, nothing_met = run(400, objective=objective)
    met_rows: list[int] = []
    monkeypatch.setattr(train, "pair_logps", limited(150, met_rows))
    short, met = run(400, objective=objective)
    assert nothing_met == []
    assert met == [MemoryLimit(1, met_rows[0] // 2)]
    assert 150 < met_rows[0] < 300
    assert losses(short) == pytest.approx(losses(free), abs=1e-6)
    assert [(r.step, r.pairs, r.tokens) for r in short] == [(r.step, r.pairs, r.tokens) for r in free]
    assert losses(run(met[0].tokens, objective=objective)[0]) == losses(short)


def test_a_limit_met_on_the_way_is_met_again_on_a_resume() -> None:
    """Bits hang on rows: with the limit known, the steps before and after it are those of the run that met it."""
    plain = losses(run(400)[0])
    known = losses(run(400, [MemoryLimit(3, 100)])[0])
    assert known[:2] == plain[:2]
    assert known == pytest.approx(plain, abs=1e-6)
    later = run(400, [MemoryLimit(3, 100)])[0]
    assert losses(later) == known


def test_when_one_pair_is_too_much_the_backward_pass_forms_more_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 tokens, down to the longest pair; then its MLPs, then whole layers; then there is nothing left to do."""
    monkeypatch.setattr(train, "pair_logps", limited(LONGEST - 1))
    policy = policy_on(size=0, attn_implementation=PAIRS)
    steps = Steps(THIRTY, 30, 2 * LONGEST, 0, 1, 1)
    state = TrainingState.fresh(Policy(policy), SECTION, 1)
    met: list[MemoryLimit] = []

    def live(batches: Any) -> list[PairLogps]:
        return [pair_logps(policy, batch) for batch in batches]

    with pytest.raises(RunError, match=f"the longest pair, {LONGEST} tokens, does not fit") as refused:
        list(train.train(Policy(policy), steps, DPO(), state, live, MemoryLimits(policy, steps, [], met.append)))
    assert met == [MemoryLimit(1, LONGEST), MemoryLimit(1, LONGEST, "mlp"), MemoryLimit(1, LONGEST, "layer")]
    assert "data.max_length" in str(refused.value.hint)


def test_log_probs_without_a_gradient_halve_their_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Order and values stay; a pair that is too much on its own is named."""
    policy = policy_on(attn_implementation=PAIRS)
    free = batched_logps(policy, THIRTY, token_budget=400)
    monkeypatch.setattr(batched, "pair_logps", limited(LONGEST))
    short = batched_logps(policy, THIRTY, token_budget=400)
    torch.testing.assert_close(short.chosen_P, free.chosen_P, rtol=1e-5, atol=0)
    torch.testing.assert_close(short.rejected_P, free.rejected_P, rtol=1e-5, atol=0)
    monkeypatch.setattr(batched, "pair_logps", limited(LONGEST - 1))
    with pytest.raises(RunError, match=f"the longest pair, {LONGEST} tokens"):
        batched_logps(policy, THIRTY, token_budget=400)


def test_a_known_limit_s_recomputation_is_applied_and_later_words_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """As memory.jsonl has them: the plan's, two halvings at step 3, and one at step 2 of a run that went back there."""
    applied: list[str] = []
    monkeypatch.setattr(memory, "set_recompute", lambda _policy, what: applied.append(what))
    steps = Steps(THIRTY, 8, 400, 0, 1, 5)
    known = [MemoryLimit(0, 400, "mlp"), MemoryLimit(3, 200, "mlp"), MemoryLimit(3, 100, "mlp")]
    room = MemoryLimits(policy_on(), steps, known)
    tokens = [room.packed(steps.micro_batches_of(step), step)[0].token_budget for step in (1, 2, 3, 4)]
    assert tokens == [400, 400, 100, 100]
    assert applied == ["mlp"]
    again = MemoryLimits(policy_on(), steps, [*known, MemoryLimit(2, 150, "layer")])
    assert [again.packed(steps.micro_batches_of(step), step)[0].token_budget for step in (1, 2, 3)] == [400, 150, 150]
    assert applied == ["mlp", "mlp", "layer"]


def test_a_broken_off_forward_pass_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out between gate and up: what gate's call computed for up hangs on the graph of all layers before."""
    policy = policy_on(attn_implementation=PAIRS)
    train_mode(policy)
    outputs: list[Any] = []
    layers = policy.get_base_model().model.layers
    layers[0].register_forward_hook(lambda _module, _inputs, output: outputs.append(weakref.ref(output)))

    def no_memory(_x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    layers[-1].mlp.act_fn.forward = no_memory
    assert unless_out_of_memory(policy, lambda: pair_logps(policy, pack(THIRTY[:3]))) is None
    assert outputs[0]() is None
    assert all(module._ready is None for module in policy.modules() if isinstance(module, LoraLinear))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="something else"):
        unless_out_of_memory(torch.nn.Identity(), lambda: (_ for _ in ()).throw(RuntimeError("something else")))


def test_passes_without_a_gradient_take_a_gpu_s_full_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little training has room for; a CPU's measure stays, and that of compiled layers, which keep as much."""
    on_gpu: Any = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    monkeypatch.setattr(memory, "is_compiled", lambda model: False)
    assert [tokens_without_gradient(tokens, on_gpu) for tokens in (1630, 65536)] == [8192, 65536]
    monkeypatch.setattr(memory, "is_compiled", lambda model: True)
    assert tokens_without_gradient(1630, on_gpu) == 1630
    assert tokens_without_gradient(1630, policy_on(size=0)) == 1630


def test_a_cpu_is_given_its_own_number() -> None:
    policy = policy_on(attn_implementation=PAIRS)
    assert plan_limit(policy, THIRTY, 8, torch.device("cpu")) == MemoryLimit(0, CPU_TOKEN_BUDGET)


def pretended(*, allocated: int, usable: float, peak: Callable[[Any, MicroBatch], int]) -> memory.Card:
    """A card of which only these three are known."""
    return cast(memory.Card, SimpleNamespace(allocated=lambda: allocated, usable=lambda: usable, peak=peak))


@pytest.mark.parametrize(
    ("free_tokens", "expected"),
    [
        (10_000, MemoryLimit(0, 256)),  # more than a step has: 8 pairs of some 25 tokens, and a quarter
        (200, MemoryLimit(0, 128)),  # what fits, in whole blocks
        (LONGEST, MemoryLimit(0, LONGEST)),
        (LONGEST - 10, MemoryLimit(0, LONGEST, "mlp")),  # at half the memory a token
        (LONGEST // 3, MemoryLimit(0, LONGEST, "layer")),  # at a fifth
    ],
)
def test_the_plan_is_a_straight_line_through_two_measured_rows(
    monkeypatch: pytest.MonkeyPatch, free_tokens: int, expected: MemoryLimit
) -> None:
    """A make-believe card: 5,000 bytes to begin with, 10 a token (5 and 2 with less kept), room for `free_tokens` and
    for the tenth that is never planned with."""
    a_token = {"nothing": 10, "mlp": 5, "layer": 2}
    now = {"what": "nothing"}
    room = 10.05 * free_tokens / memory._SPARE

    def peak(_policy: Any, row: MicroBatch) -> int:
        used = a_token[now["what"]] * row.tokens
        if used > room:
            raise torch.OutOfMemoryError("pretended")
        return 5_000 + used

    monkeypatch.setattr(memory, "set_recompute", lambda _policy, what: now.update(what=what))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    card = pretended(allocated=5_000, usable=5_000 + room, peak=peak)
    policy = policy_on(attn_implementation=PAIRS)
    assert plan_limit(policy, THIRTY, 8, torch.device("cuda"), card) == expected


def test_a_plan_is_tried_before_it_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As measured on an H200: of a short row's blocks parts go to waste, so the line through two of them is too flat
    by a fifth, and a row of the size it plans would be too much."""
    tried = []

    def peak(_policy: Any, row: MicroBatch) -> int:
        tried.append(row.tokens)
        return 10 * row.tokens + max(0, 2 * LONGEST - row.tokens) * 2

    room = 10 * 600
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    card = pretended(allocated=0, usable=room / memory._SPARE, peak=peak)
    limit = plan_limit(policy_on(attn_implementation=PAIRS), THIRTY, len(THIRTY), torch.device("cuda"), card)
    assert limit == MemoryLimit(0, 512)
    assert max(tried[3:]) > 600  # the first was all that could be wanted, the next two the line's


def test_a_card_that_holds_not_even_one_pair_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(_policy: Any, _row: MicroBatch) -> int:
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    card = pretended(allocated=0, usable=1.0, peak=peak)
    with pytest.raises(RunError, match="the longest pair"):
        plan_limit(policy_on(attn_implementation=PAIRS), THIRTY, 8, torch.device("cuda"), card)


def test_a_run_says_so_and_writes_it_down(monkeypatch: pytest.MonkeyPatch, tiny_base: Path, tmp_path: Path) -> None:
    """`dpo train` with rows too large at its third step: a line says what was done, memory.jsonl keeps it for a resume,
    and the metrics are those of the run that had room."""
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, training={"tokens_per_micro_batch": 2048})
    assert dpo("train", recipe, "--set", f"run.folder={tmp_path / 'free'}").code == 0
    calls = {"n": 0}

    def third(model: Any, batch: MicroBatch, **kwargs: Any) -> PairLogps:
        calls["n"] += 1
        if calls["n"] == 3:
            raise torch.OutOfMemoryError("pretended")
        return pair_logps(model, batch, **kwargs)

    monkeypatch.setattr(train, "pair_logps", third)
    said = dpo("train", recipe, "--set", f"run.folder={tmp_path / 'short'}")
    assert said.code == 0, said.err
    (line,) = map(json.loads, (tmp_path / "short" / "memory.jsonl").read_text().splitlines())
    assert (line["step"], line["recompute"]) == (3, "nothing")
    assert line["tokens"] < 200  # half of what four pairs take
    assert f"step 3 ran out of GPU memory: {line['tokens']} tokens a micro-batch from here on" in said.err
    free, short = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("free", "short")
    )
    assert [line["loss"] for line in short[1:]] == pytest.approx([line["loss"] for line in free[1:]], abs=1e-6)
