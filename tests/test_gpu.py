"""What only a GPU can show: the kernel's numbers and gradients, compiled layers, real lack of memory, equal bits.

    python -m pytest tests/test_gpu.py

Skipped where there is no CUDA. The oracle: the plain model in fp32, eager attention, one sequence at a time.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_studio.cli.app import set_environment
from dpo_studio.config import AdapterSection, TrainingSection
from dpo_studio.frozen import adapter_columns
from dpo_studio.frozen.fp8 import fp8_rows, fp8_weight
from dpo_studio.frozen.gptq import Packed
from dpo_studio.frozen.linear import FrozenLinear
from dpo_studio.frozen.nf4 import Doubled, Nf4, quantise_nf4
from dpo_studio.frozen.row_scaled import RowScaled, row_scaled
from dpo_studio.frozen.scaled import Scaled, quantise_fp8
from dpo_studio.frozen.weights import Frozen
from dpo_studio.learning.logprobs import pair_logps
from dpo_studio.learning.memory import MemoryLimit, MemoryLimits, plan_limit
from dpo_studio.learning.packing_check import check_packing
from dpo_studio.learning.state import TrainingState
from dpo_studio.learning.train import train
from dpo_studio.models.adapters import adapter_state, as_reference, attach, train_mode
from dpo_studio.models.attention import FLEX
from dpo_studio.models.layers import RUNGS, compiled_layers, set_recompute
from dpo_studio.objectives import DPO, PairLogps
from dpo_studio.policy.policy import Policy
from dpo_studio.tokens.pack import Steps, pack
from tests.pairs_of_ids import random_pairs
from tests.policies import plain_peft_on, policy_on
from tests.textbook import columns, gradients, plain_logps
from tests.tiny_models import tiny_folder, tiny_model
from tests.tiny_runs import dpo, write_recipe

set_environment()  # torch has not asked for memory yet
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]
CUDA = torch.device("cuda")
SHAPE: dict[str, Any] = {"head_dim": 16}
PAIRS = [*random_pairs(6), *random_pairs(3, seed=5, prompt=(30, 90), answer=(20, 200))]
WEIGHTS_P2 = torch.randn(len(PAIRS), 2, generator=torch.Generator().manual_seed(3))
ARCHITECTURES = ["llama", "mistral-window", "qwen3", "gemma3", "gemma2", "granite-swa", "cohere", "stablelm"]


def shape(architecture: str) -> dict[str, Any]:
    """Heads of 16, the smallest FlexAttention's kernel takes; StableLM has hidden_size / heads of them."""
    return {"hidden_size": 64, "head_dim": 16} if architecture == "stablelm" else SHAPE


