"""`model.compute: fp8` on a dense base, on a CPU: the arithmetic against plain torch, a run from training to export.

The kernels and a GPU's products: tests/test_gpu.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_studio.config import ModelSection
from dpo_studio.errors import ModelError
from dpo_studio.frozen.linear import FrozenLinear
from dpo_studio.frozen.products import adapter_disabled, products
from dpo_studio.frozen.row_scaled import RowScaled, row_scaled
from dpo_studio.models.load import load_chat_model
from tests.tiny_models import tiny_folder
from tests.tiny_runs import dpo, write_recipe


def by_hand(x_MK: torch.Tensor) -> torch.Tensor:
    """Each row to the nearest multiple that e4m3 has, its largest value at 448, and back: four significant bits from
    2^-6 on, steps of 2^-9 below."""
    scales_M1 = x_MK.abs().amax(1, keepdim=True) / 448
    scaled = (x_MK / scales_M1).double()
    exponent = torch.floor(torch.log2(scaled.abs().clamp_min(2.0**-6)))
    step = torch.exp2(exponent - 3)
    return (torch.round(scaled / step) * step * scales_M1.double()).float()


def test_rows_are_rounded_as_by_hand() -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 40)[:, None]
    x8, scales = row_scaled(x)
    assert torch.allclose(x8.float() * scales[:, None], by_hand(x), rtol=1e-6)
    assert row_scaled(torch.zeros(2, 16))[0].float().abs().sum() == 0


def test_products_and_gradients_are_those_of_rounded_operands() -> None:
    """y and dL/dA, dL/dB, dL/dx by plain fp64 products of what was rounded by hand."""
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(n, 48, generator=draw) * 0.1 for n in (32, 64)]
    x = torch.randn(5, 48, generator=draw, requires_grad=True)
    down = torch.randn(7, 48, generator=draw, requires_grad=True)
    ups = [torch.randn(n, r, generator=draw, requires_grad=True) for n, r in ((32, 3), (64, 4))]
    slopes = [torch.randn(5, n, generator=draw) for n in (32, 64)]
    found = products(x, [RowScaled.of(weight) for weight in weights], down, ups)
    sum((y * g).sum() for y, g in zip(found, slopes, strict=True)).backward()  # type: ignore[union-attr]

    low = (x @ down.t()).detach().double()
    slope = torch.zeros(5, 7).double()
    expected_x = torch.zeros(5, 48).double()
    for y, weight, up, g, at in zip(found, weights, ups, slopes, (slice(0, 3), slice(3, 7)), strict=True):
        expected = by_hand(x.detach()).double() @ by_hand(weight).double().t() + low[:, at] @ up.detach().double().t()
        assert (y.double() - expected).norm() / expected.norm() < 4e-3  # bf16's own rounding of y
        assert up.grad is not None
        assert torch.allclose(up.grad.double(), g.double().t() @ low[:, at], rtol=1e-4, atol=1e-4)
        slope[:, at] = g.double() @ up.detach().double()
        expected_x += by_hand(g).double() @ by_hand(weight.t().contiguous()).double().t()
    expected_x += slope @ down.detach().double()
    assert x.grad is not None
    assert (x.grad.double() - expected_x).norm() / expected_x.norm() < 4e-3
    assert down.grad is not None
    assert torch.allclose(down.grad.double(), slope.t() @ x.detach().double(), rtol=1e-3, atol=1e-3)
    with adapter_disabled():
        disabled = products(x, [RowScaled.of(weight) for weight in weights], down, ups)
    zeros = products(x, [RowScaled.of(weight) for weight in weights], down, [torch.zeros_like(up) for up in ups])
    assert all(torch.equal(a, b) for a, b in zip(disabled, zeros, strict=True))


@pytest.mark.parametrize("outlier", [1.0, 1000.0])
def test_an_outlier_takes_nothing_from_the_other_values_of_its_row(outlier: float) -> None:
    """e4m3 has 2^15 between its smallest normal value and its largest; an int8 scale would leave nothing of them."""
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(2))
    x[:, 0] = outlier * 4
    x8, scales = row_scaled(x)
    rest = (x8.float() * scales[:, None] - x)[:, 1:].norm() / x[:, 1:].norm()
    assert rest < 0.035


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in FP8 with a live reference, fp32 elsewhere."""
    folder = tmp_path_factory.mktemp("fp8")
    base = tiny_folder(folder / "base")
    model = {"path": str(base), "dtype": "float32", "compute": "fp8"}
    said = dpo("train", write_recipe(folder / "r.yaml", base, model=model, reference={"mode": "live"}))
    assert said.code == 0, said.err
    assert "compute in FP8 (e4m3, a scale a row), forward and backward; on a CPU that is slow" in said.err
    return folder / "run"


def test_a_run_in_fp8_starts_at_ln_2_to_the_bit_and_moves(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [line for line in lines if "loss" in line]
    assert metrics[0]["loss"] == torch.tensor(math.log(2)).item()
    assert metrics[0]["rewards/margins"] == 0
    assert metrics[-1]["rewards/margins"] != 0


def test_score_and_generate_compute_as_the_run_did_unless_told(run: Path) -> None:
    """In FP8 the log-probs are other ones than in the dtype's precision, and near them for this wild little model."""
    pairs = run.parent / "pairs.jsonl"
    in_fp8, again, exact = (dpo("score", run, pairs, *how) for how in ([], ["--compute", "fp8"], ["--compute", "bf16"]))
    assert (in_fp8.code, again.code, exact.code) == (0, 0, 0), in_fp8.err + exact.err
    assert in_fp8.lines == again.lines
    apart = [
        abs(a["chosen_logp"] - b["chosen_logp"]) / a["chosen_tokens"]
        for a, b in zip(in_fp8.lines, exact.lines, strict=True)
    ]
    assert 0 < max(apart) < 1
    assert dpo("generate", run, "--prompt", "hello", "--max-new-tokens", "4").code == 0


def test_an_export_adds_to_the_checkpoints_own_weights(run: Path) -> None:
    """Not to the rounded ones: merged = base + alpha / r B A, in bf16."""
    said = dpo("export", run, run.parent / "merged", "--to", "merged")
    assert said.code == 0, said.err
    merged, base = (load_file(run.parent / name / "model.safetensors") for name in ("merged", "base"))
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    scale = json.loads((run / "adapter/adapter_config.json").read_text())
    name = "model.layers.0.self_attn.q_proj"
    up, down = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
    expected = base[f"{name}.weight"].float() + scale["lora_alpha"] / scale["r"] * (up @ down)
    apart = (merged[f"{name}.weight"].float() - expected).norm() / expected.norm()
    assert apart < 4e-3  # bf16's rounding; e4m3's is 2.6e-2


def test_layers_of_odd_sizes_and_mixtures_are_refused_by_name(tmp_path: Path) -> None:
    odd = tiny_folder(tmp_path / "odd", intermediate_size=72)
    with pytest.raises(ModelError, match=r"cannot be used for .*mlp\.\w+_proj: \d+ inputs and \d+ outputs"):
        load_chat_model(ModelSection(path=str(odd), compute="fp8"))


def test_only_decoder_layers_are_rounded(tmp_path: Path) -> None:
    model = load_chat_model(ModelSection(path=str(tiny_folder(tmp_path / "base")), compute="fp8")).model
    rounded = {name for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    assert rounded and all(".layers." in name for name in rounded)
    assert not isinstance(model.get_output_embeddings(), FrozenLinear)
