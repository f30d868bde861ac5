"""Masks by hand, the two ways of attention against each other, and what is refused by its config alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    DeepseekV32Config,
    DoryConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoConfig,
    JambaConfig,
    Lfm2Config,
    MambaConfig,
    ModernBertDecoderConfig,
    MptConfig,
    Qwen3NextConfig,
    T5Config,
)

from dpo_studio.errors import ModelError
from dpo_studio.learning.logprobs import token_logps
from dpo_studio.models.attention import (
    BLOCK,
    DENSE,
    FLEX,
    PAIRS,
    _whole_blocks,
    block_mask,
    check_architecture,
    choose_attention,
    dense_mask,
    row_inputs,
)
from dpo_studio.models.layouts import choose_layout
from dpo_studio.tokens.pack import Span, pack
from tests.pairs_of_ids import encoded, random_pairs
from tests.tiny_models import ARCHITECTURES, tiny_model

TWO = [encoded([11, 12], [21, 22, 23], [31, 32]), encoded([13], [24, 25], [33])]
"""Rows of tokens: 11 12 | 21 22 | 31 for the first pair, 13 | 24 | nothing for the second, whose answer is one id."""


def seen(mask: Tensor) -> list[str]:
    """A line for each token of the row: x where it may look."""
    return ["".join("x" if look else "." for look in row) for row in mask[0, 0].tolist()]


def test_a_token_sees_its_own_prompt_and_its_own_answer_so_far() -> None:
    """Row: 11 12 21 22 31 | 13 24. The rejected 31 sees the prompt and itself, not 21 22; 13 begins anew."""
    assert seen(dense_mask(pack(TWO))) == [
        "x......",
        "xx.....",
        "xxx....",
        "xxxx...",
        "xx..x..",
        ".....x.",
        ".....xx",
    ]


def test_a_window_is_counted_in_positions_not_in_places() -> None:
    """Window 2: a token sees itself and the position before it. For 31 (position 2) that is 12 (position 1), three
    places to its left; a window counted in places would leave it only itself."""
    assert seen(dense_mask(pack(TWO), window=2)) == [
        "x......",
        "xx.....",
        ".xx....",
        "..xx...",
        ".x..x..",
        ".....x.",
        ".....xx",
    ]


@pytest.mark.parametrize(
    ("architecture", "windows"),
    [
        ("llama", 0),
        ("mistral-window", 9),
        ("qwen2", {"full_attention": 0}),
        ("qwen2-mixed", {"full_attention": 0, "sliding_attention": 9}),
        ("qwen3", {"full_attention": 0}),
        ("gemma3", {"full_attention": 0, "sliding_attention": 9}),
    ],
)
def test_every_kind_of_layer_gets_its_own_window(architecture: str, windows: Any) -> None:
    """One mask for models with one kind of layer, else one for each; `pairs` gets the window itself, 0 for none."""
    config = tiny_model(architecture, attn_implementation=PAIRS).config
    batch = pack(random_pairs(3))
    arguments = row_inputs(config, batch)
    noted = arguments["attention_mask"]
    notes = {"": noted} if isinstance(noted, Tensor) else noted
    assert all(note[0, 0, 1:].tolist() == [list(span) for span in batch.spans] for note in notes.values())
    found = {kind: int(note[0, 0, 0, 0]) for kind, note in notes.items()}
    assert found == ({"": windows} if isinstance(noted, Tensor) else windows)
    config._attn_implementation = DENSE
    dense = row_inputs(config, batch)["attention_mask"]
    masks = {"": dense} if isinstance(dense, Tensor) else dense
    for kind, mask in masks.items():
        window = windows[kind] if kind else windows
        assert torch.equal(mask, dense_mask(batch, window or None))


WINDOWED: list[tuple[str, int | None]] = [
    (name, window)
    for name in ("mistral-window", "qwen2-mixed", "gemma3", "gemma2", "granite-swa")
    for window in (1, 2, 5, 31)
]
FULL: list[tuple[str, int | None]] = [(name, None) for name in ("llama", "llama-tied", "mistral", "qwen2", "qwen3")]


@pytest.mark.parametrize(("architecture", "window"), WINDOWED + FULL)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_pair_by_pair_and_flex_are_the_dense_mask(architecture: str, window: int | None) -> None:
    """The same model twice, whatever the window: one token, within an answer, across the prompt, or past it all."""
    batch = pack([*random_pairs(4, seed=window or 0), *TWO])
    changes = {} if window is None else {"sliding_window": window}
    with torch.no_grad():
        by_pair, flex, dense = (
            token_logps(tiny_model(architecture, attn_implementation=kind, **changes), batch)
            for kind in (PAIRS, FLEX, DENSE)
        )
    torch.testing.assert_close(by_pair, dense, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("window", "chunk"), [*((window, None) for window in (None, 1, 40, 128, 200, 500)), (None, 100), (None, 300)]
)
@pytest.mark.parametrize("seed", range(3))
def test_flex_visits_every_block_that_anyone_may_see_and_masks_in_all_but_full_ones(
    window: int | None, seed: int, chunk: int | None
) -> None:
    """Of 128 x 128 tokens, against the dense mask cut into such blocks. Some are skipped, some are full: pairs of 3 to
    1,400 tokens. A full block that is listed as a partial one would cost time, never a number; it happens with windows.
    """
    pairs = [*random_pairs(5, seed=seed, prompt=(1, 400), answer=(1, 500)), *random_pairs(6, seed=seed + 9)]
    mask: Any = block_mask(pack(pairs), window, chunk)
    dense_TT = dense_mask(_whole_blocks(pack(pairs), mask.seq_lengths[0]), window, chunk)[0, 0]
    blocks = len(dense_TT) // BLOCK
    cut = dense_TT.view(blocks, BLOCK, blocks, BLOCK).transpose(1, 2).flatten(2)
    anyone, everyone = cut.any(2), cut.all(2)
    partial, full = (
        torch.stack([torch.zeros(blocks, dtype=torch.bool).scatter(0, row[:n].long(), True) for n, row in lists])
        for lists in (
            list(zip(mask.kv_num_blocks[0, 0], mask.kv_indices[0, 0], strict=True)),
            list(zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)),
        )
    )
    assert not (partial & full).any()
    assert not (anyone & ~partial & ~full).any()
    assert not (full & ~everyone).any()
    assert not partial.all()
    if window is None and chunk is None:
        assert torch.equal(full, everyone)
        assert full.any()
    place_T = torch.arange(len(dense_TT))
    assert torch.equal(mask.mask_mod(None, None, place_T[:, None], place_T), dense_TT)


def test_a_row_is_filled_up_with_tokens_that_see_themselves_alone() -> None:
    batch = _whole_blocks(pack(TWO))
    assert batch.ids_1T.shape == batch.position_ids_1T.shape == (1, BLOCK)
    assert torch.equal(dense_mask(batch)[0, 0, 7:, 7:], torch.eye(BLOCK - 7, dtype=torch.bool))
    assert not dense_mask(batch)[0, 0, 7:, :7].any()
    assert torch.equal(dense_mask(batch)[0, 0, :7, :7], dense_mask(pack(TWO))[0, 0])


@pytest.mark.parametrize("attention", [PAIRS, FLEX])
def test_without_a_pack_our_attentions_are_plain_sdpa(attention: str) -> None:
    """`dpo generate` uses the same loaded model: also with left padding."""
    ids, mask = torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for architecture in ("llama", "mistral-window", "gemma3"):
        with torch.no_grad():
            ours, theirs = (
                tiny_model(architecture, attn_implementation=kind)(input_ids=ids, attention_mask=mask).logits
                for kind in (attention, "sdpa")
            )
        assert torch.equal(ours[mask.bool()], theirs[mask.bool()])


def test_spans_are_where_the_parts_lie() -> None:
    """First pair: prompt 0-2, chosen 2-4, rejected 4-5; second: prompt 5-6, chosen 6-7, no rejected token is read."""
    assert pack(TWO).spans == (Span(0, 2, 4, 5), Span(5, 6, 7, 7))


def test_the_kernel_is_chosen_where_it_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, with heads it takes, Triton and a C compiler; what the recipe names is not questioned."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    small, usual = (tiny_model(head_dim=size).config for size in (8, 16))
    monkeypatch.setattr("dpo_studio.models.attention.find_spec", lambda name: name)
    monkeypatch.setenv("CC", "cc")
    assert [choose_attention("auto", usual, gpu), choose_attention("auto", small, gpu)] == [FLEX, PAIRS]
    assert [choose_attention("auto", usual, cpu), choose_attention("sdpa", usual, gpu)] == [PAIRS, DENSE]
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert choose_attention("auto", usual, gpu) == PAIRS


@pytest.mark.parametrize(
    ("config", "layout", "reason"),
    [
        (Qwen3NextConfig(), "rows", "has layers with a state (linear_attention)"),
        (JambaConfig(), "rows", "has layers with a state (linear_attention)"),
        (MambaConfig(), "rows", "has layers with a state (linear_attention)"),
        (
            Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2),
            "rows",
            "has layers with a state (conv)",
        ),
        (DeepseekV32Config(), "apart", "a pack's mask does not reach (indexed_attention)"),
        (BloomConfig(), "apart", "places of the row (ALiBi)"),
        (MptConfig(), "apart", "places of the row (ALiBi)"),
        (FalconConfig(alibi=True), "apart", "places of the row (ALiBi)"),
        (GPTNeoConfig(), "apart", "places of the row (local attention)"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_packs_cannot_hold_is_read_in_another_layout(config: Any, layout: str, reason: str) -> None:
    check_architecture(config, "some/model")
    choice = choose_layout(config)
    assert choice.layout == layout and reason in choice.why


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma3TextConfig(use_bidirectional_attention=True), "looks at later tokens (use_bidirectional_attention)"),
        (DoryConfig(), "more than one product between its hidden states and its logits"),
        (ModernBertDecoderConfig(), "more than one product between its hidden states and its logits"),
        (T5Config(), "is an encoder-decoder"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_no_layout_makes_right_is_refused_by_its_config(config: Any, reason: str) -> None:
    with pytest.raises(ModelError) as refused:
        check_architecture(config, "some/model")
    assert f"some/model ({config.model_type}) " in refused.value.message
    assert reason in refused.value.message
    assert refused.value.hint is not None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_packs_can_hold_is_let_through(architecture: str) -> None:
    config = tiny_model(architecture).config
    check_architecture(config, "some/model")
    assert choose_layout(config).layout == "packed"
