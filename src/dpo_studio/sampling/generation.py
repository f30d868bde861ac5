"""Sampling answers: the same prompts, model, temperature, sample and seed give the same texts, every time.

Three things make that true. The uniforms are drawn for each prompt from a hash of everything that its answer depends
on, so no outside random state matters. Batches are cut from the sorted prompts, so a restart, or the same prompts in
another order, makes the same batches (bf16 results depend on the batch). And a token is the inverse of the distribution
function at its number: no draw depends on which other answers are still being written.

The loop is our own because answers end: it drops a finished answer from the batch at once, where `model.generate` pads
it until the longest one is done. SmolLM2-135M in bf16, 48 everyday prompts, 64 new tokens, one CPU core of the AVX-512
kind: `model.generate` 175 tokens a second, here 221; with a LoRA adapter 116 and 213; 96 prompts at once 181 and 246.
A step at 100 cached tokens costs 3.3 ms a row with 48 rows and 2.7 with 128, hence large batches. What did not pay: two
bf16 products instead of the fused attention were 9 % faster but round the scores to 8 bits; weights in oneDNN's own
layout 4 % at 96 rows (8 to 17 % at 48) for a hundred lines on private torch operators.

Shapes: B = rows still being written, W = columns (padding, prompt, answer), V = vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

from dpo_studio.errors import DataError, NonFiniteError, UsageError
from dpo_studio.frozen.linear import held_dense
from dpo_studio.models.adapters import in_eval
from dpo_studio.models.layers import causal_lm
from dpo_studio.models.unsupported import long_rope_limit
from dpo_studio.sampling.completion import Completion
from dpo_studio.sampling.own_cache import keeps_own_cache, steps_of_one

__all__ = ["generate", "stream"]

UNIFORM_BITS = 53
"""The precision of a float64 between 0 and 1."""
COLDEST = 1e-6
"""Below this a temperature only overflows: two bf16 logits that differ do so by more than 1e-3 of their size."""
BLOCK = 128
"""The vocabulary is searched by blocks first: one fp32 pass over it, then float64 sums over the few that are left."""
GROWTH = 64
"""Columns the cache grows by: memory follows the answers that are still being written, not `max_new_tokens`."""

Choose = Callable[[Tensor, Tensor], Tensor]
"""Logits (B, V) and uniforms (B,) to ids (B,)."""
Step = tuple[list[int], list[int]]
"""The rows still being written, and the token each of them got."""


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    decode: Callable[[list[int]], str],
    *,
    eos_ids: Collection[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    sample: int = 0,
    batch_size: int = 128,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """One answer to each prompt, in the prompts' order. `progress` receives how many tokens each step wrote.

    The k-th occurrence of a prompt in the list has uniforms of its own; otherwise neither its position nor its
    neighbours matter (in bf16 they change the rounding). Two models given the same seed share their uniforms; give the
    other one another seed for independent answers. At temperature 0 the most likely token is taken, and seed and
    sample mean nothing.

    Raises:
        UsageError: a length or a temperature that means nothing.
        DataError: a prompt is empty.
        NonFiniteError: the model's logits are not finite.
    """
    _check(model, prompts, max_new_tokens, temperature)
    if not prompts:
        return []
    uniforms = _uniforms(prompts, max_new_tokens, f"{seed} {sample} {float(temperature)!r}")
    choose = partial(_choose, temperature=float(temperature))
    answers: list[list[int]] = [[] for _ in prompts]
    with in_eval(model), held_dense(model):
        if long_rope_limit(_text_config(model)) is not None or keeps_own_cache(model):
            batch_size = 1  # the longest row would choose the rope of all; a state is not cut like keys and values
        for places in _batches(prompts, batch_size):
            for rows, ids in _generate_steps(
                model, [prompts[i] for i in places], uniforms[places], choose, eos_ids, pad_id
            ):
                for row, token in zip(rows, ids, strict=True):
                    answers[places[row]].append(token)
                if progress is not None:
                    progress(len(ids))
    return [_completion(answer, decode, eos_ids) for answer in answers]


def stream(
    model: nn.Module,
    prompt: Sequence[int],
    decode: Callable[[list[int]], str],
    *,
    eos_ids: Collection[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    top_p: float = 1.0,
) -> Generator[str, None, bool]:
    """One answer, piece by piece as it is written; together the pieces are what `generate` would return.

    At its end it returns whether the model ended its turn itself, within the limit.

    A character whose bytes are spread over tokens decodes to U+FFFD until it is whole, so such an end is held back.
    """
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p:g}", hint="a share above 0, at most 1 (1 keeps every token)")
    _check(model, [prompt], max_new_tokens, temperature)
    uniforms = _uniforms([prompt], max_new_tokens, f"{seed} 0 {float(temperature)!r}")
    choose = partial(_choose, temperature=float(temperature), top_p=top_p)
    steps = _generate_steps(model, [prompt], uniforms, choose, eos_ids, pad_id=prompt[0])
    return _pieces(_step_by_step_in_eval(model, steps), decode, eos_ids)


def _step_by_step_in_eval(model: nn.Module, steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, with the model in eval while one is computed and in its old mode while the reader uses its piece."""
    while True:
        with in_eval(model):
            step = next(steps, None)
        if step is None:
            return
        yield step


