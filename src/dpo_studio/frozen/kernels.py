"""Triton kernels for packed weights: integers to bfloat16 or FP8 near the memory's own rate, activations to FP8.

Each reads what it needs once and writes its result once: a 7B's weights are dequantised in 5 ms on an H200, where its
products over 8,192 tokens take 160. Imported only where there is a GPU; they know tensors, and no kind of weight.

Shapes: N = outputs, K = inputs, W = words of a row, G = groups of inputs, M = rows of activations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["dequantise", "dequantise_nf4", "dequantise_scaled", "fp8_integers", "fp8_rows", "scaled_integers"]

_ROWS, _COLUMNS = 64, 128
_FP8_LARGEST = 448.0
_NF4_TILE = 4096
"""Weights that a program forms."""


def fp8_integers(
    words_NW: Tensor, scales_NG: Tensor, zeros_NG: Tensor, group_K: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """integer - zero point as e4m3, (N, K): at most 15 in size, so exact."""
    return dequantise(words_NW, scales_NG, zeros_NG, group_K, bits, group_size, torch.float8_e4m3fn)


def scaled_integers(integers_NK: Tensor, scales_NG: Tensor, dtype: torch.dtype) -> Tensor:
    """scale x integer in `dtype`, (N, K)."""
    outputs, inputs = integers_NK.shape
    block = inputs // scales_NG.shape[1]
    out_NK = torch.empty(outputs, inputs, dtype=dtype, device=integers_NK.device)
    grid = (inputs // block, triton.cdiv(outputs, _ROWS))
    with torch.cuda.device(out_NK.device):
        _scaled[grid](integers_NK, scales_NG, out_NK, outputs, inputs, _ROWS, block)
    return out_NK


def fp8_rows(x_MK: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Activations as e4m3, (M, K), and their scales, (M, K / block) with rows next to each other in memory."""
    rows, inputs = x_MK.shape
    x8_MK = torch.empty_like(x_MK, dtype=torch.float8_e4m3fn)
    scales_MB = torch.empty(inputs // block, rows, dtype=torch.float32, device=x_MK.device).t()
    grid = (triton.cdiv(rows, _ROWS), inputs // block)
    with torch.cuda.device(x_MK.device):
        _rows_to_fp8[grid](x_MK, x8_MK, scales_MB, rows, inputs, _ROWS, block, _FP8_LARGEST)
    return x8_MK, scales_MB


def dequantise(
    words_NW: Tensor,
    scales_NG: Tensor,
    zeros_NG: Tensor,
    group_K: Tensor | None,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """scale x (integer - zero point) in `dtype`, (N, K); the scale left out if that is e4m3."""
    outputs, inputs = words_NW.shape[0], words_NW.shape[1] * 32 // bits
    out_NK = torch.empty(outputs, inputs, dtype=dtype, device=words_NW.device)
    columns = 128  # or what divides a group, for a tile then has one scale a row
    while group_K is None and group_size % columns:
        columns //= 2
    grid = (triton.cdiv(inputs, columns), triton.cdiv(outputs, _ROWS))
    with torch.cuda.device(out_NK.device):
        _dequantise[grid](
            words_NW,
            scales_NG,
            zeros_NG,
            words_NW if group_K is None else group_K,
            out_NK,
            outputs,
            inputs,
            words_NW.shape[1],
            scales_NG.shape[1],
            group_size,
            bits,
            group_K is not None,
            dtype != torch.float8_e4m3fn,
            _ROWS,
            columns,
            columns * bits // 32,
        )
    return out_NK


@triton.jit  # type: ignore[untyped-decorator]
def _dequantise(  # type: ignore[no-untyped-def]
    words_ptr,
    scales_ptr,
    zeros_ptr,
    group_ptr,
    out_ptr,
    outputs,
    inputs,
    row_words,
    groups,
    group_size,
    BITS: tl.constexpr,
    ACT_ORDER: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """A tile of ROWS outputs x COLUMNS inputs."""
    n = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside_N = n < outputs
    inside = inside_N[:, None] & (k < inputs)[None, :]
    if BITS == 3:  # a field may span two words
        first, shift = k * 3 // 32, k * 3 % 32
        low = tl.load(words_ptr + n[:, None] * row_words + first[None, :], mask=inside, other=0)
        high_inside = inside & (first + 1 < row_words)[None, :]
        high = tl.load(words_ptr + n[:, None] * row_words + first[None, :] + 1, mask=high_inside, other=0)
        low_part = low.to(tl.uint32, bitcast=True) >> shift[None, :].to(tl.uint32)
        left = tl.where(shift > 29, 32 - shift, 0).to(tl.uint32)
        high_part = tl.where(shift[None, :] > 29, high.to(tl.uint32, bitcast=True) << left[None, :], 0)
        integers = ((low_part | high_part) & 7).to(tl.int32)
    else:
        w = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
        some = inside_N[:, None] & (w < row_words)[None, :]
        words = tl.load(words_ptr + n[:, None] * row_words + w[None, :], mask=some, other=0)
        shifts = tl.arange(0, 32 // BITS) * BITS
        fields = (words[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
        integers = tl.reshape(fields, [ROWS, COLUMNS])
    if ACT_ORDER:
        group = tl.load(group_ptr + k, mask=k < inputs, other=0)
        at = n[:, None] * groups + group[None, :]
        scales = tl.load(scales_ptr + at, mask=inside, other=0.0)
        zeros = tl.load(zeros_ptr + at, mask=inside, other=0)
    else:
        at_N = n * groups + (tl.program_id(0) * COLUMNS) // group_size
        scales = tl.load(scales_ptr + at_N, mask=inside_N, other=0.0)[:, None]
        zeros = tl.load(zeros_ptr + at_N, mask=inside_N, other=0)[:, None]
    values = (integers - zeros.to(tl.int32)).to(tl.float32)
    if SCALED:
        values = values * scales.to(tl.float32)
    tl.store(out_ptr + n[:, None] * inputs + k[None, :], values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rows_to_fp8(  # type: ignore[no-untyped-def]
    x_ptr,
    x8_ptr,
    scales_ptr,
    rows,
    inputs,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """ROWS rows of one block of inputs: the largest value of each becomes e4m3's largest."""
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (m < rows)[:, None]
    at = m[:, None] * inputs + k[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale_M = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-12) / LARGEST
    tl.store(x8_ptr + at, (x / scale_M[:, None]).to(x8_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + tl.program_id(1).to(tl.int64) * rows + m, scale_M, mask=m < rows)


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(  # type: ignore[no-untyped-def]
    integers_ptr,
    scales_ptr,
    out_ptr,
    outputs,
    inputs,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A tile of ROWS outputs of one block of inputs."""
    n = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (n < outputs)[:, None]
    at = n[:, None] * inputs + k[None, :]
    integers = tl.load(integers_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale_N = tl.load(scales_ptr + tl.program_id(0).to(tl.int64) * outputs + n, mask=n < outputs, other=0.0)
    tl.store(out_ptr + at, (integers * scale_N[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def dequantise_nf4(
    bytes_P: Tensor,
    levels_16: Tensor,
    scales_B: Tensor,
    doubled: tuple[Tensor, Tensor, Tensor] | None,
    doubled_block: int,
    shape: tuple[int, int],
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    """level x scale in `dtype`, of this shape: two levels a byte, a scale for each `block` of weights.

    `doubled` is what the scales are made of where they are bytes themselves: a scale for each `doubled_block` of them,
    their 256 levels, and what is added.
    """
    out = torch.empty(shape, dtype=dtype, device=bytes_P.device)
    rows = max(1, _NF4_TILE // block)
    grid = (triton.cdiv(len(scales_B), rows),)
    scales_C, levels_256, mean = doubled or (scales_B, scales_B, scales_B)
    with torch.cuda.device(out.device):
        _nf4[grid](
            bytes_P,
            levels_16,
            scales_B,
            scales_C,
            levels_256,
            mean,
            out,
            out.numel(),
            len(scales_B),
            doubled is not None,
            doubled_block,
            block,
            rows,
            enable_fp_fusion=False,  # product and sum of a doubled scale are rounded one after the other
        )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _nf4(  # type: ignore[no-untyped-def]
    bytes_ptr,
    levels_ptr,
    scales_ptr,
    scales_of_scales_ptr,
    levels_of_scales_ptr,
    mean_ptr,
    out_ptr,
    count,
    blocks,
    DOUBLED: tl.constexpr,
    DOUBLED_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """ROWS blocks of BLOCK weights."""
    b = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside_b = b < blocks
    if DOUBLED:
        names = tl.load(scales_ptr + b, mask=inside_b, other=0).to(tl.int32)
        scales = tl.load(scales_of_scales_ptr + b // DOUBLED_BLOCK, mask=inside_b, other=0.0)
        scales = tl.load(levels_of_scales_ptr + names) * scales + tl.load(mean_ptr)
    else:
        scales = tl.load(scales_ptr + b, mask=inside_b, other=0.0)
    at = b[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    two = tl.load(bytes_ptr + at, mask=at < count // 2, other=0).to(tl.int32)
    first = tl.load(levels_ptr + (two >> 4)) * scales[:, None]
    second = tl.load(levels_ptr + (two & 15)) * scales[:, None]
    to = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.interleave(first, second)
    tl.store(out_ptr + to, values.to(out_ptr.dtype.element_ty), mask=to < count)


def dequantise_scaled(
    values_NK: Tensor, scales_RC: Tensor, block: tuple[int, int], factor: float, dtype: torch.dtype
) -> Tensor:
    """scale x value x factor in `dtype`, (N, K): e4m3 or int8, with a scale for each block of outputs and inputs."""
    outputs, inputs = values_NK.shape
    out_NK = torch.empty(outputs, inputs, dtype=dtype, device=values_NK.device)
    grid = (triton.cdiv(inputs, _COLUMNS), triton.cdiv(outputs, _ROWS))
    with torch.cuda.device(out_NK.device):
        _eight_bits[grid](
            values_NK,
            scales_RC,
            out_NK,
            outputs,
            inputs,
            scales_RC.shape[1],
            *block,
            factor,
            factor != 1.0,
            _ROWS,
            _COLUMNS,
        )
    return out_NK


@triton.jit  # type: ignore[untyped-decorator]
def _eight_bits(  # type: ignore[no-untyped-def]
    values_ptr,
    scales_ptr,
    out_ptr,
    outputs,
    inputs,
    column_blocks,
    height,
    width,
    factor,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """A tile of ROWS outputs x COLUMNS inputs."""
    n = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (n < outputs)[:, None] & (k < inputs)[None, :]
    at = n[:, None] * inputs + k[None, :]
    values = tl.load(values_ptr + at, mask=inside).to(tl.float32)  # what is outside is not stored
    scale_at = (n // height)[:, None] * column_blocks + (k // width)[None, :]
    values = values * tl.load(scales_ptr + scale_at, mask=inside, other=0.0).to(tl.float32)
    if FACTOR:
        values = values * factor
    tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=inside)
