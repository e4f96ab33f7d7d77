"""`topk_encode`: the k largest features of each row under a sparse autoencoder's encoder, without all features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rmfast import backends as _backends
from rmfast.arguments import flag
from rmfast.kernels.topk_encode import reference as _reference
from rmfast.ops._library import (
    FLOATS,
    checked,
    define,
    direct,
    expect,
    expect_dtype,
    expect_no_grad,
    lib,
    native,
    no_gradient,
)

define("topk_encode", "(Tensor x, Tensor weight, Tensor? bias, int k, Tensor? b_dec, bool relu) -> (Tensor, Tensor)")
native.define(
    "topk_merge_(Tensor(a!) values, Tensor(b!) indices, Tensor products, Tensor? bias, int first, bool last) -> ()"
)
native.define("transpose_16_(Tensor(a!) out, Tensor x) -> ()")

# Bytes of a row block's column and of a feature tile's row: 2048 x 2048 in fp32, 4096 x 1024 in 16 bits. On Zen 4
# torch's matmul is then at its rate for whole matrices or above it (95 GFLOP/s a core in fp32 against 93); with 512
# rows in fp32 it packs the weights so often that it loses 6%. Where both are widened from 16 bits and so take memory of
# their own, 1024 x 768 (Emerald Rapids: 3% slower than 2048 x 1024, half of its memory).
_ROWS, _FEATURES = 8192, 512
_WIDENED_ROWS, _WIDENED_FEATURES = 4096, 192

# torch's bf16 matmul takes weights of unit stride over d 7% faster (Zen 4, 217 against 203 GFLOP/s a core), for which a
# tile is transposed: as long as 30 rows take.
_TRANSPOSE_ROWS = 512


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, b_dec: Tensor | None, relu: bool):
    from rmfast.kernels.topk_encode import triton

    if (cause := triton.why_not(x, k)) is None:
        return triton.topk_encode(x, weight, bias, k, b_dec, relu)
    if _backends.requested() == "triton":
        raise _backends.BackendError(f"Backend 'triton' cannot run topk_encode: {cause}")
    return _reference.topk_encode(x, weight, bias, k, b_dec, relu)


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU's matmul in dtype is no slower than in fp32 (that of fp16 is 200 times, on Zen 4)."""
    return _backends.bf16_matmul_pays() if dtype == torch.bfloat16 else dtype != torch.float16


