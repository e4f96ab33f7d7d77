"""A small run of every GPU kernel, for compute-sanitizer: odd sizes, views, rows, interventions, gradients.

`TRITON_INTERPRET=1 python tests/ops/gpu_small.py cpu` is the Triton half in the interpreter.
"""

from __future__ import annotations

import sys

import torch

import rmfast
from rmfast.losses import binned_mmd, tcrm_loss
from rmfast.ops import (
    gated_activation,
    neuron_stats,
    patch_rows,
    reward_head,
    rms_norm,
    rotary,
    suffix_attention,
    topk_encode,
)


def main(device: str = "cuda") -> None:
    torch.manual_seed(0)
    torch.set_default_device(device)
    for backend in ("triton", "cuda") if device == "cuda" else ("triton",):
        with rmfast.backend(backend):
            for dtype in (torch.bfloat16, torch.float32, torch.float64):
                for d, K, J in ((59, 1, 0), (136, 3, 2), (256, 20, 9)):
                    hidden = torch.randn(3, 7, d + 8).to(dtype)[:, 1:, 3 : 3 + d]
                    weight, gain = torch.randn(K, d), torch.randn(d)
                    rows = torch.tensor([0, 17, 3, 3])
                    extra = {}
                    if J:
                        P = torch.randn(J, d) / d**0.5
                        extra = {"directions": P, "strengths": torch.rand(2, J)}
                    for norm in ("rms", "layer"):
                        reward_head(hidden, weight, norm=norm, norm_weight=gain, **extra)
                        reward_head(hidden, weight, norm=norm, norm_weight=gain, rows=rows, **extra)
                    leaf = hidden.detach().requires_grad_()
                    reward_head(leaf, weight.requires_grad_(), norm="rms", norm_weight=gain).sum().backward()
                outside = 9 if device == "cuda" else 5  # a GPU gives NaN there
                base_rows, value_rows = torch.tensor([[0, 5, 2, outside, 1], [-1, 1, -1, 0, outside]])
                for d in (59, 256, 4104, 20000):
                    buffer, gain = torch.randn(2, 6, d + 8).to(dtype), torch.randn(d)
                    for base, values in (buffer[..., :d], buffer[..., 3 : 3 + d]):
                        patch_rows(base, values, base_rows, value_rows, gain)
                        patch_rows(base, values, base_rows, value_rows, gain.to(dtype), gemma=True)
    with rmfast.backend("triton"):
        for n, m in ((2, 3), (37, 70), (600, 5)):
            buffer = torch.randn(n + 1, m + 3).relu().bfloat16()
            for x in (buffer[1:, 1 : m + 1], buffer[1:, 1 : m + 1].float(), buffer[1:, 1 : m + 1].T.contiguous().T):
                neuron_stats(x, torch.randn(n, 3))
        for dtype in (torch.bfloat16, torch.float32):
            for n, d, features, k in ((3, 5, 7, 7), (70, 64, 2048, 32), (2, 33, 700, 200)):
                buffer = torch.randn(n + d, features + d + 1).to(dtype)
                x, weight = buffer[:n, 1 : d + 1], buffer[n:, d + 1 :]
                topk_encode(x, weight, weight[0], k, b_dec=x[0])
                topk_encode(x.contiguous(), weight.T.contiguous().T, None, k)
            values = torch.randn(2, 2061).to(dtype)[:, 1:].requires_grad_()
            ends = torch.tensor([0, 5, 6, 2060])
            tcrm_loss(*values, ends, ends, margin=torch.rand(3))[0].backward()
            for shape in ((150,), (150, 3)):
                x = torch.randn(shape).to(dtype).requires_grad_()
                index = torch.arange(150)
                binned_mmd(x, index % 7, groups=index % 2, bandwidth=[0.5, 2.0]).backward()
        for dtype in (torch.bfloat16, torch.float32):
            cu, start, length = (
                torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 3, 70, 71], [0, 5, 0, 9], [5, 0, 0, 31])
            )
            for size, options in ((64, {}), (16, {"softcap": 20.0, "window": 9}), (80, {"window": 1})):
                q, k, v = torch.randn(71, 6, size), torch.randn(71, 2, size), torch.randn(71, 2, size)
                pool = torch.randn(2, 40, 2, size).to(dtype)
                given = (*(t.to(dtype) for t in (q, k, v)), cu, *pool, start, length)
                suffix_attention(*given, scale=0.3, **options)
                asked = torch.tensor([0, 1, 1, 3, 4], dtype=torch.int32)  # the last rows of each suffix
                suffix_attention(q[:4].to(dtype), *given[1:], scale=0.3, cu_queries=asked, **options)
            for n, d in ((1, 59), (37, 256), (3, 4104)):
                x, y, w = torch.randn(n, d).to(dtype), torch.randn(n, d).to(dtype), torch.randn(d).to(dtype)
                rms_norm(x, w, eps=1e-6)
                rms_norm(x, w, residual=y, post_weight=w, eps=1e-6, gemma=True)
                for kind in ("silu", "gelu", "gelu_tanh"):
                    gated_activation(x, y, kind=kind)
            q, k, turn = torch.randn(37, 6, 20).to(dtype), torch.randn(37, 2, 20).to(dtype), torch.randn(2, 37, 16)
            rotary(q, k, *turn.to(dtype))
            rotary(q, k, *turn.to(dtype), q_norm=torch.randn(20), k_norm=torch.randn(20))
    if device == "cuda":
        torch.cuda.synchronize()
    print("ran every kernel")


if __name__ == "__main__":
    main(*sys.argv[1:])
