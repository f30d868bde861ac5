"""gptqmodel's own word on packed weights, in a process of its own: it prints, patches others, takes 5 s to import.

    python -m tests.gptq_oracle layers OUT.safetensors           random layers of every format, packed and dequantised
    python -m tests.gptq_oracle model FOLDER OUT [SETTINGS...]   a model folder with its linears packed by gptqmodel
    python -m tests.gptq_oracle adapter FOLDER ADAPTER SEQUENCES.json OUT.json
                                                                 log-probs by PEFT on the base that gptqmodel loads

A sequence is `[prompt ids, answer ids]`; its log-prob is the sum over the answer.

`SETTINGS` are `bits=4 group_size=32 sym=1 desc_act=0 checkpoint_format=gptq`, defaults as shown.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

__all__ = ["CASES", "case_name", "in_own_process"]

INPUTS, OUTPUTS = 256, 64
CASES: list[dict[str, Any]] = [
    dict(zip(("bits", "group_size", "sym", "desc_act", "checkpoint_format"), values, strict=True))
    for values in product((2, 3, 4, 8), (32, 64, 128, -1), (True, False), (False, True), ("gptq", "gptq_v2"))
]
"""Every format that DPO Studio says it loads."""


def case_name(case: dict[str, Any]) -> str:
    """What a case's tensors are called."""
    return "-".join(str(value) for value in case.values())


def in_own_process(*arguments: object) -> None:
    """Run this script."""
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)} | {"GPTQMODEL_CPU_WORKERS": "2", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.gptq_oracle", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:  # gptqmodel leaves a folder of logs where it is imported
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def main() -> None:
    """Do what the command line says."""
    what, *rest = sys.argv[1:]
    if what == "layers":
        _layers(Path(rest[0]))
    elif what == "adapter":
        _adapter(*map(Path, rest))
    else:
        folder, out, *settings = rest
        _model(Path(folder), Path(out), **_settings(settings))


def _settings(words: list[str]) -> dict[str, Any]:
    given = dict(word.split("=") for word in words)
    numbers = {"bits": 4, "group_size": 32, "sym": 1, "desc_act": 0}
    settings: dict[str, Any] = {name: int(given.get(name, value)) for name, value in numbers.items()}
    settings |= {name: bool(settings[name]) for name in ("sym", "desc_act")}
    return settings | {"checkpoint_format": given.get("checkpoint_format", "gptq")}


def _layers(out: Path) -> None:
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {}
    for case in CASES:
        weight_NK = 0.1 * torch.randn(OUTPUTS, INPUTS, generator=draw)
        if not case["sym"]:
            weight_NK += 0.05  # groups whose zero points are far from the middle
        parts, dense_NK = packed(weight_NK, draw=draw, **case)
        tensors |= {f"{case_name(case)}.{part}": tensor for part, tensor in parts.items()}
        tensors[f"{case_name(case)}.dense"] = dense_NK
    save_file(tensors, out)


def packed(
    weight_NK: Any, *, bits: int, group_size: int, sym: bool, desc_act: bool, checkpoint_format: str, draw: Any
) -> tuple[dict[str, Any], Any]:
    """(gptqmodel's tensors as a checkpoint has them, its dequantised weight in fp16 after reading them back)."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    outputs, inputs = weight_NK.shape
    size = inputs if group_size == -1 else group_size
    order = torch.randperm(inputs, generator=draw) if desc_act else torch.arange(inputs)
    g_idx = torch.empty(inputs, dtype=torch.int32)
    g_idx[order] = (torch.arange(inputs) // size).int()
    top = 2**bits - 1
    groups = [weight_NK[:, g_idx == group] for group in range(-(-inputs // size))]
    low = torch.stack([part.amin(1).clamp(max=0) for part in groups], 1)
    high = torch.stack([part.amax(1).clamp(min=0) for part in groups], 1)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    scales_NG = ((high - low) / top).clamp(min=1e-6)
    zeros_NG = torch.full_like(scales_NG, (top + 1) // 2) if sym else torch.round(-low / scales_NG).clamp(0, top)

    def fresh() -> Any:
        return TorchLinear(
            bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, in_features=inputs, out_features=outputs
        )

    linear = torch.nn.Linear(inputs, outputs, bias=False)
    linear.weight.data = weight_NK.clone()
    layer = fresh()
    layer.pack_original(linear, scales_NG, zeros_NG, g_idx)
    if checkpoint_format == "gptq":
        layer.qzero_format(format=2)
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=group_size))
    parts = {part: getattr(layer, part).clone() for part in ("qweight", "qzeros", "scales", "g_idx")}
    again = fresh()
    for part, tensor in parts.items():
        again.register_buffer(part, tensor.clone())
    if checkpoint_format == "gptq":
        convert_gptq_v1_to_v2_format_module(again, bits, torch.int32)
    again.eval()
    return parts, again.dequantize_weight().t().half().contiguous()


def _model(folder: Path, out: Path, **settings: Any) -> None:
    """The folder's model with every linear but the head packed; in `dense/` the same with dequantised weights."""
    import torch
    from safetensors.torch import load_file, save_file

    draw = torch.Generator().manual_seed(1)
    packed_tensors, dense_tensors = {}, {}
    for key, tensor in sorted(load_file(folder / "model.safetensors").items()):
        if not _is_linear(key):
            packed_tensors[key] = dense_tensors[key] = tensor.half()
            continue
        parts, dense_NK = packed(tensor.float(), draw=draw, **settings)
        prefix = key.removesuffix(".weight")
        packed_tensors |= {f"{prefix}.{part}": value for part, value in parts.items()}
        dense_tensors[key] = dense_NK
    quantization = settings | {
        "quant_method": "gptq",
        "format": settings["checkpoint_format"],
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:7.6.0"]},
    }
    for place, tensors, changes in (
        (out, packed_tensors, {"quantization_config": quantization, "dtype": "float16"}),
        (out / "dense", dense_tensors, {}),
    ):
        place.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if file.is_file() and file.suffix in (".json", ".jinja"):
                shutil.copy(file, place)
        config = json.loads((folder / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | changes))
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


def _adapter(folder: Path, adapter: Path, sequences: Path, out: Path) -> None:
    """Through transformers, gptqmodel's torch kernel (GPTQ's or AWQ's) and PEFT's own layers, one sequence at a time;
    fp32, but for AWQ's products, which are fp16's."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    awq = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    quantization = AwqConfig(bits=4, backend="torch_awq") if awq else GPTQConfig(bits=4, backend="gptq_torch")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)
    model = PeftModel.from_pretrained(base, adapter).eval()
    kinds = {type(module).__name__ for module in model.modules() if "TorchLinear" in type(module).__name__}
    assert kinds, "gptqmodel's layers are not there"
    sums = []
    for prompt, answer in json.loads(sequences.read_text()):
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].float().log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        sums.append(sum(float(logps[place, token]) for place, token in zip(places, answer, strict=True)))
    out.write_text(json.dumps(sums))


def _is_linear(key: str) -> bool:
    return key.endswith("_proj.weight")


if __name__ == "__main__":
    main()
