"""A dense model folder -> a GPTQ one, by gptqmodel in a process of its own (`gptq_job.py`), made fit for publishing.

Calibration is the user's own pairs: each prompt with its chosen answer, as the chat template writes them. Calibrated on
anything else a small model babbles.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_studio.errors import ModelError, UsageError, install_hint
from dpo_studio.export.merge import copy_tokenizer, forget_where_from
from dpo_studio.frozen.formats import read_quantization
from dpo_studio.tokens.encode import EncodedPair

__all__ = ["Quantising", "calibration_rows", "check_gptqmodel", "file_dtype", "layer_count", "quantise", "resolved"]

BITS = (2, 3, 4, 8)
GROUP_SIZES = (128, 64, 32)
"""What `auto` tries: the largest that fits costs the fewest scales."""
_BATCH = 8
"""Calibration rows at once, of like lengths: padding is masked out, and a GPU wants more than one."""
_MSE = 2.4
"""Scales are searched for the least |error|^2.4 of a group rather than set by its largest weight. On the demo run's
merged model, 4 bits in groups of 64: noise of the reward margins 4.1 instead of 6.4, for half as much time again."""
_THREADS = 2
"""gptqmodel 7.6 asks its pool for two workers while it loads, and its own number on a machine of two cores is one."""


@dataclass(frozen=True)
class Quantising:
    """How weights become integers."""

    bits: int = 4
    group_size: int | None = None
    """Inputs that share a scale; None: the largest of 128, 64 and 32 that divides every layer's inputs."""
    desc_act: bool = False
    """Quantise the inputs that matter most first (act-order)."""
    sym: bool = True


def check_gptqmodel() -> None:
    """Before anything long begins.

    Raises:
        ModelError: gptqmodel is not installed.
    """
    if importlib.util.find_spec("gptqmodel") is None:
        raise ModelError("quantising needs gptqmodel, which is not installed", hint=install_hint("gptq"))


def calibration_rows(pairs: Sequence[EncodedPair]) -> list[list[int]]:
    """The ids of every prompt with its chosen answer."""
    return [[*pair.prompt.tolist(), *pair.chosen.ids.tolist()] for pair in pairs]


def resolved(folder: Path, wanted: Quantising) -> Quantising:
    """The settings with a group size that fits every layer of the model.

    Raises:
        UsageError: bits or a group size that GPTQ has not, or that does not fit this model.
    """
    if wanted.bits not in BITS:
        raise UsageError(f"--bits {wanted.bits} is not one of {', '.join(map(str, BITS))}")
    inputs = {layer.in_features: name for name, layer in reversed(_quantised_layers(folder))}  # the first of each size
    fitting = [size for size in GROUP_SIZES if not any(count % size for count in inputs)]
    if wanted.group_size is None and fitting:
        return replace(wanted, group_size=fitting[0])
    size = wanted.group_size or GROUP_SIZES[-1]
    odd = [(name, count) for count, name in inputs.items() if count % size]
    if not odd:
        return wanted
    name, count = odd[-1]
    hint = f"{' or '.join(map(str, fitting))} divides every layer's inputs" if fitting else None
    raise UsageError(f"--group-size {size}: {name} has {count} inputs, which it does not divide", hint=hint)


def layer_count(folder: Path) -> int:
    """Transformer blocks of a model folder: what the progress counts."""
    return int(AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers)


