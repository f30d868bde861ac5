"""A loss, a data format, a judge and a model family, each from this file alone, through a whole run.

What is added stays added, so the runs are in a process of their own: this file, run as a program. It uses public names
only and touches no module.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpo_studio.config import add_objective, recipe_schema
from dpo_studio.evaluation.judges import Comparison, RuleJudge, Verdict, add_judge, higher_wins
from dpo_studio.models.families import Family, add_family
from dpo_studio.objectives import Formula, PairLogps, Positive, margin
from dpo_studio.preferences.formats import add_format
from dpo_studio.preferences.pair import Message, Pair
from tests.tiny_models import tiny_folder
from tests.tiny_runs import dpo, tiny_rows, write_recipe, write_rows
from tests.tiny_tokenizers import VOCABULARY, end_ids, tiny_tokenizer


@dataclass(frozen=True)
class Squared(Formula):
    """(1 - beta x margin)^2: while the policy is its reference, 1."""

    kind: Literal["squared"] = "squared"
    beta: Positive = 0.5

    def __call__(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Loss of each pair, (P,)."""
        return (1 - self.beta * margin(policy, reference)) ** 2


def good_and_bad(row: dict[str, Any]) -> Pair:
    """A row of {"ask", "good", "bad"}."""
    ask, good, bad = ((Message(role, row[key]),) for role, key in _TURNS)
    return Pair(ask, good, bad)


_TURNS = (("user", "ask"), ("assistant", "good"), ("assistant", "bad"))


def shorter(_more: str) -> RuleJudge:
    """Fewer characters win."""

    def rule(comparison: Comparison) -> Verdict:
        a, b = -len(comparison.a.text), -len(comparison.b.text)
        return higher_wins(a, b, "The shorter one.")

    return RuleJudge("shorter", "The answer with fewer characters wins.", rule)


class QuietConfig(LlamaConfig):  # type: ignore[misc]
    """A Llama's, and what its logits are multiplied by."""

    model_type = "quiet_llama"
    quiet_logit_scale: float = 0.25


class QuietForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """A Llama whose logits are a quarter."""

    config_class: ClassVar[Any] = QuietConfig

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As a Llama's, times `quiet_logit_scale`."""
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * self.config.quiet_logit_scale
        return found


def quiet_folder(folder: Path) -> Path:
    """A model of that family, with random weights."""
    torch.manual_seed(0)
    config = QuietConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = QuietForCausalLM(config)
    model.generation_config.eos_token_id = sorted(end_ids())
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def use_all_doors(folder: Path) -> dict[str, Any]:
    """Every door used, then the verbs; what they said."""
    add_objective(Squared)
    add_format("good-and-bad", {"ask", "good", "bad"}, good_and_bad)
    add_judge("shorter", shorter)
    AutoConfig.register("quiet_llama", QuietConfig)
    AutoModelForCausalLM.register(QuietConfig, QuietForCausalLM)
    add_family(Family("quiet_llama", logits_multiplied_by="quiet_logit_scale"))

    rows = [{"ask": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in tiny_rows(24)]
    source = write_rows(folder / "rows.jsonl", rows)
    data = {"train": {"source": str(source), "format": "good-and-bad"}, "held_out": {"fraction": 0.25}}
    said: dict[str, Any] = {
        name: dpo(*words).out
        for name, words in {
            "train help": ("train", "--help"),
            "check help": ("data", "check", "--help"),
            "eval help": ("eval", "--help"),
            "check": ("data", "check", source, "--json"),
        }.items()
    }
    said["schema"] = json.dumps(recipe_schema())
    for name, base in (("loss", tiny_folder(folder / "base")), ("family", quiet_folder(folder / "quiet"))):
        (place := folder / name).mkdir()
        recipe = write_recipe(place / "r.yaml", base, data=data, objective={"kind": "squared"})
        trained = dpo("train", recipe)
        scored = dpo("score", place / "run", source, "--format", "good-and-bad", "--dtype", "float32")
        said[name] = {"train": [trained.code, trained.err], "score": [scored.code, scored.err], "lines": scored.lines}
    judged = dpo("eval", folder / "loss/run", "--judge", "shorter", "--temperatures", "0.7", "--prompts", 4)
    said["eval"] = [judged.code, judged.err]
    return said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doors")


@pytest.fixture(scope="module")
def said(place: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "tests.test_doors", place], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((place / "said.json").read_text())
    return found


def test_help_and_schema_list_what_was_added(said: dict[str, Any]) -> None:
    for where, name in (("train help", "squared"), ("check help", "good-and-bad"), ("eval help", "shorter")):
        assert name in " ".join(said[where].split())
    assert '"squared"' in said["schema"]


def test_a_loss_trains_and_scores(said: dict[str, Any], place: Path) -> None:
    """Its first loss is 1; its own, not ln 2, falls."""
    assert said["loss"]["train"][0] == said["loss"]["score"][0] == 0, said["loss"]
    lines = [json.loads(line) for line in (place / "loss/run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["eval_loss"] == 1
    assert lines[1]["loss"] == pytest.approx(1, abs=1e-5)
    assert lines[-1]["loss"] != pytest.approx(1, abs=1e-3)


def test_a_format_is_checked_trained_on_and_scored(said: dict[str, Any]) -> None:
    """`auto` finds it, for no format of the package fits its columns."""
    report = json.loads(said["check"])
    assert (report["format"], report["pairs"]) == ("good-and-bad", 24)
    assert [line["index"] for line in said["loss"]["lines"]] == list(range(24))


def test_a_judge_judges_an_evaluation(said: dict[str, Any], place: Path) -> None:
    """Held against the lengths of the very answers that it was shown."""
    code, err = said["eval"]
    assert code == 0, err
    rates = json.loads((place / "loss/run/evaluation/winrate.json").read_text())
    lines = (place / "loss/run/evaluation/comparisons.jsonl").read_text().splitlines()
    sides = [(len(line["base"]["text"]), len(line["tuned"]["text"])) for line in map(json.loads, lines)]
    wins = sum(1.0 if b < a else 0.5 if b == a else 0.0 for a, b in sides)
    assert "shorter" in json.dumps(rates)
    assert rates["temperatures"][0]["win_rate"] == pytest.approx(wins / len(sides))


def test_a_family_computes_as_its_plain_model(said: dict[str, Any], place: Path) -> None:
    """The reference's log-probs are those of its own forward, which scales the logits."""
    assert said["family"]["train"][0] == said["family"]["score"][0] == 0, said["family"]
    model = QuietForCausalLM.from_pretrained(place / "quiet", attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "quiet")
    for row, line in list(zip(tiny_rows(24), said["family"]["lines"], strict=True))[:4]:
        for side in ("chosen", "rejected"):
            plain = plain_logp(model, tokenizer, row["prompt"], row[side])
            assert line[f"reference_{side}_logp"] == pytest.approx(plain, rel=2e-4)


def plain_logp(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Of one answer, up to its end of turn, by the model's own forward."""
    chat = [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": answer}], return_dict=False)
    whole = whole[: len(whole) - whole[::-1].index(tokenizer.eos_token_id)]
    ids = torch.tensor([whole])
    with torch.no_grad():
        logps_TV = model(input_ids=ids, use_cache=False).logits[0, len(start) - 1 : -1].float().log_softmax(-1)
    return float(logps_TV.gather(1, ids[0, len(start) :, None]).sum())


if __name__ == "__main__":
    there = Path(sys.argv[1])
    (there / "said.json").write_text(json.dumps(use_all_doors(there)))
