"""Triton kernels for FP8 with a scale a row: activations and an adapter's columns behind them, read once.

Imported only where there is a GPU. `adapter_columns` says what the columns are.

Shapes: M = rows of activations, K = inputs, N = outputs, R = ranks, r = one layer's, X = K and the columns, E = those,
S = X filled up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["fp8_by_row", "largest_of", "write_columns"]

_LARGEST = 448.0
_ROW_AT_ONCE = 16384
"""Values of a row that one program keeps in registers between finding its largest and rounding them."""
_ROWS = 32
_ALIGNED = 128
"""Bytes: rows of other lengths make the product a fifth slower."""


def fp8_by_row(
    x_MK: Tensor,
    low_MR: Tensor | None = None,
    largest_R: Tensor | None = None,
    width: int = 0,
    *,
    least: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """e4m3, (M, K + width), and the scale of each row, (M,) fp32.

    Behind x stand [high, low, high] of `low_MR`, or zeros without it; `largest_R` is each rank's largest on the other
    side of the product, as `write_columns` gets it.
    """
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    rows, inputs = x_MK.shape
    stride = -(-(inputs + width) // _ALIGNED) * _ALIGNED
    x8_MS = torch.empty(rows, stride, dtype=torch.float8_e4m3fn, device=x_MK.device)
    scales_M = torch.empty(rows, dtype=torch.float32, device=x_MK.device)
    columns = min(triton.next_power_of_2(inputs), _ROW_AT_ONCE)
    rank = 0 if low_MR is None else low_MR.shape[1]
    with torch.cuda.device(x_MK.device):
        _by_row[(rows,)](
            x_MK,
            x8_MS,
            scales_M,
            x_MK if low_MR is None else low_MR,
            scales_M if largest_R is None else largest_R,
            inputs,
            x_MK.stride(0),
            stride,
            0 if low_MR is None else low_MR.stride(0),
            rank,
            width,
            least,
            COLUMNS=columns,
            WHOLE=inputs <= columns,
            RANKS=max(16, triton.next_power_of_2(rank)),
            WIDTH=max(16, triton.next_power_of_2(width)),
            LARGEST=_LARGEST,
            num_warps=max(4, min(16, columns // 1024)),
        )
    return x8_MS[:, : inputs + width], scales_M


def largest_of(up_Nr: Tensor, scales_N: Tensor, out_r: Tensor) -> None:
    """Write the largest of |up / scale| to each of `out_r`, which holds zeros."""
    outputs, rank = up_Nr.shape
    with torch.cuda.device(up_Nr.device):
        _largest[(triton.cdiv(outputs, _ROWS),)](
            up_Nr,
            scales_N,
            out_r,
            outputs,
            rank,
            len(out_r),
            up_Nr.stride(0),
            up_Nr.stride(1),
            ROWS=_ROWS,
            RANKS=triton.next_power_of_2(rank),
            COPIES=triton.next_power_of_2(len(out_r)),
        )


def write_columns(room_NE: Tensor, up_Nr: Tensor, scales_N: Tensor, largest_r: Tensor, first: int, ranks: int) -> None:
    """Write an adapter's columns behind a weight: [high, high, low] of up / scale, zeros for other layers' ranks.

    The layer's ranks begin at `first` of `ranks`; `largest_r` is the largest of up / scale, once for each.
    """
    outputs, width = room_NE.shape
    with torch.cuda.device(room_NE.device):
        _columns[(triton.cdiv(outputs, _ROWS),)](
            room_NE,
            up_Nr,
            scales_N,
            largest_r,
            outputs,
            up_Nr.shape[1],
            up_Nr.stride(0),
            up_Nr.stride(1),
            first,
            ranks,
            width,
            room_NE.stride(0),
            ROWS=_ROWS,
            WIDTH=triton.next_power_of_2(width),
            LARGEST=_LARGEST,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _shift(largest, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The power of two that a side in units of its scales is divided by, and the other multiplied with: half of what
    separates its largest from e4m3's in exponents if that is smaller, all of it if it is larger."""
    exponent = tl.log2(tl.maximum(largest, 1e-30) / LARGEST)
    return tl.exp2(tl.ceil(tl.where(exponent > 0, exponent, 0.5 * exponent)))


