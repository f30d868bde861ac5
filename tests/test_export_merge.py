"""Merging: W + scale B A against PEFT's own merge, and a rounding that loses nothing on average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_studio.errors import ModelError
from dpo_studio.export.merge import Delta, adapter_deltas, merge, rounded, save_plain
from dpo_studio.frozen.gptq import Packed
from dpo_studio.frozen.linear import FrozenLinear
from tests.policies import plain_peft_on, policy_on
from tests.tiny_models import tiny_folder, tiny_model

ULP = 2.0**-7
"""Most that one step of bf16 is of the number it starts from."""


def test_merged_weights_are_pefts_to_one_step_of_bf16() -> None:
    """The oracle: PEFT's `merge_and_unload` in fp32 of the same adapter on the same base."""
    expected = plain_peft_on("llama").merge_and_unload().state_dict()
    model: Any = tiny_model("llama")
    deltas = adapter_deltas(policy_on("llama"))
    assert len(deltas) == 4 * 7
    merge(model, deltas)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert ((found[name].float() - exact).abs() <= ULP * exact.abs() + 1e-30).all(), name


def test_in_fp32_nothing_is_rounded() -> None:
    expected = plain_peft_on("llama").merge_and_unload().state_dict()
    model: Any = tiny_model("llama")
    merge(model, adapter_deltas(policy_on("llama")), torch.float32)
    for name, exact in expected.items():
        torch.testing.assert_close(model.state_dict()[name], exact, rtol=1e-6, atol=1e-6)


def test_rounding_goes_to_a_neighbour_and_is_right_on_average() -> None:
    """1 and its neighbour 1 + 2^-7: a quarter of the way up, a quarter of a million draws land above; nearest: none.

    The mean of a million draws of a share p = 1/4 is within 5 sqrt(p (1 - p) / 10^6) = 0.0022 of it.
    """
    step = 2.0**-7
    found = rounded(torch.full((1000, 1000), 1 + step / 4), torch.bfloat16, seed=0).float()
    assert set(found.flatten().tolist()) == {1.0, 1 + step}
    assert (found > 1).double().mean().item() == pytest.approx(0.25, abs=0.0022)
    assert torch.equal(torch.tensor(1 + step / 4).to(torch.bfloat16), torch.tensor(1.0).to(torch.bfloat16))


def test_numbers_of_bf16_stay_and_the_same_seed_draws_the_same() -> None:
    draw = torch.Generator().manual_seed(0)
    exact = torch.randn(64, 64, generator=draw)
    on_grid = exact.to(torch.bfloat16)
    assert torch.equal(rounded(on_grid.float(), torch.bfloat16, seed=1), on_grid)
    assert torch.equal(rounded(exact, torch.bfloat16, seed=1), rounded(exact, torch.bfloat16, seed=1))
    assert not torch.equal(rounded(exact, torch.bfloat16, seed=1), rounded(exact, torch.bfloat16, seed=2))
    negative = rounded(-exact.abs(), torch.bfloat16, seed=1).float()
    assert ((negative + exact.abs()).abs() <= ULP * exact.abs()).all()


def test_an_adapter_too_small_for_the_nearest_step_survives_in_products() -> None:
    """Every weight moves by a tenth of a step: rounded to the nearest all of it is gone, drawn it is there on average.

    256 rows of 4096 ones against weights 1 + step / 10: each sum has standard deviation step x 19.2 about the mean
    step x 409.6, and the mean of 256 of them step x 1.2.
    """
    step = 2.0**-7
    model: Any = torch.nn.Module()
    model.layer = torch.nn.Linear(4096, 256, bias=False)
    model.layer.weight.data.fill_(1.0)
    down, up = torch.full((1, 4096), step / 10), torch.ones(256, 1)
    merge(model, {"layer": Delta(down, up, 1.0)})
    sums = (model.layer.weight.double() - 1).sum(1) / step
    assert sums.mean().item() == pytest.approx(409.6, abs=6)


def test_packed_layers_become_the_dense_ones_they_stand_for() -> None:
    """A GPTQ layer with a delta and one without: fp32 scale x integer, plus what the adapter adds, rounded once."""
    model: Any = torch.nn.Module()
    model.first, model.second = (_packed(seed) for seed in (0, 1))
    exact = {name: getattr(model, name).dense_weight(torch.float32) for name in ("first", "second")}
    draw = torch.Generator().manual_seed(2)
    delta = Delta(torch.randn(2, 64, generator=draw) / 10, torch.randn(32, 2, generator=draw) / 10, 2.0)
    merge(model, {"first": delta})
    assert type(model.first) is type(model.second) is torch.nn.Linear
    assert torch.equal(model.second.weight, exact["second"].to(torch.bfloat16))
    wanted = exact["first"] + 2.0 * delta.up_Nr @ delta.down_rK
    assert ((model.first.weight.float() - wanted).abs() <= ULP * wanted.abs() + 1e-7).all()


def _packed(seed: int) -> FrozenLinear:
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31 - 1, (32, 8), generator=draw).to(torch.int32)
    scales = torch.rand(32, 2, generator=draw).half() / 10
    return FrozenLinear(Packed(words, scales, torch.full((32, 2), 8).byte(), None, bits=4, group_size=32))


def test_a_delta_for_a_layer_that_is_not_there_or_not_finite_is_refused() -> None:
    model: Any = tiny_model("llama")
    with pytest.raises(ModelError, match="nosuch"):
        merge(model, {"nosuch": Delta(torch.ones(1, 1), torch.ones(1, 1), 1.0)})
    name, delta = next(iter(adapter_deltas(policy_on("llama")).items()))
    assert isinstance(delta, Delta)
    with pytest.raises(ModelError, match="not finite"):
        merge(model, {name: Delta(delta.down_rK * float("inf"), delta.up_Nr, 1.0)})


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen2"])
def test_the_saved_folder_is_one_that_plain_transformers_loads(architecture: str, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", architecture)
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    (tmp_path / "out").mkdir()
    merge(model, adapter_deltas(policy_on(architecture)))
    save_plain(model, tmp_path / "out", source=source, template=None)
    back, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert back.dtype == torch.bfloat16
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    tied = architecture == "llama-tied"
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not tied
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_a_recipes_own_template_takes_the_tokenizers_place(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source")
    (tmp_path / "out").mkdir()
    save_plain(tiny_model("llama"), tmp_path / "out", source=source, template="{{ messages[0].content }}!")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"
