"""Losses of reward models: values that cohere over tokens (TCRM), rewards free of a spurious factor (CRM)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from rmfast.arguments import flag, number, shown, whole, word
from rmfast.ops import binned_mmd as _binned_mmd
from rmfast.ops import reward_head, tcrm
from rmfast.ops._library import FLOATS, expect, expect_dtype, readable

REDUCTIONS = ("sum", "mean")


def tcrm_loss(
    values_chosen: Tensor,
    values_rejected: Tensor,
    cu_seqlens_chosen: Tensor,
    cu_seqlens_rejected: Tensor,
    *,
    smooth: float = 0.1,
    lookahead: float = 0.01,
    reduction: str = "sum",
    response_start: tuple[Tensor, Tensor] | None = None,
    margin: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of temporally coherent reward modelling (TCRM, arXiv 2604.22981), over B pairs of responses.

    A reward model's value at any token is trained to be the conditional expectation of the final reward. With r_k the
    values at a response's tokens 0 .. K and SG the stop-gradient, a pair's loss is

        L_BT + smooth · (L_sm of chosen + of rejected) + lookahead · (L_LA of chosen + of rejected)
        L_BT = −log σ(r_K chosen − r_K rejected − margin)
        L_sm = Σ_{k=1..K} (r_{k−1} − SG[r_k])²
        L_LA = Σ_{k<K} (r_k − SG[r_K])²

    and the result the mean over pairs. So a final value gets its gradient from L_BT alone, any other one from the
    token behind it and from the final one. A response of one token has L_BT only.

    One pass over the values forward and one backward, with nothing kept between them but the values.

    Args:
        values_chosen: the head's output at every token: (N,), all chosen texts one behind the other, or (B, T), padded.
            float64, float32, bfloat16 or float16. What lies outside of responses is not read, and its gradient is 0.
        values_rejected: the same for the rejected texts, in the order of their pairs; its N or T may differ.
        cu_seqlens_chosen: for values (N,): int32 or int64 (B + 1,): 0, then the texts' ends, the last of them N.
            For values (B, T): bool (B, T), True at the text's tokens (or only at the response's). Padding may lie left
            or right, or on both sides; there are no holes.
        cu_seqlens_rejected: the same for the rejected texts.
        smooth: weight of L_sm, at least 0; the paper's is 0.1.
        lookahead: weight of L_LA, at least 0; the paper's is 0.01.
        reduction: of L_sm and L_LA over the K terms of a response: "sum", as the paper writes them, or "mean".
        response_start: int32 or int64 (B,) for chosen and for rejected: the index of a response's first token in its
            text. None: every token of a text belongs to the response.
        margin: (B,), any of the dtypes of values, or None for 0.

    Returns:
        The loss, in float32 (float64 for float64 values), differentiable once in both values; and its three terms
        before their weights, detached: "bradley_terry", "smoothness" and "lookahead", means over pairs.

        A NaN at any token of a response makes the loss NaN, and the gradients in its own pair that depend on it.

    Raises:
        ValueError: a shape, device or weight that does not fit, or no pairs; cu_seqlens that fall or don't end at N, a
            mask with holes, a response without tokens (on CUDA these give a NaN loss instead, unless RMFAST_CHECK=1);
            a margin that requires grad.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
        rmfast.BackendError: a backend asked for by name cannot run.
    """
    starts = (None, None) if response_start is None else _two(response_start, "response_start", "(chosen, rejected)")
    sides: list[Tensor] = []
    for side, values, cu_seqlens, start in (
        ("chosen", values_chosen, cu_seqlens_chosen, starts[0]),
        ("rejected", values_rejected, cu_seqlens_rejected, starts[1]),
    ):
        name = f"values_{side}"
        expect_tensor(values, name)
        expect_dtype(values.dtype in FLOATS, name, "float64, float32, bfloat16 or float16", values.dtype)
        expect_dtype(
            values.dtype == values_chosen.dtype, name, f"{values_chosen.dtype}, as values_chosen", values.dtype
        )
        expect(values.dim() in (1, 2), name, "of shape (N,) or (B, T)", tuple(values.shape))
        names = f"cu_seqlens_{side}", f"response_start of {side}"
        sides += _ranges(values.shape, cu_seqlens, start, names, values)
    pairs, others = sides[0].size(0), sides[2].size(0)
    if pairs != others:
        raise ValueError(f"Expected as many rejected texts as chosen ones, {pairs}, got {others}")
    return _loss(
        values_chosen.reshape(-1), values_rejected.reshape(-1), torch.stack(sides), smooth, lookahead, reduction, margin
    )


