"""A result that is not finite is no result: exit 3 and a word on why, however few steps were passed over."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_studio.config import TrainingSection
from dpo_studio.errors import ModelError, NonFiniteError
from dpo_studio.evaluation.judges import check_some_finite
from dpo_studio.learning.state import TrainingState
from dpo_studio.models.attention import PAIRS
from dpo_studio.models.finite import check_finite_adapter
from dpo_studio.objectives import DPO
from dpo_studio.policy.policy import Policy
from tests.pairs_of_ids import random_pairs
from tests.policies import policy_on, take_steps
from tests.tiny_runs import dpo, tiny_rows, write_recipe, write_rows


def is_finite(folder: Path) -> bool:
    """By plain safetensors: every tensor under a folder."""
    files = list(folder.rglob("*.safetensors"))
    return all(bool(t.float().isfinite().all()) for file in files for t in load_file(file).values())


@pytest.mark.parametrize(
    ("section", "held_out"),
    [
        ({"learning_rate": 1e308}, True),
        ({"learning_rate": 1e308}, False),
        ({"learning_rate": 1e308, "max_steps": 2}, False),
        ({"learning_rate": 1e308, "max_steps": 1, "warmup": 0}, False),
        ({"learning_rate": 1e25, "max_steps": 2, "warmup": 1}, True),
        ({"learning_rate": 1e25, "max_steps": 2, "warmup": 1}, False),
        ({"learning_rate": 1e25, "max_steps": 4, "schedule": "constant"}, True),
        ({"learning_rate": 1e38, "weight_decay": 10.0, "warmup": 0}, True),
    ],
    ids=str,
)
def test_a_training_that_blows_up_ends_with_3_and_leaves_no_result(
    tiny_base: Path, tmp_path: Path, section: dict[str, Any], held_out: bool
) -> None:
    """Infinite weights at the first step that has a rate, or finite ones that give no finite log-prob, at any place."""
    data: dict[str, Any] = {} if held_out else {"data": {"held_out": {"fraction": 0.0}}}
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, training={"save_every": 1} | section, **data)
    said = dpo("train", recipe)
    assert said.code == 3, said.err
    assert "finite" in said.err and "learning_rate" in said.err and "Traceback" not in said.err
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "result.json").exists()
    assert is_finite(tmp_path / "run")
    again = dpo("train", recipe)  # it is still none
    assert again.code == 3, again.err
    assert not (tmp_path / "run" / "adapter").exists()


def test_one_odd_step_is_still_passed_over(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = TrainingState.advance

    def odd_once(state: TrainingState, policy: Any) -> None:
        if state.step == 1:
            raise NonFiniteError("the gradient is not finite")
        advance(state, policy)

    monkeypatch.setattr(TrainingState, "advance", odd_once)
    said = dpo("train", write_recipe(tmp_path / "r.yaml", tiny_base))
    assert said.code == 0, said.err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped_steps"] == 1


@pytest.mark.parametrize("steps", [1, 2])
def test_a_training_of_which_no_step_could_be_taken_ends_with_3(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Fewer steps than stop a run in its middle: nothing was learned all the same."""

    def never(state: TrainingState, policy: Any) -> None:
        raise NonFiniteError("the gradient is not finite")

    monkeypatch.setattr(TrainingState, "advance", never)
    said = dpo("train", write_recipe(tmp_path / "r.yaml", tiny_base, training={"max_steps": steps}))
    assert said.code == 3, said.err
    assert f"none of the {steps} steps could be taken" in said.err
    assert not (tmp_path / "run" / "result.json").exists()


