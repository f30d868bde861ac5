"""Settings that fit a model, and a child process that gives up: what the person at the keyboard hears of both."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from dpo_studio.errors import ModelError, UsageError
from dpo_studio.export.requantise import (
    Quantising,
    calibration_rows,
    check_gptqmodel,
    file_dtype,
    layer_count,
    quantise,
    resolved,
)
from tests.pairs_of_ids import encoded


def config_folder(folder: Path, hidden: int, intermediate: int, **changes: Any) -> Path:
    """A model's config is all that the settings are resolved by."""
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**(shape | {"num_attention_heads": 1, "head_dim": hidden} | changes))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("hidden", "intermediate", "size"), [(256, 512, 128), (576, 1536, 64), (96, 256, 32), (4096, 14336, 128)]
)
def test_the_group_size_is_the_largest_that_divides_every_layers_inputs(
    hidden: int, intermediate: int, size: int, tmp_path: Path
) -> None:
    """576 = 9 x 64, SmolLM2's hidden size; 96 = 3 x 32."""
    folder = config_folder(tmp_path, hidden, intermediate)
    assert resolved(folder, Quantising()) == Quantising(4, size)
    assert layer_count(folder) == 2


def test_a_group_size_that_does_not_fit_names_the_layer_and_those_that_do(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, 576, 1536)
    with pytest.raises(UsageError, match=r"--group-size 128: model.layers.0.self_attn.q_proj has 576 inputs") as told:
        resolved(folder, Quantising(group_size=128))
    assert "64 or 32 divides" in str(told.value)
    with pytest.raises(UsageError, match=r"--group-size 32: .* has 40 inputs"):
        resolved(config_folder(tmp_path / "odd", 40, 64), Quantising())
    with pytest.raises(UsageError, match="--bits 5"):
        resolved(folder, Quantising(bits=5))


def test_calibration_is_the_prompt_with_its_chosen_answer() -> None:
    assert calibration_rows([encoded([1, 2], [3, 4], [5])]) == [[1, 2, 3, 4]]
    assert json.dumps(calibration_rows([encoded([1], [2], [3])]))  # plain numbers, not numpy's
    assert not isinstance(calibration_rows([encoded([1], [2], [3])])[0][0], np.integer)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
        ({}, torch.float32),
        ({"dtype": "nn"}, torch.float32),
    ],
)
def test_the_precision_of_a_folder(config: dict[str, str], dtype: torch.dtype, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert file_dtype(tmp_path) == dtype


def test_without_gptqmodel_the_hint_is_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="not installed") as told:
        check_gptqmodel()
    assert "pip install -e " in str(told.value) and "[gptq]" in str(told.value)


@pytest.mark.parametrize(
    ("program", "parts"),
    [
        ("import sys; print('x\\nValueError: odd\\n  more', file=sys.stderr); sys.exit(1)", ["ValueError: odd"]),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ["ended by SIGKILL", "was memory short?"]),
        ("import sys; sys.exit(3)", ["ended with 3"]),
    ],
)
def test_a_job_that_gives_up_is_told_of_in_one_line(
    program: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_the_job(monkeypatch, program)
    folder = config_folder(tmp_path / "model", 64, 64)
    (tmp_path / "work").mkdir()
    with pytest.raises(ModelError, match="mine cannot be quantised") as told:
        quantise(folder, tmp_path / "out", [[1]], Quantising(4, 32), tmp_path / "work", name="mine")
    for part in parts:
        assert part in str(told.value)
    assert "Traceback" not in str(told.value)


def test_what_breaks_the_wait_off_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal arrives as an exception; the child is gone before it goes on."""
    instead_of_the_job(monkeypatch, "import time; print('{\"layer\": 0}', flush=True); time.sleep(60)")
    folder = config_folder(tmp_path / "model", 64, 64)
    (tmp_path / "work").mkdir()
    started: list[Any] = []
    whole = subprocess.Popen

    def remembered(*arguments: Any, **more: Any) -> Any:
        started.append(whole(*arguments, **more))
        return started[-1]

    def interrupt(layers: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", remembered)
    with pytest.raises(KeyboardInterrupt):
        quantise(folder, tmp_path / "out", [[1]], Quantising(4, 32), tmp_path / "work", name="m", progress=interrupt)
    assert started[0].returncode == -signal.SIGKILL


def instead_of_the_job(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    whole = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: whole([sys.executable, "-c", program], **more))
