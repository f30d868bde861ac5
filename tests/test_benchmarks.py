"""The benchmarks run, and measure what they say: true lengths, the same pairs for both sides, tables from their JSON.

`shapes`, `jobs`, ... are the modules of benchmarks/ (`pythonpath` in pyproject.toml).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import gptq
import growth
import plots
import vs_trl
from dpo_studio.frozen.linear import FrozenLinear
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.models.attention import PAIRS
from dpo_studio.tokens.pack import pack
from jobs import Job, Rival, check_system, measure, on_gptq
from meter import Meter
from ours import gptq_linear, unshared_pack
from shapes import MIXES, SHAPES, random_model, random_pairs, unique_tokens
from tests.pairs_of_ids import random_pairs as short_pairs
from tests.policies import policy_on
from tests.tiny_runs import write_pairs

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    ("mix", "medians"),
    [("ultrafeedback", (110, 270, 240)), ("summarisation", (900, 60, 60)), ("long-chats", (1500, 500, 450))],
)
def test_a_mix_has_the_medians_it_is_named_for(mix: str, medians: tuple[int, int, int]) -> None:
    rows = MIXES[mix].lengths(4000)
    assert [statistics.median(column) for column in zip(*rows, strict=True)] == pytest.approx(medians, rel=0.03)
    assert max(prompt + max(chosen, rejected) for prompt, chosen, rejected in rows) <= MIXES[mix].cap
    assert min(map(min, rows)) >= 8


def test_ultrafeedback_lengths_are_those_of_the_first_measurements() -> None:
    """The figures of 2026-11-22 in docs/performance.md stand on these draws of seed 0."""
    assert MIXES["ultrafeedback"].lengths(3) == [(92, 275, 391), (100, 676, 82), (142, 123, 231)]


def test_a_mistral_7b_has_its_weights() -> None:
    """32 x (4096 x 6144 + 4096 x 4096 + 4096 x 28672 + 14336 x 4096) = 6,979,321,856."""
    assert SHAPES["mistral-7b"].layer_parameters == 6_979_321_856


def test_unshared_rows_give_the_shared_rows_log_probs() -> None:
    """The same numbers from more tokens: what `ours-unshared` measures is the sharing alone."""
    pairs = short_pairs(5)
    policy = policy_on(attn_implementation=PAIRS)
    shared, unshared = pack(pairs), unshared_pack(pairs, range(5))
    assert unshared.tokens - shared.tokens == sum(len(pair.prompt) for pair in pairs)
    ours, theirs = pair_logps(policy, unshared), pair_logps(policy, shared)
    for name in ("chosen_P", "rejected_P", "chosen_tokens_P", "rejected_tokens_P"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)


def test_every_default_system_has_a_setting_and_a_wrong_name_is_refused() -> None:
    assert all(map(check_system, [*vs_trl.DEFAULT_SYSTEMS, *gptq.DEFAULT_SYSTEMS]))
    assert Rival.named("trl-b8-pre-group") == Rival(8, False, True, True, False)
    assert Rival.named("trl-gptq-b4-ckpt") == Rival(4, True, False, False, False, gptq=True)
    assert not any(map(on_gptq, vs_trl.DEFAULT_SYSTEMS))
    assert {name for name in gptq.DEFAULT_SYSTEMS if not on_gptq(name)} == {"ours-live", "ours-cached"}
    for wrong in ("trl", "trl-b", "trl-b4-fast", "trl-b4-", "ours", "trl-4", "trl-b4-gptq", "packed", "gptq-live"):
        with pytest.raises(ValueError, match="no such system"):
            check_system(wrong)


def test_a_gptq_base_has_the_shape_and_weights_like_a_fresh_model() -> None:
    """Two layers of seven packed ones, none like another, nothing dense among them. transformers' own weights have a
    standard deviation of 0.02; rounding to steps of 0.02 x 2.8 / 7 adds that squared over 12: 1 %."""
    model = random_model(SHAPES["tiny"], torch.device("cpu"), PAIRS, partial(gptq_linear, kind="packed"))
    linear = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    packed = [module for module in linear if isinstance(module, FrozenLinear)]
    assert len(packed) == len(linear) == 14
    assert len({layer.get_buffer("words_NW").sum().item() for layer in packed}) == 14
    weights = torch.cat([layer.dense_weight(torch.float32).flatten() for layer in packed])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(weights.mean().item()) < 2e-4
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    assert model.config.num_hidden_layers == 2


def test_a_resident_base_holds_the_packed_ones_weights() -> None:
    layers = []
    for kind in ("packed", "resident"):
        torch.manual_seed(1)
        layers.append(gptq_linear(torch.nn.Linear(256, 96, bias=False, dtype=torch.bfloat16), kind))
    packed, resident = layers
    assert isinstance(packed, FrozenLinear)
    assert type(resident) is torch.nn.Linear
    assert torch.equal(resident.weight, packed.dense_weight(torch.bfloat16))


def test_a_meter_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps end at 9, 10, 12 and 14 s after a beginning at 0; two are warm-up. 2 steps of 30 unique tokens in 4 s are
    15 a second; with a mean pair of 5 tokens, 3 pairs a second."""
    clock = iter([0.0, 9.0, 10.0, 12.0, 14.0])
    monkeypatch.setattr("time.time", lambda: next(clock))
    meter = Meter(torch.device("cpu"), seconds=4, deadline=1000)
    meter.begin()
    assert [meter.note(6, 30, 40) for _ in range(4)] == [False, False, False, True]
    result = meter.result(mean_unique=5, flops_a_token=1e12)
    assert result["pairs_per_second"] == 3
    assert result["tflops"] == 20
    assert result["step_seconds"] == [9, 1, 2, 2]


