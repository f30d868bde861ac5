"""The check before the first step: a run's log-probs are those of the plain model, adapter off and on.

ln 2 at step 0 cannot catch a wrong mask: policy and reference err alike. So the pairs in which an error would show
(`probe_pairs`) are computed as the run computes them and the textbook's way (`plain`), twice: as the reference and as
the policy, with noise in every B, so that an adapter which is not switched off, or not on everywhere, shows too.

Shapes: N = scored tokens of a pair, both answers', the chosen one's first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dpo_studio.errors import ModelError, reason_of
from dpo_studio.frozen.linear import computes_in_fp8
from dpo_studio.learning.adapter_noise import noisy_adapters
from dpo_studio.learning.eager_logps import computes_in_fp32, in_fp32, plain_model, plain_token_logps
from dpo_studio.learning.logprobs import token_logps
from dpo_studio.learning.memory import CPU_TOKEN_BUDGET, too_long_for_memory, unless_out_of_memory
from dpo_studio.learning.neighbours_check import check_neighbours
from dpo_studio.learning.probe_pairs import ProbePair, limits_of, probe_pairs
from dpo_studio.models.adapters import POLICY, REFERENCE, adapter_names, as_reference, in_eval, saved_name
from dpo_studio.models.layers import causal_lm
from dpo_studio.models.layouts import layout_of
from dpo_studio.models.sharding import local
from dpo_studio.preferences.pair import Pair
from dpo_studio.tokens.chat import ChatEncoder
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import micro_batches, tokens_in
from dpo_studio.tokens.scored_text import check_scored

__all__ = ["check_packing"]

_TIMES = 3
"""The limit of a pair's difference, in multiples of the plain model's own rounding, ..."""
_APART = 1e-4
"""... and what is always allowed, in nats a token: fp32 run and plain are 1e-6 to 1e-5 apart."""


@dataclass(frozen=True)
class _Pass:
    """One of the ways in which the run computes, and the state of the plain model that it must equal."""

    name: str
    adapter: str | None
    state: Callable[[nn.Module], AbstractContextManager[None]]


class _Off(NamedTuple):
    """Mean differences in nats a token."""

    difference: float
    """Of the run's log-probs from the plain model's."""
    rounding: float
    """Of the plain model's from its own in fp32."""


def check_packing(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    *,
    texts: Sequence[Pair] = (),
    encoder: ChatEncoder | None = None,
    adapters: Mapping[str, Path] | None = None,
    token_budget: int = CPU_TOKEN_BUDGET,
) -> float:
    """Compare log-probs as the run computes them with the plain model's; return the mean difference a token, in nats.

    `texts` are what the pairs were encoded from by `encoder`, found by `row`: no text of a prompt may be scored.
    `adapters` are the folders that the model's adapters, by name, were loaded from. `token_budget`: tokens of a row.

    Raises:
        ModelError: weights are not finite; an adapter differs from its folder's files; text of a prompt is scored; or a
            pair's log-probs differ by more than three times what this precision explains.
    """
    _check_finite(model)
    for name, folder in (adapters or {}).items():
        _check_loaded(model, name, folder)
    if encoder is not None:
        check_scored(pairs, texts, encoder)
    sample = probe_pairs(pairs, limits_of(model))
    while True:
        found = unless_out_of_memory(model, partial(_compare, model, pairs, sample, token_budget))
        if found is not None:
            _check_switch(model, pairs[sample[0].place], token_budget)
            check_neighbours(model, pairs, _TIMES * found.rounding + _APART)
            return found.difference
        tokens = [tokens_in(layout_of(model), pairs[one.place]) for one in sample]
        if len(sample) == 1:
            raise too_long_for_memory(tokens[0])
        longest = sample[tokens.index(max(tokens))]
        sample.remove(longest)


def _compare(model: nn.Module, pairs: Sequence[EncodedPair], sample: Sequence[ProbePair], token_budget: int) -> _Off:
    chosen = [pairs[one.place] for one in sample]
    off = []
    with torch.no_grad(), in_eval(model), noisy_adapters(model):
        for one in _passes(model):
            with one.state(model), _named(model, "as this run reads it"):
                ours = _packed(model, chosen, token_budget)
            with _named(model, "by transformers alone"):
                own = None if computes_in_fp32(model) else _plain(model, one.adapter, chosen)
                exact = _plain(model, one.adapter, chosen, exact=True)
            off.append(_judge(one.name, sample, chosen, ours, exact, own or exact, model))
    return _Off(max(one.difference for one in off), max(one.rounding for one in off))


