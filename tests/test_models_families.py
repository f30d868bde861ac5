"""A family of models is added from one file, and its numbers are right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, StableLmConfig

from dpo_studio.models.families import FAMILIES, Family, add_family, family_of, is_gated
from tests.test_doors import QuietConfig, QuietForCausalLM, plain_logp, quiet_folder
from tests.tiny_runs import dpo, tiny_rows, write_recipe


def test_a_family_of_ones_own_trains_and_scores_as_its_plain_model(tmp_path: Path) -> None:
    """Unknown, its key is refused by name; one entry later its log-probs are those of its own forward."""
    AutoConfig.register("quiet_llama", QuietConfig)
    AutoModelForCausalLM.register(QuietConfig, QuietForCausalLM)
    base, rows = quiet_folder(tmp_path / "base"), tiny_rows(24)
    recipe = write_recipe(tmp_path / "r.yaml", base, rows=rows)
    said = dpo("train", recipe, "--dry-run")
    assert said.code == 1 and "quiet_llama has quiet_logit_scale: 0.25 in its config" in said.err
    add_family(Family("quiet_llama", logits_multiplied_by="quiet_logit_scale"))
    assert family_of(QuietConfig()).logits_multiplied_by == "quiet_logit_scale"
    said = dpo("train", recipe)
    assert said.code == 0, said.err
    said = dpo("score", tmp_path / "run", tmp_path / "pairs.jsonl", "--dtype", "float32")
    assert said.code == 0, said.err
    model = QuietForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for row, line in list(zip(rows, said.lines, strict=True))[:6]:
        for side in ("chosen", "rejected"):
            plain = plain_logp(model, tokenizer, row["prompt"], row[side])
            assert line[f"reference_{side}_logp"] == pytest.approx(plain, rel=2e-4)
    assert any(line["chosen_logp"] != line["reference_chosen_logp"] for line in said.lines)
    with pytest.raises(ValueError, match=r"quiet_llama.* has a family already"):
        add_family(Family("quiet_llama"))


def test_a_family_is_added_once_and_with_a_layout_that_is_built() -> None:
    with pytest.raises(ValueError, match="'llama' has a family already"):
        add_family(Family("llama"))
    with pytest.raises(ValueError, match="layout 'columns' is not one of packed, rows, apart"):
        add_family(Family("columns_of_mine", layout="columns"))  # type: ignore[arg-type]


def test_each_family_has_one_entry_and_no_entry_is_a_plain_decoder() -> None:
    kinds = [family.model_type for family in FAMILIES]
    assert len(kinds) == len(set(kinds))
    assert all(family != Family(family.model_type) for family in FAMILIES)
    assert family_of(StableLmConfig()) == Family("stablelm")


def test_gated_mlps_are_classes_that_compute_what_the_entry_says() -> None:
    """Each named class is found in transformers and is down(act(gate(x)) * up(x)), computed here by hand."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3TextConfig
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.mistral.modeling_mistral import MistralConfig, MistralMLP
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2MLP
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3MLP

    pairs = (
        (LlamaConfig, LlamaMLP),
        (MistralConfig, MistralMLP),
        (Qwen2Config, Qwen2MLP),
        (Qwen3Config, Qwen3MLP),
        (Gemma3TextConfig, Gemma3MLP),
    )
    assert {mlp.__name__ for _, mlp in pairs} == {family.gated_mlp for family in FAMILIES} - {None}
    for config, kind in pairs:
        assert is_gated(kind)
        mlp, x = kind(config(hidden_size=64, intermediate_size=16, num_attention_heads=4)), torch.randn(3, 64)
        torch.testing.assert_close(mlp(x), mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))
    assert not is_gated(torch.nn.Linear)