def test_an_update_that_makes_infinite_weights_stops_the_loop_at_once() -> None:
    """Its loss and gradient are finite: nothing but a look at the weights tells of it before the next step does."""
    model = policy_on(attn_implementation=PAIRS)
    section = TrainingSection(pairs_per_step=8, learning_rate=1e308, warmup=0, schedule="constant")
    with pytest.raises(
        NonFiniteError, match=r"step 1 made weights that are not finite, with a learning rate of 1e\+308"
    ):
        list(take_steps(model, random_pairs(30), section, DPO(), steps=3))


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_whole_sees_one_odd_number_anywhere(where: str, number: float) -> None:
    model = policy_on(size=0.1)
    state = TrainingState.fresh(Policy(model), TrainingSection(), 3)
    assert state.is_finite(Policy(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        trained[0 if where == "first" else -1].view(-1)[-1] = number
    assert not state.is_finite(Policy(model))


# What comes after a training


@pytest.fixture(scope="module")
def broken(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, into whose adapter an infinity was put."""
    folder = tmp_path_factory.mktemp("broken")
    assert dpo("train", write_recipe(folder / "r.yaml", tiny_base)).code == 0
    file = folder / "run" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[sorted(tensors)[-1]].view(-1)[0] = math.inf
    save_file(tensors, file, metadata={"format": "pt"})
    return folder / "run"


@pytest.mark.parametrize("to", ["adapter", "merged"])
def test_an_adapter_that_is_not_finite_is_not_exported(broken: Path, tmp_path: Path, to: str) -> None:
    said = dpo("export", broken, tmp_path / "out", "--to", to)
    assert said.code == 3, said.err
    assert "infinity" in said.err and "lora" in said.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_weights_cannot_be_read_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        check_finite_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"no")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        check_finite_adapter(tmp_path)
    save_file({"numbers": torch.tensor([1, 2]), "shares": torch.tensor([0.5])}, file)
    check_finite_adapter(tmp_path)


@pytest.mark.parametrize("verb", [("score",), ("eval", "--judge", "length")])
def test_no_verb_gives_a_result_of_it(broken: Path, tmp_path: Path, verb: tuple[str, ...]) -> None:
    pairs = [write_rows(tmp_path / "p.jsonl", tiny_rows(4))] if verb[0] == "score" else []
    said = dpo(verb[0], broken, *pairs, *verb[1:])
    assert said.code in (1, 3), said.err
    assert "not finite" in said.err or "infinity" in said.err
    assert "Traceback" not in said.err


def test_scores_that_are_all_not_finite_are_written_as_null_and_end_with_3(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_studio.workflows import scoring

    told = scoring.side_logps

    def nothing(*given: Any, **more: Any) -> Any:
        return told(*given, **more).map(lambda x_P: x_P * math.nan if x_P.is_floating_point() else x_P)

    monkeypatch.setattr(scoring, "side_logps", nothing)
    said = dpo("score", tiny_base, write_rows(tmp_path / "p.jsonl", tiny_rows(3)))
    assert said.code == 3, said.err
    assert [line["chosen_logp"] for line in said.lines] == [None, None, None]
    assert "no log-prob of the 3 pairs is finite" in said.err


@pytest.mark.parametrize("beta", ["1e308", "1e200"])
def test_a_summary_never_holds_a_number_that_is_none(tiny_run: Path, tmp_path: Path, beta: str) -> None:
    """beta x margin is too large for fp32: null, in the lines and in the summary, which stay JSON."""
    said = dpo("score", tiny_run, write_rows(tmp_path / "p.jsonl", tiny_rows(5)), "--beta", beta, "--json")
    assert said.code == 0, said.err

    def none(name: str) -> None:
        raise AssertionError(name)

    summary = json.loads(said.err.strip().splitlines()[-1], parse_constant=none)
    assert summary["margin"] is None and 0 <= summary["accuracy"] <= 1
    assert all(json.loads(line, parse_constant=none)["margin"] is None for line in said.out.splitlines())
    plain = dpo("score", tiny_run, tmp_path / "p.jsonl", "--json")
    assert json.loads(plain.err.strip().splitlines()[-1])["accuracy"] == summary["accuracy"]
    assert dpo("score", tiny_run, tmp_path / "p.jsonl", "--beta", beta).code == 0


def test_a_sweep_of_which_every_run_stops_itself_ends_with_3(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    said = dpo("sweep", recipe, "--set", "training.learning_rate=1e300,1e308", "--out", tmp_path / "out")
    assert said.code == 3, said.err
    runs = json.loads((tmp_path / "out" / "sweep.json").read_text())["runs"]
    assert all("not finite" in run["stopped"] for run in runs)


def test_a_sweep_in_which_one_run_blows_up_says_so_and_has_the_other(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    said = dpo("sweep", recipe, "--set", "training.learning_rate=1e308,1e-3", "--out", tmp_path / "out")
    assert said.code == 0, said.err
    first, second = json.loads((tmp_path / "out" / "sweep.json").read_text())["runs"]
    assert "not finite" in first["stopped"] and first["accuracy"] is None
    assert second["stopped"] is None and second["accuracy"] is not None


@pytest.mark.parametrize("numbers", [[math.nan], [math.inf, -math.inf], [math.nan, math.inf]])
def test_a_judge_whose_numbers_are_all_none_gives_no_verdicts(numbers: list[float]) -> None:
    with pytest.raises(NonFiniteError) as caught:
        check_some_finite(numbers, "reward:m")
    assert caught.value.exit_code == 3
    check_some_finite([*numbers, 1.0], "reward:m")
    check_some_finite([], "reward:m")


@pytest.mark.parametrize("text", [".inf", ".nan", "1e400", "-1e400"])
def test_settings_that_are_no_numbers_are_refused_before_anything_runs(
    tiny_base: Path, tmp_path: Path, text: str
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base)
    for key in ("training.learning_rate", "objective.beta", "training.weight_decay", "training.clip"):
        said = dpo("train", recipe, "--set", f"{key}={text}")
        assert said.code in (1, 2), (key, said.err)
        assert "Traceback" not in said.err
    assert not (tmp_path / "run").exists()