@contextmanager
def _named(model: nn.Module, how: str) -> Iterator[None]:
    """Inside, what a model's own code raises is a refusal: no run would get further."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{causal_lm(model).config.model_type} cannot be computed {how} (layout {layout_of(model)}): "
            f"{type(error).__name__}: {reason_of(error)}",
            hint="try model.layout: apart, or model.attention: sdpa; if it stays, please report the model",
        ) from error


def _check_switch(model: nn.Module, pair: EncodedPair, token_budget: int) -> None:
    """Raises ModelError if the reference changes with the policy's adapter.

    What one layer does without its switch can be less than bfloat16 rounds. So nothing is compared with a plain model:
    the same computation with and without noise in the adapter gives the same numbers, as far as a repetition does.
    """
    if POLICY not in adapter_names(model):
        return
    with torch.no_grad(), in_eval(model), as_reference(model):
        (first_N,), (second_N,) = (_packed(model, [pair], token_budget) for _ in range(2))
        with noisy_adapters(model, only=[POLICY]):
            (noisy_N,) = _packed(model, [pair], token_budget)
    by_itself, with_noise = ((first_N - other_N).abs().mean().item() for other_N in (second_N, noisy_N))
    if not with_noise <= _TIMES * by_itself + _APART:
        raise ModelError(
            f"log-probs of the reference change by {with_noise:.3g} nats a token with what is in the policy's adapter "
            f"(row {pair.row}, the adapter off): a layer that is adapted is not switched off",
            hint="please report the model; train without that layer (adapter.targets)",
        )


def _passes(model: nn.Module) -> list[_Pass]:
    if not (names := adapter_names(model)):
        return [_Pass("", None, lambda _: nullcontext())]
    reference = REFERENCE if REFERENCE in names else None
    named = "the reference's adapter on" if reference else "the adapter off"
    return [
        _Pass(f", {named}", reference, as_reference),
        _Pass(", the adapter on", POLICY, lambda _: nullcontext()),
    ]


def _packed(model: nn.Module, pairs: Sequence[EncodedPair], token_budget: int) -> list[Tensor]:
    """Each pair's log-probs (N,), from rows packed as in a run."""
    found: dict[int, Tensor] = {}
    device = causal_lm(model).device
    for batch in micro_batches(pairs, range(len(pairs)), token_budget, layout=layout_of(model)):
        by_answer = torch.split(token_logps(model, batch.to(device)).cpu(), batch.tokens_A.tolist())
        for place, chosen, rejected in zip(batch.pairs, by_answer[0::2], by_answer[1::2], strict=True):
            found[place] = torch.cat([chosen, rejected])
    return [found[place] for place in range(len(pairs))]


def _plain(model: nn.Module, adapter: str | None, pairs: Sequence[EncodedPair], *, exact: bool = False) -> list[Tensor]:
    """Each pair's log-probs (N,) the textbook's way, `exact` in fp32."""
    with ExitStack() as states:
        states.enter_context(plain_model(model, adapter))
        if exact:
            states.enter_context(in_fp32(model))
        return [
            torch.cat(
                [plain_token_logps(model, pair.prompt.tolist(), answer) for answer in (pair.chosen, pair.rejected)]
            ).cpu()
            for pair in pairs
        ]


def _judge(
    name: str,
    sample: Sequence[ProbePair],
    pairs: Sequence[EncodedPair],
    ours: Sequence[Tensor],
    exact: Sequence[Tensor],
    own: Sequence[Tensor],
    model: nn.Module,
) -> _Off:
    """The mean difference of all tokens; raises ModelError for the first pair whose own is too large.

    What the precision explains is the plain model's distance from fp32 on that pair or on all of them, whichever is
    larger: that of a pair with two answer tokens is sometimes close to zero by chance.
    """
    rounding = (torch.cat(list(own)) - torch.cat(list(exact))).abs().mean().item()
    for one, pair, ours_N, exact_N, own_N in zip(sample, pairs, ours, exact, own, strict=True):
        where = f"on {one.why} (row {pair.row}{name})"
        if len(ours_N) != len(exact_N):
            raise ModelError(f"{len(ours_N)} tokens are scored {where}, whose answers have {len(exact_N)}")
        difference = (ours_N - exact_N).abs().mean().item()
        explained = max((own_N - exact_N).abs().mean().item(), rounding)
        if not difference <= _TIMES * explained + _APART:
            precision = "fp8" if computes_in_fp8(model) else str(causal_lm(model).dtype).removeprefix("torch.")
            raise ModelError(
                f"{layout_of(model)} and plain log-probs differ by {difference:.3g} nats a token {where}, where "
                f"{precision} explains {explained:.2g}: this model is computed incorrectly",
                hint="try model.attention: sdpa, or model.layout: apart; if it stays, please report the model",
            )
    return _Off((torch.cat(list(ours)) - torch.cat(list(exact))).abs().mean().item(), rounding)


def _check_finite(model: nn.Module) -> None:
    """Raises ModelError with the name of a tensor that contains NaN or infinity."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            tensor = local(tensor)
            total = tensor.detach().sum(dtype=torch.float32).item()  # no copy, and what is not finite stays so
            if total != total or abs(total) == float("inf"):
                what = "NaN" if tensor.isnan().any() else "infinity"
                raise ModelError(
                    f"the model's own numbers are not finite: tensor {name.replace('.base_layer', '')} has {what}",
                    hint="its files are damaged, or it was saved by a training that had failed: download it again",
                )


def _check_loaded(model: nn.Module, name: str, folder: Path) -> None:
    """Raises ModelError if a tensor of the adapter in memory differs from its file's."""
    tensors = {saved_name(parameter, name): p for parameter, p in model.named_parameters()}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no dict
            saved = file.get_tensor(key)
            mine = tensors.get(key)
            if mine is None or not torch.equal(saved.float(), mine.detach().cpu().float()):
                raise ModelError(
                    f"{folder} was loaded, and {key} is not what its file says",
                    hint="please report this: the adapter in memory is not the one that was saved",
                )
