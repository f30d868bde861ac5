from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_studio.learning import batched_logps as batched
from dpo_studio.workflows import scoring
from tests.tiny_runs import Said, dpo, tiny_rows, write_rows

NUMBERS = ["chosen_logp", "rejected_logp", "reference_chosen_logp", "reference_rejected_logp"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", tiny_rows(12, seed=5))


@pytest.fixture(scope="module")
def run_scored(tiny_run: Path, pairs: Path) -> Said:
    return dpo("score", tiny_run, pairs, "--dtype", "float32", "--json")


def textbook(model: Any, folder: Path, pairs: Path) -> list[list[float]]:
    """Chosen and rejected log-probs of every row: one sequence at a time, the template's own ids, in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    return [[_textbook(model, tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in rows]


@torch.no_grad()
def _textbook(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    asked = [{"role": "user", "content": prompt}]
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], tokenize=False)
    start = len(tokenizer(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)).input_ids)
    ids = torch.tensor([tokenizer(whole.removesuffix("\n")).input_ids])  # the newline after the end of turn is dropped
    logps = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return float(sum(logps[place - 1, ids[0, place]] for place in range(start, ids.shape[1])))


# The numbers


def test_the_log_probs_of_a_base_are_the_textbooks(tiny_base: Path, pairs: Path) -> None:
    """One by one through the plain model, within 1e-3; a base is its own reference."""
    said = dpo("score", tiny_base, pairs, "--dtype", "float32")
    expected = textbook(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), tiny_base, pairs)
    for line, (chosen, rejected) in zip(said.lines, expected, strict=True):
        assert line["chosen_logp"] == pytest.approx(chosen, abs=1e-3)
        assert line["rejected_logp"] == pytest.approx(rejected, abs=1e-3)
        assert (line["reference_chosen_logp"], line["margin"]) == (line["chosen_logp"], 0)


def test_the_log_probs_of_a_run_are_plain_pefts(tiny_run: Path, tiny_base: Path, pairs: Path, run_scored: Said) -> None:
    """Policy: the saved adapter through PEFT's own loader. Reference: the base alone."""
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    reference = textbook(base, tiny_base, pairs)
    policy = textbook(PeftModel.from_pretrained(base, tiny_run / "adapter"), tiny_base, pairs)
    assert policy != reference
    for line, ours, theirs in zip(run_scored.lines, policy, reference, strict=True):
        assert [line[name] for name in NUMBERS] == pytest.approx([*ours, *theirs], abs=1e-3)


def test_the_margin_is_beta_times_the_difference_of_the_log_ratios(run_scored: Said) -> None:
    """beta 0.5 is the run's own; a margin in fp32 sums of some 100 nats is good to 1e-4."""
    for line in run_scored.lines:
        chosen, rejected, reference_chosen, reference_rejected = (line[name] for name in NUMBERS)
        expected = 0.5 * ((chosen - reference_chosen) - (rejected - reference_rejected))
        assert line["margin"] == pytest.approx(expected, abs=1e-4)


def test_beta_is_the_flags_else_the_runs_else_a_tenth(
    tiny_run: Path, tiny_base: Path, pairs: Path, run_scored: Said
) -> None:
    flagged = dpo("score", tiny_run, pairs, "--dtype", "float32", "--beta", "1", "--json")
    assert summary(run_scored)["beta"] == 0.5
    assert summary(flagged)["beta"] == 1
    assert [line["margin"] for line in flagged.lines] == pytest.approx(
        [2 * line["margin"] for line in run_scored.lines]
    )
    assert summary(dpo("score", tiny_base, pairs, "--json"))["beta"] == 0.1


# The lines


def test_a_line_holds_what_the_contract_lists(tiny_base: Path, tmp_path: Path) -> None:
    """Rows in order, from 0, blank lines not counted; a refused one is its index and its reason."""
    one, two, *_ = tiny_rows(2)
    broken = {"prompt": "a?", "chosen": "same", "rejected": "same"}
    said = dpo("score", tiny_base, write_rows(tmp_path / "x.jsonl", [one, "", broken, two, {"prompt": "b?"}]))
    assert said.code == 0
    keys = ["index", *NUMBERS, "margin", "chosen_tokens", "rejected_tokens"]
    assert [sorted(line) for line in said.lines] == [
        sorted(keys),
        ["index", "refused"],
        sorted(keys),
        ["index", "refused"],
    ]
    assert [line["index"] for line in said.lines] == [0, 1, 2, 3]
    assert said.lines[1]["refused"] == "chosen and rejected are identical"
    assert all(isinstance(line["chosen_tokens"], int) for line in said.lines if "refused" not in line)


def test_there_is_no_length_limit_unless_one_is_given(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "water " * 100, "chosen": "yes", "rejected": "no"}, *tiny_rows(1)]
    file = write_rows(tmp_path / "x.jsonl", rows)
    assert not any("refused" in line for line in dpo("score", tiny_base, file).lines)
    first, second = dpo("score", tiny_base, file, "--max-length", 128).lines
    assert "max_length is 128" in first["refused"] and "margin" in second
    cut = dpo("score", tiny_base, file, "--max-length", 40, "--too-long", "cut_answer_end").lines
    assert cut[1]["chosen_tokens"] <= 40


