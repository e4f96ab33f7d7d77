"""The reward head in Triton: `forward` and `backward` with the contract of `reference.py`.

A row's order of additions depends only on d, K, J and the dtype: launch configurations are functions of those alone
(never of the number of rows, and there is no autotuning), products are fused where the code says `fma` and nowhere
else (`enable_fp_fusion=False`), and rows are read with the vector width that d allows. Layouts, and with them the
order of a reduction, follow that width, so rows that are not aligned to it are first copied to where they are.

    forward     K + J <= 6   triton_few.py             one read of the rows at the speed of the read; 8 in 32 bits;
                                                       J counts as the power of 2 from it on
                more         triton_many.py            a skinny GEMM on the tensor cores
                             triton_prepare.py before it, and before interventions: triton_intervene.py on the dots
    backward    K d small    triton_backward_fused.py  one read of the rows, kept in registers
                else         triton_backward_split.py  the rows' gradient, then that of the dots, by GEMMs
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rmfast.kernels.launch import aligned, on_device

from .triton_backward_fused import backward_fused, fused_backward_config
from .triton_backward_split import backward_split
from .triton_few import few
from .triton_fma import few_dots, padded
from .triton_intervene import intervene
from .triton_many import many
from .triton_prepare import prepare
from .triton_rows import Rows, accumulation


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    rows: Tensor | None,
    directions: Tensor | None,
    strengths: Tensor | None,
    targets: Tensor | None,
    intervention_index: Tensor | None,
) -> Tensor:
    """Rewards (M, K), or (M, I, K) with interventions and no `intervention_index`.

    A row or intervention index out of range gives NaN for its row. Nothing synchronises with the host. Parameters may
    have any floating dtype and stride: those of one or two heads in 16 bits are read as they are, which saves a launch
    for each.
    """
    is_few = weight.size(0) + padded(0 if directions is None else directions.size(0)) <= few_dots(hidden.dtype)
    acc = accumulation(hidden.dtype)

    def taken(value: Any) -> Any:
        if value is None:
            return None
        # A conversion for each weight and number of a row costs more than it saves from three heads on.
        as_it_is = is_few and weight.size(0) <= 2 and directions is None and value.itemsize == 2
        return aligned((value if as_it_is else value.to(acc)).contiguous())

    with on_device(hidden):
        weight, bias, norm_weight, norm_bias = (taken(value) for value in (weight, bias, norm_weight, norm_bias))
        directions, strengths, targets = taken(directions), taken(strengths), taken(targets)
        intervention_index = aligned(intervention_index)
        read = Rows(hidden, rows)
        if is_few and directions is None:
            return few(read, weight, bias, norm, norm_weight, norm_bias, eps, None)[0]
        prepared = prepare(hidden.dtype, weight, bias, norm, norm_weight, norm_bias, directions, pack=not is_few)
        if is_few:
            out, stats = few(read, weight, bias, norm, norm_weight, norm_bias, eps, directions)
        else:
            out, stats = many(read, prepared, norm, eps, need_stats=directions is not None)
        if directions is None:
            return out
        assert stats is not None and strengths is not None
        return intervene(
            read, out, stats, prepared, weight, norm, norm_weight, eps, directions, strengths, targets,
            intervention_index,
        )  # fmt: skip


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    norm: int,
    norm_weight: Tensor | None,
    eps: float,
    rows: Tensor | None,
    need_rows: bool,
    need_dots: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the rows read, (M, d) in hidden's dtype, and V (K, d); one that is not needed comes back empty.

    V is summed in parts of rows, and the parts in order: no atomics, the same bits every time.
    """
    grad, weight, norm_weight = aligned(grad), aligned(weight), aligned(norm_weight)
    with on_device(hidden):
        read = Rows(hidden, rows)
        config = fused_backward_config(weight.size(1), weight.size(0), hidden.dtype)
        args = grad, read, weight, norm, norm_weight, eps, need_rows, need_dots
        grad_rows, partial = backward_split(*args) if config is None else backward_fused(config, *args)
        return grad_rows, partial.sum(0)