def test_a_meter_that_runs_late_ends_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 12 s another step of 2 s would end past the deadline of 13."""
    clock = iter([0.0, 9.0, 10.0, 12.0])
    monkeypatch.setattr("time.time", lambda: next(clock))
    meter = Meter(torch.device("cpu"), seconds=100, deadline=13)
    meter.begin()
    assert [meter.note(1, 1, 1) for _ in range(3)] == [False, False, True]


def test_a_rival_reads_both_sequences_of_a_pair_padded_to_the_longest() -> None:
    rivals = pytest.importorskip("rivals")
    pairs = random_pairs(MIXES["ultrafeedback"], 24, 512)
    longest = max(len(p.prompt) + max(len(p.chosen.ids), len(p.rejected.ids)) for p in pairs[:4])
    assert rivals.padded_tokens(pairs[:4]) == 8 * longest
    grouped = rivals.batches_of(pairs, Rival.named("trl-b4-group"))
    assert sorted(pair.row for batch in grouped for pair in batch) == list(range(24))
    plain = rivals.batches_of(pairs, Rival.named("trl-b4"))
    assert sum(map(rivals.padded_tokens, grouped)) < sum(map(rivals.padded_tokens, plain))


def test_the_benchmark_runs_end_to_end(tmp_path: Path) -> None:
    """Both sides begin at ln 2 = 0.6931, and the last line is ours over theirs."""
    record = _run(tmp_path / "a.json", "--systems", "ours-live,trl-b2")
    ours, theirs = record["systems"]
    assert [(result["system"], result["status"]) for result in (ours, theirs)] == [
        ("ours-live", "ok"),
        ("trl-b2", "ok"),
    ]
    assert [result["first_loss"] for result in (ours, theirs)] == pytest.approx([0.6931, 0.6931], abs=1e-3)
    assert record["card"]["tflops"] > 0
    assert record["ratio"] == pytest.approx(ours["pairs_per_second"] / theirs["pairs_per_second"])
    assert plots.table(record).count("\n") == 3


@pytest.mark.slow
def test_a_gptq_base_is_measured_end_to_end(tmp_path: Path) -> None:
    """Every kind of base begins at ln 2; what a CPU cannot do says why; the last lines are the ratios."""
    systems = "ours-live,packed-live,packed-cached,fp8-live"
    record, said = _gptq(tmp_path / "a.json", systems)
    *done, failed = record["systems"]
    assert [result["status"] for result in done] == ["ok"] * 3
    assert [result["first_loss"] for result in done] == pytest.approx([0.6931] * 3, abs=1e-3)
    assert (
        failed["reason"]
        == "RuntimeError: FP8: needs an NVIDIA GPU of the Hopper generation or later (at: making the model)"
    )
    rates = {result["system"]: result["pairs_per_second"] for result in done}
    ratio = rates["packed-live"] / rates["ours-live"]
    assert record["ratios"] == pytest.approx({"packed over bf16, live": ratio})
    assert said[-1] == f"ratio={ratio:.3f} packed over bf16, live"
    assert re.fullmatch(r"gib=-?\d\.\d\d saved by packed, live", said[-2])
    assert "| DPO Studio | GPTQ base, reference in the step |" in plots.table(record)


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("gptqmodel") and find_spec("optimum")), reason="needs gptqmodel and optimum")
def test_gptqmodel_is_measured_end_to_end(tmp_path: Path) -> None:
    """TRL on gptqmodel's layers begins at ln 2 as well. Its layers compile their own dequantising: half a minute."""
    record, _ = _gptq(tmp_path / "a.json", "packed-live,trl-gptq-b2")
    ours, theirs = record["systems"]
    assert [result["first_loss"] for result in (ours, theirs)] == pytest.approx([0.6931, 0.6931], abs=1e-3)
    ratio = ours["pairs_per_second"] / theirs["pairs_per_second"]
    assert record["ratios"] == pytest.approx({"packed over gptqmodel, PEFT and TRL, live": ratio})


