"""An adapter's part of an FP8 product, computed by the product itself: no pass over wide outputs.

y = W x + B (A x). Behind the K rounded inputs of a row stand the R values of A x, behind the K weights of an output its
row of B, and one product adds up both. A bf16 value is two e4m3 ones (the rounded one, and what rounding left over), so
that behind x stand [high, low, high] of A x, and behind W [high, high, low] of B: 3 R columns, and the product of the
two low halves, 2^-8 of the whole, is left out. Both sides share their row's scale with x and W. A power of two for
each layer goes from one to the other, so that neither leaves e4m3's range: B begins at zero and grows.

In the backward pass dL/dx = g W + (g B) A in the same way: A stands behind the transposed weight.

Shapes: M = rows, K = inputs, N = outputs, R = ranks of the layers that read one input, r = one layer's, X = columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_studio.frozen.row_scaled import MULTIPLE, ROOM, RowScaled, row_scaled, scaled_product

__all__ = ["input_slopes", "outputs"]


def outputs(
    x_MK: Tensor, weights: Sequence[RowScaled], low_MR: Tensor | None, ups_Nr: Sequence[Tensor]
) -> list[Tensor]:
    """W x + B (A x) of each layer that reads x, (M, N) in x's precision.

    `low_MR` is A x of all layers; None leaves the adapters out, with the bits that a B of zeros gives.
    """
    ranks = [up_Nr.shape[1] for up_Nr in ups_Nr]
    rank = sum(ranks)
    if not _fits(x_MK, rank):
        rounded = row_scaled(x_MK)
        ys = [weight.product(*rounded).to(x_MK.dtype) for weight in weights]
        if low_MR is not None and rank:
            for y_MN, up_Nr, low_Mr in zip(ys, ups_Nr, torch.split(low_MR, ranks, 1), strict=True):
                y_MN.addmm_(low_Mr, up_Nr.t())
        return ys
    from dpo_studio.frozen.kernels_fp8 import fp8_by_row, largest_of, write_columns

    width = _width(rank)
    if low_MR is None:
        rounded = fp8_by_row(x_MK, width=width)
    else:
        largest_R, first = x_MK.new_zeros(rank, dtype=torch.float32), 0
        for weight, up_Nr in zip(weights, ups_Nr, strict=True):
            own = largest_R[first : first + up_Nr.shape[1]]
            largest_of(up_Nr, weight.scales_N, own)
            room_NE = weight.weight_NX[:, x_MK.shape[1] : x_MK.shape[1] + width]
            write_columns(room_NE, up_Nr, weight.scales_N, own, first, rank)
            first += up_Nr.shape[1]
        rounded = fp8_by_row(x_MK, low_MR, largest_R, width)
    return [scaled_product(*rounded, weight.weight_NX, weight.scales_N) for weight in weights]


def input_slopes(
    gradients_MN: Sequence[Tensor], weights: Sequence[RowScaled], slope_MR: Tensor, down_RK: Tensor
) -> Tensor:
    """dL/dx of what these layers read, (M, K): the sum of g W over the layers, and (g B) A of all of them."""
    rank = len(down_RK)
    if not _fits(slope_MR, rank):
        slope_MK = slope_MR @ down_RK
        for gradient_MN, weight in zip(gradients_MN, weights, strict=True):
            slope_MK.add_(weight.input_slope(gradient_MN))
        return slope_MK
    from dpo_studio.frozen.kernels_fp8 import fp8_by_row, largest_of, write_columns

    (gradient_MN, *other_gradients), (weight, *others) = gradients_MN, weights
    width, outputs = _width(rank), weight.shape[0]
    largest_R, up_KR = down_RK.new_zeros(rank, dtype=torch.float32), down_RK.t()
    largest_of(up_KR, weight.scales_K, largest_R)
    room_KE = weight.transposed_KX[:, outputs : outputs + width]
    write_columns(room_KE, up_KR, weight.scales_K, largest_R, 0, rank)
    rounded = fp8_by_row(gradient_MN, slope_MR, largest_R, width)
    slope_MK = scaled_product(*rounded, weight.transposed_KX, weight.scales_K)
    for gradient_MN, weight in zip(other_gradients, others, strict=True):
        slope_MK.add_(weight.input_slope(gradient_MN))
    return slope_MK


def _fits(like: Tensor, rank: int) -> bool:
    return like.is_cuda and 0 < 3 * rank <= ROOM


def _width(rank: int) -> int:
    """Columns of an adapter: three a rank, filled up to what the product wants."""
    return -(-3 * rank // MULTIPLE) * MULTIPLE
