"""Tiny model folders in every quantised format, made by the format's own library.

In `dense/` are the same model with the weights that the library forms of them, in fp32, and in `bfloat16.safetensors`
(float16, float32) those of the quantised layers alone, as products in that precision have them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "awq_folder",
    "change_config",
    "change_tensors",
    "compressed_folder",
    "fp8_folder",
    "int8_folder",
    "nf4_folder",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Made = tuple[dict[str, Tensor], dict[torch.dtype, Tensor]]
"""The tensors of a layer by the end of their names, and the weights that the library forms of them for products in each
of `DTYPES`, (N, K)."""


def nf4_folder(plain: Path, out: Path, *, double: bool, storage: torch.dtype = torch.uint8) -> Path:
    """NF4 by bitsandbytes' CPU wheel, of bf16 weights."""
    from bitsandbytes import functional

    def made(weight_NK: Tensor) -> Made:
        packed, state = functional.quantize_4bit(
            weight_NK.bfloat16(), compress_statistics=double, quant_type="nf4", quant_storage=storage
        )
        parts = {"weight": packed} | {f"weight.{name}": x for name, x in state.as_dict(packed=True).items()}
        # in one row: the CPU's kernel (0.50) takes wrong scales where rows are no whole number of blocks
        state.shape = torch.Size([1, weight_NK.numel()])
        dense = {}
        for dtype in DTYPES:  # what its products are computed with in each
            state.dtype = dtype
            dense[dtype] = functional.dequantize_4bit(packed, state).view(weight_NK.shape)
        return parts, dense

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return _written(plain, out, made, settings | {"bnb_4bit_use_double_quant": double})