_CARD = Job("card", "cpu", "tiny", "ultrafeedback", pairs=1, pairs_per_step=1, tokens_per_micro_batch=64, seconds=0.1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": "no such"}, r"KeyError: 'no such' \(at: products\)"),
        ({"limit": 0.2}, "stopped after 0 s, at: (starting|importing)"),
    ],
)
def test_a_system_that_fails_or_never_ends_says_why(change: dict[str, Any], reason: str) -> None:
    result = measure(replace(_CARD, **change))
    assert result["status"] == "failed"
    assert re.fullmatch(reason, result["reason"])
    assert vs_trl.line(result) == f"{'card':18} {result['reason']}"


def test_whole_epochs_of_a_model_folder_alternate(tiny_base: Path, tmp_path: Path) -> None:
    """The mode for a CPU: two rounds each of TRL and ours on the same four pairs."""
    source = write_pairs(tmp_path / "pairs.jsonl", 12)
    arguments = ["--model", str(tiny_base), "--source", str(source), "--pairs", "4", "--rounds", "2"]
    record = _vs_trl(tmp_path / "a.json", *arguments)
    assert {name: len(seconds) for name, seconds in record["seconds"].items()} == {"trl": 2, "ours": 2}
    assert (record["kind"], record["pairs"]) == ("epochs", 4)
    assert record["dtype"] in ("float32", "bfloat16")


