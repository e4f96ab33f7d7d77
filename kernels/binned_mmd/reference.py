"""The sum of MMD² over pairs of bins in eager PyTorch: the contract of all backends, and what runs where none is built.

Rows come sorted by group, then by bin, so that the coefficient c_ij of k(x_i, x_j) in the sum follows from the place
of j: `same[i]` inside of i's bin, −2 alpha[i] alpha[j] elsewhere in its group, 0 outside. The diagonal is left out. All
of c is known before a row is read, so the gradient comes from the same pass as the value:

    value = Σ_{i≠j} c_ij k_ij,   k_ij = mean_h e^{−rates[h] |x_i − x_j|²}
    grad_i = −4 Σ_j w_ij (x_i − x_j),   w_ij = c_ij mean_h rates[h] e^{−rates[h] |x_i − x_j|²}

Rows of one number take `line`; longer ones matmuls over square tiles of pairs of rows, one triangle of them, with
`weigh` in between. Backends bring their own `line` and `weigh`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PAIRS = 1 << 19  # of a strip of `line`: 2 MiB of fp32
LONG = 64.0  # squared length times rate (0.3 by the median heuristic) from which on fp32 loses over 1e-5 of a kernel


def _coefficients(ranges: Tensor, alpha: Tensor, same: Tensor, rows: slice, columns: slice) -> Tensor:
    column = torch.arange(alpha.size(0), device=alpha.device)
    bin_first, bin_end, group_first, group_end = ranges[:, rows, None]
    j = column[columns]
    c = (-2 * alpha[rows, None] * alpha[columns]).where((j >= group_first) & (j < group_end), 0)
    c = torch.where((j >= bin_first) & (j < bin_end), same[rows, None], c)
    return c.where(column[rows, None] != j, 0)


def _kernels(squares: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """k and mean_h rates[h] e^{−rates[h] |x_i − x_j|²} of squared distances."""
    kernels = slopes = torch.zeros_like(squares)
    for rate in rates.unbind():
        kernel = torch.exp(-rate * squares)
        kernels, slopes = kernels + kernel, slopes + rate * kernel
    return kernels / rates.size(0), slopes / rates.size(0)


def line(
    x: Tensor, ranges: Tensor, alpha: Tensor, same: Tensor, rates: Tensor, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Value in fp64 and gradient of rows x (N,) of one number."""
    value = x.new_zeros((), dtype=torch.float64)
    grad = torch.empty_like(x) if need_grad else x.new_empty(0)
    strip = max(1, PAIRS // x.size(0))
    for first in range(0, x.size(0), strip):
        rows = slice(first, first + strip)
        gaps = x[rows, None] - x
        kernels, slopes = _kernels(gaps * gaps, rates)
        c = _coefficients(ranges, alpha, same, rows, slice(None))
        value += (c * kernels).sum(dtype=torch.float64)
        if need_grad:
            grad[rows] = -4 * (c * slopes * gaps).sum(1)
    return value, grad


def weigh(
    dots: Tensor, squares: Tensor, ranges: Tensor, alpha: Tensor, same: Tensor, rates: Tensor, row: int, column: int
) -> Tensor:
    """A tile's share of the value, in fp64; its dots x_i·x_j, those of rows from `row` and `column` on, become w_ij."""
    rows, columns = slice(row, row + dots.size(0)), slice(column, column + dots.size(1))
    kernels, slopes = _kernels((squares[rows, None] + squares[columns] - 2 * dots).clamp(min=0), rates)
    c = _coefficients(ranges, alpha, same, rows, columns)
    torch.mul(c, slopes, out=dots)
    return (c * kernels).sum(dtype=torch.float64)


def cancels(squares: Tensor, rates: Tensor) -> bool:
    """Whether |x_i|² + |x_j|² − 2 x_i·x_j loses too much, of rows of these squared lengths about their mean.

    A kernel's exponent is off by about eps times squared length times rate: by much among rows many bandwidths from the
    mean, which are all of them where a few far away move it. A GPU is waited for; while a graph is captured nothing can
    be read of it, and the answer is that it may be.
    """
    if squares.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    exact = squares.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    return bool(squares.amax() * rates.amax() > (LONG if exact else 1))  # at 1 kernels have the products' own eps


def forward(
    x: Tensor,
    ranges: Tensor,
    alpha: Tensor,
    same: Tensor,
    rates: Tensor,
    need_grad: bool,
    line: Callable = line,
    weigh: Callable = weigh,
) -> tuple[Tensor, Tensor]:
    """Value () in fp64, and the gradient in x (N, f), or an empty tensor where it is not needed.

    ranges int64 (4, N): first and end of each row's bin, first and end of its group; alpha, same (N,); rates (H,).
    """
    if x.size(1) == 1:
        value, grad = line(x[:, 0].contiguous(), ranges, alpha, same, rates, need_grad)
        return value, grad[:, None] if need_grad else grad
    centred = x - x.mean(0)
    squares = centred.square().sum(1)
    wide = cancels(squares, rates)
    if wide:  # in fp64, about the median, which a few rows far away do not move (`median` itself is not deterministic)
        centred = x.double() - x.sort(0).values[x.size(0) // 2]
        squares = centred.square().sum(1)
    value = x.new_zeros((), dtype=torch.float64)
    # Rows of a tile: 1 MiB of pairs in fp32 (a core's L2), or on a GPU few launches.
    tile = 512 if x.device.type == "cpu" else 4096
    ones = torch.nn.functional.pad(centred, (0, 1), value=1)  # the column that sums w
    products = torch.zeros_like(ones)
    lengths = x.new_zeros(x.size(0)) if wide else squares  # as `weigh` is given them
    for i in range(0, x.size(0), tile):
        for j in range(i, x.size(0), tile):
            w = centred[i : i + tile] @ centred[j : j + tile].T
            if wide:  # with lengths of 0, −|x_i − x_j|² / 2 stands for x_i·x_j
                w = (w - squares[i : i + tile, None] / 2 - squares[j : j + tile] / 2).to(x.dtype)
            value += (1 if i == j else 2) * weigh(w, lengths, ranges, alpha, same, rates, i, j)
            if need_grad:
                w = w.to(products.dtype)
                products[i : i + tile].addmm_(w, ones[j : j + tile])
                if i != j:
                    products[j : j + tile].addmm_(w.T, ones[i : i + tile])
    if not need_grad:
        return value, x.new_empty(0)
    return value, (4 * (products[:, :-1] - products[:, -1:] * centred)).to(x.dtype)
