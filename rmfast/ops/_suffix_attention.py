"""`suffix_attention`: attention of ragged suffixes over shared prefixes and themselves."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from rmfast import backends as _backends
from rmfast.arguments import flag
from rmfast.kernels.suffix_attention import reference as _reference
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

MAX_HEAD_DIM = 256

define(
    "suffix_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_queries, Tensor? prefix_k, Tensor? prefix_v, "
    "Tensor? prefix_start, Tensor? prefix_len, float scale, bool causal, float softcap, int window, "
    "Tensor? sinks=None, Tensor? alibi=None) -> (Tensor, Tensor)",
)
native.define(
    "suffix_seen_keys(Tensor ends, Tensor asks, Tensor? start, Tensor? length, int queries, int keys, int pool, "
    "bool causal, int window) -> Tensor"
)
for _name in ("suffix_attention_seen", "suffix_attention_wgmma"):
    native.define(
        _name + "(Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor seen, float scale, "
        "float softcap, Tensor? sinks, Tensor? alibi) -> (Tensor, Tensor)"
    )


def _triton():
    from rmfast.kernels.suffix_attention import triton

    return triton.forward


def _cuda():
    from rmfast.kernels.suffix_attention import cuda

    return cuda.forward


def _cuda_refuses(*args):
    from rmfast.kernels.suffix_attention import cuda

    return cuda.refuses(*args)


def _varlen():
    from rmfast.kernels.suffix_attention import varlen

    return varlen.forward


def _varlen_refuses(*args):
    from rmfast.kernels.suffix_attention import varlen

    return varlen.refuses(*args)


_backends.register(
    "suffix_attention",
    refusals={"cuda": _cuda_refuses, "varlen": _varlen_refuses},
    cuda=_cuda,
    triton=_triton,
    varlen=_varlen,
    cpp=lambda: torch.ops.rmfast_native.suffix_attention.default,
    eager=lambda: _reference.forward,
)


def suffix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_start: Tensor | None = None,
    prefix_len: Tensor | None = None,
    *,
    cu_queries: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of S ragged suffixes, laid end to end, each over a stretch of a shared prefix pool and its own rows.

    The keys of suffix s are `prefix_k[prefix_start[s] : prefix_start[s] + prefix_len[s]]`, at positions 0, 1, ..., then
    its own rows `k[cu_seqlens[s] : cu_seqlens[s + 1]]`, so its row i sits at position prefix_len[s] + i. Prefixes
    are read where they lie; suffixes with one prefix_start share them, and longer prefixes may contain shorter ones.

    Args:
        q: (N, Hq, D), or (M, Hq, D) with cu_queries, after rotary embedding; float64, float32, bfloat16 or float16.
            D is a multiple of 8, at most 256. Like k and v it may be a strided view (a slice of a fused projection)
            with a contiguous last dimension.
        k: (N, Hkv, D) with Hq a multiple of Hkv, q's dtype; head h of q reads head h // (Hq // Hkv).
        v: (N, Hkv, D).
        cu_seqlens: (S + 1,), int32 or int64: 0, then the suffixes' ends, the last of them N. Suffixes may be empty.
        prefix_k: (P, Hkv, D), after rotary embedding, or None with the three below for suffixes without prefixes.
        prefix_v: (P, Hkv, D).
        prefix_start: (S,), int32 or int64, rows of the pool; ignored where prefix_len is 0.
        prefix_len: (S,), int32 or int64; 0 is a suffix without a prefix.
        cu_queries: (S + 1,), int32 or int64: 0, then the ends of each suffix's rows in q, which are its last rows (in
            a last layer of which one token is read, one row), at most as many as it has in k; None for all.
        scale: of the logits; None is D ** -0.5. Finite and above 0.
        causal: rows see keys at positions up to their own; otherwise the whole prefix and all rows of their suffix.
        softcap: logits s become softcap · tanh(s / softcap) before masking (Gemma 2); None for none.
        window: causal: keys at positions above own − window (the query itself counts); otherwise keys at a distance
            of at most `window` to either side, as transformers' bidirectional sliding attention. None for none.
        sinks: (Hq,), a floating dtype: a logit for each head that joins the softmax's denominator and has no value
            (gpt-oss), whatever the window. Neither scale nor softcap applies to it. None for none.
        alibi: (Hq,), a floating dtype: slopes. alibi[h] · position of the key is added to logits, after scale and
            softcap (ALiBi as in transformers: a key's position counts from its text's first token). None for none.

    Returns:
        out: q's shape and dtype, contiguous.
        lse: q.shape[:2], the log-sum-exp of the row's logits, that of a sink included, in float32 (float64 for
            float64 q).

        Sums are in float32 (float64 for float64 q). In the C++ and Triton kernels a row's bits depend only on its
        text: not on where that is cut into prefix and suffix, on what else is in the batch, where it lies in memory or
        how many threads run.
        Non-finite values stay within the suffixes that have them among their keys.

    Raises:
        ValueError: a shape, stride, device or option that does not fit; cu_seqlens that does not rise from 0 to N, or
            a prefix outside the pool (both read on the CPU only; on CUDA unchecked unless RMFAST_CHECK=1); inputs that
            require grad while gradients are on: the op has none.
        TypeError: a dtype that is not supported, or an argument that is no tensor.
        rmfast.BackendError: a backend asked for by name cannot run.
    """
    if not isinstance(q, Tensor):
        raise TypeError(f"Expected q to be a torch.Tensor, got {type(q).__name__}")
    expect_dtype(q.dtype in FLOATS, "q", "float64, float32, bfloat16 or float16", q.dtype)
    expect(q.dim() == 3, "q", "of shape (N, Hq, D)", tuple(q.shape))
    rows, heads, d = q.shape
    expect(d % 8 == 0 and 8 <= d <= MAX_HEAD_DIM, "q.size(2), the head size,", "a multiple of 8 up to 256", d)
    expect(rows == 0 or q.stride(-1) == 1, "q.stride(-1)", "1", q.stride(-1))
    _floats(k, "k", (rows if cu_queries is None else None, None, d), q)
    kv_heads = k.size(1)
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        expect(False, "k.size(1), the number of key heads,", f"a divisor of the {heads} heads of q", kv_heads)
    _floats(v, "v", (k.size(0), kv_heads, d), q)
    _integers(cu_seqlens, "cu_seqlens", None, q)
    expect(cu_seqlens.numel() >= 1, "cu_seqlens", "of shape (S + 1,)", tuple(cu_seqlens.shape))
    if cu_queries is not None:
        _integers(cu_queries, "cu_queries", cu_seqlens.numel(), q)
    pool = {"prefix_k": prefix_k, "prefix_v": prefix_v, "prefix_start": prefix_start, "prefix_len": prefix_len}
    if any(value is not None for value in pool.values()):
        for name, value in pool.items():
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"Expected {name} to be a torch.Tensor, got {type(value).__name__}")
        for name, value in pool.items():
            expect(value is not None, name, "a tensor, as the other prefix arguments are", None)
        assert prefix_k is not None
        _floats(prefix_k, "prefix_k", (None, kv_heads, d), q)
        _floats(prefix_v, "prefix_v", (prefix_k.size(0), kv_heads, d), q)
        _integers(prefix_start, "prefix_start", cu_seqlens.numel() - 1, q)
        _integers(prefix_len, "prefix_len", cu_seqlens.numel() - 1, q)
    scale = _number(d**-0.5 if scale is None else scale, "scale")
    softcap = 0.0 if softcap is None else _number(softcap, "softcap")
    if window is not None and (isinstance(window, bool) or not isinstance(window, (int, torch.SymInt))):
        raise TypeError(f"Expected window to be an int, got {type(window).__name__}")
    expect(window is None or 1 <= window < 2**63, "window", "at least 1", window)
    checked(sinks, "sinks", (heads,), q)
    checked(alibi, "alibi", (heads,), q)
    expect_no_grad("suffix_attention", q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, sinks=sinks, alibi=alibi)
    args = (
        q, k, v, cu_seqlens, cu_queries, prefix_k, prefix_v, prefix_start, prefix_len, scale, flag("causal", causal),
        softcap, window or 0, sinks, alibi,
    )  # fmt: skip
    return _suffix_attention(*args) if direct(args) else torch.ops.rmfast.suffix_attention(*args)