def assert_textbook(policy: Any, architecture: str) -> None:
    """1e-4 relative: of each log-prob, and of each gradient relative to its largest entry.

    Where plain fp32 is itself further than that from fp64 (Granite with a window: 2e-4 of a gradient), thrice as far.
    """
    oracle = plain_peft_on(architecture, **shape(architecture)).to(CUDA)
    expected_P2 = plain_logps(oracle, PAIRS)
    plain = gradients(oracle, (WEIGHTS_P2.to(CUDA) * expected_P2).sum())
    exact = plain_peft_on(architecture, **shape(architecture)).to(CUDA).double()
    expected = gradients(exact, (WEIGHTS_P2.to(CUDA).double() * plain_logps(exact, PAIRS)).sum())
    expected = {name: gradient.float() for name, gradient in expected.items()}
    allowed = {
        name: max(1e-4 * expected[name].abs().max().item(), 3 * (plain[name] - expected[name]).abs().max().item())
        for name in expected
    }
    for pairs in (PAIRS, PAIRS[::-1]):
        logps_P2 = columns(pair_logps(policy, pack(pairs).to(CUDA)))
        if pairs is not PAIRS:
            logps_P2 = logps_P2.flip(0)
        torch.testing.assert_close(logps_P2, expected_P2, rtol=1e-4, atol=1e-4)
        found = gradients(policy, (WEIGHTS_P2.to(CUDA) * logps_P2).sum())
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=allowed[name], msg=name)
    with torch.no_grad(), as_reference(policy):
        reference = columns(pair_logps(policy, pack(PAIRS).to(CUDA)))
    with torch.no_grad(), oracle.disable_adapter():
        torch.testing.assert_close(reference, plain_logps(oracle, PAIRS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flex_is_the_textbook_eager_and_compiled(architecture: str) -> None:
    policy = policy_on(architecture, attn_implementation=FLEX, **shape(architecture)).to(CUDA)
    train_mode(policy)
    assert check_packing(policy, PAIRS) < 1e-4
    assert_textbook(policy, architecture)
    set_recompute(policy, "nothing")
    with compiled_layers(policy):
        assert_textbook(policy, architecture)
        assert check_packing(policy, PAIRS) < 1e-4


@pytest.mark.parametrize("what", RUNGS)
@pytest.mark.parametrize("compiled", [False, True])
def test_forming_anew_changes_no_number(what: Any, compiled: bool) -> None:
    policy = policy_on(attn_implementation=FLEX, **SHAPE).to(CUDA)
    train_mode(policy)
    set_recompute(policy, what)
    with compiled_layers(policy) if compiled else nullcontext():
        assert_textbook(policy, "llama")


def test_in_bfloat16_compiled_packs_add_no_more_noise_than_bfloat16_itself() -> None:
    """Mean error a token against fp32: at most 1.5 times that of the plain model in bf16."""
    changes: dict[str, Any] = {"initializer_range": 0.08, **SHAPE}
    exact = plain_logps(policy_on(attn_implementation="sdpa", **changes).to(CUDA), PAIRS)
    half = policy_on(attn_implementation=FLEX, **changes)
    half.get_base_model().bfloat16()
    half = half.to(CUDA)
    for name, p in half.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    tokens = sum(len(a.ids) for pair in PAIRS for a in (pair.chosen, pair.rejected))
    with torch.no_grad():
        plain = plain_logps(half, PAIRS)
        with compiled_layers(half):
            packed = columns(pair_logps(half, pack(PAIRS).to(CUDA)))
    noise, ours = ((x - exact).abs().sum().item() / tokens for x in (plain, packed))
    assert 0 < ours < 1.5 * noise


def packed_weight(
    bits: int,
    group_size: int,
    *,
    act_order: bool,
    outputs: int = 200,
    inputs: int = 768,
    of: torch.dtype = torch.float16,
) -> Packed:
    """Random words, scales and zero points, on the CPU; outputs that fill no whole tile."""
    draw = torch.Generator().manual_seed(bits)
    groups = inputs // group_size
    words = torch.randint(-(2**31), 2**31 - 1, (outputs, inputs * bits // 32), generator=draw, dtype=torch.int32)
    scales = (0.01 * torch.randn(outputs, groups, generator=draw)).to(of)
    zeros = torch.randint(0, 2**bits, (outputs, groups), generator=draw).byte()
    order = torch.randint(0, groups, (inputs,), generator=draw, dtype=torch.int32) if act_order else None
    return Packed(words, scales, zeros, order, bits, group_size)


def on_gpu(weight: Packed) -> Packed:
    """The same on the device."""
    group = None if weight.group_K is None else weight.group_K.to(CUDA)
    words, scales, zeros = (x.to(CUDA) for x in (weight.words_NW, weight.scales_NG, weight.zeros_NG))
    return Packed(words, scales, zeros, group, weight.bits, weight.group_size)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, 768])
@pytest.mark.parametrize("act_order", [False, True])
def test_weights_formed_by_the_kernel_are_those_of_plain_torch(bits: int, group_size: int, act_order: bool) -> None:
    """To the bit, in bf16 and fp16; plain torch's are gptqmodel's (tests/test_models_gptq.py)."""
    weight = packed_weight(bits, group_size, act_order=act_order)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rounded = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        assert torch.equal(on_gpu(weight).dequantised(dtype).cpu(), weight.exact(rounded).to(dtype))


@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32])
def test_other_precisions_of_scales_are_formed_as_by_plain_torch(of: torch.dtype) -> None:
    """To the bit: AWQ's and compressed-tensors' scales."""
    weight = packed_weight(4, 32, act_order=False, of=of)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(on_gpu(weight).dequantised(dtype).cpu(), weight.plain(dtype))


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("block", [32, 64, 128, 4096])
def test_nf4_formed_by_the_kernel_is_that_of_plain_torch(block: int, doubled: bool) -> None:
    """To the bit; plain torch's is bitsandbytes' (tests/test_models_formats.py). 200 x 770 weights: blocks over the
    ends of rows, and a last one that is not full."""
    draw = torch.Generator().manual_seed(block)
    shape = (200, 770)
    blocks = -(-shape[0] * shape[1] // block)
    bytes_P = torch.randint(0, 256, (shape[0] * shape[1] // 2,), generator=draw, dtype=torch.uint8)
    scales = torch.rand(blocks, generator=draw)
    parts = None
    if doubled:
        scales = torch.randint(0, 256, (blocks,), generator=draw, dtype=torch.uint8)
        of_scales = torch.rand(-(-blocks // 256), generator=draw)
        parts = Doubled(of_scales, torch.randn(256, generator=draw), torch.tensor(0.7071), 256)
    weight = Nf4(bytes_P, scales, parts, shape, block)
    there = Nf4.taken(iter([x.to(CUDA) for x in weight.tensors().values()]), iter(weight.numbers()))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(there.dequantised(dtype).cpu(), weight.exact(dtype))
        assert torch.equal(there.plain(dtype).cpu(), weight.exact(dtype))


@pytest.mark.parametrize("quantised", [quantise_nf4, quantise_fp8])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_quantises_to_the_bits_of_a_cpu(of: torch.dtype, quantised: Callable[[Tensor], Frozen]) -> None:
    """Which are bitsandbytes' and transformers' (tests/test_models_formats.py)."""
    weight_NK = torch.randn(330, 770, generator=torch.Generator().manual_seed(0)).to(of)
    weight_NK[:128] = 0
    found, expected = quantised(weight_NK.to(CUDA)), quantised(weight_NK)
    assert found.numbers() == expected.numbers()
    for tensor, wanted in zip(found.tensors().values(), expected.tensors().values(), strict=True):
        assert torch.equal(tensor.cpu().float(), wanted.float())


@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(128, 128), (1, 770), (200, 770), (64, 32)])
def test_eight_bits_formed_by_the_kernel_are_those_of_plain_torch(block: tuple[int, int], of: torch.dtype) -> None:
    """To the bit, e4m3 and int8, with the last blocks smaller; plain torch's are the libraries'
    (tests/test_models_formats.py)."""
    draw = torch.Generator().manual_seed(block[0])
    outputs, inputs = 200, 770
    scales = torch.rand(-(-outputs // block[0]), -(-inputs // block[1]), generator=draw).to(of)
    normal = torch.randn(outputs, inputs, generator=draw)
    for values, of_127 in ((normal.to(torch.float8_e4m3fn), False), ((40 * normal).clamp(-127, 127).char(), True)):
        weight = Scaled(values, scales, block, of_127)
        there = Scaled(values.to(CUDA), scales.to(CUDA), block, of_127)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert torch.equal(there.dequantised(dtype).cpu(), weight.plain(dtype))
            assert torch.equal(there.plain(dtype).cpu(), weight.plain(dtype))


def test_fp8_loses_nothing_of_the_weights() -> None:
    """Activations of one value a block are exact in e4m3, so what is left is bf16's own rounding of the result; with
    random ones the error is that of three-bit mantissas, about 2.6 %."""
    packed = on_gpu(packed_weight(4, 128, act_order=False, outputs=256, inputs=1024))
    dense, weight = packed.exact(torch.float32), fp8_weight(packed)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(weight.dequantised(dtype), packed.exact(dtype))
    draw = torch.Generator(CUDA).manual_seed(0)
    flat = torch.randn(64, 8, 1, generator=draw, device=CUDA).expand(-1, -1, 128).reshape(64, 1024).bfloat16()
    exact = flat.double() @ dense.double().t()
    found = weight.product(*fp8_rows(flat))[:64]
    assert ((found.double() - exact).norm() / exact.norm()).item() < 3e-3
    x = torch.randn(77, 1024, generator=draw, device=CUDA).bfloat16()
    exact = x.double() @ dense.double().t()
    found = weight.product(*fp8_rows(x))[:77]
    assert 5e-3 < ((found.double() - exact).norm() / exact.norm()).item() < 4e-2


@pytest.mark.parametrize("inputs", [48, 4096, 20000])
def test_rows_are_rounded_on_the_gpu_as_on_the_cpu(inputs: int) -> None:
    """The same scales, and values that differ by one step of e4m3 where the two divide differently."""
    x = torch.randn(77, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[3], x[5, 7] = 0, 30000
    (x8, scales), (expected8, expected) = row_scaled(x.to(CUDA)), row_scaled(x)
    assert torch.allclose(scales.cpu(), expected, rtol=1e-6)
    differs = x8.cpu().float() != expected8.float()
    assert differs.float().mean() < 1e-2
    assert torch.allclose(x8.cpu().float(), expected8.float(), rtol=0.13, atol=2**-9)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1, 10.0], ids="B={}".format)
@pytest.mark.parametrize("ranks", [(1,), (16,), (28, 28, 28), (3, 8, 5), (100,)], ids=str)
def test_an_adapters_part_of_an_fp8_product_is_as_fine_as_in_bf16(ranks: tuple[int, ...], size: float) -> None:
    """The part alone: a weight and inputs that are zero but for what sets the scales, so that nothing hides it. Two
    e4m3 halves of each side have about eight bits together, as bf16 has; rank 100 does not fit, and is added in bf16.
    A thousand times below the weights, as after a step or two, both sides share what is left of e4m3's range.
    """
    apart = 0.06 if size < 1e-5 else 0.012
    draw = torch.Generator(CUDA).manual_seed(1)
    inputs, rows = 1024, 77
    x = torch.zeros(rows, inputs, device=CUDA, dtype=torch.bfloat16)
    x[:, 0] = 4.0
    outputs = [304 + 16 * i for i in range(len(ranks))]
    dense = [torch.zeros(n, inputs, device=CUDA, dtype=torch.bfloat16) for n in outputs]
    for weight in dense:
        weight[:, 1] = 0.1  # the other side has a zero there
    weights = [RowScaled.of(weight) for weight in dense]
    low = torch.randn(rows, sum(ranks), generator=draw, device=CUDA).bfloat16()
    ups = [size * torch.randn(n, r, generator=draw, device=CUDA) for n, r in zip(outputs, ranks, strict=True)]
    ups = [up.bfloat16() for up in ups]
    found = adapter_columns.outputs(x, weights, low, ups)
    for y, up, part in zip(found, ups, torch.split(low, list(ranks), 1), strict=True):
        exact = part.double() @ up.double().t()
        assert ((y.double() - exact).norm() / exact.norm()).item() < apart
    gradients_ = [torch.zeros(rows, n, device=CUDA, dtype=torch.bfloat16) for n in outputs]
    gradients_[0][:, 0] = 4.0
    down = (0.03 * torch.randn(sum(ranks), inputs, generator=draw, device=CUDA)).bfloat16()
    slope = (size * low).bfloat16()
    found_slope = adapter_columns.input_slopes(gradients_, weights, slope, down)
    exact = slope.double() @ down.double()
    exact[:, 1] += 4.0 * 0.1  # the weight's own part of the gradient
    others = torch.arange(inputs, device=CUDA) != 1
    assert ((found_slope.double() - exact)[:, others].norm() / exact[:, others].norm()).item() < apart


@pytest.mark.parametrize("rank", [4, 16, 40])
def test_an_adapter_left_out_of_an_fp8_product_is_one_of_zeros_to_the_bit(rank: int) -> None:
    draw = torch.Generator(CUDA).manual_seed(2)
    x = torch.randn(77, 512, generator=draw, device=CUDA).bfloat16()
    weights = [RowScaled.of(torch.randn(256, 512, generator=draw, device=CUDA).bfloat16()) for _ in range(3)]
    low = torch.randn(77, 3 * rank, generator=draw, device=CUDA).bfloat16()
    some = [torch.randn(256, rank, generator=draw, device=CUDA).bfloat16() for _ in weights]
    adapter_columns.outputs(x, weights, low, some)  # leaves its columns behind the weights
    left_out = adapter_columns.outputs(x, weights, None, some)
    zeros = adapter_columns.outputs(x, weights, low, [torch.zeros_like(up) for up in some])
    assert all(torch.equal(a, b) for a, b in zip(left_out, zeros, strict=True))


def gptq_policy(
    *,
    fp8: bool = False,
    resident: bool = False,
    rows8: bool = False,
    quantised: Callable[[Tensor], Frozen] | None = None,
) -> Any:
    """A tiny Llama whose linears hold random 4-bit words in groups of 128, bf16, its adapter moved; or what `quantised`
    makes of them."""
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = tiny_model(attn_implementation=FLEX, initializer_range=0.05, **shape).bfloat16().to(CUDA)
    for name, linear in [(n, m) for n, m in model.named_modules() if n.endswith("_proj")]:
        weight = packed_weight(4, 128, act_order=False, outputs=linear.out_features, inputs=linear.in_features)
        words, scales = weight.words_NW.to(CUDA), weight.scales_NG.abs().to(CUDA)
        weight = Packed(words, scales, torch.full_like(weight.zeros_NG, 8).to(CUDA), None, 4, 128)
        of = weight if quantised is None else quantised(weight.dequantised(torch.bfloat16))
        parent, _, child = name.rpartition(".")
        if resident:
            linear.weight.data = of.dequantised(torch.bfloat16)
        else:
            kind = RowScaled.of(weight.dequantised(torch.bfloat16)) if rows8 else fp8_weight(weight) if fp8 else of
            layer = FrozenLinear(kind)
            setattr(model.get_submodule(parent), child, layer)
    model.requires_grad_(False)
    policy = attach(model, AdapterSection(rank=4, alpha=8), seed=0)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            draw = torch.Generator().manual_seed(len(name))
            p.data = 0.02 * torch.randn(p.shape, generator=draw).to(CUDA)
    train_mode(policy)
    set_recompute(policy, "nothing")
    return policy


@pytest.mark.parametrize("compiled", [False, True])
def test_a_packed_base_is_the_dense_one(compiled: bool) -> None:
    """Log-probs and gradients of a base that forms its weights again and again, and of one that holds them, in bf16."""
    found = []
    for resident in (False, True):
        policy = gptq_policy(resident=resident)
        with compiled_layers(policy) if compiled else nullcontext():
            logps_P2 = columns(pair_logps(policy, pack(PAIRS).to(CUDA)))
            found.append((logps_P2.detach(), gradients(policy, (WEIGHTS_P2.to(CUDA) * logps_P2).sum())))
    (packed_logps, packed_slopes), (dense_logps, dense_slopes) = found
    assert torch.equal(packed_logps, dense_logps)
    for name, gradient in packed_slopes.items():
        assert torch.equal(gradient, dense_slopes[name]), name


@pytest.mark.parametrize("quantised", [quantise_nf4, quantise_fp8])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_base_quantised_while_loading_is_the_dense_one_of_its_weights(
    compiled: bool, quantised: Callable[[Tensor], Frozen]
) -> None:
    """Log-probs and gradients, to the bit, in bf16, of weights formed again and again and of weights formed once."""
    found = []
    for resident in (False, True):
        policy = gptq_policy(resident=resident, quantised=quantised)
        with compiled_layers(policy) if compiled else nullcontext():
            logps_P2 = columns(pair_logps(policy, pack(PAIRS).to(CUDA)))
            found.append((logps_P2.detach(), gradients(policy, (WEIGHTS_P2.to(CUDA) * logps_P2).sum())))
    (packed_logps, packed_slopes), (dense_logps, dense_slopes) = found
    assert torch.equal(packed_logps, dense_logps)
    for name, gradient in packed_slopes.items():
        assert torch.equal(gradient, dense_slopes[name]), name


@pytest.mark.parametrize("rows8", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_starts_at_ln_2_and_stays_near_bf16(compiled: bool, rows8: bool) -> None:
    """Policy and reference err alike: with B at zero the margins are 0 to the bit. Per token both stay near bf16's."""
    policy = gptq_policy(fp8=not rows8, rows8=rows8)
    plain = gptq_policy()
    tokens = sum(len(a.ids) for pair in PAIRS for a in (pair.chosen, pair.rejected))
    with compiled_layers(policy) if compiled else nullcontext():
        logps_P2 = columns(pair_logps(policy, pack(PAIRS).to(CUDA)))
        slopes = gradients(policy, (WEIGHTS_P2.to(CUDA) * logps_P2).sum())
        expected_P2 = columns(pair_logps(plain, pack(PAIRS).to(CUDA)))
        expected = gradients(plain, (WEIGHTS_P2.to(CUDA) * expected_P2).sum())
        assert 0 < ((logps_P2 - expected_P2).abs().sum() / tokens).item() < 0.05
        for name, gradient in slopes.items():
            assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), 0) > 0.9, name
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.data.zero_()
        now = columns(pair_logps(policy, pack(PAIRS).to(CUDA)))  # with what it keeps for a backward pass
        with torch.no_grad(), as_reference(policy):
            reference = columns(pair_logps(policy, pack(PAIRS).to(CUDA)))
        assert torch.equal(now.detach(), reference)


LONG = random_pairs(160, prompt=(100, 300), answer=(100, 400))
"""Some 110,000 tokens."""


def steps_of(
    policy: Any, tokens: int, pairs_per_step: int = 16, steps: int = 4
) -> tuple[list[float], list[MemoryLimit]]:
    """Losses of some steps with a live reference, and the limits they met."""

    def live(batches: Any) -> list[PairLogps]:
        with as_reference(policy):
            return [pair_logps(policy, batch) for batch in batches]

    section = TrainingSection(pairs_per_step=pairs_per_step, learning_rate=3e-3, warmup=0, schedule="constant")
    pairs = LONG[: max(48, pairs_per_step)]
    plan = Steps(pairs, pairs_per_step, tokens, 0, 2, steps)
    state = TrainingState.fresh(Policy(policy), section, steps)
    met: list[MemoryLimit] = []
    train_mode(policy)
    reports = train(Policy(policy), plan, DPO(), state, live, MemoryLimits(policy, plan, report=met.append))
    return [report.metrics["loss"] for report in reports], met


def larger() -> Any:
    """Some 25 MB of activations for a thousand tokens."""
    changes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64, "initializer_range": 0.05}
    return policy_on(attn_implementation=FLEX, size=0, **changes).to(CUDA)


@contextmanager
def room_for(gib: float) -> Iterator[None]:
    """Inside, so much and no more can be allocated on top of what is."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + gib * 2**30) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_real_lack_of_memory_ends_with_the_same_losses() -> None:
    """Rows of 16,384 tokens, some 80 KB each, where 0.2 GiB are left: the same losses as with all the room there is."""
    free, nothing = steps_of(larger(), 16384)
    policy = larger()
    with room_for(0.2):
        short, met = steps_of(policy, 16384)
    assert nothing == []
    assert met
    assert met[-1].tokens < 16384
    assert short == pytest.approx(free, abs=1e-4)
    assert min(free) < free[0] - 0.05


def test_the_plan_fits_and_fills() -> None:
    """What is planned runs, and twice as much, in rows that a step of 160 pairs fills, does not.

    A GiB: of less, blocks of 20 MiB waste more than the tenth that the plan spares.
    """
    policy = larger()
    train_mode(policy)
    with room_for(1):
        limit = plan_limit(policy, LONG, len(LONG), CUDA)
        assert limit.recompute == "nothing"
        _, met = steps_of(policy, limit.tokens, len(LONG), steps=1)
        assert met == [], limit
        _, met = steps_of(policy, 2 * limit.tokens, len(LONG), steps=1)
        assert met != [], limit


def test_the_same_run_twice_has_the_same_bits() -> None:
    """Nothing adds in the order in which threads happen to arrive."""
    runs = []
    for _ in range(2):
        policy = larger()
        set_recompute(policy, "nothing")
        with compiled_layers(policy):
            losses, _ = steps_of(policy, 4096)
        runs.append((losses, {name: p.detach().clone() for name, p in adapter_state(policy).items()}))
    assert runs[0][0] == runs[1][0]
    for name, p in runs[0][1].items():
        assert torch.equal(p, runs[1][1][name]), name


def test_a_run_from_the_command_line_resumes_bit_for_bit(tmp_path: Path) -> None:
    """`dpo train` on the GPU, bf16: eight steps at once, and stopped after four."""
    base = tiny_folder(tmp_path / "base", **SHAPE)
    recipe = write_recipe(tmp_path / "r.yaml", base, training={"max_steps": 8, "save_every": 4})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said = dpo("train", recipe, "--set", f"run.folder={whole}")
    assert said.code == 0, said.err
    assert dpo("train", recipe, "--set", f"run.folder={parts}").code == 0
    shutil.rmtree(parts / "checkpoints" / "step-8")
    (parts / "result.json").unlink()
    again = dpo("train", recipe, "--set", f"run.folder={parts}")
    assert again.code == 0, again.err
    assert (whole / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
    name = "adapter/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()
    steps = [json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(9))
