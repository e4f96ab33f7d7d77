"""The rows that are read: where they lie, as the host sees them and as a kernel does, and the width of their loads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmfast.kernels.launch import aligned


@triton.jit
def row_offsets(p_rows, o_m, M, T, N, stride_b, stride_t, VEC: tl.constexpr, FLAT: tl.constexpr):
    """Where rows o_m (int64) start in hidden, and which of them exist."""
    m_m = o_m < M
    if p_rows is not None:
        o_n = tl.load(p_rows + o_m, mask=m_m, other=0)
        m_m = m_m & (o_n >= 0) & (o_n < N)
    else:
        o_n = o_m
    o_n = tl.where(m_m, o_n, 0)
    stride_b = tl.cast(stride_b, tl.int64)
    stride_t = tl.cast(stride_t, tl.int64)
    if FLAT:
        o_h = o_n * stride_t
    else:
        o_h = (o_n // T) * stride_b + (o_n % T) * stride_t
    if VEC > 1:
        o_h = tl.multiple_of(o_h, VEC)
    return o_h, m_m


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over rows of a dtype, and of rewards."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def vector_width(d: int, dtype: torch.dtype) -> int:
    """Elements in a thread's load of a row: 16 bytes where d is a multiple of that, else 1."""
    width = 16 // dtype.itemsize
    return width if d % width == 0 else 1


class Rows:
    """The rows read, as the kernels take them: every row starts at a multiple of the vector width."""

    def __init__(self, hidden: Tensor, rows: Tensor | None) -> None:
        vec = vector_width(hidden.size(-1), hidden.dtype)
        if vec > 1 and not self._aligned(hidden, vec):
            if rows is None:
                hidden = hidden.clone(memory_format=torch.contiguous_format)
            else:
                inside = (rows >= 0) & (rows < hidden.size(0) * hidden.size(1))
                safe = torch.where(inside, rows, 0)
                hidden = hidden[safe // hidden.size(1), safe % hidden.size(1)][None]
                rows = torch.where(inside, torch.arange(rows.size(0), device=rows.device), -1)
        batch, tokens, self.d = hidden.shape
        stride_b, stride_t = self._strides(hidden)
        self.hidden, self.rows = hidden, aligned(rows)
        self.count = batch * tokens if rows is None else rows.size(0)
        # Without it a row's place costs a 64-bit division.
        self.flat = batch == 1 or stride_b == tokens * stride_t
        self.shape = (self.count, tokens, batch * tokens, stride_b, stride_t)

    @staticmethod
    def _strides(hidden: Tensor) -> tuple[int, int]:
        """Strides of batch and token; that of an axis of one element is put where it does no harm."""
        stride_b, stride_t = hidden.stride(0), hidden.stride(1)
        if hidden.size(1) == 1:
            stride_t = stride_b
        if hidden.size(0) == 1:
            stride_b = hidden.size(1) * stride_t
        return stride_b, stride_t

    @classmethod
    def _aligned(cls, hidden: Tensor, vec: int) -> bool:
        return hidden.data_ptr() % 16 == 0 and all(stride % vec == 0 for stride in cls._strides(hidden))