@triton.jit  # type: ignore[untyped-decorator]
def _by_row(  # type: ignore[no-untyped-def]
    x_ptr,
    x8_ptr,
    scales_ptr,
    low_ptr,
    largest_ptr,
    inputs,
    row_stride,
    out_stride,
    low_stride,
    rank,
    width,
    least,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """One row: its largest value, the adapter's included, becomes e4m3's largest."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, COLUMNS)
    out_ptr = x8_ptr + m * out_stride
    x = tl.load(x_ptr + m * row_stride + k, mask=k < inputs, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=0)
    if not WHOLE:
        for start in range(COLUMNS, inputs, COLUMNS):
            more = tl.load(x_ptr + m * row_stride + start + k, mask=start + k < inputs, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(more), axis=0))
    r = tl.arange(0, RANKS)
    low = tl.load(low_ptr + m * low_stride + r, mask=r < rank, other=0.0).to(tl.float32)
    low = low * _shift(tl.load(largest_ptr + r, mask=r < rank, other=0.0), LARGEST)
    largest = tl.maximum(largest, tl.max(tl.abs(low), axis=0))
    scale = tl.maximum(largest, least) / LARGEST
    tl.store(scales_ptr + m, scale)
    tl.store(out_ptr + k, (x / scale).to(x8_ptr.dtype.element_ty), mask=k < inputs)
    if not WHOLE:
        for start in range(COLUMNS, inputs, COLUMNS):
            more = tl.load(x_ptr + m * row_stride + start + k, mask=start + k < inputs, other=0.0).to(tl.float32)
            tl.store(out_ptr + start + k, (more / scale).to(x8_ptr.dtype.element_ty), mask=start + k < inputs)
    if width > 0:
        low = low / scale
        high8 = low.to(x8_ptr.dtype.element_ty)
        rest8 = (low - high8.to(tl.float32)).to(x8_ptr.dtype.element_ty)
        tail_ptr = out_ptr + inputs
        tl.store(tail_ptr + r, high8, mask=r < rank)
        tl.store(tail_ptr + rank + r, rest8, mask=r < rank)
        tl.store(tail_ptr + 2 * rank + r, high8, mask=r < rank)
        e = tl.arange(0, WIDTH)
        zeros = tl.zeros((WIDTH,), tl.float32).to(x8_ptr.dtype.element_ty)
        tl.store(tail_ptr + e, zeros, mask=(e >= 3 * rank) & (e < width))


@triton.jit  # type: ignore[untyped-decorator]
def _largest(  # type: ignore[no-untyped-def]
    up_ptr,
    scales_ptr,
    out_ptr,
    outputs,
    rank,
    copies,
    up_stride_n,
    up_stride_r,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COPIES: tl.constexpr,
) -> None:
    """ROWS outputs; a maximum does not depend on the order."""
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    r = tl.arange(0, RANKS)
    inside = (n < outputs)[:, None] & (r < rank)[None, :]
    up = tl.load(up_ptr + n[:, None] * up_stride_n + r[None, :] * up_stride_r, mask=inside, other=0.0).to(tl.float32)
    scale_N = tl.load(scales_ptr + n, mask=n < outputs, other=1.0)
    largest = tl.max(tl.max(tl.abs(up) / scale_N[:, None], axis=1), axis=0)
    copy = tl.arange(0, COPIES)
    tl.atomic_max(out_ptr + copy, tl.zeros((COPIES,), tl.float32) + largest, mask=copy < copies)


@triton.jit  # type: ignore[untyped-decorator]
def _columns(  # type: ignore[no-untyped-def]
    room_ptr,
    up_ptr,
    scales_ptr,
    largest_ptr,
    outputs,
    rank,
    up_stride_n,
    up_stride_r,
    first,
    ranks,
    width,
    row_stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """ROWS outputs: all their columns."""
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    e = tl.arange(0, WIDTH)
    piece, r = e // ranks, e % ranks - first
    inside = (n < outputs)[:, None]
    own = (piece < 3) & (r >= 0) & (r < rank)
    at = n[:, None] * up_stride_n + r[None, :] * up_stride_r
    up = tl.load(up_ptr + at, mask=inside & own[None, :], other=0.0).to(tl.float32)
    scale_N = tl.load(scales_ptr + n, mask=n < outputs, other=1.0)
    value = up / (scale_N[:, None] * _shift(tl.load(largest_ptr), LARGEST))
    high8 = value.to(room_ptr.dtype.element_ty)
    rest8 = (value - high8.to(tl.float32)).to(room_ptr.dtype.element_ty)
    column8 = tl.where((piece == 2)[None, :], rest8.to(tl.float32), high8.to(tl.float32)).to(room_ptr.dtype.element_ty)
    tl.store(room_ptr + n[:, None] * row_stride + e[None, :], column8, mask=inside & (e < width)[None, :])
