"""Whole epochs of a real chat model on real pairs, TRL and ours alternating, median of three: for a CPU.

Counted: every forward, backward and optimizer step of one epoch, the reference's log-probs included. Not counted:
imports, loading, tokenising. Both take steps of four pairs, without gradient checkpointing, in the precision that
`dtype: auto` chooses on this machine: bf16 where its products are fast, else fp32, in which both end sooner.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from peft import LoraConfig
from transformers import PrinterCallback
from trl import DPOConfig

from dpo_studio.config import AdapterSection, ModelSection, SourceSection, TrainingSection
from dpo_studio.learning.reference import reference_logps
from dpo_studio.learning.state import TrainingState
from dpo_studio.learning.train import train
from dpo_studio.models.adapters import as_reference, attach, train_mode
from dpo_studio.models.load import ChatModel, choose_dtype, load_chat_model
from dpo_studio.objectives import DPO
from dpo_studio.policy.policy import Policy
from dpo_studio.preferences.sources import read_pairs
from dpo_studio.tokens.encode import EncodedPair, encode_pairs
from dpo_studio.tokens.pack import Steps, packed_tokens
from rivals import AsGiven, dataset_of

__all__ = ["alternate"]

PAIRS_PER_STEP = 4
TOKENS_PER_MICRO_BATCH = 2048
LEARNING_RATE = 1e-5


def alternate(options: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    """Our pairs/s over TRL's, and every number behind it."""
    _quieten()
    dtype, reason = choose_dtype("auto", torch.device("cpu"))
    precision = str(dtype).removeprefix("torch.")
    print(f"both sides in {precision}: {reason}", flush=True)
    pairs = _pairs(options, precision)
    print(f"{len(pairs)} pairs, {sum(map(packed_tokens, pairs))} packed tokens, {_unshared(pairs)} unshared")
    systems: dict[str, Callable[[Sequence[EncodedPair]], float]] = {
        "trl": lambda some: trl_seconds(options.model, some, options.max_length, precision),
        "ours": lambda some: our_seconds(options.model, some, precision),
    }
    for run in systems.values():
        run(pairs[:PAIRS_PER_STEP])  # warm-up: allocators, thread pools, oneDNN's kernels
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(options.rounds):
        for name, run in systems.items():
            seconds[name].append(run(pairs))
            rate = len(pairs) / seconds[name][-1]
            left = _left(seconds, options.rounds)
            print(f"round {number + 1}  {name:5}{seconds[name][-1]:8.1f} s{rate:8.3f} pairs/s{left}", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["trl"] / medians["ours"]
    return ratio, _record(options, pairs, seconds, ratio) | {"dtype": precision}


def _left(seconds: Mapping[str, Sequence[float]], rounds: int) -> str:
    """How long the rest will take, once each system has run."""
    if not all(seconds.values()):
        return ""
    left = sum((rounds - len(known)) * known[-1] for known in seconds.values())
    return f", about {left:.0f} s left" if left else ""


def trl_seconds(model: str, pairs: Sequence[EncodedPair], max_length: int, precision: str) -> float:
    """One epoch of TRL's DPOTrainer on these ids, in this order."""

    with tempfile.TemporaryDirectory() as folder:
        base = _load(model, precision)
        settings = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PAIRS_PER_STEP,
            num_train_epochs=1,
            max_length=max_length,
            learning_rate=LEARNING_RATE,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=precision == "bfloat16",
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1000,
        )
        trainer = AsGiven(
            model=base.model,
            args=settings,
            train_dataset=dataset_of(pairs, base.model.config.vocab_size),
            processing_class=base.encoder._tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def our_seconds(model: str, pairs: Sequence[EncodedPair], precision: str) -> float:
    """One epoch of ours: the reference's log-probs first, then the steps."""
    base = _load(model, precision)
    policy = attach(base.model, AdapterSection(), seed=0)
    section = TrainingSection(pairs_per_step=PAIRS_PER_STEP, learning_rate=LEARNING_RATE)
    start = time.perf_counter()
    with as_reference(policy):
        reference = reference_logps(policy, pairs, token_budget=TOKENS_PER_MICRO_BATCH, cache=None)
    steps = Steps(
        pairs,
        PAIRS_PER_STEP,
        TOKENS_PER_MICRO_BATCH,
        seed=0,
        epochs=1,
        reference=lambda positions: reference.map(lambda logps_P: logps_P[list(positions)]),
    )
    state = TrainingState.fresh(Policy(policy), section, steps.total)
    train_mode(policy)
    for _ in train(Policy(policy), steps, DPO(), state):
        pass
    return time.perf_counter() - start


def _pairs(options: argparse.Namespace, precision: str) -> list[EncodedPair]:
    source = read_pairs(SourceSection(source=options.source, rows=2 * (options.pairs or 24)))
    encoded = encode_pairs(source.pairs, _load(options.model, precision).encoder, max_length=options.max_length)
    return encoded.pairs[: (options.pairs or 24)]


def _load(model: str, precision: str) -> ChatModel:
    return load_chat_model(ModelSection.model_validate({"path": model, "dtype": precision}))


def _unshared(pairs: Sequence[EncodedPair]) -> int:
    return sum(2 * len(pair.prompt) + len(pair.chosen.ids) + len(pair.rejected.ids) for pair in pairs)


def _record(
    options: argparse.Namespace, pairs: Sequence[EncodedPair], seconds: dict[str, list[float]], ratio: float
) -> dict[str, Any]:
    return {
        "kind": "epochs",
        "ratio": ratio,
        "seconds": seconds,
        "pairs_per_second": {name: len(pairs) / statistics.median(values) for name, values in seconds.items()},
        "pairs": len(pairs),
        "source": options.source,
        "model": options.model,
        "max_length": options.max_length,
        "cpus": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
    }


def _quieten() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