def int8_folder(plain: Path, out: Path) -> Path:
    """INT8 by bitsandbytes, of bf16 weights."""
    from bitsandbytes import functional

    def made(weight_NK: Tensor) -> Made:
        values, largest, _ = functional.int8_vectorwise_quant(weight_NK.bfloat16())
        dense = functional.int8_vectorwise_dequant(values, largest)
        parts = {"weight": values, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return parts, {dtype: dense.to(dtype) for dtype in DTYPES}

    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    return _written(plain, out, made, settings)


def awq_folder(plain: Path, out: Path, *, scales: torch.dtype = torch.float16, group_size: int = 32) -> Path:
    """AWQ in the gemm packing, packed and formed by gptqmodel's own functions; in bf16 rounded once from fp32."""
    gptqmodel = _gptqmodel_packing()

    def made(weight_NK: Tensor) -> Made:
        groups = weight_NK.view(len(weight_NK), -1, group_size)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales_NG = ((high - low) / 15).to(scales)
        zeros_NG = (-low / scales_NG.float()).round().clamp(0, 15)
        integers = (groups / scales_NG[..., None].float()).round().add(zeros_NG[..., None]).clamp(0, 15)
        integers_KN, zeros_GN, scales_GN = integers.flatten(1).int().t(), zeros_NG.int().t(), scales_NG.t()
        qweight, qzeros = gptqmodel.pack_awq(integers_KN.contiguous(), zeros_GN.contiguous(), 4)

        def formed(dtype: torch.dtype) -> Tensor:
            dense_KN: Tensor = gptqmodel.dequantize_gemm(qweight, qzeros, scales_GN.to(dtype), 4, group_size)
            return dense_KN.t()

        dense = {dtype: formed(scales).to(dtype) for dtype in DTYPES}
        dense[torch.bfloat16] = formed(torch.float32).bfloat16()
        return {"qweight": qweight, "qzeros": qzeros, "scales": scales_GN}, dense

    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    return _written(plain, out, made, settings)


def compressed_folder(plain: Path, out: Path, **weights: Any) -> Path:
    """compressed-tensors with these arguments of a scheme's weights; its own decompression is in the scales' precision,
    bf16, in which the tiny model is saved."""
    from compressed_tensors.compressors import FloatQuantizationCompressor, PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    args = scheme.weights
    kind = FloatQuantizationCompressor if args.type == "float" else PackedQuantizationCompressor

    def made(weight_NK: Tensor) -> Made:
        weight_NK = weight_NK.bfloat16()
        height, width = _block(weights, weight_NK.shape)
        padded = pad(weight_NK, (0, -weight_NK.shape[1] % width, 0, -weight_NK.shape[0] % height))
        blocks = padded.view(len(padded) // height, height, -1, width)
        scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
        scale = scale.view(-1) if weights["strategy"] == "tensor" else scale
        parts = kind.compress({"weight": weight_NK, "weight_scale": scale, "weight_zero_point": zero}, scheme)
        dense = kind.decompress(parts, scheme)["weight"]
        assert dense.dtype == torch.bfloat16
        return parts, {dtype: dense.to(dtype) for dtype in DTYPES}

    form = "float-quantized" if args.type == "float" else "pack-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return _written(plain, out, made, settings | {"ignore": ["lm_head"], "quantization_status": "compressed"})


def fp8_folder(plain: Path, out: Path, *, block: tuple[int, int], scales: torch.dtype = torch.float32) -> Path:
    """FP8 in blocks as DeepSeek writes it. The formed weight is written out by hand, and is transformers' too where
    blocks divide it."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    height, width = block

    def made(weight_NK: Tensor) -> Made:
        outputs, inputs = weight_NK.shape
        padded = pad(weight_NK, (0, -inputs % width, 0, -outputs % height))
        blocks = padded.view(len(padded) // height, height, -1, width)
        scale = (blocks.abs().amax((1, 3)) / 448).to(scales)
        each = scale.float().repeat_interleave(height, 0).repeat_interleave(width, 1)[:outputs, :inputs]
        values = (weight_NK / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        dense = {dtype: (values.float() * each).to(dtype) for dtype in DTYPES}
        if padded.shape == weight_NK.shape:
            for dtype, formed in dense.items():
                assert torch.equal(formed, Fp8Dequantize(None)._dequantize_one(values, scale, dtype))
        return {"weight": values, "weight_scale_inv": scale}, dense

    settings = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    return _written(plain, out, made, settings | {"fmt": "e4m3"})


def _block(weights: dict[str, Any], shape: torch.Size) -> tuple[int, int]:
    """Outputs and inputs that share a scale."""
    size: list[int] = weights.get("block_structure", [1, weights.get("group_size") or shape[1]])
    return (shape[0], shape[1]) if weights["strategy"] == "tensor" else (size[0], size[1])


def _gptqmodel_packing() -> Any:
    """gptqmodel's module of AWQ's packing, alone: importing gptqmodel takes 5 s, prints and patches other libraries."""
    package = find_spec("gptqmodel")
    assert package is not None and package.origin is not None
    file = Path(package.origin).parent / "quantization" / "awq" / "utils" / "packing_utils.py"
    spec = spec_from_file_location("gptqmodel_packing_utils", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _written(plain: Path, out: Path, made: Callable[[Tensor], Made], settings: dict[str, Any]) -> Path:
    """The model of `plain` with every linear layer but the head as `made` gives it."""
    packed: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    formed: dict[torch.dtype, dict[str, Tensor]] = {dtype: {} for dtype in DTYPES}
    for key, tensor in sorted(load_file(plain / "model.safetensors").items()):
        if key.endswith("_proj.weight"):
            parts, dense = made(tensor.float())
            packed |= {f"{key.removesuffix('weight')}{end}": part.contiguous() for end, part in parts.items()}
            for dtype, weight_NK in dense.items():
                formed[dtype][key] = weight_NK.contiguous()
        else:
            rest[key] = tensor.bfloat16()
    dense_tensors = formed[torch.float32] | {key: tensor.float() for key, tensor in rest.items()}
    changes: dict[str, Any] = {"dtype": "bfloat16", "quantization_config": settings}
    for place, tensors, changed in ((out, packed | rest, changes), (out / "dense", dense_tensors, {})):
        place.mkdir(parents=True)
        for file in plain.iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copy(file, place)
        config = json.loads((plain / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | changed))
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    for dtype, weights in formed.items():
        save_file(weights, out / "dense" / f"{str(dtype).removeprefix('torch.')}.safetensors")
    return out


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Write the folder's tensors again after `change`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    """Change what the folder's config says of its quantisation."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
