"""examples/loop.py is what it says: DPO, and an adapter that plain PEFT loads."""

from __future__ import annotations

import ast
import importlib.util
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_studio.config import AdapterSection, ModelSection, TrainingSection, as_source
from dpo_studio.models.load import load_chat_model
from dpo_studio.objectives import DPO
from dpo_studio.policy.policy import Policy
from dpo_studio.preferences.sources import read_pairs
from dpo_studio.tokens.encode import encode_pairs
from tests.policies import take_steps
from tests.tiny_runs import tiny_rows, write_rows

LOOP = Path(__file__).parents[1] / "examples" / "loop.py"


@pytest.fixture(scope="module")
def loop() -> Any:
    spec = importlib.util.spec_from_file_location("loop", LOOP)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_is_the_products_and_saves_what_plain_peft_loads(
    loop: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 pairs in steps of 4: ln 2 first, then the losses of `train` with the same settings; and A and B in the file
    are the trained ones."""
    for name, value in {"PAIRS_PER_STEP": 4, "LEARNING_RATE": 1e-2}.items():
        monkeypatch.setattr(loop, name, value)
    write_rows(file := tmp_path / "pairs.jsonl", tiny_rows(24))
    losses = loop.main(str(tiny_base), str(file), str(tmp_path / "adapter"))
    assert len(losses) == 6
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)

    base = load_chat_model(ModelSection(path=str(tiny_base), dtype="float32"))
    pairs = encode_pairs(read_pairs(as_source(str(file))).pairs, base.encoder, max_length=1024).pairs
    policy = Policy.fresh(base.model, AdapterSection(rank=16, alpha=32), seed=0)
    section = TrainingSection(pairs_per_step=4, learning_rate=1e-2, schedule="constant", warmup=0)
    reports = list(take_steps(policy.model, pairs, section, DPO(), steps=6, budget=2048))
    assert losses == pytest.approx([report.metrics["loss"] for report in reports], abs=1e-6)

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    loaded = {name.replace(".default.weight", ".weight"): p for name, p in plain.named_parameters() if ".lora_" in name}
    assert saved.keys() == loaded.keys()
    for name, tensor in policy.state().items():
        assert torch.equal(loaded[name], saved[name])
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-3)  # of steps of 1e-2


def test_the_loop_and_the_doors_use_public_names_only() -> None:
    """Each name that they import is in its module's `__all__`."""
    for file in (LOOP, Path(__file__).with_name("test_doors.py")):
        found = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        ours = [
            node for node in found if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpo_studio")
        ]
        assert not [name.name for node in found if node not in ours for name in node.names if "dpo_studio" in name.name]
        private = [
            f"{node.module}.{name.name}"
            for node in ours
            for name in node.names
            if name.name not in import_module(str(node.module)).__all__
        ]
        assert private == []
        assert len(ours) > 4