def _pieces(
    steps: Iterator[Step], decode: Callable[[list[int]], str], eos_ids: Collection[int]
) -> Generator[str, None, bool]:
    """What each token adds to the text, as far as it cannot change any more; whether the last one is an end."""
    ended = False
    answer: list[int] = []
    text, shown = "", 0
    for _, (token,) in steps:
        ended = token in eos_ids
        if not ended:
            answer.append(token)
            text = decode(answer)
            whole = len(text.rstrip("�"))
            if whole > shown:
                yield text[shown:whole]
                shown = whole
    if len(text) > shown:
        yield text[shown:]
    return ended


def _check(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float) -> None:
    """Refuse what would fail later, or silently mean something else."""
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}", hint="at least 1")
    if not 0 <= temperature < float("inf"):
        raise UsageError(
            f"temperature is {temperature}", hint="0 takes the likeliest token, 1 samples as the model says"
        )
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {place} has no tokens", hint="a chat template writes some for every prompt")


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(causal_lm(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Places in the list, batch by batch: similar lengths together, and the same whatever the list's order."""
    order = sorted(range(len(prompts)), key=lambda place: (len(prompts[place]), tuple(prompts[place]), place))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _uniforms(prompts: Sequence[Sequence[int]], tokens: int, key: str) -> NDArray[np.float64]:
    """A number in [0, 1) for each token of each answer, (prompts, tokens); more tokens begin with the same numbers.

    PCG64's raw stream is guaranteed to stay what it is over numpy's versions; its distributions are not.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    rows = np.empty((len(prompts), tokens))
    for row, prompt in zip(rows, prompts, strict=True):
        ids = tuple(prompt)
        digest = hashlib.sha256(f"{key} {seen[ids]} {ids}".encode()).digest()
        raw = np.random.PCG64(int.from_bytes(digest, "big")).random_raw(tokens)
        row[:] = (raw >> np.uint64(64 - UNIFORM_BITS)) * 2.0**-UNIFORM_BITS
        seen[ids] += 1
    return rows


def _completion(answer: list[int], decode: Callable[[list[int]], str], eos_ids: Collection[int]) -> Completion:
    ended = bool(answer) and answer[-1] in eos_ids
    text = decode(answer[:-1] if ended else answer)
    return Completion(text=text, ended=ended, tokens=len(answer), ids=tuple(answer))


def _generate_steps(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    uniforms: NDArray[np.float64],
    choose: Choose,
    eos_ids: Collection[int],
    pad_id: int,
) -> Iterator[Step]:
    """Generate a token a step for all rows; a row that has ended is not yielded again. The model must be in eval."""
    if keeps_own_cache(model):
        yield from steps_of_one(model, prompts[0], uniforms[0], choose, eos_ids)
        return
    device = next(model.parameters()).device
    ids_BW, mask_BW = _left_padded(prompts, pad_id, device)
    cache = Cache(layer_class_to_replicate=_CacheLayer)
    # transformers 5.24 calls `cache` what 5.17 to 5.23 called `past_key_values`
    name = "cache" if "cache" in signature(causal_lm(model).forward).parameters else "past_key_values"
    rows = list(range(len(prompts)))
    limit = long_rope_limit(_text_config(model))
    whole_BW = ids_BW
    for step in range(uniforms.shape[1]):
        if step and limit is not None and int(mask_BW.sum()) == limit + 1:  # from here on other angles, for all tokens
            cache, ids_BW = Cache(layer_class_to_replicate=_CacheLayer), whole_BW
        with torch.inference_mode():
            position_BW = (mask_BW.cumsum(1) - 1).clamp(min=0)[:, -ids_BW.shape[1] :]
            output = model(
                input_ids=ids_BW,
                attention_mask=mask_BW,
                position_ids=position_BW,
                use_cache=True,
                logits_to_keep=1,
                **{name: cache},
            )
            chosen_B = choose(output.logits[:, -1], torch.as_tensor(uniforms[rows, step], device=device))
        chosen: list[int] = chosen_B.tolist()
        yield rows, chosen
        order = _closed_up([token not in eos_ids for token in chosen])
        if not order:
            return
        if len(order) < len(rows):
            rows, mask_BW, chosen_B = [rows[i] for i in order], mask_BW[order], chosen_B[order]
            for layer in cache.layers:
                layer.keep(order)
        ids_BW, mask_BW = chosen_B[:, None], pad(mask_BW, (0, 1), value=1)
        whole_BW = torch.cat([whole_BW, ids_BW], 1) if limit is not None else ids_BW


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, W), int64. On a CPU one column more than the longest prompt needs.

    With nothing masked, transformers drops the mask and SDPA's grouped-query path takes over, which a CPU has no kernel
    for: 48 rows of equal length took 256 ms a step where a masked column makes it 146.
    """
    width = max(map(len, prompts)) + (device.type == "cpu")
    rows = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    marks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(marks, device=device)


def _closed_up(alive: Sequence[bool]) -> list[int]:
    """Which row is where once the ended ones are removed: the last ones fill the gaps, so that few rows move.

    [kept, ended, kept, kept] gives [0, 3, 2].
    """
    count = sum(alive)
    movers = iter([row for row in range(count, len(alive)) if alive[row]])
    return [row if alive[row] else next(movers) for row in range(count)]


def _choose(logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_p: float = 1.0) -> Tensor:
    """The likeliest token at temperature 0, else the first whose cumulative probability exceeds the uniform, (B,)."""
    if temperature == 0:
        best_B = logits_BV.max(-1)
        _check_finite(best_B.values)
        return best_B.indices
    # float(): the division is what rounds, and softmax subtracts the largest logit before it can overflow
    shares_BV = torch.softmax(logits_BV.float() / max(temperature, COLDEST), -1)
    _check_finite(shares_BV[:, 0])
    return _inverse(_nucleus(shares_BV, top_p) if top_p < 1 else shares_BV, uniforms_B)


def _inverse(shares_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Where the running sum of the shares passes the uniform times their total, (B,): never at a share of zero.

    One running sum over 49,152 fp32 shares loses the tail; sums of blocks, then one block, keep it and are quicker.
    """
    rows = torch.arange(len(shares_BV), device=shares_BV.device)
    blocks = pad(shares_BV, (0, -shares_BV.shape[1] % BLOCK)).view(len(shares_BV), -1, BLOCK)
    block_B, uniforms_B = _pass(blocks.sum(-1), uniforms_B)
    place_B, _ = _pass(blocks[rows, block_B], uniforms_B)
    return block_B * BLOCK + place_B


def _pass(weights_BN: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """The place where the running sum passes the uniform, and how far into that place's weight, from 0 to 1: (B,)
    each."""
    running_BN = weights_BN.double().cumsum(-1)
    target_B = torch.minimum(uniforms_B * running_BN[:, -1], running_BN[:, -1].nextafter(running_BN.new_zeros(())))
    place_B1 = (running_BN <= target_B[:, None]).sum(-1, keepdim=True)
    weight_B = weights_BN.gather(1, place_B1)[:, 0].double()
    before_B = running_BN.gather(1, place_B1)[:, 0] - weight_B
    return place_B1[:, 0], ((target_B - before_B) / weight_B).clamp(0, 1)


def _nucleus(shares_BV: Tensor, top_p: float) -> Tensor:
    """The nucleus: the fewest likeliest tokens with a share of `top_p` (Holtzman et al. 2019); the others at zero."""
    ordered = shares_BV.sort(-1, descending=True)
    outside_BV = ordered.values.cumsum(-1) - ordered.values >= top_p
    return shares_BV.masked_fill(outside_BV.scatter(-1, ordered.indices, outside_BV), 0)


def _check_finite(values_B: Tensor) -> None:
    if not bool(torch.isfinite(values_B).all()):
        raise NonFiniteError(
            "the model's logits are not finite", hint="a diverged adapter, or a dtype too small for it"
        )


class _CacheLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of the rows still being written, in buffers with room at the end: (B, heads, W, head size).

    Every layer keeps all columns, windowed ones too: transformers puts the window into the mask by column.
    """

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the new columns; all of them so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [states[:, :, :0] for states in (key_states, value_states)]
        start, self.columns = self.columns, self.columns + key_states.shape[2]
        if self.columns > self.buffers[0].shape[2]:
            self.buffers = [self._roomier(buffer, start) for buffer in self.buffers]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self.columns] = states
        self.keys, self.values = (buffer[:, :, : self.columns] for buffer in self.buffers)
        return self.keys, self.values

    def keep(self, order: list[int]) -> None:
        """Row `order[i]` becomes row i: only those that are not there already are copied, then the end is cut off."""
        moved = [place for place, row in enumerate(order) if place != row]
        with torch.inference_mode():
            for buffer in self.buffers:
                buffer[moved, :, : self.columns] = buffer[[order[place] for place in moved], :, : self.columns]
            self.buffers = [buffer[: len(order)] for buffer in self.buffers]
            self.keys, self.values = (buffer[:, :, : self.columns] for buffer in self.buffers)

    def _roomier(self, buffer: Tensor, filled: int) -> Tensor:
        rows, heads, _, size = buffer.shape
        roomier = buffer.new_empty(rows, heads, self.columns + GROWTH, size)
        roomier[:, :, :filled] = buffer[:, :, :filled]
        return roomier