def _cpp(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, b_dec: Tensor | None, relu: bool):
    """Products of some rows and features at a time, merged into the rows' k largest.

    Nearly all time is the product's: torch's, as no other is as fast on every CPU (AMX, AVX-512 BF16, MKL), but in fp32
    on AMD's CPUs the one of `linear`.
    """
    merge = torch.ops.rmfast_native.topk_merge_
    n, width = x.size(0), weight.size(1)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    stored = x.dtype if _multiplies(x.dtype) else dtype
    values, indices = _topk_encode_fake(x, weight, bias, k)
    wide = stored != x.dtype
    rows = min(n, (_WIDENED_ROWS if wide else _ROWS) // stored.itemsize)
    features = min(width, (_WIDENED_FEATURES if wide else _FEATURES) * stored.itemsize)
    multiply = _products(weight, features, stored, wide, rows)
    centred = None if b_dec is None else x.new_empty(rows, x.size(1))
    for i in range(0, n, rows):
        block = x[i : i + rows]
        if b_dec is not None and centred is not None:
            block = torch.sub(block, b_dec, out=centred[: block.size(0)])
        block = block.to(stored)
        for j in range(0, width, features):
            out = multiply(block, j)
            some = None if bias is None else bias[j : j + features]
            merge(values[i : i + rows], indices[i : i + rows], out, some, j, j + features >= width)
    return values.relu_() if relu else values, indices


def _products(
    weight: Tensor, features: int, stored: torch.dtype, wide: bool, rows: int
) -> Callable[[Tensor, int], Tensor]:
    """Function of rows (n, d) and a tile's first feature: their products (n, at most `features`), until the next."""
    space = weight.new_empty(rows * features, dtype=stored)

    def out_for(block: Tensor, tile: Tensor) -> Tensor:
        return space[: block.size(0) * tile.size(1)].view(block.size(0), -1)

    if stored == torch.float32 and _backends.fp32_linear_pays(stored)[0] and 1 in weight.stride():
        linear, across = torch.ops.rmfast_native.linear_.default, weight.stride(1) == 1

        def ours(block: Tensor, j: int) -> Tensor:
            tile = weight[:, j : j + features]
            out = out_for(block, tile)
            linear(out, block if block.stride(1) == 1 else block.contiguous(), tile if across else tile.T, None, across)
            return out

        return ours
    tile_of = _tiles(weight, features, stored, wide, rows)

    def torchs(block: Tensor, j: int) -> Tensor:
        tile = tile_of(j)
        return torch.mm(block, tile, out=out_for(block, tile))

    return torchs


def _tiles(weight: Tensor, features: int, stored: torch.dtype, wide: bool, rows: int) -> Callable[[int], Tensor]:
    """Function of the first feature of a tile (d, at most `features`) in the dtype and layout that are multiplied."""
    by_row = weight.stride(1) == 1

    def part(j: int) -> Tensor:
        return weight[:, j : j + features]

    if wide:
        shape = (weight.size(0), features) if by_row else (features, weight.size(0))
        space = weight.new_empty(shape, dtype=stored)
        space = space if by_row else space.T
        return lambda j: space[:, : part(j).size(1)].copy_(part(j))
    if stored == torch.bfloat16 and rows >= _TRANSPOSE_ROWS and by_row:
        turned = weight.new_empty(features, weight.size(0))

        def transposed(j: int) -> Tensor:
            out = turned[: part(j).size(1)]
            torch.ops.rmfast_native.transpose_16_(out, part(j))
            return out.T

        return transposed
    return part


_backends.register("topk_encode", triton=lambda: _triton, cpp=lambda: _cpp, eager=lambda: _reference.topk_encode)


def topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    b_dec: Tensor | None = None,
    relu: bool = True,
) -> tuple[Tensor, Tensor]:
    """The k largest features of each row: relu(top k of (x − b_dec) W + b), with no (N, F) array in memory.

    The encoder of a TopK sparse autoencoder (arXiv 2406.04093; in reward-lens, arXiv 2604.26130, k = 32). Products are
    made for some rows and features at a time and merged into the rows' k largest.

    Rounding: x − b_dec is rounded to x's dtype, as SAELens does. Products are accumulated in float32 (float64 for
    float64), and for 16-bit inputs not rounded, but by the C++ backend in bfloat16 on a CPU whose matmul is faster in
    it (AMX, or AVX-512 BF16 on AMD): there the sum over d is rounded to bfloat16 once, before the bias is added. The
    bias is added, and the largest are chosen, in float32.

    Args:
        x: (N, d), float64, float32, bfloat16 or float16, any strides.
        weight: (d, F), W_enc as SAELens keeps it, in x's dtype; any strides, so `.T` of an (F, d) one as well.
        bias: (F,) or None.
        k: how many, from 1 to F.
        b_dec: (d,), subtracted from each row, or None.
        relu: whether values below 0 become 0; the order and the indices are those before it.

    Returns:
        values (N, k) in float32 (float64 for float64 x), largest first, and indices (N, k) int64. Equal values stand in
        the order of their indices, of which the lowest are taken. NaN is above all values, as for `torch.topk`: a row
        with NaN gives NaN at features 0 to k − 1. The same call gives the same bits; the C++ backend's matmul may round
        a row differently beside other rows.

    Raises:
        ValueError: a shape or device that does not fit, k outside of 1 to F; inputs that require grad while gradients
            are on: the op has none.
        TypeError: a dtype that is not supported or not x's, or an argument that is no tensor, or k no int.
        rmfast.BackendError: a backend asked for by name cannot run (Triton in float64 and above k = 256).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"Expected x to be a torch.Tensor, got {type(x).__name__}")
    expect_dtype(x.dtype in FLOATS, "x", "float64, float32, bfloat16 or float16", x.dtype)
    expect(x.dim() == 2, "x", "of shape (N, d)", tuple(x.shape))
    if weight is None:
        raise TypeError("Expected weight to be a torch.Tensor, got NoneType")
    checked(weight, "weight", (x.size(1), None), x)
    expect_dtype(weight.dtype == x.dtype, "weight", f"{x.dtype}, that of x", weight.dtype)
    checked(bias, "bias", (weight.size(1),), x)
    checked(b_dec, "b_dec", (x.size(1),), x)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"Expected k to be an int, got {type(k).__name__}")
    expect(1 <= k <= weight.size(1), "k", f"from 1 to the number of features, {weight.size(1)}", k)
    expect_no_grad("topk_encode", x=x, weight=weight, bias=bias, b_dec=b_dec)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    bias = None if bias is None else bias.to(dtype).contiguous()
    args = (x, weight, bias, k, None if b_dec is None else b_dec.to(x.dtype), flag("relu", relu))
    return _topk_encode(*args) if direct(args) else torch.ops.rmfast.topk_encode(*args)


def _topk_encode(x, weight, bias, k, b_dec, relu):
    run = _backends.choose("topk_encode", x.device.type)
    return _topk_encode_fake(x, weight, bias, k) if x.size(0) == 0 else run(x, weight, bias, k, b_dec, relu)


def _topk_encode_fake(x, weight, bias, k, b_dec=None, relu=True):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.size(0), k), dtype=dtype), x.new_empty((x.size(0), k), dtype=torch.int64)


lib.impl("topk_encode", _topk_encode, "CompositeExplicitAutograd")
torch.library.register_fake("rmfast::topk_encode", _topk_encode_fake, lib=lib)
torch.library.register_autograd("rmfast::topk_encode", no_gradient("topk_encode"), lib=lib)