def test_what_is_not_finite_is_null_and_counted(tiny_base: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no NaN. The summary is over the other pairs."""
    whole = batched.logps_over_ranks

    def broken(*arguments: Any, **more: Any) -> Any:
        logps = whole(*arguments, **more)
        logps.chosen_P[0], logps.rejected_P[1] = float("nan"), float("-inf")
        return logps

    monkeypatch.setattr(scoring, "logps_over_ranks", broken)
    said = dpo("score", tiny_base, pairs, "--json")
    first, second, *_ = said.lines
    assert (first["chosen_logp"], first["margin"], second["rejected_logp"]) == (None, None, None)
    assert first["rejected_logp"] is not None
    assert (summary(said)["pairs"], summary(said)["not_finite"]) == (12, 2)


# The summary


def summary(said: Said) -> dict[str, Any]:
    """The last line on stderr, under --json."""
    read: dict[str, Any] = json.loads(said.err.splitlines()[-1])
    return read


def test_the_summary_counts_what_the_lines_say(run_scored: Said) -> None:
    read = summary(run_scored)
    lines = run_scored.lines
    assert read["accuracy"] == sum((line["margin"] > 0) + 0.5 * (line["margin"] == 0) for line in lines) / len(lines)
    assert read["margin"] == pytest.approx(sum(line["margin"] for line in lines) / len(lines))
    longer = [
        (line["chosen_tokens"] > line["rejected_tokens"]) + 0.5 * (line["chosen_tokens"] == line["rejected_tokens"])
        for line in lines
    ]
    assert read["longer_wins"] == pytest.approx(sum(longer) / len(lines))
    assert read.keys() >= {"accuracy_before", "accuracy_before_per_token", "accuracy_ci95", "refused", "dtype"}


def test_without_json_the_summary_is_a_line_a_number(tiny_base: Path, pairs: Path) -> None:
    said = dpo("score", tiny_base, pairs)
    assert "pairs: 12" in said.err.splitlines()
    assert "accuracy: 50 %" in said.err.splitlines()


# Where from, where to


def test_an_adapter_folder_a_checkpoint_and_a_moved_run_score_as_the_run_does(
    tiny_run: Path, pairs: Path, run_scored: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copytree(tiny_run, tmp_path / "moved")
    unfinished = shutil.copytree(tiny_run, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    monkeypatch.chdir(tmp_path)
    for name in ("moved", "unfinished", moved / "adapter", moved / "checkpoints" / "step-4" / "adapter"):
        said = dpo("score", name, pairs, "--dtype", "float32", "--beta", "0.5")
        assert said.lines == run_scored.lines, name


def test_an_adapter_far_from_any_run_finds_its_base_by_name(
    tiny_run: Path, tiny_base: Path, pairs: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(tiny_run / "adapter", tmp_path / "adapter")
    assert dpo("score", adapter, pairs).code == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "names no base model" in dpo("score", adapter, pairs).err


def test_out_appears_whole_and_leaves_stdout_alone(tiny_base: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    out.write_text("older")
    said = dpo("score", tiny_base, pairs, "--out", out, "--overwrite")
    assert (said.code, said.out, len(out.read_text().splitlines())) == (0, "", 12)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]


def test_a_failure_leaves_the_older_file_as_it_was(tiny_base: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    out.write_text("older")
    assert dpo("score", tiny_base, tmp_path / "no.jsonl", "--out", out, "--overwrite").code == 1
    assert out.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]


def test_out_must_be_a_file_in_a_folder_that_is_there(tiny_base: Path, pairs: Path, tmp_path: Path) -> None:
    """Told before the model is loaded."""
    before = pairs.read_bytes()
    for out in (tmp_path, "/dev/zero", tmp_path / "no" / "x.jsonl", "/", pairs):
        said = dpo("score", tiny_base, pairs, "--out", out)
        assert (said.code, said.out) == (2, "")
        assert str(out) in said.err
    assert pairs.read_bytes() == before


def test_a_run_with_another_model_as_reference_says_how_to_score(tiny_run: Path, pairs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("model: null", "model: other/model"))
    said = dpo("score", run, pairs)
    assert said.code == 1
    assert "other/model" in said.err and "hint:" in said.err


def test_a_run_that_has_nothing_yet_says_how_to_go_on(tiny_run: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(tiny_run / "recipe.yaml", tmp_path / "run")
    said = dpo("score", tmp_path / "run", pairs)
    assert said.code == 1
    assert "no adapter and no checkpoint" in said.err