def _floats(value: Tensor | None, name: str, shape: tuple[int | None, ...], q: Tensor) -> None:
    if value is None:
        raise TypeError(f"Expected {name} to be a torch.Tensor, got None")
    checked(value, name, shape, q)
    if value.dtype != q.dtype:  # messages are made only where they are raised: 1 µs each
        expect_dtype(False, name, f"{q.dtype}, that of q,", value.dtype)
    if value.stride(-1) != 1:
        expect(value.numel() == 0, f"{name}.stride(-1)", "1", value.stride(-1))


def _integers(value: Tensor | None, name: str, size: int | None, q: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected {name} to be a torch.Tensor, got {type(value).__name__}")
    expect_dtype(value.dtype in (torch.int32, torch.int64), name, "int32 or int64", value.dtype)
    if value.dim() != 1 or (size is not None and value.numel() != size):
        expect(False, name, f"of shape {'(S + 1,)' if size is None else f'({size},)'}", tuple(value.shape))
    if value.device != q.device:
        expect(False, f"{name}.device", f"that of the first argument, {q.device}", value.device)


def _number(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Expected {name} to be a float, got {type(value).__name__}")
    expect(math.isfinite(value) and value > 0, name, "finite and above 0", value)
    return float(value)


def _check_values(
    rows: int, queries: int, cu_seqlens: Tensor, cu_queries: Tensor | None, pool: Tensor | None, start: Tensor | None,
    length: Tensor | None,
) -> None:  # fmt: skip
    """Checks that read tensors: always on the CPU, on CUDA (where they synchronise) only with RMFAST_CHECK=1.

    In NumPy, 10 µs a call: a tenth of a small call's time, where torch's own ops would take half of it.
    """
    if cu_seqlens.device.type != "cpu" and os.environ.get("RMFAST_CHECK") != "1":
        return
    ends = cu_seqlens.cpu().numpy()
    _check_ends("cu_seqlens", ends, rows, "k")
    if cu_queries is not None:
        asks = cu_queries.cpu().numpy()
        _check_ends("cu_queries", asks, queries, "q")
        more = (asks[1:] - asks[:-1]) > (ends[1:] - ends[:-1])
        if more.any():
            s = more.argmax()
            raise ValueError(
                f"Expected cu_queries to give suffix {s} at most its {ends[s + 1] - ends[s]} rows, got "
                f"{asks[s + 1] - asks[s]}"
            )
    if pool is None or start is None or length is None:
        return
    starts, lengths = start.cpu().numpy().astype("int64"), length.cpu().numpy().astype("int64")
    outside = (lengths < 0) | ((lengths > 0) & ((starts < 0) | (starts > pool.size(0) - lengths)))
    if outside.any():
        s = outside.argmax()
        raise ValueError(
            f"Expected prefix_start and prefix_len to stay in the {pool.size(0)} rows of prefix_k, got start "
            f"{starts[s]} and length {lengths[s]} for suffix {s}"
        )


def _check_ends(name: str, ends: Any, rows: int, of: str) -> None:
    if ends[0] != 0 or ends[-1] != rows:
        expect(ends[0] == 0, f"{name}[0]", "0", ends[0])
        expect(False, f"{name}[-1]", f"{rows}, the rows of {of}", ends[-1])
    falls = ends[1:] < ends[:-1]
    if falls.any():
        at = falls.argmax()
        raise ValueError(f"Expected {name} not to fall, got {ends[at : at + 2].tolist()} at {at}")


def _suffix_attention(
    q, k, v, cu_seqlens, cu_queries, prefix_k, prefix_v, prefix_start, prefix_len, scale, causal, softcap, window,
    sinks=None, alibi=None,
):  # fmt: skip
    cu_seqlens, cu_queries, start, length = (
        None if index is None else index.contiguous() for index in (cu_seqlens, cu_queries, prefix_start, prefix_len)
    )
    _check_values(k.size(0), q.size(0), cu_seqlens, cu_queries, prefix_k, start, length)
    if q.numel() == 0:
        return _suffix_attention_fake(q)
    acc = _reference.accumulator(q.dtype)
    sinks, alibi = (None if each is None else each.to(acc).contiguous() for each in (sinks, alibi))
    args = (
        q, k, v, cu_seqlens, cu_queries, prefix_k, prefix_v, start, length, scale, causal, softcap, window, sinks,
        alibi,
    )  # fmt: skip
    return _backends.choose("suffix_attention", q.device.type, args)(*args)


def _suffix_attention_fake(q, *args, **options):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=_reference.accumulator(q.dtype))


lib.impl("suffix_attention", _suffix_attention, "CompositeExplicitAutograd")
torch.library.register_fake("rmfast::suffix_attention", _suffix_attention_fake, lib=lib)
torch.library.register_autograd("rmfast::suffix_attention", no_gradient("suffix_attention"), lib=lib)