def linear_value_loss(
    hidden: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    smooth: float = 0.1,
    lookahead: float = 0.01,
    reduction: str = "sum",
    response_start: Tensor | None = None,
    margin: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`tcrm_loss` of a linear head, straight from the last hidden states: norm, head and loss.

    Reads `hidden` once forward and once backward (`rmfast.ops.reward_head`), and writes no normalised copy: beyond
    the gradients it needs a few numbers for each token, and for the head 64 partial sums of d.

    Args:
        hidden: the residual stream before the final norm, the B chosen texts first, then the B rejected ones in the
            same order, as trainers put both into one batch: (N, d), one text behind the other, or (2 B, T, d), padded;
            float64, float32, bfloat16 or float16.
        weight: (1, d) or (d,), the value head; any of these dtypes, as all floating arguments below.
        cu_seqlens: for hidden (N, d): int32 or int64 (2 B + 1,): 0, then the texts' ends, the last of them N. For
            hidden (2 B, T, d): bool (2 B, T), as for `tcrm_loss`.
        bias: (1,) or None.
        norm: None, "rms", "gemma_rms" or "layer", as for `rmfast.ops.reward_head`, like the next three.
        norm_weight: (d,) or None.
        norm_bias: (d,) or None.
        eps: above 0.
        smooth: as for `tcrm_loss`, like the next two.
        lookahead: at least 0.
        reduction: "sum" or "mean".
        response_start: int32 or int64 (2 B,): the index of a response's first token in its text, or None.
        margin: (B,) or None.

    Returns:
        As `tcrm_loss`; differentiable once in hidden, weight, bias, norm_weight and norm_bias. hidden is read at
        padding and outside of responses as well, where it should be finite: a NaN there makes the gradients of the
        head NaN.

    Raises:
        ValueError: an odd number of texts, more than one head, or what `tcrm_loss` and `rmfast.ops.reward_head` refuse.
    """
    expect_tensor(hidden, "hidden")
    expect_tensor(weight, "weight")
    expect(hidden.dim() in (2, 3), "hidden", "of shape (N, d) or (2 B, T, d)", tuple(hidden.shape))
    d = hidden.size(-1)
    expect(tuple(weight.shape) in ((1, d), (d,)), "weight", f"of shape (1, {d}) or ({d},)", tuple(weight.shape))
    first, end = _ranges(hidden.shape[:-1], cu_seqlens, response_start, ("cu_seqlens", "response_start"), hidden)
    texts = first.size(0)
    expect(texts % 2 == 0, "cu_seqlens", "of an even number of texts, chosen and rejected", texts)
    values = reward_head(
        hidden, weight.reshape(1, d), bias, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps
    ).reshape(-1)
    half = texts // 2
    bounds = torch.stack((first[:half], end[:half], first[half:], end[half:]))
    return _loss(values, values, bounds, smooth, lookahead, reduction, margin)


def binned_mmd(
    x: Tensor,
    bins: Tensor,
    *,
    kernel: str = "rbf",
    bandwidth: str | float | Sequence[float] = "median",
    unbiased: bool = False,
    groups: Tensor | None = None,
    gather: bool | dist.ProcessGroup = False,
) -> Tensor:
    """How much the distribution of x differs between bins: Σ_{m,m'} MMD²(m, m') over all ordered pairs of M bins.

    The regulariser of causal reward modelling (CRM, arXiv 2501.09620): rewards that must not change with a spurious
    factor Z (length, sycophancy, a group) have the same distribution whatever Z is. Add λ times this to the loss, with
    `bins = bin_factor(z, M)`. With k the kernel and A_mm' its mean over pairs of a row of bin m and one of bin m',

        Σ_{m,m'} MMD² = Σ_{m,m'} (A_mm + A_m'm' − 2 A_mm') = 2 M Σ_m A_mm − 2 Σ_{m,m'} A_mm'

    Value and gradient come from one pass over tiles of pairs of rows; the kernel matrix is never stored: memory is
    O(N f). Products of representations many bandwidths apart are in float64; a GPU is waited for to tell.

    Args:
        x: rewards (N,) or representations (N, f); float64, float32, bfloat16 or float16.
        bins: int64 (N,), the bin of each row; any number names a bin. M counts the bins that occur.
        kernel: "rbf", e^{−|a − b|² / (2 h²)}.
        bandwidth: h. A number; several, for the mean of their kernels; or "median", the median of the distances between
            at most 512 rows, spread evenly over x (no randomness, and no gradient through it).
        unbiased: A_mm leaves out a row's pair with itself and divides by n (n − 1), and bins of a single row take no
            part; MMD² of a bin with itself is 0, as it is when biased.
        groups: int64 (N,) or None: the conditional form, the sum over groups of the form inside each, as for chosen and
            rejected responses separately. M is then each group's own.
        gather: True takes the rows of all ranks of torch.distributed's default group together (or a process group:
            of its ranks), which may differ in N. Every rank gets the value over all rows, and for its own rows the
            gradient times the number of ranks, as from `torch.distributed.nn.all_gather` where all ranks scale the
            value alike: the mean that DistributedDataParallel takes over ranks is then the value's gradient.

    Returns:
        The sum (), in float32 (float64 for float64 x), differentiable once in x. 0 where fewer than two bins take part.
        The unbiased one may be negative. A NaN in x makes it NaN.

    Raises:
        ValueError: a shape, device, kernel or bandwidth that does not fit; no rows; gather without torch.distributed.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
        rmfast.BackendError: a backend asked for by name cannot run.
    """
    expect_tensor(x, "x")
    expect(x.dim() in (1, 2), "x", "of shape (N,) or (N, f)", tuple(x.shape))
    for name, index in (("bins", bins), *([] if groups is None else [("groups", groups)])):
        expect_tensor(index, name, x)
        expect_dtype(index.dtype == torch.int64, name, "torch.int64", index.dtype)
        expect(tuple(index.shape) == (x.size(0),), name, f"of shape ({x.size(0)},)", tuple(index.shape))
    word("kernel", kernel, ("rbf",))
    bandwidths = _bandwidths(bandwidth)
    flag("unbiased", unbiased)
    if not isinstance(gather, bool | dist.ProcessGroup):
        raise TypeError(f"Expected gather to be True, False or a process group, got {shown(gather)}")
    if gather is not False:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("Expected torch.distributed to be initialised for gather, got no process group")
        group = None if gather is True else gather
        x, bins = _gathered(x, group), _gathered(bins, group)
        groups = None if groups is None else _gathered(groups, group)
    return _binned_mmd(x, bins, groups, bandwidths=bandwidths, unbiased=unbiased)


def bin_factor(z: Tensor, n: int) -> Tensor:
    """Quantile bins of a factor, such as response lengths: int64 (N,), 0 .. n − 1, for `binned_mmd`.

    A value's bin is ⌊n · (values below it) / N⌋. So the bins are as equal in size as ties allow: equal values share a
    bin, that of the first of them, and bins may stay empty. A factor of at most n different values, such as a flag, has
    a bin for each of them instead. NaN counts as infinity.

    Args:
        z: (N,), any real dtype, N at least 1.
        n: the number of bins, at least 1.

    Raises:
        ValueError: a shape or n that does not fit.
        TypeError: complex or boolean z, or an argument that is no tensor or no int.
    """
    expect_tensor(z, "z")
    if z.dtype == torch.bool or z.is_complex() or z.is_meta:
        raise TypeError(f"Expected z to have a real dtype, got {z.dtype}")
    expect(z.dim() == 1 and z.size(0) >= 1, "z", "of shape (N,) with N >= 1", tuple(z.shape))
    n = whole("n", n, 1)
    z = z.detach().contiguous()
    if z.is_floating_point():
        z = torch.where(z.isnan(), torch.inf, z)  # bisection is lost beside NaN
    ordered = z.sort().values
    values = ordered.unique_consecutive()
    if values.size(0) <= n:  # quantiles would put a flag that more than half of the rows have into one bin
        return torch.searchsorted(values, z)
    below = torch.searchsorted(ordered, z).clamp(max=z.size(0) - 1)
    return below * n // z.size(0)


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None, center: float | None = None
) -> Tensor:
    """mean(−log σ(r_w − r_l − margin)) + center · mean((r_w + r_l)²), in plain PyTorch.

    Args:
        chosen: rewards r_w of the preferred responses, any shape; float64, float32, bfloat16 or float16.
        rejected: r_l, chosen's shape.
        margin: chosen's shape, a number, or None for 0.
        center: at least 0; keeps rewards near 0 (TRL's `center_rewards_coefficient`). None is 0.

    Returns:
        The loss (), in float32 (float64 for float64 rewards).

    Raises:
        ValueError: a shape or center that does not fit, or no pairs.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
    """
    chosen = wide(chosen, "chosen")
    rejected = wide(rejected, "rejected", chosen)
    expect(chosen.numel() > 0, "chosen", "at least one reward", tuple(chosen.shape))
    expect(rejected.shape == chosen.shape, "rejected", f"of shape {tuple(chosen.shape)}", tuple(rejected.shape))
    gap = chosen - rejected
    if isinstance(margin, Tensor):
        expect(margin.shape == chosen.shape, "margin", f"of shape {tuple(chosen.shape)}", tuple(margin.shape))
        gap = gap - wide(margin, "margin", chosen)
    elif margin is not None:
        gap = gap - number("margin", margin)
    loss = -logsigmoid(gap).mean()
    if center is None:
        return loss
    return loss + number("center", center, 0) * (chosen + rejected).square().mean()


def correlation_penalty(x: Tensor, factor: Tensor) -> Tensor:
    """|Pearson correlation of x and a factor|, the length penalty of ODIN (arXiv 2402.07319), in plain PyTorch.

    0, with a gradient of 0, where either is constant (up to rounding), so it is never NaN for finite input.

    Args:
        x: rewards (N,), N at least 1; float64, float32, bfloat16 or float16. Differentiable.
        factor: (N,), any real dtype.

    Returns:
        The penalty (), in float32 (float64 for float64 x).

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
    """
    x = wide(x, "x")
    expect_tensor(factor, "factor", x)
    expect(x.dim() == 1 and x.size(0) >= 1, "x", "of shape (N,) with N >= 1", tuple(x.shape))
    expect(factor.shape == x.shape, "factor", f"of shape {tuple(x.shape)}", tuple(factor.shape))
    if factor.is_complex():
        raise TypeError(f"Expected factor to have a real dtype, got {factor.dtype}")
    x, x_square, x_constant = _centred(x)
    # In fp64, at unit length: what a factor's numbers are (bytes, seconds since 1970) is not what fp32 holds.
    z, z_square, z_constant = _centred(factor.double())
    z = (z / torch.where(z_constant, 1, z_square).sqrt()).to(x.dtype)
    constant = x_constant | z_constant
    return torch.where(constant, 0, (x * z).sum() / torch.where(constant, 1, x_square).sqrt()).abs()


def _centred(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x − mean, its squared length, and whether that is no more than the rounding of a constant's mean leaves."""
    gap = x - x.mean()
    square = gap.square().sum()
    noise = 4 * torch.finfo(x.dtype).eps * x.detach().abs().max()
    return gap, square, square.detach() <= x.size(0) * noise.square()


def wide(value: Tensor, name: str, like: Tensor | None = None) -> Tensor:
    """A tensor of a supported float dtype, in fp32 at least; TypeError for any other."""
    expect_tensor(value, name, like)
    expect_dtype(value.dtype in FLOATS, name, "float64, float32, bfloat16 or float16", value.dtype)
    return value if value.dtype == torch.float64 else value.float()


def _bandwidths(bandwidth: object) -> tuple[float, ...]:
    if isinstance(bandwidth, str):
        expect(bandwidth == "median", "bandwidth", '"median", a number or several', repr(bandwidth))
        return ()
    several = bandwidth if isinstance(bandwidth, tuple | list) else [bandwidth]
    expect(len(several) >= 1, "bandwidth", '"median", a number or several', bandwidth)
    return tuple(number("bandwidth", h, 0, above=True) for h in several)


class _Gather(torch.autograd.Function):
    """The rows of all ranks. As each computes the same from them, a rank's own gradient needs no communication."""

    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
        rank = dist.get_rank(group)
        before = sum(sizes[:rank])
        ctx.rows, ctx.ranks = slice(before, before + sizes[rank]), len(sizes)
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: x.size(0)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.ranks * grad[ctx.rows], None, None


def _gathered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    size = torch.tensor([x.size(0)], device=x.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    return _Gather.apply(x, [int(size) for size in sizes], group)


def _loss(chosen, rejected, bounds, smooth, lookahead, reduction, margin) -> tuple[Tensor, dict[str, Tensor]]:
    mean = word("reduction", reduction, REDUCTIONS) == "mean"
    loss, terms = tcrm(chosen, rejected, bounds, margin=margin, smooth=smooth, lookahead=lookahead, mean=mean)
    return loss, dict(zip(("bradley_terry", "smoothness", "lookahead"), terms.unbind()))


def _ranges(
    shape: torch.Size, cu_seqlens: Tensor, start: Tensor | None, names: tuple[str, str], like: Tensor
) -> tuple[Tensor, Tensor]:
    """First token and end of each response, int64 (B,), in the flattened tokens of `shape`."""
    name, start_name = names
    expect_tensor(cu_seqlens, name, like)
    first, end = (_masked if len(shape) == 2 else ragged)(shape, cu_seqlens, name)
    if start is None:
        return first, end
    expect_tensor(start, start_name, like)
    _integers(start, start_name)
    texts = first.size(0)
    expect(tuple(start.shape) == (texts,), start_name, f"of shape ({texts},)", tuple(start.shape))
    if readable(start):
        lengths = end - first
        wrong = (start < 0) | (start >= lengths)
        if wrong.any():
            b = int(wrong.int().argmax())
            raise ValueError(
                f"Expected {start_name} to be an index of the text's tokens, got {int(start[b])} for text {b} of "
                f"{int(lengths[b])} tokens"
            )
    # A negative start would reach into the text before; one past the end leaves no token, which the op sees.
    return torch.where(start < 0, -1, first + start), end


def ragged(shape: torch.Size, cu_seqlens: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Where the sequences of flat values start and end, (B,) each, from cu_seqlens."""
    _integers(cu_seqlens, name)
    expect(
        cu_seqlens.dim() == 1 and cu_seqlens.size(0) >= 2,
        name, "of shape (B + 1,) with B >= 1", tuple(cu_seqlens.shape),
    )  # fmt: skip
    if readable(cu_seqlens):
        first, last = cu_seqlens.detach().cpu().numpy()[[0, -1]]  # in NumPy: a tenth of the time of torch's indexing
        expect(first == 0, f"{name}[0]", "0", first)
        expect(last == shape[0], f"{name}[-1]", f"{shape[0]}, the number of tokens", last)
    ends = cu_seqlens.to(torch.int64)
    return ends[:-1], ends[1:]


def _masked(shape: torch.Size, mask: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if mask.dtype != torch.bool:
        raise TypeError(f"Expected {name} to have dtype torch.bool for padded values, got {mask.dtype}")
    expect(mask.shape == shape, name, f"of shape {tuple(shape)}", tuple(mask.shape))
    expect(shape.numel() > 0, name, "of at least one text and token", tuple(shape))
    texts, width = shape
    first = mask.int().argmax(1)
    end = width - mask.int().flip(1).argmax(1)
    count = mask.sum(1)
    if readable(mask):
        for wrong, what in ((count == 0, "no tokens"), (end - first != count, "holes")):
            if wrong.any():
                raise ValueError(
                    f"Expected {name} to be True at one run of tokens in each row, got {what} in row "
                    f"{int(wrong.int().argmax())}"
                )
    row = torch.arange(texts, device=mask.device) * width
    return torch.where(end - first == count, row + first, -1), row + end


def _two(value: object, name: str, what: str) -> tuple:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        got = f"{len(value)} of them" if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"Expected {name} to be a pair {what}, got {got}")
    return tuple(value)


def expect_tensor(value: object, name: str, like: Tensor | None = None) -> None:
    """TypeError for what is no tensor; ValueError for one on another device than `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected {name} to be a torch.Tensor, got {type(value).__name__}")
    if like is not None:
        expect(value.device == like.device, f"{name}.device", f"{like.device}, that of the values", value.device)


def _integers(value: Tensor, name: str) -> None:
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"Expected {name} to have dtype torch.int32 or torch.int64, got {value.dtype}")
