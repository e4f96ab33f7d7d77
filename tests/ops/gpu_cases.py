"""Each Triton kernel at shapes of real models, as its launcher launches it: what `make gpu-dry` compiles and reads.

Nothing runs, and the tensors hold nothing (device `meta`): a launcher that read one on the host would fail here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rmfast.kernels.binned_mmd import triton as binned_mmd
from rmfast.kernels.neuron_stats import triton as neuron_stats
from rmfast.kernels.patch_rows import triton as patch_rows
from rmfast.kernels.reward_head import reference
from rmfast.kernels.reward_head import triton as reward_head
from rmfast.kernels.suffix_attention import triton as suffix_attention
from rmfast.kernels.tcrm import triton as tcrm
from rmfast.kernels.token_wise import triton as token_wise
from rmfast.kernels.topk_encode import triton as topk_encode

BF16, FP16, FP32, INT, LONG = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64
ROWS = 16384


def of(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def head(dtype: torch.dtype, d: int, heads: int, directions: int = 0, interventions: int = 8, layer: bool = False):
    norm = reference.LAYER if layer else reference.RMS
    wide = lambda *shape: of(*shape, dtype=FP32)  # noqa: E731
    some = directions > 0
    return lambda: reward_head.forward(
        of(1, ROWS, d, dtype=dtype), of(heads, d, dtype=dtype), None, norm, of(d, dtype=dtype),
        of(d, dtype=dtype) if layer else None, 1e-6, None, wide(directions, d) if some else None,
        wide(interventions, directions) if some else None, wide(interventions, directions) if some else None, None,
    )  # fmt: skip


def head_gradient(d: int, heads: int):
    wide = lambda *shape: of(*shape, dtype=FP32)  # noqa: E731
    return lambda: reward_head.backward(
        wide(ROWS, heads), of(1, ROWS, d), wide(heads, d), reference.RMS, wide(d), 1e-6, None, True, True
    )


def attention(
    d: int, heads: int, kv_heads: int, dtype: torch.dtype = BF16, suffixes: int = 64, softcap: float = 0.0,
    window: int = 0,
):  # fmt: skip
    cu, start = of(suffixes + 1, dtype=INT), of(suffixes, dtype=INT)
    q, k, pool = (of(n, h, d, dtype=dtype) for n, h in ((ROWS, heads), (ROWS, kv_heads), (2048, kv_heads)))
    return lambda: suffix_attention.forward(q, k, k, cu, None, pool, pool, start, start, d**-0.5, True, softcap, window)


def rms_norm(d: int, residual: bool = True):
    return lambda: token_wise.rms_norm(of(ROWS, d), of(d), of(ROWS, d) if residual else None, None, 1e-5, False)


def rotary(d: int, heads: int, kv_heads: int, norm: bool = False):
    gain = of(d) if norm else None
    return lambda: token_wise.rotary(
        of(ROWS, heads, d), of(ROWS, kv_heads, d), of(ROWS, d), of(ROWS, d), gain, gain, 1e-6, False
    )


def gated(kind: int):
    return lambda: token_wise.gated_activation(of(ROWS, 14336), of(ROWS, 14336), kind)


def patched(d: int):
    rows = of(ROWS, dtype=LONG)
    return lambda: patch_rows.patch_rows(of(512, d), of(512, d), rows, rows, of(d), 1e-5, False)


def statistics(n: int):
    return lambda: neuron_stats.neuron_stats(of(n, 14336), of(n, 4, dtype=INT), of(4, dtype=torch.float64))


def encoded(d: int, features: int, k: int):
    return lambda: topk_encode.topk_encode(of(1024, d), of(d, features), of(features, dtype=FP32), k, None, True)


def mmd(features: int):
    rows = of(1024, dtype=FP32)
    ranges = of(4, 1024, dtype=LONG)
    return lambda: binned_mmd.forward(of(1024, features, dtype=FP32), ranges, rows, rows, of(5, dtype=FP32), True)


def pairs():
    values, bounds = of(4096), of(4, 64, dtype=LONG)
    return lambda: tcrm.forward(values, values, bounds, None, 0.1, 0.01, True)


CASES: dict[str, dict[str, Callable[[], object]]] = {
    "reward_head": {
        "bf16 d 2048 K 1": head(BF16, 2048, 1),
        "bf16 d 4096 K 1": head(BF16, 4096, 1),
        "bf16 d 4096 K 4": head(BF16, 4096, 4),
        "bf16 d 4096 K 6": head(BF16, 4096, 6),
        "bf16 d 4096 K 8": head(BF16, 4096, 8),
        "bf16 d 4096 K 16": head(BF16, 4096, 16),
        "bf16 d 2048 K 1 layer norm": head(BF16, 2048, 1, layer=True),
        "bf16 d 2048 K 1 J 3 I 8": head(BF16, 2048, 1, 3),
        "bf16 d 2048 K 1 J 4 I 8": head(BF16, 2048, 1, 4),
        "bf16 d 2048 K 16 J 32 I 8": head(BF16, 2048, 16, 32),
        "fp32 d 2048 K 1": head(FP32, 2048, 1),
        "fp32 d 2048 K 16": head(FP32, 2048, 16),
        "gradient bf16 d 4096 K 1": head_gradient(4096, 1),
        "gradient bf16 d 4096 K 16": head_gradient(4096, 16),
    },
    "suffix_attention": {
        "bf16 D 64": attention(64, 9, 3),
        "bf16 D 128": attention(128, 32, 8),
        "bf16 D 64, suffixes of one row": attention(64, 9, 3, suffixes=ROWS),
        "bf16 D 128, suffixes of one row": attention(128, 32, 8, suffixes=ROWS),
        "bf16 D 256": attention(256, 16, 8),
        "bf16 D 256 softcap window": attention(256, 16, 8, softcap=50.0, window=4096),
        "fp16 D 128 window": attention(128, 32, 8, FP16, window=4096),
        "fp32 D 64": attention(64, 9, 3, FP32),
        "fp32 D 128": attention(128, 32, 8, FP32),
    },
    "token_wise": {
        "rms_norm d 576": rms_norm(576),
        "rms_norm d 2048": rms_norm(2048),
        "rms_norm d 4096": rms_norm(4096),
        "rms_norm d 8192": rms_norm(8192),
        "rms_norm d 4096 without residual": rms_norm(4096, False),
        "rotary D 64, 9 and 3 heads": rotary(64, 9, 3),
        "rotary D 128, 32 and 8 heads": rotary(128, 32, 8),
        "rotary D 128, norms": rotary(128, 32, 8, True),
        "silu": gated(0),
        "gelu": gated(1),
        "gelu by tanh": gated(2),
    },
    "patch_rows": {"d 2048": patched(2048), "d 4096": patched(4096)},
    "neuron_stats": {"128 texts": statistics(128), "512 texts": statistics(512)},
    "topk_encode": {"d 2048 k 32": encoded(2048, 65536, 32), "d 4096 k 64": encoded(4096, 65536, 64)},
    "binned_mmd": {"rewards": mmd(1), "representations": mmd(8)},
    "tcrm": {"pairs": pairs()},
}
