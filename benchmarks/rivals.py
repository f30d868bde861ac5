"""TRL's DPOTrainer under measurement, tuned: the same weights, pairs, token ids, LoRA and optimizer as ours."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import DPOConfig, DPOTrainer

from dpo_studio.tokens.encode import EncodedPair
from jobs import Job, Rival
from meter import Meter
from shapes import (
    ALPHA,
    GPTQ_BITS,
    GPTQ_ZERO,
    MIXES,
    RANK,
    TARGETS,
    gptq_group,
    mean_unique_tokens,
    random_gptq,
    random_model,
    random_pairs,
    shaped,
    unique_tokens,
)

__all__ = ["AsGiven", "dataset_of", "gptqmodel_linear", "padded_tokens", "run"]

_MEGA_BATCH = 50
"""Batches that transformers' length-grouped sampler sorts at a time in a data set of thousands."""
_FORWARD, _BACKWARD = 2, 2


class AsGiven(DPOTrainer):  # type: ignore[misc]
    """TRL, its hands off the ids."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


def run(job: Job, meter: Meter) -> dict[str, Any]:
    """Train until the meter has seen enough."""
    setting = Rival.named(job.system)
    shape, mix = shaped(job.shape, window=job.window, vocabulary=job.vocabulary), MIXES[job.mix]
    pairs = random_pairs(mix, job.pairs, shape.vocabulary)
    meter.say("making the model")
    batches = batches_of(pairs, setting)
    with tempfile.TemporaryDirectory() as folder:
        trainer = AsGiven(
            model=random_model(shape, meter.device, "sdpa", gptqmodel_linear if setting.gptq else None),
            args=_arguments(setting, folder, mix.max_length, meter.device),
            train_dataset=dataset_of([pair for batch in batches for pair in batch], shape.vocabulary),
            processing_class=_tokenizer(),
            peft_config=LoraConfig(
                r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"
            ),
            callbacks=[_Watch(meter, batches)],
        )
        trainer.remove_callback(PrinterCallback)
        # Set after the start: TRL would hash the 7B weights on the CPU (28 GB in fp32) and make a pass that is not
        # counted. The stand-ins come in the data set, as TRL's own columns.
        trainer.precompute_ref_logps = setting.precomputed
        trainer.train()
    if not meter.counts:
        raise RuntimeError("TRL ended without a step")
    passes = _FORWARD + _BACKWARD + (0 if setting.precomputed else _FORWARD)
    result = meter.result(mean_unique_tokens(pairs), passes * shape.layer_parameters)
    return result | {"setting": str(setting), "first_loss": _first_loss(trainer)}


def gptqmodel_linear(dense: nn.Linear) -> nn.Module:
    """gptqmodel's own layer with the weights of `ours.gptq_linear`, in train mode: otherwise it gives no gradient."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear

    inputs, device = dense.in_features, dense.weight.device
    group = gptq_group(inputs)
    words_NW, scales_NG = random_gptq(dense)
    layer: Any = (TritonV2Linear if device.type == "cuda" else TorchLinear)(
        bits=GPTQ_BITS,
        group_size=group,
        desc_act=False,
        sym=True,
        in_features=inputs,
        out_features=dense.out_features,
        bias=False,
    ).to(device)
    layer.qweight = words_NW.t().contiguous()
    layer.qzeros.fill_(sum(GPTQ_ZERO << at for at in range(0, 32, GPTQ_BITS)) - 2**32)  # as int32
    layer.scales = scales_NG.t().to(dense.weight.dtype).contiguous()
    layer.g_idx = torch.arange(inputs, device=device, dtype=torch.int32) // group
    layer.post_init()
    return layer.train()  # type: ignore[no-any-return]


def batches_of(pairs: Sequence[EncodedPair], setting: Rival) -> list[list[EncodedPair]]:
    """The pairs of each step, whole batches only.

    Grouped, they are transformers' own batches in random order: its sampler goes from long to short for fifty batches,
    and a measurement of fifteen seconds would see the long ones only.
    """
    order = list(range(len(pairs)))
    if setting.grouped:
        lengths = [len(pair.prompt) + max(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in pairs]
        generator = torch.Generator().manual_seed(0)
        order = get_length_grouped_indices(lengths, setting.batch, mega_batch_mult=_MEGA_BATCH, generator=generator)
    starts = list(range(0, len(order) - setting.batch + 1, setting.batch))
    if not starts:
        raise ValueError(f"{len(pairs)} pairs are fewer than a batch of {setting.batch}")
    if setting.grouped:
        random.Random(0).shuffle(starts)
    return [[pairs[place] for place in order[start : start + setting.batch]] for start in starts]


def padded_tokens(batch: Sequence[EncodedPair]) -> int:
    """Tokens the model reads for a batch: two sequences a pair, all as long as the longest."""
    return 2 * len(batch) * max(len(p.prompt) + max(len(p.chosen.ids), len(p.rejected.ids)) for p in batch)


def dataset_of(pairs: Sequence[EncodedPair], vocabulary: int) -> Dataset:
    """The columns that DPOTrainer's collator reads, with stand-ins for the reference: a uniform model's log-probs."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": pair.prompt.tolist(),
                "chosen_ids": pair.chosen.ids.tolist(),
                "rejected_ids": pair.rejected.ids.tolist(),
                "ref_chosen_logps": -len(pair.chosen.ids) * math.log(vocabulary),
                "ref_rejected_logps": -len(pair.rejected.ids) * math.log(vocabulary),
            }
            for pair in pairs
        ]
    )


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Tells the meter of every step, and ends the training when it has seen enough."""

    def __init__(self, meter: Meter, batches: list[list[EncodedPair]]) -> None:
        self.meter, self.batches = meter, batches

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.meter.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        batch = self.batches[(state.global_step - 1) % len(self.batches)]
        if self.meter.note(len(batch), sum(map(unique_tokens, batch)), padded_tokens(batch)):
            control.should_training_stop = True


def _arguments(setting: Rival, folder: str, max_length: int, device: torch.device) -> DPOConfig:
    names = {field.name for field in fields(DPOConfig)}
    # transformers 5.17 knows the old name only; later the new one, when set, wins over TRL's default for the old one
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    arguments = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=setting.batch,
        max_steps=10**6,  # the meter ends it
        max_length=max_length,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        bf16=True,
        use_cpu=device.type == "cpu",
        torch_compile=setting.compiled,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_first_step=True,
        logging_steps=1000,  # none but the first while it is timed; TRL's default is 10
        remove_unused_columns=False,
        **{checkpointing: setting.checkpointing},
    )
    if arguments.gradient_checkpointing != setting.checkpointing:
        raise RuntimeError("this transformers does not do as it was told about checkpointing")
    return arguments


def _tokenizer() -> PreTrainedTokenizerFast:
    """TRL asks for one; it is used for its padding id alone."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(words, special["unk_token"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _first_loss(trainer: DPOTrainer) -> float | None:
    """As logged; ln 2 unless the reference is a stand-in."""
    return next((line["loss"] for line in trainer.state.log_history if "loss" in line), None)