def file_dtype(folder: Path) -> torch.dtype:
    """The precision in which the folder's config says its weights are kept."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch."), None)
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


def _quantised_layers(folder: Path) -> list[tuple[str, nn.Linear]]:
    """Every linear layer but the head, without weights."""
    config = AutoConfig.from_pretrained(folder).get_text_config()
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def quantise(
    model: Path,
    out: Path,
    rows: Sequence[Sequence[int]],
    settings: Quantising,
    work: Path,
    *,
    name: str,
    progress: Callable[[int], None] = lambda layers: None,
) -> None:
    """Quantise the dense model in `model` into `out`, an empty folder; `work` is for what is needed on the way.

    `settings` are `resolved`. The tensors that stay dense keep the source's precision, and its tokenizer its bytes.

    Raises:
        ModelError: gptqmodel gave up, or what it left is not a GPTQ checkpoint.
    """
    kept = file_dtype(model)
    job = {
        "model": str(model),
        "out": str(out),
        "offload": str(work / "offload"),
        "config": asdict(settings) | {"mse": _MSE},
        "dtype": str(kept if torch.cuda.is_available() else torch.float32).removeprefix("torch."),
        "rows": [list(row) for row in rows],
        "batch_size": _BATCH,
    }
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    _run(work, name, progress)
    _tidy(out, model, kept)
    if read_quantization(out) is None or not list(out.glob("*.safetensors")):
        raise ModelError(f"{name}: gptqmodel left no quantised weights")


def _run(work: Path, name: str, progress: Callable[[int], None]) -> None:
    """The job in `work`, in a process that ends with this one."""
    command = [sys.executable, "-m", "dpo_studio.export.gptq_job", str(work / "job.json")]
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "GPTQMODEL_CPU_WORKERS": _workers()}
    with (
        (work / "log").open("w", encoding="utf-8") as log,
        subprocess.Popen(  # noqa: S603 - a fixed argument list
            command,
            cwd=work,  # gptqmodel leaves a folder of logs where it is started
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
        ) as child,
    ):
        try:
            assert child.stdout is not None
            _listen(child.stdout, progress)
            code = child.wait()
        finally:
            child.kill()
    if code != 0:
        raise ModelError(f"{name} cannot be quantised: {_reason(work / 'log', code)}", hint=_hint(code))


def _workers() -> str:
    return os.environ.get("GPTQMODEL_CPU_WORKERS") or str(max(_THREADS, (os.cpu_count() or 1) // 2))


def _listen(events: IO[str], progress: Callable[[int], None]) -> None:
    for line in events:
        if "layer" in json.loads(line):
            progress(1)


def _reason(log: Path, code: int) -> str:
    """The last line of the log that is an exception's, or how the process ended."""
    if code < 0:
        return f"gptqmodel was ended by {signal.Signals(-code).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line[:1].isalpha() and "Error" in line.partition(":")[0]]
    return " ".join((errors or lines or [f"gptqmodel ended with {code}"])[-1].split())[:400]


def _hint(code: int) -> str | None:
    return "was memory short? it needs the dense model twice" if code == -signal.SIGKILL else None


def _tidy(out: Path, source: Path, kept: torch.dtype) -> None:
    """Clean gptqmodel's output for publishing: no paths, no logs, dense tensors in their old precision."""
    (out / "quant_log.csv").unlink(missing_ok=True)
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        wide = [key for key, value in tensors.items() if value.dtype == torch.float32]
        if wide and kept != torch.float32:
            tensors |= {key: tensors[key].to(kept) for key in wide}
            save_file(tensors, file, metadata={"format": "pt"})
    _count_bytes(out)
    name = str(kept).removeprefix("torch.")
    for file in (out / "config.json", out / "quantize_config.json"):
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        quantization = config.get("quantization_config", config)
        for key in ("offload_to_disk", "offload_to_disk_path"):
            quantization.get("meta", {}).pop(key, None)
        if quantization is not config:
            config["dtype"] = name
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for saved in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (out / saved).unlink(missing_ok=True)
    copy_tokenizer(source, out, None)
    forget_where_from(out)


def _count_bytes(out: Path) -> None:
    """Update the index of several files, which has their size in bytes."""
    index = out / "model.safetensors.index.json"
    if not index.is_file():
        return
    content = json.loads(index.read_text(encoding="utf-8"))
    sizes = [value.nbytes for file in out.glob("*.safetensors") for value in load_file(file).values()]
    content["metadata"] = {"total_size": sum(sizes)}
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
