"""Out of GPU memory where no step can be taken again with less: one message and what to do, never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Never

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from dpo_studio.evaluation.reward_model import RewardModel
from dpo_studio.models import folder, load
from dpo_studio.models.adapters import attach_existing
from dpo_studio.workflows import talking
from tests.test_evaluation_models import decoder_folder
from tests.tiny_models import tiny_folder, tiny_model
from tests.tiny_runs import Said, dpo, tiny_rows, write_recipe, write_rows

TORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 112.00 MiB. GPU 0 has a total capacity of 11.99 GiB of which 3.94 MiB is "
    "free. Process 7 has 11.98 GiB memory in use. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


def out_of_memory(*_: Any, **__: Any) -> Never:
    raise torch.OutOfMemoryError(TORCH_SAYS)


def told(said: Said, *parts: str) -> None:
    """Exit 1, one message on stderr with `parts` and a hint; nothing of torch's own advice."""
    assert (said.code, said.out) == (1, ""), said
    assert said.err.count("error: ") == 1 and "  hint: " in said.err
    assert "Traceback" not in said.err and "PYTORCH" not in said.err
    for part in parts:
        assert part in said.err


def test_a_base_that_does_not_fit_is_told_of_by_name_with_the_way_on(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedModel, "to", out_of_memory)
    rows = write_rows(tmp_path / "pairs.jsonl", tiny_rows(2))
    for said in (
        dpo("train", write_recipe(tmp_path / "r.yaml", tiny_base)),
        dpo("score", tiny_base, rows),
        dpo("generate", tiny_base, "--prompt", "a"),
    ):
        told(said, f"{tiny_base} does not fit in the GPU's memory: its weights take 0.0 GiB", "GPTQ", "nvidia-smi")
    reward = decoder_folder(tmp_path / "reward")
    told(dpo("judge", "check", rows, "--judge", f"reward:{reward}"), f"{reward} does not fit in the GPU's memory")


def test_the_size_that_is_told_is_that_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """7,241,732,096 weights of a Mistral 7B in bf16: 14,483,464,192 bytes of 2^30 a GiB."""
    monkeypatch.setattr(PreTrainedModel, "get_memory_footprint", lambda _: 7_241_732_096 * 2)
    monkeypatch.setattr(PreTrainedModel, "to", out_of_memory)
    said = dpo("generate", tiny_folder(tmp_path / "7b"), "--prompt", "a")
    told(said, "its weights take 13.5 GiB")


@pytest.mark.parametrize(("residency", "way_on"), [("packed", "choose a smaller model"), ("bf16", "residency: packed")])
def test_a_quantised_base_that_does_not_fit_is_told_what_takes_less(
    residency: str, way_on: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "read_quantization", lambda _: object())
    monkeypatch.setattr(load, "load_quantised", out_of_memory)
    recipe = write_recipe(tmp_path / "r.yaml", tiny_base, model={"residency": residency})
    said = dpo("train", recipe)
    told(said, f"{tiny_base} does not fit in the GPU's memory", way_on)
    assert ("residency" in said.err) == (residency == "bf16")


def test_running_out_later_is_told_in_torchs_own_numbers(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(talking, "stream", out_of_memory)
    numbers = "CUDA out of memory. Tried to allocate 112.00 MiB. GPU 0 has a total capacity of 11.99 GiB"
    told(dpo("generate", tiny_run, "--prompt", "a"), numbers, "nvidia-smi")
    monkeypatch.setattr(RewardModel, "_read", out_of_memory)
    reward, rows = decoder_folder(tmp_path / "reward"), write_rows(tmp_path / "pairs.jsonl", tiny_rows(2))
    told(dpo("judge", "check", rows, "--judge", f"reward:{reward}"), numbers)


def test_no_room_for_an_adapter_says_nothing_of_another_base(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's error is a RuntimeError, as is that of tensors of the wrong shape."""
    monkeypatch.setattr(PeftModel, "from_pretrained", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        attach_existing(tiny_model(), tiny_run / "adapter", trainable=False)