@pytest.mark.parametrize("chosen", [torch.float32, torch.bfloat16])
def test_whole_epochs_are_in_the_precision_that_auto_chooses_on_both_sides(
    chosen: torch.dtype,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import epochs

    asked: list[str] = []

    def side(*arguments: Any) -> float:
        asked.append(arguments[-1])
        return 1.0

    monkeypatch.setattr(epochs, "_quieten", lambda: None)
    monkeypatch.setattr(epochs, "choose_dtype", lambda wanted, device: (chosen, "it is quicker here"))
    monkeypatch.setattr(epochs, "trl_seconds", side)
    monkeypatch.setattr(epochs, "our_seconds", side)
    source = write_pairs(tmp_path / "pairs.jsonl", 12)
    options = argparse.Namespace(model=str(tiny_base), source=str(source), pairs=4, rounds=1, max_length=512)
    _, record = epochs.alternate(options)
    precision = str(chosen).removeprefix("torch.")
    assert asked == [precision] * 4
    assert record["dtype"] == precision
    assert epochs._load(str(tiny_base), precision).model.dtype == chosen
    assert f"both sides in {precision}: it is quicker here" in capsys.readouterr().out


def _run(file: Path, *arguments: str) -> dict[str, Any]:
    """`vs_trl.py` on the tiny shape; its JSON."""
    size = ["--pairs", "16", "--pairs-per-step", "4", "--tokens-per-micro-batch", "2048", "--seconds", "0.2"]
    return _vs_trl(file, "--shape", "tiny", *size, *arguments)


def _gptq(file: Path, systems: str) -> tuple[dict[str, Any], list[str]]:
    """`gptq.py` on the tiny shape; its JSON and what it said."""
    size = ["--shape", "tiny", "--pairs", "8", "--pairs-per-step", "4", "--tokens-per-micro-batch", "2048"]
    command = [sys.executable, str(BENCHMARKS / "gptq.py"), "--device", "cpu", "--json", str(file), *size]
    command += ["--seconds", "0.1", "--systems", systems]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    record: dict[str, Any] = json.loads(file.read_text())
    return record, done.stdout.splitlines()


def _vs_trl(file: Path, *arguments: str) -> dict[str, Any]:
    """`vs_trl.py` as a process; its JSON."""
    command = [sys.executable, str(BENCHMARKS / "vs_trl.py"), "--device", "cpu", "--json", str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"ratio=\d+\.\d\d", done.stdout.splitlines()[-1])
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def _result(system: str, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "system": system,
        "setting": check_system(system),
        "status": "ok",
        "pairs_per_second": rate,
        "unique_tokens_per_second": 1000 * rate,
        "tflops": 300.0,
        "share_of_card": 0.5,
        "peak_gib": 20.0,
        "first_step_seconds": 9.0,
        "import_seconds": 5.0,
        "device_name": "Card",
        **more,
    }


_MADE: dict[str, Any] = {
    "kind": "steady",
    "shape": "mistral-7b",
    "mix": "ultrafeedback",
    "date": "2026-01-01",
    "versions": {"trl": "1"},
    "card": {"tflops": 600.0},
    "systems": [
        _result("trl-b4", 4.0),
        _result("trl-b4-pre", 6.0),
        _result("ours-live", 12.0),
        _result("ours-cached", 15.0, pairs_per_second_with_reference=11.0),
        _result("ours-unshared", 8.0),
        {"system": "trl-b8", "setting": "batch 8", "status": "failed", "reason": "OutOfMemoryError: a | b"},
    ],
}


def test_like_is_compared_with_like() -> None:
    """Reference counted: ours 12 (cached with its pass 11) over TRL's 4. Left out: 15 over 6. Sharing: 12 over 8."""
    found = vs_trl.ratios(_MADE["systems"])
    assert found == {"reference counted": 3, "reference left out": 2.5, "prompt shared, over unshared": 1.5}
    assert vs_trl.headline(found, against_trl=True) == 3
    assert vs_trl.headline(found, against_trl=False) == 1.5
    assert vs_trl.headline(vs_trl.ratios(_MADE["systems"][2:5]), against_trl=True) is None


def test_bases_are_compared_with_the_reference_counted_alike() -> None:
    """Live: packed 14.7 over bf16's 15 = 0.98, fp8 17.64 over 15 = 1.176 and over packed 1.2; gptqmodel's best setting
    is 4.9, so 3 and 3.6. Cached: 22 over 20. What failed is left out. 45 - 35 GiB are saved."""
    results = [
        _result("ours-live", 15.0, peak_gib=45.0),
        _result("packed-live", 14.7, peak_gib=35.0),
        _result("fp8-live", 17.64, peak_gib=35.5),
        _result("trl-gptq-b4-group", 4.9, peak_gib=90.0),
        _result("trl-gptq-b4-ckpt-group", 4.0, peak_gib=15.0),
        _result("ours-cached", 20.0, peak_gib=45.0, pairs_per_second_with_reference=14.0),
        _result("packed-cached", 22.0, peak_gib=36.0),
        {"system": "fp8-cached", "setting": "", "status": "failed", "reason": "stopped"},
    ]
    assert gptq.ratios(results) == pytest.approx(
        {
            "packed over bf16, live": 0.98,
            "fp8 over bf16, live": 1.176,
            "fp8 over packed, live": 1.2,
            "packed over bf16, cached": 1.1,
            "packed over gptqmodel, PEFT and TRL, live": 3.0,
            "fp8 over gptqmodel, PEFT and TRL, live": 3.6,
        }
    )
    assert gptq.saved(results) == {"packed, live": 10.0, "fp8, live": 9.5, "packed, cached": 9.0}
    assert vs_trl.ratios(results) == {}


def test_the_tables_and_the_figure_say_what_the_json_says(tmp_path: Path) -> None:
    lines = plots.table(_MADE).splitlines()
    assert [line.split(" | ")[2] for line in lines[2:7]] == [
        "15.00 (11.00 with its pass)",
        "12.00",
        "8.00",
        "6.00",
        "4.00",
    ]
    assert lines[-1].startswith("| TRL | batch 8 | failed: OutOfMemoryError: a / b |")
    assert {line.count(" |") for line in lines} == {8}
    assert "Card; its products alone 600 TFLOP/s" in plots.caption(_MADE)
    plots.draw([_MADE, _MADE | {"mix": "summarisation"}], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_growth_compares_with_its_base() -> None:
    """64 pairs at 8 a second are 8 s; 128 at 10 are 12.8 s: 1.6 times. 3 GiB of which 1 imports, then 5: twice."""
    result = {"status": "ok", "device_name": "CPU", "pairs_per_second_with_reference": 8.0, "peak_gib": 3.0}
    base = growth.compared("base", 64, result | {"imported_gib": 1.0}, None)
    more = {"pairs_per_second_with_reference": 10.0, "peak_gib": 5.0, "imported_gib": 1.0}
    row = growth.compared("2x pairs", 128, result | more, base)
    assert (row["time_ratio"], row["memory_ratio"]) == pytest.approx((1.6, 2.0))
    failed = growth.compared("2x length", 64, {"status": "failed", "reason": "stopped"}, base)
    drawn = plots.growth_table({"rows": [base, row, failed]}).splitlines()
    assert drawn[3] == "| 2x pairs | 12.8 | 1.60 | 4.00 | 2.00 |"
    assert drawn[4] == "| 2x length | failed: stopped |  |  |  |"


def test_lengths_and_ids_reach_the_pairs() -> None:
    pairs = random_pairs(MIXES["ultrafeedback"], 3, 512)
    assert unique_tokens(pairs[0]) == 92 + 275 + 391
    assert min(pair.prompt.min() for pair in pairs) >= 10
    assert max(pair.prompt.max() for pair in pairs) < 512
